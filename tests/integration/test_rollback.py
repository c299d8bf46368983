"""A rollback puts the run back, and what follows is what would have followed from that checkpoint."""

from __future__ import annotations

# Trains with dropout, saving a checkpoint of everything every tenth step, and prints a digest of the weights after each
# step. Batches come from a generator that is part of the checkpoint; those of steps to be skipped are passed over.
SCRIPT = """
import hashlib, json, sys, threading, torch, sharpwatch
from transformers import GPT2Config, GPT2LMHeadModel
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0,
    eos_token_id=0))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.99**step)
data = torch.Generator().manual_seed(1)
saved, position, skip, restored = {}, 0, range(0), None

def restore(request):
    global position, skip, restored
    state = saved[request.uri]
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    data.set_state(state["data"])
    torch.set_rng_state(state["rng"])
    position, skip = state["position"], range(*request.skip)
    restored = [request.step, list(request.skip), request.reason]

watch = sharpwatch.attach(model, optimizer, training_job="back", run="back", on_rollback=restore)
over = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
while not over.is_set():
    while True:
        ids = torch.randint(64, (4, 16), generator=data)
        position += 1
        if position not in skip:
            break
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
    print(json.dumps({"step": watch.step, "position": position, "weights": digest, "restored": restored}), flush=True)
    restored = None
    if watch.step % 10 == 0:
        saved[f"step-{watch.step}"] = {"model": {k: v.clone() for k, v in model.state_dict().items()},
            "optimizer": __import__("copy").deepcopy(optimizer.state_dict()), "schedule": schedule.state_dict(),
            "data": data.get_state(), "rng": torch.get_rng_state(), "position": position}
        watch.saved_checkpoint(watch.step, f"step-{watch.step}")
    schedule.step()
    optimizer.zero_grad()
    over.wait(0.02)
watch.close()
"""


def test_an_operators_rollback_repeats_the_run_from_the_checkpoint_bit_for_bit(daemon, stepping):
    trainer = stepping(SCRIPT)
    first = {entry["step"]: entry["weights"] for entry in trainer.until(lambda entry: entry["step"] == 24)}
    decision = daemon.cli("rollback", "back", "--to-step", "12", "--reason", "try again")
    assert decision["outcome"] == "applied"
    assert decision["rollback"]["checkpoint"]["step"] == 10  # the newest at or before step 12
    seen = trainer.until(lambda entry: entry["restored"] is not None)
    assert seen[-1]["restored"][0] == 10
    assert seen[-1]["restored"][2] == "try again"
    assert seen[-1]["step"] == 10
    assert seen[-1]["weights"] == first[10]
    again = {entry["step"]: entry["weights"] for entry in trainer.until(lambda entry: entry["step"] == 24)}
    assert again == {step: first[step] for step in range(11, 25)}
    detail = daemon.cli("show", "back")
    assert detail["run"]["step"] >= 10
    assert sum(detail["dropped"].values()) == 0  # steps that went back were taken, not refused


def test_a_range_of_data_is_left_out_after_the_rollback(daemon, stepping):
    trainer = stepping(SCRIPT)
    trainer.until(lambda entry: entry["step"] == 24)
    daemon.cli("rollback", "back", "--to-step", "20", "--skip", "22:25", "--reason", "bad shard")
    back = trainer.until(lambda entry: entry["restored"] is not None)[-1]
    assert back["restored"] == [20, [22, 25], "bad shard"]
    assert [(entry["step"], entry["position"]) for entry in trainer.until(lambda entry: entry["step"] == 24)] == [
        (21, 21),
        (22, 25),
        (23, 26),
        (24, 27),
    ]


def test_without_a_checkpoint_a_rollback_is_refused_before_anything_is_sent(daemon, stepping):
    stepping(SCRIPT.replace("watch.saved_checkpoint", "(lambda step, uri: None)"))
    done = daemon.command("rollback", "back", "--reason", "no way back")
    assert done.returncode == 1
    assert "checkpoint" in done.stderr + done.stdout
