"""`python -m tests.soak --minutes 30`: jobs on a real cluster and a real store, under a storm, audited one by one.

The seed fixes the manifests, the storm's choices and the proxy's; what they meet depends on the machine's timing, so a
seed makes a like storm again, not the same one. The protocol's exact replays are the simulator's (tests/simulator).
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from tests.harness.faults import Faults
from tests.harness.processes import Family
from tests.harness.proxy import fault_proxy_process, proxy_report
from tests.harness.s3 import credentials, seaweedfs
from tests.soak.chaos import Climate
from tests.soak.fake_model import CALLS, calls
from tests.soak.history import Scene, play
from tests.soak.jobs import Model
from tests.soak.report import Tally
from tests.soak.supervisor import Supervisor, soak_cluster

_SHORT = 5.0
"""Below so many minutes the storm is denser, so that every kind of fault happens."""


def main() -> int:
    arguments = _arguments()
    signal.signal(signal.SIGTERM, _leave)
    tally = Tally(seed=arguments.seed)
    family = Family()
    folder = Path(tempfile.mkdtemp(prefix="lms-", dir="/tmp"))  # short: Ray puts sockets far below
    began = time.monotonic()
    try:
        _soak(arguments, folder, family, tally)
    except Exception as error:  # noqa: BLE001 - the report has to come, and says that it ended early
        tally.violations.append(f"the soak broke: {type(error).__name__}: {error}")
    except (KeyboardInterrupt, SystemExit):
        tally.interrupted = True
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # what is below this process has to end first
        left = family.end()
        tally.seconds = time.monotonic() - began
        if left:
            tally.violations.append(f"{left} processes would not end")
        if not tally.violations and not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(f"evidence: {folder}")
        text = tally.text() + (f"\nagain: python -m tests.soak --seed {arguments.seed}" if tally.violations else "")
        print(text, flush=True)
        if arguments.report:
            arguments.report.parent.mkdir(parents=True, exist_ok=True)
            arguments.report.write_text(text + "\n")
    return 130 if tally.interrupted else tally.exit_code


def _soak(arguments: argparse.Namespace, folder: Path, family: Family, tally: Tally) -> None:
    short = arguments.minutes < _SHORT
    faults = Faults() if short else Faults(delay_seconds=10.0, freeze=0.0005)
    climate = Climate(driver=25, interrupt=45, node=35, head=70, clean=20, longest_stop=8) if short else Climate()
    samples: dict[Model, int] = {"fake": 80, "embedded": 40} if short else {"fake": 400, "embedded": 120}
    with ExitStack() as stack:
        (folder / "s3").mkdir()
        (folder / "r").mkdir()
        direct = stack.enter_context(seaweedfs(folder / "s3"))
        proxy = stack.enter_context(fault_proxy_process(direct, faults, arguments.seed))
        os.environ.update(credentials(direct))  # the harness sees the store as it is
        store = credentials(proxy) | {CALLS: str(folder / "calls")}
        supervisor = Supervisor(soak_cluster(family, folder / "r", store, (2, 2) if short else (2, 2, 2)))
        supervisor.wait_until_up()
        scene = Scene(
            supervisor=supervisor, family=family, folder=folder, climate=climate, seed=arguments.seed, samples=samples,
            storm_seconds=60.0 if short else 240.0, least_kills=5,
        )  # fmt: skip
        number = 0
        end = time.monotonic() + 60 * arguments.minutes
        while not tally.violations and (
            time.monotonic() < end - (10 if number else 0) or sum(tally.kills.values()) < scene.least_kills
        ):
            model: Model = "embedded" if tally.model_seconds["embedded"] < tally.model_seconds["fake"] else "fake"
            play(scene, number, model, end, tally)
            number += 1
            print(f"history {number}, {model}: {sum(tally.kills.values())} kills, {len(tally.violations)} violations",
                  flush=True)  # fmt: skip
        report = proxy_report(proxy)
        tally.requests.update(report["requests"])
        tally.faults.update(report["faults"])
        tally.attempts = sum(report["attempts"].values())
        tally.fake_calls = calls(folder / "calls")
        tally.node_restarts = supervisor.restarts


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=None, help="without it a random one, which the report names")
    parser.add_argument("--report", type=Path, help="a file for the closing report")
    parser.add_argument("--keep", action="store_true", help="keep logs and data even if all is well")
    arguments = parser.parse_args()
    arguments.seed = secrets.randbelow(2**32) if arguments.seed is None else arguments.seed
    return arguments


def _leave(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(143)


if __name__ == "__main__":
    sys.exit(main())
