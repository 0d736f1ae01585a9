"""The transformers backend beside transformers' own `generate`, one prompt at a time."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
import torch

from megatron_longpo.config.backends import BackendConfig
from megatron_longpo.data.text.chat import prompt_ids
from megatron_longpo.generation.backends import prefill, running, slots
from megatron_longpo.generation.backends.base import BackendError, Completion, Request, Sampling
from megatron_longpo.generation.backends.transformers import TransformersBackend

WORDS = [
    "harbour",
    "ledger",
    "barrel",
    "tide",
    "measure",
    "depth",
    "width",
    "salt",
    "farmer",
    "mayor",
]
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=24)
SAMPLED = Sampling(temperature=1.3, top_p=0.9, max_new_tokens=24)


def text(num_words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))


def request(content: str, sampling: Sampling = GREEDY, seed: int = 0) -> Request:
    return Request(messages=({"role": "user", "content": content},), sampling=sampling, seed=seed)


def complete(
    backend: TransformersBackend, requests: list[Request]
) -> list[Completion | BackendError]:
    return asyncio.run(backend.complete(requests))


def make_blocks_small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (prefill, running, slots):
        monkeypatch.setattr(module, "BLOCK", 32)


@pytest.fixture
def backend(model: str, monkeypatch: pytest.MonkeyPatch) -> TransformersBackend:
    make_blocks_small(monkeypatch)
    return TransformersBackend(config(model))


def config(model: str, **changes: Any) -> BackendConfig:
    return BackendConfig(model=model, dtype="fp32", device="cpu", num_threads=1, **changes)


def stock_answer(model: str, backend: TransformersBackend, one: Request) -> Completion:
    """What `generate` of transformers writes, without anything of ours."""
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    prompt = prompt_ids(backend.tokenizer, one.messages)
    ids = torch.tensor([prompt])
    eos = backend.tokenizer.eos_ids[0]
    output = stock.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=one.sampling.max_new_tokens,
        do_sample=False,
        pad_token_id=eos,
        eos_token_id=eos,
    )
    written = output[0, len(prompt) :].tolist()
    answer = backend.tokenizer.decode(written, skip_special=True).strip()
    return Completion(text=answer, finished=written[-1] == eos)


DOCUMENT = text(350, 0)
SHARED = [request(f"{DOCUMENT}\n\n{text(n, n)}?") for n in (2, 9, 1, 30)]
"""Long documents with questions of several lengths."""
UNLIKE = [request(text(n, n)) for n in (60, 3, 25, 90)]
"""Nothing but the template in common."""


@pytest.mark.parametrize("requests", [SHARED, UNLIKE, SHARED[:1]], ids=["shared", "unlike", "one"])
def test_a_batch_writes_what_generate_writes_one_by_one(
    model: str, backend: TransformersBackend, requests: list[Request]
) -> None:
    expected = [stock_answer(model, backend, one) for one in requests]
    assert complete(backend, requests) == expected
    assert len({str(answer) for answer in expected}) == len(requests)


def count_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list to which every call of the model adds how many tokens it reads."""
    read: list[int] = []
    for module in (prefill, slots):
        forward = module.forward

        def counted(*args: Any, forward: Any = forward, **more: Any) -> torch.Tensor:
            read.append(len(args[2]))  # model, cache, ids
            return forward(*args, **more)

        monkeypatch.setattr(module, "forward", counted)
    return read


def test_a_shared_prefix_is_read_once(
    backend: TransformersBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = count_read(monkeypatch)
    sampling = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=1)
    requests = [request(one.messages[0]["content"], sampling) for one in SHARED]
    lengths = [len(prompt_ids(backend.tokenizer, one.messages)) for one in requests]
    first = complete(backend, requests)
    once = sum(read)
    assert once < max(lengths) + 4 * 150 < sum(lengths) / 2
    read.clear()
    assert complete(backend, requests) == first
    assert sum(read) < 4 * 150  # whole blocks of the prefix are there from the call before


