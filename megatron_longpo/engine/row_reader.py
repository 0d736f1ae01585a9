"""Opens a run's data sets: checks and measures rows, and finds the reference's cached sums."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_longpo.config.train import TrainConfig
from megatron_longpo.data.rows.dataset import RowDataset
from megatron_longpo.data.trees.catalog import PairCatalog
from megatron_longpo.data.trees.reference_logps import ReferenceLogps
from megatron_longpo.engine.console import RunConsole
from megatron_longpo.engine.reference_cache import find_logps
from megatron_longpo.engine.reference_fingerprint import (
    ReferenceFingerprint,
    fingerprint_model,
    with_rows,
)
from megatron_longpo.engine.sources import ModelSources, read_pairs
from megatron_longpo.objectives import Objective
from megatron_longpo.parallel.collectives import from_main_rank


@dataclass(kw_only=True, slots=True)
class RowReader:
    """Reads `data.path` and `data.eval_path` in the same way."""

    config: TrainConfig
    sources: ModelSources
    objective: Objective
    console: RunConsole
    uses_cache: bool
    """True: the reference's sums are read from a cache, and its rows are not packed."""
    _model: ReferenceFingerprint | None = None
    """Fingerprint of the reference without rows; None until needed, as it reads all weights."""

    def read(self, key: str, path: str) -> PairCatalog:
        """Returns the usable pairs of `path`, which is the value of the setting `key`."""

        def progress(rows: Any) -> Iterator[int]:
            return self.console.track(rows, what=f"checking {path}", total=len(rows))

        pairs = read_pairs(
            self.config,
            path,
            self.sources,
            self.objective,
            progress=progress,
            find_logps=partial(self._find_logps, key) if self.uses_cache else None,
            for_evaluation=key == "data.eval_path",
        )
        dropped = f", {pairs.num_dropped} dropped as too long" if pairs.num_dropped else ""
        self.console.say(
            f"{path}: {len(pairs)} pairs{dropped}, the largest {pairs.largest_pair_tokens} tokens"
        )
        return pairs

    def fingerprint(self, dataset: RowDataset) -> ReferenceFingerprint:
        """Returns the fingerprint of the reference's sums of these rows; for the main rank."""
        if self._model is None:
            cached = self.sources.scorer("cached")
            assert cached is not None, "only a cached reference has a fingerprint"
            self.console.say(f"reading {cached.folder} for its fingerprint")
            self._model = fingerprint_model(self.config, cached.folder, cached.arch)
        return with_rows(self._model, dataset)

    def _find_logps(self, key: str, dataset: RowDataset) -> ReferenceLogps:
        cache_path = self.config.reference.cache_path
        assert cache_path is not None, "the config is resolved"

        def find() -> ReferenceLogps:
            return find_logps(
                Path(cache_path),
                self.fingerprint(dataset),
                self.objective.needs.reference,
                data_key=key,
            )

        logps = from_main_rank(find)
        self.console.say(f"{key}: the reference's log-probabilities are those of {logps.source}")
        return logps
