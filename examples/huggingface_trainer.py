"""Hugging Face's Trainer: a callback watches, and `train` can also go back to a checkpoint."""

from tiny import gpt2, rows
from transformers import Trainer, TrainingArguments

# --8<-- [start:train]
from sharpwatch.integrations.huggingface import SharpwatchCallback, train

trainer = Trainer(
    gpt2(),
    TrainingArguments(
        "runs/huggingface",
        per_device_train_batch_size=8,
        max_steps=60,
        save_steps=20,  # a rollback can go to each of these checkpoints
        report_to="none",
    ),
    train_dataset=rows(),
    callbacks=[SharpwatchCallback(training_job="gpt2-trainer", probe_every=10)],
)
train(trainer)  # in place of trainer.train(); takes the same arguments
# --8<-- [end:train]
