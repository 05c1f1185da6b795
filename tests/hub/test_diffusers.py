"""diffusers' own modules side by side, in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditloom.backbones.dit import DiTConfig
from ditloom.backbones.mmdit import PRESETS, MMDiTConfig
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.hub.checkpoint import load_foreign, save_foreign

diffusers = pytest.importorskip("diffusers")

STD = 0.1
SD3: dict[str, dict[str, Any]] = {
    "sd3": {},
    "sd3.5-large": {"qk_norm": "rms_norm"},
    "sd3.5-medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
}
SIZES = [(8, 8), (12, 16), (2, 6)]
T = torch.tensor([0.97, 0.4, 0.05], dtype=torch.float64)


def randomised(module: nn.Module) -> Any:
    """No zero left anywhere: the comparison would pass trivially."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(STD * torch.randn(p.shape, generator=generator))
    return module.eval()


def their_sd3(**more: Any) -> Any:
    return randomised(
        diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=4,
            attention_head_dim=24,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=96,
            pooled_projection_dim=20,
            pos_embed_max_size=12,
            **more,
        )
    )


def their_dit() -> Any:
    model = randomised(
        diffusers.DiTTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=24,
            in_channels=4,
            out_channels=8,
            num_layers=3,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=10,
        )
    )
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return model


def text(rows: int = 3, tokens: int = 7, seed: int = 1) -> Condition:
    g = torch.Generator().manual_seed(seed)
    return Condition(text=torch.randn(rows, tokens, 32, generator=g), pooled=torch.randn(rows, 20, generator=g))


def latent(height: int = 8, width: int = 8) -> Tensor:
    return torch.randn(3, 4, height, width, generator=torch.Generator().manual_seed(2))


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def run_sd3(theirs: Any, x: Tensor, condition: Condition, t: Tensor = T) -> Tensor:
    return theirs(
        x,
        encoder_hidden_states=condition.text,
        pooled_projections=condition.pooled,
        timestep=(1000 * t).float(),
        return_dict=False,
    )[0]


@pytest.mark.parametrize("kind", SD3)
@torch.no_grad()
def test_sd3_from_diffusers(kind: str, tmp_path: Path) -> None:
    theirs = their_sd3(**SD3[kind])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_foreign(tmp_path / "theirs")
    for size in SIZES:
        y = run_sd3(theirs, latent(*size), text())
        assert float(y.std()) > 0.1
        close(ours(latent(*size), T, text()), y)


@pytest.mark.parametrize("kind", SD3)
@torch.no_grad()
def test_sd3_to_diffusers(kind: str, tmp_path: Path) -> None:
    qk = "rms" if "qk_norm" in SD3[kind] else None
    dual = SD3[kind].get("dual_attention_layers", ())
    sizes = {"image_size": 8, "channels": 4, "text_width": 32, "pooled_width": 20, "table": 9, "table_span": 4}
    config = MMDiTConfig(depth=3, width=64, heads=4, qk_norm=qk, dual=dual, **sizes)
    ours = randomised(config.build())
    theirs = diffusers.SD3Transformer2DModel.from_pretrained(save_foreign(ours, "diffusers-sd3", tmp_path / "ours"))
    close(ours(latent(6, 10), T, text()), run_sd3(theirs.eval(), latent(6, 10), text()))
    again = load_foreign(tmp_path / "ours")
    assert again.preset == config.__class__(**{**vars(config), "text_tokens": again.preset.text_tokens})
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in ours.state_dict().items())


@torch.no_grad()
def test_masked_text_is_text_that_is_not_there(tmp_path: Path) -> None:
    theirs = their_sd3(**SD3["sd3.5-medium"])
    theirs.save_pretrained(tmp_path / "theirs")
    ours, full = load_foreign(tmp_path / "theirs"), text()
    assert full.text is not None
    lengths = [7, 4, 1]
    mask = torch.arange(7)[None] < torch.tensor(lengths)[:, None]
    y = ours(latent(), T, Condition(text=full.text, text_mask=mask, pooled=full.pooled))
    for i, n in enumerate(lengths):
        row = full.rows(slice(i, i + 1))
        short = Condition(text=row.text[:, :n], pooled=row.pooled)  # type: ignore[index]
        close(y[i : i + 1], run_sd3(theirs, latent()[i : i + 1], short, T[i : i + 1]))


