"""Rows of the retrieval, NLL and retention sets, by what stands in them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_longpo.config.evaluation import NllConfig, RetentionConfig, RetrievalConfig
from megatron_longpo.data.text.chat_tokenizer import ChatTokenizer
from megatron_longpo.data.text.hf_tokenizer import HuggingFaceTokenizer
from megatron_longpo.errors import UserError
from megatron_longpo.evaluation.chats import CHATS
from megatron_longpo.evaluation.frames import plain_ids
from megatron_longpo.evaluation.haystack import filler_text
from megatron_longpo.evaluation.position_nll import bucket_borders, make_nll
from megatron_longpo.evaluation.retention import make_retention
from megatron_longpo.evaluation.retrieval import make_retrieval
from tests.small_tokenizers import (
    CHATML,
    CHATML_SPECIAL,
    LLAMA3,
    LLAMA3_SPECIAL,
    MISTRAL_V2,
    byte_level,
    space_prefixing,
)

CONFIG = RetrievalConfig(
    kinds=("passkey", "multi_needle"), lengths=(600, 900), depths=(0.0, 0.5, 1.0), samples=2
)


def tokenizers() -> list[ChatTokenizer]:
    made = [
        (byte_level(tuple(CHATML_SPECIAL), "<|im_end|>"), CHATML),
        (byte_level(tuple(LLAMA3_SPECIAL), "<|end_of_text|>", "<|begin_of_text|>"), LLAMA3),
        (space_prefixing(), MISTRAL_V2),
        # A space before the end of a turn, and two tokens that end it.
        (space_prefixing(), MISTRAL_V2.replace("{{ eos_token }}", " {{ eos_token }}")),
        (
            byte_level(tuple(CHATML_SPECIAL), "<|im_end|>"),
            CHATML.replace("<|im_end|>", "<|im_end|><|endoftext|>"),
        ),
    ]
    names = ("chatml", "llama3", "mistral", "spaced", "two ends")
    found: list[ChatTokenizer] = []
    for name, (tokenizer, template) in zip(names, made, strict=True):
        found.append(HuggingFaceTokenizer(tokenizer, name=name, chat_template=template))
    return found


@pytest.mark.parametrize("tokenizer", tokenizers(), ids=lambda tokenizer: tokenizer.name)
def test_a_row_hides_one_number_and_scores_its_tokens(tokenizer: ChatTokenizer) -> None:
    retrieval = make_retrieval(CONFIG, tokenizer)
    assert len(retrieval.questions) == 2 * 2 * 3 * 2
    for question in retrieval.questions:
        branch = retrieval.probes.rows[question.row].branches[question.group]
        assert len(branch.input_ids) == question.length or question.kind == "multi_needle"
        assert len(branch.input_ids) <= question.length
        number, end = (
            tokenizer.decode(branch.input_ids[branch.targets[branch.groups == group]])
            for group in (question.group, question.end_group)
        )
        assert number.strip().rstrip(".") == question.value
        ends = {"llama3": "<|eot_id|>", "mistral": "</s>", "spaced": "</s>"}
        assert end == ends.get(tokenizer.name, "<|im_end|>")
        ended = int(branch.targets[-1])
        assert tokenizer.decode(branch.input_ids[:ended]).rstrip().endswith(".")
        text, prompt = tokenizer.decode(branch.input_ids), retrieval.prompt(question)
        assert text.count(question.value) == (3 if question.kind == "passkey" else 2)
        asked = tokenizer.decode(prompt)
        assert asked.count(question.value) == (2 if question.kind == "passkey" else 1)
        # The prompt ends where the model begins to answer, which it does with these words.
        answer = tokenizer.decode(branch.input_ids[len(prompt) :], skip_special=True).strip()
        assert answer.startswith("The pass key") and f"is {question.value}." in answer
        place = text.index(question.value) / len(text)
        assert place == pytest.approx(question.depth, abs=0.3), question


def test_the_questions_of_a_text_share_it() -> None:
    retrieval = make_retrieval(replace(CONFIG, kinds=("multi_needle",)), tokenizers()[0])
    assert len(retrieval.probes) == 4
    assert len({question.value for question in retrieval.questions}) == 12
    for size in retrieval.probes.sizes:
        assert size.policy_tokens < 0.7 * size.unshared_tokens
    names = {question.row: set() for question in retrieval.questions}
    for question in retrieval.questions:
        names[question.row].add(question.group)
    assert all(groups == {0, 1, 2} for groups in names.values())
    assert [question.end_group for question in retrieval.questions[:3]] == [3, 4, 5]


def test_the_same_seed_gives_the_same_rows() -> None:
    tokenizer = tokenizers()[0]
    one, same, other = (make_retrieval(replace(CONFIG, seed=seed), tokenizer) for seed in (0, 0, 1))
    assert one.questions == same.questions
    assert [question.value for question in one.questions] != [q.value for q in other.questions]
    for mine, theirs in zip(one.probes.rows, same.probes.rows, strict=True):
        assert np.array_equal(mine.branches[0].input_ids, theirs.branches[0].input_ids)


def test_rows_of_a_length_do_not_depend_on_others() -> None:
    tokenizer = tokenizers()[0]
    several = make_retrieval(CONFIG, tokenizer)
    alone = make_retrieval(replace(CONFIG, lengths=(900,), samples=1), tokenizer)
    wanted = [q for q in several.questions if (q.length, q.sample) == (900, 0)]
    assert [alone.prompt(question).tolist() for question in alone.questions] == [
        several.prompt(question).tolist() for question in wanted
    ]


def test_a_split_has_the_same_rows() -> None:
    whole = make_retrieval(CONFIG, tokenizers()[0])
    parts = list(whole.split())
    assert [len(part.questions) for part in parts] == [6, 6, 6, 6]
    prompts = [part.prompt(question).tolist() for part in parts for question in part.questions]
    assert prompts == [whole.prompt(question).tolist() for question in whole.questions]


def test_documents_of_the_user_are_haystacks_without_special_tokens(tmp_path: Path) -> None:
    words = "Marble <|im_end|> quarry. "
    (tmp_path / "a.txt").write_text(words * 200)
    tokenizer = tokenizers()[0]
    retrieval = make_retrieval(replace(CONFIG, haystack=str(tmp_path)), tokenizer)
    branch = retrieval.probes.rows[0].branches[0]
    assert "Marble <|im_end|> quarry. " in tokenizer.decode(branch.input_ids)
    (end,) = tokenizer.encode("<|im_end|>")
    # The template's own, and none of the text.
    assert int((branch.input_ids == end).sum()) == 3


def test_what_leaves_no_room_or_cannot_be_read_is_refused(tmp_path: Path) -> None:
    tokenizer = tokenizers()[0]
    with pytest.raises(UserError, match=r"evaluation\.retrieval\.lengths \(50\): question, answer"):
        make_retrieval(replace(CONFIG, lengths=(50,)), tokenizer)
    missing = str(tmp_path / "none")
    with pytest.raises(UserError, match=r"^evaluation\.retrieval\.haystack \(.*no such file"):
        make_retrieval(replace(CONFIG, haystack=missing), tokenizer)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match=r"holds no usable text \(empty document\)"):
        make_retrieval(replace(CONFIG, haystack=str(tmp_path)), tokenizer)


def test_buckets_double_and_hold_every_position(tmp_path: Path) -> None:
    assert bucket_borders(4096, 32768) == (0, 4096, 8192, 16384, 32768)
    assert bucket_borders(100, 250) == (0, 100, 200, 250)
    tokenizer = tokenizers()[0]
    for number, length in enumerate((6000, 200, 7000, 8000)):
        (tmp_path / f"{number}.txt").write_text(filler_text(seed=number)[:length])
    config = NllConfig(documents=str(tmp_path), length=1000, bucket=300, samples=2)
    nll = make_nll(config, tokenizer)
    assert (len(nll.probes), nll.num_short) == (2, 1)
    head = len(tokenizer.encode("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"))
    for row, number in zip(nll.probes.rows, (0, 2), strict=True):
        (branch,) = row.branches
        text = filler_text(seed=number)[:8000]
        assert branch.input_ids[head:].tolist() == tokenizer.encode(text)[: 1000 - head]
        assert branch.targets.tolist() == list(range(head, 1000))
    assert nll.probes.counts_RG.tolist() == [[300 - head, 300, 400]] * 2
    with pytest.raises(UserError, match=r"evaluation\.nll\.length \(99999\): the longest of the 4"):
        make_nll(replace(config, length=99999), tokenizer)


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


def test_plain_ids_never_hold_a_special_token() -> None:
    tokenizer = tokenizers()[0]
    text = "one <|im_start|><|im_end|> two"
    ids = plain_ids(tokenizer, text)
    assert tokenizer.decode(ids) == text
    specials = {tokenizer.encode(special)[0] for special in CHATML_SPECIAL}
    assert not specials & set(ids)
