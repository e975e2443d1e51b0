"""Who provides what, and where peers are, over libp2p's own Kademlia: every role played by each implementation.

A case: a server that two others know; one of them provides a piece of content, the other finds out who does, and then
where that peer is. Neither has met the other. In results, ``peer`` is the server and ``direction`` says who looks for
whom.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack

import trio

from interop.peers.base import Driver, Finder, PeerError
from interop.peers.fetch import FetchError
from interop.peers.ours import OURS, OurDriver
from interop.suite import Result, reasons
from net import errors

CASE_S = 40.0
FOUND_S = 15.0  # foreign peers do not tell when they have taken note of a server
RETRY_S = 0.25
SHA_256 = b"\x12\x20"  # how a multihash begins


async def run(drivers: Sequence[Driver]) -> AsyncGenerator[Result, None]:
    """Results as they come, with one foreign implementation after another."""
    for driver in drivers:
        try:
            await trio.to_thread.run_sync(driver.fetch)
        except FetchError:
            continue  # the suite before us has told
        by_name: dict[str, Driver] = {OURS: OurDriver(), driver.name: driver}
        for server, provider, seeker in itertools.product(by_name, repeat=3):
            if len({server, provider, seeker}) > 1:
                yield await _run_case(by_name, server, provider, seeker)


async def _run_case(by_name: Mapping[str, Driver], server: str, provider: str, seeker: str) -> Result:
    failure: str | None = None
    found_s = 0.0
    try:
        with trio.fail_after(CASE_S):
            async with AsyncExitStack() as stack:
                middle, giver, taker = [
                    await stack.enter_async_context(by_name[name].start_finder()) for name in (server, provider, seeker)
                ]
                for each in (giver, taker):
                    await each.join(middle.address)
                found_s = await _seek(giver, taker, SHA_256 + hashlib.sha256(os.urandom(32)).digest())
    except* (errors.NetError, PeerError, OSError) as group:
        failure = "; ".join(reasons(group))
    except* trio.TooSlowError:
        failure = f"not done within {CASE_S:g} s"
    return Result(
        peer=server,
        transport="kademlia",
        security="noise",
        direction=f"{seeker}->{provider}",
        failure=failure,
        took_s=None if failure else found_s,
        took="found",
    )


async def _seek(giver: Finder, taker: Finder, multihash: bytes) -> float:
    """Seconds for the first search that succeeds."""
    who, where = giver.address.peer_id, giver.address.address
    wrong = "it was not provided"
    with trio.move_on_after(FOUND_S):
        while True:
            try:
                await giver.provide(multihash)
                start = trio.current_time()
                providers = await taker.find_providers(multihash)
                if who in providers:
                    seconds = trio.current_time() - start
                    known = await taker.find_peer(who)
                    if where in known:
                        return seconds
                    wrong = f"the provider is said to be at {', '.join(map(str, known)) or 'no address'}, not {where}"
                else:
                    wrong = f"{len(providers)} providers were found, and not the one"
            except (PeerError, errors.NetError) as error:
                wrong = str(error)
            await trio.sleep(RETRY_S)
    raise PeerError(wrong)
