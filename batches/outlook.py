"""When a batch's turn comes and when it is done, told from the view that `batches/policy.py` decides on.

Nothing here decides: these are estimates, as if no more work came. `./run bench eta` measures them.

1. **Who serves a model.** Its workers now, all they have leased before anything else. A model without
   a worker gets the first one that runs dry, or that its oldest batch's patience ends for; of several
   such models the one with the most work first.
2. **In which order.** A model's workers are one server that higher classes use first and that the
   organizations of a class share by weight, each doing its own batches in order of age (generalized
   processor sharing, Parekh and Gallager 1993). One that is ahead waits until the others are even with
   it. After v tokens for every unit of weight such a server has done

       F(v) = Σ over organizations of min(what it has waiting, weight × max(0, v − how far ahead))

   so a batch whose organization has x tokens waiting up to and with it ends after F(ahead + x / weight).
3. **Chunks are not cut.** One begins when the server has done half of it, less that half (where
   organizations are even, somebody has to wait); a batch's last one begins when all before it is done,
   and takes as long as one worker takes.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import NamedTuple

from batches.policy import (
    Candidate,
    Model,
    Reason,
    Tenant,
    View,
    Worker,
    ahead_of_average,
    patient_until,
)


class Running(NamedTuple):
    """What is leased of a batch."""

    batch: str
    organization: str
    model: str
    workers: int
    tokens: float
    """Left to do, by estimate."""


@dataclass(frozen=True, slots=True)
class Place:
    """A batch's place among those of its model: from 1, or 0 while it runs.

    Times are seconds since 1970, None where nothing can be said; `start` is of its next chunk.
    """

    position: int
    reason: Reason
    start: float | None = None
    completion: float | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """A batch's first and last token, counted in tokens of its model from now on."""

    candidate: Candidate
    first: float
    last: float


@dataclass(frozen=True, slots=True)
class Server:
    """The workers of a model, now or as soon as one comes."""

    reason: Reason
    begin: float = 0.0
    """From when on, in seconds since 1970."""
    speed: float = 0.0
    """Tokens a second, of all together."""
    workers: int = 1

    def after(self, tokens: float) -> float:
        """When so many tokens are done."""
        return self.begin + tokens / self.speed

    def alone(self, tokens: float) -> float:
        """Seconds that one of the workers takes for them."""
        return tokens * self.workers / self.speed


def explain(
    view: View, running: Iterable[Running] = (), failing: Collection[str] = ()
) -> dict[str, Place]:
    """The place of every batch that waits or runs, by its id; `failing` are models that do not load."""
    running = list(running)
    leased = Counter[str]()
    for each in running:
        leased[each.model] += each.tokens  # type: ignore[assignment]
    able = {
        name: [each for each in its if _may_run(each, view)] for name, its in view.waiting.items()
    }
    servers = _servers(view, able, leased, failing)
    places: dict[str, Place] = {}
    for model, waiting in able.items():
        places |= _waiting(view, model, waiting, servers[model], leased[model])
        places |= _blocked(view, model, len(waiting))
    for each in running:
        places[each.batch] = _running(each, servers[each.model], places.get(each.batch))
    return places


def _may_run(each: Candidate, view: View) -> bool:
    return not each.hold and view.tenants[each.organization].may_run


def _waiting(
    view: View, model: str, able: Sequence[Candidate], server: Server, leased: float
) -> Iterator[tuple[str, Place]]:
    turns = sorted(_turns(able, view, model), key=lambda turn: (turn.first, turn.last))
    tokens, chunks = 0.0, 0  # of those before
    for position, turn in enumerate(turns, 1):
        it = turn.candidate
        ahead = round(turn.first * chunks / tokens) if tokens else 0
        tokens, chunks = tokens + it.tokens, chunks + it.chunks
        reason = replace(server.reason, ahead=ahead)
        if not server.speed:
            yield it.batch, Place(position, reason)
            continue
        chunk = it.tokens / it.chunks
        start = server.after(leased + turn.first)
        last_begins = max(start, server.after(leased + turn.last - chunk))
        end = last_begins + server.alone(chunk)
        yield it.batch, Place(position, reason, start, end)


def _blocked(view: View, model: str, before: int) -> Iterator[tuple[str, Place]]:
    """Those that are held, or whose organization may not run now: after the others, at no time."""
    blocked = [each for each in view.waiting[model] if not _may_run(each, view)]
    for position, each in enumerate(blocked, before + 1):
        code = "held" if view.tenants[each.organization].held else each.hold or "limit"
        yield each.batch, Place(position, Reason(code, model))


def _running(each: Running, server: Server, waiting: Place | None) -> Place:
    """With more to come it ends when that does; else when what is leased is done."""
    reason = Reason("running", each.model, workers=each.workers)
    if waiting is not None:
        return Place(0, reason, waiting.start, waiting.completion)
    if not server.speed:
        return Place(0, reason)
    return Place(0, reason, None, server.begin + server.alone(each.tokens / each.workers))


# --- Who serves a model ---------------------------------------------------------------------------


