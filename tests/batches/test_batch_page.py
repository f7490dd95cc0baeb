"""The pages of one batch, as a browser without scripts asks for them and as HTMX does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import timedelta
from decimal import Decimal
from html import unescape
from typing import Any

import orjson
import pytest
from django.contrib.messages import get_messages
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.models import AuditEvent
from accounts.services import audit
from batches import results, storage
from batches.models import Batch, Chunk, Sample
from batches.models.batches import NEXT, Status
from batches.queries import batches as queries
from batches.services import batches, files, leases, progress
from batches.services.finalization import finalize_batch
from batches.services.leases import Outcome
from batches.services.validation import validate_batch
from batches.views import batch as views
from batches.views import batches as list_views
from batches.views import results as results_views
from models_registry.models import Model
from tests import jobs
from tests.conftest import Person

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("own_storage", "wakeups_sent")]


@pytest.fixture(autouse=True)
def echo(echo: Model) -> Model:
    Model.objects.filter(pk=echo.pk).update(input_price=Decimal(2), output_price=Decimal(3))
    return echo


def answer(line: int, said: Any, **body: Any) -> Outcome:
    message = {"role": "assistant", "content": said}
    whole = {"choices": [{"message": message, "finish_reason": "stop"}]} | body
    return _outcome(line, True, {"response": {"status_code": 200, "body": whole}, "error": None})


def refusal(line: int, code: str = "too_long", status: int = 400) -> Outcome:
    error = {"code": code, "message": f"It is {code}."}
    return _outcome(
        line,
        False,
        {"response": {"status_code": status, "body": {"error": error}}, "error": None},
    )


def _outcome(line: int, ok: bool, said: dict[str, Any]) -> Outcome:
    whole = {"id": "batch_req_0", "custom_id": f"say {line}"} | said
    payload = orjson.dumps(whole, option=orjson.OPT_APPEND_NEWLINE)
    return Outcome(line, ok, payload, input=10, cached=4, output=20)


def saved(batch: Batch, outcomes: Sequence[Outcome], *, finished: bool = True) -> None:
    leases.save(lease=jobs.lease(), outcomes=outcomes, finished=finished)


def ended(person: Person, outcomes: Sequence[Outcome], requests: Any = None) -> Batch:
    """A finished batch with these results."""
    batch = jobs.running(person.caller, requests or len(outcomes))
    saved(batch, outcomes)
    finalize_batch(batch.pk)
    return jobs.fresh(batch)


def page(person: Person, batch: Batch, rest: str = "") -> str:
    response = person.browser.get(f"/batches/{batch.pk}{rest}")
    assert response.status_code == 200, response.content
    return unescape(response.content.decode())


def facts(said: str) -> dict[str, str]:
    """The numbers that the overview has, by what they are called."""
    found = re.findall(r"<div><dt>(.+?)</dt><dd>(.+?)</dd></div>", said)
    return {name: value.replace("\xa0", " ") for name, value in found}


def lines(said: str) -> list[int]:
    """The lines that the page of results lists."""
    return [int(line) for line in re.findall(r'/results/(\d+)[^"]*" aria-label=', said)]


def link(said: str, label: str) -> str:
    """Where the pager's link of this label leads; '' without one."""
    found = re.search(
        rf'<a class="btn" href="([^"]+)" rel="\w+">[^/]*?(?:</?[^a].*?>)*?\s*{label}', said
    )
    return found[1] if found else ""


# --- The overview ---------------------------------------------------------------------------


def test_a_finished_batch_says_what_it_used_and_cost(owner: Person) -> None:
    batch = ended(owner, [answer(1, "a"), answer(2, "b"), refusal(3)])
    shown = facts(page(owner, batch))
    assert batch.cost == Decimal("0.00024")  # 30 tokens in at 2, 60 out at 3, for a million
    assert shown == {
        "Requests": "3",
        "Tokens in": "30",
        "of them cached": "12",
        "Tokens out": "60",
        "GPU minutes": "0.0",
        "Cost": "0.00024 USD",
    }


