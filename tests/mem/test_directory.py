"""Look-ups that are not waited for."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from client.directory import USABLE_S, Directory
from net.errors import DialError
from net.protocol.announcement import NodeAnnouncement
from tests.unit.session_worlds import PEERS, offer


class Slow:
    """A look-up that takes two seconds, and finds one node more each time."""

    def __init__(self) -> None:
        self.asked = 0
        self.fails = False

    async def __call__(self) -> list[NodeAnnouncement]:
        self.asked += 1
        await trio.sleep(2)
        if self.fails:
            raise DialError("nobody answers")
        return [offer(peer, 0, 4) for peer in PEERS[: self.asked]]


async def test_what_was_found_before_will_do_and_is_renewed(autojump_clock: MockClock) -> None:
    look_up = Slow()
    async with trio.open_nursery() as nursery:
        directory = Directory(look_up, nursery)
        assert len(await directory.nodes(fresh=False)) == 1  # there was nothing
        await trio.sleep(10)
        began = trio.current_time()
        assert len(await directory.nodes(fresh=False)) == 1
        assert trio.current_time() == began
        await trio.sleep(3)
        assert len(await directory.nodes(fresh=False)) == 2
        assert len(await directory.nodes()) == 3
        await trio.sleep(USABLE_S + 1)
        look_up.fails = True
        with pytest.raises(DialError):
            await directory.nodes(fresh=False)


async def test_a_renewal_that_fails_is_nobodys_error(autojump_clock: MockClock) -> None:
    look_up = Slow()
    async with trio.open_nursery() as nursery:
        directory = Directory(look_up, nursery)
        await directory.nodes()
        look_up.fails = True
        await trio.sleep(5)
        assert len(await directory.nodes(fresh=False)) == 1
        await trio.sleep(5)
        assert len(await directory.nodes(fresh=False)) == 1
        await trio.sleep(1)
        assert look_up.asked == 3


async def test_of_those_who_wait_one_looks(autojump_clock: MockClock) -> None:
    look_up = Slow()
    async with trio.open_nursery() as nursery:
        directory = Directory(look_up, nursery)
        for _ in range(5):
            nursery.start_soon(directory.nodes)
    assert look_up.asked == 1
