"""Deliveries: that they arrive signed, are tried again on time, die, and come back by replay."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import orjson
import pytest
import time_machine
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django_scopes import scopes_disabled
from openai import OpenAI
from pytest_httpserver import HTTPServer
from standardwebhooks import Webhook
from werkzeug import Request, Response

from batches import webhooks as wire
from batches.models import Event, WebhookAttempt, WebhookDelivery, WebhookEndpoint
from batches.models.batches import Status
from batches.models.events import EventType
from batches.services import deliveries, events, webhooks
from batches.services.finalization import finalize_batch
from batches.services.validation import validate_batch
from batches.webhooks import Sender
from tests import jobs
from tests.conftest import Person
from tests.receiver import Came, Receiver, receiving

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.usefixtures("own_storage", "echo"),
]
ALL = list(EventType.values)


@pytest.fixture
def received(httpserver: HTTPServer) -> list[Request]:
    """What came in; everything is answered with 200 unless a test says otherwise."""
    httpserver.expect_request("/hook").respond_with_data("thanks")
    return _Log(httpserver)


class _Log(list[Request]):
    def __init__(self, server: HTTPServer) -> None:
        self._server = server

    def __iter__(self) -> Iterator[Request]:
        return iter(request for request, _ in self._server.log)

    def __len__(self) -> int:
        return len(self._server.log)


def endpoint(
    person: Person, server: HTTPServer | Receiver, **fields: Any
) -> tuple[WebhookEndpoint, str]:
    url = server.url() if isinstance(server, Receiver) else server.url_for("/hook")
    given = {"name": "hook", "event_types": ALL, "project": None, "url": url}
    return webhooks.create_webhook(actor=person.caller, **(given | fields))


def happened(person: Person, type: EventType = EventType.BATCH_COMPLETED, **data: Any) -> Event:
    return events.record(
        type,
        organization=person.caller.organization,
        project=person.caller.project,
        data={"id": "batch_1"} | data,
    )


def the_delivery() -> WebhookDelivery:
    with scopes_disabled():
        return WebhookDelivery.objects.get()


def attempts() -> list[tuple[int | None, str, str]]:
    with scopes_disabled():
        rows = WebhookAttempt.objects.order_by("pk")
        return list(rows.values_list("status", "answer", "error"))


# --- The outbox -----------------------------------------------------------------------------


def test_a_batch_tells_of_every_status_that_matters(owner: Person, httpserver: HTTPServer) -> None:
    endpoint(owner, httpserver)
    batch = jobs.running(owner.caller, 3, progress_percents=[50])
    jobs.finish(jobs.lease())
    finalize_batch(batch.pk)
    assert jobs.fresh(batch).status == Status.COMPLETED
    bad = jobs.created(owner.caller, b"no json\n")
    validate_batch(bad.pk)
    with scopes_disabled():
        told = [(event.type, orjson.loads(event.body)) for event in Event.objects.order_by("pk")]
        assert WebhookDelivery.objects.count() == 4
    counts = {"total": 3, "completed": 3, "failed": 0}
    assert [(type, body["data"]) for type, body in told] == [
        ("batch.in_progress", {"id": batch.pk}),
        ("batch.progress", {"id": batch.pk, "percent": 50, "request_counts": counts}),
        ("batch.completed", {"id": batch.pk}),
        ("batch.failed", {"id": bad.pk}),
    ]
    assert [set(body) for _, body in told] == [{"id", "object", "created_at", "type", "data"}] * 4


def test_only_those_are_told_who_asked(
    owner: Person, stranger: Person, httpserver: HTTPServer
) -> None:
    told, _ = endpoint(owner, httpserver, project=owner.caller.project)
    endpoint(owner, httpserver, event_types=["batch.failed"])
    endpoint(stranger, httpserver)
    off, _ = endpoint(owner, httpserver)
    webhooks.update_webhook(actor=owner.caller, row=off, enabled=False)
    happened(owner)
    assert the_delivery().endpoint_id == told.pk


def test_an_event_goes_with_its_change(owner: Person, httpserver: HTTPServer) -> None:
    endpoint(owner, httpserver)
    with transaction.atomic():
        happened(owner)
        transaction.set_rollback(True)
    with scopes_disabled():
        assert (Event.objects.count(), WebhookDelivery.objects.count()) == (0, 0)


# --- Sending --------------------------------------------------------------------------------


def test_a_delivery_is_what_the_sdk_unwraps(
    owner: Person, httpserver: HTTPServer, received: list[Request]
) -> None:
    row, secret = endpoint(owner, httpserver, headers={"Authorization": "Bearer receiver"})
    event = happened(owner)
    deliveries.send_due(row.pk)
    (request,) = received
    body, headers = request.get_data(), dict(request.headers)
    assert body.decode() == event.body
    assert headers["Authorization"] == "Bearer receiver"
    client = OpenAI(api_key="none", webhook_secret=secret)
    unwrapped = client.webhooks.unwrap(body, headers)
    assert (unwrapped.type, unwrapped.data.id) == ("batch.completed", "batch_1")
    assert Webhook(secret).verify(body.decode(), {k.lower(): v for k, v in headers.items()})
    with pytest.raises(Exception, match="signature"):
        client.webhooks.unwrap(body.replace(b"batch_1", b"batch_2"), headers)
    with (
        time_machine.travel(timezone.now() + timedelta(seconds=301)),
        pytest.raises(ValueError, match="old"),
    ):
        client.webhooks.unwrap(body, headers)
    assert (the_delivery().state, attempts()) == ("delivered", [(200, "thanks", "")])


def test_while_a_secret_is_rotated_both_sign(
    owner: Person, httpserver: HTTPServer, received: list[Request]
) -> None:
    row, old = endpoint(owner, httpserver)
    row, new = webhooks.rotate_secret(actor=owner.caller, row=row, overlap=webhooks.OVERLAP)
    happened(owner)
    deliveries.send_due(row.pk)
    (request,) = received
    headers = {name.lower(): value for name, value in request.headers.items()}
    for secret in (old, new):
        assert Webhook(secret).verify(request.get_data(as_text=True), headers)
    with time_machine.travel(timezone.now() + timedelta(hours=25)):
        row.refresh_from_db()
        assert deliveries.secrets_of(row) == [new]


def test_a_retry_has_the_same_id_and_body_and_a_signature_of_its_own_time(
    owner: Person, httpserver: HTTPServer
) -> None:
    row, _ = endpoint(owner, httpserver)
    httpserver.expect_ordered_request("/hook").respond_with_data("no", status=503)
    httpserver.expect_ordered_request("/hook").respond_with_data("yes")
    event = happened(owner)
    deliveries.send_due(row.pk)
    first = the_delivery()
    assert (first.state, first.tries, first.error) == ("retrying", 1, "HTTP 503")
    assert first.next_attempt_at is not None
    with time_machine.travel(first.next_attempt_at + timedelta(seconds=1)):
        deliveries.send_due(row.pk)
    (one, _), (two, _) = httpserver.log
    assert one.get_data() == two.get_data() == event.body.encode()
    assert one.headers["webhook-id"] == two.headers["webhook-id"] == event.pk
    assert int(one.headers["webhook-timestamp"]) < int(two.headers["webhook-timestamp"])
    assert [status for status, _, _ in attempts()] == [503, 200]


def test_the_attempts_follow_the_schedule_and_end_as_a_dead_letter(
    owner: Person, httpserver: HTTPServer
) -> None:
    row, _ = endpoint(owner, httpserver)
    httpserver.expect_request("/hook").respond_with_data("no", status=500)
    waits, begun = [], timezone.now()
    with time_machine.travel(begun, tick=False) as clock:
        happened(owner)
        while (at := the_delivery().next_attempt_at) is not None:
            waits.append((at - datetime.now(UTC)).total_seconds())
            clock.move_to(max(at, _resumes(row)))
            deliveries.send_due(row.pk)
    assert len(waits) == len(deliveries.SCHEDULE) == len(attempts())
    for waited, planned in zip(waits, deliveries.SCHEDULE, strict=True):
        assert planned <= waited <= planned * (1 + deliveries.JITTER) + 1
    assert 71 * 3600 < sum(deliveries.SCHEDULE) <= 72 * 3600
    assert (the_delivery().state, the_delivery().error) == ("dead", "HTTP 500")


def _resumes(row: WebhookEndpoint) -> datetime:
    with scopes_disabled():
        return WebhookEndpoint.objects.get(pk=row.pk).resume_at


@pytest.mark.parametrize(
    ("said", "seconds"),
    [("3600", 3600), ("soon", 0), ("-5", 0), ("9" * 400, 86_400), ("date", 7200)],
)
def test_the_receiver_may_ask_to_be_left_alone(
    said: str, seconds: int, owner: Person, httpserver: HTTPServer
) -> None:
    row, _ = endpoint(owner, httpserver)
    with time_machine.travel(
        timezone.now().replace(microsecond=0) + timedelta(seconds=1), tick=False
    ):
        if said == "date":
            said = format_datetime(timezone.now() + timedelta(seconds=7200), usegmt=True)
        httpserver.expect_request("/hook").respond_with_data(
            "no", status=429, headers={"Retry-After": said}
        )
        happened(owner)
        deliveries.send_due(row.pk)
        due = the_delivery().next_attempt_at
        assert due is not None
        waited = (due - timezone.now()).total_seconds()
    planned = max(seconds, deliveries.SCHEDULE[1])
    assert planned <= waited <= planned * (1 + deliveries.JITTER)


def test_one_that_is_gone_is_sent_nothing_more(owner: Person, httpserver: HTTPServer) -> None:
    row, _ = endpoint(owner, httpserver)
    watcher, _ = endpoint(owner, httpserver, event_types=["webhook.disabled"])
    httpserver.expect_request("/hook").respond_with_data("gone", status=410)
    happened(owner)
    deliveries.send_due(row.pk)
    row.refresh_from_db()
    assert (row.enabled, row.disabled_why) == (
        False,
        "The receiver answered 410: it is gone for good.",
    )
    with scopes_disabled():
        states = dict(WebhookDelivery.objects.values_list("endpoint_id", "state"))
        told = Event.objects.get(type="webhook.disabled")
    assert states == {row.pk: "dead", watcher.pk: "retrying"}
    assert orjson.loads(told.body)["data"]["id"] == row.pk


def test_an_endpoint_where_nothing_arrives_for_days_is_disabled(
    owner: Person, httpserver: HTTPServer
) -> None:
    row, _ = endpoint(owner, httpserver)
    httpserver.expect_request("/hook").respond_with_data("no", status=500)
    happened(owner)
    deliveries.send_due(row.pk)
    with time_machine.travel(timezone.now() + deliveries.DISABLE_AFTER + timedelta(minutes=1)):
        deliveries.send_due(row.pk)
    row.refresh_from_db()
    assert (row.enabled, row.disabled_why) == (False, "Nothing arrived for 5 days.")
    webhooks.update_webhook(actor=owner.caller, row=row, enabled=True)
    row.refresh_from_db()
    assert (row.enabled, row.failing_since, row.failures) == (True, None, 0)


@pytest.mark.parametrize("status", [301, 302, 307, 400, 401, 404, 500])
def test_anything_but_2xx_is_a_failure_and_no_redirect_is_followed(
    status: int, owner: Person, httpserver: HTTPServer
) -> None:
    row, _ = endpoint(owner, httpserver)
    there = httpserver.url_for("/elsewhere")
    httpserver.expect_request("/hook").respond_with_data(
        "", status=status, headers={"Location": there}
    )
    happened(owner)
    deliveries.send_due(row.pk)
    assert [request.path for request, _ in httpserver.log] == ["/hook"]
    assert (the_delivery().state, the_delivery().error) == ("retrying", f"HTTP {status}")


def test_of_an_endless_answer_four_kilobytes_are_kept(
    owner: Person, httpserver: HTTPServer
) -> None:
    row, _ = endpoint(owner, httpserver)

    def endless(_: Request) -> Response:
        return Response(b"\0" + b"x" * 100_000)

    httpserver.expect_request("/hook").respond_with_handler(endless)
    happened(owner)
    deliveries.send_due(row.pk)
    ((status, answer, _),) = attempts()
    assert (status, answer) == (200, "\ufffd" + "x" * 4095)


def test_one_endpoint_is_sent_to_by_one_process_at_a_time(
    owner: Person, httpserver: HTTPServer, wakeups_sent: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    row, _ = endpoint(owner, httpserver)
    inside, go = threading.Event(), threading.Event()

    def wait(_: Request) -> Response:
        inside.set()
        go.wait(10)
        return Response("ok")

    httpserver.expect_request("/hook").respond_with_handler(wait)
    happened(owner)
    happened(owner)
    thread = threading.Thread(target=_in_thread, args=(row.pk,))
    thread.start()
    assert inside.wait(10)
    wakeups_sent.clear()
    happened(owner)  # while the first two are on their way
    deliveries.send_due(row.pk)  # another thread, which only leaves word
    monkeypatch.setattr(deliveries, "_turns", {})
    deliveries.send_due(row.pk)  # another process, which finds it taken
    assert attempts() == []
    monkeypatch.undo()
    go.set()
    thread.join(20)
    assert [status for status, _, _ in attempts()] == [200, 200, 200]


def _in_thread(id: str) -> None:
    try:
        deliveries.send_due(id)
    finally:
        connection.close()


def test_what_a_dead_process_held_is_sent_when_its_time_is_over(
    owner: Person, httpserver: HTTPServer, received: list[Request], wakeups_sent: list[Any]
) -> None:
    row, _ = endpoint(owner, httpserver)
    happened(owner)
    with scopes_disabled():
        WebhookEndpoint.objects.update(busy_until=timezone.now() + timedelta(seconds=45))
        wakeups_sent.clear()
        deliveries.repeat_wakeups()
        assert wakeups_sent == []
        with time_machine.travel(timezone.now() + timedelta(seconds=46)):
            deliveries.repeat_wakeups()
            assert wakeups_sent == [("batches.tasks.deliver", row.pk)]
            deliveries.send_due(row.pk)
    assert the_delivery().state == "delivered"


# --- Side by side -----------------------------------------------------------------------------


def states() -> list[tuple[str, int, str]]:
    with scopes_disabled():
        rows = WebhookDelivery.objects.order_by("pk")
        return list(rows.values_list("state", "tries", "error"))


def told_many(person: Person, count: int) -> list[str]:
    """The ids of so many events, in their order."""
    return [happened(person, id=f"batch_{at}").pk for at in range(count)]


def test_a_round_goes_side_by_side_over_connections_that_stay_open(owner: Person) -> None:
    most = deliveries.SIDE_BY_SIDE
    with receiving() as receiver:
        row, _ = endpoint(owner, receiver)
        ids = told_many(owner, 3 * most)
        deliveries.send_due(row.pk)
        assert sorted(came.id for came in receiver.came) == ids
        assert {came.id for came in receiver.came[:most]} == set(ids[:most])
        assert receiver.connections <= most
    assert states() == [("delivered", 1, "")] * len(ids)


def test_a_connection_that_the_receiver_has_closed_costs_no_attempt(owner: Person) -> None:
    with receiving() as receiver:
        row, _ = endpoint(owner, receiver)
        with Sender(row.url, row.timeout, side_by_side=1) as sender:
            assert sender.send_all([(b"{}", {"webhook-id": "one"})])[0].ok
            receiver.drop()
            assert sender.send_all([(b"{}", {"webhook-id": "two"})])[0].ok
        assert [came.id for came in receiver.came] == ["one", "two"]
        assert receiver.connections == 2


def test_a_connection_that_another_thread_took_first_is_not_missed(owner: Person) -> None:
    class Taken(list[Any]):
        """Empty by the time that it is asked for one."""

        def __len__(self) -> int:
            return 1

    with receiving() as receiver:
        row, _ = endpoint(owner, receiver)
        with Sender(row.url, row.timeout, side_by_side=2) as sender:
            sender._idle = Taken()
            assert sender.send_all([(b"{}", {"webhook-id": "one"})])[0].ok


def test_one_that_fails_now_and_then_is_not_left_alone(owner: Person) -> None:
    with receiving(lambda came: 500 if b"batch_1" in came.body else 200) as receiver:
        row, _ = endpoint(owner, receiver)
        told_many(owner, 3)
        deliveries.send_due(row.pk)
    row.refresh_from_db()
    assert states() == [("delivered", 1, ""), ("retrying", 1, "HTTP 500"), ("delivered", 1, "")]
    assert (row.failures, row.failing_since, row.busy_until) == (0, None, None)
    assert row.resume_at <= timezone.now()


def test_one_that_fails_is_tried_one_by_one_after_longer_and_longer_pauses(owner: Person) -> None:
    with receiving(lambda _: 500) as receiver:
        row, _ = endpoint(owner, receiver)
        told_many(owner, 5)
        tried = []
        with time_machine.travel(timezone.now(), tick=False) as clock:
            for pause in deliveries.PAUSE_SECONDS:
                before, now = len(receiver.came), timezone.now()
                with scopes_disabled():
                    WebhookDelivery.objects.update(next_attempt_at=now)
                deliveries.send_due(row.pk)
                tried.append(len(receiver.came) - before)
                assert (_resumes(row) - now).total_seconds() == pause
                deliveries.send_due(row.pk)  # too early
                clock.move_to(_resumes(row))
        assert tried == [5, 1, 1, 1]


def test_a_hanging_receiver_holds_up_its_own_round_only(owner: Person) -> None:
    with receiving(lambda came: None if came.path == "/hang" else 200) as receiver:
        slow, _ = endpoint(owner, receiver, url=receiver.url("/hang"), timeout=5)
        quick, _ = endpoint(owner, receiver)
        told_many(owner, 3)
        thread = threading.Thread(target=_in_thread, args=(slow.pk,))
        thread.start()
        deliveries.send_due(quick.pk)
        with scopes_disabled():
            done = WebhookDelivery.objects.filter(endpoint=quick, state="delivered").count()
            assert (done, WebhookAttempt.objects.filter(delivery__endpoint=slow).count()) == (3, 0)
        thread.join(20)
    with scopes_disabled():
        errors = WebhookDelivery.objects.filter(endpoint=slow).values_list("error", flat=True)
        assert set(errors) == {"It did not answer in time."}


def test_slow_receivers_of_one_organization_leave_threads_to_the_others(
    owner: Person, stranger: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = deliveries._Turn(organization_id=owner.caller.organization.pk, waits=True)
    busy = {f"we_{at}": slow for at in range(deliveries.SLOW_AT_ONCE)}
    monkeypatch.setattr(deliveries, "_turns", busy)
    with receiving() as receiver:
        failing, _ = endpoint(owner, receiver)
        new, _ = endpoint(owner, receiver)
        theirs, _ = endpoint(stranger, receiver)
        with scopes_disabled():
            WebhookEndpoint.objects.filter(pk__in=[failing.pk, theirs.pk]).update(failures=1)
        happened(owner)
        happened(stranger)
        for row in (failing, new, theirs):
            deliveries.send_due(row.pk)
    with scopes_disabled():
        states = dict(WebhookDelivery.objects.values_list("endpoint_id", "state"))
        assert states == {failing.pk: "retrying", new.pk: "delivered", theirs.pk: "delivered"}
        assert WebhookEndpoint.objects.get(pk=failing.pk).busy_until is None


def test_a_rate_is_kept_and_what_the_sweep_came_too_late_for_is_made_up(owner: Person) -> None:
    with receiving() as receiver:
        row, _ = endpoint(owner, receiver, per_minute=30)
        with time_machine.travel(timezone.now(), tick=False) as clock:
            told_many(owner, 40)
            for _ in range(20):  # a sweep every three seconds, for a minute
                clock.shift(timedelta(seconds=3))
                deliveries.send_due(row.pk)
        assert len(receiver.came) in (30, 31)


# --- What comes in between ----------------------------------------------------------------------


def test_an_event_that_is_being_written_does_not_hide_its_endpoint(
    owner: Person, httpserver: HTTPServer, received: list[Request]
) -> None:
    """Its delivery's foreign key locks the endpoint's row until that transaction ends."""
    row, _ = endpoint(owner, httpserver)
    happened(owner)
    with transaction.atomic():
        happened(owner)
        thread = threading.Thread(target=_in_thread, args=(row.pk,))
        thread.start()
        thread.join(30)
        assert len(received) == 1


def test_an_endpoint_can_be_deleted_while_an_event_is_written(
    owner: Person, httpserver: HTTPServer
) -> None:
    """The change that the event tells of must not fail for it, and that at its commit."""
    row, _ = endpoint(owner, httpserver)
    written = threading.Event()

    @transaction.atomic
    def tell() -> None:
        happened(owner)
        written.set()
        time.sleep(0.5)  # so that the other waits by now, or is through

    def delete() -> None:
        written.wait(30)
        webhooks.delete_webhook(actor=owner.caller, row=row)

    assert jobs.together(tell, delete) == [None, None]
    with scopes_disabled():
        assert Event.objects.count() == 1
        assert not WebhookDelivery.objects.exists()


def test_name_servers_are_asked_while_nothing_is_locked(
    owner: Person, httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches' changes need the organization's row and the endpoint's, and would wait as well."""
    asked: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        wire, "require_reachable", lambda url: asked.append((url, connection.in_atomic_block))
    )
    row, _ = endpoint(owner, httpserver)
    new = httpserver.url_for("/new")
    row = webhooks.update_webhook(actor=owner.caller, row=row, url=new)
    webhooks.update_webhook(actor=owner.caller, row=row, url=new, name="other")
    assert asked == [(httpserver.url_for("/hook"), False), (new, False)]


