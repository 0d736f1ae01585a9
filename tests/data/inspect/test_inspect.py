from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from megatron_longpo.config.inspect import InspectConfig
from megatron_longpo.config.tokenize import TokenizeConfig
from megatron_longpo.data.inspect.console import show_sample
from megatron_longpo.data.inspect.page import _script_json
from megatron_longpo.data.inspect.row_samples import sample_of_row
from megatron_longpo.data.inspect.run import run_inspect
from megatron_longpo.data.inspect.samples import Sample
from megatron_longpo.data.inspect.statistics import Series, row_statistics
from megatron_longpo.data.rows.dataset import open_rows
from megatron_longpo.data.text.chat_tokenizer import ChatTokenizer
from megatron_longpo.data.text.hf_tokenizer import HuggingFaceTokenizer
from megatron_longpo.data.text.tokenize import run_tokenize
from megatron_longpo.errors import UserError
from tests import small_tokenizers as small
from tests.data.text.test_tokenize import CHUNKS, DOCUMENT, example, write

BACKEND = small.byte_level(tuple(small.CHATML_SPECIAL), "<|im_end|>")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("rows")
    BACKEND.save_pretrained(folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(small.CHATML)
    turn = {**example()["turns"][0], "chunk_span": None}
    other = example(document="A. " + DOCUMENT, turns=[turn])
    examples = write(folder / "e.jsonl", example(), example(id="again"), other)
    output = str(folder / "rows.jsonl")
    run_tokenize(TokenizeConfig(examples=examples, output=output, tokenizer=str(folder / "model")))
    return output


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return HuggingFaceTokenizer(BACKEND, name="chatml", chat_template=small.CHATML)


@pytest.fixture(scope="module")
def sample(rows: str, tokenizer: ChatTokenizer) -> Sample:
    return sample_of_row(open_rows(rows)[0], tokenizer)


def test_sample_of_a_row(rows: str, sample: Sample, tokenizer: ChatTokenizer) -> None:
    row = open_rows(rows)[0]
    shared, chosen, rejected, *short = sample.segments
    assert sample.num_turns == 2 and len(short) == 6
    assert [piece.text for piece in shared.pieces if piece.mark == "chunk"] == CHUNKS
    assert [piece.text for piece in chosen.pieces if piece.mark == "answer"] == [
        "Twelve.<|im_end|>",
        "The harbour.<|im_end|>",
    ]
    for branch, tokens in ((chosen, row.chosen), (rejected, row.rejected)):
        assert branch.start == shared.num_tokens
        text = "".join(piece.text for piece in (*shared.pieces, *branch.pieces))
        assert text == tokenizer.decode(tokens.input_ids)
    tree = f"[{shared.num_tokens} -> [{chosen.num_tokens}, {rejected.num_tokens}]]"
    assert sample.facts[0] == f"tree of the policy: {tree}"
    physical = len(row.chosen) + (rejected.num_tokens or 0)
    unshared = len(row.chosen) + len(row.rejected)
    assert f"in a pack: {physical} tokens in place of {unshared}, " in sample.facts[1]


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_chunks_at_the_ends_of_a_document_are_marked(
    system: str | None, rows: str, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    parts = ["The year began.\n\nIt was wet.", "Nothing came of it.", "The year ended in rain."]
    turns = [{**example()["turns"][0], "chunk": part, "chunk_span": None} for part in parts]
    examples = write(tmp_path / "e.jsonl", example(document="\n\n".join(parts), turns=turns))
    output = str(tmp_path / "rows.jsonl")
    model = str(Path(rows).parent / "model")
    run_tokenize(TokenizeConfig(examples=examples, output=output, tokenizer=model, system=system))
    shared = sample_of_row(open_rows(output)[0], tokenizer).segments[0]
    assert [piece.text for piece in shared.pieces if piece.mark == "chunk"] == parts


@pytest.mark.parametrize("terminal", [True, False])
def test_marks_are_colours_on_a_terminal_and_signs_elsewhere(
    terminal: bool, sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    colours = "standard" if terminal else None
    console = Console(force_terminal=terminal, color_system=colours, soft_wrap=True)
    show_sample(console, sample, 2000)
    out = capsys.readouterr().out
    assert ("\x1b[" in out) == terminal
    assert ("⟦Twelve.<|im_end|>⟧" in out) == (f"⟪{CHUNKS[0]}⟫" in out) == (not terminal)
    assert "\x1b[30;42mTwelve.<|im_end|>" in out if terminal else "\x1b" not in out


def test_control_characters_do_not_reach_the_console(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b[2J\x1b]0;title\x07 \u202e"
    path = write(
        tmp_path / "e.jsonl",
        example(document=evil + DOCUMENT, turns=[{**example()["turns"][0], "chunk_span": None}]),
    )
    run_inspect(InspectConfig(rows=path, max_chars=10_000))
    out = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\u202e"} & set(out)
    assert f"⟪{CHUNKS[0]}⟫" in out and "⟦Seven of them.⟧" in out
    assert "1 of 1 examples" in out and "document, characters" in out


def test_dpo_pairs_and_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [{"prompt": "How many?", "chosen": "Twelve.", "rejected": "Seven."}] * 2
    run_inspect(InspectConfig(rows=write(tmp_path / "d.jsonl", *pairs), row=1))
    out = capsys.readouterr().out
    assert "prompt, user: 9 characters" in out and "⟦Twelve.⟧" in out
    assert "duplicates: 1 of 2 have the same texts as an earlier one" in out


def test_row_statistics(rows: str) -> None:
    dataset = open_rows(rows)
    statistics = row_statistics(dataset, len(dataset))
    series = {one.name: one.values for one in statistics.series}
    assert series["chosen row"] == tuple(len(row.chosen) for row in dataset)
    assert series["turns"] == (2, 2, 1)
    assert all(90 < share < 100 for share in series["share of shared prefix"])
    assert statistics.notes[1:] == [
        f"duplicates: 1 of 3 have the same {name} as an earlier one"
        for name in ("chosen and rejected tokens", "shared prefix", "id")
    ]
    counts, borders = Series(name="x", unit="", values=(1, 2, 2, 9)).bins()
    assert sum(counts) == 4 and len(borders) == len(counts) + 1 and np.isclose(borders[-1], 9)


def test_page_holds_its_data_as_text_alone(rows: str, tmp_path: Path) -> None:
    hostile = {"x": "</script><!-- & \u2028"}
    written = _script_json(hostile)
    assert not set("<>&") & set(written) and json.loads(written) == hostile
    page = tmp_path / "deep" / "rows.html"
    run_inspect(InspectConfig(rows=rows, html=str(page), html_samples=2, row=1))
    text = page.read_text(encoding="utf-8")
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert [sample["id"] for sample in data["samples"]] == ["doc", "again"]
    assert data["first"] == 1 and data["statistics"]["read"] == "3 of 3 rows"
    assert [path.name for path in page.parent.iterdir()] == ["rows.html"]
    with pytest.raises(UserError, match=r"html \(.*rows.html\): exists and is not empty"):
        run_inspect(InspectConfig(rows=rows, html=str(page)))


def test_a_row_beyond_the_last(rows: str) -> None:
    with pytest.raises(UserError, match=r"row \(3\): must be below the number of rows, 3"):
        run_inspect(InspectConfig(rows=rows, row=3))
