"""What docs/marking.md promises: each picture's file says that a model made it, and what that costs and proves."""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import EpsImagePlugin, Image

from latentmill.engine import embed_watermark, watermark_bit_accuracy
from latentmill.jobs import postprocess, xmp
from latentmill.jobs.credentials import Credentials, installed
from latentmill.jobs.errors import JobError, OutputConflictError, UsageError
from latentmill.jobs.inspection import Inspection, Unread, inspect_files
from latentmill.jobs.job import Job, open_job
from latentmill.jobs.ledger.pictures import decode_png, encode_png, encode_png_before_4, stated_source_type
from latentmill.jobs.ledger.png_chunks import read_chunks, utf8_chunk, with_chunks
from latentmill.jobs.outputs.repair import repair
from latentmill.jobs.outputs.verify import verify
from latentmill.jobs.plans import columns
from latentmill.jobs.plans.columns import COLUMNS
from latentmill.jobs.spec import JobSpec
from tests.jobs.driver import job_spec, run
from tests.jobs.outputs.repairs import healed_engine

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TEXT = "StableDiffusionV1"
PARAMETERS = [
    "a red circle\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1",
    "café, naïve\nSteps: 3",
    "漢字 ☃\nSteps: 3",
]
Manifest = Callable[..., Path]


def photo(side: int, seed: int = 0) -> np.ndarray:
    """Detail at every scale, and a sensor's noise, as in a photograph."""
    rng = np.random.default_rng(seed)
    total = np.zeros((side, side, 3))
    for octave in range(2, 9):
        small = rng.normal(size=(2**octave, 2**octave, 3)).astype(np.float32)
        total += cv2.resize(small, (side, side), interpolation=cv2.INTER_CUBIC) * 0.55**octave
    scaled = 127 + 60 * total / total.std() + rng.normal(size=total.shape)
    return np.clip(scaled, 0, 255).astype(np.uint8)


