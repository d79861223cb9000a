"""Job files and flags: what is accepted, what overrides what, and one line for everything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentmill.jobs.errors import UsageError
from latentmill.jobs.job_file import BLANK_MANIFEST, load_job_file, resolve
from latentmill.jobs.spec import SETTINGS

EXAMPLES = sorted((Path(__file__).parents[2] / "configs" / "jobs").glob("*.yaml"))


def write_job(tmp_path: Path, text: str) -> str:
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_flags_override_the_job_file_and_none_is_no_flag(tmp_path):
    job = write_job(tmp_path, "prompts: a.txt\nseed: 7\nwidth: 320\nexecutor: inline\nnum_actors: 3\n")
    spec = resolve(job, {"seed": 9, "width": None, "prompts": [], "num_actors": 2})
    assert spec.prompts == ("a.txt",)
    assert (spec.seed, spec.width, spec.runtime.executor, spec.runtime.num_actors) == (9, 320, "inline", 2)


def test_runtime_may_be_nested_in_a_file_and_flags_still_win(tmp_path):
    job = write_job(tmp_path, "prompts: [a.txt, b.csv]\nruntime: {executor: inline, address: auto}\n")
    spec = resolve(job, {"executor": "ray"})
    assert (spec.runtime.executor, spec.runtime.address) == ("ray", "auto")
    assert spec.prompts == ("a.txt", "b.csv")


def test_axes_by_flag_replace_those_of_the_file_by_name_and_keep_their_place(tmp_path):
    job = write_job(tmp_path, "prompts: a.txt\nsweep:\n  seed: 0:4\n  sampler: ddim,plms\n")
    spec = resolve(job, {"sweep": ["sampler=plms", "guidance_scale=1,2"]})
    assert list(spec.sweep.items()) == [("seed", ["0:4"]), ("sampler", ["plms"]), ("guidance_scale", ["1", "2"])]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_a_valid_job(path):
    spec = resolve(str(path), {})
    if "prompt" in spec.sweep:
        assert spec.prompts == (str(BLANK_MANIFEST),)
    else:
        assert spec.prompts == ("configs/prompts/sample.txt",)


def test_there_is_an_example_for_each_use():
    assert [path.stem for path in EXAMPLES] == ["bulk-dataset", "nightly-sweep", "prompt-variants", "seed-cfg-grid"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"prompts": []}, ["no manifest is named", "give a file"]),
        ({"num_inference_stps": 3}, ["num_inference_stps", "did you mean 'num_inference_steps'"]),
        ({"chunk_size": 0}, ["chunk_size 0 is outside 1..4096"]),
        ({"batch_size": 100_000}, ["batch_size 100000 is outside 1..4096"]),
        ({"width": "x"}, ["width 'x'", "whole number"]),
        ({"width": 1_000_000}, ["width 1000000 is outside 1..4096"]),
        ({"num_images": 10**9}, ["num_images 1000000000 is outside 1..1000"]),
        ({"seed": 2**32}, ["seed 4294967296 is outside 0..4294967295"]),
        ({"guidance_scale": float("nan")}, ["guidance_scale nan is outside 0..100"]),
        ({"num_inference_steps": 10**5}, ["num_inference_steps 100000 is outside 1..1000"]),
        ({"eta": 2.0}, ["eta 2.0 is outside 0..1"]),
        ({"sampler": "dimm"}, ["sampler 'dimm' is unknown, did you mean 'ddim'"]),
        ({"format": "files"}, ["unknown key 'format'; pictures are always files; leave it out"]),
        ({"safety": "off"}, ["safety 'off'", "open-nsfw", "none"]),
        ({"watermark": "dwtdct"}, ["watermark 'dwtdct'", "did you mean 'dwtDct'"]),
        ({"watermark_text": ""}, ["watermark_text ''", "1 to 32 bytes"]),
        ({"on_flagged": "burn"}, ["on_flagged 'burn' does not exist", "blank"]),
        ({"executor": "rey"}, ["executor 'rey' does not exist, did you mean 'ray'", "inline"]),
        ({"num_actors": 0}, ["num_actors 0 is outside 1..10000"]),
        ({"dtype": "int8"}, ["dtype 'int8' does not exist", "float16"]),
        ({"out": "http://example.com/x"}, ["http", "s3"]),
        ({"negative_prompt": "a\0b"}, ["negative_prompt", "NUL"]),
        ({"negative_prompt": "x" * 20_000}, ["20,000 bytes", "16,384"]),
        ({"prompts": 7}, ["prompts is 7"]),
    ],
)
def test_a_bad_value_is_refused_in_one_line(flags, words):
    with pytest.raises(UsageError) as caught:
        resolve(None, {"prompts": ["a.txt"], **flags})
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    for word in words:
        assert word in message


def test_one_axis_may_be_given_without_a_list():
    assert dict(resolve(None, {"prompts": ["a.txt"], "out": "x", "sweep": "seed=0:4"}).sweep) == {"seed": ["0:4"]}
    with pytest.raises(UsageError, match="sweep is 5, expected a mapping of axes to values, or a list"):
        resolve(None, {"prompts": ["a.txt"], "out": "x", "sweep": 5})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("promts: a.txt\n", ["unknown key 'promts'", "did you mean 'prompts'"]),
        ("runtime: {adress: x}\n", ["unknown key 'adress'", "'address'"]),
        ("format: files\n", ["unknown key 'format'; pictures are always files; leave it out"]),
        ("- a\n- b\n", ["not a mapping"]),
        ("a: [\n", ["not YAML"]),
        ("date: 2026-02-30\n", ["not YAML", "day is out of range"]),
        ("sweep: 5\n", ["sweep is 5, expected a mapping"]),
        ("sweep: [a, b]\n", ["sweep is ['a', 'b'], expected a mapping"]),
        ("", ["not a mapping"]),
        ("1: 2\n", ["unknown key 1"]),
    ],
)
def test_a_bad_job_file_is_refused_in_one_line(tmp_path, text, words):
    with pytest.raises(UsageError) as caught:
        load_job_file(write_job(tmp_path, text))
    assert "\n" not in str(caught.value)
    assert "job.yaml" in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_job_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"nothing\.yaml does not exist"):
        load_job_file(str(tmp_path / "nothing.yaml"))


def test_a_manifest_given_as_job_file_is_refused_unread(tmp_path):
    path = tmp_path / "big.yaml"
    path.write_bytes(b"a" * 1_000_001)
    with pytest.raises(UsageError, match="is it a manifest"):
        load_job_file(str(path))


def test_a_job_file_has_every_flag_and_no_hashed_key_is_runtime():
    assert {"prompts", "out", "model", "sweep", "threads_per_actor", "executor", "address"} <= SETTINGS.keys()
    assert not SETTINGS.keys() & {"runtime", "dated"}
