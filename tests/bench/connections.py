"""What is left of many connections once they are closed: memory, descriptors, tasks. All in one process, over TCP."""

from __future__ import annotations

import gc
import os
import resource
from collections.abc import Sequence

import trio

from net.addresses import parse
from net.host import Host, open_host
from net.identity import Identity
from tests.bench import report

WARM_UP = 200


def _held() -> tuple[float, int, int]:
    """Resident MB, open descriptors, living tasks."""
    gc.collect()
    with open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[1]) * resource.getpagesize() / 1e6
    return resident, len(os.listdir("/proc/self/fd")), trio.lowlevel.current_statistics().tasks_living


async def _connect(host: Host, identities: Sequence[Identity], count: int) -> None:
    for number in range(count):
        async with open_host(identities[number % len(identities)]) as other:
            await other.connect(host.peer_id, host.addresses)
    while host.swarm.connections:  # until the last one has ended at this side, too
        await trio.lowlevel.checkpoint()


async def _measure(connections: int) -> list[report.Figure]:
    identities = [Identity.generate() for _ in range(50)]
    async with open_host(Identity.generate(), listen=[parse("/ip4/127.0.0.1/tcp/0")]) as host:
        await _connect(host, identities, WARM_UP)
        before = _held()
        began = trio.current_time()
        await _connect(host, identities, connections)
        seconds = trio.current_time() - began
        after = _held()
    growth = [late - early for early, late in zip(before, after, strict=True)]
    return [
        report.figure("resident-growth", [growth[0]], "MB", better="lower", goal=5.0),
        report.figure("descriptors-growth", [growth[1]], "descriptors", better="lower", goal=0),
        report.figure("tasks-growth", [growth[2]], "tasks", better="lower", goal=0),
        report.figure("ms-per-connection", [1000 * seconds / connections], "ms", better="lower"),
    ]


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--connections", type=int, default=10_000, help="default: 10000")
    options = parser.parse_args()
    report.show("connections", trio.run(_measure, options.connections), as_json=options.json)


if __name__ == "__main__":
    main()
