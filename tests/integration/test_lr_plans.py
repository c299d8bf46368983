"""A learning-rate plan with a real daemon and a real training: promoted, undone where it harms, over a restart."""

from __future__ import annotations

import grpc
from daemons import PATIENCE

from sharpwatch.v1.operator_pb2 import Plan, WatchRunRequest
from sharpwatch.v1.operator_pb2_grpc import OperatorServiceStub

# Trains on random tokens until told to stop: its loss stays where it is, unless a rate is far too high. Clipping keeps
# that from ending in NaN.
SCRIPT = """
import json, sys, threading, torch, sharpwatch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16, bos_token_id=0, eos_token_id=0))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
watch = sharpwatch.attach(model, optimizer, training_job="plans", run="plans", probe_every=100000,
    lr_bounds=(0.01, 10000.0))
over = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), over.set()), daemon=True).start()
step = 0
while not over.is_set():
    step += 1
    ids = torch.randint(32, (8, 16))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(json.dumps({"step": step, "loss": loss.item(), "multipliers": dict(watch.status.multipliers)}), flush=True)
    threading.Event().wait(0.01)
watch.close()
"""
BAND = 40  # losses that a stage is judged by


def until(daemon, *states: str) -> Plan:
    """The plan once it is in one of `states`, while the training goes on."""
    with grpc.insecure_channel(daemon.grpc) as channel:
        shown = (("authorization", f"Bearer {daemon.token_file.read_text().strip()}"),)
        stub = OperatorServiceStub(channel)
        watch = stub.WatchRun(WatchRunRequest(run="plans"), timeout=PATIENCE, metadata=shown)
        return next(each.detail.plan for each in watch if each.detail.plan.state in states)


def in_force(trainer, **wanted: float) -> None:
    trainer.until(lambda entry: all(entry["multipliers"][block] == value for block, value in wanted.items()))


def test_a_plan_goes_through_stage_by_stage(daemon, stepping, monkeypatch):
    monkeypatch.setenv("SHARPWATCH_AUTHOR", "ada")
    trainer = stepping(SCRIPT)
    trainer.until(lambda entry: entry["step"] >= BAND)
    arguments = ("lr", "plan", "plans", "--set", "emb=4,vo=2", "--ramp-steps", "5", "--reason", "as measured")
    draft = daemon.cli(*arguments, "--dry-run")
    assert [stage["blocks"] for stage in draft["plan"]["stages"]] == [["vo"], ["emb"]]
    assert daemon.cli("lr", "show", "plans")["plan"] is None
    started = daemon.cli(*arguments)
    assert (started["plan"]["state"], started["decision"]["outcome"]) == ("running", "applied")
    in_force(trainer, vo=2.0, emb=1.0)
    waits = until(daemon, "waiting", "aborted", "paused")
    assert waits.detail.startswith("stage 1 of 2 (vo) went well: loss ")
    again = daemon.command("lr", "plan", "plans", "paper")
    assert (again.returncode, again.stderr) == (1, "sharpwatch: plan own is waiting: abort it first\n")
    shown = daemon.command("lr", "promote", "plans", "--reason", "evaluated")
    assert shown.returncode == 0, shown.stderr
    assert "under way" in shown.stdout
    assert "revision 2 applied at step" in shown.stdout
    in_force(trainer, vo=2.0, emb=4.0)
    ended = until(daemon, "done", "aborted", "paused")
    assert (ended.state, ended.detail[:31]) == ("done", "stage 2 of 2 (emb) went well: l")
    assert [each["reason"] for each in daemon.cli("lr", "history", "plans")["revisions"]] == [
        "plan own, stage 1 of 2 (vo): as measured",
        "plan own, stage 2 of 2 (emb): evaluated",
    ]
    audit = daemon.cli("decisions", "plans", "--audit")
    states = [(row["outcome"], row["author"]) for row in audit["transitions"] if row["decision_id"] == waits.id]
    assert states == [
        *(("running", "ada"), ("running", "ada"), ("waiting", "")),
        *(("running", "ada"), ("running", "ada"), ("done", "")),
    ]
    assert "plan own; stage 2 of 2 (emb) went well" in daemon.command("decisions", "plans", "--audit").stdout
    assert daemon.cli("lr", "undo", "plans")["outcome"] == "applied"
    in_force(trainer, vo=2.0, emb=1.0)


def test_a_stage_that_harms_is_undone(daemon, stepping):
    trainer = stepping(SCRIPT)
    trainer.until(lambda entry: entry["step"] >= BAND)
    plan = ("lr", "plan", "plans", "--set", "norm=1.5,head=10000", "--auto", "--ramp-steps", "0")
    assert daemon.cli(*plan)["decision"]["outcome"] == "applied"
    in_force(trainer, norm=1.5, head=10000.0)
    ended = until(daemon, "aborted", "done")
    assert ended.state == "aborted"
    assert ended.detail.startswith("stage 2 of 2 (head) was undone: loss ")
    in_force(trainer, norm=1.5, head=1.0)
    revisions = daemon.cli("lr", "history", "plans")["revisions"]
    assert [(each["undoes"], each["author"]) for each in revisions][-1] == (2, "sharpwatch")
    assert len(revisions) == 3


def test_a_plan_survives_the_end_of_the_daemon_between_its_stages(daemon, stepping):
    trainer = stepping(SCRIPT)
    trainer.until(lambda entry: entry["step"] >= BAND)
    plan = ("lr", "plan", "plans", "--set", "emb=4,vo=2", "--auto", "--ramp-steps", "5")
    started = daemon.cli(*plan)["plan"]
    in_force(trainer, vo=2.0, emb=1.0)
    daemon.kill()
    last = trainer.next()["step"]
    trainer.until(lambda entry: entry["step"] == last + 100)  # in which the first stage would have been judged
    daemon.start()
    ended = until(daemon, "done", "aborted", "paused")
    assert (ended.id, ended.state) == (started["id"], "done")
    in_force(trainer, vo=2.0, emb=4.0)
    revisions = daemon.cli("lr", "history", "plans")["revisions"]
    assert [each["multipliers"]["emb"] for each in revisions] == [1.0, 4.0]


def test_pause_and_abort(daemon, stepping):
    trainer = stepping(SCRIPT)
    trainer.until(lambda entry: entry["step"] >= BAND)
    missing = daemon.command("lr", "pause", "plans", "--dry-run")
    assert (missing.returncode, "has no plan" in missing.stderr) == (1, True)
    refused = daemon.command("lr", "plan", "plans", "measured")
    assert (refused.returncode, "needs the sharpness of norm" in refused.stderr) == (1, True)
    daemon.cli("lr", "plan", "plans", "--set", "emb=4,vo=2", "--stages", "emb+vo", "--auto")
    assert daemon.cli("lr", "pause", "plans", "--reason", "lunch")["plan"]["state"] == "paused"
    tried = daemon.command("lr", "promote", "plans", "--dry-run").stdout
    assert tried.endswith("plan own would be running (stage 1 of 1 (emb, vo) is judged)\n")
    tried = daemon.command("lr", "abort", "plans", "--dry-run").stdout
    assert tried.endswith("plan own would be aborted; then in force: every block 1\n")
    assert daemon.cli("lr", "show", "plans")["plan"]["state"] == "paused"
    aborted = daemon.cli("lr", "abort", "plans", "--reason", "no gain")
    assert (aborted["plan"]["state"], aborted["decision"]["outcome"]) == ("aborted", "applied")
    in_force(trainer, vo=1.0, emb=1.0)
