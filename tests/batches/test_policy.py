"""Which batch a worker serves next: a pure function, so its tests are small worlds and properties."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batches import policy
from batches.policy import (
    HIGH,
    LOW,
    NORMAL,
    PATIENCE,
    Candidate,
    Decision,
    Model,
    Tenant,
    View,
    Worker,
    choose,
    work_of,
)

NOW = 1_000_000.0
HOUR, DAY = 3_600.0, 86_400.0
SPEED = 1_000.0
LOAD = 60.0
MODELS = {name: Model({"": SPEED}, {"": LOAD}) for name in "abc"}


def batch(
    name: str,
    organization: str = "org",
    *,
    seconds: float = 60,
    waited: float = 0,
    priority: int = NORMAL,
    due: float = 1_000 * DAY,
) -> Candidate:
    """With so many seconds of work, ready for `waited` seconds, to be ended in `due` seconds."""
    since = NOW - waited
    chunks = max(1, round(seconds / 60))
    return Candidate(name, organization, priority, since, since, NOW + due, seconds * SPEED, chunks)


def view(
    waiting: dict[str, list[Candidate]],
    *workers: Worker,
    tenants: dict[str, Tenant] | None = None,
    models: dict[str, Model] | None = None,
) -> View:
    ordered = {model: sorted(those, key=lambda each: each.due) for model, those in waiting.items()}
    names = {each.organization for those in waiting.values() for each in those}
    known = {name: Tenant() for name in names} | (tenants or {})
    return View(NOW, ordered, work_of(ordered), known, models or MODELS, workers)


def on(model: str, name: str = "w", *, stayed: float = DAY, kind: str = "") -> Worker:
    return Worker(name, kind, model, NOW - stayed)


def chosen(seen: View, worker: Worker | None = None) -> tuple[str, str]:
    """The batch and the reason's code; an empty name for none."""
    decision = choose(seen, worker or seen.workers[0])
    return decision.candidate.batch if decision.candidate else "", decision.reason.code


# --- Which batch of a model -----------------------------------------------------------------------


def test_nothing_waits() -> None:
    assert chosen(view({}, on("a"))) == ("", "nothing")


def test_the_oldest_of_equals_goes_first() -> None:
    assert chosen(view({"a": [batch("new"), batch("old", waited=5)]}, on("a"))) == ("old", "loaded")


def test_batches_of_the_same_moment_have_an_order_too() -> None:
    same = [batch("2"), batch("1"), batch("3")]
    assert chosen(view({"a": same}, on("a"))) == chosen(view({"a": same[::-1]}, on("a")))


def test_a_higher_class_goes_before_fairness() -> None:
    waiting = {"a": [batch("plain", "poor", waited=9), batch("urgent", "rich", priority=HIGH)]}
    tenants = {"rich": Tenant(served=1_000)}
    assert chosen(view(waiting, on("a"), tenants=tenants)) == ("urgent", "loaded")


def test_the_organization_that_is_least_ahead_goes_first() -> None:
    waiting = {"a": [batch("rich's", "rich", waited=9), batch("poor's", "poor")]}
    tenants = {"rich": Tenant(served=100), "poor": Tenant(served=90)}
    assert chosen(view(waiting, on("a"), tenants=tenants)) == ("poor's", "loaded")


def test_a_weight_of_two_makes_twice_as_much_as_fair() -> None:
    waiting = {"a": [batch("heavy's", "heavy"), batch("light's", "light", waited=9)]}
    tenants = {"heavy": Tenant(weight=2, served=190), "light": Tenant(served=100)}
    assert chosen(view(waiting, on("a"), tenants=tenants)) == ("heavy's", "loaded")


def test_a_deadline_goes_before_class_and_fairness() -> None:
    late = batch("late", "rich", seconds=1_800, due=HOUR, priority=LOW)
    waiting = {"a": [batch("urgent", priority=HIGH), late]}
    tenants = {"rich": Tenant(served=1_000)}
    assert chosen(view(waiting, on("a"), tenants=tenants)) == ("late", "loaded")


