from __future__ import annotations

import inspect
import re

import pytest
import torch
from stand_ins import Net
from torch import nn

import sharpwatch
from sharpwatch.errors import AttachError


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    monkeypatch.delenv("SHARPWATCH_ADDRESS", raising=False)
    monkeypatch.delenv("SHARPWATCH_DISABLED", raising=False)


@pytest.fixture
def model():
    return Net()


@pytest.fixture
def optimizer(model):
    return torch.optim.AdamW(model.parameters())


def test_the_signature_is_the_documented_one():
    documented = (
        "model, optimizer, *, training_job, run=None, address=None, token=None, tls=None, overhead_budget=0.01, "
        "probe_every=None, early_probes=0, probes=('gnb', 'direction'), loss_fn=None, logits_fn=None, "
        "on_rollback=None, control='lr', lr_bounds=(0.01, 10.0), initial_step=0, seed=0, rules=None, strict=False, "
        "data_order=None, labels=None, transport=None"
    )
    parameters = inspect.signature(sharpwatch.attach).parameters.values()
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    assert str(inspect.Signature(bare)) == f"({documented})"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"training_job": ""}, "training_job must have 1 to 221 printable characters, got ''"),
        ({"training_job": "x" * 300}, "training_job must have 1 to 221 printable characters, got 'xx"),
        ({"training_job": "a\nb"}, "training_job must have 1 to 221 printable characters, got 'a\\nb'"),
        ({"run": ""}, "run must have 1 to 253 printable characters, or be None, got ''"),
        (
            {"overhead_budget": 0.0},
            "overhead_budget must satisfy 0 < overhead_budget <= 1 (a share of step time), got 0.0",
        ),
        ({"overhead_budget": 1.5}, "overhead_budget <= 1 (a share of step time), got 1.5"),
        ({"overhead_budget": float("nan")}, "overhead_budget <= 1 (a share of step time), got nan"),
        ({"overhead_budget": "1%"}, "overhead_budget <= 1 (a share of step time), got '1%'"),
        ({"probe_every": 0}, "probe_every must be None or a whole number of steps >= 1, got 0"),
        ({"early_probes": -1}, "early_probes must be a whole number of steps >= 0, got -1"),
        ({"probe_every": 2.5}, "probe_every must be None or a whole number of steps >= 1, got 2.5"),
        (
            {"probes": ("gnb", "sharpness")},
            "'gnb', 'direction', 'hutchinson', 'lanczos', 'linesearch', 'gradient_noise', 'preconditioned'",
        ),
        ({"probes": "gnb"}, "each once, got 'gnb'"),
        ({"probes": None}, "each once, got None"),
        ({"probes": iter(["gnb"])}, "each once"),
        ({"probes": ("gnb", "gnb")}, "each once"),
        ({"control": "all"}, "'none', 'lr', 'rollback'"),
        ({"lr_bounds": (0.0, 2.0)}, "lr_bounds must satisfy 0 < low <= 1 <= high, got ("),
        ({"lr_bounds": (1.5, 2.0)}, "lr_bounds must satisfy 0 < low <= 1 <= high, got ("),
        ({"lr_bounds": (0.5, 0.9)}, "lr_bounds must satisfy 0 < low <= 1 <= high, got ("),
        ({"lr_bounds": (0.5, float("inf"))}, "lr_bounds must satisfy 0 < low <= 1 <= high, got ("),
        ({"lr_bounds": 2.0}, "lr_bounds must be two numbers (low, high), got 2.0"),
        ({"initial_step": -1}, "initial_step must be a whole number >= 0, got -1"),
        ({"initial_step": 1.0}, "initial_step must be a whole number >= 0, got 1.0"),
        ({"seed": -1}, "seed must be a whole number, 0 <= seed < 2**63, got -1"),
        ({"on_rollback": "restore"}, "on_rollback must be a callable or None, got str"),
        ({"loss_fn": 3}, "loss_fn must be a callable or None, got int"),
        ({"address": "localhost"}, "address: expected HOST:PORT or unix:PATH"),
        ({"address": 7741}, "address: expected HOST:PORT or unix:PATH"),
        ({"tls": {"certificate": "x"}}, "ca, cert, key"),
        ({"tls": {"ca": 3}}, "tls['ca'] must be a path, got int"),
        ({"data_order": ""}, "data_order must have 1 to 200 printable characters, or be None, got ''"),
        ({"data_order": "x" * 201}, "data_order must have 1 to 200 printable characters, or be None, got 'xx"),
        (
            {"labels": {"Team": "nlp"}},
            "labels: a label's name must be 1 to 63 of a-z, 0-9 and _ and begin with a letter",
        ),
        ({"labels": {"run": "mine"}}, "labels: label 'run' is every run's own"),
        ({"labels": {"team": 7}}, "labels: label team must have 1 to 200 printable characters, got 7"),
        ({"labels": ["team"]}, "labels must be a dict of at most 16, or None, got ['team']"),
        ({"data_order": 7}, "data_order must have 1 to 200 printable characters, or be None, got 7"),
        ({"token": "a\nb"}, "token"),
        ({"token": b"secret"}, "token must be a string or None, got bytes"),
        ({"transport": "unix:/run/s"}, "transport must have the members of sharpwatch.agent.transport.base.Transport"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(model, optimizer, transports, options, says):
    with pytest.raises(AttachError, match=re.escape(says)):
        sharpwatch.attach(model, optimizer, **({"training_job": "job", "transport": transports.new()} | options))
    assert not any(transport.hellos for transport in transports)
    assert not model._forward_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_model_and_optimizer_must_belong_together(model, optimizer, transports):
    with pytest.raises(AttachError, match="must hold a parameter of this model"):
        sharpwatch.attach(Net(), optimizer, training_job="job", transport=transports.new())
    with pytest.raises(AttachError, match=r"model must be a torch\.nn\.Module, got str"):
        sharpwatch.attach("model", optimizer, training_job="job", transport=transports.new())
    with pytest.raises(AttachError, match=r"optimizer\[1\] must be a torch.optim.Optimizer, got int"):
        sharpwatch.attach(model, [optimizer, 3], training_job="job", transport=transports.new())
    with pytest.raises(AttachError, match="got the same one twice"):
        sharpwatch.attach(model, [optimizer, optimizer], training_job="job", transport=transports.new())
    with pytest.raises(AttachError, match="got none"):
        sharpwatch.attach(model, [], training_job="job", transport=transports.new())
    with pytest.raises(AttachError, match="model must have a parameter that requires a gradient"):
        sharpwatch.attach(model.requires_grad_(False), optimizer, training_job="job", transport=transports.new())


def lazy():
    model = Net()
    model.lm_head = nn.LazyLinear(11)
    return model


def scripted():
    model = Net()
    model.lm_head = torch.jit.script(model.lm_head)
    return model


@pytest.mark.filterwarnings("ignore")  # torch's own, of what is under development or deprecated
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Net().to("meta"), "wte.weight is on the meta device"),
        (lazy, "lm_head.weight has no shape yet; call the model once"),
        (scripted, "lm_head is a ScriptModule"),
    ],
)
def test_a_model_that_cannot_be_read_is_refused(transports, make, says):
    model = make()
    with pytest.raises(AttachError, match=re.escape(says)):
        sharpwatch.attach(model, torch.optim.SGD(model.parameters()), training_job="job", transport=transports.new())
    assert not any(transport.hellos for transport in transports)


