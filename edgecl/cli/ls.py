"""`edgecl ls`."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

import typer

from edgecl.cli.options import JsonOption

ListName = Literal["recipes", "methods", "targets", "runtimes", "nets", "datasets"]


def ls_command(
    list_: Annotated[ListName | None, typer.Argument(help="What to list [default: everything]")] = None,
    json_: JsonOption = False,
) -> None:
    """List what there is: recipes, methods, targets, runtimes, nets, datasets."""
    from edgecl.cli.output import print_json, print_rows

    names: list[ListName] = [list_] if list_ else list(get_args(ListName))
    found = {name: _entries(name) for name in names}
    if json_:
        if list_ == "methods":
            # Only where they are asked for alone: their files import torch.
            from edgecl.config.recipe import method_settings

            found["methods"] = [{**entry, **method_settings(entry["name"])} for entry in found["methods"]]
        print_json([entry for name in names for entry in found[name]])
        return
    for name in names:
        rows = [(entry["name"], entry["summary"]) for entry in found[name]]
        if name == "nets" and list_ is None:
            rows = [("…", f"{len(rows)} nets of timm: `edgecl ls nets` lists them")]
        print_rows(name, ["name", "what it is"], rows)


def _entries(name: ListName) -> Sequence[dict[str, Any]]:
    if name == "recipes":
        from edgecl.config.settings import list_packaged

        return list_packaged("recipes")
    if name == "methods":
        from edgecl.config.recipe import describe_methods

        return describe_methods()
    if name == "targets":
        from edgecl.config.settings import list_packaged

        return list_packaged("export")
    if name == "runtimes":
        from edgecl.onboard.runtimes import list_runtimes

        return list_runtimes()
    if name == "nets":
        from edgecl.nets.catalogue import list_nets

        return list_nets()
    from edgecl.data.sources import list_datasets

    return list_datasets()
