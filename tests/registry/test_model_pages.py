"""The pages of models: what is offered, to whom, in which state, and the box to try one."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from math import inf
from pathlib import Path
from typing import Any

import orjson
import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django_scopes import scopes_disabled

from accounts.models import Quota, Reservation
from batches import lane, policy
from batches.lane import Request
from batches.queries import queue as queries
from models_registry.fit import context_of
from models_registry.models import Measurement, Model
from models_registry.services import note_failure, register_model
from tests.batches.test_batch_pages import HTMX
from tests.conftest import Person
from tests.lane import empty_lane, valkey  # noqa: F401 a fixture

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("wakeups_sent", "empty_lane")]

ASKED = {"prompt": "Why?", "most_tokens": "16"}


def rows(response: Any) -> dict[str, list[str]]:
    """The cells of each line of the table, by the model's name."""
    found = {}
    for line in re.findall(r"<tr>\s*<td><a.*?</tr>", response.content.decode(), re.S):
        cells = [
            " ".join(re.sub("<.*?>", " ", cell).split())
            for cell in re.findall(r"<td.*?</td>", line, re.S)
        ]
        found[cells[0]] = cells[1:]
    return found


def seen(monkeypatch: pytest.MonkeyPatch, *workers: policy.Worker) -> None:
    """These workers are alive."""
    monkeypatch.setattr(queries, "_see_workers", [lambda: list(workers)])


def answer(text: str, **more: Any) -> bytes:
    choice = {"message": {"content": text}, "finish_reason": "stop"} | more
    usage = {"prompt_tokens": 5, "completion_tokens": 1234}
    return orjson.dumps({"choices": [choice], "usage": usage})


@contextmanager
def worker(model: str, body: bytes, status: int = 200) -> Iterator[list[Request]]:
    """Somebody who has the model ready and answers one request with this; yields what was asked."""
    taken: list[Request] = []

    def serve() -> None:
        with valkey() as server:
            popped = server.blpop([lane.queue_of(model)], timeout=20)
            assert popped is not None
            id = popped[1].decode()
            taken.append(Request.decoded(server.getdel(lane.request_of(id))))
            frames = [lane.ALIVE.encoded(), lane.answer(status, body).encoded()]
            server.rpush(lane.reply_of(id), *frames)

    with valkey() as server:
        server.set(lane.ready_of(model), 1, ex=20)
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield taken
    finally:
        thread.join(30)


# --- What is offered ------------------------------------------------------------------------


def test_the_list_has_what_is_offered_to_the_organization(
    owner: Person, reviewer: Person, stranger: Person, echo: Model
) -> None:
    register_model(
        name="team/own", source="none", engine="instant", organizations=[owner.caller.organization]
    )
    for person in (owner, reviewer):
        assert list(rows(person.browser.get("/models"))) == ["echo", "team/own"]
    assert list(rows(stranger.browser.get("/models"))) == ["echo"]
    assert stranger.browser.get("/models/team/own").status_code == 404
    assert owner.browser.get("/models/team/own").status_code == 200


def test_a_line_says_context_speed_price_and_state(owner: Person, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 40960}')
    model = register_model(
        name="vendor/chat",
        source=str(tmp_path),
        input_price=Decimal("0.5"),
        output_price=Decimal("1.125"),
    )
    Measurement.objects.create(model=model, gpu="A", tokens_per_second=900)
    Measurement.objects.create(model=model, gpu="B", tokens_per_second=21_000.4, load_seconds=75)
    register_model(name="new", source="none", engine="instant", engine_args={"max_model_len": 4096})
    assert rows(owner.browser.get("/models")) == {
        "vendor/chat": [
            "Chat",
            "40,960 tokens",
            "21,000 tokens/s",
            "0.50 USD in, 1.125 USD out",
            "Loads when needed",
        ],
        "new": ["Chat", "4,096 tokens", "not measured yet", "free", "Loads when needed"],
    }


