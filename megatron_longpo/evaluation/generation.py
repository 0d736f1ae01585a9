"""Lets a model answer retrieval questions greedily, through transformers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from megatron_longpo.data.text.chat_tokenizer import ChatTokenizer
from megatron_longpo.evaluation.retrieval import Question, RetrievalSet


def answer_questions(
    model: Any,
    tokenizer: ChatTokenizer,
    retrieval: RetrievalSet,
    questions: Iterable[Question],
    new_tokens: int,
) -> list[bool]:
    """Returns whether each answer of a transformers model contains the requested number."""
    found = []
    for question in questions:
        prompt = torch.from_numpy(retrieval.prompt(question)).long()[None].to(model.device)
        with torch.no_grad():
            written = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.eos_ids[0] if tokenizer.eos_ids else 0,
            )
        answer = tokenizer.decode(written[0, prompt.shape[1] :].tolist(), skip_special=True)
        found.append(question.value in answer.replace(" ", "").replace(",", ""))
    return found
