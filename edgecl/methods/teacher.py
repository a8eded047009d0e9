"""A frozen teacher: its settings, its passes, and its features kept on the disk."""

from __future__ import annotations

import copy
import hashlib
import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.distributed
from accelerate.utils import gather_object
from pydantic import Field
from torch import Tensor, nn

from edgecl.config.recipe import Data, ForwardPasses, Recipe
from edgecl.config.settings import Config
from edgecl.config.views import ViewSpec
from edgecl.data.loading import TrainingImages
from edgecl.data.views import make_views
from edgecl.distributed import processes
from edgecl.methods.method import Method, RatedConfig, RunContext
from edgecl.nets.backbone import feature_count, taking_pictures
from edgecl.nets.given import GivenNet, load_given
from edgecl.nets.heads import Projector
from edgecl.nets.slimming import SlimmableNet
from edgecl.progress import Progress
from edgecl.storage.writing import write_bytes

_AT_ONCE = 64


class TeacherConfig(Config):
    """The [method.teacher] table."""

    arch: str | None = None
    """timm's name of the teacher; a model directory and a repository of the Hub say it themselves."""
    weights: str | None = None
    """As [host] init: a model directory, a .safetensors or .pth file of timm's tensors, "timm", "hf-hub:USER/NAME" or
    "untrained"."""
    view: Literal["augmented", "plain"] = "augmented"
    """What the teacher sees: the student's own views, or the center of each picture, always the same."""
    cache: bool = True
    """With plain views: find the features of all pictures once and keep them on the disk, beside the run."""
    training_flops: float = Field(0.0, ge=0, le=1e30)
    """What the teacher's own training has cost, for `edgecl cost`; nothing here can know it."""


class TaughtConfig(RatedConfig):
    """A method with a frozen teacher."""

    teacher: TeacherConfig = TeacherConfig()

    def check(self, recipe: Recipe) -> None:
        """Refuse a method without its teacher."""
        super().check(recipe)
        if self.teacher.weights is None:
            raise ValueError(
                f"'method.name' {self.name} learns from a teacher: set 'method.teacher.weights' to a model directory or a "
                "file of weights, and for a file also 'method.teacher.arch' to timm's name of the net"
            )

    def prepare(self, recipe: Recipe) -> dict[str, str]:
        """Load the teacher, and refuse one that does not take the recipe's pictures."""
        given = Teacher(load_teacher(self.teacher), recipe.data).given
        return {"teacher": given.sha256}

    def taught_views(self, recipe: Recipe) -> int:
        """Count the whole views of a picture that the teacher sees where it sees the student's."""
        return self.count_views(recipe, local=False)

    def view_specs(self, recipe: Recipe) -> tuple[ViewSpec, ...]:
        """Return the student's views, and the teacher's plain one behind them."""
        return self.with_plain(recipe, super().view_specs(recipe))

    def with_plain(self, recipe: Recipe, specs: tuple[ViewSpec, ...]) -> tuple[ViewSpec, ...]:
        """Add the teacher's plain view, where it has one: the square center of the picture."""
        if self.teacher.view == "augmented":
            return specs
        side = recipe.data.image_size
        return (*specs, ViewSpec(names=("plain",), size=side, scale=(1, 1), ratio=(1, 1), teacher=True))

    def forward_passes(self, recipe: Recipe) -> ForwardPasses:
        """Return the student's, and the teacher's: one for each view that it sees, or one in the whole run."""
        passes = super().forward_passes(recipe)
        if self.teacher.view == "augmented":
            return passes._replace(teacher=self.taught_views(recipe))
        return passes._replace(teacher_once=1) if self.teacher.cache else passes._replace(teacher=1)


class Teacher:
    """A frozen net, on whatever device and in whatever precision its pictures come.

    No module, so that neither optimizer nor checkpoint nor data-parallel training sees it.

    Args:
        data: how the pictures that it is given were normalized, and how large they are.

    Raises:
        RecipeError: it does not take pictures of that size.
    """

    def __init__(self, given: GivenNet, data: Data):
        self.given = given
        self.features = feature_count(given.net)
        """F, the length of a feature vector."""
        self._net = _for_pictures_of(given.net, data.image_size).requires_grad_(False).eval()
        mean, std = (torch.tensor(one).view(3, 1, 1) for one in (data.mean, data.std))
        own_mean, own_std = (
            torch.tensor(one).view(3, 1, 1) if one else other
            for one, other in ((given.mean, mean), (given.std, std))
        )
        # From the recipe's normalization to the teacher's own.
        self._scale, self._shift = std / own_std, (mean - own_mean) / own_std
        side = data.image_size
        hint = "set [data] image_size to a size that the teacher takes, or choose another teacher"
        with taking_pictures(f"the teacher '{given.arch}'", side, side, hint=hint):
            self(torch.zeros(1, 3, side, side))

    @torch.no_grad()
    def __call__(self, view: Tensor) -> Tensor:
        """Return (N, F) features of (N, 3, size, size) pictures, normalized by the recipe; features as they are."""
        if view.ndim == 2:
            return view
        like = next(self._net.parameters())
        if (like.device, like.dtype) != (view.device, view.dtype):
            self._net.to(view.device, view.dtype)
        scale, shift = (one.to(view.device, view.dtype) for one in (self._scale, self._shift))
        features: Tensor = self._net(view * scale + shift)
        return features

    def one_by_one(self, view: Tensor) -> Tensor:
        """Return the features of pictures that each go through alone, so that none depends on its neighbors in a batch."""
        if view.ndim == 2:
            return view
        with torch.autocast(view.device.type, enabled=False):
            return torch.cat([self(picture[None].contiguous()) for picture in view])