def test_a_deadline_far_away_changes_nothing() -> None:
    waiting = {"a": [batch("urgent", priority=HIGH), batch("plain", due=20 * HOUR)]}
    assert chosen(view(waiting, on("a"))) == ("urgent", "loaded")


def test_a_small_batch_starts_in_time_although_many_workers_serve_its_model() -> None:
    waiting = {"a": [batch("big", priority=HIGH, seconds=9_000), batch("small", due=600)]}
    workers = [on("a", name) for name in "1234"]
    assert chosen(view(waiting, *workers)) == ("small", "loaded")


def test_a_deadline_that_nobody_could_meet_harms_nobody() -> None:
    hopeless = batch("hopeless", seconds=20 * HOUR, due=HOUR)
    assert chosen(view({"a": [hopeless, batch("urgent", priority=HIGH)]}, on("a"))) == (
        "urgent",
        "loaded",
    )


def test_the_bound_on_starving_goes_before_class() -> None:
    starved = batch("starved", priority=LOW, waited=PATIENCE[LOW] + 1)
    waiting = {"a": [batch("urgent", priority=HIGH), starved]}
    assert chosen(view(waiting, on("a"))) == ("starved", "loaded")


def test_who_splits_a_batch_into_a_hundred_gets_no_more_for_it() -> None:
    """All of them are past their patience, and yet it is the other one's turn."""
    hundred = [batch(f"split{at}", "many", waited=PATIENCE[NORMAL] + at + 1) for at in range(100)]
    waiting = {"a": [*hundred, batch("one", "few")]}
    tenants = {"many": Tenant(served=110), "few": Tenant(served=100)}
    assert chosen(view(waiting, on("a"), tenants=tenants)) == ("one", "loaded")
    tenants["many"] = Tenant(served=100)  # no further ahead than the average
    assert chosen(view(waiting, on("a"), tenants=tenants)) == ("split99", "loaded")


def test_those_who_are_ahead_are_more_patient_but_not_for_ever() -> None:
    starved = batch("starved", "rich", priority=LOW, waited=policy.MORE * PATIENCE[LOW] + 1)
    waiting = {"a": [starved, batch("urgent", "poor", priority=HIGH)]}
    tenants = {"rich": Tenant(served=1_000)}
    assert chosen(view(waiting, on("a"), tenants=tenants)) == ("starved", "loaded")


def test_in_its_own_turn_what_is_past_its_patience_goes_first() -> None:
    late = batch("late", "mine", priority=LOW, waited=PATIENCE[LOW] + 1)
    waiting = {"a": [late, batch("new", "mine"), batch("other's", "other")]}
    tenants = {"mine": Tenant(served=100), "other": Tenant(served=100)}
    idle = {"b": [batch("far", "third")]}  # who had nothing makes the others ahead of the average
    assert chosen(view(waiting | idle, on("a"), tenants=tenants))[0] == "late"
    tenants["other"] = Tenant(served=90)
    assert chosen(view(waiting | idle, on("a"), tenants=tenants))[0] == "other's"


def test_a_share_is_spread_over_the_models_of_every_kind() -> None:
    """A small GPU's view of it, too: half of its work is for a model that no such GPU can run."""
    models = {
        "a": Model({"small": SPEED, "large": SPEED}, {"small": LOAD, "large": LOAD}),
        "b": Model({"small": SPEED, "large": SPEED}, {"small": LOAD, "large": LOAD}),
        "c": Model({"large": SPEED}, {"large": LOAD}, frozenset({"small"})),
    }
    waiting = {
        "a": [batch("both's", "both", seconds=HOUR)],
        "b": [batch("plain", "plain", seconds=HOUR)],
        "c": [batch("large", "both", seconds=HOUR)],
    }
    workers = [on("", f"s{at}", kind="small") for at in range(2)]
    workers += [on("c", f"l{at}", kind="large") for at in range(2)]
    seen = view(waiting, *workers, models=models)
    entitled = policy._entitled(seen, ["a", "b"])
    assert (entitled["a"], entitled["b"]) == (pytest.approx(1), pytest.approx(2))


