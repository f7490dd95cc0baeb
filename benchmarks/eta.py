"""How wrong the estimates of start and end are: those of a simulated day against what happened.

The day is that of `./run bench queue`, under our policy. Every four minutes everybody is told what
`batches/outlook.py` says. Of each batch that waits, or lives, for ten minutes or more, the error of what
was said after a quarter, half and three quarters of that time is

    |estimated - actual| / (actual - asked)

so 0.5 means: half an hour off, an hour before. `late` is the share of batches that were later than said.
"""

from __future__ import annotations

import random
import time
from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, field, replace

from batches import policy
from batches.outlook import Place, Running, explain
from batches.policy import View
from benchmarks import queue
from benchmarks.queue import DAY, Job, Simulation, quantile

EVERY, SHORTEST = 240.0, 600.0
PERCENTS = (25, 50, 75)
LOADS = (0.5, 0.8)


@dataclass
class Told(Simulation):
    """A day on which everybody is told now and then what to expect."""

    under_way: dict[int, tuple[Job, float, float]] = field(default_factory=dict)
    """By worker: the batch of its chunk, when it began to run (the load is over), and its seconds."""
    said: dict[str, list[tuple[float, Place]]] = field(default_factory=lambda: defaultdict(list))
    slowest: float = 0.0

    def run(self) -> None:
        self.later(EVERY, self.tell)
        super().run()

    def start(self, at: int, job: Job, model: str) -> None:
        super().start(at, job, model)
        worker = self.workers[at]
        seconds = job.truth * job.chunk_tokens / self.models[model].speed_on(worker.kind)
        self.under_way[at] = (job, max(self.now, worker.since), seconds)

    def finish(self, at: int, job: Job) -> None:
        del self.under_way[at]
        super().finish(at, job)

    def tell(self) -> None:
        began = time.process_time()
        places = explain(self._view(), self._running())
        self.slowest = max(self.slowest, time.process_time() - began)
        for name, place in places.items():
            self.said[name].append((self.now, place))
        if self.now < DAY:
            self.later(self.now + EVERY, self.tell)

    def _view(self) -> View:
        """With what was served as it has faded; the simulation lets what comes grow instead."""
        faded = 0.5 ** (self.now / policy.HALF_LIFE)
        tenants = {
            name: replace(each, served=each.served * faded) for name, each in self.tenants.items()
        }
        return View(self.now, self.waiting, self.work, tenants, self.models, self.workers)

    def _running(self) -> list[Running]:
        """As the saved results tell it in production: how much of each chunk is left."""
        found: dict[str, Running] = {}
        for job, began, seconds in self.under_way.values():
            left = job.chunk_tokens * min(1.0, 1 - (self.now - began) / seconds)
            known = found.get(job.name, Running(job.name, job.organization, job.model, 0, 0.0))
            found[job.name] = known._replace(workers=known.workers + 1, tokens=known.tokens + left)
        return list(found.values())


def day(load: float) -> Told:
    models = queue.make_models(random.Random(queue.SEED))
    jobs = queue.make_jobs(random.Random(f"{queue.SEED} {load}"), models, load, plain=False)
    weigh = random.Random(queue.SEED)
    weights = {f"org-{at:03}": weigh.choices((1.0, 2.0, 4.0), (70, 20, 10))[0] for at in range(500)}
    world = Told(models, jobs, weights, queue.ours)
    world.run()
    return world


def errors(world: Told, what: str, percent: int) -> list[tuple[float, bool]]:
    """Of each batch the error of what was said nearest to this part of its life; whether it is late."""
    found = []
    for job in world.jobs:
        actual = job.first if what == "start" else job.ended
        if actual is None or actual - job.arrived < SHORTEST or job.name not in world.said:
            continue
        said = world.said[job.name]
        wanted = job.arrived + percent / 100 * (actual - job.arrived)
        at = min(bisect_left(said, wanted, key=lambda each: each[0]), len(said) - 1)
        asked, place = min(said[max(0, at - 1) : at + 1], key=lambda each: abs(each[0] - wanted))
        estimated = place.start if what == "start" else place.completion
        if estimated is not None and abs(asked - wanted) <= EVERY / 2 and asked < actual:
            found.append((abs(estimated - actual) / (actual - asked), actual > estimated))
    return found


def run() -> dict[str, float]:
    numbers: dict[str, float] = {}
    for load in LOADS:
        print(f"  at {load:.0%} load …", flush=True)
        world = day(load)
        for what in ("start", "completion"):
            for percent in PERCENTS:
                found = errors(world, what, percent)
                name = f"{what}_at_{percent}_load_{load * 100:.0f}"
                numbers[f"{name}_median"] = quantile([error for error, _ in found], 0.5)
                numbers[f"{name}_p90"] = quantile([error for error, _ in found], 0.9)
                numbers[f"{name}_late"] = sum(late for _, late in found) / len(found)
        numbers[f"explain_ms_load_{load * 100:.0f}"] = 1e3 * world.slowest
    return numbers
