"""Which batch a GPU worker serves next: a pure function of what waits, who asks and what is loaded.

Nothing here reads a clock, a database or a GPU, so the same code runs in `./run bench queue`.
Times are seconds since 1970, work is in tokens by estimate, and a *chunk* is what one lease hands
out. `batches/outlook.py` tells people from the same view when their turn will come.

A decision has two steps, and each has one idea.

1. **Which model should this worker have?** Every model with work states a *claim* to one worker
   more than the n that serve it already, those under way to it counted. The highest rank wins:

       late       rescue > n + ½        rescue = chunks that give every batch past its patience
                                                 its turn within ten minutes, at least one worker
       deadline   must > n + ½          must = 1.25 × max over deadlines d of
                                                 (work due by d) / (time until d), plus rescue
       share      entitled / (n + 1)    entitled = its organizations' shares of all workers

   The maximum is the least constant speed that meets every deadline, earliest first (the critical
   interval of Yao, Demers and Shenker, "A scheduling model for reduced CPU energy", 1995). Shares
   are max-min fair by weight. Dividing by n + 1 hands workers out as D'Hondt's method hands out
   seats (Balinski and Young, "Fair representation", 1982). A worker with work left moves only for
   a claim of a higher rank, or one better than its own by the factor `BETTER`; after it stayed for a multiple
   of the *measured* seconds its load took; and to work that is worth the swap. Since those under
   way count, the next worker that looks finds the claim answered.

2. **Which batch of that model?** A batch past its patience (`MORE` times that, where its organization
   is ahead of the average: who splits a batch into a hundred must not get a hundred times the share);
   else one that an operator moved to the front (which brings a worker to its model as a late one
   does, until it has had a chunk); else, when the deadlines need most of the model's workers, the
   one with the earliest deadline; else the highest class, in it the organization that is least
   ahead, and of its batches one past its patience, else the oldest. An organization is ahead by its
   served GPU seconds divided by its weight: the counters of deficit round robin (Shreedhar and
   Varghese, 1995), which forget half in a quarter of an hour (as in Kay and Lauder, "A fair share
   scheduler", 1988), so that nobody saves up for a day nor pays for one. What GPU seconds are:
   tokens by the model's own speed on its fastest kind, so that a token of a large model counts for
   more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from math import inf
from operator import itemgetter
from typing import NamedTuple

LOW, NORMAL, HIGH = -1, 0, 1
PATIENCE = {LOW: 6 * 3600.0, NORMAL: 2 * 3600.0, HIGH: 300.0}
"""Seconds after its last chunk at which a batch of this class goes first, whatever else waits."""
MORE = 3.0
"""So many times as patient is a batch of an organization that is ahead of the average."""
CLASS_FACTOR = {LOW: 0.25, NORMAL: 1.0, HIGH: 4.0}
"""How much more a class counts between models; within a model the higher one simply goes first."""
RESCUE_SECONDS = 600.0
"""How soon all batches that are past their patience should have had a chunk."""
MARGIN_SECONDS = 300.0
"""Kept free before every deadline, for a swap, a chunk under way and finalizing."""
SAFETY = 1.25
"""Deadlines are planned with this much more work than there is by estimate."""
TIGHT = 0.6
"""Deadlines go first once they need this share of the workers that serve the model."""
BETTER = 1.6
"""A claim must be better than the loaded model's by this factor."""
RESCUE_STAY, SHARE_STAY = 5.0, 12.0
"""A worker stays this many times the seconds its load took: when a model is at risk, and else. The
first also after the last real-time request, if nothing is at risk; the second is what a model must
have to do for each of its workers that another one comes to."""
IDLE_WORTH = 20.0
"""An idle worker joins others where these would need as many times the load's seconds alone."""
CHUNK_SECONDS = 60.0
DEFAULT_SPEED, DEFAULT_LOAD, DEFAULT_WAKE = 2000.0, 90.0, 10.0
"""Tokens a second, seconds of a load and of a waking, until they are measured."""
HORIZON = 300.0
"""Nobody is entitled to more workers than would do their work within so many seconds."""
HALF_LIFE = 900.0
"""Seconds after which half of what an organization was served is forgotten."""
AHEAD_SECONDS = 600.0
"""How long before its turn on a worker a model's weights are brought there."""
ASKED_SECONDS = 180.0
"""For so long a model that a real-time request asked for is worth a worker with nothing else to do."""


