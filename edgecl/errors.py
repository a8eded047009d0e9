"""Every error edgecl raises on purpose.

EdgeclError                 exit 1: a problem, where it is, and what to do next
├── RecipeError             a recipe: unknown name, key or value
├── TargetError             a deployment target: unknown name, key or value
├── DataError               images: none found, too many unreadable, labels missing, batch larger than the data
├── ShapeError              a tensor of the wrong shape
├── SliceError              a slim net that is no prefix of its host
├── ArtifactError           a directory or file on disk: missing, in the way, of another kind, torn or changed
├── TrainingError           a run that must not go on
│   ├── CollapseError       the embedding lost its dimensions
│   └── NonFiniteError      a loss that is not a number
├── ProcessError            another process of the run that is gone or silent
├── ParityError             two forms of one net that disagree
└── DeviceError             a device or runtime that is not there

Preempted is none of them: a run that was asked to end, and has saved; exit 0, or 130 after Ctrl-C.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Mapping, Sequence

from edgecl.onboard.errors import printable as printable

# An error says what is wrong; it does not quote whole files.
LONGEST = 2000
# So many names can be looked through in an error.
_FEW = 60


class EdgeclError(Exception):
    """A problem the user can act on.

    Its text is `printable` and `bounded`, wherever it is written: names and values in it may be a stranger's.

    Args:
        problem: what is wrong, with the offending name and both values; no full stop.
        where: label -> place, each printed on a line of its own.
        hint: what to do next.
    """

    def __init__(self, problem: str, *, where: Mapping[str, object] | None = None, hint: str | None = None):
        self.problem = problem
        self.where = dict(where or {})
        self.hint = hint
        super().__init__(str(self))

    def __str__(self) -> str:
        rows = [(label, bounded(str(place))) for label, place in self.where.items()]
        if self.hint:
            rows.append(("hint", bounded(self.hint)))
        pad = max((len(label) for label, _ in rows), default=0) + 1
        lines = [bounded(self.problem), *(f"  {label + ':':<{pad}} {place}" for label, place in rows)]
        return printable("\n".join(lines))


class RecipeError(EdgeclError):
    """A recipe that cannot be read: unknown name, key or value."""


class TargetError(EdgeclError):
    """A deployment target that cannot be read: unknown name, key or value."""


class DataError(EdgeclError):
    """Images that cannot be used: none found, too many unreadable, labels missing."""


class ShapeError(EdgeclError):
    """A tensor of the wrong shape."""


class SliceError(EdgeclError):
    """A slim net that is not a prefix of its host."""


class ArtifactError(EdgeclError):
    """A directory or file that is missing, in the way, of another kind, torn or changed."""


class TrainingError(EdgeclError):
    """A training run that must not go on."""


class CollapseError(TrainingError):
    """An embedding that lost its dimensions."""


class NonFiniteError(TrainingError):
    """A loss that is not a number."""


class ProcessError(EdgeclError):
    """Another process of the run that is gone, or does not answer."""


class Preempted(Exception):  # noqa: N818 - an end that was asked for, not an error
    """A run that was asked to end and has saved where it is.

    Args:
        text: where it is, and the command that goes on from there.
        signal: how it was asked: SIGTERM, a scheduler's, or SIGINT, Ctrl-C.
    """

    def __init__(self, text: str, *, signal: int):
        super().__init__(text)
        self.signal = signal


class ParityError(EdgeclError):
    """Two forms of one net that disagree by more than the tolerance."""


class DeviceError(EdgeclError):
    """A device or runtime that is not there."""


def bounded(text: str, length: int = LONGEST) -> str:
    """Cut a text that is longer than so many characters, and say by how much."""
    return text if len(text) <= length else f"{text[:length]}… ({len(text) - length:,} more characters)"


def tell(line: str) -> None:
    """Write a line for the user on stderr, `printable` and `bounded`."""
    sys.stderr.write(f"edgecl: {printable(bounded(line))}\n")


def first_line(problem: Exception) -> str:
    """Return the first line of what an exception says, which may be nothing; libraries add pages to theirs."""
    return (str(problem).splitlines() or [""])[0]


def counted(count: int, noun: str) -> str:
    """Write a count with its noun, which takes an s: 1 thread, 2 threads."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def first_of(names: Sequence[str]) -> str:
    """Name the first five, with a sign where there are more."""
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "")


def near_matches(name: str, known: Iterable[str]) -> str:
    """Say which known names are close to a wrong one, for an error's hint."""
    known = sorted(known)
    by_lower = {one.lower(): one for one in known}
    close = [by_lower[one] for one in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)]
    if close:
        return "did you mean " + " or ".join(repr(match) for match in close) + "?"
    if len(known) > _FEW:
        return f"none of the {len(known):,} known names is near it"
    # Names that hold a comma need another sign between them.
    return "known: " + ("; " if any("," in one for one in known) else ", ").join(known)
