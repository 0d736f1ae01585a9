"""`longpo train`: prepares a run, then does one optimizer step after the other."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_longpo.config.train import TrainConfig, check_world
from megatron_longpo.data.trees.catalog import PairCatalog
from megatron_longpo.data.trees.sampler import PairSampler
from megatron_longpo.engine import build, run_folder
from megatron_longpo.engine.batches import rank_packs, read_ahead
from megatron_longpo.engine.build_config import training_build_config
from megatron_longpo.engine.console import RunConsole
from megatron_longpo.engine.degrees import parallel_sizes
from megatron_longpo.engine.flops import step_flops
from megatron_longpo.engine.metrics import (
    Metrics,
    MetricsWriter,
    check_trackers,
    mean_metrics,
    peak_memory_gib,
)
from megatron_longpo.engine.row_reader import RowReader
from megatron_longpo.engine.schedule import run_microbatches
from megatron_longpo.engine.sources import ModelSources, check_layout, make_objective, read_models
from megatron_longpo.errors import StopRequested
from megatron_longpo.evaluation.in_training import TrainingEvaluation, prepare_evaluation
from megatron_longpo.model.spec import DTYPES
from megatron_longpo.objectives import Objective
from megatron_longpo.parallel import groups as process_groups
from megatron_longpo.parallel.collectives import on_any_rank
from megatron_longpo.parallel.groups import Groups
from megatron_longpo.runtime import stop
from megatron_longpo.training import checkpoint
from megatron_longpo.training.background import BackgroundSaves
from megatron_longpo.training.data_parallel import connect, gather_parameters, wrap_in_ddp
from megatron_longpo.training.optimizer import (
    check_optimizer,
    current_learning_rate,
    make_optimizer,
    make_scheduler,
)


@dataclass(kw_only=True, slots=True)
class Run:
    """A run in progress, as `prepare` made it and every step changes it."""

    config: TrainConfig
    groups: Groups
    console: RunConsole
    sources: ModelSources
    objective: Objective
    pairs: PairCatalog
    evaluation: TrainingEvaluation
    sampler: PairSampler
    state: checkpoint.TrainingState
    """Model, optimizer and what else a checkpoint saves."""
    saves: BackgroundSaves
    scheduler: OptimizerParamScheduler
    num_steps: int
    step: int
    """Optimizer steps done."""

    @property
    def model(self) -> Sequence[Any]:
        """This rank's chunks, wrapped by Megatron's DDP."""
        return self.state.model

    @property
    def optimizer(self) -> MegatronOptimizer:
        return self.state.optimizer

    @property
    def budget_tokens(self) -> int:
        return self.config.data.pack_tokens or self.pairs.largest_pair_tokens


def run_training(config: TrainConfig) -> None:
    """Trains; `config` is resolved.

    Raises:
        UserError: for bad input, if possible before expensive work.
        StopRequested: after a signal asked to stop; a checkpoint is saved.
    """
    try:
        run = prepare(config)
        if config.train.dry_run:
            run.console.say("dry run: settings, data and model are in order")
            return
        train(run)
    finally:
        process_groups.shutdown()


def prepare(
    config: TrainConfig, *, write_weights: build.WeightsWriter = build.load_hf_weights
) -> Run:
    """Checks everything, cheapest first, builds the model and resumes a checkpoint if there is one.

    `write_weights` replaces the reading of Hugging Face weights, for benchmarks.
    """
    _check_machine(config)
    sources = read_models(config)
    check_layout(config, sources)
    resume_from = _checkpoint_to_resume(config)
    if resume_from is not None:
        checkpoint.check_matches(resume_from, sources.policy, sources.lora)
    groups = process_groups.initialize(
        parallel_sizes(config.parallel, sources.built),
        timeout_minutes=config.parallel.timeout_minutes,
        seed=config.train.seed,
    )
    console = RunConsole(is_main=groups.is_main)
    objective = make_objective(config)
    pairs, eval_pairs = _read_rows(config, sources, objective, console)
    sampler = _make_sampler(config, pairs, console)
    evaluation = prepare_evaluation(
        config,
        sources,
        groups,
        pairs=eval_pairs,
        objective=objective,
        console=console,
        write_weights=write_weights,
    )
    state = _build_state(config, sources, groups, sampler, console, write_weights)
    step = _resume(config, resume_from, state, console)
    # With another global batch than before, the rest of the epochs is another number of steps.
    num_steps = config.train.steps or step + sampler.steps_left(config.train.epochs)
    if step >= num_steps:
        console.say(f"nothing is left to do: {num_steps} steps are asked for")
    scheduler = make_scheduler(config.optimizer, state.optimizer, num_steps=num_steps)
    scheduler.step(increment=min(step, num_steps))
    return Run(
        config=config,
        groups=groups,
        console=console,
        sources=sources,
        objective=objective,
        pairs=pairs,
        evaluation=evaluation,
        sampler=sampler,
        state=state,
        saves=BackgroundSaves(),
        scheduler=scheduler,
        num_steps=num_steps,
        step=step,
    )


def _check_machine(config: TrainConfig) -> None:
    """Raises a UserError for folders, packages and processes that do not fit the config."""
    run_folder.check_writable(config)
    check_trackers(config.logging)
    check_optimizer(config.optimizer)
    if config.checkpoint.resume == "never":
        run_folder.check_is_new(config)
    check_world(config, int(os.environ.get("WORLD_SIZE", 1)))


def _read_rows(
    config: TrainConfig, sources: ModelSources, objective: Objective, console: RunConsole
) -> tuple[PairCatalog, PairCatalog | None]:
    """Returns the pairs to train on and those to evaluate on."""
    reader = RowReader(
        config=config,
        sources=sources,
        objective=objective,
        console=console,
        uses_cache=config.reference.mode == "cached",
    )
    pairs = reader.read("data.path", config.data.path)
    if config.data.pack_tokens is not None:
        pairs.check_budget(config.data.pack_tokens)
    if config.data.eval_path is None:
        return pairs, None
    return pairs, reader.read("data.eval_path", config.data.eval_path)


def _make_sampler(config: TrainConfig, pairs: PairCatalog, console: RunConsole) -> PairSampler:
    """Returns the order of the pairs over all epochs."""
    sampler = PairSampler(
        len(pairs),
        global_batch_pairs=config.train.global_batch_pairs,
        shuffle=config.data.shuffle,
        seed=config.data.seed,
        fingerprint=pairs.dataset.fingerprint,
    )
    if sampler.dropped_pairs_per_epoch:
        console.say(
            f"the last {sampler.dropped_pairs_per_epoch} pairs of each epoch's order are left out: "
            f"they do not fill a global batch of {config.train.global_batch_pairs}"
        )
    return sampler


def _build_state(
    config: TrainConfig,
    sources: ModelSources,
    groups: Groups,
    sampler: PairSampler,
    console: RunConsole,
    write_weights: build.WeightsWriter,
) -> checkpoint.TrainingState:
    """Builds the model and its optimizer."""
    unwrapped = build.build_model(
        training_build_config(config),
        sources,
        groups,
        say=console.say,
        write_weights=write_weights,
    )
    model = wrap_in_ddp(unwrapped, config.optimizer)
    optimizer = make_optimizer(config.optimizer, model, bf16=config.model.dtype == "bf16")
    connect(model, optimizer)
    return checkpoint.TrainingState(
        model=model,
        optimizer=optimizer,
        optimizer_kind={
            "name": config.optimizer.name,
            "distributed": config.optimizer.distributed,
        },
        sampler=sampler,
        groups=groups,
    )


def _resume(
    config: TrainConfig,
    resume_from: Path | None,
    state: checkpoint.TrainingState,
    console: RunConsole,
) -> int:
    """Loads the checkpoint, if there is one, and returns the steps that are done."""
    if resume_from is None:
        return 0
    step = checkpoint.load(resume_from, state, load_optimizer=config.checkpoint.load_optimizer)
    console.say(f"resumed from {resume_from} at step {step}")
    return step


def train(run: Run) -> None:
    """Runs the remaining steps; writes metrics, evaluations and checkpoints when they are due."""
    config = run.config
    stop.listen()
    if not run.groups.is_main:
        _train_or_abandon(run, None)
        return
    run_folder.write_config(config, {"data": run.pairs.dataset.fingerprint})
    writer = MetricsWriter(
        config.logging, resumed_step=run.step, run_config=run_folder.plain_config(config)
    )
    try:
        _train_or_abandon(run, writer)
    finally:
        writer.close()


def _train_or_abandon(run: Run, writer: MetricsWriter | None) -> None:
    try:
        _train(run, writer)
    except BaseException:
        # If one rank fails alone, the ranks cannot agree that a checkpoint is written.
        run.saves.abandon()
        raise


def _train(run: Run, writer: MetricsWriter | None) -> None:
    config = run.config
    if _stop_agreed(run):
        raise StopRequested(f"stopped before step {run.step + 1}, nothing new to save")
    if run.step == 0 and config.train.eval_at_start:
        _evaluate(run, writer)
    steps = run.console.track(
        range(run.step, run.num_steps), what="training", total=run.num_steps, done=run.step
    )
    for _ in steps:
        metrics = train_step(run)
        _log(run, metrics, writer)
        is_last = run.step == run.num_steps
        if _is_due(run.step, config.train.eval_interval) or (
            is_last and config.train.eval_at_start
        ):
            _evaluate(run, writer)
        must_stop = _stop_agreed(run)
        if is_last or must_stop or _is_due(run.step, config.checkpoint.interval):
            save(run, is_final=is_last or must_stop)
        if must_stop and not is_last:
            raise StopRequested(f"stopped at step {run.step} of {run.num_steps}, checkpoint saved")


def train_step(run: Run) -> Metrics:
    """Trains on one global batch and returns the step's row of metrics.jsonl."""
    started = time.perf_counter()
    run.saves.poll()
    pairs = run.sampler.next_batch()
    for chunk in run.model:
        chunk.train()
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    packs = rank_packs(
        run.pairs,
        pairs,
        run.groups,
        budget_tokens=run.budget_tokens,
    )

    read_sums = run_microbatches(run.model, packs, run.objective, run.groups, forward_only=False)
    learning_rate = current_learning_rate(run.optimizer)
    _, grad_norm, _ = run.optimizer.step()
    if run.step + 1 < run.num_steps:
        upcoming = run.sampler.upcoming_batch()
        read_ahead(run.pairs, upcoming, run.groups, budget_tokens=run.budget_tokens)
    # From here on the CPU waits for the GPU.
    sums = read_sums()
    _check_finite("loss", sums["loss"], run.step + 1)
    _check_finite("gradient norm", float(grad_norm), run.step + 1)
    run.scheduler.step(increment=1)
    run.step += 1
    step_time = time.perf_counter() - started
    return {
        "step": run.step,
        **mean_metrics(sums),
        "grad_norm": float(grad_norm),
        "learning_rate": learning_rate,
        "consumed_pairs": run.sampler.state.consumed_pairs,
        **_work_metrics(run, pairs, step_time),
    }


