"""``raceme relay`` and ``raceme ping``."""

from __future__ import annotations

import argparse
from contextlib import aclosing

from net import console

DEFAULT_RELAY_LISTEN = "/ip4/0.0.0.0/tcp/4001"


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    relay = commands.add_parser(
        "relay",
        help="run a bootstrap node: the address that others start from",
        description="Run a bootstrap node. Its address is the first line of standard output; give it to the "
        "others as --bootstrap. Ctrl-C ends it.",
    )
    relay.add_argument(
        "--listen",
        metavar="MULTIADDR",
        action="append",
        help=f"where to accept connections; may be repeated (default: {DEFAULT_RELAY_LISTEN})",
    )
    relay.add_argument(
        "--bootstrap",
        metavar="ADDR",
        action="append",
        default=[],
        help="another bootstrap node to join; may be repeated",
    )
    console.add_identity(relay)
    console.add_json(relay, "the address")
    console.add_common(relay)
    relay.set_defaults(run=run_relay)

    ping = commands.add_parser(
        "ping",
        help="measure the round trip to a peer",
        description="Measure the round trip to a peer, over a connection secured as all are.",
    )
    ping.add_argument("address", metavar="ADDR", help="the peer's address, ending in /p2p/PEERID")
    ping.add_argument("--count", type=int, default=5, help="how many (default: 5)")
    console.add_json(ping, "the figures")
    console.add_common(ping)
    ping.set_defaults(run=run_ping)


def run_relay(options: argparse.Namespace) -> int:
    import trio

    from net import addresses
    from net.dht.service import Dht
    from net.host import open_host
    from net.identity import Identity

    listen = [addresses.parse(text) for text in options.listen or [DEFAULT_RELAY_LISTEN]]
    bootstrap = [addresses.parse_peer(text) for text in options.bootstrap]
    if options.identity is not None:
        identity = Identity.load(options.identity)
    else:
        identity = Identity.default(console.data_folder(), "relay")

    async def serve(stop: trio.Event) -> None:
        async with open_host(identity, listen=listen) as host:

            async def work() -> None:
                dht = Dht(host, server=True)
                await dht.join(bootstrap)
                dialable = [str(address) for address in host.peer_addresses]
                if options.json:
                    console.print_json({"address": dialable[0], "addresses": dialable, "peer_id": str(host.peer_id)})
                else:
                    print(dialable[0], flush=True)
                await dht.run()

            await console.cancel_on(stop, work)

    trio.run(console.until_signalled, serve)
    return 0


def run_ping(options: argparse.Namespace) -> int:
    import statistics

    import trio

    from net import addresses
    from net.host import open_host
    from net.identity import Identity
    from net.ping import ping

    target = addresses.parse_peer(options.address)
    if options.count < 1:
        raise console.UserError("--count must be at least 1")
    times_ms: list[float] = []

    async def measure(stop: trio.Event) -> None:
        async with open_host(Identity.generate()) as host:

            async def work() -> None:
                await host.connect(target.peer_id, [target.address])
                async with aclosing(ping(host, target.peer_id)) as round_trips:
                    async for round_trip_s in round_trips:
                        times_ms.append(round_trip_s * 1000)
                        if not options.json:
                            print(f"{target.peer_id}: {times_ms[-1]:.2f} ms", flush=True)
                        if len(times_ms) == options.count:
                            return
                        await trio.sleep(0.2)

            await console.cancel_on(stop, work)

    trio.run(console.until_signalled, measure)
    if not times_ms:
        return console.EXIT_INTERRUPTED
    summary = {"min_ms": min(times_ms), "median_ms": statistics.median(times_ms), "max_ms": max(times_ms)}
    if options.json:
        console.print_json({"peer_id": str(target.peer_id), **summary, "times_ms": times_ms})
    else:
        print(" ".join(f"{name[:-3]} {value:.2f} ms" for name, value in summary.items()))
    return 0
