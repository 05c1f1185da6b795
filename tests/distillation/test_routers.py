"""Training of cache routers on a tiny model: what is learned, what is left alone, and what the losses are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ditloom.caches.routers import SCORES, Gates
from ditloom.conditions.labels import Labels
from ditloom.contracts.errors import UserError
from ditloom.contracts.registries import DATA
from ditloom.distillation.harmonica import HarmoniCaTraining, _Lessons
from ditloom.distillation.learning_to_cache import LearningToCacheTraining
from ditloom.distillation.setting import Setting
from ditloom.latents.pixels import Pixels
from ditloom.model import Model
from ditloom.processes.linear import Linear
from tests.sites import toys

STEPS, SITES = 4, 10
HASTY: dict[str, Any] = {"trajectories": 3, "batch": 2, "weigh_every": 2}


@pytest.fixture
def setting() -> Setting:
    backbone = toys.make("dit").requires_grad_(False)
    names = tuple(f"class {i}" for i in range(9))
    model = Model(backbone, Linear(), Pixels(channels=4), Labels(names=names))
    sampling = model.settings(steps=STEPS, sampler="euler", guidance=2.0)
    return Setting(model, {**sampling, "size": 8}, list(range(9)))


def weights(setting: Setting) -> list[torch.Tensor]:
    return [p.clone() for p in setting.model.backbone.parameters()]


def test_only_routers_learn_and_the_first_step_always_computes(setting: Setting) -> None:
    before = weights(setting)
    seen: list[tuple[int, int, float]] = []
    scores = HarmoniCaTraining(**HASTY).train(setting, lambda n, of, what: seen.append((n, of, what["loss"])))[SCORES]
    fresh = Gates(STEPS, SITES, 0.1, range(1, STEPS), HarmoniCaTraining().seed).scores.detach()
    assert scores.shape == (STEPS, SITES) and bool((scores[0] == 1).all())
    assert bool((scores[1:] != fresh[1:]).all()), "every gate of every later step has moved"
    assert all(torch.equal(a, b) for a, b in zip(before, setting.model.backbone.parameters(), strict=True))
    assert all(p.grad is None for p in setting.model.backbone.parameters())
    assert [(n, of) for n, of, _ in seen] == [(1, 3), (2, 3), (3, 3)] and all(loss > 0 for *_, loss in seen)


def test_training_again_gives_the_same_bits(setting: Setting) -> None:
    first, again = (HarmoniCaTraining(**HASTY).train(setting)[SCORES] for _ in range(2))
    assert torch.equal(first, again)


def test_open_gates_agree_with_the_teacher_and_carry_no_weight(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Gates, "clamp", lambda self: None)
    lessons = _Lessons(HarmoniCaTraining(**HASTY), setting)
    with torch.no_grad():
        for row in lessons.gates.logits:
            row.fill_(40.0)
    lessons.weigh()
    assert max(lessons.weights) < 1e-10
    lessons.trajectory(0)
    assert lessons.loss < 1e-10


def test_weights_measure_what_each_step_adds(setting: Setting) -> None:
    lessons = _Lessons(HarmoniCaTraining(**HASTY), setting)
    lessons.weigh()
    assert lessons.weights[0] == 0 and all(w > 0 for w in lessons.weights[1:])
    assert lessons.gates.active == frozenset(range(1, STEPS))


def test_a_higher_price_computes_less(setting: Setting) -> None:
    shares = []
    for penalty in (0.0, 1.0):
        training = HarmoniCaTraining(trajectories=12, batch=2, weigh_every=12, rate=0.3, penalty=penalty, target=0.0)
        scores = training.train(setting)[SCORES]
        shares.append(float((scores[1:] > 0.1).float().mean()))
    assert shares[1] < shares[0]


def test_the_penalty_is_steered_towards_the_target(setting: Setting) -> None:
    training = HarmoniCaTraining(trajectories=60, batch=1, weigh_every=60, rate=0.2, target=0.5)
    lessons = _Lessons(training, setting)
    lessons.weigh()
    for number in range(60):
        lessons.trajectory(number)
    assert 0.3 < lessons.share < 0.7


class Noise:
    """Pictures of nothing."""

    def __init__(self) -> None:
        from ditloom.contracts.data import SourceInfo

        self.info = SourceInfo("noise", 4, (8, 8), tuple(f"class {i}" for i in range(9)), False, "none")

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Any:
        from ditloom.contracts.data import Example

        g = torch.Generator().manual_seed(index)
        image = torch.randint(256, (8, 8, 4), generator=g, dtype=torch.uint8).numpy()
        return Example(image, index % 9, None, None, f"{index}")

    def fingerprint(self) -> str:
        return "noise"


def test_pairs_of_steps_on_pictures(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditloom.distillation.learning_to_cache.registered", lambda registry, spec: Noise())
    before = weights(setting)
    training = LearningToCacheTraining(iterations=8, batch=2, data="noise", rate=0.1)
    scores = training.train(setting)[SCORES]
    assert bool((scores[::2] == 1).all()), "the first of each pair is a full step"
    assert bool((scores[1::2] < 1).all())
    assert all(torch.equal(a, b) for a, b in zip(before, setting.model.backbone.parameters(), strict=True))
    assert DATA is not None


def test_what_is_refused(setting: Setting) -> None:
    odd = Setting(setting.model, {**setting.sampling, "steps": 5}, setting.inputs)
    with pytest.raises(UserError, match="steps in pairs"):
        LearningToCacheTraining().train(odd)
    with pytest.raises(UserError, match="name a data source"):
        LearningToCacheTraining().train(setting)
    with pytest.raises(UserError, match="above 0"):
        HarmoniCaTraining(trajectories=0)
    with pytest.raises(UserError, match=r"a share in 0\.5\.\.1"):
        LearningToCacheTraining(target=0.4)
