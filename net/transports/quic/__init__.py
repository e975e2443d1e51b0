"""QUIC v1: ``/ip4|ip6|dns|dns4|dns6/HOST/udp/PORT/quic-v1``. One UDP socket listens, dials and punches.

The library is aioquic, not its fork qh3, which does a packet of 1,200 bytes twelve times cheaper (its core is
Rust: 234 MB per processor second of both ends against 20, measured here with 1.7.2 and 2.1.0). qh3's servers
cannot ask for a client's certificate, which is who a libp2p peer is; and its core gives credit back when an
event is polled, in the order of all streams, so that one stream cannot hold up its sender without holding up
the others. Both would be changes inside its compiled core. What aioquic costs per packet is met by fewer, larger
datagrams where the path carries them (``core.py``) and by fewer system calls (``udp.py``).

Layers: ``core.py`` one connection without I/O; ``connection.py`` its streams, timer and end, in trio;
``endpoint.py`` one socket and its connections; ``udp.py`` the socket; ``transport.py`` what the swarm sees.
"""

from net.transports.quic.transport import QuicTransport

__all__ = ["QuicTransport"]
