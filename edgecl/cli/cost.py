"""`edgecl cost`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgecl.cli.options import JsonOption, SetOption

if TYPE_CHECKING:
    from edgecl.storage.records import CostRecord, PublishedCost, RecipeCost, RecipeTraining, WidthCost


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
            "--images",
            min=1,
            max=10**12,
            help="Images per epoch [default: the recipe's own data, else ImageNet-1K's]",
        ),
    ] = None,
    set_: SetOption = None,
) -> None:
    """Count MACs, parameters, training FLOPs."""
    from edgecl.cli.output import print_json

    if table == (subject is not None):
        raise typer.BadParameter("give either MODEL_DIR|RECIPE or --table")
    if subject is None:
        from edgecl.evaluate.cost import cost_table

        rows = cost_table()
        if json_:
            print_json(rows)
        else:
            _print_table(rows)
        return
    if Path(subject).is_dir():
        if set_ or images:
            raise typer.BadParameter("--set and --images are for a recipe, and this is a model directory")
        from edgecl.evaluate.cost import cost

        record: CostRecord | RecipeCost = cost(Path(subject))
    else:
        from edgecl.config.recipe import read_recipe, recipe_name

        recipe = read_recipe(subject, set_)
        from edgecl.evaluate.cost import cost_of_recipe

        record = cost_of_recipe(recipe, recipe_name=recipe_name(subject), images=images)
    if json_:
        print_json(record)
    else:
        _print_cost(subject, record)


def _print_cost(subject: str, record: "CostRecord | RecipeCost") -> None:
    from edgecl.cli.output import print_rows
    from edgecl.storage.records import RecipeCost

    size = " x ".join(str(side) for side in record.input)
    in_training = isinstance(record, RecipeCost)
    rows = [
        ("MACs", _count(record.macs), f"one image, {size}, as fvcore counts"),
        ("FLOPs", _count(record.flops), "2 x MACs"),
        ("parameters", _count(record.params), "without classifier" if in_training else ""),
    ]
    skipped = ", ".join(f"{name.removeprefix('aten::')} x{count}" for name, count in record.uncounted.items())
    rows.append(("not counted", skipped or "nothing", ""))
    if isinstance(record, RecipeCost):
        rows += _training_rows(record.training, record.widths)
    print_rows(f"cost of {subject}", ["", "", ""], rows)


def _training_rows(training: "RecipeTraining", widths: "list[WidthCost]") -> list[tuple[str, str, str]]:
    from edgecl.errors import counted

    total, projector = training.total_flops, training.projector_total_flops
    seen = f"{counted(training.images, 'image')}, {counted(training.epochs, 'epoch')}"
    rows = [
        ("method", training.method, seen),
        ("forward units", f"{training.forward_units:.2f}", "slim forward passes per image; backward = 2"),
        ("training", f"{_flops(training.flops_per_image)} per image", "projector apart"),
        ("training, total", _total(total), "all images and epochs, what a teacher computes once included"),
        ("projector", _total(projector), f"{100 * projector / total:.1f} % on top"),
    ]
    if training.local_views_flops_per_image:
        local = training.local_views_flops_per_image
        share = 100 * local / training.flops_per_image
        rows.append(("local views", f"{_flops(local)} per image", f"{share:.1f} % of the training"))
    if training.teacher_total_flops:
        teacher = training.teacher_total_flops
        rows.append(("teacher's passes", _total(teacher), f"{100 * teacher / total:.1f} % of the training"))
        own = _total(training.teacher_training_flops) if training.teacher_training_flops else "not said"
        rows.append(("teacher's training", own, "not in the total; set method.teacher.training_flops"))
    if training.coding_rate_total_flops:
        rate = training.coding_rate_total_flops
        rows.append(("coding rate", _total(rate), f"{100 * rate / total:.1f} % on top"))
    if len(widths) == 1:
        return rows
    further = training.further_widths_total_flops
    widest, *others = (f"{one.width:g}" for one in widths)
    on_top = f"{100 * further / (total - further):.1f} % on top of {widest} alone"
    rows.append(("further widths", _total(further), f"of the total, for {', '.join(others)}: {on_top}"))
    return rows + [
        (
            f"width {one.width:g}",
            f"{_count(one.macs)} MACs, {_count(one.params)} parameters",
            f"{one.forward_passes:.2f} of its forward passes per image",
        )
        for one in widths
    ]


def _scaled(count: float) -> tuple[str, str]:
    """Write a count with four digits, and the prefix of its size."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:,.4g}", prefix
    return f"{count:.4g}", ""


def _count(count: float) -> str:
    return " ".join(_scaled(count)).rstrip()


def _flops(count: float) -> str:
    number, prefix = _scaled(count)
    return f"{number} {prefix}FLOPs"


def _total(flops: float) -> str:
    """Write FLOPs of a whole run: in 1e17, as papers do, where that is readable."""
    return f"{flops / 1e17:.4g}e17 FLOPs" if flops >= 1e16 else _flops(flops)


def _print_table(rows: "list[PublishedCost]") -> None:
    from edgecl.cli.output import print_rows

    print_rows(
        "training cost on ImageNet-1K, 1e17 FLOPs: by one rule, against the print",
        ["method", "net", "teacher", "epochs", "rule", "printed", "difference", "note"],
        [
            (
                row.method,
                row.arch,
                row.teacher or "–",
                row.epochs,
                f"{row.total_flops / 1e17:.4g}",
                f"{row.printed_flops / 1e17:g}",
                f"{100 * row.difference:+.1f} %",
                row.note,
            )
            for row in rows
        ],
    )
