"""Compiled per block: as many graphs as were announced, none after warm-up, none broken."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from ditloom.contracts.method import Handler, Tap
from ditloom.parts.mix_ffn import MixFFN
from ditloom.sites.compiling import announce, compile_blocks, keep_layouts
from tests.sites import toys
from tests.sites.driving import by_run, same
from tests.sites.walkthroughs import Added, Broadcast, Captures, FirstBlockCache, Inject, SomeRows

COUNTERS = torch._dynamo.utils.counters


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    COUNTERS.clear()
    yield
    torch._dynamo.reset()


HANDLERS: Mapping[str, tuple[Callable[[], list[Handler]], int]] = {
    "nothing": (list, 1),
    "a cache": (lambda: [Broadcast(3)], 2),
    "a range": (lambda: [FirstBlockCache(0.3)], 1),
    "two caches": (lambda: [Broadcast(3), SomeRows(3)], 4),
    "one tap on every block": (lambda: [Inject((0, 1, 2, 3, 4))], 1),
    "captures": (lambda: [Captures([Tap("v_proj", b) for b in range(5)])], 1),
    "kept keys": (lambda: [Added(toys.latent(1))], 2),
}


@pytest.mark.parametrize("name", HANDLERS)
def test_graphs_are_as_many_as_distinct_plans(name: str) -> None:
    """Blocks of one kind share a graph whatever their number; the run announces at least as many as are made."""
    make, graphs = HANDLERS[name]
    eager, _ = by_run(toys.make("dit"), make())
    model = toys.make("dit")
    compile_blocks(model, backend="eager")
    compiled, run = by_run(model, make())
    assert COUNTERS["stats"]["unique_graphs"] == graphs
    assert run.program is None or graphs <= run.program.static_plans()
    assert not COUNTERS["graph_break"]
    torch.testing.assert_close(compiled, eager)
    again, _ = by_run(model, make())
    assert same(again, compiled) and COUNTERS["stats"]["unique_graphs"] == graphs, "compiled again"


def test_the_recompile_limit_holds_what_is_announced() -> None:
    config = torch._dynamo.config
    with config.patch(recompile_limit=2, accumulated_recompile_limit=2):
        model = toys.make("mmdit")
        assert announce(model, 5) == 2 * 5 and config.recompile_limit == 2, "nothing is compiled"
        compile_blocks(model, backend="eager")
        assert announce(model, 5) == 2 * 5 and config.recompile_limit == 80
        assert config.accumulated_recompile_limit == 640


@pytest.mark.slow
def test_gradients_of_a_compiled_convolution_over_tokens_are_right_and_channels_last() -> None:
    keep_layouts()
    ffn, x = MixFFN(16, 24), torch.randn(2, 12, 16, requires_grad=True)
    gradients = lambda: torch.autograd.grad(ffn(x, (3, 4)).square().sum(), [x, *ffn.parameters()])  # noqa: E731
    plain = gradients()
    ffn.compile(fullgraph=True, dynamic=False)
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled, codes = run_and_get_code(gradients)
    for a, b in zip(compiled, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    backward = next(code for code in codes if "aten.convolution_backward.default(" in code)
    strides = re.findall(r"\(2, 48, 3, 4\), \(([\d, ]+)\)", backward)
    assert strides and set(strides) == {"576, 1, 192, 48"}


@pytest.mark.slow
def test_frozen_blocks_compute_the_same_in_one_graph_each() -> None:
    eager, _ = by_run(toys.make("dit"), [Broadcast(3)])
    model = toys.make("dit")
    compile_blocks(model, frozen=True)
    with torch.no_grad():
        compiled, run = by_run(model, [Broadcast(3)])
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
    assert COUNTERS["stats"]["unique_graphs"] <= 2 * 5
    with torch.no_grad():
        again, _ = by_run(model, [Broadcast(3)])
    assert same(again, compiled) and not any(p.requires_grad for p in model.parameters())
    assert not torch._inductor.config.freezing
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.zero_()  # what was laid out anew does not see it
        assert same(by_run(model, [Broadcast(3)])[0], compiled)
