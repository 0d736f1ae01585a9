"""Documents written together: each request's text is what it would be alone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_longpo.errors import StopRequested, UserError
from megatron_longpo.generation import generate
from megatron_longpo.generation.backends import decoding_loop
from megatron_longpo.generation.backends.base import BackendError, Completion, Request, Sampling
from megatron_longpo.generation.backends.factory import make_backend
from megatron_longpo.generation.backends.slots import SlotCache, SlotShape
from megatron_longpo.generation.backends.transformers import TransformersBackend
from tests.generation.backends.test_transformers import (
    config,
    copy_of,
    make_blocks_small,
    request,
    text,
)
from tests.generation.scripted import settings

Answers = list[Completion | BackendError]


def greedy(max_new_tokens: int) -> Sampling:
    return Sampling(temperature=0.0, top_p=1.0, max_new_tokens=max_new_tokens)


def sampled(temperature: float, top_p: float) -> Sampling:
    return Sampling(temperature=temperature, top_p=top_p, max_new_tokens=20)


def document(number: int) -> list[Request]:
    """Four requests: about a text that they share, or with nothing in common."""
    samplings = [greedy(7 + 5 * number), sampled(1.2, 0.9), greedy(3), sampled(0.9, 1.0)]
    start = text(40 + 37 * number, number) if number % 2 else ""
    return [
        request(
            f"{start} {text(2 + 9 * index + number, index)}?", sampling, seed=10 * number + index
        )
        for index, sampling in enumerate(samplings[: 2 + number % 3])
    ]


DOCUMENTS = [document(number) for number in range(6)]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    make_blocks_small(monkeypatch)


@pytest.fixture
def expected(model: str, small_blocks: None) -> list[Answers]:
    """One request at a time."""
    backend = TransformersBackend(config(model))
    return [[asyncio.run(backend.complete([one]))[0] for one in requests] for requests in DOCUMENTS]


def answer_all(backend: TransformersBackend) -> list[Answers]:
    """Every document asks on its own, each some time after the one before."""

    async def ask(number: int) -> Answers:
        for _ in range(6 * number):
            await asyncio.sleep(0)
        return await backend.complete(DOCUMENTS[number])

    async def all_ask() -> list[Answers]:
        return list(await asyncio.gather(*(ask(number) for number in range(len(DOCUMENTS)))))

    return asyncio.run(all_ask())


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[SlotShape]:
    """Of the slots that are made."""
    made: list[SlotShape] = []
    init = SlotCache.__init__

    def noted(self: SlotCache, shape: SlotShape, **more: Any) -> None:
        made.append(shape)
        init(self, shape, **more)

    monkeypatch.setattr(SlotCache, "__init__", noted)
    return made


@pytest.mark.parametrize("steps", [1, 8])
@pytest.mark.parametrize("most_masked", [0, 8192**2], ids=["rests one by one", "rests together"])
def test_documents_that_come_and_go_change_no_text(
    model: str,
    expected: list[Answers],
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    most_masked: int,
) -> None:
    monkeypatch.setattr(decoding_loop, "MOST_MASKED", most_masked)
    backend = TransformersBackend(config(model, documents_at_once=3))
    assert backend.documents_at_once == 3
    backend._loop._steps = steps
    under_way: list[int] = []
    write_some = backend._loop._write_some

    def counted() -> None:
        under_way.append(len(backend._loop._active))
        write_some()

    monkeypatch.setattr(backend._loop, "_write_some", counted)
    assert answer_all(backend) == expected
    assert {1, 2} <= set(under_way)
    assert answer_all(backend) == expected  # the same slots, used before
    assert len({str(answer) for answers in expected for answer in answers}) > 12


def test_rows_are_written_in_one_pass(
    model: str, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = TransformersBackend(config(model, documents_at_once=4))
    backend._loop._eos_ids = frozenset({-1})
    widths: list[int] = []
    step = SlotCache.step

    def counted(self: SlotCache, *rest: Any, **more: Any) -> torch.Tensor:
        logits = step(self, *rest, **more)
        widths.append(len(logits))
        return logits

    monkeypatch.setattr(SlotCache, "step", counted)

    async def four() -> None:
        requests = [request(text(20, seed), greedy(12)) for seed in (1, 2)]
        await asyncio.gather(*(backend.complete(requests) for _ in range(4)))

    asyncio.run(four())
    assert widths == [8] * 11  # the first token of twelve comes from the prompt


def test_slots_stay_within_batch_tokens(
    model: str, expected: list[Answers], shapes: list[SlotShape]
) -> None:
    backend = TransformersBackend(config(model, documents_at_once=6, batch_tokens=2600))
    assert answer_all(backend) == expected
    assert len(shapes) > 1 and max(shape.num_slots for shape in shapes) > 1
    for shape in shapes:
        assert shape.num_slots == 1 or shape.num_slots * shape.capacity <= 2600


def test_short_memory_halves_the_documents(
    model: str,
    expected: list[Answers],
    shapes: list[SlotShape],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    step = SlotCache.step
    most = 2

    def short(self: SlotCache, *rest: Any, **more: Any) -> torch.Tensor:
        logits = step(self, *rest, **more)
        if self.shape.num_slots * self.shape.num_requests > most:
            raise torch.OutOfMemoryError
        return logits

    monkeypatch.setattr(SlotCache, "step", short)
    backend = TransformersBackend(config(model, documents_at_once=4))
    answers = answer_all(backend)
    assert answers == expected
    err = capsys.readouterr().err
    assert "warning: 4 documents of" in err and "answered in two halves" in err
    assert [shape.num_slots for shape in shapes[:2]] == [4, 2]
    most = 0
    (failed, *_) = asyncio.run(backend.complete(DOCUMENTS[0]))
    assert str(failed) == "prompt that does not fit in GPU memory"
    most = 100
    assert answer_all(backend) == expected


def test_a_task_that_is_cancelled_leaves_its_slot(model: str, expected: list[Answers]) -> None:
    backend = TransformersBackend(config(model, documents_at_once=2))
    endless = [request("tide", greedy(10**5))]

    async def ask() -> Answers:
        for _ in range(2):
            task = asyncio.create_task(backend.complete(endless))
            for _ in range(10):
                await asyncio.sleep(0)
            task.cancel()
        return await backend.complete(DOCUMENTS[3])

    assert asyncio.run(ask()) == expected[3]


def test_what_goes_wrong_is_told_to_all_who_wait(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = TransformersBackend(config(model, documents_at_once=2))

    def broken(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("the model broke")

    monkeypatch.setattr(SlotCache, "step", broken)
    with pytest.raises(RuntimeError, match="the model broke"):
        answer_all(backend)


def test_a_run_and_a_resumed_run_write_the_same_file(
    model: str, documents: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more: dict[str, Any] = {
        "dtype": "fp32",
        "device": "cpu",
        "num_threads": 1,
        "max_new_tokens": 16,
        "chosen_temperature": 0.8,
        "filters": [],
        "report": False,
    }

    def written(name: str, **changes: Any) -> bytes:
        (tmp_path / name).mkdir(exist_ok=True)
        generate.run_generate(settings(model, documents, tmp_path / name, **{**more, **changes}))
        return (tmp_path / name / "examples.jsonl").read_bytes()

    one_by_one = written("one")
    assert one_by_one.count(b"\n") == 3
    assert written("together", documents_at_once=3) == one_by_one
    save = generate._ShardRun._save

    def interrupted(self: Any, *rest: Any) -> None:
        save(self, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(generate._ShardRun, "_save", interrupted)
        with pytest.raises(StopRequested):
            written("resumed", documents_at_once=3)
    assert written("resumed", documents_at_once=2) == one_by_one


def test_a_model_whose_rope_depends_on_the_longest_text_is_written_alone(
    model: str, tmp_path: Path
) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    folder = copy_of(model, tmp_path, config={"rope_parameters": rope})
    with pytest.raises(UserError, match=r"documents_at_once \(2\): must be 1 for"):
        make_backend(config(folder, documents_at_once=2))
    assert make_backend(config(folder)).documents_at_once == 1
    assert make_backend(config(model)).documents_at_once == 1  # the default
