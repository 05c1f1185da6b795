"""Attaching: what is refused, in a sentence; hooks of other libraries go on working; times and branches of a caller."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ditloom
from ditloom.adapters import finding
from ditloom.adapters.contract import Adapter
from ditloom.adapters.dit import DiT
from ditloom.adapters.timeline import Timeline
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Tap
from ditloom.contracts.plan import Action
from ditloom.contracts.time import DISCRETE_1000
from tests.adapters.driving import BRANCHES, attached, latents, plain
from tests.adapters.pipelines import PIPES, Clocks
from tests.adapters.tiny import CASES
from tests.sites.walkthroughs import Added, Broadcast, Captures, FirstBlockCache, Regional

diffusers = pytest.importorskip("diffusers")
DIT = CASES["dit"]


def step(t: int = 0, **more: Any) -> Tensor:
    with torch.no_grad():
        return DIT.module(**DIT.arguments(latents(DIT)[t], DIT.times[t]), **more).sample


def using(*methods: Any, **options: Any) -> Any:
    return ditloom.using(DIT.module, *methods, timesteps=DIT.times, branches=BRANCHES, **options)


class TestRefused:
    def test_a_class_without_adapter(self) -> None:
        with pytest.raises(UserError, match="no adapter knows the class Linear of torch"):
            ditloom.using(nn.Linear(2, 2), timesteps=[1.0])

    def test_another_version(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(finding, "version", lambda library: "0.30.2")
        with pytest.raises(UserError, match=r"checked with diffusers from 0\.42 to below 0\.43, and 0\.30\.2"):
            using()

    def test_what_is_neither_module_nor_pipeline(self) -> None:
        with pytest.raises(UserError, match="got a dict"):
            ditloom.using({})

    def test_a_bare_transformer_without_times(self) -> None:
        with pytest.raises(UserError, match="needs timesteps="):
            ditloom.using(DIT.module, Broadcast(2))

    def test_a_pipeline_of_unknown_guidance(self) -> None:
        class Odd(type(PIPES["dit"].pipe)):  # type: ignore[misc]
            pass

        parts = PIPES["dit"].pipe.components
        odd = Odd(transformer=parts["transformer"], vae=parts["vae"], scheduler=parts["scheduler"])
        with pytest.raises(UserError, match="nothing is known of the guidance of Odd"):
            ditloom.using(odd, Broadcast(2))
        clocks = Clocks()
        with ditloom.using(odd, clocks, branches=("cond", "uncond")):
            odd.set_progress_bar_config(disable=True)
            odd([1], num_inference_steps=2, output_type="pt")
        assert clocks.rows == [("cond", "uncond")] * 2

    def test_a_second_attachment(self) -> None:
        with using(), pytest.raises(UserError, match="attached to this DiTTransformer2DModel already"), using():
            pass

    def test_another_thread(self) -> None:
        caught: list[BaseException] = []

        def call() -> None:
            try:
                step()
            except UserError as error:
                caught.append(error)

        with using():
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
        assert "another thread" in str(caught[0])

    def test_a_time_that_is_not_in_the_run(self) -> None:
        with using(Broadcast(2)), pytest.raises(UserError, match="called at time 123, .* nearest is 50"):
            DIT.module(**DIT.arguments(latents(DIT)[0], 123.0))

    def test_rows_that_do_not_divide(self) -> None:
        with using(Broadcast(2)), pytest.raises(UserError, match="3 rows cannot hold the guidance branches"):
            DIT.module(torch.zeros(3, 4, 8, 8), torch.full((3,), 999), torch.zeros(3, dtype=torch.long))

    def test_a_site_it_lacks(self) -> None:
        with pytest.raises(UserError, match="DiT has no temporal attention"), using(Broadcast(2, kind="temporal")):
            pass

    def test_stages_inside_attention(self) -> None:
        with pytest.raises(UserError, match="runs as a whole"), using(Captures([Tap("q_proj", 0)])):
            step()

    def test_segments_and_rules(self) -> None:
        with pytest.raises(UserError, match="adds token segments"), using(Added(torch.zeros(1, 4, 8, 8))):
            pass
        with pytest.raises(UserError, match="sets an attention rule"), using(Regional(torch.ones(1), torch.ones(1))):
            pass

    def test_a_method_that_chooses_the_steps(self) -> None:
        with pytest.raises(UserError, match="fewer-steps changes how a run is sampled"):
            using("fewer-steps:steps=3").__enter__()

    def test_a_module_that_computes_something_else(self) -> None:
        changed = CASES["dit"].make().eval()
        changed.norm_out = nn.Sequential(changed.norm_out, nn.Dropout(0.5)).train()
        with (
            ditloom.using(changed, timesteps=DIT.times, branches=BRANCHES),
            pytest.raises(UserError, match="does not compute what its adapter says"),
        ):
            changed(**DIT.arguments(latents(DIT)[0], DIT.times[0]))
        assert "forward" not in vars(changed)

    def test_a_cache_of_diffusers_beside(self) -> None:
        case = CASES.get("flux")
        if case is None:
            pytest.skip("no transformer with caches of its own")
        case.module.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
        try:
            with pytest.raises(UserError, match="disable_cache"):
                ditloom.using(case.module, timesteps=[1.0]).__enter__()
        finally:
            case.module.disable_cache()


class TestHooks:
    def test_of_accelerate_go_on_working(self) -> None:
        from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

        seen: list[str] = []

        class Hook(ModelHook):  # type: ignore[misc]
            def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                seen.append(type(module).__name__)
                return args, kwargs

        expected = step()
        add_hook_to_module(DIT.module, Hook())
        inner = DIT.module.transformer_blocks[1]
        add_hook_to_module(inner, Hook())
        try:
            with using(Captures([Tap("mlp", 1)])):
                assert torch.equal(step(), expected)
            assert seen.count("DiTTransformer2DModel") == 1
            assert seen.count("BasicTransformerBlock") >= 2  # the check by the original, and the run
            seen.clear()
            step()
            assert len(seen) == 2
        finally:
            for module in (inner, DIT.module):
                remove_hook_from_module(module)
                vars(module).pop("forward", None)

    def test_of_diffusers_go_on_working(self) -> None:
        from diffusers.hooks import HookRegistry, ModelHook

        class Doubles(ModelHook):  # type: ignore[misc]
            def post_forward(self, module: nn.Module, output: Any) -> Any:
                output.sample = 2 * output.sample
                return output

        expected = step()
        registry = HookRegistry.check_if_exists_or_initialize(DIT.module)
        registry.register_hook(Doubles(), "doubles")
        try:
            with using(Broadcast(2)):
                assert torch.equal(step(), 2 * expected)
            assert torch.equal(step(), 2 * expected)
        finally:
            registry.remove_hook("doubles")
            del DIT.module._diffusers_hook
            vars(DIT.module).pop("forward", None)
        assert torch.equal(step(), expected)

    def test_added_while_attached_stay(self) -> None:
        from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

        expected = step()
        with using(Broadcast(2)):
            add_hook_to_module(DIT.module, ModelHook())
            assert torch.equal(step(), expected)
        assert torch.equal(step(), expected)
        remove_hook_from_module(DIT.module)
        vars(DIT.module).pop("forward", None)
        assert torch.equal(step(), expected)


class TestTold:
    def test_conditions_made_anew_on_every_call_are_recognised(self) -> None:
        _, run = attached(DIT, Broadcast(2))  # `arguments` draws the labels again for every step
        assert run.report.count("attn", Action.REUSE) > 0

    def test_another_condition_makes_what_is_stored_absent(self) -> None:
        with using(Broadcast(99)) as run, torch.no_grad():
            step(0)
            step(1)
            reused = run.report.count("attn", Action.REUSE)
            other = DIT.arguments(latents(DIT)[2], DIT.times[2])
            other["class_labels"] = other["class_labels"] + 1
            DIT.module(**other)
        assert reused and run.report.count("attn", Action.REUSE) == reused

    def test_changed_weights_make_what_is_stored_absent(self) -> None:
        weight = DIT.module.transformer_blocks[2].ff.net[2].weight
        with using(Broadcast(99)) as run, torch.no_grad():
            step(0)
            weight.mul_(1.0)
            step(1)
        assert run.report.count("attn", Action.REUSE) == 0

    def test_another_shape_makes_what_is_stored_absent(self) -> None:
        with using(Broadcast(99)) as run, torch.no_grad():
            step(0)
            one = DIT.arguments(latents(DIT)[1][:1], DIT.times[1])
            DIT.module(**one)
        assert run.report.count("attn", Action.REUSE) == 0

    def test_a_restart(self) -> None:
        with using(Broadcast(99)) as run, torch.no_grad():
            step(0)
            run.restart()
            step(1)
        assert run.report.count("attn", Action.REUSE) == 0

    def test_memory_above_a_limit(self) -> None:
        with using(Broadcast(2), memory_limit=1000), pytest.raises(UserError, match="the limit is 1 kB"):
            step()


class TestTimeline:
    def test_a_solver_of_two_stages(self) -> None:
        line = Timeline(torch.tensor([9.0, 6.0, 6.0, 3.0, 3.0]), order=2)
        visits = []
        for value in (9.0, 6.0, 6.0, 3.0, 3.0):
            at = line.place(torch.tensor([value]), ("cond",))
            visits.append(line.visit(at, ("cond",)))
        assert line.steps == 3
        assert visits == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]

    def test_a_time_that_comes_twice(self) -> None:
        line = Timeline(torch.tensor([9.0, 6.0, 6.0, 3.0]))
        visits = [line.visit(line.place(torch.tensor([v]), ("cond",)), ("cond",)) for v in (9.0, 6.0, 6.0, 3.0)]
        assert visits == [(0, 0), (1, 0), (2, 1), (3, 0)]

    def test_a_further_call_at_the_same_place(self) -> None:
        line = Timeline(torch.tensor([9.0, 6.0]))
        visits = [line.visit(line.place(torch.tensor([9.0]), (b,)), (b,)) for b in ("cond", "uncond", "cond")]
        assert visits == [(0, 0), (0, 0), (0, 1)]

    def test_times_rounded_to_bfloat16(self) -> None:
        times = torch.linspace(1000, 950, 30)
        line = Timeline(times)
        found = [line.place(t[None].to(torch.bfloat16), ("cond",)) for t in times if line.visit(0, ("x",)) or True]
        assert found[0] == 0
        line = Timeline(times)
        places = []
        for t in times:
            places.append(line.place(t[None].to(torch.bfloat16), ("cond",)))
            line.visit(places[-1], ("cond",))
        assert places == list(range(30))

    def test_its_schedule(self) -> None:
        schedule = Timeline(torch.tensor([999, 499])).schedule(DISCRETE_1000, BRANCHES)
        assert schedule.times == (1.0, 0.5, 0.0)
        assert schedule.native == (999.0, 499.0)

    def test_heun_in_a_pipeline(self) -> None:
        from diffusers import HeunDiscreteScheduler

        pipe = PIPES["dit"].pipe
        before, pipe.scheduler = pipe.scheduler, HeunDiscreteScheduler()
        clocks = Clocks()
        try:
            with ditloom.using(pipe, clocks, FirstBlockCache(10.0)) as run:
                PIPES["dit"].run(steps=4)
        finally:
            pipe.scheduler = before
        assert [(c.step, c.evaluation) for c in clocks.clocks] == [(k // 2, k % 2) for k in range(7)]
        assert run.report.count("range", Action.REUSE) == 2 * 3  # the first stages of steps 1 to 3


class Toy(nn.Module):
    """A transformer of somebody's own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(4))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_an_adapter_may_be_registered_for_a_class() -> None:
    from ditloom.contracts.registry import register

    assert isinstance(finding.adapter_of(DIT.module), DiT)

    @register("toy-of-a-test")
    class ToyAdapter(Adapter):
        classes = ("Toy",)
        sample, timestep = "x", "t"

        def blocks(self, module: Any) -> Any:
            from ditloom.adapters.foreign_block import PlainBlock

            return [PlainBlock(layer) for layer in module.layers]

        def embed(self, module: Any, call: Any) -> Any:
            from ditloom.contracts.layout import Layout, Span
            from ditloom.contracts.streams import Context, Streams

            return Streams({"image": call["x"]}, Layout((Span("image", call["x"].shape[1]),))), Context()

        def head(self, module: Any, streams: Any, context: Any) -> Any:
            return streams["image"]

    finding.register_adapter(ToyAdapter)
    toy = Toy()
    try:
        with ditloom.using(toy, FirstBlockCache(10.0), timesteps=[1.0, 0.5]) as run, torch.no_grad():
            for t in (1.0, 0.5):
                toy(torch.ones(1, 3, 8), torch.tensor([t]))
        assert run.report.count("range", Action.REUSE) == 1
    finally:
        finding.ADAPTERS._local.pop("toy-of-a-test")
    assert plain(DIT)
