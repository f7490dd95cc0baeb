"""The pages of a new batch, as a browser without scripts asks for them and as `upload.js` does.

What comes of tables is tested in `test_conversion.py`, and the whole way in `tests/e2e/`.
"""

from __future__ import annotations

import io
import re
from datetime import UTC, datetime
from typing import Any

import orjson
import pyarrow as pa
import pytest
import time_machine
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import Client
from django_scopes import scopes_disabled
from pyarrow import parquet

from accounts.models import Project, Quota
from accounts.services import projects
from accounts.services.limits import set_limits
from batches.models import Batch, File, FileCheck
from batches.models.files import CheckState
from batches.services import checks
from batches.services.validation import validate_batch
from models_registry.models import Model, Task
from models_registry.services import register_model
from tests.batches.conftest import Disk
from tests.conftest import PASSWORD, Person
from tests.jobs import content as lines_in
from tests.jobs import jsonl, lines, stored
from tests.wire import CHAT, line

SCRIPT = {"accept": "application/json"}
TABLE = b"question,topic\nWhy?,sky\nHow?,sea\n"


@pytest.fixture(autouse=True)
def _disk(disk: Disk, wakeups_sent: list[tuple[str, ...]]) -> None:
    """A storage of the test's own, and nobody who is woken."""


def send(
    client: Client, content: bytes, name: str = "in.jsonl", project: str = "", **options: Any
) -> Any:
    form: dict[str, Any] = {"file": SimpleUploadedFile(name, content)}
    if project:
        form["project"] = project
    return client.post("/batches/new", form, **options)


def checked(person: Person, content: bytes) -> str:
    """The path of the page of a file that was sent and checked."""
    response = send(person.browser, content)
    assert response.status_code == 302, response.content
    return str(response["Location"])


def table(person: Person, content: bytes = TABLE, name: str = "asked.csv") -> str:
    response = send(person.browser, content, name)
    assert response.status_code == 302, response.content
    return str(response["Location"])


def made(person: Person) -> list[Batch]:
    with scopes_disabled():
        mine = Batch.objects.filter(organization=person.caller.organization)
        return list(mine.select_related("input_file"))


def files() -> list[tuple[str, str, int | None]]:
    with scopes_disabled():
        return list(File.objects.order_by("pk").values_list("filename", "purpose", "lines"))


def errors(response: Any) -> list[str]:
    """What the page complains of."""
    found = re.findall(
        r'role="alert"[^>]*>([^<]+)<|_error">\s*(?:<div>)?([^<]+)<', response.content.decode()
    )
    return [(first or second).strip() for first, second in found]


RECIPE = {"prompt": "{{question}}", "model": "echo", "endpoint": CHAT}
HOW = {"priority": "high", "completion_window": "24h"}


# --- A file ---------------------------------------------------------------------------------


def test_a_good_file_becomes_a_batch(owner: Person, echo: Model) -> None:
    page = checked(owner, jsonl(lines(3)))
    shown = owner.browser.get(page).content.decode()
    assert "Every line is good" in shown
    assert "nobody has measured yet" in shown
    given = HOW | {"output_days": "2", "key_0": "team", "value_0": "search", "key_9": "empty"}
    response = owner.browser.post(page, given)
    [batch] = made(owner)
    assert (response.status_code, response["Location"]) == (302, f"/batches/{batch.pk}")
    assert batch.endpoint == CHAT
    assert (batch.priority, batch.completion_window) == (1, "24h")
    assert batch.metadata == {"team": "search", "empty": ""}
    assert batch.output_expires_after_seconds == 2 * 86_400
    assert (batch.user, batch.api_key) == (owner.user, None)
    validate_batch(batch.pk)
    assert made(owner)[0].total == 3
    assert files() == [("in.jsonl", "batch", 3)]


