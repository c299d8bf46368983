"""The loss that Trainer's callback shows is the one that Trainer steps on, whatever computes it."""

from __future__ import annotations

import copy

import pytest
import torch
from stand_ins import LLAMA
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from sharpwatch.integrations.huggingface import SharpwatchCallback, train

STEPS = 4


def rows(count=48):
    """Rows in which more and more tokens are ignored, so that micro-batches weigh differently."""
    torch.manual_seed(1)
    ids = torch.randint(1, 32, (count, 12))
    ignored = torch.arange(12) < (torch.arange(count) % 10)[:, None]
    return [{"input_ids": row, "labels": row.masked_fill(none, -100)} for row, none in zip(ids, ignored, strict=True)]


class OfTheLogits(Trainer):
    """As DPO, distillation or class weights would have another loss than the model's."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        output = model(**inputs)
        loss = output.logits.square().mean()
        return (loss, output) if return_outputs else loss


class WithPenalty(Trainer):
    """The model's own loss and one more term: backward runs from the sum."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, output = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        loss = loss + 0.1 * output.logits.square().mean()
        return (loss, output) if return_outputs else loss


class OwnStep(Trainer):
    """A training step of its own, which Trainer's `compute_loss` has no part in."""

    def training_step(self, model, inputs, *_):
        model.train()
        loss = model(**self._prepare_inputs(inputs)).logits.exp().mean() / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


def function_of_outputs(outputs, labels, num_items_in_batch=None):
    return outputs.logits.square().sum() / (12 * 32 * num_items_in_batch) + 0 * labels.sum()


CASES = {
    "the model's own": (Trainer, {}, {}),
    "compute_loss": (OfTheLogits, {}, {}),
    "an added term": (WithPenalty, {}, {}),
    "training_step": (OwnStep, {}, {}),
    "compute_loss_func": (Trainer, {}, {"compute_loss_func": function_of_outputs}),
    "label smoothing": (Trainer, {"label_smoothing_factor": 0.2}, {}),
}


def trained(kind, arguments, options, folder, *, run=Trainer.train, callbacks=()):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    settings = {"max_steps": STEPS, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "seed": 3}
    settings |= {"save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "learning_rate": 1e-2} | arguments
    trainer = kind(
        model, TrainingArguments(str(folder), **settings), train_dataset=rows(), callbacks=list(callbacks), **options
    )
    run(trainer)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer, logged


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_the_loss_shown_is_the_one_that_trainer_logs(transports, tmp_path, case, accumulation):
    kind, arguments, options = CASES[case]
    arguments = arguments | {"gradient_accumulation_steps": accumulation}
    callback = SharpwatchCallback(training_job="job", transport=transports.new(), probes=())
    trainer, logged = trained(kind, arguments, options, tmp_path, run=train, callbacks=[callback])
    samples = [sample for sample in transports[-1].samples if not sample.closing]
    assert [sample.loss for sample in samples] == pytest.approx(logged, rel=1e-5)
    assert "backward" not in vars(trainer.accelerator)
    plain, alike = trained(kind, arguments, options, tmp_path)
    assert alike == logged
    assert all(map(torch.equal, trainer.model.state_dict().values(), plain.model.state_dict().values()))


def test_the_callback_alone_shows_it_too(transports, tmp_path):
    callback = SharpwatchCallback(training_job="job", transport=transports.new(), probes=())

    def run(trainer):
        trainer.add_callback(callback)
        trainer.train()

    _, logged = trained(OfTheLogits, {}, {}, tmp_path, run=run)
    samples = [sample for sample in transports[-1].samples if not sample.closing]
    assert [sample.loss for sample in samples] == pytest.approx(logged, rel=1e-5)


@pytest.mark.parametrize(("kind", "probed"), [(Trainer, True), (OfTheLogits, False)])
def test_probes_run_on_the_models_own_loss_only_where_trainer_trains_on_it(transports, tmp_path, kind, probed):
    callback = SharpwatchCallback(training_job="job", transport=transports.new(), probe_every=2)
    trained(kind, {}, {}, tmp_path, run=train, callbacks=[callback])
    samples = transports[-1].samples
    assert any(sample.HasField("direction") for sample in samples) is probed
    reasons = {failure.probe: failure.reason for failure in samples[-1].health.probe_failures}
    assert reasons.get("direction") == (
        None if probed else "the loop does not train on the loss that the model returns: pass loss_fn"
    )
    # A mean square is told by its gradient and its value, which `train` shows.
    expected = "mean cross-entropy of logits, labels shifted by one" if probed else "mean square of logits"
    assert (samples[-1].health.objective, samples[-1].health.objective_state) == (expected, "verified")


def test_a_trainer_of_its_own_loss_is_probed_by_the_batch_that_it_observes(transports, tmp_path):
    class Observing(OfTheLogits):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            callback.watch.observe(batch=inputs)
            return super().compute_loss(model, inputs, return_outputs, **kwargs)

    def loss_fn(model, inputs):
        return model(**inputs).logits.square().mean()

    callback = SharpwatchCallback(training_job="job", transport=transports.new(), probe_every=2, loss_fn=loss_fn)
    _, logged = trained(Observing, {}, {}, tmp_path, run=train, callbacks=[callback])
    samples = transports[-1].samples
    assert [sample.loss for sample in samples if not sample.closing] == pytest.approx(logged, rel=1e-5)
    assert sum(sample.HasField("direction") for sample in samples) == STEPS // 2
    assert not samples[-1].health.probe_failures


def test_the_loss_of_direct_preference_optimization(transports, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizer = byte_tokenizer()
    pairs = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i)} for i in range(16)]
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA | {"vocab_size": 260, "max_position_embeddings": 64}))
    reference = copy.deepcopy(model)
    arguments = trl.DPOConfig(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[],
        use_cpu=True, bf16=False, save_strategy="no", logging_steps=1, disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    callback = SharpwatchCallback(training_job="job", transport=transports.new(), probe_every=1)
    trainer = trl.DPOTrainer(
        model, reference, args=arguments, train_dataset=datasets.Dataset.from_list(pairs), processing_class=tokenizer,
        callbacks=[callback],
    )  # fmt: skip
    train(trainer)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    samples = [sample for sample in transports[-1].samples if not sample.closing]
    assert [sample.loss for sample in samples] == pytest.approx(logged, rel=1e-4)
    assert samples[0].loss == pytest.approx(0.6931, abs=1e-3)  # ln 2, as long as the policy is the reference


def byte_tokenizer():
    """A tokenizer without download: a byte is a token."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"eos_token": "</s>", "pad_token": "<pad>"})
    return fast
