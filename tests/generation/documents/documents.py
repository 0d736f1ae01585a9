"""Made-up texts, and reading what a path holds."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from megatron_longpo.generation.documents.formats import ReadOptions
from megatron_longpo.generation.documents.reading import Document, DocumentSet


def prose(seed: int, num_words: int = 400) -> str:
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(3000)}" for _ in range(num_words))


def read(path: Path | str, **more: Any) -> tuple[list[Document], dict[str, int]]:
    options = ReadOptions(**more.pop("options", {}))
    documents = DocumentSet(str(path), options=options, **more)
    return list(documents), dict(documents.dropped)
