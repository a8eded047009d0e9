"""`python -m edgecl.onboard`: verify or measure a bundle on this device; one JSON object on stdout."""

import argparse
import json
import sys
from typing import Any, Dict, List, Optional

from .errors import OnboardError


def main(arguments: Optional[List[str]] = None) -> int:
    """Run one verb and return its exit status: 0 done, 1 a named error, 2 usage.

    stdout carries one JSON object: the record, or `{"error": {"name", "problem", "hint", "record"}}`.
    stderr carries progress, and the error in words.
    """
    parser = argparse.ArgumentParser(prog="edgecl.onboard", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    verbs.required = True  # no argument of add_subparsers before Python 3.7
    bench = verbs.add_parser("bench", help="measure latency")
    bench.add_argument("bundle", metavar="BUNDLE")
    bench.add_argument("--duration-s", type=float, default=10.0, help="seconds to sample for (default 10)")
    bench.add_argument("--threads", type=int, help="threads to compute with (default: every core available)")
    verify = verbs.add_parser("verify", help="check hashes and reference outputs")
    verify.add_argument("bundle", metavar="BUNDLE")
    options = parser.parse_args(arguments)
    try:
        record = _run(options)
    except OnboardError as error:
        print("edgecl: %s" % error.problem, file=sys.stderr)
        if error.hint:
            print("  hint: %s" % error.hint, file=sys.stderr)
        about: Dict[str, Any] = {"name": error.name, "problem": error.problem, "hint": error.hint}
        about["record"] = getattr(error, "record", None)
        print(json.dumps({"error": about}, allow_nan=False))
        return 1
    print(json.dumps(record, allow_nan=False))
    return 0


def _run(options: argparse.Namespace) -> Dict[str, Any]:
    if options.verb == "verify":
        from .verify import verify

        return verify(options.bundle)
    from .bench import PROGRESS, bench

    def report(line: str) -> None:
        print(PROGRESS + line, file=sys.stderr, flush=True)

    return bench(options.bundle, duration_s=options.duration_s, threads=options.threads, report=report)


if __name__ == "__main__":
    sys.exit(main())
