"""Tables and rotations against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ditloom.contracts.errors import UserError
from ditloom.parts.embedders import sinusoid
from ditloom.parts.positions import (
    axial_axes,
    check_axes,
    grid_positions,
    rotary,
    rotary_grid,
    rotate,
    sincos_at,
    sincos_grid,
    with_axes,
)
from ditloom.parts.tables import CroppedTable, interpolated

CPU = torch.device("cpu")


def test_the_column_fills_the_first_half() -> None:
    table = sincos_at(grid_positions(3, 5), 16)
    by_hand = np.array([[w, h] for h in range(3) for w in range(5)], dtype=np.float64)
    omega = 10000.0 ** (-np.arange(4) / 4)
    parts = [np.concatenate([np.sin(p[:, None] * omega), np.cos(p[:, None] * omega)], 1) for p in by_hand.T]
    np.testing.assert_allclose(table.numpy(), np.concatenate(parts, 1), atol=1e-14)
    moved = (table[1] - table[0]).abs() > 0
    assert moved[:8].any()
    assert not moved[8:].any()


def test_a_grid_of_the_table_is_cached_and_cast() -> None:
    table = sincos_grid(2, 3, 8, torch.bfloat16, CPU)
    assert table is sincos_grid(2, 3, 8, torch.bfloat16, CPU)
    torch.testing.assert_close(table, sincos_at(grid_positions(2, 3), 8).to(torch.bfloat16))
    with pytest.raises(UserError, match="multiple of 4"):
        sincos_at(grid_positions(2, 3), 6)


def test_tables_made_on_meta_do_not_spoil_the_cache() -> None:
    with torch.device("meta"):
        assert grid_positions(7, 9).device.type == "cpu"
    assert sincos_grid(7, 9, 8, torch.float32, CPU).device.type == "cpu"


def test_rotation_keeps_lengths_and_sees_relative_offsets_only() -> None:
    q, k = torch.randn(2, 1, 12, 2, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    places = grid_positions(3, 4)
    axes = axial_axes(24)
    scores = []
    for shift in (0, 5):
        table = rotary(places + torch.tensor([shift, 2 * shift]), axes)
        turned = rotate(q, table), rotate(k, table)
        torch.testing.assert_close(turned[0].norm(dim=-1), q.norm(dim=-1), rtol=1e-6, atol=1e-6)
        scores.append(torch.einsum("bqhd,bkhd->bhqk", *turned))
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(scores[0], torch.einsum("bqhd,bkhd->bhqk", q, k), atol=1e-2)


def test_rotation_is_a_complex_product() -> None:
    x = torch.randn(2, 6, 3, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    places = grid_positions(2, 3)
    frequencies = 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    angles = torch.cat([places[:, :1] * frequencies, places[:, 1:] * frequencies], dim=1)
    turned = (
        torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        * torch.polar(torch.ones(()).double(), angles)[:, None]
    )
    expected = torch.view_as_real(turned).flatten(-2)
    torch.testing.assert_close(rotate(x, rotary(places, (8, 8))), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rotary_grid(2, 3, axes=(8, 8), theta=10000.0, device=CPU), rotary(places, (8, 8)))


def test_heads_that_do_not_split_are_refused() -> None:
    with pytest.raises(UserError, match="multiple of 4"):
        axial_axes(18)


def test_a_table_is_cropped_in_the_middle() -> None:
    table = CroppedTable(9, 3, 8)
    tokens = torch.zeros(1, 6, 8)
    torch.testing.assert_close(table(tokens, (2, 3))[0].unflatten(0, (2, 3)), table.table[3:5, 3:6])
    expected = sincos_at(grid_positions(9, 9) / 3, 8).to(torch.float32)
    torch.testing.assert_close(table.table.flatten(0, 1), expected)
    with pytest.raises(UserError, match="covers 9x9"):
        table(torch.zeros(1, 10, 8), (10, 1))


def test_positions_of_a_table_count_from_the_crop() -> None:
    table = CroppedTable(9, 3, 8)
    tokens = torch.zeros(1, 6, 8)
    on_the_grid = table(tokens, (2, 3), grid_positions(2, 3))
    torch.testing.assert_close(on_the_grid, table(tokens, (2, 3)))
    between = interpolated(table.table, torch.tensor([[1.5, 2.0]]))
    torch.testing.assert_close(between[0], (table.table[1, 2] + table.table[2, 2]) / 2)
    torch.testing.assert_close(interpolated(table.table, torch.tensor([[8.0, 8.0]]))[0], table.table[8, 8])
    with pytest.raises(UserError, match="leave the model's position table"):
        table(tokens, (2, 3), grid_positions(2, 3) + 20)


@pytest.mark.parametrize("shift", [0, 1])
def test_time_sinusoid_is_cosines_then_sines(shift: int) -> None:
    t = np.array([0.0, 0.37, 999.0])
    frequencies = 10000.0 ** (-np.arange(8) / (8 - shift))
    expected = np.concatenate([np.cos(t[:, None] * frequencies), np.sin(t[:, None] * frequencies)], 1)
    np.testing.assert_allclose(sinusoid(torch.tensor(t), 16, shift=shift).numpy(), expected, atol=1e-4)


def test_time_sinusoid_is_that_of_diffusers() -> None:
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    t = torch.tensor([0.5, 17.0, 981.0])
    for shift in (0, 1):
        theirs = embeddings.get_timestep_embedding(t, 32, flip_sin_to_cos=True, downscale_freq_shift=shift)
        torch.testing.assert_close(sinusoid(t, 32, shift=shift), theirs)


def test_grids_of_any_number_of_axes() -> None:
    places = grid_positions(2, 3, 4)
    assert places.shape == (24, 3)
    assert places[17].tolist() == [1, 1, 1]
    assert torch.equal(with_axes(grid_positions(3, 4), 3), grid_positions(1, 3, 4))
    expected = rotary(grid_positions(1, 3, 4), (4, 8, 6), 100.0)
    table = rotary_grid(3, 4, axes=(4, 8, 6), theta=100.0, device=CPU)
    assert all(torch.equal(a, b) for a, b in zip(table, expected, strict=True))
    with pytest.raises(UserError, match="2 position axes"):
        with_axes(places, 2)


@pytest.mark.parametrize("axes", [(4, 8, 10), (3, 9, 12), (24, 2)])
def test_axes_that_do_not_fit_a_head(axes: tuple[int, ...]) -> None:
    check_axes((4, 8, 12), 24)
    with pytest.raises(UserError, match="24"):
        check_axes(axes, 24)