def test_a_change_does_not_wait_for_events_nor_events_for_it(
    owner: Person, httpserver: HTTPServer
) -> None:
    row, _ = endpoint(owner, httpserver)
    with transaction.atomic():
        webhooks.update_webhook(actor=owner.caller, row=row, name="other")
        (told,) = jobs.together(lambda: happened(owner))
    assert isinstance(told, Event)


def test_a_receiver_that_was_exchanged_meanwhile_is_not_disabled_for_the_old_ones_410(
    owner: Person,
) -> None:
    def leave(_: Came) -> int:
        with scopes_disabled():
            WebhookEndpoint.objects.update(url=receiver.url("/new"))
        connection.close()
        return 410

    with receiving(lambda came: leave(came) if came.path == "/hook" else 200) as receiver:
        row, _ = endpoint(owner, receiver)
        happened(owner)
        deliveries.send_due(row.pk)
        row.refresh_from_db()
        assert (row.enabled, row.failures, states()) == (True, 0, [("retrying", 1, "HTTP 410")])
        with time_machine.travel(timezone.now() + timedelta(seconds=10)):
            deliveries.send_due(row.pk)
        assert [came.path for came in receiver.came] == ["/hook", "/new"]
    assert states() == [("delivered", 2, "")]


def test_an_endpoint_that_is_deleted_while_it_is_sent_to_leaves_nothing(owner: Person) -> None:
    def forget(_: Came) -> int:
        with scopes_disabled():
            WebhookEndpoint.objects.all().delete()
        connection.close()
        return 200

    with receiving(forget) as receiver:
        row, _ = endpoint(owner, receiver)
        happened(owner)
        deliveries.send_due(row.pk)
        assert len(receiver.came) == 1
    assert (attempts(), deliveries._turns) == ([], {})


