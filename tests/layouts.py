"""Small models with each layout of outputs and rows, trained on several tasks; exact traces by the definition of G."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

INPUTS, CLASSES, LENGTH, WIDTH = 9, 5, 6, 8
LAYOUTS = ("batch first", "time first", "channels second", "flattened", "rows")
TASKS = ("shifted", "masked", "regression")


class Net(nn.Module):
    """A causal model whose outputs depend on the position; the loss is its own, or left to the loop.

    Args:
        layout: One of `LAYOUTS`.
        task: One of `TASKS`.
        own_loss: Whether it returns its loss when called with targets.
    """

    def __init__(self, layout: str, task: str, *, own_loss: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.layout, self.task, self.own_loss = layout, task, own_loss
        self.emb = nn.Embedding(INPUTS, WIDTH)
        self.pos = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.head = nn.Linear(WIDTH, 1 if (layout, task) == ("rows", "regression") else CLASSES)

    def forward(self, x, targets=None):
        ids = x.T if self.layout == "time first" else x
        steps = torch.arange(1, ids.shape[1] + 1)
        hidden = (self.emb(ids) + self.pos[: ids.shape[1]]).tanh().cumsum(1) / steps[:, None]
        if self.layout == "rows":
            logits = self.head(hidden[:, -1])
            logits = logits[:, 0] if logits.shape[1] == 1 else logits
        else:
            logits = self.laid_out(self.head(hidden))
        if targets is None or not self.own_loss:
            return logits
        return {"loss": self.loss(logits, targets), "logits": logits}

    def laid_out(self, logits):
        """Logits [B, T, V] as the model returns them."""
        match self.layout:
            case "time first":
                return logits.transpose(0, 1)
            case "channels second":
                return logits.transpose(1, 2)
            case "flattened":
                return logits.flatten(0, 1)
        return logits

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of outputs, as a loop would write it."""
        if self.task == "regression":
            return functional.mse_loss(outputs, targets.view(outputs.shape))
        if self.layout == "rows":
            return functional.cross_entropy(outputs, targets)
        if self.task == "masked":
            outputs = outputs if self.layout == "channels second" else outputs.reshape(-1, CLASSES)
            return functional.cross_entropy(outputs, targets.reshape(outputs.shape[0], *outputs.shape[2:]))
        match self.layout:
            case "time first":
                outputs, targets = outputs.transpose(0, 1), targets.T
            case "channels second":
                outputs = outputs.transpose(1, 2)
            case "flattened":
                outputs = outputs.view(*targets.shape, CLASSES)
        return functional.cross_entropy(outputs[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


def batch_of(model: Net, rows: int = 4, seed: int = 1) -> dict[str, Tensor]:
    """Inputs and targets of `rows` rows."""
    source = torch.Generator().manual_seed(seed)
    x = torch.randint(INPUTS, (rows, LENGTH), generator=source)
    shape = (rows,) if model.layout == "rows" else (rows, LENGTH)
    targets = torch.randint(CLASSES, shape, generator=source)
    if model.task == "masked":
        targets[torch.rand(shape, generator=source) < 0.4] = -100
        targets.view(-1)[0] = 1
    time_first = model.layout == "time first"
    x, targets = (x.T, targets.T) if time_first and targets.dim() > 1 else (x, targets)
    if model.task == "regression":
        shape = (rows, LENGTH, CLASSES) if model.layout == "flattened" else model(x).shape
        targets = torch.randn(shape, generator=source)
    return {"x": x.contiguous(), "targets": targets.contiguous()}


def exact_trace(model: nn.Module, loss, *outputs: Tensor) -> float:
    """Tr(Jᵀ (∂²L/∂z²) J) at `outputs`, which have their graph; `loss` is a function of them."""
    sizes = [output.numel() for output in outputs]

    def of_entries(entries: Tensor) -> Tensor:
        return loss(*(part.view_as(output) for part, output in zip(entries.split(sizes), outputs, strict=True)))

    entries = torch.cat([output.reshape(-1) for output in outputs])
    hessian = torch.autograd.functional.hessian(of_entries, entries.detach())
    parameters = [each for each in model.parameters() if each.requires_grad]
    rows = []
    for entry in entries:
        found = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(found, parameters, strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]))
    jacobian = torch.stack(rows)
    return float(((hessian @ jacobian) * jacobian).sum())