# --- Who may run ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tenant", [Tenant(held=True), Tenant(limit=2, running=2)])
def test_who_is_held_or_at_its_limit_is_passed_over(tenant: Tenant) -> None:
    waiting = {"a": [batch("blocked", "blocked", waited=9), batch("free")]}
    assert chosen(view(waiting, on("a"), tenants={"blocked": tenant})) == ("free", "loaded")
    assert chosen(view({"a": [batch("1", "blocked")]}, on("a"), tenants={"blocked": tenant})) == (
        "",
        "nothing",
    )


def test_below_its_limit_it_runs() -> None:
    tenants = {"org": Tenant(limit=2, running=1)}
    assert chosen(view({"a": [batch("1")]}, on("a"), tenants=tenants)) == ("1", "loaded")


def test_a_draining_worker_gets_nothing() -> None:
    drained = replace(on("a"), draining=True)
    assert chosen(view({"a": [batch("1")]}, drained)) == ("", "draining")


def test_a_model_that_does_not_fit_is_never_chosen() -> None:
    models = MODELS | {"b": Model({}, {}, frozenset({"small"}))}
    waiting = {"b": [batch("1", waited=DAY)]}
    small, large = on("a", kind="small"), on("a", kind="large")
    assert chosen(view(waiting, small, models=models)) == ("", "nothing")
    assert chosen(view(waiting, large, models=models)) == ("1", "late")


# --- Which model ----------------------------------------------------------------------------------


def test_with_nothing_loaded_the_model_with_the_best_claim_is() -> None:
    waiting = {"a": [batch("1", "x")], "b": [batch("2", "y"), batch("3", "z")]}
    assert chosen(view(waiting, on(""))) == ("2", "dry")


def test_the_loaded_model_is_kept_when_others_claim_as_much() -> None:
    waiting = {"a": [batch("1", seconds=9_000)], "b": [batch("2", "other", seconds=9_000)]}
    assert chosen(view(waiting, on("a"))) == ("1", "loaded")


def test_a_worker_goes_where_its_share_of_tenants_is() -> None:
    crowd = [batch(f"b{at}", f"org{at}", seconds=9_000) for at in range(4)]
    waiting = {"a": [batch("1", seconds=9_000)], "b": crowd}
    two = [on("a", "1"), on("a", "2")]
    assert chosen(view(waiting, *two)) == ("b0", "share")


def test_a_swap_must_be_worth_its_measured_cost() -> None:
    crowd = [batch(f"b{at}", f"org{at}", seconds=600) for at in range(4)]
    waiting = {"a": [batch("1", seconds=9_000)], "b": crowd}
    two = [on("a", "1"), on("a", "2")]
    slow = {"b": Model({"": SPEED}, {"": 300})}
    quick = {"b": Model({"": SPEED}, {"": 5})}
    assert chosen(view(waiting, *two, models=MODELS | slow)) == ("1", "loaded")
    assert chosen(view(waiting, *two, models=MODELS | quick)) == ("b0", "share")


def test_a_model_that_sleeps_here_costs_only_its_waking() -> None:
    crowd = [batch(f"b{at}", f"org{at}", seconds=600) for at in range(4)]
    waiting = {"a": [batch("1", seconds=9_000)], "b": crowd}
    slow = {"b": Model({"": SPEED}, {"": 300}, wake={"": 5})}
    awake, other = on("a", "1"), on("a", "2")
    has_it = replace(awake, asleep=frozenset("b"))
    assert chosen(view(waiting, awake, other, models=MODELS | slow)) == ("1", "loaded")
    assert chosen(view(waiting, has_it, other, models=MODELS | slow)) == ("b0", "share")


def test_a_model_that_was_woken_need_stay_less_long() -> None:
    waiting = {"a": [batch("1")], "b": [batch("2", waited=PATIENCE[NORMAL] + 1)]}
    models = MODELS | {"a": Model({"": SPEED}, {"": LOAD}, wake={"": 2})}
    loaded = on("a", stayed=policy.RESCUE_STAY * 2)
    woken = replace(loaded, asleep=frozenset("a"))
    assert chosen(view(waiting, loaded, models=models)) == ("1", "loaded")
    assert chosen(view(waiting, woken, models=models)) == ("2", "late")


