"""The selective scan of Mamba (Gu & Dao, arXiv 2312.00752) in plain PyTorch: sequential, and in parallel chunks.

    h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t        y_t = C_t h_t        h_0 = 0

for every channel d and state n: u, dt [B, L, D]; A [D, N], negative; B, C [B, L, N]; y [B, L, D]. The recurrence runs
in float32 (float64 stays).

`selective_scan` cuts the tokens into chunks. All chunks take their first step together, then their second, and so on;
what each hands to the next is settled between two such passes. No quotient of decays is ever formed, so that any dt is
safe. Its backward pass computes the states again and keeps only those at the borders of chunks. To compilers it is one
opaque operation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from ditloom.parts.precision import wide

CHUNK = 32
PER_STATE = 4
AT_ONCE = {"cpu": 1 << 16}
AT_ONCE_ELSEWHERE = 1 << 26


def sequential_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The recurrence, one token after the other: the reference."""
    dtype, (u, dt, A, B, C) = u.dtype, (wide(t) for t in (u, dt, A, B, C))
    h, outputs = u.new_zeros(u.shape[0], u.shape[2], A.shape[1]), []
    for u_t, dt_t, B_t, C_t in zip(u.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        h = torch.exp(dt_t[..., None] * A) * h + (dt_t * u_t)[..., None] * B_t[:, None]
        outputs.append((h @ C_t[..., None]).squeeze(-1))
    return torch.stack(outputs, dim=1).to(dtype)


def selective_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int = CHUNK) -> Tensor:
    """The same values, chunks of `chunk` tokens in parallel; L need not be a multiple of it."""
    return _scan(*(wide(t) for t in (u, dt, A, B, C)), chunk)[0].to(u.dtype)


def scan_macs(tokens: int, channels: int, states: int) -> int:
    """Multiply-accumulates of the recurrence: exponent, input, state and output, for every token, channel and state."""
    return PER_STATE * tokens * channels * states


@torch.library.custom_op("ditloom::selective_scan", mutates_args=())
def _scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """y [B, L, D] and the states that enter the chunks [B, K, N, D]."""
    parts = [Chunks(given, A, chunk).forward() for given in _groups(A, chunk, u, dt, B, C)]
    return torch.cat([y for y, _ in parts]), torch.cat([h for _, h in parts])


