"""What mDNS does with a network that refuses, and with names that come and go. zeroconf is a fake here."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import zeroconf
from trio.testing import MockClock

from net import mdns
from net.addresses import PeerAddress, tcp
from net.host import Host, open_host
from net.mdns import LOOK_S, Mdns
from tests.net_helpers import seeded

OTHER = PeerAddress(address=tcp("192.168.1.11", 4001), peer_id=seeded(2).peer_id)
NAME = f"another.{mdns.SERVICE}"


class Network:
    """zeroconf's, as far as it is used: calls come from threads.

    Attributes:
        fails: whether nothing can be sent now.
        is_slow: whether the next registration takes longer than zeroconf waits for it.
        told: the TXT records that were announced, with how.
        asked: the names that were looked into.
        changed: what the browser calls.
    """

    def __init__(self) -> None:
        self.fails = self.is_slow = self.has_name = False
        self.told: list[tuple[str, bytes]] = []
        self.asked: list[str] = []
        self.changed: Callable[..., None] = lambda **_: None
        self.is_closed = False

    def register_service(self, info: Any) -> None:
        self._tell("register", info)

    def update_service(self, info: Any) -> None:
        self._tell("update", info)

    def _tell(self, how: str, info: Any) -> None:
        if self.fails:
            raise OSError(101, "Network is unreachable")
        if how == "register" and self.is_slow:
            self.is_slow, self.has_name = False, True  # done, but nobody waited for it
            raise zeroconf.EventLoopBlocked
        if how == "register" and self.has_name:
            raise zeroconf.ServiceNameAlreadyRegistered
        self.told.append((how, info.text))

    def get_service_info(self, service: str, name: str, timeout_ms: int) -> Any:
        self.asked.append(name)
        return zeroconf.ServiceInfo(service, name, port=1, properties=mdns.write_txt([OTHER]), server=name)

    def close(self) -> None:
        self.is_closed = True

    async def say(self, name: str, change: zeroconf.ServiceStateChange) -> None:
        """From a thread, as zeroconf's browser does."""

        def call() -> None:
            self.changed(zeroconf=self, service_type=mdns.SERVICE, name=name, state_change=change)

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        for _ in range(3):
            await trio.testing.wait_all_tasks_blocked()


@asynccontextmanager
async def mdns_at(monkeypatch: pytest.MonkeyPatch, network: Network) -> AsyncIterator[tuple[Host, list[PeerAddress]]]:
    """A host with mDNS, and whom it has met so."""

    async def at_once(call: Callable[..., Any], *arguments: Any, abandon_on_cancel: bool = False) -> Any:
        await trio.lowlevel.checkpoint()
        return call(*arguments)

    def browser(responder: Any, service: str, handlers: list[Callable[..., None]]) -> None:
        network.changed = handlers[0]

    monkeypatch.setattr(trio.to_thread, "run_sync", at_once)
    monkeypatch.setattr(zeroconf, "Zeroconf", lambda interfaces: network)
    monkeypatch.setattr(zeroconf, "ServiceBrowser", browser)
    met: list[PeerAddress] = []
    async with open_host(seeded(1), transports=[]) as host, trio.open_nursery() as nursery:
        host.listening = [tcp("192.168.1.10", 4001)]
        await nursery.start(Mdns(host, on_peer=met.append).run)
        for _ in range(3):
            await trio.testing.wait_all_tasks_blocked()
        yield host, met
        nursery.cancel_scope.cancel()


async def test_addresses_are_announced_and_anew_when_they_change(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Network()
    async with mdns_at(monkeypatch, network) as (host, _):
        assert [how for how, _ in network.told] == ["register"]
        await trio.sleep(3 * LOOK_S + 1)
        assert len(network.told) == 1
        host.listening = [tcp("10.0.0.7", 4001)]
        await trio.sleep(LOOK_S + 1)
        how, text = network.told[-1]
        assert (how, mdns.read_txt(text)[0].address) == ("update", tcp("10.0.0.7", 4001))
    assert network.is_closed


async def test_what_could_not_be_announced_is_tried_again(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Network()
    network.fails = True
    async with mdns_at(monkeypatch, network) as (host, _):
        await trio.sleep(2 * LOOK_S + 1)
        network.fails = False
        await trio.sleep(LOOK_S + 1)
        assert [how for how, _ in network.told] == ["register"]
        network.fails = True
        host.listening = [tcp("10.0.0.7", 4001)]
        await trio.sleep(LOOK_S + 1)
        network.fails = False
        await trio.sleep(LOOK_S + 1)
        assert [how for how, _ in network.told] == ["register", "update"]


async def test_a_registration_that_took_too_long_is_not_tried_for_ever(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Network()
    network.is_slow = True
    async with mdns_at(monkeypatch, network):
        await trio.sleep(5 * LOOK_S)
        assert [how for how, _ in network.told] == ["update"]


async def test_names_that_come_are_looked_into_and_those_that_go_are_not(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody answers for a name that has gone: three seconds for nothing, in which nobody else is met."""
    network = Network()
    async with mdns_at(monkeypatch, network) as (host, met):
        await network.say(NAME, zeroconf.ServiceStateChange.Removed)
        assert network.asked == []
        await network.say(NAME, zeroconf.ServiceStateChange.Added)
        assert (network.asked, met) == ([NAME], [OTHER])
        assert host.peerstore.addresses(OTHER.peer_id) == [OTHER.address]
        await network.say(NAME, zeroconf.ServiceStateChange.Updated)
        assert network.asked == [NAME, NAME]
