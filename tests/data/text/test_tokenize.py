from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_longpo.config.inspect import InspectConfig
from megatron_longpo.config.tokenize import TokenizeConfig
from megatron_longpo.data.common_prefix import common_prefix_length
from megatron_longpo.data.inspect.run import run_inspect
from megatron_longpo.data.rows.dataset import open_rows
from megatron_longpo.data.rows.schema import IGNORED_LABEL
from megatron_longpo.data.text.chat import prompt_ids
from megatron_longpo.data.text.prompt_layout import opening_messages
from megatron_longpo.data.text.tokenize import run_tokenize
from megatron_longpo.data.text.tokenizers import load_tokenizer
from megatron_longpo.errors import UserError
from tests import small_tokenizers as small

CHUNKS = ["Twelve barrels were landed.", "The harbour lists high water."]
DOCUMENT = "\n\n".join(["The year begins.", CHUNKS[0], *["Nothing."] * 60, CHUNKS[1], "The end."])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = small.byte_level(tuple(small.CHATML_SPECIAL), "<|im_end|>")
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(small.CHATML)
    return str(folder)


def example(**changes: Any) -> dict[str, Any]:
    turns = [
        {
            "chunk": chunk,
            "chunk_span": [DOCUMENT.index(chunk), DOCUMENT.index(chunk) + len(chunk)],
            "question": question,
            "chosen": chosen,
            "rejected": rejected,
        }
        for chunk, question, chosen, rejected in (
            (CHUNKS[0], "How many barrels?", "Twelve.", "Seven of them."),
            (CHUNKS[1], "Who lists it?", "The harbour.", "The ledger."),
        )
    ]
    return {"id": "doc", "document": DOCUMENT, "turns": turns, **changes}


def write(path: Path, *values: Any) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return str(path)


def make(tmp_path: Path, model: str, **settings: Any) -> TokenizeConfig:
    settings = {"output": str(tmp_path / "rows.jsonl"), **settings}
    return TokenizeConfig(examples=str(tmp_path / "e.jsonl"), tokenizer=model, **settings)


def test_rows_hold_the_conversations(tmp_path: Path, model: str) -> None:
    write(tmp_path / "e.jsonl", example())
    summary = run_tokenize(make(tmp_path, model, system="Answer."))
    assert (summary.num_rows, summary.dropped.total()) == (1, 0)
    row = open_rows(str(tmp_path / "rows.jsonl"))[0]
    decode = load_tokenizer(model).decode
    assert row.id == "doc"

    def chat(context: str, *texts: str) -> str:
        text = f"<|im_start|>system\nAnswer.<|im_end|>\n<|im_start|>user\n{context}\n\n"
        parts = [
            f"{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"
            for question, answer in zip(texts[::2], texts[1::2], strict=True)
        ]
        return text + "\n<|im_start|>user\n".join(parts)

    assert decode(row.chosen.input_ids) == chat(
        DOCUMENT, "How many barrels?", "Twelve.", "Who lists it?", "The harbour."
    )
    assert decode(row.rejected.input_ids) == chat(
        DOCUMENT, "How many barrels?", "Seven of them.", "Who lists it?", "The ledger."
    )
    assert [decode(short.input_ids) for short in row.reference_chosen] == [
        chat(CHUNKS[0], "How many barrels?", "Twelve."),
        chat(CHUNKS[1], "Who lists it?", "The harbour."),
    ]
    assert [decode(short.input_ids) for short in row.reference_rejected] == [
        chat(CHUNKS[0], "How many barrels?", "Seven of them."),
        chat(CHUNKS[1], "Who lists it?", "The ledger."),
    ]
    labelled = row.rejected.labels[row.rejected.labels != IGNORED_LABEL]
    assert decode(labelled) == "Seven of them.<|im_end|>The ledger.<|im_end|>"
    # Both branches share everything up to the first answer, and so do generation's prompts.
    prompt = prompt_ids(
        load_tokenizer(model), opening_messages("Answer.", DOCUMENT, "How many barrels?")
    )
    assert row.chosen.input_ids[: len(prompt)].tolist() == prompt
    assert common_prefix_length(row.chosen.input_ids, row.rejected.input_ids) == len(prompt)


