"""Which parameters make up a block, for libraries that take whole parameters."""

from __future__ import annotations

from torch import nn

from sharpwatch import classify


def parameters_of(model: nn.Module) -> dict[str, list[str]]:
    """Parameter names of `split_fused(model)` by block, as sharpwatch divides `model`.

    A fused query-key-value parameter is two in the copy: query and key first, then value.
    """
    blocks: dict[str, list[str]] = {}
    for part in classify(model).parts:
        name = part.parameter
        if part.dim is not None:
            module, tensor = name.rsplit(".", 1)
            half = {"qk": 0, "vo": 1}[part.type]
            name = f"{module}.parametrizations.{tensor}.original{half}"
        names = blocks.setdefault(part.type, [])
        if name not in names:
            names.append(name)
    return {block: blocks[block] for block in classify(model).blocks}
