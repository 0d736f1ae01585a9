"""The `longpo` command: one table of commands, each a config class and a function.

Both are imported when their command runs, so that `--help` and a mistake in the settings are
answered without loading torch.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_longpo import __version__
from megatron_longpo.config.help import config_text, help_text, section_text
from megatron_longpo.config.parser import load_config, unchecked_values
from megatron_longpo.errors import (
    EXIT_BAD_INPUT,
    EXIT_CHECK_FAILED,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_STOPPED_ON_REQUEST,
    CheckFailed,
    StopRequested,
    UserError,
    nearest,
)
from megatron_longpo.runtime import parent, stop
from megatron_longpo.runtime.gpu_memory import allow_expandable_segments
from megatron_longpo.runtime.launch import LAUNCH_HELP, run_torchrun, take_launch


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One command: its config class, its function, and what `--help` says of it."""

    name: str
    summary: str
    config: str
    """`module:Class` of the config."""
    run: str
    """`module:function` that takes the config."""
    examples: tuple[str, ...]
    positionals: tuple[str, ...] = ()
    """Settings that may be given by position, in this order."""
    resolve: str | None = None
    """`module:function` that checks the settings against each other and fills what depends on
    others, from config to config. It needs no torch."""
    takes_keywords: bool = False
    """Whether `run` takes each setting as an argument: runtime/ knows no config."""
    check_world: str = "megatron_longpo.config.train:check_world"
    """`module:function` that checks a config and a number of processes, if the command launches."""
    launches: bool = False
    """Whether it can run in many processes, which `--nproc` starts."""
    stops: bool = False
    """Whether it saves and ends when a signal tells it to stop."""


