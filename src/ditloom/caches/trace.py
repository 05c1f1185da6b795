"""What one plain run shows of a model: how much each thing that caches look at changes from step to step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditloom.contracts.clock import Clock, Rows, Schedule
from ditloom.contracts.method import Handler, Tap
from ditloom.sites.surface import Surface

INDICATORS = ("modulated_in", "time_embedding")
"""What TeaCache may look at: what the first block reads, or the time alone."""
KINDS = ("attn", "cross", "temporal", "mlp")
ENTERS, LEAVES = "block_in", "block_out"


@dataclass(frozen=True)
class Trace:
    """Per picture and step [N, S]; NaN where there is nothing before to compare with.

    indicators, output: relL1 to the step before, of TeaCache's indicators and of the leading branch's prediction.
    growth: MagCache's gamma, the mean over tokens of ``|R_s| / |R_{s-1}|`` with R the change of the whole stack.
    cosine, ratio, size: of ``d_s = e_s - e_{s-1}`` with e the predictions of all branches: ``cos(d_s, d_{s-1})``,
    ``|d_s| / |d_{s-1}|`` and ``|d_s| / |e_s|``. sites: relL1 of every attention and feed-forward output, by site.
    """

    indicators: Mapping[str, Tensor]
    output: Tensor
    growth: Tensor
    cosine: Tensor
    ratio: Tensor
    size: Tensor
    sites: Mapping[str, Tensor]

    @property
    def steps(self) -> int:
        """Steps S of the runs."""
        return self.output.shape[1]

    def pairs(self, indicator: str) -> tuple[Tensor, Tensor]:
        """(change of an indicator, change of the output) over all pictures and steps that have one."""
        x, y = self.indicators[indicator][:, 1:].flatten(), self.output[:, 1:].flatten()
        good = x.isfinite() & y.isfinite()
        return x[good], y[good]

    @classmethod
    def joined(cls, traces: Sequence[Trace]) -> Trace:
        """The traces of several batches as one."""
        first = traces[0]

        def cat(name: str) -> Any:
            if isinstance(getattr(first, name), Tensor):
                return torch.cat([getattr(t, name) for t in traces])
            return {key: torch.cat([getattr(t, name)[key] for t in traces]) for key in getattr(first, name)}

        return cls(**{name: cat(name) for name in cls.__dataclass_fields__})


class Recorder(Handler):
    """Watches one plain run, whose trace it then has; nothing is changed and nothing is reused."""

    key = "calibrate"

    def __init__(self, sites: bool = True):
        self.with_sites = sites
        self._before: dict[str, Any] = {}
        self._rows: dict[str, dict[int, Tensor]] = {}
        self._steps = 0

    def taps(self, schedule: Schedule, surface: Surface) -> Sequence[Sequence[Tap]]:
        self._steps, self._last = schedule.steps, surface.blocks - 1
        leading = ("cond",) if "cond" in schedule.branches else schedule.branches[:1]
        wanted = [("time_embedding", None), (ENTERS, 0), (LEAVES, self._last)]
        if surface.has_stage("modulated_in", 0):
            wanted.append(("modulated_in", 0))
        if self.with_sites:
            wanted += [
                (site.inner, site.block) for kind in KINDS for site in surface.sites(kind) if site.inner in KINDS
            ]
        return [[Tap(stage, block, branches=leading) for stage, block in wanted]] * schedule.steps

    def captured(self, tap: Tap, value: Any, clock: Clock, rows: Rows) -> None:
        if not clock.may_reuse or value is None:
            return
        if tap.stage == ENTERS:
            self._entered = value
        elif tap.stage == LEAVES:
            self._follow_growth(value.float() - self._entered.float(), clock.step)
        else:
            name = tap.stage if tap.stage in INDICATORS else f"{tap.stage}({tap.block})"
            self._follow(name, value, clock.step)

    def observe(self, clock: Clock, outputs: Mapping[str, Tensor], memo: dict[str, Any]) -> None:
        leading = outputs.get("cond", next(iter(outputs.values())))
        self._follow("output", leading, clock.step)
        self._follow_delta(torch.cat([o.flatten(1) for o in outputs.values()], dim=1).float(), clock.step)

    def _follow(self, name: str, now: Tensor, step: int) -> None:
        if name in self._before:
            self._note(name, step, relative_change(now, self._before[name]))
        self._before[name] = now

    def _follow_growth(self, residual: Tensor, step: int) -> None:
        norms = residual.norm(dim=-1)
        if "norms" in self._before:
            self._note("growth", step, (norms / self._before["norms"].clamp_min(1e-12)).mean(1))
        self._before["norms"] = norms

    def _follow_delta(self, outputs: Tensor, step: int) -> None:
        before = self._before.get("outputs")
        self._before["outputs"] = outputs
        if before is None or before.shape != outputs.shape:
            self._before.pop("delta", None)
            return
        delta, last = outputs - before, self._before.get("delta")
        self._before["delta"] = delta
        self._note("size", step, delta.norm(dim=1) / outputs.norm(dim=1).clamp_min(1e-12))
        if last is not None:
            self._note("cosine", step, torch.nn.functional.cosine_similarity(delta, last, dim=1))
            self._note("ratio", step, delta.norm(dim=1) / last.norm(dim=1).clamp_min(1e-12))

    def _note(self, name: str, step: int, values: Tensor) -> None:
        self._rows.setdefault(name, {})[step] = values.detach().double().cpu()

    def trace(self) -> Trace:
        """What was seen."""
        own = ("output", "growth", "cosine", "ratio", "size")
        seen = {name: self._table(name) for name in (*self._rows, *own)}
        sites = {name: seen[name] for name in self._rows if name not in (*own, *INDICATORS)}
        indicators = {name: seen[name] for name in INDICATORS if name in self._rows}
        return Trace(indicators=indicators, sites=sites, **{name: seen[name] for name in own})

    def _table(self, name: str) -> Tensor:
        noted = self._rows.get(name, {})
        pictures = next((len(v) for rows in self._rows.values() for v in rows.values()), 1)
        nothing = torch.full((pictures,), torch.nan, dtype=torch.float64)
        return torch.stack([noted.get(step, nothing) for step in range(self._steps)], dim=1)


def relative_change(now: Tensor, before: Tensor) -> Tensor:
    """relL1 of each picture [N]: ``mean|now - before| / mean|before|``."""
    now, before = now.flatten(1).float(), before.flatten(1).float()
    return (now - before).abs().mean(1) / before.abs().mean(1).clamp_min(1e-12)
