"""transformers' Trainer as its example scripts use it, and PEFT's LoRA on top."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, default_data_collator

from benchmarks.setups import text
from benchmarks.setups.trial import Trial
from benchmarks.setups.truth import Truth

GPT2_BLOCKS = "emb qk vo ffn norm other"  # positions are learned, the head is tied


def gpt2(**options: Any) -> GPT2LMHeadModel:
    """A GPT-2 with dropout."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=text.VOCABULARY,
            n_positions=text.LENGTH,
            n_embd=32,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
            **options,
        )
    )


def own_loss(model: Any, inputs: Any) -> Tensor:
    """The loss that a model of transformers returns."""
    return _call(model, inputs).loss


def next_token_logits(model: Any, inputs: Any) -> Tensor:
    """The logits of a causal model's positions that predict, [N, V]."""
    given = {name: value for name, value in inputs.items() if name != "labels"}
    logits, labels = _call(model, given).logits[:, :-1], inputs["labels"][:, 1:]
    return logits[labels != -100]


def _call(model: Any, inputs: Any) -> Any:
    """The forward of the class: of a copied model, the one that TRL put in its place calls the original."""
    return type(model).forward(model, **inputs)


CAUSAL = Truth(own_loss, next_token_logits)


def arguments(trial: Trial, **options: Any) -> dict[str, Any]:
    """What every Trainer is given here."""
    return {
        "output_dir": str(trial.folder),
        "max_steps": trial.steps,
        "per_device_train_batch_size": text.ROWS,
        "learning_rate": 1e-3,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1000,
        "disable_tqdm": True,
        "use_cpu": True,
        **options,
    }


def run_clm(trial: Trial) -> None:
    """transformers/examples/pytorch/language-modeling/run_clm.py: GPT-2, blocks of text whose labels are its inputs."""
    trainer = Trainer(
        gpt2(),
        TrainingArguments(**arguments(trial, gradient_accumulation_steps=1)),
        train_dataset=text.dataset(64),
        data_collator=default_data_collator,
    )
    trial.run(trainer, blocks=GPT2_BLOCKS, truth=CAUSAL)


def peft_lora(trial: Trial) -> None:
    """PEFT's LoRA on GPT-2's fused and plain projections, under Trainer."""
    config = LoraConfig(r=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    trainer = Trainer(
        get_peft_model(gpt2(), config),
        TrainingArguments(**arguments(trial)),
        train_dataset=text.dataset(64),
        data_collator=default_data_collator,
    )
    trial.run(trainer, blocks="qk vo ffn", truth=CAUSAL)
