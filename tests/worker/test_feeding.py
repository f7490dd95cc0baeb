"""How much an engine is given, with engines that are nothing but their queue."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.engines.base import FULLS, Engine, Report
from worker.engines.gauge import Gauge
from worker.feeding import Feed


@dataclass(slots=True)
class Asked:
    """A request: its tokens by estimate and in truth, and the steps that it runs."""

    estimate: int
    tokens: int
    steps: int


class Queue(Engine):
    """Runs what it was given in turn, as far as its slots and its cache go, step by step.

    As with a real one, its next step has begun when the last one's answers are seen: what is given
    then is too late for it.
    """

    def __init__(self, slots: int, cache: int, *, tells: bool = True) -> None:
        self.capacity, self.cache_tokens = FULLS * slots, cache
        self.slots, self.tells = slots, tells
        self.running: list[Asked] = []
        self.waiting: deque[Asked] = deque()
        self.arriving: list[Asked] = []

    def step(self) -> list[Asked]:
        """What ended with this step."""
        while self.waiting and len(self.running) < self.slots and self._holds(self.waiting[0]):
            self.running.append(self.waiting.popleft())
        ran = len(self.running)
        for each in self.running:
            each.steps -= 1
        ended = [each for each in self.running if not each.steps]
        self.running = [each for each in self.running if each.steps]
        if self.tells:
            self.report = Report(ran, len(self.waiting))
        self.waiting += self.arriving
        self.arriving = []
        return ended

    def _holds(self, more: Asked) -> bool:
        used = sum(each.tokens for each in self.running)
        return not self.running or used + more.tokens <= self.cache_tokens


def filled(feed: Feed, engine: Queue, left: deque[Asked]) -> None:
    while left and feed.takes(engine, left[0].estimate):
        asked = left.popleft()
        feed.begin(asked.estimate)
        engine.arriving.append(asked)


def steps_of(engine: Queue, asked: list[Asked]) -> int:
    """How many steps it takes to run all of them, fed as it should be."""
    feed, left, steps = Feed(), deque(asked), 0
    filled(feed, engine, left)
    while feed.requests:
        for each in engine.step():
            feed.end(each.estimate)
        filled(feed, engine, left)
        steps += 1
    assert not left
    return steps


def least_steps(slots: int, cache: int, asked: list[Asked]) -> int:
    """The same with everything in the engine from the start."""
    engine, steps = Queue(slots, cache), 0
    engine.waiting = deque(asked)
    while engine.waiting or engine.running:
        engine.step()
        steps += 1
    return steps


requests = st.builds(
    Asked, estimate=st.integers(1, 300), tokens=st.integers(1, 150), steps=st.integers(1, 6)
)


@given(st.lists(requests), st.integers(1, 6), st.integers(0, 200), st.booleans(), st.integers(0, 9))
def test_it_is_never_more_than_the_engine_should_have(
    asked: list[Asked], slots: int, cache: int, tells: bool, headroom: int
) -> None:
    engine, feed, left = Queue(slots, cache, tells=tells), Feed(), deque(asked)
    feed.headroom = headroom
    while left or feed.requests:
        while left and feed.takes(engine, left[0].estimate):
            before, each = feed.tokens, left.popleft()
            feed.begin(each.estimate)
            engine.arriving.append(each)
            assert feed.requests <= max(1, engine.capacity - headroom)
            if cache and not tells:  # but for the one that crosses the border by itself
                assert feed.tokens <= FULLS * cache or before <= cache
        for each in engine.step():
            feed.end(each.estimate)
    assert (feed.requests, feed.tokens) == (0, 0)


@given(st.lists(requests, max_size=60), st.integers(1, 6), st.integers(0, 200))
def test_while_work_waits_outside_some_waits_in_an_engine_that_tells(
    asked: list[Asked], slots: int, cache: int
) -> None:
    engine, feed, left = Queue(slots, cache), Feed(), deque(asked)
    filled(feed, engine, left)
    while feed.requests:
        for each in engine.step():
            feed.end(each.estimate)
        filled(feed, engine, left)
        waiting = len(engine.waiting) + len(engine.arriving)
        assert not left or waiting or feed.requests == engine.capacity
    assert not left


@given(st.lists(requests, max_size=60), st.integers(1, 6), st.integers(1, 200))
def test_an_engine_that_tells_nothing_is_never_empty_while_work_waits(
    asked: list[Asked], slots: int, cache: int
) -> None:
    engine, feed, left = Queue(slots, cache, tells=False), Feed(), deque(asked)
    while left or feed.requests:
        filled(feed, engine, left)
        assert feed.requests
        for each in engine.step():
            feed.end(each.estimate)


SHORT, LONG = (10, 10, 8), (3_000, 3_000, 100)
TOO_HIGH, TOO_LOW = (30_000, 20, 10), (30, 3_000, 100)
AT_ONCE = (5, 5, 1)


@pytest.mark.parametrize(
    "kinds",
    [[SHORT], [LONG], [TOO_HIGH], [TOO_LOW], [AT_ONCE], [SHORT, LONG, TOO_HIGH]],
)
def test_the_engine_is_as_busy_as_with_all_the_work_at_once(kinds: list[Any]) -> None:
    """But for the few steps in which it tells that it was underestimated."""

    def work() -> list[Asked]:
        return [Asked(*kind) for kind in kinds for _ in range(2_000 // len(kinds))]

    least = least_steps(64, 40_000, work())
    assert least <= steps_of(Queue(64, 40_000), work()) <= least + 8


def test_of_long_requests_as_many_wait_as_fit_the_cache() -> None:
    engine, feed, left = Queue(64, 40_000), Feed(), deque(Asked(*LONG) for _ in range(100))
    for running in (0, 13, 13):
        filled(feed, engine, left)
        engine.step()
        assert (len(engine.running), len(engine.waiting)) == (running, 26 - running)


def test_one_request_may_be_of_any_size() -> None:
    feed = Feed()
    assert feed.takes(Queue(4, 100), 1_000_000)
    feed.headroom = 8
    assert feed.takes(Queue(4, 100), 1)
    feed.begin(1)
    assert not feed.takes(Queue(4, 100), 1)


@pytest.mark.parametrize(
    ("requests", "tokens", "wanted"),
    [(0, 0, True), (7, 99, True), (8, 8, False), (1, 100, False)],
)
def test_more_is_leased_while_less_than_an_engine_full_waits(
    requests: int, tokens: int, wanted: bool
) -> None:
    assert Feed().wants(Queue(4, 100), requests, tokens) is wanted
    assert Feed().wants(Queue(4, 0), requests, tokens) is (requests < 8)


@pytest.mark.parametrize(
    ("report", "requests", "full"),
    [
        (Report(4, 1), 0, 0.0),  # an old report: nothing is in flight
        (Report(2, 0), 2, 0.5),
        (Report(2, 1), 3, 1.0),  # the cache is full
        (Report(9, 0), 9, 1.0),
        (None, 4, 0.5),
        (None, 3, 0.6),  # by tokens
    ],
)
def test_how_full_the_engine_is(report: Report | None, requests: int, full: float) -> None:
    engine, feed = Queue(4, 100), Feed()
    engine.report = report
    for _ in range(requests):
        feed.begin(40 if full == 0.6 else 10)
    assert feed.fullness(engine) == full


# --- What vLLM's schedulers say --------------------------------------------------------------------


class Stats:
    def __init__(self, running: int, waiting: int, skipped: int = 0) -> None:
        self.num_running_reqs = running
        self.num_waiting_reqs = waiting
        self.num_skipped_waiting_reqs = skipped


def test_the_gauge_counts_what_a_step_ended_as_having_run() -> None:
    """An embedding is over with its first step: the scheduler always says that none runs."""
    told: list[Report] = []
    gauge = Gauge(told.append)
    logger = gauge.logger(None, 0)
    for waiting in (8, 4, 0):
        logger.record(Stats(0, waiting), None, mm_cache_stats=None, engine_idx=0)
        for _ in repeat(None, 4):
            gauge.ended()
    assert told == [Report(0, 8), Report(4, 4), Report(4, 0)]


def test_the_gauge_adds_up_the_ranks() -> None:
    told: list[Report] = []
    gauge = Gauge(told.append)
    one, two = gauge.logger(None, 0), gauge.logger(None, 1)
    one.record(Stats(3, 1), None)
    two.record(Stats(4, 0, 2), None)
    one.record(None, None)
    one.record(Stats(2, 0), None)
    assert told == [Report(3, 1), Report(7, 3), Report(7, 2)]
