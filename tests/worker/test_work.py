"""A chunk in a worker's hands: what is read of it, and the lines that come of it."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import orjson
import pytest

from batches import storage
from batches.services import leases
from batches.services.leases import Lease
from tests import jobs
from tests.conftest import Person
from worker import work
from worker.engines.base import Answer, Usage
from worker.work import ALONE_AFTER, GIVEN_UP_AFTER, Request, Work

LEASE = Lease(1, 1, 0, 0, 3, "batch_1", "/v1/chat/completions", "echo", "input", "index")
database = pytest.mark.django_db
stored = pytest.mark.usefixtures("own_storage", "wakeups_sent", "echo")


def request(line: int = 1, deaths: int = 0) -> Request:
    return Request(line, b'{"custom_id": "mine", "body": {}}', deaths)


def of(*requests: Request) -> Work:
    return Work(LEASE, deque(requests), deque())


# --- Reading --------------------------------------------------------------------------------


@database
@stored
def test_a_chunk_is_read_in_execution_order(owner: Person, settings: Any) -> None:
    settings.CHUNK_REQUESTS = 3
    long = {name: name * 3_000 for name in "ab"}
    said = [long["a"] + "1", long["b"] + "1", long["a"] + "2", long["b"] + "2"]
    lines = [jobs.line(text, custom_id=str(at)) for at, text in enumerate(said, 1)]
    jobs.running(owner.caller, lines)
    taken = [jobs.read(jobs.lease()), jobs.read(jobs.lease())]
    assert [[each.line for each in one.todo] for one in taken] == [[1, 3, 2], [4]]
    assert [orjson.loads(each.text) for each in taken[0].todo] == [lines[0], lines[2], lines[1]]


@database
@stored
def test_what_is_saved_is_not_read_again(owner: Person) -> None:
    jobs.running(owner.caller, 4)
    lease = jobs.lease()
    leases.save(lease=lease, outcomes=[jobs.outcome(2), jobs.outcome(4)], finished=False)
    leases.give_back(lease)
    again = jobs.read(jobs.lease())
    assert [each.line for each in again.todo] == [1, 3]
    assert (again.finished, again.all_run) == ([], False)


@database
@stored
def test_suspects_wait_for_their_trial_and_the_guilty_are_told(owner: Person) -> None:
    jobs.running(owner.caller, 5)
    lease = jobs.lease()
    leases.give_back(lease)
    for line, deaths in ((1, 1), (2, ALONE_AFTER), (3, GIVEN_UP_AFTER), (4, GIVEN_UP_AFTER + 1)):
        for _ in range(deaths):
            leases.accuse(lease.batch_id, [line])
    taken = jobs.read(jobs.lease())
    assert [(each.line, each.deaths) for each in taken.todo] == [(1, 1), (5, 0)]
    assert [(each.line, each.deaths) for each in taken.alone] == [(2, 3), (3, 4)]
    assert [outcome.line for outcome in taken.finished] == [4]


@database
@stored
def test_a_chunk_whose_owners_died_is_run_one_by_one(owner: Person) -> None:
    jobs.running(owner.caller, 3)
    for _ in range(ALONE_AFTER):
        jobs.expire_lease(jobs.lease().chunk_id)
        leases.release_expired()
    taken = jobs.read(jobs.lease())
    assert (len(taken.todo), [each.line for each in taken.alone]) == (0, [1, 2, 3])


@database
@stored
@pytest.mark.parametrize("kind", ["input", "index"])
def test_a_file_that_is_cut_short_is_an_error_and_no_smaller_chunk(
    owner: Person, own_storage: Path, kind: str
) -> None:
    batch = jobs.running(owner.caller, 3)
    name = batch.input_file.storage_name if kind == "input" else batch.index_name
    whole = (own_storage / name).read_bytes()
    # 20 bytes are a record of the index, and less than a line of the input.
    (own_storage / name).write_bytes(whole[:-20])
    with pytest.raises(OSError, match="shorter than"):
        jobs.read(jobs.lease())


@database
@stored
def test_a_file_that_is_gone_is_an_error(owner: Person) -> None:
    batch = jobs.running(owner.caller, 3)
    storage.remove(batch.index_name)
    with pytest.raises(OSError, match="No such file"):
        jobs.read(jobs.lease())


# --- Bookkeeping ----------------------------------------------------------------------------


def test_all_is_run_when_nothing_waits_and_nothing_flies() -> None:
    empty, waiting = of(), of(request())
    flying, alone = of(), of()
    flying.flying[1] = None  # type: ignore[assignment]
    alone.alone.append(request())
    assert [each.all_run for each in (empty, waiting, flying, alone)] == [True] + [False] * 3


def test_of_a_dropped_chunk_only_what_flies_is_waited_for() -> None:
    dropped = of(request())
    dropped.alone.append(request(2))
    dropped.drop()
    assert (dropped.all_run, dropped.waiting, dropped.lost) == (True, 0, False)
    dropped.drop(lost=True)
    dropped.drop()
    assert dropped.lost


def test_what_is_finished_is_taken_in_order_and_once() -> None:
    one = of()
    for line in range(5):
        one.record(jobs.outcome(line))
    assert [each.line for each in one.take_finished(3)] == [0, 1, 2]
    assert [each.line for each in one.take_finished(3)] == [3, 4]
    assert one.take_finished(3) == []


def test_a_suspect_is_put_back_to_run_alone() -> None:
    one = of(request(9))
    one.put_back(request(1, deaths=ALONE_AFTER - 1))
    one.put_back(request(2, deaths=ALONE_AFTER))
    assert [each.line for each in one.todo] == [1, 9]
    assert [each.line for each in one.alone] == [2]


# --- Lines ----------------------------------------------------------------------------------


def test_an_answer_is_a_line_of_the_output_file() -> None:
    answer = Answer(200, b'{"id":"x","n":1.50}', Usage(input=3, cached=1, output=2, reasoning=1))
    outcome = work.answered(request(7), "mine", answer, 0.25)
    line = orjson.loads(outcome.payload)
    assert line == {
        "id": line["id"],
        "custom_id": "mine",
        "response": {
            "status_code": 200,
            "request_id": line["response"]["request_id"],
            "body": {"id": "x", "n": 1.5},
        },
        "error": None,
    }
    assert line["id"].startswith("batch_req_")
    assert line["response"]["request_id"].startswith("req_")
    assert outcome.payload.endswith(b'{"id":"x","n":1.50}},"error":null}\n')
    assert (outcome.line, outcome.ok) == (7, True)
    tokens = (outcome.input, outcome.cached, outcome.output, outcome.reasoning)
    assert (tokens, outcome.gpu_seconds) == ((3, 1, 2, 1), 0.25)


@pytest.mark.parametrize(("status", "ok"), [(200, True), (399, True), (400, False), (500, False)])
def test_an_answer_of_an_error_is_no_success(status: int, ok: bool) -> None:
    assert work.answered(request(), "mine", Answer(status, b"{}"), 0.0).ok is ok


@pytest.mark.parametrize(
    ("make", "code"), [(work.failed, "engine_error"), (work.crashed, "engine_crashed")]
)
def test_a_request_without_an_answer_is_a_line_of_the_error_file(make: Any, code: str) -> None:
    outcome = make(request(7))
    line = orjson.loads(outcome.payload)
    assert (line["custom_id"], line["response"]) == ("mine", None)
    assert line["error"]["code"] == code
    assert (outcome.line, outcome.ok, outcome.input, outcome.output) == (7, False, 0, 0)
    assert outcome.payload.count(b"\n") == 1
