"""TLS 1.3 with the libp2p certificate extension.

The certificate is self-signed by a throw-away key and carries one extension, libp2p's: the peer's
identity key and its signature over the throw-away key. It stands first, because js-libp2p reads only
the first. Certificates are made and judged here through pyOpenSSL's memory BIO; no certificate
authority is involved.

Source: https://github.com/libp2p/specs/blob/master/tls/tls.md
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from libp2p.security.tls.certificate import add_libp2p_extension, verify_certificate_chain
from OpenSSL import SSL

from net.errors import ConnectionLost, PeerIdMismatch, RemoteProtocolError
from net.identity import Identity, PeerId
from net.security.base import RECORD_BYTES, Buffer, SecureChannel

ALPN = [b"libp2p"]
SIGNATURE_PREFIX = b"libp2p-tls-handshake:"
SEND_BYTES = 1024 * 1024


class TlsSecurity:
    """``/tls/1.0.0`` for one identity."""

    protocol_id = "/tls/1.0.0"

    def __init__(self, identity: Identity) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        context = SSL.Context(SSL.TLS_METHOD)
        context.set_min_proto_version(SSL.TLS1_3_VERSION)
        context.use_privatekey(key)
        context.use_certificate(_certificate(identity, key))
        # Whose certificate it is we judge ourselves, after the handshake: there are no authorities here.
        context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, lambda *_: True)
        context.set_alpn_protos(ALPN)
        context.set_alpn_select_callback(lambda _connection, offered: ALPN[0] if ALPN[0] in offered else b"")
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
        try:
            certificate = connection.get_peer_certificate(as_cryptography=True)
            if certificate is None:
                raise ValueError("there is none")
            channel.remote_peer = PeerId.from_pubkey(verify_certificate_chain([certificate]))
        except Exception as error:  # the library raises ValueError and whatever the parsers below it raise
            raise RemoteProtocolError(f"the peer's TLS certificate is not libp2p's: {error}") from error
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


def _certificate(identity: Identity, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "libp2p")])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .serial_number(int.from_bytes(os.urandom(8), "big") >> 1)
        .not_valid_before(now - datetime.timedelta(days=2))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=36500))
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
    )
    public = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    builder = add_libp2p_extension(builder, identity.key_pair.public_key, identity.sign(SIGNATURE_PREFIX + public))
    certificate: x509.Certificate = builder.sign(key, hashes.SHA256())
    return certificate
