"""The proof: every objective in plain transformers + torch, as slow and plain as can be.

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
    """What one pair contributes, in nats, before any weight. Row names are `long_chosen` etc."""

    policy: dict[str, list[float]]
    """By row one sum of answer log-probs a turn."""
    reference: dict[str, list[float]]
    token_counts: dict[str, list[int]]
    """By row the answer tokens of each turn."""
    nll_sum: float
    nll_count: int
    divergence_sum: float
    divergence_count: int
    chosen_reward: float
    rejected_reward: float
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
    answer_nll_weight: float = 0.0,
    turns: str = "summed",
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
    alignment_weight: float = 0.0,
    divergence_weight: float = 0.0,
    divergence_scope: str = "chosen_answers",
    reference_context: str = "short",
) -> OracleResult:
    """Returns the loss over `rows`, its metrics and its gradient with respect to `policy`.

    `policy` and `reference` are Hugging Face causal language models; `reference` None means
    reference log-probs of 0. `policy`'s `.grad` is left filled.
    """
    assert nll_scope in ("chosen_row", "chosen_answers") and turns in ("summed", "per_turn")
    assert reference_context in ("short", "long")
    policy.eval()  # No dropout; gradients flow all the same.
    policy.zero_grad(set_to_none=True)
    pairs: list[PairSums] = []
    columns: list[dict[str, float]] = []
    policy_rows, reference_rows = rows_of(name, reference_context)
    short_to_long = name.startswith("solopo")

    for row in rows:
        # 1. Every answer under every context that matters, each by a forward pass of its own.
        p = {key: conversation_sums(policy, row, key) for key in policy_rows}
        r = {key: torch.zeros_like(p[key]) for key in policy_rows}
        if reference is not None:
            reference.eval()
            with torch.no_grad():
                r = {key: conversation_sums(reference, row, key) for key in reference_rows}
        counts = {key: answer_counts(row, key) for key in policy_rows}

        loss = torch.zeros((), dtype=torch.float64)
        column: dict[str, float] = {}

        # 2. The preference, of the conversation or of each turn: rewards r_w and r_l, then a loss.
        if policy_rows:

            def unit(x: Tensor) -> Tensor:
                return x.sum().reshape(1) if turns == "summed" else x

            def reward(key: str, p: Any = p, r: Any = r, counts: Any = counts) -> Tensor:
                reference_key = key
                if not short_to_long and reference is not None and reference_rows:
                    reference_key = key.replace("long", reference_context)
                if name in ("longpo", "dpo", "solopo_dpo"):
                    return beta * unit(p[key] - r[reference_key])
                if name == "ipo":
                    return beta * unit(p[key] - r[reference_key]) / unit(counts[key])
                mean = unit(p[key]) / unit(counts[key])
                if name in ("simpo", "solopo_simpo"):
                    return beta * mean
                assert name in ("orpo", "solopo_orpo")
                return (mean.exp() / (1 - mean.exp())).log()

            context = "short" if short_to_long else "long"
            chosen_reward, rejected_reward = (
                reward(f"{context}_chosen"),
                reward(f"{context}_rejected"),
            )
            margin = chosen_reward - rejected_reward
            if name == "ipo":
                losses = (margin / beta - 1 / (2 * beta)) ** 2
            else:
                # -log sigmoid(x) = log(1 + exp(-x)).
                margin = margin - gamma
                right = torch.logaddexp(-margin, torch.zeros_like(margin))
                swapped = torch.logaddexp(margin, torch.zeros_like(margin))
                losses = (1 - label_smoothing) * right + label_smoothing * swapped
            preference = losses.mean()
            loss = loss + preference_weight * preference
            column |= {
                "preference_loss": float(preference),
                "rewards/chosen": float(chosen_reward.sum()),
                "rewards/rejected": float(rejected_reward.sum()),
                "rewards/accuracies": float(chosen_reward.sum() > rejected_reward.sum()),
                "rewards/margins": float(chosen_reward.sum() - rejected_reward.sum()),
                "logps/chosen": float(p[f"{context}_chosen"].sum()),
                "logps/rejected": float(p[f"{context}_rejected"].sum()),
            }
            if reference is not None and reference_rows:
                asked = "short" if short_to_long else reference_context
                column |= {
                    "reference_logps/chosen": float(r[f"{asked}_chosen"].sum()),
                    "reference_logps/rejected": float(r[f"{asked}_rejected"].sum()),
                }
            if answer_nll_weight:
                answers = f"{context}_chosen"
                answer_nll = -p[answers].sum() / counts[answers].sum()
                loss = loss + answer_nll_weight * answer_nll
                column["answer_nll_loss"] = float(answer_nll)
            if short_to_long:
                gap = (reward("short_chosen") - reward("long_chosen")).abs().mean()
                loss = loss + alignment_weight * gap
                column["alignment_loss"] = float(gap)
                column["logps/long_chosen"] = float(p["long_chosen"].sum())
                if reference is not None and reference_rows:
                    column["reference_logps/long_chosen"] = float(r["long_chosen"].sum())

        # 3. NLL: every token of the row but the first, or the answers; a mean over its tokens.
        nll_sum, nll_count = torch.zeros((), dtype=torch.float64), 0
        if nll_weight:
            if short_to_long:
                nll_rows, only_answers = list(row.reference_chosen), True
            elif name == "sft_rejected":
                nll_rows, only_answers = [row.rejected], True
            else:
                nll_rows, only_answers = [row.chosen], nll_scope == "chosen_answers"
            for nll_row in nll_rows:
                counted = token_logps(policy, nll_row)
                if only_answers:
                    counted = counted[is_answer(nll_row)[1:]]
                nll_sum, nll_count = nll_sum - counted.sum(), nll_count + len(counted)
            if nll_count:
                loss = loss + nll_weight * nll_sum / nll_count
            column["nll_loss"] = float(nll_sum) / nll_count if nll_count else 0.0

        # 4. KL(policy on the long row || reference), token by token of an answer that both read.
        divergence = torch.zeros(0, dtype=torch.float64)
        if divergence_weight:
            branch = divergence_scope.removesuffix("_answers")
            with torch.no_grad():
                teacher = answer_distributions(reference, row, f"{reference_context}_{branch}")
            student = answer_distributions(policy, row, f"long_{branch}")
            divergence = (student.exp() * (student - teacher)).sum(-1)
            loss = loss + divergence_weight * divergence.mean()
            column["divergence_loss"] = float(divergence.mean())

        # 5. One pair's share of the mean; its graphs are freed before the next pair.
        (loss / len(rows)).backward()
        columns.append({"loss": float(loss), **column})
        pairs.append(
            PairSums(
                policy={key: sums.tolist() for key, sums in p.items()},
                reference={key: sums.tolist() for key, sums in r.items()},
                token_counts={key: values.tolist() for key, values in counts.items()},
                nll_sum=float(nll_sum),
                nll_count=nll_count,
                divergence_sum=float(divergence.sum()),
                divergence_count=len(divergence),
                chosen_reward=column.get("rewards/chosen", 0.0),
                rejected_reward=column.get("rewards/rejected", 0.0),
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


def rows_of(name: str, reference_context: str) -> tuple[list[str], list[str]]:
    """The answers whose sums the preference needs from the policy, and from the reference."""
    long_rows = ["long_chosen", "long_rejected"]
    referenced = [f"{reference_context}_chosen", f"{reference_context}_rejected"]
    solopo = ["short_chosen", "short_rejected", "long_chosen"]
    return {
        "longpo": (long_rows, referenced),
        "dpo": (long_rows, referenced),
        "ipo": (long_rows, referenced),
        "simpo": (long_rows, []),
        "orpo": (long_rows, []),
        "sft": ([], []),
        "sft_rejected": ([], []),
        "sft_short_to_long": ([], []),
        "solopo_dpo": (solopo, solopo),
        "solopo_simpo": (solopo, []),
        "solopo_orpo": (solopo, []),
        "opsdl": ([], []),
    }[name]


def conversations(row: Any, key: str) -> list[Any]:
    """`long_*`: the one long conversation with all answers; `short_*`: one row a turn."""
    context, branch = key.split("_")
    if context == "long":
        return [getattr(row, branch)]
    return list(getattr(row, f"reference_{branch}"))


def conversation_sums(model: Any, row: Any, key: str) -> Tensor:
    """`[turns]`: log-prob of each answer under its context."""
    return torch.cat([turn_sums(token_logps(model, one), one) for one in conversations(row, key)])


def answer_counts(row: Any, key: str) -> Tensor:
    """`[turns]`: tokens of each answer."""
    ones = [
        turn_sums(torch.ones(len(one.input_ids) - 1, dtype=torch.float64), one)
        for one in conversations(row, key)
    ]
    return torch.cat(ones)


def answer_distributions(model: Any, row: Any, key: str) -> Tensor:
    """`[answer tokens, V]` float64: log-probs of all tokens, wherever an answer's is predicted."""
    found = []
    for one in conversations(row, key):
        ids = torch.as_tensor(np.asarray(one.input_ids), dtype=torch.int64)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        found.append(torch.log_softmax(logits.double(), dim=-1)[is_answer(one)[1:]])
    return torch.cat(found)


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
