"""A row of the public schema by hand, and the ways to save rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_longpo.data.rows.schema import PreferenceRow

EOS = 2
"""Also the pad id, to show that only the mask tells padding."""


def columns(**changes: Any) -> dict[str, Any]:
    """A row of two turns whose prompt is 10..., with padding of every kind that is allowed."""
    row = {
        "chosen_input_ids": [10, 11, 12, 5, EOS, 13, 6, EOS],
        "chosen_attention_mask": [1] * 8,
        "chosen_labels": [-100, -100, -100, 5, EOS, -100, 6, EOS],
        "rejected_input_ids": [10, 11, 12, 7, EOS, 13, 8, EOS, EOS, EOS],
        "rejected_attention_mask": [1] * 8 + [0, 0],
        "rejected_labels": [-100, -100, -100, 7, EOS, -100, 8, EOS, EOS, -100],
        "ref_chosen_input_ids": [[10, 12, 5, EOS], [13, 6, EOS, EOS]],
        "ref_chosen_attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0]],
        "ref_chosen_labels": [[-100, -100, 5, EOS], [-100, 6, EOS, -100]],
        "ref_rejected_input_ids": [[10, 12, 7, EOS], [13, 8, EOS]],
        "ref_rejected_attention_mask": [[1, 1, 1, 1], [1, 1, 1]],
        "ref_rejected_labels": [[-100, -100, 7, EOS], [-100, 8, EOS]],
    }
    return {**row, **changes}


def write_lines(path: Path, *values: Any) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def assert_is_the_row(row: PreferenceRow) -> None:
    assert row.chosen.input_ids.tolist() == [10, 11, 12, 5, EOS, 13, 6, EOS]
    assert row.rejected.input_ids.tolist() == [10, 11, 12, 7, EOS, 13, 8, EOS]
    assert row.rejected.labels.tolist() == [-100, -100, -100, 7, EOS, -100, 8, EOS]
    assert [t.input_ids.tolist() for t in row.reference_chosen] == [[10, 12, 5, EOS], [13, 6, EOS]]
    assert [t.labels.tolist() for t in row.reference_chosen] == [
        [-100, -100, 5, EOS],
        [-100, 6, EOS],
    ]
    assert [len(t) for t in row.reference_rejected] == [4, 3]
    assert row.chosen.input_ids.dtype == row.reference_rejected[1].labels.dtype == np.int64


def save_jsonl(rows: list[dict[str, Any]], folder: Path) -> str:
    return write_lines(folder / "rows.jsonl", *rows)


def save_arrow(rows: list[dict[str, Any]], folder: Path) -> str:
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "arrow"))
    return str(folder / "arrow")


def save_split(rows: list[dict[str, Any]], folder: Path) -> str:
    import datasets

    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})
    splits.save_to_disk(str(folder / "splits"))
    return str(folder / "splits")


def save_parquet(rows: list[dict[str, Any]], folder: Path) -> str:
    import datasets

    (folder / "parquet" / "data").mkdir(parents=True)
    for number, row in enumerate(rows):
        dataset = datasets.Dataset.from_list([row])
        dataset.to_parquet(str(folder / "parquet" / "data" / f"train-{number:05}.parquet"))
    return str(folder / "parquet")


def save_json(rows: list[dict[str, Any]], folder: Path) -> str:
    (folder / "rows.json").write_text("\ufeff \n" + json.dumps(rows, indent=1), encoding="utf-8")
    return str(folder / "rows.json")


Save = Callable[[list[dict[str, Any]], Path], str]

SAVERS: list[Save] = [
    save_jsonl,
    save_arrow,
    save_split,
    save_parquet,
    save_json,
]
