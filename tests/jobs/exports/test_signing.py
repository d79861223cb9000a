"""Content credentials: exported pictures are signed, c2pa-python itself reads them, and a changed pixel shows."""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, ObjectIdentifier
from PIL import Image

from latentmill.jobs import credentials
from latentmill.jobs.credentials import read_credentials
from latentmill.jobs.errors import OutputConflictError, UsageError
from latentmill.jobs.exports.shards import open_export
from latentmill.jobs.exports.spec import make_export_spec
from latentmill.jobs.exports.table import EXPORTS, IMAGE_FORMATS
from latentmill.jobs.inspection import Inspection, inspect_files
from latentmill.jobs.xmp import DIGITAL_SOURCE_TYPE
from tests.harness.certificates import HAS_OPENSSL, Certificates, time_stamps, write_certificates
from tests.jobs.exports.conftest import Write, digests

c2pa = pytest.importorskip("c2pa")


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return write_certificates(tmp_path_factory.mktemp("signer"))


def files_of(signer: Certificates) -> dict[str, str]:
    return {"sign": str(signer.chain), "key": str(signer.key)}


def read_by_the_library(data: bytes, mime: str, issuer: Path | None = None) -> dict[str, Any]:
    """What c2pa-python says of a file, with nothing of ours between."""
    anchors = {} if issuer is None else {"trust": {"trust_anchors": issuer.read_text()}}
    context = c2pa.Context(c2pa.Settings.from_dict({"verify": {"verify_trust": True}, **anchors}))
    with c2pa.Reader(mime, io.BytesIO(data), context=context) as reader:
        found: dict[str, Any] = json.loads(reader.json())
    return found


def pictures_and_rows(folder: Path) -> tuple[list[Path], list[dict[str, Any]]]:
    lines = "".join(path.read_text() for path in sorted(folder.glob("*.jsonl"))).splitlines()
    rows = [json.loads(line) for line in lines]
    return [folder / row["file_name"] for row in rows], rows


@pytest.mark.parametrize("image_format", list(IMAGE_FORMATS))
def test_a_signed_picture_is_read_by_the_library_and_its_row_has_both_digests(
    image_format: str, write: Write, signer: Certificates, ok: list[dict[str, Any]], tmp_path: Path
):
    write("jsonl", image_format=image_format, **files_of(signer))
    write("jsonl", tmp_path / "plain", image_format=image_format)
    pictures, rows = pictures_and_rows(tmp_path / "export")
    plain, _ = pictures_and_rows(tmp_path / "plain")
    assert len(pictures) == 6
    for picture, unsigned, row, own in zip(pictures, plain, rows, ok, strict=True):
        data = picture.read_bytes()
        told = read_by_the_library(data, f"image/{image_format}", signer.issuer)
        assert told["validation_state"] == "Trusted"
        manifest = told["manifests"][told["active_manifest"]]
        assert manifest["claim_generator_info"][0]["name"] == "latentmill"
        assert manifest["claim_generator_info"][0]["version"] == "0.1.0"
        assert manifest["signature_info"]["common_name"] == "Test signer"
        assert "thumbnail" not in manifest
        (actions,) = [each for each in manifest["assertions"] if each["label"].startswith("c2pa.actions")]
        (action,) = actions["data"]["actions"]
        assert (action["action"], action["digitalSourceType"]) == ("c2pa.created", DIGITAL_SOURCE_TYPE)
        assert action["parameters"] == {"latentmill.model_sha256": own["model_sha256"]}
        assert (row["sha256"], row["exported_sha256"]) == (own["sha256"], hashlib.sha256(data).hexdigest())
        assert row["exported_bytes"] == len(data) < unsigned.stat().st_size + 4000
        with Image.open(picture) as shown, Image.open(unsigned) as before:
            assert np.array_equal(np.asarray(shown), np.asarray(before))
            assert b"trainedAlgorithmicMedia" in shown.info["xmp"]
            assert shown.info.get("parameters") == before.info.get("parameters")


