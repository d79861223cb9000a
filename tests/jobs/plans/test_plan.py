"""Drafting, publishing and resuming a plan; what its hash covers; what it refuses, in one line."""

from __future__ import annotations

import datetime
import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentmill.engine import EXECUTIONS
from latentmill.jobs.errors import JobError, OutputConflictError, UsageError
from latentmill.jobs.job_file import resolve
from latentmill.jobs.manifests import readers
from latentmill.jobs.models.presets import list_presets
from latentmill.jobs.plans import plan as plan_module
from latentmill.jobs.plans import snapshot
from latentmill.jobs.plans.plan import adopt, draft_plan, load_plan
from latentmill.jobs.plans.planned import fingerprint
from latentmill.jobs.settings import settings_of
from latentmill.jobs.spec import JobSpec, Runtime
from latentmill.jobs.store.storage import Storage


@pytest.fixture
def job(tmp_path, tiny_model, manifest):
    """A function from flags to a spec of a small job."""
    prompts = manifest(5)

    def make(**flags):
        return resolve(
            None, {"prompts": [str(prompts)], "out": str(tmp_path / "out"), "model": str(tiny_model), **flags}
        )

    return make


def files_under(folder):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def publish(spec):
    with draft_plan(spec) as draft:
        return adopt(draft, Storage.open(spec.out))


def hash_of(spec):
    with draft_plan(spec) as draft:
        return draft.plan_hash


def test_a_draft_writes_nothing_and_leaves_nothing(job, tmp_path):
    with draft_plan(job()) as draft:
        assert draft.summary().samples == 5
        assert draft.rejects.path.is_file()
    assert not draft.rejects.path.parent.exists()
    assert not (tmp_path / "out").exists()


def test_publishing_writes_the_plan_and_starting_again_finds_it(job, tmp_path):
    spec = job()
    plan = publish(spec)
    out = tmp_path / "out"
    digest = json.loads((out / "_job/plan.json").read_bytes())["manifest"]["digest"]
    names = [f"_job/manifest-{digest[:16]}-00000.parquet", "_job/plan.json", "_job/rejected.parquet"]
    assert files_under(out) == names
    before = (out / "_job/plan.json").read_bytes()
    again = publish(spec)
    assert again.plan_hash == plan.plan_hash == load_plan(Storage.open(spec.out)).plan_hash
    assert (out / "_job/plan.json").read_bytes() == before
    assert (plan.n_rows, plan.n_rejected, plan.n_samples, plan.n_chunks) == (5, 0, 5, 1)


def test_the_snapshot_comes_before_the_plan_and_the_rejected_rows_after_it(job, monkeypatch):
    """Whoever reads a plan finds its rows; whoever is refused by it has not touched its rejected rows."""
    written = []
    create, write = Storage.create, Storage.write
    monkeypatch.setattr(Storage, "create", lambda self, path, data: (written.append(path), create(self, path, data))[1])
    monkeypatch.setattr(Storage, "write", lambda self, path, data: (written.append(path), write(self, path, data))[1])
    publish(job())
    assert written[0].startswith("_job/manifest-")
    assert written[1:] == ["_job/plan.json", "_job/rejected.parquet"]


def test_the_loser_of_a_race_adopts_the_winners_plan_or_refuses(job, monkeypatch):
    storage = Storage.open(job().out)
    real = plan_module._read_plan
    with draft_plan(job()) as first, draft_plan(job()) as same, draft_plan(job(seed=1)) as other:
        winner = adopt(first, storage)
        for loser, expected in ((same, None), (other, OutputConflictError)):
            answers = iter([lambda _: None, real])  # the plan appears between the look and the create
            monkeypatch.setattr(plan_module, "_read_plan", lambda storage, answers=answers: next(answers)(storage))
            if expected is None:
                assert adopt(loser, storage).plan_hash == winner.plan_hash
            else:
                with pytest.raises(expected, match="seed: 42 -> 1"):
                    adopt(loser, storage)


