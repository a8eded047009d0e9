"""A net that somebody has trained: from a file of timm's tensors, a model directory or timm's own hub."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from edgecl.errors import ArtifactError, DeviceError, RecipeError, first_line
from edgecl.nets.backbone import create_backbone
from edgecl.nets.model_dir import create_blank, load_backbone, load_model
from edgecl.onboard.bundle import sha256_of_file
from edgecl.storage.directories import ModelDir

HUB = "timm"
UNTRAINED = "untrained"


class GivenNet(NamedTuple):
    """A net from pictures to features, and how its pictures are normalized.

    Attributes:
        net: from (N, 3, H, W) to (N, F), in evaluation mode.
        arch: timm's name.
        mean: of each channel, in 0..1; None where nothing says so.
        std: of each channel, in 0..1; None where nothing says so.
        sha256: of its weights' file, or of the weights themselves where there is none.
    """

    net: nn.Module
    arch: str
    mean: Sequence[float] | None
    std: Sequence[float] | None
    sha256: str


def load_given(weights: str, *, arch: str | None) -> GivenNet:
    """Load a net without its classifier.

    Args:
        weights: a model directory; a .safetensors or .pth file of timm's tensors; "timm" for timm's own pretrained
            weights, which needs a network; "untrained" for random ones, always the same.
        arch: timm's name; None where a model directory says it.

    Raises:
        RecipeError: no architecture named or no such, or weights of another one.
        ArtifactError: no such file, or not one of tensors.
        DeviceError: timm's hub does not answer.
    """
    path = Path(weights)
    if weights not in (HUB, UNTRAINED) and path.is_dir():
        return _of_model_dir(path, arch=arch)
    if weights not in (HUB, UNTRAINED) and not path.exists():
        raise ArtifactError(f"there is neither a file of weights nor a model directory at '{path}'")
    if arch is None:
        raise RecipeError(
            f"the weights '{weights}' do not say of which net they are",
            hint="name its architecture too; only a model directory knows its own",
        )
    if weights == HUB:
        return _of_hub(arch)
    if weights == UNTRAINED:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = create_backbone(arch).eval()
        return GivenNet(net, arch, None, None, _sha256_of_tensors(net))
    net = create_backbone(arch).eval()
    _put(net, _read_tensors(path), file=path, arch=arch)
    return GivenNet(net, arch, None, None, sha256_of_file(path))


def _of_model_dir(path: Path, *, arch: str | None) -> GivenNet:
    whole, record = load_model(path)
    if arch not in (None, record.arch):
        raise RecipeError(f"'{path}' holds a '{record.arch}', not a '{arch}'")
    net = create_blank(record, classes=0)
    load_backbone(net, whole)
    images = record.preprocessing
    return GivenNet(
        net.eval(), record.arch, images.mean, images.std, sha256_of_file(ModelDir(path).weights_file)
    )


def _of_hub(arch: str) -> GivenNet:
    create_backbone(arch)  # names an unknown architecture as everywhere
    try:
        net: Any = timm.create_model(arch, pretrained=True, num_classes=0)
    except (OSError, RuntimeError, ValueError) as exc:
        raise DeviceError(
            f"timm's hub gives no weights of '{arch}': {first_line(exc)}",
            hint="without a network, name a file of its weights",
        ) from exc
    settings = net.pretrained_cfg
    return GivenNet(
        net.eval(), arch, tuple(settings["mean"]), tuple(settings["std"]), _sha256_of_tensors(net)
    )


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


def _put(net: nn.Module, tensors: dict[str, Tensor], *, file: Path, arch: str) -> None:
    """Copy tensors into a net; those of a classifier, which the net has not, are left."""
    own = net.state_dict()
    for name, mine in own.items():
        given = tensors.get(name)
        if given is None or given.shape != mine.shape:
            what = "is missing" if given is None else f"has the shape {tuple(given.shape)}"
            raise RecipeError(
                f"the weights are not those of '{arch}': '{name}' {what}, and is {tuple(mine.shape)} in the net",
                where={"file": file},
            )
    classifier: Any = getattr(net, "pretrained_cfg", {}).get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    foreign = [
        name for name in tensors if name not in own and not any(name.startswith(f"{head}.") for head in heads)
    ]
    if foreign:
        raise RecipeError(
            f"the weights are not those of '{arch}': the net has no '{foreign[0]}'"
            + (f", nor {len(foreign) - 1} others of the file" if len(foreign) > 1 else ""),
            where={"file": file},
        )
    net.load_state_dict({name: tensors[name] for name in own})