@pytest.mark.parametrize("documents_at_once", [1, 2])
def test_larger_slots_keep_the_prefix(
    model: str,
    backend: TransformersBackend,
    monkeypatch: pytest.MonkeyPatch,
    documents_at_once: int,
) -> None:
    expected = complete(backend, SHARED)
    other = TransformersBackend(config(model, documents_at_once=documents_at_once))
    complete(other, SHARED[:2])
    slots_before = other._loop._slots
    read = count_read(monkeypatch)
    assert complete(other, SHARED) == expected
    assert other._loop._slots is not slots_before  # two requests needed less room
    # The rests of four prompts, each of less than a block of the prefix more, and new tokens.
    assert sum(read) < 4 * 150 + 4 * GREEDY.max_new_tokens
    assert len(prompt_ids(other.tokenizer, SHARED[0].messages)) > 1000


def test_kept_keys_change_no_bit(
    model: str, backend: TransformersBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logits(after: list[list[Request]]) -> torch.Tensor:
        fresh = TransformersBackend(config(model))
        for requests in after:
            complete(fresh, requests)
        seen = []
        step = slots.SlotCache.step
        with monkeypatch.context() as patch:
            patch.setattr(
                slots.SlotCache, "step", lambda *a, **k: seen.append(step(*a, **k)) or seen[-1]
            )
            complete(fresh, SHARED)
        return torch.cat(seen)

    alone = logits([])
    assert torch.equal(alone, logits([SHARED[:2]]))
    assert torch.equal(alone, logits([UNLIKE, [request(DOCUMENT[:300])]]))


def test_samples_do_not_depend_on_neighbours_or_batches(
    model: str, backend: TransformersBackend
) -> None:
    requests = [
        request(one.messages[0]["content"], SAMPLED, seed) for seed, one in enumerate(SHARED)
    ]
    requests[2] = SHARED[2]  # a greedy one among them
    together = complete(backend, requests)
    assert together == [complete(backend, [one])[0] for one in requests]
    assert together == complete(backend, requests[::-1])[::-1]
    two = running.capacity([backend._running(one) for one in requests[:2]])
    for bounds, sizes in (
        ({"batch_size": 3}, [3, 1]),
        ({"batch_tokens": 10}, [1, 1, 1, 1]),
        ({"batch_tokens": two}, [2, 1, 1]),
    ):
        small = TransformersBackend(config(model, **bounds))
        batches = small._batches([small._running(one) for one in requests])
        assert [len(batch) for batch in batches] == sizes
        assert together == complete(small, requests)
    again = [request(requests[0].messages[0]["content"], SAMPLED, seed) for seed in range(6)]
    assert len({str(answer) for answer in complete(backend, again)}) > 3


def test_answers_end_by_themselves_or_at_the_most_tokens(
    backend: TransformersBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = (1, 5, 24)
    requests = [
        request(
            SHARED[0].messages[0]["content"], Sampling(temperature=0, top_p=1, max_new_tokens=n)
        )
        for n in lengths
    ]
    (batch,) = backend._batches([backend._running(one) for one in requests])
    asyncio.run(backend._loop.write(batch))
    assert [len(one.written) for one in batch] == list(lengths)
    assert not any(one.finished for one in batch)
    monkeypatch.setattr(backend._loop, "_eos_ids", frozenset({batch[2].written[3]}))
    answers = complete(backend, requests)
    assert [answer.finished for answer in answers] == [False, True, True]


def test_rope_theta_changes_answers(model: str) -> None:
    own = complete(TransformersBackend(config(model)), SHARED)
    other = TransformersBackend(config(model, rope_theta=1e7, context_length=99))
    assert complete(other, SHARED) != own
    assert other.context_length == 99


def test_short_memory_halves_a_batch_once(
    backend: TransformersBackend,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = complete(backend, SHARED)
    write = backend._loop.write
    most = 2

    async def short(batch: list[Any]) -> None:
        await write(batch)  # memory ends late: what was written is to be forgotten
        if len(batch) > most:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(backend._loop, "write", short)
    assert complete(backend, SHARED) == whole
    assert "4 requests of" in capsys.readouterr().err
    most = 1
    answers = complete(backend, SHARED[:3])
    assert answers[0] == whole[0]
    assert all(isinstance(answer, BackendError) for answer in answers[1:])
    assert str(answers[1]) == "prompt that does not fit in GPU memory"