def test_credentials_name_no_prompt_unless_asked(write: Write, signer: Certificates, tmp_path: Path):
    for prompted in (False, True):
        folder = tmp_path / str(prompted)
        write(
            "jsonl", folder, image_format="webp", filter="prompt == 'seven'", sign_prompt=prompted, **files_of(signer)
        )
        ((picture,), _) = pictures_and_rows(folder)
        assert (b"seven" in picture.read_bytes()) == prompted
    told = read_by_the_library(picture.read_bytes(), "image/webp")
    (assertion,) = told["manifests"][told["active_manifest"]]["assertions"]
    assert assertion["data"]["actions"][0]["parameters"]["latentmill.prompt"] == "seven"


@pytest.mark.parametrize("image_format", list(IMAGE_FORMATS))
def test_one_flipped_pixel_fails(image_format: str, write: Write, signer: Certificates, tmp_path: Path):
    write("jsonl", image_format=image_format, filter="prompt == 'one'", **files_of(signer))
    ((picture,), _) = pictures_and_rows(tmp_path / "export")
    with_credentials = picture.read_bytes()
    sound = read_credentials(with_credentials, image_format.upper(), str(signer.issuer))
    assert sound is not None
    assert (sound.state, sound.signer, sound.issuer) == ("trusted", "Test signer", "Test Mill")
    assert (sound.generator or "").startswith("latentmill 0.1.0")
    assert sound.digital_source_type == DIGITAL_SOURCE_TYPE
    untrusted = read_credentials(with_credentials, image_format.upper())
    assert untrusted is not None
    assert (untrusted.state, untrusted.failures) == ("valid", ("signingCredential.untrusted",))
    flipped = with_one_pixel_flipped(with_credentials, image_format)
    broken = read_credentials(flipped, image_format.upper(), str(signer.issuer))
    assert broken is not None
    assert broken.state == "invalid"
    assert "assertion.dataHash.mismatch" in broken.failures
    assert read_by_the_library(flipped, f"image/{image_format}", signer.issuer)["validation_state"] == "Invalid"


def with_one_pixel_flipped(data: bytes, image_format: str) -> bytes:
    """PNG: the same file with one value of its pixels changed and written anew; others: a bit of their pixels' data."""
    if image_format != "png":
        place = data.rindex(b"\xff\xda") + 60 if image_format == "jpeg" else data.index(b"VP8L") + 40
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    import struct
    import zlib

    start = data.index(b"IDAT") - 4
    (size,) = struct.unpack_from(">I", data, start)
    raw = bytearray(zlib.decompress(data[start + 8 : start + 8 + size]))
    raw[-1] ^= 1  # the last value, by which no other is predicted
    packed = zlib.compress(bytes(raw))
    chunk = struct.pack(">I", len(packed)) + b"IDAT" + packed + struct.pack(">I", zlib.crc32(b"IDAT" + packed))
    changed = data[:start] + chunk + data[start + 12 + size :]
    with Image.open(io.BytesIO(data)) as one, Image.open(io.BytesIO(changed)) as other:
        assert (np.asarray(one) != np.asarray(other)).sum() == 1
    return changed


@pytest.mark.parametrize("to", list(EXPORTS))
def test_every_form_holds_signed_pictures_and_goes_on_with_what_is_there(
    to: str, write: Write, signer: Certificates, tmp_path: Path
):
    settings = {"shard_size": "2", **files_of(signer)}
    first = write(to, **settings)
    before = digests(tmp_path / "export")
    again = write(to, verify=True, **settings)
    assert (first.written, again.written) == (3, 0)
    assert digests(tmp_path / "export") == before, "what is there is not signed again"
    assert any(b"c2pa" in path.read_bytes() for path in (tmp_path / "export").rglob("*") if path.is_file())
    for secret in (signer.key.read_bytes().splitlines()[1], str(signer.key).encode(), str(signer.chain).encode()):
        assert not any(secret in path.read_bytes() for path in (tmp_path / "export").rglob("*") if path.is_file())
    (tmp_path / "export/_export/export.json").unlink()
    lost = sorted((tmp_path / "export/_export/shards").rglob("*.json"))[1]
    lost.unlink()
    assert write(to, **settings).written == 1
    assert write(to, verify=True, **settings).written == 0


