"""`edgecl publish`."""

from pathlib import Path
from typing import Annotated

import typer

from edgecl.cli.options import ForceOption, JsonOption, ModelArgument


def publish_command(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    bundle: Annotated[
        Path | None,
        typer.Option(
            "--bundle",
            metavar="BUNDLE",
            help="Publish the ONNX files of this bundle of the net, with what was measured of them "
            "[default: one exported now, fp32]",
        ),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            "--push",
            metavar="USER/NAME",
            help="Push the folder to the Hugging Face Hub, or to HF_ENDPOINT; a new repository is public.",
        ),
    ] = None,
    json_: JsonOption = False,
    force: ForceOption = False,
) -> None:
    """Write a folder that timm loads, with ONNX files and a model card."""
    from edgecl.cli.output import print_json, print_line
    from edgecl.deploy.publish import publish
    from edgecl.errors import tell

    record = publish(model, out=out, bundle=bundle, push=push, force=force, say=tell)
    if json_:
        print_json(record)
        return
    if record.timm:
        print_line(f'timm.create_model("local-dir:{out}", pretrained=True)')
    else:
        print_line(f"{record.why_not_timm}: ONNX alone")
    print_line(f"-> {out}" + (f", {record.url}" if record.url else ""))
