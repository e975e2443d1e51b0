"""The lab: everything that runs on the simulated internet, with its tables.

It begins with itself: every NAT and every line is held to what it claims. Then our nodes: dials that need no help, the
matrix of all NATs, the best paths where things are less simple, generations, and changes of the network. Needs root (or
a kernel that lends it in user namespaces), nftables and iproute2; leaves nothing behind.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

import trio

from interop import lab
from interop.lab import changes, dials, ends, generation, lines, matrix, nat, paths, probes
from interop.lab.probes import Finding
from tests.bench import report
from tests.bench.report import Figure, figure

COLUMNS = "{:<54} {:<34} {:<34} {}"
STARTS = (2, 16)


def main() -> int:
    parser = report.parser(__doc__)
    parser.prog = "python -m interop.lab"
    parser.set_defaults(runs=None)
    parser.add_argument("--only", action="append", choices=sorted(PARTS), help="this part alone; may be repeated")
    parser.add_argument("--transport", action="append", choices=matrix.TRANSPORTS, help="in the matrix (default: all)")
    options = parser.parse_args()
    found = Lab(options.only or list(PARTS), options.json, options.runs, options.transport)
    broken = 0
    try:
        lab.enter()
        trio.run(_run, found)
    except* lab.LabError as group:
        print(f"lab: {_first(group)}", file=sys.stderr)
        broken = 1
    except* KeyboardInterrupt:
        broken = 130
    if broken:
        return broken
    if options.json:
        report.show("lab", found.figures, as_json=True)
    else:
        print()
        report.show("lab", found.figures, as_json=False)
        print(f"{found.passed} of {found.total} claims hold")
    return 0 if found.passed == found.total else 1


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class Lab:
    """What is to be run, and what has been found."""

    def __init__(self, parts: list[str], as_json: bool, runs: int | None, transports: list[str] | None) -> None:
        self.parts = parts
        self.out = sys.stderr if as_json else sys.stdout
        self.runs = runs  # None: each part's own
        self.transports = transports or list(matrix.TRANSPORTS)
        self.figures: list[Figure] = []
        self.passed = self.total = 0

    def say(self, text: str) -> None:
        print(text.rstrip(), file=self.out, flush=True)

    async def claims(self, title: str, coming: AsyncGenerator[Finding, None]) -> dict[str, float]:
        """A table of findings; the figures of those that have one."""
        self.say(f"\n{COLUMNS.format(title, 'claimed', 'found', '')}")
        values = {}
        passed = total = 0
        async with aclosing(coming):
            async for one in coming:
                total += 1
                passed += one.passed
                self.say(COLUMNS.format(one.name, one.expected, one.found, "pass" if one.passed else "FAIL"))
                if one.value is not None:
                    values[one.name] = one.value
        self.figures.append(figure(f"{title}-held", [float(passed)], f"of {total}", better="higher", goal=total))
        self.passed += passed
        self.total += total
        return values


async def _run(found: Lab) -> None:
    for name in found.parts:
        await PARTS[name](found)


async def _starts(found: Lab) -> None:
    found.say("homes, each with a host: seconds to bring them up")
    for homes in STARTS:
        start = trio.current_time()
        net = lab.internet()
        kinds = list(nat.KINDS)
        for number in range(homes):
            net.home(nat=kinds[number % len(kinds)]).host()
        async with net.up():
            taken = trio.current_time() - start
        found.figures.append(figure(f"start-{homes}-homes", [taken], "s", better="lower"))
        found.say(f"{homes:>4} {taken:.2f}")


async def _probes(found: Lab) -> None:
    await found.claims("nats", probes.run())


async def _ends(found: Lab) -> None:
    await found.claims("ends", ends.run())


async def _lines(found: Lab) -> None:
    values = await found.claims("lines", lines.run())
    found.figures.append(figure("ceiling", [values["ceiling of the core"]], "Mbit/s", better="higher"))


async def _dials(found: Lab) -> None:
    await found.claims("dials", dials.run())


async def _changes(found: Lab) -> None:
    values = await found.claims("changes", changes.run(runs=found.runs or changes.RUNS))
    found.figures.append(figure("seconds-to-return", list(values.values()), "s", better="lower", goal=changes.AGAIN_S))


async def _paths(found: Lab) -> None:
    outcomes: list[paths.Outcome] = []

    async def findings() -> AsyncGenerator[Finding, None]:
        async with aclosing(paths.run(runs=found.runs or paths.RUNS)) as coming:
            async for outcome in coming:
                outcomes.append(outcome)
                yield outcome.finding

    await found.claims("paths", findings())
    found.figures += paths.figures(outcomes)
    for why in sorted({str(outcome.why) for outcome in outcomes if not outcome.finding.passed and outcome.why}):
        found.say(f"  why not: {why}")


async def _generation(found: Lab) -> None:
    await found.claims("generation", generation.run())


async def _matrix(found: Lab) -> None:
    attempts = []
    coming = matrix.run(runs=found.runs or matrix.RUNS, transports=found.transports)
    async with aclosing(coming):
        async for attempt in coming:
            attempts.append(attempt)
    found.say("\nmatrix: direct / connected / attempts; rows call")
    for transport in found.transports:
        for row in matrix.table(attempts, transport):
            found.say(row)
        reasons = {attempt.reached.why for attempt in attempts if attempt.transport == transport} - {None}
        for why in sorted(str(reason) for reason in reasons)[:1]:
            found.say(f"  why not: {why}")
    found.figures += matrix.figures(attempts)


PARTS: dict[str, Callable[[Lab], Awaitable[None]]] = {
    "starts": _starts,
    "nats": _probes,
    "lines": _lines,
    "dials": _dials,
    "matrix": _matrix,
    "paths": _paths,
    "changes": _changes,
    "generation": _generation,
    "ends": _ends,
}

if __name__ == "__main__":
    sys.exit(main())
