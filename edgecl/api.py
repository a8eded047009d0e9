"""The verbs of the command line as Python functions: `import edgecl; edgecl.pretrain("photos", data="photos/")`.

Each does what the command of its name does, and returns the record that it also writes to the disk, a model of
`edgecl.storage.records`: `record.top1`, or `record.to_json()` for a dictionary. stdout stays empty;
`pretrain` and `finetune` show their progress on stderr. Paths may be strings. What goes wrong is an
`edgecl.errors.EdgeclError`. torch is imported by the first call that needs it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from edgecl.reports.content import Report
    from edgecl.storage.records import (
        BenchRecord,
        CostRecord,
        FinetunedModel,
        Manifest,
        ModelRecord,
        PickedImage,
        Predictions,
        ProbeRecord,
        Proposal,
        PublishedRecord,
        RecipeCost,
        RunRecord,
        VerifyRecord,
    )

__all__ = [
    "bench",
    "carve",
    "cost",
    "export",
    "finetune",
    "init",
    "pick",
    "predict",
    "pretrain",
    "probe",
    "publish",
    "report",
    "verify",
]

# A record as it stands in a JSON file.
Record = dict[str, Any]
# Settings to change: {"optim.lr": 0.2} or {"optim": {"lr": 0.2}}, or ["optim.lr=0.2"] as the command line writes them.
Changes = Mapping[str, object] | Sequence[str]
AnyPath = str | Path


def init(
    photos: AnyPath,
    *,
    out: AnyPath,
    labels: AnyPath | None = None,
    test: AnyPath | None = None,
    target: AnyPath | None = None,
    hours: float | None = None,
    weights: AnyPath | None = None,
    arch: str | None = None,
    force: bool = False,
) -> Proposal:
    """Look at pictures and at this machine, and write a recipe for them, with reasons and price as comments.

    Args:
        photos: a folder of images, or another data URI; of more than 5,000, 5,000 are read.
        out: the .toml file to write.
        labels: a data URI of labelled images to learn from later, to be looked for among the others.
        test: a data URI of held-out labelled images, to be looked for in place of those.
        target: what the net is for: a packaged target (`edgecl ls targets`) or a TOML file.
        hours: that training may take on this machine; None takes the packaged recipe's epochs.
        weights: to start from, as [host] init takes them.
        arch: timm's name of the net that a file of weights is of; None takes that of the recipe `continue`.
        force: replace an earlier file.

    Returns:
        What was seen, chosen and timed: `advice`, `reasons`, `hours`, `total_flops`, `survey`, `machine`, `timing`.

    Raises:
        DataError: no images, or none that can be read.
        TargetError: unknown target.
        RecipeError: a name that does not end in .toml, weights of another net, or an architecture of none.
        ArtifactError: the output exists, or there are no such weights.
        DeviceError: the smallest batch does not fit into the GPU's memory, or a hub of weights does not answer.
    """
    from edgecl.evaluate.init import init as write_recipe

    return write_recipe(
        str(photos),
        out=Path(out),
        labels=_uri(labels),
        test=_uri(test),
        target=_uri(target),
        hours=hours,
        weights=_uri(weights),
        arch=arch,
        force=force,
    )


def pick(
    photos: AnyPath,
    *,
    model: AnyPath,
    count: int = 200,
    out: AnyPath,
    force: bool = False,
) -> list[PickedImage]:
    """Pick which pictures to label first, and write their list and a page that shows them.

    Args:
        photos: a folder of images, or another data URI.
        model: a model directory, whose net tells what is alike.
        count: how many to pick.
        out: the list to write, a .csv, .jsonl or .txt file; the page lies beside it, as .html.
        force: replace earlier files.

    Returns:
        The pictures in the order in which to label them, each with its reason; then those that are unlike all others; last
        those that cannot be read, with `readable` False.

    Raises:
        ArtifactError: not a model directory, a name that ends otherwise, or the output exists.
        DataError: no images, none that can be read, or fewer than `count`.
    """
    from edgecl.evaluate.pick import pick as pick_images

    return pick_images(str(photos), model=Path(model), count=count, out=Path(out), force=force)


def pretrain(
    recipe: AnyPath,
    *,
    data: AnyPath | None = None,
    out: AnyPath | None = None,
    set: Changes = (),
    device: Literal["auto", "cpu", "cuda"] = "auto",
    resume: bool = False,
    allow: Sequence[str] = (),
    force: bool = False,
    download: bool = False,
) -> RunRecord:
    """Pretrain from unlabelled images and write a run directory.

    Args:
        recipe: a packaged recipe (`edgecl ls recipes`) or a TOML file.
        data: a data URI in place of the recipe's, such as a folder of images or "demo".
        out: the run directory to write; None takes runs/RECIPE.
        set: settings of the recipe to change, as {"optim.lr": 0.2} or ["optim.lr=0.2"].
        device: where to train; "auto" takes a GPU when there is one.
        resume: continue the run in `out`; start it where there is none yet.
        allow: when resuming, settings that may differ, such as "run.epochs".
        force: replace an earlier run.
        download: let torchvision fetch a data set that is not on the disk.

    Returns:
        What run.json holds, with `total_steps`, `wall_s` and `plateau` (None, or why the run is stuck).

    Raises:
        RecipeError: unknown recipe, setting or value, or no images named.
        EdgeclError: of another class, as `edgecl.train.pretrain.pretrain` lists them.
    """
    from edgecl.config.recipe import read_recipe, recipe_name
    from edgecl.train.pretrain import pretrain as run

    name = recipe_name(str(recipe))
    return run(
        read_recipe(str(recipe), _assignments(set)),
        recipe_name=name,
        out=Path("runs", name) if out is None else Path(out),
        data=_uri(data),
        device=device,
        resume=resume,
        allow=allow,
        force=force,
        download=download,
    )


def carve(
    run: AnyPath,
    *,
    out: AnyPath,
    width: float | None = None,
    checkpoint: Literal["newest", "best"] = "newest",
    recalibrate_norms: bool = True,
    force: bool = False,
) -> ModelRecord:
    """Carve a slim net out of a run's host and write it as a model directory.

    Args:
        run: a run directory; or a recipe's .toml file, of which the weights that it starts from ([host] init) are written
            as they are.
        out: the model directory to write.
        width: a trained width, the host's among them; None takes the widest slim net.
        checkpoint: the newest, or the one with the best features.
        recalibrate_norms: re-estimate batch-norm statistics on the run's own images; without, or where the run has taken
            no step from the weights it starts from, a bit-for-bit copy.
        force: replace an earlier model directory.

    Returns:
        What model.json holds, with `arch`, `width`, `step`, `params` and `features`.

    Raises:
        ArtifactError: not a run directory, no whole checkpoint in it, or the output exists.
        SliceError: the run was not trained at this width, or it is that of a host with the slim net's skip connections.
        RecipeError: the recipe starts from no given weights, or from those of another net.
        DataError: the run's images are gone, and recalibration needs them.
    """
    from edgecl.train.carve import carve as carve_run

    return carve_run(
        Path(run),
        out=Path(out),
        width=width,
        checkpoint=checkpoint,
        recalibrate_norms=recalibrate_norms,
        force=force,
    )


def probe(
    model: AnyPath,
    *,
    data: AnyPath,
    test: AnyPath | None = None,
    labels_per_class: int | None = None,
    seeds: int = 3,
    download: bool = False,
) -> ProbeRecord:
    """Evaluate a net's frozen features and write probe.json into its model directory.

    Args:
        model: a model directory.
        data: a data URI with labels to learn from, such as a folder of class folders.
        test: a data URI with labels, held out; None takes the set's own test split, or holds out a fifth.
        labels_per_class: labels of the few-label probe; None takes 10.
        seeds: draws of the few labels; one alone has no interval.
        download: let torchvision fetch a data set that is not on the disk.

    Returns:
        What probe.json holds, with `knn_top1`, `linear_top1` and `few_label_top1`, in percent, and their 95 % intervals.

    Raises:
        ArtifactError: not a model directory.
        DataError: no labels, or fewer of a class than asked for.
    """
    from edgecl.evaluate.probe import probe as probe_model

    return probe_model(
        Path(model),
        data=str(data),
        test=_uri(test),
        labels_per_class=labels_per_class,
        seeds=seeds,
        download=download,
    )


def finetune(
    model: AnyPath,
    *,
    data: AnyPath,
    out: AnyPath,
    test: AnyPath | None = None,
    epochs: int | None = None,
    quantize: Literal["int8"] | None = None,
    set: Changes = (),
    force: bool = False,
    download: bool = False,
) -> FinetunedModel:
    """Add a classifier to a net, train both with labels, and write a new model directory.

    Args:
        model: a model directory.
        data: a data URI with labels, such as a folder of class folders.
        out: the model directory to write.
        test: a data URI with labels, held out; None takes the set's own test split, or holds out a fifth.
        epochs: passes over the data; None takes 20, or 3 with `quantize`.
        quantize: "int8" trains the net as the int8 net it will be; None trains in float.
        set: settings of fine-tuning to change, as {"lr": 0.01} or ["lr=0.01"].
        force: replace an earlier model directory.
        download: let torchvision fetch a data set that is not on the disk.

    Returns:
        What model.json holds, and as `evaluation` what evaluation.json does, with `top1` in percent and its 95 % interval.

    Raises:
        ArtifactError: not a model directory, a net that is quantized already, or the output exists.
        DataError: no labels, or other classes than those of the classifier to quantize.
        RecipeError: unknown setting or value, or a net that cannot be quantized.
    """
    from edgecl.evaluate.finetune import finetune as finetune_model

    return finetune_model(
        Path(model),
        data=str(data),
        out=Path(out),
        test=_uri(test),
        epochs=epochs,
        quantize=quantize,
        assignments=_assignments(set),
        force=force,
        download=download,
    )


def cost(subject: AnyPath, *, set: Changes = (), images: int | None = None) -> CostRecord | RecipeCost:
    """Count a net's MACs and parameters, and a recipe's training FLOPs too.

    Args:
        subject: a model directory, into which cost.json is written; or a packaged recipe or TOML file.
        set: of a recipe, settings to change, as {"slim.width": 0.5} or ["slim.width=0.5"].
        images: of a recipe, images per epoch; None takes those of its own data, else ImageNet-1K's.

    Returns:
        A record with `macs`, `flops` and `params`, and of a recipe `training` and `widths`.

    Raises:
        ArtifactError: not a model directory.
        RecipeError: unknown recipe, setting or value, or fewer images than a batch.
    """
    if Path(subject).is_dir():
        from edgecl.evaluate.cost import cost as cost_of_model

        return cost_of_model(Path(subject))
    from edgecl.config.recipe import read_recipe, recipe_name
    from edgecl.evaluate.cost import cost_of_recipe

    recipe = read_recipe(str(subject), _assignments(set))
    return cost_of_recipe(recipe, recipe_name=recipe_name(str(subject)), images=images)


def export(
    model: AnyPath,
    *,
    target: AnyPath,
    out: AnyPath,
    precisions: Sequence[str] | None = None,
    calibration: AnyPath | None = None,
    eval_uri: AnyPath | None = None,
    run: AnyPath | None = None,
    input: Literal["float32", "uint8", "uint8-nchw"] | None = None,
    softmax: bool = False,
    force: bool = False,
    download: bool = False,
    say: Callable[[str], None] | None = None,
) -> Manifest:
    """Export a net to ONNX in every precision, prove each against torch, and write a bundle.

    Args:
        model: a model directory.
        target: a packaged target (`edgecl ls targets`) or a TOML file.
        out: the bundle to write.
        precisions: of "fp32", "fp16" and "int8", the preferred one first; None takes the target's.
        calibration: a data URI of real images to calibrate and to compare on; None takes those of the net's run.
        eval_uri: a data URI of labelled images to evaluate the precisions on; None takes the held-out part of the
            net's own.
        run: the run directory that the model was carved from, to compare with the slim net in its host too.
        input: what the net takes: "float32", (N, 3, H, W), normalized; "uint8", RGB bytes (N, H, W, 3); "uint8-nchw", bytes
            (N, 3, H, W). None takes the target's.
        softmax: end a classifier in softmax, also where the target does not.
        force: replace an earlier bundle.
        download: let torchvision fetch a data set that is not on the disk.
        say: called with one line at a time on how far it is, `print` for example.

    Returns:
        The content of manifest.json; `precisions` has the parity and accuracy of each, and of INT8 the decision.

    Raises:
        ArtifactError: not a model directory, or the output exists.
        TargetError: unknown target, a precision that the target's device lacks or an input that its runtime does not
            take, or softmax of features.
        DataError: no images to compare on, or too few to calibrate on.
        ParityError: a precision outside the target's tolerance; no bundle is left.
        DeviceError: the target needs a compiler that is not installed.
    """
    from edgecl.deploy.export import export as export_model

    return export_model(
        Path(model),
        target=str(target),
        out=Path(out),
        precisions=precisions,
        calibration=_uri(calibration),
        eval_uri=_uri(eval_uri),
        run=None if run is None else Path(run),
        input=input,
        softmax=softmax,
        force=force,
        download=download,
        say=say or _silence,
    )


def predict(
    model: AnyPath,
    pictures: AnyPath | Sequence[AnyPath],
    *,
    top: int = 5,
    out: AnyPath | None = None,
    precision: Literal["fp32", "fp16", "int8"] | None = None,
    runtime: str | None = None,
    force: bool = False,
    say: Callable[[str], None] | None = None,
) -> Predictions:
    """Name what is on pictures, by a classifier in torch or by a bundle.

    Args:
        model: a model directory with a classifier, or a bundle of one.
        pictures: files, and folders of them at any depth; one or several.
        top: how many classes to name of each, >= 1.
        out: a .csv or .jsonl to write, a line a picture; None writes nothing.
        precision: which net of a bundle to run; None takes the bundle's own.
        runtime: to run a bundle with, a name of `edgecl ls runtimes`; None takes the one it is made for.
        force: replace an earlier `out`.
        say: called with one line at a time where an engine must be built first.

    Returns:
        What `predict --json` prints: `predictions` in the order of the files, each with `top` or, where the file is no
        readable picture, `problem`; scores are probabilities.

    Raises:
        ArtifactError: neither a model directory nor a bundle, no classifier in it, or `out` exists.
        DataError: no such file or folder, or no pictures in a folder.
        DeviceError: the runtime is not installed or cannot run the net.
    """
    from edgecl.deploy.predict import predict as predict_pictures

    several = [pictures] if isinstance(pictures, str | Path) else pictures
    return predict_pictures(
        Path(model),
        [Path(path) for path in several],
        top=top,
        out=None if out is None else Path(out),
        precision=precision,
        runtime=runtime,
        force=force,
        say=say or _silence,
    )


def verify(
    bundle: AnyPath,
    *,
    precisions: Sequence[str] | None = None,
    runtime: str | None = None,
    host: str | None = None,
    say: Callable[[str], None] | None = None,
) -> VerifyRecord:
    """Check a bundle's hashes and its outputs against torch's, here or on a board, and write verify.json into it.

    Args:
        bundle: a bundle.
        precisions: which to run; None takes all in the bundle.
        runtime: a name of `edgecl ls runtimes`; None takes the one the bundle is made for.
        host: USER@BOARD[:PORT] to verify on, over ssh; None takes this machine.
        say: called with one line at a time on how far a board is.

    Returns:
        The content of verify.json; `precisions` has the largest difference and the top-1 agreement of each, and what is
        allowed.

    Raises:
        ArtifactError: not a bundle, or a file is missing or changed.
        ParityError: outputs further from torch's than the bundle allows.
        DeviceError: the runtime is not installed or cannot load the net, or the board cannot be reached.
    """
    from edgecl.deploy.device import verify as verify_bundle

    return verify_bundle(Path(bundle), precisions=precisions, runtime=runtime, host=host, report=say)


def bench(
    bundle: AnyPath,
    *,
    precisions: Sequence[str] | None = None,
    runtime: str | None = None,
    duration_s: float = 10.0,
    threads: int | None = None,
    power: bool = True,
    host: str | None = None,
    say: Callable[[str], None] | None = None,
) -> BenchRecord:
    """Measure a bundle's latency, and its energy where a board tells it, and write a record into the bundle.

    Args:
        bundle: a bundle.
        precisions: which to measure, in turn in one session; None takes the bundle's default alone.
        runtime: a name of `edgecl ls runtimes`, or "trtexec"; None takes the one the bundle is made for.
        duration_s: seconds to sample each precision for, > 0.
        threads: how many to compute with, >= 1; None takes every core.
        power: read the board's power rails, where it has any.
        host: USER@BOARD[:PORT] to measure on, over ssh; None takes this machine.
        say: called about once a second with one line on how far it is.

    Returns:
        The record, with one of `measurements` per precision and mode, in it `latency_ms` with its intervals; and `device`.

    Raises:
        ArtifactError: not a bundle, it lacks a precision, or a file is missing or changed.
        DeviceError: the runtime is not installed or cannot load the net, or the board cannot be reached.
    """
    from edgecl.deploy.device import bench as bench_bundle

    return bench_bundle(
        Path(bundle),
        precisions=precisions,
        runtime=runtime,
        duration_s=duration_s,
        threads=threads,
        power=power,
        host=host,
        report=say,
    )


def publish(
    model: AnyPath,
    *,
    out: AnyPath,
    bundle: AnyPath | None = None,
    push: str | None = None,
    force: bool = False,
    say: Callable[[str], None] | None = None,
) -> PublishedRecord:
    """Write a folder for others: what timm loads, ONNX files, a model card with what was measured.

    Args:
        model: a model directory.
        out: the folder to write, for `timm.create_model("local-dir:FOLDER", pretrained=True)` where timm has the net.
        bundle: a bundle of this net, whose ONNX files and measurements are taken; None exports one file, in fp32.
        push: USER/NAME on the Hugging Face Hub, or where HF_ENDPOINT points, to push the folder to; None sends nothing.
        force: replace an earlier folder.
        say: called with a line at each stage.

    Returns:
        What edgecl.json in the folder holds, with `timm` (the name, or None), `why_not_timm` and, once pushed, `url`.

    Raises:
        ArtifactError: not a model directory, a bundle of another net, or the output exists.
        ParityError: the ONNX file computes something else than torch.
        DeviceError: no name of a repository, or the hub refused it; then the folder is whole.
    """
    from edgecl.deploy.publish import publish as publish_model

    return publish_model(
        Path(model),
        out=Path(out),
        bundle=None if bundle is None else Path(bundle),
        push=push,
        force=force,
        say=say or _silence,
    )


def report(dirs: AnyPath | Sequence[AnyPath], *, out: AnyPath, force: bool = False) -> Report:
    """Write one page (report.html, report.md, report.json) about runs, nets and bundles.

    Args:
        dirs: run, model, bundle or pipeline directories, one or several.
        out: the directory to write.
        force: replace an earlier report.

    Returns:
        What report.json holds, with `decision`, `rows`, `comparison` and `notes`.

    Raises:
        ArtifactError: a directory that edgecl did not write, an unreadable record, or the output exists.
    """
    from edgecl.reports.report import report as report_on

    several = [dirs] if isinstance(dirs, str | Path) else dirs
    return report_on([Path(path) for path in several], out=Path(out), force=force)


def _assignments(changes: Changes) -> list[str]:
    """Return changed settings as `--set` takes them: KEY=VALUE, the value in TOML."""
    if isinstance(changes, Mapping):
        from edgecl.config.recipe import flatten

        # Of strings, numbers, truth values and lists of these, JSON is TOML.
        return [
            f"{key}={json.dumps(value, ensure_ascii=False, default=str)}"
            for key, value in flatten(changes).items()
        ]
    return [changes] if isinstance(changes, str) else list(changes)


def _uri(data: AnyPath | None) -> str | None:
    return None if data is None else str(data)


def _silence(line: str) -> None:
    pass
