"""`edgecl probe`."""

from typing import Annotated

import typer

from edgecl.cli.options import DownloadOption, JsonOption, LabelledOption, ModelArgument, TestOption


def probe_command(
    model: ModelArgument,
    data: LabelledOption,
    test: TestOption = None,
    labels_per_class: Annotated[
        int | None,
        typer.Option("--labels-per-class", min=1, help="Labels of the few-label probe [default: 10]"),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Draws of the few labels.")] = 3,
    json_: JsonOption = False,
    download: DownloadOption = False,
) -> None:
    """Judge a net's frozen features."""
    from edgecl.cli.output import print_json, print_rows
    from edgecl.evaluate.probe import probe

    record = probe(
        model, data=data, test=test, labels_per_class=labels_per_class, seeds=seeds, download=download
    )
    if json_:
        print_json(record)
        return
    few = record["few_label_top1"]
    rows = [
        ("kNN", f"{record['knn_top1']:.1f}", _interval(record["knn_ci95"]), f"{record['n_train']} labels"),
        (
            "linear",
            f"{record['linear_top1']:.1f}",
            _interval(record["linear_ci95"]),
            f"{record['n_train']} labels",
        ),
        (
            "few labels",
            f"{few['mean']:.1f}",
            _interval(few["ci95"]),
            f"{few['labels_per_class']} per class, {seeds} draws",
        ),
    ]
    print_rows(f"{model}: top-1 % on {record['n_test']} held-out images", ["", "top-1", "95 %", "from"], rows)


def _interval(bounds: list[float] | None) -> str:
    return "–" if bounds is None else f"[{bounds[0]:.1f}, {bounds[1]:.1f}]"
