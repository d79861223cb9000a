"""`latentmill push-to-hub`: a finished export, uploaded as it lies there to a dataset repository on the hub."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.exports.documents import MANIFEST_PATH, read_plan
from latentmill.jobs.manifests.fields import shorten
from latentmill.jobs.store.storage import Storage
from latentmill.jobs.store.urls import display_url, place_of

_REPO = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class PushSummary:
    """Where the export is now."""

    dest: str
    repo: str
    url: str

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def push_to_hub(dest_url: str, repo: str, *, private: bool = False) -> PushSummary:
    """Afterwards the repository, made if there is none, holds every file of the export, by one commit.

    Raises UsageError if the export is not finished, not on a disk, or no token is here; JobError for what the hub says.
    """
    if not _REPO.fullmatch(repo):
        raise UsageError(f"repository {shorten(repo)} is not OWNER/NAME; name one, for example me/birds")
    protocol, folder = place_of(dest_url)
    if protocol != "file":
        raise UsageError(f"{display_url(dest_url)} is not on a disk; copy it to one, then push the copy")
    dest = Storage.open(dest_url)
    read_plan(dest)
    if not dest.exists(MANIFEST_PATH):
        raise UsageError(f"{dest.url} is not finished; run the same `latentmill export` command again: it resumes")
    import huggingface_hub

    token = huggingface_hub.get_token()
    if token is None:
        raise UsageError("there is no token for the Hugging Face hub; set HF_TOKEN, or log in by: hf auth login")
    api = huggingface_hub.HfApi(token=token)
    try:
        made = api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        message = "Exported by latentmill"
        ignored = [".*", "**/.*"]
        api.upload_folder(
            repo_id=repo, repo_type="dataset", folder_path=folder, commit_message=message, ignore_patterns=ignored
        )
    except Exception as error:  # errors of its HTTP client, of its uploader and of the hub itself share no base class
        raise JobError(f"{repo} on the hub: {' '.join(str(error).split())[:300]}; nothing was lost here") from error
    return PushSummary(dest=dest.url, repo=repo, url=str(made))