def test_signatures_in_tar_files_are_those_of_the_library(write: Write, signer: Certificates, tmp_path: Path):
    write("webdataset", **files_of(signer))
    with tarfile.open(tmp_path / "export/000000.tar") as tar:
        names = [name for name in tar.getnames() if name.endswith(".png")]
        states = [
            read_by_the_library(tar.extractfile(name).read(), "image/png", signer.issuer)["validation_state"]
            for name in names
        ]
    assert states == ["Trusted"] * 6


def test_another_signer_or_none_is_another_export(write: Write, signer: Certificates, tmp_path: Path):
    write("jsonl", **files_of(signer))
    other = write_certificates(tmp_path / "other")
    with pytest.raises(OutputConflictError, match=r"signing is .* there and None here"):
        write("jsonl")
    with pytest.raises(OutputConflictError, match=r"signing is .* there and .* here"):
        write("jsonl", **files_of(other))
    with pytest.raises(OutputConflictError, match=r"'prompts': False.* there and .*'prompts': True.* here"):
        write("jsonl", sign_prompt=True, **files_of(signer))
    write("jsonl", tmp_path / "plain")
    with pytest.raises(OutputConflictError, match="signing is None there"):
        write("jsonl", tmp_path / "plain", **files_of(signer))


def test_a_node_with_another_certificate_at_that_place_signs_nothing(
    write: Write, published: Path, signer: Certificates, tmp_path: Path
):
    write("jsonl", **files_of(signer))
    other = write_certificates(tmp_path / "other")
    begun = open_export(str(published), str(tmp_path / "export"), str(signer.chain), str(signer.key))
    assert begun.signing is not None
    begun = open_export(str(published), str(tmp_path / "export"), str(other.chain), str(other.key))
    with pytest.raises(UsageError, match=r"is not the one that the export at .* was begun with; put that one there"):
        _ = begun.signing


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_the_algorithm_follows_from_the_key(curve: ec.EllipticCurve, write: Write, tmp_path: Path):
    signer = write_certificates(tmp_path / "signer", curve=curve)
    write("jsonl", filter="prompt == 'one'", **files_of(signer))
    ((picture,), _) = pictures_and_rows(tmp_path / "export")
    told = read_by_the_library(picture.read_bytes(), "image/png", signer.issuer)
    assert told["validation_state"] == "Trusted"
    assert told["manifests"][told["active_manifest"]]["signature_info"]["alg"] in {"Es384", "Es512"}


@pytest.mark.parametrize("kind", ["Ed25519", "RSA"])
def test_keys_of_other_kinds_sign_too(kind: str, write: Write, tmp_path: Path):
    own = ed25519.Ed25519PrivateKey.generate() if kind == "Ed25519" else rsa.generate_private_key(65537, 2048)
    signer = write_certificates(tmp_path / "signer", key=own)
    write("jsonl", filter="prompt == 'one'", **files_of(signer))
    ((picture,), _) = pictures_and_rows(tmp_path / "export")
    told = read_by_the_library(picture.read_bytes(), "image/png", signer.issuer)
    assert told["validation_state"] == "Trusted"


