"""One QUIC connection without I/O: aioquic's, with what libp2p and a bounded memory ask for.

What is added, by overriding the methods that aioquic calls for each packet:

- both sides show a certificate;
- credit is given for what a reader has taken. aioquic doubles a window as soon as half of it has come, so that
  a reader that stops holds ever more memory;
- datagrams grow to what the path carries (RFC 8899): 1,200 bytes are what every path carries, a loopback or a
  network with large frames carries more, and the cost of a datagram here hardly depends on its size;
- header protection copies headers, not packets;
- the pacer lets go at once what falls due between two turns of the event loop;
- an acknowledgement travels with data when there is some, and is due after a run of datagrams.

Source: RFC 9000, RFC 9002, RFC 8899; aioquic 1.7
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Sequence

from aioquic import tls
from aioquic._buffer import Buffer
from aioquic._crypto import CryptoError, HeaderProtection
from aioquic.quic import events
from aioquic.quic.configuration import SMALLEST_MAX_DATAGRAM_SIZE, QuicConfiguration
from aioquic.quic.connection import NetworkAddress, QuicConnection, QuicConnectionState
from aioquic.quic.packet import (
    QuicFrameType,
    QuicPacketType,
    QuicProtocolVersion,
    pull_quic_transport_parameters,
)
from aioquic.quic.packet_builder import QuicDeliveryState, QuicPacketBuilder
from aioquic.quic.recovery import QuicPacketPacer, QuicPacketSpace
from aioquic.quic.stream import QuicStream
from cryptography import x509

from net.security.certificate import ALPN, Credentials

__all__ = ["BASE_DATAGRAM_BYTES", "CID_BYTES", "QuicCore", "configure"]

# What a stranger does wrong is told to the swarm, which logs it; it is no warning on somebody's terminal.
logging.getLogger("quic").setLevel(logging.ERROR)

CID_BYTES = 8
INITIAL_WINDOW_BYTES = 1024 * 1024  # of a stream
CONNECTION_WINDOW_BYTES = 64 * 1024 * 1024  # unread in all streams together
MAX_INBOUND_STREAMS = 256  # go-libp2p
IDLE_S = 30.0  # as announced; the driver finds the dead sooner, by pings
ACK_EVERY_DATAGRAMS = 32  # or after ACK_DELAY_S; fewer leave more to the data
ACK_DELAY_S = 0.001  # far below the 25 ms that we announce
MAX_NUMBER_BYTES, SAMPLE_BYTES = 4, 16  # RFC 9001, section 5.4.2
TURN_S = 0.002  # of an event loop whose timers are exact to a millisecond

BASE_DATAGRAM_BYTES = SMALLEST_MAX_DATAGRAM_SIZE
# Ethernet with IPv6; jumbo frames; loopback: four to a run, and about as far as aioquic goes (a frame's length in
# two bytes).
LADDER = (1452, 8952, 16376)
PROBE_TRIES = 3
SEARCH_AGAIN_S = 600.0  # RFC 8899, PMTU_RAISE_TIMER
BLACK_HOLE_TIMEOUTS = 2  # probe timeouts in a row, after which large datagrams are suspected


def configure(credentials: Credentials, *, client: bool) -> QuicConfiguration:
    """What our connections have in common. Whose certificate came is judged by the caller, after the handshake."""
    return QuicConfiguration(
        alpn_protocols=[ALPN],
        certificate=credentials.certificate,
        private_key=credentials.key,
        connection_id_length=CID_BYTES,
        idle_timeout=IDLE_S,
        is_client=client,
        max_data=CONNECTION_WINDOW_BYTES,
        max_stream_data=INITIAL_WINDOW_BYTES,
        supported_versions=[QuicProtocolVersion.VERSION_1],
        verify_mode=ssl.CERT_NONE,
    )


class QuicCore(QuicConnection):
    """See aioquic's class for what is not here."""

    def __init__(
        self,
        configuration: QuicConfiguration,
        *,
        original_destination_connection_id: bytes | None = None,
        retry_source_connection_id: bytes | None = None,
    ) -> None:
        super().__init__(
            configuration=configuration,
            original_destination_connection_id=original_destination_connection_id,
            retry_source_connection_id=retry_source_connection_id,
        )
        self.unread_bytes = 0  # given to the driver, which has not given them on
        self._local_max_streams_bidi.value = self._local_max_streams_bidi.sent = MAX_INBOUND_STREAMS
        self._local_max_streams_uni.value = self._local_max_streams_uni.sent = 0  # libp2p has none
        self._ack_delay = ACK_DELAY_S
        self._loss._pacer = _Pacer(max_datagram_size=self._max_datagram_size)
        self._unacknowledged = 0  # datagrams that have come since our last acknowledgement
        self._largest_allowed = LADDER[-1]  # by the peer
        self._probing: int | None = None  # the size on its way
        self._probe_tries = 0
        self._probe_at = 0.0  # not before
        self._probe_lost_at = 0.0

    # What has been agreed

    @property
    def has_begun(self) -> bool:
        """Whether a packet of the peer's made sense."""
        return self._state is not QuicConnectionState.FIRSTFLIGHT

    @property
    def is_established(self) -> bool:
        return self._handshake_complete

    @property
    def alpn(self) -> str | None:
        return self.tls.alpn_negotiated

    def peer_certificate(self) -> x509.Certificate | None:
        return self.tls._peer_certificate

    @property
    def is_client(self) -> bool:
        return self._is_client

    @property
    def round_trip_s(self) -> float | None:
        return self._loss._rtt_smoothed if self._loss._rtt_initialized else None

    @property
    def termination(self) -> events.ConnectionTerminated | None:
        """Why it ends or has ended; None as long as it lives."""
        return self._close_event

    @property
    def was_ended_by_peer(self) -> bool:
        return self._state is QuicConnectionState.DRAINING

    @property
    def validated_address(self) -> NetworkAddress | None:
        """Where the peer is, as far as that has been shown."""
        return next((path.addr for path in self._network_paths[:1] if path.is_validated), None)

    @property
    def datagram_bytes(self) -> int:
        """How large our datagrams are."""
        return self._max_datagram_size

    # Streams

    def unsent(self, stream_id: int) -> int:
        """Bytes of a stream that were never on their way."""
        stream = self._streams.get(stream_id)
        return 0 if stream is None else stream.sender._buffer_stop - stream.sender.highest_offset

    def can_receive(self, stream_id: int) -> bool:
        """Whether the peer may still send something that has not come."""
        stream = self._streams.get(stream_id)
        return stream is not None and not stream.receiver.is_finished

    @property
    def has_unacknowledged(self) -> bool:
        """Whether anything of any stream has not reached the peer for certain."""
        return any(
            not sender.is_finished
            and sender._reset_error_code is None
            and (sender._buffer_stop > sender._buffer_start or sender._buffer_fin is not None)
            for sender in (stream.sender for stream in self._streams.values())
        )

    def stop(self, stream_id: int) -> None:
        """Ask the peer to send no more, unless it has ended."""
        stream = self._streams.get(stream_id)
        if stream is not None and not stream.receiver.is_finished:
            stream.receiver.stop(0)

    def grant(self, stream_id: int, limit: int) -> None:
        """Let the peer send up to offset ``limit``."""
        stream = self._streams.get(stream_id)
        if stream is not None and not stream.receiver.is_finished:
            stream.max_stream_data_local = max(stream.max_stream_data_local, limit)

    # Datagrams

    def receive_datagrams(self, datagrams: Sequence[bytes], address: NetworkAddress, now: float) -> None:
        before = self.get_peer_address()
        for datagram in datagrams:
            self.receive_datagram(datagram, address, now)
        if before != self.get_peer_address() and before is not None:
            self.use_base_size(now)
        space = self._application_space()
        if space is not None and space.ack_at is not None:
            self._unacknowledged += len(datagrams)
            if self._unacknowledged >= ACK_EVERY_DATAGRAMS:
                space.ack_at = now

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, NetworkAddress]]:
        if not self._network_paths:
            return []
        space = self._application_space()
        if space is not None and space.ack_at is not None and self._has_stream_data():
            space.ack_at = now
        made = super().datagrams_to_send(now)
        if space is None or space.ack_at is None:
            self._unacknowledged = 0
        if self._probe_size(now) is not None:
            made += self._probe(now)
        return made

    def get_timer(self) -> float | None:
        timer = super().get_timer()
        if self._probing is not None and timer is not None and self.termination is None:
            return min(timer, self._probe_lost_at)
        return timer

    def handle_timer(self, now: float) -> None:
        super().handle_timer(now)
        if self._probing is not None and now >= self._probe_lost_at:
            self._on_probe(QuicDeliveryState.LOST, self._probing)
        if self._loss._pto_count >= BLACK_HOLE_TIMEOUTS and self._max_datagram_size > BASE_DATAGRAM_BYTES:
            self.use_base_size(now)

    def _application_space(self) -> QuicPacketSpace | None:
        return self._spaces.get(tls.Epoch.ONE_RTT)

    def _has_stream_data(self) -> bool:
        return any(not stream.sender.buffer_is_empty for stream in self._streams_queue)

    # Datagram sizes

    def use_base_size(self, now: float) -> None:
        """Back to what every path carries: this one is new, or swallows what is larger."""
        self._use_size(BASE_DATAGRAM_BYTES)
        self._probing = None
        self._probe_tries = 0
        self._probe_at = now + self._loss.get_probe_timeout()

    def _use_size(self, size: int) -> None:
        self._max_datagram_size = size
        self._loss._pacer._max_datagram_size = size
        self._loss._cc._max_datagram_size = size  # type: ignore[attr-defined]  # both algorithms have it

    def _probe_size(self, now: float) -> int | None:
        """The size to try now, if any."""
        if not self._handshake_confirmed or self._probing is not None or now < self._probe_at:
            return None
        if self.termination is not None or not self._network_paths[0].is_validated:
            return None
        return next((size for size in LADDER if self._max_datagram_size < size <= self._largest_allowed), None)

    def _probe(self, now: float) -> list[tuple[bytes, NetworkAddress]]:
        """A PING in as much padding as makes a datagram of the size to try.

        Its loss is no sign of congestion, nor does anything wait for it (RFC 8899, section 3): it counts neither
        as in flight nor as asking for an acknowledgement.
        """
        size = self._probe_size(now)
        if size is None:
            return []
        self._probing = size
        self._probe_lost_at = now + 3 * self._loss.get_probe_timeout()
        path = self._network_paths[0]
        builder = QuicPacketBuilder(
            host_cid=self.host_cid,
            is_client=self._is_client,
            max_datagram_size=size,
            packet_number=self._packet_number,
            peer_cid=self._peer_cid.cid,
            spin_bit=self._spin_bit,
            version=self._version or QuicProtocolVersion.VERSION_1,
        )
        builder.start_packet(QuicPacketType.ONE_RTT, self._cryptos[tls.Epoch.ONE_RTT])
        frame = builder.start_frame(QuicFrameType.PING, handler=self._on_probe, handler_args=(size,))
        frame.push_bytes(bytes(builder.remaining_buffer_space))
        packet = builder._packet
        if packet is not None:
            packet.in_flight = packet.is_ack_eliciting = False
        return self._flush_builder(builder=builder, network_path=path, peer_cid=self._peer_cid.cid, now=now)

    def _on_probe(self, delivery: QuicDeliveryState, size: int) -> None:
        if self._probing != size:
            return  # given up already
        self._probing = None
        if delivery is QuicDeliveryState.ACKED:
            self._probe_tries = 0
            self._use_size(size)
            return
        self._probe_tries += 1
        if self._probe_tries >= PROBE_TRIES:
            self._probe_tries = 0
            self._probe_at = self._probe_lost_at + SEARCH_AGAIN_S

    # What aioquic calls

    def _initialize(self, peer_cid: bytes) -> None:
        super()._initialize(peer_cid)
        self.tls._request_client_certificate = not self._is_client

    def _update_traffic_key(
        self, direction: tls.Direction, epoch: tls.Epoch, cipher_suite: tls.CipherSuite, secret: bytes
    ) -> None:
        super()._update_traffic_key(direction, epoch, cipher_suite, secret)
        pair = self._cryptos[epoch]
        context = pair.send if direction is tls.Direction.ENCRYPT else pair.recv
        if isinstance(context.hp, HeaderProtection):
            context.hp = _HeaderProtection(context.hp)

    def _parse_transport_parameters(self, data: bytes, from_session_ticket: bool = False) -> None:
        super()._parse_transport_parameters(data, from_session_ticket)
        largest = pull_quic_transport_parameters(Buffer(data=data)).max_udp_payload_size
        if largest is not None:
            self._largest_allowed = largest

    def _write_connection_limits(self, builder: QuicPacketBuilder, space: QuicPacketSpace) -> None:
        """MAX_DATA when a quarter of the window was taken, MAX_STREAMS when half of the streams have ended."""
        data, streams = self._local_max_data, self._local_max_streams_bidi
        limit = data.used - self.unread_bytes + CONNECTION_WINDOW_BYTES
        if limit - data.value >= CONNECTION_WINDOW_BYTES // 4:
            limit -= sum(len(stream.receiver._buffer) for stream in self._streams.values())  # behind gaps
        if limit - data.value >= CONNECTION_WINDOW_BYTES // 4:
            data.value = limit
        due = [data] if data.value != data.sent else []
        if streams.value - streams.sent > streams.sent - streams.used:
            due.append(streams)
        for each in due:
            frame = builder.start_frame(
                each.frame_type, capacity=9, handler=self._on_connection_limit_delivery, handler_args=(each,)
            )
            frame.push_uint_var(each.value)
            each.sent = each.value

    def _write_stream_limits(self, builder: QuicPacketBuilder, space: QuicPacketSpace, stream: QuicStream) -> None:
        """MAX_STREAM_DATA where ``grant`` has raised it."""
        if stream.max_stream_data_local_sent == stream.max_stream_data_local:
            return
        frame = builder.start_frame(
            QuicFrameType.MAX_STREAM_DATA,
            capacity=17,
            handler=self._on_max_stream_data_delivery,
            handler_args=(stream,),
        )
        frame.push_uint_var(stream.stream_id or 0)
        frame.push_uint_var(stream.max_stream_data_local)
        stream.max_stream_data_local_sent = stream.max_stream_data_local


