"""The loss that Lightning's callback shows is the one that backward ran from, whatever `training_step` makes it of."""

from __future__ import annotations

import logging

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from stand_ins import LLAMA
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from sharpwatch.integrations.lightning import SharpwatchCallback

STEPS = 4


def own(output):
    return output.loss


def added(output):
    return output.loss + 0.1 * output.logits.square().mean()


def another(output):
    return output.logits.square().mean()


def named(output):
    return {"loss": another(output), "more": output.loss.detach()}


class Module(LightningModule):
    """Keeps what each micro-batch was trained on."""

    def __init__(self, loss):
        super().__init__()
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(LlamaConfig(**LLAMA))
        self.loss, self.trained_on = loss, []

    def training_step(self, batch, index):
        del index
        result = self.loss(self.model(input_ids=batch[0], labels=batch[0]))
        self.trained_on.append((result["loss"] if isinstance(result, dict) else result).item())
        return result

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Manual(Module):
    """Optimizes by hand, two micro-batches to a step."""

    def __init__(self, loss):
        super().__init__(loss)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        self.manual_backward(loss / 2)
        if index % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


def fit(module, transport, *, steps=STEPS, **options):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(1)
    callback = SharpwatchCallback(training_job="job", transport=transport, probes=())
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_steps=steps,
        enable_checkpointing=False, callbacks=[callback], **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(torch.randint(32, (48, 12))), batch_size=4))
    samples = [sample for sample in transport.samples if not sample.closing]
    assert samples[-1].health.swallowed_errors == 0
    return [sample.loss if sample.HasField("loss") else None for sample in samples]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("loss", [own, added, another, named])
def test_the_loss_shown_is_the_one_of_training_step_from_the_first_step_on(transports, loss, accumulation):
    module = Module(loss)
    shown = fit(module, transports.new(), accumulate_grad_batches=accumulation)
    means = torch.tensor(module.trained_on).view(-1, accumulation).mean(1)
    assert len(shown) == STEPS
    assert shown == pytest.approx(means.tolist(), rel=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss", [own, another])
def test_the_loss_shown_is_the_one_given_to_manual_backward(transports, loss):
    module = Manual(loss)
    shown = fit(module, transports.new())
    assert shown == pytest.approx(torch.tensor(module.trained_on).view(-1, 2).mean(1).tolist(), rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_the_scale_of_half_precision_drops_out(transports):
    class Scaled(Module):
        def on_before_backward(self, loss):
            self.scaled = loss.item()

    module = Scaled(another)
    plugin = pytest.importorskip("lightning.pytorch.plugins").MixedPrecision(
        "16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0)
    )
    shown = fit(module, transports.new(), plugins=[plugin])
    assert module.scaled == pytest.approx(64 * module.trained_on[-1], rel=1e-2)
    assert shown == pytest.approx(module.trained_on, rel=1e-2)
