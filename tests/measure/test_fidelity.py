"""PSNR and SSIM against torchmetrics on pictures rounded to 8 bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.image import structural_similarity_index_measure as their_ssim

from ditloom.contracts.errors import UserError
from ditloom.measure.fidelity import psnr, ssim


def pair(batch: int, channels: int, height: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    a = torch.rand(batch, channels, height, width, generator=draw)
    return a, (a + 0.2 * torch.randn(a.shape, generator=draw)).clamp(0, 1)


@given(st.integers(1, 3), st.sampled_from([1, 3]), st.integers(11, 30), st.integers(11, 30), st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_ssim_is_that_of_torchmetrics_away_from_the_border(batch, channels, height, width, seed):
    a, b = ((x * 255).round() / 255 for x in pair(batch, channels, height, width, seed))
    theirs = their_ssim(
        a.double(), b.double(), sigma=1.5, kernel_size=11, data_range=1.0, reduction="none", return_full_image=True
    )[1]
    inside = theirs[..., 5 : height - 5, 5 : width - 5] if theirs.shape[-1] == width else theirs
    assert torch.allclose(ssim(a, b), inside.mean((1, 2, 3)), atol=1e-8)


def test_psnr_of_a_known_error():
    a = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    b = a.clone()
    b[0, :, 0, 0] = 51
    assert psnr(a, b).tolist() == pytest.approx([-10 * torch.tensor(0.2**2 / 16).log10().item(), float("inf")])


def test_pictures_are_rounded_to_eight_bits_first():
    a = torch.full((1, 1, 16, 16), 100 / 255)
    assert psnr(a, a + 0.4 / 255).item() == float("inf")
    assert psnr(a, a + 0.6 / 255).item() == pytest.approx(20 * torch.tensor(255.0).log10().item())
    whole, floats = (pair(2, 3, 16, 16, 0)[0] * 255).round().to(torch.uint8), pair(2, 3, 16, 16, 0)[1]
    assert torch.equal(ssim(whole, floats), ssim(whole.double() / 255, floats))


def test_each_picture_is_judged_alone_and_equal_ones_are_perfect():
    a, b = pair(4, 3, 20, 20, 3)
    for metric in (psnr, ssim):
        alone = torch.cat([metric(a[i : i + 1], b[i : i + 1]) for i in range(4)])
        assert torch.allclose(metric(a, b), alone, rtol=1e-12)
    assert torch.allclose(ssim(a, a), torch.ones(4, dtype=torch.float64))
    assert torch.isinf(psnr(a, a)).all()


def test_unlike_shapes_and_tiny_pictures_are_refused():
    with pytest.raises(UserError, match="equal batches"):
        psnr(torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 8, 8))
    with pytest.raises(UserError, match="at least 11"):
        ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


def test_latents_are_measured_in_the_range_of_the_reference() -> None:
    from ditloom.measure.fidelity import latent_psnr

    reference = torch.tensor([[-3.0, 5.0]])
    assert latent_psnr(reference + 0.8, reference) == pytest.approx(20.0, abs=1e-4)
    assert latent_psnr(reference, reference) == float("inf")