CHANGES = {
    "seed": {"seed": 1}, "width": {"width": 264}, "height": {"height": 264}, "steps": {"num_inference_steps": 7},
    "guidance": {"guidance_scale": 3.0}, "negative": {"negative_prompt": "x"}, "sampler": {"sampler": "plms"},
    "eta": {"eta": 0.5}, "images": {"num_images": 2}, "sweep": {"sweep": ["seed=0:2"]}, "chunk": {"chunk_size": 16},
    "batch": {"batch_size": 2}, "safety": {"safety": "none"}, "threshold": {"nsfw_threshold": 0.5},
    "flagged": {"on_flagged": "keep"}, "watermark": {"watermark": "dwtDct"}, "text": {"watermark_text": "other"},
    "threads": {"threads_per_actor": 3}, "device": {"device": "cuda"}, "policy": {"watermark_policy": "require"},
    "syntax": {"prompt_syntax": "a1111"}, "long": {"long_prompts": "chunk"},
    "prediction": {"prediction_type": "v_prediction"}, "spacing": {"timestep_spacing": "trailing"},
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_can_change_a_pixel_or_a_row_changes_the_hash_and_is_refused(job, change):
    publish(job(device="cpu"))
    flags = {"device": "cpu"} | CHANGES[change]
    with draft_plan(job(**flags)) as draft, pytest.raises(OutputConflictError) as caught:
        adopt(draft, Storage.open(job().out))
    assert "->" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_changed_rows_and_changed_weights_are_refused(job, tmp_path, tiny_model):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    publish(job(model=str(model)))
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(
        OutputConflictError, match=r"model file unet/diffusion_pytorch_model\.safetensors: '\w+' -> '\w+'"
    ):
        publish(job(model=str(model)))
    weights.write_bytes(original)
    (tmp_path / "prompts.txt").write_text("another prompt\n")
    with pytest.raises(OutputConflictError, match="manifest rows"):
        publish(job(model=str(model)))


def test_the_axes_order_is_part_of_the_plan(job):
    publish(job(sweep=["seed=0:2", "sampler=ddim,plms"]))
    with pytest.raises(OutputConflictError, match="axis order: 'seed,sampler' -> 'sampler,seed'"):
        publish(job(sweep=["sampler=ddim,plms", "seed=0:2"]))


@pytest.mark.parametrize(
    "flags",
    [
        {"executor": "inline"},
        {"num_actors": 1, "threads_per_actor": 1},
        {"address": "auto", "cpus_per_actor": 0.5},
        {"strict": True},
        {"dtype": "float32", "device": "cpu"},
        {"watermark_text": "StableDiffusionV1"},
        {"manifest_format": "lines"},
        {"prediction_type": "epsilon", "timestep_spacing": "leading"},
    ],
)
def test_what_cannot_change_anything_does_not_change_the_hash(job, flags):
    assert hash_of(job(device="cpu", threads_per_actor=1)) == hash_of(
        job(**{"device": "cpu", "threads_per_actor": 1} | flags)
    )


def test_a_resumed_job_keeps_its_threads_unless_told_otherwise(job):
    assert publish(job(threads_per_actor=3)).settings.threads_per_actor == 3
    assert publish(job()).settings.threads_per_actor == 3
    assert publish(job(num_actors=1)).settings.threads_per_actor == 3
    with pytest.raises(OutputConflictError, match="threads_per_actor: 3 -> 2"):
        publish(job(threads_per_actor=2))


def test_a_job_is_resumed_that_an_older_version_began_with_format_files(job):
    with draft_plan(job()) as draft:
        document = draft.document()
        document["identity"] = {**document["identity"], "format": "files"}
        document["plan_hash"] = fingerprint(document["identity"])
        del document["checksum"]
        storage = Storage.open(draft.spec.out)
        storage.create("_job/plan.json", json.dumps({**document, "checksum": fingerprint(document)}).encode())
        assert adopt(draft, storage).plan_hash == document["plan_hash"]
    with pytest.raises(OutputConflictError, match=r"plan: chunk_size: 32 -> 7\. Use another"):
        publish(job(chunk_size=7))


def test_threads_and_dtype_have_plain_defaults(job):
    plan = publish(job(device="cpu"))
    assert (plan.settings.device, plan.settings.dtype, plan.settings.threads_per_actor) == ("cpu", "float32", 1)
    with draft_plan(job(device="cuda")) as draft:
        assert draft.identity["dtype"] == "float16"
    with pytest.raises(UsageError, match="float16 does not run on cpu; use float32 or bfloat16"):
        draft_plan(job(device="cpu", dtype="float16"))


def test_how_a_gpu_runs_the_model_is_part_of_the_plan_and_nothing_for_a_cpu(job):
    hashes = set()
    for execution in EXECUTIONS:
        with draft_plan(job(device="cuda", execution=execution)) as draft:
            assert draft.identity["execution"] == execution
            hashes.add(draft.plan_hash)
    assert len(hashes) == 3
    with pytest.raises(UsageError, match="execution compiled does not run on cpu; use eager, or device cuda"):
        draft_plan(job(device="cpu", execution="compiled"))
    with pytest.raises(UsageError, match="execution 'jit' does not exist; there is eager, graphs, compiled"):
        job(execution="jit")


def test_the_same_rows_from_elsewhere_are_the_same_plan(job, tmp_path, monkeypatch):
    rows = [{"prompt": f"p {number}", "seed": number, "tag": "x" * (number % 7)} for number in range(50)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet", row_group_size=7)
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(snapshot, "PART_ROWS", 12)
    hashes = {hash_of(job(prompts=[str(tmp_path / name)])) for name in ("m.parquet", "m.jsonl")}
    monkeypatch.setattr(readers, "BLOCK_BYTES", 100)
    hashes.add(hash_of(job(prompts=[str(tmp_path / "m.jsonl")])))
    assert len(hashes) == 1


PEAK = """
import re, sys
from pathlib import Path
from latentmill.jobs.plans.plan import draft_plan
from latentmill.jobs.settings import settings_of
from latentmill.jobs.job_file import resolve
from latentmill.jobs.spec import JobSpec, Runtime
with draft_plan(resolve(None, {"prompts": [sys.argv[1]], "model": sys.argv[2], "sweep": ["seed=0:1000"]})) as draft:
    peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
    print(draft.grid.n_samples, peak)
"""


@pytest.mark.long
def test_memory_does_not_grow_with_the_manifest(tmp_path, tiny_model):
    peaks = []
    for rows in (100_000, 700_000):
        path = tmp_path / f"{rows}.txt"
        path.write_text("".join(f"a picture of the thing number {number}, oil on canvas\n" for number in range(rows)))
        command = [sys.executable, "-c", PEAK, str(path), str(tiny_model)]
        samples, peak = map(int, subprocess.run(command, capture_output=True, check=True).stdout.split())
        assert samples == rows * 1000
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 25  # 600,000 more rows are 30 MB of text alone


def test_parts_are_cut_by_bytes_too(job, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "PART_BYTES", 1000)
    (tmp_path / "m.txt").write_text("".join("x" * 300 + f"{number}\n" for number in range(10)))
    with draft_plan(job(prompts=[str(tmp_path / "m.txt")])) as draft:
        assert [part.rows for part in draft.snapshot.parts] == [4, 4, 2]


def test_rejected_rows_are_written_with_reasons_and_change_nothing_else(job, tmp_path):
    (tmp_path / "m.csv").write_text("prompt,seed,id\nfine,1,a\nbad,-1,../x\nbad too,x,\nfine too,,a\n")
    plan = publish(job(prompts=[str(tmp_path / "m.csv")]))
    assert (plan.n_rows, plan.n_rejected) == (2, 2)
    rejected = pq.read_table(tmp_path / "out/_job/rejected.parquet").to_pylist()
    assert [(row["source_row"], row["row_number"], row["row_id"], row["excerpt"]) for row in rejected] == [
        (2, 2, "../x", "bad"),
        (3, 3, "3", "bad too"),
    ]
    assert "seed -1 is outside" in rejected[0]["reason"]
    assert rejected[0]["source"].endswith("m.csv")
    samples = plan.samples_of_chunk(0)
    assert [(sample.row_number, sample.row_id, sample.request.seed) for sample in samples] == [
        (1, "a", 1),
        (4, "a", 43),
    ]


def test_rejects_beyond_the_record_are_counted(job, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "MAX_RECORDED_REJECTS", 3)
    (tmp_path / "m.csv").write_text("prompt,seed\nfine,1\n" + "bad,x\n" * 10)
    assert publish(job(prompts=[str(tmp_path / "m.csv")])).n_rejected == 10
    assert pq.read_metadata(tmp_path / "out/_job/rejected.parquet").num_rows == 3


def test_row_numbers_run_through_all_files(job, tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.csv").write_text("prompt,seed\nthree,x\nfour,4\n")
    plan = publish(job(prompts=[str(tmp_path / "a.txt"), str(tmp_path / "b.csv")]))
    assert [sample.row_number for sample in plan.samples_of_chunk(0)] == [1, 3, 5]
    assert pq.read_table(tmp_path / "out/_job/rejected.parquet").column("row_number").to_pylist() == [4]


def test_carried_columns_reach_the_record_schema_under_safe_names(job, tmp_path):
    when = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
    table = pa.table(
        {
            "prompt": ["a", "b"],
            "status": ["theirs", None],
            "manifest_status": [1, 2],
            "row_number": [7, 8],
            "vector": pa.array([[1.0], None], pa.list_(pa.float32())),
            "at": pa.array([1_700_000_000_000_000_001, None], pa.timestamp("ns", "UTC")),
            "day": pa.array([when, when], pa.timestamp("us", "UTC")),
        }
    )
    pq.write_table(table, tmp_path / "m.parquet")
    plan = publish(job(prompts=[str(tmp_path / "m.parquet")]))
    names = ["manifest_manifest_status", "manifest_status", "row_number", "vector", "at", "day"]
    assert plan.record_schema.names[-6:] == names
    rows = [sample.extra for sample in plan.samples_of_chunk(0)]
    carried = pa.Table.from_pylist(rows, schema=pa.schema([plan.record_schema.field(name) for name in names]))
    for name, original in zip(names, ["status", "manifest_status", *names[2:]], strict=True):
        assert carried.column(name).combine_chunks().equals(table.column(original).combine_chunks()), name


def test_the_summary_says_what_would_happen(job, tmp_path):
    (tmp_path / "m.csv").write_text("prompt,width\nshort,\n" + "word " * 200 + ",\nwide,512\nbad,511\n")
    spec = job(
        prompts=[str(tmp_path / "m.csv")],
        sweep=["guidance_scale=1,4", "seed=0:3"],
        chunk_size=4,
        batch_size=4,
        num_images=1,
    )
    with draft_plan(spec) as draft:
        summary = draft.summary()
    assert (summary.rows, summary.rejected_rows, summary.samples) == (3, 1, 18)
    assert [(group.width, group.guided, group.samples) for group in summary.groups] == [
        (256, False, 6), (256, True, 6), (512, False, 3), (512, True, 3),
    ]  # fmt: skip
    assert (summary.chunks, summary.passes) == (6, 6 * summary.groups[0].num_inference_steps)
    assert summary.padding_waste == pytest.approx(0.25)
    assert (summary.token_limit, summary.tokens_over_limit, summary.tokens_checked) == (75, 1, 3)
    assert summary.bytes_expected == int(1.5 * (12 * 256 * 256 + 6 * 512 * 256))
    assert "width 511" in summary.first_rejects[0].reason
    assert json.loads(json.dumps(summary.to_dict()))["axes"] == {"guidance_scale": [1.0, 4.0], "seed": [0, 1, 2]}


def long_rows(tmp_path):
    """A short prompt, a long one, one that is long only with its brackets, and one with a long negative prompt."""
    rows = [
        {"prompt": "short"},
        {"prompt": "star " * 80},
        {"prompt": "(star) " * 60},
        {"prompt": "x", "negative_prompt": "star " * 90},
    ]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(tmp_path / "long.jsonl")]


@pytest.mark.parametrize(("syntax", "over"), [("plain", 3), ("a1111", 2)])
def test_long_prompts_are_counted_in_the_syntax_that_is_chosen(job, tmp_path, syntax, over):
    for choice in ("truncate", "chunk"):
        with draft_plan(job(prompts=long_rows(tmp_path), prompt_syntax=syntax, long_prompts=choice)) as draft:
            summary = draft.summary()
        assert (summary.rows, summary.tokens_over_limit, summary.tokens_checked) == (4, over, 4)
        assert (summary.prompt_syntax, summary.long_prompts) == (syntax, choice)


def test_long_prompts_are_rejected_with_their_length_where_they_are_errors(job, tmp_path):
    spec = job(prompts=long_rows(tmp_path), prompt_syntax="a1111", long_prompts="error")
    with draft_plan(spec) as draft:
        summary = draft.summary()
    assert (summary.rows, summary.rejected_rows, summary.tokens_over_limit, summary.tokens_checked) == (2, 2, 2, 4)
    assert [note.row_number for note in summary.first_rejects] == [2, 4]
    assert summary.first_rejects[0].reason.startswith("prompt has 80 tokens, the limit is 75; shorten it")
    assert summary.first_rejects[1].reason.startswith("negative_prompt has 90 tokens, the limit is 75")


def test_no_secret_reaches_the_plan(job, tmp_path, s3, s3_environment):
    import fsspec

    fsspec.filesystem("s3", use_listings_cache=False).pipe_file(f"{s3}/in/m.txt", b"one\n")
    publish(job(prompts=[f"{s3}/in/m.txt"], out=f"{s3}/out"))
    plan = load_plan(Storage.open(f"{s3}/out"))
    assert plan.sources == (f"{s3}/in/m.txt",)
    assert [sample.request.prompt for sample in plan.samples_of_chunk(0)] == ["one"]
    text = Storage.open(f"{s3}/out").read("_job/plan.json").decode()
    assert s3_environment["AWS_SECRET_ACCESS_KEY"] not in text
    assert s3_environment["AWS_ACCESS_KEY_ID"] not in text


def test_a_damaged_plan_or_snapshot_is_refused(job, tmp_path):
    spec = job()
    publish(spec)
    out = tmp_path / "out" / "_job"
    part = next(out.glob("manifest-*.parquet"))
    other = pa.table(pq.read_table(part).to_pydict() | {"prompt": ["x"] * 5}, schema=pq.read_schema(part))
    pq.write_table(other, part)
    with pytest.raises(JobError, match="part 0 of the plan is not what was planned"):
        load_plan(Storage.open(spec.out)).samples_of_chunk(0)
    part.write_bytes(b"PAR1")
    with pytest.raises(JobError, match="part 0 of the plan cannot be read"):
        load_plan(Storage.open(spec.out)).samples_of_chunk(0)
    text = (out / "plan.json").read_text()
    for damaged in (
        text.replace('"seed":42', '"seed":43'),
        text.replace('"rows":5', '"rows":6'),
        text[:-1],
        "[]",
        "{}",
    ):
        assert damaged != text
        (out / "plan.json").write_text(damaged)
        with pytest.raises(JobError, match=r"plan\.json"):
            load_plan(Storage.open(spec.out))


def test_samplers_are_stored_by_name_and_an_unknown_one_is_refused(job, tmp_path):
    (tmp_path / "m.csv").write_text("prompt,sampler\na,plms\nb,ddim\n")
    spec = job(prompts=[str(tmp_path / "m.csv")])
    publish(spec)
    path = tmp_path / "out/_job/plan.json"
    document = json.loads(path.read_bytes())
    assert {values[3] for values in document["manifest"]["classes"]} == {"ddim", "plms"}
    document.pop("checksum")
    document["manifest"]["classes"][0][3] = "newer"
    path.write_text(json.dumps(document | {"checksum": fingerprint(document)}))
    with pytest.raises(JobError, match="the sampler 'newer', which this version lacks"):
        load_plan(Storage.open(spec.out))


def test_a_full_disk_for_the_spool_is_one_line(job, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(snapshot.pq, "write_table", full)
    with pytest.raises(JobError, match=r"spooled to .*: No space left on device; set TMPDIR"):
        draft_plan(job())


def test_an_output_without_a_plan_is_named(tmp_path):
    with pytest.raises(UsageError, match="has no plan; start one with: latentmill run"):
        load_plan(Storage.open(str(tmp_path)))


def incomplete_model(tmp_path, tiny_model):
    shutil.copytree(tiny_model, tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "vae")
    return str(tmp_path / "half")


BAD_JOBS = {
    "no manifest": (lambda put, half: {"prompts": ["nowhere.txt"]}, ["nowhere.txt does not exist"]),
    "empty": (lambda put, half: {"prompts": [put("m.txt", "\n \n")]}, ["m.txt", "holds no rows"]),
    "header only": (lambda put, half: {"prompts": [put("m.csv", "prompt\n")]}, ["holds no rows"]),
    "no valid row": (
        lambda put, half: {"prompts": [put("m.csv", "prompt,seed\na,x\nb,y\n")]},
        ["none of the 2 rows is valid", "row 1", "seed 'x'"],
    ),
    "strict": (
        lambda put, half: {"prompts": [put("m.csv", "prompt,seed\na,1\nb,y\n")], "strict": True},
        ["m.csv, row 2", "seed 'y'", "strict"],
    ),
    "unknown model": (lambda put, half: {"model": "embeded"}, ["'embeded'", "did you mean 'embedded'", "folder"]),
    "half a model": (lambda put, half: {"model": half()}, ["vae", "missing"]),
    "a file as model": (lambda put, half: {"model": put("m.ckpt", "x")}, ["m.ckpt"]),
    "revision": (lambda put, half: {"revision": "main"}, ["revision 'main'"]),
    "odd size": (lambda put, half: {"width": 257}, ["width 257", "multiple of 8", "256 or 264"]),
    "small for the watermark": (lambda put, half: {"width": 128}, ["128x256", "65,536", "watermark none"]),
    "plms with eta": (lambda put, half: {"sampler": "plms", "eta": 0.3}, ["eta 0.3", "plms"]),
    "euler_a with eta": (lambda put, half: {"sampler": "euler_a", "eta": 0.3}, ["eta 0.3", "euler_a", "sampler ddim"]),
    "steps that do not fit": (
        lambda put, half: {"num_inference_steps": 3, "timestep_spacing": "original"},
        ["sampler ddim", "num_inference_steps is 3", "original spacing", "the nearest number that does is 2"],
    ),
    "steps of an axis": (
        lambda put, half: {"sweep": ["num_inference_steps=4,3"], "timestep_spacing": "original"},
        ["num_inference_steps is 3"],
    ),
    "spacing": (lambda put, half: {"timestep_spacing": "even"}, ["timestep_spacing 'even'", "trailing"]),
    "tokenizer of a folder": (lambda put, half: {"tokenizer": "x/y"}, ["tokenizer is 'x/y'", "leave it out"]),
    "no checker": (lambda put, half: {"safety": "clip-concepts"}, ["clip-concepts", "safety_checker", "open-nsfw"]),
    "no watermark to require": (
        lambda put, half: {"watermark": "none", "watermark_policy": "require"},
        ["watermark_policy 'require'", "watermark is none"],
    ),
    "a watermark of chance": (
        lambda put, half: {"watermark_text": "ab", "watermark_policy": "retry"},
        ["watermark_text 'ab' has 16 bits", "3 bytes"],
    ),
    "default negative too long": (
        lambda put, half: {"negative_prompt": "word " * 300, "long_prompts": "error"},
        ["negative_prompt has", "tokens, the limit is 75", "chunk"],
    ),
    "blocks as lines": (
        lambda put, half: {"prompts": [put("m.txt", "a cat\nNegative prompt: blurry\n")]},
        ["m.txt", "manifest_format parameters", "lines"],
    ),
    "axis size": (lambda put, half: {"sweep": ["width=256,300"]}, ["axis width", "300"]),
    "seeds run out": (lambda put, half: {"seed": 2**32 - 3}, ["seed 4294967293", "5 samples", "4294967295"]),
    "too many groups": (
        lambda put, half: {"sweep": ["num_inference_steps=1:601", "sampler=ddim,plms"]},
        ["1,200 combinations", "1,024"],
    ),
    "too many samples": (
        lambda put, half: {"sweep": ["seed=0:60000", "eta=0,0.1", "negative_prompt=x"][:2], "num_images": 1000}
        | {"prompts": [put("m.txt", "a\n" * 1000)]},
        ["120,000,000,000 samples", "10,000,000,000"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_JOBS)
def test_a_job_that_cannot_run_is_refused_in_one_line_and_leaves_nothing(job, tmp_path, tiny_model, case, monkeypatch):
    import tempfile

    def put(name, text):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    spool = tmp_path / "spool"
    spool.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spool))
    make, words = BAD_JOBS[case]
    with pytest.raises(UsageError) as caught:
        publish(job(**make(put, lambda: incomplete_model(tmp_path, tiny_model))))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    assert not list(spool.iterdir())
    assert not (tmp_path / "out").exists()


def test_presets_are_whole_and_the_default_exists():
    presets = list_presets()
    assert "embedded" in presets
    for name, preset in presets.items():
        assert preset.width % 8 == 0, name
        assert preset.width * preset.height >= 65_536, name


def test_a_machine_that_cannot_load_opencv_is_told_before_a_model_is_loaded(job, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UsageError, match="install libgl1, or put opencv-python-headless in its place"):
        draft_plan(job())
    draft_plan(job(watermark="none")).close()


def test_a_plan_knows_the_job_that_was_planned_with_nothing_left_open(job):
    spec = job(sweep=["seed=1,2"], safety="none", watermark="none", chunk_size=7)
    plan = publish(spec)
    assert plan.settings.runtime == Runtime()
    assert (plan.settings.out, plan.settings.model, plan.settings.sweep) == (
        Storage.open(spec.out).url,
        spec.model,
        {"seed": [1, 2]},
    )
    planned = {name: getattr(plan.settings, name) for name, setting in settings_of(JobSpec).items() if setting.planned}
    assert planned.pop("strength") is None, "no row has an image to start from"
    known = {**plan.identity, **plan.parameters, "nsfw_threshold": spec.nsfw_threshold}
    assert planned == {name: known[name] for name in planned}
    assert None not in planned.values()
    assert (plan.settings.batch_size, plan.settings.chunk_size) == (plan.batch_size, 7)
