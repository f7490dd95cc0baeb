"""The queue's policy in a simulated day: 64 GPUs of two kinds, 20 models, 500 tenants.

The workload, fixed by `SEED` and the same for every policy:

- 40 GPUs of 24 GB and 24 of 80 GB. The large kind runs every model; six of the twenty models fit
  no other. The small kind has 0.35 to 0.55 of the large one's speed. A load takes 30 to 60 s on the
  large kind, a third more on the small one, and 90 to 180 s for the six large models.
- Models and tenants are used unevenly (Zipf, exponents 1 and 0.7); a tenant uses one to three
  models and weighs 1 (70 %), 2 (20 %) or 4 (10 %).
- A batch has 30 s to 20 h of work for a large GPU (bounded Pareto, exponent 1.1: most are small, a
  few are most of the work), which its estimate misses by 20 % (lognormal). Its class is low, normal
  or high (15, 70, 15 %), its window 1, 4 or 24 h (10, 20, 70 %), but never shorter than eight large
  GPUs need for it.
- Arrivals follow the day: 30 % more than the mean at the busiest hour, 30 % less at the quietest.
  A load of 80 % means that the day's batches are 0.8 of what all GPUs could do in it.
- A chunk is a minute for a large GPU. A batch past its window expires with what is left of it, as
  in production. After the day the simulation runs on until everything has ended.

A miss counts when the deadline could have been met, judged by a relaxed world: all GPUs as one
machine without swaps, on which any batch may use everything, earliest deadline first; and the 80 GB
ones likewise for the models that need them. What is late even there is left out, and counted.
Starved is a batch that waited half an hour longer for its next chunk than `policy.MORE` times its
class's patience.
Fairness (Jain's index: 1 is equal) is taken on a plain day, of normal batches with windows of 24 h
at 95 % load, because classes and deadlines are meant to go before it: each hour, over the GPU
seconds by weight of those tenants that had 60 chunks or more waiting all through the hour.
"""

from __future__ import annotations

import heapq
import random
import time
from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from batches import policy
from batches.policy import HIGH, LOW, NORMAL, Candidate, Model, Tenant, View, Worker

SEED = 7
DAY, HOUR = 86_400.0, 3_600.0
SMALL, LARGE = "24 GB", "80 GB"
COUNTS = {SMALL: 40, LARGE: 24}
SLOWER = 0.45
"""The small kind's speed, on average, in those of the large one."""
CAPACITY = COUNTS[LARGE] + SLOWER * COUNTS[SMALL]
LOADS = (0.5, 0.8, 0.95)
CHUNK = 60.0
GRACE = 1_800.0
BACKLOG = 60
LOOK_AGAIN = 120.0
"""Seconds after which an idle worker looks again by itself."""
CLASSES = {LOW: "low", NORMAL: "normal", HIGH: "high"}


# --- The workload ---------------------------------------------------------------------------------


@dataclass(slots=True)
class Job:
    """A batch; `work` in seconds of a large GPU."""

    name: str
    organization: str
    model: str
    priority: int
    arrived: float
    due: float
    work: float
    chunk_tokens: float
    chunks: int
    """Not leased yet."""
    truth: float
    """What the work is, in what it was estimated to be."""
    running: int = 0
    served: float = 0.0
    first: float | None = None
    ended: float | None = None
    gap: float = 0.0

    @property
    def candidate(self) -> Candidate:
        return Candidate(
            self.name,
            self.organization,
            self.priority,
            self.arrived,
            self.served,
            self.due,
            self.chunks * self.chunk_tokens,
            self.chunks,
        )


def make_models(chance: random.Random) -> dict[str, Model]:
    models = {}
    for at in range(20):
        large = at % 10 in (2, 5, 8)
        speed, slower = chance.uniform(1_000, 8_000), chance.uniform(0.35, 0.55)
        load = chance.uniform(90, 180) if large else chance.uniform(30, 60)
        models[f"model-{at:02}"] = Model(
            {LARGE: speed} if large else {LARGE: speed, SMALL: speed * slower},
            {LARGE: load, SMALL: load * 4 / 3},
            frozenset({SMALL}) if large else frozenset(),
        )
    return models


