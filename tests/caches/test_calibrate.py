"""`ditloom calibrate`: one run, one file a method, found again for just the runs it fits, refused for others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ditloom.caches.magcache import MagCache
from ditloom.caches.taocache import TaoCache
from ditloom.caches.teacache import TeaCache
from ditloom.calibration import Circumstances, find, fingerprint, keep, spelled
from ditloom.contracts.assets import packed, read
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Assets
from ditloom.contracts.registries import GUIDANCE, SAMPLERS
from ditloom.contracts.settings import registered
from ditloom.loading import load
from ditloom.measure.calibrate import calibrate, calibrated_methods, chosen, flat_part
from ditloom.model import Model, using
from tests.cli.tiny import tiny

STEPS = 8


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return load(tiny(sampling={"steps": STEPS, "sampler": "euler"}).save(tmp_path / "tiny"))


def calibrated(model: Model, *methods: str, steps: int = STEPS) -> list[Path]:
    settings = {**model.settings(steps=steps), "seed": 0}
    found = calibrate(model, [0, 1, 2, 0], settings, methods or calibrated_methods())
    return [keep(assets, key, found.circumstances) for key, assets in found.assets.items()]


def test_every_calibrated_method_is_known() -> None:
    assert {"teacache", "magcache", "taocache"} <= set(calibrated_methods())
    assert chosen("magcache, teacache") == ["magcache", "teacache"]
    with pytest.raises(UserError, match="fbcache reads no calibration; those that do are .*magcache"):
        chosen("fbcache")
    with pytest.raises(UserError, match="unknown method 'magcach': did you mean 'magcache'"):
        chosen("magcach")


def test_it_is_kept_with_the_model_and_found(model: Model) -> None:
    paths = calibrated(model)
    assert all(path.parent == model.folder / "calibration" for path in paths)  # type: ignore[operator]
    assert {path.name.partition("-")[0] for path in paths} >= {"teacache", "magcache", "taocache"}
    for method in ("teacache:threshold=0.5", "magcache:threshold=0.5", "taocache"):
        result = model.generate([0, 1], using=[method])
        assert result.report.share_saved > 0.1, method
        assert not any("no calibration" in note for note in result.report.notes)


def test_it_is_found_by_another_load_and_by_an_equal_spelling(model: Model) -> None:
    calibrated(model, "magcache")
    again = load(model.folder)  # type: ignore[arg-type]
    again.generate([0], using=["magcache"])
    again.generate([0], using=["magcache"], guidance=3.0, sampler="euler", steps=STEPS)
    again.to(dtype=torch.bfloat16).generate([0], using=["magcache"])


@pytest.mark.parametrize(
    "change, said",
    [
        ({"steps": 5}, f"there is one for steps {STEPS} and this run has 5): make it with"),
        ({"sampler": "heun"}, "there is one for sampler euler and this run has heun"),
        ({"guidance": 5.0}, "there is one for guidance cfg:scale=3.0 and this run has cfg:scale=5.0"),
    ],
)
def test_another_run_is_refused_with_the_command_that_helps(model: Model, change: dict[str, Any], said: str) -> None:
    calibrated(model, "magcache", "teacache")
    with pytest.raises(UserError) as refused:
        model.generate([0], using=["magcache"], **change)
    sentence = str(refused.value)
    assert sentence.startswith("magcache needs a calibration of this model for this run") and said in sentence
    assert f"ditloom calibrate --model {model.folder} --methods magcache --steps" in sentence
    report = model.generate([0], using=["teacache"], **change).report
    assert any("as there is no calibration for these settings" in note for note in report.notes)


def test_another_model_is_refused(model: Model, tmp_path: Path) -> None:
    (path,) = calibrated(model, "taocache")
    with torch.no_grad():
        next(model.backbone.parameters()).mul_(1.5)
    with pytest.raises(UserError, match="needs a calibration of this model for this run .there is one for model"):
        model.generate([0], using=["taocache"])
    with pytest.raises(UserError, match="the calibration of taocache was made for model .*: calibrate again"):
        model.generate([0], using=[f"taocache:calibration={path}"])


def test_a_missing_one_is_told_with_the_command(model: Model) -> None:
    with pytest.raises(UserError, match="make it with  ditloom calibrate --model .* --sampler euler --guidance cfg"):
        model.generate([0], using=["magcache"])


def test_a_named_file(model: Model, tmp_path: Path) -> None:
    (path,) = calibrated(model, "magcache")
    moved = path.rename(tmp_path / "mine.safetensors")
    model.generate([0], using=[f"magcache:calibration={moved}"])
    with pytest.raises(UserError, match="was made for method magcache and this run has taocache"):
        model.generate([0], using=[f"taocache:calibration={moved}"])
    with pytest.raises(UserError, match="the calibration nowhere.safetensors cannot be read"):
        model.generate([0], using=["magcache:calibration=nowhere.safetensors"])
    (tmp_path / "other.safetensors").write_bytes(packed(Assets({"ratio": torch.ones(3)}))[:20])
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "other.safetensors")


def test_other_steps_where_a_method_tolerates_them(model: Model) -> None:
    calibrated(model, "magcache")
    model.generate([0], using=["magcache:interpolate=True"], steps=5)


def test_attached_for_runs_other_than_the_usual(model: Model) -> None:
    """The run says which calibration is meant, not the moment of attaching."""
    calibrated(model, "magcache", steps=5)
    with using(model, "magcache:threshold=0.5"):
        assert model.generate([0], steps=5).report.share_saved > 0.1
        with pytest.raises(UserError, match="magcache needs a calibration"):
            model.generate([0])


def test_several_live_side_by_side(model: Model) -> None:
    first, second = (calibrated(model, "magcache", steps=steps)[0] for steps in (STEPS, 5))
    assert first.parent == second.parent and first != second
    for steps in (STEPS, 5):
        model.generate([0], using=["magcache"], steps=steps)


def test_a_model_that_may_not_be_written_uses_the_cache(model: Model, tmp_path: Path) -> None:
    (model.folder / "calibration").write_text("in the way")  # type: ignore[operator]
    (path,) = calibrated(model, "magcache")
    assert path.parent == tmp_path / "cache" / "ditloom" / "calibration" / fingerprint(model.backbone)
    model.generate([0], using=["magcache"])


def test_a_bundled_model_is_not_written_to(tmp_path: Path) -> None:
    bundled = load("fashion")
    now = Circumstances.of(bundled, bundled.latent_shape())
    path = keep(Assets({"ratio": torch.ones(20)}, now.facts("magcache")), "magcache", now)
    assert path.is_relative_to(tmp_path / "cache") and now.name == "fashion"
    assert find(MagCache(), now) is not None


def test_what_it_is_made_of(model: Model) -> None:
    (path,) = calibrated(model, "taocache")
    made = read(path)
    assert made.tensors["cosine"].shape == (STEPS,) and made.made_for["pictures"] == 4
    assert made.made_for["method"] == "taocache" and made.made_for["size"] == "1x16x16"
    assert json.loads(made.made_for["process"])["name"] == "linear"
    assert path.stat().st_size < 3000


def test_batches_do_not_matter(model: Model) -> None:
    settings = {**model.settings(), "seed": 0}
    one, other = (calibrate(model, [0, 1, 2], settings, ["magcache"], batch_size=n) for n in (3, 1))
    torch.testing.assert_close(one.assets["magcache"].tensors["ratio"], other.assets["magcache"].tensors["ratio"])
    assert set(one.curves()) == {"attn", "mlp"} and len(one.curves()["attn"]) == STEPS - 1


def test_attached_methods_do_not_disturb_it(model: Model) -> None:
    settings = {**model.settings(), "seed": 0}
    plain = calibrate(model, [0], settings, ["magcache"]).assets["magcache"].tensors["ratio"]
    model.attached.append("fbcache:threshold=9")
    assert torch.equal(plain, calibrate(model, [0], settings, ["magcache"]).assets["magcache"].tensors["ratio"])


@pytest.mark.parametrize("steps", [1, 2])
def test_too_few_steps(model: Model, steps: int) -> None:
    settings = {**model.settings(steps=steps), "seed": 0}
    with pytest.raises(UserError, match=f"taocache learns nothing from {steps} steps: calibrate with more"):
        calibrate(model, [0], settings, ["taocache"])


def test_advice_can_be_used(model: Model) -> None:
    settings = {**model.settings(), "seed": 0}
    found = calibrate(model, [0, 1], settings, calibrated_methods())
    for key, assets in found.assets.items():
        keep(assets, key, found.circumstances)
    told = list(found.advice())
    assert {spec.partition(":")[0] for spec, _ in told} >= {"teacache", "magcache", "taocache"}
    for spec, _ in told:
        model.generate([0], using=[spec])


def test_spelling() -> None:
    assert spelled(registered(SAMPLERS, "euler")) == "euler"
    assert spelled(registered(GUIDANCE, "cfg:scale=7,rescale=0.7")) == "cfg:scale=7,rescale=0.7"


def test_the_flat_part_of_a_curve() -> None:
    assert flat_part([9, 3, 1, 1, 1, 2, 8, 9]) == (2, 7)
    assert flat_part([1.0]) == (1, 2)


def test_dataclasses_of_calibrated_methods() -> None:
    assert MagCache(interpolate=True).tolerates == {"steps"} and not TeaCache().needs_calibration
    assert TaoCache().needs_calibration and not TaoCache(alpha=0.5).needs_calibration


def run_command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    from ditloom.cli import main

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return call


def test_the_command(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    ditloom = run_command(capsys)
    code, out, _ = ditloom("calibrate", "--model", model.folder, "--count", 4, "--steps", 6, "--json")
    document = json.loads(out)
    assert code == 0 and set(document["files"]) == set(calibrated_methods())
    assert all(Path(path).is_file() for path in document["files"].values())
    assert document["made_for"]["magcache"]["steps"] == 6 and len(document["curves"]["attn"]) == 5
    assert len(document["tensors"]["magcache"]["ratio"]) == 6
    code, _, err = ditloom("generate", "--model", model.folder, "--classes", "all", "--steps", 6, "--using", "magcache")
    assert code == 0, err


def test_the_command_tells_how_to_go_on(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run_command(capsys)("calibrate", "--model", model.folder, "--count", 2, "--methods", "magcache")
    assert code == 0 and "calibrate 2/2 pictures" in err
    assert "with  --steps 8 --sampler euler --guidance cfg:scale=3.0  use" in out
    assert "magcache:threshold=0.06,max_consecutive=3" in out and "change of" in out


def test_a_timetable_is_learned_kept_and_found(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    training = "harmonica:trajectories=2,batch=2,target=0.5"
    code, out, err = run_command(capsys)("calibrate", "--model", model.folder, "--count", 3, "--train", training)
    assert code == 0 and "harmonica 2/2 rounds" in err and "the learned timetable" in out, err
    assert "teacache" not in out, "only what was asked for"
    result = model.generate([0], using=["harmonica"])
    assert result.report.full_macs > 0
    with pytest.raises(UserError, match="ditloom calibrate --model .* --train harmonica"):
        model.generate([0], using=["harmonica"], steps=5)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--methods", "harmonica"), "ask for it with --train harmonica"),
        (("--train", "harmonica:trajectory=2"), "did you mean 'trajectories'"),
        (("--train", "harmoni"), "did you mean 'harmonica'"),
        (("--methods", "fbcache"), "fbcache reads no calibration"),
        (("--count", 0), "--count and --batch-size are at least 1"),
        (("--steps", 2, "--methods", "taocache"), "taocache learns nothing from 2 steps"),
        (("--classes", "cat"), "'cat'"),
    ],
)
def test_refusals(model: Model, arguments: Any, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run_command(capsys)("calibrate", "--model", model.folder, *arguments)
    assert (code, out) == (2, "") and said in err
