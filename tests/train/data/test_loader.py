import pickle
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.base.labels import IGNORE_INDEX
from train.data.batch import Batch
from train.data.loader import StepLoader, epoch_order, one_pass
from train.data.pack import Rows


def make_rows(num_rows: int, sequence_length: int = 4) -> Rows:
    """Distinct tokens; the last row is one label short."""
    length = num_rows * sequence_length
    return Rows(stream=np.arange(length, dtype=np.uint32), sequence_length=sequence_length)


def make_loader(num_rows: int = 13, **settings: int) -> StepLoader:
    options: dict[str, Any] = {"batch_size": 4, "accumulate": 2, "seed": 3, "num_steps": 6}
    return StepLoader(rows=make_rows(num_rows), **{**options, **settings})


def same(ours: Batch, theirs: Batch) -> bool:
    return all(
        torch.equal(our, their)
        if isinstance(our, torch.Tensor) and isinstance(their, torch.Tensor)
        else our == their
        for our, their in zip(ours, theirs, strict=True)
    )


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 3), st.integers(0, 2**63))
def test_every_row_comes_once_an_epoch_across_the_borders_of_epochs(
    num_rows: int, batch_size: int, accumulate: int, seed: int
) -> None:
    loader = make_loader(num_rows, batch_size=batch_size, accumulate=accumulate, seed=seed)
    num_steps = -(-3 * num_rows // loader.rows_per_step)

    ids = [int(row) for step in range(num_steps) for row in loader.row_ids(step)]

    for epoch in range(3):
        assert sorted(ids[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 3))
def test_micro_batches_hold_the_rows_of_their_step_in_order(
    num_rows: int, batch_size: int, accumulate: int
) -> None:
    loader = make_loader(num_rows, batch_size=batch_size, accumulate=accumulate, num_steps=3)

    batches = list(loader)

    assert [(b.step, b.first_row) for b in batches] == [
        (step, micro * batch_size) for step in range(3) for micro in range(accumulate)
    ]
    for step in range(3):
        tokens_BT = torch.cat([batch.tokens_BT for batch in batches if batch.step == step])
        assert torch.equal(tokens_BT, loader.rows.gather(loader.row_ids(step))[0])


@pytest.mark.parametrize("world_size", [2, 4])
@given(num_rows=st.integers(1, 40), accumulate=st.integers(1, 3))
def test_ranks_together_see_the_batches_of_one(world_size: int, num_rows: int, accumulate: int) -> None:
    alone = list(make_loader(num_rows, accumulate=accumulate, num_steps=3))
    ranks = [
        make_loader(num_rows, accumulate=accumulate, num_steps=3, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]

    for whole, *parts in zip(alone, *ranks, strict=True):
        for name in ("tokens_BT", "labels_BT"):
            in_turn = torch.stack([getattr(part, name) for part in parts], dim=1).flatten(0, 1)
            assert torch.equal(getattr(whole, name), in_turn)
        assert {part.num_valid for part in parts} == {whole.num_valid}
        assert [part.first_row - whole.first_row for part in parts] == list(range(world_size))
        assert {part.stride for part in parts} == {world_size}


@given(st.integers(1, 40), st.integers(1, 3), st.integers(0, 6))
def test_a_resumed_run_sees_what_the_run_never_stopped_would(
    num_rows: int, accumulate: int, start_step: int
) -> None:
    whole = [b for b in make_loader(num_rows, accumulate=accumulate) if b.step >= start_step]

    resumed = list(make_loader(num_rows, accumulate=accumulate, start_step=start_step))

    assert len(resumed) == len(whole) == (6 - start_step) * accumulate
    assert all(map(same, resumed, whole))


@given(st.integers(1, 40), st.integers(1, 3))
def test_the_divisor_counts_the_labels_of_the_whole_step(num_rows: int, accumulate: int) -> None:
    loader = make_loader(num_rows, accumulate=accumulate, num_steps=4)
    counted: Counter[int] = Counter()

    for batch in loader:
        counted[batch.step] += int((batch.labels_BT != IGNORE_INDEX).sum())

    assert counted == {batch.step: batch.num_valid for batch in loader}
    assert all(batch.num_rows == 4 * accumulate for batch in loader)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_neither_batches_nor_the_global_random_state(num_workers: int) -> None:
    alone = list(make_loader(start_step=1))
    before = torch.get_rng_state()

    ours = list(make_loader(start_step=1, num_workers=num_workers))

    assert len(ours) == len(alone)
    assert all(map(same, ours, alone))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loader_can_be_iterated_again() -> None:
    loader = make_loader()

    assert all(map(same, list(loader), list(loader)))


def test_the_seed_and_the_epoch_change_the_order() -> None:
    orders = {tuple(epoch_order(seed, epoch, 50)) for seed in range(3) for epoch in range(3)}

    assert len(orders) == 9  # two of 50! orders alike: a chance below 1e-60


def test_a_run_meets_its_rows_in_another_order_each_epoch() -> None:
    loader = make_loader(num_rows=50, batch_size=50, accumulate=1)

    orders = {tuple(loader.row_ids(epoch)) for epoch in range(4)}

    assert len(orders) == 4


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    assert epoch_order(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert epoch_order(2**40, 7, 8).tolist() == [4, 7, 1, 6, 2, 0, 5, 3]


def test_an_order_does_not_favour_places() -> None:
    first = Counter(int(epoch_order(1, epoch, 4)[0]) for epoch in range(4000))

    # each of 1,000 expected with deviation 27.4: 6 of them off is a chance below 1e-8
    assert all(abs(first[row] - 1000) < 165 for row in range(4))


@given(st.integers(1, 30), st.integers(1, 8))
def test_one_pass_gives_every_label_once_in_batches_of_one_shape(num_rows: int, batch_size: int) -> None:
    rows = make_rows(num_rows)

    batches = list(one_pass(rows, batch_size=batch_size))

    labels = torch.cat([b.labels_BT[b.labels_BT != IGNORE_INDEX] for b in batches])
    assert sorted(labels.tolist()) == rows.stream[1:].tolist()
    assert {tuple(b.tokens_BT.shape) for b in batches} == {(batch_size, 4)}
    assert all(b.num_valid == int((b.labels_BT != IGNORE_INDEX).sum()) for b in batches)


def test_one_pass_starts_with_rows_from_all_over_the_text() -> None:
    first = next(iter(one_pass(make_rows(1000), batch_size=32)))

    # all 32 from one half: a chance of 2 ** -31
    assert first.tokens_BT.min() < 2000 < first.tokens_BT.max()


def test_a_loader_survives_a_trip_to_another_process() -> None:
    loader = make_loader()

    copied = pickle.loads(pickle.dumps(loader))  # noqa: S301 - what a spawned worker does

    assert all(map(same, copied, loader))
