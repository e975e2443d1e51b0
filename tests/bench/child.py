"""What a benchmark's child runs first: ``python -m tests.bench.child PARENT SOURCE ANNOUNCED MODULE ARGUMENTS...``.

It is killed when the process PARENT ends, however that ends, also while it is stopped itself. SOURCE and ANNOUNCED say
where it is in the benchmark's network (``links.py``): the address that it dials from, and the multiaddr that it
announces in place of those where it listens; ``-`` for neither. Then comes ``python -m MODULE ARGUMENTS...``.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

from compute.spinning import spin_briefly

PR_SET_PDEATHSIG = 1
NONE = "-"


def _end_with_parent(parent: int) -> None:
    """Linux: the kernel sees to it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the parent has ended")


def _announce(text: str) -> None:
    from net import addresses
    from net.addresses import Multiaddr

    announced = Multiaddr(text)
    addresses.spell_out = lambda address: [announced]


def _dial_from(source: str) -> None:
    import trio

    from net.addresses import Multiaddr
    from net.errors import DialError
    from net.transports import tcp

    async def connect(address: Multiaddr, host: str, port: int) -> trio.SocketStream:
        try:
            return await trio.open_tcp_stream(host, port, local_address=source)
        except OSError as error:
            raise DialError(f"{address}: {error}") from error

    tcp.connect = connect


def main() -> None:
    parent, source, announced, module, *arguments = sys.argv[1:]
    _end_with_parent(int(parent))
    if source != NONE:
        _dial_from(source)
    if announced != NONE:
        _announce(announced)
    spin_briefly()  # as every command does
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