def test_dataset_folder_holds_the_same_rows(tmp_path: Path, model: str) -> None:
    write(tmp_path / "e.jsonl", example(), example(id="other"))
    run_tokenize(make(tmp_path, model))
    run_tokenize(make(tmp_path, model, output=str(tmp_path / "rows")))
    lines, folder = open_rows(str(tmp_path / "rows.jsonl")), open_rows(str(tmp_path / "rows"))
    assert [row.id for row in folder] == [row.id for row in lines] == ["doc", "other"]
    for left, right in zip(lines, folder, strict=True):
        for (name, a), (_, b) in zip(left.named_rows(), right.named_rows(), strict=True):
            assert np.array_equal(a.input_ids, b.input_ids), name
            assert np.array_equal(a.labels, b.labels), name
    before = folder.fingerprint
    run_tokenize(make(tmp_path, model, output=str(tmp_path / "rows"), overwrite=True))
    assert open_rows(str(tmp_path / "rows")).fingerprint == before
    assert sorted(os.listdir(tmp_path)) == ["e.jsonl", "rows", "rows.jsonl"]


@pytest.mark.parametrize("cut_from", ["middle", "tail"])
def test_long_document_is_cut_outside_its_evidence(
    cut_from: str, tmp_path: Path, model: str
) -> None:
    write(tmp_path / "e.jsonl", example())
    run_tokenize(make(tmp_path, model))
    whole = open_rows(str(tmp_path / "rows.jsonl"))[0]
    config = make(tmp_path, model, max_length=400, cut_from=cut_from, overwrite=True)
    assert run_tokenize(config).num_cut_documents == 1
    row = open_rows(str(tmp_path / "rows.jsonl"))[0]
    assert len(whole.rejected) > 500
    assert 380 <= max(len(row.chosen), len(row.rejected)) <= 400
    text = load_tokenizer(model).decode(row.rejected.input_ids)
    for kept in (*CHUNKS, "How many barrels?", "Who lists it?", "Seven of them.", "The year beg"):
        assert kept in text
    assert ("The end." in text) == (cut_from == "middle")
    labels = whole.chosen.labels[whole.chosen.labels != IGNORED_LABEL]
    assert row.chosen.labels[row.chosen.labels != IGNORED_LABEL].tolist() == labels.tolist()