def test_the_run_is_named_after_the_job_without_touching_the_global_source(model, optimizer, transports):
    random = torch.get_rng_state()
    with sharpwatch.attach(model, optimizer, training_job="job", transport=transports.new()) as one:
        first = transports[-1].hello
    with sharpwatch.attach(model, optimizer, training_job="job", transport=transports.new()) as other:
        assert re.fullmatch(r"job-\d{8}-\d{6}-[0-9a-f]{6}", one.run)
        assert one.run != other.run
        assert first.attempt != transports[-1].hello.attempt
    assert torch.equal(random, torch.get_rng_state())


def test_the_address_comes_from_the_argument_the_environment_or_the_default(model, optimizer, monkeypatch):
    def target(**options):
        with sharpwatch.attach(model, optimizer, training_job="job", **options) as watch:
            return watch._watched.transport._destination.targets[0]

    assert target() == "127.0.0.1:7741"
    monkeypatch.setenv("SHARPWATCH_ADDRESS", "watch.example:99")
    assert target() == "watch.example:99"
    assert target(address="unix:/run/s") == "unix:/run/s"


def test_the_hello_says_what_is_watched(model, optimizer, transports):
    with sharpwatch.attach(
        model,
        optimizer,
        training_job="job",
        transport=transports.new(),
        run="r",
        control="rollback",
        lr_bounds=(0.5, 4),
        initial_step=9,
        seed=3,
        data_order="openwebtext, seed 7",
        labels={"team": "nlp"},
    ) as watch:
        hello = transports[-1].hello
        assert watch.step == 9
    assert (hello.protocol, hello.training_job, hello.run, hello.optimizer) == (1, "job", "r", "AdamW")
    assert (hello.control, hello.min_multiplier, hello.max_multiplier) == ("rollback", 0.5, 4.0)
    assert (hello.initial_step, hello.seed, list(hello.probes)) == (9, 3, ["gnb", "direction"])
    assert hello.data_order == "openwebtext, seed 7"
    assert hello.labels == {"team": "nlp"}
    assert list(hello.blocks) == ["emb", "norm", "head"]
    assert sum(block.parameters for block in hello.layer_blocks) == sum(p.numel() for p in model.parameters())