def test_a_worker_that_has_just_loaded_stays() -> None:
    crowd = [batch(f"b{at}", f"org{at}", seconds=9_000) for at in range(4)]
    waiting = {"a": [batch("1", seconds=9_000)], "b": crowd}
    just = [on("a", "1", stayed=policy.SHARE_STAY * LOAD - 1), on("a", "2")]
    assert chosen(view(waiting, *just)) == ("1", "loaded")


def test_an_unloaded_model_with_a_starving_batch_ends_a_long_turn() -> None:
    waiting = {"a": [batch("1")], "b": [batch("2", waited=PATIENCE[NORMAL] + 1)]}
    short, long = policy.RESCUE_STAY * LOAD - 1, policy.RESCUE_STAY * LOAD
    assert chosen(view(waiting, on("a", stayed=short))) == ("1", "loaded")
    assert chosen(view(waiting, on("a", stayed=long))) == ("2", "late")


def test_an_unloaded_model_whose_deadline_comes_close_ends_a_turn() -> None:
    waiting = {"a": [batch("1")], "b": [batch("2", seconds=1_800, due=HOUR)]}
    assert chosen(view(waiting, on("a"))) == ("2", "deadline")


def test_two_that_look_one_after_the_other_do_not_both_swap_for_what_one_can_do() -> None:
    waiting = {"b": [batch("2", seconds=120)]}
    idle = [on("a", "1"), on("a", "2")]
    assert chosen(view(waiting, *idle)) == ("2", "dry")
    waiting = {"b": [batch("2", seconds=60)]}
    after = [replace(idle[0], model="b"), idle[1]]
    assert chosen(view(waiting, *after), after[1]) == ("", "soon")


def test_work_for_many_is_shared_by_many() -> None:
    waiting = {"b": [batch("2", seconds=9_000)]}
    workers = [on("b", "1"), on("a", "2")]
    assert chosen(view(waiting, *workers), workers[1]) == ("2", "dry")


def test_the_worker_that_a_deadline_needs_stays() -> None:
    crowd = [batch(f"b{at}", f"org{at}", seconds=9_000) for at in range(9)]
    waiting = {"a": [batch("1", seconds=3_000, due=HOUR)], "b": crowd}
    assert chosen(view(waiting, on("a"))) == ("1", "loaded")


def test_a_drained_workers_model_counts_as_unserved() -> None:
    waiting = {"b": [batch("2", seconds=60)]}
    leaving = replace(on("b", "1"), draining=True)
    asking = on("a", "2")
    assert chosen(view(waiting, leaving, asking), asking) == ("2", "dry")


# --- Real-time requests -------------------------------------------------------------------------


def asked(seen: View, **ago: float) -> View:
    """The view with models that were asked for so many seconds ago."""
    return replace(seen, asked={name: NOW - seconds for name, seconds in ago.items()})


def loads(seen: View) -> tuple[str, str]:
    """What the first worker does without a batch: the model to load, and the reason's code."""
    decision = choose(seen, seen.workers[0])
    assert decision.candidate is None
    return decision.model, decision.reason.code


def test_a_worker_without_work_loads_what_was_asked_for_last() -> None:
    assert loads(asked(view({}, on("a")), b=90, c=20)) == ("c", "asked")


def test_what_was_asked_for_long_ago_is_forgotten() -> None:
    assert loads(asked(view({}, on("a")), b=policy.ASKED_SECONDS)) == ("", "nothing")
    assert loads(asked(view({}, on("a")), b=policy.ASKED_SECONDS - 1)) == ("b", "asked")


def test_what_others_serve_or_what_does_not_fit_or_exist_is_not_loaded_for_who_asks() -> None:
    models = MODELS | {"b": Model({"": SPEED}, {"": LOAD}, frozenset({""}))}
    seen = view({}, on(""), on("c", "other"), models=models)
    assert loads(asked(seen, b=1, c=1, gone=1)) == ("", "nothing")
    assert loads(asked(view({}, on(""), models=models), b=1, c=1)) == ("c", "asked")


def test_a_model_that_only_a_draining_worker_serves_is_loaded() -> None:
    leaving = replace(on("a", "leaving"), draining=True)
    assert loads(asked(view({}, on(""), leaving), a=1)) == ("a", "asked")


