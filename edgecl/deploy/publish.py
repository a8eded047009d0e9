"""A model directory -> a folder for others: what timm loads, ONNX files, a model card; pushed to a hub when asked."""

from __future__ import annotations

import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import onnx
import timm
import torch
from timm.models import is_model, save_for_hf
from torch import nn

from edgecl import __version__
from edgecl.config.target import read_target
from edgecl.deploy.card import model_card
from edgecl.deploy.contract import one_line
from edgecl.deploy.onnx import onnx_from_net
from edgecl.deploy.parity import check_parity, check_tolerance
from edgecl.deploy.session import session_of
from edgecl.deploy.variants import torch_outputs
from edgecl.errors import ArtifactError, DeviceError, ParityError, first_line
from edgecl.nets.fake_quant import without_fake_quant
from edgecl.nets.model_dir import load_model
from edgecl.onboard.bundle import LABELS, check_files, onnx_name, sha256_of_file
from edgecl.onboard.errors import OnboardError
from edgecl.storage.directories import Bundle, ModelDir
from edgecl.storage.outputs import new_directory, refuse_existing, refuse_own_input
from edgecl.storage.record_files import write_record
from edgecl.storage.records import Manifest, ModelRecord, Preprocessing, PublishedRecord
from edgecl.storage.writing import write_bytes

# Any batch, on any processor.
_TARGET = "ort-cpu-batch"
# What timm knows of its own weights, and nothing of ours.
_OF_TIMMS_WEIGHTS = (
    *("tag", "license", "origin_url", "paper_ids", "paper_name", "notes", "description"),
    *("url", "hf_hub_id", "test_input_size", "test_crop_pct"),
)


def publish(
    model: Path,
    *,
    out: Path,
    bundle: Path | None = None,
    push: str | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> PublishedRecord:
    """Write a folder that timm and ONNX Runtime load, with a model card, and push it to a hub where one is named.

    `edgecl.publish` tells arguments, result and errors.
    """
    refuse_existing(out, force=force, kind=PublishedRecord.KIND)
    for given in (model, bundle):
        if given is not None:
            refuse_own_input(out, given)
    if push is not None:
        _check_name(push)
    trained, record = load_model(model)
    net = without_fake_quant(trained) if record.quantization else trained
    manifest = None if bundle is None else _read_bundle(bundle, ModelDir(model))
    plain = _from_timm(net, record)
    why_not = plain if isinstance(plain, str) else None
    name = None if isinstance(plain, str) else str(cast(Any, plain).pretrained_cfg["architecture"])
    say(why_not or f"timm builds it as '{name}'")
    with new_directory(out, kind=PublishedRecord.KIND, force=force) as aside:
        if name is not None:
            _write_for_timm(aside, plain, record)
        if record.classes is not None:
            lines = "".join(f"{one_line(name)}\n" for name in record.classes)
            write_bytes(aside / LABELS, lines.encode())
        if bundle is None or manifest is None:
            say("exporting to ONNX")
            onnx.save(_checked_onnx(net, record), aside / onnx_name("fp32"))
        else:
            for about in manifest.precisions.values():
                shutil.copyfile(bundle / about.model, aside / about.model)
        published = PublishedRecord(
            made_from=ModelDir(model).sha256,
            command="edgecl publish",  # another one's paths are nobody's business
            timm=name,
            why_not_timm=why_not,
            files={},
        )
        card = model_card(ModelDir(model), record, published, bundle=bundle, manifest=manifest, name=push)
        write_bytes(aside / "README.md", card.encode())
        published.files = {path.name: sha256_of_file(path) for path in sorted(aside.iterdir())}
        published = write_record(aside / PublishedRecord.FILE, published)
    if push is not None:
        say(f"pushing to {push}")
        published.url = _push(out, push)
    return published


def _check_name(name: str) -> None:
    """Refuse what is no name of a repository, before any work."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        fits = name.count("/") == 1
    except HFValidationError:
        fits = False
    if not fits:
        raise DeviceError(
            f"--push '{name}' is not of the form USER/NAME",
            hint="letters, digits, '-', '_' and '.', as in me/flowers",
        )


def _read_bundle(bundle: Path, model: ModelDir) -> Manifest:
    """Return the manifest of a bundle once its files are whole and of this very net."""
    manifest = Bundle(bundle).read()
    try:
        check_files(bundle, manifest.to_json())
    except OnboardError as error:
        raise ArtifactError(error.problem, where={"bundle": bundle}, hint=error.hint) from error
    if manifest.made_from != model.sha256:
        raise ArtifactError(
            f"the bundle '{bundle}' was not made from the net in '{model.path}'",
            hint="export this model directory, and give that bundle",
        )
    return manifest


def _from_timm(net: nn.Module, record: ModelRecord) -> nn.Module | str:
    """Return the net as timm builds it by a name alone, with these weights; or why there is no such name.

    A narrower net may be one that timm has under another name: mobilenetv3_small_100 at width 0.5 is mobilenetv3_small_050.
    """
    if record.quantization is not None:
        return "timm cannot build this net: its batch norms were folded when it was trained for INT8"
    name = record.arch
    if record.width != 1.0:
        name = f"{re.sub('_100$', '', name)}_{round(100 * record.width):03d}"
    at_width = f"'{record.arch}' at width {record.width:g}"
    if not is_model(name):
        return f"timm cannot build this net: it has no {at_width}"
    plain: nn.Module = timm.create_model(name, num_classes=len(record.classes or ())).eval()
    try:
        plain.load_state_dict(net.state_dict())
    except RuntimeError:
        return f"timm cannot build this net: its '{name}' is not {at_width}"
    noise = _noise(record)
    if not (torch_outputs(plain, noise) == torch_outputs(net, noise)).all():
        stem = "" if record.stem_stride is None else f"; the stem of this one has stride {record.stem_stride}"
        return f"timm cannot build this net: its '{name}' computes something else{stem}"
    return plain


def _noise(record: ModelRecord) -> torch.Tensor:
    """Return (4, 3, H, W) inputs at the net's size."""
    side = record.preprocessing.image_size
    return torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(0))


