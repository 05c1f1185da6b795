"""A measurement: a number with the protocol it was taken under."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Protocol:
    """Everything that must be equal before two numbers may be compared."""

    metric: str
    model: str = ""
    extractor: str = ""
    samples: int = 0
    sampler: str = ""
    steps: int = 0
    guidance: str = ""
    seeds: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """Eight hex digits that name the protocol."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True, default=str).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Measurement:
    """A value, its protocol, and an error bar where there is one."""

    value: float
    protocol: Protocol
    error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the protocol's hash among them."""
        return {"value": self.value, "error": self.error, "protocol": asdict(self.protocol), "hash": self.protocol.hash}
