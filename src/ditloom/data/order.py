"""Which example the n-th image of a run is: a pure function of (seed, number of examples, n).

Epoch e of a data set of N examples is images eN to eN + N - 1, and shows a pseudo-random permutation of all N. The
permutation is a Feistel network over the smallest even power of two that holds N, walked along its cycles until it
lands below N (Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). It needs no memory and no state, so a
run resumes at any image count, with any batch size, number of ranks and workers, in the middle of an epoch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8
Integers = NDArray[np.uint64]
_NO_KEYS: Integers = np.empty((0, ROUNDS), dtype=np.uint64)


@dataclass(frozen=True)
class ImageOrder:
    """`order.examples(start, stop)`: the example of each image count in [start, stop), int64."""

    length: int
    seed: int = 0
    shuffle: bool = True

    def examples(self, start: int, stop: int) -> NDArray[np.int64]:
        return self.at(np.arange(start, stop, dtype=np.int64))

    def at(self, images: NDArray[np.int64]) -> NDArray[np.int64]:
        """Example of each global image index."""
        epochs, positions = np.divmod(images, self.length)
        if not self.shuffle:
            return positions
        shown, which = np.unique(epochs, return_inverse=True)
        keys = np.stack([round_keys(self.seed, int(epoch)) for epoch in shown]) if len(shown) else _NO_KEYS
        return permuted(positions, self.length, keys[which])


def round_keys(seed: int, epoch: int) -> Integers:
    """One 64-bit key for each round, from a hash of (seed, epoch)."""
    digest = hashlib.blake2b(f"{seed}/order/{epoch}".encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def permuted(positions: NDArray[np.int64], length: int, keys: Integers) -> NDArray[np.int64]:
    """The place of each position [n] in the permutation of range(length) that its round keys [n, ROUNDS] pick."""
    half = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
    values = _feistel(positions.astype(np.uint64), half, keys)
    while (outside := values >= length).any():
        values[outside] = _feistel(values[outside], half, keys[outside])
    return values.astype(np.int64)


def _feistel(values: Integers, half: np.uint64, keys: Integers) -> Integers:
    """A bijection of range(2 ** (2 * half))."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys.T:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return (left << half) | right


def _mixed(values: Integers) -> Integers:
    """The 64-bit finaliser of SplitMix64 (Steele et al. 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
