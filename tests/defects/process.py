"""A peer as a process of its own, which tests kill and stop.

As a program: a host of ours that says where it is on standard output, and on each stream sends ``BEGINNING`` and then
nothing more.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from net import addresses
from net.addresses import PeerAddress
from net.host import open_host
from net.mux.base import Stream
from net.swarm import Connection
from tests.defects.stacks import PROTOCOL
from tests.net_helpers import seeded

BEGINNING = b"the beginning of a long answer"
START_S = 40.0


class PeerProcess:
    """A peer that runs, until it is killed or stopped."""

    def __init__(self, popen: subprocess.Popen[str]) -> None:
        self._popen = popen
        timer = threading.Timer(START_S, popen.kill)
        timer.start()
        try:
            assert popen.stdout is not None
            self.address: PeerAddress = addresses.parse_peer(popen.stdout.readline().strip())
        finally:
            timer.cancel()

    def kill(self) -> None:
        """End it at once, and see it end."""
        self._popen.kill()
        self._popen.wait(10)

    def stop(self) -> None:
        """Stop it where it is, and see it stopped. Its sockets stay open, and the kernel goes on acknowledging."""
        self._popen.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(self._popen.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)


@contextmanager
def peer_process() -> Iterator[PeerProcess]:
    """A running peer; killed at the end of the block."""
    popen = subprocess.Popen([sys.executable, "-m", "tests.defects.process"], stdout=subprocess.PIPE, text=True)
    try:
        yield PeerProcess(popen)
    finally:
        popen.kill()  # which ends a stopped one too
        popen.communicate()


async def _serve() -> None:
    async def begin(connection: Connection, stream: Stream) -> None:
        await stream.send_all(BEGINNING)
        await trio.sleep_forever()

    async with open_host(seeded(1), listen=[addresses.parse("/ip4/127.0.0.1/tcp/0")]) as host:
        host.handle(PROTOCOL, begin)
        print(host.peer_addresses[0], flush=True)
        await trio.sleep_forever()


if __name__ == "__main__":
    trio.run(_serve)
