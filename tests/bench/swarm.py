"""Simulated swarms on a virtual clock: what look-ups find while servers come, go and lie.

placement-found: share of the live servers that look-ups find, over all probes of a seed. dead-gone-s: the longest
time after which a look-up that begins still finds a server that is gone; withdrawn-gone-s: the same, of those alone
that said goodbye. forged-accepted: records in results that their subject never signed, or signed for something else;
older-accepted: versions when a newer one had been signed 20 s before, time enough to be put where it belongs;
outdated-s: the longest such time, however short. find-s: a look-up of the whole placement, in virtual seconds.
wall-s: real ones, per seed. Values are the worst over the seeds' own, not their median, where a goal is set.

The issue's bar is ``--seeds 50``: about a core-minute and 200 MB each. ``--seed N`` replays one. A seed that misses a
goal is named on standard error.
"""

from __future__ import annotations

import multiprocessing
import statistics
from dataclasses import replace
from functools import partial

from tests.bench import report
from tests.mem.simulation import Outcome, Scenario, simulate

FOUND, DEAD_GONE_S = 0.999, 120.0
TRACE_BITS = 2**64 - 1


def _misses(outcome: Outcome) -> bool:
    return bool(
        outcome.found_share < FOUND or outcome.dead_gone_s > DEAD_GONE_S or outcome.forged > 0 or outcome.older > 0
    )


def _figures(outcomes: list[Outcome]) -> list[report.Figure]:
    def worst(name: str, values: list[float], unit: str, better: str, goal: float | None = None) -> report.Figure:
        made = report.figure(name, values, unit, better=better, goal=goal)
        return replace(made, value=made.min if better == "higher" else made.max)

    return [
        worst("placement-found", [each.found_share for each in outcomes], "of live", "higher", FOUND),
        worst("dead-gone-s", [each.dead_gone_s for each in outcomes], "s", "lower", DEAD_GONE_S),
        worst("withdrawn-gone-s", [each.withdrawn_gone_s for each in outcomes], "s", "lower"),
        worst("forged-accepted", [float(each.forged) for each in outcomes], "records", "lower", 0.0),
        worst("older-accepted", [float(each.older) for each in outcomes], "records", "lower", 0.0),
        worst("outdated-s", [each.outdated_s for each in outcomes], "s", "lower"),
        report.figure("find-s", [statistics.median(each.find_s) for each in outcomes], "virtual s", better="lower"),
        report.figure("wall-s", [each.wall_s for each in outcomes], "s", better="lower"),
    ]


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--seeds", type=int, help="how many swarms, from seed 0 on (default: as many as --runs)")
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--nodes", type=int, default=300, help="servers in a swarm (default: 300)")
    parser.add_argument("--minutes", type=float, default=3.0, help="simulated, after the first (default: 3)")
    parser.add_argument("--processes", type=int, default=2, help="seeds at a time (default: 2)")
    options = parser.parse_args()
    seeds = range(options.runs if options.seeds is None else options.seeds) if options.seed is None else [options.seed]
    scenario = Scenario(nodes=options.nodes, minutes=options.minutes)
    outcomes = []
    with multiprocessing.get_context("spawn").Pool(min(options.processes, len(seeds))) as pool:
        for outcome in pool.imap(partial(simulate, scenario=scenario), seeds):
            outcomes.append(outcome)
            report.progress(
                f"seed {outcome.seed}: found {outcome.found} of {outcome.expected}, "
                f"dead for {outcome.dead_gone_s:.1f} s, forged {outcome.forged}, older {outcome.older} "
                f"(outdated for {outcome.outdated_s:.1f} s), find {statistics.median(outcome.find_s):.1f} s, "
                f"wall {outcome.wall_s:.0f} s, trace {outcome.trace & TRACE_BITS:016x}"
                + (f"; MISSED, replay with --seed {outcome.seed}" if _misses(outcome) else "")
            )
    report.show("swarm", _figures(outcomes), as_json=options.json)


if __name__ == "__main__":
    main()
