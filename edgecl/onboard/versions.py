"""Version ranges such as '>=10.3,<10.8', compared as PEP 440 compares releases; what a vendor appends is ignored.

Devices need not have the library packaging; the tests hold this to it.
"""

import operator
import re
from typing import List, Tuple

Version = Tuple[int, ...]

_BOUND = re.compile(r"(>=|<=|==|<|>)\s*(\d{1,9}(?:\.\d{1,9})*)")
_HOLDS = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}


def numbers_of(version: str) -> Version:
    """Return the release numbers of a version: (10, 3, 0, 26) for '10.3.0.26', (1, 20) for '1.20+cpu'."""
    begin = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in begin.group(0).split(".")) if begin else ()


def bounds_of(versions: str) -> List[Tuple[str, Version]]:
    """Return the bounds of a range as operator and version; an empty range has none.

    Raises:
        ValueError: a part is not one of >=, <=, ==, < and > with a version.
    """
    bounds = []
    for part in filter(None, (part.strip() for part in versions.split(","))):
        found = _BOUND.fullmatch(part)
        if not found:
            raise ValueError("'%s' is no bound of versions; write a range as in '>=10.3,<10.8'" % part)
        bounds.append((found.group(1), numbers_of(found.group(2))))
    return bounds


def holds(version: Version, sign: str, bound: Version) -> bool:
    """Return whether a version lies on its side of a bound; missing numbers count as 0."""
    longest = max(len(version), len(bound))
    left, right = (numbers + (0,) * (longest - len(numbers)) for numbers in (version, bound))
    return bool(_HOLDS[sign](left, right))


def version_fits(version: str, versions: str) -> bool:
    """Return whether a version lies in a range; see `bounds_of` for its form and error."""
    return all(holds(numbers_of(version), sign, bound) for sign, bound in bounds_of(versions))
