"""Lightning: a callback watches, and `fit` can also go back to a checkpoint."""

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import gpt2, rows
from torch.utils.data import DataLoader

# --8<-- [start:fit]
from sharpwatch.integrations.lightning import SharpwatchCallback, fit


class LanguageModel(LightningModule):
    """A GPT-2 that trains on its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = gpt2()

    def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the loss of one batch."""
        return self.transformer(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Train all parameters with AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


saving = ModelCheckpoint("runs/lightning", every_n_train_steps=20, save_top_k=-1)
watching = SharpwatchCallback(training_job="gpt2-lightning", probe_every=10)
trainer = Trainer(max_steps=60, callbacks=[watching, saving], logger=False, enable_progress_bar=False)
fit(trainer, LanguageModel(), DataLoader(rows(), batch_size=8, shuffle=True))  # in place of trainer.fit()
# --8<-- [end:fit]
