"""The loop: bit-exact resume, accumulation, faults, signals, logs."""

import os
import signal
from dataclasses import replace

import pytest
import torch

from ditloom.contracts.errors import UserError
from ditloom.training import checkpoint
from ditloom.training.metrics import read_metrics, series
from ditloom.training.posthoc import snapshots
from ditloom.training.trainer import Diverged
from tests.training import tiny

VARIANTS = {
    "plain": {},
    "accumulated": {"micro_batch": 3},
    "bf16": {"precision": "bf16"},
    "bf16 accumulated and checkpointed": {"precision": "bf16", "micro_batch": 4, "checkpointing": True},
}


def interrupted(run, stops, **changes):
    """Trained to the end in several processes' worth of trainers, each killed without a word after some batches."""
    for stop in stops:
        part = tiny.trainer(run, **changes)
        part._open_log = lambda stack, resumed: None
        for images in _quietly(part):
            if images >= stop:
                break
    last = tiny.trainer(run, **changes)
    last.train()
    return last


def _quietly(trainer):
    """The loop without its end: saves when due, then just stops being called."""
    trainer.resume()
    before = trainer.images
    for images in trainer.steps():
        trainer._keep(before, images, stop=False)
        before = images
        yield images


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_killed_and_resumed_run_ends_in_the_same_bits(tmp_path, changes):
    changes = {**changes, "save_every": 24}
    whole = tiny.trainer(tmp_path / "whole", **changes)
    whole.train()
    parts = interrupted(tmp_path / "parts", (8, 32, 80), **changes)
    assert parts.images == 128
    assert tiny.same(tiny.weights(whole), tiny.weights(parts))


@pytest.mark.slow
def test_a_compiled_run_resumes_to_the_same_bits_with_one_graph_for_all_blocks(tmp_path):
    changes = {"compile": True, "precision": "bf16", "save_every": 24, "images": 64}
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    whole = tiny.trainer(tmp_path / "whole", sample=_sampled, sample_every=32, **changes)
    whole.train()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    parts = interrupted(tmp_path / "parts", (40,), **changes)
    assert tiny.same(tiny.weights(whole), tiny.weights(parts))
    plain = tiny.trainer(tmp_path / "plain", **{**changes, "compile": False})
    plain.train()
    assert 0 < tiny.furthest(tiny.weights(whole), tiny.weights(plain)) < 0.05


def _sampled(network, images):
    """A forward of another batch size than training's."""
    condition = tiny.feed().conditions([0, 1, 2], [0, 1, 2])
    return network(torch.zeros(3, *tiny.SHAPE), torch.full((3,), 0.5), condition).float().numpy().tobytes()


@pytest.mark.parametrize("micro", [1, 3, 4])
def test_accumulation_equals_the_large_batch(tmp_path, micro):
    whole = tiny.trainer(tmp_path / "a", lr=1e-4)
    parts = tiny.trainer(tmp_path / "b", lr=1e-4, micro_batch=micro)
    whole.train(), parts.train()
    assert tiny.furthest(tiny.weights(whole), tiny.weights(parts)) < 1e-6


def test_the_last_batch_is_whole_and_the_count_exact(tmp_path):
    built = tiny.trainer(tmp_path, images=20)
    assert built.train().images == 24
    assert checkpoint.read(checkpoint.latest(tmp_path).path).state["images"] == 24


def test_a_finished_run_trains_no_further(tmp_path):
    tiny.trainer(tmp_path, images=32).train()
    again = tiny.trainer(tmp_path, images=32)
    before = tiny.weights(tiny.trainer(tmp_path / "x", images=32))
    again.train()
    assert again.images == 32 and not tiny.same(before, tiny.weights(again))
    longer = tiny.trainer(tmp_path, images=48)
    longer.train()
    straight = tiny.trainer(tmp_path / "straight", images=48)
    straight.train()
    assert tiny.same(tiny.weights(longer), tiny.weights(straight))


def test_training_lowers_the_loss_and_logs_it(tmp_path):
    built = tiny.trainer(tmp_path, images=800, lr=3e-3)
    built.train()
    images, losses = series(read_metrics(tmp_path / "metrics.jsonl"), "loss")
    assert images == list(range(16, 801, 16))
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])
    names = set(read_metrics(tmp_path / "metrics.jsonl")[0])
    assert {"images", "loss", "denoise.mse", "gradient", "rate", "seconds", "speed"} <= names


def test_a_nan_loss_stops_and_names_the_last_good_checkpoint(tmp_path):
    built = tiny.trainer(tmp_path, save_every=24)
    learn = built.learner.learn

    def poisoned(micro, first, size):
        if first == 48:
            micro[0].x.fill_(float("nan"))
        learn(micro, first, size)

    built.learner.learn = poisoned
    with pytest.raises(Diverged, match="not a number at 56 images: the last good checkpoint is .*images-000000000048"):
        built.train()
    saved = checkpoint.read(checkpoint.latest(tmp_path).path)
    assert saved.images == 48
    assert all(torch.isfinite(t).all() for t in saved.tensors["model"].values())


