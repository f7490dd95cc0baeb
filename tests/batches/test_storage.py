"""The storage: whole or not at all, and nothing left lying about."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from django.core.exceptions import SuspiciousFileOperation

from batches import storage
from tests import jobs


def incoming(root: Path) -> list[Path]:
    return list((root / "incoming").iterdir())


def test_what_is_kept_is_read_again(own_storage: Path) -> None:
    with storage.temporary("x.jsonl") as made:
        made.write(b"some bytes")
        assert storage.keep("org/one", made) == "org/one"
    with storage.opened("org/one") as stream:
        assert stream.read() == b"some bytes"
        stream.seek(5)
        assert stream.read(3) == b"byt"
    assert jobs.kept() == {"org/one"}
    assert incoming(own_storage) == []


def test_what_is_not_kept_is_gone(own_storage: Path) -> None:
    with storage.temporary("x.jsonl") as made:
        made.write(b"some bytes")
        assert len(incoming(own_storage)) == 1
    assert (jobs.kept(), incoming(own_storage)) == (set(), [])


def test_a_failure_leaves_nothing(own_storage: Path) -> None:
    with pytest.raises(ZeroDivisionError), storage.temporary("x.jsonl"):
        raise ZeroDivisionError
    assert (jobs.kept(), incoming(own_storage)) == (set(), [])


def test_keeping_is_a_rename_of_bytes_that_reached_the_disk(
    own_storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with storage.temporary("x.jsonl") as made:
        made.write(b"x" * 100_000)
        inode = os.fstat(made.fileno()).st_ino
        storage.keep("org/one", made)
        assert synced == [made.fileno()]
    assert (own_storage / "org/one").stat().st_ino == inode
    assert (own_storage / "org/one").stat().st_size == 100_000


def test_two_of_a_name_are_two(own_storage: Path) -> None:
    names = []
    for content in (b"first", b"second"):
        with storage.temporary("x") as made:
            made.write(content)
            names.append(storage.keep("org/same", made))
    assert len(set(names)) == 2
    assert jobs.kept() == set(names)


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "org/../../outside"])
def test_nothing_is_kept_outside(own_storage: Path, name: str) -> None:
    with storage.temporary("x") as made, pytest.raises(SuspiciousFileOperation):
        storage.keep(name, made)


def test_removing_twice_is_no_error(own_storage: Path) -> None:
    with storage.temporary("x") as made:
        storage.keep("org/one", made)
    storage.remove("org/one")
    storage.remove("org/one")
    assert jobs.kept() == set()
    with pytest.raises(FileNotFoundError):
        storage.opened("org/one")
