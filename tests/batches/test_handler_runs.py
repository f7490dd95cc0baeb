"""Runs of result handlers: who gets which batch, in which order, and what becomes of trouble."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, ClassVar

import pytest
import time_machine
from celery.exceptions import SoftTimeLimitExceeded
from django.db import transaction
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.errors import BadRequest, Forbidden
from accounts.models import AuditEvent, Organization
from batches.handlers import registry
from batches.handlers.base import Batch, Handler, HandlerFailed, Results, Settings
from batches.models import HandlerRun, ResultHandler
from batches.models.batches import Status
from batches.services import batches, files, handler_runs, handlers, sweep
from batches.services.finalization import finalize_batch
from tests import jobs
from tests.conftest import Person

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.usefixtures("own_storage", "echo", "scripted"),
]


class Scripted(Handler[Settings]):
    """Does what the test says, and remembers what it was given."""

    name = "scripted"
    title = "Scripted"
    summary = "For tests."
    settings_schema = Settings
    seen: ClassVar[list[list[str]]] = []
    does: ClassVar[Callable[[Results], Any]] = staticmethod(lambda results: None)

    def handle(self, batch: Batch, results: Results) -> str | None:
        self.seen.append([answer.custom_id for answer in results])
        said: str | None = type(self).does(results)
        return said


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[Scripted]:
    monkeypatch.setattr(Scripted, "seen", [])
    monkeypatch.setattr(Scripted, "does", staticmethod(lambda results: None))
    kinds = {**registry.kinds(), "scripted": Scripted}
    monkeypatch.setattr(registry, "kinds", lambda: kinds)
    return Scripted


def handler(person: Person, name: str = "mine", **fields: Any) -> ResultHandler:
    given: dict[str, Any] = {"kind": "scripted", "settings": {}, "project": None}
    return handlers.create_handler(actor=person.caller, name=name, **(given | fields))


def ended(person: Person, requests: int = 3, **options: Any) -> Batch:
    batch = jobs.running(person.caller, requests, **options)
    jobs.finish(jobs.lease())
    finalize_batch(batch.pk)
    return jobs.fresh(batch)


def runs(batch: Batch) -> list[HandlerRun]:
    with scopes_disabled():
        rows = HandlerRun.objects.filter(batch=batch).select_related("handler")
        return list(rows.order_by("position"))


def the_run(batch: Batch) -> HandlerRun:
    (run,) = runs(batch)
    return run


def names(batch: Batch) -> list[str]:
    return [run.handler.name for run in runs(batch)]


def change(run: HandlerRun, **fields: Any) -> None:
    with scopes_disabled():
        HandlerRun.objects.filter(pk=run.pk).update(**fields)


@pytest.fixture
def failing(scripted: type[Scripted], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(results: Results) -> None:
        raise HandlerFailed("no room")

    monkeypatch.setattr(scripted, "does", staticmethod(fail))


# --- Who gets what --------------------------------------------------------------------------


def test_a_run_is_done_once_the_batch_has_ended(owner: Person, scripted: type[Scripted]) -> None:
    scripted.does = staticmethod(lambda results: "a thing")
    handler(owner)
    batch = ended(owner)
    assert the_run(batch).state == "waiting"
    handler_runs.run_due(batch.pk)
    run = the_run(batch)
    assert (run.state, run.rows, run.result, run.error) == ("done", 3, "a thing", "")
    assert (run.attempts, run.busy_until, run.next_attempt_at) == (1, None, None)
    assert run.started_at is not None
    assert run.ended_at is not None
    assert scripted.seen == [["1", "2", "3"]]
    handler_runs.run_due(batch.pk)
    assert len(scripted.seen) == 1


def test_only_handlers_of_the_batchs_project_that_are_switched_on(
    owner: Person, stranger: Person
) -> None:
    from accounts.services import projects

    other = projects.create_project(actor=owner.caller, name="Evals")
    handler(owner, "everywhere")
    handler(owner, "here", project=owner.caller.project)
    handler(owner, "elsewhere", project=other)
    handler(owner, "off", enabled=False)
    handler(owner, "asked", by_default=False)
    handler(stranger, "theirs")
    assert names(ended(owner)) == ["everywhere", "here"]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("none", []),
        ("", []),
        ("asked", ["asked"]),
        (" asked , usual,nobody", ["usual", "asked"]),
        ("off", []),
    ],
)
def test_the_batchs_metadata_choose(owner: Person, said: str, expected: list[str]) -> None:
    handler(owner, "usual")
    handler(owner, "asked", by_default=False)
    handler(owner, "off", enabled=False)
    assert names(ended(owner, metadata={"handlers": said})) == expected


def test_a_cancelled_batch_is_handled_if_it_has_output(owner: Person) -> None:
    handler(owner)
    none, some = jobs.running(owner.caller, 2), jobs.running(owner.caller, 2)
    batches.cancel_batch(actor=owner.caller, batch=none)
    finalize_batch(none.pk)
    lease = jobs.lease()
    jobs.leases.save(lease=lease, outcomes=[jobs.outcome(1)], finished=False)
    batches.cancel_batch(actor=owner.caller, batch=some)
    jobs.change(some, cancelling_at=timezone.now() - timedelta(minutes=1))
    finalize_batch(some.pk)
    assert [jobs.fresh(batch).status for batch in (none, some)] == [Status.CANCELLED] * 2
    assert (len(runs(none)), len(runs(some))) == (0, 1)


def test_a_run_is_written_with_the_end_of_its_batch(owner: Person) -> None:
    handler(owner)
    batch = ended(owner)
    with scopes_disabled(), transaction.atomic():
        HandlerRun.objects.all().delete()
        handler_runs.batch_ended(batch)
        transaction.set_rollback(True)
    assert len(runs(batch)) == 1


def test_a_handler_can_be_deleted_while_a_batch_ends(owner: Person, acme: Organization) -> None:
    """Each needs what the other has locked, unless they agree on an order."""
    row = handler(owner)
    batch = ended(owner)
    with scopes_disabled():
        HandlerRun.objects.all().delete()
    written = threading.Event()

    @transaction.atomic
    def end() -> None:
        handler_runs.batch_ended(batch)
        written.set()
        time.sleep(0.5)  # so that the other waits by now
        Organization.objects.select_for_update(no_key=True).get(pk=acme.pk)  # as quotas do

    def delete() -> None:
        written.wait(30)
        handlers.delete_handler(actor=owner.caller, row=row)

    assert jobs.together(end, delete) == [None, None]
    assert runs(batch) == []


# --- Trouble --------------------------------------------------------------------------------


@pytest.mark.usefixtures("failing")
def test_what_fails_is_tried_again_later_and_in_the_end_no_more(owner: Person) -> None:
    handler(owner)
    with time_machine.travel(timezone.now(), tick=False) as clock:
        batch = ended(owner)
        waits = []
        for _ in handler_runs.SCHEDULE:
            handler_runs.run_due(batch.pk)
            run = the_run(batch)
            if run.next_attempt_at is not None:
                waits.append((run.next_attempt_at - timezone.now()).total_seconds())
                handler_runs.run_due(batch.pk)  # too early
                assert the_run(batch).attempts == run.attempts
                clock.move_to(run.next_attempt_at)
    run = the_run(batch)
    assert (run.state, run.error, run.rows) == ("failed", "no room", 3)
    assert run.attempts == len(handler_runs.SCHEDULE)
    for wait, planned in zip(waits, handler_runs.SCHEDULE[1:], strict=True):
        assert planned <= wait <= planned * 1.2 + 0.001


def test_what_cannot_be_helped_is_not_tried_again(owner: Person, scripted: type[Scripted]) -> None:
    def refuse(results: Results) -> None:
        raise HandlerFailed("gone", final=True)

    scripted.does = staticmethod(refuse)
    handler(owner)
    batch = ended(owner)
    handler_runs.run_due(batch.pk)
    assert (the_run(batch).state, the_run(batch).attempts) == ("failed", 1)


def test_a_bug_in_a_handler_is_that_runs_own(owner: Person, scripted: type[Scripted]) -> None:
    calls = []

    def first_one_fails(results: Results) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise ZeroDivisionError("by\0zero")

    scripted.does = staticmethod(first_one_fails)
    handler(owner, "first")
    handler(owner, "second")
    batch = ended(owner)
    handler_runs.run_due(batch.pk)
    assert [(run.state, run.error) for run in runs(batch)] == [
        ("waiting", "ZeroDivisionError: by\ufffdzero"),
        ("done", ""),
    ]
    assert jobs.fresh(batch).status == Status.COMPLETED


def test_what_takes_too_long_says_so(owner: Person, scripted: type[Scripted]) -> None:
    def hang(results: Results) -> None:
        raise SoftTimeLimitExceeded  # as Celery does, in the midst of it

    scripted.does = staticmethod(hang)
    handler(owner)
    batch = ended(owner)
    handler_runs.run_due(batch.pk)
    run = the_run(batch)
    assert (run.state, run.error) == ("waiting", "It took longer than 55 minutes.")


def test_what_hangs_is_ended_and_leaves_its_process_to_others(
    owner: Person, scripted: type[Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handler_runs, "SILENT_SECONDS", 0.2)

    def hang(results: Results) -> None:
        for _ in range(2):
            try:
                time.sleep(60)
            except Exception:  # as clients that try again do
                continue

    handler(owner, "hangs")
    handler(owner, "next")
    batch = ended(owner)
    scripted.does = staticmethod(lambda results: hang(results) if len(scripted.seen) == 1 else "ok")
    handler_runs.run_due(batch.pk)
    assert [(run.state, run.error, run.result) for run in runs(batch)] == [
        ("waiting", handler_runs.HANGS, ""),
        ("done", "", "ok"),
    ]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_who_gives_signs_of_life_may_take_longer(
    owner: Person, scripted: type[Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handler_runs, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(handler_runs, "BEAT_SECONDS", 0.0)

    def work(results: Results) -> str:
        for _ in range(30):
            time.sleep(0.05)
            results.beat()
        return "all of it"

    scripted.does = staticmethod(work)
    handler(owner)
    batch = ended(owner)
    handler_runs.run_due(batch.pk)
    assert (the_run(batch).state, the_run(batch).result) == ("done", "all of it")


def test_after_a_long_run_the_next_has_a_time_of_its_own(
    owner: Person, monkeypatch: pytest.MonkeyPatch, wakeups_sent: list[tuple[str, ...]]
) -> None:
    monkeypatch.setattr(handler_runs, "TURN_SECONDS", -1.0)
    handler(owner, "first")
    handler(owner, "second")
    batch = ended(owner)
    wakeups_sent.clear()
    handler_runs.run_due(batch.pk)
    assert [run.state for run in runs(batch)] == ["done", "waiting"]
    assert wakeups_sent == [("batches.tasks.handle_results", batch.pk)]


def test_they_begin_in_order_and_a_later_one_waits_for_a_first_attempt(
    owner: Person, scripted: type[Scripted]
) -> None:
    first, second = handler(owner, "first"), handler(owner, "second")
    handlers.update_handler(actor=owner.caller, row=second, position=1)
    batch = ended(owner)
    begun = []

    def remember(results: Results) -> None:
        begun.extend(run.handler.name for run in runs(batch) if run.state == "running")
        handler_runs.run_due(batch.pk)  # another process, at this moment

    scripted.does = staticmethod(remember)
    handler_runs.run_due(batch.pk)
    assert begun == ["second", "first"]
    assert [run.handler_id for run in runs(batch)] == [second.pk, first.pk]


def test_a_run_whose_process_died_is_run_again_and_done_once(
    owner: Person, scripted: type[Scripted]
) -> None:
    handler(owner)
    batch = ended(owner)
    calls = []

    class Killed(BaseException):
        """Nothing catches it, and nothing is tidied up."""

    def die_once(results: Results) -> str:
        calls.append(1)
        if len(calls) == 1:
            raise Killed
        return "whole"

    scripted.does = staticmethod(die_once)
    with pytest.raises(Killed):
        handler_runs.run_due(batch.pk)
    run = the_run(batch)
    assert (run.state, run.attempts) == ("running", 1)
    handler_runs.run_due(batch.pk)
    assert len(calls) == 1  # it might be alive
    change(run, busy_until=timezone.now() - timedelta(seconds=1))
    handler_runs.run_due(batch.pk)
    run = the_run(batch)
    assert (run.state, run.attempts, run.result, len(calls)) == ("done", 2, "whole", 2)


def test_who_was_thought_dead_says_nothing_any_more(
    owner: Person, scripted: type[Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handler_runs, "BEAT_SECONDS", 0)
    handler(owner)
    batch = ended(owner)

    def taken_over(results: Results) -> str:
        scripted.does = staticmethod(lambda results: "by the second")
        change(the_run(batch), busy_until=timezone.now() - timedelta(seconds=1))
        handler_runs.run_due(batch.pk)
        results.beat()
        return "by the first"

    scripted.does = staticmethod(taken_over)
    handler_runs.run_due(batch.pk)
    run = the_run(batch)
    assert (run.state, run.result, run.attempts) == ("done", "by the second", 2)


def test_what_dies_every_time_has_failed_in_the_end(owner: Person) -> None:
    handler(owner)
    batch = ended(owner)
    change(
        the_run(batch),
        state="running",
        attempts=len(handler_runs.SCHEDULE),
        next_attempt_at=None,
        busy_until=timezone.now() - timedelta(seconds=1),
    )
    handler_runs.run_due(batch.pk)
    run = the_run(batch)
    assert (run.state, run.error) == ("failed", handler_runs.DIED)


def test_a_handler_that_is_deleted_stops_its_run(
    owner: Person, scripted: type[Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handler_runs, "BEAT_SECONDS", 0)
    row = handler(owner)
    batch = ended(owner)
    reached = []

    def delete(results: Results) -> None:
        handlers.delete_handler(actor=owner.caller, row=row)
        results.beat()
        reached.append(1)

    scripted.does = staticmethod(delete)
    handler_runs.run_due(batch.pk)
    assert (runs(batch), reached) == ([], [])


def test_a_kind_that_is_gone_fails_and_says_so(
    owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler(owner)
    batch = ended(owner)
    monkeypatch.setattr(registry, "kinds", dict)
    handler_runs.run_due(batch.pk)
    run = the_run(batch)
    assert (run.state, run.error) == ("failed", "The portal has no handler 'scripted' any more.")


def test_files_that_were_deleted_fail_the_run(owner: Person) -> None:
    handler(owner)
    batch = ended(owner)
    assert batch.output_file is not None
    files.delete_file(actor=owner.caller, file=batch.output_file)
    handler_runs.run_due(batch.pk)
    assert the_run(batch).error == "The batch's files have been deleted."


def test_an_organization_has_only_so_many_runs_at_once(owner: Person) -> None:
    handler(owner)
    held = [ended(owner) for _ in range(handler_runs.AT_ONCE)]
    for each in held:
        until = timezone.now() + timedelta(minutes=1)
        change(the_run(each), state="running", attempts=1, next_attempt_at=None, busy_until=until)
    batch = ended(owner)
    handler_runs.run_due(batch.pk)
    assert the_run(batch).state == "waiting"
    change(the_run(held[0]), busy_until=timezone.now() - timedelta(seconds=1))
    handler_runs.run_due(batch.pk)
    assert the_run(batch).state == "done"


def test_a_suspended_organizations_runs_wait(owner: Person, acme: Organization) -> None:
    handler(owner)
    batch = ended(owner)
    Organization.objects.filter(pk=acme.pk).update(suspended_at=timezone.now())
    handler_runs.run_due(batch.pk)
    assert the_run(batch).state == "waiting"


def test_the_sweep_wakes_for_what_is_due(
    owner: Person, wakeups_sent: list[tuple[str, ...]]
) -> None:
    handler(owner)
    batch, later = ended(owner), ended(owner)
    change(the_run(later), next_attempt_at=timezone.now() + timedelta(hours=1))
    told = ("batches.tasks.handle_results", batch.pk)
    assert told in wakeups_sent
    wakeups_sent.clear()
    sweep.sweep()
    assert [sent for sent in wakeups_sent if "handle" in sent[0]] == [told]
    handler_runs.run_due(batch.pk)
    wakeups_sent.clear()
    sweep.sweep()
    assert [sent for sent in wakeups_sent if "handle" in sent[0]] == []


def test_the_sweep_passes_over_whom_only_their_own_runs_hold_up(
    owner: Person, stranger: Person, wakeups_sent: list[tuple[str, ...]]
) -> None:
    """Their many would otherwise come before the others' few, every time."""
    handler(owner)
    handler(stranger)
    held = [ended(owner) for _ in range(handler_runs.AT_ONCE)]
    ended(owner)
    theirs = ended(stranger)
    for each in held:
        until = timezone.now() + timedelta(minutes=1)
        change(the_run(each), state="running", attempts=1, next_attempt_at=None, busy_until=until)
    wakeups_sent.clear()
    sweep.sweep()
    told = [sent for sent in wakeups_sent if "handle" in sent[0]]
    assert told == [("batches.tasks.handle_results", theirs.pk)]