class Candidate(NamedTuple):
    """A batch with at least one chunk to lease."""

    batch: str
    organization: str
    priority: int
    created: float
    served: float
    """When it last got a chunk; when it became ready, if it had none yet."""
    due: float
    tokens: float
    """In its ready chunks."""
    chunks: int
    front: float = 0.0
    """When an operator moved it to the front; 0: nobody did."""
    hold: str = ""
    """Why it may not run now (one of `HOLDS`), where people are told; workers are shown no such."""


HOLDS = ("moderation", "hold", "tenant_paused", "model_paused")
"""What keeps a batch from running by an operator's wish, or until one has approved it."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """An organization that has work waiting."""

    weight: float = 1.0
    served: float = 0.0
    """GPU seconds, of which half is forgotten every `HALF_LIFE`."""
    running: int = 0
    limit: int | None = None
    """Chunks that it may have running at once."""
    held: bool = False

    @property
    def may_run(self) -> bool:
        return not self.held and (self.limit is None or self.running < self.limit)

    @property
    def ahead(self) -> float:
        return self.served / self.weight


@dataclass(frozen=True, slots=True)
class Model:
    """What was measured of a model, by kind of GPU."""

    speed: Mapping[str, float] = field(default_factory=dict)
    """Tokens a second, in and out."""
    load: Mapping[str, float] = field(default_factory=dict)
    """Seconds from nothing loaded to the first request."""
    unfit: frozenset[str] = frozenset()
    """Kinds of GPU that it does not fit."""
    wake: Mapping[str, float] = field(default_factory=dict)
    """Seconds from asleep to the first request."""

    def speed_on(self, kind: str) -> float:
        return self.speed.get(kind) or max(self.speed.values(), default=DEFAULT_SPEED)

    def cost(self, tokens: float) -> float:
        """What so many tokens are worth, in seconds of the kind of GPU that is fastest with it."""
        return tokens / max(self.speed.values(), default=DEFAULT_SPEED)

    def load_on(self, kind: str) -> float:
        return self.load.get(kind, max(self.load.values(), default=DEFAULT_LOAD))

    def wake_on(self, kind: str) -> float:
        return self.wake.get(kind, max(self.wake.values(), default=DEFAULT_WAKE))


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker that is alive."""

    name: str
    kind: str = ""
    model: str = ""
    """Loaded, or being loaded."""
    since: float = 0.0
    """When its model was loaded."""
    draining: bool = False
    asleep: frozenset[str] = frozenset()
    """Models that it has or had to wake, not to load."""

    def swap_to(self, name: str, model: Model) -> float:
        """Seconds until the model is ready here."""
        return model.wake_on(self.kind) if name in self.asleep else model.load_on(self.kind)


@dataclass(frozen=True, slots=True)
class View:
    """Everything that a decision looks at, at one moment."""

    now: float
    waiting: Mapping[str, Sequence[Candidate]]
    """By model, in order of deadlines."""
    work: Mapping[str, Mapping[str, float]]
    """By model and organization, tokens that wait, each times its class factor."""
    tenants: Mapping[str, Tenant]
    models: Mapping[str, Model]
    workers: Sequence[Worker]
    asked: Mapping[str, float] = field(default_factory=dict)
    """Models that real-time requests asked for, and when they last did."""


def work_of(waiting: Mapping[str, Sequence[Candidate]]) -> dict[str, dict[str, float]]:
    """What `View.work` says, added up from what waits."""
    found: dict[str, dict[str, float]] = {}
    for model, candidates in waiting.items():
        by_organization = found[model] = dict[str, float]()
        for _, organization, priority, _, _, _, tokens, _, _, _ in candidates:
            counted = tokens * CLASS_FACTOR[priority]
            by_organization[organization] = by_organization.get(organization, 0.0) + counted
    return found


def without(view: View, decision: Decision) -> View:
    """The view without the batch that was chosen."""
    return _replaced(view, decision, [])


def after_lease(view: View, decision: Decision) -> View:
    """The view once a chunk of what was chosen is leased, as large as its chunks are on average."""
    assert decision.candidate is not None
    was = decision.candidate
    tokens = was.tokens / was.chunks
    left = was._replace(served=view.now, tokens=was.tokens - tokens, chunks=was.chunks - 1)
    tenant = view.tenants[was.organization]
    served = tenant.served + view.models[decision.model].cost(tokens)
    tenant = replace(tenant, served=served, running=tenant.running + 1)
    view = _replaced(view, decision, [left] if left.chunks else [])
    return replace(view, tenants={**view.tenants, was.organization: tenant})