def test_bad_lines_are_listed_with_their_reasons_and_nothing_is_made(
    owner: Person, echo: Model
) -> None:
    content = b"\n".join([line("a"), b"{", line("a"), line("b", url="/v1/x"), b'{"a": "<b>"}'])
    page = checked(owner, content)
    shown = owner.browser.get(page).content.decode()
    rows = re.findall(r'data-label="Line">(.+?)<.+?wrong">(.+?)<', shown, re.S)
    assert [(line, said[:20]) for line, said in rows] == [
        ("2", "The line is not vali"),
        ("3", "The custom_id &#x27;"),
        ("4", "url is &#x27;/v1/x&#"),
        ("5", "custom_id is missing"),
    ]
    assert "4 problems in 5 requests" in shown
    assert "Start the batch" not in shown
    refused = owner.browser.post(page, HOW)
    assert refused.status_code == 400
    assert made(owner) == []


def test_a_thousand_bad_lines_are_counted_and_a_hundred_listed(owner: Person) -> None:
    page = checked(owner, b"{\n" * 1000)
    shown = owner.browser.get(page).content.decode()
    assert shown.count('data-label="Line"') == checks.LISTED
    assert "and 900 more" in shown


def test_a_model_that_is_not_offered_is_found_once_it_is(owner: Person) -> None:
    page = checked(owner, line())
    assert "There is no model" in owner.browser.get(page).content.decode()
    register_model(name="echo", source="none", engine="instant")
    assert owner.browser.post(f"{page}/check")["Location"] == page
    assert "Every line is good" in owner.browser.get(page).content.decode()


def test_what_it_costs_is_said_by_the_models_prices(owner: Person, echo: Model) -> None:
    Model.objects.update(input_price=1_000_000, output_price=2_000_000)
    page = checked(owner, jsonl(lines(2)))
    with scopes_disabled():
        check = FileCheck.objects.get()
    assert (check.input_tokens > 0, check.output_tokens) == (True, 2 * 256)
    cost = check.input_tokens + 2 * check.output_tokens
    assert f"{cost:,.4f} USD" in owner.browser.get(page).content.decode()


def test_a_measured_model_tells_when_each_priority_would_be_done_if_there_is_a_worker(
    owner: Person, echo: Model
) -> None:
    Model.objects.update(tokens_per_second=100.0)
    shown = owner.browser.get(checked(owner, line())).content.decode()
    assert re.findall(r"<li>(\w+) priority: (unknown when)", shown) == [
        ("High", "unknown when"),
        ("Normal", "unknown when"),
        ("Low", "unknown when"),
    ]


