"""The official STDiT's and STDiT3's own numbers.

Tensor j of the sorted names (tables excluded) is `formula(shape, j, 0.3)`, of STDiT with 0.2; x [3, 3, 4, 6, 10] is
tensor 1000, text [3, 1, 5, 20] tensor 1001, at scale 1.5; native times 998, 420, 13; 5, 3 and 1 of 5 text tokens are
real; frames per second 24, 8, 120; in the masked record, frames that "frames" marks 0 are clean. What the official
module puts out for clean frames, which nobody reads, is modulated twice by its last layer, and is left out.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditloom.backbones.stdit import PRESETS, STDiTConfig
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.contracts.time import DISCRETE_1000
from ditloom.hub.checkpoint import foreign_state_dict, load_foreign, save_foreign
from ditloom.hub.format import Foreign
from ditloom.hub.formats import FORMATS
from tests.hub.test_golden import formula

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("stdit.json").read_text())
SMALL: dict[str, Any] = {
    "width": 48,
    "heads": 2,
    "size": (4, 6, 10),
    "channels": 3,
    "text_width": 20,
    "text_tokens": 5,
    "null_tokens": 5,
}
CONFIGS = {
    "stdit": STDiTConfig(version=1, depth=3, space_scale=0.5, time_scale=2.0, time=DISCRETE_1000, **SMALL),
    "stdit3": STDiTConfig(depth=4, trained=48, **SMALL),
}
SCALE = {"stdit": 0.2, "stdit3": 0.3}
TABLES = ("pos_embed", "pos_embed_temporal", "rope.freqs")


def filled(name: str) -> dict[str, Tensor]:
    theirs = foreign_state_dict(CONFIGS[name].build(), name)
    learned = sorted(k for k in theirs if k not in TABLES)
    return {**theirs, **{k: formula(tuple(theirs[k].shape), j, SCALE[name]) for j, k in enumerate(learned)}}


def told(name: str) -> Condition:
    mask = torch.arange(5)[None] < torch.tensor([5, 3, 1])[:, None]
    extra = {"fps": torch.tensor([24.0, 8.0, 120.0])} if name == "stdit3" else {}
    return Condition(text=formula((3, 1, 5, 20), 1001, 1.5)[:, 0], text_mask=mask, extra=extra)


def check(record: str, name: str, t: Tensor, frames: Tensor | None = None) -> None:
    golden, config, theirs = GOLDEN[record], CONFIGS[name], filled(name)
    assert len(theirs.keys() - set(TABLES)) == golden["tensors"]
    with torch.no_grad():
        y = load_foreign(theirs, config, name)(formula((3, 3, 4, 6, 10), 1000, 1.5), t, told(name))
    expected = torch.tensor(golden["output"]).reshape(golden["shape"])
    expected = config.sign * expected[:, : y.shape[1]]
    if frames is not None:
        y, expected = (v.transpose(1, 2)[frames] for v in (y, expected))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", CONFIGS)
def test_computes_what_the_official_module_computes(name: str) -> None:
    check(name, name, CONFIGS[name].time.noise_level(torch.tensor([998.0, 420.0, 13.0])))


def test_clean_frames_have_time_zero_as_the_official_mask_gives_them() -> None:
    level = CONFIGS["stdit3"].time.noise_level(torch.tensor([998.0, 420.0, 13.0]))
    frames = torch.tensor(GOLDEN["frames"])
    check("stdit3-masked", "stdit3", (level[:, None] * frames).repeat_interleave(3 * 5, 1), frames.bool())


@pytest.mark.parametrize(
    ("name", "format"), [("STDiT-XL/2", "stdit"), ("STDiT3-XL/2", "stdit3"), ("STDiT3-3B/2", "stdit3")]
)
def test_official_names_tell_every_setting(name: str, format: str) -> None:
    config = replace(PRESETS[name], null_tokens=PRESETS[name].text_tokens)
    reader = FORMATS.get(format)()
    with torch.device("meta"):
        theirs = reader.keymap.out(config.build().state_dict(), config)
    tables = {e.theirs: e.make(config) for e in reader.keymap.entries if hasattr(e, "make")}
    given = Foreign({**theirs, **tables})
    assert reader.recognises(given)
    assert reader.config(given) == config


@pytest.mark.parametrize("name", CONFIGS)
def test_written_and_read_bit_for_bit(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    backbone = load_foreign(filled(name), config, name)
    again = load_foreign(save_foreign(backbone, name, tmp_path / "model.safetensors"), config, name)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in backbone.state_dict().items())
    wrong = filled(name)
    table = "rope.freqs" if name == "stdit3" else "pos_embed_temporal"
    wrong[table] = wrong[table] + 0.1
    with pytest.raises(UserError, match="table of"):
        load_foreign(wrong, config, name)
