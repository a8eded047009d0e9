"""`edgecl bench`."""

from pathlib import Path
from typing import Annotated

import typer


def bench_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A directory that `edgecl export` wrote.")],
    duration_s: Annotated[
        float,
        typer.Option(
            "--duration-s",
            min=0.001,
            help="Seconds to sample for, once warm; at least 1,000 runs where the net allows.",
        ),
    ] = 10.0,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads to compute with [default: every core]")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the record as one JSON object.")] = False,
) -> None:
    """Measure a bundle's latency on this machine."""
    from edgecl.cli.output import print_json, print_rows, status_line
    from edgecl.deploy.bench import bench

    with status_line() as report:
        record = bench(bundle, duration_s=duration_s, threads=threads, report=report)
    if json_:
        print_json(record)
        return
    latency, device = record["latency_ms"], record["device"]
    rows = []
    for name in ("p50", "p90", "p99"):
        interval = latency[f"ci95_{name}"]
        shown = (
            f"{latency[name]:.4g} ms  [{interval[0]:.4g}, {interval[1]:.4g}]"
            if interval
            else "under 1,000 runs"
        )
        rows.append((name, shown))
    rows += [
        ("mean", f"{latency['mean']:.4g} ms"),
        ("throughput", f"{record['throughput_per_s']:.4g} images/s at batch {record['batch']}"),
        ("runtime", f"{record['runtime']}, {record['precision']}"),
        ("threads", record["threads"]),
        ("device", f"{device['name']}, {device['cores']} cores, load {device['load_1m']} before"),
        ("samples", f"{record['samples']} in {record['duration_s']:.1f} s"),
        ("warm-up", f"{record['warmup_samples']} runs in {record['warmup_s']:.1f} s"),
    ]
    if record["marks"]:
        rows.append(("doubtful", ", ".join(record["marks"])))
    print_rows(f"{bundle}: latency [95 % interval]", ["", ""], rows)
