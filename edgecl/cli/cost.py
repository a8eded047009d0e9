"""`edgecl cost`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from edgecl.cli.options import JsonOption, SetOption


def cost_command(
    subject: Annotated[
        str | None,
        typer.Argument(metavar="MODEL_DIR|RECIPE", help="A model directory, or a recipe to price."),
    ] = None,
    json_: JsonOption = False,
    table: Annotated[
        bool, typer.Option("--table", help="Price every row of the paper's training-cost column.")
    ] = False,
    images: Annotated[
        int | None,
        typer.Option(
            "--images", min=1, help="Images per epoch [default: the recipe's own data, else ImageNet-1K's]"
        ),
    ] = None,
    set_: SetOption = None,
) -> None:
    """Count MACs, parameters, training FLOPs."""
    from edgecl.cli.output import print_json

    if table == (subject is not None):
        raise typer.BadParameter("give either MODEL_DIR|RECIPE or --table")
    if subject is None:
        from edgecl.cost import cost_table

        rows = cost_table()
        if json_:
            print_json(rows)
        else:
            _print_table(rows)
        return
    if Path(subject).is_dir():
        from edgecl.cost import cost

        record = cost(Path(subject))
    else:
        from edgecl.recipe import read_recipe, recipe_name

        recipe = read_recipe(subject, set_)
        from edgecl.cost import cost_of_recipe

        record = cost_of_recipe(recipe, recipe_name=recipe_name(subject), images=images)
    if json_:
        print_json(record)
    else:
        _print_cost(subject, record)


def _print_cost(subject: str, record: dict[str, Any]) -> None:
    from edgecl.cli.output import print_rows

    size = " x ".join(str(side) for side in record["input"])
    rows = [
        ("MACs", f"{record['macs'] / 1e6:,.2f} M", f"one image, {size}, as fvcore counts"),
        ("FLOPs", f"{record['flops'] / 1e6:,.2f} M", "2 x MACs"),
        (
            "parameters",
            f"{record['params'] / 1e6:,.3f} M",
            "without classifier" if "training" in record else "",
        ),
    ]
    skipped = ", ".join(
        f"{name.removeprefix('aten::')} x{count}" for name, count in record["uncounted"].items()
    )
    rows.append(("not counted", skipped or "nothing", ""))
    if "training" in record:
        training = record["training"]
        rows += [
            ("method", training["arm"], f"{training['images']:,} images, {training['epochs']} epochs"),
            (
                "forward units",
                f"{training['forward_units']:.2f}",
                "slim forward passes per image; backward = 2",
            ),
            ("training", f"{training['flops_per_image'] / 1e9:.3f} GFLOPs per image", "projector apart"),
            ("training, total", f"{training['total_flops'] / 1e17:.4g}e17 FLOPs", "projector apart"),
            (
                "projector",
                f"{training['projector_total_flops'] / 1e17:.4g}e17 FLOPs",
                f"{100 * training['projector_total_flops'] / training['total_flops']:.1f} % on top",
            ),
        ]
        if len(record["widths"]) > 1:
            rows += [
                (
                    f"width {one['width']:g}",
                    f"{one['macs'] / 1e6:,.2f} M MACs, {one['params'] / 1e6:,.3f} M parameters",
                    f"{one['forward_passes']:.2f} of its forward passes per image",
                )
                for one in record["widths"]
            ]
    print_rows(f"cost of {subject}", ["", "", ""], rows)


def _print_table(rows: list[dict[str, Any]]) -> None:
    from edgecl.cli.output import print_rows

    print_rows(
        "training cost on ImageNet-1K, 1e17 FLOPs: by one rule, against the print",
        ["method", "net", "teacher", "epochs", "rule", "printed", "difference", "note"],
        [
            (
                row["method"],
                row["arch"],
                row["teacher"] or "–",
                row["epochs"],
                f"{row['total_flops'] / 1e17:.4g}",
                f"{row['printed_flops'] / 1e17:g}",
                f"{100 * row['difference']:+.1f} %",
                row["note"],
            )
            for row in rows
        ],
    )
