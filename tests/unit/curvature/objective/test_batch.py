from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn

from sharpwatch.curvature.objective.batch import Batch, count_tokens, find_labels, find_logits, predict, training_loss
from sharpwatch.errors import ProbeError

ROWS = torch.tensor([0, 2])


class Pair(NamedTuple):
    left: object
    right: object


def ids(rows=4, length=6):
    return torch.arange(rows * length).view(rows, length)


@pytest.mark.parametrize(
    ("args", "kwargs", "rows"),
    [
        ((ids(),), {}, 4),
        ((), {"position_ids": torch.arange(6)[None], "input_ids": ids()}, 4),
        ((ids(),), {"cache_position": torch.arange(6), "attention_mask": torch.ones(4, 1, 6, 6)}, 4),
        (({"inputs": [ids(3), torch.zeros(3, 2)]},), {"scale": torch.tensor(2.0)}, 3),
        ((torch.arange(5),), {}, 5),
    ],
)
def test_rows_are_the_dimension_that_the_tensors_share(args, kwargs, rows):
    assert Batch(args, kwargs).rows == rows


def test_a_call_without_tensors_has_no_rows():
    with pytest.raises(ProbeError, match="without any tensor"):
        _ = Batch((3,), {"flag": True}).rows


def test_slices_what_has_rows_and_passes_the_rest():
    shared = torch.arange(6)[None]
    batch = Batch(
        (ids(), [ids(), "x"], Pair(ids(), None)),
        {
            "labels": ids(),
            "position_ids": shared,
            "weights": torch.arange(4),
            "deep": {"mask": ids()},
            "use_cache": False,
        },
    )
    part = batch.slice(ROWS)
    wanted = ids()[ROWS]
    assert torch.equal(part.args[0], wanted)
    assert torch.equal(part.args[1][0], wanted)
    assert part.args[1][1] == "x"
    assert torch.equal(part.args[2].left, wanted)
    assert isinstance(part.args[2], Pair)
    assert torch.equal(part.kwargs["labels"], wanted)
    assert torch.equal(part.kwargs["position_ids"], shared)
    assert part.kwargs["position_ids"].data_ptr() != shared.data_ptr()  # the model may write into it
    assert torch.equal(part.kwargs["weights"], ROWS)
    assert torch.equal(part.kwargs["deep"]["mask"], wanted)
    assert part.kwargs["use_cache"] is False
    assert part.rows == 2


def test_positions_along_a_sequence_as_long_as_the_batch_are_left_whole():
    position = torch.arange(4)
    part = Batch((), {"input_ids": ids(4, 4), "cache_position": position}).slice(ROWS)
    assert torch.equal(part.kwargs["cache_position"], position)
    assert part.kwargs["input_ids"].shape == (2, 4)


def test_usable_leaves_out_the_count_of_other_ranks_and_inference_tensors():
    with torch.inference_mode():
        inference = ids()
    batch = Batch((inference,), {"num_items_in_batch": 99, "labels": ids()}).prepared()
    assert not batch.args[0].is_inference()
    assert torch.equal(batch.args[0], inference)
    assert set(batch.kwargs) == {"labels"}


class HuggingFace(nn.Module):
    """Named as its classes are, with the signature and the configuration that the rules read."""

    def __init__(self, *, encoder_decoder=False):
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=encoder_decoder)

    def forward(self, input_ids, attention_mask=None, labels=None):
        """Only its signature is used."""


class TinyForMaskedLM(HuggingFace):
    pass


