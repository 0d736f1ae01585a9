"""The `longpo` command: what it lists, how it parses, and its exit codes."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_longpo import __version__, cli
from megatron_longpo.cli import COMMANDS, Command, find_command, main
from megatron_longpo.config.help import config_text
from megatron_longpo.config.parser import load_config, unchecked_values
from megatron_longpo.errors import CheckFailed, StopRequested, UserError
from megatron_longpo.runtime.launch import LAUNCH_HELP, Launch, take_launch

ROOT = Path(__file__).parents[1]
TRAIN = ["--model.hf_path=m", "--data.path=d", "--logging.dir=l"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PlainConfig:
    """Settings of a command made up here."""

    source: str
    """Where from."""
    paths: tuple[str, ...] = ()
    """What else."""
    overwrite: bool = False
    """Replace what is there."""
    size: int = 3
    """How large."""


def error_line(captured: Any) -> str:
    """What a command wrote to stderr, which must be one line."""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err.strip()


@pytest.fixture
def train_with(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a function in place of run_training, and says what main returns with it."""

    def run(function: Any, *options: str) -> int:
        fake = types.ModuleType("megatron_longpo.training.loop")
        fake.run_training = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
        return main(["train", *TRAIN, *options])

    return run


# The table of commands


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_listed_command_exists(command: Command) -> None:
    for name in (command.config, command.run, command.resolve):
        if name is not None:
            module, _, attribute = name.partition(":")
            assert hasattr(importlib.import_module(module), attribute), name


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_has_examples_and_every_setting(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command.name.split(), "--help"]) == 0
    text = capsys.readouterr().out
    module, _, attribute = command.config.partition(":")
    config_class = getattr(importlib.import_module(module), attribute)
    assert f"usage: longpo {command.name} " in text
    assert all(example in text for example in command.examples)
    assert all((f"{option}\n" in text) == command.launches for option, _ in LAUNCH_HELP)
    for field in dataclasses.fields(config_class):
        assert f"--{field.name}" in text
    for name in command.positionals:
        assert name in {field.name for field in dataclasses.fields(config_class)}
        assert name.upper() in text


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_examples_parse(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("generate.yaml", "tokenize.yaml", "train.yaml", "evaluate.yaml"):
        (tmp_path / name).write_text("")
    module, _, attribute = command.config.partition(":")
    config_class = getattr(importlib.import_module(module), attribute)
    for example in command.examples:
        words = example.split()
        start = words.index("megatron_longpo" if words[0] == "torchrun" else "longpo") + 1
        found, arguments = find_command(words[start:])
        assert found is command
        _, arguments = take_launch(arguments)
        unchecked_values(
            config_class,
            [argument for argument in arguments if argument != "--print_config"],
            command=command.name,
            positionals=command.positionals,
        )


def test_help_of_every_command_is_quick_and_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from megatron_longpo.cli import COMMANDS, main\n"
        "assert main([]) == main(['--help']) == 0\n"
        "for command in COMMANDS:\n"
        "    assert main([*command.name.split(), '--help']) == 0\n"
        "    assert main([*command.name.split(), '--print_config']) == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'megatron', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert command.summary in done.stdout


def test_help_of_one_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    whole = capsys.readouterr().out
    assert "--help [SECTION]\n" in whole and "such as --help model." in whole
    for name, keys in (
        ("optimizer", {"optimizer.lr", "optimizer.eps"}),
        ("evaluation", {"evaluation.nll.length", "evaluation.retrieval.depths"}),
        ("evaluation.retrieval", {"evaluation.retrieval.depths"}),
        ("train.eval-interval", {"train.eval_interval"}),
    ):
        assert main(["train", "--help", name]) == 0
        text = capsys.readouterr().out
        assert text.strip() in whole
        shown = {line.strip()[2:] for line in text.splitlines() if line.startswith("  --")}
        assert keys <= shown
        assert all(key.startswith(name.replace("-", "_")) for key in shown)
    assert shown == {"train.eval_interval"}
    assert main(["generate", "--model", "m", "-h", "server"]) == 0
    assert capsys.readouterr().out.startswith("server: An OpenAI-compatible server")
    assert main(["train", "--help", "--config", "absent.yaml"]) == 0
    assert capsys.readouterr().out == whole


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (
            "optimzer",
            "longpo train has no such section or key. The nearest is optimizer",
        ),
        ("lr", "Did you mean optimizer.lr?"),
        ("micro_batch_size", "Megatron-LM's micro_batch_size is data.pack_tokens here"),
    ],
)
def test_help_of_an_unknown_section(
    section: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--help", section]) == 2
    assert expected in error_line(capsys.readouterr())


def test_readme_names_only_commands_that_exist() -> None:
    for page in ("README.md", "docs/settings.md", "docs/megatron_flags.md"):
        for line in (ROOT / page).read_text().splitlines():
            for code in line.split("`")[1::2] if "`" in line else [line.strip()]:
                words = code.split()
                if words[:1] == ["longpo"] and words[1:] and words[1] != "COMMAND":
                    find_command(words[1:])


# Parsing


@pytest.mark.parametrize("kernel", ["cudnn+te", "te", "varlen"])
def test_evaluate_takes_the_kernels_of_train(kernel: str) -> None:
    config_class = importlib.import_module("megatron_longpo.config.evaluate").EvaluateConfig
    config = load_config(
        config_class,
        ["m", f"--attention_kernel={kernel}"],
        command="evaluate",
        positionals=("models",),
    )
    assert config.attention_kernel == kernel


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"longpo {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["tran"], "tran: no such command. The nearest is train"),
        (["zzz"], "zzz: no such command. There are generate, judge, tokenize"),
        (["convert"], "convert needs a second word. Use convert export or convert import"),
        (["convert", "check"], "convert needs a second word"),
        (["convert", "verify"], "source is missing"),
        (["train", "--parallel.tensr", "2"], "The nearest is parallel.tensor"),
        (["train", "--nproc", "none"], "--nproc (none) must be an integer, at least 1"),
        (["train", "--nproc"], "--nproc () must be an integer, at least 1"),
        (["convert", "import", "a"], "destination is missing"),
        (["convert", "import", "a", "b", "c"], "c: one argument too many"),
        (["report"], "runs is missing"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    line = error_line(capsys.readouterr())
    assert line.startswith("longpo: ")
    assert expected in line


def test_positionals_lists_and_bare_switches() -> None:
    config = load_config(
        PlainConfig,
        ["--overwrite", "here", "b c", "d, e", "--size", "4"],
        command="plain",
        positionals=("source", "paths"),
    )
    assert config == PlainConfig(source="here", paths=("b c", "d, e"), overwrite=True, size=4)


def test_a_positional_may_be_named_and_a_dash_may_follow_two_dashes() -> None:
    config = load_config(
        PlainConfig,
        ["--source=a", "--", "-b"],
        command="plain",
        positionals=("paths",),
    )
    assert config == PlainConfig(source="a", paths=("-b",))


def test_print_config_reads_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", *TRAIN, "--print_config", "--train.steps", "7"]) == 0
    text = capsys.readouterr().out
    values = yaml.safe_load(text)
    assert values["train"]["steps"] == 7
    assert values["lora"] is None
    assert "# Highest learning rate. [a number, at least 0; default 5e-7]\n  lr: 5.0e-07" in text
    path = tmp_path / "train.yaml"
    path.write_text(text)
    config_class = importlib.import_module("megatron_longpo.config.train").TrainConfig
    config = load_config(config_class, ["--config", str(path)], command="train")
    assert config == load_config(config_class, [*TRAIN, "--train.steps=7"], command="train")
    assert config_text(config_class, dataclasses.asdict(config)) == text.rstrip("\n")


def test_nproc_is_taken_out() -> None:
    four = Launch(num_processes=4)
    assert take_launch(["--a", "1", "--nproc", "4", "--b"]) == (four, ["--a", "1", "--b"])
    assert take_launch(["--nproc=4"]) == (four, [])
    nodes = ["--nproc", "4", "--nnodes", "2", "--rdzv_endpoint", "node1:29500", "--rdzv_id", "7"]
    launch = Launch(num_processes=4, num_nodes=2, rdzv_endpoint="node1:29500", rdzv_id="7")
    assert take_launch(nodes) == (launch, [])
    with pytest.raises(UserError, match=r"--nnodes \(2\) needs --rdzv_endpoint HOST:PORT"):
        take_launch(["--nproc", "4", "--nnodes", "2"])
    assert take_launch(["--a"]) == (None, ["--a"])


def test_nproc_inside_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="a launcher has started this process already"):
        take_launch(["--nproc=4"])


@pytest.mark.parametrize("command", ["train", "reference"])
def test_nproc_is_checked_against_the_settings_before_anything_starts(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[Any] = []

    def run_torchrun(launch: Launch, command: str, arguments: list[str]) -> int:
        started.append((launch, command, arguments))
        return 75

    monkeypatch.setattr(cli, "run_torchrun", run_torchrun)
    assert main([command, *TRAIN, "--nproc", "9"]) == 2
    assert "global_batch_pairs (8) must be at least" in error_line(capsys.readouterr())
    assert not started
    assert main([command, "--nproc", "2", *TRAIN]) == 75
    assert started == [(Launch(num_processes=2), command, TRAIN)]


# Exit codes


def test_the_function_gets_resolved_settings(train_with: Any) -> None:
    seen = []
    assert train_with(seen.append, "--objective.name=dpo") == 0
    assert seen[0].objective.beta == 0.1
    assert seen[0].checkpoint.dir == "l/checkpoints"


def test_the_reference_command_takes_the_settings_of_train(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []
    fake = types.ModuleType("megatron_longpo.reference.run")
    fake.run_reference = seen.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    assert main(["reference", *TRAIN, "--reference.mode=online", "--reference.offload"]) == 0
    (reference,) = (config.reference for config in seen)
    assert (reference.mode, reference.cache_path) == ("cached", "l/reference_logps")
    assert main(["reference", *TRAIN, "--objective.name=sft"]) == 2
    assert "reference.mode (cached): sft uses no reference" in error_line(capsys.readouterr())
    assert main(["reference", *TRAIN, "--objective.name=opsdl"]) == 2
    assert "compares whole next-token distributions" in error_line(capsys.readouterr())


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (CheckFailed("b is 2\ninstead of 1"), 1, "longpo: b is 2 instead of 1"),
        (UserError("two\nlines"), 2, "longpo: two lines"),
        (StopRequested("saved step 4"), 75, "longpo: saved step 4"),
        (KeyboardInterrupt(), 130, "longpo: interrupted"),
    ],
)
def test_exit_codes(
    train_with: Any,
    error: BaseException,
    code: int,
    line: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(config: Any) -> None:
        raise error

    assert train_with(fail) == code
    assert error_line(capsys.readouterr()) == line


def test_a_fault_is_not_hidden(train_with: Any) -> None:
    def fail(config: Any) -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        train_with(fail)


def test_the_first_rank_speaks_first(
    train_with: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)

    def fail(config: Any) -> None:
        raise UserError("wrong everywhere")

    monkeypatch.setenv("RANK", "0")
    assert train_with(fail) == 2
    assert not waited
    monkeypatch.setenv("RANK", "1")
    assert train_with(fail) == 2
    assert waited == [2]
    assert capsys.readouterr().err.count("wrong everywhere") == 2


def test_a_reader_that_leaves_is_no_fault() -> None:
    command = f"{sys.executable} -u -m megatron_longpo train --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "0\n"
    assert done.stderr == ""
