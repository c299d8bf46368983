"""Where the rows of a batch are, by trial."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.curvature.objective.rows import RowLayout, find_rows, precision_of, select_rows
from sharpwatch.errors import ObjectiveError, UndecidedError

EPS = torch.finfo(torch.float32).eps


def causal(x, time):
    """Each position's output depends on those before it, along `time`."""
    return x.float().tanh().cumsum(time)[..., None] * torch.arange(1.0, 4.0)


def found(model, *args, **kwargs):
    return find_rows(lambda batch: model(*batch.args, **batch.kwargs), Batch(args, kwargs), EPS)


def ids(*shape):
    return torch.randint(1, 9, shape, generator=torch.Generator().manual_seed(0))


def test_batch_first_and_time_first():
    assert found(lambda x: causal(x, 1), ids(4, 6)) == RowLayout()
    layout = found(lambda x: causal(x, 0), ids(6, 4))
    assert layout == RowLayout((1,))
    batch = Batch((ids(6, 4),), axes=layout.axes)
    assert batch.rows == 4
    assert torch.equal(batch.slice(torch.tensor([1, 3])).args[0], ids(6, 4)[:, [1, 3]])


def test_a_beginning_of_the_sequences_is_not_taken_for_rows():
    """The first positions of a causal model do not change when later ones are cut off."""
    whole = causal(ids(6, 4), 0)
    assert torch.equal(causal(ids(6, 4)[:1], 0), whole[:1])
    assert found(lambda x: causal(x, 0), ids(6, 4)).axes == (1,)


def test_masks_that_outvote_the_batch():
    def model(x, mask, other):
        assert mask.shape == other.shape == (6, 6)
        return (mask.float() @ x.float().T).T + other.float().sum()

    masks = torch.ones(6, 6).tril(), torch.ones(6, 6)
    assert found(model, ids(4, 6), *masks).axes == (0, None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_a_square_mask_of_as_many_positions_as_rows(dtype):
    def model(x, mask):
        return (mask.float() @ x.float().T).T

    mask = torch.ones(6, 6).tril().to(dtype)
    assert found(model, ids(6, 6), mask).axes == (0, None)
    assert found(lambda x, mask: model(x.T, mask).T, ids(6, 6), mask).axes == (1, None)


def test_a_hidden_state_with_rows_in_its_second_dimension():
    torch.manual_seed(0)
    rnn = nn.LSTM(3, 5, num_layers=2, batch_first=True).eval()
    state = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    assert found(rnn, torch.randn(4, 6, 3), state).axes == (0, 1, 1)
    time_first = nn.LSTM(3, 5, num_layers=2).eval()
    assert found(time_first, torch.randn(6, 4, 3), state).axes == (1, 1, 1)


def test_flattened_outputs_in_either_order():
    assert found(lambda x: causal(x, 1).flatten(0, 1), ids(4, 6)) == RowLayout()
    layout = found(lambda x: causal(x, 0).flatten(0, 1), ids(6, 4))
    assert layout == RowLayout((1,), interleaved=True)


def test_outputs_that_mix_rows_are_refused():
    with pytest.raises(ObjectiveError, match="depend on the other rows"):
        found(lambda x: x.float() - x.float().mean(), ids(4, 6))


def test_an_error_of_the_model_itself_is_told():
    def broken(x):
        raise ValueError(f"no {x.dim()} dimensions")

    with pytest.raises(ValueError, match="no 2 dimensions"):
        found(broken, ids(4, 6))


def test_random_outputs_and_bare_losses_show_nothing():
    assert found(lambda x: torch.rand(x.shape), ids(4, 6)) == RowLayout()
    assert found(lambda x: x.float().mean(), ids(4, 6)) == RowLayout()
    assert found(lambda x: causal(x, 1), ids(1, 6)) == RowLayout(certain=False)


def test_outputs_that_are_all_alike_leave_it_undecided():
    with pytest.raises(UndecidedError):
        found(lambda x: 0 * causal(x, 1), ids(4, 6))
    # Where no other dimension can be cut, the first has the rows.
    assert found(lambda x: 0 * x.float() @ torch.ones(6, 2), ids(4, 6)) == RowLayout(certain=False)


def test_single_positions_may_differ_by_a_routers_choice():
    calls = []

    def model(x):
        calls.append(x)
        output = causal(x, 1)
        output[0, len(calls) % 6] += 1
        return output

    assert found(model, ids(4, 6)) == RowLayout()


def test_values_are_cut_as_the_outputs_are():
    values, rows = torch.arange(12), torch.tensor([0, 2])
    like = torch.Size([8])
    assert select_rows(values, rows, 3, interleaved=False, like=like).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert select_rows(values, rows, 3, interleaved=True, like=like).tolist() == [0, 2, 3, 5, 6, 8, 9, 11]
    table = values.view(4, 3)
    assert torch.equal(select_rows(table, rows, 3, interleaved=False, like=torch.Size([4, 2])), table[:, rows])
    with pytest.raises(ObjectiveError, match="can't be cut"):
        select_rows(values, rows, 3, interleaved=False, like=torch.Size([7]))


def test_the_precision_is_that_of_the_coarsest_format():
    model = nn.Linear(2, 2)
    assert precision_of(model) == EPS
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert precision_of(model) == torch.finfo(torch.bfloat16).eps
    assert precision_of(model.half()) == torch.finfo(torch.float16).eps
