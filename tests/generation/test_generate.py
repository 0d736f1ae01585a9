from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.config.tokenize import TokenizeConfig
from megatron_longpo.data.text.examples import ExampleFile
from megatron_longpo.data.text.tokenize import run_tokenize
from megatron_longpo.errors import UserError
from megatron_longpo.generation import generate
from megatron_longpo.generation.questions.planted_facts import PLANTED_KINDS
from tests.generation.scripted import DOCUMENT, Scripted, by_length, is_long, settings

# ---------------------------------------------------------------- with a real model


def test_a_real_model_writes_examples_that_tokenize(
    model: str, documents: str, tmp_path: Path
) -> None:
    config = settings(model, documents, tmp_path, rejected_temperature=1.5)
    summary = generate.run_generate(config)
    assert summary.num_examples >= 1
    assert summary.num_documents == 4
    examples = list(ExampleFile(config.output))
    assert len(examples) == summary.num_examples
    assert not (tmp_path / "examples.jsonl.partial").exists()
    for example in examples:
        for turn in example.turns:
            start, end = turn.chunk_span or (0, 0)
            assert example.document[start:end] == turn.chunk
            assert turn.chosen and turn.rejected and turn.chosen != turn.rejected
    rows = run_tokenize(
        TokenizeConfig(examples=config.output, output=str(tmp_path / "r.jsonl"), tokenizer=model)
    )
    assert rows.num_rows == len(examples)


def test_same_seed_same_file(model: str, documents: str, tmp_path: Path) -> None:
    outputs = []
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        config = settings(
            model,
            documents,
            tmp_path,
            output=str(tmp_path / name),
            seed=seed,
            rejected_temperature=1.0,
            rejected_top_p=0.9,
            limit=2,
        )
        generate.run_generate(config)
        outputs.append([(e.document, e.turns) for e in ExampleFile(config.output)])
    assert outputs[0] == outputs[1] != outputs[2]


def test_model_that_cannot_be_loaded(documents: str, tmp_path: Path, model: str) -> None:
    (tmp_path / "hollow").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "hollow" / name).write_bytes((Path(model) / name).read_bytes())
    with pytest.raises(UserError, match=r"model \(.*hollow\): cannot be loaded"):
        generate.run_generate(settings(str(tmp_path / "hollow"), documents, tmp_path))


# ---------------------------------------------------------------- with scripted answers


def test_chosen_reads_the_chunk_and_rejected_the_document(
    documents: str, tmp_path: Path, scripted: Callable[..., Scripted]
) -> None:
    backend = scripted(by_length)
    config = settings("m", documents, tmp_path, system="Sir.", rejected_temperature=0.7)
    summary = generate.run_generate(config)
    assert (summary.num_examples, summary.num_turns) == (3, 6)
    assert summary.dropped == {"document without a chunk of the right length": 1}
    first = ExampleFile(config.output)[0]
    for number, turn in enumerate(first.turns):
        assert (turn.chosen, turn.rejected) == (
            "A short and right answer.",
            "A long and wrong answer.",
        )
        for prompt, context in (
            (backend.prompts[number], turn.chunk),
            (backend.prompts[2 + number], first.document),
        ):
            assert prompt == (
                f"<|im_start|>system\nSir.<|im_end|>\n<|im_start|>user\n"
                f"{context.strip()}\n\n{turn.question}<|im_end|>\n<|im_start|>assistant\n"
            )
        assert f"`{first.meta['facts'][number][0]}`" not in turn.question
        assert first.meta["facts"][number][0] in turn.chunk
    assert first.turns[0].chunk != first.turns[1].chunk
    assert [s.temperature for s in backend.samplings[:4]] == [0.0, 0.0, 0.7, 0.7]


def test_document_is_cut_for_the_model_but_never_the_question_or_chunks(
    documents: str, tmp_path: Path, scripted: Callable[..., Scripted]
) -> None:
    backend = scripted(lambda prompt: f"An answer of {len(prompt)} characters.")
    config = settings("m", documents, tmp_path, max_prompt_tokens=450)
    generate.run_generate(config)
    for number, example in enumerate(ExampleFile(config.output)):
        assert example.document == DOCUMENT.replace("Thing", f"Thing{'abc'[number]}")
        rejected = backend.prompts[4 * number + 2 : 4 * number + 4]
        for prompt, turn in zip(rejected, example.turns, strict=True):
            assert 400 < len(backend.tokenizer.encode(prompt)) <= 450
            assert turn.question in prompt
            for other in example.turns:
                assert other.chunk in prompt
            assert example.document not in prompt


def test_long_documents_are_bounded(
    documents: str, tmp_path: Path, scripted: Callable[..., Scripted]
) -> None:
    backend = scripted(lambda prompt: f"An answer of {len(prompt)} characters.")
    config = settings("m", documents, tmp_path, max_document_tokens=400)
    generate.run_generate(config)
    for example in ExampleFile(config.output):
        assert len(backend.tokenizer.encode(example.document)) == 400
        assert example.meta["document_tokens"] == 400
        assert example.document.startswith("class Thing")
    config = settings(
        "m",
        documents,
        tmp_path,
        max_document_tokens=400,
        min_document_tokens=20,
        long_documents="drop",
        overwrite=True,
    )
    with pytest.raises(
        UserError, match=r"3 x document over max_document_tokens, 1 x document under mi"
    ):
        generate.run_generate(config)