def make_jobs(
    chance: random.Random, models: dict[str, Model], load: float, plain: bool
) -> list[Job]:
    names = list(models)
    popular = [1 / (at + 1) for at in range(len(names))]
    tenants = [f"org-{at:03}" for at in range(500)]
    active = [1 / (at + 1) ** 0.7 for at in range(len(tenants))]
    uses = {each: chance.choices(names, popular, k=chance.randint(1, 3)) for each in tenants}
    jobs: list[Job] = []
    left = load * CAPACITY * DAY
    while left > 0:
        organization = chance.choices(tenants, active)[0]
        job = _job(chance, models, organization, chance.choice(uses[organization]))
        if plain:
            job.priority, job.due = NORMAL, job.arrived + 24 * HOUR
        jobs.append(job)
        left -= jobs[-1].work
    jobs.sort(key=lambda job: job.arrived)
    for at, job in enumerate(jobs):
        job.name = f"batch-{at:06}"
    return jobs


def _job(chance: random.Random, models: dict[str, Model], organization: str, model: str) -> Job:
    work = pareto(chance, 1.1, 30, 20 * HOUR)
    wanted = chance.choices((1, 4, 24), (10, 20, 70))[0]
    window = next(hours * HOUR for hours in (1, 4, 24) if hours >= max(wanted, work / 8 / HOUR))
    arrived = moment(chance)
    chunks = max(1, round(work / CHUNK))
    return Job(
        name="",
        organization=organization,
        model=model,
        priority=chance.choices((LOW, NORMAL, HIGH), (15, 70, 15))[0],
        arrived=arrived,
        due=arrived + window,
        work=work,
        chunk_tokens=work * models[model].speed[LARGE] / chunks,
        chunks=chunks,
        truth=chance.lognormvariate(0, 0.2),
        served=arrived,
    )


def pareto(chance: random.Random, alpha: float, low: float, high: float) -> float:
    """A bounded Pareto variate, by inversion."""
    share = chance.random() * (1 - (low / high) ** alpha)
    return low / (1 - share) ** (1 / alpha)


def moment(chance: random.Random) -> float:
    """A moment of the day, by rejection: the rate is a triangle from 0.7 to 1.3 and back."""
    while True:
        at = chance.uniform(0, DAY)
        if chance.uniform(0, 1.3) < 0.7 + 0.6 * (1 - abs(at / DAY - 0.5) * 2):
            return at


# --- The simulation -------------------------------------------------------------------------------

Chooser = Callable[["Simulation", Worker], "tuple[Job, str] | None"]


