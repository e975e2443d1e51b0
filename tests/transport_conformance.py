"""What every transport does, as tests: subclass ``TransportConformance`` and give it a ``Rig``."""

from __future__ import annotations

import os
import random
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass

import pytest
import trio
import trio.testing

from net.addresses import Multiaddr
from net.errors import AddressError, ConnectionLost, DialError, NetError
from net.host import open_host
from net.identity import Identity
from net.limits import Limits
from net.mux.base import Muxer, Stream
from net.security.noise import NoiseSecurity
from net.security.tls import TlsSecurity
from net.transports.base import Accept, Arrived, RawConnection, RunningTransport, Transport
from tests.net_helpers import receive_all, receive_count, seeded

SIZES = [0, 1, 125, 126, 65_535, 65_536, 65_537, 2_000_000]
PATIENCE_S = 10.0  # no test of this suite takes a tenth of it


@dataclass(frozen=True, kw_only=True)
class Rig:
    """One kind of transport in a world of its own.

    Attributes:
        make: a transport of this world.
        anywhere: where to listen when the port does not matter.
        foreign: addresses of other kinds.
        nobody: an address that refuses, as long as the block lasts.
        abrupt: what a reader sees of a peer that vanished without goodbye: the end, or a broken connection.
        babbling: somebody who answers a dial with these words; where None, one who accepts and says them.
        make_for: in place of ``make``, of transports that need to know whose they are.
    """

    make: Callable[[], Transport] | None = None
    anywhere: Multiaddr
    foreign: Sequence[Multiaddr]
    nobody: Callable[[], AbstractAsyncContextManager[Multiaddr]]
    abrupt: type[trio.BrokenResourceError] | None
    babbling: Callable[[bytes], AbstractAsyncContextManager[Multiaddr]] | None = None
    make_for: Callable[[Identity], Transport] | None = None

    def of(self, identity: Identity) -> Transport:
        """A transport of ``identity``'s."""
        if self.make_for is not None:
            return self.make_for(identity)
        assert self.make is not None
        return self.make()


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """A connection, from both ends."""

    dialled: RawConnection
    accepted: RawConnection
    bound: Multiaddr


class MuxedStream(trio.abc.Stream):
    """One stream of a connection that was muxed by its transport, as if it were the whole connection."""

    def __init__(self, mux: Muxer, stream: Stream) -> None:
        self._mux = mux
        self._stream = stream

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        with broken_when_lost():
            await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()
        with broken_when_lost():
            await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        with broken_when_lost():
            return await self._stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        finally:
            self._mux.close()


@contextmanager
def broken_when_lost() -> Iterator[None]:
    """A stream's error in the words of a transport."""
    try:
        yield
    except NetError as error:
        raise trio.BrokenResourceError(str(error)) from error


@asynccontextmanager
async def byte_stream(arrived: Arrived, *, dialled: bool) -> AsyncIterator[RawConnection]:
    """A connection's bytes: of one that its transport has muxed, those of the first stream, which the dialler opens."""
    if isinstance(arrived, RawConnection):
        async with arrived.stream:
            yield arrived
        return
    first, coming = trio.open_memory_channel[Stream](1)

    async def on_stream(stream: Stream) -> None:
        first.send_nowait(stream)
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        await nursery.start(arrived.mux.run, on_stream)
        if dialled:
            stream = arrived.mux.open_stream()
            await stream.send_all(b"!")  # a stream is not known to the other side before its first byte
        else:
            stream = await coming.receive()
            assert await stream.receive_some(1) == b"!"
        async with MuxedStream(arrived.mux, stream) as bytes_:
            yield RawConnection(stream=bytes_, local=arrived.local, remote=arrived.remote)


@asynccontextmanager
async def running(transport: Transport) -> AsyncIterator[Transport]:
    """A transport that can dial, as long as the block lasts."""
    async with trio.open_nursery() as nursery:
        if isinstance(transport, RunningTransport):
            await nursery.start(transport.run)
        yield transport
        nursery.cancel_scope.cancel()


