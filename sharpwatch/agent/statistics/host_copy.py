"""Numbers on their way from a device to the host, so that nothing waits for them."""

from __future__ import annotations

import torch
from torch import Tensor


class AsyncHostCopy:
    """A copy of `tensor` on the host, made without waiting for the device. Poll `ready`, then call `read`."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = tensor.detach()
        if tensor.device.type == "cuda":
            # Pinned, or CUDA would make the copy wait for the device.
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            self._host.copy_(tensor.detach(), non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(tensor.device))

    @property
    def ready(self) -> bool:
        """Whether `read` would return at once."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def read(self) -> Tensor:
        """The tensor on the CPU; waits until it has arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.cpu()


Number = float | AsyncHostCopy


def copied(value: float | Tensor | None) -> Number:
    """`value` as a number, or as a host copy if it is on a device; 0 for None."""
    if isinstance(value, Tensor):
        return AsyncHostCopy(value) if value.device.type != "cpu" else float(value.detach())
    return 0.0 if value is None else float(value)


def number(value: Number) -> float:
    """The number itself; waits until it has arrived."""
    return float(value.read()) if isinstance(value, AsyncHostCopy) else value


def is_ready(value: Number) -> bool:
    """Whether `number` would return at once."""
    return not isinstance(value, AsyncHostCopy) or value.ready
