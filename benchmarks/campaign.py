"""Training runs that can be interrupted: what arms.py and start.py share.

Each run has a process of its own, claimed by a lock, so that several commands may work in one directory side by side,
each on its own core. A run that was stopped or killed goes on where it was; a run that is finished is a line in
results.jsonl and is not repeated. A run is known by the hash of its settings: an edited list makes new runs, and the
lines of the old ones stay in the file unread.

    DIR/results.jsonl       one line per finished run
    DIR/runs/RUN/pretrain   run directory, as `edgecl pretrain` writes it
    DIR/runs/RUN/slim       the carved net
    DIR/runs/RUN/log.txt    what the run said
    DIR/images              links to the images of a folder, without and with those held out
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

from timing import processor

from edgecl.config.recipe import Recipe, read_recipe
from edgecl.errors import ArtifactError, CollapseError, EdgeclError, NonFiniteError, Preempted
from edgecl.metrics.intervals import mean_interval
from edgecl.storage.directories import RunDir
from edgecl.storage.lock import hold

# How a run's process ends, where it does not end as an error does.
FINISHED, IN_USE, STOPPED = 0, 75, 76

DEMO_VALIDATION = "demo:validation"
"""What to evaluate on: 1,000 pictures of the demo's generator that are neither its training nor its test pictures."""
DEMO_VALIDATION_IMAGES = 1000

RANKME_IMAGES = 2048
# Variables by which a processor plays an older one.
PLAYED = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")


@dataclass(frozen=True)
class Run:
    """One net to be trained and evaluated.

    Attributes:
        name: what is shown, and the beginning of its directory's name.
        recipe: a packaged recipe's name, or a TOML file.
        assignments: changes to it, as `--set` takes them.
        seed: of the run.
        data: URI of the images to train on; their labels are used to evaluate only.
        evaluate_on: URI of held-out images, or DEMO_VALIDATION.
        split: "validation" for choices, "test" for the report.
        labels_per_class: of the few-label probe.
        draws: how often these are drawn.
        learn_from: labelled images that a probe learns from, an even share of each class; None means all.
        threads: of its process.
        device: as for `edgecl pretrain`.
        untrained: evaluate the net as it is initialized.
        machine: set where a result belongs to one kind of processor.
    """

    name: str
    recipe: str
    assignments: tuple[str, ...]
    seed: int
    data: str
    evaluate_on: str
    split: str = "validation"
    labels_per_class: int = 10
    draws: int = 5
    learn_from: int | None = None
    threads: int = 1
    device: str = "cpu"
    untrained: bool = False
    machine: str = ""

    def settings(self) -> Recipe:
        """Return the recipe with all changes made; its threads are the run's own.

        Raises:
            RecipeError: an unknown recipe, key or value.
        """
        recipe = read_recipe(self.recipe, [*self.assignments, f"run.seed={self.seed}"])
        return recipe.model_copy(update={"run": recipe.run.model_copy(update={"threads": None})})

    @cached_property
    def key(self) -> str:
        """The name of the run's directory: equal for equal settings, under whatever names they are listed."""
        settings = self.settings()
        # Settings at their default leave no trace: a version that adds one must not start everything anew.
        told = settings.model_dump(mode="json", exclude_defaults=True)
        told["method"] = {"name": settings.method.name, **told.get("method", {})}  # each method's own default
        told = json.dumps([told, self.threads, self.untrained, self.machine], sort_keys=True)
        digest = hashlib.sha256(told.encode()).hexdigest()[:10]
        return f"{re.sub(r'[^a-z0-9]+', '-', self.name.lower())}-{settings.run.epochs}-epochs-seed{self.seed}-{digest}"

    @property
    def identity(self) -> str:
        """What a line of results.jsonl is found by: the run and how it was evaluated."""
        evaluated = [self.split, self.labels_per_class, self.draws, self.learn_from]
        return f"{self.key.rpartition('-')[2]} {' '.join(map(str, evaluated))}"


# --- the directory ---


def read_results(directory: Path) -> dict[str, dict]:
    """Return identity -> line of results.jsonl; a line torn by a crash is left out."""
    found = {}
    file = directory / "results.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            result = json.loads(line)
            found.setdefault(result["identity"], result)
    return found


