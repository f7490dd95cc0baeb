"""What people are told about a waiting batch: its place, why it waits, and until when."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given

from batches.outlook import Place, Running, explain
from batches.policy import HIGH, LOW, PATIENCE, Model, Tenant, View, Worker
from tests.batches.test_policy import (
    HOUR,
    LOAD,
    MODELS,
    NOW,
    SPEED,
    TENANTS,
    WAITING,
    WORKERS,
    batch,
    on,
    view,
)


def times(place: Place) -> tuple[float, float]:
    """Seconds from now until it starts and ends."""
    assert place.start is not None
    assert place.completion is not None
    return round(place.start - NOW), round(place.completion - NOW)


def test_a_lone_batch_starts_now() -> None:
    place = explain(view({"a": [batch("1", seconds=120)]}, on("a")))["1"]
    assert (place.position, times(place)) == (1, (0, 120))
    assert str(place.reason) == "waiting: 0 chunks ahead, a is loaded"


def test_batches_of_one_organization_go_by_age() -> None:
    waiting = {"a": [batch("new", seconds=60), batch("old", seconds=180, waited=9)]}
    found = explain(view(waiting, on("a")))
    assert (found["old"].position, times(found["old"])) == (1, (0, 180))
    assert (found["new"].position, times(found["new"])) == (2, (180, 240))
    assert str(found["new"].reason) == "waiting: 3 chunks ahead, a is loaded"


def test_organizations_share_by_weight() -> None:
    waiting = {"a": [batch("x", "x", seconds=600), batch("y", "y", seconds=600, waited=1)]}
    found = explain(view(waiting, on("a"), tenants={"x": Tenant(weight=3.0)}))
    # Somebody has to wait for the first chunk: whoever weighs less, for longer.
    assert times(found["x"]) == (10, 800)
    assert times(found["y"]) == (90, 1200)


def test_an_organization_that_is_ahead_waits_until_the_others_are_even() -> None:
    waiting = {"a": [batch("rich's", "rich"), batch("poor's", "poor", seconds=600)]}
    tenants = {"rich": Tenant(served=240.0), "poor": Tenant(served=120.0, weight=2.0)}
    found = explain(view(waiting, on("a"), tenants=tenants))
    # 360 seconds of the poor one's, at its weight, are 180 of the rich one's, which it was ahead.
    assert times(found["rich's"]) == (420, 540)
    assert times(found["poor's"]) == (0, 660)


def test_two_workers_are_twice_as_quick_but_for_the_last_chunk() -> None:
    found = explain(view({"a": [batch("1", seconds=600)]}, on("a", "1"), on("a", "2")))
    assert times(found["1"]) == (0, 540 / 2 + 60)


def test_a_chunk_takes_one_workers_time_however_many_there_are() -> None:
    found = explain(view({"a": [batch("1", seconds=60)]}, *[on("a", name) for name in "123456"]))
    assert times(found["1"]) == (0, 60)


def test_higher_classes_go_before() -> None:
    waiting = {"a": [batch("low", priority=LOW), batch("high", seconds=300, priority=HIGH)]}
    found = explain(view(waiting, on("a")))
    assert times(found["high"]) == (0, 300)
    assert times(found["low"]) == (300, 360)


def test_a_model_that_is_not_loaded_waits_for_the_swap() -> None:
    waiting = {"a": [batch("1", seconds=300)], "b": [batch("2", seconds=60)]}
    place = explain(view(waiting, on("a")))["2"]
    assert times(place) == (300 + LOAD, 360 + LOAD)
    assert (place.reason.code, place.reason.loaded, place.reason.at) == ("swap", "a", NOW + 300)
    assert str(place.reason) == "waiting: 0 chunks ahead, a is loaded, swap planned at 13:51 UTC"


def test_a_swap_comes_when_patience_ends_at_the_latest() -> None:
    waiting = {"a": [batch("1", seconds=99 * HOUR)], "b": [batch("2", priority=HIGH)]}
    assert explain(view(waiting, on("a")))["2"].reason.at == NOW + PATIENCE[HIGH]


@pytest.mark.parametrize(
    ("tenant", "code"), [(Tenant(held=True), "held"), (Tenant(limit=0), "limit")]
)
def test_who_may_not_run_is_told_so_and_no_time(tenant: Tenant, code: str) -> None:
    place = explain(view({"a": [batch("1")]}, on("a"), tenants={"org": tenant}))["1"]
    assert (place.reason.code, place.start, place.completion) == (code, None, None)


def test_without_a_gpu_that_fits_no_time_is_promised() -> None:
    models = MODELS | {"a": Model(unfit=frozenset({"small"}))}
    place = explain(view({"a": [batch("1")]}, on("b", kind="small"), models=models))["1"]
    assert (place.reason.code, place.start) == ("unfit", None)
    assert "no worker" in str(place.reason)


def test_models_without_a_worker_come_one_after_the_other_the_most_work_first() -> None:
    waiting = {
        "a": [batch("1", seconds=300)],
        "b": [batch("2", seconds=60)],
        "c": [batch("3", seconds=600)],
    }
    found = explain(view(waiting, on("a")))
    assert times(found["3"]) == (300 + LOAD, 900 + LOAD)
    assert times(found["2"]) == (900 + 2 * LOAD, 960 + 2 * LOAD)
    assert found["2"].reason.at == NOW + 900 + LOAD


def test_a_worker_that_is_loading_begins_when_that_is_done() -> None:
    place = explain(view({"a": [batch("1", seconds=60)]}, on("a", stayed=-30)))["1"]
    assert times(place) == (30, 90)
    assert str(place.reason) == "waiting: 0 chunks ahead, a is being loaded"


# --- What runs ------------------------------------------------------------------------------------


def leased(name: str, *, seconds: float, model: str = "a", workers: int = 1) -> Running:
    """So many seconds of work for one worker are left."""
    return Running(name, "org", model, workers, seconds * SPEED)


def test_a_batch_of_which_nothing_waits_any_more_runs_until_its_chunks_are_done() -> None:
    seen = view({}, on("a", "1"), on("a", "2"))
    place = explain(seen, [leased("1", seconds=90, workers=2)])["1"]
    assert (place.position, place.start, place.completion) == (0, None, NOW + 45)
    assert str(place.reason) == "running on 2 workers"


def test_what_is_leased_is_done_before_what_waits() -> None:
    running = [leased("1", seconds=60), leased("other", seconds=60)]
    seen = view({"a": [batch("1", seconds=120), batch("2", "other")]}, on("a", "1"), on("a", "2"))
    found = explain(seen, running)
    assert (found["1"].position, str(found["1"].reason)) == (0, "running on 1 worker")
    assert times(found["1"]) == (60 + 15, 60 + 60 + 60)
    assert found["2"].position == 1


def test_what_runs_on_a_worker_that_is_gone_ends_when_another_has_loaded_its_model() -> None:
    place = explain(view({}, on("b")), [leased("1", seconds=60)])["1"]
    assert (place.position, place.completion) == (0, NOW + LOAD + 60)


def test_what_runs_while_no_worker_is_alive_has_no_end() -> None:
    place = explain(view({}), [leased("1", seconds=60)])["1"]
    assert (place.position, place.completion) == (0, None)


# --- What does not run ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workers", "said"),
    [
        ([], "waiting: no worker is running; whoever runs the portal starts one with ./run worker"),
        (
            [replace(on("a"), draining=True)],
            "waiting: all workers are draining and begin nothing new",
        ),
    ],
)
def test_without_a_worker_it_is_said_what_to_do(workers: list[Worker], said: str) -> None:
    place = explain(view({"a": [batch("1")]}, *workers))["1"]
    assert (str(place.reason), place.start, place.completion) == (said, None, None)


def test_a_model_that_does_not_load_is_named() -> None:
    seen = view({"a": [batch("1")], "b": [batch("2")]}, on("c"), on("c", "2"))
    found = explain(seen, failing={"a"})
    said = "waiting: a could not be loaded; it is tried again from time to time"
    assert (str(found["1"].reason), found["1"].start) == (said, None)
    assert found["2"].start == NOW + LOAD


def test_one_that_a_worker_has_loaded_after_all_is_served() -> None:
    assert explain(view({"a": [batch("1")]}, on("a")), failing={"a"})["1"].start == NOW


@given(WAITING, WORKERS, TENANTS)
def test_every_batch_has_a_place_of_its_own_and_ends_after_it_starts(
    waiting: dict[str, list[object]], workers: list[Worker], tenants: dict[str, Tenant]
) -> None:
    seen: View = replace(view(waiting, *workers, tenants=tenants))  # type: ignore[arg-type]
    found = explain(seen)
    for those in seen.waiting.values():
        assert sorted(found[each.batch].position for each in those) == [*range(1, len(those) + 1)]
    for place in found.values():
        assert str(place.reason)
        if place.start is not None and place.completion is not None:
            assert NOW <= place.start <= place.completion + 1e-6


# --- What operators did ------------------------------------------------------------------------


def test_what_was_moved_to_the_front_goes_before_all_of_its_model() -> None:
    front = batch("front", "other", priority=LOW)._replace(front=NOW)
    last = batch("last", "other", priority=LOW)._replace(front=NOW + 1)
    waiting = {"a": [batch("high", priority=HIGH, waited=9), front, last]}
    found = explain(view(waiting, on("a")))
    assert [times(found[name]) for name in ("last", "front", "high")] == [
        (0, 60),
        (60, 120),
        (120, 180),
    ]


def test_a_move_to_the_front_brings_a_worker_at_once() -> None:
    front = batch("front", waited=60)._replace(front=NOW)
    waiting = {"a": [batch("here", seconds=HOUR)], "b": [front]}
    assert times(explain(view(waiting, on("a")))["front"])[0] == LOAD


@pytest.mark.parametrize(
    ("hold", "said"),
    [
        ("moderation", "held: waits for an operator's approval"),
        ("hold", "held by an operator"),
        ("tenant_paused", "held: an operator has paused the organization's work"),
        ("model_paused", "held: a is paused by an operator"),
    ],
)
def test_what_is_held_is_behind_the_others_and_says_why(hold: str, said: str) -> None:
    held = batch("held", waited=HOUR, priority=HIGH)._replace(hold=hold)
    found = explain(view({"a": [batch("free"), held]}, on("a")))
    assert times(found["free"]) == (0, 60)
    place = found["held"]
    assert (place.position, str(place.reason), place.start) == (2, said, None)
