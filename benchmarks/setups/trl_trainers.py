"""TRL's trainers for supervised fine-tuning and for preferences."""

from __future__ import annotations

import copy

from datasets import Dataset
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from benchmarks.setups import text
from benchmarks.setups.trainers import CAUSAL, arguments
from benchmarks.setups.trial import Trial
from benchmarks.setups.truth import Truth

_BLOCKS = "emb qk vo ffn norm head"


def _qwen2(vocabulary: int) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            tie_word_embeddings=False,
        )
    )


def trl_sft(trial: Trial) -> None:
    """SFTTrainer on prompts and completions, of which the completions alone are trained on."""
    tokenizer, pieces = text.tokenizer(), text.sentences(128)
    rows = [{"prompt": a, "completion": b} for a, b in zip(pieces[::2], pieces[1::2], strict=True)]
    trainer = SFTTrainer(
        _qwen2(len(tokenizer)),
        SFTConfig(**arguments(trial), max_length=48),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trial.run(trainer, blocks=_BLOCKS, truth=CAUSAL)


def trl_dpo(trial: Trial) -> None:
    """DPOTrainer: the loss is of two answers, under the model and under a copy of how it began."""
    tokenizer, pieces = text.tokenizer(), text.sentences(192)
    rows = [
        {"prompt": a, "chosen": b, "rejected": c}
        for a, b, c in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True)
    ]
    model = _qwen2(len(tokenizer))
    trainer = DPOTrainer(
        model,
        ref_model=copy.deepcopy(model),
        args=DPOConfig(**arguments(trial, max_steps=16, per_device_train_batch_size=4), max_length=64),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    # TRL's fused head can't be differentiated twice, so there is no truth but that there is no Gauss-Newton matrix.
    trial.run(trainer, blocks=_BLOCKS, truth=Truth(None))