def _replaced(view: View, decision: Decision, left: Sequence[Candidate]) -> View:
    model, its = decision.model, list[Candidate]()
    for each in view.waiting[model]:
        its += left if each is decision.candidate else [each]
    waiting, work = {**view.waiting, model: its}, {**view.work, **work_of({model: its})}
    if not its:
        del waiting[model], work[model]
    return replace(view, waiting=waiting, work=work)


@dataclass(frozen=True, slots=True)
class Reason:
    """Why, as data; `str` puts it in words."""

    code: str
    model: str = ""
    loaded: str = ""
    ahead: int = 0
    at: float | None = None
    workers: int = 0

    def __str__(self) -> str:
        at = f"{datetime.fromtimestamp(self.at, UTC):%H:%M} UTC" if self.at is not None else "?"
        chunks = f"{self.ahead} chunk{'' if self.ahead == 1 else 's'} ahead"
        workers = f"{self.workers} worker{'' if self.workers == 1 else 's'}"
        return WORDS[self.code].format(
            model=self.model, loaded=self.loaded or "nothing", chunks=chunks, at=at, workers=workers
        )


WORDS = {
    # Decisions
    "loaded": "{model} is loaded",
    "dry": "nothing waits for {loaded}: swap to {model}",
    "late": "batches of {model} waited too long for {loaded} to stay",
    "deadline": "deadlines of {model} need another worker",
    "share": "{model} has fewer workers than its tenants' share",
    "draining": "the worker is draining",
    "asked": "real-time requests ask for {model}",
    "kept": "real-time requests asked for {loaded} a moment ago",
    "nothing": "nothing waits that may run here",
    "soon": "others will be done with {model} before a swap is",
    # Places in the queue
    "running": "running on {workers}",
    "next": "waiting: {chunks}, {model} is loaded",
    "loading": "waiting: {chunks}, {model} is being loaded",
    "swap": "waiting: {chunks}, {loaded} is loaded, swap planned at {at}",
    "held": "held: the organization is suspended or its work is on hold",
    "moderation": "held: waits for an operator's approval",
    "hold": "held by an operator",
    "tenant_paused": "held: an operator has paused the organization's work",
    "model_paused": "held: {model} is paused by an operator",
    "limit": "waiting: the organization runs as many chunks at once as it may",
    "unfit": "waiting: no worker that is running has a GPU that {model} fits",
    "failing": "waiting: {model} could not be loaded; it is tried again from time to time",
    "nobody": "waiting: no worker is running; whoever runs the portal starts one with ./run worker",
    "drained": "waiting: all workers are draining and begin nothing new",
}


@dataclass(frozen=True, slots=True)
class Decision:
    """What to lease from, or nothing: then the worker keeps idle, or just loads the model."""

    candidate: Candidate | None
    reason: Reason

    @property
    def model(self) -> str:
        return self.reason.model if self.candidate or self.reason.code == "asked" else ""


@dataclass(frozen=True, slots=True)
class Demand:
    """What waits for one model, as one worker sees it."""

    model: str
    waiting: Sequence[Candidate]
    """Those that may run, in order of deadlines."""
    speed: float
    load: float
    tokens: float
    rate: float
    """Tokens a second that its deadlines need."""
    lates: int
    """Batches past their patience."""
    entitled: float
    """Workers that its organizations deserve to have here."""
    others: float
    """Workers that serve the model already, but for the one that asks."""
    ahead: frozenset[str] = frozenset()
    """Organizations that had more than the average by weight lately."""

    @property
    def seconds(self) -> float:
        """Of work for one worker."""
        return self.tokens / self.speed

    @property
    def rescue(self) -> float:
        """Workers that its late batches need."""
        return max(1.0, self.lates * CHUNK_SECONDS / RESCUE_SECONDS) if self.lates else 0.0

    @property
    def must(self) -> float:
        """Workers that its deadlines and its late batches need."""
        return SAFETY * self.rate / self.speed + self.rescue

    @property
    def claim(self) -> tuple[int, float]:
        """How much the model wants one worker more than the others: its rank, then by how much."""
        for rank, wanted in ((LATE, self.rescue), (DEADLINE, self.must)):
            if wanted > self.others + 0.5:
                return rank, wanted / (self.others + 1)
        return SHARE, self.entitled / (self.others + 1)


