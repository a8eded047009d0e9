"""Every error the device code raises on purpose.

OnboardError                a problem, and what to do next
├── BundleError             a bundle: missing, torn, changed, or not what its manifest says
├── DisagreementError       outputs further from torch than the manifest allows
└── DeviceError             a runtime or device that is not there, or cannot do what was asked
"""

import unicodedata
from typing import Any, Dict, Optional

# They turn the order of what follows on the screen: U+061C, LRM, RLM, the embeddings and overrides, the isolates.
_BIDIRECTIONAL = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
# An error says what is wrong; it does not quote whole files.
_LONGEST = 4000


def printable(text: str) -> str:
    """Return a text as a terminal may show it: what could steer it, or turn its letters, as visible escapes.

    Newlines and tabs stay. `edgecl.errors` has a twin for the host, which this code cannot import.
    """
    if len(text) > _LONGEST:
        text = text[:_LONGEST] + "..."
    return "".join(_escape(sign) if _is_unsafe(sign) else sign for sign in text)


def _is_unsafe(sign: str) -> bool:
    return sign not in "\n\t" and (unicodedata.category(sign) in ("Cc", "Cs") or sign in _BIDIRECTIONAL)


def _escape(sign: str) -> str:
    code = ord(sign)
    return "\\x%02x" % code if code < 256 else "\\u%04x" % code


class OnboardError(Exception):
    """A problem the user can act on.

    Args:
        problem: what is wrong, with the offending name and both values; no full stop.
        hint: what to do next.
    """

    name = "onboard"
    """How the error is called where it leaves the process, as JSON."""

    def __init__(self, problem: str, hint: Optional[str] = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint


class BundleError(OnboardError):
    """A bundle that is missing, torn, changed, or not what its manifest says."""

    name = "bundle"


class DisagreementError(OnboardError):
    """Outputs further from torch than the manifest allows; `record` holds the numbers seen."""

    name = "disagreement"

    def __init__(
        self, problem: str, hint: Optional[str] = None, record: Optional[Dict[str, Any]] = None
    ) -> None:
        super().__init__(problem, hint)
        self.record = record or {}


class DeviceError(OnboardError):
    """A runtime or device that is not there, or cannot do what was asked."""

    name = "device"
