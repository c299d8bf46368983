"""The demo's transformers: Hugging Face's own classes at a size that two cores can train."""

from __future__ import annotations

from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

LENGTH = 128  # tokens in a row
ROWS = 8  # rows in a batch


def build(name: str, vocabulary: int) -> nn.Module:
    """`gpt2` (fused QKV, tied head, dropout) or `llama` (grouped queries, RMSNorm, own head), freshly initialised."""
    if name == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary,
                n_positions=LENGTH,
                n_embd=128,
                n_layer=4,
                n_head=4,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
