"""`edgecl probe`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgecl.cli.options import DownloadOption, JsonOption, LabelledOption, TestOption

if TYPE_CHECKING:
    from edgecl.storage.records import ProbedNet, ProbeRecord


def probe_command(
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL_DIR...",
            help="Directories that `edgecl carve` or `finetune` wrote.",
            show_default=False,
        ),
    ],
    data: LabelledOption,
    test: TestOption = None,
    labels_per_class: Annotated[
        int | None,
        typer.Option(
            "--labels-per-class", min=1, max=10**9, help="Labels of the few-label probe [default: 10]"
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=10_000, help="Draws of the few labels.")] = 3,
    json_: JsonOption = False,
    download: DownloadOption = False,
) -> None:
    """Evaluate a net's frozen features; of several nets, side by side."""
    from edgecl.cli.output import print_json
    from edgecl.evaluate.probe import probe_all, side_by_side

    records = probe_all(
        models, data=data, test=test, labels_per_class=labels_per_class, seeds=seeds, download=download
    )
    if len(models) == 1:
        if json_:
            print_json(records[0])
        else:
            _print_one(models[0], records[0], draws=seeds)
        return
    table = side_by_side(models, records)
    if json_:
        print_json(table)
    else:
        _print_several(table, draws=seeds)


def _print_one(model: Path, record: "ProbeRecord", *, draws: int) -> None:
    from edgecl.cli.output import print_rows

    few = record.few_label_top1
    all_labels, some = f"{record.n_train} labels", f"{few.labels_per_class} per class, {draws} draws"
    rows = [
        ("kNN", f"{record.knn_top1:.1f}", _interval(record.knn_ci95), all_labels),
        ("linear", f"{record.linear_top1:.1f}", _interval(record.linear_ci95), all_labels),
        ("few labels", f"{few.mean:.1f}", _interval(few.ci95), some),
    ]
    print_rows(f"{model}: top-1 % on {record.n_test} held-out images", ["", "top-1", "95 %", "from"], rows)


def _print_several(table: "list[ProbedNet]", *, draws: int) -> None:
    from edgecl.cli.output import print_rows

    per_class, rows = table[0].probe.few_label_top1.labels_per_class, []
    for one in table:
        probe, few = one.probe, one.probe.few_label_top1
        found = (
            (probe.knn_top1, probe.knn_ci95),
            (probe.linear_top1, probe.linear_ci95),
            (few.mean, few.ci95),
        )
        size = (f"{one.width:g}", f"{one.params / 1e6:,.3f} M", f"{one.macs / 1e6:,.2f} M")
        rows.append((one.model, *size, *(f"{value:.1f} {_interval(ci95)}" for value, ci95 in found)))
    print_rows(
        f"top-1 % on {table[0].probe.n_test} held-out images; few labels: {per_class} per class, {draws} draws",
        ["net", "width", "params", "MACs", "kNN", "linear", "few labels"],
        rows,
    )


def _interval(bounds: list[float] | None) -> str:
    return "–" if bounds is None else f"[{bounds[0]:.1f}, {bounds[1]:.1f}]"
