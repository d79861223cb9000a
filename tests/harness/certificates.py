"""Certificates that C2PA takes, and a server that stamps the time, made for a test."""

from __future__ import annotations

import datetime
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier


@dataclass(frozen=True)
class Certificates:
    """PEM files: the leaf with its issuer, the leaf's key, and the issuer alone."""

    chain: Path
    key: Path
    issuer: Path


def _name(text: str) -> x509.Name:
    names = ((NameOID.ORGANIZATION_NAME, "Test Mill"), (NameOID.COMMON_NAME, text))
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in names])


def _usage(*, signs: bool) -> x509.KeyUsage:
    none = dict.fromkeys(("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False)
    rest = {"key_cert_sign": not signs, "crl_sign": not signs, "encipher_only": False, "decipher_only": False}
    return x509.KeyUsage(digital_signature=signs, **none, **rest)


def write_certificates(
    folder: Path,
    *,
    purposes: Sequence[ObjectIdentifier] = (ExtendedKeyUsageOID.EMAIL_PROTECTION,),
    lifetime: datetime.timedelta = datetime.timedelta(days=30),
    curve: ec.EllipticCurve | None = None,
    key: CertificateIssuerPrivateKeyTypes | None = None,
    passphrase: bytes | None = None,
) -> Certificates:
    """A chain of two, valid since two days ago and for so long from now on; the leaf has that `key`, or one made."""
    folder.mkdir(parents=True, exist_ok=True)
    begins = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=2)
    ends = datetime.datetime.now(datetime.UTC) + lifetime
    keys = [ec.generate_private_key(ec.SECP256R1()), key or ec.generate_private_key(curve or ec.SECP256R1())]
    locked = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()

    def builder(name: str, key: CertificateIssuerPrivateKeyTypes) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder(not_valid_before=begins, not_valid_after=ends)
            .subject_name(_name(name))
            .issuer_name(_name("Test issuer"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key()), critical=False)
        )

    issuer = (
        builder("Test issuer", keys[0])
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .sign(keys[0], hashes.SHA256())
    )
    leaf = (
        builder("Test signer", keys[1])
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=True)
        .sign(keys[0], hashes.SHA256())
    )
    pem = [certificate.public_bytes(serialization.Encoding.PEM) for certificate in (leaf, issuer)]
    found = Certificates(chain=folder / "chain.pem", key=folder / "key.pem", issuer=folder / "issuer.pem")
    found.chain.write_bytes(b"".join(pem))
    found.issuer.write_bytes(pem[1])
    found.key.write_bytes(keys[1].private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked))
    return found


_TSA_CONFIG = """[tsa]
default_policy = 1.2.3.4
serial = {folder}/serial
digests = sha256, sha384, sha512
signer_digest = sha256
ess_cert_id_alg = sha256
"""


@contextmanager
def time_stamps(folder: Path) -> Iterator[tuple[str, Certificates]]:
    """The address of a server that stamps the time by OpenSSL (RFC 3161), and its certificates."""
    certificates = write_certificates(folder, purposes=(ExtendedKeyUsageOID.TIME_STAMPING,))
    (folder / "config").write_text(_TSA_CONFIG.format(folder=folder))
    (folder / "serial").write_text("01\n")
    one_at_a_time = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            with one_at_a_time:
                (folder / "query").write_bytes(self.rfile.read(int(self.headers["Content-Length"])))
                files = {"-signer": certificates.chain, "-inkey": certificates.key, "-chain": certificates.issuer}
                options = [word for name, file in files.items() for word in (name, str(file))]
                command = ["openssl", "ts", "-reply", "-config", "config", "-section", "tsa", "-queryfile", "query"]
                done = subprocess.run([*command, *options], cwd=folder, capture_output=True, check=False)
            self.send_response(200 if done.returncode == 0 else 500)
            self.send_header("Content-Type", "application/timestamp-reply")
            self.send_header("Content-Length", str(len(done.stdout)))
            self.end_headers()
            self.wfile.write(done.stdout)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", certificates
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


HAS_OPENSSL = shutil.which("openssl") is not None
