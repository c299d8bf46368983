"""Rendezvous hashing: every shard has its share, and nothing moves that need not."""

from __future__ import annotations

from collections import Counter

import pytest

from sharpwatch.common.shards import Shard, held_by, holder_in, parse_shard, shard_of, shard_order

RUNS = [f"job-{number}" for number in range(20_000)]


def test_the_hash_is_part_of_the_protocol():
    """Agents, commands and daemons of different versions must agree, so these never change."""
    assert [shard_of(run, 16) for run in ("gpt2-a1", "run", "läuft", "\ud800")] == [1, 2, 1, 10]
    assert shard_order("gpt2-a1", 5) == [1, 4, 2, 3, 0]


@pytest.mark.parametrize("count", [2, 3, 16, 64])
def test_every_shard_has_its_share(count):
    """Each run falls on a shard by chance 1/n: five binomial standard deviations, which 64 shards pass by 4e-5."""
    share = Counter(shard_of(run, count) for run in RUNS)
    deviation = (len(RUNS) * (1 / count) * (1 - 1 / count)) ** 0.5
    assert share.keys() == set(range(count))
    assert all(abs(found - len(RUNS) / count) < 5 * deviation for found in share.values())


def test_of_a_shard_that_is_gone_only_its_own_runs_move_and_all_others_get_some():
    gone, count = 2, 8
    moved: Counter[int] = Counter()
    for run in RUNS:
        order = shard_order(run, count)
        left = [shard for shard in order if shard != gone]
        assert order[0] == shard_of(run, count)
        if order[0] != gone:
            assert left[0] == order[0]
        else:
            moved[left[0]] += 1
    own = moved.total()
    deviation = (own * (1 / (count - 1)) * (1 - 1 / (count - 1))) ** 0.5
    assert all(abs(moved[shard] - own / (count - 1)) < 5 * deviation for shard in range(count) if shard != gone)


def test_one_shard_more_takes_runs_and_moves_none_between_the_others():
    assert all(shard_of(run, 9) in {8, shard_of(run, 8)} for run in RUNS)


def test_a_shard_is_read_as_it_is_written():
    assert parse_shard("3/16") == Shard(3, 16)
    assert str(Shard(3, 16)) == "3/16"
    for wrong in ("", "3", "3/3", "4/3", "-1/3", "0/0", "1/2/3", "0/1025", " 0/1", "a/b"):
        with pytest.raises(ValueError, match=r"expected INDEX/COUNT with 0 <= INDEX < COUNT <= 1024, such as 0/4, got"):
            parse_shard(wrong)


def test_who_holds_a_shard_is_read_out_of_a_reason():
    for address in ("host-1:7741", "[::1]:7741", "unix:/run/s"):
        assert holder_in(f"UNAVAILABLE: run a: {held_by(3, address)}") == address
    assert holder_in(held_by(3, "")) == ""
    assert holder_in("the daemon is stopping") == ""
