"""The batch that a training loop shows by `watch.observe(batch=...)`, held until the probe after its step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.curvature.objective.nested import map_tensors
from sharpwatch.errors import ProbeError

LATE = (
    "observe(batch=...) came after optimizer.step(), but probes run within it: call observe between backward and step"
)


class ObservedBatch:
    """References to the tensors of a batch, without their graphs; nothing is copied.

    Args:
        value: The nest that the loop observed; what is put into or taken out of its containers later does not count.
        late: It came after the step that a probe was due after, so there is nothing to probe.
    """

    def __init__(self, value: Any, *, late: bool = False) -> None:
        self._late = late
        held = None if late else map_tensors(value, lambda tensor, _: tensor.detach())
        self._batch = Batch((held,), observed=True)
        self._versions = [_version(tensor) for tensor in self._batch.tensors()]

    def take(self) -> Batch:
        """The batch as it was observed.

        Raises:
            ProbeError: It came too late, or the loop has written into one of its tensors since.
        """
        if self._late:
            raise ProbeError(LATE)
        if [_version(tensor) for tensor in self._batch.tensors()] != self._versions:
            raise ProbeError(
                "the batch given to observe() was changed in place before optimizer.step(): give observe() a copy"
            )
        return self._batch


def _version(tensor: Tensor) -> int:
    # Tensors made in inference mode have no version; autograd could not have used them either.
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001 - as torch's own documentation of in-place checks
