"""Every error the device code raises on purpose.

OnboardError                a problem, and what to do next
├── BundleError             a bundle: missing, torn, changed, or not what its manifest says
├── DisagreementError       outputs further from torch than the manifest allows
└── DeviceError             a runtime or device that is not there, or cannot do what was asked
"""

from typing import Any, Dict, Optional


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
