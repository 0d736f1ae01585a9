from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_longpo.data.jsonl import dump_line
from megatron_longpo.data.rows.dataset import open_rows
from megatron_longpo.data.rows.fitting import fit_row
from megatron_longpo.data.rows.schema import IGNORED_LABEL, PreferenceRow, TokenRow, row_columns
from megatron_longpo.data.rows.sources import open_source
from megatron_longpo.data.rows.writing import row_line, write_rows_jsonl
from megatron_longpo.errors import UserError

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


SAVERS: list[Callable[[list[dict[str, Any]], Path], str]] = [
    save_jsonl,
    save_arrow,
    save_split,
    save_parquet,
    save_json,
]


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("save", SAVERS)
def test_every_source_gives_the_same_rows(
    save: Callable[[list[dict[str, Any]], Path], str], tmp_path: Path
) -> None:
    # The public sets have further columns and no id.
    extra = {"chosen_lm_labels": [1, 2], "note": "x"}
    path = save([columns(**extra), columns(**extra)], tmp_path)
    rows = open_rows(path)
    assert len(rows) == 2
    for row in rows:
        assert_is_the_row(row)
    assert rows[1].id == rows[-1].id == "1"
    assert rows[1].source == (f"{path}:2" if save is save_jsonl else f"{path}[1]")
    with pytest.raises(IndexError):
        rows[2]


@pytest.mark.parametrize("save", SAVERS)
def test_fingerprint_follows_the_content_only(
    save: Callable[[list[dict[str, Any]], Path], str], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first = save([columns()], tmp_path / "a")
    other = save([columns(chosen_attention_mask=[1] * 5 + [0] * 3)], tmp_path / "b")
    moved = tmp_path / "moved" / Path(first).name
    moved.parent.mkdir()
    if Path(first).is_dir():
        shutil.copytree(first, moved)
    else:
        shutil.copy(first, moved)
    for file in [moved, *moved.rglob("*")]:
        os.utime(file, (1e9, 1e9))
    assert open_rows(str(moved)).fingerprint == open_rows(first).fingerprint
    assert open_rows(other).fingerprint != open_rows(first).fingerprint


def without_short_rows(**changes: Any) -> dict[str, Any]:
    return {name: value for name, value in columns(**changes).items() if "ref_" not in name}


@pytest.mark.parametrize("save", SAVERS)
def test_short_rows_may_be_absent(
    save: Callable[[list[dict[str, Any]], Path], str], tmp_path: Path
) -> None:
    rows = open_rows(save([without_short_rows(), without_short_rows()], tmp_path))
    for row in rows:
        assert row.reference_chosen == row.reference_rejected == ()
        assert row.chosen.input_ids.tolist() == columns()["chosen_input_ids"]
        assert [name for name, _ in row.named_rows()] == ["chosen_{}", "rejected_{}"]
        assert not any("ref_" in name for name in row_columns(row))


@pytest.mark.parametrize("save", SAVERS)
def test_rows_with_and_without_short_rows_may_be_mixed(
    save: Callable[[list[dict[str, Any]], Path], str], tmp_path: Path
) -> None:
    # Arrow gives the second row nulls.
    nulls = {name: None for name in columns() if "ref_" in name}
    rows = open_rows(save([columns(), columns(**nulls)], tmp_path))
    assert_is_the_row(rows[0])
    assert rows[1].reference_chosen == rows[1].reference_rejected == ()


@pytest.mark.parametrize("kind", ["list", "large_list", "fixed_size_list"])
def test_the_public_sets_columns(kind: str, tmp_path: Path) -> None:
    """int32 in Arrow, short rows padded to a rectangle, and columns that are not ours."""
    import datasets
    import pyarrow as pa

    def as_arrow(value: Any) -> Any:
        if not isinstance(value[0], list):
            return pa.array([value], pa.list_(pa.int32()))
        if kind == "fixed_size_list":
            return pa.array([value], pa.list_(pa.list_(pa.int32(), len(value[0]))))
        make = {"list": pa.list_, "large_list": pa.large_list}[kind]
        return pa.array([value], make(make(pa.int32())))

    padded = {
        "ref_rejected_input_ids": [[10, 12, 7, EOS], [13, 8, EOS, EOS]],
        "ref_rejected_attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0]],
        "ref_rejected_labels": [[-100, -100, 7, EOS], [-100, 8, EOS, -100]],
        "chosen_lm_labels": [1] * 8,
        "rejected_lm_labels": [1] * 10,
    }
    table = pa.table({name: as_arrow(value) for name, value in columns(**padded).items()})
    datasets.Dataset(table).save_to_disk(str(tmp_path / "public"))
    rows = open_rows(str(tmp_path / "public"))
    assert_is_the_row(rows[0])
    assert rows[0].id == "0"


def test_jsonl_lines_are_counted_with_blank_ones_and_ids_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = ["", json.dumps(columns(id="ü-1")), "  ", json.dumps(columns(id=7)), "{broken"]
    path.write_text("\ufeff".join([lines[0], lines[1]]) + "\n" + "\n".join(lines[2:]))
    rows = open_rows(str(path))
    assert len(rows) == 3
    assert (rows[1].id, rows[1].source) == ("7", f"{path}:3")
    with pytest.raises(UserError, match=r"rows.jsonl:4: not a JSON object"):
        rows[2]


def test_write_and_read_again(tmp_path: Path) -> None:
    row = open_rows(write_lines(tmp_path / "a.jsonl", columns(id="x")))[0]
    assert write_rows_jsonl(tmp_path / "deep" / "b.jsonl", [row, row]) == 2
    again = open_rows(str(tmp_path / "deep" / "b.jsonl"))
    assert_is_the_row(again[1])
    assert again[1].id == "x"
    assert os.listdir(tmp_path / "deep") == ["b.jsonl"]


def test_lines_are_those_of_the_standard_library(tmp_path: Path) -> None:
    row = open_rows(write_lines(tmp_path / "a.jsonl", columns()))[0]
    for row_id in ("x", '"é\u2028\\ \x7f\n\x01'):
        named = replace(row, id=row_id)
        assert row_line(named).decode() == dump_line(row_columns(named))


def test_failed_write_keeps_the_file_before(tmp_path: Path) -> None:
    row = open_rows(write_lines(tmp_path / "a.jsonl", columns()))[0]
    before = (tmp_path / "a.jsonl").read_bytes()

    def rows() -> Any:
        yield row
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rows_jsonl(tmp_path / "a.jsonl", rows())
    assert (tmp_path / "a.jsonl").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.jsonl"]


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


def test_bad_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.jsonl: no such file"):
        open_rows(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match=r"empty.jsonl: holds no rows"):
        open_rows(write_lines(tmp_path / "empty.jsonl"))
    with pytest.raises(UserError, match=r"neither a save_to_disk folder nor"):
        open_rows(str(tmp_path))
    (tmp_path / "broken.json").write_text('[{"id": 1},\n')
    with pytest.raises(UserError, match=r"broken.json: not a JSON list of objects \(.*line 2"):
        open_rows(str(tmp_path / "broken.json"))
    (tmp_path / "numbers.json").write_text("[1]")
    with pytest.raises(UserError, match=r"numbers.json\[0\]: is a JSON int, must be an object"):
        open_rows(str(tmp_path / "numbers.json"))[0]
    path = save_arrow([{"text": "x"}], tmp_path)
    with pytest.raises(UserError, match=r"arrow: lacks the column chosen_input_ids.*tokenize"):
        open_rows(path)
    with pytest.raises(UserError, match=r"arrow\[0\]: chosen_input_ids must be a flat list"):
        shutil.rmtree(path)
        open_rows(save_arrow([columns(chosen_input_ids=[1, None])], tmp_path))[0]
    (tmp_path / "arrow" / "data-00000-of-00001.arrow").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"arrow: not readable as a dataset folder"):
        open_rows(path)
    with pytest.raises(UserError, match=r"list.jsonl:1: holds a JSON list, must be an object"):
        open_rows(write_lines(tmp_path / "list.jsonl", [1]))[0]
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "\xe9\xff"}\n')
    with pytest.raises(UserError, match=r"latin.jsonl:1: not UTF-8 text"):
        open_rows(str(tmp_path / "latin.jsonl"))[0]


