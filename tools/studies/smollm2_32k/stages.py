"""How each part of the study is made, by our own commands; what is there is not made again."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_longpo.data.jsonl import write_whole
from megatron_longpo.errors import UserError
from tools.studies.smollm2_32k.commands import Commands, OutOfTime, longpo, options
from tools.studies.smollm2_32k.pairs import choose_pairs, digest_in, restore_pairs, unpack
from tools.studies.smollm2_32k.plan import ITERATIONS, Run, Scale
from tools.studies.smollm2_32k.results import (
    RECIPE,
    read_result,
    read_results,
    result_path,
    settings_of,
    write_result,
)

HELD_OUT = ("git-doc", "r-doc", "debian-policy", "developers-reference")
LEAST_GENERATION_SECONDS = 60
"""Generation goes on where it was stopped, so it is begun with as little as this."""
TRAINED = "trained.json"
"""In a run's folder when its training has ended."""
START_SECONDS, SAVE_SECONDS, EVALUATE_SECONDS = 30, 10, 45
"""Predictions for one H100, until there are results from the device."""


class Study:
    """Where everything is, and how each part is made."""

    def __init__(
        self,
        *,
        scale: Scale,
        runs: Sequence[Run],
        output: Path,
        results: Path,
        model: Path | None,
        shards: int,
        minutes: float | None,
        jobs: int,
        gpus: Sequence[str] = (),
    ) -> None:
        self.scale = scale
        self.output = output.resolve()
        self.results = results.resolve()
        self.shards = shards
        self.jobs = jobs
        """Runs at a time on a GPU."""
        self.model = (self.output / "model") if model is None else model.resolve()
        self.keep = self.output / "keep"
        self.runs = runs
        self.parent = next(run for run in runs if run.is_parent)
        self.commands = Commands(self.output / "logs", minutes=minutes, gpus=gpus)
        self.device = device_name()

    # ---------------------------------------------------------------- data

    @property
    def documents(self) -> Path:
        return self.keep / ("documents" if self.scale.is_tiny else "documents.jsonl.gz")

    @property
    def held_out(self) -> Path:
        return self.keep / ("held_out" if self.scale.is_tiny else "held_out.jsonl.gz")

    @property
    def first_model(self) -> Path:
        """What the second iteration starts from."""
        return self.exported(self.parent)

    def exported(self, run: Run) -> Path:
        """Where a run's model is in Hugging Face's format, if it is kept."""
        return self._made_by(run) / f"{run.name}-hf"

    def _made_of(self, iteration: int) -> Path:
        """Where everything is that was made of an iteration's pairs, and of no others."""
        return self.output / f"of-pairs-{self.digest(iteration)}"

    def _made_by(self, run: Run) -> Path:
        """Within that, or without pairs for the base, what was made by settings as they are."""
        above = self.output if run.method is None else self._made_of(run.iteration)
        return above / f"by-{settings_of(run)}"

    def digest(self, iteration: int) -> str | None:
        """Of the pairs that are there; None where another model has written them."""
        if not self._pairs(iteration).exists():
            return None
        return digest_in(self.keep, iteration, writer=self._writer(iteration))

    def _writer(self, iteration: int) -> str | None:
        return self.parent.name if iteration > 1 else None

    def make_model(self) -> None:
        if (self.model / "config.json").exists():
            return
        if self.scale.is_tiny:
            command = ["tools/tiny_models.py", "llama", self.model, "--max_positions", 2048]
        else:
            command = ["tools/smollm2.py", self.model, "--dtype", "bf16"]
        self.commands.python("model", *command)

    def make_documents(self) -> None:
        if self.documents.exists() and self.held_out.exists():
            return
        if self.scale.is_tiny:
            tool = "tools/standard_library.py"
            self.commands.python("documents", tool, self.documents, "--number", 6)
            sizes = ("--min-chars", 13001, "--max-chars", 16000)
            self.commands.python("held_out", tool, self.held_out, *sizes)
            return
        least, most = self.scale.document_tokens
        self.commands.python(
            "documents",
            *("-m", "tools.long_documents", self.keep, "--tokenizer", self.model),
            *("--min-tokens", least, "--max-tokens", most, "--join", "--max-mb", 30),
            *("--held-out", *HELD_OUT),
        )

    def take_our_pairs(self) -> None:
        """Puts the pairs that the results are of back into their documents.

        Raises:
            UserError: where these are not the same documents, or there are other pairs.
        """
        for iteration in ITERATIONS:
            pairs = self._pairs(iteration)
            ours = digest_in(self.results, iteration, writer=self._writer(iteration))
            if ours is None and iteration > 1:
                continue
            if not pairs.exists():
                restore_pairs(self.results, pairs, self.documents)
            elif self.digest(iteration) != ours:
                raise UserError(
                    f"--our-pairs: {pairs} has others than the results are of. Choose another "
                    "--output, or leave --our-pairs out"
                )

    def make_pairs(self, iteration: int) -> Path:
        """Generates and chooses; returns where the pairs are."""
        pairs = self._pairs(iteration)
        if self.digest(iteration) is not None:
            return pairs
        parent = self.digest(iteration - 1) if iteration > 1 else None
        writer = self._writer(iteration)
        by_writer = "" if writer is None else f"-by-{writer}-of-{parent}"
        examples = self.keep / f"examples-{iteration}{by_writer}.jsonl"
        if not examples.exists():
            self.require(LEAST_GENERATION_SECONDS, f"pairs-{iteration}")
            self._generate(iteration, examples)
        described = choose_pairs(
            examples,
            pairs,
            number=self.scale.num_pairs,
            keep_all=self.scale.is_tiny,
            seed=iteration,
            documents=None if self.scale.is_tiny else self.documents,
            parent=parent,
            writer=writer,
        )
        print(f"{pairs}: {described['pairs']} rows, {described['turns']} turns", flush=True)
        examples.unlink()
        return pairs

    def _pairs(self, iteration: int) -> Path:
        return self.keep / f"pairs-{iteration}.jsonl.gz"

    def _generate(self, iteration: int, examples: Path) -> None:
        least, most = self.scale.document_tokens
        values: dict[str, Any] = {
            "model": self.model,
            "documents": self.documents,
            "output": examples,
            "min_document_tokens": least,
            "max_document_tokens": most,
            "seed": iteration,
            "num_threads": 1 if self.shards > 1 else None,
            **self.scale.generate,
        }
        if iteration > 1:
            values |= {"model": self.first_model, **self.scale.generate_next}
        arguments = ["generate", "--config", RECIPE / "generate.yaml", *options(values)]
        self.commands.together(
            {
                f"generate-{iteration}-{shard}": longpo(
                    *arguments, "--shard", f"{shard}/{self.shards}"
                )
                for shard in range(self.shards)
            }
        )

    def make_rows(self, iteration: int) -> Path:
        pairs = self.make_pairs(iteration)
        rows = self._made_of(iteration) / "rows.jsonl"
        if rows.exists():
            return rows
        rows.parent.mkdir(parents=True, exist_ok=True)
        examples = rows.with_name("pairs.jsonl")
        unpack(pairs, examples)
        values = {
            "examples": examples,
            "output": rows,
            "tokenizer": self.model,
            **self.scale.tokenize,
        }
        self.commands.longpo(f"tokenize-{iteration}", "tokenize", *options(values))
        examples.unlink()
        return rows

    # ---------------------------------------------------------------- runs

    def _folder(self, run: Run) -> Path:
        return self._made_by(run) / "runs" / run.name

    def is_done(self, run: Run) -> bool:
        """Whether its result is there, by these settings and of the pairs that are there: others
        are another study's."""
        path = result_path(self.results, run)
        if not path.exists():
            return False
        result = read_result(path)
        if not result.is_by_settings_of(run):
            return False
        digest = self.digest(run.iteration)
        return run.method is None or (digest is not None and result.pairs == digest)

    def do(self, run: Run) -> None:
        """Makes the result of a run; its rows are there.

        Raises:
            OutOfTime: where the time left is not enough for all of it, or was not.
            CommandFailed: where a part of it failed.
        """
        folder = self._folder(run)
        seconds: dict[str, float] = {}
        self.require(self.predicted_seconds(run), run.name)
        if run.method is not None:
            seconds["train"] = self.train(run, folder, self.make_rows(run.iteration))
        evaluated = folder / "evaluated" if run.is_evaluated else None
        if evaluated is not None:
            started = time.monotonic()
            self.evaluate(run, folder, evaluated)
            seconds["evaluate"] = time.monotonic() - started
        write_result(
            result_path(self.results, run),
            run,
            seconds=seconds,
            evaluation_file=None if evaluated is None else evaluated / "evaluation.json",
            metrics_file=None if run.method is None else folder / "metrics.jsonl",
            device=self.device,
            pairs=None if run.method is None else self.digest(run.iteration),
        )
        # Gigabytes; a model that is needed has been exported.
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    def make_first_model(self) -> None:
        """The model of the first iteration, trained again where it has not outlived a machine."""
        if self.first_model.exists():
            return
        self.require(self._predicted_training(self.parent), self.parent.name)
        self.train(self.parent, self._folder(self.parent), self.make_rows(1))

    def train(self, run: Run, folder: Path, rows: Path) -> float:
        """Trains, if that has not been done here; returns the seconds it took."""
        done = folder / TRAINED
        if not self._must_train(run):
            return float(json.loads(done.read_text())["seconds"])
        assert run.method is not None
        values: dict[str, Any] = {
            "model.hf_path": self.model if run.iteration == 1 else self.first_model,
            "data.path": rows,
            "logging.dir": folder,
            "train.seed": run.seed,
            "data.seed": run.seed,
            "train.steps": self.scale.steps,
            "evaluation.retrieval.haystack": self.held_out,
            "evaluation.nll.documents": self.held_out,
            **self.scale.train,
            **run.method.options,
            **run.options,
        }
        if not run.is_evaluated:
            values |= {"train.eval_interval": 0, "train.eval_at_start": False}
        started = time.monotonic()
        config = ("--config", RECIPE / "train.yaml")
        self.commands.longpo(f"train-{run.name}", "train", *config, *options(values))
        taken = time.monotonic() - started
        if run.is_exported and not self.exported(run).exists():
            self.commands.longpo(
                *(f"export-{run.name}", "convert", "export"),
                *(folder / "checkpoints", self.exported(run)),
            )
        write_whole(done, json.dumps({"seconds": round(taken, 1)}) + "\n")
        return taken

    def _must_train(self, run: Run) -> bool:
        """Also where it was done and its checkpoint, which went with its result, is needed."""
        lacks_export = run.is_exported and not self.exported(run).exists()
        made = (self._folder(run) / name for name in (TRAINED, "checkpoints"))
        return lacks_export or not all(path.exists() for path in made)

    def evaluate(self, run: Run, folder: Path, evaluated: Path) -> None:
        values: dict[str, Any] = {
            "output": evaluated,
            "base": self.model,
            "evaluation.retrieval.haystack": self.held_out,
            "evaluation.nll.documents": self.held_out,
            **self.scale.evaluate,
        }
        if run.theta is not None:
            values["rope_theta"] = run.theta
        target = self.model if run.method is None else folder / "checkpoints"
        config = ("--config", RECIPE / "evaluate.yaml")
        self.commands.longpo(f"evaluate-{run.name}", "evaluate", target, *config, *options(values))

    # ---------------------------------------------------------------- time

    def require(self, seconds: float, what: str) -> None:
        """Ends the study for now where the time left is not enough.

        Raises:
            OutOfTime: then.
        """
        left = self.commands.seconds_left
        if seconds > left:
            print(f"{what}: about {seconds:.0f} s, {max(left, 0):.0f} s are left", flush=True)
            raise OutOfTime

    def predicted_seconds(self, run: Run) -> float:
        """Of what is missing of a run, from results of this device where there are some."""
        total = 0.0
        if run.method is not None and self._must_train(run):
            total += self._predicted_training(run)
        if run.is_evaluated:
            total += self._seconds(run, "evaluate") or EVALUATE_SECONDS
        return total

    def _predicted_training(self, run: Run) -> float:
        assert run.method is not None
        steps = int(run.options.get("train.steps", self.scale.steps))
        step_seconds = run.method.step_seconds * self.jobs
        predicted = START_SECONDS + steps * step_seconds + SAVE_SECONDS
        return self._seconds(run, "train") or predicted

    def _seconds(self, run: Run, part: str) -> float | None:
        """What that part took in other runs: of the same method, else of any."""
        found = [
            result
            for result in read_results(self.results)
            if result.device == self.device and part in result.seconds
        ]
        same = [result for result in found if result.group == run.group]
        if part == "train" and not same:
            return None
        return (
            statistics.median(result.seconds[part] for result in same or found) if found else None
        )


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
