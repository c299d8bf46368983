"""A run taken up again in the middle of its data sees what the run that went on saw, and draws what it drew.

The positions beneath are held against lists of what each step took.
"""

from __future__ import annotations

import copy
import io
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from sharpwatch.checkpointing.resumable_loader import DataPosition, ResumableLoader, holds, nth_kept, rescaled, union
from sharpwatch.errors import CheckpointError

# torchdata's last release calls what newer versions of torch deprecate.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
DATA = TensorDataset(torch.arange(20))
RANGES = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=5)


class Noisy(torch.utils.data.Dataset):
    """Items that draw from the global generator, as augmentations do."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.tensor([float(index), torch.rand(()).item()])


class Stream(IterableDataset):
    def __iter__(self):
        yield from torch.arange(20)


class Draws:
    """nanoGPT's manner: a batch is a draw, and where it stands is the random state."""

    def __iter__(self):
        while True:
            yield torch.randint(1000, (2,))

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def distributed():
    return DataLoader(DATA, 2, sampler=DistributedSampler(DATA, num_replicas=2, rank=1, seed=5))


def generated(**options):
    return DataLoader(DATA, 2, shuffle=True, generator=torch.Generator().manual_seed(3), **options)


LOADERS = {
    "shuffled": lambda: DataLoader(DATA, 2, shuffle=True),
    "augmented": lambda: DataLoader(Noisy(), 2, shuffle=True),
    "its own generator": generated,
    "workers": lambda: DataLoader(Noisy(), 2, shuffle=True, num_workers=2),
    "distributed": distributed,
    "iterable": lambda: DataLoader(Stream(), 2),
    "stateful": lambda: StatefulDataLoader(DATA, 2, shuffle=True),
    "draws": Draws,
}


def values(batch):
    return (batch[0] if isinstance(batch, list) else batch).flatten().tolist()


def run(batches, steps):
    """What `steps` steps see and draw, as a loop with dropout does."""
    seen = []
    while len(seen) < steps:
        for batch in batches:
            seen.append((batches.epoch, values(batch), torch.rand(()).item()))
            if len(seen) == steps:
                break
    return seen


