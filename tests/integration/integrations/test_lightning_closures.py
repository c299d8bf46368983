"""Lightning hands forward, backward and clipping to `optimizer.step(closure)`: what evaluates it twice may do so."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

TESTS = str(Path(__file__).parents[2])

# Each of CASES, plain and watched: digests of the weights, the norms of the gradients that each step began with, and
# what a transport without a courier was given.
SCRIPT = """
import hashlib, json, logging, math, sys, warnings, torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel
sys.path.insert(0, TESTS)
from stand_ins import Transports
from sharpwatch.integrations.lightning import SharpwatchCallback
warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
transports = Transports()

class Sam(torch.optim.AdamW):
    \"\"\"Sharpness-aware minimisation over AdamW.\"\"\"

    @torch.no_grad()
    def step(self, closure):
        evaluate = torch.enable_grad()(closure)
        loss = evaluate()
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = [p.clone() for p in parameters]
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in parameters))
        norms.append(norm)
        for p in parameters:
            p.add_(p.grad, alpha=0.05 / norm)
        evaluate()
        for p, old in zip(parameters, before):
            p.copy_(old)
        super().step()
        return loss

OPTIMIZERS = {
    "sam": lambda parameters: Sam(parameters, lr=1e-3),
    "lbfgs": lambda parameters: torch.optim.LBFGS(parameters, lr=0.1, max_iter=3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
}

class Module(LightningModule):
    def __init__(self, optimizer):
        super().__init__()
        self.optimizer = optimizer
        self.model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2,
            bos_token_id=0, eos_token_id=0))
        self.losses = []

    def on_train_start(self):
        norms.clear()  # attach has stepped copies

    def training_step(self, batch, index):
        loss = self.model(input_ids=batch[0], labels=batch[0]).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return OPTIMIZERS[self.optimizer](self.parameters())

def train(optimizer, options, callbacks):
    torch.manual_seed(0)
    module = Module(optimizer)
    rows = torch.randint(64, (40, 16))
    Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_steps=10,
        enable_checkpointing=False, callbacks=callbacks, **options).fit(
            module, DataLoader(TensorDataset(rows), batch_size=2, shuffle=True))
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in module.parameters())).hexdigest()
    return digest, module.losses, list(norms)

norms = []
for optimizer, options in CASES:
    plain = train(optimizer, options, [])
    watched = train(optimizer, options, [SharpwatchCallback(training_job="closures", transport=transports.new(),
        probe_every=5)])
    samples = [sample for sample in transports[-1].samples if not sample.closing]
    print(json.dumps({
        "plain": plain, "watched": watched, "swallowed": samples[-1].health.swallowed_errors,
        "failures": [str(failure) for failure in samples[-1].health.probe_failures],
        "steps": [sample.step for sample in samples],
        "probed": [sample.step for sample in samples if sample.HasField("gnb") and sample.HasField("direction")],
        "norms": [torch.frombuffer(bytearray(sample.tap.gradient_norm.data), dtype=torch.float32).norm().item()
            * sample.tap.clip_factor for sample in samples],
    }))
"""

CLIPPED = {"gradient_clip_val": 0.5}
CASES = [
    ["sam", CLIPPED],
    ["sam", {"accumulate_grad_batches": 2, "precision": "bf16-mixed", **CLIPPED}],
    ["lbfgs", {}],
    ["adamw", CLIPPED],
]


def test_closures_are_evaluated_as_often_as_the_optimizer_does_and_nothing_is_changed(script):
    output = script(SCRIPT.replace("TESTS", repr(TESTS)).replace("CASES", repr(CASES)))
    results = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    for (optimizer, options), result in zip(CASES, results, strict=True):
        assert result["watched"] == result["plain"], (optimizer, options)
        assert result["steps"] == list(range(1, 11))
        assert result["probed"] == [5, 10]
        assert (result["swallowed"], result["failures"]) == (0, [])
        if optimizer == "sam":
            assert len(result["watched"][1]) == 10 * (options.get("accumulate_grad_batches", 1) + 1)
            # Float32 sums over 16 dimensions' weights, against float64.
            assert result["norms"] == pytest.approx(result["watched"][2], rel=1e-5)
        if "gradient_clip_val" in options:
            assert all(math.isclose(norm, 0.5, rel_tol=1e-4) for norm in result["norms"])
