"""The evaluator: batch sizes, resuming, protocols, and a real tiny model."""

import json

import numpy as np
import pytest
import torch
from painter import Painter, patch, real

from ditloom.contracts.errors import UnknownName, UserError
from ditloom.measure.drawing import Sampling, draw, model_hash
from ditloom.measure.evaluate import anchors, evaluate, save_measurements
from ditloom.measure.features import built
from ditloom.measure.frechet import Frechet

TRAINING, HELD_OUT = real(range(4)), real(range(4, 6))
DIT = {"depth": 1, "width": 16, "heads": 2, "patch": 4, "image_size": 8, "channels": 1, "classes": 10}
ALL = ("frechet", "kernel-distance:subsets=5", "memorisation", "retrieval")


def measured(model=None, batch_size=7, **given):
    sampling = Sampling(batch_size=batch_size)
    return evaluate(
        model or Painter(), HELD_OUT.cases, TRAINING, HELD_OUT, metrics=ALL, extractor="pixels:size=8",
        sampling=sampling, **given,
    )  # fmt: skip


def test_values_and_hashes_do_not_depend_on_the_batch_size():
    first = [m.to_dict() for m in measured(batch_size=3).measurements]
    for batch_size in (1, 8, 100):
        assert [m.to_dict() for m in measured(batch_size=batch_size).measurements] == first


def test_an_interrupted_evaluation_goes_on_and_draws_each_picture_once(tmp_path):
    model = Painter(fail_at=14)
    with pytest.raises(KeyboardInterrupt):
        measured(model, folder=tmp_path)
    assert model.drawn == list(range(14))
    model.fail_at = None
    found = measured(model, folder=tmp_path)
    assert model.drawn == list(range(20))
    assert [m.to_dict() for m in found.measurements] == [m.to_dict() for m in measured().measurements]
    assert len(list(tmp_path.glob("*.png"))) == 20
    (tmp_path / "000003.png").write_bytes(b"torn")
    measured(model, folder=tmp_path)
    assert model.drawn[20:] == list(range(7))


def test_a_folder_of_another_drawing_is_refused_by_what_differs(tmp_path):
    model = Painter()
    draw(model, [1, 2], Sampling(), tmp_path)
    draw(model, [1, 2], Sampling(batch_size=1), tmp_path)
    assert model.drawn == [0, 1]
    for sampling, inputs, said in (
        (Sampling(steps=4), [1, 2], "steps"),
        (Sampling(seed=1), [1, 2], "seed"),
        (Sampling(), [1, 3], "inputs"),
    ):
        with pytest.raises(UserError, match=said):
            draw(model, inputs, sampling, tmp_path)
    with torch.no_grad():
        model.backbone.weight += 1
    with pytest.raises(UserError, match="another model"):
        draw(model, [1, 2], Sampling(), tmp_path)


def test_every_number_carries_its_protocol():
    found = measured()
    by_name = {m.protocol.metric: m for m in found.measurements}
    said = by_name["frechet"].protocol
    assert (said.samples, said.steps, said.sampler, said.extractor) == (20, 3, "brush", "pixels-8")
    assert said.seeds == "0, images 0 to 19"
    assert said.extra["reference_samples"] == 40
    assert said.model.startswith("painter ")
    assert by_name["kernel-distance"].error > 0
    assert len({m.protocol.hash for m in found.measurements}) == len(found.measurements)
    assert found.value("retrieval/right-group") == 1.0


def test_other_weights_or_settings_change_the_hash():
    model = Painter()
    before = model_hash(model)
    with torch.no_grad():
        model.backbone.weight[0] += 1e-4
    assert model_hash(model) != before
    hashes = [
        evaluate(
            model, HELD_OUT.cases, TRAINING, HELD_OUT, metrics=["memorisation"], extractor="pixels", sampling=sampling
        ).measurements[0].protocol.hash
        for sampling in (Sampling(), Sampling(steps=5), Sampling(guidance=2.0), Sampling(using=("skip:every=2",)))
    ]  # fmt: skip
    assert len(set(hashes)) == 4


def test_the_json_is_strict(tmp_path):
    found = measured()
    found.save(tmp_path / "deep" / "found.json")
    rows = json.loads((tmp_path / "deep" / "found.json").read_text())
    assert [row["hash"] for row in rows] == [m.protocol.hash for m in found.measurements]
    broken = [type(m)(float("inf"), m.protocol) for m in found.measurements]
    save_measurements(broken, tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text())[0]["value"] is None


def test_anchors_measure_the_held_out_pictures():
    found = anchors(TRAINING, HELD_OUT, [Frechet()], built("pixels:size=8"))[0]
    assert found.protocol.model == "real held-out pictures"
    assert 0 < found.value < measured().value("frechet") * 10


def test_unknown_metrics_and_nothing_to_draw_are_refused():
    with pytest.raises(UnknownName, match="'frechet'"):
        evaluate(Painter(), HELD_OUT.cases, TRAINING, HELD_OUT, metrics=["freche"], extractor="pixels")
    with pytest.raises(UserError, match="nothing to draw"):
        draw(Painter(), [])


def test_pictures_are_those_of_the_model_in_order():
    drawn = draw(Painter(), [3, 1, 4], Sampling(batch_size=2, seed=5))
    assert np.array_equal(drawn, np.stack([patch(c, 1000 + 97 * 5 + i) for i, c in enumerate([3, 1, 4])]))


def test_a_real_model_draws_the_same_pictures_in_any_batches():
    from ditloom.loading import assemble

    config = {
        "backbone": {**DIT, "family": "dit", "learn_sigma": False},
        "process": "linear",
        "latents": {"name": "pixels", "channels": 1},
        "conditioner": {"name": "labels", "num_classes": 10},
        "info": {"name": "tiny"},
    }
    torch.manual_seed(0)
    model = assemble(config)
    for parameter in model.backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    sampling = [Sampling(steps=2, guidance=1.5, batch_size=size) for size in (1, 4)]
    one, four = (draw(model, list(range(5)), given) for given in sampling)
    assert one.shape == (5, 8, 8, 1)
    assert np.abs(one.astype(int) - four).max() <= 1
    assert np.unique(one).size > 20
