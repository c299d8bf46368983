"""A rollback through `Checkpoints` ends where a run ends that was taken up by hand at that place, without the data."""

from __future__ import annotations

import pytest

from scripts import POLICIES, START, UNTIL_STOPPED, filled, printed, weights

# The model, the data and the loop's parts, as any user's script has them. Batches of epoch 0 that are numbered 22 to 24
# carry labels of noise: the fault.
PARTS = (
    START
    + """
from torch.utils.data import DataLoader, TensorDataset
model = transformer()
decayed = torch.optim.AdamW([p for p in model.parameters() if p.dim() > 1], lr=1e-3)
plain = torch.optim.SGD([p for p in model.parameters() if p.dim() == 1], lr=1e-2, momentum=0.9)
schedule = torch.optim.lr_scheduler.OneCycleLR(decayed, max_lr=1e-2, total_steps=1000)
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**123, growth_interval=6, enabled=SCALED)
data = torch.randint(64, (60, 16), generator=torch.Generator().manual_seed(1))
loader = DataLoader(TensorDataset(data), batch_size=2, shuffle=True)

def train(ids):
    scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
    for optimizer in (decayed, plain):
        scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in (decayed, plain):
        scaler.step(optimizer)
        optimizer.zero_grad()
    scaler.update()
    schedule.step()
"""
)

WATCHED = (
    PARTS
    + UNTIL_STOPPED
    + """
import sharpwatch
watch = sharpwatch.attach(model, [decayed, plain], training_job="plain", run="plain", control="rollback",
    address=ADDRESS)
checkpoints = sharpwatch.Checkpoints(FOLDER, model, [decayed, plain], watch=watch, data=loader, scheduler=schedule,
    scaler=scaler, keep=1000)
resumed = checkpoints.resume()
for ids, in checkpoints.batches():
    train(ids)
    tell(step=checkpoints.step, weights=digest(model), watched=watch.step, run=watch.run, resumed=resumed,
        rate=schedule.get_last_lr()[0], batch=checkpoints.data.taken, scale=scaler.get_scale())
    if checkpoints.step % 10 == 0:
        checkpoints.save()
    over.wait(0.02)
    if over.is_set():
        break
watch.close()
"""
)

# By hand, without sharpwatch: PyTorch's own means to load, and the batches up to there passed over.
BY_HAND = (
    PARTS
    + """
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
batches = enumerate((batch for _ in range(10) for batch in loader), 1)
for _ in range(TAKEN):
    next(batches)
weights, optimizers = get_state_dict(model, [decayed, plain])
dcp.load({"model": weights, "optimizers": optimizers}, checkpoint_id=FOLDER)
set_state_dict(model, [decayed, plain], model_state_dict=weights, optim_state_dict=optimizers)
rest = torch.load(FOLDER + "/rank-0.pt")
schedule.load_state_dict(rest["others"]["scheduler-0"])
scaler.load_state_dict(rest["others"]["scaler"])
torch.set_rng_state(rest["random"]["cpu"])
for number, (ids,) in batches:
    if number not in SKIP:
        train(ids)
        tell(batch=number, weights=digest(model), scale=scaler.get_scale(), rate=schedule.get_last_lr()[0])
    if number == LAST:
        break
"""
)


def by_hand(skip, steps):
    """The weights after each of `steps` steps of the same loop without sharpwatch, that passes `skip` over."""
    loop, found = {}, {}
    exec(filled(PARTS, SCALED=False), loop)  # noqa: S102 - the user's script, up to its loop
    batches = (batch for _ in range(10) for batch in loop["loader"])
    for number, (ids,) in enumerate(batches, 1):
        if number not in skip:
            loop["train"](ids)
            found[len(found) + 1] = loop["digest"](loop["model"])
        if len(found) == steps:
            return found
    raise AssertionError(f"{steps} steps are more than there is data for")


def since(found, step):
    return {at: value for at, value in found.items() if at >= step}


@pytest.fixture
def watched(stepping, daemon, tmp_path):
    names = {"FOLDER": str(tmp_path / "checkpoints"), "ADDRESS": daemon.grpc}
    return lambda fault=".loss", scaled=False: stepping(filled(WATCHED, SCALED=scaled, **names).replace(".loss", fault))


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


def test_a_rollback_ends_where_a_restart_by_hand_ends(daemon, watched, script):
    # Scaled losses overflow now and then, and their steps are void: where, only the scaler knows.
    trainer = watched(scaled=True)
    first = trainer.until(lambda entry: entry["step"] == 28)
    done = daemon.cli("rollback", "plain", "--to-step", "20", "--skip", "24:27", "--reason", "bad shard")
    assert done["outcome"] == "applied"
    back = trainer.until(lambda entry: entry["step"] == 21)[-1]
    again = [back, *trainer.until(lambda entry: entry["step"] == 38)]
    taken = {entry["step"]: entry["batch"] for entry in reversed(first)}  # a void step's is a later one
    left_out = range(taken[23] + 1, taken[26] + 1)
    assert len(left_out) == 4  # one of them void
    names = {"FOLDER": done["rollback"]["checkpoint"]["uri"], "SCALED": True, "TAKEN": taken[20]}
    by_hand = printed(script(filled(BY_HAND, **names, SKIP=list(left_out), LAST=again[-1]["batch"])))
    compared = ("batch", "weights", "scale", "rate")
    assert [{name: entry[name] for name in compared} for entry in again] == by_hand[-len(again) :]
    assert len({entry["scale"] for entry in by_hand}) > 1


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


def test_a_batch_that_breaks_the_run_is_skipped_without_an_operator(daemon, watched):
    daemon.stop()
    daemon.policies = POLICIES
    daemon.start()
    loop = {}
    exec(filled(PARTS, SCALED=False), loop)  # noqa: S102 - the user's script, up to its loop
    broken = list(loop["loader"])[24][0][0].tolist()
    fault = f"{broken} in ids.tolist() and checkpoints.data.taken <= 30"  # not when it comes again
    trainer = watched(f".loss.mul(float('nan') if {fault} else 1.0)")
    trainer.until(lambda entry: entry["step"] == 25)
    trainer.until(lambda entry: entry["step"] == 21)
    again = trainer.until(lambda entry: entry["step"] == 30)
    made = daemon.cli("decisions", "plain")["decisions"][-1]
    assert (made["policy"], made["rollback"]["checkpoint"]["step"]) == ("roll-back", 20)
    assert made["outcome"] == "applied", made["detail"]
    left_out = range(made["rollback"]["skip_from_step"], made["rollback"]["skip_to_step"])
    assert 25 in left_out
    assert weights(again) == since(by_hand(left_out, 30), 22)
