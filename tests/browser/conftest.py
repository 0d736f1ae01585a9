from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

NAMES = ("chromium", "chromium-headless-shell", "google-chrome", "chromium-browser")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium that is on the machine (LONGPO_CHROMIUM, or on the PATH)."""
    from playwright.sync_api import sync_playwright

    found = os.environ.get("LONGPO_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.fail("no Chromium found: apt-get install chromium, or set LONGPO_CHROMIUM to one")
    with sync_playwright() as playwright:
        # Containers run as root, where Chromium's sandbox cannot start.
        launched = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield launched
        launched.close()