def test_a_large_file_is_checked_by_the_cpu_queue_while_the_page_asks_for_its_progress(
    owner: Person,
    echo: Model,
    monkeypatch: pytest.MonkeyPatch,
    wakeups_sent: list[tuple[str, ...]],
    django_capture_on_commit_callbacks: Any,
) -> None:
    monkeypatch.setattr(checks, "AT_ONCE_BYTES", 10)
    with django_capture_on_commit_callbacks(execute=True):
        page = checked(owner, line())
    [id] = [sent[1] for sent in wakeups_sent if sent[0] == "batches.tasks.check"]
    shown = owner.browser.get(page)
    assert 'hx-trigger="every 3s"' in shown.content.decode()
    with scopes_disabled():
        size = File.objects.get().bytes
        FileCheck.objects.update(bytes_read=size // 2 + 1)
    htmx = {"hx-request": "true"}
    part = owner.browser.get(page, headers=htmx).content.decode()
    assert part.strip().startswith("<section")
    assert 'value="50"' in part
    assert owner.browser.post(page, HOW).status_code == 400
    checks.run_check(id)
    assert owner.browser.get(page, headers=htmx)["HX-Refresh"] == "true"
    assert "Every line is good" in owner.browser.get(page).content.decode()
    with scopes_disabled():
        before = FileCheck.objects.get().done_at
        checks.run_check(id)  # a wake-up that comes twice
        assert FileCheck.objects.get().done_at == before


def test_a_lost_wakeup_is_sent_again(
    owner: Person,
    monkeypatch: pytest.MonkeyPatch,
    wakeups_sent: list[tuple[str, ...]],
    django_capture_on_commit_callbacks: Any,
) -> None:
    monkeypatch.setattr(checks, "AT_ONCE_BYTES", 10)
    checked(owner, line())
    wakeups_sent.clear()
    with django_capture_on_commit_callbacks(execute=True), scopes_disabled():
        checks.repeat_wakeups()
        FileCheck.objects.update(state=CheckState.DONE)
        checks.repeat_wakeups()
    assert [sent[0] for sent in wakeups_sent] == ["batches.tasks.check"]


def test_a_file_that_is_here_already_is_taken_after_a_check(owner: Person, echo: Model) -> None:
    file = stored(owner.caller, line())
    assert file.filename in owner.browser.get("/batches/new").content.decode()
    assert (
        "has not been checked yet" in owner.browser.get(f"/batches/new/{file.pk}").content.decode()
    )
    response = owner.browser.post("/batches/new", {"file_id": file.pk})
    assert response["Location"] == f"/batches/new/{file.pk}"
    assert "Every line is good" in owner.browser.get(response["Location"]).content.decode()


def test_only_what_a_batch_can_be_made_of_is_offered_and_only_ones_own(
    owner: Person, stranger: Person
) -> None:
    stored(stranger.caller, line())
    stored(owner.caller, b"picture", purpose="vision")
    assert "<option" not in owner.browser.get("/batches/new").content.decode()
    of_batch = stored(owner.caller, b"x", purpose="vision")
    response = owner.browser.post("/batches/new", {"file_id": of_batch.pk})
    assert (response.status_code, len(errors(response))) == (400, 1)


def test_a_strangers_file_is_not_taken(owner: Person, stranger: Person) -> None:
    file = stored(stranger.caller, line())
    response = owner.browser.post("/batches/new", {"file_id": file.pk})
    assert response.status_code == 404
    with scopes_disabled():
        assert FileCheck.objects.count() == 0


# --- Its project ----------------------------------------------------------------------------


@pytest.fixture
def research(owner: Person) -> Project:
    return projects.create_project(actor=owner.caller, name="Research")


def chosen_on(response: Any) -> list[str]:
    """The projects that are offered, the chosen one with a star."""
    found = re.findall(
        r'<option value="proj_\w+"( selected)?>(\w+)</option>', response.content.decode()
    )
    return [f"{name}*" if chosen else name for chosen, name in found]


def test_a_single_project_is_no_choice(owner: Person, echo: Model) -> None:
    page = checked(owner, line())
    for path in ("/batches/new", page):
        assert 'name="project"' not in owner.browser.get(path).content.decode()
    owner.browser.post(page, HOW)
    assert made(owner)[0].project_id == owner.caller.project.pk


def test_a_batch_is_made_in_the_chosen_project_at_first_its_files(
    owner: Person, echo: Model, research: Project
) -> None:
    assert chosen_on(owner.browser.get("/batches/new")) == ["Default*", "Research"]
    in_default = checked(owner, line("a"))
    assert chosen_on(owner.browser.get(in_default)) == ["Default*", "Research"]
    sent = send(owner.browser, line("b"), project=research.pk)
    assert chosen_on(owner.browser.get(sent["Location"])) == ["Default", "Research*"]

    owner.browser.post(in_default, HOW | {"project": research.pk})
    owner.browser.post(in_default, HOW | {"project": owner.caller.project.pk})
    owner.browser.post(in_default, HOW)
    usual = owner.caller.project.pk
    ids = [each.project_id for each in sorted(made(owner), key=lambda each: each.pk)]
    assert ids == [research.pk, usual, usual]


def test_what_is_made_of_a_table_is_in_its_project(
    owner: Person, echo: Model, research: Project
) -> None:
    path = send(owner.browser, TABLE, "asked.csv", project=research.pk)["Location"]
    response = owner.browser.post(path, RECIPE | {"make": "1"})
    with scopes_disabled():
        ids = set(File.objects.values_list("project", flat=True))
    assert ids == {research.pk}
    assert chosen_on(owner.browser.get(response["Location"])) == ["Default", "Research*"]


def test_others_projects_and_archived_ones_are_refused(
    owner: Person, stranger: Person, echo: Model, research: Project
) -> None:
    page = checked(owner, line())
    old = projects.create_project(actor=owner.caller, name="Old")
    projects.archive_project(actor=owner.caller, project=old)
    before = files()
    for project in (stranger.caller.project, old):
        refused = owner.browser.post(page, HOW | {"project": project.pk})
        assert (refused.status_code, len(errors(refused))) == (400, 1)
        uploaded = send(owner.browser, line(), project=project.pk)
        assert uploaded.status_code == 404
        assert errors(uploaded)[0].startswith("No such project")
        script = send(owner.browser, line(), project=project.pk, headers=SCRIPT)
        assert script.status_code == 404
    assert (made(owner), files()) == ([], before)


# --- What is refused, in the API's words -------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("in.txt", b"x", "A batch is made of a .jsonl file"),
        ("in.jsonl", b"", "The file is empty."),
    ],
)
def test_a_refused_file_is_told_on_the_page_and_to_scripts(
    name: str, content: bytes, said: str, owner: Person
) -> None:
    response = send(owner.browser, content, name)
    assert response.status_code == 400
    assert errors(response)[0].startswith(said)
    answer = send(owner.browser, content, name, headers=SCRIPT)
    assert (answer.status_code, answer.json()["error"][: len(said)]) == (400, said)
    assert files() == []