def test_while_it_runs_it_says_what_it_cost_so_far(owner: Person) -> None:
    batch = jobs.running(owner.caller, 3)
    saved(batch, [answer(1, "a")], finished=False)
    assert facts(page(owner, batch))["Cost so far"] == "0.00008 USD"


def test_a_batch_that_was_never_run_cost_nothing(owner: Person) -> None:
    batch = jobs.running(owner.caller, 2)
    batches.cancel_batch(actor=owner.caller, batch=batch)
    finalize_batch(batch.pk)
    again = jobs.fresh(batch)
    assert (again.status, again.cost) == (Status.CANCELLED, None)
    assert "Cost" not in facts(page(owner, again))


def test_the_states_are_told_with_how_long_each_took(owner: Person) -> None:
    batch = ended(owner, [answer(1, "a")])
    begin = batch.created_at
    jobs.change(
        batch,
        in_progress_at=begin + timedelta(seconds=2),
        finalizing_at=begin + timedelta(seconds=2 + 65),
        completed_at=begin + timedelta(seconds=2 + 65 + 7_260),
    )
    detail = views.Detail(jobs.fresh(batch), True)
    assert [(step.label, step.lasted) for step in detail.steps] == [
        ("Created", "2 s"),
        ("In progress", "1 min 5 s"),
        ("Finalizing", "2 h 1 min"),
        ("Completed", ""),
    ]
    assert [step.is_now for step in detail.steps] == [False, False, False, True]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(-1, "0 s"), (59, "59 s"), (60, "1 min 0 s"), (3_600, "1 h 0 min"), (200_000, "2 d 7 h")],
)
def test_a_length_of_time_has_its_two_largest_units(seconds: int, said: str) -> None:
    assert views.lasting(timedelta(seconds=seconds)) == said


def test_failures_are_grouped_by_kind_with_examples(owner: Person) -> None:
    bad = [refusal(line) for line in range(1, 8)] + [refusal(8, "odd", 500)]
    batch = ended(owner, [*bad, answer(9, "a")])
    assert batch.error_kinds == [
        {"code": "too_long", "status": 400, "count": 7, "message": "It is too_long.",
         "lines": [1, 2, 3, 4, 5]},
        {"code": "odd", "status": 500, "count": 1, "message": "It is odd.", "lines": [8]},
    ]  # fmt: skip
    said = page(owner, batch)
    assert re.findall(r'data-label="Requests">(\d+)<', said) == ["7", "1"]
    assert f'href="/batches/{batch.pk}/results/8?failed=on"' in said


def test_failures_of_a_running_batch_are_grouped_as_far_as_they_are_known(
    owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries, "FAILURES_LOOKED_AT", 2)
    batch = jobs.running(owner.caller, 5)
    saved(batch, [refusal(1), refusal(2), refusal(3)], finished=False)
    said = page(owner, batch)
    assert "Of the first 2 failures" in said
    assert re.findall(r'data-label="Requests">(\d+)<', said) == ["2"]


def test_what_was_never_run_is_a_kind_of_its_own(owner: Person) -> None:
    batch = jobs.running(owner.caller, 3)
    saved(batch, [answer(2, "a")], finished=False)
    batches.cancel_batch(actor=owner.caller, batch=batch)
    jobs.change(batch, cancelling_at=timezone.now() - timedelta(minutes=1))
    finalize_batch(batch.pk)
    [kind] = jobs.fresh(batch).error_kinds or []
    assert (kind["code"], kind["status"], kind["count"], kind["lines"]) == (
        "batch_cancelled",
        None,
        2,
        [1, 3],
    )


def test_bad_lines_of_the_input_are_listed(owner: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "BAD_LINES", 2)
    batch = jobs.running(owner.caller, [{"custom_id": "<i>"}] * 3)
    assert batch.status == Status.FAILED
    said = page(owner, batch)
    assert re.findall(r'data-label="Line">(\d+)<', said) == ["1", "2"]
    assert "and 1 more" in said