def drawing(side: int) -> np.ndarray:
    """Shapes on white with a decoder's faint noise, as the embedded model draws."""
    picture = np.full((side, side, 3), 250, np.uint8)
    cv2.circle(picture, (side // 2, side // 2), side // 4, (200, 40, 30), -1, cv2.LINE_AA)
    cv2.rectangle(picture, (side // 10, side // 10), (side // 4, side // 3), (30, 60, 190), -1)
    noise = np.random.default_rng(1).normal(scale=1.2, size=picture.shape)
    return np.clip(picture + cv2.GaussianBlur(noise, (0, 0), 1.0), 0, 255).astype(np.uint8)


def chunks_of(data: bytes, *kinds: bytes) -> list[tuple[bytes, bytes]]:
    return [(kind, body) for kind, body in read_chunks(data) if kind in kinds]


def text_as_the_web_uis_read_it(data: bytes) -> dict[str, str]:
    """By hand, from the PNG specification: keyword, NUL, text; in iTXt four fields between them."""
    found = {}
    for kind, body in chunks_of(data, b"tEXt", b"iTXt"):
        keyword, _, rest = body.partition(b"\0")
        text = rest.decode("latin-1") if kind == b"tEXt" else rest[2:].split(b"\0", 2)[2].decode()
        found[keyword.decode()] = text
    return found


@pytest.mark.parametrize("text", PARAMETERS)
def test_all_readers_see_the_pixels_the_parameters_and_the_mark(text: str) -> None:
    pixels = photo(64)
    data = encode_png(pixels, text)
    assert np.array_equal(decode_png(data, (64, 64)), pixels)
    assert np.array_equal(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)[:, :, ::-1], pixels)
    assert text_as_the_web_uis_read_it(data) == {"parameters": text, xmp.KEYWORD: xmp.PACKET}
    with Image.open(io.BytesIO(data)) as image:
        assert (image.mode, image.text["parameters"]) == ("RGB", text)
        assert image.info["xmp"] == xmp.PACKET.encode()
    with Image.open(io.BytesIO(data)) as image:
        image.verify()  # every chunk's checksum


@pytest.mark.parametrize("text", PARAMETERS)
def test_the_parameters_are_the_chunk_that_pillow_writes_and_stand_before_the_pixels(text: str) -> None:
    ours, pillows = (encode(photo(64), text) for encode in (encode_png, encode_png_before_4))
    assert chunks_of(pillows, b"tEXt", b"iTXt") == chunks_of(ours, b"tEXt", b"iTXt")[1:]
    kinds = [kind for kind, _ in read_chunks(ours)]
    assert kinds[:1] + kinds[3:4] + kinds[-1:] == [b"IHDR", b"IDAT", b"IEND"]


def test_the_mark_in_the_file_is_what_iptc_and_adobe_say() -> None:
    data = encode_png(photo(64))
    ((_, body),) = chunks_of(data, b"iTXt")
    packet = body.partition(b"\0\0\0\0\0")[2]
    assert len(packet) == 393
    assert packet.startswith('<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'.encode())
    (description,) = ElementTree.fromstring(packet).iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    stated = description.attrib["{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"]
    assert stated == "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


@pytest.mark.parametrize(
    ("packet", "stated"),
    [
        (b"<Iptc4xmpExt:DigitalSourceType>theirs</Iptc4xmpExt:DigitalSourceType>", "theirs"),
        (b"<a Iptc4xmpExt:DigitalSourceType = 'theirs'/>", "theirs"),
        (b"<a Iptc4xmpExt:DigitalSourceType=''/>", None),
        (b"<a photoshop:Credit='x'/>", None),
        (b"\xff\xfe", None),
    ],
)
def test_the_source_type_is_read_in_each_form_that_xmp_has(packet: bytes, stated: str | None) -> None:
    assert xmp.source_type(packet) == stated


def test_what_is_no_whole_png_states_nothing() -> None:
    data = encode_png(photo(64))
    assert stated_source_type(data) == xmp.DIGITAL_SOURCE_TYPE
    for other in (b"", data[:40], data[1:], encode_png_before_4(photo(64), "x"), b"GIF89a" + data[8:]):
        assert stated_source_type(other) is None


def test_the_bytes_do_not_depend_on_threads_or_on_the_array_they_come_from() -> None:
    pixels, threads = photo(512), cv2.getNumThreads()
    wide = np.zeros((512, 600, 3), np.uint8)
    wide[:, :512] = pixels
    try:
        files = set()
        for number in (1, 2, 8):
            cv2.setNumThreads(number)
            files |= {encode_png(pixels, "x"), encode_png(wide[:, :512], "x")}
    finally:
        cv2.setNumThreads(threads)
    assert len(files) == 1


@pytest.mark.parametrize("side", [256, 512])
@pytest.mark.parametrize("content", [photo, drawing])
def test_files_are_no_larger_than_pillows_by_more_than_a_tenth(content: Any, side: int) -> None:
    pixels = embed_watermark(content(side), TEXT, "dwtDctSvd")
    before, now = len(encode_png_before_4(pixels, PARAMETERS[0])), len(encode_png(pixels, PARAMETERS[0]))
    assert now <= 1.1 * before, f"{now} bytes, {before} before"


def test_encoding_takes_a_fraction_of_pillows_time() -> None:
    def seconds(encode: Callable[[np.ndarray, str], bytes]) -> float:
        start = time.process_time()
        encode(pixels, "x")
        return time.process_time() - start

    pixels = photo(512)
    pairs = [(seconds(encode_png), seconds(encode_png_before_4)) for _ in range(5)]
    assert min(ours for ours, _ in pairs) < 0.4 * min(pillows for _, pillows in pairs)


@pytest.fixture
def spec(tiny_model: Path, manifest: Manifest, tmp_path: Path) -> JobSpec:
    return job_spec(tiny_model, manifest(["one", "two nsfw", "three poison"]), tmp_path / "out")


def pictures_of(job: Job) -> dict[str, bytes]:
    rows = [
        row
        for chunk in range(job.plan.n_chunks)
        if (record := job.ledger.read(chunk))
        for row in record.table.to_pylist()
    ]
    return {row["image"]: job.pictures.read(row["image"]) for row in rows if row["image"]}


def test_every_picture_of_a_job_is_marked_the_black_ones_too_and_the_rows_say_so(spec: JobSpec) -> None:
    run(spec)
    files = pictures_of(open_job(spec.out))
    assert len(files) == 2
    assert {stated_source_type(data) for data in files.values()} == {xmp.DIGITAL_SOURCE_TYPE}
    (part,) = (Path(spec.out) / "dataset").glob("*.parquet")
    table = pq.read_table(part)
    assert set(table.column("digital_source_type").to_pylist()) == {xmp.DIGITAL_SOURCE_TYPE}
    assert table.schema.metadata[b"latentmill.digital_source_type"] == xmp.DIGITAL_SOURCE_TYPE.encode()
    assert verify(spec.out).defects == ()


def test_the_files_of_txt2img_are_marked(tmp_path: Path) -> None:
    from latentmill.jobs.txt2img.files import OutputFolder

    folder = OutputFolder(tmp_path)
    for path in (folder.save_sample(photo(64)), folder.save_grid(photo(64))):
        assert stated_source_type(path.read_bytes()) == xmp.DIGITAL_SOURCE_TYPE


def unmarked(pixels: np.ndarray, text: str) -> bytes:
    return encode_png_before_4(pixels, text)


def otherwise(pixels: np.ndarray, text: str) -> bytes:
    return with_chunks(
        unmarked(pixels, text), utf8_chunk(xmp.KEYWORD, "<a Iptc4xmpExt:DigitalSourceType='digitalCapture'/>")
    )


@pytest.mark.parametrize(("encode", "words"), [(unmarked, "no source type"), (otherwise, "'digitalCapture'")])
def test_verify_names_a_picture_without_the_mark(
    encode: Callable[..., bytes], words: str, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postprocess, "encode_png", encode)
    run(spec)
    defects = verify(spec.out).defects
    assert [defect.kind for defect in defects] == ["source-unstated"] * 2
    assert f"its XMP states {words}, not {xmp.DIGITAL_SOURCE_TYPE}" in defects[0].detail
    left = repair(spec.out, engine_factory=healed_engine).unhealed
    assert [defect.kind for defect in left] == ["source-unstated"] * 2


@pytest.mark.parametrize("version", [2, 3])
def test_an_output_begun_without_marks_stays_without_is_healed_and_not_gone_on_with(
    version: int, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as before:
        before.setattr(columns, "COLUMNS", tuple(column for column in COLUMNS if column.since <= version))
        before.setattr(columns, "MIXED_CHUNKS_SINCE", version)
        run(spec)
    job = open_job(spec.out)
    assert job.plan.format_version == version
    files = pictures_of(job)
    assert [kind for data in files.values() for kind, _ in chunks_of(data, b"iTXt", b"tEXt")] == [b"tEXt"] * 2
    assert verify(spec.out).defects == ()
    lost = sorted(files)[0]
    (Path(spec.out) / lost).unlink()
    assert repair(spec.out, engine_factory=healed_engine).exit_code == 0
    assert pictures_of(job) == files
    with pytest.raises(OutputConflictError, match=f"in format {version}, which this version reads but does not go on"):
        run(spec)
    assert pictures_of(job) == files


def inspect_one(path: Path, **options: Any) -> Inspection:
    (answer,) = inspect_files([str(path)], text=TEXT, **options)
    assert isinstance(answer, Inspection)
    return answer


def test_inspect_says_all_that_a_file_carries_and_its_row(tiny_model: Path, manifest: Manifest, tmp_path: Path) -> None:
    sizes = {"width": 256, "height": 256, "watermark": "dwtDctSvd"}
    spec = job_spec(tiny_model, manifest(["one", "two"]), tmp_path / "out", **sizes)
    run(spec)
    place, data = sorted(pictures_of(open_job(spec.out)).items())[1]
    (tmp_path / "copy.png").write_bytes(data)
    answer = inspect_one(tmp_path / "copy.png", dataset=spec.out)
    assert answer.found
    assert answer.sha256 == hashlib.sha256(data).hexdigest()
    assert (answer.width, answer.height, answer.c2pa) == (256, 256, Credentials(state="none"))
    assert answer.digital_source_type == xmp.DIGITAL_SOURCE_TYPE
    assert answer.parameters is not None
    assert answer.parameters.startswith("two\nSteps: 2, Sampler: DDIM")
    assert answer.row is not None
    assert (answer.row["prompt"], answer.row["image"]) == ("two", place)
    signed = with_chunks(data, struct.pack(">I4s4sI", 4, b"caBX", b"jumb", zlib.crc32(b"caBXjumb")))
    (tmp_path / "signed.png").write_bytes(signed)
    signed_answer = inspect_one(tmp_path / "signed.png", dataset=spec.out)
    assert (signed_answer.c2pa.state, signed_answer.row) == ("invalid" if installed() else "not checked", None)
    with pytest.raises(JobError, match="has no plan"):
        inspect_one(tmp_path / "copy.png", dataset=str(tmp_path))
    command = [sys.executable, "-m", "latentmill", "inspect", "copy.png", "none.png", "--dataset", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        1,
        "error: none.png does not exist or is no regular file; give picture files\n",
    )
    lines = done.stdout.splitlines()
    assert lines[0].startswith("copy.png: found, dwtDctSvd, ")
    assert lines[1:] == [
        f"  source type (XMP): {xmp.DIGITAL_SOURCE_TYPE}",
        "  C2PA: none",
        "  parameters: " + answer.parameters.replace("\n", "\\n"),
        f"  row: sample {answer.row['sample_id']}, ok, {place}",
    ]  # fmt: skip
    done = subprocess.run([*command, "--json"], cwd=tmp_path, capture_output=True, text=True, check=False)
    (first, second) = json.loads(done.stdout)
    assert (first["row"]["sample_id"], first["watermark"]["bits"], second["found"]) == ("00000001", 136, False)


def test_other_programs_pictures_are_inspected_too(tmp_path: Path) -> None:
    pixels = photo(256)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", xmp=xmp.PACKET.encode())
    Image.fromarray(pixels[:64, :64]).save(tmp_path / "small.png")
    answer = inspect_one(tmp_path / "a.jpg")
    assert (answer.found, answer.digital_source_type, answer.parameters) == (False, xmp.DIGITAL_SOURCE_TYPE, None)
    assert answer.c2pa == Credentials(state="none")
    answer = inspect_one(tmp_path / "small.png")
    assert (answer.watermark, answer.digital_source_type, answer.c2pa) == (None, None, Credentials(state="none"))
    (tmp_path / "text.png").write_text("no picture")
    _, unread = inspect_files([str(tmp_path / name) for name in ("a.jpg", "text.png")], text=TEXT)
    assert isinstance(unread, Unread)


def test_what_the_page_says_of_loss_is_so(tmp_path: Path) -> None:
    marked = embed_watermark(photo(512), TEXT, "dwtDctSvd")
    (tmp_path / "a.png").write_bytes(encode_png(marked))
    with Image.open(tmp_path / "a.png") as image:
        image.save(tmp_path / "again.png")  # Pillow keeps no metadata unless told to
        image.resize((480, 480)).save(tmp_path / "scaled.png")
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png")
        image.crop((1, 1, 512, 512)).save(tmp_path / "cut.png")
        image.save(tmp_path / "hard.jpg", quality=10)
    again = inspect_one(tmp_path / "again.png")
    assert (again.found, again.digital_source_type) == (True, None)
    for name in ("scaled.png", "turned.png", "cut.png", "hard.jpg"):
        assert not inspect_one(tmp_path / name).found, name
    flat = np.full((512, 512, 3), 250, np.uint8)
    assert watermark_bit_accuracy(embed_watermark(flat, TEXT, "dwtDct"), TEXT, "dwtDct") < 96 / 136
    black = np.zeros((512, 512, 3), np.uint8)
    for method in ("dwtDct", "dwtDctSvd"):
        assert watermark_bit_accuracy(embed_watermark(black, TEXT, method), TEXT, method) == 1


def test_the_pages_figures_and_tests_are_there() -> None:
    page = (ROOT / "docs" / "marking.md").read_text(encoding="utf-8")
    assert f"the same {len(xmp.PACKET.encode())} bytes" in page
    assert "no legal advice" in page
    named = set(re.findall(r"`(tests/[^`]+)`", page))
    assert str(Path(__file__).relative_to(ROOT)) in named
    assert all((ROOT / name).is_file() for name in named)


POSTPROCESS = """
import sys
import numpy as np
from latentmill.engine import GenerationResult, SafetyVerdict
from latentmill.jobs.job import open_job
from latentmill.jobs.postprocess import postprocess_sample

job = open_job(sys.argv[1])
(sample, *_) = job.plan.samples_of_chunk(0)
pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
verdict = SafetyVerdict(checker="none", score=0.0, flagged=False)
result = GenerationResult(
    pixels=pixels, error=None, safety=verdict, prompt_tokens=3, precision="fp32", batch_size=2, batch_slot=0
)
done = postprocess_sample(job.plan, sample, result, "test")
assert done.data is not None and done.row["watermark_bit_accuracy"] > 0.7, done.row
print(*sorted({name.partition(".")[0] for name in sys.modules} & set(sys.argv[2:])))
"""


def test_postprocessing_imports_neither_torch_nor_what_brings_it(
    tiny_model: Path, manifest: Manifest, tmp_path: Path
) -> None:
    sizes = {"width": 256, "height": 256, "watermark": "dwtDctSvd"}
    spec = job_spec(tiny_model, manifest(1), tmp_path / "out", **sizes)
    run(spec)
    heavy = ["torch", "transformers", "imwatermark", "pywt", "ray", "onnxruntime", "scipy", "cv2"]
    done = subprocess.run(
        [sys.executable, "-c", POSTPROCESS, spec.out, *heavy], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.split()) == (0, ["cv2"]), done.stderr


def test_a_picture_that_is_a_program_for_ghostscript_is_not_run(tmp_path, monkeypatch):
    ghostscript, ran = tmp_path / "gs", tmp_path / "ran"
    ghostscript.write_text(f"#!/bin/sh\ntouch {ran}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    Image.new("RGB", (300, 300)).save(tmp_path / "a.eps")
    with pytest.raises(UsageError, match="cannot be read as a picture"):
        inspect_files([str(tmp_path / "a.eps")], text="StableDiffusionV1")
    assert not ran.exists()
