"""Near-duplicates: MinHash sketches of word 5-grams, compared through locality-sensitive hashing.

The sketches and the index are rensa's. A document of 200,000 characters takes about 15 ms, and one
that is kept about 3.5 KB of memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

from megatron_longpo.errors import UserError

_WORDS_PER_SHINGLE = 5
_NUM_HASHES = 128
_LEAST_RECALL = 0.999
"""Of pairs that are barely alike enough, the share that is compared by their whole sketches."""

_SEED = 42
_BATCH = 10_000

SPACELESS = r"\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
"""Scripts without spaces, for a class of a regular expression: a character counts as a word."""

_WORD = re.compile(rf"[{SPACELESS}]|[^\W_]+")


class NearDuplicates:
    """Compares each document with those before it; of those that are alike, the first is kept."""

    def __init__(self, similarity: float) -> None:
        """Takes the least Jaccard similarity of the sets of 5-grams at which two are alike."""
        try:
            import rensa
        except ImportError as error:
            raise UserError(
                f"near_duplicates ({similarity}): needs rensa (pip install rensa); "
                "set near_duplicates: null to keep documents that are much alike"
            ) from error
        self._sketch: Any = rensa.RMinHash
        self._kept: Any = rensa.RMinHashDeduplicator(
            similarity, _NUM_HASHES, use_lsh=True, num_bands=_num_bands(similarity), seed=_SEED
        )

    def add(self, name: str, text: str) -> str | None:
        """Keeps a document, or returns the name of an earlier one that it is like."""
        sketch = self._sketch(num_perm=_NUM_HASHES, seed=_SEED)
        shingles = _shingles(text)
        empty = True
        # In batches: a sketch needs no list of all shingles.
        while batch := list(islice(shingles, _BATCH)):
            sketch.update(batch)
            empty = False
        if empty or self._kept.add(name, sketch):
            return None
        return str(min(self._kept.get_duplicates(sketch)))


def _num_bands(similarity: float) -> int:
    """Returns the fewest bands with enough recall; two are compared if a whole band agrees."""
    for num_bands in (1, 2, 4, 8, 16, 32, 64):
        missed = (1 - similarity ** (_NUM_HASHES // num_bands)) ** num_bands
        if 1 - missed >= _LEAST_RECALL:
            return num_bands
    return _NUM_HASHES


def _shingles(text: str) -> Iterator[str]:
    words: list[str] = []
    for match in _WORD.finditer(text):
        words.append(match[0].lower())
        if len(words) >= _BATCH:
            yield from _join(words)
            words = words[-_WORDS_PER_SHINGLE + 1 :]
    if words:
        yield from _join(words)


def _join(words: list[str]) -> Iterator[str]:
    for at in range(max(1, len(words) - _WORDS_PER_SHINGLE + 1)):
        yield " ".join(words[at : at + _WORDS_PER_SHINGLE])