LATE, DEADLINE, SHARE = 2, 1, 0


def choose(view: View, worker: Worker) -> Decision:
    """The batch that the worker should lease a chunk from, or why it should keep idle."""
    if worker.draining:
        return Decision(None, Reason("draining"))
    if _just_came(view, worker) and (here := _demands(view, worker, [worker.model])):
        return _decided(view, here[0], "loaded", worker)
    demands = {each.model: each for each in _demands(view, worker, view.waiting)}
    kept = demands.pop(worker.model, None)
    best = _best([each for each in demands.values() if _worth(each, kept)])
    asked = _asked(view, worker)
    if best is not None and kept is None and best.claim[0] == SHARE and asked == worker.model != "":
        return Decision(None, Reason("kept", worker.model, worker.model))
    if best is not None and (kept is None or _beats(best, kept, view.now - worker.since)):
        return _decided(view, best, _why(best, kept), worker)
    if kept is not None:
        return _decided(view, kept, "loaded", worker)
    if asked not in ("", worker.model):
        return Decision(None, Reason("asked", asked, worker.model))
    rest = _best(list(demands.values()))
    return Decision(None, Reason("soon", rest.model) if rest else Reason("nothing"))


def _asked(view: View, worker: Worker) -> str:
    """The model that the worker would serve real-time requests with; '' for none.

    Its own while that is in use; else, of those that no other worker serves, the last one.
    """
    if not view.asked:
        return ""
    served = {each.model for each in view.workers if not each.draining and each.name != worker.name}
    ago = {
        name: view.now - at
        for name, at in view.asked.items()
        if name in view.models and name not in served
    }
    own = view.models.get(worker.model)
    if own and ago.get(worker.model, inf) < RESCUE_STAY * own.load_on(worker.kind):
        return worker.model
    wished = [
        name
        for name, seconds in ago.items()
        if seconds < ASKED_SECONDS
        and name != worker.model
        and worker.kind not in view.models[name].unfit
    ]
    return min(wished, key=lambda name: (ago[name], name), default="")


def choose_more(view: View, worker: Worker) -> Decision:
    """The next batch of the worker's own model, once it was chosen to keep that."""
    here = _demands(view, worker, [worker.model] if worker.model in view.waiting else [])
    return _decided(view, here[0], "loaded", worker) if here else Decision(None, Reason("nothing"))


def upcoming(view: View, worker: Worker) -> str:
    """The model that the worker will most likely swap to within `AHEAD_SECONDS`; '' for none.

    It is what would be chosen then if nothing else came, and if who asks in real time went on
    asking. A model that sleeps here is none: its weights are in memory already.
    """
    name = choose(_ahead(view, worker), worker).model
    return "" if name == worker.model or name in worker.asleep else name


def _ahead(view: View, worker: Worker) -> View:
    """The view `AHEAD_SECONDS` later: of a model that is served there is less by what its workers
    do until then, and all of its batches that are left had their turn."""
    later, served = view.now + AHEAD_SECONDS, supply(view, worker)
    waiting: dict[str, Sequence[Candidate]] = {}
    for name, its in view.waiting.items():
        workers = served.get(name, 0.0) + (name == worker.model)
        done = AHEAD_SECONDS * workers * view.models[name].speed_on(worker.kind)
        tokens = sum(each.tokens for each in its)
        if tokens > done:
            left = 1 - done / tokens
            waiting[name] = [_after(each, left, later) for each in its] if workers else its
    asked = {name: at + AHEAD_SECONDS for name, at in view.asked.items()}
    return replace(view, now=later, waiting=waiting, work=work_of(waiting), asked=asked)


def _after(each: Candidate, left: float, served: float) -> Candidate:
    return each._replace(tokens=each.tokens * left, served=served)


def _decided(view: View, demand: Demand, code: str, worker: Worker) -> Decision:
    return Decision(_pick(view, demand), Reason(code, demand.model, worker.model))


# --- Which model ----------------------------------------------------------------------------------


def _just_came(view: View, worker: Worker) -> bool:
    """Whether the worker's model was loaded too lately for any other to take its place."""
    if worker.model not in view.waiting:
        return False
    load = worker.swap_to(worker.model, view.models[worker.model])
    return view.now - worker.since < RESCUE_STAY * load


