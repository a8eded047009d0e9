"""SSL-Small: MoCo-v2 with what small nets need: a lower temperature, stronger views, a wide head.

Source: Shi et al., "On the Efficacy of Small Self-Supervised Contrastive Models without Distillation Signals", AAAI 2022,
arXiv:2107.14762, and the command in the authors' public README. The authors also begin with weights that were distilled
from a larger net; without such weights this begins at random, and takes the coding rate
(`edgecl.methods.losses.coding_rate`) to start.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from edgecl.methods import moco_v2
from edgecl.methods.losses import CodingRate


class Config(moco_v2.Config):
    """As MoCo-v2."""

    brings: ClassVar[dict[str, dict[str, Any]]] = {
        "projector": {"sizes": [2048, 128]},
        "views": {"jitter": 1.0, "grayscale": 0.5, "blur": [0.5, 0.5]},
    }

    label: ClassVar[str] = "SSL-Small"
    name: Literal["ssl-small"] = "ssl-small"  # type: ignore[assignment]
    temperature: float = Field(0.1, gt=0, le=100)
    """tau, of the softmax over cosines; the paper's."""
    coding_rate: CodingRate = CodingRate(weight=0.05)
    """In the place of the authors' distilled weights: without either, one seed of two does not start (docs/results.md)."""


class SslSmall(moco_v2.MocoV2):
    """MoCo-v2 by its own settings."""


METHOD = SslSmall
