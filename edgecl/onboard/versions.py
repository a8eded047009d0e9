"""Whether a version lies within a target's range, whatever a vendor puts behind the numbers."""

import re
from typing import Tuple


def version_fits(version: str, specifiers: str) -> bool:
    """Return whether a version such as '10.3.0.26' lies within specifiers such as '>=10.3,<10.8'.

    Numbers are compared as numbers, and no further than the specifier goes: 10.3.0 is '==10.3' and '<=10.3'.
    """
    numbers = _numbers(version)
    for operator, bound in re.findall(r"(>=|<=|==|<|>)\s*(\d+(?:\.\d+)*)", specifiers):
        limit = _numbers(bound)
        seen = (numbers + (0,) * len(limit))[: len(limit)]
        if not {
            ">=": seen >= limit,
            "<=": seen <= limit,
            "==": seen == limit,
            "<": seen < limit,
            ">": seen > limit,
        }[operator]:
            return False
    return True


def _numbers(version: str) -> Tuple[int, ...]:
    begin = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in begin.group(0).split(".")) if begin else ()