def test_drops_are_counted(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    silent = example(id="silent")
    silent["turns"][1]["rejected"] = " "
    broad = example(id="broad")
    broad["turns"] = [{**broad["turns"][0], "chunk": DOCUMENT, "chunk_span": None}]
    write(tmp_path / "e.jsonl", silent, broad, {**example(), "document": " ".join(CHUNKS)})
    config = make(tmp_path, model, short_max_length=200, max_length=300)
    config.examples = write(
        tmp_path / "e.jsonl",
        silent,
        broad,
        example(document=" ".join(CHUNKS), turns=[{**example()["turns"][0], "chunk_span": None}]),
    )
    summary = run_tokenize(config)
    assert dict(summary.dropped) == {"empty answer": 1, "short row over short_max_length": 1}
    assert "1 rows, the longest of" in capsys.readouterr().out
    assert len(open_rows(config.output)) == 1

    config = make(tmp_path, model, max_length=100, overwrite=True)
    before = Path(config.output).read_bytes()
    with pytest.raises(UserError, match=r"no example gave a row \(dropped: 2 x long row over max_"):
        run_tokenize(make(tmp_path, model, max_length=40, overwrite=True))
    with pytest.raises(UserError, match=r"e.jsonl:2: gives a row of \d+ tokens, more than max_len"):
        run_tokenize(make(tmp_path, model, max_length=100, too_long="error", overwrite=True))
    assert Path(config.output).read_bytes() == before


def without_chunks(*turns: int, **changes: Any) -> dict[str, Any]:
    value = example(**changes)
    for turn in turns:
        value["turns"][turn] |= {"chunk": None, "chunk_span": None}
    return value


@pytest.mark.parametrize("output", ["rows.jsonl", "rows"])
def test_examples_without_chunks_give_rows_without_short_ones(
    output: str, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    unknown = without_chunks(id="unknown")
    for turn in unknown["turns"]:
        del turn["chunk"], turn["chunk_span"]
    write(tmp_path / "e.jsonl", example(), without_chunks(1, id="half"), unknown)
    config = make(tmp_path, model, output=str(tmp_path / output))
    assert run_tokenize(config).num_without_short_rows == 2
    out = capsys.readouterr().out
    assert "LongPO examples: documents with turns" in out and "; 2 have no short rows" in out
    rows = list(open_rows(config.output))
    assert [len(row.reference_chosen) for row in rows] == [2, 0, 0]
    for row in rows[1:]:
        assert row.reference_rejected == ()
        assert np.array_equal(row.chosen.input_ids, rows[0].chosen.input_ids)
        assert np.array_equal(row.rejected.labels, rows[0].rejected.labels)
    run_inspect(InspectConfig(rows=config.output))
    out = capsys.readouterr().out
    assert (
        "2 of 3 rows have no short reference rows" in out and "short reference row, tokens" in out
    )


def test_documents_without_chunks_are_cut_outside_the_spans_that_are_known(
    tmp_path: Path, model: str
) -> None:
    value = without_chunks(0, 1)
    value["turns"][0]["chunk_span"] = example()["turns"][0]["chunk_span"]
    write(tmp_path / "e.jsonl", value)
    assert run_tokenize(make(tmp_path, model, max_length=300)).num_cut_documents == 1
    row = open_rows(str(tmp_path / "rows.jsonl"))[0]
    text = load_tokenizer(model).decode(row.rejected.input_ids)
    assert 280 <= max(len(row.chosen), len(row.rejected)) <= 300
    for kept in (CHUNKS[0], "How many barrels?", "Who lists it?", "Seven of them.", "The end."):
        assert kept in text


def test_existing_output_is_refused(tmp_path: Path, model: str) -> None:
    write(tmp_path / "e.jsonl", example())
    (tmp_path / "rows.jsonl").write_text("precious\n")
    with pytest.raises(UserError, match=r"output \(.*rows.jsonl\): exists and is not empty"):
        run_tokenize(make(tmp_path, model))
    (tmp_path / "rows").mkdir()
    run_tokenize(make(tmp_path, model, output=str(tmp_path / "rows")))
    with pytest.raises(UserError, match=r"output \(.*rows\): exists and is not empty"):
        run_tokenize(make(tmp_path, model, output=str(tmp_path / "rows")))
    assert (tmp_path / "rows.jsonl").read_text() == "precious\n"


@contextmanager
def files_up_to(num_bytes: int) -> Iterator[None]:
    """Files get no larger in this process, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["full", "full.jsonl"])
@pytest.mark.parametrize("num_bytes", [500, 30_000])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    name: str, num_bytes: int, tmp_path: Path, model: str
) -> None:
    write(tmp_path / "e.jsonl", *(example(id=str(number)) for number in range(60)))
    before = sorted(tmp_path.iterdir())
    with (
        files_up_to(num_bytes),
        pytest.raises(UserError, match=rf"{name}: cannot be written \(.*File too large"),
    ):
        run_tokenize(make(tmp_path, model, output=str(tmp_path / name)))
    assert sorted(tmp_path.iterdir()) == before


def test_a_disk_too_full_for_the_page(tmp_path: Path) -> None:
    write(tmp_path / "e.jsonl", example())
    page = tmp_path / "page.html"
    config = InspectConfig(rows=str(tmp_path / "e.jsonl"), html=str(page), max_chars=10)
    with files_up_to(5_000), pytest.raises(UserError, match=r"page.html: cannot be written"):
        run_inspect(config)
    assert [one.name for one in tmp_path.iterdir()] == ["e.jsonl"]


def test_inspect_shows_segments_and_statistics(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "e.jsonl", example(), example(id="other"))
    run_tokenize(make(tmp_path, model))
    row = open_rows(str(tmp_path / "rows.jsonl"))[1]
    shared = common_prefix_length(row.chosen.input_ids, row.rejected.input_ids)
    capsys.readouterr()
    run_inspect(InspectConfig(rows=str(tmp_path / "rows.jsonl"), tokenizer=model, row=1))
    out = capsys.readouterr().out
    assert f"shared prefix: {shared} tokens" in out
    assert f"chosen: {len(row.chosen) - shared} tokens" in out
    assert "Twelve.<|im_end|>" in out and "Seven of them.<|im_end|>" in out
    saved = shared / (len(row.chosen) + len(row.rejected))
    assert f"{saved:.1%}" in out
    with pytest.raises(UserError, match=r"row \(2\): must be below the number of rows, 2"):
        run_inspect(InspectConfig(rows=str(tmp_path / "rows.jsonl"), row=2))
