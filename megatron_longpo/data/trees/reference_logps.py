"""The reference's log-probabilities of a data set's rows, computed once and looked up in training.

Letters: R rows, U turns of all these rows together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_longpo.config.names import RowName
from megatron_longpo.data.trees.forest import Term
from megatron_longpo.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceLogps:
    """Per-turn sums of the reference's log-probabilities over answer tokens.

    Rows are identified by their index in the data set, since ids need not be unique.
    """

    indices: np.ndarray
    """[R] int64, ascending."""
    ids: np.ndarray
    """[R] str; the row's id, to detect an index that means another row."""
    num_turns: np.ndarray
    """[R] int64."""
    sums: Mapping[RowName, np.ndarray]
    """[U] float64 in nats for each scored row of a pair: turn by turn, row by row."""
    source: str = ""
    """Where they are stored, for messages."""
    _starts: np.ndarray = field(init=False, repr=False)
    """[R] int64; index of a row's first turn among all turns."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "_starts", np.cumsum(self.num_turns) - self.num_turns)

    def __len__(self) -> int:
        return len(self.indices)

    def of(
        self, index: int, *, row_id: str, num_turns: int, where: str, rows: Sequence[RowName]
    ) -> dict[Term, np.ndarray]:
        """Returns the sums of one row, [num_turns] each.

        Args:
            index: the row's index in the data set.
            row_id: its id.
            num_turns: its number of turns.
            where: the row, for messages.
            rows: the rows of the pair whose sums are needed; all must have been scored.

        Raises:
            UserError: if the row is missing, or another row was scored at its index.
        """
        place = int(np.searchsorted(self.indices, index))
        if place == len(self) or self.indices[place] != index:
            raise UserError(
                f"{where}: is not among the {len(self)} rows in {self.source}; run longpo "
                "reference with these settings, which resumes where it stopped"
            )
        saved = (str(self.ids[place]), int(self.num_turns[place]))
        if saved != (row_id, num_turns):
            raise UserError(
                f"{where}: has the id {row_id!r} and {num_turns} turns, in {self.source} it has "
                f"{saved[0]!r} and {saved[1]}; remove that folder and run longpo reference again"
            )
        start = int(self._starts[place])
        return {Term.of_row(row): self.sums[row][start : start + num_turns] for row in rows}


def joined(parts: Sequence[ReferenceLogps], *, source: str) -> ReferenceLogps:
    """Joins parts in the order of the rows; if a row is in two parts, the first is kept."""
    assert parts, "no parts"
    indices = np.concatenate([part.indices for part in parts])
    num_turns = np.concatenate([part.num_turns for part in parts])
    _, order = np.unique(indices, return_index=True)
    starts = np.cumsum(num_turns) - num_turns
    turns = np.concatenate(
        [np.arange(starts[row], starts[row] + num_turns[row]) for row in order]
        or [np.empty(0, dtype=np.int64)]
    )
    return ReferenceLogps(
        indices=indices[order],
        ids=np.concatenate([part.ids for part in parts])[order],
        num_turns=num_turns[order],
        sums={
            row: np.concatenate([part.sums[row] for part in parts])[turns] for row in parts[0].sums
        },
        source=source,
    )
