"""Which kinds of handlers there are: ours without an installation, others' by entry points."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import pytest
from django_scopes import scopes_disabled

from batches.handlers import registry
from batches.models import HandlerRun
from batches.services import handler_runs, handlers
from tests import jobs
from tests.batches.test_handler_kinds import chat, ended
from tests.conftest import Person

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "result_handler"
Install = Callable[[str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a distribution with one module and these entry points where installed ones are."""
    site = tmp_path / "site-packages"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    before = set(sys.modules)

    def put(module: Path | str, points: str) -> None:
        name, text = ("others", module) if isinstance(module, str) else ("", module.read_text())
        (site / (f"{name}.py" if name else Path(module).name)).write_text(text)
        info = site / f"{name or 'example'}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {info.stem}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(points)
        registry.kinds.cache_clear()

    yield put  # type: ignore[misc]
    registry.kinds.cache_clear()
    for name in set(sys.modules) - before:
        if name in ("others", "batch_result_counts"):
            del sys.modules[name]


def entry_points_of(path: Path) -> dict[str, str]:
    project = tomllib.loads(path.read_text())["project"]
    found: dict[str, str] = project["entry-points"][registry.GROUP]
    return found


def test_ours_are_declared_and_known_without_being_installed() -> None:
    assert entry_points_of(ROOT / "pyproject.toml") == registry.BUILT_IN
    assert {name: kind.name for name, kind in registry.kinds().items()} == {
        name: name for name in registry.BUILT_IN
    }


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("own_storage", "echo")
def test_the_example_works_through_its_entry_point(
    owner: Person, install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = entry_points_of(EXAMPLE / "pyproject.toml")
    said = "\n".join(f"{name} = {where}" for name, where in points.items())
    install(EXAMPLE / "batch_result_counts.py", f"[{registry.GROUP}]\n{said}\n")
    monkeypatch.setenv("RESULT_COUNTS_DIR", str(tmp_path / "counts"))
    handlers.create_handler(
        actor=owner.caller, name="tally", kind="counts", settings={"longest": 3}, project=None
    )
    batch = ended(owner, chat(1, "Yes"), chat(2, "yes"), chat(3, "perhaps"))
    handler_runs.run_due(batch.pk)
    with scopes_disabled():
        run = HandlerRun.objects.get(batch=batch)
    assert (run.state, run.error, run.result) == ("done", "", "2 different answers")
    file = tmp_path / "counts" / batch.organization_id / f"{batch.pk}.json"
    assert orjson.loads(file.read_bytes()) == {"yes": 2, "other": 1}
    assert jobs.fresh(batch).status == "completed"


@pytest.mark.parametrize(
    "module",
    [
        "raise RuntimeError('at import')",
        "Other = object()",
        "class Other: pass",
        "",
    ],
)
def test_one_that_cannot_be_loaded_takes_no_other_along(module: str, install: Install) -> None:
    install(module, f"[{registry.GROUP}]\nother = others:Other\n")
    assert set(registry.kinds()) == set(registry.BUILT_IN)


def test_ours_cannot_be_replaced(install: Install) -> None:
    install("Other = object", f"[{registry.GROUP}]\nwebhook = others:Other\n")
    assert registry.kinds()["webhook"].__module__ == "batches.handlers.webhook"
