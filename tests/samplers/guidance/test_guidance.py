"""Guidance rules: their identities, diffusers' own versions, the branches they ask for."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ditloom.contracts.errors import UnknownName, UserError
from ditloom.contracts.registries import GUIDANCE
from ditloom.contracts.sampler import Moment
from ditloom.processes.discrete_vp import DiscreteVP
from ditloom.processes.edm import EDM
from ditloom.processes.linear import Linear
from ditloom.samplers import guidance_rule, sampler
from ditloom.samplers.guided import Guided
from ditloom.samplers.trajectory import finish
from tests.samplers.mixture import no_noise

FLOW = Linear()
GENERATOR = torch.Generator().manual_seed(0)
X, COND, WEAK = (torch.randn(3, 4, 6, 6, generator=GENERATOR) for _ in range(3))
RULES = ["cfg", "cfg:rescale=0.7", "cfg:channels=3", "autoguidance", "cfg-zero-star:zero_steps=0", "apg"]


def moment(t: float = 0.5, step: int = 3, path=FLOW) -> Moment:
    return Moment(X, t, step, 10, path)


def combined(spec, cond=COND, weak=WEAK, **where):
    rule = guidance_rule(spec)
    here = moment(**where)
    given = dict(zip(("cond", rule.weak), (cond, weak), strict=True)) if hasattr(rule, "weak") else {"cond": cond}
    return rule.combine({k: given[k] for k in rule.branches(here)}, here, {})


def test_the_registered_rules():
    assert GUIDANCE.names() == ["apg", "autoguidance", "cfg", "cfg-zero-star", "none"]
    for name in GUIDANCE.names():
        assert guidance_rule(guidance_rule(name).config()) == guidance_rule(name)


@pytest.mark.parametrize("spec", [*RULES, "cfg-zero-star", "none"])
def test_scale_one_is_the_conditional_prediction_alone(spec):
    rule = guidance_rule(spec)
    rule = dataclasses.replace(rule, scale=1.0) if spec != "none" else rule
    assert rule.needs == rule.branches(moment(step=0)) == ("cond",)
    estimate = rule.combine({"cond": COND, getattr(rule, "weak", "uncond"): WEAK}, moment(step=0), {})
    torch.testing.assert_close(estimate.v, COND)


@pytest.mark.parametrize("spec", RULES)
def test_near_scale_one_every_rule_is_near_the_conditional(spec):
    rule = dataclasses.replace(guidance_rule(spec), scale=1 + 1e-6)
    torch.testing.assert_close(combined(rule).v, COND, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("spec", ["cfg", "autoguidance", "cfg-zero-star:zero_steps=0", "apg"])
def test_equal_branches_give_that_branch_at_any_scale(spec):
    torch.testing.assert_close(combined(spec, COND, COND).v, COND, atol=2e-5, rtol=1e-5)


def test_cfg_is_the_formula():
    torch.testing.assert_close(combined("cfg:scale=3").v, WEAK + 3 * (COND - WEAK))
    torch.testing.assert_close(combined("autoguidance:scale=1.42").v, WEAK + 1.42 * (COND - WEAK))


@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "score", "v-trig", "edm"])
def test_cfg_commutes_with_conversions(predicts):
    path = DiscreteVP(predicts=predicts)
    guided = combined("cfg:scale=3", path=path)
    parts = [path.estimate(X, 0.5, p) for p in (COND, WEAK)]
    for name in ("x0", "eps", "v", "score"):
        strong, weak = (getattr(p, name) for p in parts)
        torch.testing.assert_close(getattr(guided, name), weak + 3 * (strong - weak), rtol=1e-4, atol=1e-4)


def test_the_interval_includes_both_ends_and_saves_the_other_branch():
    rule = guidance_rule("cfg:scale=2,start=0.1,end=0.7")
    asked = {t: rule.branches(moment(t)) for t in (0.0, 0.0999, 0.1, 0.4, 0.7, 0.7001, 1.0)}
    both = ("cond", "uncond")
    assert list(asked.values()) == [("cond",), ("cond",), both, both, both, ("cond",), ("cond",)]
    torch.testing.assert_close(combined(rule, t=0.9).v, COND)
    assert all(guidance_rule("cfg").branches(moment(t)) == both for t in (0.0, 0.3, 1.0))
    with pytest.raises(UserError, match="start <= end"):
        guidance_rule("cfg:start=0.7,end=0.1")


def test_first_channels_and_learned_variance_stay_as_in_dit():
    """DiT guides channels 0 to 2; channel 3 and the variance channels keep the conditional's values."""
    path = DiscreteVP(predicts="eps+var")
    cond, weak = torch.cat([COND, X], 1), torch.cat([WEAK, -X], 1)
    three = combined("cfg:scale=4,channels=3", cond, weak, path=path).prediction
    full = WEAK + 4 * (COND - WEAK)
    assert torch.equal(three[:, 3:], cond[:, 3:])
    torch.testing.assert_close(three[:, :3], full[:, :3])
    every = combined("cfg:scale=4", cond, weak, path=path).prediction
    torch.testing.assert_close(every[:, :4], full)
    assert torch.equal(every[:, 4:], X)


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_rescale_equals_diffusers(share):
    utils = pytest.importorskip("diffusers.guiders.guider_utils", reason="needs diffusers' guiders")
    expected = utils.rescale_noise_cfg(WEAK + 5 * (COND - WEAK), COND, guidance_rescale=share)
    torch.testing.assert_close(combined(f"cfg:scale=5,rescale={share}").v, expected)
    if share == 1:
        torch.testing.assert_close(combined("cfg:scale=5,rescale=1").v.std((1, 2, 3)), COND.std((1, 2, 3)))


