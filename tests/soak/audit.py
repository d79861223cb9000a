"""I1 to I9 of one finished output, each on its own, against an undisturbed run of the same plan on a local disk."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentmill.jobs.job import open_job
from latentmill.jobs.outputs.clean import clean
from latentmill.jobs.outputs.publish import standing_publication
from latentmill.jobs.outputs.verify import verify
from latentmill.jobs.store.storage import Storage
from tests.harness.cluster import ROOT
from tests.jobs.driver import pictures, read_dataset
from tests.soak.jobs import SoakJob
from tests.soak.watch import Watch

INVARIANTS = tuple(f"I{number}" for number in range(1, 10))


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A history that both drivers say is over, and what is needed to judge it."""

    job: SoakJob
    out: str
    reference: str
    """The same plan, run undisturbed on a local disk."""
    reference_exit_code: int
    exit_codes: tuple[int, ...]
    watch: Watch
    neighbours: dict[str, tuple[str, int]]
    """Everything in the bucket that is not OUT's, before."""
    working_folders: tuple[Path, ...]


def audit(finished: Finished) -> dict[str, list[str]]:
    """For each invariant, what is wrong; empty lists if nothing is. The bucket is read past the proxy."""
    found = {name: check(name, finished) for name in INVARIANTS}
    for violation in finished.watch.violations:
        found.setdefault(violation[:2] if violation[:2] in found else "watch", []).append(
            f"seen on the way: {violation}"
        )
    return found


def check(name: str, finished: Finished) -> list[str]:
    """What is wrong by one invariant."""
    checks = dict(zip(INVARIANTS, (_i1, _i2, _i3, _i4, _i5, _i6, _i7, _i8, _i9), strict=True))
    try:
        return checks[name](finished)
    except Exception as error:  # noqa: BLE001 - an output that cannot even be read is a violation too
        return [f"cannot be checked: {type(error).__name__}: {error}"]


def neighbours(out: str) -> dict[str, tuple[str, int]]:
    """Every object of the bucket that is not OUT's: its size, and the digest of those that lie beside OUT."""
    bucket, _, inside = out.removeprefix("s3://").partition("/")
    storage, beside = Storage.open(f"s3://{bucket}"), inside.rpartition("/")[0] + "/"
    listed = [*storage.list(""), *storage.list_hidden("")]
    return {
        path: (_digest(storage.read(path)) if path.startswith(beside) else "", size)
        for path, size in listed
        if not path.startswith(f"{inside}/")
    }


def run_cli(job: SoakJob, out: str, *more: str, verb: str = "run") -> tuple[int, dict[str, Any] | None, str]:
    """Run the job's command in this environment, without Ray: exit code, JSON answer if any, words."""
    done = subprocess.run(
        job.command(verb, out, "--executor", "inline", *more), cwd=ROOT, capture_output=True, text=True, check=False,
        timeout=600,
    )  # fmt: skip
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = None
    return done.returncode, answer, done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""


def _i1(finished: Finished) -> list[str]:
    """Each planned sample is in exactly one committed row, with a status."""
    job = open_job(finished.out)
    rows: Counter[str] = Counter()
    wrong = []
    for chunk in range(job.plan.n_chunks):
        record = job.ledger.read(chunk)
        if record is None:
            wrong.append(f"chunk {chunk} is not committed")
            continue
        for row in record.table.to_pylist():
            rows[row["sample_id"]] += 1
            if row["status"] not in {"ok", "flagged", "failed"}:
                wrong.append(f"sample {row['sample_id']} has the status {row['status']!r}")
    wrong += [f"sample {sample} is in {count} rows" for sample, count in rows.items() if count != 1]
    planned = {f"{ordinal:08d}" for ordinal in range(job.plan.n_samples)}
    return [*wrong, *(f"sample {sample} is in no row" for sample in sorted(planned - rows.keys()))]


def _i2(finished: Finished) -> list[str]:
    """Every referenced object exists, as its row says; and all else that `verify` looks at."""
    return [f"{defect.kind} {defect.path}: {defect.detail}" for defect in verify(finished.out).defects]


