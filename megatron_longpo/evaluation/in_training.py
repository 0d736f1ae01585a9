"""Evaluates a model in training at an interval: the evaluation pairs, and the suite."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_longpo.config.train import TrainConfig
from megatron_longpo.data.text.tokenizers import load_tokenizer
from megatron_longpo.data.trees.catalog import PairCatalog
from megatron_longpo.engine import build
from megatron_longpo.engine.batches import rank_packs
from megatron_longpo.engine.build_config import training_build_config
from megatron_longpo.engine.console import RunConsole
from megatron_longpo.engine.metrics import Metrics, mean_metrics
from megatron_longpo.engine.schedule import MetricSums, run_microbatches
from megatron_longpo.engine.sources import ModelSources
from megatron_longpo.evaluation.results import Record, flat_numbers
from megatron_longpo.evaluation.scorer import KeptBase, Scorer
from megatron_longpo.evaluation.suite import Suite
from megatron_longpo.objectives import Objective
from megatron_longpo.parallel.groups import Groups

BASE_BUDGET_TOKENS = 8192
"""Tokens of a microbatch of retention's short prompts: few microbatches, of a size that fits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingEvaluation:
    """Everything to evaluate; made once, before the model, and holds tokens but no model."""

    pairs: PairCatalog | None
    """Rows of `data.eval_path`."""
    batch_pairs: int
    suite: Suite
    base: KeptBase | None
    """None if the base is the reference in memory, or retention is off."""
    objective: Objective
    groups: Groups
    console: RunConsole

    @property
    def is_off(self) -> bool:
        return self.pairs is None and not self.suite.sets

    def run(self, model: Sequence[Any], *, budget_tokens: int) -> tuple[Metrics, Record]:
        """Measures everything; the model's weights and gradients stay as they are.

        Returns:
            The numbers under `eval/...`, and the record of the suite, empty if the suite is off.
        """
        started = time.perf_counter()
        for chunk in model:
            chunk.eval()
        metrics: Metrics = {}
        if self.pairs is not None:
            metrics |= self._score_pairs(self.pairs, model, budget_tokens)
        scorer = Scorer(model=model, groups=self.groups, budget_tokens=budget_tokens)
        record = self.suite.measure(scorer, base=self.base, track=self._track)
        metrics |= flat_numbers(record)
        metrics["time_s"] = time.perf_counter() - started
        return {f"eval/{name}": value for name, value in metrics.items()}, record

    def _score_pairs(self, pairs: PairCatalog, model: Sequence[Any], budget_tokens: int) -> Metrics:
        """Scores every pair once and returns means over all pairs."""
        totals: MetricSums = {}
        budget = max(budget_tokens, pairs.largest_pair_tokens)
        with torch.no_grad():
            for start in self._track(range(0, len(pairs), self.batch_pairs)):
                batch = list(range(start, min(start + self.batch_pairs, len(pairs))))
                packs = rank_packs(pairs, batch, self.groups, budget_tokens=budget)
                read_sums = run_microbatches(
                    model, packs, self.objective, self.groups, forward_only=True
                )
                for name, value in read_sums().items():
                    totals[name] = totals.get(name, 0.0) + value
        return mean_metrics(totals)

    def _track(self, parts: Sequence[Any]) -> Iterator[Any]:
        return self.console.track(parts, what="evaluating", total=len(parts))


def prepare_evaluation(
    config: TrainConfig,
    sources: ModelSources,
    groups: Groups,
    *,
    pairs: PairCatalog | None,
    objective: Objective,
    console: RunConsole,
    write_weights: build.WeightsWriter,
) -> TrainingEvaluation:
    """Makes the rows and, if no reference stays in memory, asks the base model once.

    Raises:
        UserError: for evaluation settings that do not fit their files or the model.
    """
    suite = Suite.of(
        config.evaluation,
        lambda: load_tokenizer(sources.policy_folder),
        vocab_size=sources.policy.vocab_size,
    )
    if suite.sets:
        console.say(f"evaluation: {suite.summary}")
    kept, base = None, sources.scorer("base")
    if suite.retention is not None and base is not None and not config.train.dry_run:
        console.say(f"evaluation: asking {base.folder} once, for retention")
        model = build.build_alone(
            training_build_config(config), base, sources, groups, write_weights=write_weights
        )
        kept = ask_base(suite, model, groups)
    return TrainingEvaluation(
        pairs=pairs,
        batch_pairs=config.train.global_batch_pairs,
        suite=suite,
        base=kept,
        objective=objective,
        groups=groups,
        console=console,
    )


def ask_base(suite: Suite, model: list[Any], groups: Groups) -> KeptBase:
    """Returns the base model's states for retention, and frees the model."""
    assert suite.retention is not None
    scorer = Scorer(model=model, groups=groups, budget_tokens=BASE_BUDGET_TOKENS)
    kept = scorer.keep_base(suite.retention)
    model.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return kept
