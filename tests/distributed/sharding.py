"""Small real models, sharded in the ways that people train with."""

from __future__ import annotations

from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)


def by_fsdp(model, mesh, **options):
    """Each layer by itself, then the rest, as the documentation of `fully_shard` has it."""
    inner = next(module for module in model.modules() if hasattr(module, "layers") or hasattr(module, "h"))
    for layer in inner.layers if hasattr(inner, "layers") else inner.h:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def by_tensor_parallelism(model, mesh):
    """A LLaMA: heads and hidden units over ranks, the sequence where norms are, the vocabulary at the end."""
    whole = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    into = PrepareModuleInput(
        input_kwarg_layouts={"hidden_states": Shard(1)}, desired_input_kwarg_layouts={"hidden_states": Replicate()}
    )
    sequence = SequenceParallel(use_local_output=True)
    plan = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "model.norm": sequence,
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
    }
    for number in range(len(model.model.layers)):
        plan |= {
            f"model.layers.{number}.{name}": style
            for name, style in {
                "input_layernorm": sequence,
                "self_attn": into,
                "self_attn.q_proj": ColwiseParallel(),
                "self_attn.k_proj": ColwiseParallel(),
                "self_attn.v_proj": ColwiseParallel(),
                "self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1)),
                "post_attention_layernorm": sequence,
                "mlp": whole,
                "mlp.gate_proj": ColwiseParallel(),
                "mlp.up_proj": ColwiseParallel(),
                "mlp.down_proj": RowwiseParallel(output_layouts=Shard(1)),
            }.items()
        }
    return parallelize_module(model, mesh, plan)
