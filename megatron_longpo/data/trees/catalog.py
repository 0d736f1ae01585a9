"""Reads all rows once before training: checks every row and measures every pair."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from megatron_longpo.data.rows.dataset import RowDataset
from megatron_longpo.data.rows.fitting import fit_row
from megatron_longpo.data.rows.schema import PreferenceRow
from megatron_longpo.data.trees.packing import PairSize, pair_size
from megatron_longpo.data.trees.reference_logps import ReferenceLogps
from megatron_longpo.data.trees.tree import PairTrees, TreeConfig, answer_turns, pair_trees
from megatron_longpo.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class RowLimits:
    """The limits that a row must fit."""

    vocab_size: int
    max_length: int
    too_long: str
    max_reference_length: int | None
    """Positions of the reference; None if it has no limit or reads no short rows."""


class PairCatalog:
    """The usable pairs of a data set: sizes in memory, trees on demand."""

    def __init__(
        self,
        dataset: RowDataset,
        *,
        limits: RowLimits,
        tree_config: TreeConfig,
        reference_logps: ReferenceLogps | None = None,
        per_turn: bool = False,
        progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    ) -> None:
        """Reads every row once.

        Args:
            dataset: the rows.
            limits: what each row must fit.
            tree_config: which parts of a row go into its trees.
            reference_logps: sums of the reference, for trees without a reference.
            per_turn: whether the objective pairs chosen and rejected turn by turn.
            progress: wraps the iteration to show progress.

        Raises:
            UserError: for the first row that is malformed or does not fit, or if none is usable.
        """
        self.dataset = dataset
        self.limits = limits
        self.tree_config = tree_config
        self.reference_logps = reference_logps
        self.sizes: list[PairSize] = []
        self._indices: list[int] = []
        self._ahead: dict[int, PairTrees] = {}
        for index in progress(range(len(dataset))):
            row = self._fitted(index)
            if row is None:
                continue
            if tree_config.reads_short_rows:
                _check_short_rows(row)
            trees = self._trees(index, row)
            if tree_config.policy or tree_config.divergence is not None:
                _check_turns(row, tree_config, per_turn=per_turn)
            self.sizes.append(pair_size(trees))
            self._indices.append(index)
        if not self._indices:
            raise UserError(
                f"{dataset.name}: none of the {len(dataset)} rows is within data.max_length "
                f"({limits.max_length}); raise it, or use data.too_long=truncate_document"
            )

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def num_dropped(self) -> int:
        return len(self.dataset) - len(self)

    @property
    def largest_pair_tokens(self) -> int:
        return max(size.policy_tokens for size in self.sizes)

    def read_ahead(self, pairs: Sequence[int]) -> None:
        """Builds and keeps the trees of these pairs, and forgets all others."""
        self._ahead = {pair: self.trees(pair) for pair in pairs}

    def trees(self, pair: int) -> PairTrees:
        """Reads one usable pair and builds its trees."""
        if pair in self._ahead:
            return self._ahead[pair]
        index = self._indices[pair]
        row = self._fitted(index)
        assert row is not None, "a usable row cannot have become too long"
        return self._trees(index, row)

    def row_index(self, pair: int) -> int:
        """Returns the index in the data set of a usable pair."""
        return self._indices[pair]

    def pair_id(self, pair: int) -> str:
        return self.dataset[self._indices[pair]].id

    def check_budget(self, pack_tokens: int) -> None:
        """Raises `UserError` if a pair exceeds the microbatch budget, and names that pair."""
        for pair, size in enumerate(self.sizes):
            if size.policy_tokens > pack_tokens:
                raise UserError(
                    f"data.pack_tokens ({pack_tokens}): pair {self.trees(pair).id!r} "
                    f"({self.source(pair)}) has {size.policy_tokens} policy tokens; use at least "
                    f"{self.largest_pair_tokens}, or null for the largest pair"
                )

    def source(self, pair: int) -> str:
        return self.dataset[self._indices[pair]].source

    def sizes_of(self, pairs: Sequence[int]) -> list[PairSize]:
        return [self.sizes[pair] for pair in pairs]

    def _trees(self, index: int, row: PreferenceRow) -> PairTrees:
        trees = pair_trees(row, self.tree_config)
        if self.reference_logps is None:
            return trees
        sums = self.reference_logps.of(
            index,
            row_id=row.id,
            num_turns=trees.num_turns,
            where=row.source,
            rows=self.tree_config.reference,
        )
        return replace(trees, reference_logps=sums)

    def _fitted(self, index: int) -> PreferenceRow | None:
        limits = self.limits
        return fit_row(
            self.dataset[index],
            vocab_size=limits.vocab_size,
            max_length=limits.max_length,
            too_long=limits.too_long,
            max_reference_length=limits.max_reference_length,
        )


def _check_short_rows(row: PreferenceRow) -> None:
    if not row.reference_chosen:
        raise UserError(
            f"{row.source}: has no short rows (ref_chosen_*, ref_rejected_*), which this "
            "objective.name and reference.context read; use others, such as objective.name=dpo "
            "with reference.context=long, or make the rows of examples with chunks"
        )


def _check_turns(row: PreferenceRow, tree_config: TreeConfig, *, per_turn: bool) -> None:
    """Raises `UserError` if rows that are compared turn by turn have different numbers of turns.

    Without short rows, only objectives with `per_turn` need equal numbers.
    """
    counts = {
        "chosen": int(answer_turns(row.chosen).max()) + 1,
        "rejected": int(answer_turns(row.rejected).max()) + 1,
    }
    if tree_config.reads_short_rows:
        counts["reference"] = len(row.reference_chosen)
    elif not per_turn:
        return
    if len(set(counts.values())) == 1:
        return
    found = ", ".join(f"{name} {count}" for name, count in counts.items())
    needed = "the short reference rows answer" if "reference" in counts else "per_turn pairs"
    raise UserError(
        f"{row.source}: answers of the row: {found}; {needed} one by one, so there must be as many "
        "of each; mend the row or remove it"
    )
