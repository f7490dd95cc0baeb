"""The storage, on a disk and in a bucket: whole or not at all, and nothing left lying about."""

from __future__ import annotations

import io
import os
import random
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.core.exceptions import SuspiciousFileOperation
from hypothesis import given
from hypothesis import strategies as st

from batches import storage
from tests import jobs


@pytest.fixture(params=["disk", "bucket"])
def kind(request: pytest.FixtureRequest) -> str:
    """Where bytes are kept; empty."""
    request.getfixturevalue("own_storage" if request.param == "disk" else "bucket")
    return str(request.param)


def incoming() -> list[Path]:
    return list(Path(django_settings.FILE_UPLOAD_TEMP_DIR).iterdir())


def put(name: str, content: bytes = b"some bytes") -> str:
    with storage.temporary("x") as made:
        made.write(content)
        made.size = len(content)
        return storage.keep(name, made)


def read(name: str) -> bytes:
    with storage.opened(name) as stream:
        return stream.read()


# --- Both -----------------------------------------------------------------------------------


def test_what_is_kept_is_read_again(kind: str) -> None:
    name = put("org/one")
    with storage.opened(name) as stream:
        assert stream.read() == b"some bytes"
        stream.seek(5)
        assert stream.read(3) == b"byt"
        assert (stream.tell(), stream.read(100), stream.read(1)) == (8, b"es", b"")
        assert (stream.seek(0, io.SEEK_END), stream.read()) == (10, b"")
        assert (stream.seek(2), stream.readline()) == (2, b"me bytes")
    assert name.startswith("org/one")
    assert (jobs.kept(), incoming()) == ({name}, [])


def test_what_is_not_kept_is_gone(kind: str) -> None:
    with storage.temporary("x.jsonl") as made:
        made.write(b"some bytes")
        # Where keeping is no rename it needs no name: a kill would leave nothing behind.
        assert len(incoming()) == (1 if kind == "disk" else 0)
    assert (jobs.kept(), incoming()) == (set(), [])


def test_a_failure_leaves_nothing(kind: str) -> None:
    with pytest.raises(ZeroDivisionError), storage.temporary("x.jsonl"):
        raise ZeroDivisionError
    assert (jobs.kept(), incoming()) == (set(), [])


def test_two_of_a_name_are_two(kind: str) -> None:
    names = [put("org/same", content) for content in (b"first", b"second")]
    assert jobs.kept() == set(names)
    assert [read(name) for name in names] == [b"first", b"second"]


def test_nothing_at_all_can_be_kept(kind: str) -> None:
    name = put("org/empty", b"")
    assert (read(name), storage.pieces(name, [(0, 5)])) == (b"", [b""])


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "org/../../outside"])
def test_nothing_is_kept_outside(kind: str, name: str) -> None:
    with pytest.raises(SuspiciousFileOperation):
        put(name)
    assert (jobs.kept(), incoming()) == (set(), [])


def test_removing_twice_is_no_error(kind: str) -> None:
    name = put("org/one")
    storage.remove(name)
    storage.remove(name)
    assert jobs.kept() == set()


def test_what_is_missing_is_said_at_once(kind: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"No such .*org/none"):
        storage.opened("org/none")
    with pytest.raises(FileNotFoundError):
        storage.pieces("org/none", [(0, 1)])


def test_a_folder_goes_with_all_that_is_in_it_and_no_other(kind: str) -> None:
    for name in ("org/one", "org/two"):
        put(name)
    other = put("org2/one")
    storage.remove_folder("org")
    storage.remove_folder("none")
    assert jobs.kept() == {other}


def test_lines_and_seeks_are_those_of_a_file(kind: str) -> None:
    """Longer than any window, with lines longer than any buffer."""
    chance = random.Random(3)
    content = b"".join(b"x" * chance.choice([0, 70, 5_000, 200_000]) + b"\n" for _ in range(200))
    name, like = put("org/lines", content), io.BytesIO(content)
    with storage.opened(name) as stream:
        assert list(stream) == list(like)
        for _ in range(50):
            offset, length = chance.randrange(len(content) + 10), chance.choice([1, 900, 300_000])
            assert stream.seek(offset) == like.seek(offset)
            assert stream.read(length) == like.read(length)
            assert stream.readline(5_000) == like.readline(5_000)
            assert stream.tell() == like.tell()


@given(
    spans=st.lists(st.tuples(st.integers(0, 120), st.integers(0, 30)), max_size=20),
    near=st.integers(0, 40),
    at_once=st.integers(1, 60),
)
def test_pieces_are_what_each_read_alone_would_be(
    spans: list[tuple[int, int]], near: int, at_once: int, tmp_path_factory: Any
) -> None:
    content = bytes(range(100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "NEAR", near)
        patch.setattr(storage, "AT_ONCE", at_once)
        patch.setattr(storage, "opened", lambda name: io.BytesIO(content))
        found = storage.pieces("org/one", spans)
    assert found == [content[offset : offset + length] for offset, length in spans]


def test_pieces_that_lie_near_are_read_in_one_go_of_a_bounded_size() -> None:
    near, most = storage.NEAR, storage.AT_ONCE
    line = 1_000
    spans = [
        (5 * most, line),
        (0, line),
        (line + near, line),
        (2 * line + 2 * near, 3 * most),
        (2 * line + 2 * near + 1, 10),
        (5 * most - 10, 5),
        (6 * most - 10, 9),
    ]
    # A piece longer than that comes alone, or with those that lie in it.
    assert list(storage._runs(spans)) == [[1, 2], [3, 4], [5, 0], [6]]


# --- A disk ---------------------------------------------------------------------------------


def test_keeping_on_a_disk_is_a_rename_of_bytes_that_reached_it(
    own_storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with storage.temporary("x.jsonl") as made:
        made.write(b"x" * 100_000)
        inode = os.fstat(made.fileno()).st_ino
        assert storage.keep("org/one", made) == "org/one"
        assert synced == [made.fileno()]
    assert (own_storage / "org/one").stat().st_ino == inode
    assert (own_storage / "org/one").stat().st_size == 100_000