def test_scripts_are_told_where_to_go(owner: Person, echo: Model) -> None:
    answer = send(owner.browser, line(), headers=SCRIPT).json()
    with scopes_disabled():
        assert answer == {"url": f"/batches/new/{File.objects.get().pk}"}


def test_nothing_chosen_is_said(owner: Person) -> None:
    response = owner.browser.post("/batches/new", {})
    assert (response.status_code, errors(response)) == (400, ["Choose a file."])


def test_the_limits_are_those_of_the_api(owner: Person, settings: Any) -> None:
    settings.MAX_BATCH_FILE_BYTES = 10
    response = send(owner.browser, line())
    size = len(line())
    said = f"The file has {size:,} bytes; for purpose &#x27;batch&#x27; the limit is 10."
    assert (response.status_code, errors(response)) == (413, [said])


def test_a_body_that_is_too_large_is_refused_by_its_length_alone(
    owner: Person, settings: Any
) -> None:
    settings.MAX_FILE_BYTES = 0
    settings.DATA_UPLOAD_MAX_MEMORY_SIZE = 10
    response = send(owner.browser, b"x" * 100_000, headers=SCRIPT)
    assert response.status_code == 413
    assert response.json()["error"] == "At most 65,536 bytes are taken here."


def test_a_full_quota_is_said_in_words(owner: Person, settings: Any) -> None:
    set_limits(actor=None, organization=owner.caller.organization, storage_bytes=10)
    response = send(owner.browser, line())
    assert response.status_code == 429
    assert errors(response)[0].startswith("Your organization&#x27;s limit is 10 bytes of files")


@pytest.mark.parametrize("path", ["/batches/new", "/files"])
def test_a_file_without_the_forms_token_is_refused(path: str, owner: Person) -> None:
    client = Client(enforce_csrf_checks=True)
    client.login(username=owner.user.email, password=PASSWORD)
    client.cookies = owner.browser.cookies
    file = SimpleUploadedFile("in.jsonl", line())
    assert client.post(path, {"file": file}).status_code == 403
    assert files() == []
    token = re.search(r'csrfmiddlewaretoken" value="(\w+)"', client.get(path).content.decode())
    assert token
    given = {"file": SimpleUploadedFile("in.jsonl", line()), "csrfmiddlewaretoken": token[1]}
    assert client.post(path, given | {"purpose": "batch"}).status_code == 302


def test_who_may_only_look_makes_nothing(viewer: Person, owner: Person) -> None:
    page = checked(owner, line())
    for response in (
        send(viewer.browser, line()),
        viewer.browser.get("/batches/new"),
        viewer.browser.post(page, HOW),
        viewer.browser.post(f"{page}/check"),
    ):
        assert response.status_code == 403
    assert "/batches/new" not in viewer.browser.get("/batches").content.decode()
    assert "/batches/new" in owner.browser.get("/batches").content.decode()


