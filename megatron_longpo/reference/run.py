"""`longpo reference`: writes the frozen reference's log-probabilities of every row to disk.

The reference runs in the place that the policy has in training: the same packs, layouts and
pipeline, but one model without optimizer or gradients. The command resumes a stopped run, under the
same or any other layout.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_longpo.config.names import RowName
from megatron_longpo.config.train import TrainConfig, check_world
from megatron_longpo.data.trees.catalog import PairCatalog
from megatron_longpo.data.trees.packing import PairSize
from megatron_longpo.data.trees.reference_logps import ReferenceLogps
from megatron_longpo.data.trees.tree import PairTrees, reference_alone
from megatron_longpo.engine import build, degrees, run_folder
from megatron_longpo.engine.batches import lay_out_microbatch, rank_microbatches, split_parts
from megatron_longpo.engine.build_config import training_build_config
from megatron_longpo.engine.console import RunConsole
from megatron_longpo.engine.metrics import peak_memory_gib
from megatron_longpo.engine.reference_cache import CacheHeader
from megatron_longpo.engine.row_reader import RowReader
from megatron_longpo.engine.schedule import score_microbatches
from megatron_longpo.engine.sources import make_objective, read_models
from megatron_longpo.errors import StopRequested
from megatron_longpo.parallel import groups as process_groups
from megatron_longpo.parallel.collectives import from_main_rank, on_any_rank
from megatron_longpo.parallel.groups import Groups
from megatron_longpo.reference.writer import CacheWriter
from megatron_longpo.runtime import stop


@dataclass(frozen=True, slots=True)
class ReferenceRows:
    """A catalog's pairs with only the rows that the reference reads."""

    catalog: PairCatalog

    def sizes_of(self, pairs: Sequence[int]) -> list[PairSize]:
        return [size.reference_alone for size in self.catalog.sizes_of(pairs)]

    def trees(self, pair: int) -> PairTrees:
        return reference_alone(self.catalog.trees(pair))


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One data set and its pairs that are not scored yet."""

    catalog: PairCatalog
    writer: CacheWriter | None
    """None on all ranks but the main one."""
    pending: tuple[int, ...]
    """Pairs of the catalog that are in no part on disk, the same on every rank."""

    @property
    def budget_tokens(self) -> int:
        """Tokens of a microbatch: as many as in training, which also needs memory for backward."""
        largest = max(size.reference_tokens for size in self.catalog.sizes)
        return max(self.catalog.largest_pair_tokens, largest)


def run_reference(config: TrainConfig) -> None:
    """Computes the cache for `longpo train` with `reference.mode: cached`; `config` is resolved.

    Raises:
        UserError: for bad input.
        StopRequested: after a signal asked to stop; all scored rows are saved.
    """
    try:
        compute(config)
    finally:
        process_groups.shutdown()


def compute(config: TrainConfig) -> None:
    """Checks everything, cheapest first, and scores the rows that are not on disk."""
    assert config.reference.cache_path is not None, "the config is resolved"
    run_folder.check_folder("reference.cache_path", Path(config.reference.cache_path))
    check_world(config, int(os.environ.get("WORLD_SIZE", 1)))
    sources = read_models(config)
    cached = sources.scorer("cached")
    assert cached is not None, "the config is resolved"
    degrees.stage_split(config.parallel, sources.policy)
    degrees.check_split(config.parallel, [cached.arch])
    groups = process_groups.initialize(
        degrees.parallel_sizes(config.parallel, [cached.arch]),
        timeout_minutes=config.parallel.timeout_minutes,
        seed=config.train.seed,
    )
    stop.listen()
    console = RunConsole(is_main=groups.is_main)
    reader = RowReader(
        config=config,
        sources=sources,
        objective=make_objective(config),
        console=console,
        uses_cache=False,
    )
    catalogs = [reader.read("data.path", config.data.path)]
    if config.data.eval_path is not None:
        catalogs.append(reader.read("data.eval_path", config.data.eval_path))
    if config.train.dry_run:
        console.say("dry run: settings and data are in order")
        return
    tasks = [open_task(reader, catalog) for catalog in catalogs]
    if not any(task.pending for task in tasks):
        return
    model = build.build_alone(
        training_build_config(config), cached, sources, groups, say=console.say
    )
    for task in tasks:
        score(task, model, groups, console)


def open_task(reader: RowReader, catalog: PairCatalog) -> Task:
    """Opens the cache of a data set on the main rank, and finds the rows that it lacks."""
    config = reader.config
    assert config.reference.cache_path is not None, "the config is resolved"
    cache_path = Path(config.reference.cache_path)
    reference = reader.sources.scorer("cached")
    assert reference is not None, "the config is resolved"
    writers = []

    def open_cache() -> set[int]:
        writer = CacheWriter(
            cache_path,
            CacheHeader(
                fingerprint=reader.fingerprint(catalog.dataset),
                rows=reader.objective.needs.reference,
            ),
            made_with={
                "reference": reference.folder,
                "model.attention_kernel": config.model.attention_kernel,
                "model.layers": config.model.layers,
                "parallel": asdict(config.parallel),
            },
        )
        writers.append(writer)
        for path in writer.damaged:
            reader.console.say(f"{path} was damaged: its rows are scored again")
        reader.console.say(f"{writer.folder}: has {len(writer.saved)} of {len(catalog)} rows")
        return writer.saved

    saved = from_main_rank(open_cache)
    return Task(
        catalog=catalog,
        writer=writers[0] if writers else None,
        pending=tuple(pair for pair in range(len(catalog)) if catalog.row_index(pair) not in saved),
    )


def score(task: Task, model: list[Any], groups: Groups, console: RunConsole) -> None:
    """Scores a task's pending pairs, saving them part by part."""
    rows = ReferenceRows(task.catalog)
    sizes = [size.policy_tokens for size in rows.sizes_of(task.pending)]
    parts = split_parts(task.pending, sizes, groups, budget_tokens=task.budget_tokens)
    done, total = len(task.catalog) - len(task.pending), len(task.catalog)
    for pairs in console.track(parts, what="scoring", total=len(parts)):
        if on_any_rank(stop.was_requested(), groups.device):
            raise StopRequested(
                f"stopped with {done} of {total} rows scored and saved; the same command goes on"
            )
        started = time.perf_counter()
        logps = score_part(task, pairs, model, groups)
        if task.writer is not None:
            task.writer.write(logps)
        done += len(pairs)
        tokens = sum(size.policy_tokens for size in rows.sizes_of(pairs))
        console.say(
            f"scored {done}/{total}  tokens/s {tokens / (time.perf_counter() - started):.4g}  "
            f"peak memory {peak_memory_gib():.4g} GiB"
        )


