"""The training loop: by image count, resumable bit for bit, stopped politely, watched for numbers that are none."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ditloom.contracts.backbone import Backbone
from ditloom.contracts.errors import UserError
from ditloom.training import checkpoint
from ditloom.training.config import TrainConfig
from ditloom.training.draws import Draws, Rows, pieces
from ditloom.training.durable import exclusive, explained, replace_file
from ditloom.training.ema import Power
from ditloom.training.feed import Feed
from ditloom.training.launch import StopRequest, World
from ditloom.training.learner import Learner
from ditloom.training.metrics import MetricsLog
from ditloom.training.parallel import gathered
from ditloom.training.posthoc import Moment, save_snapshot
from ditloom.training.progress import Progress

Draw = Callable[[Backbone, int], bytes]


class Diverged(UserError):
    """The loss or a weight is no longer a number."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: images seen, its newest checkpoint, whether it was asked to stop, seconds of training."""

    images: int
    checkpoint: Path | None
    stopped: bool
    seconds: float


class Trainer:
    """Trains until `config.total` images are seen, from the newest whole checkpoint of `run` if there is one.

    sample: called on every process with the averaged student and the image count; the PNG it returns is kept in
    `samples/`. state: plain values kept in checkpoints beside the trainer's own.
    """

    def __init__(
        self,
        learner: Learner,
        draws: Draws,
        feed: Feed,
        config: TrainConfig,
        run: Path,
        *,
        sample: Draw | None = None,
        state: dict[str, Any] | None = None,
        progress: Callable[..., Progress] = Progress,
    ):
        self.learner, self.draws, self.feed, self.config, self.run = learner, draws, feed, config, Path(run)
        self.sample, self.state, self.progress = sample, dict(state or {}), progress
        self.world: World = learner.world
        self.images, self.seconds, self.saved_at = 0, 0.0, -1
        self.stop = StopRequest()

    def steps(self) -> Iterator[int]:
        """Learn one global batch after another; yields the number of images seen after each."""
        for rows in self.feed.rows(self.images, self.config.total):
            size = min(self.config.batch, self.config.total - self.images)
            batch = self.draws(rows, self.images, size)
            self.learner.learn(list(pieces(batch, self._micro(rows))), self.images, size)
            self.images += size
            yield self.images

    def _micro(self, rows: Rows) -> int:
        return min(self.config.micro_batch or len(rows.x), len(rows.x))

    def train(self) -> Outcome:
        """Run to the end, or to a SIGTERM or Ctrl-C, which saves first."""
        with contextlib.ExitStack() as stack:
            if self.world.leader:
                stack.enter_context(exclusive(self.run))
            stack.enter_context(self.stop)
            resumed = self.resume()
            bar = self.progress(self.config.total, done=self.images, quiet=not self.world.leader)
            self.bar = stack.enter_context(bar)
            self.log = self._open_log(stack, resumed)
            self._report_resume(resumed)
            stopped = self._loop()
        found = checkpoint.folders(self.run)
        return Outcome(self.images, found[0] if found else None, stopped, self.seconds)

    def _loop(self) -> bool:
        """True when it was asked to stop before the end."""
        mark, before, stop = time.monotonic(), self.images, False
        for images in self.steps():
            now = time.monotonic()
            self.seconds, mark = self.seconds + now - mark, now
            stop = self._agreed_to_stop()
            if self._crossed(self.config.log_every, before, images):
                self._log(images)
            self._keep(before, images, stop)
            before = images
            if stop:
                break
        if self.saved_at != self.images:
            self._save(self.images)
        return stop and self.images < self.config.total

    def _keep(self, before: int, images: int, stop: bool) -> None:
        """Save, snapshot and sample where they are due."""
        config = self.config
        if self._crossed(config.save_every, before, images) or stop:
            self._save(images)
        if self._crossed(config.snapshot_every, before, images):
            self._snapshot(images)
        if self.sample is not None and not stop and self._crossed(config.sample_every, before, images):
            self._sample(images)

    def _crossed(self, every: int | None, before: int, after: int) -> bool:
        """Whether a multiple of `every`, or the end, lies in (before, after]."""
        return every is not None and (after // every > before // every or after == self.config.total)

    def _agreed_to_stop(self) -> bool:
        """Whether any process was asked to stop. On the CPU the loss is looked at, too; elsewhere when it is logged."""
        bad = self.world.device.type == "cpu" and not self.learner.is_sane()
        stops, faults = self.world.sum(torch.tensor([self.stop.requested, bad], dtype=torch.int32)).tolist()
        if faults:
            raise self._diverged()
        return bool(stops)

    def _diverged(self) -> Diverged:
        found = checkpoint.latest(self.run).path if self.world.leader else None
        last = "no checkpoint was saved before" if found is None else f"the last good checkpoint is {found}"
        return Diverged(
            f"the loss is not a number at {self.images} images: {last}; lower the learning rate or set clip"
        )

    def _log(self, images: int) -> None:
        means = self.learner.tally.means(self.world)
        if not all(math.isfinite(value) for value in means.values()):
            raise self._diverged()
        rate = self.bar.speed.rate
        self.bar.update(images, **{name: means[name] for name in ("loss",) if name in means})
        if self.log is not None:
            self.log.write(images, **means, rate=self.learner.rate, speed=rate, seconds=self.seconds)

    def _save(self, images: int) -> None:
        """Every process hands over its part; the leader writes; all learn of a failure."""
        if not self.learner.is_finite():
            raise self._diverged()
        tensors, failure = self.learner.tensors(), None
        if self.world.leader:
            mark = self.config.mark_every
            marked = mark is not None and images // mark > max(self.saved_at, 0) // mark
            try:
                checkpoint.save(self.run, images, tensors, self._state(images), keep=self.config.keep, marked=marked)
            except UserError as error:
                failure = str(error)
        failure = self.world.share(failure)
        if failure is not None:
            raise UserError(f"{failure}; training stopped at {images} images")
        self.saved_at = images

    def _state(self, images: int) -> dict[str, Any]:
        own = {
            "images": images,
            "seconds": self.seconds,
            "fingerprint": self.feed.fingerprint(),
            "config": self.config.to_dict(),
            "torch": torch.__version__,
        }
        return {**self.state, **own}

    def resume(self) -> int | None:
        """Load the newest whole checkpoint; the image count it was made at, or None for a fresh start."""
        found = checkpoint.latest(self.run) if self.world.leader else checkpoint.Found(None)
        path, self.broken = self.world.share((str(found.path or ""), found.broken))
        if not path:
            return None
        saved = checkpoint.read(Path(path))
        self._check_data(saved)
        self.learner.load(saved.tensors)
        self.images, self.seconds, self.saved_at = saved.images, saved.state["seconds"], saved.images
        self.changed = changed_keys(saved.state["config"], self.config.to_dict())
        return saved.images

    def _check_data(self, saved: checkpoint.Checkpoint) -> None:
        before, now = saved.state["fingerprint"], self.feed.fingerprint()
        if before != now:
            raise UserError(
                f"the data set has changed since {self.run} began (its fingerprint was {before[:12]} and is now "
                f"{now[:12]}): restore the data, or start a new run"
            )

    def _report_resume(self, resumed: int | None) -> None:
        for sentence in self.broken:
            self.bar.say(sentence)
        if resumed is not None:
            changes = f", with changed {', '.join(self.changed)}" if self.changed else ""
            self.bar.say(f"resumed at {resumed:,} images{changes}")

    def _open_log(self, stack: contextlib.ExitStack, resumed: int | None) -> MetricsLog | None:
        if not self.world.leader:
            return None
        log = MetricsLog(self.run / "metrics.jsonl", resumed_at=resumed or 0)
        stack.callback(log.close)
        return log

    def _snapshot(self, images: int) -> None:
        for track in self.learner.tracks.values():
            if isinstance(track.profile, Power):
                whole = gathered(track.averages, self.world)
                if self.world.leader:
                    save_snapshot(self.run, Moment(images, track.profile.width), whole)

    @torch.no_grad()
    def _sample(self, images: int) -> None:
        assert self.sample is not None
        first = next(iter(self.learner.tracks), None)
        with self.learner.averaged(first) as network:
            picture = self.sample(network, images)
        path = self.run / "samples" / f"images-{images:012d}.png"
        if self.world.leader:
            with explained("write", path):
                path.parent.mkdir(exist_ok=True)
                replace_file(path, [picture])


def changed_keys(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Settings whose value differs."""
    return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