def _work_metrics(run: Run, pairs: list[int], step_time: float) -> Metrics:
    sizes = run.pairs.sizes_of(pairs)
    tokens = sum(size.policy_tokens for size in sizes)
    flops = step_flops(
        sizes,
        run.sources.policy,
        run.sources.online_arch,
        lora=None if run.sources.lora is None else run.sources.lora.config,
    )
    return {
        "tokens": tokens,
        "unshared_tokens": sum(size.unshared_tokens for size in sizes),
        "reference_tokens": sum(size.reference_tokens for size in sizes),
        "step_time_s": step_time,
        "tokens_per_second": tokens / step_time,
        "model_tflops_per_gpu": flops / step_time / run.groups.world_size / 1e12,
        "peak_memory_gib": peak_memory_gib(),
    }


def _evaluate(run: Run, writer: MetricsWriter | None) -> None:
    if run.evaluation.is_off:
        return
    metrics, record = run.evaluation.run(run.model, budget_tokens=run.budget_tokens)
    metrics = {"step": run.step, **metrics}
    run.console.say_evaluation(metrics)
    if writer is not None:
        writer.write(metrics)
        if record:
            writer.write_record({"step": run.step, **record})


def _log(run: Run, metrics: Metrics, writer: MetricsWriter | None) -> None:
    is_paced = _is_due(run.step, run.config.logging.interval) or run.step == run.num_steps
    if is_paced:
        run.console.say_step(metrics, num_steps=run.num_steps)
    if writer is not None:
        writer.write(metrics, to_trackers=is_paced)


