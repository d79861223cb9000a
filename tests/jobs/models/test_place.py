"""The model of a job on its nodes: wherever the bytes come from, the planned ones are loaded, or none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from latentmill.engine.types import ModelSpec
from latentmill.jobs.errors import UsageError
from latentmill.jobs.job import open_job
from latentmill.jobs.models.choice import ModelChoice, resolve_model
from latentmill.jobs.models.place import ModelMismatchError, place_model
from latentmill.jobs.plans.plan import adopt, draft_plan
from latentmill.jobs.spec import JobSpec
from latentmill.jobs.store.storage import Storage
from latentmill.jobs.worker import load_engine
from tests.engine.diffusers_models import in_shards, write_flux
from tests.engine.families import write_sd1
from tests.engine.originals import write_safetensors
from tests.jobs.driver import job_spec, read_dataset, run
from tests.jobs.models.machines import place_on_node

pytestmark = pytest.mark.long

Manifest = Callable[..., Path]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def node_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node that has no model yet."""
    monkeypatch.setenv("LATENTMILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def upload(folder: Path, url: str) -> str:
    storage = Storage.open(url)
    for path in folder.rglob("*"):
        if path.is_file():
            storage.write(path.relative_to(folder).as_posix(), path.read_bytes())
    return url


def plan(spec: JobSpec) -> str:
    """The job's output, planned and not run."""
    with draft_plan(spec) as draft:
        adopt(draft, Storage.open(spec.out))
    return spec.out


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_job_whose_model_lies_in_a_bucket_is_the_job_of_the_local_folder(
    s3: str, tiny_model: Path, manifest: Manifest, node_cache: Path, tmp_path: Path
) -> None:
    url = upload(tiny_model, f"{s3}/models/tiny")
    storage = Storage.open(url)
    storage.write("v1-5-pruned.ckpt", b"never read")
    storage.write("unet/diffusion_pytorch_model.bin", b"never read either")
    outs = {str(tiny_model): f"{tmp_path}/local", url: f"{tmp_path}/remote", f"embedded={url}/": f"{tmp_path}/preset"}
    for model, out in outs.items():
        spec = job_spec(model, manifest(2), out, sampler="ddim", guidance_scale=3.0, safety="none")
        assert run(spec, engine_factory=load_engine).exit_code == 0
    local, remote, preset = (read_dataset(out) for out in outs.values())
    assert set(remote.rows["model"].to_pylist()) == {url}
    assert remote.rows.drop_columns(["model"]).equals(local.rows.drop_columns(["model"]))
    assert remote.manifest["plan_hash"] == local.manifest["plan_hash"]
    assert preset.rows.column("pixel_sha256") == local.rows.column("pixel_sha256")
    assert preset.manifest["plan_hash"] == local.manifest["plan_hash"]
    model = open_job(f"{tmp_path}/remote").plan.model
    assert (model.source, model.name, model.spec.model) == (url, "tiny", url)
    (entry,) = (node_cache / "models").iterdir()
    held = {path.relative_to(entry).as_posix() for path in entry.rglob("*") if path.is_file()}
    assert held == model.files.keys() | {".complete"}


def test_a_single_file_in_a_bucket_with_its_vocabulary_in_another_place(node_cache: Path, tmp_path: Path) -> None:
    folder = write_sd1(tmp_path / "sd1")
    file = write_safetensors(folder, tmp_path / "v1.safetensors")
    Storage.open("memory://weights-1/a").write("v1.safetensors", file.read_bytes())
    upload(folder, "memory://weights-1/sd1")
    local, _, _ = resolve_model(ModelChoice(source=str(file), tokenizer=str(folder)))
    choice = ModelChoice(source="memory://weights-1/a/v1.safetensors", tokenizer="memory://weights-1/sd1/")
    remote, _, _ = resolve_model(choice)
    assert (remote.files, remote.digest, remote.name) == (local.files, local.digest, local.name)
    assert remote.tokenizer == "memory://weights-1/sd1/tokenizer"
    shutil.rmtree(node_cache)  # another node
    spec = place_model(remote)
    assert Path(spec.model).read_bytes() == file.read_bytes()
    assert node_cache in Path(spec.model).parents
    assert node_cache in Path(spec.tokenizer or "").parents


def test_a_model_at_a_url_is_the_same_set_of_files_as_the_folder(
    tiny_model: Path, node_cache: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    counts = ("tokenizer/added_tokens.json", "safety_checker/config.json", "feature_extractor/preprocessor_config.json")
    for name in (*counts, "tokenizer/README.txt", "safety_checker/README.json", "unet/other.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "safety_checker/model.safetensors").write_bytes(b"weights")
    local, _, _ = resolve_model(ModelChoice(source=str(folder)))
    remote, _, _ = resolve_model(ModelChoice(source=upload(folder, "memory://weights-8/model")))
    assert (remote.files, remote.digest) == (local.files, local.digest)
    assert {*counts, "safety_checker/model.safetensors"} < remote.files.keys()
    held = Path(place_model(remote).model)
    placed = {path.relative_to(held).as_posix() for path in held.rglob("*") if path.is_file()}
    assert placed == remote.files.keys() | {".complete"}


def test_every_shard_of_a_transformer_at_a_url_is_placed(node_cache: Path, tmp_path: Path) -> None:
    folder = in_shards(write_flux(tmp_path / "flux"), tmp_path / "sharded")
    local, _, _ = resolve_model(ModelChoice(source=str(folder)))
    remote, _, _ = resolve_model(ModelChoice(source=upload(folder, "memory://weights-10/flux")))
    assert (remote.files, remote.digest) == (local.files, local.digest)
    held = Path(place_model(remote).model)
    shards = {path.relative_to(held).as_posix() for path in held.rglob("transformer/*.safetensors")}
    assert len(shards) > 1
    assert shards < remote.files.keys()


@pytest.mark.slow
def test_a_flipped_byte_on_one_node_is_named_there_and_harmless_elsewhere(
    manifest: Manifest, node_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound, broken = tmp_path / "hub-of-node-1", tmp_path / "hub-of-node-2"
    repo = sound / "models--someone--tiny"
    write_sd1(repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    shutil.copytree(sound, broken)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(sound))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    out = plan(job_spec("someone/tiny", manifest(1), tmp_path / "out", sampler="ddim", safety="none"))
    weights = broken / "models--someone--tiny/snapshots" / COMMIT / WEIGHTS
    planned = open_job(out).plan.model.files[WEIGHTS]
    flip(weights)
    there = {"HF_HUB_CACHE": str(broken), "HF_HUB_OFFLINE": "1"}
    on_broken = place_on_node(out, tmp_path / "cache-of-node-2", **there)
    assert on_broken.returncode != 0
    message = on_broken.stderr.strip().splitlines()[-1]
    for word in ("ModelMismatchError", str(weights), planned, os.uname().nodename, "fetched again"):
        assert word in message
    on_sound = place_on_node(out, tmp_path / "cache-of-node-1", **{**there, "HF_HUB_CACHE": str(sound)})
    assert on_sound.stdout.strip() == str(sound / "models--someone--tiny/snapshots" / COMMIT), on_sound.stderr


@pytest.mark.slow
def test_a_flipped_byte_in_a_nodes_download_is_fetched_again(
    s3: str, tiny_model: Path, manifest: Manifest, node_cache: Path, tmp_path: Path
) -> None:
    url = upload(tiny_model, f"{s3}/tiny")
    out = plan(job_spec(url, manifest(1), f"{s3}/out", sampler="ddim"))
    other = tmp_path / "cache-of-node-2"
    placed = place_on_node(out, other)
    weights = Path(placed.stdout.strip()) / WEIGHTS
    assert other in weights.parents
    flip(weights)
    assert place_on_node(out, other).returncode == 0
    assert weights.read_bytes() == (tiny_model / WEIGHTS).read_bytes()


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (lambda folder: flip(folder / WEIGHTS), r"sha256 \w{64} was planned, \w{64} is there; copy the planned"),
    "missing": (
        lambda folder: (folder / "tokenizer/tokenizer_config.json").unlink(),
        r"tokenizer_config\.json of the model .* not",
    ),
    "more": (lambda folder: (folder / "tokenizer/vocab.txt").write_text("x"), r"vocab\.txt on .* was no part"),
    "half": (lambda folder: (folder / WEIGHTS).unlink(), "has no weights"),
    "gone": (shutil.rmtree, "does not exist"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_local_model_that_is_not_the_planned_one_is_refused(
    change: str, tiny_model: Path, node_cache: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "tiny"))
    model, _, _ = resolve_model(ModelChoice(source=str(folder)))
    assert place_model(model) == ModelSpec(model=str(folder))
    act, words = CHANGES[change]
    act(folder)
    with pytest.raises(ModelMismatchError, match=words) as caught:
        place_model(model)
    assert os.uname().nodename in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (ModelChoice(source="memory://empty/sd15"), "there is nothing at memory://empty/sd15"),
        (
            ModelChoice(source="memory://half/sd15"),
            "config.json is missing: the folder is not a whole",
        ),
        (
            ModelChoice(source="embedded=memory://half/sd15"),
            "config.json is missing: the folder is not a whole",
        ),
        (ModelChoice(source="memory://half/sd15", revision="main"), "no meaning for a model at a URL"),
        (ModelChoice(source="memory://half/sd15?versionId=3"), "carries a user or a query"),
        (ModelChoice(source="http://example.com/sd15"), "only file, s3"),
        (ModelChoice(source="memory://half/x.safetensors"), "there is no file memory://half/x.safetensors"),
        (ModelChoice(source="memory://half/broken.safetensors"), "memory://half/broken.safetensors"),
    ],
    ids=lambda value: getattr(value, "source", None),
)
def test_a_model_at_a_url_that_cannot_be_planned_is_one_line(choice: ModelChoice, words: str, node_cache: Path) -> None:
    upload_half = Storage.open("memory://half")
    upload_half.write("sd15/model_index.json", b'{"_class_name": "StableDiffusionPipeline"}')
    upload_half.write("broken.safetensors", b"\0" * 100)
    with pytest.raises(UsageError) as caught:
        resolve_model(choice)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(node_cache) not in str(caught.value)


def test_a_bucket_that_refuses_is_one_line_without_its_secrets(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(UsageError, match=r"cannot read s3://.*AWS_PROFILE") as caught:
            resolve_model(ModelChoice(source=f"{s3}/sd15"))
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)
