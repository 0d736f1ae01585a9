"""The study's pairs: which are chosen, whose they are, and how they come back."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_longpo.data.jsonl import write_packed_jsonl
from megatron_longpo.data.text.examples import Example, ExampleFile, Turn, write_examples
from megatron_longpo.errors import UserError
from megatron_longpo.generation.questions.planted_facts import PLANTED_KINDS
from tools.studies.smollm2_32k import outlines, pairs, study
from tools.studies.smollm2_32k.commands import ROOT
from tools.studies.smollm2_32k.plan import FULL, SETTING, plan

RECIPE = ROOT / "examples" / "smollm2_32k"
RUNS = plan(SETTING)


def test_questions_in_training_are_not_those_of_the_evaluation() -> None:
    config = yaml.safe_load((RECIPE / "generate.yaml").read_text())
    training = {name for name, kind in PLANTED_KINDS.items() if kind.split == "train"}
    assert set(config["fact_kinds"]) <= training - {"access_code"}
    assert config["fact_split"] == "train"


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """Five examples of two turns; of number n the first n % 3 rejected answers are right."""
    path = tmp_path / "examples.jsonl"
    written = []
    for n in range(5):
        answers = [("It is A.", "a" if turn < n % 3 else "It is B.") for turn in range(2)]
        turns = tuple(
            Turn(chunk="text", chunk_span=None, question=f"q{turn}?", chosen=chosen, rejected=wrong)
            for turn, (chosen, wrong) in enumerate(answers)
        )
        meta = {"kinds": ["x", "y"], "facts": [["A."], ["A."]], "model": "m"}
        if n % 3:
            meta["facts"] = [["A"], ["A"]]
        written.append(Example(id=f"d{n}", document="a text", turns=turns, meta=meta))
    write_examples(path, written)
    summary = {"num_documents": 6, "num_examples": 5, "dropped": {"document: x": 1}}
    path.with_suffix(".summary.json").write_text(json.dumps(summary))
    return path


def test_pairs_without_right_rejected_answers(examples: Path, tmp_path: Path) -> None:
    target = tmp_path / "pairs-1.jsonl.gz"
    described = pairs.choose_pairs(examples, target, number=3, keep_all=False, seed=0)
    assert described["answers"] == {"turns": 10, "chosen_right": 10, "rejected_wrong": 6}
    plain = tmp_path / "pairs.jsonl"
    pairs.unpack(target, plain)
    found = list(ExampleFile(plain))
    # Number 2 has no wrong rejected answer; those with more turns come first.
    assert [len(example.turns) for example in found] == [2, 2, 1]
    assert {example.id for example in found[:2]} == {"d0", "d3"}
    assert found[2].turns[0].question == "q1?"
    assert found[2].meta == {"kinds": ["y"], "facts": [["A"]], "model": "m"}
    assert json.loads(pairs.description_of(target).read_text()) == described
    assert described["digest"] == pairs.digest_in(tmp_path, 1)
    assert pairs.digest_in(tmp_path, 2) is None
    # A second iteration's pairs are another's where those of the first are.
    second = tmp_path / "pairs-2.jsonl.gz"
    choose = partial(pairs.choose_pairs, examples, second, number=3, keep_all=False, seed=0)
    choose(parent=described["digest"])
    assert pairs.digest_in(tmp_path, 2) == described["digest"]
    choose(parent="of others")
    assert pairs.digest_in(tmp_path, 2) is None
    assert described["kinds"] == {"x": 2, "y": 3}
    first = target.read_bytes()
    pairs.choose_pairs(examples, target, number=3, keep_all=False, seed=0)
    assert target.read_bytes() == first
    kept = pairs.choose_pairs(examples, target, number=9, keep_all=True, seed=0)
    assert (kept["pairs"], kept["turns"]) == (5, 10)
    assert len(gzip.decompress(target.read_bytes()).splitlines()) == 5


def test_pairs_of_another_writer_are_not_taken(examples: Path, tmp_path: Path) -> None:
    keep = tmp_path / "keep"
    keep.mkdir()
    arguments: dict[str, Any] = {"scale": FULL, "runs": RUNS, "model": None, "shards": 1}
    made = study.Study(**arguments, output=tmp_path, results=tmp_path, minutes=None, jobs=1)
    choose = partial(pairs.choose_pairs, examples, number=3, keep_all=False, seed=0)
    first = choose(keep / "pairs-1.jsonl.gz")["digest"]
    (writer,) = [run.name for run in RUNS if run.is_parent]
    for name, parent, is_taken in (
        (writer, first, True),
        ("longpo-of-another-setting-s42", first, False),
        (writer, "of others", False),
    ):
        second = choose(keep / "pairs-2.jsonl.gz", parent=parent, writer=name)["digest"]
        assert (made.digest(2) == second) == is_taken
        assert made.digest(1) == first


def test_pairs_come_back_from_their_outlines(tmp_path: Path) -> None:
    texts = [f"Chapter {n}.\n\nIt rains in \u00c5s.\n\nThe end." for n in range(3)]
    documents = tmp_path / "documents.jsonl.gz"
    write_packed_jsonl(documents, ({"text": text} for text in texts))
    written = []
    for n, text in enumerate(texts):
        planted = text.replace("\n\nThe", f"\n\nThe key is {n}.\n\nA clock is {n}.\n\nThe")
        span = (planted.index("The key"), len(planted) - 3)
        turn = Turn(
            **{"chunk": planted[slice(*span)], "chunk_span": span, "question": "Which key?"},
            **{"chosen": f"It is {n}.", "rejected": "None."},
        )
        meta = {"kinds": ["x"], "facts": [[str(n)]], "model": "m"}
        meta |= {"source": f"/elsewhere/documents.jsonl.gz:{n + 1}"}
        written.append(Example(id=f"d{n}", document=planted, turns=(turn,), meta=meta))
    examples = tmp_path / "examples.jsonl"
    write_examples(examples, written)
    summary = {"num_documents": 3, "num_examples": 3, "dropped": {}}
    examples.with_suffix(".summary.json").write_text(json.dumps(summary))
    results, keep = tmp_path / "results", tmp_path / "keep"
    results.mkdir()
    made = pairs.choose_pairs(
        examples,
        results / "pairs-1.jsonl.gz",
        number=2,
        keep_all=False,
        seed=1,
        documents=documents,
    )
    outlined = outlines.outline_of(results / "pairs-1.jsonl.gz")
    assert "rains" not in gzip.decompress(outlined.read_bytes()).decode()

    arguments: dict[str, Any] = {"scale": FULL, "runs": RUNS, "model": None, "shards": 1}
    other = study.Study(**arguments, output=tmp_path, results=results, minutes=None, jobs=1)
    keep.mkdir()
    write_packed_jsonl(keep / documents.name, ({"text": text} for text in ["new", *texts]))
    other.take_our_pairs()
    one, back = (tmp_path / f"{name}.jsonl" for name in ("one", "back"))
    pairs.unpack(results / "pairs-1.jsonl.gz", one)
    pairs.unpack(keep / "pairs-1.jsonl.gz", back)
    for ours, theirs in zip(ExampleFile(back), ExampleFile(one), strict=True):
        line = int(str(theirs.meta["source"]).rpartition(":")[2])
        assert ours.meta["source"] == f"{keep / documents.name}:{line + 1}"
        same = {"source": "", "meta": {**theirs.meta, "source": ours.meta["source"]}}
        assert replace(ours, source="") == replace(theirs, **same)
    assert other.digest(1) == made["digest"]
    other.take_our_pairs()

    described = keep / "pairs-1.json"
    described.write_text(described.read_text().replace(made["digest"], "of others"))
    with pytest.raises(UserError, match=r"pairs-1.jsonl.gz has others than the results are of"):
        other.take_our_pairs()
    (keep / "pairs-1.jsonl.gz").unlink()
    mine = (results / "pairs-1.json").read_text()
    (results / "pairs-1.json").write_text(mine.replace(made["digest"], "of others"))
    with pytest.raises(UserError, match=r"gives other pairs than those of .* \(of others\)"):
        other.take_our_pairs()
    (results / "pairs-1.json").write_text(mine)
    write_packed_jsonl(keep / documents.name, ({"text": text} for text in ["new", texts[0]]))
    with pytest.raises(UserError, match=r"--our-pairs: .* lacks the documents of [12] of 2 pairs"):
        other.take_our_pairs()
    outlined.unlink()
    with pytest.raises(UserError, match=r"pairs-1.outline.jsonl.gz is not there"):
        other.take_our_pairs()


def test_a_fact_within_a_line_has_no_outline(examples: Path, tmp_path: Path) -> None:
    (example, *_) = ExampleFile(examples)
    assert outlines.outline(example, "a text") is not None
    assert outlines.outline(replace(example, document="a KEY text"), "a text") is None
