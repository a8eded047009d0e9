"""The verb `run`: recipe -> pretrain -> carve -> cost -> probe against baselines -> export, verify, bench -> report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from edgecl.config.recipe import Recipe, recipe_from_tables, width_as_given
from edgecl.config.target import read_target
from edgecl.errors import ArtifactError, RecipeError, TargetError
from edgecl.storage.directories import Bundle, ModelDir, PipelineDir, RunDir
from edgecl.storage.lock import NAME as LOCK
from edgecl.storage.lock import hold
from edgecl.storage.outputs import refuse_existing
from edgecl.storage.record_files import read_record, write_record
from edgecl.storage.records import Json, PipelineRecord, Stage
from edgecl.storage.redaction import record_without_secrets
from edgecl.storage.writing import clear_directory, disk_errors

if TYPE_CHECKING:
    from edgecl.reports.content import Report

BENCH_S = 5.0
Device = Literal["auto", "cpu", "cuda"]


class PipelineRun(NamedTuple):
    """What a pipeline leaves.

    Attributes:
        record: in pipeline.json.
        report: in report.json.
    """

    record: PipelineRecord
    report: Report


def run(
    recipe: Recipe,
    *,
    recipe_name: str,
    out: Path,
    data: str | None = None,
    test: str | None = None,
    targets: Sequence[str] = ("ort-cpu",),
    precisions: Sequence[str] | None = None,
    device: Device = "auto",
    resume: bool = False,
    force: bool = False,
    download: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> PipelineRun:
    """Run every verb of a recipe, from images to a measured bundle and a report.

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
        the record in pipeline.json, and that of the report.

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

    # Before hours of training: labels that cannot be used.
    labelled_data = check_labelled(
        uri, test=test, per_class=recipe.probe.labels_per_class, limit=recipe.data.limit, download=download
    )
    record = PipelineRecord(
        made_from=None,
        recipe_name=recipe_name,
        recipe=recipe.model_dump(mode="json"),
        data=uri,
        test=test,
        targets=list(targets),
        precisions=None if precisions is None else list(precisions),
        stages={},
    )
    with hold(out, what="pipeline directory"):
        if resume:
            record.stages = _stages_done(pipeline, record)
        else:
            _start(pipeline, record)
        try:
            _run_stages(
                recipe,
                pipeline,
                record,
                uri,
                labelled_data=labelled_data,
                device=device,
                resume=resume,
                download=download,
                say=say,
            )
        except Exception:
            if not resume and not RunDir(pipeline.run).record_file.exists():
                clear_directory(out, keep={LOCK})  # a start that was refused leaves nothing
            raise
        say("report")
        from edgecl.reports.report import report

        # Each time: it is cheap, and stages may be newer.
        written = report([out], out=pipeline.report, force=True)
    return PipelineRun(record, written)


def _run_stages(
    recipe: Recipe,
    pipeline: PipelineDir,
    record: PipelineRecord,
    uri: str,
    *,
    labelled_data: bool,
    device: Device,
    resume: bool,
    download: bool,
    say: Callable[[str], None],
) -> None:
    """Run the stages that are not done yet, and write the record after each."""

    def stage(
        name: str, work: Callable[[], Sequence[Path]], *, stale: bool = False, target: Json | None = None
    ) -> bool:
        """Do a stage unless all it made is still there; return whether it was done now."""
        done = record.stages.get(name)
        if done and not stale and all((pipeline.path / file).exists() for file in done.made):
            say(f"{name}: already done")
            return False
        say(name)
        started = time.monotonic()
        written = work()
        record.stages[name] = Stage(
            wall_s=round(time.monotonic() - started, 3),
            made=[path.relative_to(pipeline.path).as_posix() for path in written],
            target=target,
        )
        write_record(pipeline.record_file, record)
        return True

    # A later stage is made from an earlier one, and made anew with it.
    stale = stage(
        "pretrain",
        lambda: _pretrain(recipe, pipeline, record, device=device, resume=resume, download=download),
    )
    if not stale:
        _check_images(pipeline, uri, download=download)
    nets = _nets_of(recipe, pipeline)
    stale = stage("carve", lambda: _carve(nets, pipeline, force=resume), stale=stale)
    stage("cost", lambda: _cost(nets), stale=stale)
    stage(
        "probe",
        lambda: _probe(
            recipe, pipeline, uri, test=record.test, labelled_data=labelled_data, download=download
        ),
        stale=stale,
    )
    precisions = record.precisions
    for target in record.targets:
        target_now = read_target(target, precisions=precisions).model_dump(mode="json")
        for width, net in nets.items():
            # The widest net, often the only one, has the plain name of stage and folder.
            suffix = "" if net == pipeline.slim else f"-{width_as_given(width)}"
            name = f"export {target}{suffix.replace('-', ' ')}"
            bundle = Bundle(pipeline.bundles / f"{Path(target).stem}{suffix}")
            before = record.stages.get(name)
            stage(
                name,
                partial(_export, net, target, bundle, uri, precisions, name=name, force=resume, say=say),
                stale=stale or before is None or before.target != target_now,
                target=target_now,
            )


