"""Users' training scripts: what they share, whatever trains, and what they print."""

from __future__ import annotations

import json

START = """
import hashlib, json, os, signal, sys, threading, torch
from transformers import GPT2Config, GPT2LMHeadModel
torch.manual_seed(0)

def transformer():
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0))

def digest(model):
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()

def tell(**what):
    print(json.dumps(what), flush=True)
"""

# Trains until its input ends, and can die without any goodbye.
UNTIL_STOPPED = """
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
over = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
"""

POLICIES = """
policies:
  - name: roll-back
    match: {alert: NonFinite}
    mode: enforce
    action: {kind: rollback, skip_margin: 2}
"""


def filled(source, **names):
    """`source` with literals in place of names."""
    for name, value in names.items():
        source = source.replace(name, repr(value))
    return source


def printed(text):
    """The lines that a script printed as JSON; frameworks print too."""
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"')]


def weights(entries):
    """The digests of weights that were printed, by step."""
    return {entry["step"]: entry["weights"] for entry in entries if "weights" in entry}
