"""What both sides of tools/bench_peers.py share: a case, its inputs, and how steps are timed."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_longpo.config.names import Dtype
from megatron_longpo.data.jsonl import write_whole
from megatron_longpo.data.rows.schema import PreferenceRow
from megatron_longpo.data.rows.writing import write_rows_jsonl
from megatron_longpo.model.spec import DTYPES
from tools.bench_models import ModelShape, PairShape, random_pair

BETA, LEARNING_RATE, ADAM_BETAS, CLIP_GRAD = 0.1, 1e-6, (0.9, 0.95), 1.0
"""Of both sides: DPO with Adam, no weight decay, a constant rate."""
SLOWER = 1.15
"""A trial of which two counted steps take so many times the best trial's median ends early."""
POSITIONS = 131_072
MEASURED = ("torch", "transformers", "trl", "liger_kernel", "megatron-core", "transformer_engine")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One cell of the table: a model, a length, a kind of reference. One pair a step."""

    shape_name: str
    shape: ModelShape
    context: int
    """Tokens of a row, chosen and rejected alike: TRL pads, and without padding transformers
    leaves the mask out, so that SDPA's flash and cuDNN kernels run."""
    answer: int
    """Tokens of each answer."""
    dtype: Dtype
    reference: str
    """online = scored in every step, cached = scored once before training, which is not timed."""
    warmup: int
    repeats: int
    folder: str
    """Where the inputs are."""

    @property
    def name(self) -> str:
        return f"{self.shape_name}-{self.context}-{self.reference}"

    @property
    def num_steps(self) -> int:
        return self.warmup + self.repeats

    @property
    def rows_path(self) -> Path:
        return Path(self.folder) / f"rows-{self.shape_name}-{self.context}.jsonl"

    @property
    def model_folder(self) -> Path:
        return Path(self.folder) / f"model-{self.shape_name}"

    def rows(self) -> list[PreferenceRow]:
        """Returns a pair for each step."""
        shape = PairShape(
            context=self.context,
            turns=1,
            answer=self.answer,
            equal_answers=True,
            question=max(1, self.answer // 8),
            chunk=1,
        )
        return [
            random_pair(shape, vocabulary=self.shape.vocabulary, seed=seed)
            for seed in range(self.num_steps)
        ]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Case:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**fields, "shape": ModelShape(**fields["shape"])})

    def write_inputs(self) -> None:
        """Writes rows, and random weights as a Hugging Face folder, if they do not exist."""
        if not self.rows_path.exists():
            write_rows_jsonl(self.rows_path, self.rows())
        if self.model_folder.exists():
            return
        partial = self.model_folder.with_suffix(".partial")
        self.shape.write_config(partial, max_positions=POSITIONS)
        torch.manual_seed(0)
        with torch.device(device()):
            model = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(partial), dtype=DTYPES[self.dtype]
            )
        model.save_pretrained(partial)
        partial.rename(self.model_folder)
        del model
        free_memory()


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Numbers(NamedTuple):
    """What a step computed; the two sides are compared by it."""

    loss: float
    chosen_logps: float
    """Log-probability of the chosen answer under the policy, in nats."""
    rejected_logps: float


class StepClock:
    """Times steps from the end of the one before, so that reading data and logging count."""

    def __init__(self, case: Case, *, best: float | None = None) -> None:
        self.case = case
        self.best = best
        self.seconds: list[float] = []
        """All steps, those of the warm-up too."""
        self.peaks_gib: list[float] = []

    @property
    def counted(self) -> list[float]:
        return self.seconds[self.case.warmup :]

    def start(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._started = time.perf_counter()

    def step_done(self) -> bool:
        """Records the time; returns whether no further step is worth its time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.peaks_gib.append(torch.cuda.max_memory_allocated() / 2**30)
        self.seconds.append(time.perf_counter() - self._started)
        self.start()
        return self._is_slow or len(self.seconds) >= self.case.num_steps

    @property
    def _is_slow(self) -> bool:
        if self.best is None or len(self.counted) < 2:
            return False
        return min(self.counted) > SLOWER * self.best


@dataclass(kw_only=True, slots=True)
class Trial:
    """One way of doing a case's steps."""

    settings: dict[str, Any]
    step_s: list[float] = field(default_factory=list)
    """Counted steps."""
    warmup_s: list[float] = field(default_factory=list)
    peak_memory_gib: float | None = None
    """Of the counted steps; None without a GPU."""
    numbers: list[Numbers] = field(default_factory=list)
    """Of every step."""
    failure: str | None = None

    @property
    def median_s(self) -> float | None:
        return statistics.median(self.step_s) if self.step_s and not self.failure else None


class Trials:
    """Runs the ways of one side, and saves its results after each of them.

    Goes on from what another process has left at `path`.
    """

    def __init__(self, case: Case, path: Path) -> None:
        self.case = case
        self.path = path
        self.trials: list[Trial] = []
        if path.exists():
            self.trials = [
                Trial(**{name: value for name, value in trial.items() if name != "median_s"})
                for trial in json.loads(path.read_text(encoding="utf-8"))["trials"]
            ]

    @property
    def best(self) -> Trial | None:
        done = [trial for trial in self.trials if trial.median_s is not None]
        return min(done, key=lambda trial: trial.median_s or 0.0, default=None)

    def run(self, settings: dict[str, Any], train: Callable[[StepClock], list[Numbers]]) -> None:
        """Runs one way; a fault of it, such as out of memory, ends only this way."""
        print(f"--- {self.case.name}: {settings}", flush=True)
        clock = StepClock(self.case, best=self.best.median_s if self.best else None)
        trial = Trial(settings=settings)
        try:
            trial.numbers = train(clock)
            trial.warmup_s = clock.seconds[: self.case.warmup]
            trial.step_s = clock.counted
            trial.peak_memory_gib = max(clock.peaks_gib[self.case.warmup :], default=None)
        except torch.OutOfMemoryError:
            trial.failure = "out of memory"
        except Exception as error:
            traceback.print_exc()
            trial.failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        free_memory()
        self.trials.append(trial)
        self._write()

    def _write(self) -> None:
        result = {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "versions": _versions(),
            "trials": [{**asdict(trial), "median_s": trial.median_s} for trial in self.trials],
        }
        write_whole(self.path, json.dumps(result))


def _versions() -> dict[str, str]:
    versions = {}
    for package in MEASURED:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
