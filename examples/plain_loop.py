"""A plain PyTorch loop with checkpoints that a rollback can go back to."""

import torch
from tiny import gpt2, rows
from torch.utils.data import DataLoader

# --8<-- [start:import]
import sharpwatch

# --8<-- [end:import]

model = gpt2()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.999**step)
loader = DataLoader(rows(), batch_size=8, shuffle=True)

# --8<-- [start:loop]
watch = sharpwatch.attach(model, optimizer, training_job="gpt2-owt", control="rollback")
checkpoints = sharpwatch.Checkpoints("runs/gpt2-owt", model, optimizer, watch=watch, data=loader, scheduler=scheduler)
checkpoints.resume()  # continues from the newest checkpoint, if there is one
for batch in checkpoints.batches(epochs=3):  # a rollback is done here, between two batches
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    if checkpoints.step % 100 == 0:
        checkpoints.save()  # as the last thing of a step
watch.close()
# --8<-- [end:loop]
