"""`edgecl bench`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

from edgecl.cli.device_options import HostOption, PrecisionOption, RuntimeOption, split_precisions
from edgecl.cli.options import JsonOption

if TYPE_CHECKING:
    from edgecl.storage.records import BenchRecord, Latency

_Quantile = Literal["p50", "p90", "p99"]
# What a mark of a measurement means.
_MARKS = {
    "unsteady": "it never became steady while warming up",
    "noisy": "a tenth of the runs took over 1.25 times the median: other work on the machine",
    "drift": "the last quarter ran over 3 % slower than the first",
    "unstable": "trtexec calls it unstable: it varies by over 2.5 %",
    "enqueue bound": "the processor could hardly start work as fast as the GPU did it",
    "no CUDA graph": "without a CUDA graph, which this trtexec did not make",
    "precision not checked": "the engine does not tell what its layers compute in",
}


def bench_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A directory that `edgecl export` wrote.")],
    precision: PrecisionOption = None,
    runtime: RuntimeOption = None,
    host: HostOption = None,
    duration_s: Annotated[
        float,
        typer.Option(
            "--duration-s",
            min=0.001,
            max=86_400,
            help="Seconds to sample each precision for, once warm; at least 1,024 runs where the net allows. "
            "60 for numbers to publish.",
        ),
    ] = 10.0,
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, max=1024, help="Threads to compute with [default: every core]"),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Measure a bundle's latency, and its energy where a board has a power monitor, here or on a board."""
    from edgecl.cli.output import print_json, status_line
    from edgecl.deploy.device import bench

    precisions = split_precisions(precision)
    with status_line() as report:
        record = bench(
            bundle,
            precisions=precisions,
            runtime=runtime,
            duration_s=duration_s,
            threads=threads,
            host=host,
            report=report,
        )
    if json_:
        print_json(record)
    else:
        _print_record(bundle, record)


def _print_record(bundle: Path, record: "BenchRecord") -> None:
    from edgecl.cli.output import print_line, print_rows

    device = record.device
    print_rows(
        f"{bundle} on {device.name}: latency in ms",
        ["precision", "mode", "p50 [95 % interval]", "p90", "p99", "images/s", "J/inference", "runs"],
        [
            (
                one.precision,
                one.mode,
                *(_quantile(one.latency_ms, name) for name in get_args(_Quantile)),
                _rate(one.throughput_per_s),
                f"{one.energy.j_per_inference:.3g}" if one.energy else "–",
                "–" if one.samples is None else f"{one.samples:,}",
            )
            for one in record.measurements
        ],
    )
    for ratio in record.ratios:
        low, high = ratio.ci95 or (None, None)
        interval = f" [{low:.3g}, {high:.3g}]" if low is not None else ""
        print_line(f"{ratio.b} is {ratio.p50_ratio:.3g}{interval} times as fast as {ratio.a}")
    print_line(f"{record.runtime}, threads: {record.threads}, batch: {record.batch}")
    rails = next((one.energy.rails for one in record.measurements if one.energy), None)
    if rails:
        print_line(f"energy of the whole module: {' + '.join(rails)}")
    for mark in record.marks:
        print_line(f"doubtful: {_MARKS.get(mark, mark)}")
    for one in record.measurements:
        for mark in one.marks:
            if mark not in record.marks:
                print_line(f"doubtful: {one.precision}, {one.mode}: {_MARKS.get(mark, mark)}")


def _quantile(latency: "Latency", name: "_Quantile") -> str:
    value: float | None = getattr(latency, name)
    if value is None:
        return "too few runs"
    interval = latency.ci95_p50 if name == "p50" else None
    return f"{value:.4g}" + (f" [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else "")


def _rate(per_second: float | None) -> str:
    if per_second is None:
        return "–"
    return f"{per_second:,.0f}" if per_second >= 1000 else f"{per_second:.4g}"
