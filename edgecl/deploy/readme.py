"""The README of a bundle: ten lines for whoever finds it on a board."""

from __future__ import annotations

from edgecl.onboard.runtimes import RUNTIMES
from edgecl.storage.records import Manifest


def bundle_readme(manifest: Manifest) -> str:
    """Return what a bundle is and what to type, from its manifest."""
    net, form, preprocessing = manifest.net, manifest.input, manifest.preprocessing
    assert net is not None
    assert preprocessing is not None
    batch = f"1 to {form.max_batch}" if form.dynamic_batch else str(form.shape[0])
    outputs = f"{len(manifest.classes)} classes" if manifest.classes else "features"
    holds = ", ".join(
        f"{name} ({about.model})" + ("" if about.decision is None else f": {about.decision.words}")
        for name, about in manifest.precisions.items()
    )
    runtime = RUNTIMES[manifest.runtime]
    lines = [
        f"{net.arch} at width {net.width:g}, {outputs}, for {manifest.target_name} ({manifest.made_by})",
        f"input  '{form.name}': float32, {batch} x {' x '.join(str(side) for side in form.shape[1:])}, RGB / 255, "
        f"minus mean {preprocessing.mean}, divided by std {preprocessing.std}",
        f"output '{manifest.output.name}': float32, {batch} x {manifest.output.shape[1]}",
        f"holds  {holds}; the default is {manifest.precision}",
        f"needs  Python 3.6 or newer, NumPy and {runtime.needs or runtime.title}; nothing is installed",
        "python3 onboard.pyz doctor     what will fail here, and how to mend it",
        *(
            ["python3 onboard.pyz build      build the engines, kept beside this file"]
            if runtime.builds_engines
            else []
        ),
        "python3 onboard.pyz verify     hashes, and outputs against torch's",
        "python3 onboard.pyz bench      latency and energy, as one JSON record",
        "manifest.json says where everything came from and what was measured.",
    ]
    return "\n".join(lines) + "\n"