def test_chunks_say_which_tokens_of_the_document_they_are(
    documents: str, tmp_path: Path, scripted: Callable[..., Scripted]
) -> None:
    tokenizer = scripted(by_length).tokenizer
    config = settings("m", documents, tmp_path)
    generate.run_generate(config)
    for example in ExampleFile(config.output):
        ids = tokenizer.encode(example.document)
        assert example.meta["document_tokens"] == len(ids)
        spans = example.meta["chunk_token_spans"]
        for (first, last), turn in zip(spans, example.turns, strict=True):
            assert tokenizer.decode(ids[first:last]).strip() == turn.chunk.strip()
            assert 60 <= last - first <= 150


def test_drops_are_counted(
    documents: str, tmp_path: Path, scripted: Callable[..., Scripted]
) -> None:
    def answer(prompt: str) -> str:
        if not is_long(prompt):
            return "A right answer."
        return "a right ANSWER." if "Thinga" in prompt else "I'm sorry, no."

    scripted(answer)
    with pytest.raises(
        UserError, match=r"gave no example \(dropped: .*4 x rejected answer: refusal"
    ):
        generate.run_generate(settings("m", documents, tmp_path))
    assert not (tmp_path / "examples.jsonl.partial").exists()

    scripted(by_length, finished=False)
    with pytest.raises(UserError, match=r"\d+ x chosen answer: unfinished"):
        generate.run_generate(settings("m", documents, tmp_path, filters=["unfinished"]))
    scripted(by_length)
    with pytest.raises(UserError, match=r"\d+ x chosen answer: without the fact"):
        generate.run_generate(settings("m", documents, tmp_path, require_fact=True))


def test_required_fact_is_in_the_chosen_answer(
    documents: str, tmp_path: Path, scripted: Callable[..., Scripted]
) -> None:
    scripted(lambda prompt: "None of it." if is_long(prompt) else prompt[-4000:])
    config = settings("m", documents, tmp_path, require_fact=True)
    assert generate.run_generate(config).num_turns == 6


def test_the_model_writes_questions(
    documents: str, tmp_path: Path, scripted: Callable[..., Scripted]
) -> None:
    def answer(prompt: str) -> str:
        if "numbered 1 to 4" in prompt:
            bad = "Thingb" in prompt
            return "No." if bad else "\n".join(f"{n}. What about {n}, then?" for n in range(1, 5))
        return by_length(prompt)

    backend = scripted(answer)
    config = settings("m", documents, tmp_path, instructions="model")
    summary = generate.run_generate(config)
    assert summary.num_examples == 2
    assert summary.dropped["chunk whose questions did not parse"] >= 2
    questions = {turn.question for e in ExampleFile(config.output) for turn in e.turns}
    assert all("What about" in question for question in questions)
    assert (backend.samplings[0].temperature, backend.samplings[0].top_p) == (0.7, 0.9)
    assert len(set(backend.seeds)) == len(backend.seeds)


def test_instructions_from_a_file(
    documents: str, tmp_path: Path, scripted: Callable[..., Scripted]
) -> None:
    scripted(by_length)
    (tmp_path / "q.txt").write_text("Sum it up.\n")
    config = settings("m", documents, tmp_path, instructions=str(tmp_path / "q.txt"))
    generate.run_generate(config)
    assert all("Sum it up." in t.question for e in ExampleFile(config.output) for t in e.turns)


def test_planted_facts_are_in_the_example(
    documents: str, tmp_path: Path, scripted: Callable[..., Scripted]
) -> None:
    backend = scripted(lambda p: "None of it." if is_long(p) else p[-4000:])
    config = settings("m", documents, tmp_path, instructions="planted", require_fact=True)
    assert generate.run_generate(config).num_turns == 6
    for example in ExampleFile(config.output):
        for turn, kind, fact in zip(
            example.turns, example.meta["kinds"], example.meta["facts"], strict=True
        ):
            assert kind in PLANTED_KINDS
            assert all(word in turn.chunk and word in example.document for word in fact)
            assert not any(word in DOCUMENT for word in fact if len(word) > 3)
    assert len(backend.prompts) == 12


def test_existing_output_is_refused(documents: str, tmp_path: Path) -> None:
    (tmp_path / "examples.jsonl").write_text("precious\n")
    with pytest.raises(UserError, match=r"output \(.*\): exists and is not empty"):
        generate.run_generate(settings("m", documents, tmp_path))
    assert (tmp_path / "examples.jsonl").read_text() == "precious\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_min_tokens": 200}, r"chunk_min_tokens \(200\): must not exceed chunk_max_tok"),
        ({"chunk_max_tokens": 3000}, r"chunk_max_tokens \(3000\): must be below max_prompt_tokens"),
    ],
)
def test_bad_settings_are_named(
    changes: dict[str, Any],
    message: str,
    documents: str,
    tmp_path: Path,
    scripted: Callable[..., Scripted],
) -> None:
    scripted(by_length)
    with pytest.raises(UserError, match=message):
        generate.run_generate(settings("m", documents, tmp_path, **changes))


def test_examples_are_valid_json_lines(
    documents: str, tmp_path: Path, scripted: Callable[..., Scripted]
) -> None:
    scripted(by_length)
    config = settings("m", documents, tmp_path)
    generate.run_generate(config)
    for line in Path(config.output).read_text().splitlines():
        assert set(json.loads(line)) == {"id", "document", "turns", "meta"}
