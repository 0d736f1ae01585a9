"""The oracle against quantities made another way: transformers' own loss, hand sums, differences.

It is what the fast code is held to, so nothing here is taken from megatron_longpo but the rows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.oracle import OracleResult, is_answer, oracle_step, oracle_train, token_logps, turn_sums
from tests.random_rows import random_row, random_rows

VOCAB = 48


def tiny_llama(seed: int, *, tied: bool = False, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        # Larger than the usual 0.02, so that logits differ and gradients are well above rounding.
        initializer_range=0.3,
    )
    model: Any = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")
    return model.to(dtype).eval()


@pytest.fixture
def rows() -> list[Any]:
    return random_rows(np.random.default_rng(0), VOCAB, 3)


@pytest.fixture
def policy() -> Any:
    return tiny_llama(0)


@pytest.fixture
def reference() -> Any:
    return tiny_llama(1)


def row_of(ids: list[int], labels: list[int]) -> Any:
    return SimpleNamespace(input_ids=np.array(ids), labels=np.array(labels))


def test_turns_are_runs_of_labels_and_a_first_token_is_never_one() -> None:
    row = row_of([1, 2, 3, 4, 5, 6], [1, -100, 3, 4, -100, 6])
    assert is_answer(row).tolist() == [False, False, True, True, False, True]
    # logps[t - 1] is token t's: tokens 2 and 3, then token 5.
    logps = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    assert turn_sums(logps, row).tolist() == [3.0, 8.0]


def test_token_logps_are_those_of_a_growing_prefix(policy: Any) -> None:
    """Each token's log-prob from a pass over its own history alone: shift and causality at once."""
    ids = [5, 9, 2, 2, 40]
    with torch.no_grad():
        logps = token_logps(policy, row_of(ids, ids))
        for end in range(1, len(ids)):
            last_logits = policy(input_ids=torch.tensor([ids[:end]])).logits[0, -1]
            torch.testing.assert_close(logps[end - 1], last_logits.log_softmax(0)[ids[end]])


@pytest.mark.parametrize("scope", ["chosen_row", "chosen_answers"])
def test_nll_is_the_loss_that_transformers_computes(
    policy: Any, rows: list[Any], scope: str
) -> None:
    result = oracle_step(policy, None, rows, name="sft", preference_weight=0.0, nll_scope=scope)
    losses = []
    for row in rows:
        labels = row.chosen.input_ids if scope == "chosen_row" else row.chosen.labels
        ids = torch.from_numpy(row.chosen.input_ids)[None]
        losses.append(float(policy(input_ids=ids, labels=torch.from_numpy(labels)[None]).loss))
    assert result.loss == pytest.approx(sum(losses) / 3, rel=1e-6)
    assert result.metrics["nll_loss"] == result.loss
    assert [pair.nll_count for pair in result.pairs] == [
        len(row.chosen) - 1 if scope == "chosen_row" else int(is_answer(row.chosen).sum())
        for row in rows
    ]


def test_sft_rejected_is_sft_with_the_branches_swapped(policy: Any, rows: list[Any]) -> None:
    swapped = [SimpleNamespace(chosen=row.rejected, rejected=row.chosen) for row in rows]
    settings: dict[str, Any] = {"preference_weight": 0.0, "nll_scope": "chosen_answers"}
    one = oracle_step(policy, None, rows, name="sft_rejected", **settings)
    other = oracle_step(policy, None, swapped, name="sft", **settings)
    assert one.loss == other.loss and one.grad_norm == other.grad_norm


def test_dpo_starts_at_ln_2_and_longpo_does_not(policy: Any, rows: list[Any]) -> None:
    settings: dict[str, Any] = {"beta": 0.1, "preference_weight": 1.0, "nll_weight": 0.0}
    dpo = oracle_step(policy, policy, rows, name="dpo", reference_context="long", **settings)
    assert dpo.loss == pytest.approx(math.log(2), rel=1e-12)
    assert dpo.metrics["rewards/chosen"] == dpo.metrics["rewards/margins"] == 0.0
    assert dpo.metrics["rewards/accuracies"] == 0.0
    assert dpo.metrics["logps/chosen"] == dpo.metrics["reference_logps/chosen"]
    assert "nll_loss" not in dpo.metrics
    longpo = oracle_step(policy, policy, rows, name="longpo", **settings)
    assert abs(longpo.loss - math.log(2)) > 1e-3