class _HeaderProtection(HeaderProtection):
    """aioquic's, without its copies of the whole packet for the sake of five bytes (RFC 9001, section 5.4)."""

    def __init__(self, other: HeaderProtection) -> None:
        self._encryptor = other._encryptor
        self._is_chacha20 = other._is_chacha20

    def apply(self, plain_header: bytes, protected_payload: bytes) -> bytes:
        length = (plain_header[0] & 0x03) + 1
        start = MAX_NUMBER_BYTES - length
        header = self._unmasked(plain_header, self._mask(protected_payload[start : start + SAMPLE_BYTES]), length)
        return header + protected_payload

    def remove(self, packet: bytes, pn_offset: int) -> tuple[bytes, int]:
        start = pn_offset + MAX_NUMBER_BYTES
        if start + SAMPLE_BYTES > len(packet):
            raise CryptoError("Packet is too short to sample")
        mask = self._mask(packet[start : start + SAMPLE_BYTES])
        length = ((packet[0] ^ mask[0]) & 0x03) + 1
        header = self._unmasked(packet[: pn_offset + length], mask, length)
        return header, int.from_bytes(header[pn_offset:], "big")

    @staticmethod
    def _unmasked(header: bytes, mask: bytes, length: int) -> bytes:
        """The first byte and the packet number the other way: masked, or in the clear."""
        out = bytearray(header)
        out[0] ^= mask[0] & (0x0F if out[0] & 0x80 else 0x1F)
        for at in range(length):
            out[at - length] ^= mask[1 + at]
        return bytes(out)


class _Pacer(QuicPacketPacer):
    def update_rate(self, congestion_window: int, smoothed_rtt: float) -> None:
        super().update_rate(congestion_window, smoothed_rtt)
        self.bucket_max = max(self.bucket_max, TURN_S)
