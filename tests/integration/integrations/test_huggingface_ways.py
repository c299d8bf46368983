"""What users do with Trainer, and what a rollback makes of it: nothing else than a restart by hand would."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from sharpwatch.integrations.huggingface import SharpwatchCallback, train
from sharpwatch.v1 import types_pb2

ROWS = torch.randint(64, (24, 16), generator=torch.Generator().manual_seed(1))  # twelve batches of 2
APPLIED, FAILED, REFUSED = "applied", "failed", "refused"


class PerRow(GPT2LMHeadModel):
    """A loss for each row; the loop takes their mean."""

    def forward(self, input_ids=None, labels=None, **_):
        output = super().forward(input_ids=input_ids)
        each = torch.nn.functional.cross_entropy(output.logits.transpose(1, 2), labels, reduction="none")
        return {"logits": output.logits, "loss": each.mean(1)}


class MeanOfRows(Trainer):
    def compute_loss(self, model, inputs, **_):
        return model(**inputs)["loss"].mean()


class NoLength(Trainer):
    def get_train_dataloader(self):
        loader = super().get_train_dataloader()

        class Batches:
            def __iter__(self):
                yield from loader

        return Batches()


class OwnOrder(Trainer):
    def get_train_dataloader(self):
        generator = torch.Generator().manual_seed(2)
        return DataLoader(self.train_dataset, 2, shuffle=True, generator=generator, collate_fn=self.data_collator)


class Seen(TrainerCallback):
    """The weights after each step, the newest; orders a rollback in the step of each plan."""

    def __init__(self, transports, plans):
        self.weights, self._transports, self._plans = {}, transports, list(plans)

    def on_step_begin(self, args, state, _control, **_):
        if self._plans and self._plans[0][0] == state.global_step + 1:
            _, to, skip = self._plans.pop(0)
            checkpoint = types_pb2.Checkpoint(step=to, uri=str(Path(args.output_dir).resolve() / f"checkpoint-{to}"))
            target = types_pb2.Rollback(checkpoint=checkpoint, skip_from_step=skip[0], skip_to_step=skip[1])
            self._transports[-1].command(id=f"back-{to}", rollback=target)

    def on_step_end(self, _args, state, _control, model, **_):
        values = b"".join(value.detach().numpy().tobytes() for value in model.parameters())
        self.weights[state.global_step] = hashlib.sha256(values).hexdigest()


class SeedsInStepThree(TrainerCallback):
    def on_step_end(self, _args, state, _control, **_):
        if state.global_step == 3:
            torch.manual_seed(123)


class RaisesOnceBack(TrainerCallback):
    begun = 0

    def on_train_begin(self, *_, **__):
        self.begun += 1
        if self.begun > 1:
            raise RuntimeError("a user's own")


def transformer(kind=GPT2LMHeadModel):
    torch.manual_seed(0)
    return kind(
        GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    )


def anew():
    return transformer()


@pytest.fixture
def made(tmp_path, transports):
    """Make a Trainer of eight steps; returns it and what is seen of it."""
    runs = iter(range(100))

    def make(*plans, watched=True, kind=Trainer, model=transformer, callbacks=(), **options):
        seen = Seen(transports, plans)
        given = {"model_init": options.pop("model_init", None)}
        folder = options.pop("folder", tmp_path / str(next(runs)))
        arguments = {"max_steps": 8, "save_steps": 2, "per_device_train_batch_size": 2, "seed": 7, **options}
        args = TrainingArguments(
            str(folder), report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=5e-3, **arguments
        )
        data = [{"input_ids": row, "labels": row} for row in ROWS]
        model = None if given["model_init"] else model()
        trainer = kind(model, args, train_dataset=data, callbacks=[seen, *callbacks], **given)
        trainer.remove_callback(PrinterCallback)
        if watched:
            trainer.add_callback(SharpwatchCallback(training_job="ways", transport=transports.new()))
        return trainer, seen

    return make


def outcomes(transports):
    return [result.outcome for transport in transports for result in transport.results]


WAYS = {
    "noise on embeddings": {"neftune_noise_alpha": 5.0},
    "a callback that seeds": {"callbacks": [SeedsInStepThree()]},
    "a model made anew": {"model_init": anew},
}


@pytest.mark.parametrize("way", WAYS)
def test_going_back_brings_the_same_steps_again_and_is_reported_once(made, transports, way):
    trainer, plain = made(watched=False, **WAYS[way])
    trainer.train()
    trainer, watched = made((6, 4, (0, 0)), **WAYS[way])
    train(trainer)
    assert watched.weights == plain.weights
    assert outcomes(transports) == [APPLIED]
    assert len({hello.run for transport in transports for hello in transport.hellos}) == 1


@pytest.mark.parametrize(
    ("reason", "options"),
    [
        ("dataset that has a length", {"kind": NoLength}),
        ("the sampler has no set_epoch", {"kind": OwnOrder}),
        ("the sampler has no set_epoch", {"train_sampling_strategy": "group_by_length"}),
        ("ignore_data_skip", {"ignore_data_skip": True}),
    ],
)
def test_data_whose_place_cannot_be_found_again_is_not_skipped(made, transports, caplog, reason, options):
    trainer, plain = made(watched=False, **options)
    trainer.train()
    trainer, watched = made((6, 4, (5, 6)), **options)
    train(trainer)
    assert watched.weights == plain.weights
    assert outcomes(transports) == [REFUSED]  # and not failed: the checkpoint is good
    assert reason in caplog.text


def test_a_checkpoint_that_was_undone_is_no_place_to_go_to(made, transports, caplog):
    class NotAgain(TrainerCallback):
        times = 0

        def on_step_end(self, _args, state, control, **_):
            self.times += state.global_step == 4
            control.should_save &= self.times < 2 or state.global_step != 4

    trainer, seen = made((5, 2, (3, 4)), (5, 4, (0, 0)), callbacks=[NotAgain()])
    train(trainer)
    assert outcomes(transports) == [APPLIED, FAILED]
    assert "checkpoint-4 was undone by a rollback" in caplog.text
    assert max(seen.weights) == 8


def test_losses_that_are_no_one_number_do_not_end_the_training(made, transports):
    options = {
        "kind": MeanOfRows,
        "model": lambda: transformer(PerRow),
        "per_device_train_batch_size": 5,  # the last of an epoch is of 4 rows, and no sum with others
        "gradient_accumulation_steps": 5,
    }
    trainer, plain = made(watched=False, **options)
    trainer.train()
    trainer, watched = made(**options)
    trainer.train()
    assert watched.weights == plain.weights
    assert transports[0].samples[-1].health.swallowed_errors == 0


def test_a_path_is_resumed_without_what_was_left_out(made, tmp_path):
    trainer, whole = made((6, 4, (5, 6)))
    train(trainer)
    trainer, again = made()
    train(trainer, resume_from_checkpoint=tmp_path / "0" / "checkpoint-6")
    assert again.weights == {step: whole.weights[step] for step in (7, 8)}


def test_a_second_training_takes_what_the_first_left_out(made):
    trainer, watched = made((8, 6, (7, 8)), model_init=anew)
    train(trainer)
    first = dict(watched.weights)
    train(trainer)
    assert watched.weights != first
    trainer, plain = made(watched=False, model_init=anew)
    trainer.train()
    assert watched.weights == plain.weights


def test_an_error_on_the_way_back_is_raised_and_reported(made, transports):
    trainer, _ = made((6, 4, (5, 6)), callbacks=[RaisesOnceBack()])
    with pytest.raises(RuntimeError, match="a user's own"):
        train(trainer)
    (result,) = transports[0].results
    assert (result.outcome, result.detail) == (FAILED, "RuntimeError: a user's own")
    assert transports[0].closed
    assert not any(sample.closing for sample in transports[0].samples)  # no goodbye: it did not end in order
    assert "get_train_dataloader" not in vars(trainer)


def test_without_train_a_rollback_is_refused_and_training_goes_on(made, transports):
    trainer, plain = made(watched=False)
    trainer.train()
    trainer, watched = made((6, 4, (5, 6)), watched=False)
    trainer.add_callback(SharpwatchCallback(training_job="ways", transport=transports.new(), control="rollback"))
    trainer.train()
    assert watched.weights == plain.weights
    assert outcomes(transports) == [REFUSED]


def news(transports):
    """The names of the checkpoints that were saved, and of those that were deleted."""
    samples = [sample for transport in transports for sample in transport.samples]
    saved = [Path(checkpoint.uri).name for sample in samples for checkpoint in sample.checkpoints]
    return saved, [Path(uri).name for sample in samples for uri in sample.deleted_checkpoints]


def test_what_trainer_deletes_is_told_also_of_an_earlier_training(made, transports, tmp_path):
    trainer, _ = made(save_total_limit=2, folder=tmp_path / "runs")
    train(trainer)
    assert news(transports) == ([f"checkpoint-{step}" for step in (2, 4, 6, 8)], ["checkpoint-2", "checkpoint-4"])
    transports.clear()
    trainer, _ = made(save_total_limit=2, folder=tmp_path / "runs", max_steps=12)
    train(trainer, resume_from_checkpoint=True)
    assert news(transports) == (["checkpoint-10", "checkpoint-12"], ["checkpoint-6", "checkpoint-8"])


class Deletes(TrainerCallback):
    """Deletes a checkpoint by hand, or a file of it, while training."""

    def __init__(self, name):
        self._name = name

    def on_step_begin(self, args, state, _control, **_):
        if state.global_step == 5:
            path = Path(args.output_dir, self._name)
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("checkpoint-4", "checkpoint-4 does not exist any more"),
        ("checkpoint-4/optimizer.pt", "checkpoint-4 lacks optimizer.pt"),
    ],
)
def test_a_checkpoint_that_was_deleted_by_hand_is_refused_and_training_goes_on(made, transports, name, reason):
    trainer, plain = made(watched=False)
    trainer.train()
    trainer, watched = made((6, 4, (0, 0)), callbacks=[Deletes(name)])
    train(trainer)
    assert watched.weights == plain.weights
    (result,) = transports[0].results
    assert (result.outcome, result.detail.endswith(reason)) == (FAILED, True)
