"""Random numbers that are functions of (seed, epoch, index), and of nothing else.

There is no generator and so no state: which worker, which process or which restart asks for the
numbers of an image cannot change them.

Source: the mixing step is SplitMix64's (Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195).
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(
    seed: int, epoch: int, indices: NDArray[np.integer[Any]], *, stream: str, count: int
) -> NDArray[np.float64]:
    """Return uniform numbers that depend on the seed, the epoch and the image alone.

    Args:
        indices: (N,) images, >= 0.
        stream: what the numbers are for; another name gives independent numbers.
        count: numbers per image.

    Returns:
        (N, count) in [0, 1), multiples of 2**-53.
    """
    bits = random_uint64(seed, epoch, indices, stream=stream, count=count)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def random_uint64(
    seed: int, epoch: int, indices: NDArray[np.integer[Any]], *, stream: str, count: int
) -> NDArray[np.uint64]:
    """Draw like `uniforms`, whole numbers: (N, count) of 64 bits."""
    keys = _absorb(_key(seed, epoch, stream), np.asarray(indices).astype(np.uint64))
    return _absorb(keys[:, None], np.arange(count, dtype=np.uint64)[None, :])


def permutation(seed: int, epoch: int, length: int, *, stream: str = "order") -> NDArray[np.int64]:
    """Shuffle 0 … length - 1, each epoch differently.

    Returns:
        (length,) every index once.
    """
    keys = _absorb(_key(seed, epoch, stream), np.arange(length, dtype=np.uint64))
    return np.argsort(keys, kind="stable").astype(np.int64)


def _key(seed: int, epoch: int, stream: str) -> NDArray[np.uint64]:
    name = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little")
    key = np.array([name], dtype=np.uint64)
    for word in (seed, epoch):
        key = _absorb(key, np.array([word], dtype=np.uint64))
    return key


def _absorb(key: NDArray[np.uint64], word: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # Mixing the word before it meets the key keeps (1, 2) and (2, 1), or neighbors, apart.
    return _mix(key ^ _mix(word * _GOLDEN + _GOLDEN))


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