def test_zero_star_equals_diffusers():
    module = pytest.importorskip("diffusers.guiders.classifier_free_zero_star_guidance")
    scale = module.cfg_zero_star_scale(COND.flatten(1), WEAK.flatten(1)).view(-1, 1, 1, 1)
    expected = scale * WEAK + 3.5 * (COND - scale * WEAK)
    torch.testing.assert_close(combined("cfg-zero-star:scale=3.5,zero_steps=0").v, expected)


def test_the_optimal_scale_is_one_for_equal_and_k_for_scaled_predictions():
    from ditloom.samplers.guidance.cfg_zero_star import optimal_scale

    torch.testing.assert_close(optimal_scale(COND, COND).flatten(), torch.ones(3))
    torch.testing.assert_close(optimal_scale(-2.5 * WEAK, WEAK).flatten(), torch.full((3,), -2.5))
    small = 0.01 * WEAK
    torch.testing.assert_close(optimal_scale(3 * small, small).flatten(), torch.full((3,), 3.0))
    assert not optimal_scale(COND, 0 * WEAK).any()


def test_zero_init_leaves_x_where_it_is_and_needs_no_model():
    rule, solver = guidance_rule("cfg-zero-star:scale=3,zero_steps=2"), sampler("euler")
    model = Guided(lambda x, t, branches, **where: {b: COND for b in branches}, FLOW, rule, 5)
    steps = list(solver.sample(model, X, solver.grid(FLOW, 5), FLOW, no_noise))
    assert torch.equal(steps[0].x, X) and torch.equal(steps[1].x, X) and not torch.equal(steps[2].x, X)
    assert (model.evaluations, model.branch_evaluations) == (3, 6)


def test_apg_equals_diffusers():
    """Its "original formulation" writes the scale as w - 1."""
    module = pytest.importorskip("diffusers.guiders.adaptive_projected_guidance")
    rule, memory = guidance_rule("apg:scale=4,eta=0.2,momentum=-0.5,norm_limit=7"), {}
    path = Linear(predicts="x0")
    buffer = module.MomentumBuffer(-0.5)
    for step in range(3):
        cond, weak = COND * (1 + step), WEAK - step
        expected = module.normalized_guidance(cond, weak, 3.0, buffer, 0.2, 7.0, True)
        given = {"cond": cond, "uncond": weak}
        torch.testing.assert_close(rule.combine(given, moment(path=path, step=step), memory).x0, expected)