def _write_for_timm(folder: Path, plain: Any, record: ModelRecord) -> None:
    """Write config.json and model.safetensors: weights, names of the classes, and how pictures are prepared."""
    plain.pretrained_cfg = {
        key: value for key, value in plain.pretrained_cfg.items() if key not in _OF_TIMMS_WEIGHTS
    }
    images = record.preprocessing
    config = {
        "input_size": (3, images.image_size, images.image_size),
        "interpolation": images.interpolation,
        "crop_mode": "center",
        "crop_pct": crop_fraction(images),
        "mean": images.mean,
        "std": images.std,
    }
    about = {"pretrained_cfg": config, "label_names": record.classes}
    save_for_hf(plain, str(folder), model_config=about, safe_serialization=True)


def crop_fraction(images: Preprocessing) -> float:
    """Return what timm, which rounds image_size / fraction down, takes for the resize of a net's pictures."""
    fraction = images.image_size / images.resize_size
    while math.floor(images.image_size / fraction) < images.resize_size:
        fraction = math.nextafter(fraction, 0)
    return fraction


def _checked_onnx(net: nn.Module, record: ModelRecord) -> onnx.ModelProto:
    """Export a net in fp32 for any batch, and compare it with torch."""
    target, side = read_target(_TARGET), record.preprocessing.image_size
    about = {key: getattr(record, key) for key in ("classes", "label_sets", "arch")}
    metadata = {**record.preprocessing.to_json(), **about}
    model = onnx_from_net(net, graph=target.graph, shape=(3, side, side), metadata=metadata)
    noise = _noise(record)
    found = session_of(model, runtime=target.runtime)(noise.numpy())
    try:
        check = check_parity("torch net", "ONNX fp32", found, torch_outputs(net, noise))
        check_tolerance(check, target.tolerance_of("fp32", features=True))
    except ParityError as error:
        raise ParityError(error.problem, hint="nothing was published") from error
    return model


def _push(folder: Path, name: str) -> str:
    """Push a folder to the Hugging Face Hub, or where HF_ENDPOINT points, and return its address there.

    Raises:
        DeviceError: no network, no login, or the hub refuses; the folder stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi(library_name="edgecl", library_version=__version__)
    try:
        url = api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"edgecl {__version__}")
    except (
        Exception
    ) as exc:  # whatever of the network, the login or the hub goes wrong, in any of its libraries
        raise DeviceError(
            f"'{name}' was not pushed: {first_line(exc)}",
            where={"hub": api.endpoint},
            hint=f"the folder '{folder}' is whole; `hf auth login`, then `hf upload {name} {folder}`",
        ) from exc
    return str(url)
