"""Every generator that a loop draws from comes back, through a file that is read with `weights_only`."""

from __future__ import annotations

import io
import random
import threading

import numpy as np
import torch

from sharpwatch.common.rng_state import random_state, rng_state_restored, seeded_state, set_random_state


def draws():
    return random.random(), random.gauss(), np.random.rand(), np.random.randn(), torch.rand(3).tolist()  # noqa: S311, NPY002


def test_what_is_drawn_is_drawn_again():
    random.seed(1)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(3)
    draws()  # both Gaussians keep one for the next
    file = io.BytesIO()
    torch.save(random_state(), file)
    first = draws()
    draws()
    file.seek(0)
    set_random_state(torch.load(file, weights_only=True))
    assert draws() == first


def test_a_seed_begins_every_generator_and_moves_none():
    before = random_state()
    states = [seeded_state(seed) for seed in (2**63 + 1, 2**63 + 1, 5)]
    drawn = []
    for state in states:
        set_random_state(state)
        drawn.append(draws())
    assert drawn[0] == drawn[1]
    assert all(one != other for one, other in zip(drawn[0], drawn[2], strict=True))
    set_random_state(before)
    first = draws()
    set_random_state(before)
    seeded_state(3)
    assert draws() == first


def test_what_an_inner_context_put_back_is_not_taken_for_unused():
    """While other threads live, only what the model was seen not to use is left as it is."""
    model, over = torch.nn.Linear(1, 1), threading.Event()

    def drawing():
        with rng_state_restored(model):
            torch.rand(3)

    with rng_state_restored(model):
        drawing()
    other = threading.Thread(target=over.wait)
    other.start()
    try:
        before = torch.get_rng_state()
        drawing()
        assert torch.equal(torch.get_rng_state(), before)
    finally:
        over.set()
        other.join()
