"""TLS 1.3 with libp2p's certificates (``certificate.py``), through pyOpenSSL's memory BIO.

Source: https://github.com/libp2p/specs/blob/master/tls/tls.md
"""

from __future__ import annotations

from collections.abc import Sequence

import trio
from OpenSSL import SSL

from net.errors import ConnectionLost, PeerIdMismatch, RemoteProtocolError
from net.identity import Identity, PeerId
from net.security.base import RECORD_BYTES, Buffer, SecureChannel
from net.security.certificate import ALPN, authenticate, make_credentials

PROTOCOLS = [ALPN.encode()]
SEND_BYTES = 1024 * 1024


class TlsSecurity:
    """``/tls/1.0.0`` for one identity."""

    protocol_id = "/tls/1.0.0"

    def __init__(self, identity: Identity) -> None:
        credentials = make_credentials(identity)
        context = SSL.Context(SSL.TLS_METHOD)
        context.set_min_proto_version(SSL.TLS1_3_VERSION)
        context.use_privatekey(credentials.key)
        context.use_certificate(credentials.certificate)
        # Whose certificate it is we judge ourselves, after the handshake: there are no authorities here.
        context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, lambda *_: True)
        context.set_alpn_protos(PROTOCOLS)
        context.set_alpn_select_callback(lambda _connection, offered: PROTOCOLS[0] if PROTOCOLS[0] in offered else b"")
        context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
        self._context = context

    async def outbound(self, stream: trio.abc.Stream, expected: PeerId) -> SecureChannel:
        channel = await self._handshake(stream, client=True)
        if channel.remote_peer != expected:
            raise PeerIdMismatch(expected, channel.remote_peer)
        return channel

    async def inbound(self, stream: trio.abc.Stream) -> SecureChannel:
        return await self._handshake(stream, client=False)

    async def _handshake(self, stream: trio.abc.Stream, *, client: bool) -> TlsChannel:
        connection = SSL.Connection(self._context, None)
        if client:
            connection.set_connect_state()
        else:
            connection.set_accept_state()
        channel = TlsChannel(stream, connection)
        try:
            await channel.handshake()
        except SSL.Error as error:
            raise RemoteProtocolError("TLS handshake failed") from error
        except trio.BrokenResourceError as error:
            raise ConnectionLost("the connection broke during the TLS handshake") from error
        channel.remote_peer = authenticate(lambda: connection.get_peer_certificate(as_cryptography=True))
        return channel


class TlsChannel(SecureChannel):
    """Application data through an OpenSSL connection in memory; all network I/O is trio's."""

    def __init__(self, stream: trio.abc.Stream, connection: SSL.Connection) -> None:
        super().__init__(stream)
        self._tls = connection
        self._ended = False
        self._closed_by_peer = False

    async def handshake(self) -> None:
        while True:
            try:
                self._tls.do_handshake()
                break
            except SSL.WantReadError:
                await self._flush()
                await self._feed()
            if self._ended:
                raise trio.BrokenResourceError("the stream ended during the handshake")
        await self._flush()

    def _encrypt(self, pieces: Sequence[Buffer]) -> list[memoryview]:
        for piece in pieces:
            view = memoryview(piece).cast("B")
            while view:
                try:
                    view = view[self._tls.send(view[:SEND_BYTES]) :]
                except SSL.Error as error:
                    raise trio.BrokenResourceError("TLS refused to send") from error
        return self._take_records()

    async def receive_batch(self) -> Sequence[bytes]:
        while True:
            batch = self._decrypt()
            if batch or self._closed_by_peer:
                return batch
            await self._feed()

    def _decrypt(self) -> list[bytes]:
        """All that has come, at most 16 KiB in a piece: a record of TLS."""
        parts: list[bytes] = []
        try:
            while True:
                parts.append(self._tls.recv(RECORD_BYTES))
        except SSL.WantReadError:
            pass  # all that has come is opened
        except SSL.ZeroReturnError:
            self._closed_by_peer = True
        except SSL.Error as error:
            if not parts:  # what came before is good; the error comes again
                why = "the stream ended without TLS's close_notify" if self._ended else "a TLS record was not authentic"
                raise trio.BrokenResourceError(why) from error
        return parts

    async def aclose(self) -> None:
        try:
            self._tls.shutdown()
            with trio.move_on_after(1):
                await self._flush()
        except (SSL.Error, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the other side is gone: there is nobody to say goodbye to
        finally:
            await self._stream.aclose()

    async def _feed(self) -> None:
        data = await self._stream.receive_some(self._read_bytes)
        if data:
            self._tls.bio_write(data)
        else:
            self._ended = True
            self._tls.bio_shutdown()

    def _take_records(self) -> list[memoryview]:
        out: list[memoryview] = []
        while True:
            try:
                out.append(memoryview(self._tls.bio_read(SEND_BYTES)))
            except SSL.WantReadError:
                return out

    async def _flush(self) -> None:
        """Send what OpenSSL wants to say of its own: handshakes and alerts."""
        self._unsent += self._take_records()
        await self.flush()