def test_of_a_hold_that_another_took_over_only_the_attempt_is_kept(owner: Person) -> None:
    def steal(_: Came) -> int:
        with scopes_disabled():
            WebhookEndpoint.objects.update(busy_until=timezone.now() + timedelta(seconds=99))
        connection.close()
        return 200

    with receiving(steal) as receiver:
        row, _ = endpoint(owner, receiver)
        happened(owner)
        deliveries.send_due(row.pk)
    assert ([status for status, _, _ in attempts()], states()) == ([200], [("retrying", 0, "")])
    row.refresh_from_db()
    assert row.busy_until is not None


@pytest.mark.parametrize("said", [b"\0\0\0\r\n\r\n", b"HTTP/1.1 2\0 \0\r\n\r\n", b"\xff" * 50])
def test_what_is_no_http_is_a_failure_like_any_other(said: bytes, owner: Person) -> None:
    with receiving(raw=said) as receiver:
        row, _ = endpoint(owner, receiver)
        happened(owner)
        deliveries.send_due(row.pk)
    ((state, tries, error),) = states()
    assert (state, tries, bool(error), "\0" in error) == ("retrying", 1, True, False)
    assert len(attempts()) == 1


def test_cookies_of_a_receiver_are_not_brought_back(owner: Person, httpserver: HTTPServer) -> None:
    row, _ = endpoint(owner, httpserver)
    httpserver.expect_request("/hook").respond_with_data("ok", headers={"Set-Cookie": "a=b"})
    told_many(owner, 2 * deliveries.SIDE_BY_SIDE)
    deliveries.send_due(row.pk)
    assert {request.headers.get("Cookie") for request, _ in httpserver.log} == {None}


