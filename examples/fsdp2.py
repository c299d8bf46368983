"""FSDP2: torchrun --nproc-per-node 2 examples/fsdp2.py."""

import torch
import torch.distributed as dist
from tiny import gpt2, rows
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

# --8<-- [start:loop]
import sharpwatch

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
device = torch.device("cuda", dist.get_node_local_rank()) if torch.cuda.is_available() else torch.device("cpu")
mesh = init_device_mesh(device.type, (dist.get_world_size(),))
model = gpt2().to(device)
for layer in model.transformer.h:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # after sharding
data = rows()
loader = DataLoader(data, batch_size=4, sampler=DistributedSampler(data))

watch = sharpwatch.attach(model, optimizer, training_job="gpt2-fsdp2", control="rollback", probe_every=10)
checkpoints = sharpwatch.Checkpoints("runs/fsdp2", model, optimizer, watch=watch, data=loader)
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
