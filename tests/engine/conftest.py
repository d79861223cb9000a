from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.utils import logging

from latentmill.engine import Engine, ModelSpec
from tests.harness.models import write_model

logging.set_verbosity_error()
logging.disable_progress_bar()

DRAWING = {
    "embedded_model",
    "diffusers_pipelines",
    "joint_transformers",
    "latent_diffusion",
    "pipeline",
    "sampler_pictures",
    "sdxl",
    "single_files",
}
"""The test files that draw whole pictures, most of them once more with the reference pipelines."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.stem.removeprefix("test_") in DRAWING:
            item.add_marker("slow")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Bits depend on the number of threads, and two test processes on two cores must not fight."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def eps_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "eps")


@pytest.fixture(scope="session")
def engine(eps_model: Path) -> Engine:
    return Engine.load(ModelSpec(model=str(eps_model), safety="none"), device="cpu", dtype="float32", batch_size=4)
