"""Rows of the retrieval set, by what they hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_longpo.config.evaluation import RetrievalConfig
from megatron_longpo.data.text.chat_tokenizer import ChatTokenizer
from megatron_longpo.errors import UserError
from megatron_longpo.evaluation.retrieval import make_retrieval
from tests.evaluation.chat_tokenizers import tokenizers

CONFIG = RetrievalConfig(
    kinds=("passkey", "multi_needle"), lengths=(600, 900), depths=(0.0, 0.5, 1.0), samples=2
)


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