@torch.no_grad()
def test_dit_from_diffusers(tmp_path: Path) -> None:
    theirs = their_dit()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_foreign(tmp_path / "theirs")
    index, label = torch.tensor([999, 400, 3]), torch.tensor([0, 10, 4])
    y = theirs(latent(), timestep=index, class_labels=label, return_dict=False)[0]
    close(ours(latent(), (index + 1) / 1000, Condition(label=label)), y)
    assert float(y.std()) > 0.1


@torch.no_grad()
def test_dit_to_diffusers(tmp_path: Path) -> None:
    config = DiTConfig(depth=2, width=64, heads=4, image_size=8, classes=10, frequency_shift=1)
    ours = randomised(config.build())
    theirs = diffusers.DiTTransformer2DModel.from_pretrained(save_foreign(ours, "diffusers-dit", tmp_path / "ours"))
    index, label = torch.tensor([999, 400, 3]), torch.tensor([0, 10, 4])
    y = theirs.eval()(latent(), timestep=index, class_labels=label, return_dict=False)[0]
    close(ours(latent(), (index + 1) / 1000, Condition(label=label)), y)
    assert load_foreign(tmp_path / "ours").preset == config


def test_a_round_trip_through_us_is_bit_exact(tmp_path: Path) -> None:
    for name, theirs in (("diffusers-sd3", their_sd3(**SD3["sd3.5-medium"])), ("diffusers-dit", their_dit())):
        theirs.save_pretrained(tmp_path / name)
        save_foreign(load_foreign(tmp_path / name), name, tmp_path / f"{name}-again")
        again = type(theirs).from_pretrained(tmp_path / f"{name}-again").state_dict()
        assert again.keys() == theirs.state_dict().keys()
        assert all(torch.equal(again[k], v) for k, v in theirs.state_dict().items())


def test_a_sharded_pipeline_folder_is_read(tmp_path: Path) -> None:
    theirs = their_sd3()
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="200KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    ours = load_foreign(tmp_path)
    torch.testing.assert_close(ours.text_embedder.weight.data, theirs.context_embedder.weight.data)
    next((tmp_path / "transformer").glob("*-00002-*.safetensors")).unlink()
    with pytest.raises(UserError, match="lacks .*00002"):
        load_foreign(tmp_path)


def test_embedders_that_differ_between_blocks_are_refused(tmp_path: Path) -> None:
    theirs = their_dit()
    with torch.no_grad():
        theirs.transformer_blocks[2].norm1.emb.class_embedder.embedding_table.weight.add_(1)
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match="transformer_blocks.2.*differs"):
        load_foreign(tmp_path / "theirs")


def test_what_diffusers_cannot_hold_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="frequencies"):
        save_foreign(DiTConfig(depth=1, width=32, heads=2, image_size=4).build(), "diffusers-dit", tmp_path / "a")
    with pytest.raises(UserError, match="null_class"):
        plain = DiTConfig(depth=1, width=32, heads=2, image_size=4, null_class=False).build()
        save_foreign(plain, "diffusers-dit", tmp_path / "b")
    with pytest.raises(UserError, match="pooled_width"):
        unpooled = MMDiTConfig(depth=2, width=32, heads=2, text_width=8, pooled_width=0, table=4, table_span=4)
        save_foreign(unpooled.build(), "diffusers-sd3", tmp_path / "c")
    assert not (tmp_path / "b").exists()
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("name", ["SD3-medium", "SD3.5-medium", "SD3.5-large"])
def test_the_published_sizes_are_diffusers_shapes(name: str) -> None:
    from ditloom.hub.formats.diffusers_sd3 import DiffusersSD3

    config = PRESETS[name]
    settings = {k: v for k, v in DiffusersSD3().settings(config).items() if k != "_class_name"}
    with torch.device("meta"):
        theirs = diffusers.SD3Transformer2DModel(**settings).state_dict()
        ours = DiffusersSD3.keymap.out(config.build().state_dict(), config)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
