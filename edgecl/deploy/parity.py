"""The exported net held to torch on real images, before a bundle is written."""

from __future__ import annotations

from typing import Any

import numpy
from numpy.typing import NDArray

from edgecl.errors import ParityError
from edgecl.onboard.runners import Runner
from edgecl.onboard.verify import compare, run_all
from edgecl.target import Tolerance

Array = NDArray[numpy.float32]


def prove_parity(
    runner: Runner, images: Array, expected: Array, *, form: dict[str, Any], tolerance: Tolerance
) -> dict[str, Any]:
    """Run the exported net with the code that runs it on devices, and hold it to torch's outputs.

    Args:
        runner: has loaded the exported net.
        images: (N, 3, H, W) after preprocessing.
        expected: (N, F) torch's outputs.
        form: the manifest's "input".
        tolerance: the target's.

    Returns:
        {"images", "max_abs_difference", "mean_abs_difference", "max_relative_difference", "top1_agreement"}.

    Raises:
        ParityError: another shape, or further from torch than the tolerance allows; NaN is further than anything.
    """
    found = run_all(runner, images, form)
    if found.shape != expected.shape:
        raise ParityError(f"the exported net gives outputs {found.shape}, torch {expected.shape}")
    parity: dict[str, Any] = {"images": len(images), **compare(found, expected)}
    difference, agreement = parity["max_relative_difference"], parity["top1_agreement"]
    problems = []
    if not difference <= tolerance.max_relative_difference:
        problems.append(
            f"the largest relative difference is {difference:.3g}, allowed {tolerance.max_relative_difference:g}"
        )
    if not agreement >= tolerance.top1_agreement:
        problems.append(
            f"the largest output agrees on {agreement:.1%}, required {tolerance.top1_agreement:.1%}"
        )
    if problems:
        raise ParityError(
            f"the exported net disagrees with torch on {len(images)} images: " + "; ".join(problems),
            hint="no bundle was written; a wider [tolerance] in the target is for differences you can explain",
        )
    return parity
