"""A loop under Accelerate: attach after `prepare`, to what it returns. Run it with `accelerate launch` or python."""

import torch
from accelerate import Accelerator
from tiny import gpt2, rows
from torch.utils.data import DataLoader

# --8<-- [start:loop]
import sharpwatch

accelerator = Accelerator(gradient_accumulation_steps=2)
model = gpt2()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loader = DataLoader(rows(), batch_size=4, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

watch = sharpwatch.attach(model, optimizer, training_job="gpt2-accelerate", control="rollback", probe_every=10)
checkpoints = sharpwatch.Checkpoints("runs/accelerate", model, optimizer, watch=watch, data=loader)
checkpoints.resume()  # continues from the newest checkpoint, if there is one
for batch in checkpoints.batches(epochs=1):  # a rollback is done here, between two batches
    with accelerator.accumulate(model):
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    if accelerator.sync_gradients and checkpoints.step % 50 == 0:
        checkpoints.save()  # as the last thing of a step
watch.close()
# --8<-- [end:loop]
accelerator.end_training()
