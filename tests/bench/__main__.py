"""Run every benchmark; say which goals are missed. Exit status 0 unless one broke."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.bench import report

NOT_BENCHMARKS = {
    *("__init__", "__main__", "report", "processes"),
    *("child", "children", "generating", "links", "prompts", "storm", "training"),  # of faults, generate, tune
}


def main() -> int:
    options = report.parser(__doc__).parse_args()
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in NOT_BENCHMARKS)
    results, broken = [], []
    for name in names:
        report.progress(f"== {name}")
        done = subprocess.run(
            [sys.executable, "-m", f"tests.bench.{name}", "--json", "--runs", str(options.runs)],
            stdout=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            broken.append(name)
            continue
        result = json.loads(done.stdout)
        results.append(result)
        if not options.json:
            entries = [report.Figure(**entry) for entry in result["figures"]]
            report.show(name, entries, as_json=False, missing=result.get("missing"))
    figures = [report.Figure(**entry) for result in results for entry in result["figures"]]
    if options.json:
        print(json.dumps({"benches": results, "broken": broken}))
    else:
        missed = [entry.name for entry in figures if not entry.is_met]
        missing = [name for result in results for name in result.get("missing", ())]
        print(
            f"missed: {', '.join(missed) or 'none'}"
            + (f"; missing: {', '.join(missing)}" if missing else "")
            + (f"; broken: {', '.join(broken)}" if broken else "")
        )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
