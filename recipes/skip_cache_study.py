"""Does Skip-Cache on a Skip-DiT beat keeping the same blocks of the DiT it came from?

    ditloom train recipes/fashion-skip.yaml --out runs/fashion-skip
    OMP_NUM_THREADS=1 python recipes/skip_cache_study.py

The same steps keep the same range of blocks on both; on the DiT as it is (the value) and as a change added to the
current input. The number is the PSNR of the latents to the same model's own plain run, over all pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

import tyro
from torch import Tensor

from ditloom.caches.skip_dit import SkipCache
from ditloom.caches.static import Reuse, StaticCache
from ditloom.contracts.method import Codec, Handler
from ditloom.loading import load
from ditloom.measure.fidelity import latent_psnr
from ditloom.model import Model
from ditloom.sites.codecs import DELTA, VALUE

SEED = 5


@dataclass(frozen=True)
class Study:
    """The two models and how they draw."""

    plain: str = "fashion"
    skip: str = "runs/fashion-skip/model"
    steps: int = 20
    pictures: int = 50
    intervals: tuple[int, ...] = (2, 3, 4)


def kept(method: SkipCache, codec: Codec) -> Handler:
    """The method's range on its steps, on any backbone."""
    k = method.blocks
    return StaticCache("kept", [Reuse(lambda s: [s.range(k, s.blocks - k)], method.cached, codec)])


def drawn(model: Model, study: Study, handlers: list[Handler]) -> tuple[Tensor, float]:
    """Latents, and the share of MACs saved."""
    inputs = [i % 10 for i in range(study.pictures)]
    result = model.generate(inputs, seed=SEED, steps=study.steps, sampler="euler", using=handlers)
    return result.latents, result.report.share_saved


def main(study: Study) -> None:
    """Print a table."""
    dit, skip = load(study.plain), load(study.skip)
    plain, plain_skip = drawn(dit, study, [])[0], drawn(skip, study, [])[0]
    for interval in study.intervals:
        method = SkipCache(interval=interval)
        surface = skip.surface()
        cases = {
            "Skip-DiT, Skip-Cache": (skip, plain_skip, method.bind(surface)),
            "DiT, value": (dit, plain, kept(method, VALUE)),
            "DiT, change": (dit, plain, kept(method, DELTA)),
        }
        for name, (model, reference, handler) in cases.items():
            x, saved = drawn(model, study, [handler])
            print(f"every {interval}  {name:22} {saved:.3f} saved  {latent_psnr(x, reference):.2f} dB", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Study))
