"""What ``raceme doctor`` finds, over an internet in memory, and how it says it."""

from __future__ import annotations

import importlib.util
import subprocess
import types
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from client import doctor
from client.doctor import Finding, State
from net.addresses import PeerAddress, tcp
from net.dht.service import Dht
from net.files.manifest import ModelManifest
from net.files.pieces import Hashes
from net.host import open_host
from net.mux.base import Stream
from net.nat.mapping import PortMapper
from net.swarm import Connection
from tests.gateways import found
from tests.mem.internet import Internet, Machine
from tests.mem.test_nat_reachability import INNER, PEERS, FakeGateway, node_at
from tests.net_helpers import seeded


async def carry(connection: Connection, stream: Stream) -> None:
    stream.reset()


@asynccontextmanager
async def swarm_of(internet: Internet, *, relays: bool = False) -> AsyncIterator[list[PeerAddress]]:
    """Public peers that know each other."""
    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
        first: list[PeerAddress] = []
        for number, ip in enumerate(PEERS):
            node = await stack.enter_async_context(node_at(internet, internet.machine(ip), 10 + number))
            if relays:
                node.host.handle(doctor.HOP_PROTOCOL, carry)
            dht = Dht(node.host, server=True)
            await dht.join(first)
            nursery.start_soon(dht.run)
            first = first or node.host.peer_addresses
        yield first
        nursery.cancel_scope.cancel()


async def findings_at(
    machine: Machine, bootstrap: Sequence[PeerAddress], mapper: PortMapper | None = None
) -> dict[str, Finding]:
    findings: list[Finding] = []
    began = trio.current_time()
    async with open_host(seeded(1), listen=[tcp(machine.ip, 4001)], transports=[machine]) as host:
        await doctor._check_network(host, bootstrap, mapper, findings.append)
    assert trio.current_time() - began <= 15
    return {finding.name: finding for finding in findings}


async def test_a_public_machine(autojump_clock: MockClock) -> None:
    internet = Internet()
    async with swarm_of(internet, relays=True) as bootstrap:
        told = await findings_at(internet.machine("45.1.0.1"), bootstrap)
    assert {name: finding.state.value for name, finding in told.items()} == dict.fromkeys(
        ["bootstrap", "NAT", "from outside", "relays", "clock"], "ok"
    )
    assert "no NAT for TCP" in told["NAT"].text
    assert "public" in told["from outside"].text
    assert "/ip4/45.1.0.1/tcp/4001" in told["from outside"].text
    assert "3 of the peers" in told["relays"].text


async def test_behind_a_symmetric_nat_without_relays(autojump_clock: MockClock) -> None:
    internet = Internet()
    router = internet.router("45.1.0.1", symmetric=True)
    async with swarm_of(internet) as bootstrap:
        told = await findings_at(internet.machine(INNER, router), bootstrap, PortMapper(finders=[]))
    assert "symmetric" in told["NAT"].text
    assert told["port mapping"].state is State.NOTE
    assert "UPnP" in told["port mapping"].advice
    assert "relay-only" in told["from outside"].text
    assert "forward a port" in told["from outside"].advice
    assert told["relays"].state is State.BAD
    assert "raceme relay" in told["relays"].advice


async def test_behind_a_router_that_opens_ports(autojump_clock: MockClock) -> None:
    internet = Internet()
    router = internet.router("45.1.0.1", symmetric=True)
    async with swarm_of(internet) as bootstrap:
        mapper = PortMapper(finders=[found(FakeGateway(router=router))])
        told = await findings_at(internet.machine(INNER, router), bootstrap, mapper)
    assert told["port mapping"].state is told["from outside"].state is State.OK
    assert "4001/tcp at 45.1.0.1:4001/tcp" in told["port mapping"].text
    assert "confirmed" in told["from outside"].text
    assert not router.forwards  # given back


async def test_a_bootstrap_node_that_is_not_there(autojump_clock: MockClock) -> None:
    internet = Internet()
    nobody = PeerAddress(address=tcp("44.9.0.9", 4001), peer_id=seeded(77).peer_id)
    told = await findings_at(internet.machine("45.1.0.1"), [nobody])
    assert list(told) == ["bootstrap"]
    assert told["bootstrap"].state is State.BAD
    assert "no answer" in told["bootstrap"].text
    assert "firewall" in told["bootstrap"].advice


@pytest.mark.parametrize(
    ("ahead_s", "state", "words"),
    [
        ([], State.OK, "not compared"),
        ([-30.0, 20.0], State.OK, "within an hour"),
        ([-30.0, 9000.0, -20.0], State.OK, "within an hour"),  # one node whose clock is wrong
        ([9000.0, 9000.0], State.BAD, "2.5 h behind"),
        ([-9000.0], State.BAD, "2.5 h ahead of"),
    ],
)
def test_the_clock(ahead_s: list[float], state: State, words: str) -> None:
    finding = doctor.clock_finding(ahead_s)
    assert finding.state is state
    assert words in finding.text


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = doctor.check_folder(tmp_path / "not" / "there" / "yet")
    assert (finding.state, finding.name) == (State.OK, "disk")
    (tmp_path / "file").write_text("")
    assert doctor.check_folder(tmp_path / "file" / "folder").state is State.BAD
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=10**9))
    finding = doctor.check_folder(tmp_path)
    assert (finding.state, finding.advice) == (State.BAD, "make room: models take gigabytes")


def test_what_is_kept_is_told_by_its_size(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    finding = doctor.check_kept(folder, "models")
    assert (finding.name, finding.state, finding.advice) == ("models kept", State.OK, "")
    assert finding.text == f"{folder} holds none"
    manifest = ModelManifest(name="some-bloom", digest="ab" * 32, files={"config.json": Hashes.of_bytes(b"{}").file})
    for number, size in enumerate((2_000_000, 3_000_000, 1_000, 10_000)):
        place = folder / f"{number:064d}"[::-1]
        (place / "deep").mkdir(parents=True)
        (place / "deep" / "weights").write_bytes(bytes(size))
        (place / "link").symlink_to(place / "deep" / "weights")
    (folder / ("1" + "0" * 63) / "manifest").write_bytes(manifest.to_bytes())
    finding = doctor.check_kept(folder, "models")
    named = "100000000000 (some-bloom) of 3.0 MB, 000000000000 of 2.0 MB, 300000000000 of 0.0 MB"
    assert finding.text == f"{folder} holds 5.0 MB, the largest: {named}"
    assert finding.state is State.OK
    assert "delete folders there that no running node or client uses" in finding.advice


@pytest.mark.parametrize(
    ("output", "status", "words"),
    [
        ("2.13.0\nNVIDIA H200, 141 GB\n", 0, "NVIDIA H200, 141 GB"),
        ("2.13.0\n", 0, "torch 2.13.0 finds none"),
        ("", 1, "torch cannot be loaded (OSError: libcudart)"),
    ],
)
async def test_the_gpu(output: str, status: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(command: list[str], **options: object) -> subprocess.CompletedProcess[bytes]:
        await trio.lowlevel.checkpoint()
        return subprocess.CompletedProcess(command, status, output.encode(), b"Traceback\nOSError: libcudart\n")

    monkeypatch.setattr(trio, "run_process", run)
    finding = await doctor.check_gpu()
    assert words in finding.text
    assert (finding.state is State.OK) == ("NVIDIA H200" in words)


async def test_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in (await doctor.check_gpu()).text
