"""Files that a user names, in stores that do not answer."""

from __future__ import annotations

import pytest
from botocore.exceptions import EndpointConnectionError
from fsspec.implementations.memory import MemoryFileSystem

from latentmill.jobs.errors import UsageError
from latentmill.jobs.inspection import inspect_files
from latentmill.jobs.job_file import load_job_file
from latentmill.jobs.manifests.axes import build_axes, listed_values
from latentmill.jobs.manifests.wildcards import Templates, WildcardFolder


@pytest.mark.parametrize(
    "read",
    [
        lambda: load_job_file("memory://b/job.yaml"),
        lambda: listed_values("prompt", "@memory://b/prompts.txt"),
        lambda: build_axes({"model": listed_values("model", "memory://b/*.safetensors")}),
        lambda: Templates(WildcardFolder("memory://b")).parse("__colour__"),
        lambda: inspect_files(["memory://b/a.png"], text="StableDiffusionV1"),
    ],
)
def test_a_store_that_does_not_answer_is_one_line_that_names_the_file(read, monkeypatch):
    def silent(*_args, **_options):
        raise EndpointConnectionError(endpoint_url="http://127.0.0.1:9/b")

    for name in ("info", "glob", "find", "cat_file"):
        monkeypatch.setattr(MemoryFileSystem, name, silent)
    with pytest.raises(UsageError, match=r"memory://b.* cannot be read \(Could not connect to the endpoint") as caught:
        read()
    assert "\n" not in str(caught.value)
