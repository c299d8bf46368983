"""A run in which one weight is damaged after step 300, as by a bit flip: for the tutorial in docs/operating.md."""

import torch
from tiny import gpt2, rows
from torch.utils.data import DataLoader

import sharpwatch

model = gpt2()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loader = DataLoader(rows(), batch_size=8, shuffle=True)

watch = sharpwatch.attach(model, optimizer, training_job="spike", run="spike", control="rollback")
checkpoints = sharpwatch.Checkpoints("runs/spike", model, optimizer, watch=watch, data=loader, keep=100)
damaged = False
for batch in checkpoints.batches(epochs=60):
    if checkpoints.step == 300 and not damaged:
        damaged = True
        with torch.no_grad():
            model.transformer.h[1].mlp.c_fc.weight[0, 0] = 300.0
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if checkpoints.step % 100 == 0:
        checkpoints.save()
        print(f"step {checkpoints.step}: loss {loss.item():.3f}", flush=True)
watch.close()