# --- Dead letters ---------------------------------------------------------------------------


def test_a_dead_letter_is_replayed_to_the_mended_address_under_its_own_id(
    owner: Person, httpserver: HTTPServer
) -> None:
    row, _ = endpoint(owner, httpserver)
    event = happened(owner)
    with scopes_disabled():
        WebhookDelivery.objects.update(
            state="dead", next_attempt_at=None, tries=10, ended_at=timezone.now()
        )
    httpserver.expect_request("/mended").respond_with_data("ok")
    webhooks.update_webhook(actor=owner.caller, row=row, url=httpserver.url_for("/mended"))
    with scopes_disabled():
        everything = WebhookDelivery.objects.all()
        assert deliveries.replay(actor=owner.caller, deliveries=everything) == 1
    assert (the_delivery().state, the_delivery().tries) == ("retrying", 0)
    deliveries.send_due(row.pk)
    ((request, _),) = httpserver.log
    assert (request.path, request.headers["webhook-id"]) == ("/mended", event.pk)
    assert the_delivery().state == "delivered"


def test_purging_takes_only_what_is_dead(owner: Person, httpserver: HTTPServer) -> None:
    endpoint(owner, httpserver)
    happened(owner)
    dead = happened(owner)
    with scopes_disabled():
        of_dead = WebhookDelivery.objects.filter(event=dead)
        of_dead.update(state="dead", next_attempt_at=None)
        everything = WebhookDelivery.objects.all()
        assert deliveries.purge(actor=owner.caller, deliveries=everything) == 1
    assert the_delivery().state == "retrying"