def stand(batches):
    """What a checkpoint would hold, of a run that goes on."""
    file = io.BytesIO()
    torch.save(batches.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through(batches, steps, at):
    """`run`, and the position after `at` steps."""
    seen, state = [], None
    while len(seen) < steps:
        for batch in batches:
            seen.append((batches.epoch, values(batch), torch.rand(()).item()))
            if len(seen) == at:
                state = stand(batches)
            if len(seen) == steps:
                break
    return seen, state


@pytest.mark.parametrize("at", [1, 3, 10, 13, 20])
@pytest.mark.parametrize("name", LOADERS)
def test_it_goes_on_where_it_stood(name, at):
    if name == "workers" and at not in {3, 10}:
        pytest.skip("starting workers takes seconds")
    torch.manual_seed(1)
    whole, state = through(ResumableLoader(LOADERS[name]()), 26, at)
    torch.manual_seed(99)
    again = ResumableLoader(LOADERS[name]())
    again.load_state_dict(state)
    assert run(again, 26 - at) == whole[at:]


# A StatefulDataLoader keeps its own iterator, and can't be copied in the middle of an epoch.
@pytest.mark.parametrize("name", [name for name in LOADERS if name not in {"workers", "stateful"}])
def test_a_copy_goes_on_where_it_was_made(name):
    torch.manual_seed(1)
    whole = run(ResumableLoader(LOADERS[name]()), 26)
    torch.manual_seed(1)
    batches = ResumableLoader(LOADERS[name]())
    for _, _ in zip(range(3), batches, strict=False):
        torch.rand(())
    twin = copy.deepcopy(batches)
    torch.manual_seed(99)
    assert run(twin, 23) == whole[3:]


@pytest.mark.parametrize("name", ["shuffled", "its own generator", "stateful", "distributed", "iterable"])
def test_without_a_restore_it_is_the_loader(name):
    torch.manual_seed(1)
    plain, loader = [], LOADERS[name]()
    for epoch in range(3):
        if name == "distributed":
            loader.sampler.set_epoch(epoch)
        plain += [(epoch, values(batch), torch.rand(()).item()) for batch in loader]
    torch.manual_seed(1)
    batches = ResumableLoader(LOADERS[name]())
    assert run(batches, len(plain)) == plain
    assert batches.epoch == 2


@pytest.mark.parametrize("name", ["shuffled", "stateful", "draws"])
def test_what_is_left_out_moves_the_next_ones_up(name):
    torch.manual_seed(1)
    all_batches = [data for _, data, _ in run(ResumableLoader(LOADERS[name]()), 24)]
    torch.manual_seed(1)
    _, state = through(ResumableLoader(LOADERS[name]()), 4, 4)
    again = ResumableLoader(LOADERS[name]())
    again.load_state_dict(state)
    again.leave_out((2, 7), (8, 9))  # of which 2 and 3 are taken already
    seen = run(again, 12)
    if name != "draws":  # whose batches depend on what else is drawn
        # The second pass is shuffled by a random state that fewer draws have led to.
        assert [data for _, data, _ in seen[:2]] == [all_batches[i] for i in (7, 9)]
        assert sorted(item for _, data, _ in seen[2:] for item in data) == list(range(20))
        assert [epoch for epoch, _, _ in seen] == [0] * 6 + [1] * 6  # an epoch has ten batches, come what may
    assert again.taken == 20


@pytest.mark.parametrize("name", ["shuffled", "stateful", "distributed"])
def test_an_iterator_that_is_left_begins_anew_as_the_loaders_own_does(name):
    def left(loader):
        seen = []
        for epoch, count in enumerate((10, 4, 10, 10)):  # the last of an epoch may be taken without asking for the end
            if name == "distributed":
                getattr(loader, "loader", loader).sampler.set_epoch(epoch)
            iterator = iter(loader)
            seen += [(values(next(iterator)), torch.rand(()).item()) for _ in range(min(count, len(loader)))]
        return seen

    torch.manual_seed(1)
    plain = left(LOADERS[name]())
    torch.manual_seed(1)
    assert left(ResumableLoader(LOADERS[name]())) == plain


def test_steps_are_reported_as_batches():
    batches = ResumableLoader(DataLoader(DATA, 2))
    for number, _ in enumerate(batches, 1):
        batches.mark(number // 2)
    assert batches.batches_of(2, 4) == (2, 6)
    assert batches.batches_of(4, 4) == (0, 0)


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
def test_one_rank_sees_the_rest_of_what_two_have_seen(kind):
    def share(ranks, rank):
        return ResumableLoader(kind(DATA, 2, sampler=DistributedSampler(DATA, num_replicas=ranks, rank=rank, seed=5)))

    seen = []
    for rank in (0, 1):
        batches = share(2, rank)
        batches.load_state_dict(through(share(2, rank), 1, 1)[1])  # a restart on the way
        rest, state = through(batches, 2, 2)
        seen += [item for _, data, _ in rest for item in data]
    first = [item for rank in (0, 1) for _, data, _ in run(share(2, rank), 1) for item in data]
    alone = share(1, 0)
    alone.load_state_dict(alone.adapted_state(state, 2, 1))
    assert alone.taken == 6
    rest = [item for _, data, _ in run(alone, 4) for item in data]
    assert sorted(first + seen + rest) == list(range(20))
    assert alone.epoch == 0
    assert len({item for _, data, _ in run(alone, 10) for item in data}) == 20


def test_a_shuffled_loader_that_says_where_it_stands_is_passed_over_in_the_same_order():
    torch.manual_seed(1)
    order = [data for _, data, _ in run(ResumableLoader(LOADERS["stateful"]()), 10)]
    torch.manual_seed(1)
    state = through(ResumableLoader(LOADERS["stateful"]()), 3, 3)[1]
    again = ResumableLoader(LOADERS["stateful"]())
    again.load_state_dict(state)
    state = through(again, 2, 2)[1]
    alone = ResumableLoader(LOADERS["stateful"]())
    alone.load_state_dict(alone.adapted_state(state, 2, 1))  # not shared between ranks: the epoch stays as long
    assert [data for _, data, _ in run(alone, 5)] == order[5:]


def test_only_an_empty_place_of_the_loaders_own_is_taken_up_by_another_number_of_ranks():
    _, state = through(ResumableLoader(Draws()), 3, 3)
    assert ResumableLoader(Draws()).adapted_state(state, 2, 1)["loader"] == {}
    with pytest.raises(CheckpointError, match="one of 2 ranks and can't be converted for 1"):
        ResumableLoader(Draws()).adapted_state(state | {"loader": {"position": 3}}, 2, 1)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=40))
def test_a_position_knows_what_every_step_took(paces):
    position, taken = DataPosition(), [0]
    for step, pace in enumerate(paces, 1):
        taken.append(taken[-1] + pace)
        position.mark(step, taken[-1])
        position.mark(step, taken[-1] + 1)  # a later micro-batch, of the next step
    again = DataPosition(position.corners)
    assert [again.batches(step) for step in range(len(taken))] == taken
    assert again.batches(len(taken) + 1) == taken[-1] + 2 * paces[-1]


def test_a_steady_position_stays_small():
    position = DataPosition()
    for step in range(1, 10_000):
        position.mark(step, 4 * step)
    assert len(position.corners) == 2


@given(RANGES)
def test_a_union_is_the_same_batches_in_order_and_apart(ranges):
    merged = union(ranges)
    truth = {batch for first, last in ranges for batch in range(first, last)}
    assert [batch for batch in range(40) if holds(merged, batch)] == sorted(truth)
    assert all(left[1] < right[0] for left, right in pairwise(merged))


@given(RANGES, st.integers(0, 30))
def test_the_nth_kept_batch(ranges, number):
    merged = union(ranges)
    assert nth_kept(merged, number) == [batch for batch in range(200) if not holds(merged, batch)][number]


@given(RANGES, st.integers(1, 4), st.integers(1, 4))
def test_ranges_hold_as_much_data_at_another_pace(ranges, was, now):
    merged = union(ranges)
    again = rescaled(merged, Fraction(was, now))  # a batch of n ranks is n portions of data
    held = {portion for portion in range(200) if holds(merged, portion // was)}
    found = {portion for portion in range(200) if holds(again, portion // now)}
    assert held <= found
    assert len(found - held) <= 2 * (now - 1) * len(merged)