def test_weights_that_are_no_numbers_are_never_saved(tmp_path):
    built = tiny.trainer(tmp_path, save_every=24)
    learn = built.learner.learn

    def broken(micro, first, size):
        learn(micro, first, size)
        if first == 40:
            built.learner.masters.named["roles.student.blocks.0.mlp.fc1.weight"].data[0, 0] = float("inf")

    built.learner.learn = broken
    with pytest.raises(Diverged, match="last good checkpoint is .*images-000000000024"):
        built.train()


def test_changed_data_is_refused(tmp_path):
    tiny.trainer(tmp_path, images=32).train()
    changed = tiny.trainer(tmp_path, data=tiny.feed(fingerprint="other"))
    with pytest.raises(UserError, match="the data set has changed since .* began"):
        changed.train()


def test_a_checkpoint_of_another_network_is_refused_by_name(tmp_path):
    tiny.trainer(tmp_path, images=32).train()
    other = tiny.trainer(tmp_path)
    other.learner = tiny.Learner({"student": tiny.network(width=48)}, tiny.PROCESS, other.learner.phases, averages={})
    with pytest.raises(UserError, match=r"'model' does not fit this model: .* has shape \[32"):
        other.train()


def test_a_broken_newest_checkpoint_falls_back_and_says_so(tmp_path, capsys):
    tiny.trainer(tmp_path, images=64, save_every=24).train()
    newest = checkpoint.latest(tmp_path).path
    os.truncate(newest / "model.safetensors", 100)
    again = tiny.trainer(tmp_path, images=64, save_every=24)
    again.train()
    assert "damaged: model.safetensors holds 100 bytes" in capsys.readouterr().err
    whole = tiny.trainer(tmp_path / "whole", images=64)
    whole.train()
    assert tiny.same(tiny.weights(whole), tiny.weights(again))


def test_sigterm_saves_and_the_run_goes_on_to_the_same_bits(tmp_path):
    built = tiny.trainer(tmp_path / "a")
    learn = built.learner.learn

    def killed(micro, first, size):
        if first == 40:
            os.kill(os.getpid(), signal.SIGTERM)
        learn(micro, first, size)

    built.learner.learn = killed
    outcome = built.train()
    assert outcome.stopped and outcome.images == 48 and outcome.checkpoint.name.endswith("048")
    rest = tiny.trainer(tmp_path / "a")
    assert not rest.train().stopped
    whole = tiny.trainer(tmp_path / "b")
    whole.train()
    assert tiny.same(tiny.weights(whole), tiny.weights(rest))
    images, _ = series(read_metrics(tmp_path / "a" / "metrics.jsonl"), "loss")
    assert images == list(range(16, 129, 16))


def test_a_disk_that_fills_up_is_one_sentence_and_the_old_checkpoint_stays(tmp_path, monkeypatch):
    built = tiny.trainer(tmp_path, save_every=24)
    real = checkpoint.save

    def full(run, images, *args, **kwargs):
        if images > 24:
            raise UserError("could not save the checkpoint: No space left on device")
        return real(run, images, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(UserError, match="No space left on device; training stopped at 48 images"):
        built.train()
    assert checkpoint.latest(tmp_path).path.name.endswith("024")


def test_two_trainers_never_share_a_run(tmp_path):
    first = tiny.trainer(tmp_path)
    learn = first.learner.learn

    def meanwhile(micro, start, size):
        with pytest.raises(UserError, match="another process is writing to"):
            tiny.trainer(tmp_path).train()
        learn(micro, start, size)

    first.learner.learn = meanwhile
    first.config = replace(first.config, images=8)
    first.train()


def test_samples_come_from_the_average_and_leave_no_trace(tmp_path):
    seen = []

    def sample(network, images):
        seen.append((images, {n: p.detach().clone() for n, p in network.named_parameters()}, network.training))
        return b"picture"

    for precision in ("fp32", "bf16"):
        seen.clear()
        run = tmp_path / precision
        watched = tiny.trainer(run, sample=sample, sample_every=64, precision=precision)
        plain = tiny.trainer(tmp_path / f"{precision}-plain", precision=precision)
        watched.train(), plain.train()
        assert tiny.same(tiny.weights(watched), tiny.weights(plain))
        assert [images for images, _, _ in seen] == [64, 128] and not seen[0][2]
        average = watched.learner.tracks["ramped"].averages
        compute = watched.learner.step.networks["student"].dtype
        assert all(torch.equal(seen[-1][1][n], average[n].to(compute)) for n in average)
        assert sorted(path.name for path in (run / "samples").iterdir())[-1] == "images-000000000128.png"


def test_marked_checkpoints_and_power_snapshots_are_kept(tmp_path):
    tiny.trainer(tmp_path, save_every=16, mark_every=50, keep=1, snapshot_every=64).train()
    assert [path.name[-3:] for path in checkpoint.folders(tmp_path)] == ["128", "112", "064"]
    assert [moment.images for moment in snapshots(tmp_path)] == [64, 128]
