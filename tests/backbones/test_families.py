"""What is special about each family, as its paper and code have it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditloom.backbones.dit import DiTConfig
from ditloom.backbones.lightning_dit import LightningDiTConfig
from ditloom.backbones.mmdit import DualMMDiTBlock, LastMMDiTBlock, MMDiTConfig
from ditloom.backbones.sit import SiTConfig
from ditloom.backbones.u_vit import UViTBlock, UViTConfig
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Segment
from ditloom.contracts.streams import Context, Streams
from tests.backbones.portrait import LATENT, TEXT
from tests.backbones.tiny import TINY, embedded, inputs, make

CLASSES = {**LATENT, "classes": 10}


def copied(config: Any, source: nn.Module) -> Any:
    backbone = config.build().eval()
    backbone.load_state_dict(source.state_dict(), strict=True)
    return backbone


@torch.no_grad()
def test_lightning_dit_without_flags_is_a_dit_bit_for_bit() -> None:
    dit = make("dit")
    bare = LightningDiTConfig(**CLASSES, learn_sigma=True, rms_norm=False, swiglu=False, rope=False)
    x, t, condition = inputs(dit)
    native = dit.preset.time.native(t)
    out = copied(replace(bare, time=dit.preset.time), dit)(x, t, condition)
    assert torch.equal(-out, dit(x, t, condition)[:, :4])
    assert torch.equal(copied(bare, dit)(x, 1 - native, condition), out)


@torch.no_grad()
def test_sit_is_minus_the_first_half_of_a_dit_in_its_own_time() -> None:
    dit = make("dit")
    sit = copied(SiTConfig(**CLASSES), dit)
    x, t, condition = inputs(dit)
    own = dit.preset.time.noise_level(1 - t)
    assert torch.equal(-sit(x, t, condition), dit(x, own, condition)[:, :4])
    assert SiTConfig(**CLASSES).sign == -1
    assert sit.preset.time.native(torch.tensor([0.0, 0.25])).tolist() == [1.0, 0.75]


@torch.no_grad()
def test_dit_tokens_and_positions_permute_together() -> None:
    dit = make("dit")
    streams, context = embedded(dit, *inputs(dit))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    out = dit.run(streams, context)["image"]
    permuted = dit.run(streams.updated(image=streams["image"][:, order]), context)["image"]
    torch.testing.assert_close(permuted, out[:, order], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_frequencies_as_diffusers_has_them_are_others() -> None:
    dit = make("dit")
    args = inputs(dit)
    assert not torch.allclose(copied(replace(dit.preset, frequency_shift=1), dit)(*args), dit(*args), atol=1e-2)


@pytest.mark.parametrize("name", ["dit", "lightning-dit", "mmdit"])
@torch.no_grad()
def test_a_segment_is_heard_with_the_time_it_asks_for(name: str) -> None:
    backbone = make(name)
    x, t, condition = inputs(backbone)
    memory, native = backbone.prepare(condition), backbone.preset.time.native(t)

    def run(**more: Any) -> Tensor:
        segment = Segment("reference", x.flip(0), **more)
        return backbone.head(*_after(backbone, backbone.embed(x, native, memory, [segment])))

    plain, same, clean = backbone(x, t, condition), run(), run(modulation="zero")
    own = run(modulation="own", time=torch.zeros(3))
    assert same.shape == plain.shape
    assert not torch.allclose(same, plain, atol=1e-3)
    assert not torch.allclose(clean, same, atol=1e-4)
    torch.testing.assert_close(own, clean, rtol=1e-5, atol=1e-5)


def _after(backbone: Any, entered: tuple[Streams, Context]) -> tuple[Streams, Context]:
    return backbone.run(*entered), entered[1]


@torch.no_grad()
def test_a_segment_may_run_through_the_text_weights() -> None:
    backbone = make("mmdit")
    x, t, condition = inputs(backbone, masked=False)
    native = backbone.preset.time.native(t)
    assert condition.text is not None
    embedded_text = backbone.text_embedder(condition.text)
    halves = replace(condition, text=condition.text[:, :3])
    more = Segment("more", embedded_text[:, 3:], weights="text")
    streams, context = backbone.embed(x, native, backbone.prepare(halves), [more])
    out = backbone.head(*_after(backbone, (streams, context)))
    torch.testing.assert_close(out, backbone(x, t, condition), rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="'video'"):
        backbone.embed(x, native, backbone.prepare(halves), [replace(more, weights="video")])


@torch.no_grad()
def test_masked_text_may_hold_anything() -> None:
    for name in ("mmdit", "mmdit-dual", "u-vit-text"):
        backbone = make(name)
        x, t, condition = inputs(backbone)
        assert condition.text is not None
        assert condition.text_mask is not None
        other = condition.text.masked_fill(~condition.text_mask[..., None], 7.0)
        changed = backbone(x, t, replace(condition, text=other))
        torch.testing.assert_close(changed, backbone(x, t, condition), rtol=1e-5, atol=1e-5)
        unmasked = backbone(x, t, replace(condition, text_mask=None))
        assert not torch.allclose(unmasked[1:], changed[1:], atol=1e-4), name


@torch.no_grad()
def test_mmdit_reads_no_order_in_its_text() -> None:
    backbone = make("mmdit")
    x, t, condition = inputs(backbone, masked=False)
    assert condition.text is not None
    out = backbone(x, t, replace(condition, text=condition.text.flip(1)))
    torch.testing.assert_close(out, backbone(x, t, condition), rtol=1e-5, atol=1e-5)


def test_mmdit_block_kinds() -> None:
    dual = make("mmdit-dual").blocks
    assert [type(b) is DualMMDiTBlock for b in dual] == [True, True, False, False]
    assert isinstance(dual[3], LastMMDiTBlock)
    assert [("attn2" in b.sites, "mlp_text" in b.sites) for b in dual] == [(True, True)] * 2 + [
        (False, True),
        (False, False),
    ]
    with pytest.raises(UserError, match=r"blocks 0\.\.1; got \[2\]"):
        MMDiTConfig(depth=3, width=64, heads=4, dual=(2,))
    with pytest.raises(UserError, match="covers 12x12"):
        backbone = make("mmdit")
        x, t, condition = inputs(backbone)
        backbone(torch.zeros(3, 4, 26, 8), t, condition)


@torch.no_grad()
def test_the_second_attention_follows_the_rule_among_image_tokens() -> None:
    """Under a rule that isolates an added segment, the image does not see it in either attention."""
    from ditloom.sites.rules import Isolate, both, rule, settle

    backbone = make("mmdit-dual")
    x, t, condition = inputs(backbone)
    native, memory = backbone.preset.time.native(t), backbone.prepare(condition)
    outs = []
    for scale in (1.0, -3.0):
        streams, context = backbone.embed(x, native, memory, [Segment("reference", scale * x)])
        chosen = both(context.rule.rule, rule(Isolate(("image", "text"))))
        settled, gates = settle(chosen, streams.layout, context.gates)
        context = replace(context, rule=settled, gates=dict(gates))
        outs.append(backbone.head(*_after(backbone, (streams, context))))
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)


def test_u_vit_pairs_its_halves_last_in_first_out() -> None:
    assert make("u-vit").skips == {3: 1, 4: 0}
    assert make("u-vit-text").skips == {2: 0}
    with pytest.raises(UserError, match="even"):
        UViTConfig(depth=3, width=64, heads=4)
    with pytest.raises(UserError, match="not on both"):
        UViTConfig(depth=2, width=64, heads=4, classes=3, text_width=8)


@torch.no_grad()
def test_u_vit_with_skips_that_pass_x_is_a_plain_vit() -> None:
    backbone: Any = make("u-vit")
    x, t, condition = inputs(backbone)
    plain = [UViTBlock(64, 4) for _ in backbone.blocks]
    for block, mine in zip(backbone.blocks, plain, strict=True):
        mine.load_state_dict({k: v for k, v in block.state_dict().items() if "skip_linear" not in k})
        if hasattr(block, "skip_linear"):
            block.skip_linear.weight.copy_(torch.eye(64, 128))
            block.skip_linear.bias.zero_()
    out = backbone(x, t, condition)
    skips = sum(p.numel() for n, p in backbone.named_parameters() if "skip_linear" in n)
    assert skips == 2 * (2 * 64**2 + 64)
    backbone.blocks, backbone.skips = nn.ModuleList(plain), {}
    torch.testing.assert_close(out, backbone(x, t, condition), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_u_vit_text_permutes_with_its_positions() -> None:
    backbone: Any = make("u-vit-text")
    x, t, condition = inputs(backbone, masked=False)
    assert condition.text is not None
    out, order = backbone(x, t, condition), torch.tensor([3, 1, 5, 0, 2, 4])
    flipped = replace(condition, text=condition.text[:, order])
    assert not torch.allclose(backbone(x, t, flipped), out, atol=1e-3)
    backbone.pos_embed[:, 1:7] = backbone.pos_embed[:, 1:7][:, order]
    torch.testing.assert_close(backbone(x, t, flipped), out, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_u_vit_short_text_uses_the_first_positions() -> None:
    backbone = make("u-vit-text")
    x, t, condition = inputs(backbone, masked=False)
    assert condition.text is not None
    mask = torch.arange(6)[None].expand(3, -1) < 4
    short = backbone(x, t, Condition(text=condition.text[:, :4]))
    torch.testing.assert_close(short, backbone(x, t, replace(condition, text_mask=mask)), rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="6 text tokens; got 8"):
        backbone(x, t, Condition(text=torch.zeros(3, 8, 32)))


@torch.no_grad()
def test_u_vit_says_what_it_cannot_do() -> None:
    backbone = make("u-vit")
    x, t, condition = inputs(backbone)
    with pytest.raises(UserError, match="8x8; got 8x12"):
        backbone(torch.zeros(3, 4, 8, 12), t, condition)
    with pytest.raises(UserError, match="one time token"):
        backbone(x, t[:, None].expand(-1, 16), condition)
    native, memory = backbone.preset.time.native(t), backbone.prepare(condition)
    with pytest.raises(UserError, match="one time token"):
        backbone.embed(x, native, memory, [Segment("reference", x, modulation="zero")])
    streams, context = backbone.embed(x, native, memory, [Segment("reference", x)])
    assert streams.layout.length() == 2 + 16 + 16
    tokens = streams.segment("reference"), streams.segment("image")
    assert torch.equal(*tokens)
    with pytest.raises(UserError, match="long skip"):
        backbone.blocks[4].modulated_in(streams, context)
    assert "modulated_in" in backbone.missing["modulation"]


@pytest.mark.parametrize("name", ["u-vit", "u-vit-text"])
@torch.no_grad()
def test_u_vit_does_not_start_at_zero(name: str) -> None:
    backbone = TINY[name].build()
    assert backbone(*inputs(backbone)).std() > 1e-3


def test_small_text_models_fit_the_project() -> None:
    from ditloom.backbones.mmdit import PRESETS

    config = PRESETS["MMDiT-XS/1"]
    assert (config.channels, config.image_size, config.text_width, config.pooled_width) == (16, 8, 384, 384)
    x, _, condition = config.build().example(2)
    assert x.shape == (2, 16, 8, 8)
    assert condition.text is not None
    assert condition.text.shape == (2, 16, 384)
    assert TEXT["text_width"] == 32
    assert DiTConfig(**CLASSES).out_channels == 8


@torch.no_grad()
def test_released_velocities_point_the_way_the_process_says() -> None:
    """An official SiT that predicts x0 - noise everywhere: with the preset's process, its estimate is the data."""
    from ditloom.contracts.registries import PROCESSES

    config = SiTConfig(**CLASSES)
    sit = config.build().eval()  # all zero but the output's bias: a constant official output
    sit.final_layer.linear.bias.copy_(torch.randn(32, generator=torch.Generator().manual_seed(0)))
    settings = {k: v for k, v in config.process.items() if k != "name"}
    process = PROCESSES.get(config.process["name"])(**settings)
    x0 = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    toward_data = -sit(x0, t, Condition(label=torch.tensor([1, 2, 3])))
    noise = x0 - toward_data
    x = process.add_noise(x0, noise, t)
    estimate = process.estimate(x, t, sit(x, t, Condition(label=torch.tensor([1, 2, 3]))))
    torch.testing.assert_close(estimate.x0, x0, rtol=1e-4, atol=1e-4)