def _i3(finished: Finished) -> list[str]:
    """Rows and files are those of an undisturbed run."""
    got, calm = read_dataset(finished.out), read_dataset(finished.reference)
    wrong = [] if got.manifest == calm.manifest else [f"manifest: {_difference(got.manifest, calm.manifest)}"]
    if not got.rows.equals(calm.rows):
        pairs = zip(got.rows.to_pylist(), calm.rows.to_pylist(), strict=False)
        differing = [
            _difference(mine, other) | {"sample_id": other["sample_id"]} for mine, other in pairs if mine != other
        ]
        wrong.append(f"{len(differing)} rows differ, the first: {differing[:1]}")
    if got.files != calm.files:
        names = sorted(
            name for name in got.files.keys() | calm.files.keys() if got.files.get(name) != calm.files.get(name)
        )
        wrong.append(f"{len(names)} files differ: {names[:5]}")
    return wrong


def _i4(finished: Finished) -> list[str]:
    """Nothing outside OUT was touched: neither the bucket's other objects nor the drivers' working folders."""
    after = neighbours(finished.out)
    wrong = [f"{path} beside OUT is not as it was" for path in _difference(after, finished.neighbours)]
    return wrong + [f"a driver left {path}" for folder in finished.working_folders for path in folder.iterdir()]


def _i5(finished: Finished) -> list[str]:
    """No commit record that was seen has changed: the watch adds what it found; here is whether it saw all."""
    chunks = open_job(finished.out).plan.n_chunks
    return (
        [] if finished.watch.records == chunks else [f"the watch has seen {finished.watch.records} of {chunks} records"]
    )


def _i6(finished: Finished) -> list[str]:
    """A last cleaning removes every attempt that lost, and no referenced object."""
    cleaned = clean(finished.out)
    if cleaned.exit_code != 0:
        return [f"the cleaning could not read the records of chunks {cleaned.unreadable_chunks}"]
    job = open_job(finished.out)
    records = (job.ledger.read(chunk) for chunk in range(job.plan.n_chunks))
    referenced = {image for record in records if record for image in record.table.column("image").to_pylist()} - {None}
    stored = {path for path, _ in pictures(job.storage)}
    missing, left = sorted(referenced - stored), sorted(stored - referenced)
    return [f"{path} is referenced and gone" for path in missing] + [f"{path} was left by `clean`" for path in left]


def _i7(finished: Finished) -> list[str]:
    """A changed plan is refused, and changes nothing."""
    before = _snapshot(finished.out)
    code, _, words = run_cli(finished.job, finished.out, "--negative-prompt", "another plan")
    wrong = [] if code == 3 else [f"a changed plan ended with {code} instead of 3: {words}"]
    return wrong + [f"a changed plan touched {path}" for path in _difference(_snapshot(finished.out), before)]


def _i8(finished: Finished) -> list[str]:
    """Running the finished job again generates nothing."""
    before = _snapshot(finished.out)
    code, answer, words = run_cli(finished.job, finished.out)
    if answer is None or answer["generated"] != 0 or code != finished.reference_exit_code:
        return [f"resuming a finished job ended with {code}, generated {answer and answer['generated']}: {words}"]
    return [f"resuming a finished job changed {path}" for path in _difference(_snapshot(finished.out), before)]


def _i9(finished: Finished) -> list[str]:
    """Both drivers ended with the exit code of an undisturbed run, and everything is published."""
    wrong = [
        f"a driver ended with {code}, an undisturbed run with {finished.reference_exit_code}"
        for code in finished.exit_codes
        if code != finished.reference_exit_code
    ]
    return wrong + ([] if standing_publication(open_job(finished.out)) else ["it is not published"])


def _snapshot(out: str) -> dict[str, tuple[str, int]]:
    """All of OUT but for the pictures, which are many and are checked elsewhere: digest and size."""
    storage = Storage.open(out)
    return {
        path: (_digest(storage.read(path)), size) for path, size in storage.list("") if not path.startswith("images/")
    }


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _difference(mine: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What two mappings do not have in common: (mine, other) by key."""
    return {
        key: (mine.get(key), other.get(key))
        for key in sorted(mine.keys() | other.keys())
        if mine.get(key) != other.get(key)
    }
