"""Vouchers: a relay's signed word that it holds a reservation for a peer.

Wire: a signed envelope of domain ``libp2p-relay-rsvp`` and payload type ``03 02``, around

    message Voucher { bytes relay = 1; bytes peer = 2; uint64 expiration = 3; }  // Unix seconds

Source: https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md#reservation-vouchers. It names the multicodec
``0x0302``; go-libp2p and js-libp2p write its two bytes, others may write it as a varint (``82 06``). We write the
former and read both.
"""

from __future__ import annotations

from libp2p.peer.envelope import Envelope, make_unsigned, unmarshal_envelope
from libp2p.relay.circuit_v2.pb.circuit_pb2 import Voucher

from net.errors import RecordError
from net.identity import Identity, PeerId

DOMAIN = "libp2p-relay-rsvp"
PAYLOAD_TYPE = b"\x03\x02"
PAYLOAD_TYPES = (PAYLOAD_TYPE, b"\x82\x06")
CLOCK_SKEW_S = 3600  # by which the relay's clock may differ from ours


def issue(identity: Identity, peer_id: PeerId, expires_s: int) -> bytes:
    """A relay's voucher for ``peer_id``.

    Args:
        identity: the relay's.
        peer_id: who holds the reservation.
        expires_s: its end in Unix seconds.
    """
    payload = Voucher(
        relay=identity.peer_id.to_bytes(), peer=peer_id.to_bytes(), expiration=expires_s
    ).SerializeToString()
    envelope = Envelope(
        public_key=identity.key_pair.public_key,
        payload_type=PAYLOAD_TYPE,
        raw_payload=payload,
        signature=identity.sign(make_unsigned(DOMAIN, PAYLOAD_TYPE, payload)),
    )
    return bytes(envelope.marshal_envelope())


def check(data: bytes, *, relay: PeerId, peer_id: PeerId, now_s: float) -> None:
    """See that ``relay`` itself says that ``peer_id`` holds a reservation which has not ended.

    Raises:
        RecordError: it does not; the text says what is wrong.
    """
    try:
        envelope = unmarshal_envelope(data)
        envelope.validate(DOMAIN)
        voucher = Voucher.FromString(envelope.raw_payload)
        signer = PeerId.from_pubkey(envelope.public_key)
    except Exception as error:  # protobuf's, the library's and the key type's own errors
        raise RecordError(f"no valid voucher: {error}") from error
    if envelope.payload_type not in PAYLOAD_TYPES:
        raise RecordError("an envelope of another type than a voucher's")
    if signer != relay:
        raise RecordError(f"a voucher of {relay} that {signer} signed")
    if voucher.relay != relay.to_bytes():
        raise RecordError(f"a voucher for another relay than {relay}")
    if voucher.peer != peer_id.to_bytes():
        raise RecordError(f"a voucher for another peer than {peer_id}")
    if voucher.expiration + CLOCK_SKEW_S < now_s:
        raise RecordError("a voucher that has expired")
