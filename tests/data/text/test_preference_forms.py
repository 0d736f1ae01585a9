"""Sets in the forms of ms-swift and LLaMA-Factory, and what no row can carry, as far as rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.config.inspect import InspectConfig
from megatron_longpo.config.tokenize import TokenizeConfig
from megatron_longpo.data.inspect.run import run_inspect
from megatron_longpo.data.rows.dataset import open_rows
from megatron_longpo.data.rows.schema import IGNORED_LABEL, PreferenceRow
from megatron_longpo.data.text.sets import TextSet
from megatron_longpo.data.text.tokenize import run_tokenize
from megatron_longpo.data.text.tokenizers import load_tokenizer
from megatron_longpo.errors import UserError
from tests import small_tokenizers as small
from tests.data.text.test_dpo_sets import save_jsonl, save_parquet_file

QUESTION, CHOSEN, REJECTED = "How many barrels?", "Twelve.", "Seven of them."
SYSTEM = "Be short."


def said(role: str, content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def shared(role: str, text: str) -> dict[str, str]:
    """A message as ShareGPT and LLaMA-Factory write it."""
    return {"from": role, "value": text}


ASKED, GOOD, BAD = said("user", QUESTION), said("assistant", CHOSEN), said("assistant", REJECTED)
TOLD = said("system", SYSTEM)
HUMAN, GPT, OTHER = shared("human", QUESTION), shared("gpt", CHOSEN), shared("gpt", REJECTED)
SWIFT = {"messages": [TOLD, ASKED, GOOD], "rejected_response": REJECTED}
FACTORY = {
    "conversations": [shared("system", SYSTEM), HUMAN],
    "chosen": GPT,
    "rejected": OTHER,
}
TRL = {"prompt": [TOLD, ASKED], "chosen": [GOOD], "rejected": [BAD]}

FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "swift": (SWIFT, "messages with rejected_response, as for ms-swift"),
    "swift_system": (
        {"system": SYSTEM, "messages": [ASKED, GOOD], "rejected_response": REJECTED},
        "messages with rejected_response, as for ms-swift",
    ),
    "swift_both_systems": (
        {"system": "Be long.", **SWIFT},
        "messages with rejected_response, as for ms-swift",
    ),
    "swift_response_list": (
        {"messages": [TOLD, ASKED, GOOD], "rejected_response": [BAD]},
        "messages with rejected_response, as for ms-swift",
    ),
    "swift_messages": (
        {"messages": [TOLD, ASKED, GOOD], "rejected_messages": [TOLD, ASKED, BAD]},
        "messages with rejected_messages, as for ms-swift",
    ),
    "swift_messages_system": (
        {"system": SYSTEM, "messages": [ASKED, GOOD], "rejected_messages": [ASKED, BAD]},
        "messages with rejected_messages, as for ms-swift",
    ),
    "swift_sharegpt": (
        {"system_prompt": SYSTEM, "conversations": [HUMAN, GPT], "rejected_response": REJECTED},
        "conversations with rejected_response, as for ms-swift",
    ),
    "factory": (FACTORY, "conversations with chosen and rejected, as for LLaMA-Factory"),
    "factory_system": (
        {**FACTORY, "conversations": [HUMAN], "system": SYSTEM},
        "conversations with chosen and rejected, as for LLaMA-Factory",
    ),
    "factory_openai": (
        {"messages": [TOLD, ASKED], "chosen": GOOD, "rejected": BAD},
        "messages with chosen and rejected, as for LLaMA-Factory",
    ),
    "trl_sharegpt": (
        {"chosen": [shared("system", SYSTEM), HUMAN, GPT], "rejected": [TOLD, ASKED, BAD]},
        "whole conversations as messages",
    ),
    "trl_beside_messages": (
        {**TRL, "messages": [ASKED, GOOD]},
        "prompt as messages, answers as messages",
    ),
    "trl_parts": (
        {**TRL, "chosen": [said("assistant", [{"type": "text", "text": CHOSEN}])]},
        "prompt as messages, answers as messages",
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    small.byte_level(tuple(small.CHATML_SPECIAL), "<|im_end|>").save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(small.CHATML)
    return str(folder)


def tokenized(path: str, folder: Path, model: str, **settings: Any) -> list[PreferenceRow]:
    output = str(folder / "rows.jsonl")
    config = TokenizeConfig(
        examples=path, tokenizer=model, output=output, overwrite=True, **settings
    )
    run_tokenize(config)
    return list(open_rows(output))


def ids_and_labels(row: PreferenceRow) -> list[list[int]]:
    sides = (row.chosen, row.rejected)
    return [array.tolist() for side in sides for array in (side.input_ids, side.labels)]


@pytest.mark.parametrize("save", [save_jsonl, save_parquet_file])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_row_of_trl(
    form: str,
    save: Callable[[list[dict[str, Any]], Path], str],
    tmp_path: Path,
    model: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if (form, save) == ("trl_sharegpt", save_parquet_file):
        pytest.skip("Arrow gives every list the same fields")
    pair, description = FORMS[form]
    path = save([pair, pair], tmp_path)
    rows = tokenized(path, tmp_path, model)
    assert f"{path}: a DPO set: {description}\n" in capsys.readouterr().out
    (same,) = tokenized(save_jsonl([TRL], tmp_path), tmp_path, model)
    assert [ids_and_labels(row) for row in rows] == [ids_and_labels(same)] * 2


def test_swift_compares_what_follows_the_last_question(tmp_path: Path, model: str) -> None:
    history = [ASKED, said("assistant", "Shared."), said("user", "And?")]
    pair = {"messages": [*history, GOOD], "rejected_response": REJECTED}
    (row,) = tokenized(save_jsonl([pair], tmp_path), tmp_path, model)
    tokenizer = load_tokenizer(model)
    for side, answer in ((row.chosen, CHOSEN), (row.rejected, REJECTED)):
        labelled = tokenizer.decode(side.labels[side.labels != IGNORED_LABEL])
        assert labelled == f"{answer}<|im_end|>"
        assert "Shared.<|im_end|>" in tokenizer.decode(side.input_ids)


@pytest.mark.parametrize("space", [" ", "\n", "\t\n"])
def test_prompts_that_differ_by_white_space_at_their_ends_are_one(
    space: str, tmp_path: Path, model: str
) -> None:
    spaced = said("user", f"{space}{QUESTION}{space}")
    pairs: list[dict[str, Any]] = [
        {"chosen": [TOLD, spaced, GOOD], "rejected": [TOLD, ASKED, BAD]},
        {"messages": [TOLD, ASKED, GOOD], "rejected_messages": [TOLD, spaced, BAD]},
    ]
    (same,) = tokenized(save_jsonl([TRL], tmp_path), tmp_path, model)
    for pair in pairs:
        (row,) = tokenized(save_jsonl([pair], tmp_path), tmp_path, model)
        assert ids_and_labels(row) == ids_and_labels(same)
    inside = {"chosen": [said("user", "How  many barrels?"), GOOD], "rejected": [ASKED, BAD]}
    with pytest.raises(UserError, match="share no user message to answer"):
        TextSet(save_jsonl([inside], tmp_path))


TOOL = {"type": "function", "function": {"name": "weather"}}
COLUMNS: dict[str, Any] = {
    "tools": [TOOL],
    "functions": json.dumps([TOOL]),
    "images": ["cat.png"],
    "videos": ["cat.mp4"],
    "audios": ["cat.wav"],
    "image": {"path": "cat.png"},
    "objects": {"ref": ["cat"]},
    "rejected_images": ["cat.png"],
    "rejected_tools": [TOOL],
    "chat_template_kwargs": {"enable_thinking": True},
}


@pytest.mark.parametrize("pair", [SWIFT, FACTORY, TRL], ids=["swift", "factory", "trl"])
@pytest.mark.parametrize("name", COLUMNS)
def test_columns_that_no_row_can_carry(
    name: str,
    pair: dict[str, Any],
    tmp_path: Path,
    model: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    having = {**pair, name: COLUMNS[name]}
    with pytest.raises(
        UserError, match=rf"pairs.jsonl:1: has a column {name}, .* remove"
    ) as caught:
        TextSet(save_jsonl([having, pair], tmp_path))
    assert "\n" not in str(caught.value)
    path = save_jsonl([pair, having, pair, having], tmp_path)
    rows = tokenized(path, tmp_path, model)
    assert [row.id for row in rows] == ["0", "2"]
    assert f"; dropped 2: 2 x column {name} (first: {path}:2)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_column_that_the_form_does_not_define(
    name: str, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    example = {
        "id": "a",
        "document": "Twelve barrels were landed.",
        "turns": [{"question": QUESTION, "chosen": CHOSEN, "rejected": REJECTED}],
    }
    for item in (TRL, example):
        with pytest.raises(
            UserError, match=rf"pairs.jsonl:1: has a column {name}, which this form"
        ):
            TextSet(save_jsonl([{**item, name: SYSTEM}], tmp_path))
        path = save_jsonl([item, {**item, name: SYSTEM}], tmp_path)
        assert len(tokenized(path, tmp_path, model)) == 1
        assert f"1 x column {name} (first: {path}:2)" in capsys.readouterr().out


EMPTY = ("", "[]", " null ", [], {}, None, {"path": None})


def test_empty_columns_and_fields_are_none(tmp_path: Path, model: str) -> None:
    pairs = [{**SWIFT, "tools": value, "images": value} for value in EMPTY]
    asked = [said("user", QUESTION, tool_calls=value, thinking=value) for value in EMPTY]
    pairs += [{"messages": [TOLD, item, GOOD], "rejected_response": REJECTED} for item in asked]
    assert len(tokenized(save_jsonl(pairs, tmp_path), tmp_path, model)) == len(pairs)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (said("assistant", "I look.", tool_calls=[TOOL]), "tool_calls in a message"),
        (said("assistant", None, tool_calls=[TOOL]), "tool_calls in a message"),
        (said("assistant", "", function_call={"name": "x"}), "function_call in a message"),
        (said("assistant", CHOSEN, reasoning_content="Hm."), "reasoning_content in a message"),
        (said("assistant", CHOSEN, reasoning="Hm."), "reasoning in a message"),
        (said("assistant", CHOSEN, thinking="Hm."), "thinking in a message"),
        (said("assistant", CHOSEN, images=["cat.png"]), "images in a message"),
        (said("assistant", [{"type": "image_url", "image_url": "x"}]), "image_url in a message"),
        (said("tool_call", "{}"), "message of the role tool_call"),
        (shared("function_call", "{}"), "message of the role function_call"),
    ],
)
def test_messages_that_no_row_can_carry(
    message: dict[str, Any],
    reason: str,
    tmp_path: Path,
    model: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    having = [
        {**TRL, "chosen": [message]},
        {"messages": [ASKED, message], "rejected_response": REJECTED},
        {"messages": [ASKED, GOOD], "rejected_messages": [ASKED, message]},
        {**FACTORY, "rejected": message},
    ]
    # Also as the first item, which tells the form.
    path = save_jsonl([*having, SWIFT], tmp_path)
    assert [row.id for row in tokenized(path, tmp_path, model)] == ["4"]
    assert f"; dropped 4: 4 x {reason} (first: {path}:1)" in capsys.readouterr().out
    with pytest.raises(UserError, match=rf"no example gave a row \(dropped: 4 x {reason} \(first"):
        tokenized(save_jsonl(having, tmp_path), tmp_path, model)


@pytest.mark.parametrize("role", ["tool", "observation", "tool_response", "function", "ipython"])
def test_results_of_tools_in_a_prompt(
    role: str, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = [HUMAN, shared("gpt", "I look."), shared(role, "12")]
    path = save_jsonl([FACTORY, {**FACTORY, "conversations": prompt}], tmp_path)
    assert len(tokenized(path, tmp_path, model)) == 1
    assert f"1 x message of the role {role} (first: {path}:2)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ({"messages": [ASKED, GOOD], "rejected_response": None}, "rejected_response is missing"),
        ({"messages": [ASKED, GOOD], "rejected_response": 3}, "rejected_response is a int"),
        ({"messages": None, "rejected_response": "x"}, "messages is missing, must be text or"),
        ({"messages": "x", "rejected_response": "x"}, "messages is text, must be a list of"),
        ({"messages": [GOOD], "rejected_response": "x"}, "messages has no user message to answer"),
        ({"messages": [ASKED], "rejected_response": "x"}, "messages ends with the question; it"),
        (
            {"messages": [ASKED, GOOD], "rejected_response": [ASKED, BAD]},
            "rejected_response: the first message after the prompt is the user's",
        ),
        (
            {"messages": [ASKED, GOOD], "rejected_messages": [said("user", "No?"), BAD]},
            "messages and rejected_messages share no user message to answer",
        ),
        ({**SWIFT, "messages": [ASKED, GOOD], "system": 3}, "system is a int, must be text"),
        ({**FACTORY, "conversations": None}, "messages is missing, must be text or"),
        ({**FACTORY, "conversations": [HUMAN, GPT]}, "prompt ends with an answer"),
        ({**FACTORY, "chosen": HUMAN}, "chosen: the first message after the prompt is the user's"),
        ({**FACTORY, "rejected": None}, "rejected is missing"),
        ({**FACTORY, "rejected": {"from": "gpt"}}, r"rejected\[0\] must be .* or {\"from\": text"),
        ({**TRL, "chosen": [said("assistant", ["x"])]}, r"chosen\[0\] must be"),
    ],
)
def test_bad_pairs_are_named(pair: dict[str, Any], message: str, tmp_path: Path) -> None:
    pairs = TextSet(save_jsonl([SWIFT, pair], tmp_path))
    with pytest.raises(UserError, match=rf"pairs.jsonl:2: {message}") as caught:
        pairs[1]
    assert "\n" not in str(caught.value)


def test_inspect_leaves_out_what_no_row_can_carry(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    having = {**SWIFT, "messages": [ASKED, said("assistant", CHOSEN, thinking="Hm.")]}
    path = save_jsonl([having, SWIFT, having, FACTORY], tmp_path)
    with pytest.raises(UserError, match=r"row \(2\): no row can carry it \(thinking in a message"):
        run_inspect(InspectConfig(rows=path, row=2))
    page = tmp_path / "page.html"
    run_inspect(InspectConfig(rows=path, row=1, html=str(page), html_samples=4))
    out = capsys.readouterr().out
    assert REJECTED in out and f"{page}: 2 samples" in out
