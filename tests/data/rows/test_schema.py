from __future__ import annotations

import json
from pathlib import Path

from megatron_longpo.data.rows.dataset import open_rows
from megatron_longpo.data.rows.schema import row_columns
from tests.data.rows.row_files import columns, write_lines


def test_columns_are_plain_lists(tmp_path: Path) -> None:
    values = row_columns(open_rows(write_lines(tmp_path / "rows.jsonl", columns()))[0])
    assert json.loads(json.dumps(values)) == values
    assert values["chosen_labels"] == columns()["chosen_labels"]
    assert values["ref_chosen_attention_mask"] == [[1] * 4, [1] * 3]