def save(run: Run, *, is_final: bool) -> None:
    """Saves a checkpoint, in the background with `checkpoint.async_save` unless it is the last."""
    config = run.config
    assert config.checkpoint.dir is not None, "the config is resolved"
    run.saves.wait()
    gather_parameters(run.model)
    checkpoint.save(
        Path(config.checkpoint.dir),
        run.step,
        run.state,
        hf_source=run.sources.policy_folder,
        arch=run.sources.policy,
        dtype=str(DTYPES[config.model.dtype]).removeprefix("torch."),
        keep=config.checkpoint.keep,
        lora=run.sources.lora,
        background=run.saves if config.checkpoint.async_save and not is_final else None,
        say=run.console.say,
    )


def _checkpoint_to_resume(config: TrainConfig) -> Path | None:
    assert config.checkpoint.dir is not None, "the config is resolved"
    resume = config.checkpoint.resume
    if resume == "never":
        return None
    folder = Path(config.checkpoint.dir)
    own = checkpoint.newest(folder)
    if resume == "auto":
        return own
    chosen = checkpoint.find_iteration_folder(resume)
    if own is not None and chosen.resolve().parent != folder.resolve():
        # A requeued run still names its first start: it resumes its own newest checkpoint.
        return own
    return chosen


def _stop_agreed(run: Run) -> bool:
    """Tells whether any rank was asked to stop: all must save the same step."""
    return on_any_rank(stop.was_requested(), run.groups.device)


def _check_finite(name: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the {name} of step {step} is {value}; the last checkpoint is intact. Look at the "
            "rows of this step, or lower optimizer.lr"
        )


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
