"""Seeded damage: bytes, texts, and trees of JSON, each changed a little or beyond recognition."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

TEXTS = (
    "",
    "\0",
    "\x1b[2J\x1b]0;x\x07",
    "\u202egpj.exe\u2066",
    "a\nb: c",
    "x" * 300,
    "x" * 50_000,
    "../../etc/passwd",
    "/dev/zero",
    "~nobody-of-that-name/x",
    "<script>alert(1)</script><img src=x onerror=y>",
    "'\"`$(touch canary); touch canary",
    "| a | b |\n```\n# c",
    "nan",
    "\ud800",
    "http://[::1",
    "shards:pipe:touch canary",
    "shards:x{0..99999999}.tar",
    "{}{0}%s%n",
    "ünï 𝔘 \u200b",
)
NUMBERS = (
    0, -1, 1, 2, 7, 255, 65536, 10**5, 10**9, 2**31, 2**63, 2**64, 10**20, -(10**20), 10**310,
    0.5, -0.0, 1e-320, 1e300, -1e308, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
# Stand in a tree for what `json.dumps` cannot write.
DIGITS, DEEP = "@@digits@@", "@@deep@@"


class Mutator:
    """A source of damage that is a function of its seed alone."""

    def __init__(self, seed: str):
        self.random = random.Random(seed)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def pick(self, choices: Any) -> Any:
        return self.random.choice(list(choices))

    def value(self) -> Any:
        """Something of any type."""
        return self.random.choice(
            [
                lambda: self.pick(TEXTS),
                lambda: self.pick(NUMBERS),
                lambda: self.pick([None, True, False, [], {}, [[]], {"a": {}}]),
                lambda: [self.pick(NUMBERS) for _ in range(self.random.randrange(5))],
                lambda: {self.pick(TEXTS): self.pick(TEXTS)},
                lambda: [self.pick(TEXTS)] * self.random.choice([1, 3, 20_000]),
                lambda: self.nested(self.random.choice([5, 60, 400])),
                lambda: self.pick([DIGITS, DEEP]),
            ]
        )()

    def nested(self, depth: int) -> Any:
        value: Any = 1
        for _ in range(depth):
            value = [value] if depth % 2 else {"a": value}
        return value

    def tree(self, tree: Any) -> Any:
        """A copy of a JSON value with one to three places changed."""
        tree = copy.deepcopy(tree)
        for _ in range(self.random.choice([1, 1, 1, 2, 3])):
            holder, key = self.random.choice([*_places(tree)] or [(None, None)])
            if holder is None:
                return self.value()
            self._change(holder, key)
        return tree

    def _change(self, holder: Any, key: Any) -> None:
        what = self.random.randrange(10)
        if what < 6:
            holder[key] = self.value()
        elif what == 6:
            del holder[key]
        elif what == 7 and isinstance(holder, dict):
            holder[self.pick(TEXTS)] = holder.pop(key)
        elif what == 8 and isinstance(holder[key], (int, float)):
            holder[key] = -holder[key] * self.pick([1, 1000, 1e-9])
        elif what == 9:
            holder[key] = {"a": holder[key]} if self.chance(0.5) else [holder[key]]
        else:
            holder[key] = None

    def bytes(self, content: bytes) -> bytes:
        """A copy of some bytes with a few operations of a fuzzer on them."""
        data = bytearray(content)
        for _ in range(self.random.choice([1, 1, 2, 4, 16])):
            start = self.random.randrange(len(data) + 1)
            length = min(self.random.choice([1, 1, 2, 4, 8, 64, 512, 4096]), len(data) - start)
            end = start + length
            operation = self.random.randrange(8)
            if operation == 0 and start < len(data):
                data[start] ^= 1 << self.random.randrange(8)
            elif operation == 1:
                data[start:end] = self.random.randbytes(length)
            elif operation == 2:
                del data[start:end]
            elif operation == 3:
                data[start:start] = self.random.randbytes(length)
            elif operation == 4:
                data[start:end] = self.pick([b"\0", b"\xff", b"\x7f", b"0", b"7", b"\x80"]) * length
            elif operation == 5:
                data[start:start] = data[start:end]
            elif operation == 6:
                there = self.random.randrange(len(data) + 1)
                data[there : there + length] = data[start:end]
            elif self.chance(0.2):
                del data[start:]
        return bytes(data)

    def text(self, text: str) -> str:
        """A copy of a text with a few changes to its letters and lines."""
        lines = text.splitlines()
        for _ in range(self.random.choice([1, 1, 2, 4])):
            at = self.random.randrange(len(lines) + 1)
            operation = self.random.randrange(6)
            if operation == 0:
                lines.insert(at, self.pick(TEXTS))
            elif operation == 1 and lines:
                lines.insert(at, self.pick(lines))
            elif operation == 2 and at < len(lines):
                del lines[at]
            elif operation == 3 and at < len(lines):
                place = self.random.randrange(len(lines[at]) + 1)
                lines[at] = lines[at][:place] + self.pick(TEXTS) + lines[at][place:]
            elif operation == 4 and at < len(lines):
                lines[at] = lines[at][: self.random.randrange(len(lines[at]) + 1)]
            else:
                lines.insert(at, self.pick("[]{}=\"'#,.") * self.random.choice([1, 3, 3000]))
        return "\n".join(lines) + "\n"

    def toml(self, text: str) -> str:
        """A copy of TOML text with the values of one to three keys replaced, or the text itself changed."""
        if self.chance(0.3):
            return self.text(text)
        lines = text.splitlines()
        keys = [place for place, line in enumerate(lines) if "=" in line and not line.startswith("#")]
        for place in self.random.sample(keys, min(len(keys), self.random.choice([1, 1, 2, 3]))):
            key = lines[place].partition("=")[0]
            lines[place] = f"{key}= {self.literal()}"
        return "\n".join(lines) + "\n"

    def literal(self) -> str:
        """A TOML value."""
        return self.random.choice(
            [
                lambda: json.dumps(self.pick(TEXTS)),
                lambda: str(self.pick(NUMBERS)),
                lambda: self.pick(
                    ["true", "1979-05-27", "{}", "[]", "[[1]]", "bare", '"""', "-0", "0x1F", "1e999"]
                ),
                lambda: (
                    "[" + ", ".join(str(self.pick(NUMBERS)) for _ in range(self.random.randrange(1, 6))) + "]"
                ),
                lambda: "9" * self.random.choice([30, 5000]),
                lambda: "[" * (depth := self.random.choice([3, 100, 2000])) + "]" * depth,
                lambda: "[" + "1," * self.random.choice([10, 20_000]) + "]",
                lambda: "{a = " * (depth := self.random.choice([3, 100])) + "1" + "}" * depth,
            ]
        )()


def dumps(tree: Any) -> str:
    """JSON text of a tree, with what the placeholders stand for."""
    text = json.dumps(tree, indent=1)
    return text.replace(json.dumps(DIGITS), "9" * 5000).replace(json.dumps(DEEP), "[" * 3000 + "]" * 3000)


def _places(tree: Any) -> Any:
    """Every (container, key) in a tree."""
    waiting = [tree]
    while waiting:
        holder = waiting.pop()
        items = (
            holder.items()
            if isinstance(holder, dict)
            else enumerate(holder if isinstance(holder, list) else ())
        )
        for key, value in list(items):
            yield holder, key
            waiting.append(value)
