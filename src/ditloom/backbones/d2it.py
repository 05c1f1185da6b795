"""D2iT: Dynamic Diffusion Transformer for Accurate Image Generation (Jia et al., CVPR 2025, arXiv 2504.09454).

Reconstruction: the official code could not be had. As the paper describes it: a DiT over regions predicts one rough
value per region, and RefineNet, a few narrow blocks among the positions of regions that are marked fine, corrects it
there. Reconstructed are RefineNet's width and depth (two blocks of half the width, which gives the published counts to
0.6 %), its reading of the noisy latent, and that the number of fine regions is bounded by a setting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditloom.backbones import dit
from ditloom.backbones.dit import DiT, DiTBlock, DiTConfig
from ditloom.contracts.backbone import NOTHING, Transition, check_size
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout, Segment, Span
from ditloom.contracts.plan import BlockPlan
from ditloom.contracts.registry import register
from ditloom.contracts.streams import Context, Memory, Streams
from ditloom.parts import cost
from ditloom.parts.attention import SelfAttention, kernel, logits
from ditloom.parts.checks import check_rows
from ditloom.parts.grains import fine_places, over_cells
from ditloom.parts.grids import to_map
from ditloom.parts.heads import Head
from ditloom.parts.patches import zero_
from ditloom.sites.visit import BARE, BareVisit, Visit

FINE, REGIONS = "fine", "regions"


@dataclass(frozen=True, kw_only=True)
class D2iTConfig(DiTConfig):
    """Settings of a D2iT: those of a DiT whose patch is a region; `image_size` is fixed, as positions are learned.

    fine_ratio: at most this share of an image's regions is fine. refine_depth, refine_width, refine_heads: RefineNet's.
    """

    family: ClassVar[str] = "d2it"

    fine_ratio: float = 0.5
    refine_depth: int = 2
    refine_width: int
    refine_heads: int

    def __post_init__(self) -> None:
        if not 0 < self.fine_ratio <= 1:
            raise UserError(f"the largest share of fine regions lies above 0, up to 1; got {self.fine_ratio}")
        if self.patch < 2:
            raise UserError(f"a region has at least 2x2 latent positions; got {self.patch}x{self.patch}")

    @property
    def regions(self) -> int:
        """Regions of an image."""
        return (self.image_size // self.patch) ** 2

    @property
    def fine_regions(self) -> int:
        """Regions that may be fine."""
        return max(1, round(self.fine_ratio * self.regions))

    def build(self) -> D2iT:
        return D2iT(self)


class FineAttention(SelfAttention):
    """Softmax attention among real fine positions; those that only fill up a batch are no keys."""

    def forward(self, x: Tensor, layout: Layout, context: Context, at: Visit | BareVisit = BARE) -> Tensor:
        if context.rule is not None or at.extra_keys is not None:
            raise UserError("RefineNet attends among fine positions: it takes no attention rules and no further keys")
        q, k, v = self.heads_of(x, None, at)
        if at.wants("logits"):
            at.keep("logits", logits(q, k))
        return self.out(kernel(q, k, v, context.shared["seen"][:, None, None]).flatten(2), at)


class Enter(Transition):
    """From regions to the fine positions in them: linear(feature of the region) + linear(noisy latent) + position.

    The regions' features ride along as the stream "rough".
    """

    def __init__(self, width: int, channels: int, fine_width: int, positions: int):
        super().__init__()
        self.from_region, self.from_latent = nn.Linear(width, fine_width), nn.Linear(channels, fine_width)
        self.positions = nn.Parameter(torch.zeros(positions, fine_width))

    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        x, places, chosen = streams["image"], context.shared["places"], context.shared["chosen"]
        features = self.from_region(x.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1])))
        features = features.repeat_interleave(places.shape[1] // chosen.shape[1], dim=1)
        fine = features + self.from_latent(context.shared["latent"]) + self.positions[places]
        return Streams({"image": fine, "rough": x}, self.after(streams.layout)), {}

    def macs(self, layout: Layout) -> dict[str, int]:
        regions, fine = layout.read(REGIONS), layout.read(FINE)
        return {"rest": cost.linear(self.from_region, regions) + cost.linear(self.from_latent, fine)}

    def after(self, layout: Layout) -> Layout:
        reads = (*layout.reads, ("rough", layout.length()))
        return replace(layout, spans=(Span("image", layout.read(FINE)),), reads=reads)


class RefineBlock(DiTBlock):
    """A DiT block among fine positions, with a condition of its own width."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__(width, heads, mlp_ratio, attn=FineAttention(width, heads))

    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        return super().forward(streams, _fine(context), plan, given)

    def modulated_in(self, streams: Streams, context: Context) -> Tensor:
        return super().modulated_in(streams, _fine(context))


def _fine(context: Context) -> Context:
    return replace(context, modulation={"image": context.shared["refine"]})