COMMANDS = (
    Command(
        name="generate",
        summary="Write preference examples about long documents, with the model's own answers.",
        config="megatron_longpo.config.generate:GenerateConfig",
        run="megatron_longpo.generation.generate:run_generate",
        resolve="megatron_longpo.config.generate:resolve_generate",
        examples=(
            "longpo generate --model models/hf --documents books --output examples.jsonl",
            "longpo generate --config generate.yaml --shard 0/8",
            "longpo generate --config generate.yaml --merge",
        ),
        stops=True,
    ),
    Command(
        name="judge",
        summary="Let a model score the answers of preference examples, and drop what scores low.",
        config="megatron_longpo.config.judge:JudgeConfig",
        run="megatron_longpo.generation.judge.run:run_judge",
        resolve="megatron_longpo.config.judge:resolve_judge",
        examples=(
            "longpo judge examples.jsonl --output judged.jsonl --model models/hf",
            "longpo judge examples.jsonl --output good.jsonl --model models/hf --least_support 4 "
            "--least_better 0.75",
            "longpo judge examples.jsonl --output judged.jsonl --model models/large "
            "--backend server --server.endpoints [http://localhost:8000/v1]",
        ),
        positionals=("examples",),
    ),
    Command(
        name="tokenize",
        summary="Turn preference examples into token rows for one model.",
        config="megatron_longpo.config.tokenize:TokenizeConfig",
        run="megatron_longpo.data.text.tokenize:run_tokenize",
        examples=(
            "longpo tokenize --examples examples.jsonl --output rows.jsonl --tokenizer models/hf",
            "longpo tokenize --config tokenize.yaml --overwrite",
        ),
    ),
    Command(
        name="inspect",
        summary="Show what is in a set of token rows or examples: text, labels, lengths, turns.",
        config="megatron_longpo.config.inspect:InspectConfig",
        run="megatron_longpo.data.inspect.run:run_inspect",
        examples=(
            "longpo inspect rows.jsonl",
            "longpo inspect rows.jsonl --tokenizer models/hf --row 3",
            "longpo inspect rows.jsonl --tokenizer models/hf --html rows.html",
            "longpo inspect examples.jsonl --html examples.html",
        ),
        positionals=("rows",),
    ),
    Command(
        name="train",
        summary="Train a model on token rows. Several processes start with --nproc, on several "
        "machines with --nnodes too; plain torchrun -m megatron_longpo train works as well.",
        config="megatron_longpo.config.train:TrainConfig",
        run="megatron_longpo.training.loop:run_training",
        resolve="megatron_longpo.config.train:resolve",
        examples=(
            "longpo train --config train.yaml",
            "longpo train --config train.yaml --optimizer.lr 1e-6 --train.steps 20",
            "longpo train --nproc 8 --config train.yaml",
            "torchrun --nnodes 2 --nproc-per-node 8 -m megatron_longpo train --config train.yaml",
        ),
        launches=True,
        stops=True,
    ),
    Command(
        name="reference",
        summary="Compute the reference's log-probabilities of all rows once, for training with "
        "reference.mode cached. Takes the settings and options of train. A stopped run is resumed.",
        config="megatron_longpo.config.train:TrainConfig",
        run="megatron_longpo.reference.run:run_reference",
        resolve="megatron_longpo.config.train:resolve_reference",
        examples=(
            "longpo reference --config train.yaml",
            "longpo reference --nproc 8 --config train.yaml --parallel.tensor 8",
            "torchrun --nproc-per-node 8 -m megatron_longpo reference --config train.yaml",
        ),
        launches=True,
        stops=True,
    ),
    Command(
        name="convert import",
        summary="Turn a Hugging Face model into a Megatron checkpoint.",
        config="megatron_longpo.config.convert:ImportConfig",
        run="checkpoints_convert.hf_to_megatron:run_import",
        examples=("longpo convert import models/hf models/megatron",),
        positionals=("source", "destination"),
    ),
    Command(
        name="convert export",
        summary="Turn a Megatron checkpoint into a Hugging Face folder.",
        config="megatron_longpo.config.convert:ExportConfig",
        run="checkpoints_convert.megatron_to_hf:run_export",
        examples=(
            "longpo convert export runs/a/checkpoints models/a-hf",
            "longpo convert export runs/lora/checkpoints models/a-adapter --lora adapter",
        ),
        positionals=("source", "destination"),
    ),
    Command(
        name="convert verify",
        summary="Test the converters on a Hugging Face model: import and export it, then compare "
        "weights, logits on real text, tokenizer and config.",
        config="megatron_longpo.config.convert:VerifyConfig",
        run="checkpoints_convert.verify:run_verify",
        examples=(
            "longpo convert verify models/hf",
            "longpo convert verify models/hf --text chapter.txt --json",
            "longpo convert verify models/hf --export models/a-hf",
            "longpo convert verify models/hf-70b --logits false --work_dir /scratch",
        ),
        positionals=("source",),
    ),
    Command(
        name="evaluate",
        summary="Measure a model: retrieval by length and depth, NLL of long documents by "
        "position, retention of a base model on short prompts, benchmarks. Or compare evaluations. "
        "Several processes start with --nproc.",
        config="megatron_longpo.config.evaluate:EvaluateConfig",
        run="megatron_longpo.evaluation.evaluate:run_evaluate",
        resolve="megatron_longpo.config.evaluate:resolve_evaluate",
        check_world="megatron_longpo.config.evaluate:check_evaluate_world",
        examples=(
            "longpo evaluate models/hf --output evaluated/base --config evaluate.yaml",
            "longpo evaluate runs/a/checkpoints --output evaluated/a --base models/hf "
            "--nproc 8 --parallel.context 8 --config evaluate.yaml",
            "longpo evaluate models/hf --suite ruler,mmlu --output evaluated/base",
            "longpo evaluate --compare evaluated/base evaluated/a runs/a --output comparison",
        ),
        positionals=("models",),
        launches=True,
    ),
    Command(
        name="report",
        summary="Plot and summarise what training runs logged.",
        config="megatron_longpo.config.report:ReportConfig",
        run="megatron_longpo.engine.report:run_report",
        examples=("longpo report runs/a", "longpo report runs/a runs/b --output comparison.png"),
        positionals=("runs",),
    ),
    Command(
        name="env",
        summary="Show versions, GPUs and which optional packages are missing.",
        config="megatron_longpo.config.env:EnvConfig",
        run="megatron_longpo.runtime.env:run_env",
        takes_keywords=True,
        examples=("longpo env", "longpo env --json"),
    ),
)


