from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sharpwatch.agent.transport.spool import MAX_EVENTS, Spool, has_events, without_arrays
from sharpwatch.v1 import agent_pb2, types_pb2


def sample(sequence, *, results=(), checkpoints=(), deleted=(), closing=False, restored=False, loss=None):
    return agent_pb2.Sample(
        sequence=sequence,
        step=sequence,
        loss=loss,
        results=[types_pb2.CommandResult(command_id=each) for each in results],
        checkpoints=[types_pb2.Checkpoint(step=each, uri=f"c{each}") for each in checkpoints],
        deleted_checkpoints=[f"c{each}" for each in deleted],
        closing=closing,
        restored=restored,
    )


def put(spool, message):
    return spool.put(message, agent_pb2.SessionRequest(sample=message).SerializeToString())


def drain(spool):
    """Every sample not sent, in the order of sending."""
    sent = []
    while (entry := spool.next()) is not None:
        sent.append(agent_pb2.SessionRequest.FromString(entry.payload).sample)
        assert entry.sequence == sent[-1].sequence
    return sent


def sequences(samples):
    return [each.sequence for each in samples]


def ids(samples):
    return [result.command_id for each in samples for result in each.results]


def test_samples_leave_in_order_and_stay_until_settled():
    spool = Spool(10_000)
    assert all(put(spool, sample(i)) for i in (1, 2, 5))
    assert sequences(drain(spool)) == [1, 2, 5]
    assert (len(spool), spool.unsent, spool.settled) == (3, 0, 0)
    spool.settle(2)
    assert (len(spool), spool.settled) == (1, 4)
    spool.settle(5)
    assert (len(spool), spool.size, spool.settled) == (0, 0, 5)


def test_a_new_receiver_gets_everything_unsettled_again():
    spool = Spool(10_000)
    for i in (1, 2, 3):
        put(spool, sample(i))
    spool.next()
    spool.next()
    spool.settle(1)
    spool.rewind()
    assert sequences(drain(spool)) == [2, 3]


def test_only_newer_samples_come_in():
    spool = Spool(10_000)
    put(spool, sample(4))
    assert not put(spool, sample(4))
    assert not put(spool, sample(3))
    assert sequences(drain(spool)) == [4]


def test_a_dropped_sample_hands_its_events_to_the_next():
    spool = Spool(0)
    put(spool, sample(1, results=["a"], checkpoints=[10]))
    put(spool, sample(2, results=["b"], checkpoints=[20], loss=2.5))
    assert spool.drop_oldest() == 1
    (left,) = drain(spool)
    assert ids([left]) == ["a", "b"]
    assert [each.step for each in left.checkpoints] == [10, 20]
    assert (left.sequence, left.loss) == (2, 2.5)


def test_of_a_checkpoint_that_was_saved_and_deleted_the_newest_news_stays():
    spool = Spool(0)
    put(spool, sample(1, checkpoints=[10, 20], deleted=[5, 6]))
    put(spool, sample(2, checkpoints=[5], deleted=[10]))
    spool.drop_oldest()
    (left,) = drain(spool)
    assert [each.step for each in left.checkpoints] == [20, 5]
    assert list(left.deleted_checkpoints) == ["c6", "c10"]


def test_checkpoints_that_a_restore_left_behind_are_not_handed_on():
    spool = Spool(0)
    put(spool, sample(1, checkpoints=[1, 9]))
    put(spool, sample(3, restored=True))
    spool.drop_oldest()
    (left,) = drain(spool)
    assert [each.step for each in left.checkpoints] == [1]
    assert list(left.deleted_checkpoints) == ["c9"]  # the file may have been another checkpoint before


def test_the_newest_sample_is_never_over_the_limit():
    spool = Spool(0)
    put(spool, sample(1))
    assert not spool.overfull
    put(spool, sample(2))
    assert spool.overfull


def test_a_refused_sample_hands_its_events_past_those_already_sent():
    spool = Spool(10_000)
    for i in (1, 2, 3):
        put(spool, sample(i, results=[f"r{i}"]))
    spool.next()
    spool.next()
    assert spool.refuse(1, keep_events=True)
    assert not spool.refuse(1, keep_events=True)
    assert not spool.refuse(3, keep_events=True), "it was not sent yet"
    assert ids(drain(spool)) == ["r1", "r3"]


