"""A net that somebody has trained: from a file of timm's tensors, a model directory, timm's hub or the Hugging Face Hub."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from edgecl.config.recipe import Data, Host, width_as_given
from edgecl.errors import ArtifactError, DeviceError, RecipeError, first_line
from edgecl.nets.backbone import create_backbone
from edgecl.nets.model_dir import create_blank, load_model
from edgecl.onboard.bundle import sha256_of_file
from edgecl.storage.directories import ModelDir

HUB = "timm"
HUGGING_FACE = "hf-hub:"
UNTRAINED = "untrained"


class GivenNet(NamedTuple):
    """A net from pictures to features, and how its pictures are normalized.

    Attributes:
        net: from (N, 3, H, W) to (N, F), in evaluation mode.
        arch: timm's name.
        mean: of each channel, in 0..1; None where nothing says so.
        std: of each channel, in 0..1; None where nothing says so.
        sha256: of its weights' file, or of the weights themselves where there is none.
        left_out: names of the tensors that were there and are not in the net: its classifier's.
    """

    net: nn.Module
    arch: str
    mean: Sequence[float] | None
    std: Sequence[float] | None
    sha256: str
    left_out: tuple[str, ...] = ()


def load_given(
    weights: str, *, arch: str | None, width: float | None = None, stem_stride: int | None = None
) -> GivenNet:
    """Load a net without its classifier.

    Args:
        weights: a model directory; a .safetensors or .pth file of timm's tensors; "timm" for timm's own pretrained
            weights or "hf-hub:USER/NAME" for a repository of timm's form, which need a network or what it brought
            before; "untrained" for random ones, always the same.
        arch: timm's name; None where a model directory or a repository says it.
        width: that the net must have; None for a model directory's own and 1 for all others.
        stem_stride: that the net must have, if a width is named.

    Raises:
        RecipeError: no architecture named or no such, or weights of another one, another width or other shapes.
        ArtifactError: no such file, not one of tensors, or numbers in it that are not finite.
        DeviceError: a hub does not answer.
    """
    path = Path(weights)
    hub = weights == HUB or weights.startswith(HUGGING_FACE)
    if not hub and weights != UNTRAINED:
        if path.is_dir():
            return _of_model_dir(path, arch=arch, width=width, stem_stride=stem_stride)
        if not path.exists():
            raise ArtifactError(f"there is neither a file of weights nor a model directory at '{path}'")
    if weights.startswith(HUGGING_FACE):
        return _of_hub(weights, arch=arch, width=width, stem_stride=stem_stride)
    if arch is None:
        raise RecipeError(
            f"the weights '{weights}' do not say of which net they are",
            hint="name its architecture too; only a model directory and a repository of the Hub know their own",
        )
    if weights == HUB:
        return _of_hub(arch, arch=arch, width=width, stem_stride=stem_stride)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = create_backbone(arch, width=width or 1.0, stem_stride=stem_stride).eval()
    if weights == UNTRAINED:
        return GivenNet(net, arch, None, None, _sha256_of_tensors(net))
    left_out = _put(net, _read_tensors(path), source=weights, arch=arch, width=width)
    return GivenNet(net, arch, None, None, sha256_of_file(path), left_out)


def load_start(weights: str, *, host: Host, width: float, data: Data) -> GivenNet:
    """Load a net for a recipe's slim net.

    Args:
        data: how its pictures will be normalized.

    Raises:
        RecipeError, ArtifactError, DeviceError: as `load_given`; also where it was trained on pictures that were
            normalized in another way.
    """
    given = load_given(weights, arch=host.arch, width=width, stem_stride=host.stem_stride)
    for key in ("mean", "std"):
        its, here = getattr(given, key), getattr(data, key)
        if its is not None and tuple(its) != here:
            raise RecipeError(
                f"the weights '{weights}' are for pictures with the {key} {list(its)}, and 'data.{key}' is {list(here)}",
                hint=f"set [data] {key} = {list(its)}",
            )
    return given


def _of_model_dir(path: Path, *, arch: str | None, width: float | None, stem_stride: int | None) -> GivenNet:
    whole, record = load_model(path)
    _check_arch(str(path), record.arch, arch)
    if width is None:
        net = create_blank(record, classes=0)
    elif record.quantization:
        raise RecipeError(f"'{path}' was trained for INT8", hint="name the float net that it was made from")
    elif record.stem_stride != stem_stride:
        raise RecipeError(
            f"'{path}' holds a net with the stem stride {record.stem_stride}, not {stem_stride}",
            hint=f"set [host] stem_stride = {record.stem_stride}"
            if record.stem_stride
            else "leave out [host] stem_stride",
        )
    else:
        net = create_backbone(record.arch, width=width, stem_stride=stem_stride)
    left_out = _put(net, whole.state_dict(), source=str(path), arch=record.arch, width=width)
    images, file = record.preprocessing, ModelDir(path).weights_file
    return GivenNet(net.eval(), record.arch, images.mean, images.std, sha256_of_file(file), left_out)


def _of_hub(name: str, *, arch: str | None, width: float | None, stem_stride: int | None) -> GivenNet:
    """Load what timm finds by a name of its own or of a repository."""
    where = "the Hugging Face Hub" if name.startswith(HUGGING_FACE) else "timm's hub"
    if arch is not None:
        create_backbone(arch)  # names an unknown architecture as everywhere
    try:
        whole: Any = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError, ValueError, LookupError) as exc:
        raise DeviceError(
            f"{where} gives no weights of '{name.removeprefix(HUGGING_FACE)}': {first_line(exc)}",
            hint="without a network, name a file of its weights",
        ) from exc
    settings = whole.pretrained_cfg
    _check_arch(name, settings["architecture"], arch)
    arch = arch or str(settings["architecture"])
    net = create_backbone(arch, width=width or 1.0, stem_stride=stem_stride).eval()
    left_out = _put(net, whole.state_dict(), source=name, arch=arch, width=width)
    return GivenNet(
        net, arch, tuple(settings["mean"]), tuple(settings["std"]), _sha256_of_tensors(net), left_out
    )


def _check_arch(source: str, its: str, wanted: str | None) -> None:
    # What follows the dot says how timm's own weights were trained.
    if wanted is not None and its.partition(".")[0] != wanted.partition(".")[0]:
        raise RecipeError(f"'{source}' holds a '{its}', not a '{wanted}'")


def _sha256_of_tensors(net: nn.Module) -> str:
    found = hashlib.sha256()
    for tensor in net.state_dict().values():
        found.update(tensor.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a file of named tensors; nothing in it is run."""
    found: Any
    try:
        safe = path.suffix == ".safetensors"
        found = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as exc:  # whatever content makes torch's reader of tensors alone raise
        raise ArtifactError(
            f"not a file of tensors, or one that holds more than tensors ({type(exc).__name__})",
            where={"file": path},
            hint="save the net's state_dict() alone, by safetensors or torch.save",
        ) from exc
    # As timm and torchvision save it, and as training scripts do.
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(one, Tensor) for one in found.values()):
        raise ArtifactError("not a file of named tensors", where={"file": path})
    return {str(name).removeprefix("module."): tensor for name, tensor in found.items()}


