"""Does training start every time? The demo's pretraining over many seeds and thread counts; the worst and the median.

    python benchmarks/start.py --out DIR                              # 10 seeds, 1 and 2 threads
    python benchmarks/start.py --out DIR --table                      # what there is so far
    python benchmarks/start.py --out DIR --set method.coding_rate.weight=0   # another recipe, in the same directory

A run is lucky or not by its seed, and by its rounding: by the number of threads and by the kernels that a processor
chooses. So each has a process of its own with its threads set from the start, and its line names the processor; on
another processor, or on one that plays an older one (ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2), all are run anew.
It can be stopped at any time and goes on with the same command; two commands at once share the work.

Nets are evaluated on 1,000 validation pictures of the demo's generator; its test pictures are not touched. "few" is a linear
probe on 5 labels per class, mean of 5 draws. A run is on the plateau when its own record says so at its end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path

import campaign
from campaign import PLAYED, Run, read_results, state_of
from timing import options_of, processor, table

from edgecl.errors import EdgeclError


def runs_of(given: argparse.Namespace) -> list[Run]:
    """List the runs, seed by seed."""
    name, _ = processor()
    machine = " ".join([name, *(f"{key}={os.environ[key]}" for key in PLAYED if key in os.environ)])
    return [
        Run(
            f"{threads} threads",
            given.recipe,
            tuple(given.set),
            seed,
            data="demo",
            evaluate_on=campaign.DEMO_VALIDATION,
            labels_per_class=5,
            draws=5,
            threads=threads,
            machine=machine,
        )
        for seed in range(given.seeds)
        for threads in given.threads
    ]


def on_plateau(line: dict) -> bool:
    return line["plateau"] is not None


def print_table(runs: list[Run], directory: Path) -> dict:
    """Print every run, then the worst and the median at each number of threads, and all together."""
    found = read_results(directory)
    lines = [(run, found[run.identity]) for run in runs if run.identity in found]
    sound = [(run, line) for run, line in lines if "failed" not in line]
    name, isa = processor()
    print(f"{name}, {', '.join(isa) or 'none of the instructions looked for'}")
    for line in [line for _, line in sound][:1]:
        print(
            ", ".join(f"{key} {value}" for key, value in [*line["played"].items(), *line["versions"].items()])
        )
    head = ["threads", "seed", "kNN", "5/class", "linear", "RankMe", "diagonal, off-diagonal", "plateau", "s"]
    body = [row_of(str(run.threads), str(run.seed), line) for run, line in sound]
    groups = {str(threads): [line for run, line in sound if run.threads == threads] for threads in
              sorted({run.threads for run in runs})}  # fmt: skip
    summaries = {}
    for threads, group in {**groups, "all": [line for _, line in sound]}.items():
        if group:
            summaries[threads] = summarize(group)
            body += [summary_row(threads, which, summaries[threads]) for which in ("worst", "median")]
    print("\n" + table(head, body))
    for run, line in lines:
        if "failed" in line:
            print(f"\nFailed: {run.threads} threads, seed {run.seed}: {line['failed']}")
    missing = [run for run in runs if run.identity not in found]
    if missing:
        print(f"\nUnfinished, {len(missing)} of {len(runs)} runs:\n")
        for run in missing:
            print(f"- {run.threads} threads, seed {run.seed}: {state_of(run, directory)}")
    return {
        "finished": len(lines),
        "runs": len(runs),
        "failed": len(lines) - len(sound),
        "summaries": summaries,
    }


def row_of(threads: str, seed: str, line: dict) -> list[str]:
    return [
        threads,
        seed,
        f"{line['knn_top1']:.1f}",
        f"{statistics.mean(line['few']):.1f}",
        f"{line['linear_top1']:.1f}",
        f"{line['rankme']:.0f} of {line['features']}",
        f"{line['diagonal']:.2f}, {line['off_diagonal_rms']:.2f}",
        "yes" if on_plateau(line) else "no",
        f"{line['wall_s']:.0f}",
    ]


def summarize(lines: list[dict]) -> dict:
    """Return the worst and the median of each number, each by itself, and how many are on the plateau."""
    columns = {
        "knn_top1": [line["knn_top1"] for line in lines],
        "few": [statistics.mean(line["few"]) for line in lines],
        "linear_top1": [line["linear_top1"] for line in lines],
        "rankme": [line["rankme"] for line in lines],
    }
    return {
        "worst": {key: min(values) for key, values in columns.items()},
        "median": {key: statistics.median(values) for key, values in columns.items()},
        "on_plateau": sum(map(on_plateau, lines)),
        "count": len(lines),
    }


def summary_row(threads: str, which: str, summary: dict) -> list[str]:
    numbers = [f"{summary[which][key]:.1f}" for key in ("knn_top1", "few", "linear_top1", "rankme")]
    plateau = f"{summary['on_plateau']} of {summary['count']}" if which == "worst" else ""
    return [threads, f"**{which}**", *numbers, "", plateau, ""]


def main() -> None:
    options = options_of(__doc__)
    options.add_argument("--out", type=Path, required=True, help="directory of the runs")
    options.add_argument("--recipe", default="demo", help="a recipe for the demo's pictures [default: demo]")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="repeatable")
    options.add_argument("--seeds", type=int, default=10)
    options.add_argument(
        "--threads", default=[1, 2], type=lambda text: [int(part) for part in text.split(",")], metavar="1,2"
    )
    options.add_argument("--table", action="store_true", help="train nothing, print what there is")
    given = options.parse_args()
    runs = runs_of(given)
    try:
        runs[0].settings()
    except EdgeclError as problem:
        raise SystemExit(f"start.py: {problem}") from None
    status = 0 if given.table else campaign.work(runs, given.out)
    print(json.dumps({"benchmark": "start", **print_table(runs, given.out)}))
    raise SystemExit(status)


if __name__ == "__main__":
    main()
