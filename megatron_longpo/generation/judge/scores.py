"""The scores of an unfinished judge run, a line an example, appended as they come."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from megatron_longpo.data.jsonl import JsonlFile, disk_errors, dump_line
from megatron_longpo.errors import UserError
from megatron_longpo.generation.shards.files import KEPT
from megatron_longpo.generation.shards.locks import hold


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnScores:
    """The judge's scores of a turn; None if a reply could not be read."""

    support: int | None
    """How far the chunk supports the chosen answer, 1 to 5."""
    better: float | None
    """How often chosen beat rejected over both orders: 1, 0.75 (once, and once neither) ... 0."""


class ScoreFile:
    """The file `output.scores`; `scores` also has an earlier run's, by the example's index."""

    def __init__(self, output: Path, fingerprint: str) -> None:
        """Reads an earlier run's scores; an unfinished last line is removed.

        Raises:
            UserError: the scores have another fingerprint, or a line is damaged.
        """
        self.path = output.with_name(output.name + ".scores")
        self._fingerprint = fingerprint
        self.scores: dict[int, list[TurnScores]] = {}
        if self.path.exists():
            self._read()

    @classmethod
    @contextmanager
    def opened(cls, output: Path, fingerprint: str, *, overwrite: bool) -> Iterator[Self]:
        """Opens the file; no other process writes it until the block ends.

        Args:
            output: the examples file that it belongs to.
            fingerprint: of the examples and the settings.
            overwrite: begin anew.
        """
        lock = output.with_name(output.name + ".lock")
        with hold(lock, what=str(output)):
            try:
                if overwrite:
                    output.with_name(output.name + ".scores").unlink(missing_ok=True)
                yield cls(output, fingerprint)
            finally:
                lock.unlink(missing_ok=True)  # while it is held, so that nobody else's goes

    def append(self, index: int, scores: Sequence[TurnScores]) -> None:
        """Adds the scores of an example's turns."""
        line = {
            "settings": self._fingerprint,
            "example": index,
            "turns": [dataclasses.asdict(score) for score in scores],
        }
        with disk_errors(self.path, advice=KEPT):
            size = self.path.stat().st_size if self.path.exists() else 0
            try:
                with open(self.path, "ab") as file:
                    file.write(dump_line(line).encode("utf-8"))
            except OSError:
                # A line may be half written, as on a full disk.
                os.truncate(self.path, size)
                raise
        self.scores[index] = list(scores)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def _read(self) -> None:
        data = self.path.read_bytes()
        complete = data.rfind(b"\n") + 1
        if complete < len(data):
            os.truncate(self.path, complete)
        lines = JsonlFile(self.path)
        for index, line in enumerate(lines):
            if line.get("settings") != self._fingerprint:
                raise UserError(
                    f"{lines.where(index)}: was scored with another model, examples or settings; "
                    "give --overwrite to begin anew or choose another output"
                )
            try:
                self.scores[int(line["example"])] = [TurnScores(**turn) for turn in line["turns"]]
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{lines.where(index)}: is damaged ({error}); remove the line, and its example "
                    "is judged again"
                ) from error
