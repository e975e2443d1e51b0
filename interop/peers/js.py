"""js-libp2p, through ``js/peer.mjs`` and JSON lines on its standard input and output."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio

from interop.peers.base import NO_RELAYING, START_S, PeerError, Relaying, Sight, program
from interop.peers.fetch import fetch_js
from net.addresses import Multiaddr, PeerAddress, parse, parse_peer
from net.identity import PeerId

STEP_S = 60.0
MAX_LINE_BYTES = 64 * 1024


class JsDriver:
    name = "js"

    def fetch(self) -> None:
        fetch_js()

    @asynccontextmanager
    async def start(self, transport: str, security: str, relaying: Relaying = NO_RELAYING) -> AsyncIterator[JsPeer]:
        through = "" if relaying.through is None else str(relaying.through)
        words = [through or ("serve" if relaying.serves else "dial")] if relaying != NO_RELAYING else []
        async with node([transport, security, *words]) as peer:
            yield peer

    @asynccontextmanager
    async def start_finder(self) -> AsyncIterator[JsPeer]:
        async with node(["tcp", "noise", "kad"]) as peer:
            yield peer


@asynccontextmanager
async def node(words: Sequence[str], *, within: Sequence[str] = ()) -> AsyncIterator[JsPeer]:
    """A running peer. ``within``: the beginning of its command line, for one that is to run somewhere else."""
    interpreter, script = fetch_js()
    async with program([*within, str(interpreter), str(script), *words]) as process:
        peer = JsPeer(process)
        hello = await peer._receive(START_S)
        peer.address = parse_peer(hello["addresses"][0])
        yield peer


class JsPeer:
    address: PeerAddress

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._said = b""
        self._calls = 0

    async def echo(self, to: PeerAddress, count: int) -> float:
        return float((await self._call("echo", address=str(to), bytes=count))["seconds"])

    async def ping(self, to: PeerAddress) -> float:
        return float((await self._call("ping", address=str(to)))["seconds"])

    async def identify(self, to: PeerAddress) -> Sight:
        return Sight(**await self._call("identify", address=str(to)))

    async def addresses(self) -> Sequence[Multiaddr]:
        """Where it tells others that it is."""
        return [parse(each) for each in (await self._call("addresses"))["addresses"]]

    # Kademlia, if it is in it

    async def join(self, to: PeerAddress) -> None:
        await self._call("dial", address=str(to))

    async def provide(self, multihash: bytes) -> None:
        await self._call("provide", multihash=multihash.hex())

    async def find_providers(self, multihash: bytes) -> Sequence[PeerId]:
        found = await self._call("providers", multihash=multihash.hex())
        return [PeerId.from_string(each) for each in found["peers"]]

    async def find_peer(self, peer_id: PeerId) -> Sequence[Multiaddr]:
        found = await self._call("find", peer=str(peer_id))
        suffix = f"/p2p/{peer_id}"
        return [parse(each.removesuffix(suffix)) for each in found["addresses"]]

    # AutoNAT v2, if it speaks it

    async def verified(self) -> Sequence[Multiaddr]:
        """Where others have dialled it back."""
        return [parse(each) for each in (await self._call("verified"))["addresses"]]

    async def _call(self, what: str, **more: Any) -> dict[str, Any]:
        if self._process.stdin is None:
            raise PeerError("node has no input")
        self._calls += 1
        line = json.dumps({"id": self._calls, "do": what, **more})
        await self._process.stdin.send_all(line.encode() + b"\n")
        while True:
            answer = await self._receive(STEP_S)
            if answer["id"] == self._calls:  # an older one belongs to a call that was given up
                break
        if "error" in answer:
            raise PeerError(f"js: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    async def _receive(self, timeout_s: float) -> dict[str, Any]:
        if self._process.stdout is None:
            raise PeerError("node has no output")
        with trio.move_on_after(timeout_s):
            while b"\n" not in self._said:
                part = await self._process.stdout.receive_some()
                if not part or len(self._said) > MAX_LINE_BYTES:
                    raise PeerError("node ended, or talks without end")
                self._said += part
            line, _, self._said = self._said.partition(b"\n")
            message: dict[str, Any] = json.loads(line)
            return message
        raise PeerError(f"node did not answer within {timeout_s:g} s")
