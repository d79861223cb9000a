"""Models from object stores, downloaded once per node; entries are named by their digest, complete and verified."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from latentmill.jobs.errors import JobError
from latentmill.jobs.models.digests import file_digest, read_note, remember_digest, write_note
from latentmill.jobs.models.node import cache_folder, node_name, one_at_a_time
from latentmill.jobs.models.remote import Fetched, RemoteTree, download, find_file, list_tree
from latentmill.jobs.store.errors import describe
from latentmill.jobs.store.local import sync_folder
from latentmill.jobs.store.urls import display_url

SINGLE_FILES = (".safetensors", ".ckpt")
"""Suffixes of a model in one file; any other address is a folder."""

_COMPLETE = ".complete"
_OUTLINE_LIMIT = 64 * 2**20
_TEXT = (".json", ".txt", ".model", ".jinja")

Claim = Callable[[Path], Iterable[str]]
"""The files of a model, found from a copy of its folder: small files are copied, the others are empty."""


def is_url(place: str) -> bool:
    """Whether a model's place is a URL, not a path or a hub id."""
    return "://" in place


def is_single_file(url: str) -> bool:
    """Whether the address names a model in one file."""
    return url.lower().endswith(SINGLE_FILES)


def listing_digest(files: Mapping[str, str]) -> str:
    """One hash over files' names and hashes."""
    return hashlib.sha256("".join(f"{files[name]}  {name}\n" for name in sorted(files)).encode()).hexdigest()


def fetch_newest(url: str, claim: Claim | None = None) -> Path:
    """For planning: a folder with the current files of `url`, those that `claim` names or all.

    Files on this node are not fetched again while the store reports the same version.
    """
    tree = find_file(url) if is_single_file(url) else list_tree(url)
    with one_at_a_time(tree.fingerprint or secrets.token_hex(20)) as alone:
        note = {} if tree.fingerprint is None else read_note(_source_note(tree.fingerprint))
        if note:
            return hold(url, {name: str(digest) for name, digest in note.items()})
        with _workshop(tree.fingerprint, alone=alone) as folder:
            names = tree.files if claim is None else _claimed(tree, claim, folder / "outline")
            entry = _settle(folder, download(tree, names, _made(folder / "model")))
        if tree.fingerprint is not None:
            write_note(_source_note(tree.fingerprint), json.loads((entry / _COMPLETE).read_bytes()))
        return entry


def hold(url: str, files: Mapping[str, str]) -> Path:
    """For loading: a folder with exactly these files, names to sha256, fetched from `url` if necessary.

    Only one process of a node downloads. Files that are incomplete or changed on the disk are fetched again. Raises
    JobError if the bytes at `url` are not the planned ones.
    """
    digest = listing_digest(files)
    entry = _models() / digest
    if _is_whole(entry, files):
        return entry
    with one_at_a_time(digest) as alone:
        if _is_whole(entry, files):
            return entry
        tree = find_file(url) if is_single_file(url) else list_tree(url)
        with _workshop(digest, alone=alone) as folder:
            fetched = download(tree, files, _made(folder / "model"))
            wrong = sorted(name for name in files if fetched[name].sha256 != files[name])
            if wrong:
                raise JobError(
                    f"{wrong[0]} at {display_url(tree.url)} is not the planned file: sha256 {files[wrong[0]]} was "
                    f"planned, {node_name()} received {fetched[wrong[0]].sha256}; put the planned file back, or use a "
                    f"new --out"
                )
            return _settle(folder, fetched)


def _is_whole(entry: Path, files: Mapping[str, str]) -> bool:
    """Whether the entry is complete and unchanged."""
    if not (entry / _COMPLETE).is_file():
        return False
    try:
        return all(file_digest(entry / name) == digest for name, digest in files.items())
    except OSError:
        return False


def _settle(folder: Path, fetched: Mapping[str, Fetched]) -> Path:
    """Afterwards the entry is in place, by one rename of this process or another."""
    made = folder / "model"
    files = {name: file.sha256 for name, file in fetched.items()}
    entry = _models() / listing_digest(files)
    with (made / _COMPLETE).open("x", encoding="utf-8") as marker:
        json.dump(files, marker)
        marker.flush()
        os.fsync(marker.fileno())
    for below in {made, *((made / name).parent for name in files)}:
        sync_folder(below)
    for attempt in range(3):
        if _is_whole(entry, files):
            return entry
        try:
            if entry.exists():
                entry.rename(folder / f"damaged-{attempt}")  # processes that have it open keep it
            made.rename(entry)
        except OSError:
            continue  # another process renamed its entry in between
        sync_folder(entry.parent)
        for name, file in fetched.items():
            remember_digest(entry / name, file.identity, file.sha256)
        return entry
    raise JobError(f"the model cannot be put into {entry}; remove that folder, and run the same command again")


def _claimed(tree: RemoteTree, claim: Claim, outline: Path) -> list[str]:
    """The files of a model, found without its weights."""
    small = [name for name, file in tree.files.items() if name.endswith(_TEXT) and file.size <= _OUTLINE_LIMIT]
    download(tree, small, _made(outline))
    for name in tree.files.keys() - set(small):
        (outline / name).parent.mkdir(parents=True, exist_ok=True)
        (outline / name).touch()
    return sorted(claim(outline))


@contextmanager
def _workshop(key: str | None, *, alone: bool) -> Iterator[Path]:
    """A working folder, removed afterwards together with those that killed processes left."""
    name = key or secrets.token_hex(20)
    try:
        models = _models()
        models.mkdir(parents=True, exist_ok=True)
        if alone:
            for left in models.glob(f".{name}-*"):
                shutil.rmtree(left, ignore_errors=True)
        folder = _made(models / f".{name}-{secrets.token_hex(6)}")
    except OSError as error:
        raise JobError(
            f"models cannot be kept in {cache_folder()}: {describe(error)}; name another folder by LATENTMILL_CACHE"
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _models() -> Path:
    return cache_folder() / "models"


def _source_note(fingerprint: str) -> Path:
    return cache_folder() / "sources" / f"{fingerprint}.json"
