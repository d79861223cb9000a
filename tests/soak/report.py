"""What a soak did and found, added up over its histories."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tests.soak.audit import INVARIANTS
from tests.soak.jobs import Model


@dataclass
class Tally:
    """Counts of everything; `violations` names the history and the invariant."""

    seed: int
    seconds: float = 0.0
    interrupted: bool = False
    histories: Counter[str] = field(default_factory=Counter)
    model_seconds: dict[Model, float] = field(default_factory=lambda: {"fake": 0.0, "embedded": 0.0})
    kills: Counter[str] = field(default_factory=Counter)
    stops: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    endings: Counter[str] = field(default_factory=Counter)
    cleanings: Counter[int] = field(default_factory=Counter)
    node_restarts: int = 0
    samples: int = 0
    chunks: int = 0
    fake_chunks: int = 0
    fake_calls: int = 0
    attempts: int = 0
    audits: int = 0
    looks: int = 0
    complaints: Counter[str] = field(default_factory=Counter)
    surprises: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return 1 if self.violations else 0

    def text(self) -> str:
        """The closing report."""
        lives, requests, faults = (sum(each.values()) for each in (self.endings, self.requests, self.faults))
        models = ", ".join(f"{name} {seconds / 60:.1f} min" for name, seconds in self.model_seconds.items())
        lines = [
            f"soak: {self.seconds / 60:.1f} minutes, seed {self.seed}{', INTERRUPTED' if self.interrupted else ''}",
            f"histories    {sum(self.histories.values())}: {_list(self.histories)}; two drivers throughout",
            f"models       {models}; {self.samples} samples in {self.chunks} chunks",
            f"kills        {sum(self.kills.values())} by SIGKILL: {_list(self.kills)}",
            f"stops        {sum(self.stops.values())}: {_list(self.stops)}",
            f"restarts     {self.node_restarts} of nodes; {lives - self.endings['published']} of drivers",
            f"driver lives {lives}: {_list(self.endings)}",
            *(f"  {count} x {complaint}" for complaint, count in self.complaints.most_common(8)),
            f"store        {requests} requests: {_list(self.requests)}",
            f"faults       {faults} ({100 * faults / max(1, requests):.0f} % of requests): {_list(self.faults)}",
            f"cleanings    {sum(self.cleanings.values())} beside the drivers, by exit code: {_list(self.cleanings)}",
            f"work lost    {self.attempts} attempts began to upload for {self.chunks} chunks",
            f"             the fake model was called {self.fake_calls} times for {self.fake_chunks} chunks",
            f"audits       {self.audits} of {', '.join(INVARIANTS)} each; {self.looks} looks at running outputs",
            f"surprises    {len(self.surprises)}",
            *(f"  {surprise}" for surprise in self.surprises[:20]),
            f"violations   {len(self.violations)}",
            *(f"  {violation}" for violation in self.violations[:50]),
        ]
        return "\n".join(lines)


def _list(counts: Counter[str] | Counter[int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=str)) or "none"
