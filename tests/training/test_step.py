"""The step, its draws and objectives: loss sums, captures, coefficients, phases, condition dropout."""

import pytest
import torch

from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UnknownName, UserError
from ditloom.contracts.method import Tap
from ditloom.training.draws import Rows, dropped, pieces
from ditloom.training.learner import Learner
from ditloom.training.objectives.denoise import Denoise
from ditloom.training.optim import AdamW
from ditloom.training.step import Phase
from tests.training import tiny
from tests.training.align import Align


def batch(first=0, size=8, config=tiny.CONFIG):
    rows = next(tiny.feed(batch=size).rows(first, first + size))
    return tiny.draws(config)(rows, first, size)


def test_the_loss_is_the_process_s_own_on_the_noised_batch():
    built, drawn = tiny.learner(), batch()
    losses, logs = built.step(drawn, "main", {"denoise": 1.0})
    network = built.step.networks["student"]
    x = tiny.PROCESS.add_noise(drawn.x, drawn.noise, drawn.t)
    expected = ((network(x, drawn.t, drawn.condition) - (drawn.noise - drawn.x)) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(losses, expected)
    assert torch.equal(logs["denoise.mse"], losses)


def test_draws_follow_from_the_image_index_alone():
    whole = batch(size=8)
    for index in (0, 3, 7):
        rows = next(tiny.feed(batch=8).rows(0, 8))
        one = Rows(rows.x[index : index + 1], rows.condition.rows([index]), [index], rows.null)
        alone = tiny.draws()(one, 0, 8)
        assert torch.equal(alone.noise[0], whole.noise[index]) and alone.t[0] == whole.t[index]
        assert alone.condition.label[0] == whole.condition.label[index]


def test_conditions_are_dropped_at_the_stated_rate():
    labels = torch.cat([batch(first, 8).condition.label for first in range(0, 1600, 8)])
    assert 0.16 < float((labels == tiny.CLASSES).double().mean()) < 0.24


def test_dropped_texts_take_the_null_row_padded():
    text = Condition(text=torch.ones(3, 4, 2), text_mask=torch.ones(3, 4, dtype=torch.bool), pooled=torch.ones(3, 2))
    null = Condition(text=torch.zeros(1, 1, 2), text_mask=torch.ones(1, 1, dtype=torch.bool), pooled=torch.zeros(1, 2))
    out = dropped(text, null, torch.tensor([False, True, False]))
    assert out.text[1].abs().sum() == 0 and out.text_mask[1].tolist() == [True, False, False, False]
    assert out.pooled[:, 0].tolist() == [1, 0, 1]


def test_pieces_cover_the_batch_in_order():
    drawn = batch()
    parts = list(pieces(drawn, 3))
    assert [len(part.x) for part in parts] == [3, 3, 2]
    assert torch.equal(torch.cat([part.noise for part in parts]), drawn.noise)
    assert [i for part in parts for i in part.indices] == drawn.indices


def test_an_objective_with_captures_changes_nothing_at_coefficient_zero():
    plain = tiny.learner()
    off = tiny.learner(objectives={"denoise": Denoise(tiny.PROCESS), "align": Align(weight=0.0)})
    on = tiny.learner(objectives={"denoise": Denoise(tiny.PROCESS), "align": Align(weight=0.5)})
    for first in range(0, 40, 8):
        for built in (plain, off, on):
            built.learn([batch(first)], first, 8)
    a, b, c = (built.tensors()["model"] for built in (plain, off, on))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)
    assert off.phases[0].objectives["align"].runs == 0 and on.phases[0].objectives["align"].runs == 5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_captures_carry_gradients_to_the_blocks_before_them(checkpointing):
    built = tiny.learner(objectives={"align": Align(weight=1.0)}, checkpointing=checkpointing)
    losses, logs = built.step(batch(), "main", {"align": 1.0})
    losses.sum().backward()
    network = built.step.networks["student"]
    assert network.blocks[0].mlp.fc1.weight.grad.abs().sum() > 0
    assert network.final_layer.linear.weight.grad is None or network.final_layer.linear.weight.grad.abs().sum() == 0
    assert logs["align.distance"].shape == (8,)


