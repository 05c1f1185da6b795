"""Captures for an alignment loss, checkpointed, on two processes: losses and gradients are those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from tests.sites import alignment


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """What two processes computed, all cases in one go."""
    folder: Path = tmp_path_factory.mktemp("two")
    multiprocessing.spawn(alignment.work, (2, str(folder)), nprocs=2)
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    return {name: alignment.learn(name, "alone", False, slice(None)) for name in alignment.FAMILIES}


@pytest.mark.parametrize("case", alignment.cases(), ids=lambda c: "-".join(map(str, c)))
def test_two_processes_do_what_one_does(case: tuple[str, str, bool], found: dict, alone: dict) -> None:
    loss, gradients = found[repr(case)]
    expected, others = alone[case[0]]
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    assert gradients.keys() == others.keys() and len(gradients) > 40
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert float(gradients["head.weight"].abs().max()) > 1e-4