def _demands(view: View, worker: Worker, some: Iterable[str]) -> list[Demand]:
    """What waits for each of these models, where it fits the worker and anything of it may run."""
    fit = [name for name in some if worker.kind not in view.models[name].unfit]
    entitled = _entitled(view, fit)
    others = supply(view, worker)
    blocked = frozenset(name for name, each in view.tenants.items() if not each.may_run)
    ahead = ahead_of_average(view)
    found = []
    for name in fit:
        waiting, model = view.waiting[name], view.models[name]
        if blocked:
            waiting = [each for each in waiting if each.organization not in blocked]
        if waiting:
            speed, load = model.speed_on(worker.kind), worker.swap_to(name, model)
            tokens, rate, lates = _pressure(waiting, view.now, _fastest(view, name), ahead)
            served = others.get(name, 0.0)
            found.append(
                Demand(
                    name, waiting, speed, load, tokens, rate, lates, entitled[name], served, ahead
                )
            )
    return found


def supply(view: View, worker: Worker) -> dict[str, float]:
    """By model, how many workers like this one the other workers on it are worth."""
    found: dict[str, float] = {}
    for each in view.workers:
        if each.model in view.models and not each.draining and each.name != worker.name:
            model = view.models[each.model]
            one = model.speed_on(each.kind) / model.speed_on(worker.kind)
            found[each.model] = found.get(each.model, 0.0) + one
    return found


def _fastest(view: View, name: str) -> float:
    """Tokens a second, if every worker served the model."""
    model = view.models[name]
    kinds = Counter(each.kind for each in view.workers if not each.draining)
    return sum(
        many * model.speed_on(kind) for kind, many in kinds.items() if kind not in model.unfit
    )


def _entitled(view: View, models: Iterable[str]) -> dict[str, float]:
    """Workers that each of these models deserves: the sum of what its organizations are entitled to.

    An organization is entitled to `level` workers by weight, or to what would do its work within
    `HORIZON`, if that is less; spread over its models as its work is: over all that any worker can
    run, or it would be entitled to a whole share of every kind of GPU. One that may not run now is
    entitled to nothing.
    """
    kinds = {each.kind for each in view.workers if not each.draining}
    seconds: dict[str, float] = {}
    for name, work in view.work.items():
        if not kinds <= view.models[name].unfit:
            per_token = view.models[name].cost(1)
            for organization, tokens in work.items():
                seconds[organization] = seconds.get(organization, 0.0) + tokens * per_token
    able = {name: each for name, each in view.tenants.items() if name in seconds and each.may_run}
    wants = [(seconds[name] / HORIZON / each.weight, each.weight) for name, each in able.items()]
    level = _level(wants, sum(not each.draining for each in view.workers))
    shares = {
        name: min(level * each.weight / seconds[name], 1 / HORIZON) for name, each in able.items()
    }
    return {
        name: view.models[name].cost(
            sum(tokens * shares.get(organization, 0.0) for organization, tokens in work.items())
        )
        for name in models
        if (work := view.work[name])
    }


def _level(wants: list[tuple[float, float]], workers: int) -> float:
    """Workers by weight at which all are given out: max-min fairness, filled like water.

    `wants` are pairs of how much would be enough by weight, and the weight.
    """
    left, weights = float(workers), sum(weight for _, weight in wants)
    for enough, weight in sorted(wants):
        if enough * weights >= left:
            return left / weights
        left -= enough * weight
        weights -= weight
    return inf


def patient_until(each: Candidate, ahead: Collection[str]) -> float:
    """When it goes first, whatever else waits; `ahead` are the organizations that must wait longer."""
    return each.served + PATIENCE[each.priority] * (MORE if each.organization in ahead else 1.0)


def ahead_of_average(view: View) -> frozenset[str]:
    """Organizations that had more than those with work had on average, by weight.

    They must be more patient, or who splits a batch into a hundred got a hundred times the share.
    """
    some = {organization for work in view.work.values() for organization in work}
    weights = sum(view.tenants[each].weight for each in some)
    average = sum(view.tenants[each].served for each in some) / weights if weights else 0.0
    return frozenset(each for each in some if view.tenants[each].ahead > average)