class NanoGpt(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(8, 4)

    def forward(self, idx, targets=None):
        logits = self.wte(idx) @ self.wte.weight.T
        if targets is None:
            return logits[:, [-1]], None
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


LABELS = torch.tensor([[5, -100, 7], [-100, 6, 7]])


@pytest.mark.parametrize(
    ("model", "aligned"),
    [
        (HuggingFace(), [[-100, 7, -100], [6, 7, -100]]),
        (HuggingFace(encoder_decoder=True), LABELS.tolist()),
        (TinyForMaskedLM(), LABELS.tolist()),
    ],
)
def test_labels_of_hugging_face_models(model, aligned):
    for batch in (Batch((LABELS,), {"labels": LABELS}), Batch((LABELS, None, LABELS))):
        assert find_labels(model, batch).aligned().tolist() == aligned
    assert find_labels(model, Batch((LABELS, LABELS))) is None  # the second one is the attention mask


def test_targets_of_nanogpt_models():
    targets = torch.tensor([[1, -1, 3]])
    for batch in (Batch((targets, targets)), Batch((targets,), {"targets": targets})):
        assert find_labels(NanoGpt(), batch).aligned().tolist() == [[1, -100, 3]]
        assert count_tokens(NanoGpt(), batch) == 2


def test_without_labels_every_position_predicts():
    model = NanoGpt().wte
    logits, mask = predict(model, model, Batch((ids(1, 6),)), None)
    assert logits.shape == (1, 6, 4)
    assert mask.all()
    assert count_tokens(model, Batch((ids(2, 3),))) == 6
    assert count_tokens(model, Batch((torch.zeros(2, 3, 16),))) == 6


def test_the_losses_that_a_run_may_train_on():
    torch.manual_seed(0)
    model = NanoGpt()
    inputs, targets = torch.tensor([[0, 1, 2]]), torch.tensor([[1, -1, 3]])
    own = training_loss(model, model, Batch((inputs, targets)), None)
    assert torch.equal(own, model(inputs, targets)[1])

    class LogitsOnly(NanoGpt):
        def forward(self, idx, targets):
            return super().forward(idx, targets)[0]

    bare = LogitsOnly()
    bare.load_state_dict(model.state_dict())
    torch.testing.assert_close(training_loss(bare, bare, Batch((inputs, targets)), None), own)
    given = training_loss(model, model, Batch((inputs, targets)), lambda called, batch: 3 * called(*batch.args)[1])
    torch.testing.assert_close(given, 3 * own)


def test_a_loss_that_does_not_depend_on_the_weights_is_refused():
    model = NanoGpt()
    with pytest.raises(ProbeError, match=r"loss_fn must give a scalar loss .*, got a float32 tensor"):
        training_loss(model, model, Batch((ids(),)), lambda *_: torch.tensor(1.0))
    with pytest.raises(ProbeError, match="must give a scalar"):
        training_loss(model, model, Batch((ids(1, 2) % 8,)), lambda called, batch: called.wte(batch.args[0]))


@pytest.mark.parametrize(
    "output",
    [
        SimpleNamespace(logits=torch.ones(1, 2, 3)),
        {"logits": torch.ones(1, 2, 3)},
        (torch.tensor(0.5), torch.ones(1, 2, 3)),
        torch.ones(1, 2, 3),
    ],
)
def test_finds_the_logits(output):
    assert find_logits(output).shape == (1, 2, 3)


@pytest.mark.parametrize(
    ("output", "seen"),
    [
        ((torch.ones(2), "x"), r"a tuple of \(a float32 tensor \(2,\), a str\)"),
        ({"loss": 1}, "a mapping of loss"),
        (torch.ones(2, 3, dtype=torch.int64), "an? int64 tensor"),
        (None, "a NoneType"),
    ],
)
def test_says_what_it_saw_instead_of_logits(output, seen):
    with pytest.raises(ProbeError, match=seen) as caught:
        find_logits(output)
    assert "logits_fn" in str(caught.value)


def test_says_when_labels_do_not_fit_the_logits():
    with pytest.raises(ProbeError, match=r"logits \(1, 5, 4\), mask or labels \(2, 3\)"):
        predict(lambda *_, **__: torch.ones(1, 5, 4), HuggingFace(), Batch((LABELS,), {"labels": LABELS}), None)
