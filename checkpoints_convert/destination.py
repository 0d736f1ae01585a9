"""Output folders that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_longpo.errors import UserError


@contextmanager
def new_folder(
    destination: str, *, overwrite: bool, replaceable: Callable[[Path], bool]
) -> Iterator[Path]:
    """Yields a temporary folder, which is renamed to `destination` if the block succeeds.

    A destination that is not empty is refused without `overwrite`. With it, a destination that
    `replaceable` does not accept is refused too, since replacing deletes everything in it.
    """
    final = Path(destination).expanduser().absolute()
    _check(final, overwrite=overwrite, replaceable=replaceable)
    temporary = final.with_name(f".{final.name}.writing-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _put_in_place(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check(final: Path, *, overwrite: bool, replaceable: Callable[[Path], bool]) -> None:
    if not final.exists():
        return
    if not final.is_dir():
        raise UserError(f"{final}: exists and is not a folder; choose another destination")
    if not any(final.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{final}: exists and is not empty; choose another, or give --overwrite")
    if not replaceable(final):
        raise UserError(
            f"{final}: holds other things than an earlier result of this command, so --overwrite "
            "does not replace it; choose another destination"
        )


def _put_in_place(temporary: Path, final: Path) -> None:
    if not final.exists():
        temporary.rename(final)
        return
    old = final.with_name(f".{final.name}.old-{os.getpid()}")
    final.rename(old)
    temporary.rename(final)
    shutil.rmtree(old)
