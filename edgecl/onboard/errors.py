"""Every error the device code raises on purpose.

OnboardError                a problem, and what to do next
├── BundleError             a bundle: missing, torn, changed, or not what its manifest says
├── DisagreementError       outputs further from torch than the manifest allows
├── DataError               pictures that are not there
└── DeviceError             a runtime or device that is not there, or cannot do what was asked
"""

import re
import sys
from typing import Any, Dict, Optional

# What steers a terminal (control characters but newline and tab), what turns the order of the letters that follow
# (U+061C, the marks, embeddings, overrides and isolates), the surrogates that stand for undecodable bytes in a file
# name, and what XML cannot hold.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
# An error says what is wrong; it does not quote whole files.
_LONGEST = 4000


def printable(text: object) -> str:
    """Return text that every output may show: what could steer a terminal, or turn its letters, as visible escapes.

    Newlines and tabs stay. The host uses it too.
    """
    return _UNSAFE.sub(_escape, str(text))


def bounded(text: str) -> str:
    """Cut a text that is too long for an error."""
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def _escape(match: Any) -> str:
    code = ord(match.group(0))
    return "\\x%02x" % code if code < 256 else "\\u%04x" % code


class OnboardError(Exception):
    """A problem the user can act on, with the offending name and both values; the hint says what to do next."""

    name = "onboard"
    """How the error is called where it leaves the process, as JSON."""
    record: Optional[Dict[str, Any]] = None
    """The numbers seen, where there are any."""

    def __init__(self, problem: str, hint: Optional[str] = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint


class BundleError(OnboardError):
    """A bundle that is missing, torn, changed, or not what its manifest says."""

    name = "bundle"

    def __init__(self, problem: str, hint: Optional[str] = "export the bundle again") -> None:
        super().__init__(problem, hint)


class DisagreementError(OnboardError):
    """Outputs further from torch than the manifest allows; `record` holds the numbers seen."""

    name = "disagreement"


class DataError(OnboardError):
    """Pictures that are not there."""

    name = "data"


class DeviceError(OnboardError):
    """A runtime or device that is not there, or cannot do what was asked."""

    name = "device"


def cannot_import(what: str, exc: Exception, hint: str) -> DeviceError:
    """Return the error for a library that this Python does not have, or cannot load."""
    return DeviceError("%s cannot be imported by %s: %s" % (what, sys.executable, exc), hint)
