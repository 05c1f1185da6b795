"""Post-hoc averages: the official coefficients, snapshots that return themselves, a width never tracked."""

import pytest
import torch

from ditloom.contracts.errors import UserError
from ditloom.training.ema import Power, Track
from ditloom.training.posthoc import Moment, coefficients, inner_product, reconstruct, save_snapshot, snapshots

# NVlabs/edm2 training/phema.py at d8299d3c: power_function_correlation and solve_posthoc_coefficients
KEPT = [Moment(n, width) for width in (0.05, 0.1) for n in (2000, 4000, 6000, 8000)]
OFFICIAL = {
    Moment(8000, 0.075): [
        5.546456340552845e-08, 0.00013089783154824394, 0.011581696005781553, 0.33642415793662295,
        -9.914806777199236e-07, -0.0007879841738916888, -0.04466504858127728, 0.6973172169973306,
    ],
    Moment(7000, 0.15): [
        -0.0011586432764659883, -0.02710450976504444, -0.15891516879249645, -0.8605943446391691,
        0.004007726200638055, 0.078378695727717, 0.497945846183067, 1.467440398361754,
    ],
}  # fmt: skip


def trained(run, widths=(0.05, 0.1), steps=800, every=100, dtype=torch.float32):
    """A random walk of weights whose averages are saved; also tracks 0.075, which is not saved."""
    generator = torch.Generator().manual_seed(0)
    weights = {"w": torch.zeros(200), "b": torch.zeros(3)}
    tracks = {width: Track(Power(width=width), weights) for width in (*widths, 0.075)}
    for step in range(1, steps + 1):
        for tensor in weights.values():
            tensor += torch.randn(tensor.shape, generator=generator)
        for width, track in tracks.items():
            track.update(step * 8, 8)
            if width in widths and step % every == 0:
                save_snapshot(run, Moment(step * 8, width), track.averages, dtype)
    return tracks


def test_inner_products_are_the_official_ones_and_the_integral():
    a, b = Moment(1000, 0.05), Moment(2000, 0.1)
    assert inner_product(a, b) == pytest.approx(2.3365171355698508e-05, rel=1e-12)
    assert inner_product(Moment(2000, 0.05), Moment(1000, 0.1)) == pytest.approx(2.2270736011808175e-08, rel=1e-12)
    from ditloom.training.ema import exponent_of

    time = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 100
    profiles = []
    for moment in (a, b):
        gamma = exponent_of(moment.width)
        inside = (time <= moment.images) * (gamma + 1) / moment.images
        profiles.append(inside * (time / moment.images).clamp(max=1) ** gamma)
    assert inner_product(a, b) == pytest.approx(float((profiles[0] * profiles[1]).sum() / 100), rel=1e-4)


@pytest.mark.parametrize("target", OFFICIAL)
def test_coefficients_are_the_official_ones(target):
    assert coefficients(KEPT, target) == pytest.approx(OFFICIAL[target], rel=1e-6, abs=1e-9)


def test_an_existing_snapshot_comes_back(tmp_path):
    tracks = trained(tmp_path)
    for width in (0.05, 0.1):
        made = reconstruct(tmp_path, width)
        assert (made["w"] - tracks[width].averages["w"]).norm() <= 1e-6 * tracks[width].averages["w"].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_width_between_two_tracks_is_near_the_one_tracked_directly(tmp_path, dtype):
    tracks = trained(tmp_path, dtype=dtype)
    assert len(snapshots(tmp_path)) == 16
    made, direct = reconstruct(tmp_path, 0.075)["w"], tracks[0.075].averages["w"]
    error = (made - direct).norm() / direct.norm()
    apart = (tracks[0.05].averages["w"] - direct).norm() / direct.norm()
    assert error < 1e-2 < apart


def test_what_cannot_be_made_is_refused(tmp_path):
    with pytest.raises(UserError, match="no saved power-function averages"):
        reconstruct(tmp_path, 0.1)
    trained(tmp_path, steps=200)
    with pytest.raises(UserError, match="end at 1600 images"):
        reconstruct(tmp_path, 0.1, images=2000)