@pytest.mark.parametrize("purpose", ["1.3.6.1.5.5.7.3.4", "1.3.6.1.5.5.7.3.36", "1.3.6.1.4.1.62558.2.1"])
def test_certificates_for_mail_documents_and_claims_sign_and_are_read(purpose: str, write: Write, tmp_path: Path):
    signer = write_certificates(tmp_path / "signer", purposes=[ObjectIdentifier(purpose)])
    write("jsonl", filter="prompt == 'one'", **files_of(signer))
    ((picture,), _) = pictures_and_rows(tmp_path / "export")
    found = read_credentials(picture.read_bytes(), "PNG", str(signer.issuer))
    assert found is not None
    assert found.state == "trusted"


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("purpose", "cannot sign: .*certificate is invalid.*give a certificate for digital signatures"),
        ("expired", "cannot sign: .*certificate"),
        ("key of another", "cannot sign: .*does not match"),
        ("no key", "key '.*' is no private key in PEM form without a passphrase"),
        ("a passphrase", "key '.*' is no private key in PEM form without a passphrase"),
        ("no certificate", "sign '.*' has no certificates in PEM form"),
        ("nowhere", "cannot be read: No such file or directory; give a PEM file"),
        ("alone", "cannot sign: .*self-signed"),
    ],
)
def test_what_cannot_sign_is_refused_before_anything_is_written(
    fault: str, why: str, write: Write, signer: Certificates, tmp_path: Path
):
    files = files_of(signer)
    match fault:
        case "purpose":
            files = files_of(write_certificates(tmp_path / "bad", purposes=[ExtendedKeyUsageOID.SERVER_AUTH]))
        case "expired":
            files = files_of(write_certificates(tmp_path / "bad", lifetime=datetime.timedelta(days=-1)))
        case "key of another":
            files["key"] = str(write_certificates(tmp_path / "bad").key)
        case "no key":
            files["key"] = str(signer.chain)
        case "a passphrase":
            files = files_of(write_certificates(tmp_path / "bad", passphrase=b"secret"))
        case "no certificate":
            files["sign"] = str(signer.key)
        case "nowhere":
            files["key"] = str(tmp_path / "nowhere.pem")
        case "alone":
            files["sign"] = str(signer.issuer)
    with pytest.raises(UsageError, match=why):
        write("jsonl", **files)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("given", [{"sign": "a"}, {"key": "a"}, {"sign_prompt": True}, {"timestamp_url": "http://a"}])
def test_signing_takes_both_files(given: dict[str, Any]):
    with pytest.raises(UsageError, match="give both --sign and --key"):
        make_export_spec({"to": "hf", "out": "out", **given})