def test_longpo_is_put_together_from_four_sums(policy: Any, reference: Any) -> None:
    """Two turns, every sum taken here token by token from full softmaxes."""
    row = random_row(
        np.random.default_rng(3),
        VOCAB,
        chosen_answer_lengths=[2, 3],
        rejected_answer_lengths=[4, 1],
        chunk_lengths=[5, 2],
    )

    def answer_logp(model: Any, ids: np.ndarray, begin: int, length: int) -> float:
        with torch.no_grad():
            probabilities = model(input_ids=torch.from_numpy(ids)[None]).logits[0].softmax(-1)
        return sum(
            math.log(float(probabilities[at - 1, ids[at]])) for at in range(begin, begin + length)
        )

    # Prompt 9, question 2: chosen answers at 9 and 9 + 2 + 2, rejected ones at 9 and 9 + 4 + 2.
    p_w = [answer_logp(policy, row.chosen.input_ids, *span) for span in [(9, 2), (13, 3)]]
    p_l = [answer_logp(policy, row.rejected.input_ids, *span) for span in [(9, 4), (15, 1)]]
    r_w = [
        answer_logp(reference, short.input_ids, *span)
        for short, span in zip(row.reference_chosen, [(5, 2), (2, 3)], strict=True)
    ]
    r_l = [
        answer_logp(reference, short.input_ids, *span)
        for short, span in zip(row.reference_rejected, [(5, 4), (2, 1)], strict=True)
    ]
    nll = -answer_logp(policy, row.chosen.input_ids, 1, 15) / 15
    z = [p_w[i] - p_l[i] - (r_w[i] - r_l[i]) for i in range(2)]

    def l_of(x: float) -> float:
        return -0.9 * math.log(1 / (1 + math.exp(-x))) - 0.1 * math.log(1 / (1 + math.exp(x)))

    beta = 0.2
    settings: dict[str, Any] = {"beta": beta, "preference_weight": 0.5, "label_smoothing": 0.1}
    summed = oracle_step(policy, reference, [row], **settings)
    apart = oracle_step(policy, reference, [row], turns="per_turn", **settings)
    assert summed.loss == pytest.approx(nll + 0.5 * l_of(beta * sum(z)), rel=1e-9)
    assert apart.loss == pytest.approx(
        nll + 0.5 * (l_of(beta * z[0]) + l_of(beta * z[1])) / 2, rel=1e-9
    )
    pair = summed.pairs[0]
    assert pair.policy["long_chosen"] == pytest.approx(p_w)
    assert pair.policy["long_rejected"] == pytest.approx(p_l)
    assert pair.reference["short_chosen"] == pytest.approx(r_w)
    assert pair.reference["short_rejected"] == pytest.approx(r_l)
    chosen, rejected = beta * (sum(p_w) - sum(r_w)), beta * (sum(p_l) - sum(r_l))
    for result in (summed, apart):
        assert result.metrics["rewards/chosen"] == pytest.approx(chosen)
        assert result.metrics["rewards/rejected"] == pytest.approx(rejected)
        assert result.metrics["rewards/margins"] == pytest.approx(chosen - rejected)
        assert result.metrics["rewards/accuracies"] == float(chosen > rejected)


def test_no_reference_counts_as_zero_logps(policy: Any, rows: list[Any]) -> None:
    result = oracle_step(policy, None, rows, beta=0.1)
    assert result.metrics["rewards/chosen"] == pytest.approx(0.1 * result.metrics["logps/chosen"])
    assert "reference_logps/chosen" not in result.metrics


def assert_slope(step: Callable[[], OracleResult], weight: Any, gradient: torch.Tensor) -> None:
    """Moves one weight tensor along two directions; the loss must change as its gradient says.

    transformers' norms and softmax round to float32 whatever the model's type, so a single
    element's difference drowns in rounding; a direction through the whole tensor does not.
    """
    noise = torch.randn(
        weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(7)
    )
    for direction in (gradient.sign(), gradient.sign() * noise.abs()):
        width, losses = 1e-4, []
        for side in (1, -1):
            with torch.no_grad():
                weight += side * width * direction
            losses.append(step().loss)
            with torch.no_grad():
                weight -= side * width * direction
        slope = float((gradient * direction).sum())
        assert slope > 0.1, "a flat direction proves nothing"
        assert (losses[0] - losses[1]) / (2 * width) == pytest.approx(slope, rel=3e-3)


@pytest.mark.parametrize("turns", ["summed", "per_turn"])
def test_gradient_by_finite_differences(
    policy: Any, reference: Any, rows: list[Any], turns: str
) -> None:
    def step() -> OracleResult:
        return oracle_step(policy, reference, rows, beta=0.3, preference_weight=1.0, turns=turns)

    gradients = step().gradients
    assert set(gradients) == {name for name, _ in policy.named_parameters()}
    for name in ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        assert_slope(step, policy.get_parameter(name), gradients[name])


