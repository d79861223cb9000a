"""The allow-list of places."""

from __future__ import annotations

import pytest

from latentmill.jobs.errors import UsageError
from latentmill.jobs.store.urls import allowed_filesystem, display_url, shared_url


@pytest.mark.parametrize(
    ("url", "protocol", "path"),
    [
        ("/a/b", "file", "/a/b"),
        ("/a/../b", "file", "/b"),
        ("file:///x/y", "file", "/x/y"),
        ("s3://bucket/a b/k", "s3", "bucket/a b/k"),
        ("memory://a/b", "memory", "/a/b"),
    ],
)
def test_allowed_places_open_without_a_listings_cache(url, protocol, path):
    fs, inside = allowed_filesystem(url)
    names = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    assert protocol in names
    assert inside == path
    assert not fs.dircache.use_listings_cache


@pytest.mark.parametrize(
    "url",
    [
        "http://h/x",
        "https://h/x",
        "ftp://h/x",
        "simplecache::http://h/x",
        "zip://a.zip::s3://b/c",
        "github://o:r@main/x",
        "reference://x",
        "S3://b/x",
        "",
        " ",
        "a\0b",
        "s3://b/../c",
        "s3://user:canary-secret@b/x",
    ],
)
def test_other_places_are_refused_in_one_line_without_secrets(url):
    with pytest.raises(UsageError) as caught:
        allowed_filesystem(url)
    assert "\n" not in str(caught.value)
    assert "canary-secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://k:canary@b/x?sig=canary", "s3://b/x"),
        ("s3://k@b/x", "s3://b/x"),
        (
            "abfs://container@account.dfs.core.windows.net/x?sas=canary",
            "abfs://container@account.dfs.core.windows.net/x",
        ),
        ("hf://datasets/a/b@main/x.parquet", "hf://datasets/a/b@main/x.parquet"),
        ("dir/what?.txt", "dir/what?.txt"),
    ],
)
def test_a_shown_url_has_no_user_no_password_no_query(url, shown):
    assert display_url(url) == shown


def test_a_place_that_only_this_process_has_is_refused_where_others_need_it(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="memory://out lives in one process only; use --executor inline or another"):
        shared_url("memory://out", here="inline")
    assert shared_url("s3://bucket/out", here="inline") == "s3://bucket/out"
    (tmp_path / "mount").symlink_to("/nodes/1")
    monkeypatch.chdir(tmp_path)
    assert shared_url("mount/out", here="inline") == f"{tmp_path}/mount/out"  # another node has a link of its own