def test_without_the_library_signing_names_the_extra_and_inspecting_says_not_checked(
    write: Write, signer: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write("jsonl", filter="prompt == 'one'", **files_of(signer))
    ((picture,), _) = pictures_and_rows(tmp_path / "export")
    script = (
        "import sys; sys.modules['c2pa'] = None\n"
        "from latentmill.jobs import credentials; credentials.installed = lambda: False\n"
        "from latentmill import cli; sys.argv = ['latentmill', *sys.argv[1:]]; cli.main()"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run([*command, "inspect", str(picture)], capture_output=True, text=True, check=False)
    assert "  C2PA: there, not checked: install latentmill[c2pa]" in done.stdout.splitlines()
    monkeypatch.setitem(sys.modules, "c2pa", None)
    assert credentials.installed() is False
    with pytest.raises(UsageError, match=r"pip install 'latentmill\[c2pa\]'"):
        write("jsonl", tmp_path / "other", **files_of(signer))
    assert not (tmp_path / "other").exists()


def test_inspect_reads_them_and_a_changed_file_ends_with_exit_code_1(
    write: Write, signer: Certificates, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write("jsonl", filter="prompt == 'one'", **files_of(signer))
    ((picture,), _) = pictures_and_rows(tmp_path / "export")
    changed = tmp_path / "changed.png"
    changed.write_bytes(with_one_pixel_flipped(picture.read_bytes(), "png"))
    sound, broken = inspect_files([str(picture), str(changed)], text="StableDiffusionV1", trust=str(signer.issuer))
    assert isinstance(sound, Inspection)
    assert isinstance(broken, Inspection)
    assert sound.c2pa is not None
    assert broken.c2pa is not None
    assert (sound.c2pa.state, broken.c2pa.state, broken.sound) == ("trusted", "invalid", False)
    from latentmill.jobs.show.dataset_views import show_inspections

    show_inspections([sound, broken])
    said = capsys.readouterr().out
    assert "C2PA: trusted; signed by Test signer, Test Mill; made by latentmill 0.1.0" in said
    assert "C2PA: INVALID: assertion.dataHash.mismatch" in said
    with pytest.raises(UsageError, match=r"trust '.*' cannot be read"):
        inspect_files([str(picture)], text="StableDiffusionV1", trust=str(tmp_path / "nowhere"))


def test_a_stranger_s_manifest_is_invalid_and_no_error():
    png = bytes.fromhex("89504e470d0a1a0a") + b"\0\0\0\4caBXjumb" + b"\0\0\0\0"
    found = read_credentials(png, "PNG")
    assert found is not None
    assert found.state == "invalid"
    assert read_credentials(b"GIF89a", "GIF") is None


@pytest.mark.skipif(not HAS_OPENSSL, reason="it needs openssl")
def test_a_time_stamp_says_when_it_was_signed(write: Write, signer: Certificates, tmp_path: Path):
    with time_stamps(tmp_path / "tsa") as (url, _):
        write("jsonl", filter="prompt == 'one'", timestamp_url=url, **files_of(signer))
    ((picture,), _) = pictures_and_rows(tmp_path / "export")
    told = read_by_the_library(picture.read_bytes(), "image/png", signer.issuer)
    assert told["manifests"][told["active_manifest"]]["signature_info"]["time"].startswith("20")
    found = read_credentials(picture.read_bytes(), "PNG", str(signer.issuer))
    assert found is not None
    assert found.time is not None
    with pytest.raises(UsageError, match="cannot sign"):  # the server is gone
        write("jsonl", tmp_path / "other", timestamp_url=url, **files_of(signer))


@pytest.mark.long
@pytest.mark.skipif(not HAS_OPENSSL, reason="it needs openssl")
def test_credentials_outlive_their_certificate_by_a_time_stamp_only(write: Write, tmp_path: Path):
    signer = write_certificates(tmp_path / "signer", lifetime=datetime.timedelta(seconds=10))
    ends = time.time() + 10
    signed = {}
    with time_stamps(tmp_path / "tsa") as (url, stamps):
        for name, settings in (("stamped", {"timestamp_url": url}), ("plain", {})):
            write("jsonl", tmp_path / name, filter="prompt == 'one'", **settings, **files_of(signer))
            ((picture,), _) = pictures_and_rows(tmp_path / name)
            signed[name] = picture.read_bytes()
    (tmp_path / "both.pem").write_bytes(signer.issuer.read_bytes() + stamps.issuer.read_bytes())

    def states(trust: Path) -> list[str]:
        found = [read_credentials(signed[name], "PNG", str(trust)) for name in ("stamped", "plain")]
        return [each.state for each in found if each is not None]

    assert states(tmp_path / "both.pem") == ["trusted", "trusted"]
    time.sleep(max(0, ends + 1.5 - time.time()))
    assert states(tmp_path / "both.pem") == ["trusted", "invalid"]
    assert states(signer.issuer) == ["invalid", "invalid"], "the issuer of time stamps must be trusted too"


@pytest.mark.cluster
@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")  # Ray 2.60 uses its own old settings
def test_a_cluster_signs_with_the_files_of_its_nodes(
    write: Write, signer: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(signer.chain.parent)
    write("jsonl", tmp_path / "export", shard_size="2", executor="ray", sign="chain.pem", key="key.pem")
    pictures, rows = pictures_and_rows(tmp_path / "export")
    assert [row["exported_sha256"] for row in rows] == [
        hashlib.sha256(picture.read_bytes()).hexdigest() for picture in pictures
    ]
    states = [read_credentials(picture.read_bytes(), "PNG", str(signer.issuer)) for picture in pictures]
    assert [found.state for found in states if found is not None] == ["trusted"] * 6
