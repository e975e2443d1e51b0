"""The internet's core: one process with a TUN device for every uplink, as a star.

Kernels without netem cannot delay or lose packets, so this does. ``Star`` decides when which packet goes where
(packets and ``now`` in, packets due out); ``main`` reads and writes the devices. A packet passes, in this order:
the sender's upload limit, half its round trip, the receiver's download limit, half the receiver's round trip.

It is told what to do by lines of JSON on its standard input, and answers each with one line:
``{"do": "port", "name": N, "namespace": PATH}``, ``{"do": "line", "name": N, "line": {...}}``,
``{"do": "routes", "name": N, "keys": [HEX, ...]}``, ``{"do": "counters"}``. It ends with its standard input.
"""

from __future__ import annotations

import fcntl
import gc
import heapq
import json
import os
import random
import select
import struct
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

from interop.lab.nat import WAN
from interop.lab.plan import Line

MTU = 1500
BATCH = 32  # packets read from one device before the others' turn
MAX_WAITING = 200_000  # packets in flight; 300 MB
TUNSETIFF = 0x400454CA
IFF_TUN = 0x0001
IFF_NO_PI = 0x1000
NEVER = 3600.0


@dataclass
class Counters:
    """Packets of one port, counted at the sender's side, except for ``delivered``."""

    sent: int = 0
    delivered: int = 0
    lost: int = 0
    overflowed: int = 0
    unroutable: int = 0


class Port:
    """One uplink: its line, and until when its two queues are busy."""

    def __init__(self, name: str, fd: int) -> None:
        self.name = name
        self.fd = fd
        self.counters = Counters()
        self.up_free_at = 0.0
        self.down_free_at = 0.0
        self.set(Line())

    def set(self, line: Line) -> None:
        self.delay_s = line.rtt_ms / 2000
        self.up_s_per_byte = 0.0 if line.up_mbit is None else 8e-6 / line.up_mbit
        self.down_s_per_byte = 0.0 if line.down_mbit is None else 8e-6 / line.down_mbit
        self.loss = line.loss if line.is_up else 1.0
        self.queue_s = line.queue_ms / 1000


class Star:
    """Which packet is due when; without I/O."""

    def __init__(self, random_source: random.Random) -> None:
        self.ports: dict[str, Port] = {}
        self._routes: dict[bytes, Port] = {}
        self._events: list[tuple[float, int, Port, bytes, bool]] = []  # at its last link when True
        self._number = count()
        self._random = random_source.random

    def add(self, name: str, fd: int) -> Port:
        port = self.ports[name] = Port(name, fd)
        return port

    def route(self, name: str, keys: list[bytes]) -> None:
        """These addresses, and no others, lead to the port. Keys: as ``plan.route_keys``."""
        port = self.ports[name]
        self._routes = {key: to for key, to in self._routes.items() if to is not port} | dict.fromkeys(keys, port)

    def offer(self, port: Port, packet: bytes, now: float) -> None:
        """Take a packet that ``port``'s machine sends."""
        port.counters.sent += 1
        to = self._routes.get(packet[16:20] if packet[0] >> 4 == 4 else packet[24:32])
        if to is None:
            port.counters.unroutable += 1
            return
        if (port.loss or to.loss) and (self._random() < port.loss or self._random() < to.loss):
            port.counters.lost += 1
            return
        when = now
        if port.up_s_per_byte or len(self._events) > MAX_WAITING:
            when = max(now, port.up_free_at)
            if when - now > port.queue_s or len(self._events) > MAX_WAITING:
                port.counters.overflowed += 1
                return
            when = port.up_free_at = when + len(packet) * port.up_s_per_byte
        when += port.delay_s
        if to.down_s_per_byte:
            heapq.heappush(self._events, (when, next(self._number), to, packet, False))
        else:
            heapq.heappush(self._events, (when + to.delay_s, next(self._number), to, packet, True))

    def due(self, now: float) -> list[tuple[Port, bytes]]:
        """What is to be delivered by now, in order."""
        events = self._events
        found = []
        while events and events[0][0] <= now:
            when, _, to, packet, is_last = heapq.heappop(events)
            if is_last:
                found.append((to, packet))
                continue
            start = max(when, to.down_free_at)
            if start - when > to.queue_s:
                to.counters.overflowed += 1
                continue
            to.down_free_at = start + len(packet) * to.down_s_per_byte
            heapq.heappush(events, (to.down_free_at + to.delay_s, next(self._number), to, packet, True))
        return found

    def wait_s(self, now: float) -> float:
        """How long until something is due."""
        return max(0.0, self._events[0][0] - now) if self._events else NEVER


def open_tun(namespace: str) -> int:
    """``wan0`` in the namespace at this path. The device lives as long as the descriptor.

    Raises:
        OSError: it cannot be made.
    """
    from interop.lab import namespaces

    with namespaces.inside(namespace):
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", WAN.encode(), IFF_TUN | IFF_NO_PI))
    return fd


class Driver:
    """The star on real devices."""

    def __init__(self) -> None:
        self.star = Star(random.Random())
        self._by_fd: dict[int, Port] = {}
        self._epoll = select.epoll()
        self._told = b""

    def run(self) -> None:
        """Until standard input ends."""
        control = sys.stdin.fileno()
        os.set_blocking(control, False)
        self._epoll.register(control, select.EPOLLIN)
        while True:
            # epoll's own timeout counts whole milliseconds; select's does not
            select.select([self._epoll], [], [], self.star.wait_s(time.monotonic()))
            for fd, _ in self._epoll.poll(0):
                if fd != control:
                    self._take(fd)
                elif not self._obey(control):
                    return
            self._deliver()

    def _take(self, fd: int) -> None:
        port, offer, now = self._by_fd[fd], self.star.offer, time.monotonic()
        try:
            for _ in range(BATCH):
                offer(port, os.read(fd, MTU), now)
        except OSError:  # empty, or the device is down
            return

    def _deliver(self) -> None:
        for port, packet in self.star.due(time.monotonic()):
            try:
                os.write(port.fd, packet)
                port.counters.delivered += 1
            except OSError:  # the device is down
                port.counters.lost += 1

    def _obey(self, control: int) -> bool:
        told = os.read(control, 65536)
        *lines, self._told = (self._told + told).split(b"\n")
        for line in lines:
            try:
                answer = self._do(json.loads(line))
            except OSError as error:
                answer = {"error": f"{line.decode()}: {error}"}
            print(json.dumps(answer), flush=True)
        return bool(told)

    def _do(self, order: dict[str, Any]) -> dict[str, Any]:
        match order.pop("do"):
            case "port":
                port = self.star.add(order["name"], open_tun(order["namespace"]))
                self._by_fd[port.fd] = port
                self._epoll.register(port.fd, select.EPOLLIN)
            case "line":
                self.star.ports[order["name"]].set(Line(**order["line"]))
            case "routes":
                self.star.route(order["name"], [bytes.fromhex(key) for key in order["keys"]])
            case "counters":
                return {name: asdict(port.counters) for name, port in self.star.ports.items()}
        return {}


def main() -> None:
    with suppress(OSError):  # in a user namespace this is not allowed, and not needed on an idle machine
        os.setpriority(os.PRIO_PROCESS, 0, -15)
    gc.disable()  # packets make no cycles
    Driver().run()


if __name__ == "__main__":
    main()
