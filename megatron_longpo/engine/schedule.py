"""Runs a global batch through Megatron's pipeline schedule: forward step, loss, metric sums.

Letters: N pairs of a microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_longpo.config.names import RowName
from megatron_longpo.engine.pair_sums import sum_pairs
from megatron_longpo.model.head.final_states import Head
from megatron_longpo.objectives import LossOutput, Objective, PairLogps
from megatron_longpo.parallel.groups import Groups
from megatron_longpo.parallel.layout import RankPack

MetricSums = dict[str, float]
"""Sums over pairs by metric name; `pairs` is their number."""

T = TypeVar("T")
Pack = TypeVar("Pack", bound=RankPack)

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


def run_microbatches(
    model: Sequence[Any],
    packs: Sequence[RankPack],
    objective: Objective,
    groups: Groups,
    *,
    forward_only: bool,
) -> Callable[[], MetricSums]:
    """Runs a global batch's microbatches and, unless `forward_only`, computes its gradient.

    The loss is the mean over the pairs of the global batch. Each microbatch gives Megatron a sum
    and a number of pairs. Megatron divides once, over all data-parallel ranks, when it finalises
    gradients (`calculate_per_token_loss`).

    Args:
        model: this rank's chunks, wrapped by Megatron's DDP.
        packs: this rank's microbatches, as many as every other rank's.
        objective: the loss of a pair.
        groups: process groups.
        forward_only: whether to score only.

    Returns:
        A function that sums every metric over the global batch. All ranks call it once; all get the
        same numbers. The call waits for the GPU, so the CPU can prepare the next batch before it.
    """
    stored = _run(
        partial(_forward_step, objective=objective, groups=groups),
        model,
        packs,
        forward_only=forward_only,
    )
    return partial(_summed_over_ranks, stored, groups)


def score_microbatches(
    model: Sequence[Any], packs: Sequence[RankPack], groups: Groups
) -> list[PairLogps]:
    """Runs microbatches forward and returns the log-prob sums of their pairs.

    Every context-parallel rank of the last stage gets whole sums; other stages get an empty list.
    """
    return read_microbatches(model, packs, partial(sum_pairs, context_group=groups.context))


def read_microbatches(
    model: Sequence[Any],
    packs: Sequence[Pack],
    read: Callable[[Tensor, Pack], T],
    head: Head | None = None,
) -> list[T]:
    """Runs microbatches forward and returns `read` of each output, on the last stage.

    `head` makes the output; None = the head of training.
    """
    return _run(
        partial(_reading_step, read=read, head=head),
        model,
        packs,
        forward_only=True,
        collect_non_loss_data=True,
    )


def _run(
    step: Callable[..., Any],
    model: Sequence[Any],
    packs: Sequence[RankPack],
    *,
    forward_only: bool,
    collect_non_loss_data: bool = False,
) -> list[Any]:
    """Runs Megatron's schedule and returns what the last stage stored, one object a microbatch."""
    if len(model) > 1:
        config = model[0].config
        assert config.overlap_p2p_comm and not config.batch_p2p_comm, "mis-ordered otherwise"
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(packs) for _ in model] if len(model) > 1 else iter(packs),
        model=list(model),
        num_microbatches=len(packs),
        # Lengths differ: under pipeline parallelism the stages exchange shapes themselves.
        seq_length=1,
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=collect_non_loss_data,
    )


def _forward_step(
    packs: Iterator[RankPack], model: Any, *, objective: Objective, groups: Groups
) -> tuple[Tensor, LossFunction]:
    pack = next(packs)
    return model(pack), partial(_loss, pack=pack, objective=objective, groups=groups)


def _reading_step(
    packs: Iterator[Pack], model: Any, *, read: Callable[[Tensor, Pack], T], head: Head | None
) -> tuple[Tensor, Callable[..., T]]:
    pack = next(packs)

    def output_read(output: Tensor, non_loss_data: bool) -> T:
        return read(output, pack)

    return model(pack, head), output_read


def _loss(
    logps: Tensor, *, pack: RankPack, objective: Objective, groups: Groups
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Returns Megatron's three outputs: loss sum, number of pairs, and metric sums.

    Every context-parallel rank computes the whole loss, so only the first counts the pairs.
    Pairs of a filler have weight 0 but stay in the graph: every rank must run a backward.
    """
    pair_logps = sum_pairs(logps, pack, context_group=groups.context)
    output = objective(pair_logps)
    # Not a product with the weights: 0 times an infinite loss would be NaN.
    loss_sum = torch.where(pack.weights > 0, output.loss_N, 0.0).sum()
    counts_here = groups.context.rank() == 0
    num_pairs = (pack.weights.sum() if counts_here else torch.zeros_like(pack.weights).sum()).int()
    return loss_sum, num_pairs, _metric_sums(output, pair_logps, pack.weights, objective.compared)


def _metric_sums(
    output: LossOutput, logps: PairLogps, weights: Tensor, compared: tuple[RowName, RowName] | None
) -> dict[str, Tensor]:
    """Returns fp64 sums over the microbatch's pairs: loss, log-probs, the objective's metrics."""
    values_N = {
        "loss": output.loss_N,
        **output.metrics,
        "pairs": torch.ones_like(weights),
        **_logps_by_name("logps", logps.policy, compared),
        **_logps_by_name("reference_logps", logps.reference, compared),
    }
    stacked = torch.stack([values.detach().double() for values in values_N.values()])
    sums = torch.where(weights > 0, stacked, 0.0).sum(dim=1)
    return dict(zip(values_N, sums.unbind(), strict=True))


def _logps_by_name(
    kind: str, logps: Mapping[RowName, Tensor], compared: tuple[RowName, RowName] | None
) -> dict[str, Tensor]:
    """Returns sums over a pair's turns, [N] each, by name.

    The rows that the preference compares are named `chosen` and `rejected`; the reference's may
    have another context than the policy's. Any further row keeps its own name.
    """
    if compared is None:
        return {}
    named: dict[str, Tensor] = {}
    for row, logps_NT in logps.items():
        branch = row.partition("_")[2]
        counterpart = compared[0] if branch == "chosen" else compared[1]
        is_other = row != counterpart and counterpart in logps
        named[f"{kind}/{row if is_other else branch}"] = logps_NT.sum(dim=1)
    return named


def _summed_over_ranks(stored: Sequence[dict[str, Tensor]], groups: Groups) -> MetricSums:
    """Sums the last stage's microbatches over data-parallel ranks and sends them to every stage."""
    names: list[str] = sorted(stored[0]) if stored else []
    if groups.pipeline.size() > 1:
        last_rank = dist.get_global_rank(groups.pipeline, groups.pipeline.size() - 1)
        shared: list[Any] = [names]
        dist.broadcast_object_list(shared, src=last_rank, group=groups.pipeline)
        names = shared[0]
    totals = torch.zeros(len(names), dtype=torch.float64, device=groups.device)
    for sums in stored:
        totals += torch.stack([sums[name] for name in names])
    if groups.is_last_stage():
        dist.all_reduce(totals, group=groups.data)
    if groups.pipeline.size() > 1:
        dist.broadcast(totals, src=last_rank, group=groups.pipeline)
    return dict(zip(names, totals.tolist(), strict=True))
