"""The transformers backend on a GPU: its kernels beside transformers' own generate."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_longpo.config.backends import BackendConfig
from megatron_longpo.data.text.chat import prompt_ids
from megatron_longpo.generation.backends.base import (
    BackendError,
    Completion,
    Request,
    Sampling,
)
from megatron_longpo.generation.backends.transformers import TransformersBackend

pytestmark = pytest.mark.gpu

GREEDY = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=32)
SAMPLED = Sampling(temperature=1.0, top_p=0.9, max_new_tokens=45)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama with heads as a real one has them: 128 wide, four to a key."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tests import small_tokenizers as small

    folder = tmp_path_factory.mktemp("model")
    tokenizer = small.byte_level(tuple(small.CHATML_SPECIAL), "<|im_end|>")
    tokenizer.save_pretrained(folder)
    (Path(folder) / "chat_template.jinja").write_text(small.CHATML)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=32768,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def requests_of(document: str) -> list[Request]:
    questions = ("What does the ledger say?", "Who?", "Why was the salt sold, and when?")
    return [
        Request(
            messages=({"role": "user", "content": f"{document}\n\n{question}"},),
            sampling=GREEDY,
            seed=0,
        )
        for question in questions
    ]


@pytest.mark.parametrize("num_words", [100, 4000], ids=["short", "several blocks"])
def test_fp32_answers_are_those_of_generate(model: str, num_words: int) -> None:
    from transformers import AutoModelForCausalLM

    backend = TransformersBackend(BackendConfig(model=model, dtype="fp32", device="cuda"))
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).cuda()
    requests = requests_of("harbour ledger barrel tide " * (num_words // 4))
    expected = []
    for request in requests:
        prompt = prompt_ids(backend.tokenizer, request.messages)
        ids = torch.tensor([prompt], device="cuda")
        output = stock.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=GREEDY.max_new_tokens,
            do_sample=False,
            pad_token_id=backend.tokenizer.eos_ids[0],
        )
        written = output[0, len(prompt) :].tolist()
        expected.append(backend.tokenizer.decode(written, skip_special=True).strip())
    answers = asyncio.run(backend.complete(requests))
    assert [answer.text for answer in answers if isinstance(answer, Completion)] == expected


def test_documents_written_together_answer_as_one_by_one(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some with prefixes of several blocks, some short, joining at different times."""
    documents = [
        requests_of(f"harbour {n} ledger tide " * n)[: 1 + n % 3] for n in range(1, 1300, 149)
    ]
    for index, requests in enumerate(documents):
        requests[0] = replace(requests[0], sampling=SAMPLED, seed=index)

    def answers(documents_at_once: int) -> list[list[Completion | BackendError]]:
        backend = TransformersBackend(
            BackendConfig(
                model=model, dtype="fp32", device="cuda", documents_at_once=documents_at_once
            )
        )

        async def ask(number: int) -> list[Completion | BackendError]:
            for _ in range(3 * number):
                await asyncio.sleep(0)
            return await backend.complete(documents[number])

        async def all_ask() -> list[list[Completion | BackendError]]:
            return list(await asyncio.gather(*(ask(n) for n in range(len(documents)))))

        written = asyncio.run(all_ask())
        if documents_at_once > 1:
            assert backend._loop._graphs is not None
            assert backend._loop._graphs._graphs  # steps were captured
        return written

    assert answers(4) == answers(1)
    assert "without CUDA graphs" not in capsys.readouterr().err


def test_a_gpu_takes_several_documents_unless_told_otherwise(model: str) -> None:
    backend = TransformersBackend(BackendConfig(model=model, device="cuda"))
    assert backend.documents_at_once == 32
    documents = [requests_of(f"harbour {n} ledger tide " * 50) for n in range(40)]

    async def all_ask() -> list[list[Completion | BackendError]]:
        return list(await asyncio.gather(*(backend.complete(one) for one in documents)))

    answers = asyncio.run(all_ask())
    assert all(isinstance(answer, Completion) for one in answers for answer in one)


def test_bf16_answers_do_not_depend_on_what_was_asked_before(model: str) -> None:
    backend = TransformersBackend(BackendConfig(model=model, device="cuda", documents_at_once=1))
    requests = requests_of("harbour ledger barrel tide " * 2000)
    first = asyncio.run(backend.complete(requests))
    assert asyncio.run(backend.complete(requests)) == first  # from kept keys
    asyncio.run(backend.complete(requests_of("other words " * 50)))
    assert asyncio.run(backend.complete(requests)) == first


def test_prompts_that_do_not_fit_are_errors_of_theirs(model: str) -> None:
    backend = TransformersBackend(BackendConfig(model=model, device="cuda"))
    sampling = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=10**9)  # no GPU holds them
    (answer,) = asyncio.run(
        backend.complete(
            [Request(messages=requests_of("a")[0].messages, sampling=sampling, seed=0)]
        )
    )
    assert str(answer) == "prompt that does not fit in GPU memory"
    assert isinstance(asyncio.run(backend.complete(requests_of("a b c")))[0], Completion)
