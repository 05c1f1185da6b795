"""What a stored value was made of, so that a mismatch can be seen: tensors by identity and version, weights, rows."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from torch import Tensor, nn

from ditloom.contracts.condition import Condition


class Same:
    """Equal only to the very same, unwritten tensor; holding it keeps its identity from being used again."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor):
        self.tensor, self.version = tensor, 0 if tensor.is_inference() else tensor._version

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.tensor is other.tensor and self.version == other.version

    def __hash__(self) -> int:
        return id(self.tensor)


def of_condition(condition: Condition) -> Hashable:
    """The identity and version of every tensor of a condition."""
    return tuple((name, Same(tensor)) for name, tensor in condition.tensors().items())


class Weights:
    """The weights of a network, as a number that grows when one is written in place; looked up once a step."""

    def __init__(self, network: nn.Module):
        self.network = network
        self._tensors: list[Tensor] | None = None
        self._step: int | None = None
        self._version = 0

    def forget(self) -> None:
        """Look at the weights again, also on the same step: another run begins."""
        self._step = None

    def version(self, step: int) -> int:
        """The sum of all version counters."""
        if step != self._step:
            if self._tensors is None:
                self._tensors = [
                    t for t in (*self.network.parameters(), *self.network.buffers()) if not t.is_inference()
                ]
            self._step = step
            self._version = sum([t._version for t in self._tensors])
        return self._version


class Marks:
    """Short numbers for fingerprints: equal fingerprints, equal numbers."""

    def __init__(self) -> None:
        self._known: dict[Hashable, int] = {}

    def __call__(self, *made_of: Hashable) -> int:
        return self._known.setdefault(made_of, len(self._known))


MadeOf = Mapping[str, Hashable]
"""By branch: what a value is made of, mostly a mark."""


def of_tokens(tokens: Tensor) -> Hashable:
    """What of a batch of tokens [B, n, D] a stored value depends on besides their layout."""
    return tokens.dtype, tokens.device


def of_latent(x: Tensor) -> Hashable:
    """What of a latent batch a stored prediction depends on."""
    return tuple(x.shape), x.dtype, x.device
