"""The whole road: recipe -> pretrain -> carve -> cost -> probe against baselines -> export, verify, bench -> report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from edgecl.config.recipe import Recipe, recipe_from_tables, width_as_given
from edgecl.config.target import read_target
from edgecl.errors import ArtifactError, RecipeError, TargetError
from edgecl.storage.artifacts import (
    Bundle,
    ModelDir,
    PipelineDir,
    RunDir,
    clear_directory,
    disk_errors,
    read_record,
    record_header,
    refuse_existing,
    write_json,
)
from edgecl.storage.lock import NAME as LOCK
from edgecl.storage.lock import hold
from edgecl.storage.redaction import record_without_secrets

BENCH_S = 5.0
# What a pipeline that is resumed must be given again as it was; targets may be added.
_KEPT = ("recipe", "data", "test")


def run(
    recipe: Recipe,
    *,
    recipe_name: str,
    out: Path,
    data: str | None = None,
    test: str | None = None,
    targets: Sequence[str] = ("ort-cpu",),
    precisions: Sequence[str] | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    resume: bool = False,
    force: bool = False,
    download: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Take a recipe from images to a measured bundle and a report.

    Args:
        recipe: what to train and how to evaluate it.
        recipe_name: for the records.
        out: the directory to write; each stage has a folder in it, and with several slim widths each net.
        data: a data URI in place of the recipe's.
        test: a data URI of held-out labelled images; None takes the data set's own or holds out a fifth.
        targets: what to export for; each is verified and measured here.
        precisions: to export, in place of each target's, the preferred one first.
        device: where to train.
        resume: keep the stages that are done and unchanged, and go on from there.
        force: replace an earlier output.
        download: let torchvision fetch a data set that is not on the disk.
        say: told what starts, one line each.

    Returns:
        the record in pipeline.json, with the report's under "report".

    Raises:
        EdgeclError: of the stage that failed; stages before it stay on the disk for `resume`.
    """
    uri = data or recipe.data.uri
    if uri is None:
        raise RecipeError(f"the recipe '{recipe_name}' names no images", hint="say which with --data URI")
    _check_targets(targets, precisions)
    pipeline = PipelineDir(out)
    resume = resume and pipeline.record_file.exists()
    if not resume and not _only_a_lock(out):
        refuse_existing(out, force=force, kind=PipelineDir.KIND)
    from edgecl.evaluate.labelled import check_labelled

    # Labels that cannot be used are better refused now than after hours of training.
    labelled_data = check_labelled(
        uri, test=test, per_class=recipe.probe.labels_per_class, limit=recipe.data.limit, download=download
    )
    settings = {
        "recipe_name": recipe_name,
        "recipe": recipe.model_dump(mode="json"),
        "data": uri,
        "test": test,
        "targets": list(targets),
        "precisions": None if precisions is None else list(precisions),
    }
    with hold(out, what="pipeline directory"):
        stages = _resumed(pipeline, settings) if resume else _start(pipeline, settings)
        try:
            _run_stages(
                recipe,
                pipeline,
                settings,
                stages,
                labelled_data=labelled_data,
                device=device,
                resume=resume,
                download=download,
                say=say,
            )
        except Exception:
            if not resume and not RunDir(pipeline.run).record_file.exists():
                clear_directory(out, keep={LOCK})  # of a start that was refused nothing stays
            raise
        say("report")
        from edgecl.reports.report import report

        # Made anew each time: it is cheap, and the stages behind it may be newer.
        written = report([out], out=pipeline.report, force=True)
    return {**read_record(pipeline.record_file, kind=PipelineDir.KIND), "report": written}


