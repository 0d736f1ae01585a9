"""The order in which pairs are trained on; its position can be saved and restored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_longpo.errors import UserError


@dataclass(kw_only=True, slots=True)
class SamplerState:
    """The position of training in the data."""

    epoch: int = 0
    offset: int = 0
    """Pairs of this epoch that were consumed."""
    consumed_pairs: int = 0


class PairSampler:
    """Yields global batches of pair indices; the same on every rank, whatever the layout.

    Each epoch is a new permutation drawn from (seed, epoch). The last, incomplete global batch of
    an epoch is dropped.
    """

    def __init__(
        self,
        num_pairs: int,
        *,
        global_batch_pairs: int,
        shuffle: bool,
        seed: int,
        fingerprint: str = "",
    ) -> None:
        """`fingerprint` tells apart data sets with equal numbers of pairs."""
        if num_pairs < global_batch_pairs:
            raise UserError(
                f"train.global_batch_pairs ({global_batch_pairs}): data.path has only {num_pairs} "
                f"usable pairs, so no step would be complete; use at most {num_pairs}"
            )
        self.num_pairs = num_pairs
        self.global_batch_pairs = global_batch_pairs
        self.shuffle = shuffle
        self.seed = seed
        self.fingerprint = fingerprint
        self.state = SamplerState()

    @property
    def steps_per_epoch(self) -> int:
        return self.num_pairs // self.global_batch_pairs

    @property
    def dropped_pairs_per_epoch(self) -> int:
        return self.num_pairs % self.global_batch_pairs

    def steps_left(self, epochs: int) -> int:
        """Returns the number of global batches from this position to the end of `epochs` epochs."""
        if self.state.epoch >= epochs:
            return 0
        in_this_epoch = (self.num_pairs - self.state.offset) // self.global_batch_pairs
        return in_this_epoch + (epochs - self.state.epoch - 1) * self.steps_per_epoch

    def next_batch(self) -> list[int]:
        """Returns the next global batch's pair indices and moves the position past it."""
        batch = self.upcoming_batch()
        self.state.epoch, offset = self._upcoming()
        self.state.offset = offset + self.global_batch_pairs
        self.state.consumed_pairs += self.global_batch_pairs
        return batch

    def upcoming_batch(self) -> list[int]:
        """Returns what `next_batch` will return, without moving the position."""
        epoch, offset = self._upcoming()
        batch = self._order(epoch)[offset : offset + self.global_batch_pairs]
        return [int(index) for index in batch]

    def _upcoming(self) -> tuple[int, int]:
        """Returns epoch and offset at which the next batch begins."""
        epoch, offset = self.state.epoch, self.state.offset
        if offset + self.global_batch_pairs > self.num_pairs:
            return epoch + 1, 0
        return epoch, offset

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_pairs)
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_pairs)

    def state_dict(self) -> dict[str, int | bool | str]:
        """Returns the position, with the values that must agree for it to mean the same pairs."""
        return {
            "epoch": self.state.epoch,
            "offset": self.state.offset,
            "consumed_pairs": self.state.consumed_pairs,
            "num_pairs": self.num_pairs,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: dict[str, int | bool | str]) -> None:
        """Restores a saved position.

        Raises:
            UserError: if the data or its order changed since the position was saved.
        """
        keys = {
            "num_pairs": "data.path (usable pairs)",
            "shuffle": "data.shuffle",
            "seed": "data.seed",
            "fingerprint": "data.path (fingerprint of its rows)",
        }
        for key, setting in keys.items():
            if state[key] != getattr(self, key):
                raise UserError(
                    f"{setting} is {getattr(self, key)}, but the checkpoint was saved with "
                    f"{state[key]}, so its data position means other pairs; restore the old value, "
                    "or start a new run with checkpoint.resume=never in an empty logging.dir"
                )
        self.state = SamplerState(
            epoch=int(state["epoch"]),
            offset=int(state["offset"]),
            consumed_pairs=int(state["consumed_pairs"]),
        )
