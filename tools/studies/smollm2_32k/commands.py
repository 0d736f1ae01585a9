"""Runs commands: shown before, with a log each, ended in time."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
GRACE_SECONDS = 30
"""Between being told to stop, when commands save what they have, and being killed."""


class OutOfTime(Exception):
    """The time given to the study is over; the same command goes on."""


class CommandFailed(Exception):
    """A command ended with another exit code than 0; its log says why."""


class Commands:
    """Runs the commands of one study, one or several at a time.

    `gpus` are values of CUDA_VISIBLE_DEVICES; without any, commands see what this process does.
    """

    def __init__(self, logs: Path, *, minutes: float | None, gpus: Sequence[str] = ()) -> None:
        self._logs = logs
        self._gpus = gpus
        self._assigned = threading.local()
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def seconds_left(self) -> float:
        return float("inf") if self._deadline is None else self._deadline - time.monotonic()

    @contextmanager
    def on_gpu(self, gpu: str) -> Iterator[None]:
        """Within, this thread's commands see that GPU alone."""
        self._assigned.gpu = gpu
        try:
            yield
        finally:
            del self._assigned.gpu

    def longpo(self, name: str, *arguments: Any) -> None:
        self.together({name: longpo(*arguments)})

    def python(self, name: str, *arguments: Any) -> None:
        self.together({name: [sys.executable, *map(str, arguments)]})

    def together(self, commands: Mapping[str, Sequence[str]]) -> None:
        """Runs commands side by side, by the name of their log: in a thread that has a GPU on
        that one, else spread over all.

        Raises:
            OutOfTime: where the time was over before they had ended. They were told to stop.
            CommandFailed: where one ended with another exit code than 0.
        """
        if self.seconds_left <= 0:
            raise OutOfTime
        started = time.monotonic()
        self._logs.mkdir(parents=True, exist_ok=True)
        first = next(iter(commands.values()))
        print(f"$ {shown(first)}" + (f"   (and {len(commands) - 1} more)" * (len(commands) > 1)))
        sys.stdout.flush()
        processes = {
            name: self._start(name, command, number)
            for number, (name, command) in enumerate(commands.items())
        }
        in_time = _wait(processes.values(), self.seconds_left)
        if not in_time:
            for process in processes.values():
                process.send_signal(signal.SIGTERM)
            if not _wait(processes.values(), GRACE_SECONDS):
                for process in processes.values():
                    process.kill()
                _wait(processes.values(), GRACE_SECONDS)
        print(f"  {next(iter(commands))}: {time.monotonic() - started:.0f} s", flush=True)
        if not in_time:
            raise OutOfTime
        for name, process in processes.items():
            if process.returncode:
                lines = self.log_path(name).read_text("utf-8", "replace").splitlines()
                print("\n".join(f"  | {line[:300]}" for line in lines[-20:]), flush=True)
                raise CommandFailed(f"{name}: exit code {process.returncode}")

    def log_path(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def _start(self, name: str, command: Sequence[str], number: int) -> subprocess.Popen[bytes]:
        # Threads that wait by spinning slow everything down on a machine that does other work too.
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        path = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
        environment["PYTHONPATH"] = path
        spread = self._gpus[number % len(self._gpus)] if self._gpus else None
        if (gpu := getattr(self._assigned, "gpu", spread)) is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        with open(self.log_path(name), "ab") as log:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )


def longpo(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "megatron_longpo", *map(str, arguments)]


def shown(command: Sequence[str]) -> str:
    """A command as a user would type it."""
    if list(command[1:3]) == ["-m", "megatron_longpo"]:
        return shlex.join(["longpo", *command[3:]])
    return shlex.join(["python", *command[1:]])


def options(values: Mapping[str, Any]) -> list[str]:
    """`--key value` for each; lists and truth values as YAML."""
    found = []
    for key, value in values.items():
        is_plain = isinstance(value, (int, float, str, Path)) and not isinstance(value, bool)
        found += [f"--{key}", str(value) if is_plain else json.dumps(value)]
    return found


def _wait(processes: Iterable[subprocess.Popen[bytes]], seconds: float) -> bool:
    """Whether all have ended within the time."""
    end = time.monotonic() + max(seconds, 0)
    for process in processes:
        try:
            process.wait(None if end == float("inf") else max(end - time.monotonic(), 0.01))
        except subprocess.TimeoutExpired:
            return False
    return True
