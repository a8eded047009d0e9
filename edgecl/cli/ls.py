"""`edgecl ls`."""

from typing import Annotated, Literal

import typer

from edgecl.cli.options import JsonOption

ListName = Literal["recipes", "targets", "nets", "datasets"]


def ls_command(
    shelf: Annotated[ListName | None, typer.Argument(help="What to list [default: everything]")] = None,
    json_: JsonOption = False,
) -> None:
    """List what there is: recipes, targets, nets, datasets."""
    from edgecl.cli.output import print_json, print_rows

    shelves: list[ListName] = [shelf] if shelf else ["recipes", "targets", "nets", "datasets"]
    found = {name: _entries(name) for name in shelves}
    if json_:
        print_json([entry for name in shelves for entry in found[name]])
        return
    for name in shelves:
        print_rows(name, ["name", ""], [(entry["name"], entry["summary"]) for entry in found[name]])


def _entries(shelf: ListName) -> list[dict[str, str]]:
    if shelf == "recipes":
        from edgecl.config.recipe import list_recipes

        return list_recipes()
    if shelf == "targets":
        from edgecl.config.target import list_targets

        return list_targets()
    if shelf == "nets":
        from edgecl.nets.catalogue import list_nets

        return list_nets()
    from edgecl.data.sources import list_datasets

    return list_datasets()
