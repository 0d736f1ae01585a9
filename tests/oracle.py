"""The proof: LongPO, DPO and SFT in plain transformers + torch, as slow and plain as can be.

Every conversation is scored by a forward pass of its own over its own tokens: no packing, no
shared prefix, no parallelism, no chunked head, and nothing imported from megatron_longpo. What
the fast code gives must equal this up to rounding.

Rows are any objects with `chosen`, `rejected` (long rows) and `reference_chosen`,
`reference_rejected` (a tuple of short rows, one a turn), each of these with integer sequences
`input_ids` and `labels`. `labels[t]` is `input_ids[t]` for an answer token, else -100; the
logits at t - 1 predict token t.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PairSums:
    """What one pair contributes, in nats, before any weight."""

    policy_chosen: list[float]
    """One sum of answer log-probs a turn; likewise the next three."""
    policy_rejected: list[float]
    reference_chosen: list[float]
    reference_rejected: list[float]
    nll_sum: float
    nll_count: int
    loss: float


@dataclass(frozen=True, kw_only=True, slots=True)
class OracleResult:
    loss: float
    """Mean over the rows."""
    metrics: dict[str, float]
    """Keys of metrics.jsonl that the objective has, without counts and times."""
    pairs: list[PairSums]
    gradients: dict[str, Tensor]
    """Of `loss`, by parameter name; a tied tensor stands once, under its first name."""
    grad_norm: float


def oracle_step(
    policy: Any,
    reference: Any | None,
    rows: Sequence[Any],
    *,
    name: str = "longpo",
    beta: float = 0.01,
    preference_weight: float = 0.01,
    nll_weight: float = 1.0,
    nll_scope: str = "chosen_row",
    turns: str = "summed",
    label_smoothing: float = 0.0,
    reference_context: str = "short",
) -> OracleResult:
    """Returns the loss over `rows`, its metrics and its gradient with respect to `policy`.

    `policy` and `reference` are Hugging Face causal language models; `reference` None means
    reference log-probs of 0. `name` is `longpo`, `dpo` (same formula; pass the long reference
    context and its weights), `sft` or `sft_rejected`. `policy`'s `.grad` is left filled.
    """
    assert name in ("longpo", "dpo", "sft", "sft_rejected")
    assert nll_scope in ("chosen_row", "chosen_answers") and turns in ("summed", "per_turn")
    assert reference_context in ("short", "long")
    is_preference = name in ("longpo", "dpo")
    policy.eval()  # No dropout; gradients flow all the same.
    policy.zero_grad(set_to_none=True)
    pairs: list[PairSums] = []
    columns: list[dict[str, float]] = []

    for row in rows:
        # 1. The policy on both long conversations.
        branch = row.rejected if name == "sft_rejected" else row.chosen
        branch_logps = token_logps(policy, branch)
        nothing = torch.zeros(0, dtype=torch.float64)
        policy_w = policy_l = reference_w = reference_l = nothing
        if is_preference:
            policy_w = turn_sums(branch_logps, row.chosen)
            policy_l = turn_sums(token_logps(policy, row.rejected), row.rejected)
            reference_w, reference_l = torch.zeros_like(policy_w), torch.zeros_like(policy_l)
            if reference is not None:
                reference_w = reference_turn_sums(reference, row, "chosen", reference_context)
                reference_l = reference_turn_sums(reference, row, "rejected", reference_context)

        # 2. z = (P_w - P_l) - (R_w - R_l), of the conversation or of each turn.
        loss = torch.zeros((), dtype=torch.float64)
        column: dict[str, float] = {}
        if is_preference:
            z = (policy_w - policy_l) - (reference_w - reference_l)
            if turns == "summed":
                z = z.sum().reshape(1)
            # -log sigmoid(x) = log(1 + exp(-x)).
            right = torch.logaddexp(-beta * z, torch.zeros_like(z))
            swapped = torch.logaddexp(beta * z, torch.zeros_like(z))
            preference = ((1 - label_smoothing) * right + label_smoothing * swapped).mean()
            loss = loss + preference_weight * preference
            chosen_reward = beta * float((policy_w - reference_w).sum())
            rejected_reward = beta * float((policy_l - reference_l).sum())
            column |= {
                "preference_loss": float(preference),
                "rewards/chosen": chosen_reward,
                "rewards/rejected": rejected_reward,
                "rewards/accuracies": float(chosen_reward > rejected_reward),
                "rewards/margins": chosen_reward - rejected_reward,
                "logps/chosen": float(policy_w.sum()),
                "logps/rejected": float(policy_l.sum()),
            }
            if reference is not None:
                column |= {
                    "reference_logps/chosen": float(reference_w.sum()),
                    "reference_logps/rejected": float(reference_l.sum()),
                }
        else:
            key = "logps/rejected" if name == "sft_rejected" else "logps/chosen"
            column[key] = float(turn_sums(branch_logps, branch).sum())

        # 3. NLL: every token of the row but the first, or the answers; a mean over its tokens.
        counted = branch_logps
        if name == "sft_rejected" or nll_scope == "chosen_answers":
            counted = branch_logps[is_answer(branch)[1:]]
        nll_sum, nll_count = -counted.sum(), len(counted)
        if nll_weight and nll_count:
            loss = loss + nll_weight * nll_sum / nll_count
        if nll_weight:
            column["nll_loss"] = float(nll_sum) / nll_count if nll_count else 0.0

        # 4. One pair's share of the mean; its graphs are freed before the next pair.
        (loss / len(rows)).backward()
        columns.append({"loss": float(loss), **column})
        pairs.append(
            PairSums(
                policy_chosen=policy_w.tolist(),
                policy_rejected=policy_l.tolist(),
                reference_chosen=reference_w.tolist(),
                reference_rejected=reference_l.tolist(),
                nll_sum=float(nll_sum),
                nll_count=nll_count,
                loss=float(loss),
            )
        )

    metrics = {key: sum(column[key] for column in columns) / len(rows) for key in columns[0]}
    gradients = {
        parameter_name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for parameter_name, p in policy.named_parameters()
    }
    norm = sum(float(gradient.double().pow(2).sum()) for gradient in gradients.values()) ** 0.5
    return OracleResult(
        loss=metrics["loss"],
        metrics={**metrics, "grad_norm": norm},
        pairs=pairs,
        gradients=gradients,
        grad_norm=norm,
    )


def token_logps(model: Any, row: Any) -> Tensor:
    """Log-prob of each token but the first, given all before it: `[S - 1]` float64."""
    ids = torch.as_tensor(np.asarray(row.input_ids), dtype=torch.int64)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    logps = torch.log_softmax(logits, dim=-1)
    return logps.gather(1, ids[1:, None])[:, 0].double()


def is_answer(row: Any) -> Tensor:
    """`[S]` bool. Token 0 is never one: nothing predicts it."""
    answers = torch.as_tensor(np.asarray(row.labels)) != -100
    answers[0] = False
    return answers


def turn_sums(logps: Tensor, row: Any) -> Tensor:
    """`[S - 1] -> [turns]`: a turn's answer is an unbroken run of labelled tokens."""
    answers = is_answer(row)
    runs: list[list[int]] = []
    for position in range(1, len(answers)):
        if answers[position]:
            if not answers[position - 1]:
                runs.append([])
            runs[-1].append(position - 1)  # logps[t - 1] belongs to token t.
    return torch.stack([logps[run].sum() for run in runs])