# --- How to run it ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"completion_window": "soon"}, "completion_window must be a number of hours"),
        ({"output_days": "31"}, "Ensure this value is less than or equal to 30."),
        ({"value_0": "lonely"}, "Name the value."),
        ({"key_0": "twice", "value_0": "1", "key_1": "twice"}, "This key is given twice."),
        ({"priority": "highest"}, "Select a valid choice."),
    ],
)
def test_a_wrong_field_is_named_and_what_was_typed_stays(
    given: dict[str, str], said: str, owner: Person, echo: Model
) -> None:
    page = checked(owner, line())
    response = owner.browser.post(page, HOW | {"key_3": "kept"} | given)
    assert response.status_code == 400
    assert any(each.startswith(said) for each in errors(response))
    shown = response.content.decode()
    assert 'value="kept"' in shown
    assert "<details open" in shown
    assert made(owner) == []


def test_batches_and_files_made_here_count_against_the_minute_as_those_of_programs(
    owner: Person, echo: Model
) -> None:
    limits = {"batches_per_minute": 1, "files_per_minute": 3}
    with scopes_disabled():
        Quota.objects.create(organization=owner.caller.organization, **limits)
    with time_machine.travel(datetime.now(UTC), tick=False):  # no minute ends meanwhile
        page, asked = checked(owner, jsonl(lines(1))), table(owner)
        assert [owner.browser.post(page, HOW).status_code for _ in range(2)] == [302, 429]
        again = f"/batches/{made(owner)[0].pk}/clone"
        assert owner.browser.post(again, HOW).status_code == 400
        make = RECIPE | {"make": "1"}
        assert [owner.browser.post(asked, make).status_code for _ in range(2)] == [302, 400]
        assert send(owner.browser, jsonl(lines(1))).status_code == 429
        sent = {"file": SimpleUploadedFile("in.jsonl", jsonl(lines(1)))}
        assert owner.browser.post("/files", sent).status_code == 429
        chosen = f"file_id={page.rsplit('/', 1)[-1]}"  # as a browser sends a form without a file
        form = "application/x-www-form-urlencoded"
        taken = owner.browser.post("/batches/new", chosen, content_type=form)
        assert taken.status_code == 302
    assert len(made(owner)) == 1
    assert len(files()) == 3


def test_too_many_batches_at_once_are_refused_in_words(owner: Person, echo: Model) -> None:
    page = checked(owner, line())
    set_limits(actor=None, organization=owner.caller.organization, concurrent_batches=0)
    response = owner.browser.post(page, HOW)
    assert response.status_code == 429
    assert "unfinished batches" in errors(response)[0]


# --- A table ------------------------------------------------------------------------------------


def test_a_table_becomes_requests_that_are_shown_before_they_are_made(
    owner: Person, echo: Model
) -> None:
    page = table(owner)
    start = owner.browser.get(page).content.decode()
    assert "<code>{{question}}</code>" in start
    assert "{{question}}</textarea>" in start.replace("\n", "")
    given = RECIPE | {"system": "About {{topic}}", "max_tokens": "9", "custom_id": "topic"}
    shown = owner.browser.post(page, given | {"show": "1"})
    assert shown.status_code == 200
    requests = re.findall(r"<pre .+?>(.+?)</pre>", shown.content.decode(), re.S)
    first = orjson.loads(requests[0].replace("&quot;", '"'))
    assert first["body"] == {
        "model": "echo",
        "messages": [
            {"role": "system", "content": "About sky"},
            {"role": "user", "content": "Why?"},
        ],
        "max_completion_tokens": 9,
    }
    assert files() == [("asked.csv", "user_data", None)]
    made = owner.browser.post(page, given | {"make": "1"})
    assert "Every line is good" in owner.browser.get(made["Location"]).content.decode()
    assert files() == [("asked.csv", "user_data", None), ("asked.jsonl", "batch", 2)]
    with scopes_disabled():
        assert [each["custom_id"] for each in lines_in(File.objects.last())] == ["sky", "sea"]
        assert File.objects.first().expires_at is not None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompt": "{{nothing}}"}, "The table has no column called nothing."),
        ({"prompt": "{{<b>}}"}, "The table has no column called &lt;b&gt;."),
        ({"prompt": "{{question}}" * 1001}, "Columns are named more than 1,000 times."),
        ({"prompt": ""}, "This field is required."),
        ({"model": "other"}, "Select a valid choice. other is not one of the available choices."),
        ({"endpoint": "/v1/embeddings"}, "echo is a chat model: it does not answer"),
        ({"endpoint": "/v1/completions", "system": "x"}, "/v1/completions takes no system prompt"),
        ({"temperature": "3"}, "Ensure this value is less than or equal to 2"),
        ({"custom_id": "other"}, "Select a valid choice."),
    ],
)
def test_a_wrong_recipe_is_told_and_stays(
    given: dict[str, str], said: str, owner: Person, echo: Model
) -> None:
    page = table(owner)
    kept = {"system": "Stay"} | RECIPE | given
    response = owner.browser.post(page, kept | {"make": "1"})
    assert response.status_code == 400
    assert any(each.startswith(said) for each in errors(response))
    assert kept["system"] in response.content.decode()
    assert len(files()) == 1


