from __future__ import annotations

import random
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_longpo.config.names import FactSplit
from megatron_longpo.generation.questions.facts import holds_fact
from megatron_longpo.generation.questions.planted_facts import PLANTED_KINDS, made_up_fields
from megatron_longpo.generation.questions.planting import Planting, plant

PROSE = "The harbour is old.\n\nIt has a ledger. It has barrels.\n\nNobody paid.\n\nThe end.\n"
CODE = "def fill(size):\n    return size\n\n\ndef seek(offset):\n    pass\n"


def without(planting: Planting) -> set[str]:
    """The document with what was planted taken out, with each of the gaps that may go after it."""
    texts = {planting.document}
    for sentence in planting.sentences:
        assert planting.document.count(sentence) == 1
        texts = {t.replace(sentence + gap, "") for t in texts for gap in ("\n\n", "\n", " ")}
    return texts


@given(
    st.lists(st.text(alphabet="ab. \n", max_size=30), min_size=3, max_size=3),
    st.integers(min_value=0, max_value=2),
    st.integers(min_value=0, max_value=10_000),
    st.sampled_from(["train", "test"]),
)
def test_spans_hold_what_they_held(
    parts: list[str], index: int, seed: int, split: FactSplit
) -> None:
    parts[index] = "A b c d e." + parts[index] + "f g h i j."
    document = "xx" + "".join(parts) + "yy"
    starts = [2 + sum(map(len, parts[:number])) for number in range(3)]
    spans = [(start, start + len(part)) for start, part in zip(starts, parts, strict=True)]
    planting = plant(document, spans, index, random.Random(seed), split=split)
    assert planting is not None
    for number, (start, end) in enumerate(planting.spans):
        held = planting.document[start:end]
        if number == index:
            assert all(sentence in held for sentence in planting.sentences)
            assert held[0] == parts[index][0] and held[-1] == parts[index][-1]
        else:
            assert held == parts[number]
    assert len(planting.document) - len(document) == sum(
        end - start for start, end in planting.spans
    ) - sum(map(len, parts))
    assert planting == plant(document, spans, index, random.Random(seed), split=split)


@pytest.mark.parametrize("document", [PROSE, CODE])
def test_the_document_s_own_text_stays(document: str) -> None:
    for seed in range(50):
        planting = plant(document, [(0, len(document))], 0, random.Random(seed))
        assert planting is not None
        assert document in without(planting)


def test_sentences_stand_between_paragraphs_or_lines() -> None:
    for seed in range(20):
        planting = plant(PROSE, [(0, len(PROSE))], 0, random.Random(seed))
        assert planting is not None
        for sentence in planting.sentences:
            assert f"\n\n{sentence}\n\n" in planting.document
        planting = plant(CODE, [(0, 30)], 0, random.Random(seed), kinds=["access_code"])
        assert planting is not None
        assert f"\n{planting.sentences[0]}\n    return" in planting.document


def test_a_chunk_without_white_space_has_no_place() -> None:
    assert plant("x" * 50, [(0, 50)], 0, random.Random(0)) is None


def test_names_that_the_document_has_are_not_made_up() -> None:
    rng = random.Random(0)
    things = {made_up_fields(rng, "train")["thing"] for _ in range(4000)}
    left = sorted(things)[0]
    document = PROSE + " ".join(things - {left})
    span = [(0, len(PROSE))]
    kinds = ["access_code"]
    questions = {
        planting.fact.question
        for seed in range(20)
        if (planting := plant(document, span, 0, random.Random(seed), kinds=kinds))
    }
    assert questions and all(left in question for question in questions)
    document += " " + left
    assert plant(document, span, 0, random.Random(0), kinds=kinds) is None


@pytest.mark.parametrize("name", PLANTED_KINDS)
def test_kinds(name: str) -> None:
    kind = PLANTED_KINDS[name]
    known = set(made_up_fields(random.Random(0), kind.split))

    def fields(text: str) -> set[str]:
        return {field for _, field, _, _ in string.Formatter().parse(text) if field}

    for wording in kind.statements:
        told = set().union(*map(fields, wording))
        assert told <= known
        assert set(kind.answer) <= told
        for question in kind.questions:
            assert fields(question) <= told
    for seed in range(10):
        planting = plant(
            PROSE, [(0, len(PROSE))], 0, random.Random(seed), split=kind.split, kinds=[name]
        )
        assert planting is not None and planting.fact.kind == name
        assert holds_fact(planting.document, planting.fact.answer)
        assert not holds_fact(PROSE, planting.fact.answer)
        hidden = [word for word in planting.fact.answer if word not in planting.fact.question]
        assert hidden, "the question gives the whole answer away"


def test_hard_kinds_are_planted_by_name_alone() -> None:
    hard = {name for name, kind in PLANTED_KINDS.items() if kind.hard}
    assert hard == {"item_list", "two_hop_place", "heavier"}
    span = [(0, len(PROSE))]

    def planted(kinds: list[str] | None) -> set[str]:
        plantings = [plant(PROSE, span, 0, random.Random(seed), kinds=kinds) for seed in range(200)]
        return {planting.fact.kind for planting in plantings if planting}

    train = {name for name, kind in PLANTED_KINDS.items() if kind.split == "train"}
    assert planted(None) == train - hard
    assert planted(["heavier", "weight"]) == {"heavier", "weight"}


def test_questions_have_the_words_of_their_sentences() -> None:
    """But for the hard kinds; small models find little else."""
    for kind in PLANTED_KINDS.values():
        if kind.split == "train" and not kind.hard:
            for wording in kind.statements:
                assert len(wording) == 1
                subject = re.match(r"The (?:\w+ )*?(?:of the )?(\{\w+\})", wording[0])
                assert subject, "the sentence begins with what it is about"
                assert all(subject[1] in question for question in kind.questions)


def test_train_and_test_have_nothing_in_common() -> None:
    texts: dict[str, set[str]] = {"train": set(), "test": set()}
    for kind in PLANTED_KINDS.values():
        texts[kind.split] |= {*kind.questions, *(s for wording in kind.statements for s in wording)}
    assert not texts["train"] & texts["test"]
    assert sum(kind.split == "train" for kind in PLANTED_KINDS.values()) >= 6
    assert sum(kind.split == "test" for kind in PLANTED_KINDS.values()) >= 4
    rng = random.Random(0)
    names: dict[str, set[str]] = {}
    for split in ("train", "test"):
        drawn = [made_up_fields(rng, split) for _ in range(500)]
        names[split] = {
            word
            for fields in drawn
            for field in ("thing", "person", "role", "place", "event", "item1")
            for word in fields[field].split()
        } - {"of", "the"}
    assert not names["train"] & names["test"]