def test_captured_streams_are_those_of_a_hand_written_loop():
    built = tiny.learner(objectives={"align": Align()})
    network, drawn = built.step.networks["student"], batch()
    x = tiny.PROCESS.add_noise(drawn.x, drawn.noise, drawn.t)
    taps = [Tap("block_in", block=1), Tap("block_out", block=1), Tap("attn", block=0), Tap("q_norm", block=1)]
    prediction, captured = built.step.observers["student"](x, drawn.t, drawn.condition, taps)
    streams, context = network.embed(x, network.preset.time.native(drawn.t), network.prepare(drawn.condition))
    inner, _ = network.blocks[0](streams, context)
    outer, _ = network.blocks[1](inner, context)
    torch.testing.assert_close(captured[taps[0]], inner["image"])
    torch.testing.assert_close(captured[taps[1]], outer["image"])
    torch.testing.assert_close(prediction, network(x, drawn.t, drawn.condition))
    assert captured[taps[2]].shape == (8, 16, 32) and captured[taps[3]].shape == (8, 16, 2, 16)


def test_impossible_captures_are_one_sentence():
    observe, drawn = tiny.learner().step.observers["student"], batch()
    with pytest.raises(UserError, match="block_out of block 7; this model has blocks 0 to 1"):
        observe(drawn.x, drawn.t, drawn.condition, [Tap("block_out", block=7)])
    with pytest.raises(UserError, match="may capture, not replace"):
        observe(drawn.x, drawn.t, drawn.condition, [Tap("attn", block=0, op="replace")])


def phases():
    first = Phase(name="heads", objectives={"denoise": Denoise(tiny.PROCESS)}, trained=("final_layer.*",), stop=16)
    second = Phase(
        name="all", objectives={"denoise": Denoise(tiny.PROCESS)}, optimiser=AdamW(lr=1e-2), start=16, every=2
    )
    return [first, second]


def test_phases_train_what_they_name_when_they_are_due():
    network = tiny.network()
    built = Learner({"student": network}, tiny.PROCESS, phases())
    changed = []
    for first in range(0, 48, 8):
        before = {name: p.detach().clone() for name, p in network.named_parameters()}
        built.learn([batch(first)], first, 8)
        changed.append({name for name, p in network.named_parameters() if not torch.equal(p, before[name])})
    assert all(name.startswith("final_layer.") for name in changed[0] | changed[1]) and changed[0]
    assert len(changed[2]) == len(list(network.parameters())) == len(changed[4])
    assert changed[3] == changed[5] == set()
    assert {"heads.loss", "all.loss"} <= set(built.tally.means(built.world))


def test_two_networks_train_in_turn():
    generator, critic = tiny.network(), tiny.network(depth=1)
    turns = [
        Phase(name="one", objectives={"denoise": Denoise(tiny.PROCESS)}),
        Phase(name="two", role="critic", objectives={"denoise": Denoise(tiny.PROCESS)}, every=2),
    ]
    built = Learner({"student": generator, "critic": critic}, tiny.PROCESS, turns, precision="bf16")
    start = {name: p.clone() for name, p in built.masters.named.items()}
    built.learn([batch()], 0, 8)
    assert all(not torch.equal(start[name], p) for name, p in built.masters.named.items())
    once = {name: p.clone() for name, p in built.masters.named.items() if "critic" in name}
    built.learn([batch(8)], 8, 8)
    assert all(torch.equal(once[name], built.masters.named[name]) for name in once)
    assert {"model", "role-critic", "optimiser-one", "optimiser-two"} == set(built.tensors())
    fresh = Learner({"student": tiny.network(), "critic": tiny.network(depth=1)}, tiny.PROCESS, turns, precision="bf16")
    fresh.load(built.tensors())
    for learner in (built, fresh):
        learner.learn([batch(16)], 16, 8)
    assert tiny.same(built.tensors(), fresh.tensors())


def test_impossible_phases_are_one_sentence():
    with pytest.raises(UnknownName, match="unknown role 'studnt': did you mean 'student'"):
        Learner({"student": tiny.network()}, tiny.PROCESS, [Phase(role="studnt", objectives={})])
    with pytest.raises(UserError, match="phase 'main' trains no parameter"):
        Learner({"student": tiny.network()}, tiny.PROCESS, [Phase(trained=("nothing.*",), objectives={})])
