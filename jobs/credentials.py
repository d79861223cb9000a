"""Content credentials (C2PA) in picture files: whether they are there, and what they say when they are checked.

They are read by the library c2pa-python, the optional extra `latentmill[c2pa]`; that they are there is seen without it.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from latentmill.jobs.errors import UsageError
from latentmill.jobs.ledger.png_chunks import read_chunks
from latentmill.jobs.manifests.fields import shorten

EXTRA = "latentmill[c2pa]"
State = Literal["none", "not checked", "invalid", "valid", "trusted"]

PURPOSES = "\n".join(
    (
        "1.3.6.1.5.5.7.3.4",  # e-mail
        "1.3.6.1.5.5.7.3.36",  # documents (RFC 9336)
        "1.3.6.1.4.1.62558.2.1",  # claims of C2PA
        "1.3.6.1.5.5.7.3.8",  # time stamps
        "1.3.6.1.5.5.7.3.9",  # OCSP
    )
)
"""The purposes (EKU) of certificates that C2PA's specification lets sign, 14.5.1; the library's own list is shorter."""

_MIME = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
_PNG_KIND, _WEBP_KIND = b"caBX", b"C2PA"
_JPEG_APP11, _JPEG_SCAN = 0xEB, 0xDA


@dataclass(frozen=True, kw_only=True, slots=True)
class Credentials:
    """What a file's content credentials say.

    `valid`: signed by the holder of the certificate, and nothing was changed since. `trusted`: that, and the
    certificate follows from one of those that the reader trusts. `failures` says why it is `invalid`, or why a valid
    one is not trusted. All else is null unless it was checked.
    """

    state: State
    signer: str | None = None
    issuer: str | None = None
    generator: str | None = None
    digital_source_type: str | None = None
    time: str | None = None
    failures: tuple[str, ...] = ()


def installed() -> bool:
    """Whether content credentials can be checked and written here."""
    return find_spec("c2pa") is not None


def c2pa_library() -> ModuleType:
    """The library. Raises UsageError where it is not installed."""
    try:
        import c2pa
    except ImportError as error:
        raise UsageError(f"content credentials need a library that is not here; pip install '{EXTRA}'") from error
    found: ModuleType = c2pa
    return found


def read_credentials(data: bytes, form: str, trust: str | None = None) -> Credentials | None:
    """The content credentials in a picture's file, whose `form` is Pillow's name of it; None for any other form.

    `trust` is the place of a PEM file of certificates that signers may follow from. Raises UsageError if it is none.
    """
    if form not in _MIME:
        return None
    if not _is_there(data, form):
        return Credentials(state="none")
    if not installed():
        return Credentials(state="not checked")
    c2pa = c2pa_library()
    context = _context(c2pa, trust)
    try:
        with c2pa.Reader(_MIME[form], io.BytesIO(data), context=context) as reader:
            return _told(json.loads(reader.json()))
    except (c2pa.C2paError, ValueError, KeyError, TypeError) as error:  # a stranger's file
        return Credentials(state="invalid", failures=(shorten(" ".join(str(error).split()), 200),))


def _context(c2pa: ModuleType, trust: str | None) -> Any:
    # nothing is fetched: a file names addresses, and looking must not call them
    settings: dict[str, Any] = {"verify": {"verify_trust": True, "ocsp_fetch": False, "remote_manifest_fetch": False}}
    settings["trust"] = {"trust_config": PURPOSES}
    if trust is not None:
        try:
            settings["trust"]["trust_anchors"] = Path(trust).read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"trust {shorten(trust, 200)} cannot be read: {error}; give a PEM file") from error
    try:
        return c2pa.Context(c2pa.Settings.from_dict(settings))
    except c2pa.C2paError as error:
        raise UsageError(f"trust {shorten(str(trust), 200)} has no certificates in PEM form: {error}") from error


def _told(told: dict[str, Any]) -> Credentials:
    manifest = told["manifests"][told["active_manifest"]]
    results = told.get("validation_results", {}).get("activeManifest", {})
    signature = manifest.get("signature_info") or {}
    names = [
        f"{entry['name']} {entry.get('version', '')}".strip() for entry in manifest.get("claim_generator_info", [])
    ]
    states: dict[str, State] = {"Valid": "valid", "Trusted": "trusted"}
    return Credentials(
        state=states.get(told["validation_state"], "invalid"),
        signer=signature.get("common_name"),
        issuer=signature.get("issuer"),
        generator=", ".join(names) or None,
        digital_source_type=next(_source_types(manifest), None),
        time=signature.get("time"),
        failures=tuple(sorted({str(entry["code"]) for entry in results.get("failure", [])})),
    )


def _source_types(manifest: dict[str, Any]) -> Iterator[str]:
    for assertion in manifest.get("assertions", []):
        if str(assertion.get("label", "")).startswith("c2pa.actions"):
            for action in assertion["data"].get("actions", []):
                if "digitalSourceType" in action:
                    yield str(action["digitalSourceType"])


def _is_there(data: bytes, form: str) -> bool:
    """Whether the file has a part of the kind that holds C2PA's manifests (C2PA specification, appendix A)."""
    if form == "PNG":
        return any(kind == _PNG_KIND for kind, _ in read_chunks(data))
    return _WEBP_KIND in _kinds_of_webp(data) if form == "WEBP" else _jpeg_has_it(data)


def _kinds_of_webp(data: bytes) -> Iterator[bytes]:
    place = 12
    while place + 8 <= len(data):
        (size,) = struct.unpack_from("<I", data, place + 4)
        yield data[place : place + 4]
        place += 8 + size + size % 2


def _jpeg_has_it(data: bytes) -> bool:
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != _JPEG_SCAN:
        (size,) = struct.unpack_from(">H", data, place + 2)
        if data[place + 1] == _JPEG_APP11 and b"c2pa" in data[place : place + 2 + size]:
            return True
        place += 2 + size
    return False
