"""The certificate that libp2p's TLS and QUIC authenticate with: made for an identity, and judged.

It is self-signed by a throw-away key and carries one extension, libp2p's: the peer's identity key and its
signature over the throw-away key. The extension stands first, because js-libp2p reads only the first. No
certificate authority is involved.

Source: https://github.com/libp2p/specs/blob/master/tls/tls.md
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from libp2p.security.tls.certificate import add_libp2p_extension, verify_certificate_chain

from net.errors import RemoteProtocolError
from net.identity import Identity, PeerId

ALPN = "libp2p"
SIGNATURE_PREFIX = b"libp2p-tls-handshake:"


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """What a TLS stack needs to speak for an identity."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def make_credentials(identity: Identity) -> Credentials:
    """A fresh key, and the certificate that ties it to ``identity``."""
    key = ec.generate_private_key(ec.SECP256R1())
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
    return Credentials(certificate=builder.sign(key, hashes.SHA256()), key=key)


def authenticate(read: Callable[[], x509.Certificate | None]) -> PeerId:
    """Whose certificate ``read`` gives. That its holder has its key is for the TLS handshake to prove.

    Raises:
        RemoteProtocolError: there is none, or it is not libp2p's.
    """
    try:
        certificate = read()
        if certificate is None:
            raise ValueError("there is none")
        return PeerId.from_pubkey(verify_certificate_chain([certificate]))
    except Exception as error:  # the library raises ValueError and whatever the parsers below it raise
        raise RemoteProtocolError(f"the peer's TLS certificate is not libp2p's: {error}") from error
