"""A run that is taken up from its checkpoint is the same run: to the daemon, and in what is in force."""

from __future__ import annotations

import contextlib
import json
import os
import signal

from forked import TORCHRUN, ForkedProcess

# Trains under whatever world size it is started with, a checkpoint after every step; tells the groups of each step.
SCRIPT = """
import json, os, sys, threading, torch, torch.distributed as dist, sharpwatch
from transformers import LlamaConfig, LlamaForCausalLM
path = sys.argv[1]
several = "RANK" in os.environ
if several:
    dist.init_process_group("gloo")
torch.manual_seed(0)
plain = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16, bos_token_id=0, eos_token_id=0))
model = torch.nn.parallel.DistributedDataParallel(plain) if several else plain
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
watch = sharpwatch.attach(model, optimizer, training_job="resumed", probe_every=2)
rank = dist.get_rank() if several else 0
lost = rank == 1 and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
if os.path.exists(path):
    saved = torch.load(path)
    plain.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    watch.load_state_dict(saved["sharpwatch"])
groups = []
inner = optimizer._init_group
def init_group(group, *arguments, **options):  # inside step() and all hooks
    if group is optimizer.param_groups[0]:
        groups.append(sorted(g["lr"] for g in optimizer.param_groups))
    return inner(group, *arguments, **options)
optimizer._init_group = init_group
ids = torch.randint(32, (4, 8))
while True:
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    state = watch.state_dict()
    if rank == 0:
        torch.save({"model": plain.state_dict(), "optimizer": optimizer.state_dict(), "sharpwatch": state}, path + "~")
        os.replace(path + "~", path)
        world = dist.get_world_size() if several else 1
        print(json.dumps({"step": watch.step, "run": watch.run, "rates": groups[-1], "world": world}), flush=True)
    if lost and watch.step == 5:
        os._exit(3)
    threading.Event().wait(0.02)
"""


def start(folder, daemon, *torchrun):
    path = folder / "train.py"
    path.write_text(SCRIPT)
    environment = {
        "OMP_NUM_THREADS": "1",
        "SHARPWATCH_ADDRESS": daemon.grpc,
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    options = {"env": os.environ | environment, "start_new_session": True}
    if torchrun:
        arguments = (*torchrun, str(path), str(folder / "run.pt"))
        return ForkedProcess(TORCHRUN, arguments=arguments, **options)
    return ForkedProcess(path=path, arguments=(str(folder / "run.pt"),), **options)


def end(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.close()


def lines(process):
    for line in process.stdout:
        if line.startswith("{"):
            yield json.loads(line)


def known(daemon, entries):
    """The run, once it has taken a step after which the daemon knows it."""
    return next(entry["run"] for entry in entries if entry["run"] in daemon.get("/metrics"))


def test_a_new_process_goes_on_as_the_same_run_with_what_was_in_force(daemon, tmp_path):
    first = start(tmp_path, daemon)
    entries = lines(first)
    run = known(daemon, entries)
    decision = daemon.cli("lr", "set", run, "emb=0.5")
    before = next(entry for entry in entries if entry["step"] >= decision["applied_step"])
    assert before["rates"] == [0.5e-3, 1e-3]
    end(first)

    second = start(tmp_path, daemon)
    after = next(lines(second))
    assert after["run"] == run
    assert after["step"] > before["step"]
    assert after["rates"] == [0.5e-3, 1e-3]  # from its first step on, before the daemon has sent anything
    assert daemon.cli("lr", "set", run, "emb=0.4")["outcome"] == "applied"
    end(second)
    jobs = daemon.cli("jobs")["runs"]
    assert [(each["run"], each["attempts"]) for each in jobs] == [(run, 2)]


def test_torchrun_goes_on_as_the_same_run_after_a_rank_was_lost_and_with_fewer(daemon, tmp_path):
    job = start(tmp_path, daemon, "--standalone", "--nproc-per-node=2", "--max-restarts=1")
    entries = lines(job)
    run = known(daemon, entries)
    step = next(entry["step"] for entry in entries if entry["step"] > 5)  # its second rank dies after step 5, once
    job.terminate()
    job.wait()
    for _ in entries:
        pass

    alone = start(tmp_path, daemon)
    after = next(entry for entry in lines(alone) if entry["step"] > step)
    assert (after["world"], after["run"]) == (1, run)
    assert daemon.cli("lr", "set", run, "emb=0.5")["outcome"] == "applied"
    end(alone)
    end(job)
    (job,) = daemon.cli("jobs")["runs"]
    assert job["run"] == run
    assert job["attempts"] >= 2  # of the first, killed within a tenth of a second, the daemon may know nothing
