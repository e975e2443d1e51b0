"""Our host against go-libp2p and js-libp2p: echo, ping and identify over every transport and security, echo and ping
through relays, every role played by each that can, Kademlia's providers, and on the simulated internet (which needs
what ``make lab`` needs) hole punching and AutoNAT."""

from __future__ import annotations

import argparse
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

import trio

from interop import finding, relays, simulated, suite
from interop.peers.base import Driver
from interop.peers.go import GoDriver
from interop.peers.js import JsDriver
from tests.bench import report

DRIVERS: dict[str, Driver] = {driver.name: driver for driver in (GoDriver(), JsDriver())}
COLUMNS = "{:<5} {:<10} {:<6} {:<10} {:>12} {:>9}  {}"


@dataclass(frozen=True, kw_only=True)
class Options:
    names: list[str]
    echo_bytes: int
    as_json: bool


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m interop", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output and nothing else")
    parser.add_argument("--only", choices=sorted(DRIVERS), help="with this implementation alone")
    parser.add_argument("--megabytes", type=float, default=10.0, help="to be echoed in each case (default: 10)")
    given = parser.parse_args()
    options = Options(
        names=[given.only] if given.only else sorted(DRIVERS),
        echo_bytes=int(given.megabytes * 1_000_000),
        as_json=given.json,
    )
    results = trio.run(_run, options)
    failed = [result for result in results if result.failure is not None]
    if options.as_json:
        _show_json(results, options)
    else:
        impossible = sum(result.cannot is not None for result in results)
        remark = f", {impossible} cannot" if impossible else ""
        print(f"{len(results) - len(failed) - impossible} of {len(results)} cases passed{remark}")
    return 1 if failed or not results else 0


async def _run(options: Options) -> list[suite.Result]:
    out = sys.stderr if options.as_json else sys.stdout
    heading = ("peer", "over", "inside", "direction", f"{options.echo_bytes / 1e6:g} MB echo", "ping", "")
    print(COLUMNS.format(*heading).rstrip(), file=out, flush=True)
    results: list[suite.Result] = []
    drivers = [DRIVERS[name] for name in options.names]
    async with aclosing(_all(drivers, options)) as coming:
        async for result in coming:
            results.append(result)
            echo = "-" if result.echo_s is None else f"{result.echo_s:.2f} s"
            ping = "-" if result.ping_s is None else f"{result.ping_s * 1000:.1f} ms"
            cells = (result.peer, result.transport, result.security, result.direction, echo, ping, result.verdict)
            print(COLUMNS.format(*cells), file=out, flush=True)
    return results


async def _all(drivers: list[Driver], options: Options) -> AsyncGenerator[suite.Result, None]:
    parts = (
        suite.run(drivers, echo_bytes=options.echo_bytes),
        relays.run(drivers),
        finding.run(drivers),
        simulated.run(drivers),
    )
    for part in parts:
        async with aclosing(part) as coming:
            async for result in coming:
                yield result


def _show_json(results: list[suite.Result], options: Options) -> None:
    figures = []
    for result in results:
        if result.echo_s is not None:
            figures.append(report.figure(f"{result.name}-echo", [result.echo_s], "s", better="lower"))
        if result.ping_s is not None:
            figures.append(report.figure(f"{result.name}-ping", [result.ping_s * 1000], "ms", better="lower"))
        if result.took_s is not None:
            figures.append(report.figure(f"{result.name}-{result.took}", [result.took_s], "s", better="lower"))
    report.show("interop", figures, as_json=True)


if __name__ == "__main__":
    sys.exit(main())
