"""A rollback through `Checkpoints` ends where a run ends that was taken up by hand at that place, without the data."""

from __future__ import annotations

import pytest

# The model, the data and the loop's parts, as any user's script has them. Batches of epoch 0 that are numbered 22 to 24
# carry labels of noise: the fault.
PARTS = """
import hashlib, json, sys, threading, torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0,
    eos_token_id=0))
decayed = torch.optim.AdamW([p for p in model.parameters() if p.dim() > 1], lr=1e-3)
plain = torch.optim.SGD([p for p in model.parameters() if p.dim() == 1], lr=1e-2, momentum=0.9)
schedule = torch.optim.lr_scheduler.OneCycleLR(decayed, max_lr=1e-2, total_steps=1000)
data = torch.randint(64, (60, 16), generator=torch.Generator().manual_seed(1))
loader = DataLoader(TensorDataset(data), batch_size=2, shuffle=True)

def train(ids):
    model(input_ids=ids, labels=ids).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in (decayed, plain):
        optimizer.step()
        optimizer.zero_grad()
    schedule.step()

def digest():
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
"""

WATCHED = (
    PARTS
    + """
import os, signal, sharpwatch
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # a death without any goodbye
watch = sharpwatch.attach(model, [decayed, plain], training_job="plain", run="plain", control="rollback",
    address=sys.argv[2])
checkpoints = sharpwatch.Checkpoints(sys.argv[1], model, [decayed, plain], watch=watch, data=loader,
    scheduler=schedule, keep=1000)
resumed = checkpoints.resume()
over = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
for ids, in checkpoints.batches():
    train(ids)
    print(json.dumps({"step": checkpoints.step, "watched": watch.step, "run": watch.run, "weights": digest(),
        "resumed": resumed, "rate": schedule.get_last_lr()[0]}), flush=True)
    if checkpoints.step % 10 == 0:
        checkpoints.save()
    over.wait(0.02)
    if over.is_set():
        break
watch.close()
"""
)


def by_hand(skip, steps):
    """The weights after each of `steps` steps of the same loop without sharpwatch, that passes `skip` over."""
    loop, weights = {}, {}
    exec(PARTS, loop)  # noqa: S102 - the user's script, up to its loop
    batches = (batch for _ in range(10) for batch in loop["loader"])
    for number, (ids,) in enumerate(batches, 1):
        if number not in skip:
            loop["train"](ids)
            weights[len(weights) + 1] = loop["digest"]()
        if len(weights) == steps:
            return weights
    raise AssertionError(f"{steps} steps are more than there is data for")


def weights(entries):
    return {entry["step"]: entry["weights"] for entry in entries}


def since(found, step):
    return {at: value for at, value in found.items() if at >= step}


@pytest.fixture
def watched(stepping, daemon, tmp_path):
    source = WATCHED.replace("sys.argv[1]", repr(str(tmp_path / "checkpoints")))
    return lambda fault=".loss": stepping(source.replace("sys.argv[2]", repr(daemon.grpc)).replace(".loss", fault))


def test_a_rollback_leaves_a_range_of_data_out(daemon, watched):
    trainer = watched()
    first = trainer.until(lambda entry: entry["step"] == 26)
    plain = by_hand([], 26)
    assert weights(first) == since(plain, first[0]["step"])
    done = daemon.cli("rollback", "plain", "--to-step", "20", "--skip", "22:25", "--reason", "bad shard")
    assert done["outcome"] == "applied"
    back = trainer.until(lambda entry: entry["step"] == 21)[-1]
    assert back["weights"] == plain[21]
    again = trainer.until(lambda entry: entry["step"] == 38)  # past the end of the epoch
    assert weights(again) == since(by_hand([22, 23, 24], 38), 22)
    assert [entry["watched"] for entry in again] == list(range(22, 39))


def test_a_second_rollback_keeps_what_the_first_left_out_and_counts_steps_as_they_were_taken(daemon, watched):
    trainer = watched()
    trainer.until(lambda entry: entry["step"] == 26)
    daemon.cli("rollback", "plain", "--to-step", "20", "--skip", "22:25", "--reason", "bad shard")
    trainer.until(lambda entry: entry["step"] == 21)
    trainer.until(lambda entry: entry["step"] == 24)
    # Step 23 now is batch 26. Going back further, the bad shard stays out.
    daemon.cli("rollback", "plain", "--to-step", "10", "--skip", "23:24", "--reason", "another")
    trainer.until(lambda entry: entry["step"] == 11)
    again = trainer.until(lambda entry: entry["step"] == 26)
    assert weights(again) == since(by_hand([22, 23, 24, 26], 26), 12)


def test_a_run_that_died_goes_on_from_its_newest_checkpoint(daemon, watched):
    trainer = watched()
    trainer.until(lambda entry: entry["step"] == 26)
    daemon.cli("rollback", "plain", "--to-step", "20", "--skip", "22:25", "--reason", "bad shard")
    trainer.until(lambda entry: entry["step"] == 21)
    trainer.until(lambda entry: entry["step"] == 23)  # no checkpoint has been saved since
    trainer._process.terminate()
    trainer._process.wait(timeout=60)
    seen = watched().until(lambda entry: entry["step"] == 30)
    assert seen[-1]["resumed"] == 20
    assert seen[-1]["watched"] == 30
    assert weights(seen) == since(by_hand([22, 23, 24], 30), seen[0]["step"])


def test_a_rollback_to_a_damaged_checkpoint_fails_and_training_goes_on(daemon, watched, tmp_path):
    trainer = watched()
    trainer.until(lambda entry: entry["step"] == 26)
    file = next((tmp_path / "checkpoints/step-20").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    done = daemon.command("--json", "rollback", "plain", "--to-step", "20", "--reason", "bad shard")
    assert done.returncode == 1
    assert "missing or damaged: " + file.name in done.stdout + done.stderr
    last = trainer.next()["step"]
    after = trainer.until(lambda entry: entry["step"] >= last + 5)
    assert weights(after) == since(by_hand([], last + 5), after[0]["step"])


POLICIES = """
policies:
  - name: rollback-on-non-finite
    match: {alert: NonFinite}
    mode: enforce
    action: {kind: rollback, skip_margin: 2}
"""


def test_a_batch_that_breaks_the_run_is_gone_round_without_an_operator(daemon, watched):
    daemon.stop()
    daemon.policies = POLICIES
    daemon.start()
    loop = {}
    exec(PARTS, loop)  # noqa: S102 - the user's script, up to its loop
    broken = list(loop["loader"])[24][0][0].tolist()
    fault = f"{broken} in ids.tolist() and checkpoints.data.taken <= 30"  # not when it comes again
    trainer = watched(f".loss.mul(float('nan') if {fault} else 1.0)")
    trainer.until(lambda entry: entry["step"] == 25)
    trainer.until(lambda entry: entry["step"] == 21)
    again = trainer.until(lambda entry: entry["step"] == 30)
    made = daemon.cli("decisions", "plain")["decisions"][-1]
    assert (made["policy"], made["rollback"]["checkpoint"]["step"]) == ("rollback-on-non-finite", 20)
    assert made["outcome"] == "applied", made["detail"]
    left_out = range(made["rollback"]["skip_from_step"], made["rollback"]["skip_to_step"])
    assert 25 in left_out
    assert weights(again) == since(by_hand(left_out, 30), 22)
