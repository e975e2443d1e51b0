"""Our nodes over the simulated internet without help: public to public, out of a home, and (in vain) into one."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncGenerator

import trio

from interop.lab.asking import first_line
from interop.lab.network import Host, PublicHost, internet
from interop.lab.nodes import address, node
from interop.lab.probes import Finding, finding

RTT_MS = 50.0
SLACK_MS = 25.0  # our own protocols on a busy machine
PORT = 4001
COMMAND_S = 60.0


async def run() -> AsyncGenerator[Finding, None]:
    """All findings about dials."""
    net = internet()
    one, other = net.host("one", rtt_ms=RTT_MS), net.host("other", rtt_ms=RTT_MS)
    home = net.home("home", nat="port-restricted", rtt_ms=RTT_MS)
    inner = home.host()
    async with net.up():
        async with node(one) as first, node(other) as second, node(inner) as third:
            await first.start(port=PORT)
            await second.start(port=PORT)
            await third.start(port=PORT)
            public = address(other.address, PORT)
            for name, caller in (("public to public", first), ("home to public", third)):
                reached = await caller.connect(second, addresses=[public])
                yield finding(f"{name}: direct", True, reached.direct)
                yield _round_trip(f"{name}: ping", await caller.ping_ms(second) if reached.connected else None)
            reached = await first.connect(third, addresses=[address(home.address, PORT)])
            yield finding("public to home: connected", False, reached.connected)
        yield _round_trip("home to public: raceme ping", await _commands(inner, one))


def _round_trip(name: str, found_ms: float | None) -> Finding:
    expected_ms = 2 * RTT_MS
    return Finding(
        name=name,
        expected=f"{expected_ms:g} to {expected_ms + SLACK_MS:g} ms",
        found="none" if found_ms is None else f"{found_ms:.1f} ms",
        passed=found_ms is not None and expected_ms <= found_ms <= expected_ms + SLACK_MS,
        value=found_ms,
    )


async def _commands(inner: Host, outer: PublicHost) -> float | None:
    """The commands that people use: ``raceme relay`` in public, ``raceme ping`` at home."""
    listen = address(outer.address, PORT)
    with trio.move_on_after(COMMAND_S):
        async with outer.process(["raceme", "relay", "--json", "--listen", listen, "--until-eof"]) as relay:
            told = await first_line(relay)
            command = ["raceme", "ping", "--json", "--count", "3", told["address"]]
            async with inner.process(command, stderr=subprocess.DEVNULL) as ping:
                return float((await first_line(ping))["median_ms"])
    return None
