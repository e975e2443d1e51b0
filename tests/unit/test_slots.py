"""Who may hold how much of the cache; the driver here is a dictionary of written tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import replace
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from compute.errors import BadInput
from compute.slots import Change, Copy, NoRoom, Slot, Slots, SlotSettings

SMALL = SlotSettings(cache_tokens=1024, lengths=(16, 32, 64, 128, 256), max_sessions=40, max_sessions_per_peer=20)


def opened(slots: Slots, *sessions: tuple[str, str], now: float = 0.0) -> None:
    for session, peer in sessions:
        slots.open(session, peer, rows=1, max_length=256, now=now)


def write(slots: Slots, session: Hashable, position: int, tokens: int, now: float = 0.0) -> Change:
    change = slots.reserve(session, position, tokens, now)
    slots.commit(session, position + tokens, now)
    return change


def fill(slots: Slots, peer: str, count: int, tokens: int = 256, now: float = 0.0) -> None:
    """Sessions ``peer-0``, ``peer-1``, ... one after another, a hundredth of a second apart."""
    for number in range(count):
        session = f"{peer}-{number}"
        slots.open(session, peer, rows=1, max_length=256, now=now)
        write(slots, session, 0, tokens, now + 0.01 * number)


# Growth and rollback


def test_room_grows_by_need_in_buckets() -> None:
    slots = Slots(SMALL)
    slots.open("s", "p", rows=2, max_length=200, now=0.0)
    assert slots.used_tokens == 0
    lengths = []
    for position in range(200):
        change = write(slots, "s", position, 1)
        place = slots.place("s")
        assert place.slot is not None
        lengths.append(place.slot.length)
        assert slots.used_tokens == 2 * place.slot.length
        if position and change.granted:
            [left] = change.left
            assert change.copies == (Copy(source=left, source_first=0, target_first=0, start=0, stop=position),)
    assert sorted(set(lengths)) == [16, 32, 64, 128, 256]
    assert slots.close("s").freed == (Slot(rows=2, length=256, index=0),)
    assert (slots.used_tokens, slots.held_tokens("p"), slots.sessions()) == (0, 0, 0)


def test_going_back_keeps_the_room_and_forgets_the_rest() -> None:
    slots = Slots(SMALL)
    opened(slots, ("s", "p"))
    write(slots, "s", 0, 100)
    slots.set_back("s", 10, 0.0)
    assert slots.place("s").length == 10
    with pytest.raises(BadInput, match="at 11"):
        slots.reserve("s", 11, 1, 0.0)
    assert write(slots, "s", 5, 5) == Change()
    assert (slots.place("s").length, slots.used_tokens) == (10, 128)


def test_a_step_that_failed_leaves_what_was_before_its_position() -> None:
    slots = Slots(SMALL)
    opened(slots, ("s", "p"))
    write(slots, "s", 0, 20)
    slots.reserve("s", 8, 20, 0.0)
    slots.abort("s", 0.0)
    assert slots.place("s").length == 8
    with pytest.raises(ValueError, match="not within a step"):
        slots.abort("s", 0.0)
    with pytest.raises(ValueError, match="not within a step"):
        slots.commit("s", 9, 0.0)


@pytest.mark.parametrize(
    ("position", "tokens", "code"), [(1, 1, "bad-position"), (0, 0, "bad-shape"), (0, 257, "too-long")]
)
def test_wrong_steps_are_refused(position: int, tokens: int, code: str) -> None:
    slots = Slots(SMALL)
    opened(slots, ("s", "p"))
    with pytest.raises(BadInput) as caught:
        slots.reserve("s", position, tokens, 0.0)
    assert caught.value.code == code
    with pytest.raises(BadInput, match="no such session"):
        slots.reserve("other", 0, 1, 0.0)


@pytest.mark.parametrize(("rows", "length", "code"), [(0, 1, "bad-value"), (1, 257, "too-long"), (1025, 1, "too-long")])
def test_sessions_that_never_fit_are_refused(rows: int, length: int, code: str) -> None:
    with pytest.raises(BadInput) as caught:
        Slots(SMALL).open("s", "p", rows=rows, max_length=length, now=0.0)
    assert caught.value.code == code


@pytest.mark.parametrize(
    "wrong",
    [{"lengths": ()}, {"lengths": (2, 1)}, {"cache_tokens": 0}, {"share": 0.0}, {"want_s": 0.1}, {"keep_s": 1.0}],
)
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"rising|room"):
        replace(SMALL, **wrong)


def test_closing_waits_for_the_step() -> None:
    slots = Slots(SMALL)
    opened(slots, ("s", "p"))
    slots.reserve("s", 0, 10, 0.0)
    assert slots.close("s") == Change()
    with pytest.raises(BadInput, match="no such session"):
        slots.set_back("s", 0, 0.0)
    assert slots.commit("s", 10, 0.0).freed == (Slot(rows=1, length=16, index=0),)
    assert (slots.used_tokens, slots.sessions("p")) == (0, 0)
    assert slots.close("s") == Change()


def test_room_is_given_for_what_is_written_not_for_what_may_be() -> None:
    """Five rows of 256 tokens are more than the cache; of 200 they are not, though the next bucket would be."""
    slots = Slots(SMALL)
    slots.open("s", "p", rows=5, max_length=256, now=0.0)
    assert write(slots, "s", 0, 200).granted == Slot(rows=5, length=1024 // 5, index=0)
    with pytest.raises(BadInput) as caught:
        slots.reserve("s", 200, 10, 0.0)
    assert caught.value.code == "too-long"
    assert slots.place("s").length == 200


def test_a_session_that_is_reset_is_as_new() -> None:
    slots = with_prefix()
    write(slots, "second", 30, 10)
    assert slots.reset("second", 0.0).freed == (Slot(rows=1, length=16, index=0),)
    assert (slots.place("second").length, slots.used_tokens) == (0, 64)
    assert slots.begin_with("second", [(16, b"16")], 0.0) == 16
    slots.reserve("first", 40, 1, 0.0)
    with pytest.raises(ValueError, match="within a step"):
        slots.reset("first", 0.0)


def test_rows_change_places_in_a_slot_that_nobody_else_reads() -> None:
    slots = with_prefix()
    shared = slots.place("first").slot
    assert shared is not None
    write(slots, "second", 30, 10)
    second = slots.place("second").slot
    assert second is not None
    change = slots.reserve("second", 40, 1, 0.0, anew=True)
    assert change.copies == (
        Copy(source=shared, source_first=0, target_first=0, start=0, stop=30),
        Copy(source=second, source_first=30, target_first=0, start=30, stop=40),
    )
    assert (change.granted, change.left) == (Slot(rows=1, length=64, index=1), (second,))
    slots.commit("second", 41, 0.0)
    change = slots.reserve("second", 41, 1, 0.0, anew=True)  # of the same shape: another slot all the same
    assert change.granted == Slot(rows=1, length=64, index=2)
    assert change.left == (Slot(rows=1, length=64, index=1),)


def test_who_reads_keeps_the_order_of_rows() -> None:
    slots = with_prefix()
    shared = slots.place("first").slot
    change = slots.reserve("first", 35, 1, 0.0, anew=True)
    assert (change.left, slots.place("second").shared_slot) == ((), shared)
    slots.abort("first", 0.0)
    slots.close("first")
    assert slots.close("second").freed == (shared,)
    assert slots.used_tokens == 0


# Leases


def test_what_nobody_uses_ends_and_use_renews() -> None:
    slots = Slots(SMALL)
    fill(slots, "p", 2, tokens=10)
    for now in range(0, 601, 30):
        write(slots, "p-1", 0, 1, float(now))
    assert slots.expire(599.0) == Change()
    assert slots.expire(600.0).ended == ("p-0",)
    assert slots.sessions() == 1


def test_a_lease_that_is_over_is_anybodys() -> None:
    slots = Slots(SMALL)
    fill(slots, "a", 4)
    opened(slots, ("a-4", "a"), now=59.0)
    with pytest.raises(NoRoom) as caught:
        slots.reserve("a-4", 0, 256, 59.0)
    assert caught.value.retry_after_s == pytest.approx(1.0)
    assert write(slots, "a-4", 0, 256, 60.0).ended == ("a-0",)
    opened(slots, ("b-0", "b"), now=61.0)
    assert write(slots, "b-0", 0, 256, 61.0).ended == ("a-1",)


def test_a_session_within_a_step_is_never_ended() -> None:
    slots = Slots(SMALL)
    fill(slots, "a", 4)
    slots.reserve("a-0", 10, 1, 0.0)
    assert "a-0" not in slots.expire(10_000.0).ended
    assert slots.sessions() == 1


def test_so_many_sessions_of_a_peer_and_in_all() -> None:
    slots = Slots(replace(SMALL, max_sessions=3, max_sessions_per_peer=2))
    opened(slots, ("a", "p"), ("b", "p"))
    with pytest.raises(NoRoom, match="of this peer") as caught:
        opened(slots, ("c", "p"), now=20.0)
    assert caught.value.retry_after_s == pytest.approx(40.0)
    opened(slots, ("c", "q"))
    with pytest.raises(NoRoom, match="3 sessions are open"):
        opened(slots, ("d", "r"))
    assert slots.open("d", "r", rows=1, max_length=1, now=60.0).ended == ("a",)


# Hogs


def test_a_peer_alone_may_fill_the_cache() -> None:
    slots = Slots(SMALL)
    fill(slots, "hog", 4)
    assert slots.held_tokens("hog") == 1024


def test_the_longest_unused_of_a_hogs_sessions_give_way_first_and_no_more_than_needed() -> None:
    slots = Slots(SMALL)
    fill(slots, "hog", 4)
    write(slots, "hog-0", 0, 1, 1.0)
    opened(slots, ("honest", "h"), now=1.0)
    change = write(slots, "honest", 0, 100, 1.0)
    assert change.ended == ("hog-1",)
    assert change.freed == (Slot(rows=1, length=256, index=1),)
    assert slots.held_tokens("hog") == 768


def test_who_holds_no_more_than_a_share_gives_nothing_back() -> None:
    slots = Slots(SMALL)
    for peer in ("a", "b", "c", "d"):
        fill(slots, peer, 1)
    opened(slots, ("late", "e"), now=1.0)
    with pytest.raises(NoRoom) as caught:
        slots.reserve("late", 0, 10, 1.0)
    assert caught.value.retry_after_s == pytest.approx(59.0, abs=0.1)
    assert slots.sessions() == 5


def test_a_hog_cannot_take_from_others() -> None:
    slots = Slots(SMALL)
    fill(slots, "hog", 3)
    fill(slots, "other", 2, tokens=100)
    opened(slots, ("hog-3", "hog"))
    with pytest.raises(NoRoom):
        slots.reserve("hog-3", 0, 1, 1.0)
    assert slots.sessions("other") == 2


def test_steps_of_a_hog_are_the_last_of_their_sessions_when_others_want_in() -> None:
    slots = Slots(SMALL)
    fill(slots, "hog", 4)
    for number in range(4):
        slots.reserve(f"hog-{number}", 100, 1, 1.0)
    opened(slots, ("honest", "h"), now=1.0)
    with pytest.raises(NoRoom) as caught:
        slots.reserve("honest", 0, 100, 1.0)
    assert caught.value.retry_after_s < 0.5
    assert slots.commit("hog-0", 101, 1.1).ended == ("hog-0",)
    assert slots.commit("hog-1", 101, 1.1) == Change()
    # The hog comes back at once, and first; the room is held for who was refused.
    opened(slots, ("hog-4", "hog"), now=1.1)
    with pytest.raises(NoRoom, match="are free for this peer"):
        slots.reserve("hog-4", 0, 200, 1.1)
    assert write(slots, "honest", 0, 100, 1.25).ended == ()
    # Room is not held for ever.
    write(slots, "hog-4", 0, 128, 1.3)


def test_room_is_not_held_for_who_does_not_come_back() -> None:
    slots = Slots(SMALL)
    fill(slots, "hog", 4)
    slots.reserve("hog-0", 100, 1, 1.0)
    for number in range(1, 4):
        slots.reserve(f"hog-{number}", 100, 1, 1.0)
    opened(slots, ("honest", "h"), now=1.0)
    with pytest.raises(NoRoom):
        slots.reserve("honest", 0, 100, 1.0)
    assert slots.commit("hog-0", 101, 4.0) == Change()


@pytest.mark.parametrize("step_s", [0.01, 0.2])
@pytest.mark.parametrize("sessions", [4, 20])
def test_an_honest_session_is_admitted_within_a_second_beside_a_hog(step_s: float, sessions: int) -> None:
    """A hog that fills everything, always has a step running, and comes back whenever a session of its ends."""
    slots = Slots(SMALL)
    hogs: dict[str, float] = {}  # session: when its step ends
    count = 0
    asked_at, admitted_at = 5.0, None
    opened(slots, ("honest", "h"), now=5.0)
    ask_at, now = asked_at, 0.0
    while now < 20.0 and admitted_at is None:
        for session, ends in list(hogs.items()):
            if now >= ends:
                del hogs[session]
                if session not in slots.commit(session, slots.place(session).length + 1, now).ended:
                    slots.reserve(session, min(slots.place(session).length, 200), 1, now)
                    hogs[session] = now + step_s
        while len(hogs) < sessions:
            count += 1
            try:
                slots.open(f"hog-{count}", "hog", rows=1, max_length=256, now=now)
                slots.reserve(f"hog-{count}", 0, 200, now)
            except NoRoom:
                slots.close(f"hog-{count}")
                break
            hogs[f"hog-{count}"] = now + step_s
        if now >= ask_at:
            try:
                slots.reserve("honest", 0, 200, now)
            except NoRoom as refused:
                ask_at = now + refused.retry_after_s
            else:
                admitted_at = now
        now += 0.005
    assert admitted_at is not None
    assert admitted_at - asked_at <= 1.0


# Prefixes


def with_prefix(settings: SlotSettings = SMALL) -> Slots:
    """``first`` has 40 tokens, of which 30 are offered, and ``second`` begins with these."""
    slots = Slots(settings)
    opened(slots, ("first", "p"), ("second", "p"))
    write(slots, "first", 0, 40)
    assert slots.offer("first", 16, b"16")
    assert slots.offer("first", 30, b"30")
    assert slots.begin_with("second", [(16, b"16"), (30, b"30"), (40, b"?")], 0.0) == 30
    return slots


def test_a_session_begins_with_the_longest_that_is_there() -> None:
    slots = with_prefix()
    place = slots.place("second")
    assert (place.shared, place.shared_slot, place.slot) == (30, slots.place("first").slot, None)
    assert slots.used_tokens == 64
    assert write(slots, "second", 30, 10).granted == Slot(rows=1, length=16, index=0)
    assert slots.used_tokens == 64 + 16


def test_nothing_is_shared_between_peers_rows_or_blocks() -> None:
    slots = with_prefix()
    slots.open("peer", "q", rows=1, max_length=256, now=0.0)
    slots.open("rows", "p", rows=2, max_length=256, now=0.0)
    slots.open("blocks", "p", rows=1, max_length=256, now=0.0, group="others")
    for session in ("peer", "rows", "blocks"):
        assert slots.begin_with(session, [(30, b"30")], 0.0) == 0


def test_peers_share_where_that_is_allowed() -> None:
    slots = with_prefix(replace(SMALL, share_between_peers=True))
    slots.open("peer", "q", rows=1, max_length=256, now=0.0)
    slots.open("rows", "q", rows=2, max_length=256, now=0.0)
    assert slots.begin_with("rows", [(30, b"30")], 0.0) == 0
    assert slots.begin_with("peer", [(30, b"30")], 0.0) == 30
    assert slots.place("peer").shared_slot == slots.place("first").slot
    assert (slots.held_tokens("p"), slots.held_tokens("q")) == (64, 0)
    slots.close("first")
    slots.close("second")
    assert slots.held_tokens("p") == 64  # until nobody reads it any more
    slots.close("peer")
    assert slots.used_tokens == 0


def test_what_is_overwritten_is_no_prefix_any_more() -> None:
    slots = Slots(SMALL)
    opened(slots, ("first", "p"), ("second", "p"))
    write(slots, "first", 0, 40)
    slots.offer("first", 16, b"16")
    slots.offer("first", 30, b"30")
    write(slots, "first", 20, 1)
    assert slots.begin_with("second", [(30, b"30"), (16, b"16")], 0.0) == 16


def test_what_others_read_is_not_overwritten() -> None:
    slots = with_prefix()
    shared = slots.place("second").shared_slot
    change = write(slots, "first", 20, 5)
    assert change.copies == ()
    place = slots.place("first")
    assert (place.shared, place.shared_slot, place.slot) == (20, shared, Slot(rows=1, length=16, index=0))
    assert slots.place("second").shared_slot == shared


def test_growing_beside_readers_copies_only_what_they_do_not_read() -> None:
    slots = with_prefix()
    shared = slots.place("first").slot
    change = write(slots, "first", 40, 100)
    assert shared is not None
    assert change.copies == (Copy(source=shared, source_first=0, target_first=30, start=30, stop=40),)
    assert (change.left, change.granted) == ((), Slot(rows=1, length=128, index=0))
    assert slots.place("first").shared == 30


def test_a_slot_lives_as_long_as_it_is_read() -> None:
    slots = with_prefix()
    shared = slots.place("second").shared_slot
    assert slots.close("first").freed == ()
    write(slots, "second", 30, 1)
    assert slots.used_tokens == 64 + 16
    assert set(slots.close("second").freed) == {shared, Slot(rows=1, length=16, index=0)}
    assert (slots.used_tokens, slots._directory) == (0, {})


def test_one_of_two_readers_may_leave() -> None:
    slots = with_prefix()
    opened(slots, ("third", "p"))
    assert slots.begin_with("third", [(16, b"16")], 0.0) == 16
    slots.close("first")
    assert slots.close("second").freed == ()
    assert slots.close("third").freed == (Slot(rows=1, length=64, index=0),)


def test_going_back_into_a_prefix_and_before_it() -> None:
    slots = with_prefix()
    write(slots, "second", 30, 10)
    slots.close("first")
    write(slots, "second", 10, 5)
    assert (slots.place("second").shared, slots.used_tokens) == (10, 64 + 16)
    change = write(slots, "second", 0, 5)
    assert change.freed == (Slot(rows=1, length=64, index=0),)
    assert (slots.place("second").shared_slot, slots.used_tokens) == (None, 16)


def test_prefixes_move_with_a_session_that_grows() -> None:
    slots = Slots(SMALL)
    opened(slots, ("first", "p"), ("second", "p"))
    write(slots, "first", 0, 40)
    slots.offer("first", 30, b"30")
    write(slots, "first", 40, 100)
    assert slots.begin_with("second", [(30, b"30")], 0.0) == 30
    assert slots.place("second").shared_slot == slots.place("first").slot


def test_offers_are_bounded_and_made_once() -> None:
    slots = with_prefix()
    assert not slots.offer("first", 30, b"other")
    assert not slots.offer("second", 30, b"30")
    slots = Slots(SMALL)
    opened(slots, ("s", "p"))
    write(slots, "s", 0, 200)
    assert sum(slots.offer("s", tokens, b"%d" % tokens) for tokens in range(1, 200)) == 32
    with pytest.raises(ValueError, match="201 of 200"):
        slots.offer("s", 201, b"")


# Everything at once


class Driver:
    """Follows what the books say: memory of slots, in which each token has a value."""

    def __init__(self) -> None:
        self.memory: dict[Slot, dict[int, int]] = {}  # offset in the slot -> value; what is zeroed is missing

    def follow(self, change: Change) -> None:
        for slot in change.freed:
            del self.memory[slot]
        if change.granted is not None:
            assert change.granted not in self.memory, "given out twice"
            new = self.memory[change.granted] = {}
            for copy in change.copies:
                old = self.memory[copy.source]
                for token in range(copy.start, copy.stop):
                    new[token - copy.target_first] = old[token - copy.source_first]
        for slot in change.left:
            del self.memory[slot]

    def read(self, slots: Slots, session: Hashable) -> list[int]:
        place = slots.place(session)
        shared = self.memory[place.shared_slot] if place.shared_slot else {}
        own = self.memory[place.slot] if place.slot else {}
        return [shared[token] if token < place.shared else own[token - place.shared] for token in range(place.length)]

    def write(self, slots: Slots, session: Hashable, position: int, values: list[int]) -> None:
        place = slots.place(session)
        assert place.slot is not None
        for token, value in enumerate(values, position):
            assert place.shared <= token < place.shared + place.slot.length
            self.memory[place.slot][token - place.shared] = value


OPTIONS = SlotSettings(
    cache_tokens=256, lengths=(8, 16, 32, 64), max_sessions=12, max_sessions_per_peer=6, lease_s=10, keep_s=30
)


class AnyOrder(RuleBasedStateMachine):
    """Peers that open, write, share, go back, fail, leave and sleep; one of them is greedy."""

    options: ClassVar[SlotSettings] = OPTIONS

    def __init__(self) -> None:
        super().__init__()
        self.slots = Slots(self.options)
        self.driver = Driver()
        self.now = 0.0
        self.count = 0
        self.values = 0
        self.peers: dict[int, str] = {}
        self.rows: dict[int, int] = {}
        self.has: dict[int, list[int]] = {}  # what each session has written
        self.steps: dict[int, tuple[int, int]] = {}
        self.leaving: set[int] = set()

    def follow(self, change: Change) -> None:
        self.driver.follow(change)
        for session in change.ended:
            assert session not in self.steps, "ended within a step"
            assert isinstance(session, int)
            self.forget(session)

    def forget(self, session: int) -> None:
        del self.peers[session], self.has[session], self.rows[session]

    def usable(self) -> list[int]:
        return [each for each in self.peers if each not in self.steps and each not in self.leaving]

    @rule(peer=st.sampled_from(["hog", "hog", "a", "b"]), rows=st.integers(1, 2))
    def open(self, peer: str, rows: int) -> None:
        self.count += 1
        try:
            self.follow(self.slots.open(self.count, peer, rows=rows, max_length=64, now=self.now))
        except NoRoom as refused:
            self.follow(refused.change)
            mine = sum(each == peer for each in self.peers.values())
            assert mine == 6 or len(self.peers) == 12
        else:
            self.peers[self.count], self.rows[self.count], self.has[self.count] = peer, rows, []

    @precondition(lambda self: self.usable())
    @rule(data=st.data(), tokens=st.integers(1, 64), anew=st.booleans())
    def reserve(self, data: st.DataObject, tokens: int, anew: bool) -> None:
        session = data.draw(st.sampled_from(self.usable()))
        position = data.draw(st.integers(0, min(63, len(self.has[session]))))
        tokens = min(tokens, 64 - position)
        before = self.slots.place(session)
        try:
            self.follow(self.slots.reserve(session, position, tokens, self.now, anew=anew))
        except NoRoom as refused:
            assert 0.25 <= refused.retry_after_s <= 60
            self.follow(refused.change)
            assert self.slots.place(session) == before
        else:
            self.has[session] = self.has[session][:position]
            self.steps[session] = (position, tokens)

    @precondition(lambda self: self.steps)
    @rule(data=st.data(), fails=st.booleans())
    def finish(self, data: st.DataObject, fails: bool) -> None:
        session = data.draw(st.sampled_from(sorted(self.steps)))
        position, tokens = self.steps.pop(session)
        if session not in self.leaving:  # the step itself
            values = list(range(self.values, self.values + tokens))
            self.values += tokens
            self.driver.write(self.slots, session, position, values)
            if not fails:
                self.has[session] += values
        if fails:
            change = self.slots.abort(session, self.now)
        else:
            change = self.slots.commit(session, position + tokens, self.now)
        if session in self.leaving:
            self.leaving.discard(session)
            self.forget(session)
        self.follow(change)

    @precondition(lambda self: self.usable())
    @rule(data=st.data())
    def set_back(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(self.usable()))
        position = data.draw(st.integers(0, len(self.has[session])))
        self.slots.set_back(session, position, self.now)
        self.has[session] = self.has[session][:position]

    @precondition(lambda self: self.usable())
    @rule(data=st.data())
    def reset(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(self.usable()))
        self.follow(self.slots.reset(session, self.now))
        self.has[session] = []

    @precondition(lambda self: self.usable())
    @rule(data=st.data())
    def offer(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(self.usable()))
        for tokens in (4, 8, 20):
            if tokens <= len(self.has[session]):
                self.slots.offer(session, tokens, repr(self.has[session][:tokens]).encode())

    @precondition(lambda self: self.usable())
    @rule(data=st.data())
    def begin_with(self, data: st.DataObject) -> None:
        """Somebody begins as another session does, whoever's that is."""
        fresh = [each for each in self.usable() if not self.has[each] and self.slots.place(each).slot is None]
        fresh = [each for each in fresh if self.slots.place(each).shared_slot is None]
        if not fresh:
            return
        session = data.draw(st.sampled_from(fresh))
        like = data.draw(st.sampled_from(sorted(self.has)))
        model = self.has[like]
        digests = [(count, repr(model[:count]).encode()) for count in (4, 8, 20) if count <= len(model)]
        count = self.slots.begin_with(session, digests, self.now)
        if count and like not in self.leaving:
            assert self.peers[like] == self.peers[session] or self.options.share_between_peers
            assert self.rows[like] == self.rows[session]
        self.has[session] = model[:count]

    @precondition(lambda self: self.peers)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(sorted(self.peers)))
        change = self.slots.close(session)
        if session in self.steps:
            assert change == Change()
            self.leaving.add(session)
        else:
            self.follow(change)
            self.forget(session)

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0, 12.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.follow(self.slots.expire(self.now))

    @precondition(lambda self: self.slots.sessions("honest") == 0 and len(self.peers) < 12)
    @rule()
    def an_honest_peer_comes(self) -> None:
        """Whoever holds more than a share makes room within a second, during which every step ends."""
        self.count += 1
        session = self.count
        self.slots.open(session, "honest", rows=1, max_length=64, now=self.now)
        asked_at = self.now
        while True:
            holds = Counter[str]()
            for slot_peer in ("hog", "a", "b"):
                holds[slot_peer] = self.slots.held_tokens(slot_peer)
            try:
                self.follow(self.slots.reserve(session, 0, 60, self.now))
                break
            except NoRoom as refused:
                self.follow(refused.change)
                if self.now - asked_at > 0.9:
                    # Nobody is to blame: all that is held is within shares, or promised to who came before.
                    others = sum(tokens for _, (tokens, _) in list(self.slots._wants.items())[:-1])
                    assert others or max(holds.values()) <= OPTIONS.cache_tokens * OPTIONS.share
                    break
                self.now += min(refused.retry_after_s, 0.25)
                for busy in sorted(self.steps):
                    del self.steps[busy]
                    change = self.slots.abort(busy, self.now)
                    if busy in self.leaving:
                        self.leaving.discard(busy)
                        self.forget(busy)
                    self.follow(change)
        if self.slots._sessions[session].busy:
            self.follow(self.slots.abort(session, self.now))
        self.follow(self.slots.close(session))

    @invariant()
    def nothing_leaks_and_nobody_reads_anothers(self) -> None:
        slots = self.slots
        assert slots.used_tokens == sum(slot.tokens for slot in self.driver.memory) <= OPTIONS.cache_tokens
        assert slots.sessions() == len(self.peers)
        held = sum(slots.held_tokens(peer) for peer in ("hog", "a", "b", "honest"))
        assert held == slots.used_tokens
        for session in self.peers:
            if session not in self.leaving:
                assert self.driver.read(slots, session) == self.has[session]

    def teardown(self) -> None:
        for session in list(self.steps):
            self.driver.follow(self.slots.abort(session, self.now))
        for left in list(self.slots._sessions):
            self.driver.follow(self.slots.close(left))
        assert self.slots.used_tokens == 0
        assert not self.driver.memory
        assert not self.slots._directory
        assert not self.slots._held
        assert not self.slots._open


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


class AnyOrderTogether(AnyOrder):
    """The same where peers share."""

    options: ClassVar[SlotSettings] = replace(OPTIONS, share_between_peers=True)


TestAnyOrderTogether = AnyOrderTogether.TestCase
TestAnyOrderTogether.settings = settings(max_examples=75, stateful_step_count=50, deadline=None)
