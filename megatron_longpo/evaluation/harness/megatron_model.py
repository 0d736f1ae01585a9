"""A model in Megatron with the interface of lm-evaluation-harness, for log-likelihoods."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM

from megatron_longpo.errors import UserError
from megatron_longpo.evaluation.probes import ProbeBranch, ProbeRow, ProbeSet
from megatron_longpo.evaluation.scorer import Scorer

LogpRequest = tuple[tuple[str, str], list[int], list[int]]
"""Context and answer as text, then as token ids."""


class MegatronModel(TemplateLM):
    """Scores answers through `Scorer`; the common beginning of answers to one question is computed
    once. All processes of a layout make the same requests and get the same results.
    """

    def __init__(
        self, scorer: Scorer, tokenizer: Any, *, max_length: int, vocab_size: int, name: str
    ) -> None:
        """`tokenizer` is transformers' tokenizer; `name` is the name of the model."""
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._scorer = scorer
        self._vocab_size = vocab_size
        self._name = name

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        return str(self.tokenizer.chat_template) if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **others: Any
    ) -> list[int]:
        if add_special_tokens is None:
            # As in the harness's transformers model: the tokenizer decides, but no second BOS.
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _loglikelihood_tokens(
        self, requests: Sequence[LogpRequest], **others: Any
    ) -> list[tuple[float, bool]]:
        """Returns answers' log-likelihoods in nats, and whether greedy decoding gives them."""
        rows = []
        for number, (_, same) in enumerate(groupby(requests, key=lambda request: request[1])):
            branches = [
                self._branch(context, answer, group)
                for group, (_, context, answer) in enumerate(same)
            ]
            rows.append(ProbeRow(id=str(number), branches=tuple(branches)))
        probes = ProbeSet(rows)
        probes.check_vocabulary(self._vocab_size, what=self._name)
        scores = self._scorer.score(probes)
        return [
            (
                float(scores.logps[number, group]),
                bool(scores.hits[number, group] == len(branch.targets)),
            )
            for number, row in enumerate(rows)
            for group, branch in enumerate(row.branches)
        ]

    def _branch(self, context: list[int], answer: list[int], group: int) -> ProbeBranch:
        length = len(context) + len(answer)
        if length > self.max_length:
            raise UserError(
                f"harness.max_length ({self.max_length}): a question with its answer has {length} "
                "tokens; set more"
            )
        return ProbeBranch(
            input_ids=np.array([*context, *answer], dtype=np.int32),
            targets=np.arange(len(context), length),
            groups=np.full(len(answer), group),
        )

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("no suite asks for it")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError("suites that write are refused before a model is built")