def append_result(directory: Path, result: dict) -> None:
    """Append one line to results.jsonl and flush it to the disk; processes that append at once wait for each other."""
    with (directory / "results.jsonl").open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # torn by a crash
                file.write(b"\n")
        file.write((json.dumps(result) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def hold_out(directory: Path, data: str, count: int) -> tuple[str, str]:
    """Link the images of a folder into two: those to train on, and so many held out, an even share of each class.

    Args:
        directory: of the campaign.
        data: a folder with a sub-folder per class.
        count: images held out.

    Returns:
        The two folders.
    """
    from edgecl.data.loading import split_holdout
    from edgecl.data.sources import open_source

    images, told = directory / "images", {"data": str(Path(data).resolve()), "held_out": count}
    if not images.exists():
        root = Path(data).resolve()
        source = open_source(str(root))
        if source.labels is None:
            raise SystemExit(f"'{data}' has no classes to hold an even share of")
        parts = zip(
            ("train", "validation"), split_holdout(source.labels, count / len(source), seed=0), strict=True
        )
        aside = directory / f".images-{os.getpid()}"
        for part, indices in parts:
            for index in indices:
                picture = Path(source.describe(int(index)))
                link = aside / part / picture.relative_to(root)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(picture)
        (aside / "from.json").write_text(json.dumps(told))
        try:
            aside.rename(images)
        except OSError:  # another process was faster
            shutil.rmtree(aside)
    if json.loads((images / "from.json").read_text()) != told:
        raise SystemExit(
            f"'{images}' links to other images than {told}; remove it, or choose another directory"
        )
    return str(images / "train"), str(images / "validation")


# --- working through a list ---


class Stop:
    """Whether SIGTERM or Ctrl-C came; SIGTERM is passed on, Ctrl-C reaches a terminal's processes by itself."""

    def __init__(self) -> None:
        self.asked = 0
        self.child: subprocess.Popen | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = self.asked or number
        if number == signal.SIGTERM and self.child is not None:
            with contextlib.suppress(ProcessLookupError):
                self.child.terminate()


def work(runs: Sequence[Run], directory: Path) -> int:
    """Finish every run that no other process holds, one after another.

    Returns:
        What the command should exit with, as `edgecl pretrain` does: 0 also when SIGTERM stopped it, 130 after Ctrl-C,
        so that the script around it ends too, and 1 where a run could not be finished.
    """
    stop = Stop()
    directory.mkdir(parents=True, exist_ok=True)
    failed: set[str] = set()
    progress = True
    while progress:
        # Again from the start: a run that another process held may have been left by it.
        progress = False
        for run in runs:
            if stop.asked:
                break
            if run.identity in failed or run.identity in read_results(directory):
                continue
            code = _process_of(run, directory, stop)
            if code == FINISHED:
                progress = True
                say(f"{run.key}: {brief(read_results(directory)[run.identity])}")
            elif code == STOPPED or stop.asked:
                stop.asked = stop.asked or signal.SIGTERM
            elif code == IN_USE:
                say(f"{run.key}: another process is at it")
            else:
                failed.add(run.identity)
                log = (directory / "runs" / run.key / "log.txt").read_text(errors="replace").splitlines()
                say(f"{run.key}: ended with {code}; its log ends:\n" + "\n".join(log[-5:]))
        if stop.asked:
            say("stopped; the same command goes on from here")
            return 130 if stop.asked == signal.SIGINT else 0
    return 1 if failed else 0


def _process_of(run: Run, directory: Path, stop: Stop) -> int:
    place = directory / "runs" / run.key
    place.mkdir(parents=True, exist_ok=True)
    say(f"{run.key}: begun or gone on with")
    threads = str(run.threads)
    environment = {
        "GOMP_SPINCOUNT": "20000",  # as the command edgecl sets it
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
    }
    with (place / "log.txt").open("a") as log:
        stop.child = subprocess.Popen(
            [sys.executable, __file__, str(directory), json.dumps(asdict(run))],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
        )
        if stop.asked:  # between the look at it and the start
            stop.child.terminate()
        try:
            return stop.child.wait()
        finally:
            stop.child = None


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def brief(result: dict) -> str:
    if "failed" in result:
        return f"failed: {result['failed']}"
    return (
        f"kNN {result['knn_top1']:.1f}, linear {result['linear_top1']:.1f}, "
        f"{result['labels_per_class']}/class {statistics.mean(result['few']):.1f}, RankMe {result['rankme']:.1f}"
    )


# --- one run, in its own process ---


def finish(run: Run, place: Path) -> dict:
    """Train what is left to train, carve, evaluate; return the line for results.jsonl."""
    import torch

    from edgecl.train.carve import carve, preprocessing_of

    recipe = run.settings()
    what = {
        "identity": run.identity,
        "run": run.key,
        "arm": run.name,
        "seed": run.seed,
        "split": run.split,
        "recipe": run.recipe,
        "assignments": list(run.assignments),
        "epochs": recipe.run.epochs,
        **conditions(run),
    }
    check_evaluated(run, recipe)
    trained: dict = {}
    if not run.untrained:
        try:
            trained = train(run, recipe, place / "pretrain")
        except (CollapseError, NonFiniteError) as problem:
            # That is a result too, and it would come again.
            return {**what, "failed": str(problem).splitlines()[0]}
        if run.device == "cpu":
            # Whatever the threads of the training, judging is the same.
            torch.set_num_threads(1)
        carve(place / "pretrain", out=place / "slim", force=True)
    preprocessing = preprocessing_of(recipe)
    labelled = read_evaluated(run, recipe, preprocessing)
    if run.untrained:
        write_untrained(run, recipe, labelled, preprocessing, out=place / "slim")
    return {**what, **trained, **evaluate(run, labelled, place / "slim")}


def train(run: Run, recipe: Recipe, out: Path) -> dict:
    """Pretrain from where the run is to its end; return what it cost and how its loss ended."""
    from edgecl.evaluate.cost import training_cost
    from edgecl.train.monitor import read_metrics
    from edgecl.train.pretrain import pretrain

    run_dir = RunDir(out)
    done = run_dir.record_file.exists() and run_dir.read().state == "done"
    if not done:
        pretrain(recipe, recipe_name=run.recipe, out=out, data=run.data, device=run.device, resume=True)
    record = run_dir.read()
    cost = training_cost(recipe, images=record.data.images)
    ends = [step for step in read_metrics(run_dir.metrics_file) if "diagonal" in step][-5:]
    return {
        "images": record.data.images,
        "steps": record.total_steps,
        "wall_s": record.wall_s,
        "training_flops": cost.total_flops,
        "projector_flops": cost.projector_flops * cost.images * cost.epochs,
        "rate_flops": cost.rate_flops * cost.rate_share * cost.images * cost.epochs,
        "diagonal": statistics.mean(step["diagonal"] for step in ends),
        "off_diagonal_rms": statistics.mean(step["off_diagonal_rms"] for step in ends),
        "plateau": record.plateau.words if record.plateau else None,
        "versions": record.versions,
    }


def limit_of(run: Run, recipe: Recipe) -> int | None:
    return min((limit for limit in (recipe.data.limit, run.learn_from) if limit), default=None)


def check_evaluated(run: Run, recipe: Recipe) -> None:
    """Refuse what could not be evaluated, before hours are spent on it."""
    from edgecl.evaluate.labelled import check_labelled

    test = None if run.evaluate_on == DEMO_VALIDATION else run.evaluate_on
    check_labelled(run.data, test=test, per_class=run.labels_per_class, limit=limit_of(run, recipe))


def read_evaluated(run: Run, recipe: Recipe, preprocessing: dict):
    """Read the run's images with their labels, and those to evaluate on."""
    import torch

    from edgecl.data import demo_images
    from edgecl.evaluate.labelled import Part, read_labelled

    limit = limit_of(run, recipe)
    if run.evaluate_on != DEMO_VALIDATION:
        return read_labelled(run.data, test=run.evaluate_on, preprocessing=preprocessing, limit=limit)
    labelled = read_labelled("demo", test=None, preprocessing=preprocessing, limit=limit)
    pictures, labels = demo_images.render("validation", DEMO_VALIDATION_IMAGES, size=demo_images.SIZE)
    held_out = Part(torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels))
    return dataclasses.replace(labelled, test=held_out, test_from=DEMO_VALIDATION)


def write_untrained(run: Run, recipe: Recipe, labelled, preprocessing: dict, *, out: Path) -> None:
    """Write the net as it is initialized, its norms set as a carved net's are."""
    from edgecl.evaluate.comparison import write_random

    record = SimpleNamespace(
        arch=recipe.host.arch,
        width=recipe.slim.width,
        stem_stride=recipe.host.stem_stride,
        preprocessing=preprocessing,
        data=run.data,
        recipe_name=run.recipe,
    )
    write_random(out, record, labelled, seed=run.seed, force=True)


def evaluate(run: Run, labelled, slim: Path) -> dict:
    """Evaluate the carved net's features: kNN, a linear probe, a probe on few labels, RankMe."""
    import torch

    from edgecl.data.loading import normalize
    from edgecl.evaluate.probe import load_feature_net, probe_net
    from edgecl.metrics.collapse import extract_features, rank_me

    net, record = load_feature_net(slim)
    preprocessing = record.preprocessing
    net.to("cuda" if run.device != "cpu" and torch.cuda.is_available() else "cpu")
    found = probe_net(
        net,
        labelled,
        preprocessing=preprocessing,
        labels_per_class=run.labels_per_class,
        draws=run.draws,
        made_from=None,
    ).record
    images = labelled.train.images
    spread = images[:: max(1, len(images) // RANKME_IMAGES)][:RANKME_IMAGES]
    features = extract_features(
        net, spread, normalize=lambda part: normalize(part, preprocessing.mean, preprocessing.std)
    )
    return {
        "knn_top1": found.knn_top1,
        "linear_top1": found.linear_top1,
        "few": found.few_label_top1.draws,
        "labels_per_class": run.labels_per_class,
        "rankme": rank_me(features),
        "features": features.shape[1],
        "n_train": found.n_train,
        "n_evaluated": found.n_test,
    }


def conditions(run: Run) -> dict:
    """Say on what a run is finished."""
    import torch

    on_gpu = run.device != "cpu" and torch.cuda.is_available()
    name, flags = processor()
    return {
        "processor": name,
        "isa": flags,
        "played": {key: os.environ[key] for key in PLAYED if key in os.environ},
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "threads": torch.get_num_threads(),
    }


def _terminate(number: int, frame: object) -> None:
    raise SystemExit(STOPPED)


def _run_process(directory: Path, run: Run) -> None:
    """Claim a run, finish it and add its line; exits IN_USE or STOPPED where it does not come to that."""
    # While it trains, the run itself sees to both signals.
    signal.signal(signal.SIGTERM, _terminate)
    place = directory / "runs" / run.key
    with contextlib.ExitStack() as claim:
        try:
            claim.enter_context(hold(place, what="run"))
        except ArtifactError as problem:
            say(f"edgecl: {problem}")
            raise SystemExit(IN_USE) from None
        if run.identity in read_results(directory):  # since the list was looked through
            return
        try:
            append_result(directory, finish(run, place))
        except (Preempted, KeyboardInterrupt) as stopped:
            say(f"edgecl: {stopped}")
            raise SystemExit(STOPPED) from None
        except EdgeclError as problem:
            say(f"edgecl: {problem}")
            raise SystemExit(1) from None


# --- tables ---


def spread(values: Sequence[float], *, digits: int = 1) -> str:
    """Write a mean with its interval over seeds; one seed has none."""
    if not values:
        return "–"
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) < 2:
        return text
    low, high = mean_interval(values)
    return f"{text} [{low:.{digits}f}, {high:.{digits}f}]"


def paired(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Write the mean difference over seeds with its interval, and whether that leaves out zero."""
    differences = [x - y for x, y in zip(ours, theirs, strict=True)]
    if not differences:
        return "–"
    if len(differences) < 2:
        return f"{differences[0]:+.1f} (one seed)"
    low, high = mean_interval(differences)
    unresolved = "" if low > 0 or high < 0 else ", not resolved"
    return f"{statistics.mean(differences):+.1f} [{low:.1f}, {high:.1f}]{unresolved}"


def state_of(run: Run, directory: Path) -> str:
    """Say how far a run without a result is."""
    record_file = directory / "runs" / run.key / "pretrain" / RunDir.RECORD
    if not record_file.exists():
        return "not begun"
    record = json.loads(record_file.read_text())
    return f"step {record['step']} of {record['total_steps']}"


if __name__ == "__main__":
    told = json.loads(sys.argv[2])
    _run_process(Path(sys.argv[1]), Run(**{**told, "assignments": tuple(told["assignments"])}))