def test_the_state_is_where_workers_have_it(owner: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("loaded", "loading", "asleep", "failed", "idle"):
        register_model(name=name, source="none", engine="instant")
    note_failure("failed", why="a path of the server's")
    seen(
        monkeypatch,
        policy.Worker("a", model="loaded", asleep=frozenset({"asleep", "loaded"})),
        policy.Worker("b", model="loading", since=inf),
    )
    states = {name: cells[-1] for name, cells in rows(owner.browser.get("/models")).items()}
    assert states == {
        "asleep": "Asleep",
        "failed": "Could not be loaded",
        "idle": "Loads when needed",
        "loaded": "Loaded",
        "loading": "Loading",
    }
    assert "a path" not in owner.browser.get("/models/failed").content.decode()
    assert "on 1 worker<" in owner.browser.get("/models/loaded").content.decode()


def test_the_lists_queries_do_not_grow_with_its_rows(owner: Person) -> None:
    def count() -> int:
        client = owner.browser
        with CaptureQueriesContext(connection) as found:
            assert client.get("/models").status_code == 200
        return len(found)

    def more(name: str) -> None:
        model = register_model(name=name, source="none", engine="instant")
        Measurement.objects.create(model=model, gpu="A", tokens_per_second=900)

    more("a")
    one = count()
    more("b")
    more("c")
    assert count() == one


def test_without_a_model_the_page_says_what_to_do(owner: Person) -> None:
    assert "No model is offered to you yet" in owner.browser.get("/models").content.decode()


@pytest.mark.parametrize("text", ["[]", "{", '{"max_position_embeddings": "long"}', "null"])
def test_a_context_that_no_folder_says_is_not_known(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert context_of(str(tmp_path)) is None
    assert context_of(str(tmp_path / "none")) is None


# --- Trying one -----------------------------------------------------------------------------


def test_a_question_is_answered(owner: Person, echo: Model) -> None:
    with worker("echo", answer("<b>because</b>")) as taken:
        response = owner.browser.post("/models/echo", ASKED)
    content = response.content.decode()
    assert response.status_code == 200
    assert '<pre class="portal-tried" tabindex="0">&lt;b&gt;because&lt;/b&gt;</pre>' in content
    assert "5 tokens in, 1,234 out" in content
    assert ">\nWhy?</textarea>" in content
    (request,) = taken
    assert orjson.loads(request.body) == {
        "model": "echo",
        "messages": [{"role": "user", "content": "Why?"}],
        "max_tokens": 16,
    }
    with scopes_disabled():  # the worker settles it, as any real-time request
        assert Reservation.objects.get().user == owner.user


def test_htmx_gets_only_the_box(owner: Person, echo: Model) -> None:
    with worker("echo", answer("because")):
        response = owner.browser.post("/models/echo", ASKED, headers=HTMX)
    assert response.content.decode().strip().startswith('<section class="card" id="try"')
    assert "because" in response.content.decode()


def test_what_the_engine_refuses_is_said(owner: Person, echo: Model) -> None:
    said = orjson.dumps({"error": {"message": "The prompt is too long."}})
    with worker("echo", said, status=400):
        response = owner.browser.post("/models/echo", ASKED)
    assert response.status_code == 400
    assert "The prompt is too long." in response.content.decode()


def test_a_model_that_is_not_loaded_says_how_long_to_wait(
    owner: Person, echo: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    Measurement.objects.create(model=echo, gpu="", load_seconds=40)
    seen(monkeypatch, policy.Worker("a"))
    response = owner.browser.post("/models/echo", ASKED)
    assert response.status_code == 503
    content = response.content.decode()
    assert "a free worker loads it now, which takes about 40 s." in content
    assert "Try again in about 40 s; what you typed stays here." in content
    assert ">\nWhy?</textarea>" in content
    with scopes_disabled():
        assert not Reservation.objects.exists()
    part = owner.browser.post("/models/echo", ASKED, headers=HTMX)
    assert part.status_code == 200  # HTMX puts in place what is good
    assert "Try again in about 40 s" in part.content.decode()


def test_the_months_limit_holds(owner: Person, echo: Model) -> None:
    with scopes_disabled():
        Quota.objects.create(organization=owner.caller.organization, tokens_per_month=1)
    response = owner.browser.post("/models/echo", ASKED)
    assert response.status_code == 429
    assert "tokens a month" in response.content.decode()


def test_calls_are_counted_against_the_minute(
    owner: Person, echo: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen(monkeypatch, policy.Worker("a"))
    with scopes_disabled():
        Quota.objects.create(organization=owner.caller.organization, requests_per_minute=1)
    found = [owner.browser.post("/models/echo", ASKED).status_code for _ in range(2)]
    assert found == [503, 429]


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt": "", "most_tokens": "16"},
        {"prompt": "Why?", "most_tokens": "0"},
        {"prompt": "Why?", "most_tokens": "1e9"},
        {"prompt": "x" * 20_001, "most_tokens": "16"},
    ],
)
def test_bad_input_is_refused_and_kept(owner: Person, echo: Model, bad: dict[str, str]) -> None:
    response = owner.browser.post("/models/echo", bad)
    assert response.status_code == 400
    assert bad["prompt"] in response.content.decode()


def test_who_may_not_call_models_has_no_box(viewer: Person, owner: Person, echo: Model) -> None:
    assert 'id="try"' in owner.browser.get("/models/echo").content.decode()
    assert 'id="try"' not in viewer.browser.get("/models/echo").content.decode()
    assert viewer.browser.post("/models/echo", ASKED).status_code == 403


def test_only_chat_models_have_a_box(owner: Person) -> None:
    register_model(name="embed", source="none", engine="instant", task="embedding")
    assert 'id="try"' not in owner.browser.get("/models/embed").content.decode()
    assert owner.browser.post("/models/embed", ASKED).status_code == 400


def test_a_strangers_model_cannot_be_asked(owner: Person, stranger: Person) -> None:
    register_model(
        name="own", source="none", engine="instant", organizations=[owner.caller.organization]
    )
    assert stranger.browser.post("/models/own", ASKED).status_code == 404
    assert stranger.browser.get("/models/%00").status_code == 404
