from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_longpo.config.evaluation import RetentionConfig
from megatron_longpo.errors import UserError
from megatron_longpo.evaluation.chats import CHATS
from megatron_longpo.evaluation.retention import make_retention
from tests.evaluation.chat_tokenizers import tokenizers


def test_short_chats_are_compared_along_their_answers() -> None:
    tokenizer = tokenizers()[0]
    probes = make_retention(RetentionConfig(), tokenizer)
    assert len(probes) == len(CHATS) == 24
    for row, (_, answer) in zip(probes.rows, CHATS, strict=True):
        (branch,) = row.branches
        assert tokenizer.decode(branch.input_ids[branch.targets]) == f"{answer}<|im_end|>"


def test_prompts_of_the_user(tmp_path: Path) -> None:
    tokenizer = tokenizers()[0]
    file = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "Say yes."},
        {
            "messages": [
                {"role": "user", "content": "Say yes."},
                {"role": "assistant", "content": "Yes."},
            ]
        },
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plain, answered = make_retention(RetentionConfig(prompts=str(file)), tokenizer).rows
    ids = plain.branches[0].input_ids
    assert plain.branches[0].targets.tolist() == list(range(1, len(ids)))
    assert answered.branches[0].input_ids[: len(ids)].tolist() == ids.tolist()
    with pytest.raises(UserError, match=r"prompts\.jsonl:1: has \d+ tokens; short prompts have at"):
        make_retention(RetentionConfig(prompts=str(file), max_length=5), tokenizer)
    file.write_text('{"messages": [{"role": "robot", "content": "x"}]}\n')
    with pytest.raises(UserError, match=r"prompts\.jsonl:1: needs prompt, a text, or messages"):
        make_retention(RetentionConfig(prompts=str(file)), tokenizer)
