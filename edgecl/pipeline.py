"""The verb `run`: recipe -> pretrain -> carve -> cost -> probe against baselines -> export, verify, bench -> report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from edgecl.config.recipe import Recipe, recipe_from_tables, width_as_given
from edgecl.config.target import read_target
from edgecl.errors import ArtifactError, RecipeError, TargetError
from edgecl.storage.directories import Bundle, ModelDir, PipelineDir, RunDir
from edgecl.storage.lock import NAME as LOCK
from edgecl.storage.lock import hold
from edgecl.storage.outputs import refuse_existing, refuse_own_input
from edgecl.storage.record_files import read_record, write_record
from edgecl.storage.records import Json, ModelRecord, PipelineRecord, Stage
from edgecl.storage.redaction import record_without_secrets
from edgecl.storage.writing import clear_directory, disk_errors

if TYPE_CHECKING:
    from edgecl.evaluate.comparison import Compared
    from edgecl.reports.content import Report

BENCH_S = 5.0
Device = Literal["auto", "cpu", "cuda"]


class PipelineRun(NamedTuple):
    """What a pipeline leaves in pipeline.json and report.json."""

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
        out: the directory to write; each stage has a folder in it, and with several slim widths each net.
        data: a data URI in place of the recipe's.
        test: a data URI of held-out labelled images; None takes the data set's own or holds out a fifth.
        targets: what to export for; each is verified and measured here.
        precisions: to export, in place of each target's, the preferred one first.
        resume: keep the stages that are done and unchanged, and go on from there.
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
    init, scratch = recipe.host.init, recipe.probe.pretrained_from_scratch
    if not resume and not _only_a_lock(out):
        refuse_existing(out, force=force, kind=PipelineDir.KIND)
        for weights in (init, scratch):
            if weights is not None:
                refuse_own_input(out, Path(weights))
    from edgecl.evaluate.labelled import check_labelled

    # Before hours of training: labels that cannot be used.
    labelled_data = check_labelled(
        uri, test=test, per_class=recipe.probe.labels_per_class, limit=recipe.data.limit, download=download
    )
    if scratch is not None and not resume:
        from edgecl.nets.given import load_start

        load_start(scratch, host=recipe.host, width=recipe.slim.width, data=recipe.data)
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
        stages = _Stages(recipe, pipeline, record, uri, labelled_data, device, resume, download, say)
        try:
            stages.run()
        except Exception:
            if not resume and not RunDir(pipeline.run).record_file.exists():
                clear_directory(out, keep={LOCK})  # a start that was refused leaves nothing
            raise
        say("report")
        from edgecl.reports.report import report

        # Each time: it is cheap, and stages may be newer.
        written = report([out], out=pipeline.report, force=True)
    return PipelineRun(record, written)


@dataclass(frozen=True)
class _Stages:
    """The stages of a pipeline; each is done unless all it made is still there, and is then on record."""

    recipe: Recipe
    pipeline: PipelineDir
    record: PipelineRecord
    uri: str
    labelled_data: bool
    device: Device
    resume: bool
    download: bool
    say: Callable[[str], None]

    def run(self) -> None:
        # A later stage is made from an earlier one, and made anew with it.
        stale = self._do("pretrain", self._pretrain)
        if not stale:
            self._check_images()
        stale = self._do("carve", self._carve, stale=stale)
        self._do("cost", self._cost, stale=stale)
        self._do("probe", self._probe, stale=stale)
        for target in self.record.targets:
            now = read_target(target, precisions=self.record.precisions).model_dump(mode="json")
            for width, net in self._nets.items():
                # The widest net, often the only one, has the plain name of stage and folder.
                suffix = "" if net == self.pipeline.slim else f"-{width_as_given(width)}"
                name = f"export {target}{suffix.replace('-', ' ')}"
                bundle = Bundle(self.pipeline.bundles / f"{Path(target).stem}{suffix}")
                before = self.record.stages.get(name)
                self._do(
                    name,
                    partial(self._export, name, net, target, bundle),
                    stale=stale or before is None or before.target != now,
                    target=now,
                )

    def _do(
        self,
        name: str,
        work: Callable[[], Sequence[Path]],
        *,
        stale: bool = False,
        target: Json | None = None,
    ) -> bool:
        """Do a stage unless all it made is still there; return whether it was done now."""
        done = self.record.stages.get(name)
        if done and not stale and all((self.pipeline.path / file).exists() for file in done.made):
            self.say(f"{name}: already done")
            return False
        self.say(name)
        started = time.monotonic()
        written = work()
        self.record.stages[name] = Stage(
            wall_s=round(time.monotonic() - started, 3),
            made=[path.relative_to(self.pipeline.path).as_posix() for path in written],
            target=target,
        )
        write_record(self.pipeline.record_file, self.record)
        return True

    @property
    def _nets(self) -> dict[float, Path]:
        """The model directory of each slim width: slim for the widest, slim-WIDTH for the others."""
        widest, *others = self.recipe.slim.all_widths
        folder = self.pipeline.slim
        return {
            widest: folder,
            **{width: folder.with_name(f"{folder.name}-{width_as_given(width)}") for width in others},
        }

    def _check_images(self) -> None:
        """Check that the images that later stages read are those the run was trained on."""
        from edgecl.data.sources import open_source
        from edgecl.train.resume import IMAGES, check_source

        source = open_source(self.uri, split="train", download=self.download)
        if changes := check_source(RunDir(self.pipeline.run), source, allowed=[IMAGES]):
            raise ArtifactError(
                f"cannot resume '{self.pipeline.path}' with other images: {'; '.join(changes)}",
                hint="bring them back as they were, name by name and of the same sizes, or choose another --out",
            )

    def _pretrain(self) -> list[Path]:
        from edgecl.train.pretrain import pretrain

        run_dir = RunDir(self.pipeline.run)
        started = run_dir.record_file.exists()
        if not started and run_dir.checkpoints.exists():
            raise ArtifactError(
                f"the run directory '{run_dir.path}' has checkpoints but no {RunDir.RECORD}",
                hint=f"restore {RunDir.RECORD} from a copy, or remove the directory yourself: the run then starts anew",
            )
        pretrain(
            self.recipe,
            recipe_name=str(self.record.recipe_name),
            out=run_dir.path,
            data=self.record.data,
            device=self.device,
            resume=self.resume and started,
            force=True,
            download=self.download,
        )
        return [run_dir.record_file]

    def _carve(self) -> list[Path]:
        from edgecl.train.carve import carve

        for width, out in self._nets.items():
            carve(self.pipeline.run, out=out, width=width, force=self.resume)
        models = [ModelDir(out) for out in self._nets.values()]
        return [file for model in models for file in (model.record_file, model.weights_file)]

    def _cost(self) -> list[Path]:
        from edgecl.evaluate.cost import cost

        for out in self._nets.values():
            cost(out)
        return [ModelDir(out).cost_file for out in self._nets.values()]

    def _probe(self) -> list[Path]:
        """Compare with the baselines where there are labels; without labels there is nothing to compare."""
        from edgecl.evaluate.comparison import compare, write_random
        from edgecl.evaluate.cost import cost
        from edgecl.evaluate.labelled import read_labelled
        from edgecl.evaluate.probe import write_probe

        if not self.labelled_data:
            return []
        recipe, pipeline, settings = self.recipe, self.pipeline, self.recipe.probe
        record = ModelDir(pipeline.slim).read()
        labelled = read_labelled(
            self.uri,
            test=self.record.test,
            preprocessing=record.preprocessing,
            max_bad_fraction=recipe.data.max_bad_fraction,
            limit=recipe.data.limit,
            download=self.download,
        )
        write_random(pipeline.random, record, labelled, seed=recipe.run.seed, force=True)
        nets = self._nets_to_compare(record)
        comparison = compare(
            nets,
            labelled,
            settings=settings,
            views=recipe.views,
            seed=recipe.run.seed,
            wall_s=RunDir(pipeline.run).read().wall_s,
        )
        write_record(pipeline.comparison_file, comparison)
        baselines = [path for path in nets.features.values() if path != pipeline.slim]
        for path in baselines:
            cost(path)
        others = [path for path in self._nets.values() if path != pipeline.slim]
        for path in others:
            # On the same images and draws as the widest.
            write_probe(path, labelled, labels_per_class=settings.labels_per_class, draws=settings.draws)
        probed = [ModelDir(path).probe_file for path in (*others, pipeline.slim, *baselines)]
        return [pipeline.comparison_file, *probed, *(ModelDir(path).weights_file for path in baselines)]

    def _nets_to_compare(self, record: ModelRecord) -> Compared:
        """Write the weights that the run started from, and those that it is to be compared with, beside its own."""
        from edgecl.evaluate.comparison import Compared, write_given
        from edgecl.train.resume import check_rests_on

        pipeline, init, scratch = (
            self.pipeline,
            self.recipe.host.init,
            self.recipe.probe.pretrained_from_scratch,
        )
        if init is None:
            return Compared(pipeline.slim, pipeline.random)
        sha256 = write_given(pipeline.given, init, record, origin="given", force=True)
        check_rests_on(RunDir(pipeline.run), {"init": sha256})
        if scratch is not None:
            write_given(pipeline.scratch, scratch, record, origin="pretrained from scratch", force=True)
        return Compared(
            pipeline.slim, pipeline.random, pipeline.given, None if scratch is None else pipeline.scratch
        )

    def _export(self, name: str, net: Path, target: str, bundle: Bundle) -> list[Path]:
        """Export, verify, and measure where this machine has the target's runtime; a board's it measures later."""
        from edgecl.deploy.device import bench, verify
        from edgecl.deploy.export import export, runs_here

        here = runs_here(read_target(target))
        manifest = export(
            net,
            target=target,
            out=bundle.path,
            precisions=self.record.precisions,
            calibration=self.uri,
            force=self.resume,
            say=lambda line: self.say(f"{name}: {line}"),
        )
        verify(bundle.path, runtime=None if here else "onnxruntime")
        made = [bundle.record_file, bundle.verify_file, *(bundle.path / name for name in manifest.files)]
        if not here:
            self.say(f"{name}: measured on the device, e.g. `edgecl bench {bundle.path} --host USER@BOARD`")
            return made
        bench(bundle.path, precisions=list(manifest.precisions), duration_s=BENCH_S)
        return [*made, *sorted(bundle.path.glob("bench-*.json"))]


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


def _start(pipeline: PipelineDir, record: PipelineRecord) -> None:
    """Remove what an earlier run left, but for the lock, and write the record of a new one."""
    with disk_errors(pipeline.path):
        clear_directory(pipeline.path, keep={LOCK})
    write_record(pipeline.record_file, record)