def test_events_are_forgotten_after_a_month_unless_somebody_still_waits(
    owner: Person, httpserver: HTTPServer, received: list[Request]
) -> None:
    row, _ = endpoint(owner, httpserver, event_types=["batch.completed"])
    happened(owner)
    deliveries.send_due(row.pk)
    waiting = happened(owner)
    happened(owner, EventType.BATCH_FAILED)  # told to nobody
    later = timezone.now() + deliveries.KEEP + timedelta(minutes=1)
    with time_machine.travel(later), scopes_disabled():
        deliveries.forget_old()
        assert list(Event.objects.values_list("pk", flat=True)) == [waiting.pk]


def test_old_events_are_found_by_their_ids_however_many_are_newer() -> None:
    with scopes_disabled(), CaptureQueriesContext(connection) as asked:
        deliveries.forget_old()
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SET LOCAL enable_seqscan = off")  # so few rows need no index
        cursor.execute(f"EXPLAIN {asked[0]['sql']}")
        plan = "\n".join(line for (line,) in cursor.fetchall())
    assert "Index Cond: (id < 'evt_" in plan.replace("(id)::text", "id"), plan


# --- While its endpoint changes -----------------------------------------------------------------


def test_an_endpoint_that_is_deleted_undoes_nothing_that_it_would_be_told_of(
    owner: Person, received: list[Request], httpserver: HTTPServer
) -> None:
    row, _ = endpoint(owner, httpserver)
    deleted = threading.Event()

    @transaction.atomic
    def delete() -> None:
        webhooks.delete_webhook(actor=owner.caller, row=row)
        deleted.set()
        time.sleep(0.5)  # so that the other waits by now

    def tell() -> None:
        deleted.wait(30)
        with transaction.atomic():
            happened(owner)

    assert jobs.together(delete, tell) == [None, None]
    with scopes_disabled():
        assert (Event.objects.count(), WebhookDelivery.objects.count()) == (1, 0)