def _run_stages(
    recipe: Recipe,
    pipeline: PipelineDir,
    settings: dict[str, Any],
    stages: dict[str, dict[str, Any]],
    *,
    labelled_data: bool,
    device: Any,
    resume: bool,
    download: bool,
    say: Callable[[str], None],
) -> None:
    """Do what is not done yet, each stage noted in the record when it is."""
    out, uri, test = pipeline.path, settings["data"], settings["test"]

    def save() -> None:
        write_json(
            pipeline.record_file,
            {**record_header(PipelineDir.KIND, made_from=None), **settings, "stages": stages},
        )

    def stage(name: str, work: Callable[[], Sequence[Path]], *, stale: bool = False) -> bool:
        """Do a stage unless all it made is still there; return whether it was done now."""
        made = stages.get(name, {}).get("made", [])
        if name in stages and not stale and all((out / file).exists() for file in made):
            say(f"{name}: already done")
            return False
        say(name)
        started = time.monotonic()
        written = work()
        stages[name] = {
            "wall_s": round(time.monotonic() - started, 3),
            "made": [path.relative_to(out).as_posix() for path in written],
        }
        save()
        return True

    # What comes later is made from what comes earlier, and is made anew with it.
    stale = stage(
        "pretrain",
        lambda: _pretrain(recipe, pipeline, settings, device=device, resume=resume, download=download),
    )
    if not stale:
        _check_images(pipeline, uri, download=download)
    nets = _nets_of(recipe, pipeline)
    stale = stage("carve", lambda: _carve(nets, pipeline, force=resume), stale=stale)
    stage("cost", lambda: _cost(nets), stale=stale)
    stage(
        "probe",
        lambda: _probe(recipe, pipeline, uri, test=test, labelled_data=labelled_data, download=download),
        stale=stale,
    )
    precisions = settings["precisions"]
    for target in settings["targets"]:
        settings_now = read_target(target, precisions=precisions).model_dump(mode="json")
        for width, net in nets.items():
            # The widest has the stage's and the folder's plain name, as the only one has.
            suffix = "" if net == pipeline.slim else f"-{width_as_given(width)}"
            name = f"export {target}{suffix.replace('-', ' ')}"
            bundle = Bundle(pipeline.bundles / f"{Path(target).stem}{suffix}")
            before = stages.get(name, {}).get("target")
            if stage(
                name,
                partial(_export, net, target, bundle, uri, precisions, name=name, force=resume, say=say),
                stale=stale or before != settings_now,
            ):
                stages[name]["target"] = settings_now
                save()


def _check_targets(targets: Sequence[str], precisions: Sequence[str] | None) -> None:
    """Refuse targets that cannot be exported for before hours of training, not after them."""
    names: dict[str, str] = {}
    for target in targets:
        read_target(target, precisions=precisions)
        name = Path(target).stem
        if name in names:
            raise TargetError(
                f"two targets are called '{name}': '{names[name]}' and '{target}'",
                hint="each is exported to a folder of its name; name each target once",
            )
        names[name] = target


def _only_a_lock(out: Path) -> bool:
    return out.is_dir() and all(path.name == LOCK for path in out.iterdir())


