"""A foreign block as a pure function: called whole, or, where something acts inside, its forward re-expressed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ditloom.adapters import slots
from ditloom.contracts.backbone import NOTHING, Block
from ditloom.contracts.layout import Layout
from ditloom.contracts.plan import BlockPlan
from ditloom.contracts.streams import Context, Streams
from ditloom.parts import cost
from ditloom.sites.visit import BARE, BareVisit, Visit, take_rows, visit


class ForeignBlock(Block):
    """`whole` calls the block; `inside` runs its sub-modules one by one, at its sites. Parameters are the block's own.

    What blocks are told besides tokens is in `context.shared`, under the names of the foreign signature.
    """

    def __init__(self, inner: Any):
        super().__init__()
        self.inner = inner

    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        at = BARE if plan is None else visit(plan, given, streams.layout)
        if at is BARE or not self.sites:
            return self.whole(streams, context, given), {}
        streams = through_hooks(self.inner, lambda *_, **__: self.inside(streams, context, given, at))
        return streams, at.kept

    @abstractmethod
    def whole(self, streams: Streams, context: Context, given: Mapping[str, Any]) -> Streams:
        """The block as its library calls it."""

    def inside(self, streams: Streams, context: Context, given: Mapping[str, Any], at: Visit | BareVisit) -> Streams:
        """The same, sub-module by sub-module."""
        raise NotImplementedError


class PlainBlock(ForeignBlock):
    """A block of one stream called as ``block(x, **told)``: a site of its own as part of ranges, with none inside."""

    def whole(self, streams: Streams, context: Context, given: Mapping[str, Any]) -> Streams:
        return streams.updated(image=self.inner(streams["image"], **context.shared))

    def macs(self, layout: Layout) -> dict[str, int]:
        return {"rest": cost.linears(self.inner, layout.length())}


def through_hooks(module: nn.Module, function: Callable[..., Any]) -> Any:
    """`function` in the place of a module's forward, so that what moves its weights in and out goes on doing so."""
    if not slots.is_wrapped(module):
        return function()
    with slots.innermost(module, function):
        return module()


def feed_forward(module: Any, h: Tensor, at: Visit | BareVisit, stream: str = "image") -> Tensor:
    """diffusers' FeedForward, tapped at its hidden layer."""

    def run(*_: Any, **__: Any) -> Tensor:
        first, *rest = module.net
        x = at.tap("ff_hidden", first(h), stream)
        for part in rest:
            x = part(x)
        return x

    return through_hooks(module, run)


def mlp_site(module: Any, h: Tensor, at: Visit | BareVisit) -> Tensor:
    """The site "mlp" of a FeedForward, which works token by token, so that some rows can be computed alone."""
    rows = lambda index: module(take_rows(h, index))  # noqa: E731
    return at.around("mlp", lambda h: feed_forward(module, h, at), h, rows=rows)


def attention_macs(attention: Any, queries: int, keys: int | None = None) -> int:
    """Projections of an attention with to_q, to_k, to_v and perhaps to_out, and its two products."""
    n = queries if keys is None else keys
    total = cost.linear(attention.to_q, queries) + cost.linear(attention.to_k, n) + cost.linear(attention.to_v, n)
    out = getattr(attention, "to_out", None)
    if out is not None:
        total += cost.linears(out, queries)
    return total + cost.attention(queries, n, attention.to_q.out_features)


def joint_macs(attention: Any, tokens: int, text: int) -> int:
    """The same with text tokens that have projections of their own (add_q_proj, ..., to_add_out) in one softmax."""
    added = [getattr(attention, name, None) for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")]
    total = attention_macs(attention, tokens) - cost.attention(tokens, tokens, attention.to_q.out_features)
    total += sum(cost.linear(module, text) for module in added if module is not None)
    return total + cost.attention(tokens + text, tokens + text, attention.to_q.out_features)