HELP_OPTIONS = frozenset(("-h", "--help"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. Errors that are not the user's propagate."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Megatron says so six times; `longpo env` says it once, with what it costs.
    warnings.filterwarnings("ignore", message=r".*Apex (is|are) not installed")
    try:
        return _dispatch(arguments)
    except UserError as error:
        _wait_for_first_rank()
        print(f"longpo: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except CheckFailed as error:
        print(f"longpo: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_CHECK_FAILED
    except StopRequested as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"longpo: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_STOPPED_ON_REQUEST
    except KeyboardInterrupt:
        print("longpo: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        if _launches(arguments) and "--help" not in arguments:
            raise  # it may be a connection that broke, which is a fault
        # The reader has left, as in `longpo env | head`: there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return EXIT_DONE
    if arguments[0] == "--version":
        print(f"longpo {__version__}")
        return EXIT_DONE
    command, rest = find_command(arguments)
    return run_command(command, rest)


def _launches(arguments: Sequence[str]) -> bool:
    return any([command.name] == list(arguments[:1]) for command in COMMANDS if command.launches)


def overview() -> str:
    """Returns the text of `longpo --help`: all commands, each with an example."""
    width = max(len(command.name) for command in COMMANDS)
    return "\n".join(
        [
            "usage: longpo COMMAND [--config X.yaml] [--key VALUE ...]",
            "",
            "commands:",
            *(f"  {command.name:{width}}  {command.summary}" for command in COMMANDS),
            "",
            "examples:",
            *(f"  {command.examples[0]}" for command in COMMANDS),
            "",
            "longpo COMMAND --help shows the settings and more examples of a command;",
            "longpo COMMAND --help SECTION shows one section: longpo train --help optimizer.",
        ]
    )


def find_command(arguments: Sequence[str]) -> tuple[Command, list[str]]:
    """Splits a command line into its command and the rest."""
    names = {command.name: command for command in COMMANDS}
    for length in (2, 1):
        name = " ".join(arguments[:length])
        if name in names:
            return names[name], list(arguments[length:])
    groups = sorted({name for name in names if name.startswith(arguments[0] + " ")})
    if groups:
        raise UserError(f"{arguments[0]} needs a second word. Use {' or '.join(groups)}")
    guess = nearest(arguments[0], names)
    hint = f"The nearest is {guess}" if guess else f"There are {', '.join(names)}"
    raise UserError(f"{arguments[0]}: no such command. {hint}")


def run_command(command: Command, arguments: list[str]) -> int:
    """Parses the settings of a command and runs it, in this process or in many processes."""
    if command.launches:
        # Ranks without a launcher would wait for each other, for up to an hour.
        parent.end_with_launcher()
    config_class = _load(command.config)
    if HELP_OPTIONS & set(arguments):
        print(_help(command, config_class, _asked_section(arguments)))
        return EXIT_DONE
    launch = None
    if command.launches:
        launch, arguments = take_launch(arguments)
    if "--print_config" in arguments:
        arguments = [argument for argument in arguments if argument != "--print_config"]
        values = unchecked_values(
            config_class, arguments, command=command.name, positionals=command.positionals
        )
        print(config_text(config_class, values))
        return EXIT_DONE
    config = load_config(
        config_class,
        arguments,
        command=command.name,
        positionals=command.positionals,
        resolve=None if command.resolve is None else _load(command.resolve),
    )
    if launch is None:
        if command.stops:
            # Before the imports, which take seconds in which a signal would end the process.
            stop.listen()
        if command.launches:
            allow_expandable_segments()
        run = _load(command.run)
        if command.takes_keywords:
            run(**asdict(config))
        else:
            run(config)
        return EXIT_DONE
    _load(command.check_world)(config, launch.num_processes * launch.num_nodes)
    return run_torchrun(launch, command.name, arguments)


def _asked_section(arguments: Sequence[str]) -> str | None:
    """Returns the word after `--help`, or None: then all sections are shown."""
    after = next(index for index, word in enumerate(arguments) if word in HELP_OPTIONS) + 1
    if after == len(arguments) or arguments[after].startswith("-"):
        return None
    return arguments[after]


def _help(command: Command, config_class: type, section: str | None) -> str:
    if section is not None:
        return section_text(config_class, section, command=command.name)
    return help_text(
        config_class,
        command=command.name,
        summary=command.summary,
        positionals=command.positionals,
        extra_options=LAUNCH_HELP if command.launches else (),
        examples=command.examples,
    )


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _wait_for_first_rank() -> None:
    # What is wrong with settings or data is wrong on every rank. The launcher ends the others
    # as soon as rank 0 has said so, and the user reads one line.
    if os.environ.get("RANK", "0") != "0":
        time.sleep(2)
