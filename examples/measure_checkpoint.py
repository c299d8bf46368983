"""Measure a checkpoint once: no daemon, no training run. The command line does the same: sharpwatch measure."""

import tempfile

import torch
from tiny import gpt2, rows
from transformers import AutoModelForCausalLM

with tempfile.TemporaryDirectory() as checkpoint:
    gpt2().save_pretrained(checkpoint)  # stands for a checkpoint of yours

    # --8<-- [start:measure]
    import sharpwatch

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = torch.stack([row["input_ids"] for row in rows(8)])
    report = sharpwatch.measure(model, [{"input_ids": ids, "labels": ids}], draws=4)
    print(report)
    print("trace per parameter of qk:", report.blocks["qk"].sharpness)
    # --8<-- [end:measure]
