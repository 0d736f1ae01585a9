"""Scores probes with a model that is spread over ranks, in training's packs and pipeline.

Letters: R rows of a set, G most groups among them, N rows of a microbatch, e and d edges and places
of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_longpo.data.trees.packing import Microbatch
from megatron_longpo.engine.batches import lay_out_microbatch, rank_microbatches, split_parts
from megatron_longpo.engine.pair_sums import binned
from megatron_longpo.engine.schedule import read_microbatches
from megatron_longpo.evaluation.probe_pack import BaseStates, ProbePack, policy_states, probe
from megatron_longpo.evaluation.probes import ProbeSet
from megatron_longpo.parallel.groups import Groups
from megatron_longpo.parallel.layout import RankPack

Rows = tuple[int, ...]
Track = Callable[[Sequence[Any]], Iterator[Any]]
"""Yields parts and shows progress."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """A model's scores of a set's rows; the same on every rank."""

    logps: np.ndarray
    """[R, G] float64, nats: sums over the group's tokens."""
    hits: np.ndarray
    """[R, G] float64: how many of the group's tokens greedy decoding would write."""
    divergences: np.ndarray
    """[R] float64, nats: sum of KL(base || policy) over the row's places; 0 where the set does not
    compare."""
    agreements: np.ndarray
    """[R] float64: at how many places both models' likeliest tokens are the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptBase:
    """A base model's states at a set's places, kept after the model is freed."""

    states: dict[Rows, Tensor]
    """By the rows of a microbatch; only on the last stage."""
    weight: Tensor | None
    """This rank's rows of the output weight, in CPU memory; None on other stages."""
    budget_tokens: int
    """Tokens of the base's microbatches. A model that is compared with it is packed alike."""

    def of(self, rows: Rows) -> BaseStates | None:
        if self.weight is None:
            return None
        return BaseStates(states=self.states[rows], weight=self.weight)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scorer:
    """A model on its ranks, ready to score."""

    model: Sequence[Any]
    groups: Groups
    budget_tokens: int
    """Most tokens of a microbatch, unless one row alone has more."""

    def score(
        self, probes: ProbeSet, *, base: KeptBase | None = None, track: Track = iter
    ) -> Scores:
        """Scores all rows; a set that compares takes `base`, or the model's reference."""
        num_groups = probes.num_groups
        totals = torch.zeros(
            len(probes), 2 * num_groups + 2, dtype=torch.float64, device=self.groups.device
        )
        read = partial(_sums, num_groups=num_groups, groups=self.groups)
        head = partial(probe, context_group=self.groups.context)
        budget = self.budget_tokens if base is None else base.budget_tokens
        for microbatches, packs in self._parts(probes, track, budget_tokens=budget):
            asked = [
                ProbePack.of(
                    pack if base is None else replace(pack, reference=None),
                    base=None if base is None else base.of(microbatch.pairs),
                )
                for microbatch, pack in zip(microbatches, packs, strict=True)
            ]
            self._collect(totals, microbatches, read_microbatches(self.model, asked, read, head))
        # One rank of each data-parallel group has filled in its rows, the others left zeros.
        dist.all_reduce(totals)
        values = totals.cpu().numpy()
        return Scores(
            logps=values[:, :num_groups],
            hits=values[:, num_groups : 2 * num_groups],
            divergences=values[:, -2],
            agreements=values[:, -1],
        )

    def keep_base(self, probes: ProbeSet) -> KeptBase:
        """Returns the states that `score` needs of this model as a base; it may then be freed."""
        states: dict[Rows, Tensor] = {}
        read = partial(_whole_states, groups=self.groups)
        for microbatches, packs in self._parts(probes, iter, budget_tokens=self.budget_tokens):
            asked = [replace(pack, reference=None) for pack in packs]
            found = read_microbatches(self.model, asked, read, policy_states)
            states.update(zip([m.pairs for m in microbatches], found, strict=bool(found)))
        weight = None
        if self.groups.is_last_stage():
            weight = unwrap_model(self.model[-1]).output_weight().detach().to("cpu", copy=True)
        return KeptBase(states=states, weight=weight, budget_tokens=self.budget_tokens)

    def _parts(
        self, probes: ProbeSet, track: Track, *, budget_tokens: int
    ) -> Iterator[tuple[list[Microbatch], list[RankPack]]]:
        """Yields this rank's microbatches by part; their pairs are rows of the whole set."""
        for chunk in self.model:
            chunk.eval()
        budget = max(budget_tokens, probes.largest_row_tokens)
        sizes = [size.policy_tokens for size in probes.sizes]
        parts = split_parts(range(len(probes)), sizes, self.groups, budget_tokens=budget)
        with torch.no_grad():
            for rows in track(parts):
                dealt = rank_microbatches(probes, rows, self.groups, budget_tokens=budget)
                packs = [lay_out_microbatch(probes, rows, one, self.groups) for one in dealt]
                named = [replace(one, pairs=tuple(rows[i] for i in one.pairs)) for one in dealt]
                yield named, packs

    def _collect(
        self, totals: Tensor, microbatches: Sequence[Microbatch], found: Sequence[Tensor]
    ) -> None:
        groups = self.groups
        if not (groups.is_last_stage() and groups.tensor.rank() == groups.context.rank() == 0):
            return
        for microbatch, sums in zip(microbatches, found, strict=True):
            if not microbatch.is_filler:
                totals[list(microbatch.pairs)] = sums


def _sums(output: Tensor, pack: ProbePack, *, num_groups: int, groups: Groups) -> Tensor:
    """Sums over all context-parallel ranks, [2, e + d] -> [N, 2 G + 2]."""
    edges, places = pack.policy.edges, pack.policy.divergence
    of_edges, of_places = output.double().split([len(edges.sources), len(places.sources)], dim=1)
    num_rows = len(pack.weights)
    bins = edges.pairs * num_groups + edges.turns
    shape = torch.Size((num_rows, num_groups))
    sums = [
        *binned(of_edges, bins, shape),
        *binned(of_places, places.pairs, torch.Size((num_rows, 1))),
    ]
    total = torch.cat(sums, dim=1)
    dist.all_reduce(total, group=groups.context)
    return total


def _whole_states(states: Tensor, pack: RankPack, *, groups: Groups) -> Tensor:
    """Gathers states, [d, h] -> [slots of the whole pack, h], on every context-parallel rank."""
    places = pack.policy.divergence
    whole = states.new_zeros(places.num_slots, states.shape[1])
    whole[places.slots] = states
    dist.all_reduce(whole, group=groups.context)
    return whole