def test_what_tenants_send_is_escaped_everywhere(owner: Person) -> None:
    hostile = '"><img src=x onerror=alert(1)>'
    requests = [jobs.line(hostile), jobs.line("b")]
    bad = _outcome(2, False, {"response": None, "error": {"code": hostile, "message": hostile}})
    batch = ended(owner, [answer(1, hostile), bad], requests)
    jobs.change(batch, metadata={hostile: hostile, "items": "0"})
    for rest in ("", "/results", "/results/1", "/results/2", "/results?q=%22%3E%3Cimg", "/clone"):
        said = owner.browser.get(f"/batches/{batch.pk}{rest}").content.decode()
        assert "<img" not in said, rest
        assert "&lt;img src=x" in said, rest


def test_htmx_gets_the_live_part_and_asks_again_until_it_is_finished(owner: Person) -> None:
    batch = jobs.running(owner.caller, 2)
    htmx = {"hx-request": "true"}
    response = owner.browser.get(f"/batches/{batch.pk}", headers=htmx)
    said = response.content.decode().strip()
    assert (response.status_code, said[:8]) == (200, "<section")
    assert 'hx-trigger="every 3s, portal:seen from:body"' in said
    for status in set(Status.values) - set(NEXT):
        jobs.change(batch, status=status)
        response = owner.browser.get(f"/batches/{batch.pk}", headers=htmx)
        assert response.status_code == list_views.STOP_POLLING
        assert 'hx-trigger="portal:seen from:body"' in response.content.decode()


def test_what_can_be_done_depends_on_the_role(owner: Person, viewer: Person) -> None:
    done, running = ended(owner, [refusal(1)]), jobs.running(owner.caller, 1)
    for batch, actions in ((done, {"retry", "clone"}), (running, {"clone", "cancel"})):
        mine = set(re.findall(rf'/batches/{batch.pk}/(retry|clone|cancel)"', page(owner, batch)))
        assert mine == actions
        seen = re.findall(rf'/batches/{batch.pk}/(retry|clone|cancel)"', page(viewer, batch))
        assert seen == []


def test_cancelling_from_its_page_comes_back_to_it(owner: Person) -> None:
    batch = jobs.running(owner.caller, 1)
    response = owner.browser.post(f"/batches/{batch.pk}/cancel", {"back": "batch"})
    assert response["Location"] == f"/batches/{batch.pk}"
    assert jobs.fresh(batch).status == Status.CANCELLING


@pytest.mark.parametrize("rest", ["", "/results", "/results/1", "/chunks", "/log"])
def test_queries_do_not_grow_with_what_is_shown(rest: str, owner: Person) -> None:
    def count(batch: Batch) -> int:
        client = owner.browser
        with CaptureQueriesContext(connection) as found:
            client.get(f"/batches/{batch.pk}{rest}")
        return len(found)

    of_one = ended(owner, [refusal(1)])
    of_three = ended(owner, [refusal(1), refusal(2, "odd"), answer(3, "a")])
    assert count(of_one) == count(of_three)


# --- How fast it went -----------------------------------------------------------------------


def sampled(batch: Batch) -> list[tuple[int, int]]:
    with scopes_disabled():
        found = Sample.objects.filter(batch=batch).order_by("at")
        return list(found.values_list("answered", "output_tokens"))


def age(batch: Batch, seconds: float) -> None:
    """Let what was sampled of it be older."""
    with scopes_disabled(), connection.cursor() as cursor:
        cursor.execute(
            "UPDATE batches_sample SET at = at - %s * interval '1 second' WHERE batch_id = %s",
            [seconds, batch.pk],
        )


def test_only_what_a_worker_is_at_is_sampled(owner: Person) -> None:
    waiting, running = (jobs.running(owner.caller, 3) for _ in range(2))
    lease = jobs.lease()
    batch, other = (running, waiting) if lease.batch_id == running.pk else (waiting, running)
    progress.sample()
    leases.save(lease=lease, outcomes=[answer(1, "a")], finished=False)
    progress.sample()  # too soon after the first one
    assert (sampled(batch), sampled(other)) == ([(0, 0)], [])
    age(batch, progress.STEP)
    progress.sample()
    assert sampled(batch) == [(0, 0), (1, 20)]


