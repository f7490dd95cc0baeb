"""What STORAGE_URL may say, and what it is refused for."""

from __future__ import annotations

from pathlib import Path

import pytest
from django.core.exceptions import ImproperlyConfigured

from portal.storage_url import store_of

VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
DATA = Path("/data")


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(f"{name}_FILE", raising=False)


@pytest.mark.parametrize("url", ["file:/srv/files", "file:///srv/files"])
def test_a_folder_spools_uploads_where_keeping_them_is_a_rename(url: str) -> None:
    store = store_of(url, DATA)
    assert store.backend == "django.core.files.storage.FileSystemStorage"
    assert store.options == {"location": Path("/srv/files")}
    assert store.spool == Path("/srv/files/incoming")


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("s3://files", {"bucket_name": "files", "location": ""}),
        ("s3://files/", {"bucket_name": "files", "location": ""}),
        ("s3://my.files-1/a/b.c_d/", {"bucket_name": "my.files-1", "location": "a/b.c_d"}),
        (
            "s3://files/p?endpoint_url=http://minio:9000&region=eu-central-1&addressing_style=path",
            {
                "bucket_name": "files",
                "location": "p",
                "endpoint_url": "http://minio:9000",
                "region_name": "eu-central-1",
                "addressing_style": "path",
            },
        ),
        (
            "s3://files?endpoint_url=https%3A%2F%2Fs3.example.com%2Fstore",
            {
                "bucket_name": "files",
                "location": "",
                "endpoint_url": "https://s3.example.com/store",
            },
        ),
    ],
)
def test_a_bucket_spools_uploads_on_the_hosts_own_disk(url: str, options: dict[str, str]) -> None:
    store = store_of(url, DATA)
    assert (store.backend, store.options, store.spool) == (
        "batches.s3.S3",
        options,
        DATA / "incoming",
    )


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://host", "STORAGE_URL must be"),
        ("/srv/files", "STORAGE_URL must be"),
        ("file:", "file: needs a folder"),
        ("file://", "file: needs a folder"),
        ("s3:files", "'' is no name of a bucket"),
        ("s3://", "'' is no name of a bucket"),
        ("s3://a", "'a' is no name of a bucket"),
        ("s3://files:9000/x", "'files:9000' is no name of a bucket"),
        ("s3://[", "STORAGE_URL must be"),
        ("s3://files/../other", "the prefix takes letters"),
        ("s3://files/a//b", "the prefix takes letters"),
        ("s3://files/a%20b", "the prefix takes letters"),
        ("s3://files/a#b", "the prefix takes letters"),
        ("s3://files?bucket=x", "there is no option 'bucket'"),
        ("s3://files?endpoint_url", "STORAGE_URL must be"),
        ("s3://files?region=a&region=b", "an option is given twice"),
        ("s3://files?region=EU%20west", "'EU west' is no region"),
        ("s3://files?region=", "'' is no region"),
        ("s3://files?addressing_style=old", "must be auto, path or virtual"),
        ("s3://files?endpoint_url=minio:9000", "endpoint_url must be http"),
        ("s3://files?endpoint_url=http://", "endpoint_url must be http"),
        ("s3://files?endpoint_url=http://minio:port", "endpoint_url must be http"),
    ],
)
def test_what_makes_no_sense_is_refused(url: str, said: str) -> None:
    with pytest.raises(ImproperlyConfigured, match="STORAGE_URL") as refused:
        store_of(url, DATA)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "url",
    ["s3://key:hush@files/x", "s3://hush@files", "s3://files?endpoint_url=http://key:hush@minio"],
)
def test_credentials_in_it_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ImproperlyConfigured, match="credentials") as refused:
        store_of(url, DATA)
    assert "hush" not in str(refused.value)


def test_credentials_come_by_awss_variables_or_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_text("hush\n")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    with pytest.raises(ImproperlyConfigured, match="go together"):
        store_of("s3://files", DATA)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY_FILE", str(tmp_path / "secret"))
    known = {"bucket_name": "files", "location": "", "access_key": "key", "secret_key": "hush"}
    assert store_of("s3://files", DATA).options == known
    monkeypatch.setenv("AWS_SESSION_TOKEN", "for an hour")
    assert store_of("s3://files", DATA).options == known | {"security_token": "for an hour"}