class Strange(Net):
    """Has a parameter that no rule knows."""

    def __init__(self):
        super().__init__()
        self.mystery = nn.Parameter(torch.ones(3, 5))


def test_a_parameter_of_no_known_block_is_refused_if_asked_until_a_rules_file_says_how(
    transports, monkeypatch, tmp_path
):
    model = Strange()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(AttachError, match="mystery"):
        sharpwatch.attach(model, optimizer, training_job="job", transport=transports.new(), strict=True)
    assert not any(transport.hellos for transport in transports)
    rules = tmp_path / "rules.yaml"
    monkeypatch.setenv("SHARPWATCH_BLOCK_RULES", str(rules))
    rules.write_text("- match: mystery\n  block: nonsense\n")
    with pytest.raises(AttachError, match=r"rules\.yaml:2.*nonsense"):
        sharpwatch.attach(model, optimizer, training_job="job", transport=transports.new())
    rules.write_text("- match: mystery\n  block: other\n")
    watch = sharpwatch.attach(model, optimizer, training_job="job", transport=transports.new())
    assert ("other", 15) in {(block.block, block.parameters) for block in transports[-1].hello.layer_blocks}
    watch.close()


def test_a_second_watch_of_one_optimizer_is_refused_until_the_first_is_closed(model, optimizer, transports):
    first = sharpwatch.attach(model, optimizer, training_job="job", transport=transports.new())
    try:
        with pytest.raises(AttachError, match="watched already"):
            sharpwatch.attach(model, optimizer, training_job="job", transport=transports.new())
    finally:
        first.close()
    sharpwatch.attach(model, optimizer, training_job="job", transport=transports.new()).close()


def test_the_preconditioned_probe_is_for_adams_family_alone(model, transports):
    sgd = torch.optim.SGD(model.wte.parameters(), lr=0.1)
    adam = torch.optim.AdamW(model.lm_head.parameters())
    for optimizers in (sgd, [adam, sgd]):
        with pytest.raises(AttachError, match=r"'preconditioned'.*SGD"):
            sharpwatch.attach(
                model, optimizers, training_job="job", transport=transports.new(), probes=("gnb", "preconditioned")
            )
    assert not any(transport.hellos for transport in transports)
    with sharpwatch.attach(model, adam, training_job="job", transport=transports.new(), probes=("preconditioned",)):
        assert list(transports[-1].hello.probes) == ["preconditioned"]