def test_the_older_a_batch_the_fewer_samples(owner: Person) -> None:
    batch = jobs.running(owner.caller, 3)
    jobs.lease()
    progress.sample()
    with scopes_disabled():
        batch.backlog.started_at = timezone.now() - timedelta(hours=10)
        batch.backlog.save()
    age(batch, 36_000 / progress.POINTS - 5)
    progress.sample()
    assert len(sampled(batch)) == 1
    age(batch, 6)
    progress.sample()
    assert len(sampled(batch)) == 2


def test_at_its_end_samples_are_thinned_and_the_last_counts_what_was_run(owner: Person) -> None:
    batch = jobs.running(owner.caller, 2)
    lease = jobs.lease()
    begin = timezone.now() - timedelta(hours=1)
    with scopes_disabled():
        Sample.objects.bulk_create(
            Sample(
                batch=batch,
                at=begin + timedelta(seconds=at),
                answered=at,
                input_tokens=0,
                output_tokens=0,
            )
            for at in range(200)
        )
    leases.save(lease=lease, outcomes=[answer(1, "a")], finished=False)
    leases.give_back(lease)
    batches.cancel_batch(actor=owner.caller, batch=batch)
    jobs.change(batch, cancelling_at=timezone.now() - timedelta(minutes=1))
    finalize_batch(batch.pk)
    found = sampled(batch)
    assert [answered for answered, _ in found] == [*range(0, 200, 4), 1]
    assert jobs.fresh(batch).failed == 1


def test_the_chart_has_the_rates_between_samples(owner: Person) -> None:
    batch = ended(owner, [answer(1, "a")])
    begin = timezone.now()
    with scopes_disabled():
        Sample.objects.bulk_create(
            Sample(batch=batch, at=begin + timedelta(seconds=at), answered=answered,
                   input_tokens=answered * 10, output_tokens=answered * 100)
            for at, answered in ((0, 0), (10, 5), (20, 5), (40, 25))
        )  # fmt: skip
        detail = views.Detail(batch, True)
        assert orjson.loads(detail.chart) == [
            {"x": 10.0, "requests": 0.5, "in": 5.0, "out": 50.0},
            {"x": 20.0, "requests": 0.0, "in": 0.0, "out": 0.0},
            {"x": 40.0, "requests": 1.0, "in": 10.0, "out": 100.0},
        ]
        assert detail.rate == views.Rate(25 / 40, 2_750 / 40)


def test_a_chart_of_many_samples_has_few_points(owner: Person) -> None:
    batch = ended(owner, [answer(1, "a")])
    begin = timezone.now()
    with scopes_disabled():
        Sample.objects.bulk_create(
            Sample(batch=batch, at=begin + timedelta(seconds=at), answered=at,
                   input_tokens=0, output_tokens=0)
            for at in range(1_000)
        )  # fmt: skip
        points = orjson.loads(views.Detail(batch, True).chart)
    assert len(points) <= views.POINTS
    assert points[-1]["x"] == 999.0
    assert {point["requests"] for point in points} == {1.0}


# --- Chunks and the log ---------------------------------------------------------------------


def test_chunks_say_who_ran_them_and_how_often(owner: Person, settings: Any) -> None:
    settings.CHUNK_REQUESTS = 2
    batch = jobs.running(owner.caller, 5)
    leases.give_back(jobs.lease("gpu0"))
    jobs.finish(jobs.lease("gpu1"))
    found = [(each.worker, each.leases, each.state) for each in jobs.chunks(batch)]
    assert found == [("gpu1", 2, "done"), ("", 0, "ready"), ("", 0, "ready")]
    [done, *_] = jobs.chunks(batch)
    assert done.leased_at is not None
    assert done.done_at is not None
    assert done.leased_at <= done.done_at
    said = page(owner, batch, "/chunks")
    assert re.findall(r'data-label="Worker">(.+?)<', said) == ["gpu1", "–", "–"]
    assert re.findall(r'data-label="Attempts">(\d+)', said) == ["2", "0", "0"]


