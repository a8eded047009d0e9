"""`edgecl export`."""

from pathlib import Path
from typing import Annotated

import typer

from edgecl.cli.options import ForceOption, ModelArgument


def export_command(
    model: ModelArgument,
    target: Annotated[
        str, typer.Option("--target", metavar="NAME", help="A packaged target or a TOML file.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Bundle to write.")],
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            metavar="URI",
            help="Real images to compare on [default: those the net was made from]",
        ),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Export to ONNX, proven against torch."""
    from edgecl.deploy.export import export

    record = export(model, target=target, out=out, calibration=calibration, force=force)
    parity = record["parity"]
    typer.echo(
        f"{record['target_name']}: {record['runtime']} {record['precision']}, opset {record['target']['graph']['opset']}, "
        f"{record['size_bytes']['model.onnx'] / 1e6:.2f} MB; against torch on {parity['images']} images: largest "
        f"relative difference {parity['max_relative_difference']:.2g}, agreement {parity['top1_agreement']:.1%} -> {out}"
    )
