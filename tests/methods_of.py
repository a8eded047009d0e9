"""A method around a net of one's own, with nothing of a recipe but what matters to it."""

from __future__ import annotations

from types import SimpleNamespace

from edgecl.config.recipe import recipe_from_tables
from edgecl.methods.method import Embeddings, create_method


def method_of(
    net, name="sacl-xd", *, slow_start=0.0, batch_size=16, total_steps=100, local_count=0, **settings
):
    """Make a method with `settings` as its [method] table; SACL-XD swaps no views and scales nothing unless told to."""
    if name == "sacl-xd":
        settings = {"swap_views": 0.0, "scale": 1.0, **settings}
    tables = {
        "host": {"arch": "none", "width": net.host_width},
        "slim": {"width": net.slim_width, "widths": list(net.slim_widths), "slow_start": slow_start},
        "projector": {"sizes": [6]},
        "data": {"batch_size": batch_size},
        "views": {"local_count": local_count},
        "run": {"epochs": 1},
        "method": {"name": name, **settings},
    }
    return create_method(recipe_from_tables(tables, source="test"), net, steps_per_epoch=total_steps)


def project(method, view_a, view_b, local=(), step=0):
    """Return SACL-XD's embeddings under short names, and whole as `embeddings`."""
    embeddings = method([view_a, view_b, *local], step)
    every = {**embeddings.learnt, **embeddings.targets}
    return SimpleNamespace(
        embeddings=embeddings,
        host_a=every["host_a"],
        slim_b=tuple(z for name, z in every.items() if name.startswith("slim_b")),
        local=tuple(z for name, z in every.items() if name.startswith("local")),
        slim_a=every.get("slim_a"),
        host_b=every.get("host_b"),
    )


def losses(method, embeddings, step=0):
    """Return the loss as `total` and its terms, of `project`'s result or of embeddings."""
    whole = embeddings if isinstance(embeddings, Embeddings) else embeddings.embeddings
    total, terms = method.loss(whole, step)
    return SimpleNamespace(total=total, **terms)
