"""Lines are held to what they claim: delay, rate, loss, and changes of them while packets flow."""

from __future__ import annotations

import statistics
from collections.abc import AsyncGenerator

import trio

from interop.lab.endpoints import dialled, listening, udp
from interop.lab.network import Internet, PublicHost, internet
from interop.lab.probes import Finding, finding

RTT_MS, OTHER_RTT_MS = 50.0, 10.0
RTT_SLACK_MS = 10.0  # what a busy machine may add; an idle one adds about 1
RATE_MBIT = 20.0
LOSS = 0.05
DATAGRAMS = 4000
SECONDS = 2.0
CHUNK = 1 << 16
PORT = 9000


async def run() -> AsyncGenerator[Finding, None]:
    """All findings about lines."""
    net = internet()
    one, other = net.host("one", rtt_ms=RTT_MS), net.host("other", rtt_ms=RTT_MS)
    async with net.up():
        yield _near("round trip, 50 + 50 ms", 2 * RTT_MS, await round_trip_ms(one, other))
        await one.line(rtt_ms=OTHER_RTT_MS)
        yield _near("round trip, changed to 10 + 50 ms", OTHER_RTT_MS + RTT_MS, await round_trip_ms(one, other))
        yield await _loss(one, other)
        yield await _cut(one, other)
        await other.line(rtt_ms=OTHER_RTT_MS)
        yield await _limited("upload of 20 Mbit/s", one, other)
        yield await _limited("download of 20 Mbit/s", other, one)
        yield await _ceiling(net, one, other)


async def round_trip_ms(one: PublicHost, other: PublicHost) -> float:
    """The median time of a TCP handshake, which the kernels do between them."""
    times = []
    async with listening(other, PORT):
        for _ in range(20):
            start = trio.current_time()
            async with dialled(one, (other.address, PORT)) as connection:
                if connection is not None:
                    times.append((trio.current_time() - start) * 1000)
    return statistics.median(times) if times else float("inf")


def _near(name: str, expected_ms: float, found_ms: float) -> Finding:
    return Finding(
        name=name,
        expected=f"{expected_ms:g} to {expected_ms + RTT_SLACK_MS:g} ms",
        found=f"{found_ms:.1f} ms",
        passed=expected_ms <= found_ms <= expected_ms + RTT_SLACK_MS,
        value=found_ms,
    )


async def _loss(one: PublicHost, other: PublicHost) -> Finding:
    """Datagrams, in bursts that no queue minds."""
    await one.line(loss=LOSS)
    async with udp(one, PORT) as sender, udp(other, PORT) as receiver:
        heard: list[object] = []

        async def listen() -> None:
            while True:
                heard.append(await receiver.receive())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            for _ in range(DATAGRAMS // 10):
                for _ in range(10):
                    await sender.send((other.address, PORT))
                await trio.sleep(0.003)
            await trio.sleep(1.0)  # the last are under way
            nursery.cancel_scope.cancel()
    await one.line(loss=0.0)
    lost = 1 - len(heard) / DATAGRAMS
    spread = 4 * (LOSS * (1 - LOSS) / DATAGRAMS) ** 0.5  # one run in 16 000 is further off
    return Finding(
        name="loss of 5 %",
        expected=f"{(LOSS - spread) * 100:.1f} to {(LOSS + spread) * 100:.1f} %",
        found=f"{lost * 100:.1f} %",
        passed=abs(lost - LOSS) <= spread,
        value=lost * 100,
    )


async def _cut(one: PublicHost, other: PublicHost) -> Finding:
    """Nothing passes a line that is cut, and all that is sent after it is mended."""
    async with udp(one, PORT + 1) as sender, udp(other, PORT + 1) as receiver:
        seen = []
        for change in (one.cut, one.mend):
            await change()
            await sender.send((other.address, PORT + 1))
            seen.append(await receiver.hear(4 * RTT_MS / 1000) is not None)
    return finding("line cut, then mended", [False, True], seen)


async def _limited(name: str, uploading: PublicHost, measured: PublicHost) -> Finding:
    """TCP through a limit, always from the same side: the limit is on its upload, or on the other's download."""
    if name.startswith("upload"):
        await uploading.line(up_mbit=RATE_MBIT)
        mbit = await throughput_mbit(uploading, measured)
        await uploading.line(up_mbit=None)
    else:
        await uploading.line(down_mbit=RATE_MBIT)
        mbit = await throughput_mbit(measured, uploading)
        await uploading.line(down_mbit=None)
    return Finding(
        name=name,
        expected=f"{RATE_MBIT * 0.8:g} to {RATE_MBIT:g} Mbit/s",
        found=f"{mbit:.1f} Mbit/s",
        passed=RATE_MBIT * 0.8 <= mbit <= RATE_MBIT,
        value=mbit,
    )


async def _ceiling(net: Internet, one: PublicHost, other: PublicHost) -> Finding:
    """What the core carries: the total of all lines, on this machine, as busy as it is."""
    for host in (one, other):
        await host.line(rtt_ms=0.0)
    mbit = await throughput_mbit(one, other)
    return Finding(
        name="ceiling of the core", expected=">= 100 Mbit/s", found=f"{mbit:.0f} Mbit/s", passed=mbit >= 100, value=mbit
    )


async def throughput_mbit(sender: PublicHost, receiver: PublicHost) -> float:
    """Payload of one TCP connection, slow start left out."""
    async with (
        listening(receiver, PORT) as listener,
        dialled(sender, (receiver.address, PORT)) as outgoing,
        trio.open_nursery() as nursery,
    ):
        if outgoing is None or await listener.accept(1.0) is None:
            nursery.cancel_scope.cancel()
            return 0.0
        incoming = listener.accepted[0]

        async def pour() -> None:
            while True:
                await outgoing.send(bytes(CHUNK))

        nursery.start_soon(pour)
        await _drain(incoming, 1.0)
        start = trio.current_time()
        received = await _drain(incoming, SECONDS)
        taken = trio.current_time() - start
        nursery.cancel_scope.cancel()
    return received * 8e-6 / taken


async def _drain(incoming: trio.socket.SocketType, duration_s: float) -> int:
    received = 0
    with trio.move_on_after(duration_s):
        while True:
            received += len(await incoming.recv(CHUNK))
    return received
