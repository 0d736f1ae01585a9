"""The transformers backend on a GPU: its kernels beside transformers' own generate."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from megatron_longpo.data.chat import prompt_ids
from megatron_longpo.generation.backends.base import Completion, Request, Sampling
from megatron_longpo.generation.backends.config import BackendConfig
from megatron_longpo.generation.backends.transformers import TransformersBackend

pytestmark = pytest.mark.gpu

GREEDY = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=32)


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


def test_bf16_answers_do_not_depend_on_what_was_asked_before(model: str) -> None:
    backend = TransformersBackend(BackendConfig(model=model, device="cuda"))
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
