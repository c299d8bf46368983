"""Fine-tuning with TRL and LoRA: the callback of Hugging Face's Trainer."""

from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import pad
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

# --8<-- [start:import]
from sharpwatch.integrations.huggingface import SharpwatchCallback, train

# --8<-- [end:import]

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
)
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # a tokenizer without download: a byte is a token
tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
fast.add_special_tokens({"eos_token": "</s>", "pad_token": "<pad>"})
dataset = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows(400)])


# --8<-- [start:train]
def logits(model: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits and which positions predict: in training, TRL's forward computes a loss without logits."""
    output = model(*batch.args, **{**batch.kwargs, "labels": None, "fused_lm_head": False})
    return output.logits, pad(batch.kwargs["labels"][:, 1:] != -100, (0, 1))


def loss(model: Any, batch: Any) -> torch.Tensor:
    """Return the loss that is trained on: TRL computes it outside of the model, which returns its like."""
    return model(*batch.args, **batch.kwargs).loss


trainer = SFTTrainer(
    model,
    SFTConfig(
        "runs/trl",
        per_device_train_batch_size=8,
        bf16=torch.cuda.is_available(),
        max_steps=40,
        save_steps=20,
        report_to="none",
    ),
    train_dataset=dataset,
    processing_class=fast,
    peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    callbacks=[SharpwatchCallback(training_job="llama-lora", probe_every=10, loss_fn=loss, logits_fn=logits)],
)
train(trainer)  # in place of trainer.train()
# --8<-- [end:train]