# --- Retrying -------------------------------------------------------------------------------


@pytest.mark.usefixtures("failing")
def test_a_retry_begins_anew_and_is_audited(owner: Person, scripted: type[Scripted]) -> None:
    handler(owner)
    batch = ended(owner)
    change(the_run(batch), attempts=len(handler_runs.SCHEDULE) - 1)
    handler_runs.run_due(batch.pk)
    assert the_run(batch).state == "failed"
    handler_runs.retry_run(actor=owner.caller, run=the_run(batch))
    run = the_run(batch)
    assert (run.state, run.attempts, run.ended_at) == ("waiting", 0, None)
    scripted.does = staticmethod(lambda results: None)
    handler_runs.run_due(batch.pk)
    assert the_run(batch).state == "done"
    with scopes_disabled():
        event = AuditEvent.objects.get(action="result_handler.retried")
    assert (event.target_label, event.changes) == ("mine", {"batch": [None, batch.pk]})


def test_what_is_running_cannot_be_retried(owner: Person, viewer: Person) -> None:
    handler(owner)
    batch = ended(owner)
    until = timezone.now() + timedelta(minutes=1)
    change(the_run(batch), state="running", next_attempt_at=None, busy_until=until)
    with pytest.raises(BadRequest):
        handler_runs.retry_run(actor=owner.caller, run=the_run(batch))
    with pytest.raises(Forbidden):
        handler_runs.retry_run(actor=viewer.caller, run=the_run(batch))
