"""The goals that benchmarks hold a time to, beside that of a copy or of a peer: one table at the end of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from benchmarks.measure import ratio
from support.peak import Run


@dataclass(frozen=True)
class Goal:
    """A time beside another one of the same rounds, and how many times it should be at most."""

    what: str
    ours: float  # seconds
    limit: str
    its: float  # seconds
    ratio: float  # the median over the rounds
    most: float
    load: float = field(default_factory=lambda: os.getloadavg()[0])  # processes that wanted a core meanwhile

    @property
    def is_missed(self) -> bool:
        return self.ratio > self.most


MEASURED: list[Goal] = []  # by the benchmarks of this run


def goal(what: str, results: Mapping[str, Sequence[Run]], ours: str, limit: str, most: float) -> None:
    """Take a goal into the table. A missed one ends no benchmark: a busy machine misses some."""
    own, its = (median(run.seconds for run in results[name]) for name in (ours, limit))
    MEASURED.append(Goal(what, own, limit, its, ratio(results, ours, limit), most))


def table_of_goals(goals: Sequence[Goal]) -> str:
    """Each goal a row, and below them the number of those that are missed."""
    lines = ["| | ours | the limit | its time | ratio | goal | load | |", "|---|---|---|---|---|---|---|---|"]
    for one in goals:
        times = f"{one.ours:.2f} s | {one.limit} | {one.its:.2f} s | {one.ratio:.2f} | {one.most:.2f}"
        lines.append(f"| {one.what} | {times} | {one.load:.1f} | {'missed' if one.is_missed else ''} |")
    cores = len(os.sched_getaffinity(0))
    missed = sum(one.is_missed for one in goals)
    return "\n".join([*lines, "", f"{missed} of {len(goals)} goals are missed. {cores} cores."])
