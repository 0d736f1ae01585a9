"""The order of pairs is reproducible, complete and can be taken up anywhere."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_longpo.data.trees.sampler import PairSampler
from megatron_longpo.errors import UserError

quick = settings(max_examples=60, deadline=None, derandomize=True)


def make(
    num_pairs: int = 10, batch: int = 3, *, shuffle: bool = True, seed: int = 5
) -> PairSampler:
    return PairSampler(num_pairs, global_batch_pairs=batch, shuffle=shuffle, seed=seed)


@quick
@given(st.integers(1, 20), st.data(), st.booleans())
def test_an_epoch_visits_pairs_once_and_drops_the_rest(
    num_pairs: int, data: st.DataObject, shuffle: bool
) -> None:
    batch = data.draw(st.integers(1, num_pairs))
    sampler = make(num_pairs, batch, shuffle=shuffle)
    assert sampler.steps_per_epoch * batch + sampler.dropped_pairs_per_epoch == num_pairs
    assert sampler.dropped_pairs_per_epoch < batch
    for epoch in range(2):
        batches = []
        for _ in range(sampler.steps_per_epoch):
            upcoming = sampler.upcoming_batch()
            batches.append(sampler.next_batch())
            assert batches[-1] == upcoming, "a look ahead moves nothing"
        assert all(len(pairs) == batch for pairs in batches)
        visited = [pair for pairs in batches for pair in pairs]
        assert len(set(visited)) == len(visited) and set(visited) <= set(range(num_pairs))
        assert sampler.state.epoch == epoch
        if not shuffle:
            assert visited == list(range(len(visited)))
    assert sampler.state.consumed_pairs == 2 * len(visited)


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def epochs(seed: int) -> list[list[int]]:
        sampler = make(num_pairs=30, batch=30, seed=seed)
        return [sampler.next_batch() for _ in range(3)]

    assert epochs(1) == epochs(1)
    first, second, third = epochs(1)
    assert first != second != third != first
    assert first != epochs(2)[0]
    # Every pair gets its turn at the end, where an incomplete batch would be dropped.
    assert len({order[-1] for order in (*epochs(1), *epochs(2))}) > 1


@quick
@given(st.integers(1, 12), st.data(), st.integers(0, 15))
def test_a_saved_position_goes_on_where_it_stood(
    num_pairs: int, data: st.DataObject, steps_before: int
) -> None:
    batch = data.draw(st.integers(1, num_pairs))
    straight = make(num_pairs, batch)
    for _ in range(steps_before):
        straight.next_batch()
    resumed = make(num_pairs, batch)
    # A checkpoint keeps it as JSON.
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    for _ in range(5):
        assert resumed.next_batch() == straight.next_batch()
    assert resumed.state == straight.state


def test_another_batch_size_goes_on_behind_the_consumed_pairs() -> None:
    saved = make(num_pairs=10, batch=3, shuffle=False)
    saved.next_batch()
    resumed = make(num_pairs=10, batch=2, shuffle=False)
    resumed.load_state_dict(saved.state_dict())
    assert [resumed.next_batch() for _ in range(4)] == [[3, 4], [5, 6], [7, 8], [0, 1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_pairs": 11}, r"data\.path \(usable pairs\) is 11, .* saved with 10"),
        ({"shuffle": False}, r"data\.shuffle is False, .* saved with True"),
        ({"seed": 6}, r"data\.seed is 6, .* saved with 5"),
    ],
)
def test_a_position_in_other_data_is_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        make(**change).load_state_dict(make().state_dict())  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_a_global_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"train\.global_batch_pairs \(4\): .* only 3 usable pairs.* at most 3"
    ):
        make(num_pairs=3, batch=4)


@quick
@given(st.integers(1, 20), st.data())
def test_steps_left_are_those_that_follow(num_pairs: int, data: st.DataObject) -> None:
    """Also from where another global batch left off."""
    first, second = (data.draw(st.integers(1, num_pairs)) for _ in range(2))
    before, after = make(num_pairs, first), make(num_pairs, second)
    assert before.steps_left(2) == 2 * before.steps_per_epoch
    for _ in range(data.draw(st.integers(0, 2 * before.steps_per_epoch))):
        before.next_batch()
    after.load_state_dict(before.state_dict())
    left = after.steps_left(2)
    for _ in range(left):
        after.next_batch()
        assert after.state.epoch < 2
    after.next_batch()
    assert after.state.epoch == 2