def test_loss_and_gradient_are_means_over_rows(
    policy: Any, reference: Any, rows: list[Any]
) -> None:
    together = oracle_step(policy, reference, rows)
    alone = [oracle_step(policy, reference, [row]) for row in rows]
    for key in ("loss", "preference_loss", "nll_loss", "rewards/margins", "logps/chosen"):
        mean = sum(result.metrics[key] for result in alone) / len(rows)
        assert together.metrics[key] == pytest.approx(mean, rel=1e-12)
    for name, gradient in together.gradients.items():
        mean_gradient = sum(result.gradients[name] for result in alone) / len(rows)
        torch.testing.assert_close(gradient, mean_gradient)
    squares = sum(float(gradient.pow(2).sum()) for gradient in together.gradients.values())
    assert together.grad_norm == pytest.approx(math.sqrt(squares))


def test_a_tied_embedding_has_one_gradient(rows: list[Any]) -> None:
    """It holds both uses: perturbing the one tensor moves input and output together."""
    policy = tiny_llama(0, tied=True)

    def step() -> OracleResult:
        return oracle_step(policy, None, rows)

    gradients = step().gradients
    assert "lm_head.weight" not in gradients
    name = "model.embed_tokens.weight"
    assert_slope(step, policy.get_parameter(name), gradients[name])


def test_the_reference_keeps_no_gradient_and_float32_is_close(rows: list[Any]) -> None:
    policy, reference = tiny_llama(0), tiny_llama(1)
    exact = oracle_step(policy, reference, rows)
    assert all(parameter.grad is None for parameter in reference.parameters())
    single = oracle_step(policy.float(), reference.float(), rows)
    assert single.loss == pytest.approx(exact.loss, rel=1e-5)
    assert single.grad_norm == pytest.approx(exact.grad_norm, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
def test_first_step_is_the_optimizers_textbook_step(rows: list[Any], optimizer: str) -> None:
    """With clipped gradient g, both start from zero moments:

    rmsprop: w - lr * g / (sqrt(0.01 g^2) + eps);   adam: w * (1 - lr * wd) - lr * g / (|g| + eps)
    """
    policy, reference = tiny_llama(0), tiny_llama(1)
    before = copy.deepcopy(policy)
    result = oracle_step(policy, reference, rows)
    clip, lr, eps, decay = result.grad_norm / 2, 1e-3, 1e-8, 0.5 if optimizer == "adam" else 0.0
    history = oracle_train(
        policy, reference, [rows], lr=lr, optimizer=optimizer, clip_grad=clip, weight_decay=decay
    )
    assert history[0]["grad_norm"] == result.grad_norm, "the norm before clipping is reported"
    for name, old in before.named_parameters():
        g = result.gradients[name] / 2
        if optimizer == "rmsprop":
            expected = old - lr * g / ((0.01 * g * g).sqrt() + eps)
        else:
            expected = old * (1 - lr * (decay if old.ndim > 1 else 0.0)) - lr * g / (g.abs() + eps)
        torch.testing.assert_close(policy.get_parameter(name), expected, rtol=1e-6, atol=1e-7)


def test_training_lowers_the_loss_and_leaves_the_reference(rows: list[Any]) -> None:
    policy = tiny_llama(0, dtype=torch.float32)
    reference = copy.deepcopy(policy)
    kept = copy.deepcopy(reference.state_dict())
    history = oracle_train(policy, reference, [rows] * 5, lr=[1e-3] * 4 + [0.0], beta=0.1)
    losses = [metrics["loss"] for metrics in history]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.1
    assert [metrics["step"] for metrics in history] == [1, 2, 3, 4, 5]
    assert all(torch.equal(kept[name], value) for name, value in reference.state_dict().items())


@pytest.mark.parametrize("shared", [0, 1, 5, 9, 11, 12, None])
def test_random_rows_share_exactly_what_was_asked(shared: int | None) -> None:
    row = random_row(
        np.random.default_rng(1),
        VOCAB,
        common_prefix_length=shared,
        chosen_answer_lengths=[1, 2],
        rejected_answer_lengths=[3, 4],
        trailing_length=1,
    )
    chosen, rejected = row.chosen.input_ids, row.rejected.input_ids
    expected = 9 if shared is None else shared
    assert np.array_equal(chosen[:expected], rejected[:expected])
    assert chosen[expected] != rejected[expected]
    for long, short in ((row.chosen, row.reference_chosen), (row.rejected, row.reference_rejected)):
        answers = long.labels != -100
        assert np.array_equal(long.labels[answers], long.input_ids[answers])
        assert int((np.diff(answers.astype(int)) == 1).sum()) == len(short) == 2
        short_answers = np.concatenate([one.labels[one.labels != -100] for one in short])
        assert np.array_equal(short_answers, long.labels[answers])
