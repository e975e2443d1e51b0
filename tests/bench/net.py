"""The data path between two processes on loopback, against trio.SSLStream over TCP in the same run.

throughput-*: 1 MB messages in one direction, acknowledged once at the end; with 8 streams, the reference has 8
connections. rtt-*: echo of that size, median of each run. rtt-1KB-beside-bulk-p95: 95th percentile of a 1 KB echo
while another stream of the same connection moves 50 MB, against the idle one. throughput-60ms: through a proxy that
delays each direction by 30 ms and passes 12.5 MB/s, against raw TCP through the same proxy. throughput-relayed: through
that proxy to a relay, a third process, and on to the serving process, against our direct connection through the proxy.
*-relayed-loopback, rtt-1KB-relayed: through the relay without the proxy. *-quic: over QUIC, on a
loopback that carries datagrams of 16 KiB. cpu-*: processor seconds of both processes for a GB through one stream.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import os
import ssl
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from net.addresses import Multiaddr, PeerAddress, parse, parse_peer, relayed_by
from net.host import Host, open_host
from net.identity import Identity
from net.io import receive_exactly
from net.mux.base import Stream as MuxStream
from net.relay.server import RelayServer
from net.security.base import Security
from net.security.noise import NoiseSecurity
from net.security.tls import TlsSecurity
from net.swarm import Connection
from tests.bench import report
from tests.bench.processes import another

MB = 1_000_000
SINK, ECHO = "/bench/sink/1", "/bench/echo/1"
LINK_DELAY_S = 0.030
LINK_BYTES_PER_S = 12.5 * MB
Stream = trio.abc.Stream


# The serving process


async def _sink(stream: Stream) -> None:
    """Read until a chunk says the end; answer one byte."""
    expected = int.from_bytes(await receive_exactly(stream, 8), "big")
    while expected > 0:
        data = await stream.receive_some(256 * 1024)
        if not data:
            return
        expected -= len(data)
    await stream.send_all(b"k")


async def _echo(stream: Stream) -> None:
    while True:
        head = await stream.receive_some(4)
        if not head:
            return
        if len(head) < 4:
            head += await receive_exactly(stream, 4 - len(head))
        await stream.send_all(await receive_exactly(stream, int.from_bytes(head, "big")))


async def _relay() -> None:
    """Print where we are, relay until standard input closes."""
    listen = [parse("/ip4/127.0.0.1/tcp/0")]
    async with open_host(Identity.generate(), listen=listen) as host, trio.open_nursery() as nursery:
        await nursery.start(RelayServer(host).run)
        print(host.peer_addresses[0], flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)
        nursery.cancel_scope.cancel()


async def _serve(folder: Path, relay: PeerAddress) -> None:
    """Print where everything is, serve until standard input closes."""
    identity = Identity.generate()

    async def plain(stream: Stream) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError, Exception):
            kind = await receive_exactly(stream, 1)
            await (_sink if kind == b"s" else _echo)(stream)
        await trio.aclose_forcefully(stream)

    async def on_sink(connection: Connection, stream: MuxStream) -> None:
        await _sink(stream)

    async def on_echo(connection: Connection, stream: MuxStream) -> None:
        await _echo(stream)

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    listen = [parse("/ip4/127.0.0.1/tcp/0"), parse("/ip4/127.0.0.1/udp/0/quic-v1"), relayed_by(relay)]
    async with open_host(identity, listen=listen) as host, trio.open_nursery() as nursery:
        host.handle(SINK, on_sink)
        host.handle(ECHO, on_echo)
        tls_listeners = await trio.open_ssl_over_tcp_listeners(0, context, host="127.0.0.1")
        tcp_listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        await nursery.start(trio.serve_listeners, plain, tls_listeners)
        await nursery.start(trio.serve_listeners, plain, tcp_listeners)
        ports = {
            "host": str(host.peer_addresses[0]),
            "quic": str(host.peer_addresses[1]),
            "tls": tls_listeners[0].transport_listener.socket.getsockname()[1],  # type: ignore[attr-defined]
            "tcp": tcp_listeners[0].socket.getsockname()[1],
        }
        print(json.dumps(ports), flush=True)
        with os.fdopen(0, "rb", closefd=False) as stdin:
            while await trio.to_thread.run_sync(stdin.readline):
                print(json.dumps(os.times()[:2]), flush=True)
        nursery.cancel_scope.cancel()


# The measuring process


class _Server:
    """The other process, where its listeners are, and what it has used."""

    def __init__(self, popen: subprocess.Popen[str], folder: Path, relay: PeerAddress) -> None:
        self._popen = popen
        self.relay = relay
        fields = json.loads(self._line())
        self.peer, self.quic_peer = parse_peer(fields["host"]), parse_peer(fields["quic"])
        self.tls_port, self.tcp_port = fields["tls"], fields["tcp"]
        self.client_context = ssl.create_default_context(cafile=str(folder / "cert.pem"))
        self.client_context.check_hostname = False

    def _line(self) -> str:
        if self._popen.stdout is None:
            raise RuntimeError("no pipe")
        return self._popen.stdout.readline()

    def cpu_s(self) -> float:
        """Processor seconds of this and the other process so far."""
        if self._popen.stdin is None:
            raise RuntimeError("no pipe")
        self._popen.stdin.write("\n")
        self._popen.stdin.flush()
        return float(sum(json.loads(self._line()))) + sum(os.times()[:2])

    async def open_tls(self, kind: bytes) -> Stream:
        stream = await trio.open_ssl_over_tcp_stream("127.0.0.1", self.tls_port, ssl_context=self.client_context)
        await stream.send_all(kind)
        return stream

    async def open_tcp(self, kind: bytes, port: int | None = None) -> Stream:
        stream = await trio.open_tcp_stream("127.0.0.1", port or self.tcp_port)
        await stream.send_all(kind)
        return stream


@contextlib.contextmanager
def _server() -> Any:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_certificate(folder)
        with another("tests.bench.net", "--relay") as relaying:
            relay = parse_peer(relaying.stdout.readline() if relaying.stdout is not None else "")
            with another("tests.bench.net", "--serve", name, "--through", str(relay)) as popen:
                yield _Server(popen, folder, relay)


async def _push(stream: Stream, size: int) -> float:
    """Seconds for ``size`` bytes in 1 MB messages, acknowledged."""
    message = bytes(MB)
    start = trio.current_time()
    await stream.send_all(size.to_bytes(8, "big"))
    for _ in range(size // MB):
        await stream.send_all(message)
    await receive_exactly(stream, 1)
    return trio.current_time() - start


async def _push_many(open_stream: Callable[[], Awaitable[Stream]], streams: int, size: int) -> float:
    """Bytes per second over all streams together."""
    each = size // streams // MB * MB
    opened = [await open_stream() for _ in range(streams)]
    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for stream in opened:
            nursery.start_soon(_push, stream, each)
    seconds = trio.current_time() - start
    for stream in opened:
        await trio.aclose_forcefully(stream)
    return each * streams / seconds


async def _round_trips(stream: Stream, size: int, count: int) -> list[float]:
    message = size.to_bytes(4, "big") + bytes(size)
    times = []
    for _ in range(count):
        start = trio.current_time()
        await stream.send_all(message)
        await receive_exactly(stream, size)
        times.append(trio.current_time() - start)
    return times


async def _rtt(open_stream: Callable[[], Awaitable[Stream]], size: int, count: int) -> float:
    stream = await open_stream()
    await _round_trips(stream, size, 20)
    median = statistics.median(await _round_trips(stream, size, count))
    await trio.aclose_forcefully(stream)
    return median


def _p95(times: list[float]) -> float:
    return sorted(times)[int(len(times) * 0.95)]


async def _beside_bulk(host: Host, peer: PeerAddress, size: int) -> float:
    """p95 of a 1 KB echo while ``size`` bytes flow, over the idle p95."""
    call = await host.open_stream(peer.peer_id, [ECHO])
    await _round_trips(call, 1024, 50)
    idle = _p95(await _round_trips(call, 1024, 300))
    busy: list[float] = []
    bulk = await host.open_stream(peer.peer_id, [SINK])

    async with trio.open_nursery() as nursery:

        async def move() -> None:
            await _push(bulk, size)
            nursery.cancel_scope.cancel()

        nursery.start_soon(move)
        while True:
            busy += await _round_trips(call, 1024, 1)
    call.reset()
    await bulk.aclose()
    return _p95(busy) / idle


@contextlib.asynccontextmanager
async def _slow_link(port: int) -> AsyncIterator[int]:
    """A port that leads to ``port`` over LINK_DELAY_S each way at LINK_BYTES_PER_S."""

    async def carry(source: trio.SocketStream, sink: trio.SocketStream) -> None:
        send, receive = trio.open_memory_channel[tuple[float, bytes]](10_000)

        async def take() -> None:
            free_at = trio.current_time()
            async with send:
                with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    async for data in source:
                        free_at = max(free_at, trio.current_time()) + len(data) / LINK_BYTES_PER_S
                        await trio.sleep_until(free_at)
                        await send.send((free_at + LINK_DELAY_S, bytes(data)))

        async def give() -> None:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                async for due, data in receive:
                    await trio.sleep_until(due)
                    await sink.send_all(data)
                await sink.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(take)
            nursery.start_soon(give)

    async def handle(near: trio.SocketStream) -> None:
        far = await trio.open_tcp_stream("127.0.0.1", port)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(carry, near, far)
            nursery.start_soon(carry, far, near)

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, handle, listeners)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def _throughput_60ms(server: _Server, size: int) -> tuple[float, float]:
    """Bytes per second of ours and of raw TCP over the same slow link; the first 2 MB warm both up."""
    async with _slow_link(server.tcp_port) as raw_port:
        raw = await server.open_tcp(b"s", raw_port)
        raw_speed = size / await _push(raw, size)
        await trio.aclose_forcefully(raw)
    ours_port = int(server.peer.address.value_for_protocol("tcp"))
    async with _slow_link(ours_port) as port, open_host(Identity.generate()) as host:
        await host.connect(server.peer.peer_id, [Multiaddr(f"/ip4/127.0.0.1/tcp/{port}")])
        async with host.stream(server.peer.peer_id, [SINK]) as stream:
            return size / await _push(stream, size), raw_speed


async def _throughput_relayed(server: _Server, size: int) -> float:
    """Bytes per second through the relay, behind the slow link."""
    async with _slow_link(int(server.relay.address.value_for_protocol("tcp"))) as port:
        at = PeerAddress(address=Multiaddr(f"/ip4/127.0.0.1/tcp/{port}"), peer_id=server.relay.peer_id)
        async with _relayed_host(server, at) as host, host.stream(server.peer.peer_id, [SINK]) as stream:
            return size / await _push(stream, size)


@contextlib.asynccontextmanager
async def _relayed_host(server: _Server, relay: PeerAddress) -> AsyncIterator[Host]:
    """One that is connected with the server through the relay, which it reaches at that address."""
    async with open_host(Identity.generate()) as host:
        await host.connect(server.peer.peer_id, [relayed_by(relay)])
        yield host


async def _measure(server: _Server, runs: int, scale: float, security: str) -> list[report.Figure]:
    values: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        values.setdefault(name, []).append(value)

    identity = Identity.generate()
    chosen: dict[str, Security] = {"noise": NoiseSecurity(identity), "tls": TlsSecurity(identity)}
    size = int(100 * scale) * MB
    async with open_host(identity, securities=[chosen[security]]) as host, open_host(Identity.generate()) as quic:
        await host.connect(server.peer.peer_id, [server.peer.address])
        await quic.connect(server.peer.peer_id, [server.quic_peer.address])

        async def ours(protocol: str) -> Stream:
            return await host.open_stream(server.peer.peer_id, [protocol])

        async def over_quic(protocol: str) -> Stream:
            return await quic.open_stream(server.peer.peer_id, [protocol])

        for run in range(runs):
            report.progress(f"net: run {run + 1} of {runs}")
            for streams in (1, 8):
                name = "throughput-1-stream" if streams == 1 else "throughput-8-streams"
                before = server.cpu_s()
                mine = await _push_many(lambda: ours(SINK), streams, size)
                middle = server.cpu_s()
                reference = await _push_many(lambda: server.open_tls(b"s"), streams, size)
                after = server.cpu_s()
                note(name, mine / reference)
                if streams == 1:
                    note("throughput-quic", await _push_many(lambda: over_quic(SINK), 1, size) / reference)
                    note("MB-per-s-1-stream", mine / MB)
                    note("MB-per-s-SSLStream", reference / MB)
                    note("cpu-s-per-GB", (middle - before) / size * 1e9)
                    note("cpu-s-per-GB-SSLStream", (after - middle) / size * 1e9)
            for name, length, count in (("rtt-1KB", 1024, 400), ("rtt-56KB", 56 * 1024, 200)):
                mine = await _rtt(lambda: ours(ECHO), length, count)
                note(name, mine / await _rtt(lambda: server.open_tls(b"e"), length, count))
                note(f"{name}-us", mine * 1e6)
            reference = await _rtt(lambda: server.open_tls(b"e"), 1024, 400)
            note("rtt-1KB-quic", await _rtt(lambda: over_quic(ECHO), 1024, 400) / reference)
            note("rtt-1KB-beside-bulk-p95", await _beside_bulk(host, server.peer, 50 * MB))
            mine, reference = await _throughput_60ms(server, int(25 * scale) * MB)
            note("throughput-60ms", mine / reference)
            note("throughput-relayed", await _throughput_relayed(server, int(25 * scale) * MB) / mine)
            async with _relayed_host(server, server.relay) as relayed:

                async def through(protocol: str, host: Host = relayed) -> Stream:
                    return await host.open_stream(server.peer.peer_id, [protocol])

                speed = await _push_many(functools.partial(through, SINK), 1, size)
                note("throughput-relayed-loopback", speed / MB / statistics.median(values["MB-per-s-1-stream"]))
                note("rtt-1KB-relayed-us", await _rtt(functools.partial(through, ECHO), 1024, 400) * 1e6)
    goals = {
        "throughput-1-stream": ("x SSLStream", 2.0, "higher"),
        "throughput-8-streams": ("x SSLStream", 2.0, "higher"),
        "throughput-quic": ("x SSLStream", 0.25, "higher"),
        "rtt-1KB": ("x SSLStream", 1.5, "lower"),
        "rtt-56KB": ("x SSLStream", 1.2, "lower"),
        "rtt-1KB-beside-bulk-p95": ("x idle", 3.0, "lower"),
        "throughput-60ms": ("x raw TCP", 0.8, "higher"),
        "throughput-relayed": ("x direct", 0.7, "higher"),
        "throughput-relayed-loopback": ("x direct", None, "higher"),
        "rtt-1KB-relayed-us": ("us", None, "lower"),
        "rtt-1KB-quic": ("x SSLStream", None, "lower"),
        "cpu-s-per-GB": ("s", None, "lower"),
        "cpu-s-per-GB-SSLStream": ("s", None, "lower"),
        "MB-per-s-1-stream": ("MB/s", None, "higher"),
        "MB-per-s-SSLStream": ("MB/s", None, "higher"),
        "rtt-1KB-us": ("us", None, "lower"),
        "rtt-56KB-us": ("us", None, "lower"),
    }
    return [
        report.figure(name, values[name], unit, better=better, goal=goal)
        for name, (unit, goal, better) in goals.items()
    ]


def _write_certificate(folder: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="of the amounts moved (default: 1)")
    parser.add_argument("--security", choices=("noise", "tls"), default="noise", help="default: noise")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--through", type=parse_peer, help=argparse.SUPPRESS)
    parser.add_argument("--relay", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.relay:
        trio.run(_relay)
        return
    if options.serve is not None:
        trio.run(_serve, options.serve, options.through)
        return
    with _server() as server:
        figures = trio.run(_measure, server, options.runs, options.scale, options.security)
    report.show("net", figures, as_json=options.json)


if __name__ == "__main__":
    main()