@torch.no_grad()
def reference_turn_sums(reference: Any, row: Any, branch: str, context: str) -> Tensor:
    """`[turns]`: each answer under its own short chunk, or all under the long conversation."""
    reference.eval()
    if context == "long":
        long_row = getattr(row, branch)
        return turn_sums(token_logps(reference, long_row), long_row)
    short_rows = getattr(row, f"reference_{branch}")
    return torch.cat([turn_sums(token_logps(reference, short), short) for short in short_rows])


def oracle_train(
    policy: Any,
    reference: Any | None,
    batches: Iterable[Sequence[Any]],
    *,
    lr: float | Sequence[float],
    optimizer: str = "rmsprop",
    weight_decay: float = 0.0,
    clip_grad: float = 1.0,
    alpha: float = 0.99,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    **objective: Any,
) -> list[dict[str, float]]:
    """Trains `policy` in place, one optimizer step a batch, and returns each step's metrics.

    `lr` is constant, or one number a step. `reference` must be another object than `policy`.
    `clip_grad` 0 turns clipping off; `grad_norm` in the metrics is the norm before it. Weight
    decay leaves vectors (norms, biases) alone, and is torch's own: decoupled for adam, added to
    the gradient for rmsprop.
    """
    assert reference is not policy, "the reference must stay as it was"
    parameters = list(policy.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    stepper: torch.optim.Optimizer
    if optimizer == "rmsprop":
        stepper = torch.optim.RMSprop(groups, lr=0.0, alpha=alpha, eps=eps)
    else:
        assert optimizer == "adam", optimizer
        stepper = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps)
    history = []
    for step, rows in enumerate(batches):
        step_lr = lr[step] if isinstance(lr, Sequence) else lr
        for group in stepper.param_groups:
            group["lr"] = step_lr
        result = oracle_step(policy, reference, rows, **objective)
        if clip_grad:
            torch.nn.utils.clip_grad_norm_(parameters, clip_grad)
        stepper.step()
        history.append({"step": step + 1, **result.metrics, "learning_rate": step_lr})
    return history