def test_apg_without_its_parts_is_cfg():
    plain = "apg:scale=3,eta=1,momentum=0,norm_limit=0"
    torch.testing.assert_close(combined(plain).v, combined("cfg:scale=3").v, rtol=1e-4, atol=1e-4)


def test_apg_removes_the_part_along_the_prediction():
    path = Linear(predicts="x0")
    added = combined("apg:scale=3,momentum=0,norm_limit=0", path=path).x0 - COND
    assert (added * COND).sum((1, 2, 3)).abs().max() < 1e-3 < added.abs().max()


def test_branches_in_one_call_or_two_agree():
    weight = torch.randn(4, 4, generator=GENERATOR)

    def net(x, y):
        return torch.einsum("oc,bchw->bohw", weight, torch.tanh(x + y))

    def separate(x, t, branches, **where):
        return {b: net(x, float(b == "cond")) for b in branches}

    def batched(x, t, branches, **where):
        y = torch.cat([torch.full((len(x), 1, 1, 1), float(b == "cond")) for b in branches])
        out = net(torch.cat([x] * len(branches)), y)
        return dict(zip(branches, out.chunk(len(branches)), strict=True))

    solver, rule = sampler("heun"), guidance_rule("cfg:scale=3,end=0.6")
    models = [Guided(predict, FLOW, rule, 8) for predict in (separate, batched)]
    ends = [finish(solver.sample(m, X, solver.grid(FLOW, 8), FLOW, no_noise)) for m in models]
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-5)
    assert models[0].evaluations == solver.evaluations(8) == 15
    assert models[0].branch_evaluations == 15 + sum(t <= 0.6 for t in _visited(solver))


def _visited(solver) -> list[float]:
    seen = []

    def evaluate(x, t, **where):
        seen.append(t)
        return FLOW.estimate(x, t, x)

    list(solver.sample(evaluate, X, solver.grid(FLOW, 8), FLOW, no_noise))
    return seen


def test_the_network_hears_scaled_input_and_its_own_time():
    path, heard = EDM(), []

    def predict(x, t, branches, **where):
        heard.append((x, t, where))
        return {b: x for b in branches}

    model = Guided(predict, path, guidance_rule("none"), 4)
    estimate = model(X, 0.6, step=2, evaluation=1)
    x, t, where = heard[0]
    torch.testing.assert_close(x, path.scale_input(X, 0.6))
    assert t == path.network_time(0.6) and where == {"step": 2, "evaluation": 1} and estimate.t == 0.6
    model(X, 0.6, step=2, told=0.8)
    assert heard[1][1] == path.network_time(0.8)


def test_memory_lives_as_long_as_the_run():
    def predict(x, t, branches, **where):
        return {b: x if b == "cond" else -x for b in branches}

    rule = guidance_rule("apg:scale=2,momentum=-0.5,norm_limit=0")
    model = Guided(predict, FLOW, rule, 4)
    first, second = model(X, 0.5, step=0).x0, model(X, 0.5, step=1).x0
    model.reset()
    assert not torch.equal(first, second) or rule.eta == 0
    assert torch.equal(model(X, 0.5, step=2).x0, first)


def test_mistakes_are_named():
    with pytest.raises(UnknownName, match="did you mean 'cfg'"):
        guidance_rule("cgf")
    with pytest.raises(UnknownName, match="did you mean 'scale'"):
        guidance_rule("cfg:scal=3")
    model = Guided(lambda x, t, branches, **where: {"cond": x}, FLOW, guidance_rule("cfg"), 3)
    with pytest.raises(UserError, match="needs the branch 'uncond', and the model gives \\['cond'\\]"):
        model(X, 0.5, step=0)
