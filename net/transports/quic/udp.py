"""A UDP socket that moves runs of datagrams in one system call, where the system can (Linux: GSO and GRO).

Datagrams are never fragmented on their way: what is too large for the path is lost, which QUIC finds out.
On Linux it is also told where nobody listens.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

Address = tuple[Any, ...]

LINUX = sys.platform == "linux"
BUFFER_BYTES = 4 * 1024 * 1024  # asked for; the system may give less
MAX_RUN_BYTES = 65_507  # of UDP over IPv4
MAX_RUN_SEGMENTS = 64  # UDP_MAX_SEGMENTS of Linux
ANCILLARY_BYTES = 256

# <linux/udp.h>, <linux/in.h>, <linux/in6.h>; Python names none of them.
SOL_UDP, UDP_SEGMENT, UDP_GRO = 17, 103, 104
IP_RECVERR, IP_MTU_DISCOVER, IPV6_RECVERR, IPV6_MTU_DISCOVER, PMTUDISC_PROBE = 11, 10, 25, 23, 3
NOBODY_THERE = {errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES, errno.EPERM}


class UdpSocket:
    """Bound to ``host`` and ``port``; never waits.

    Raises:
        OSError: it cannot be bound there.
    """

    def __init__(self, family: socket.AddressFamily, host: str, port: int) -> None:
        self.family = family
        self.socket = socket.socket(family, socket.SOCK_DGRAM)
        try:
            self.socket.setblocking(False)
            if family == socket.AF_INET6:
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                self.socket.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
            if LINUX:
                self._use_linux()
            self.socket.bind((host, port))
        except BaseException:
            self.socket.close()
            raise
        self._buffer = bytearray(65_536)
        self._segments = LINUX  # whether runs are cut by the kernel

    def _use_linux(self) -> None:
        if self.family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, PMTUDISC_PROBE)
            self.socket.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)
        else:
            self.socket.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_PROBE)
            self.socket.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
        with suppress(OSError):  # kernels before 5.0
            self.socket.setsockopt(SOL_UDP, UDP_GRO, 1)

    @property
    def address(self) -> Address:
        """Where it is bound."""
        name: Address = self.socket.getsockname()
        return name

    def close(self) -> None:
        self.socket.close()

    def receive(self) -> tuple[list[bytes], Address]:
        """One run of datagrams from one peer.

        Raises:
            BlockingIOError: nothing has come.
            OSError: something that was sent did not arrive: see ``errors``.
        """
        count, ancillary, _, address = self.socket.recvmsg_into([self._buffer], ANCILLARY_BYTES if LINUX else 0)
        size = count
        for level, kind, data in ancillary:
            if level == SOL_UDP and kind == UDP_GRO:
                size = int.from_bytes(data[:4], sys.byteorder)
        view = memoryview(self._buffer)
        if 0 < size < count:
            return [bytes(view[at : min(at + size, count)]) for at in range(0, count, size)], address
        return [bytes(view[:count])], address

    def errors(self) -> Iterator[tuple[str, Address]]:
        """Why, and where to, datagrams did not arrive."""
        while LINUX:
            try:
                _, ancillary, _, address = self.socket.recvmsg(1, ANCILLARY_BYTES, socket.MSG_ERRQUEUE)
            except OSError:
                return
            for level, kind, data in ancillary:
                if (level, kind) in ((socket.IPPROTO_IP, IP_RECVERR), (socket.IPPROTO_IPV6, IPV6_RECVERR)):
                    (number,) = struct.unpack_from("=I", data)  # struct sock_extended_err
                    if number in NOBODY_THERE:
                        yield os.strerror(number).lower(), address

    def send(self, datagrams: Sequence[bytes], address: Address) -> int:
        """How many were sent, or are as good as lost; fewer than all: wait until the socket can be written."""
        at = 0
        while at < len(datagrams):
            end = self._run(datagrams, at) if self._segments else at + 1
            try:
                if end - at == 1:
                    self.socket.sendto(datagrams[at], address)
                else:
                    size = struct.pack("=H", len(datagrams[at]))
                    self.socket.sendmsg(datagrams[at:end], [(SOL_UDP, UDP_SEGMENT, size)], 0, address)
            except BlockingIOError:
                return at
            except OSError as error:
                if end - at > 1 and error.errno in (errno.EINVAL, errno.EIO, errno.EMSGSIZE, errno.ENOPROTOOPT):
                    self._segments = False  # this device cuts none: one by one
                    continue
                # Lost: too large for the path, or an error that an earlier datagram has met (``errors`` tells).
            at = end
        return at

    @staticmethod
    def _run(datagrams: Sequence[bytes], at: int) -> int:
        """The end of the datagrams from ``at`` on that make one run: of one size, the last perhaps smaller."""
        size = len(datagrams[at])
        most = min(len(datagrams), at + MAX_RUN_SEGMENTS, at + MAX_RUN_BYTES // max(size, 1))
        end = at + 1
        while end < most:
            end += 1
            if len(datagrams[end - 1]) != size:
                return end if len(datagrams[end - 1]) < size else end - 1
        return end


def source(family: socket.AddressFamily, target: Address) -> str:
    """The address of ours that datagrams to ``target`` leave from. Sends nothing.

    Raises:
        OSError: there is no way there.
    """
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])