@dataclass
class Simulation:
    """One day under one policy. The waiting batches are kept in the orders that policies want."""

    models: dict[str, Model]
    jobs: list[Job]
    weights: dict[str, float]
    chooser: Chooser
    now: float = 0.0
    waiting: dict[str, list[Candidate]] = field(default_factory=lambda: defaultdict(list))
    work: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    lines: dict[tuple[str, int], deque[Job]] = field(default_factory=lambda: defaultdict(deque))
    """By model and class, oldest first; those without a ready chunk are dropped when seen."""
    tenants: dict[str, Tenant] = field(default_factory=dict)
    workers: list[Worker] = field(default_factory=list)
    idle: set[int] = field(default_factory=set)
    swap_seconds: float = 0.0
    swaps: int = 0
    choices: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        kinds = [kind for kind, many in COUNTS.items() for _ in range(many)]
        self.workers = [Worker(f"gpu-{at:02}", kind) for at, kind in enumerate(kinds)]
        self.tenants = {name: Tenant(weight) for name, weight in self.weights.items()}
        self.by_name = {job.name: job for job in self.jobs}
        self.fairness = Fairness(self.weights)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._asked = [0] * len(kinds)

    def run(self) -> None:
        for job in self.jobs:
            self.later(job.arrived, lambda job=job: self.arrive(job))  # type: ignore[misc]
        for at in range(len(self.workers)):
            self.later(0.0, lambda at=at: self.ask(at))  # type: ignore[misc]
        while self._events:
            self.now, _, happen = heapq.heappop(self._events)
            happen()

    def later(self, at: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at, next(self._order), happen))

    def arrive(self, job: Job) -> None:
        insort(self.waiting[job.model], job.candidate, key=_due)
        self.lines[job.model, job.priority].append(job)
        self._count_work(job, job.chunks)
        self.fairness.count(job, job.chunks, self.now)
        self.later(job.due, lambda: self.expire(job))
        ready = sorted(self.idle, key=lambda at: self.workers[at].model != job.model)
        for at in ready:
            if job.chunks:
                self.ask(at)

    def expire(self, job: Job) -> None:
        if job.chunks:
            job.gap = max(job.gap, self.now - job.served)
            self.fairness.count(job, -job.chunks, self.now)
            self._count_work(job, -job.chunks)
            job.chunks = 0
            self._replace(job)
            job.ended = None if job.running else self.now

    def ask(self, at: int) -> None:
        """One worker looks for its next chunk, as it does in production when one has ended."""
        worker = self.workers[at]
        began = time.process_time()
        chosen = self.chooser(self, worker)
        self.choices.append(time.process_time() - began)
        self._asked[at] += 1
        if chosen is not None:
            self.idle.discard(at)
            self.start(at, *chosen)
        else:
            self.idle.add(at)
            if self.now < 3 * DAY and (any(self.waiting.values()) or self.now < DAY):
                asked = self._asked[at]
                self.later(self.now + LOOK_AGAIN, lambda: self._ask_again(at, asked))

    def _ask_again(self, at: int, asked: int) -> None:
        if self._asked[at] == asked and any(self.waiting.values()):
            self.ask(at)
        elif self._asked[at] == asked:
            self.later(
                self.now + LOOK_AGAIN, lambda: self._ask_again(at, asked)
            ) if self.now < DAY else None

    def start(self, at: int, job: Job, model: str) -> None:
        worker = self.workers[at]
        load = 0.0
        if worker.model != model:
            load = self.models[model].load_on(worker.kind)
            self.workers[at] = Worker(worker.name, worker.kind, model, self.now + load)
            self.swaps += 1
            if self.now < DAY:
                self.swap_seconds += load
        seconds = job.chunk_tokens / self.models[model].speed_on(worker.kind)
        self._lease(job, self.models[model].cost(job.chunk_tokens))
        self.later(self.now + load + seconds * job.truth, lambda: self.finish(at, job))

    def _lease(self, job: Job, seconds: float) -> None:
        job.gap = max(job.gap, self.now - job.served)
        job.first = self.now if job.first is None else job.first
        job.served = self.now
        job.chunks -= 1
        job.running += 1
        self._replace(job)
        tenant = self.tenants[job.organization]
        # Growing what comes instead of shrinking what was keeps the same proportions.
        served = tenant.served + seconds * 2 ** (self.now / policy.HALF_LIFE)
        self.tenants[job.organization] = Tenant(tenant.weight, served, tenant.running + 1)
        self.fairness.serve(job, seconds, self.now)
        self.fairness.count(job, -1, self.now)
        self._count_work(job, -1)

    def _replace(self, job: Job) -> None:
        """Write the batch's entry anew, or take it out when nothing of it is ready any more."""
        entries = self.waiting[job.model]
        at = bisect_left(entries, (job.due, job.name), key=_due)
        if job.chunks:
            entries[at] = job.candidate
        else:
            del entries[at]
            if not entries:
                del self.waiting[job.model]

    def _count_work(self, job: Job, chunks: int) -> None:
        """Keep what `policy.work_of` would add up."""
        work = self.work[job.model]
        tokens = chunks * job.chunk_tokens * policy.CLASS_FACTOR[job.priority]
        work[job.organization] = work.get(job.organization, 0.0) + tokens
        if work[job.organization] < 1e-3:
            del work[job.organization]

    def finish(self, at: int, job: Job) -> None:
        job.running -= 1
        if not job.running and not job.chunks:
            job.ended = self.now
        tenant = self.tenants[job.organization]
        self.tenants[job.organization] = Tenant(tenant.weight, tenant.served, tenant.running - 1)
        self.ask(at)

    def oldest(self, kind: str, priority: int | None = None, model: str = "") -> Job | None:
        """The oldest batch with a ready chunk that fits the kind."""
        heads = (
            head
            for (name, level), line in self.lines.items()
            if model in ("", name) and priority in (None, level)
            if kind not in self.models[name].unfit and (head := _head(line)) is not None
        )
        return min(heads, key=lambda job: job.name, default=None)