def test_chunks_are_paged(owner: Person, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.CHUNK_REQUESTS = 1
    monkeypatch.setattr(views, "CHUNKS", 2)
    batch = jobs.running(owner.caller, 5)
    found, rest = [], "/chunks"
    while rest:
        said = page(owner, batch, rest)
        found.append(re.findall(r"from (\d+) to", said))
        older = re.search(r'href="(\?after=\d+)"', said)
        rest = f"/chunks{older[1]}" if older else ""
    assert found == [["1", "2"], ["3", "4"], ["5"]]


@pytest.mark.parametrize("after", ["-1", "x", "9" * 30, "%00", "²"])
def test_any_after_is_an_answer(owner: Person, after: str) -> None:
    batch = jobs.running(owner.caller, 1)
    for rest in ("chunks", "results"):
        response = owner.browser.get(f"/batches/{batch.pk}/{rest}?after={after}&before={after}")
        assert response.status_code == 200


def test_the_log_tells_its_life(owner: Person, teammate: Person) -> None:
    batch = jobs.running(owner.caller, 2)
    jobs.finish(jobs.lease("gpu7"))
    finalize_batch(batch.pk)
    audit.record("batch.held", actor=owner.caller, target=batch)
    audit.record("batch.held", actor=owner.caller, label="of another")
    what = r'data-label="What"><svg.+?</svg>\s*(.+?)</td>'
    said = page(owner, batch, "/log")
    told = re.findall(what, said, re.S)
    assert told[0] == "batch.held"
    assert sorted(told) == sorted(
        [
            "batch.held",
            "Completed",
            "Finalizing",
            "Finished requests 1 to 2",
            "Began requests 1 to 2",
            "In progress",
            "Created",
        ]
    )
    assert re.findall(r'data-label="By">(gpu.+?)<', said) == ["gpu7", "gpu7"]
    assert "batch.held" not in page(teammate, batch, "/log")  # the audit is not theirs to read


def test_the_log_says_who_cancelled_it(owner: Person, teammate: Person) -> None:
    batch = jobs.running(owner.caller, 1)
    teammate.api.post(f"/v1/batches/{batch.pk}/cancel")
    said = page(owner, batch, "/log")
    assert re.search(r"batch\.cancelled</td>\s*<td data-label=\"By\">teammate@acme\.test<", said)
    with scopes_disabled():
        event = AuditEvent.objects.get(action="batch.cancelled")
    assert (event.via, event.target_id) == ("api_key", batch.pk)
    assert event.changes == {"status": ["in_progress", "cancelling"]}


def test_the_log_warns_of_requests_that_killed_engines(owner: Person) -> None:
    batch = jobs.running(owner.caller, 2)
    leases.accuse(batch.pk, [2])
    assert "line 2 (1 time)" in page(owner, batch, "/log")


# --- Results --------------------------------------------------------------------------------


def test_results_are_listed_in_input_order(owner: Person) -> None:
    batch = ended(owner, [answer(3, "third"), answer(1, "first"), refusal(2)])
    said = page(owner, batch, "/results")
    assert lines(said) == [1, 2, 3]
    assert re.findall(r'<div class="portal-clip">(.+?)</div>', said) == [
        "say 1", "first", "say 2", "It is too_long.", "say 3", "third"
    ]  # fmt: skip
    assert said.count("portal-failed-badge") == 1


@pytest.mark.parametrize("finished", [True, False])
def test_results_are_paged_both_ways(
    finished: bool, owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results_views, "PAGE_SIZE", 2)
    batch = jobs.running(owner.caller, 5)
    saved(batch, [answer(at, "a") for at in range(1, 6)], finished=False)
    if finished:
        jobs.change(batch, status=Status.FINALIZING)
        jobs.change(batch, finalizing_at=timezone.now() - timedelta(minutes=1))
        finalize_batch(batch.pk)
        assert jobs.fresh(batch).results_name
    pages = {rest: page(owner, batch, f"/results{rest}") for rest in ("", "?after=2", "?after=4")}
    assert [lines(said) for said in pages.values()] == [[1, 2], [3, 4], [5]]
    assert [link(said, "Next") for said in pages.values()] == ["?after=2", "?after=4", ""]
    assert [link(said, "Previous") for said in pages.values()] == ["", "?before=3", "?before=5"]
    assert lines(page(owner, batch, "/results?before=5")) == [3, 4]
    assert lines(page(owner, batch, "/results?before=3")) == [1, 2]


@pytest.mark.parametrize("finished", [True, False])
def test_only_what_failed_can_be_listed(
    finished: bool, owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results_views, "PAGE_SIZE", 2)
    found = [refusal(at) if at in (2, 5, 6) else answer(at, "a") for at in range(1, 8)]
    batch = jobs.running(owner.caller, 7)
    saved(batch, found, finished=finished)
    if finished:
        finalize_batch(batch.pk)
    first = page(owner, batch, "/results?failed=on")
    assert (lines(first), link(first, "Next")) == ([2, 5], "?failed=on&after=5")
    second = page(owner, batch, "/results?failed=on&after=5")
    assert (lines(second), link(second, "Next")) == ([6], "")
    assert link(second, "Previous") == "?failed=on&before=6"
    assert lines(page(owner, batch, "/results?failed=on&before=6")) == [2, 5]


def test_a_line_can_be_gone_to_where_blank_lines_shift_the_numbers(owner: Person) -> None:
    requests = [jobs.line(f"say {at}") for at in (1, 4, 6)]
    first, second, third = (orjson.dumps(each) for each in requests)
    content = b"%b\n\n\n%b\n \n%b\n" % (first, second, third)
    batch = jobs.created(owner.caller, content)
    validate_batch(batch.pk)
    saved(batch, [answer(at, f"answer {at}") for at in (1, 4, 6)])
    finalize_batch(batch.pk)
    assert lines(page(owner, batch, "/results")) == [1, 4, 6]
    for asked, shown in ((1, [1, 4, 6]), (2, [4, 6]), (4, [4, 6]), (5, [6]), (7, [])):
        assert lines(page(owner, batch, f"/results?line={asked}")) == shown
    said = page(owner, batch, "/results/4")
    assert re.findall(r'rel="(prev|next)"', said) == ["prev", "next"]
    assert f'href="/batches/{batch.pk}/results/1" rel="prev"' in said
    assert f'href="/batches/{batch.pk}/results/6" rel="next"' in said


def test_a_request_is_shown_beside_its_answer(owner: Person) -> None:
    batch = ended(owner, [answer(1, "Blue.\nAnd <b>grey</b>.")])
    said = owner.browser.get(f"/batches/{batch.pk}/results/1").content.decode()
    assert re.findall(r'<div class="portal-text">(.+?)</div>', said, re.S) == [
        "say 1",
        "Blue.\nAnd &lt;b&gt;grey&lt;/b&gt;.",
    ]
    assert re.findall(r'<div class="portal-said-by">(\w+)', said) == ["user", "assistant"]


@pytest.mark.parametrize("line", ["0", "2", "99999999999", "x", "-1"])
def test_a_line_without_a_result_leads_back_to_the_list(line: str, owner: Person) -> None:
    batch = ended(owner, [answer(1, "a")])
    response = owner.browser.get(f"/batches/{batch.pk}/results/{line}")
    assert (response.status_code, response["Location"]) == (302, f"/batches/{batch.pk}/results")


def test_a_running_batch_shows_what_is_answered_with_its_requests(owner: Person) -> None:
    batch = jobs.running(owner.caller, 5)
    saved(batch, [answer(4, "fourth"), refusal(2)], finished=False)
    assert lines(page(owner, batch, "/results")) == [2, 4]
    said = page(owner, batch, "/results/4")
    assert re.findall(r'<div class="portal-text">(.+?)</div>', said) == ["say 4", "fourth"]


def test_what_was_deleted_is_not_shown(owner: Person) -> None:
    batch = ended(owner, [answer(1, "secret answer"), refusal(2)])
    assert batch.output_file is not None
    files.delete_file(actor=owner.caller, file=batch.output_file)
    files.delete_file(actor=owner.caller, file=batch.input_file)
    assert "too_long" in page(owner, batch)
    said = page(owner, batch, "/results") + page(owner, batch, "/results/1")
    assert "secret answer" not in said
    assert "say 1" not in said
    assert "It is too_long." in said
    files.purge_files()
    assert lines(page(owner, batch, "/results")) == [1, 2]
    assert batch.error_file is not None
    files.delete_file(actor=owner.caller, file=batch.error_file)
    assert "too_long" not in page(owner, batch)


def test_the_list_of_places_goes_with_the_last_of_the_two_files(owner: Person) -> None:
    batch = ended(owner, [answer(1, "a"), refusal(2)])
    made = [batch.output_file, batch.error_file]
    there = []
    for file in made:
        assert file is not None
        files.delete_file(actor=owner.caller, file=file)
        files.purge_files()
        there.append((batch.results_name in jobs.kept(), bool(jobs.fresh(batch).results_name)))
    assert there == [(True, True), (False, False)]
    assert jobs.fresh(batch).error_kinds is None
    assert "There are no results to show" in page(owner, batch, "/results")


def test_a_list_of_places_that_could_not_be_removed_is_removed_by_the_next_sweep(
    owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = ended(owner, [answer(1, "a")])
    assert batch.output_file is not None
    files.delete_file(actor=owner.caller, file=batch.output_file)
    with monkeypatch.context() as patched:
        remove = storage.remove

        def refused(name: str) -> None:
            if name == batch.results_name:
                raise PermissionError(name)
            remove(name)

        patched.setattr(storage, "remove", refused)
        files.purge_files()
    assert batch.results_name in jobs.kept()
    files.purge_files()
    assert (batch.results_name in jobs.kept(), jobs.fresh(batch).results_name) == (False, "")


def test_before_anything_is_answered_the_page_says_so(owner: Person) -> None:
    waiting = jobs.created(owner.caller, jobs.jsonl(jobs.lines(1)))
    assert "There are no results to show yet" in page(owner, waiting, "/results")
    assert "Nothing has been answered yet" in page(owner, jobs.running(owner.caller, 1), "/results")


class Reads:
    """The storage, counting the bytes that are read of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes = 0
        opened = storage.opened
        reads = self

        class Counting:
            def __init__(self, name: str) -> None:
                self.stream = opened(name)

            def __enter__(self) -> Counting:
                return self

            def __exit__(self, *_: Any) -> None:
                self.stream.close()

            def seek(self, offset: int) -> int:
                return self.stream.seek(offset)

            def read(self, size: int = -1) -> bytes:
                data = self.stream.read(size)
                reads.bytes += len(data)
                return data

        monkeypatch.setattr(storage, "opened", Counting)


def test_a_page_reads_its_own_lines_alone(
    owner: Person, monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    """Of files of 8 MB: what is shown, and less than a thousand bytes to find it by."""
    settings.CHUNK_SECONDS = 100_000
    filler = "x" * 20_000
    requests = [jobs.line(f"{at} {filler}", custom_id=str(at)) for at in range(1, 201)]
    batch = ended(owner, [answer(at, f"{at} {filler}") for at in range(1, 201)], requests)
    assert batch.output_file is not None
    assert batch.input_file.bytes + batch.output_file.bytes > 8_000_000
    a_line = (batch.input_file.bytes + batch.output_file.bytes) / 200
    for rest, many in (("/results?after=150", 20), ("/results/170", 1)):
        reads = Reads(monkeypatch)
        said = page(owner, batch, rest)
        assert "170 xxx" in said
        assert reads.bytes < many * a_line * 1.01 + 2_000
        monkeypatch.undo()


def test_of_a_long_line_only_the_beginning_is_shown(
    owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results_views, "SHOWN", 1_000)
    monkeypatch.setattr(results_views, "LISTED", 1_000)
    batch = ended(owner, [answer(1, "x" * 5_000), answer(2, "short")])
    said = page(owner, batch, "/results/1")
    assert "its first 1000\xa0bytes are shown" in said
    assert "x" * 800 in said
    assert "x" * 1_001 not in said
    assert lines(page(owner, batch, "/results")) == [1, 2]


# --- Searching ------------------------------------------------------------------------------


@pytest.mark.parametrize("finished", [True, False])
def test_results_are_searched_in_requests_and_answers(finished: bool, owner: Person) -> None:
    said = {1: "a Needle", 2: "none", 3: "größe", 4: 'with "quotes"\nand lines'}
    requests = [jobs.line(text) for text in ("one", "two", "three needle", "four")]
    batch = jobs.running(owner.caller, requests)
    saved(batch, [answer(at, text) for at, text in said.items()], finished=finished)
    if finished:
        finalize_batch(batch.pk)
    for text, found in (
        ("needle", [1, 3]), ("GRÖSSE", []), ("größe", [3]), ('"quotes"', [4]), ("zz", [])
    ):  # fmt: skip
        shown = lines(page(owner, batch, f"/results?q={text}"))
        assert shown == found, text


def test_a_search_of_what_failed_looks_at_nothing_else(owner: Person) -> None:
    batch = ended(owner, [answer(1, "too_long"), refusal(2)])
    assert lines(page(owner, batch, "/results?q=too_long&failed=on")) == [2]


def test_a_search_ends_after_so_many_bytes_and_can_be_gone_on_with(
    owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "MOST_SEARCHED", 1_000)
    monkeypatch.setattr(results, "AT_ONCE", 500)
    batch = ended(owner, [answer(at, "y" * 300) for at in range(1, 9)] + [answer(9, "needle")])
    rest, seen, stops = "/results?q=needle", list[int](), 0
    while rest:
        said = page(owner, batch, rest)
        seen += lines(said)
        stops += "The search stopped at line" in said
        further = link(said, "Search on")
        rest = f"/results{further}" if further else ""
    assert (seen, stops > 1) == ([9], True)


def test_a_search_finds_a_page_at_a_time(owner: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_views, "PAGE_SIZE", 2)
    batch = ended(owner, [answer(at, "needle") for at in range(1, 4)])
    first = page(owner, batch, "/results?q=needle")
    assert (lines(first), link(first, "Next")) == ([1, 2], "?q=needle&after=2")
    assert lines(page(owner, batch, "/results?q=needle&after=2")) == [3]


# --- Everybody else -------------------------------------------------------------------------


@pytest.mark.parametrize("rest", ["", "/results", "/chunks", "/log", "/clone"])
def test_strangers_find_nothing(rest: str, owner: Person, stranger: Person) -> None:
    batch = ended(owner, [answer(1, "a")])
    assert stranger.browser.get(f"/batches/{batch.pk}{rest}").status_code == 404
    response = Client().get(f"/batches/{batch.pk}{rest}")
    assert response["Location"] == f"/accounts/login/?next=/batches/{batch.pk}{rest}"


def test_other_methods_are_405(owner: Person) -> None:
    for rest in ("", "/results", "/results/1", "/chunks", "/log"):
        assert owner.browser.post(f"/batches/batch_0{rest}").status_code == 405
    for rest in ("/retry", "/cancel"):
        assert owner.browser.get(f"/batches/batch_0{rest}").status_code == 405


def test_nothing_needs_an_inline_exception_of_the_policy(owner: Person) -> None:
    batch = ended(owner, [answer(1, "a"), refusal(2)])
    for rest in ("", "/results", "/results/1", "/chunks", "/log", "/clone"):
        said = owner.browser.get(f"/batches/{batch.pk}{rest}").content.decode()
        found = r"\sstyle=|<style|\son\w+=|<script(?! src=|[^>]*/json)|https?://(?!www.w3)"
        assert re.findall(found, said) == [], rest


def test_deleting_a_batchs_organization_takes_its_samples_along(owner: Person) -> None:
    batch = jobs.running(owner.caller, 1)
    jobs.lease()
    progress.sample()
    assert len(sampled(batch)) == 1
    with scopes_disabled():
        Chunk.objects.filter(batch=batch).delete()
        batch.delete()
        assert Sample.objects.count() == 0


def test_a_message_says_when_retrying_is_not_possible(owner: Person) -> None:
    batch = jobs.running(owner.caller, 1)
    response = owner.browser.post(f"/batches/{batch.pk}/retry")
    assert response["Location"] == f"/batches/{batch.pk}"
    said = [str(message) for message in get_messages(response.wsgi_request)]
    assert said == ["The batch is not finished: what fails can be retried when it is."]
