"""`edgecl export`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from edgecl.cli.device_options import split_precisions
from edgecl.cli.options import (
    DownloadOption,
    ExportPrecisionOption,
    ForceOption,
    JsonOption,
    ModelArgument,
)

if TYPE_CHECKING:
    from edgecl.storage.records import Manifest


def export_command(
    model: ModelArgument,
    target: Annotated[
        str,
        typer.Option(
            "--target", metavar="NAME", help="A packaged target (`edgecl ls targets`) or a TOML file."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Bundle to write.")],
    precision: ExportPrecisionOption = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            metavar="URI",
            help="Real images to calibrate and compare on [default: those the net was made from]",
        ),
    ] = None,
    eval_: Annotated[
        str | None,
        typer.Option(
            "--eval",
            metavar="URI",
            help="Labelled images to evaluate the precisions on [default: what is held out of the net's own]",
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run", metavar="RUN_DIR", help="Compare with the slim view in this run's host as well."
        ),
    ] = None,
    input_: Annotated[
        Literal["float32", "uint8", "uint8-nchw"] | None,
        typer.Option(
            "--input",
            help="What the net takes: float32 (N, 3, H, W), normalized; uint8, RGB bytes (N, H, W, 3); "
            "uint8-nchw, bytes (N, 3, H, W). [default: the target's]",
        ),
    ] = None,
    softmax: Annotated[
        bool, typer.Option("--softmax", help="End a classifier in softmax, if the target does not.")
    ] = False,
    json_: JsonOption = False,
    force: ForceOption = False,
    download: DownloadOption = False,
) -> None:
    """Export to ONNX in every precision, proven against torch."""
    from edgecl.cli.output import print_json
    from edgecl.deploy.export import export
    from edgecl.errors import tell

    record = export(
        model,
        target=target,
        out=out,
        precisions=split_precisions(precision),
        calibration=calibration,
        eval_uri=eval_,
        run=run,
        input=input_,
        softmax=softmax,
        force=force,
        download=download,
        say=tell,
    )
    if json_:
        print_json(record)
    else:
        _print_bundle(record, out)


def _print_bundle(manifest: "Manifest", out: Path) -> None:
    from edgecl.cli.output import print_line, print_rows

    rows = []
    for name, about in manifest.precisions.items():
        parity, accuracy = about.parity, about.accuracy
        assert parity is not None
        rows.append(
            [
                f"{name} (default)" if name == manifest.precision else name,
                about.form,
                f"{manifest.size_bytes[about.model] / 1e6:.2f}",
                f"{parity.max_relative_difference:.2g}",
                f"{parity.top1_agreement:.1%}",
                "–" if accuracy is None else f"{accuracy.value:.4g} {accuracy.metric}",
            ]
        )
    opsets = {about.opset for about in manifest.precisions.values()}
    print_rows(
        f"{manifest.target_name}: {manifest.runtime}, opset {', '.join(map(str, opsets))}",
        ["precision", "form", "MB", "largest difference", "agreement", "accuracy"],
        rows,
    )
    decisions = {name: about.decision for name, about in manifest.precisions.items()}
    decisions.update((name, about.decision) for name, about in manifest.left_out.items())
    for name, decision in decisions.items():
        if decision:
            print_line(f"{name}: {decision.words}")
    print_line(f"-> {out}")
