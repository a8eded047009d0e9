"""The README of a bundle: a page for whoever finds it on a board."""

from __future__ import annotations

from collections.abc import Mapping

from edgecl.deploy.contract import contract_of
from edgecl.onboard.runtimes import RUNTIMES
from edgecl.storage.records import Manifest


def bundle_readme(manifest: Manifest, handover: Mapping[str, str]) -> str:
    """Return what a bundle is and what to type, from its manifest and the lines about the files for other programs."""
    net, contract = manifest.net, contract_of(manifest)
    assert net is not None
    preprocessing, side = contract.preprocessing, contract.image_size
    outputs = f"{len(manifest.classes)} classes" if manifest.classes else "features"
    holds = ", ".join(
        f"{name} ({about.model})" + ("" if about.decision is None else f": {about.decision.words}")
        for name, about in manifest.precisions.items()
    )
    runtime = RUNTIMES[manifest.runtime]
    lines = [
        f"{net.arch} at width {net.width:g}, {outputs}, for {manifest.target_name} ({manifest.made_by})",
        f"picture: RGB of 8 bits, upright by its EXIF, on white; the shorter side resized to {preprocessing.resize_size} "
        f"pixels (bilinear, antialiased, as Pillow's BILINEAR), the other in proportion; the center {side} x {side} cut out",
        f"input  {contract.input_words}",
        f"output {contract.output_words}",
        f"holds  {holds}; the default is {manifest.precision}",
        f"needs  Python 3.6 or newer, NumPy and {runtime.needs or runtime.title}; nothing is installed",
        "python3 onboard.pyz doctor     what will fail here, and how to mend it",
        *(
            ["python3 onboard.pyz build      build the engines, kept beside this file"]
            if runtime.builds_engines
            else []
        ),
        "python3 onboard.pyz verify     hashes, and outputs against torch's",
        "python3 onboard.pyz predict .  the answer for pictures: IMAGE or FOLDER, several",
        "python3 onboard.pyz bench      latency and energy, as one JSON record",
        *(f"{name:<30} {line}" for name, line in handover.items()),
        "manifest.json says where everything came from and what was measured.",
    ]
    return "\n".join(lines) + "\n"