def test_an_endpoint_that_is_being_told_is_deleted_with_that(
    owner: Person, received: list[Request], httpserver: HTTPServer
) -> None:
    row, _ = endpoint(owner, httpserver)
    told = threading.Event()

    @transaction.atomic
    def tell() -> None:
        happened(owner)
        told.set()
        time.sleep(0.5)  # so that the other waits by now

    def delete() -> None:
        told.wait(30)
        webhooks.delete_webhook(actor=owner.caller, row=row)

    assert jobs.together(tell, delete) == [None, None]
    with scopes_disabled():
        assert (Event.objects.count(), WebhookDelivery.objects.count()) == (1, 0)


def test_events_do_not_wait_for_who_changes_an_endpoint(
    owner: Person, received: list[Request], httpserver: HTTPServer
) -> None:
    row, _ = endpoint(owner, httpserver)
    changed, told = threading.Event(), threading.Event()

    @transaction.atomic
    def change() -> bool:
        webhooks.update_webhook(actor=owner.caller, row=row, name="another")
        changed.set()
        return told.wait(5)

    def tell() -> None:
        changed.wait(30)
        happened(owner)
        told.set()

    assert jobs.together(change, tell) == [True, None]


def test_an_address_is_resolved_before_anything_is_locked(
    owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiving() as receiver:
        row, _ = endpoint(owner, receiver)
    locked = []

    def look(url: str) -> None:
        with connection.cursor() as cursor:
            # Only locks of whole tables tell of locked rows: RowShareLock is that of FOR UPDATE.
            cursor.execute(
                "SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid() AND mode = 'RowShareLock'"
            )
            locked.extend(cursor.fetchone())

    monkeypatch.setattr(webhooks.webhooks, "require_reachable", look)
    webhooks.update_webhook(actor=owner.caller, row=row, url="http://127.0.0.1:9/other")
    webhooks.create_webhook(
        actor=owner.caller, name="b", url=row.url, event_types=ALL, project=None
    )
    assert locked == [0, 0]


def test_a_letter_is_replayed_while_its_endpoint_is_deleted(
    owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiving() as receiver:
        row, _ = endpoint(owner, receiver)
    happened(owner)
    with scopes_disabled():
        letters = WebhookDelivery.objects.all()
        letters.update(state="dead", next_attempt_at=None)
    found = jobs.crossing(
        monkeypatch,
        lambda: webhooks.delete_webhook(actor=owner.caller, row=row),
        lambda: deliveries.replay(actor=owner.caller, deliveries=letters),
    )
    assert [each for each in found if isinstance(each, Exception)] == []
