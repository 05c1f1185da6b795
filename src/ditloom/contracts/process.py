"""A noise process: how data becomes noise, what the network predicts, its loss, and what a prediction says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, TypeAlias

from torch import Tensor
from torch.utils._pytree import register_pytree_node

from ditloom.contracts import rng


class Components(dict[str, Tensor]):
    """Named tensors that add and scale like one tensor, so that a solver's equation serves both."""

    def _with(self, other: Any, op: Callable[[Any, Any], Tensor]) -> Components:
        pairs = other.items() if isinstance(other, Mapping) else ((k, other) for k in self)
        return Components({k: op(self[k], v) for k, v in pairs})

    def __add__(self, other: Any) -> Components:
        return self._with(other, lambda a, b: a + b)

    def __sub__(self, other: Any) -> Components:
        return self._with(other, lambda a, b: a - b)

    def __mul__(self, other: Any) -> Components:
        return self._with(other, lambda a, b: a * b)

    def __truediv__(self, other: Any) -> Components:
        return self._with(other, lambda a, b: a / b)

    def __neg__(self) -> Components:
        return self * -1

    def to(self, *args: Any, **kwargs: Any) -> Components:
        """`Tensor.to` of every component."""
        return Components({k: v.to(*args, **kwargs) for k, v in self.items()})

    __radd__ = __add__
    __rmul__ = __mul__


register_pytree_node(
    Components,
    lambda c: (list(c.values()), list(c)),
    lambda values, keys: Components(zip(keys, values, strict=True)),
    serialized_type_name="ditloom.contracts.process.Components",
)

Signal: TypeAlias = Tensor | Components


@dataclass(frozen=True)
class Loss:
    """Per-sample loss [B] to minimise, and its unweighted parts [B] by name; "mse" is the one to compare runs by."""

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


class Estimate(ABC):
    """What one evaluation at (x, t) says. Conversions happen only when asked for."""

    x: Any
    t: Any
    prediction: Any

    @property
    @abstractmethod
    def x0(self) -> Any:
        """The estimate of the data."""

    @property
    def v(self) -> Any:
        """The velocity dx/dt in noise-level time; only continuous processes have one."""
        raise TypeError(f"{type(self).__name__} has no velocity: use a sampler made for this process, such as 'ddpm'")

    def clipped(self, limit: float) -> Estimate:
        """The same with the data estimate clamped to [-limit, limit]."""
        raise TypeError(f"{type(self).__name__} cannot be clipped")


class Process(ABC):
    """How data is noised and what is learned from it. Implementations are frozen dataclasses of their settings.

    `t` in [0, 1] is the noise level: 0 data, 1 noise; a float, [B], or [B, N, ...] aligned with the leading axes of
    x (noise level per token or frame). x, noise and prediction are a tensor, or `Components` for a joint process.
    """

    spacing: ClassVar[str] = "uniform"  # the grid of noise levels a sampler takes unless told otherwise
    times: ClassVar[str] = "uniform"  # the training-time distribution a trainer takes unless told otherwise

    @property
    def span(self) -> tuple[float, float]:
        """Noise levels (lowest, highest) at which network and target are well defined."""
        return 0.0, 1.0

    def draw(self, shape: Any, seed: int, name: str, indices: Sequence[int], step: int = 0, evaluation: int = 0) -> Any:
        """The random numbers this process consumes for `shape` per image: standard normal unless it says otherwise."""
        return rng.normal(shape, seed, name, indices, step, evaluation)

    @abstractmethod
    def prior(self, noise: Any, t: float = 1.0) -> Any:
        """Where sampling starts at level t, from one `draw`."""

    @abstractmethod
    def add_noise(self, x0: Any, noise: Any, t: Any) -> Any:
        """x_t: the data x0 at noise level t."""

    @abstractmethod
    def target(self, x0: Any, noise: Any, t: Any) -> Any:
        """What the network should predict."""

    @abstractmethod
    def loss(self, prediction: Any, x0: Any, noise: Any, t: Any, mask: Any = None) -> Loss:
        """Per-sample losses [B]; `mask` (broadcastable to x0) leaves padding or clean parts out of the means."""

    @abstractmethod
    def estimate(self, x: Any, t: Any, prediction: Any) -> Estimate:
        """What a prediction made at (x, t) says."""

    @abstractmethod
    def step(self, estimate: Estimate, t_next: float, noise: Any) -> Any:
        """One ancestral step from the estimate's level to t_next, with one `draw`."""

    def scale_input(self, x: Any, t: Any) -> Any:
        """x as the network wants it."""
        return x

    def network_time(self, t: Any) -> Any:
        """t as it is given to the backbone, whose `TimeInput` then makes its native time of it."""
        return t

    def split(self, prediction: Any) -> tuple[Any, Any]:
        """The part of a prediction that guidance acts on, and the rest (a learned variance) or None."""
        return prediction, None

    def join(self, guided: Any, rest: Any) -> Any:
        """The inverse of `split`."""
        return guided

    def guide(self, strong: Any, weak: Any, scale: float) -> Any:
        """Extrapolate from the weak through the strong prediction: ``weak + scale (strong - weak)``."""
        return weak + scale * (strong - weak)

    def config(self) -> dict[str, Any]:
        """Plain values for config.json, the registry name under "name"."""
        return {"name": type(self).__registration__.name, **asdict(self)}  # type: ignore[call-overload]
