"""Every image family from scratch on Fashion-MNIST, at equal MACs and equal images: which differences outlast the bars?

    OMP_NUM_THREADS=1 python -m recipes.family_study rates      # every family, three learning rates or more, one seed
    OMP_NUM_THREADS=1 python -m recipes.family_study seeds      # two more seeds for DiT and what did better
    python -m recipes.family_study report                       # docs/family-study.md and the curves beside it

Runs may be started in several processes; each takes the next one that nobody has, and what is finished stays. Where a
family's best rate is the lowest or highest tried, the next one beyond is tried as well, within `BOUNDS`. Pictures are
32x32, folded four by four into 16 channels of 8x8 (a latent space without loss), so that every family works on at most
64 tokens. Each family hears the class in its own way: as a label, or as a one-hot text token and pooled vector. Width
is chosen so that one forward takes as near as possible to `MACS`. Needs the Debian package dataset-fashion-mnist, or
lets it be fetched.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from ditloom.contracts import rng
from ditloom.contracts.backbone import Backbone, BackboneConfig, on_paper
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.data.fashion_mnist import FashionMnist
from ditloom.measure.extractors.fashion_cnn import FashionCnn
from ditloom.measure.features import extract
from ditloom.measure.frechet import Moments, frechet_distance
from ditloom.processes.linear import Linear
from ditloom.processes.times import time_sampler
from ditloom.samplers.drawing import Drawing
from ditloom.samplers.guidance.none import NoGuidance
from ditloom.samplers.heun import Heun
from ditloom.training.draws import Draws
from ditloom.training.ema import Ramped
from ditloom.training.feed import StoredFeed
from ditloom.training.learner import STUDENT, Learner
from ditloom.training.objectives.denoise import Denoise
from ditloom.training.optim import AdamW
from ditloom.training.schedules import Cosine
from ditloom.training.step import Phase
from recipes.family_study.entrants import ENTRANTS
from recipes.family_study.report import summarised, write_report

MACS = 16_000_000
IMAGES, BATCH, LOG = 25_600, 64, 1_280
RATES = (8e-3, 1.6e-2, 3.2e-2)
BOUNDS = (1e-3, 3.2e-2)
SEEDS = (0, 1, 2)
DRAWN, STEPS, HELD_OUT = 500, 10, 1_000
CLASSES, FOLD, SIDE = 10, 4, 32
WORK = Path("runs/family-study")
PROCESS = Linear()


@dataclass(frozen=True)
class Case:
    """One run: a family, a learning rate, a seed."""

    family: str
    rate: float
    seed: int

    @property
    def path(self) -> Path:
        """Where its result lies."""
        return WORK / f"{self.family}-{self.rate:g}-{self.seed}.json"


def config_of(family: str) -> BackboneConfig:
    """The configuration of a family whose forward takes closest to `MACS`."""
    found: dict[int, BackboneConfig] = {}
    for width in range(32, 513, 8):
        try:
            config = ENTRANTS[family](width)
            found[abs(macs_of(config) - MACS)] = config
        except UserError:
            continue
    return found[min(found)]


def macs_of(config: BackboneConfig) -> int:
    """MACs of one forward of one image."""
    net, layout = on_paper(config)
    return net.macs(layout)


@lru_cache
def pictures(split: str) -> tuple[Tensor, Tensor]:
    """Folded pictures [N, 16, 8, 8] in [-1, 1] and their labels."""
    source = FashionMnist(split=split, size=SIDE)
    count = len(source) if split == "train" else HELD_OUT
    examples = [source[i] for i in range(count)]
    pixels = torch.stack([torch.as_tensor(e.image[..., 0]) for e in examples])[:, None].float() / 127.5 - 1
    return pixel_unshuffle(pixels, FOLD), torch.tensor([e.label for e in examples])


def teller(net: Backbone) -> Callable[[Tensor], Condition]:
    """Labels [B] (10: none) to what this network takes: the label, or one-hot vectors in place of text."""
    _, _, like = net.example(1)

    def vectors(shape: torch.Size, labels: Tensor) -> Tensor:
        hot = torch.nn.functional.one_hot(labels, CLASSES + 1).float()
        hot = torch.nn.functional.pad(hot, (0, shape[-1] - CLASSES - 1))
        return hot.reshape(len(labels), *[1] * (len(shape) - 2), shape[-1]).expand(-1, *shape[1:]).contiguous()

    def told(labels: Tensor) -> Condition:
        given = {k: vectors(v.shape, labels) for k, v in like.tensors().items() if v.is_floating_point()}
        named = {k: given.pop(k, None) for k in ("text", "pooled")}
        return Condition(label=labels if like.label is not None else None, extra=given, **named)

    return told


def run(case: Case) -> dict[str, Any]:
    """Train one network and measure it."""
    config = config_of(case.family)
    torch.manual_seed(rng.key(case.seed, f"init/{case.family}"))
    net = config.build()
    told = teller(net)
    latents, labels = pictures("train")
    feed = StoredFeed(
        [latents],
        lambda examples, indices: told(labels[examples]),
        told(torch.tensor([CLASSES])),
        "fashion-mnist folded",
        batch=BATCH,
        seed=case.seed,
    )
    phase = Phase(
        objectives={"denoise": Denoise(PROCESS)},
        optimiser=AdamW(lr=case.rate, betas=(0.9, 0.99)),
        schedule=Cosine(warmup=1_280, total=IMAGES, floor=0.02),
        clip=1.0,
    )
    averages = {"ramped": Ramped(value=0.995)}
    learner = Learner({STUDENT: net}, PROCESS, [phase], seed=case.seed, precision="bf16", averages=averages)
    times = time_sampler("logit-normal", stratified=True)
    draws = Draws(process=PROCESS, times=times, seed=case.seed, drop=0.1)
    curve, seconds = learn(learner, draws, feed)
    result: dict[str, Any] = {"family": case.family, "rate": case.rate, "seed": case.seed, "curve": curve}
    result |= {"seconds": seconds, "images_per_second": IMAGES / seconds, "macs": macs_of(config)}
    result |= {"parameters": net.learned_parameters(), "settings": config.to_dict()}
    with learner.averaged("ramped") as averaged:
        return result | measured(averaged, told, case.seed)


def learn(learner: Learner, draws: Draws, feed: StoredFeed) -> tuple[list[tuple[int, float]], float]:
    """The loss curve and the seconds of training."""
    curve, seen, started = [], 0, time.monotonic()
    for rows in feed.rows(0, IMAGES):
        size = len(rows.x)
        learner.learn([draws(rows, seen, size)], seen, size)
        seen += size
        if seen % LOG == 0:
            curve.append((seen, learner.tally.means(learner.world)["loss"]))
            if not math.isfinite(curve[-1][1]):
                break
    return curve, time.monotonic() - started


@torch.no_grad()
def measured(net: Backbone, told: Callable[[Tensor], Condition], seed: int) -> dict[str, float]:
    """Held-out loss on fixed noise, and the Frechet distance of drawn pictures, by the averaged network."""
    latents, labels = pictures("test")
    indices = list(range(len(latents)))
    t = (torch.arange(len(latents), dtype=torch.float64) + 0.5) / len(latents)
    noise = rng.normal(latents.shape[1:], 12345, "held-out", indices)
    parts = [slice(i, i + 100) for i in range(0, len(latents), 100)]
    predictions = [net(PROCESS.add_noise(latents[p], noise[p], t[p]), t[p], told(labels[p])).float() for p in parts]
    held_out = float(PROCESS.loss(torch.cat(predictions), latents, noise, t).total.mean())
    extractor = FashionCnn()
    real = Moments.of(extract(extractor, unfolded(latents)))
    drawn = torch.cat([draw(net, told, seed, range(i, i + 100)) for i in range(0, DRAWN, 100)])
    frechet = frechet_distance(Moments.of(extract(extractor, unfolded(drawn))), real)
    return {"held_out_loss": held_out, "frechet": frechet}


def draw(net: Backbone, told: Callable[[Tensor], Condition], seed: int, indices: range) -> Tensor:
    """Pictures of the classes in turn, without guidance."""
    conditions = {"cond": told(torch.tensor([i % CLASSES for i in indices]))}
    drawing = Drawing(net, PROCESS, Heun(), NoGuidance(), conditions, seed=seed, indices=list(indices))
    *_, last = drawing.walk((FOLD * FOLD, SIDE // FOLD, SIDE // FOLD), STEPS)
    return last.x


def unfolded(latents: Tensor) -> Any:
    """uint8 pictures [N, 32, 32, 1]."""
    pixels = pixel_shuffle(latents, FOLD).clamp(-1, 1) * 127.5 + 127.5
    return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def finished() -> list[dict[str, Any]]:
    """Every result there is."""
    return [json.loads(path.read_text()) for path in sorted(WORK.glob("*.json"))]


def work(cases: list[Case]) -> None:
    """Run what nobody has run or is running."""
    WORK.mkdir(parents=True, exist_ok=True)
    for case in cases:
        claim = case.path.with_suffix(".claim")
        if case.path.exists() or not claimed(claim):
            continue
        result = run(case)
        beside = case.path.with_suffix(".part")
        beside.write_text(json.dumps(result))
        beside.replace(case.path)
        claim.unlink()
        shown = f"held-out loss {result['held_out_loss']:.4f}  Frechet {result['frechet']:.2f}"
        print(f"{case.family} {case.rate:g} seed {case.seed}: {shown}  {result['seconds']:.0f} s", flush=True)


def claimed(path: Path) -> bool:
    """Whether this process may run a case: no living process has claimed it."""
    try:
        with path.open("x") as file:
            file.write(str(os.getpid()))
        return True
    except FileExistsError:
        owner = path.read_text().strip()
        if owner.isdigit() and Path(f"/proc/{owner}").exists():
            return False
        path.write_text(str(os.getpid()))
        return True


def contenders(results: list[dict[str, Any]]) -> Iterator[Case]:
    """More seeds for DiT, for all that did better, and for all that two deviations do not separate from the best."""
    rows = sorted(summarised(results), key=lambda row: row["loss"])
    deviation = max((row["loss_sd"] for row in rows if math.isfinite(row["loss_sd"])), default=0.0)
    near = rows[0]["loss"] + 2 * math.sqrt(2) * deviation
    plain = next((row["loss"] for row in rows if row["family"] == "dit"), near)
    for row in rows:
        if row["loss"] <= max(near, plain):
            yield from (Case(row["family"], row["rate"], seed) for seed in SEEDS[1:])


def beyond(results: list[dict[str, Any]]) -> Iterator[Case]:
    """For every family whose best rate is the last one tried on its side, the next."""
    for row in summarised(results):
        best, tried = row["rate"], row["tried"]
        for edge, following in ((tried[0], best / 2), (tried[-1], best * 2)):
            if best == edge and BOUNDS[0] <= following <= BOUNDS[1]:
                yield Case(row["family"], following, SEEDS[0])


def until_settled(cases: Callable[[list[dict[str, Any]]], Iterator[Case]]) -> None:
    """Run the cases that the results ask for, and those that their results ask for, until nothing is new."""
    seen = -1
    while len(finished()) > seen:
        seen = len(finished())
        work(list(cases(finished())))


def search_rates() -> None:
    """The rates of every family, until the best is not the last."""
    work([Case(family, rate, SEEDS[0]) for family in ENTRANTS for rate in RATES])
    until_settled(beyond)


PARTS: Mapping[str, Callable[[], None]] = {
    "rates": search_rates,
    "seeds": lambda: until_settled(contenders),
    "report": lambda: write_report(finished(), MACS, IMAGES),
}


def main(part: str, /) -> None:
    """Run a part of the study: rates, seeds or report."""
    if part not in PARTS:
        raise SystemExit(f"unknown part {part!r}: expected one of {', '.join(PARTS)}")
    PARTS[part]()


if __name__ == "__main__":
    tyro.cli(main)
