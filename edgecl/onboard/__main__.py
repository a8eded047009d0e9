"""`python3 onboard.pyz VERB`: check, build, verify, measure or use a bundle on this device; one JSON object on stdout."""

import argparse
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, Dict, List, Optional

from .bundle import MANIFEST, PRECISIONS, write_whole
from .errors import BundleError, DeviceError, OnboardError, bounded, cannot_import, printable
from .runtimes import TRTEXEC, option_names

_UNFORESEEN = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


def main(arguments: Optional[List[str]] = None) -> int:
    """Run one verb and return its exit status: 0 done, 1 a named error, a failed check or an unreadable picture, 2 usage.

    stdout, or the file of --out, gets one JSON object: the record, or
    `{"error": {"name", "problem", "hint", "record"}}`. stderr gets progress, the doctor's checks and the error
    in words.
    """
    if arguments is None:
        arguments = sys.argv[1:]
    if arguments[:1] == ["remote"]:  # the other end of `edgecl ... --host`; nothing for people
        from .remote import serve

        return serve(arguments[1:])
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.bundle is None and getattr(options, "target", None) is None:
        options.bundle = _beside()
    if options.bundle is None and options.verb != "doctor":
        parser.error("the following arguments are required: BUNDLE")
    refused = None if options.out is None else _why_not_into(Path(options.out))
    if refused:  # now, not after minutes of measuring
        _say("edgecl: cannot write '%s': %s" % (options.out, refused))
        return 1
    status = 0
    try:
        record = _run_named(options)
        if options.verb == "doctor":
            _say("\n".join(_in_words(record)))
            status = 0 if record["ok"] else 1
        elif options.verb == "predict" and record["unreadable"]:
            _say("edgecl: %d of %d pictures could not be read" % (record["unreadable"], record["images"]))
            status = 1
    except OnboardError as error:
        _say("edgecl: %s" % error.problem)
        if error.hint:
            _say("  hint: %s" % error.hint)
        about: Dict[str, Any] = {"name": error.name, "problem": error.problem, "hint": error.hint}
        record, status = {"error": dict(about, record=error.record)}, 1
    text = json.dumps(record, allow_nan=False)
    if options.out is None:
        print(text)
        return status
    try:
        write_whole(Path(options.out), (text + "\n").encode("utf-8"))
    except OSError as exc:
        _say("edgecl: cannot write '%s': %s" % (options.out, exc.strerror))
        return 1
    return status