def _for_pictures_of(net: nn.Module, side: int) -> nn.Module:
    """Return a ViT whose positions timm has interpolated for pictures of this side; any other net as it is."""
    patches: Any = getattr(net, "patch_embed", None)
    if not hasattr(net, "set_input_size") or patches.img_size == (side, side) or side % patches.patch_size[0]:
        return net
    # The one that was given is kept, for a run with other pictures.
    net = copy.deepcopy(net)
    cast(Any, net).set_input_size(img_size=side)
    return net


@lru_cache(maxsize=1)
def load_teacher(settings: TeacherConfig) -> GivenNet:
    """Load the net of a [method.teacher] table; the last one is kept.

    Raises:
        RecipeError, ArtifactError, DeviceError: as `edgecl.nets.given.load_given`.
    """
    assert settings.weights is not None
    return load_given(settings.weights, arch=settings.arch)


class TaughtMethod(Method):
    """A method with a frozen teacher, and a layer that guesses the teacher's features from projections."""

    config: TaughtConfig

    def __init__(self, config: TaughtConfig, net: SlimmableNet, context: RunContext):
        super().__init__(config, net, context)
        self.teacher = Teacher(load_teacher(config.teacher), context.data)
        self.adapter = Projector(context.dimensions, [self.teacher.features])
        self._data = context.data
        self._plain = [view for view in context.views if view.teacher]

    def features_of(self, views: Sequence[Tensor], count: int) -> list[Tensor]:
        """Return the teacher's (N, F) features of the first `count` views; of a plain one, so many times."""
        if self.config.teacher.view == "plain":
            return [self.teacher.one_by_one(views[-1])] * count
        return [self.teacher(view) for view in views[:count]]

    def own(self, views: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the student's views, without what is the teacher's."""
        return views[:-1] if self.config.teacher.view == "plain" else views

    def look_up(self, images: TrainingImages, *, cache: Path) -> Tensor | None:
        """Return the teacher's (len(images), F) features of plain views, found once and kept in a file."""
        settings, data = self.config.teacher, self._data
        if settings.view == "augmented" or not settings.cache:
            return None
        identity = (
            *(images.source.fingerprint, len(images), images.skipped if images.is_cached else ()),
            *(data.decode_size, data.image_size, data.mean, data.std, data.limit, data.decode),
            *(self.teacher.given.arch, self.teacher.given.sha256),
        )
        name = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
        file = cache / f"teacher-{name}.npy"
        shape = (len(images), self.teacher.features)
        known = _read_features(file, shape)
        if all(gather_object([known is not None])):
            return known
        found = self._features_of_all(images)
        if processes.is_main():
            content = io.BytesIO()
            np.save(content, found.numpy())
            cache.mkdir(parents=True, exist_ok=True)
            write_bytes(file, content.getvalue())
        return found

    def _features_of_all(self, images: TrainingImages) -> Tensor:
        """Find the features of every picture, each process those of its share."""
        data = self._data
        found = torch.zeros(len(images), self.teacher.features)
        share = np.arange(processes.rank(), len(images), processes.world_size())
        with Progress("teacher", total=len(share), unit="images") as progress:
            for batch in images.in_order(share, batch_size=_AT_ONCE):
                (view,) = make_views(batch, self._plain, mean=data.mean, std=data.std, seed=0, epoch=0)
                found[torch.from_numpy(batch.indices)] = self.teacher.one_by_one(view).cpu().float()
                progress.advance(len(view))
        if processes.world_size() > 1:
            # The others' rows are zero, so the sum is exact.
            torch.distributed.all_reduce(found)
        return found


def _read_features(file: Path, shape: tuple[int, int]) -> Tensor | None:
    """Return the features in a file, left on the disk until they are asked for; None where it is none or another's."""
    try:
        found = np.load(file, mmap_mode="c")
    except (OSError, ValueError, EOFError):
        return None
    return torch.from_numpy(found) if found.dtype == np.float32 and found.shape == shape else None
