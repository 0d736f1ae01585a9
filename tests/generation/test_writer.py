"""How one document's questions and answers are asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_longpo.data.text.examples import ExampleFile
from megatron_longpo.generation import generate
from tests.generation.scripted import Scripted, by_length, is_long, settings


def test_a_document_is_asked_about_in_few_calls(
    documents: str, tmp_path: Path, scripted: Callable[..., Scripted]
) -> None:
    def answer(prompt: str) -> str:
        if "numbered 1 to 4" in prompt:
            return "\n".join(f"{n}. What about {n}, then?" for n in range(1, 5))
        return by_length(prompt)

    backend = scripted(answer)
    config = settings("m", documents, tmp_path, instructions="model", turns=3, limit=1)
    assert generate.run_generate(config).num_turns == 3
    assert backend.batches == [3, 3, 3]  # questions, chosen answers, rejected answers


def test_other_chunks_take_the_place_of_bad_ones(
    documents: str, tmp_path: Path, scripted: Callable[..., Scripted]
) -> None:
    answered = 0

    def answer(prompt: str) -> str:
        nonlocal answered
        answered += 1
        return "I'm sorry, no." if answered <= 3 else by_length(prompt)

    backend = scripted(answer)
    config = settings("m", documents, tmp_path, limit=1, chunk_min_tokens=30, chunk_max_tokens=100)
    summary = generate.run_generate(config)
    assert backend.batches == [2, 2, 1, 2]  # two bad ones, one of two, the last, rejected ones
    assert summary.num_turns == 2
    assert summary.dropped == {"chosen answer: refusal": 3}


def test_candidates_for_the_rejected_answer(
    documents: str, tmp_path: Path, scripted: Callable[..., Scripted]
) -> None:
    answers = iter(["", "a RIGHT answer.", "Wrong one.", "Wrong two.", "wrong one."] * 2)

    def answer(prompt: str) -> str:
        return next(answers) if is_long(prompt) else "A right answer."

    backend = scripted(answer)
    config = settings(
        "m",
        documents,
        tmp_path,
        limit=1,
        rejected_candidates=5,
        candidate_temperature=0.9,
        rejected_top_p=0.8,
    )
    generate.run_generate(config)
    assert backend.batches == [2, 10]
    assert [(one.temperature, one.top_p) for one in backend.samplings[2:7]] == (
        [(0.0, 0.8)] + [(0.9, 0.8)] * 4
    )
    assert len(set(backend.seeds)) == len(backend.seeds)
    (example,) = ExampleFile(config.output)
    assert [turn.rejected for turn in example.turns] == ["Wrong one.", "Wrong one."]
    assert example.meta["rejected_candidates"] == [["Wrong two."], ["Wrong two."]]


def test_lengths_are_those_of_the_texts(
    documents: str, tmp_path: Path, scripted: Callable[..., Scripted]
) -> None:
    backend = scripted(by_length)
    summary = generate.run_generate(settings("m", documents, tmp_path, limit=1))
    (example,) = ExampleFile(tmp_path / "examples.jsonl")
    count = [len(backend.tokenizer.encode(turn.chunk or "")) for turn in example.turns]
    assert summary.tokens["chunk"]["max"] == max(count)
    assert summary.tokens["chunk"]["mean"] == sum(count) / 2
    tokens = len(backend.tokenizer.encode(example.document))
    assert summary.tokens["document"] == dict.fromkeys(("min", "median", "mean", "max"), tokens)
