"""The parity report: slim view, torch, ONNX in each precision, each compared with the one it was made from."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from edgecl.config.recipe import recipe_from_tables
from edgecl.config.target import Tolerance
from edgecl.deploy.session import open_tensors
from edgecl.errors import ArtifactError, ParityError
from edgecl.nets.build import create_slimmable
from edgecl.nets.folding import fold_batch_norm
from edgecl.onboard.verify import breaches as breaches_of
from edgecl.onboard.verify import compare
from edgecl.storage.checkpoint import read_sealed
from edgecl.storage.directories import RunDir
from edgecl.storage.records import Comparison, ModelRecord, ParityCheck

Array = NDArray[numpy.float32]
Layers = dict[str, Array]

# Every layer's output of every image is held in memory at once.
LAYER_IMAGES = 4


def check_parity(source: str, variant: str, found: Array, expected: Array) -> ParityCheck:
    """Compare the (N, F) outputs of one variant of a net with those of what it was made from.

    Raises:
        ParityError: another shape, or values that are not finite.
    """
    if found.shape != expected.shape:
        raise ParityError(f"{variant} gives outputs {found.shape}, {source} gives {expected.shape}")
    if not numpy.isfinite(found).all():
        raise ParityError(
            f"{variant} gives values that are not finite, {source} gives finite ones",
            hint="an activation left the range of the format; keep it in fp32",
        )
    numbers = Comparison.model_validate(compare(found, expected))
    return ParityCheck(source=source, variant=variant, images=len(found), **dict(numbers))


def breaches(check: ParityCheck, tolerance: Tolerance) -> list[str]:
    """Return in which ways a check leaves a tolerance; NaN leaves every one."""
    return breaches_of(check.to_json(), tolerance.model_dump())


def check_tolerance(check: ParityCheck, tolerance: Tolerance) -> None:
    """Refuse a check outside its tolerance.

    Raises:
        ParityError: naming the first layer that leaves the tolerance, where it is known.
    """
    problems = breaches(check, tolerance)
    if problems:
        layer = check.first_diverging_layer
        raise ParityError(
            f"{check.variant} disagrees with {check.source} on {check.images} images: " + "; ".join(problems),
            where={"first layer outside": layer} if layer else {},
            hint="no bundle was written; a wider [tolerance] in the target is for differences you can explain",
        )


def first_outside(found: Layers, expected: Layers, tolerance: Tolerance) -> str | None:
    """Return the first layer whose largest difference, over the layer's largest output, leaves the tolerance."""
    for name, values in expected.items():
        if name not in found:
            continue
        scale = float(numpy.abs(values).max()) or 1.0
        if not float(numpy.abs(found[name] - values).max()) / scale <= tolerance.max_relative_difference:
            return name
    return None


def torch_layers(net: nn.Module, images: Tensor) -> Layers:
    """Return the output of every convolution and linear layer for (N, 3, H, W) images, batch norms folded, as they run."""
    folded = fold_batch_norm(net)
    layers: Layers = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            layers[name] = output.detach().numpy().copy()

        return hook

    hooks = [
        module.register_forward_hook(keep(name))
        for name, module in folded.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        folded(images)
    for hook in hooks:
        hook.remove()
    return layers


def onnx_layers(model: onnx.ModelProto, images: Array, *, names: list[str]) -> Layers:
    """Return the output of every convolution and linear layer of a model, under the names of torch's, in their order.

    Where their number differs, ONNX's own names are used.
    """
    tensors = [node.output[0] for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    found: dict[str, list[NDArray[Any]]] = defaultdict(list)
    for name, part in open_tensors(model, tensors, optimization="ALL")(images, len(images)):
        found[name].append(part)
    values = {name: numpy.concatenate(parts) for name, parts in found.items()}
    if len(names) != len(tensors):
        names = tensors
    return {
        name: values[tensor].astype(numpy.float32, copy=False)
        for name, tensor in zip(names, tensors, strict=True)
    }


def slim_view_check(net: nn.Module, record: ModelRecord, run: Path, images: Tensor) -> ParityCheck:
    """Compare a carved net with the slim view inside its host.

    Where carving re-estimated the statistics of the batch norms, the slim view is given these, so that what is
    compared is everything else.

    Raises:
        ArtifactError: the net was not carved from a checkpoint that this run has.
        ParityError: the carved net computes something else.
    """
    run_dir = RunDir(run)
    run_record = run_dir.read()
    checkpoint = read_sealed(run_dir, str(record.made_from))
    if checkpoint is None:
        raise ArtifactError(
            "this model was not carved from a checkpoint that this run has",
            where={"run": run, "model made from": str(record.made_from)[:12]},
            hint="name the run that `edgecl carve` read, and carve again if it went on since; "
            "a fine-tuned net has no slim view",
        )
    recipe = recipe_from_tables(run_record.recipe, source=str(run_dir.record_file))
    slimmable = create_slimmable(recipe)
    slimmable.load_state_dict(checkpoint.net)
    slimmable.eval()
    own = net.state_dict()
    replaced = (
        {name: own[name] for name in own if name.endswith(("running_mean", "running_var"))}
        if record.recalibrated
        else {}
    )
    with torch.no_grad():
        if record.width in slimmable.slim_widths:
            seen = slimmable.forward_slim_part("backbone", images, replaced=replaced, width=record.width)
        else:
            seen = functional_call(slimmable.host.get_submodule("backbone"), replaced, (images,))
        carved = net(images)
    form = "carved torch net" + (" (batch norms re-estimated)" if record.recalibrated else "")
    return check_parity("slim view in its host", form, carved.numpy(), seen.numpy())