def _check_targets(targets: Sequence[str], precisions: Sequence[str] | None) -> None:
    """Check the targets before hours of training."""
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


def _stages_done(pipeline: PipelineDir, now: PipelineRecord) -> dict[str, Stage]:
    """Compare the settings with those the pipeline was started with, and return the stages that are done.

    Targets may be added.
    """
    from edgecl.train.resume import differences

    before = read_record(pipeline.record_file, PipelineRecord)
    # Settings that are newer than the record have their defaults there.
    recipe = recipe_from_tables(before.recipe, source=str(pipeline.record_file))
    was, is_ = (record_without_secrets(of.to_json()) for of in (before, now))
    changes = [*differences(record_without_secrets(recipe.model_dump(mode="json")), is_["recipe"]).values()]
    changes += [
        f"{key} was {was[key]!r}, now {is_[key]!r}" for key in ("data", "test") if was[key] != is_[key]
    ]
    if changes:
        raise ArtifactError(
            f"cannot resume '{pipeline.path}' with other settings: {'; '.join(changes)}",
            hint="repeat the command it was started with, or choose another --out",
        )
    return before.stages


def _check_images(pipeline: PipelineDir, uri: str, *, download: bool) -> None:
    """Check that the images that later stages read are those the run was trained on."""
    from edgecl.data.sources import open_source
    from edgecl.train.resume import IMAGES, check_source

    source = open_source(uri, split="train", download=download)
    if changes := check_source(RunDir(pipeline.run), source, allowed=[IMAGES]):
        raise ArtifactError(
            f"cannot resume '{pipeline.path}' with other images: {'; '.join(changes)}",
            hint="bring them back as they were, name by name and of the same sizes, or choose another --out",
        )


def _start(pipeline: PipelineDir, record: PipelineRecord) -> None:
    """Remove what an earlier run left, but for the lock, and write the record of a new one."""
    with disk_errors(pipeline.path):
        clear_directory(pipeline.path, keep={LOCK})
    write_record(pipeline.record_file, record)


def _pretrain(
    recipe: Recipe,
    pipeline: PipelineDir,
    record: PipelineRecord,
    *,
    device: Device,
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
        recipe_name=str(record.recipe_name),
        out=pipeline.run,
        data=record.data,
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
    from edgecl.train.carve import carve

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
        preprocessing=record.preprocessing,
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
    write_record(pipeline.comparison_file, comparison)
    for path, name in ((pipeline.slim, "pretrained"), (pipeline.random, "random init")):
        write_record(ModelDir(path).probe_file, probes[name])
    cost(pipeline.random)
    others = [path for path in _nets_of(recipe, pipeline).values() if path != pipeline.slim]
    for path in others:
        # On the same images and draws as the widest.
        write_probe(
            path,
            load_feature_net(path)[0],
            labelled,
            preprocessing=record.preprocessing,
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
    made = [bundle.record_file, bundle.verify_file, *(bundle.path / name for name in manifest.files)]
    if not here:
        say(f"{name}: measured on the device, e.g. `edgecl bench {bundle.path} --host USER@BOARD`")
        return made
    bench(bundle.path, precisions=list(manifest.precisions), duration_s=BENCH_S)
    return [*made, *sorted(bundle.path.glob("bench-*.json"))]