def test_splits(tmp_path: Path) -> None:
    import datasets

    parts = {name: datasets.Dataset.from_list([columns(id=name)]) for name in ("a", "b")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(UserError, match=r"two: has the splits a, b and none is called train"):
        open_rows(str(tmp_path / "two"))
    assert open_source(str(tmp_path / "two"), split="b").columns(0)["id"] == "b"
    with pytest.raises(UserError, match=r"two: .* none is called c; give the folder of one split"):
        open_source(str(tmp_path / "two"), split="c")
    for save in (save_jsonl, save_json, save_arrow, save_parquet):
        with pytest.raises(UserError, match=r"split \(b\): .* has no splits; leave split out"):
            open_source(save([columns()], tmp_path), split="b")


def test_hub_ids_go_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    splits = {"train": datasets.Dataset.from_list([columns()])}
    asked: list[str] = []

    def load(hub_id: str) -> Any:
        asked.append(hub_id)
        if hub_id == "owner/name-tokenized":
            return datasets.DatasetDict(splits)
        raise ConnectionError("no way\nthere")

    monkeypatch.setattr(datasets, "load_dataset", load)
    row = open_rows("owner/name-tokenized")[0]
    assert_is_the_row(row)
    assert row.source == "owner/name-tokenized[0]"
    with pytest.raises(UserError, match=r"owner/x: no such file or folder here, .*no way there"):
        open_rows("owner/x")
    assert asked == ["owner/name-tokenized", "owner/x"]


# ---------------------------------------------------------------- fit_row

TEMPLATE_HEAD, QUESTION = [90, 91], [92, 93, 94]


def long_row(document: list[int], chunk: list[int]) -> PreferenceRow:
    def tokens(context: list[int], answer: list[int]) -> TokenRow:
        prompt = [*TEMPLATE_HEAD, *context, *QUESTION]
        ids = np.array([*prompt, *answer], dtype=np.int64)
        labels = np.array([IGNORED_LABEL] * len(prompt) + answer, dtype=np.int64)
        return TokenRow(input_ids=ids, labels=labels)

    chosen, rejected = [80, EOS], [80, 81, 82, EOS]
    return PreferenceRow(
        id="x",
        source="rows.jsonl:1",
        chosen=tokens(document, chosen),
        rejected=tokens(document, rejected),
        reference_chosen=(tokens(chunk, chosen),),
        reference_rejected=(tokens(chunk, rejected),),
    )


def fit(row: PreferenceRow, max_length: int, too_long: str, **more: Any) -> PreferenceRow | None:
    return fit_row(row, vocab_size=100, max_length=max_length, too_long=too_long, **more)


def test_row_that_fits_stays() -> None:
    row = long_row(list(range(20)), [7, 8])
    assert fit(row, 29, "error") is row


def test_truncation_takes_the_middle_of_the_document() -> None:
    row = fit(long_row(list(range(20)), [7, 8]), 17, "truncate_document")
    assert row is not None
    kept = [0, 1, 2, 3, 16, 17, 18, 19]
    assert row.chosen.input_ids.tolist() == [*TEMPLATE_HEAD, *kept, *QUESTION, 80, EOS]
    assert row.rejected.input_ids.tolist() == [*TEMPLATE_HEAD, *kept, *QUESTION, 80, 81, 82, EOS]
    assert row.chosen.labels.tolist() == [IGNORED_LABEL] * 13 + [80, EOS]
    assert len(row.rejected) == 17
    assert row.reference_chosen[0].input_ids.tolist() == [*TEMPLATE_HEAD, 7, 8, *QUESTION, 80, EOS]


def test_truncation_never_reaches_the_question() -> None:
    row = fit(long_row(list(range(20)), [7, 8]), 9, "truncate_document")
    assert row is not None
    assert row.rejected.input_ids.tolist() == [*TEMPLATE_HEAD, *QUESTION, 80, 81, 82, EOS]
    with pytest.raises(UserError, match=r"is 21 tokens longer than 8 and only 20 of its shared"):
        fit(long_row(list(range(20)), [7, 8]), 8, "truncate_document")


def test_truncation_keeps_a_chunk_at_the_end_of_the_document() -> None:
    row = fit(long_row(list(range(20)), [17, 18, 19]), 15, "truncate_document")
    assert row is not None
    assert row.chosen.input_ids[2:8].tolist() == [0, 15, 16, 17, 18, 19]


def test_truncation_without_a_short_row_is_refused() -> None:
    row = replace(long_row(list(range(20)), [7]), reference_chosen=(), reference_rejected=())
    with pytest.raises(
        UserError, match=r"rows.jsonl:1: is 12 tokens longer than 17 and has no short rows"
    ):
        fit(row, 17, "truncate_document")
    assert fit(row, 17, "drop") is None
    assert fit(row, 29, "truncate_document", max_reference_length=1) is row


def test_too_long_is_an_error_or_a_drop() -> None:
    row = long_row(list(range(20)), [7, 8])
    assert fit(row, 28, "drop") is None
    with pytest.raises(UserError, match=r"rejected_input_ids has 29 tokens, more than the 28"):
        fit(row, 28, "error")
    with pytest.raises(UserError, match=r"ref_rejected_input_ids\[0\] has 11 tokens, more than"):
        fit(row, 29, "truncate_document", max_reference_length=10)
    assert fit(row, 29, "drop", max_reference_length=10) is None
    assert fit(row, 29, "error", max_reference_length=11) is row


@pytest.mark.parametrize("bad_id", [100, -1])
def test_ids_outside_the_vocabulary_are_named(bad_id: int) -> None:
    row = long_row([1, 2, bad_id], [1])
    with pytest.raises(
        UserError, match=rf"rows.jsonl:1: chosen_input_ids\[4\] is {bad_id}, outside .* of 100"
    ):
        fit(row, 50, "error")
    row = long_row([1, 2], [1, bad_id])
    with pytest.raises(UserError, match=rf"ref_chosen_input_ids\[0\]\[3\] is {bad_id}"):
        fit(row, 50, "error")


def test_columns_are_plain_lists() -> None:
    values = row_columns(long_row([1, 2], [1]))
    assert json.loads(json.dumps(values)) == values
    assert values["ref_chosen_attention_mask"] == [[1] * 8]
