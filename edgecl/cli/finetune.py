"""`edgecl finetune`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from edgecl.cli.options import (
    DownloadOption,
    ForceOption,
    LabelledOption,
    ModelArgument,
    TestOption,
)

# Written out, since the settings' own module takes a second to import; held to it by a test.
SETTINGS = (
    "lr, backbone_lr_fraction, weight_decay, batch_size, label_smoothing, crop_min, flip, flip_vertical, jitter, "
    "rand_augment, mixup, cutmix, class_weights, ema, early_stop, test_size, seed, device; with "
    "--quantize also learn_scales, keep"
)


def finetune_command(
    model: ModelArgument,
    data: LabelledOption,
    out: Annotated[Path, typer.Option("--out", help="Model directory to write.")],
    test: TestOption = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            "--epochs", min=1, max=10**6, help="Passes over the data [default: 20, with --quantize 3]"
        ),
    ] = None,
    quantize: Annotated[
        Literal["int8"] | None,
        typer.Option("--quantize", help="Train the net as the int8 net it will be, from its own classifier."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help=f"Change a setting. Repeatable. Settings: {SETTINGS}."
        ),
    ] = None,
    force: ForceOption = False,
    download: DownloadOption = False,
) -> None:
    """Add a classifier and train with labels."""
    from edgecl.cli.output import print_line
    from edgecl.evaluate.finetune import finetune

    record = finetune(
        model,
        data=data,
        test=test,
        out=out,
        epochs=epochs,
        quantize=quantize,
        assignments=set_,
        force=force,
        download=download,
    )
    found = record.evaluation
    low, high = found.top1_ci95
    before = (
        f"float {found.float_top1:.1f} %, int8 calibrated {found.calibrated_top1:.1f} %, trained as int8: "
        if quantize
        else ""
    )
    metric = "top-1" if found.metric == "top1" else "F1"
    precision = found.mean_average_precision
    beside = "" if precision is None else f", mean average precision {precision:.1f} %"
    print_line(
        f"{before}{metric} {found.top1:.1f} % [{low:.1f}, {high:.1f}]{beside} on {found.n_test} held-out images, "
        f"{len(record.classes or ())} classes -> {out}"
    )