def score_part(
    task: Task, pairs: Sequence[int], model: list[Any], groups: Groups
) -> ReferenceLogps:
    """Returns the reference's log-probabilities of some pairs, the same on every rank."""
    source = ReferenceRows(task.catalog)
    microbatches = rank_microbatches(source, pairs, groups, budget_tokens=task.budget_tokens)
    packs = [lay_out_microbatch(source, pairs, microbatch, groups) for microbatch in microbatches]
    with torch.no_grad():
        scored = score_microbatches(model, packs, groups)
    most_turns = torch.tensor(max(pack.turn_mask.shape[1] for pack in packs), device=groups.device)
    dist.all_reduce(most_turns, op=dist.ReduceOp.MAX)
    names = task.catalog.tree_config.reference
    # One rank of each data-parallel group fills in its pairs, the others leave zeros: the sum over
    # all ranks is exact.
    sums_NRT = torch.zeros(
        len(pairs), len(names), int(most_turns), dtype=torch.float64, device=groups.device
    )
    num_turns_N = torch.zeros(len(pairs), dtype=torch.int64, device=groups.device)
    if groups.is_last_stage() and groups.tensor.rank() == 0 and groups.context.rank() == 0:
        for microbatch, logps in zip(microbatches, scored, strict=True):
            if not microbatch.is_filler:
                places = torch.tensor(microbatch.pairs, device=groups.device)
                values = torch.stack([logps.policy[name] for name in names], dim=1)
                sums_NRT[places, :, : values.shape[2]] = values
                num_turns_N[places] = logps.turn_mask_NT.sum(dim=1)
    dist.all_reduce(sums_NRT)
    dist.all_reduce(num_turns_N)
    return _part(task.catalog, pairs, names, sums_NRT.cpu().numpy(), num_turns_N.cpu().numpy())


def _part(
    catalog: PairCatalog,
    pairs: Sequence[int],
    names: tuple[RowName, ...],
    sums_NRT: np.ndarray,
    num_turns_N: np.ndarray,
) -> ReferenceLogps:
    """Returns the sums of existing turns, by row name."""
    ids = [catalog.pair_id(pair) for pair in pairs]
    is_turn_NT = np.arange(sums_NRT.shape[2]) < num_turns_N[:, None]
    for place, row_id in enumerate(ids):
        if not np.isfinite(sums_NRT[place]).all():
            raise FloatingPointError(
                f"the reference gives row {row_id!r} ({catalog.source(pairs[place])}) a "
                "log-probability that is no number; what was scored before is saved"
            )
    return ReferenceLogps(
        indices=np.array([catalog.row_index(pair) for pair in pairs], dtype=np.int64),
        ids=np.array(ids, dtype=np.str_),
        num_turns=num_turns_N,
        sums={name: sums_NRT[:, at][is_turn_NT] for at, name in enumerate(names)},
    )