def program() -> int:
    """Run one verb as a process of its own, which Ctrl-C ends at once.

    Python's own handler waits until the runtime returns, and a net may loop for ever.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell may have it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return main()


def _say(text: str) -> None:
    """Write to stderr; all that this code tells people goes through here, since strangers' words are in it."""
    print(printable(bounded(text)), file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="onboard.pyz", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    verbs.required = True  # no argument of add_subparsers before Python 3.7
    doctor = verbs.add_parser("doctor", help="check what would fail, and how to fix it")
    doctor.add_argument(
        "--target", metavar="FILE", help="a target as JSON, where no bundle says what it needs"
    )
    build = verbs.add_parser("build", help="build engines ahead of verify and bench")
    verify = verbs.add_parser("verify", help="check hashes and reference outputs")
    bench = verbs.add_parser("bench", help="measure latency, and energy where the board has a power monitor")
    predict = verbs.add_parser("predict", help="name what is on pictures")
    predict.add_argument(
        "--precision", choices=PRECISIONS, help="which net to run (default: the bundle's own)"
    )
    predict.add_argument("--top", type=int, default=5, help="classes to name of each picture (default 5)")
    for verb in (build, verify, bench):
        verb.add_argument(
            "--precision",
            action="append",
            choices=PRECISIONS,
            help="repeatable (default: %s)" % ("the bundle's own" if verb is bench else "all of the bundle"),
        )
    for verb in (verify, bench, predict):
        verb.add_argument(
            "--runtime",
            choices=[*option_names(), *([TRTEXEC] if verb is bench else ())],
            help="instead of the one the bundle is made for",
        )
    bench.add_argument("--duration-s", type=float, default=10.0, help="seconds to sample for (default 10)")
    bench.add_argument("--threads", type=int, help="threads to compute with (default: every core available)")
    bench.add_argument("--no-power", action="store_true", help="do not read the power rails")
    predict.add_argument("bundle", metavar="BUNDLE", help="its directory, such as .")
    predict.add_argument("pictures", metavar="IMAGE|FOLDER", nargs="+", help="what to look at")
    for verb in (doctor, build, verify, bench):
        verb.add_argument(
            "bundle",
            metavar="BUNDLE",
            nargs="?",
            help="its directory (default: where onboard.pyz lies, if a bundle is there)",
        )
    for verb in (doctor, build, verify, bench, predict):
        verb.add_argument("--out", metavar="FILE", help="write the JSON object here instead of printing it")
        verb.add_argument("--json", action="store_true", help="as always; taken because `edgecl` has it")
    return parser


def _beside() -> Optional[str]:
    """Return the directory of the zip file this code runs from, where that is a bundle's."""
    archive = getattr(globals().get("__loader__"), "archive", None)
    if archive is None:
        return None
    directory = Path(archive).resolve().parent
    return str(directory) if (directory / MANIFEST).is_file() else None


def _why_not_into(file: Path) -> Optional[str]:
    """Return why a file cannot be written, as far as that shows beforehand."""
    folder = file.parent
    if not folder.is_dir():
        return "there is no folder '%s'" % folder
    if file.is_dir():
        return "it is a folder"
    return None if os.access(str(folder), os.W_OK) else "the folder '%s' is not yours to write to" % folder


def _in_words(record: Dict[str, Any]) -> List[str]:
    """Return what a doctor found as `edgecl doctor` prints it: the device, and a line per check, its fix below it."""
    device, checks = record["device"], record["checks"]
    about = [device["name"], device["os"], device["jetpack"] and "JetPack %s" % device["jetpack"]]
    lines = [", ".join(part for part in about if part)]
    width = max(len(one["name"]) for one in checks)
    for one in checks:
        status = "FAIL" if one["status"] == "fail" else one["status"]
        lines.append("%-4s  %-*s  %s" % (status, width, one["name"], one["found"]))
        if one["fix"]:
            lines.append("%*s-> %s" % (width + 8, "", one["fix"]))
    return lines


def _run_named(options: argparse.Namespace) -> Dict[str, Any]:
    """Run the verb; what nobody foresaw of a bundle becomes an error with the bundle's name.

    The hash of a manifest is no proof of who made it, and its form is checked only as far as the device code relies on it.
    """
    try:
        return _run(options)
    except _UNFORESEEN as exc:
        if options.bundle is None:
            raise
        place = traceback.extract_tb(sys.exc_info()[2])[-1]
        where = "%s:%d" % (Path(place.filename).name, place.lineno or 0)
        raise BundleError(
            "'%s' is not what edgecl writes (%s: %s, at %s)"
            % (options.bundle, type(exc).__name__, exc, where),
            "do not use this bundle if a stranger made it; else export it again, and report this if it stays",
        ) from exc
    except OSError as exc:
        raise DeviceError(
            "'%s' cannot be read or written: %s" % (exc.filename or options.bundle, exc.strerror)
        ) from exc


def _run(options: argparse.Namespace) -> Dict[str, Any]:
    if options.verb == "doctor":  # the one verb that works without NumPy: it tells that it is missing
        from .doctor import doctor

        return doctor(options.bundle, target=_read_target(options.target))
    _need_numpy()
    from .bench import PROGRESS, bench

    def report(line: str) -> None:
        _say(PROGRESS + line)

    if options.verb == "predict":
        from .predict import predict

        chosen = {name: getattr(options, name) for name in ("top", "precision", "runtime")}
        return predict(options.bundle, options.pictures, report=report, **chosen)
    bundle, common = options.bundle, {"precisions": options.precision, "report": report}
    if options.verb == "verify":
        from .verify import verify

        return verify(bundle, runtime=options.runtime, **common)
    if options.verb == "build":
        from .build import build

        return build(bundle, **common)
    seconds, threads, power = options.duration_s, options.threads, not options.no_power
    return bench(bundle, runtime=options.runtime, duration_s=seconds, threads=threads, power=power, **common)


def _need_numpy() -> None:
    try:
        import numpy  # noqa: F401
    except ImportError as exc:
        raise cannot_import("NumPy", exc, "sudo apt install python3-numpy") from exc


def _read_target(path: Optional[str]) -> Optional[Dict[str, Any]]:
    if path is None:
        return None
    try:
        target = json.loads(Path(path).read_bytes().decode("utf-8"))
    except (OSError, ValueError) as exc:
        raise BundleError("cannot read the target '%s': %s" % (path, exc), None) from exc
    if not isinstance(target, dict) or "runtime" not in target:
        raise BundleError("'%s' is not a target as JSON: it has no runtime" % path, None)
    return target


if __name__ == "__main__":
    sys.exit(program())