class TransportConformance(ABC):
    @abstractmethod
    def rig(self) -> Rig: ...

    @asynccontextmanager
    async def listening(self, rig: Rig, accept: Accept, at: Multiaddr | None = None) -> AsyncIterator[Multiaddr]:
        """A listener for as long as the block lasts, and a limit to how long that may be."""
        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as nursery:
                [bound] = await nursery.start(rig.of(seeded(2)).listen, at or rig.anywhere, accept)
                yield bound
                nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def pair(self) -> AsyncIterator[Pair]:
        rig = self.rig()
        arrivals, departures = trio.open_memory_channel[RawConnection](1)

        async def accept(arrived: Arrived) -> None:
            async with byte_stream(arrived, dialled=False) as raw:
                arrivals.send_nowait(raw)
                await trio.sleep_forever()

        async with (
            self.listening(rig, accept) as bound,
            self.dialled(rig, bound) as dialled,
        ):
            yield Pair(dialled=dialled, accepted=await departures.receive(), bound=bound)

    @asynccontextmanager
    async def dialled(self, rig: Rig, address: Multiaddr) -> AsyncIterator[RawConnection]:
        """A connection from a transport of its own."""
        async with (
            running(rig.of(seeded(1))) as transport,
            byte_stream(await transport.dial(address), dialled=True) as raw,
        ):
            yield raw

    # The byte stream

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("upwards", [True, False], ids=["to the listener", "to the dialler"])
    async def test_bytes_arrive_complete_and_in_order(self, size: int, upwards: bool) -> None:
        chance = random.Random(size)
        data = chance.randbytes(size)
        async with self.pair() as pair:
            ends = pair.dialled.stream, pair.accepted.stream
            sender, receiver = ends if upwards else ends[::-1]

            async def send() -> None:
                position = 0
                while position < size:
                    count = chance.choice([0, 1, 100, 5_000, 65_536, 300_000])
                    await sender.send_all(data[position : position + count])
                    position += count
                await sender.aclose()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                received = bytearray()
                while part := await receiver.receive_some(chance.choice([1_000, 70_000, None])):
                    received += part
            assert received == data
            assert await receiver.receive_some() == b""

    async def test_both_directions_at_once(self) -> None:
        data = {True: random.Random(1).randbytes(1_000_000), False: random.Random(2).randbytes(1_000_000)}
        received: dict[bool, bytes] = {}

        async def send(stream: trio.abc.Stream, number: bool) -> None:
            for start in range(0, len(data[number]), 10_000):
                await stream.send_all(data[number][start : start + 10_000])

        async def receive(stream: trio.abc.Stream, number: bool) -> None:
            received[number] = await receive_count(stream, len(data[number]))

        async with self.pair() as pair, trio.open_nursery() as nursery:
            for stream, number in ((pair.dialled.stream, True), (pair.accepted.stream, False)):
                nursery.start_soon(send, stream, number)
                nursery.start_soon(receive, stream, not number)
        assert received == data

    async def test_a_sender_waits_for_a_reader_that_does_not_read(self) -> None:
        sent = 0

        async def send(stream: trio.abc.Stream) -> None:
            nonlocal sent
            while sent < 64_000_000:
                await stream.send_all(bytes(100_000))
                sent += 100_000

        async with self.pair() as pair, trio.open_nursery() as nursery:
            nursery.start_soon(send, pair.dialled.stream)
            before = -1
            while before != sent:  # until a round of everybody's changes nothing
                before = sent
                await trio.testing.wait_all_tasks_blocked(0.05)
            assert sent < 64_000_000
            nursery.cancel_scope.cancel()

    async def test_a_cancelled_reader_loses_nothing(self) -> None:
        async with self.pair() as pair:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(pair.accepted.stream.receive_some)
                    await trio.testing.wait_all_tasks_blocked()
                    scope.cancel()
            await pair.dialled.stream.send_all(b"and again")
            assert await receive_count(pair.accepted.stream, 9) == b"and again"

    async def test_it_is_a_stream_in_every_way_of_trio_s(self) -> None:
        async with trio.open_nursery() as nursery:

            async def hold(*, task_status: trio.TaskStatus[Pair]) -> None:
                async with self.pair() as pair:
                    task_status.started(pair)
                    await trio.sleep_forever()

            async def make() -> tuple[trio.abc.Stream, trio.abc.Stream]:
                pair = await nursery.start(hold)
                return pair.dialled.stream, pair.accepted.stream

            await trio.testing.check_two_way_stream(make, None)
            nursery.cancel_scope.cancel()

    # Ends

    async def test_a_close_reads_as_the_end_after_the_last_byte(self) -> None:
        async with self.pair() as pair:
            await pair.accepted.stream.send_all(b"last words")
            await pair.accepted.stream.aclose()
            assert await receive_all(pair.dialled.stream) == b"last words"
            assert await pair.dialled.stream.receive_some() == b""

    async def test_a_peer_that_vanishes_is_noticed(self) -> None:
        abrupt = self.rig().abrupt
        async with self.pair() as pair:
            await pair.accepted.stream.send_all(b"last words")
            await trio.aclose_forcefully(pair.accepted.stream)
            assert await receive_count(pair.dialled.stream, 10) == b"last words"
            if abrupt is None:
                assert await pair.dialled.stream.receive_some() == b""
            else:
                with pytest.raises(abrupt):
                    await pair.dialled.stream.receive_some()

    async def test_sending_to_one_who_left_breaks(self) -> None:
        async with self.pair() as pair:
            await pair.accepted.stream.aclose()
            with pytest.raises(trio.BrokenResourceError):
                while True:
                    await pair.dialled.stream.send_all(bytes(100_000))

    # Dialling

    async def test_a_refused_dial_says_where(self) -> None:
        rig = self.rig()
        async with rig.nobody() as address, running(rig.of(seeded(1))) as transport:
            with pytest.raises(DialError, match=str(address)):
                await transport.dial(address)

    @asynccontextmanager
    async def babbling(self, rig: Rig, words: bytes) -> AsyncIterator[Multiaddr]:
        if rig.babbling is not None:
            async with rig.babbling(words) as address:
                yield address
            return

        async def babble(arrived: Arrived) -> None:
            async with byte_stream(arrived, dialled=False) as raw:
                try:
                    await raw.stream.send_all(words)
                except trio.BrokenResourceError:
                    pass  # the dialler has heard enough

        async with self.listening(rig, babble) as bound:
            yield bound

    async def test_a_host_that_dials_a_babbler_fails_in_time(self) -> None:
        """Whatever answers at a peer's address, the dial ends, with the error of dials."""
        for words in (b"", b"\x13/multistream/9.9.9\n", b"HTTP/1.1 400 Bad Request\r\n\r\n", bytes(5_000)):
            rig = self.rig()
            limits = Limits(dial_s=0.5)
            async with (
                self.babbling(rig, words) as bound,
                open_host(seeded(1), transports=[rig.of(seeded(1))], limits=limits) as host,
            ):
                with pytest.raises(DialError):
                    await host.connect(seeded(2).peer_id, [bound])
                assert host.swarm.connections == []

    async def test_a_host_that_dials_a_silent_one_gives_up(self) -> None:
        rig = self.rig()
        ended = trio.Event()

        async def listen_silently(arrived: Arrived) -> None:
            async with byte_stream(arrived, dialled=False) as raw:
                try:
                    await receive_all(raw.stream)
                except trio.BrokenResourceError:
                    pass  # some transports end so
            ended.set()

        limits = Limits(dial_s=0.1)
        silent = self.listening(rig, listen_silently) if rig.babbling is None else rig.babbling(b"")
        async with (
            silent as bound,
            open_host(seeded(1), transports=[rig.of(seeded(1))], limits=limits) as host,
        ):
            with pytest.raises(DialError, match="no answer"):
                await host.connect(seeded(2).peer_id, [bound])
            if rig.babbling is None:
                await ended.wait()  # nothing is left open

    async def test_a_cancelled_dial_leaves_nothing_open(self) -> None:
        rig = self.rig()
        async with self.listening(rig, nothing) as bound:
            before = open_files()
            async with running(rig.of(seeded(1))) as transport:
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await transport.dial(bound)
            assert scope.cancelled_caught
            assert open_files() == before

    @pytest.mark.parametrize("security", [NoiseSecurity, TlsSecurity])
    async def test_a_host_that_leaves_says_goodbye(self, security: type[NoiseSecurity] | type[TlsSecurity]) -> None:
        """Its peers read of an end, not of a broken connection."""
        rig = self.rig()
        near, far = seeded(1), seeded(2)
        leave = trio.Event()

        async def serve(*, task_status: trio.TaskStatus[Sequence[Multiaddr]]) -> None:
            transports, securities = [rig.of(far)], [security(far)]
            async with open_host(far, listen=[rig.anywhere], transports=transports, securities=securities) as host:
                task_status.started(host.listening)
                await leave.wait()

        with trio.fail_after(PATIENCE_S):
            async with (
                trio.open_nursery() as nursery,
                open_host(near, transports=[rig.of(near)], securities=[security(near)]) as host,
            ):
                connection = await host.connect(far.peer_id, await nursery.start(serve))
                leave.set()
                while host.swarm.connections:
                    await trio.testing.wait_all_tasks_blocked()
                with pytest.raises(ConnectionLost, match="closed by the other side"):
                    connection.mux.open_stream()

    # Listening

    async def test_addresses_are_real_ones(self) -> None:
        rig = self.rig()
        async with self.pair() as pair:
            assert pair.bound != rig.anywhere
            assert rig.of(seeded(1)).can_dial(pair.bound)
            assert pair.dialled.remote == pair.accepted.local == pair.bound
            assert pair.dialled.local == pair.accepted.remote
            assert pair.accepted.remote != pair.bound
        for address in rig.foreign:
            transport = rig.of(seeded(1))
            assert not transport.can_dial(address)
            with pytest.raises((DialError, AddressError)):
                await transport.dial(address)
            with pytest.raises(AddressError):
                await transport.listen(address, nothing, task_status=trio.TASK_STATUS_IGNORED)

    async def test_a_taken_address_cannot_be_listened_on(self) -> None:
        rig = self.rig()
        async with self.pair() as pair:
            with pytest.raises(AddressError, match="in use"):
                await rig.of(seeded(1)).listen(pair.bound, nothing, task_status=trio.TASK_STATUS_IGNORED)

    async def test_a_cancelled_listener_frees_its_address(self) -> None:
        rig = self.rig()
        before = open_files()
        at = rig.anywhere
        for _ in range(2):
            async with self.listening(rig, nothing, at) as bound, self.dialled(rig, bound):
                pass
            at = bound
            async with running(rig.of(seeded(1))) as transport:
                with pytest.raises(DialError):
                    await transport.dial(bound)
        assert open_files() == before

    async def test_many_connections_at_once(self) -> None:
        rig = self.rig()

        async def echo(arrived: Arrived) -> None:
            async with byte_stream(arrived, dialled=False) as raw:
                await raw.stream.send_all(await receive_count(raw.stream, 4))

        async def ask(bound: Multiaddr, number: int) -> None:
            async with self.dialled(rig, bound) as raw:
                await raw.stream.send_all(b"%4d" % number)
                assert await receive_count(raw.stream, 4) == b"%4d" % number

        async with self.listening(rig, echo) as bound, trio.open_nursery() as askers:
            for number in range(50):
                askers.start_soon(ask, bound, number)


async def nothing(arrived: Arrived) -> None:
    async with byte_stream(arrived, dialled=False):
        pass


def open_files() -> set[tuple[str, str]]:
    """What this process has open, where the system tells."""
    found: set[tuple[str, str]] = set()
    if not os.path.isdir("/proc/self/fd"):
        return found
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add((name, os.readlink(f"/proc/self/fd/{name}")))
        except OSError:  # the folder's own
            continue
    return found
