"""The drivers of one history: real command lines, started again as a supervisor would, until they say it is done."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.harness.processes import Family, send

_PAUSE = 1.0


@dataclass
class Driver:
    """One command, run until it ends by publishing. `endings` says how each of its lives ended."""

    family: Family
    command: list[str]
    environment: dict[str, str]
    folder: Path
    """Its log and its answers; `cwd` in it is where it works, and stays empty."""
    process: subprocess.Popen[bytes] | None = None
    lives: int = 0
    exit_code: int | None = None
    endings: Counter[str] = field(default_factory=Counter)
    complaints: Counter[str] = field(default_factory=Counter)
    surprises: list[str] = field(default_factory=list)
    _not_before: float = 0.0

    def __post_init__(self) -> None:
        (self.folder / "cwd").mkdir(parents=True)

    @property
    def done(self) -> bool:
        return self.exit_code is not None

    def supervise(self) -> None:
        """Note how a life ended, and begin the next one."""
        if self.done or (self.process is None and time.monotonic() < self._not_before):
            return
        if self.process is None:
            self.lives += 1
            log = self.folder / "log"
            with log.open("a") as words:
                words.write(f"--- life {self.lives}, {time.strftime('%H:%M:%S')}\n")
            self.process = self.family.start(
                self.command, self.environment, log, cwd=self.folder / "cwd", answer=self._answer_file()
            )
        elif (code := self.process.poll()) is not None:
            self.process, self._not_before = None, time.monotonic() + _PAUSE
            self._note(code)

    def send(self, number: int) -> bool:
        """Whether it was alive to be told."""
        return self.process is not None and self.process.poll() is None and send(self.process.pid, number)

    def _note(self, code: int) -> None:
        answer = self._answer()
        if code in {0, 1} and answer is not None and answer["counts"] is not None:
            self.exit_code = code
            self.endings["published"] += 1
            return
        last_words = self._last_words()
        if code in {-signal.SIGKILL, -signal.SIGINT, -signal.SIGTERM, 130}:
            self.endings["killed" if code == -signal.SIGKILL else "interrupted"] += 1
        elif code in {1, 2} and last_words.startswith("error: "):
            self.endings["gave up" if code == 1 else "could not start"] += 1
            self.complaints[last_words[:160]] += 1
        elif code == 1 and last_words.startswith("latentmill: "):
            self.endings["ended by Ray"] += 1  # a driver whose cluster has no head ends without a word
        else:
            self.endings[f"exit code {code}"] += 1
            self.surprises.append(f"exit code {code}: {last_words}")

    def _answer_file(self) -> Path:
        return self.folder / f"answer-{self.lives}.json"

    def _answer(self) -> dict[str, Any] | None:
        try:
            answer: dict[str, Any] = json.loads(self._answer_file().read_text())
        except ValueError:
            return None
        return answer

    def _last_words(self) -> str:
        lines = (self.folder / "log").read_text(errors="replace").splitlines()
        return next((line[:300] for line in reversed(lines) if line.strip()), "")