def _pressure(
    waiting: Sequence[Candidate], now: float, fastest: float, ahead: Collection[str]
) -> tuple[float, float, int]:
    """Tokens, tokens a second that the deadlines need, and batches past their patience; one that was
    moved to the front is as if past it until its next chunk.

    One pass in tight code, for this is what is O(waiting batches). A deadline that all workers
    together (`fastest`, tokens a second) could not meet counts for nothing: it would take workers
    from those that can be met.
    """
    soon = now + MARGIN_SECONDS
    patient = {priority: now - seconds for priority, seconds in PATIENCE.items()}
    longer = {priority: now - MORE * seconds for priority, seconds in PATIENCE.items()}
    tokens = owed = rate = 0.0
    lates = 0
    for _, organization, priority, _, served, due, size, _, front, _ in waiting:
        tokens += size
        left = due - soon
        if left < CHUNK_SECONDS:
            left = CHUNK_SECONDS
        if size < left * fastest:
            owed += size
            if owed > rate * left:
                rate = owed / left
        if served < front or served < (longer if organization in ahead else patient)[priority]:
            lates += 1
    return tokens, rate, lates


def _best(demands: Sequence[Demand]) -> Demand | None:
    """The best claim; of equal ones that with the earliest deadline."""
    return max(
        demands, key=lambda each: (each.claim, -each.waiting[0].due, each.model), default=None
    )


def _worth(demand: Demand, here: Demand | None) -> bool:
    """Whether there is enough to do for the swap: more than the others do meanwhile."""
    if here is None or demand.claim[0] > SHARE:
        return demand.seconds > IDLE_WORTH * demand.load * demand.others
    return demand.seconds > SHARE_STAY * demand.load * (demand.others + 1)


def _beats(best: Demand, here: Demand, stayed: float) -> bool:
    """Whether a worker that has work left should leave it."""
    (rank, wanted), (rank_here, wanted_here) = best.claim, here.claim
    if rank != rank_here:
        return rank > rank_here and stayed >= RESCUE_STAY * here.load
    return wanted > BETTER * wanted_here and stayed >= SHARE_STAY * here.load


def _why(best: Demand, here: Demand | None) -> str:
    if best.claim[0] > SHARE:
        return "late" if best.lates else "deadline"
    return "share" if here else "dry"


# --- Which batch of it ----------------------------------------------------------------------------


def _pick(view: View, demand: Demand) -> Candidate:
    if demand.lates and (latest := _latest(demand.waiting, view.now, demand.ahead)):
        return latest
    if moved := _moved(demand.waiting):
        return moved
    if first := _first_due(view, demand):
        return first
    return _fair(demand.waiting, view)


def _latest(
    waiting: Iterable[Candidate], now: float, ahead: Collection[str] = ()
) -> Candidate | None:
    """The batch that is past its patience by most; None if none is. In tight code, as `_pressure`."""
    longer = {priority: MORE * seconds for priority, seconds in PATIENCE.items()}
    latest, most = None, 0.0
    for each in waiting:
        batch, organization, priority, _, served, _, _, _, _, _ = each
        over = now - served - (longer if organization in ahead else PATIENCE)[priority]
        if over > most or (over == most and latest is not None and batch > latest.batch):
            latest, most = each, over
    return latest


def _moved(waiting: Sequence[Candidate]) -> Candidate | None:
    """Of those that were moved to the front the last one that was."""
    first = max(waiting, key=_FRONT)
    return first if first.front else None


def _first_due(view: View, demand: Demand) -> Candidate | None:
    """The earliest deadline that can be met, when deadlines come first here.

    They do when they need most of the model's workers, and for a batch that must start now because
    its chunks are not cut short, however many workers there are.
    """
    fastest = _fastest(view, demand.model)
    able = (each for each in demand.waiting if each.tokens < fastest * (each.due - view.now))
    first = next(able, None)
    if first is None or demand.must > TIGHT * (demand.others + 1):
        return first
    seconds = first.tokens / demand.speed / (demand.others + 1)
    return first if first.due - view.now < 2 * MARGIN_SECONDS + seconds else None


def _fair(waiting: Sequence[Candidate], view: View) -> Candidate:
    """The highest class, in it the tenant that is least ahead; of its batches one that is past its
    patience, whatever its class, else the oldest."""
    ahead = {name: tenant.ahead for name, tenant in view.tenants.items()}
    top = max(map(_PRIORITY, waiting))
    first = [each for each in waiting if each.priority == top]
    least = min(ahead[each.organization] for each in first)
    its = [each for each in waiting if ahead[each.organization] == least]
    if late := _latest(its, view.now):
        return late
    return min(
        (each for each in its if each.priority == top), key=lambda each: (each.created, each.batch)
    )


_PRIORITY, _FRONT = itemgetter(2), itemgetter(8, 0)