def _due(each: Candidate) -> tuple[float, str]:
    return each.due, each.batch


def _head(line: deque[Job]) -> Job | None:
    while line and not line[0].chunks:
        line.popleft()
    return line[0] if line else None


class Fairness:
    """Service of normal batches by hour, of the tenants that were backlogged all through it."""

    def __init__(self, weights: dict[str, float]) -> None:
        self.weights = weights
        self.waiting: dict[str, int] = defaultdict(int)
        self.since: dict[str, float] = {}
        self.spans: list[tuple[str, float, float]] = []
        self.served: dict[tuple[str, int], float] = defaultdict(float)

    def count(self, job: Job, chunks: int, now: float) -> None:
        """So many more (or fewer) chunks of the tenant wait."""
        if job.priority != NORMAL:
            return
        self.waiting[job.organization] += chunks
        if self.waiting[job.organization] >= BACKLOG:
            self.since.setdefault(job.organization, now)
        elif job.organization in self.since:
            self.spans.append((job.organization, self.since.pop(job.organization), now))

    def serve(self, job: Job, seconds: float, now: float) -> None:
        self.served[job.organization, int(now / HOUR)] += seconds

    def jain(self) -> float:
        """The mean over the hours of the day, each counted by its tenants; 1.0 without any."""
        hours: dict[int, list[float]] = defaultdict(list)
        for name, begin, end in self.spans:
            for hour in range(-int(-begin // HOUR), int(end // HOUR)):
                if hour < 24:
                    hours[hour].append(self.served[name, hour] / self.weights[name])
        some = [each for each in hours.values() if len(each) > 1]
        tenants = sum(map(len, some))
        return sum(len(each) * jain(each) for each in some) / tenants if tenants else 1.0


def jain(shares: list[float]) -> float:
    """(Σx)² / (n Σx²): Jain, Chiu and Hawe, 1984."""
    squares = sum(each * each for each in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0


# --- The policies ---------------------------------------------------------------------------------


def ours(world: Simulation, worker: Worker) -> tuple[Job, str] | None:
    view = View(world.now, world.waiting, world.work, world.tenants, world.models, world.workers)
    decision = policy.choose(view, worker)
    if decision.candidate is None:
        return None
    return world.by_name[decision.candidate.batch], decision.model


def fifo(world: Simulation, worker: Worker) -> tuple[Job, str] | None:
    job = world.oldest(worker.kind)
    return (job, job.model) if job else None


def affinity(world: Simulation, worker: Worker) -> tuple[Job, str] | None:
    kept = world.oldest(worker.kind, model=worker.model) if worker.model else None
    return (kept, kept.model) if kept else fifo(world, worker)


def priority(world: Simulation, worker: Worker) -> tuple[Job, str] | None:
    found = (world.oldest(worker.kind, level) for level in (HIGH, NORMAL, LOW))
    job = next((each for each in found if each), None)
    return (job, job.model) if job else None


POLICIES: dict[str, Chooser] = {
    "ours": ours,
    "fifo": fifo,
    "fifo, loaded first": affinity,
    "priority": priority,
}


# --- What came of it ------------------------------------------------------------------------------


def late(world: Simulation) -> set[str]:
    return {
        job.name for job in world.jobs if job.ended is None or job.ended > job.due or job.chunks
    }


def unavoidable(jobs: list[Job], models: dict[str, Model]) -> set[str]:
    """Batches that are late even in the relaxed world."""
    fastest = max(
        model.speed[SMALL] / model.speed[LARGE] for model in models.values() if not model.unfit
    )
    large = [job for job in jobs if models[job.model].unfit]
    whole = COUNTS[LARGE] + fastest * COUNTS[SMALL]
    return late_on_one(jobs, whole) | late_on_one(large, COUNTS[LARGE])


def late_on_one(jobs: list[Job], capacity: float) -> set[str]:
    """Who is late on one machine of this many large GPUs, preemptive, earliest deadline first."""
    queue: list[tuple[float, str, float]] = []
    found = set()
    ends = [*jobs[1:], None]
    for job, after in zip(jobs, ends, strict=True):
        heapq.heappush(queue, (job.due, job.name, job.work * job.truth))
        now, until = job.arrived, after.arrived if after else float("inf")
        while queue and now < until:
            due, name, work = heapq.heappop(queue)
            end = min(now + work / capacity, until, max(due, now))
            work -= (end - now) * capacity
            now = end
            if work > 1e-6 and now >= due:
                found.add(name)
            elif work > 1e-6:
                heapq.heappush(queue, (due, name, work))
    return found


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def summary(world: Simulation, excused: set[str]) -> dict[str, float]:
    found = {
        "swap_share": world.swap_seconds / DAY / len(world.workers),
        "jain": world.fairness.jain(),
        "missed": float(len(late(world) - excused)),
        "starved": float(
            sum(job.gap > policy.MORE * policy.PATIENCE[job.priority] + GRACE for job in world.jobs)
        ),
    }
    for level, name in CLASSES.items():
        waits = [
            (job.first or job.due) - job.arrived for job in world.jobs if job.priority == level
        ]
        found[f"wait_p50_{name}"] = quantile(waits, 0.5)
        found[f"wait_p99_{name}"] = quantile(waits, 0.99)
    return found


def simulate(load: float, name: str, plain: bool = False) -> tuple[dict[str, float], Simulation]:
    chance = random.Random(f"{SEED} {load}")
    models = make_models(random.Random(SEED))
    jobs = make_jobs(chance, models, load, plain)
    weigh = random.Random(SEED)
    weights = {f"org-{at:03}": weigh.choices((1.0, 2.0, 4.0), (70, 20, 10))[0] for at in range(500)}
    world = Simulation(models, jobs, weights, POLICIES[name])
    world.run()
    excused = unavoidable(jobs, models)
    return summary(world, excused) | {"excused": float(len(excused))}, world


def simulate_all(name: str) -> dict[str, float]:
    """One policy's columns: the mixed day at three loads, and the plain one for fairness."""
    print(f"  {name} …", flush=True)
    found: dict[str, float] = {}
    starved = 0.0
    for load in LOADS:
        one, world = simulate(load, name)
        percent = round(100 * load)
        found |= {f"{key}_{percent}": one[key] for key in ("swap_share", "missed", "excused")}
        starved += one["starved"]
        if load == 0.8:
            found |= {key: value for key, value in one.items() if key.startswith("wait_")}
            found["choices_p99_ms"] = quantile(world.choices, 0.99) * 1e3
    plain, _ = simulate(0.95, name, plain=True)
    return found | {"starved": starved + plain["starved"], "jain": plain["jain"]}


def crowd(waiting: int = 10_000) -> View:
    """So many batches waiting, each a candidate of its own, for 64 workers that may all move."""
    chance, models = random.Random(SEED), make_models(random.Random(SEED))
    found: dict[str, list[Candidate]] = defaultdict(list)
    for job in make_jobs(chance, models, 0.8, plain=False)[:waiting]:
        job.due -= job.arrived
        job.arrived = job.served = -chance.uniform(0, 2 * HOUR)
        insort(found[job.model], job.candidate, key=_due)
    tenants = {f"org-{at:03}": Tenant(1.0, chance.random() * HOUR) for at in range(500)}
    names = [name for name in models if not models[name].unfit]
    kinds = [kind for kind, many in COUNTS.items() for _ in range(many)]
    workers = [
        Worker(f"gpu-{at}", kind, names[at % len(names)], -DAY) for at, kind in enumerate(kinds)
    ]
    return View(0.0, found, policy.work_of(found), tenants, models, workers)


def times_of_choose() -> list[float]:
    """Milliseconds of CPU that each worker's decision takes among 10,000 waiting batches."""
    view, taken = crowd(), []
    for worker in view.workers:
        began = time.process_time()
        policy.choose(view, worker)
        taken.append((time.process_time() - began) * 1e3)
    return taken


def run() -> dict[str, float]:
    taken = times_of_choose()
    columns = {name: simulate_all(name) for name in POLICIES}
    print(f"  {'':<18}" + "".join(f"{name:>20}" for name in columns))
    for key in columns["ours"]:
        print(f"  {key:<18}" + "".join(f"{column[key]:>20,.3f}" for column in columns.values()))
    mine = columns["ours"]
    return {
        "swap_share": mine["swap_share_80"],
        "choose_ms": max(taken),
        "choose_median_ms": quantile(taken, 0.5),
        **mine,
    }