def test_a_table_for_embeddings_takes_no_settings_of_answers(owner: Person) -> None:
    register_model(name="vectors", source="none", engine="instant", task=Task.EMBEDDING)
    page = table(owner)
    given = RECIPE | {"model": "vectors", "endpoint": "/v1/embeddings"}
    assert owner.browser.post(page, given).status_code == 200
    assert owner.browser.post(page, given | {"max_tokens": "1"}).status_code == 400


def test_a_parquet_table_makes_a_request_of_each_row_whatever_the_prompt(
    owner: Person, echo: Model
) -> None:
    sink = io.BytesIO()
    parquet.write_table(pa.table({"question": ["Why?", "How?"], "topic": ["a", "b"]}), sink)
    page = table(owner, sink.getvalue(), "asked.parquet")
    for prompt, said in (("{{topic}}!", ["a!", "b!"]), ("the same", ["the same"] * 2)):
        made = owner.browser.post(page, RECIPE | {"prompt": prompt, "make": "1"})
        with scopes_disabled():
            file = File.objects.get(pk=made["Location"].rpartition("/")[2])
        requests = lines_in(file)
        assert [each["body"]["messages"][0]["content"] for each in requests] == said


def test_a_row_that_makes_no_request_is_told(owner: Person, echo: Model) -> None:
    page = table(owner, b"question,topic\nWhy?,a\nHow?,a\n")
    response = owner.browser.post(page, RECIPE | {"custom_id": "topic", "make": "1"})
    assert response.status_code == 400
    assert errors(response) == ["Row 2: The custom_id &#x27;a&#x27; was used before."]
    assert len(files()) == 1


def test_a_broken_table_and_one_without_rows_are_told(owner: Person, echo: Model) -> None:
    response = owner.browser.get(table(owner, b"a,a\n"))
    assert response.status_code == 400
    assert errors(response)[0].startswith("Two columns are called")
    empty = table(owner, b"question\n")
    assert "no rows" in owner.browser.post(empty, RECIPE | {"show": "1"}).content.decode()
    response = owner.browser.post(empty, RECIPE | {"make": "1"})
    assert errors(response) == ["The table has no rows under its header."]


def test_only_offered_models_are_chosen_from(owner: Person, stranger: Person) -> None:
    page = table(owner)
    assert "No model is offered" in owner.browser.get(page).content.decode()
    for name, person in (("mine", owner), ("theirs", stranger)):
        register_model(
            name=name,
            source="none",
            engine="instant",
            organizations=[person.caller.organization],
        )
    shown = owner.browser.get(page).content.decode()
    assert re.findall(r'<option value="(mine|theirs)"', shown) == ["mine"]


def test_what_is_no_table_has_no_recipe(owner: Person) -> None:
    file = stored(owner.caller, line())
    response = owner.browser.get(f"/batches/new/{file.pk}/table")
    assert response["Location"] == f"/batches/new/{file.pk}"