@register("d2it", paper="D2iT: Dynamic Diffusion Transformer for Accurate Image Generation, arXiv 2504.09454")
class D2iT(DiT):
    """A DiT over regions, and RefineNet over the positions of fine ones.

    x [B, C, H, W] of the size it was built for; Condition(extra={"grain": ...}) holds the map of fine regions
    [B, H / p, W / p]; prediction [B, C or 2C, H, W]: one value per coarse region, one per position of a fine one.
    """

    missing: ClassVar[Mapping[str, str]] = {kind: why.replace("DiT", "D2iT") for kind, why in DiT.missing.items()}
    preset: D2iTConfig

    def __init__(self, config: D2iTConfig):
        super().__init__(config)
        width, fine = config.width, config.refine_width
        self.pos_embed = nn.Parameter(torch.zeros(config.regions, width))
        self.grain_embedder = nn.Embedding(2, width)
        self.refine_condition = nn.Linear(width, fine)
        self.refine_head = Head(fine, 1, config.out_channels)
        enter = Enter(width, config.channels, fine, config.image_size**2)
        refine = (RefineBlock(fine, config.refine_heads, config.mlp_ratio) for _ in range(config.refine_depth))
        self.blocks = nn.ModuleList([*self.blocks, enter, *refine])
        self.initialise()

    def make_head(self) -> Head:
        return Head(self.preset.width, 1, self.preset.out_channels)

    def initialise(self) -> None:
        """As DiT; positions and grains N(0, 0.02); RefineNet corrects nothing at the start."""
        super().initialise()
        if hasattr(self, "refine_head"):
            enter = self.blocks[self.preset.depth]
            assert isinstance(enter, Enter)
            for table in (self.pos_embed, self.grain_embedder.weight, enter.positions):
                nn.init.normal_(table, std=0.02)
            zero_(self.refine_head.linear)

    def prepare(self, condition: Condition) -> Memory:
        memory, c = super().prepare(condition), self.preset
        grain, side = condition.extra.get("grain"), c.image_size // c.patch
        if grain is None:
            raise UserError(
                f"D2iT needs a map of its fine regions: give Condition(extra={{'grain': ...}}) of {side}x{side} regions"
            )
        if grain.shape[1:] != (side, side):
            raise UserError(f"the grain map of this D2iT is of shape [batch, {side}, {side}]; got {list(grain.shape)}")
        most = int(grain.bool().flatten(1).sum(1).max()) if grain.device.type == "cpu" else 0
        if most > c.fine_regions:
            raise UserError(
                f"this D2iT refines at most {c.fine_regions} of {c.regions} regions (fine_ratio {c.fine_ratio:g}); "
                f"the map has {most}"
            )
        return replace(memory, extra={"grain": grain.bool()})

    def embed(
        self, x: Tensor, time: Tensor, memory: Memory, segments: Sequence[Segment] = ()
    ) -> tuple[Streams, Context]:
        self._check(x, time, memory, segments)
        c, grain = self.preset, memory.extra["grain"]
        x = x.to(self.dtype)
        emb = self.t_embedder(time)
        condition = (emb if memory.vector is None else emb + memory.vector)[:, None]
        chosen, places, real = fine_places(grain, c.patch, c.fine_regions)
        first = torch.arange(real.shape[1], device=real.device) == 0  # no query is left without a key
        shared = {
            "places": places,
            "chosen": chosen,
            "real": real,
            "seen": real | first,
            "latent": x.flatten(2).mT.gather(1, places[..., None].expand(-1, -1, c.channels)),
            "refine": self.refine_condition(condition),
        }
        tokens = self.x_embedder(x) + self.pos_embed + self.grain_embedder(grain.flatten(1).long())
        reads = ((FINE, c.fine_regions * c.patch**2), (REGIONS, c.fine_regions))
        side = c.image_size // c.patch
        layout = Layout((Span("image", tokens.shape[1]),), (side, side), reads)
        return Streams({"image": tokens}, layout), Context(modulation={"image": condition}, time=emb, shared=shared)

    def _check(self, x: Tensor, time: Tensor, memory: Memory, segments: Sequence[Segment]) -> None:
        size = self.preset.image_size
        check_size(x, self.preset.channels, self.preset.patch, "D2iT")
        check_rows(x, memory.vector, "labels")
        check_rows(x, memory.extra["grain"], "grain maps")
        if x.shape[2:] != (size, size):
            height, width = x.shape[2:]
            raise UserError(f"the learned positions of this D2iT are for {size}x{size}; got {height}x{width}")
        if time.ndim != 1 or segments:
            raise UserError("D2iT splits the image's regions: one time per image, and no added segments")

    def head(self, streams: Streams, context: Context) -> Tensor:
        c, shared = self.preset, context.shared
        rough = self.final_layer(streams["rough"], context.modulation["image"])
        rough = over_cells(to_map(rough, streams.layout.grid), c.patch)
        correction = self.refine_head(streams["image"], shared["refine"]) * shared["real"][..., None]
        index = shared["places"][..., None].expand_as(correction)
        fine = torch.zeros_like(rough).flatten(2).mT.scatter_add(1, index, correction.to(rough.dtype))
        return rough + fine.mT.unflatten(2, rough.shape[2:])

    def example(self, batch: int = 1, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Condition]:
        x, t, condition = super().example(batch, device)
        side = self.preset.image_size // self.preset.patch
        order = torch.rand(batch, self.preset.regions, device=device).argsort(1)
        grain = (order < self.preset.fine_regions).unflatten(1, (side, side))
        return x, t, replace(condition, extra={"grain": grain})

    def end_macs(self, layout: Layout) -> dict[str, int]:
        ends = super().end_macs(layout)
        ends["embed"] += cost.linear(self.refine_condition, 1)
        return {**ends, "head": ends["head"] + self.refine_head.macs(layout.read(FINE))}


PRESETS = {
    f"D2iT-{size}/2": D2iTConfig(
        depth=depth, width=width, heads=heads, refine_width=width // 2, refine_heads=heads // 2
    )
    for size, (depth, width, heads) in dit.SIZES.items()
    if size in ("B", "L", "XL")
}