def _servers(
    view: View,
    able: Mapping[str, Sequence[Candidate]],
    leased: Mapping[str, float],
    failing: Collection[str],
) -> dict[str, Server]:
    """Of each model with work."""
    staff: dict[str, list[Worker]] = {}
    for each in view.workers:
        if not each.draining:
            staff.setdefault(each.model, []).append(each)
    work = {
        name: sum(each.tokens for each in its) + leased.get(name, 0.0) for name, its in able.items()
    }
    work = {name: leased[name] for name in leased} | work
    found = {name: _serving(view, name, staff[name]) for name in work if name in staff}
    free: list[tuple[float, str, Worker]] = []
    for name, its in staff.items():
        dry = found[name].after(work[name]) if name in found else view.now
        free += [(dry, each.name, each) for each in its]
    free.sort(key=_FREE)
    for name in sorted(work.keys() - found.keys(), key=lambda name: (-work[name], name)):
        if name in failing:
            found[name] = Server(Reason("failing", name))
        else:
            found[name] = _next_to_serve(view, name, able.get(name, ()), work[name], free)
    return found


def _FREE(entry: tuple[float, str, Worker]) -> tuple[float, str]:
    return entry[:2]


def _serving(view: View, model: str, workers: Sequence[Worker]) -> Server:
    it, begin = view.models[model], max(view.now, min(each.since for each in workers))
    speed = sum(it.speed_on(each.kind) for each in workers)
    reason = Reason("next" if begin == view.now else "loading", model)
    return Server(reason, begin, speed, len(workers))


def _next_to_serve(
    view: View,
    model: str,
    waiting: Sequence[Candidate],
    work: float,
    free: list[tuple[float, str, Worker]],
) -> Server:
    """The first free worker that the model fits, which is then busy until the model's work is done."""
    it = view.models[model]
    first = next((entry for entry in free if entry[2].kind not in it.unfit), None)
    if first is None:
        return Server(Reason(_why_nobody(view), model))
    dry, name, worker = first
    ahead = ahead_of_average(view)
    at = max(view.now, min([dry, *(_goes_first(each, ahead) for each in waiting)]))
    server = Server(
        Reason("swap", model, worker.model, at=at),
        at + worker.swap_to(model, it),
        it.speed_on(worker.kind),
    )
    free.remove(first)
    insort(free, (max(dry, server.after(work)), name, worker), key=_FREE)
    return server


def _goes_first(each: Candidate, ahead: Collection[str]) -> float:
    """When it does; one that was moved to the front: now."""
    return 0.0 if each.served < each.front else patient_until(each, ahead)


def _why_nobody(view: View) -> str:
    if not view.workers:
        return "nobody"
    return "unfit" if any(not each.draining for each in view.workers) else "drained"


# --- In which order -------------------------------------------------------------------------------


def _turns(able: Iterable[Candidate], view: View, model: str) -> Iterator[Turn]:
    """What was moved to the front, then class by class: a higher one's is done before."""
    before, rest = 0.0, list[Candidate]()
    for each in sorted(able, key=lambda each: (-each.front, each.batch)):
        if not each.front:
            rest.append(each)
            continue
        yield Turn(each, before, before + each.tokens)
        before += each.tokens
    for _, those in groupby(sorted(rest, key=_by_class), key=lambda each: each.priority):
        group = list(those)
        yield from _shared(group, view.tenants, view.models[model], before)
        before += sum(each.tokens for each in group)


def _by_class(each: Candidate) -> tuple[int, float, str]:
    return -each.priority, each.created, each.batch


def _shared(
    group: Sequence[Candidate], tenants: Mapping[str, Tenant], model: Model, before: float
) -> Iterator[Turn]:
    totals = Counter[str]()
    for each in group:
        totals[each.organization] += each.tokens  # type: ignore[assignment]
    least = min(tenants[name].ahead for name in totals)
    # GPU seconds for a unit of weight, as tokens of this model.
    at = {name: (tenants[name].ahead - least) / model.cost(1) for name in totals}
    progress = _Progress([(at[name], tenants[name].weight, totals[name]) for name in totals])
    for each in group:
        name, weight = each.organization, tenants[each.organization].weight
        half = each.tokens / each.chunks / 2
        first = progress.done_at(at[name] + half / weight) - half
        at[name] += each.tokens / weight
        yield Turn(each, before + first, before + progress.done_at(at[name]))


class _Progress:
    """F of the module's docstring, of organizations that begin at a point, have a weight and a total.

    Between the points where an organization begins or is done, it is a straight line.
    """

    def __init__(self, organizations: Iterable[tuple[float, float, float]]) -> None:
        changes = sorted(
            change
            for begin, weight, total in organizations
            for change in ((begin, weight), (begin + total / weight, -weight))
        )
        self._points = [at for at, _ in changes]
        self._done, self._slopes = [0.0], [changes[0][1]]
        for (before, _), (at, change) in pairwise(changes):
            self._done.append(self._done[-1] + self._slopes[-1] * (at - before))
            self._slopes.append(self._slopes[-1] + change)

    def done_at(self, virtual: float) -> float:
        at = bisect_right(self._points, virtual) - 1
        return self._done[at] + self._slopes[at] * (virtual - self._points[at])
