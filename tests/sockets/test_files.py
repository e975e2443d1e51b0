"""Files over real connections, to processes that are killed half-way."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import trio

from net.addresses import parse
from net.files.pieces import PIECE_BYTES
from net.files.server import FileServer
from net.host import open_host
from net.identity import Identity
from tests.sockets.commands import LOOPBACK

PIECES = 12
PATIENCE_S = 60.0
FETCH = """
import os, signal, sys
from dataclasses import dataclass
from pathlib import Path
import trio
from net.addresses import parse_peer
from net.files.fetch import fetch
from net.files.pieces import FileId
from net.host import open_host
from net.identity import Identity, PeerId

address, root, size, target, stop = sys.argv[1:]

@dataclass
class Holder:
    peer_id: PeerId
    addresses: list

def progress(done, total):
    print(done, flush=True)
    if done >= int(stop):
        os.kill(os.getpid(), signal.SIGKILL)

async def main():
    peer = parse_peer(address)
    async with open_host(Identity.generate()) as host:
        holder = Holder(peer.peer_id, [peer.address])
        await fetch(host, FileId(bytes.fromhex(root), int(size)), [holder], Path(target), progress=progress)

trio.run(main)
"""


async def test_a_process_that_was_killed_is_gone_on_from(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    data = random.Random(3).randbytes(PIECES * PIECE_BYTES)
    source.write_bytes(data)
    target.write_bytes(b"what was there")
    with trio.fail_after(PATIENCE_S):
        async with open_host(Identity.generate(), listen=[parse(LOOPBACK)]) as host:
            file = await FileServer(host).add(source)

            async def fetching(stop: int) -> tuple[int, list[int]]:
                """How a process ended that kills itself once it has so many bytes, and how many it had when."""
                arguments = (str(host.peer_addresses[0]), str(file), str(file.size), str(target), str(stop))
                done = await trio.run_process(
                    [sys.executable, "-c", FETCH, *arguments], capture_stdout=True, check=False
                )
                return done.returncode, [int(line) for line in done.stdout.split()]

            for stop in (3 * PIECE_BYTES, 8 * PIECE_BYTES):
                status, seen = await fetching(stop)
                assert (status, seen[-1]) == (-signal.SIGKILL, stop)
                assert target.read_bytes() == b"what was there"
            assert seen[0] >= 3 * PIECE_BYTES  # what the first one had
            status, seen = await fetching(2 * file.size)
            assert (status, seen[-1]) == (0, file.size)
            assert seen[0] >= 8 * PIECE_BYTES
    assert target.read_bytes() == data
    assert sorted(os.listdir(tmp_path)) == ["source", "target"]