def test_a_draining_worker_loads_nothing_for_who_asks() -> None:
    assert loads(asked(view({}, replace(on(""), draining=True)), a=1)) == ("", "draining")


def test_a_model_in_use_is_kept_from_other_wishes() -> None:
    stay = 5 * LOAD
    assert loads(asked(view({}, on("a")), a=stay - 1, b=1)) == ("", "nothing")
    assert loads(asked(view({}, on("a")), a=stay, b=1)) == ("b", "asked")


def test_a_worker_with_batches_keeps_to_them_whoever_asks() -> None:
    seen = asked(view({"a": [batch("one")]}, on("a")), b=1)
    assert chosen(seen) == ("one", "loaded")
    assert chosen(asked(view({"c": [batch("one")]}, on("a")), b=1)) == ("one", "dry")


def test_a_model_in_use_is_kept_from_a_batch_that_can_wait() -> None:
    waiting = {"b": [batch("one")]}
    assert loads(asked(view(waiting, on("a")), a=60)) == ("", "kept")
    assert chosen(asked(view(waiting, on("a"), on("a", "w2")), a=60)) == ("one", "dry")


def test_a_model_is_kept_for_as_long_as_loading_it_again_is_worth() -> None:
    models = MODELS | {"a": Model({"": SPEED}, {"": 10.0})}
    seen = view({"b": [batch("one")]}, on("a"), models=models)
    assert loads(asked(seen, a=49)) == ("", "kept")
    assert chosen(asked(seen, a=51)) == ("one", "dry")


def test_a_batch_that_waited_too_long_or_is_due_soon_ends_a_models_use() -> None:
    late = {"b": [batch("late", waited=PATIENCE[NORMAL] + 1)]}
    assert chosen(asked(view(late, on("a")), a=1)) == ("late", "late")
    due = {"b": [batch("due", seconds=1_800, due=HOUR)]}
    assert chosen(asked(view(due, on("a")), a=1)) == ("due", "deadline")


# --- What comes next ----------------------------------------------------------------------------

AHEAD = policy.AHEAD_SECONDS


def comes(seen: View) -> str:
    return policy.upcoming(seen, seen.workers[0])


def test_what_comes_next_is_what_will_be_chosen_when_the_work_is_done() -> None:
    waiting = {"a": [batch("1", seconds=AHEAD - 1)], "b": [batch("2")]}
    assert comes(view(waiting, on("a"))) == "b"
    assert comes(view({"b": [batch("2")]}, on("a"))) == "b"


def test_nothing_comes_next_while_the_own_work_lasts_or_when_nothing_waits() -> None:
    long = {"a": [batch("1", seconds=2 * AHEAD)], "b": [batch("2")]}
    assert comes(view(long, on("a"))) == ""
    assert comes(view({"a": [batch("1")]}, on("a"))) == ""
    assert comes(view({}, on("a"))) == ""


def test_what_others_will_have_done_by_then_does_not_come_next() -> None:
    waiting = {"b": [batch("2", seconds=AHEAD - 1)]}
    assert comes(view(waiting, on("a"), on("b", "other"))) == ""
    assert comes(view(waiting, on("a"), replace(on("b", "other"), draining=True))) == "b"


def test_a_swap_that_waits_only_for_its_time_comes_next() -> None:
    starving = batch("2", waited=PATIENCE[NORMAL] - 60)
    waiting = {"a": [batch("1", seconds=2 * AHEAD)], "b": [starving]}
    assert chosen(view(waiting, on("a"))) == ("1", "loaded")
    assert comes(view(waiting, on("a"))) == "b"


def test_the_own_models_batches_are_not_late_for_having_had_their_turns() -> None:
    waiting = {
        "a": [batch("1", seconds=2 * AHEAD, priority=HIGH)],
        "b": [batch("2", waited=PATIENCE[NORMAL] - 60)],
    }
    assert comes(view(waiting, on("a"))) == "b"


def test_a_model_that_has_just_come_is_not_followed_by_another_soon() -> None:
    models = MODELS | {"a": Model({"": SPEED}, {"": AHEAD})}
    waiting = {"a": [batch("1", seconds=2 * AHEAD)], "b": [batch("2", waited=PATIENCE[NORMAL])]}
    assert comes(view(waiting, on("a", stayed=60), models=models)) == ""


