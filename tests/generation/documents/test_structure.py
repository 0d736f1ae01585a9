from __future__ import annotations

import pytest

from megatron_longpo.generation.documents.structure import PARAGRAPH, find_borders
from tests.generation.documents.test_kinds import TEXTS


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("markdown", {"## Part": 2, "# More": 1}),
        ("rst", {"Part": 1}),
        ("latex", {"\\section": 2}),
        ("code", {"class A": 0, "def f": 0}),
        ("text", {"From": PARAGRAPH}),
    ],
)
def test_borders(kind: str, expected: dict[str, int]) -> None:
    text = TEXTS[kind]
    borders = find_borders(text, kind)  # type: ignore[arg-type]
    found = dict(zip(borders.positions.tolist(), borders.ranks.tolist(), strict=True))
    outer = {position: rank for position, rank in found.items() if rank < PARAGRAPH}
    expected_at = {text.index(start): rank for start, rank in expected.items()}
    assert (outer or found) == expected_at
