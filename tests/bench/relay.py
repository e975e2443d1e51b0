"""One hog among ten users of a relay, over TCP on loopback: nine have a circuit each, the tenth has sixteen and sends
as fast as it can. The relay, the nine, the hog and those whom they send to are four processes.

least-share-*: of the nine, who got least, against what would have been fair: a tenth of all that passed, or what was
asked for where that is less. *-moderate: each of the nine asks for a little less than a tenth of what the relay can
carry; *-greedy: they send as fast as they can, too. *-rated: the relay has a rate; *-unrated: the machine is the limit.
Then the relay is but one of the four that share its cores, and relay-cpu and users-cpu (the nine's) tell which of them
was at its end: who cannot send more has no claim to a share. out-per-in-*: bytes on the wire that the relay sent for
each that it was sent.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import trio

from net.addresses import Multiaddr, PeerAddress, parse, parse_peer, relayed_by
from net.host import open_host
from net.identity import Identity, PeerId
from net.io import receive_exactly
from net.relay.reservations import RelayLimits
from net.relay.server import RelayServer
from net.transports.base import Accept, Arrived, RawConnection, RawStream
from net.transports.circuit import CircuitTransport
from net.transports.tcp import TcpTransport
from tests.bench import report
from tests.bench.processes import another

MB = 1_000_000
USERS = 10
HOG = USERS - 1
HOGS_TARGETS, HOGS_CIRCUITS = 8, 2  # all that a relay grants one user
RATE_BYTES_PER_S = 4 * MB
PIECE_BYTES = 64 * 1024
MODERATE = 0.8  # of a fair share
WARM_UP_S = 2.0
NAME_BYTES = 4


# The relay's process


class _Counted(RawStream):
    """A socket whose bytes are counted."""

    def __init__(self, stream: RawStream, count: Counter[str]) -> None:
        self._stream = stream
        self._count = count

    def limit_unsent(self, size: int | None) -> None:
        self._stream.limit_unsent(size)

    def try_send(self, data: bytes | bytearray | memoryview) -> int:
        sent = self._stream.try_send(data)
        self._count["out"] += sent
        return sent

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)
        self._count["out"] += len(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self._stream.receive_some(max_bytes)
        self._count["in"] += len(data)
        return data

    async def receive_into(self, buffer: bytearray | memoryview) -> int:
        got = await self._stream.receive_into(buffer)
        self._count["in"] += got
        return got

    async def aclose(self) -> None:
        await self._stream.aclose()


class _CountingTransport(TcpTransport):
    def __init__(self, count: Counter[str]) -> None:
        super().__init__()
        self._count = count

    async def listen(
        self,
        address: Multiaddr,
        accept: Accept,
        *,
        task_status: trio.TaskStatus[Sequence[Multiaddr]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        async def counted(arrived: Arrived) -> None:
            if isinstance(arrived, RawConnection) and isinstance(arrived.stream, RawStream):
                stream = _Counted(arrived.stream, self._count)
                arrived = RawConnection(stream=stream, local=arrived.local, remote=arrived.remote)
            await accept(arrived)

        await super().listen(address, counted, task_status=task_status)


async def _relay(rate: float | None) -> None:
    count: Counter[str] = Counter()
    listen = [parse("/ip4/127.0.0.1/tcp/0")]
    async with (
        open_host(Identity.generate(), listen=listen, transports=[_CountingTransport(count)]) as host,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(RelayServer(host, RelayLimits(bytes_per_s=rate)).run)
        _say(str(host.peer_addresses[0]))
        await _answer(lambda: {**count, "cpu_s": _cpu_s(), "at": time.monotonic()})
        nursery.cancel_scope.cancel()


# The process of those who are sent to


async def _receive(relay: PeerAddress) -> None:
    """One host for each user; all count what comes from whom."""
    received: Counter[str] = Counter()

    async def take(arrived: Arrived) -> None:
        if not isinstance(arrived, RawConnection):
            return
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            user = str(int.from_bytes(await receive_exactly(arrived.stream, NAME_BYTES), "big"))
            while data := await arrived.stream.receive_some(PIECE_BYTES):
                received[user] += len(data)

    async with contextlib.AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        names = []
        for _ in range(USERS):
            circuit = CircuitTransport()
            host = await stack.enter_async_context(open_host(Identity.generate(), transports=[TcpTransport(), circuit]))
            await nursery.start(circuit.reserve, relay, take)
            names.append(str(host.peer_id))
        _say(names)
        await _answer(lambda: dict(received))
        nursery.cancel_scope.cancel()


# The processes of those who send


async def _send(relay: PeerAddress, targets: Sequence[PeerId], users: Sequence[int], bytes_per_s: float) -> None:
    """These users, each with ``bytes_per_s``; the hog with all that it can get."""
    async with contextlib.AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        for user in users:
            circuit = CircuitTransport()
            await stack.enter_async_context(open_host(Identity.generate(), transports=[TcpTransport(), circuit]))
            chosen = [each for each in targets[:HOGS_TARGETS] for _ in range(HOGS_CIRCUITS)]
            for target in chosen if user == HOG else [targets[user]]:
                opened = await circuit.dial(relayed_by(relay), target)
                await opened.stream.send_all(user.to_bytes(NAME_BYTES, "big"))
                nursery.start_soon(_pour, opened.stream, math.inf if user == HOG else bytes_per_s)
        _say("ready")
        await _answer(lambda: {"cpu_s": _cpu_s()})
        nursery.cancel_scope.cancel()


async def _pour(stream: trio.abc.Stream, bytes_per_s: float) -> None:
    piece = bytes(PIECE_BYTES)
    due = trio.current_time()
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while True:
            await stream.send_all(piece)
            due = max(due + len(piece) / bytes_per_s, trio.current_time() - 1)
            await trio.sleep_until(due)


# All of them: one line of JSON when it is ready, then one for each line that it reads


def _say(value: Any) -> None:
    print(json.dumps(value), flush=True)


def _cpu_s() -> float:
    return sum(os.times()[:2])


async def _answer(value: Any) -> None:
    with os.fdopen(0, "rb", closefd=False) as stdin:
        while await trio.to_thread.run_sync(stdin.readline, abandon_on_cancel=True):
            _say(value())


# The measuring process


class _Process:
    """Another of this module; ``told`` is its first line."""

    def __init__(self, popen: subprocess.Popen[str]) -> None:
        self._popen = popen
        self.told = self._line()

    def _line(self) -> Any:
        if self._popen.stdout is None:
            raise RuntimeError("no pipe")
        return json.loads(self._popen.stdout.readline())

    def ask(self) -> Any:
        if self._popen.stdin is None:
            raise RuntimeError("no pipe")
        self._popen.stdin.write("\n")
        self._popen.stdin.flush()
        return self._line()


@contextlib.contextmanager
def _process(**options: Any) -> Iterator[_Process]:
    with another("tests.bench.relay", "--part", json.dumps(options)) as popen:
        yield _Process(popen)


def _measure(rate: float | None, bytes_per_s: float, seconds: float) -> dict[str, float]:
    """One run: each of the nine sends ``bytes_per_s``."""
    with contextlib.ExitStack() as stack:
        start = stack.enter_context
        relay = start(_process(role="relay", rate=rate))
        targets = start(_process(role="receive", relay=relay.told))
        sending = partial(_process, role="send", relay=relay.told, targets=targets.told, bytes_per_s=bytes_per_s)
        users = start(sending(users=list(range(HOG))))
        start(sending(users=[HOG]))
        time.sleep(WARM_UP_S)
        before, received_before, users_before = relay.ask(), targets.ask(), users.ask()
        time.sleep(seconds)
        after, received_after, users_after = relay.ask(), targets.ask(), users.ask()
    taken = after["at"] - before["at"]
    speeds = [(received_after.get(str(n), 0) - received_before.get(str(n), 0)) / taken for n in range(USERS)]
    fair = min(sum(speeds) / USERS, bytes_per_s)
    return {
        "least-share": min(speeds[:HOG]) / fair,
        "hog-share": speeds[HOG] / (sum(speeds) / USERS),
        "out-per-in": (after["out"] - before["out"]) / (after["in"] - before["in"]),
        "MB-per-s": sum(speeds) / MB,
        "relay-cpu": (after["cpu_s"] - before["cpu_s"]) / taken,
        "users-cpu": (users_after["cpu_s"] - users_before["cpu_s"]) / taken,
    }


UNITS = {
    "least-share": ("of a fair one", 0.8, "higher"),
    "hog-share": ("of a fair one", None, "lower"),
    "out-per-in": ("bytes", 1.1, "lower"),
    "MB-per-s": ("MB/s", None, "higher"),
    "relay-cpu": ("of a core", None, "lower"),
    "users-cpu": ("of a core", None, "lower"),
}


def _figures(runs: int, seconds: float) -> list[report.Figure]:
    values: dict[tuple[str, str], list[float]] = {}
    for limited, rate in (("rated", RATE_BYTES_PER_S), ("unrated", None)):
        for run in range(runs):
            report.progress(f"relay: {limited}, run {run + 1} of {runs}")
            greedy = _measure(rate, math.inf, seconds)
            moderate = _measure(rate, MODERATE * greedy["MB-per-s"] * MB / USERS, seconds)
            for demand, found in (("greedy", greedy), ("moderate", moderate)):
                for name, value in found.items():
                    values.setdefault((name, f"{demand}-{limited}"), []).append(value)
    return [
        report.figure(f"{name}-{case}", found, UNITS[name][0], better=UNITS[name][2], goal=UNITS[name][1])
        for (name, case), found in sorted(values.items())
    ]


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement (default: 5)")
    parser.add_argument("--part", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    match options.part:
        case {"role": "relay", "rate": rate}:
            trio.run(_relay, rate)
        case {"role": "receive", "relay": relay}:
            trio.run(_receive, parse_peer(relay))
        case {"role": "send", "relay": relay, "targets": targets, "users": users, "bytes_per_s": bytes_per_s}:
            trio.run(_send, parse_peer(relay), [PeerId.from_string(each) for each in targets], users, bytes_per_s)
        case _:
            report.show("relay", _figures(options.runs, options.seconds), as_json=options.json)


if __name__ == "__main__":
    main()