def test_what_does_not_fit_or_sleeps_here_and_what_a_draining_worker_would_get_do_not_come() -> (
    None
):
    waiting = {"b": [batch("2")]}
    unfit = MODELS | {"b": Model({"": SPEED}, {"": LOAD}, frozenset({""}))}
    assert comes(view(waiting, on("a"), models=unfit)) == ""
    assert comes(view(waiting, replace(on("a"), asleep=frozenset("b")))) == ""
    assert comes(view(waiting, replace(on("a"), draining=True))) == ""


def test_what_real_time_requests_ask_for_comes_next_unless_they_ask_for_the_own() -> None:
    own_work = view({"a": [batch("1")]}, on("a"))
    assert comes(asked(own_work, b=10)) == "b"
    assert comes(asked(own_work, a=10, b=10)) == ""


def test_reasons_have_words() -> None:
    decision = choose(view({"b": [batch("2")]}, on("a")), on("a"))
    assert str(decision.reason) == "nothing waits for a: swap to b"
    assert decision.model == "b"


# --- Properties -----------------------------------------------------------------------------------

CANDIDATES = st.builds(
    batch,
    st.uuids().map(str),
    st.sampled_from(["x", "y", "z"]),
    seconds=st.floats(1, 20_000),
    waited=st.floats(0, 2 * DAY),
    priority=st.sampled_from([LOW, NORMAL, HIGH]),
    due=st.floats(-HOUR, DAY),
)
WAITING = st.dictionaries(
    st.sampled_from("abc"), st.lists(CANDIDATES, min_size=1, max_size=8), max_size=3
)
WORKERS = st.lists(
    st.builds(
        on,
        st.sampled_from(["", "a", "b", "c", "gone"]),
        st.uuids().map(str),
        stayed=st.floats(0, DAY),
        kind=st.sampled_from(["small", "large"]),
    ),
    min_size=1,
    max_size=5,
)
TENANTS = st.fixed_dictionaries(
    {
        name: st.builds(
            Tenant,
            weight=st.sampled_from([0.5, 1.0, 4.0]),
            served=st.floats(0, 10_000),
            running=st.integers(0, 3),
            limit=st.sampled_from([None, 2]),
            held=st.booleans(),
        )
        for name in "xyz"
    }
)
KINDS = MODELS | {"c": Model({"large": SPEED}, {"large": LOAD}, frozenset({"small"}))}


@given(WAITING, WORKERS, TENANTS)
def test_what_is_chosen_waits_fits_and_may_run(
    waiting: dict[str, list[Candidate]], workers: list[Worker], tenants: dict[str, Tenant]
) -> None:
    seen = view(waiting, *workers, tenants=tenants, models=KINDS)
    decision = choose(seen, workers[0])
    assert isinstance(decision, Decision)
    assert str(decision.reason)
    if decision.candidate is not None:
        assert decision.candidate in waiting[decision.model]
        assert tenants[decision.candidate.organization].may_run
        assert workers[0].kind not in KINDS[decision.model].unfit


@given(WAITING, WORKERS, TENANTS)
def test_what_comes_next_is_another_model_that_waits_and_fits(
    waiting: dict[str, list[Candidate]], workers: list[Worker], tenants: dict[str, Tenant]
) -> None:
    name = comes(view(waiting, *workers, tenants=tenants, models=KINDS))
    if name:
        assert name != workers[0].model
        assert any(tenants[each.organization].may_run for each in waiting[name])
        assert workers[0].kind not in KINDS[name].unfit


@given(WAITING, WORKERS, TENANTS)
def test_no_worker_idles_while_something_waits_that_others_will_not_do_soon(
    waiting: dict[str, list[Candidate]], workers: list[Worker], tenants: dict[str, Tenant]
) -> None:
    seen = view(waiting, *workers, tenants=tenants, models=KINDS)
    decision = choose(seen, workers[0])
    served = policy.supply(seen, workers[0])
    for model, those in waiting.items():
        able = [each for each in those if tenants[each.organization].may_run]
        if able and workers[0].kind not in KINDS[model].unfit and decision.candidate is None:
            seconds = sum(each.tokens for each in able) / SPEED
            assert seconds <= policy.IDLE_WORTH * LOAD * served.get(model, 0) + 1e-6


