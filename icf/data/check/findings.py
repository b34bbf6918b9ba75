"""What is found in a data set, and in the files of one of its clips."""
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

CHECKS = ("metadata", "classes", "files", "frames", "labels", "colours", "audio", "log-mel", "derived", "leakage")
LEVELS = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing found: `error` breaks reading, `warning` may, `note` is for information."""

    check: str
    level: str
    where: str
    what: str


@dataclass
class Clip:
    """What was found in the files of one clip, to be summed up over all."""

    findings: list[Finding] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    pixels: Counter = field(default_factory=Counter)  # of every class
    distance: tuple[float, float] | None = None  # of the log-mel file: greatest and mean
    first: str = ""  # hash of the first frame
    quirk: str = "warning"  # level of what AVSBench has here and there, and the toy benchmark on purpose

    def add(self, check: str, level: str, where: Path | str, what: str) -> None:
        self.findings.append(Finding(check, level, str(where), what))


def relative(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def reason(error: Exception) -> str:
    """The message without the path in front."""
    return str(error).partition(": ")[2]