_OF_WHAT = "say what they are of: `--arch` of `edgecl init`, or `arch` and `width` in a recipe"


def _put(
    net: nn.Module, tensors: Mapping[str, Tensor], *, source: str, arch: str, width: float | None
) -> tuple[str, ...]:
    """Copy tensors into a net; return the names of those of a classifier, which the net has not."""
    wanted = f"'{arch}'" + (f" at width {width_as_given(width)}" if width is not None else "")
    where = {"weights": source}
    own = net.state_dict()
    for name, mine in own.items():
        given = tensors.get(name)
        if given is None or given.shape != mine.shape:
            what = "is missing" if given is None else f"has the shape {tuple(given.shape)}"
            raise RecipeError(
                f"the weights are not those of {wanted}: '{name}' {what}, and is {tuple(mine.shape)} in the net",
                where=where,
                hint=_OF_WHAT,
            )
        if not given.isfinite().all():
            raise ArtifactError(f"'{name}' of the weights holds numbers that are not finite", where=where)
    others = sorted(tensors.keys() - own.keys())
    foreign = sorted(set(others) - _classifier_of(arch, own)) if others else []
    if foreign:
        raise RecipeError(
            f"the weights are not those of {wanted}: the net has no '{foreign[0]}'"
            + (f", nor {len(foreign) - 1} others of the file" if len(foreign) > 1 else ""),
            where=where,
            hint=_OF_WHAT,
        )
    net.load_state_dict({name: tensors[name] for name in own})
    return tuple(others)


def _classifier_of(arch: str, backbone: Mapping[str, Tensor]) -> set[str]:
    """Return the names of what a net has with a classifier only."""
    with torch.random.fork_rng(devices=[]):
        return create_backbone(arch, num_classes=2).state_dict().keys() - backbone.keys()