@given(WAITING, WORKERS, TENANTS)
def test_what_is_leased_by_one_look_is_what_many_looks_would_lease(
    waiting: dict[str, list[Candidate]], workers: list[Worker], tenants: dict[str, Tenant]
) -> None:
    seen = view(waiting, *workers, tenants=tenants, models=KINDS)
    chunks = Counter({each.batch: each.chunks for those in waiting.values() for each in those})
    charged = {name: tenant.served for name, tenant in seen.tenants.items()}
    for _ in range(5):
        decision = choose(seen, workers[0])
        if decision.candidate is None:
            break
        if decision.model == workers[0].model and decision.reason.code == "loaded":
            assert policy.choose_more(seen, workers[0]) == decision
        taken = decision.candidate
        chunks[taken.batch] -= 1
        charged[taken.organization] += taken.tokens / taken.chunks / SPEED
        seen = policy.after_lease(seen, decision)
        left = {each.batch: each.chunks for those in seen.waiting.values() for each in those}
        assert left == {name: many for name, many in chunks.items() if many}
        assert seen.work == work_of(seen.waiting)
        assert [tenant.served for tenant in seen.tenants.values()] == pytest.approx(
            list(charged.values())
        )


@given(WAITING, WORKERS, TENANTS, st.randoms())
def test_the_same_view_in_any_order_gives_the_same_decision(
    waiting: dict[str, list[Candidate]],
    workers: list[Worker],
    tenants: dict[str, Tenant],
    chance: object,
) -> None:
    seen = view(waiting, *workers, tenants=tenants, models=KINDS)
    mixed = {model: [*waiting[model]] for model in sorted(waiting, reverse=True)}
    again = view(mixed, *reversed(workers), tenants=tenants, models=KINDS)
    assert choose(seen, workers[0]) == choose(again, workers[0])


# --- A small simulated world ----------------------------------------------------------------------


@dataclass
class World:
    """Workers that take a minute a chunk and `LOAD` seconds a swap; batches that never end."""

    workers: list[Worker]
    waiting: dict[str, list[Candidate]]
    tenants: dict[str, Tenant]
    now: float = NOW
    free: dict[str, float] = field(default_factory=dict)
    gaps: Counter[str] = field(default_factory=Counter)
    swaps: int = 0

    def run(self, seconds: float) -> None:
        self.free = {each.name: self.now for each in self.workers}
        end = self.now + seconds
        while (at := min(self.free.values())) < end:
            self.now = at
            name = min(self.free, key=lambda each: (self.free[each], each))
            self.step(next(i for i, each in enumerate(self.workers) if each.name == name))

    def step(self, at: int) -> None:
        worker = self.workers[at]
        seen = View(
            self.now, self.waiting, work_of(self.waiting), self.tenants, MODELS, self.workers
        )
        decision = choose(seen, worker)
        assert decision.candidate is not None
        swap = LOAD if decision.model != worker.model else 0
        self.swaps += bool(swap)
        if swap:
            self.workers[at] = replace(worker, model=decision.model, since=self.now + swap)
        self.free[worker.name] = self.now + swap + 60
        self.serve(decision.model, decision.candidate)

    def serve(self, model: str, it: Candidate) -> None:
        self.gaps[it.batch] = max(self.gaps[it.batch], int(self.now - it.served))
        those = self.waiting[model]
        those[those.index(it)] = it._replace(served=self.now)
        tenant = self.tenants[it.organization]
        grown = 60 * 2 ** ((self.now - NOW) / policy.HALF_LIFE)
        self.tenants[it.organization] = replace(tenant, served=tenant.served + grown)


def world(workers: int, waiting: dict[str, list[Candidate]], **weights: float) -> World:
    names = {each.organization for those in waiting.values() for each in those}
    tenants = {name: Tenant(weights.get(name, 1.0)) for name in names}
    return World([on("", str(at)) for at in range(workers)], waiting, tenants)


