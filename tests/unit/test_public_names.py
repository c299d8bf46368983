"""What users import, call and catch: changed only with a reason in CHANGELOG.md."""

from __future__ import annotations

import inspect
import re

import pytest

import sharpwatch
from sharpwatch import blocks, errors

POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
KEYWORD = inspect.Parameter.KEYWORD_ONLY
REQUIRED = inspect.Parameter.empty


def signature(function):
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def test_the_package_hands_on_these_names():
    assert sharpwatch.__all__ == [
        "BlockMap",
        "Checkpoints",
        "RollbackRequest",
        "SharpnessReport",
        "SharpwatchError",
        "Watch",
        "WatchStatus",
        "__version__",
        "attach",
        "classify",
        "measure",
    ]


@pytest.mark.parametrize("name", sharpwatch.__all__)
def test_each_name_is_there(name):
    assert getattr(sharpwatch, name) is not None


def test_an_unknown_name_is_an_attribute_error_that_lists_the_known():
    with pytest.raises(AttributeError, match="classify"):
        _ = sharpwatch.clasify


def test_attach():
    assert signature(sharpwatch.attach) == [
        ("model", POSITIONAL, REQUIRED),
        ("optimizer", POSITIONAL, REQUIRED),
        ("training_job", KEYWORD, REQUIRED),
        ("run", KEYWORD, None),
        ("address", KEYWORD, None),
        ("token", KEYWORD, None),
        ("tls", KEYWORD, None),
        ("overhead_budget", KEYWORD, 0.01),
        ("probe_every", KEYWORD, None),
        ("early_probes", KEYWORD, 0),
        ("probes", KEYWORD, ("gnb", "direction")),
        ("loss_fn", KEYWORD, None),
        ("logits_fn", KEYWORD, None),
        ("on_rollback", KEYWORD, None),
        ("control", KEYWORD, "lr"),
        ("lr_bounds", KEYWORD, (0.01, 10.0)),
        ("initial_step", KEYWORD, 0),
        ("seed", KEYWORD, 0),
        ("rules", KEYWORD, None),
        ("strict", KEYWORD, False),
        ("data_order", KEYWORD, None),
        ("labels", KEYWORD, None),
        ("transport", KEYWORD, None),
    ]


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("observe", ["self", "loss", "batch", "grad_norm"]),
        ("saved_checkpoint", ["self", "step", "uri"]),
        ("close", ["self"]),
    ],
)
def test_watch(method, parameters):
    assert list(inspect.signature(getattr(sharpwatch.Watch, method)).parameters) == parameters


def test_watch_shows_a_pending_rollback():
    assert isinstance(inspect.getattr_static(sharpwatch.Watch, "pending_rollback"), property)


def test_watch_shows_its_status():
    assert isinstance(inspect.getattr_static(sharpwatch.Watch, "status"), property)


def test_rollback_request():
    assert list(inspect.signature(sharpwatch.RollbackRequest).parameters) == ["step", "uri", "skip", "reason"]


def test_measure():
    assert signature(sharpwatch.measure) == [
        ("model", POSITIONAL, REQUIRED),
        ("batches", POSITIONAL, REQUIRED),
        ("optimizer", POSITIONAL, None),
        ("estimators", POSITIONAL, ("gnb", "hutchinson", "lanczos")),
        ("draws", POSITIONAL, 8),
        ("seed", POSITIONAL, 0),
        ("precision", KEYWORD, None),
        ("max_draws", KEYWORD, 256),
        ("blocks", KEYWORD, None),
        ("rules", KEYWORD, None),
        ("loss_fn", KEYWORD, None),
        ("logits_fn", KEYWORD, None),
        ("method", KEYWORD, "auto"),
        ("strict", KEYWORD, False),
    ]


def test_checkpoints():
    assert signature(sharpwatch.Checkpoints) == [
        ("folder", POSITIONAL, REQUIRED),
        ("model", POSITIONAL, REQUIRED),
        ("optimizer", POSITIONAL, REQUIRED),
        ("watch", KEYWORD, REQUIRED),
        ("data", KEYWORD, None),
        ("scheduler", KEYWORD, ()),
        ("scaler", KEYWORD, None),
        ("keep", KEYWORD, 3),
    ]


def test_classify():
    assert signature(sharpwatch.classify) == [
        ("model", POSITIONAL, REQUIRED),
        ("rules", POSITIONAL, None),
        ("strict", KEYWORD, False),
    ]


def test_blocks():
    assert blocks.BLOCKS == ("emb", "qk", "vo", "ffn", "norm", "head", "other")
    assert blocks.Row._fields == ("parameter", "type", "layer", "numel")


def test_the_error_tree():
    tree = {
        name: value.__base__.__name__
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, BaseException)
    }
    assert tree == {
        "SharpwatchError": "Exception",
        "ConfigError": "SharpwatchError",
        "TokenFileError": "SharpwatchError",
        "BlockError": "SharpwatchError",
        "AttachError": "SharpwatchError",
        "CheckpointError": "SharpwatchError",
        "ProbeError": "SharpwatchError",
        "EmptyBatchError": "ProbeError",
        "TrainingChangedError": "ProbeError",
        "ObjectiveError": "ProbeError",
        "UndecidedError": "ObjectiveError",
        "PrecisionError": "ProbeError",
        "DesyncError": "SharpwatchError",
        "WireError": "SharpwatchError",
        "StoreError": "SharpwatchError",
        "JournalInUseError": "StoreError",
        "ShardLostError": "JournalInUseError",
        "RevisionConflictError": "StoreError",
        "NoRoomError": "SharpwatchError",
        "NotHeldError": "SharpwatchError",
        "LogError": "SharpwatchError",
        "OperatorError": "SharpwatchError",
        "UnansweredError": "OperatorError",
    }
    drawn = re.findall(r"^[│ ]*[├└]── (\w+)", errors.__doc__, re.MULTILINE)
    assert drawn == [name for name in tree if name != "SharpwatchError"]