def _resumed(pipeline: PipelineDir, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Hold the settings to those the pipeline was started with, and return the stages that are done."""
    from edgecl.train.resume import differences

    before = read_record(pipeline.record_file, kind=PipelineDir.KIND, whole=True)
    # Settings that are newer than the record have their defaults there.
    recipe = recipe_from_tables(before["recipe"], source=str(pipeline.record_file))
    before["recipe"] = recipe.model_dump(mode="json")
    was, now = ({key: record_without_secrets(of.get(key)) for key in _KEPT} for of in (before, settings))
    changes = [*differences(was.pop("recipe"), now.pop("recipe")).values()]
    changes += [f"{key} was {was[key]!r}, now {now[key]!r}" for key in now if was[key] != now[key]]
    if changes:
        raise ArtifactError(
            f"cannot resume '{pipeline.path}' with other settings: {'; '.join(changes)}",
            hint="repeat the command it was started with, or choose another --out",
        )
    return dict(before.get("stages", {}))


def _check_images(pipeline: PipelineDir, uri: str, *, download: bool) -> None:
    """Hold the images that later stages read to those the run was trained on."""
    from edgecl.data.sources import open_source
    from edgecl.train.resume import IMAGES, check_source

    source = open_source(uri, split="train", download=download)
    if changes := check_source(RunDir(pipeline.run), source, allowed=[IMAGES]):
        raise ArtifactError(
            f"cannot resume '{pipeline.path}' with other images: {'; '.join(changes)}",
            hint="bring them back as they were, name by name and of the same sizes, or choose another --out",
        )


def _start(pipeline: PipelineDir, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Remove what an earlier run left, but for the lock, and write the record of a new one."""
    with disk_errors(pipeline.path):
        clear_directory(pipeline.path, keep={LOCK})
    write_json(
        pipeline.record_file, {**record_header(PipelineDir.KIND, made_from=None), **settings, "stages": {}}
    )
    return {}


def _pretrain(
    recipe: Recipe,
    pipeline: PipelineDir,
    settings: dict[str, Any],
    *,
    device: Any,
    resume: bool,
    download: bool,
) -> list[Path]:
    from edgecl.train.pretrain import pretrain

    run_dir = RunDir(pipeline.run)
    started = run_dir.record_file.exists()
    if not started and run_dir.checkpoints.exists():
        raise ArtifactError(
            f"the run directory '{run_dir.path}' has checkpoints but no {RunDir.RECORD}",
            hint=f"restore {RunDir.RECORD} from a copy, or remove the directory yourself: the run then starts anew",
        )
    pretrain(
        recipe,
        recipe_name=settings["recipe_name"],
        out=pipeline.run,
        data=settings["data"],
        device=device,
        resume=resume and started,
        force=True,
        download=download,
    )
    return [RunDir(pipeline.run).record_file]


def _nets_of(recipe: Recipe, pipeline: PipelineDir) -> dict[float, Path]:
    """Return the model directory of each slim width: slim for the widest, slim-WIDTH for the others."""
    widest, *others = recipe.slim.all_widths
    folder = pipeline.slim
    return {
        widest: folder,
        **{width: folder.with_name(f"{folder.name}-{width_as_given(width)}") for width in others},
    }


def _carve(nets: dict[float, Path], pipeline: PipelineDir, *, force: bool) -> list[Path]:
    from edgecl.nets.carving import carve

    for width, out in nets.items():
        carve(pipeline.run, out=out, width=width, force=force)
    return [file for out in nets.values() for file in (ModelDir(out).record_file, ModelDir(out).weights_file)]


def _cost(nets: dict[float, Path]) -> list[Path]:
    from edgecl.evaluate.cost import cost

    for out in nets.values():
        cost(out)
    return [ModelDir(out).cost_file for out in nets.values()]


def _probe(
    recipe: Recipe,
    pipeline: PipelineDir,
    uri: str,
    *,
    test: str | None,
    labelled_data: bool,
    download: bool,
) -> list[Path]:
    """Compare with the baselines where there are labels; without labels there is nothing to compare."""
    from edgecl.evaluate.comparison import compare, write_random
    from edgecl.evaluate.cost import cost
    from edgecl.evaluate.labelled import read_labelled
    from edgecl.evaluate.probe import load_feature_net, write_probe

    if not labelled_data:
        return []
    record = ModelDir(pipeline.slim).read()
    labelled = read_labelled(
        uri,
        test=test,
        preprocessing=record["preprocessing"],
        max_bad_fraction=recipe.data.max_bad_fraction,
        limit=recipe.data.limit,
        download=download,
    )
    write_random(pipeline.random, record, labelled, seed=recipe.run.seed, force=True)
    comparison, probes = compare(
        pipeline.slim,
        pipeline.random,
        labelled,
        labels_per_class=recipe.probe.labels_per_class,
        draws=recipe.probe.draws,
        scratch_steps=recipe.probe.scratch_steps,
        scratch_lr=recipe.probe.scratch_lr,
        views=recipe.views,
        seed=recipe.run.seed,
    )
    write_json(pipeline.comparison_file, comparison)
    for path, name in ((pipeline.slim, "pretrained"), (pipeline.random, "random init")):
        write_json(ModelDir(path).probe_file, probes[name])
    cost(pipeline.random)
    others = [path for path in _nets_of(recipe, pipeline).values() if path != pipeline.slim]
    for path in others:
        # On the same images and draws as the widest.
        write_probe(
            path,
            load_feature_net(path)[0],
            labelled,
            preprocessing=record["preprocessing"],
            labels_per_class=recipe.probe.labels_per_class,
            draws=recipe.probe.draws,
        )
    return [
        pipeline.comparison_file,
        *(ModelDir(path).probe_file for path in others),
        ModelDir(pipeline.slim).probe_file,
        ModelDir(pipeline.random).probe_file,
        ModelDir(pipeline.random).weights_file,
    ]


def _export(
    net: Path,
    target: str,
    bundle: Bundle,
    uri: str,
    precisions: Sequence[str] | None,
    *,
    name: str,
    force: bool,
    say: Callable[[str], None],
) -> list[Path]:
    """Export, verify, and measure where this machine has the target's runtime; a board's it measures later."""
    from edgecl.deploy.device import bench, verify
    from edgecl.deploy.export import export, runs_here

    here = runs_here(read_target(target))
    manifest = export(
        net,
        target=target,
        out=bundle.path,
        precisions=precisions,
        calibration=uri,
        force=force,
        say=lambda line: say(f"{name}: {line}"),
    )
    verify(bundle.path, runtime=None if here else "onnxruntime")
    made = [bundle.record_file, bundle.verify_file, *(bundle.path / name for name in manifest["files"])]
    if not here:
        say(f"{name}: measured on the device, e.g. `edgecl bench {bundle.path} --host USER@BOARD`")
        return made
    bench(bundle.path, precisions=list(manifest["precisions"]), duration_s=BENCH_S)
    return [*made, *sorted(bundle.path.glob("bench-*.json"))]