@torch.library.custom_op("ditloom::selective_scan_backward", mutates_args=())
def _scan_backward(
    dy: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, borders: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, A, B, C."""
    groups = _groups(A, chunk, u, dt, B, C, dy, borders)
    parts = [Chunks(given[:4], A, chunk).backward(*given[4:]) for given in groups]
    du, ddt, dA, dB, dC = zip(*parts, strict=True)
    return torch.cat(du), torch.cat(ddt), torch.stack(dA).sum(0).contiguous(), torch.cat(dB), torch.cat(dC)


def _groups(A: Tensor, chunk: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of the batch, as many at once as the fast memory of a processor can work on."""
    per_row = -(-tensors[0].shape[1] // chunk) * A.numel()
    rows = max(1, AT_ONCE.get(A.device.type, AT_ONCE_ELSEWHERE) // per_row)
    yield from zip(*(t.split(rows) for t in tensors), strict=True)


class Chunks:
    """One scan cut into chunks: Q steps of all R = rows x K chunks at once, with states laid out [R, N, D]."""

    def __init__(self, given: tuple[Tensor, ...], A: Tensor, chunk: int):
        u, dt, B, C = given
        self.rows, self.length = u.shape[:2]
        self.chunks = -(-self.length // chunk)
        self.steps = min(chunk, self.length)
        self.u, self.dt, self.A = u, dt, A.t().contiguous()[None]
        self.times = self.cut(dt)[:, :, None]
        self.inputs = self.cut(dt * u)[:, :, None]
        self.B, self.C = self.cut(B)[..., None], self.cut(C)[..., None]

    def cut(self, x: Tensor) -> Tensor:
        """[B, L, F] to [Q, B * K, F]; a short last chunk is filled with zeros, which change no state."""
        x = F.pad(x, (0, 0, 0, self.chunks * self.steps - self.length))
        return x.unflatten(1, (self.chunks, self.steps)).permute(2, 0, 1, 3).flatten(1, 2).contiguous()

    def join(self, x: Tensor) -> Tensor:
        """The inverse of `cut`, for [Q, B * K, ...] with F values each."""
        x = x.reshape(self.steps, self.rows, self.chunks, -1).permute(1, 2, 0, 3)
        return x.reshape(self.rows, -1, x.shape[-1])[:, : self.length]

    def decays(self) -> Tensor:
        """exp(dt A) of every step [Q, R, N, D]."""
        return (self.times * self.A).exp_()

    def forward(self) -> tuple[Tensor, Tensor]:
        """y, and the states that enter the chunks [B, K, N, D]."""
        decays = self.decays().unbind()
        inputs, B, C = self.inputs.unbind(), self.B.unbind(), self.C.mT.unbind()
        h = self.u.new_zeros(self.rows * self.chunks, *self.A.shape[1:])
        borders, y = torch.zeros_like(h), self.u.new_empty(self.steps, len(h), 1, h.shape[-1])
        if self.chunks > 1:
            for decay, w, b in zip(decays, inputs, B, strict=True):
                h.mul_(decay).addcmul_(w, b)
            borders = self.carried((self.times.sum(0) * self.A).exp_(), h)
            h = borders.clone()
        for decay, w, b, c, out in zip(decays, inputs, B, C, y.unbind(), strict=True):
            torch.bmm(c, h.mul_(decay).addcmul_(w, b), out=out)
        return self.join(y), borders.unflatten(0, (self.rows, self.chunks))

    def carried(self, decays: Tensor, own: Tensor, backwards: bool = False) -> Tensor:
        """What enters every chunk, from zero: out[k + 1] = decays[k] out[k] + own[k], or from the last to the first."""
        decays, own = (t.unflatten(0, (self.rows, self.chunks)) for t in (decays, own))
        out = torch.zeros_like(own)
        for k in range(self.chunks - 1):
            source, target = (self.chunks - 1 - k, self.chunks - 2 - k) if backwards else (k, k + 1)
            torch.addcmul(own[:, source], decays[:, source], out[:, source], out=out[:, target])
        return out.flatten(0, 1)

    def backward(self, dy: Tensor, borders: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of u, dt, A, B, C; the states come from `borders`, the gradient of the state from the end."""
        dy, decays = self.cut(dy)[:, :, None], self.decays()
        states = self._states_again(borders.flatten(0, 1), decays)
        dh = self._from_later_chunks(dy, decays)
        t, dA = torch.empty_like(dh), torch.zeros_like(dh)
        d_inputs, d_times = torch.empty_like(self.inputs), torch.empty_like(self.times.squeeze(2))
        dB, dC = torch.empty_like(self.B), torch.empty_like(self.C)
        B, inputs, outputs = self.B.mT, self.inputs.mT, dy.mT
        for q in reversed(range(self.steps)):
            dh.addcmul_(self.C[q], dy[q])
            torch.bmm(states[q + 1], outputs[q], out=dC[q])
            torch.bmm(B[q], dh, out=d_inputs[q])
            torch.bmm(dh, inputs[q], out=dB[q])
            torch.mul(dh.mul_(decays[q]), states[q], out=t)
            dA.addcmul_(t, self.times[q])
            torch.sum(t.mul_(self.A), 1, out=d_times[q])
        d_inputs, d_times = self.join(d_inputs), self.join(d_times)
        du, ddt = d_inputs * self.dt, d_times + d_inputs * self.u
        return du, ddt, dA.sum(0).t(), self.join(dB), self.join(dC)

    def _states_again(self, entering: Tensor, decays: Tensor) -> Tensor:
        """All states [Q + 1, R, N, D] from those that enter the chunks."""
        states = entering.new_empty(self.steps + 1, *entering.shape)
        states[0] = entering
        for q in range(self.steps):
            torch.mul(states[q], decays[q], out=states[q + 1]).addcmul_(self.inputs[q], self.B[q])
        return states

    def _from_later_chunks(self, dy: Tensor, decays: Tensor) -> Tensor:
        """The gradient that reaches every chunk's last state from the chunks after it [R, N, D]."""
        own = torch.zeros_like(decays[0])
        if self.chunks > 1:
            for q in reversed(range(self.steps)):
                own.addcmul_(self.C[q], dy[q]).mul_(decays[q])
        return self.carried((self.times.sum(0) * self.A).exp_(), own, backwards=True)


@_scan.register_fake
def _(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    chunks = -(-u.shape[1] // chunk)
    return u.new_empty(u.shape), u.new_empty(u.shape[0], chunks, A.shape[1], A.shape[0])


@_scan_backward.register_fake
def _(dy: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, borders: Tensor, chunk: int) -> Any:
    return tuple(t.new_empty(t.shape) for t in (u, dt, A, B, C))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.chunk = inputs[5]


def _gradients(ctx: Any, dy: Tensor, dborders: Tensor) -> tuple[Any, ...]:
    return *_scan_backward(dy, *ctx.saved_tensors, ctx.chunk), None


_scan.register_autograd(_gradients, setup_context=_save)


@register_flop_formula(torch.ops.ditloom.selective_scan)
def _flops(u: Any, dt: Any, A: Any, *more: Any, **given: Any) -> int:
    return 2 * u[0] * scan_macs(u[1], *A)
