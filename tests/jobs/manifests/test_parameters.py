"""Prompts in the words of web UIs: blocks, pictures' own text, lines with flags; and what we embed comes back."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from latentmill.engine import SAMPLER_CHOICES, SAMPLER_LABELS, GenerationRequest
from latentmill.jobs.errors import UsageError
from latentmill.jobs.ledger.pictures import encode_png
from latentmill.jobs.manifests.flags_reader import read_flags
from latentmill.jobs.manifests.manifest import open_manifest
from latentmill.jobs.manifests.parameters import find_sampler, parameters_text, read_parameters
from latentmill.jobs.manifests.readers import MAX_ROW_BYTES
from tests.jobs.driver import job_spec, read_dataset, run

ALICE = (
    "Positive prompt: {{alice}}, alice in wonderland, {{{solo}}},1girl,{{delicate face}}, 10s,\n"
    "Negative prompt: lowres,highres, worst quality, more than 2 nipples,malformed hands,\n"
    "Steps: 50, Sampler: DDIM, CFG scale: 7, Size: 1024x1024"
)
A1111 = (
    "a (cat:1.2), 4k\nsecond line\nNegative prompt: blurry, <lora:x:1>\nSteps: 20, Sampler: DPM++ 2M, Schedule type: "
    'Karras, CFG scale: 7.5, Seed: 1, Size: 512x768, Model hash: abc, Lora hashes: "a: 1, b: \\"2\\"", Version: v1.9.4'
)


def rows_of(path: Path, text_format: str = "auto") -> tuple[list[int], list[dict[str, Any]], dict[int, str]]:
    """Line numbers, rows without what is missing, and faults."""
    (source,) = open_manifest([str(path)], text_format).sources
    lines: list[int] = []
    rows: list[dict[str, Any]] = []
    faults: dict[int, str] = {}
    for batch in source.batches():
        faults |= {len(rows) + index: fault for index, fault in batch.faults.items()}
        lines += batch.lines.tolist()
        for index in range(len(batch)):
            row = {name: values[index] for name, values in batch.columns.items()}
            rows.append({name: value for name, value in row.items() if value is not None})
    return lines, rows, faults


def test_the_articles_own_example_is_read_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "alice.txt").write_text(ALICE)
    _, rows, faults = rows_of(tmp_path / "alice.txt", "parameters")
    positive, negative, _ = ALICE.split("\n")
    assert not faults
    assert rows == [
        {
            "prompt": positive.removeprefix("Positive prompt: "),
            "negative_prompt": negative.removeprefix("Negative prompt: "),
            "num_inference_steps": "50",
            "sampler": "ddim",
            "guidance_scale": "7",
            "width": 1024,
            "height": 1024,
        }
    ]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("packed", [False, True])
def test_blocks_are_separated_by_blank_lines_or_by_their_settings(tmp_path: Path, ending: str, packed: bool) -> None:
    text = f"\n{ALICE}\n\n \n{A1111}\nonly a prompt\n\nwith: two, pairs: here\n".replace("\n", ending).encode()
    path = tmp_path / ("m.txt.gz" if packed else "m.txt")
    path.write_bytes(gzip.compress(text) if packed else text)
    lines, rows, faults = rows_of(path, "parameters")
    assert (lines, faults) == ([2, 7, 11, 13], {})
    other = json.loads(rows[1].pop("parameters"))
    assert other == {"Model hash": "abc", "Lora hashes": 'a: 1, b: "2"', "Version": "v1.9.4"}
    assert rows[1:] == [
        {
            "prompt": "a (cat:1.2), 4k\nsecond line",
            "negative_prompt": "blurry, <lora:x:1>",
            "num_inference_steps": "20",
            "sampler": "dpmpp_2m_karras",
            "guidance_scale": "7.5",
            "seed": "1",
            "width": 512,
            "height": 768,
        },
        {"prompt": "only a prompt"},
        {"prompt": "with: two, pairs: here"},
    ]


@pytest.mark.parametrize(
    ("last", "is_prompt"),
    [
        ("Steps: 20, Seed: 1", True),
        ("Steps: 20, Seed: 1, Size: 8x8", False),
        ("a: 1, b: 2, c: 3", True),
        ("portrait, Steps: 20, Seed: 1, Size: 8x8", True),
    ],
)
def test_the_last_line_counts_only_with_three_pairs_of_settings(last: str, is_prompt: bool) -> None:
    row, fault = read_parameters(["cat", last])
    assert fault is None
    assert row["prompt"] == ("cat\n" + last if is_prompt else "cat")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("Sampler: DPM adaptive", "sampler 'DPM adaptive' is unknown; known: DDIM, PLMS, Euler, Euler a"),
        ("Sampler: Euler, Schedule type: Karras", "sampler 'Euler' with schedule type 'Karras' is unknown"),
        ("Sampler: DPM++ 2M SDE, Schedule type: Automatic", "with schedule type 'Automatic' is unknown"),
        ("Size: 512", "Size '512' is not WIDTHxHEIGHT; write for example 512x512"),
    ],
)
def test_a_block_that_cannot_be_followed_is_a_fault_of_its_row(tmp_path: Path, settings: str, words: str) -> None:
    (tmp_path / "m.txt").write_text(f"bad\nSteps: 20, Seed: 1, {settings}\n\ngood\nSteps: 1, Seed: 2, CFG scale: 3\n")
    _, rows, faults = rows_of(tmp_path / "m.txt", "parameters")
    assert list(faults) == [0]
    assert words in faults[0]
    assert [row["prompt"] for row in rows] == ["bad", "good"]


def test_samplers_have_the_names_of_web_uis_both_ways() -> None:
    assert SAMPLER_LABELS.keys() == set(SAMPLER_CHOICES)
    for sampler, name in SAMPLER_LABELS.items():
        assert find_sampler(name) == find_sampler(name.upper()) == find_sampler(sampler) == sampler
    assert find_sampler("DPM++ 2M Karras", "Karras") == find_sampler("DPM++ 2M", "Automatic") == "dpmpp_2m_karras"
    assert find_sampler("Euler a", "Automatic") == find_sampler("Euler a", "Normal") == "euler_a"


NASTY = [
    ("a cat", ""),
    ("", ""),
    ("", "only, a: negative"),
    ('commas, colons: and "quotes" \\ {{x}}', "b: c, d"),
    ("two\nlines\n\nand a blank one", "one\ntwo"),
    ("  spaces around  \n", " \n "),
    ("Steps: 3, Sampler: PLMS, CFG scale: 1, Seed: 5", "Steps: 1, Seed: 2, Size: 3x3"),
    ("cat\nNegative prompt: not mine", ""),
    ("cat\nNegative prompt: not mine", "Negative prompt: twice\nNegative prompt: thrice"),
    ("Positive prompt: mine", "Positive prompt: x"),
    ("snow ☃ 漢字 e\u0301 \u2028 \x85 \x0b", "ünï\r\ncode\r"),
]


@pytest.mark.parametrize(("prompt", "negative"), NASTY)
def test_what_we_embed_comes_back_as_it_was_asked(tmp_path: Path, prompt: str, negative: str) -> None:
    request = GenerationRequest(
        prompt=prompt,
        negative_prompt=negative,
        seed=2**32 - 1,
        width=72,
        height=64,
        num_inference_steps=31,
        guidance_scale=7.123456789,
        sampler="ddim",
        eta=0.1234567,
    )
    text = parameters_text(request, model_name='m: "x",\ny', model_hash="h", version="v 1")
    (tmp_path / "0.png").write_bytes(encode_png(np.zeros((8, 8, 3), np.uint8), text))
    lines, (row,), faults = rows_of(tmp_path / "0.png")
    assert (lines, faults, row.pop("id")) == ([1], {}, "0.png")
    assert json.loads(row.pop("parameters")) == {"Model hash": "h", "Model": 'm: "x",\ny', "Version": "v 1"}
    numbers = {name: int(row[name]) for name in ("seed", "width", "height", "num_inference_steps")}
    numbers |= {name: float(row[name]) for name in ("guidance_scale", "eta")}
    assert GenerationRequest(**{"negative_prompt": "", **row, **numbers}) == request


def test_a_picture_without_text_is_a_fault_and_no_picture_too(tmp_path: Path) -> None:
    (tmp_path / "bare.png").write_bytes(encode_png(np.zeros((8, 8, 3), np.uint8)))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    assert "no parameters text" in rows_of(tmp_path / "bare.png")[2][0]
    assert "cannot be read as a PNG" in rows_of(tmp_path / "broken.png")[2][0]


def test_text_behind_the_pixels_is_read_too(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    text = PngImagePlugin.PngInfo()
    text.add_itxt("parameters", "late ☃")
    late = io.BytesIO()
    Image.new("RGB", (8, 8)).save(late, "PNG", pnginfo=text)
    chunk = late.getvalue()[late.getvalue().index(b"iTXt") - 4 : late.getvalue().index(b"IDAT") - 4]
    data = buffer.getvalue()
    (tmp_path / "late.png").write_bytes(data[:-12] + chunk + data[-12:])
    assert rows_of(tmp_path / "late.png")[1][0]["prompt"] == "late ☃"


@pytest.mark.parametrize("line", ["Steps: 1, " + "a" * 500_000, "Steps: 1," + " " * 500_000, 'Steps: "' * 60_000])
def test_long_lines_are_read_in_no_time(line: str) -> None:
    read_parameters(["cat", line])  # a pattern that tries every start again would take hours


def test_blocks_over_the_limit_are_faults_and_the_next_is_read(tmp_path: Path) -> None:
    long = "x" * 1000 + "\n"
    (tmp_path / "m.txt").write_text("one\n\n" + long * (MAX_ROW_BYTES // 1000 + 2) + "\n\ntwo\n")
    lines, rows, faults = rows_of(tmp_path / "m.txt", "parameters")
    assert (lines[:2], list(faults), rows[2]) == ([1, 3], [1], {"prompt": "two"})


def test_the_pictures_of_a_job_are_a_manifest_of_the_same_pictures(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "m.jsonl").write_text(
        "".join(json.dumps(dict(zip(("prompt", "negative_prompt"), pair, strict=True))) + "\n" for pair in NASTY)
    )
    sweep = {"guidance_scale": [1, 3.3], "sampler": ["plms", "dpmpp_2m_karras"]}
    run(job_spec(tiny_model, tmp_path / "m.jsonl", tmp_path / "first", sweep=sweep))
    run(job_spec(tiny_model, f"{tmp_path}/first/images/*/*/*.png", tmp_path / "second"))
    first, second = (read_dataset(str(tmp_path / name)).rows for name in ("first", "second"))
    assert len(first) == 4 * len(NASTY)
    assert {row["row_id"]: row["pixel_sha256"] for row in second.to_pylist()} == {
        f"{row['sample_id']}.png": row["pixel_sha256"] for row in first.to_pylist()
    }


@pytest.mark.parametrize(
    ("line", "row"),
    [
        ("a cat -- sitting", {"prompt": "a cat -- sitting"}),
        (
            '--prompt "a cat, \\"quoted\\"" --negative_prompt bad hands --seed 5 --steps=9 --sampler_name "Euler a"',
            {
                "prompt": 'a cat, "quoted"',
                "negative_prompt": "bad hands",
                "seed": "5",
                "num_inference_steps": "9",
                "sampler": "euler_a",
            },
        ),
        (
            "--prompt 'x' --width 256 --height 320 --cfg_scale 3.5 --n_iter 2 --seed -1",
            {"prompt": "x", "width": "256", "height": "320", "guidance_scale": "3.5", "num_images": "2"},
        ),
        (
            "it's a cat --n bad, it's --d 7 --s 20 --l 4.5 --w 512 --h 768",
            {
                "prompt": "it's a cat",
                "negative_prompt": "bad, it's",
                "seed": "7",
                "num_inference_steps": "20",
                "guidance_scale": "4.5",
                "width": "512",
                "height": "768",
            },
        ),
        ("--prompt '$(touch x); `id`'", {"prompt": "$(touch x); `id`"}),
    ],
)
def test_flags_in_lines_are_parameters(line: str, row: dict[str, str]) -> None:
    assert read_flags(line) == (row, None)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--prompt x --outpath_samples /etc", "--outpath_samples is unknown; known: --prompt"),
        ("--prompt x --sed 3", "--sed is unknown, did you mean 'seed'?"),
        ("--prompt 'x", "not quoted as in a shell"),
        ("--prompt x --seed", "--seed has no value"),
        ("--prompt x --prompt y", "--prompt is given twice"),
        ("--prompt x --sampler_name UniPC", "sampler 'UniPC' is unknown"),
        ("a cat --ar 16:9", "--ar is unknown; known: --n"),
    ],
)
def test_flags_that_are_not_understood_are_faults(line: str, words: str) -> None:
    _, fault = read_flags(line)
    assert fault is not None
    assert words in fault


def test_lines_with_flags_are_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "m.txt").write_text("--prompt a --seed 1\n\nplain\nb --d 2 --zz 1\n")
    lines, rows, faults = rows_of(tmp_path / "m.txt", "flags")
    assert (lines, rows[:2], list(faults)) == ([1, 3, 4], [{"prompt": "a", "seed": "1"}, {"prompt": "plain"}], [2])


@pytest.mark.parametrize(
    ("text", "format_"), [(ALICE, "parameters"), ("\n" + A1111, "parameters"), ("--prompt x", "flags")]
)
def test_other_text_is_not_silently_read_as_lines(tmp_path: Path, text: str, format_: str) -> None:
    (tmp_path / "m.txt").write_text(text)
    with pytest.raises(UsageError, match=f"use manifest_format {format_}, or lines"):
        open_manifest([str(tmp_path / "m.txt")])
    assert len(rows_of(tmp_path / "m.txt", "lines")[1]) == len([line for line in text.split("\n") if line])
