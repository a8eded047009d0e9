"""The recipe's [views] table, and the specifications of views that it stands for."""

from __future__ import annotations

import string
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from edgecl.config.settings import LARGER_PICTURES, Config, Fraction

PerView = tuple[Fraction, Fraction]
Range = tuple[Annotated[float, Field(ge=0.01, le=100)], Annotated[float, Field(ge=0.01, le=100)]]
Strength = Annotated[float, Field(ge=0, le=100)]

_NAMES = string.ascii_lowercase


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """One or more views of each picture that differ only by chance; settings mean what they mean in [views]."""

    names: tuple[str, ...]
    """One for each view; what is random about a view is a function of its name, so no two specifications share one."""
    size: int
    """Height and width, pixels."""
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    flip: float = 0.0
    flip_vertical: float = 0.0
    jitter: float = 0.0
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0
    local: bool = False
    """A small crop, which leaves running statistics alone: those are for whole pictures."""
    teacher: bool = False
    """Seen by a frozen teacher alone, after all others."""

    @property
    def count(self) -> int:
        """How many views."""
        return len(self.names)


class Views(Config):
    """How a picture is varied; of a pair the first is for view A, the second for all others."""

    crop_scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    """Area of the crop as a fraction of the picture's."""
    crop_ratio: Range = (0.75, 4 / 3)
    """Width / height of the crop."""
    flip: Fraction = 0.5
    flip_vertical: Fraction = 0.0
    jitter: Fraction = 0.8
    """Probability of color jitter."""
    brightness: Strength = 0.4
    contrast: Strength = 0.4
    saturation: Strength = 0.2
    hue: float = Field(0.1, ge=0, le=0.5)
    grayscale: Fraction = 0.2
    blur: PerView = (1.0, 0.1)
    blur_sigma: Range = (0.1, 2.0)
    """Standard deviation of the blur, pixels of a 224-pixel view; scaled with image_size."""
    solarize: PerView = (0.0, 0.2)
    local_count: int = Field(0, ge=0, le=32)
    """Further views of each picture: small crops, varied like view B."""
    local_size: int | None = Field(None, ge=8, le=4096, description=LARGER_PICTURES)
    """Height and width of a local view, pixels; None means half of image_size."""
    local_scale: tuple[Fraction, Fraction] = (0.05, 0.3)
    """Area of a local crop as a fraction of the picture's."""

    def specs(self, size: int, *, whole: int = 2) -> tuple[ViewSpec, ...]:
        """Return the specifications of view A, of the other whole views and of the local views, where there are any.

        Args:
            size: of a whole view, pixels.
            whole: how many whole views, from 1 to 26.
        """
        others = ViewSpec(
            names=tuple(_NAMES[1:whole]),
            size=size,
            scale=self.crop_scale,
            ratio=self.crop_ratio,
            flip=self.flip,
            flip_vertical=self.flip_vertical,
            jitter=self.jitter,
            brightness=self.brightness,
            contrast=self.contrast,
            saturation=self.saturation,
            hue=self.hue,
            grayscale=self.grayscale,
            blur=self.blur[1],
            blur_sigma=self.blur_sigma,
            solarize=self.solarize[1],
        )
        first = replace(others, names=("a",), blur=self.blur[0], solarize=self.solarize[0])
        local = replace(
            others,
            names=tuple(f"local-{number}" for number in range(self.local_count)),
            size=self.local_size or max(8, size // 2),
            scale=self.local_scale,
            local=True,
        )
        return tuple(spec for spec in (first, others, local) if spec.names)
