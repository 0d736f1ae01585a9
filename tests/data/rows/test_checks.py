from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.data.rows.dataset import open_rows
from megatron_longpo.errors import UserError
from tests.data.rows.row_files import EOS, columns, write_lines


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen_labels": None}, r"lacks chosen_labels"),
        ({"chosen_labels": [-100] * 7}, r"chosen_input_ids has 8 tokens, .* its labels 7"),
        ({"chosen_labels": [-100] * 8}, r"chosen_labels marks no answer token"),
        ({"chosen_labels": [10] + [-100] * 7}, r"chosen_labels marks no answer token"),
        (
            {"chosen_labels": [-100, -100, 12, 6, EOS, -100, 6, EOS]},
            r"chosen_labels\[3\] is 6 where the token id is 5",
        ),
        (
            {"chosen_attention_mask": [0] + [1] * 7},
            r"chosen_attention_mask\[0\] is 0 before a 1; only padding on the right",
        ),
        (
            {"chosen_attention_mask": [1, 1, 0, 1, 1, 1, 1, 1]},
            r"chosen_attention_mask\[2\] is 0 before a 1",
        ),
        ({"chosen_attention_mask": [2] * 8}, r"chosen_attention_mask must hold only 0 and 1"),
        ({"ref_chosen_labels": None}, r"lacks ref_chosen_labels; .* both or neither of ref_chosen"),
        (
            {f"ref_rejected_{p}": None for p in ("input_ids", "attention_mask", "labels")},
            r"lacks ref_rejected_input_ids",
        ),
        ({"chosen_input_ids": [1.5] * 8}, r"chosen_input_ids must be a flat list of integers"),
        ({"chosen_input_ids": "text"}, r"chosen_input_ids must be a flat list of integers"),
        ({"chosen_input_ids": [[1], [2, 3]]}, r"chosen_input_ids must be a flat list"),
        ({"chosen_input_ids": [1, None]}, r"chosen_input_ids must be a flat list"),
        ({"ref_chosen_labels": [[-100]]}, r"ref_chosen has a different or no number of turns"),
        ({"ref_rejected_labels": 3}, r"ref_rejected_labels must be a list with one list"),
        (
            {"ref_chosen_labels": [[-100, -100, 5, EOS], [-100, 9, EOS, -100]]},
            r"ref_chosen_labels\[1\]\[1\] is 9 where the token id is 6",
        ),
        (
            {
                f"ref_rejected_{part}": columns()[f"ref_rejected_{part}"][:1]
                for part in ("input_ids", "attention_mask", "labels")
            },
            r"ref_chosen has 2 rows and ref_rejected 1",
        ),
        (
            {
                f"ref_{branch}_{part}": []
                for branch in ("chosen", "rejected")
                for part in ("input_ids", "attention_mask", "labels")
            },
            r"ref_chosen has a different or no number of turns",
        ),
    ],
)
def test_bad_rows_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    rows = open_rows(write_lines(tmp_path / "rows.jsonl", columns(), columns(**changes)))
    rows[0]
    with pytest.raises(UserError, match=rf"rows.jsonl:2: {message}") as caught:
        rows[1]
    assert "\n" not in str(caught.value)