def test_events_of_the_last_sample_wait_for_the_next_to_come():
    spool = Spool(10_000)
    put(spool, sample(1, results=["a"]))
    spool.next()
    spool.refuse(1, keep_events=True)
    assert (len(spool), spool.size) == (0, 0)
    put(spool, sample(2, results=["b"]))
    assert ids(drain(spool)) == ["a", "b"]


def test_events_can_be_refused_with_their_sample():
    spool = Spool(10_000)
    put(spool, sample(1, results=["a"]))
    spool.next()
    spool.refuse(1, keep_events=False)
    put(spool, sample(2))
    assert ids(drain(spool)) == []


def test_events_stay_within_what_one_sample_may_hold():
    spool = Spool(0)
    put(spool, sample(1, checkpoints=range(200)))
    put(spool, sample(2, checkpoints=range(200, 400)))
    spool.drop_oldest()
    (left,) = drain(spool)
    assert [each.step for each in left.checkpoints] == list(range(400 - MAX_EVENTS, 400))


def test_what_is_released_goes_with_its_events():
    spool = Spool(0)
    put(spool, sample(1, results=["a"]))
    assert spool.release_sent() is None
    spool.next()
    put(spool, sample(2))
    assert spool.release_sent() == 1
    assert ids(drain(spool)) == []


def test_without_arrays_all_but_statistics_stays():
    full = sample(7, results=["a"], closing=True, loss=1.0)
    full.tap.gradient_norm.data = b"x" * 100
    full.gnb.tokens = 3
    full.direction.tokens = 3
    assert without_arrays(full) == sample(7, results=["a"], closing=True, loss=1.0)
    assert full.HasField("tap"), "the caller's own is left alone"


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.booleans()),
        st.tuples(st.just("next"), st.none()),
        st.tuples(st.just("rewind"), st.none()),
        st.tuples(st.just("drop"), st.none()),
        st.tuples(st.just("settle"), st.integers(0, 40)),
        st.tuples(st.just("refuse"), st.integers(1, 40)),
    ),
    max_size=60,
)


@given(OPERATIONS)
def test_every_event_is_held_or_was_settled(operations):
    """Against a model: which sequences are held, and that no event goes but with a sample that arrived."""
    spool, held, newest, made, settled_ids = Spool(0), [], 0, set(), set()
    for name, value in operations:
        if name == "put":
            newest += 1
            results = [f"r{newest}"] if value else []
            made |= set(results)
            put(spool, sample(newest, results=results))
            held.append(newest)
        elif name == "next":
            spool.next()
        elif name == "rewind":
            spool.rewind()
        elif name == "drop" and len(held) > 1:
            assert spool.drop_oldest() == held.pop(0)
        elif name == "settle":
            arrived = [entry for entry in contents(spool) if entry.sequence <= value]
            settled_ids |= set(ids(arrived))
            spool.settle(value)
            held = [each for each in held if each > value]
        elif name == "refuse" and spool.refuse(value, keep_events=True):
            held.remove(value)
        assert len(spool) == len(held)
        assert spool.settled == (held[0] - 1 if held else newest)
        assert spool.size == sum(entry.ByteSize() + overhead(entry) for entry in contents(spool))
    put(spool, sample(newest + 1))
    spool.rewind()
    left = drain(spool)
    assert sequences(left) == [*held, newest + 1]
    assert made == settled_ids | set(ids(left))
    assert len(ids(left)) == len(set(ids(left)))


def contents(spool):
    entries = [*spool._sent.values(), *spool._unsent.values()]
    return [agent_pb2.SessionRequest.FromString(entry.payload).sample for entry in entries]


def overhead(message):
    return agent_pb2.SessionRequest(sample=message).ByteSize() - message.ByteSize()


def test_a_plain_sample_has_no_events():
    assert not has_events(sample(1, loss=1.0))
    assert has_events(sample(1, closing=True))
    assert has_events(sample(1, deleted=[3]))
