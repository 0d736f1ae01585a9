"""Rows under Mistral's real tokenizer models, beside the ids that Mistral's own package gives.

v1 is the tokenizer of Mistral v0.2, v3 that of v0.3; v2 came between them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_longpo.data.text.chat import conversation_row, prompt_ids
from megatron_longpo.data.text.tokenizers import load_tokenizer
from tests.data.text.test_public_templates import HOSTILE, conversation, labelled_spans, text_of
from tests.public_templates import MISTRAL_V03

ROOT = Path(__file__).parents[3]
FOLDER = Path(sys.prefix) / "mistral_common"
TURNS = [
    ("The ledger.\n\n  What does it say?", "It says 1843,\nor so."),
    ("And the barrels? (é, 日本)", "None of them (12) was paid for."),
    ("Who says so?", "The harbour."),
]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    if not FOLDER.is_dir():
        if "LONGPO_NEEDS_MISTRAL_COMMON" in os.environ:
            pytest.fail(f"{FOLDER} is missing: make setup")
        pytest.skip("needs tests/data/mistral_common.txt in .venv/mistral_common: make setup")
    return {**os.environ, "PYTHONPATH": str(FOLDER)}


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_ids_are_those_of_mistrals_own_package(
    version: str, environment: dict[str, str], tmp_path: Path
) -> None:
    texts = [text for turn in TURNS for text in turn]
    prompts = [texts[: 2 * turn + 1] for turn in range(len(TURNS))]
    answer = subprocess.run(
        [sys.executable, str(ROOT / "tests/data/text/in_mistral_common.py")],
        input=json.dumps({"version": version, "conversations": prompts}),
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    theirs = json.loads(answer.stdout)
    template = None
    if version != "v1":
        template = str(tmp_path / "v3.jinja")
        Path(template).write_text(MISTRAL_V03)
    tokenizer = load_tokenizer(theirs["model"], chat_template=template)
    row = conversation_row(tokenizer, conversation(TURNS))
    spans = labelled_spans(row)
    for turn, ids in enumerate(theirs["ids"]):
        asked = conversation(TURNS[: turn + 1], last_answer=False)
        assert prompt_ids(tokenizer, asked) == ids == row.input_ids[: spans[turn][0]].tolist()
    assert [text_of(tokenizer, row, *span).strip() for span in spans] == [
        f"{answer}</s>" for _, answer in TURNS
    ]
    # A document that holds markup, in the real vocabulary, forges none of it.
    hostile = conversation_row(
        tokenizer, conversation([(f"{HOSTILE} {q}", f"{a}{HOSTILE}.") for q, a in TURNS])
    )
    assert [text_of(tokenizer, hostile, *span).strip() for span in labelled_spans(hostile)] == [
        f"{answer}{HOSTILE}.</s>" for _, answer in TURNS
    ]
    for text in tokenizer.special_texts:
        (marker,) = tokenizer.encode(text)
        assert (hostile.input_ids == marker).sum() == (row.input_ids == marker).sum(), text
