"""The same questions to every registered backbone."""

from __future__ import annotations

import json

import pytest
import torch

from ditloom.contracts.backbone import Backbone
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.contracts.registries import BACKBONES
from tests.backbones.portrait import PORTRAITS
from tests.backbones.tiny import OF, TINY, embedded, inputs, make, of_kind

NAMES = list(TINY)
TIMED = [name for name in NAMES if OF[name].token_times]
RESIZED = [name for name in NAMES if OF[name].other_size]
ZERO = [name for name in NAMES if OF[name].zero_start and name not in OF[name].nonzero]
IDENTITY = [name for name in NAMES if OF[name].identity_start and name not in OF[name].restless]


def test_every_family_is_asked() -> None:
    assert {TINY[name].family for name in TINY} == set(PORTRAITS) == set(BACKBONES.names())


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def backbone(name: str) -> Backbone:
    return make(name)


def channels(name: str) -> int:
    return OF[name].outputs.get(name, TINY[name].channels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_shape_and_dtype(name: str, backbone: Backbone, dtype: torch.dtype) -> None:
    x, t, condition = inputs(backbone)
    expected = backbone(x, t, condition)
    y = backbone.to(dtype)(x.to(dtype), t, condition.to(dtype=dtype))
    assert y.shape == (3, channels(name), *x.shape[2:])
    assert y.dtype is dtype
    similarity = torch.cosine_similarity(y.float().flatten(1), expected.flatten(1))
    assert bool((similarity > 0.99).all()), similarity


@torch.no_grad()
def test_permuting_the_batch_permutes_the_output(backbone: Backbone) -> None:
    x, t, condition = inputs(backbone)
    order = torch.tensor([2, 0, 1])
    y = backbone(x[order], t[order], condition.rows(order))
    torch.testing.assert_close(y, backbone(x, t, condition)[order], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_batch_is_its_single_images(backbone: Backbone) -> None:
    x, t, condition = inputs(backbone)
    singles = [backbone(x[i : i + 1], t[i : i + 1], condition.rows(slice(i, i + 1))) for i in range(3)]
    assert not torch.allclose(singles[0], singles[1], atol=1e-2)
    torch.testing.assert_close(backbone(x, t, condition), torch.cat(singles), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_twice_the_same_and_nothing_written_to(backbone: Backbone) -> None:
    x, t, condition = inputs(backbone)
    before = [x.clone(), t.clone(), *(v.clone() for v in condition.tensors().values())]
    assert torch.equal(backbone(x, t, condition), backbone(x, t, condition))
    assert all(torch.equal(a, b) for a, b in zip(before, [x, t, *condition.tensors().values()], strict=True))


@torch.no_grad()
def test_hears_time_and_condition(backbone: Backbone) -> None:
    x, t, condition = inputs(backbone)
    y = backbone(x, t, condition)
    assert not torch.allclose(backbone(x, t * 0.5, condition), y, atol=1e-3)
    for name, value in condition.tensors().items():
        if name != "text_mask":
            assert not torch.allclose(backbone(x, t, condition.rows([1, 2, 0])), y, atol=1e-3), (name, value)


def test_gradients_reach_every_parameter(name: str, backbone: Backbone) -> None:
    x, t, condition = inputs(backbone)
    y = backbone(x, t, condition)
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    without = {n for n, p in backbone.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)}
    assert without == OF[name].dead.get(name, frozenset())
    assert {n for n, p in backbone.named_parameters() if p.grad is None} == OF[name].unread.get(name, frozenset())
    assert backbone.unread == (name in OF[name].unread)


def test_checkpointing_changes_no_gradient(backbone: Backbone) -> None:
    x, t, condition = inputs(backbone)
    found = []
    for on in (False, True):
        backbone.checkpointing = on
        backbone.zero_grad()
        backbone(x, t, condition).square().sum().backward()
        found.append([p.grad.clone() for p in backbone.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@torch.no_grad()
def test_state_dict_round_trip(backbone: Backbone) -> None:
    x, t, condition = inputs(backbone)
    other = type(backbone.preset).from_dict(json.loads(json.dumps(backbone.preset.to_dict()))).build().eval()
    other.load_state_dict(backbone.state_dict(), strict=True)
    assert torch.equal(other(x, t, condition), backbone(x, t, condition))


def test_an_unknown_setting_names_the_nearest(backbone: Backbone) -> None:
    with pytest.raises(UserError, match="did you mean.*'width'"):
        type(backbone.preset).from_dict({**backbone.preset.to_dict(), "widht": 3})


@pytest.mark.parametrize("name", RESIZED)
@torch.no_grad()
def test_other_sizes(name: str) -> None:
    backbone, size = make(name), OF[name].other_size
    x, t, condition = inputs(backbone)
    x, condition = resized(x, condition, size)
    y = backbone(x, t, condition)
    assert y.shape == (3, channels(name), *x.shape[2:])
    if OF[name].turns:
        turned = backbone(x.mT, t, condition.map(lambda v: v.mT if v.shape[2:] == x.shape[2:] else v))
        assert not torch.allclose(turned.mT, y, atol=1e-3)  # rows and columns are not the same to it


def resized(x: torch.Tensor, condition: Condition, size: tuple[int, ...]) -> tuple[torch.Tensor, Condition]:
    """A latent of another size, and with it what a condition gives in the layout of latents."""
    generator = torch.Generator().manual_seed(2)
    other = torch.randn(*x.shape[: -len(size)], *size, generator=generator)
    along = lambda v: torch.randn(*v.shape[:2], *other.shape[2:], generator=generator)  # noqa: E731
    return other, condition.map(lambda v: along(v) if v.shape[2:] == x.shape[2:] else v)


@pytest.mark.parametrize("name", TIMED)
@torch.no_grad()
def test_equal_times_per_token_are_one_time(name: str) -> None:
    backbone = make(name)
    x, t, condition = inputs(backbone)
    tokens = embedded(backbone, x, t, condition)[0].layout.span("image").length
    y = backbone(x, t[:, None].expand(-1, tokens), condition)
    torch.testing.assert_close(y, backbone(x, t, condition), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TIMED)
@torch.no_grad()
def test_a_time_per_token_is_heard_where_it_is(name: str) -> None:
    backbone = make(name)
    x, t, condition = inputs(backbone)
    layout = embedded(backbone, x, t, condition)[0].layout
    times = t[:, None].repeat(1, layout.span("image").length)
    times[:, 5] = 0.5
    changed = (backbone(x, times, condition) - backbone(x, t, condition)).abs().amax(1)
    patches = per_token(changed, layout.grid)
    assert bool((patches.argmax(1) == 5).all())


def per_token(changed: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
    """The largest value of each token's patch: [B, H, W] or [B, T, H, W] to [B, tokens]."""
    for axis, tokens in enumerate(grid, start=1):
        changed = changed.unflatten(axis, (tokens, -1)).amax(axis + 1)
    return changed.flatten(1)


@pytest.mark.parametrize("name", ZERO)
@torch.no_grad()
def test_starts_at_zero(name: str) -> None:
    backbone = TINY[name].build()
    assert not backbone(*inputs(backbone)).any()


@pytest.mark.parametrize("name", IDENTITY)
@torch.no_grad()
def test_starts_with_identity_blocks(name: str) -> None:
    backbone = TINY[name].build()
    streams, context = embedded(backbone, *inputs(backbone))
    left = {}
    for i, block in enumerate(backbone.blocks):
        given = {"skip": left[backbone.skips[i]].tokens} if i in backbone.skips else {}
        out, _ = block(streams, context, None, given)
        assert block.is_transition or all(torch.equal(out[s], streams[s]) for s in streams.tokens)
        streams = left[i] = out


@torch.no_grad()
def test_a_probe_of_the_modulated_input_is_what_the_block_reads(backbone: Backbone) -> None:
    from ditloom.contracts.plan import BlockPlan

    streams, context = embedded(backbone, *inputs(backbone))
    first = backbone.blocks[of_kind(backbone)[0]]
    _, kept = first(streams, context, BlockPlan(keep=("modulated_in",)))
    torch.testing.assert_close(first.modulated_in(streams, context), kept["modulated_in"])


def test_wrong_input_is_one_clear_sentence(backbone: Backbone) -> None:
    x, t, condition = inputs(backbone)
    tokens = {"wrong rank": x[0], "3 channels": x[:, :3], "odd size": x[..., :7], "too few rows": x[:2]}
    for what, wrong in tokens.items():
        if what == "too few rows" and condition.batch is None:
            continue
        with pytest.raises(UserError) as error:
            backbone(wrong, t[: len(wrong)] if wrong.ndim == 4 else t, condition)
        assert "\n" not in str(error.value)
    if condition.batch is not None:
        with pytest.raises(UserError, match="give Condition"):
            backbone(x, t, None)


def test_wrong_labels_and_text_are_one_clear_sentence(backbone: Backbone) -> None:
    x, t, condition = inputs(backbone)
    if condition.label is not None:
        for label, message in (([0, 1, 11], "0..10"), ([-1, 0, 0], "-1"), ([0.5, 0.0, 0.0], "whole numbers")):
            with pytest.raises(UserError, match=message):
                backbone(x, t, Condition(label=torch.tensor(label)))
    if condition.text is not None:
        for text, message in ((torch.zeros(3, 4, 31), "32"), (torch.zeros(3, 0, 32), "at least one")):
            with pytest.raises(UserError, match=message):
                backbone(x, t, Condition(text=text, pooled=condition.pooled))
        with pytest.raises(UserError, match="text mask"):
            backbone(x, t, Condition(text=condition.text, text_mask=torch.ones(3, 2).bool(), pooled=condition.pooled))
