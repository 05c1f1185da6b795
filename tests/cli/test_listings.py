"""`models`, `methods`, `data list`: what programs and people read of what there is."""

from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest
import torch

from ditloom.cli.commands import models as models_command
from ditloom.cli.show import count, plain
from ditloom.contracts import registry
from ditloom.contracts.method import Method, Touch
from ditloom.contracts.registries import DATA, METHODS
from ditloom.contracts.registry import register
from ditloom.loading import names
from ditloom.presets import build, presets

MODEL_KEYS = {"name", "family", "parameters", "macs", "tokens", "paper", "weights"}
METHOD_KEYS = {"key", "family", "paper", "touches", "status", "parameters"}


@register("every-other", paper="A Paper (2024)", family="caches")
@dataclass(frozen=True, kw_only=True)
class EveryOther(Method):
    """Skip every other step.

    More about it.
    """

    interval: int = 2
    sites: tuple[str, ...] = ("attn", "mlp")

    @classmethod
    def touches(cls):
        return [Touch("attn", "around")]

    def bind(self, surface, assets=None):
        raise NotImplementedError


@pytest.fixture
def plugged_in(monkeypatch):
    """A method of another package, and one that cannot be imported."""
    group = [
        EntryPoint("every-other", f"{__name__}:EveryOther", "ditloom.methods"),
        EntryPoint("torn", "no_such_package:Torn", "ditloom.methods"),
    ]
    monkeypatch.setattr(EntryPoint, "load", _load)
    monkeypatch.setattr(registry, "entry_points", lambda group: group_of(group))

    def group_of(name):
        return group if name == "ditloom.methods" else []


def _load(point):
    if point.name == "torn":
        raise ModuleNotFoundError("No module named 'no_such_package'")
    return EveryOther


def test_methods_of_other_packages_are_listed_with_their_settings(ditloom, plugged_in):
    listed = {method["key"]: method for method in ditloom("methods", "--json").document}
    assert {"every-other", "torn"} <= set(listed) and sorted(listed) == METHODS.names()
    assert all(set(method) >= METHOD_KEYS for method in listed.values())
    found = listed["every-other"]
    assert found["parameters"] == {"interval": 2, "sites": ["attn", "mlp"]}
    assert (found["family"], found["paper"], found["touches"]) == ("caches", "A Paper (2024)", ["around attn"])
    assert found["status"] == "ready" and found["about"] == "Skip every other step."


def test_a_plug_in_that_cannot_be_imported_spoils_nothing(ditloom, plugged_in):
    found = ditloom("methods", "torn", "--json").document[0]
    assert found["status"] == "cannot be loaded: ModuleNotFoundError: No module named 'no_such_package'"
    shown = ditloom("methods").out
    assert "every-other" in shown and "interval=2" in shown and "cannot be loaded" in shown


def test_methods_by_pattern_and_nearest(ditloom, refused, plugged_in):
    assert [m["key"] for m in ditloom("methods", "EVERY*", "--json").document] == ["every-other"]
    assert "unknown method 'every-othr': did you mean 'every-other'?" in refused("methods", "every-othr")


def test_models_are_counted_from_their_modules(ditloom):
    listed = ditloom("models", "DiT-S/*", "--json").document
    assert [row["name"] for row in listed] == ["DiT-S/2", "DiT-S/4", "DiT-S/8"]
    for row in listed:
        assert set(row) >= MODEL_KEYS
        built = build(row["name"])
        assert row["parameters"] == built.learned_parameters()
        assert row["tokens"] == (32 // built.preset.patch) ** 2
        assert "Diffusion Models with Transformers" in row["paper"]
    assert "facebook-dit" in listed[0]["formats"] and listed[0]["weights"] is None


def test_published_multiply_accumulates(ditloom):
    """DiT-XL/2 at 256 takes 118.64 G (Peebles and Xie 2022, table 4), S/2 6.06 G."""
    (large,) = ditloom("models", "DiT-XL/2", "--json").document
    (small,) = ditloom("models", "dit-s/2", "--json").document
    assert large["macs"] / 1e9 == pytest.approx(118.64, rel=1e-3) and large["parameters"] / 1e6 == pytest.approx(
        675, abs=1
    )
    assert small["macs"] / 1e9 == pytest.approx(6.06, rel=1e-2)


def test_every_preset_and_bundled_model_is_listed(ditloom, monkeypatch):
    counted = {"family": "dit", "parameters": 1, "macs": 2, "tokens": 3, "paper": "a [b]"}
    monkeypatch.setattr(models_command, "counted", lambda config: counted)
    listed = ditloom("models", "--json").document
    assert [row["name"] for row in listed] == [*names(), *presets()]
    assert [row["weights"] for row in listed] == ["bundled"] * len(names()) + [None] * len(presets())
    shown = ditloom("models").out
    assert all(name in shown for name in presets()) and "a [b]" in shown


def test_a_model_folder_is_described_without_its_weights(ditloom, model_folder, monkeypatch):
    monkeypatch.setattr(torch, "load", None)
    (row,) = ditloom("models", model_folder, "--json").document
    assert set(row) >= MODEL_KEYS and row["name"] == "tiny" and row["weights"] == str(model_folder)
    assert (row["process"], row["latents"], row["conditioner"], row["tokens"]) == ("linear", "pixels", "labels", 16)
    assert row["sampling"] == {"steps": 3}


def test_an_unknown_model_is_answered_by_the_nearest(refused):
    assert "unknown model 'DiT-XL2': did you mean 'DiT-XL/2'" in refused("models", "DiT-XL2")


def test_data_sources_and_their_settings(ditloom):
    listed = {source["name"]: source for source in ditloom("data", "list", "--json").document}
    assert sorted(listed) == DATA.names()
    assert listed["emoji"]["settings"]["split"] == "train" and listed["folder"]["settings"]["path"] == "(must be given)"
    assert all(name in ditloom("data").out for name in listed)


def test_fetching_a_source_says_what_it_holds(ditloom):
    found = ditloom("data", "fetch", "emoji:split=held-out", "--json").document
    assert (found["examples"], found["captioned"], found["size"]) == (163, True, [64, 64])
    assert len(found["fingerprint"]) == 32 and found["licence"]
    assert "163" in ditloom("data", "fetch", "emoji:split=held-out").out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("fetsh",), "unknown action of data 'fetsh': did you mean 'fetch'"),
        (("fetch",), "data fetch needs a source: one of cifar10"),
        (("fetch", "emojis"), "unknown data source 'emojis': did you mean 'emoji'"),
        (("fetch", "emoji:splt=a"), "did you mean 'split'"),
        (("fetch", "emoji:split=b"), "unknown split 'b'"),
        (("fetch", "folder"), "the data source folder needs path: write folder:path=..."),
        (("fetch", "folder:path=nowhere"), "nowhere does not exist"),
    ],
)
def test_mistakes_about_data(refused, arguments, sentence):
    assert sentence in refused("data", *arguments)


def test_counts_and_plain_values():
    assert [count(v) for v in (0, 7, 1234, 674_834_720, 118.64e9, 2e12)] == [
        "0",
        "7",
        "1.234 k",
        "674.8 M",
        "118.6 G",
        "2 T",
    ]
    value = {"a": (1, float("nan")), 2: {"x": None, "y": torch.float32}}
    assert plain(value) == {"a": [1, None], "2": {"x": None, "y": "torch.float32"}}
