"""torchtitan's own trainer, watched and able to roll back. Takes the options of torchtitan's train.py."""

from __future__ import annotations

# --8<-- [start:class]
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torchtitan.config import ConfigManager
from torchtitan.tools.logging import init_logger
from torchtitan.trainer import Trainer

import sharpwatch


class Watched(Trainer):
    """A trainer with a watch. It is built where train.py says `config.build()`."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.watch = self.batches = None
        self.saved: dict[str, Any] = {}  # the agent's state
        self.left_out: set[int] = set()  # steps of the data, counted from 1
        self.loss: Any = 0.0

    def data_step(self, step: int) -> int:
        """Return the step of the data that optimizer step `step` takes."""
        for left_out in sorted(self.left_out):
            step += left_out <= step
        return step

    def batch_generator(self, data: Any) -> Iterator[Any]:
        """Yield the batches, without those that a rollback left out."""
        size = self.gradient_accumulation_steps * self.num_pipeline_parallel_microbatches
        while True:
            if self.batches is None:  # at the start, and after a rollback: the loader is at its checkpoint's position
                self.batches, taken = super().batch_generator(data), size * self.data_step(self.step - 1)
            batch = next(self.batches)
            if taken // size + 1 not in self.left_out:
                yield batch
            taken += 1

    def forward_backward_step(self, **kwargs: Any) -> torch.Tensor:
        """Run one micro-batch, and add up its loss."""
        loss = super().forward_backward_step(**kwargs)
        self.loss = self.loss + loss.detach()
        return loss

    def train_step(self, data_iterator: Any) -> None:
        """Do a pending rollback, then one step."""
        if self.watch is None:  # the checkpoint has been loaded by now
            self.attach()
        request = self.watch.pending_rollback
        if request is not None:
            self.roll_back(request)
        super().train_step(data_iterator)
        dims, loss, self.loss = self.parallel_dims, self.loss, 0.0
        self.watch.observe(loss=loss * (dims.dp_replicate * dims.dp_shard * dims.cp))  # a rank's part of a mean
        if self.config.checkpoint.enable and self.step % self.config.checkpoint.interval == 0:
            path = Path(self.checkpointer.folder, f"step-{self.step}")
            self.watch.saved_checkpoint(self.step, str(path.resolve()))

    def attach(self) -> None:
        """Attach, and load what the checkpoint holds of an earlier attempt."""
        self.watch = sharpwatch.attach(
            self.model_parts[0],
            self.optimizers.optimizers,  # the real ones: the container's own step() has no hooks
            training_job="llama3-8b",
            initial_step=self.step - 1,
            control="rollback",
            logits_fn=self.logits,
        )
        self.watch.load_state_dict(self.saved)
        if self.config.checkpoint.enable and self.noted.exists():
            self.left_out = set(json.loads(self.noted.read_text()))

    def roll_back(self, request: sharpwatch.RollbackRequest) -> None:
        """Load the checkpoint that the request names, and leave out the data that it names."""
        self.checkpointer.maybe_wait_for_saving()
        folder = Path(self.checkpointer.folder)
        if not (folder / request.uri / ".metadata").exists():
            self.watch.rollback_failed(f"{request.uri}: not there any more")
            return
        self.left_out = self.left_out | {self.data_step(step) for step in range(*request.skip)}
        self.checkpointer.load(step=request.step)
        self.batches = None
        if torch.distributed.get_rank() == 0:  # a restart would take the newest, so undone checkpoints must go
            for path in folder.glob("step-*"):
                if int(path.name.removeprefix("step-")) > request.step:
                    shutil.rmtree(path)
            self.noted.write_text(json.dumps(sorted(self.left_out)))
        self.watch.restored(self.step)
        self.step += 1

    @property
    def noted(self) -> Path:
        """The file that notes the data left out, beside the checkpoints."""
        return Path(self.checkpointer.folder, "left_out.json")

    def state_dict(self) -> dict[str, Any]:
        """Return torchtitan's state with the agent's, as text: the entries of the agent's state may change."""
        state = self.saved if self.watch is None else self.watch.state_dict()
        return {**super().state_dict(), "sharpwatch": json.dumps(state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load torchtitan's state, and keep the agent's for `attach`."""
        super().load_state_dict(state)
        self.saved = json.loads(state["sharpwatch"])

    def logits(self, call: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits for probes: training calls the model without its head, and with a mask for all rows."""
        model = self.model_parts[0]
        masks = model.get_attention_masks(positions=batch.kwargs["positions"])
        skip, model._skip_lm_head = model._skip_lm_head, False  # noqa: SLF001 - there is no public way
        try:
            logits = call(*batch.args, **{**batch.kwargs, "attention_masks": masks})
        finally:
            model._skip_lm_head = skip  # noqa: SLF001
        return logits, torch.ones(logits.shape[:-1], dtype=torch.bool)

    def close(self) -> None:
        """Close the watch with the trainer."""
        if self.watch is not None:
            self.watch.close()
        super().close()


# --8<-- [end:class]


def main() -> None:
    """Train as torchtitan's train.py does."""
    init_logger()
    trainer = Watched(ConfigManager().parse_args())
    try:
        trainer.train()
    finally:
        trainer.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
