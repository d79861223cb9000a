"""Content credentials (C2PA) for exported pictures: who signs, that a model made them, and which one.

The bytes differ at every signing, so pictures are signed where they leave the dataset, and never in it.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latentmill.jobs.credentials import PURPOSES, c2pa_library
from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.ledger.pictures import encode_png
from latentmill.jobs.manifests.fields import shorten
from latentmill.jobs.xmp import DIGITAL_SOURCE_TYPE

if TYPE_CHECKING:
    from latentmill.jobs.exports.spec import ExportSpec

_SETTINGS = {
    "builder": {"thumbnail": {"enabled": False}},
    "trust": {"trust_config": PURPOSES},
    "verify": {"verify_after_sign": True},
}
"""No thumbnail, which would be larger than the picture's own mark; every signature is checked as it is made."""


@dataclass(frozen=True, kw_only=True)
class Signing:
    """Signs pictures; safe to share between threads. What it stands for in a plan is `facts`, which hold no secret."""

    certificate_sha256: str
    prompts: bool
    timestamp_url: str | None
    _model_sha256: str
    _signer: Any = field(repr=False)
    _context: Any = field(repr=False)

    @property
    def facts(self) -> dict[str, Any]:
        """What a plan says of it. Exports with other facts are other exports."""
        return {
            "certificate_sha256": self.certificate_sha256,
            "prompts": self.prompts,
            "timestamp_url": self.timestamp_url,
        }

    def sign(self, data: bytes, image_format: str, row: Mapping[str, Any]) -> bytes:
        """The picture with its credentials. Raises JobError if it cannot be signed."""
        c2pa = c2pa_library()
        signed = io.BytesIO()
        try:
            with c2pa.Builder(self._manifest(row), context=self._context) as builder:
                builder.sign(self._signer, f"image/{image_format}", io.BytesIO(data), signed)
        except c2pa.C2paError as error:
            raise JobError(f"sample {row['sample_id']} cannot be signed: {' '.join(str(error).split())}") from error
        return signed.getvalue()

    def _manifest(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What is stated: that a trained model made it, with which program, by which model."""
        program = {"name": "latentmill", "version": version("latentmill")}
        parameters = {"latentmill.model_sha256": row.get("model_sha256", self._model_sha256)}
        if self.prompts:
            parameters |= {"latentmill.prompt": row["prompt"], "latentmill.negative_prompt": row["negative_prompt"]}
        created = {
            "action": "c2pa.created",
            "digitalSourceType": DIGITAL_SOURCE_TYPE,
            "softwareAgent": program,
            "parameters": parameters,
        }
        actions = {"label": "c2pa.actions.v2", "data": {"actions": [created]}}
        return {"claim_generator_info": [program], "assertions": [actions]}


def open_signing(spec: ExportSpec, model_sha256: str) -> Signing | None:
    """Who signs the pictures of an export; None if nobody does.

    Raises UsageError if certificate and key are none that can sign: both files are read here, on every machine.
    """
    if spec.sign is None or spec.key is None:
        return None
    c2pa = c2pa_library()
    chain, key = _read("sign", spec.sign), _read("key", spec.key)
    algorithm = _algorithm(spec.key, key)
    try:
        signer = c2pa.Signer.from_info(
            c2pa.C2paSignerInfo(algorithm, chain, key, (spec.timestamp_url or "").encode() or None)
        )
        context = c2pa.Context(c2pa.Settings.from_dict(_SETTINGS))
    except c2pa.C2paError as error:
        raise UsageError(_refusal(spec, str(error))) from error
    signing = Signing(
        certificate_sha256=_certificate_sha256(spec.sign, chain),
        prompts=spec.sign_prompt,
        timestamp_url=spec.timestamp_url,
        _model_sha256=model_sha256,
        _signer=signer,
        _context=context,
    )
    try:  # what the certificate does not allow is known before anything is written
        black = encode_png(np.zeros((8, 8, 3), np.uint8))
        signing.sign(black, "png", {"sample_id": "0 (a test)", "prompt": "", "negative_prompt": ""})
    except JobError as error:
        raise UsageError(_refusal(spec, str(error))) from error
    return signing


def _refusal(spec: ExportSpec, why: str) -> str:
    return (
        f"sign {shorten(str(spec.sign), 200)} and its key cannot sign: {' '.join(why.split())}; give a certificate for "
        f"digital signatures and for documents, e-mail or claims (EKU), with its issuers in the same file"
    )


def _read(name: str, place: str) -> bytes:
    try:
        return Path(place).read_bytes()
    except OSError as error:
        raise UsageError(f"{name} {shorten(place, 200)} cannot be read: {error.strerror}; give a PEM file") from error


def _certificate_sha256(place: str, chain: bytes) -> str:
    """The fingerprint of the signer's own certificate, as `openssl x509 -fingerprint -sha256` gives it."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    try:
        own = x509.load_pem_x509_certificates(chain)[0]
    except (ValueError, IndexError) as error:
        raise UsageError(f"sign {shorten(place, 200)} has no certificates in PEM form") from error
    return hashlib.sha256(own.public_bytes(Encoding.DER)).hexdigest()


def _algorithm(place: str, key: bytes) -> bytes:
    """The signature algorithm of C2PA that a private key is for."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        loaded = load_pem_private_key(key, password=None)
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"key {shorten(place, 200)} is no private key in PEM form without a passphrase; make one by: openssl pkey"
        ) from error
    if isinstance(loaded, ec.EllipticCurvePrivateKey) and loaded.curve.name in _CURVES:
        return _CURVES[loaded.curve.name]
    if isinstance(loaded, ed25519.Ed25519PrivateKey):
        return b"ed25519"
    if isinstance(loaded, rsa.RSAPrivateKey):
        return b"ps256"
    raise UsageError(
        f"key {shorten(place, 200)} is of a kind that C2PA does not know; give P-256, P-384, P-521, Ed25519, RSA"
    )


_CURVES = {"secp256r1": b"es256", "secp384r1": b"es384", "secp521r1": b"es512"}
