"""``raceme relay`` and ``raceme ping``."""

from __future__ import annotations

import argparse
from contextlib import aclosing

from net import console
from net.modules import pinning

DEFAULT_RELAY_LISTEN = ("/ip4/0.0.0.0/tcp/4001", "/ip4/0.0.0.0/udp/4001/quic-v1")
MAX_PINGS = 1_000_000
WITHDRAW_S = 2.0
MAX_RESERVATIONS, MAX_CIRCUITS, MAX_MB_PER_S = 10_000, 100_000, 100_000


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    relay = commands.add_parser(
        "relay",
        help="run a bootstrap node: the address that others start from, and where those meet who cannot be reached",
        description="Run a bootstrap node. Its address is the first line of standard output; give it to the "
        "others as --bootstrap. It also relays: nodes behind NATs can be reached through it. Ctrl-C ends it.",
    )
    console.add_bootstrap(relay, "another bootstrap node to join", is_required=False)
    pinning.add_pins(relay)
    console.add_node(relay, DEFAULT_RELAY_LISTEN)
    relay.add_argument(
        "--max-reservations",
        type=console.whole(0, MAX_RESERVATIONS),
        default=128,
        metavar="N",
        help="nodes that can be reached through this one at a time; 0: none (default: 128)",
    )
    relay.add_argument(
        "--max-circuits",
        type=console.whole(0, MAX_CIRCUITS),
        default=512,
        metavar="N",
        help="connections that it carries at a time (default: 512)",
    )
    relay.add_argument(
        "--rate",
        type=console.whole(1, MAX_MB_PER_S),
        metavar="MB/S",
        help="megabytes a second that it carries in all, in fair shares (default: what the machine can do)",
    )
    console.add_json(relay, "the address and what is relayed")
    console.add_common(relay)
    relay.set_defaults(run=run_relay)

    ping = commands.add_parser(
        "ping",
        help="measure the round trip to a peer",
        description="Measure the round trip to a peer, over a connection secured as all are.",
    )
    ping.add_argument("address", metavar="ADDR", help="the peer's address, ending in /p2p/PEERID")
    ping.add_argument("--count", type=console.whole(1, MAX_PINGS), default=5, metavar="N", help="default: 5")
    console.add_swarm_key(ping)
    console.add_json(ping, "the figures")
    console.add_common(ping)
    ping.set_defaults(run=run_ping)


def run_relay(options: argparse.Namespace) -> int:
    import trio

    from net.dht.service import Dht
    from net.files.server import FileServer
    from net.host import Host
    from net.nurseries import open_service_nursery
    from net.perf import serve_perf
    from net.relay.reservations import RelayLimits
    from net.relay.server import RelayServer

    listen = console.listen_addresses(options)
    bootstrap = console.bootstrap_addresses(options)
    limits = RelayLimits(
        reservations=options.max_reservations,
        circuits=options.max_circuits,
        bytes_per_s=None if options.rate is None else options.rate * 1e6,
    )

    async def relay(host: Host) -> None:
        dht = Dht(host, server=True)
        serve_perf(host)  # the first node of a swarm has nobody else to measure its line with
        async with open_service_nursery() as nursery:
            await console.start_presence(options, host, dht, bootstrap, nursery)
            if options.max_reservations:
                await nursery.start(RelayServer(host, limits).run)
            await dht.join(bootstrap)
            if options.pin:
                pinning.start_pins(options, host, dht, FileServer(host), nursery)
            dialable = [str(address) for address in host.peer_addresses]
            if options.json:
                fields = {"max_reservations": options.max_reservations, "max_circuits": options.max_circuits}
                console.print_json(
                    {
                        "address": dialable[0],
                        "addresses": dialable,
                        "peer_id": str(host.peer_id),
                        "relay": {**fields, "mb_per_s": options.rate} if options.max_reservations else None,
                    }
                )
            else:
                print(dialable[0], flush=True)
            try:
                await dht.run()
            finally:
                with trio.move_on_after(WITHDRAW_S, shield=True):
                    await dht.withdraw()

    identity = console.node_identity(options, "relay")
    key = console.swarm_key(options)
    console.run_host(relay, identity, listen=listen, until_eof=options.until_eof, swarm_key=key)
    return 0


def run_ping(options: argparse.Namespace) -> int:
    import statistics

    import trio

    from net import addresses
    from net.host import Host
    from net.identity import Identity
    from net.ping import ping

    target = addresses.parse_peer(options.address)
    times_ms: list[float] = []

    async def measure(host: Host) -> None:
        await host.connect(target.peer_id, [target.address])
        async with aclosing(ping(host, target.peer_id)) as round_trips:
            async for round_trip_s in round_trips:
                times_ms.append(round_trip_s * 1000)
                if not options.json:
                    print(f"{target.peer_id}: {times_ms[-1]:.2f} ms", flush=True)
                if len(times_ms) == options.count:
                    return
                await trio.sleep(0.2)

    console.run_host(measure, Identity.generate(), swarm_key=console.swarm_key(options))
    if not times_ms:
        return console.EXIT_INTERRUPTED
    summary = {"min_ms": min(times_ms), "median_ms": statistics.median(times_ms), "max_ms": max(times_ms)}
    if options.json:
        console.print_json({"peer_id": str(target.peer_id), **summary, "times_ms": times_ms})
    else:
        print(" ".join(f"{name[:-3]} {value:.2f} ms" for name, value in summary.items()))
    return 0