@pytest.mark.parametrize("workers", [1, 3])
def test_nothing_starves_not_even_low_batches_of_a_model_that_is_not_loaded(workers: int) -> None:
    flood = [batch(f"flood{at}", "flood", seconds=DAY, priority=HIGH) for at in range(3)]
    rare: Sequence[Candidate] = [batch("low", "rare", priority=LOW), batch("normal", "rare")]
    it = world(workers, {"a": flood, "b": [rare[0]], "c": [rare[1]]})
    it.run(2 * DAY)
    grace = policy.RESCUE_SECONDS + (policy.RESCUE_STAY + 1) * LOAD + 120
    assert it.gaps["low"] <= PATIENCE[LOW] + grace
    assert it.gaps["normal"] <= PATIENCE[NORMAL] + grace
    assert set(it.gaps) == {"low", "normal", "flood0", "flood1", "flood2"}


def test_service_follows_the_weights_within_a_model() -> None:
    it = world(2, {"a": [batch("1", "x", seconds=DAY), batch("2", "y", seconds=DAY)]}, x=3.0, y=1.0)
    it.run(6 * HOUR)
    assert it.tenants["x"].ahead == pytest.approx(it.tenants["y"].ahead, rel=0.05)


def test_workers_are_handed_out_by_weight_between_models() -> None:
    waiting = {
        "a": [batch("1", "x", seconds=100 * DAY)],
        "b": [batch("2", "y", seconds=100 * DAY)],
        "c": [batch("3", "z", seconds=100 * DAY)],
    }
    it = world(12, waiting, x=1.0, y=2.0, z=3.0)
    it.run(4 * HOUR)
    assert Counter(each.model for each in it.workers) == {"a": 2, "b": 4, "c": 6}
    assert it.swaps < 20


# --- What an operator moved to the front -----------------------------------------------------------


def moved(candidate: Candidate, ago: float = 0) -> Candidate:
    return candidate._replace(front=NOW - ago)


def test_what_was_moved_to_the_front_goes_before_class_age_deadline_and_share() -> None:
    front = moved(batch("front", "ahead", priority=LOW), 60)._replace(served=NOW - 1)
    waiting = [batch("high", priority=HIGH, waited=200), batch("due", due=400), front]
    tenants = {"ahead": Tenant(served=1_000)}
    found = choose(view({"a": waiting}, tenants=tenants), Worker("w", model="a"))
    assert found.candidate == front


def test_of_several_the_last_one_moved_goes_first() -> None:
    first, last = (
        moved(batch(name), ago)._replace(served=NOW) for name, ago in (("a", 9), ("b", 5))
    )
    found = choose(view({"a": [first, last]}), Worker("w", model="a"))
    assert found.candidate == last


def test_what_is_past_its_patience_still_goes_before_the_front() -> None:
    late = batch("late", waited=PATIENCE[NORMAL] + 1)
    found = choose(view({"a": [moved(batch("front")), late]}), Worker("w", model="a"))
    assert found.candidate == late


def test_a_move_to_the_front_brings_a_worker_to_the_model_until_the_next_chunk() -> None:
    """Then its model keeps or loses the worker as any other: nobody else waits longer for it."""
    here = batch("here", seconds=HOUR)
    front = moved(batch("front", "other"), 1)._replace(served=NOW - 60)
    worker = Worker("w", model="a", since=NOW - DAY)
    assert choose(view({"a": [here], "b": [front]}, worker), worker).candidate == front
    served = front._replace(served=NOW)
    assert choose(view({"a": [here], "b": [served]}, worker), worker).candidate == here


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30_000)), min_size=1, max_size=8))
def test_whatever_is_moved_a_late_batch_is_never_passed_over(those: list[tuple[bool, int]]) -> None:
    waiting = [
        moved(batch(str(at), waited=waited)) if front else batch(str(at), waited=waited)
        for at, (front, waited) in enumerate(those)
    ]
    found = choose(view({"a": waiting}), Worker("w", model="a")).candidate
    assert found is not None
    late = {each.batch for each in waiting if NOW - each.served > PATIENCE[NORMAL]}
    front = {each.batch for each in waiting if each.front}
    assert found.batch in (late or front or {each.batch for each in waiting})
