"""Full float32 precision: torch rounds to fewer bits nowhere, for the time of a measurement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def float32_exact() -> Iterator[None]:
    """Set torch's precision of float32 products and convolutions to full during the body."""
    settings = _settings()
    with ExitStack() as stack:
        for owner, name, _ in settings:
            stack.callback(setattr, owner, name, getattr(owner, name))
        _exact_flag_of_cudnn(stack)
        for owner, name, exact in settings:
            setattr(owner, name, exact)
        yield


def _exact_flag_of_cudnn(stack: ExitStack) -> None:
    """Set cuDNN's older flag too, until `stack` unwinds.

    `torch.backends.cudnn.flags`, under which a model's forward may run, reads it, and raises where it differs from the
    newer settings. Setting it changes those as well, so they are set after it, and put back after it.
    """
    cudnn = torch.backends.cudnn
    try:
        flag = cudnn.allow_tf32
    except RuntimeError:
        return  # the user has set the newer ones so that they differ: a forward under `flags` can't run anyway
    stack.callback(setattr, cudnn, "allow_tf32", flag)
    cudnn.allow_tf32 = False


def _settings() -> list[tuple[Any, str, Any]]:
    """The settings that let torch round float32 to fewer bits, as (object, attribute, exact value).

    From torch 2.9 on they are called `fp32_precision`; reading the older flags then raises if a user has set the new
    ones.
    """
    backends = torch.backends
    if hasattr(backends.cuda.matmul, "fp32_precision"):
        candidates = [
            getattr(getattr(backends, kind), of, None) for kind in ("cudnn", "mkldnn") for of in ("conv", "rnn")
        ]
        candidates += [backends.cuda.matmul, getattr(backends.mkldnn, "matmul", None)]
        return [(owner, "fp32_precision", "ieee") for owner in candidates if hasattr(owner, "fp32_precision")]
    return [(backends.cuda.matmul, "allow_tf32", False)]
