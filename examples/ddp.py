"""DistributedDataParallel: torchrun --nproc-per-node 2 examples/ddp.py."""

import torch
import torch.distributed as dist
from tiny import gpt2, rows
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

# --8<-- [start:loop]
import sharpwatch

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
device = torch.device("cuda", dist.get_node_local_rank()) if torch.cuda.is_available() else torch.device("cpu")
model = DistributedDataParallel(gpt2().to(device))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
data = rows()
loader = DataLoader(data, batch_size=4, sampler=DistributedSampler(data))

# On every rank, with the same arguments, after the model is wrapped and the optimizer made.
watch = sharpwatch.attach(model, optimizer, training_job="gpt2-ddp", control="rollback", probe_every=10)
checkpoints = sharpwatch.Checkpoints("runs/ddp", model, optimizer, watch=watch, data=loader)  # a folder all ranks share
checkpoints.resume()
for batch in checkpoints.batches(epochs=1):
    loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if checkpoints.step % 50 == 0:
        checkpoints.save()
watch.close()
# --8<-- [end:loop]
dist.destroy_process_group()
