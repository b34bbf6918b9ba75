"""All findings of a data set as a table and as a file."""
from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

from icf.data.check.findings import CHECKS, LEVELS, Finding
from icf.files import write_atomic

SHOWN = 10  # findings printed per check and level; the JSON file has all


@dataclass
class Report:
    """Everything that was found and counted."""

    root: str
    subset: str
    deep: bool
    findings: list[Finding] = field(default_factory=list)
    facts: dict = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0: clean, 1: warnings only, 2: errors."""
        levels = {finding.level for finding in self.findings}
        return 2 if "error" in levels else int("warning" in levels)

    def print(self) -> None:
        """Counts, and per check the findings of each level with their number and the first ten."""
        from rich import box
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        console = Console()
        facts = Table("fact", "value", title=f"{self.subset} in {self.root}", box=box.SIMPLE)
        for name, value in self.facts.items():
            if isinstance(value, dict):
                value = ", ".join(f"{key} {number}" for key, number in value.items())
            facts.add_row(name, escape(str(value)))
        console.print(facts)
        groups = defaultdict(list)
        for finding in self.findings:
            groups[finding.check, finding.level].append(escape(f"{finding.where}: {finding.what}"))
        for check in CHECKS:
            found = [(level, groups[check, level]) for level in LEVELS if groups[check, level]]
            for level, lines in found or [("ok", [])]:
                console.print(f"  {check:10}{level:9}{len(lines) or ''}", highlight=False)
                for line in lines[:SHOWN]:  # each on a line of its own, however long, to be copied whole
                    console.print(f"    {line}", highlight=False, soft_wrap=True)
                if len(lines) > SHOWN:
                    console.print(f"    and {len(lines) - SHOWN} more, which --json FILE has", highlight=False)
        result = ("clean", "usable, with warnings", "errors: some clips cannot be read")[self.exit_code]
        console.print(f"{result}{'' if self.deep else '; --deep opens every file'}", highlight=False)

    def write(self, path: Path | str) -> None:
        """All findings and counts as JSON."""
        text = json.dumps({**asdict(self), "exit_code": self.exit_code}, indent=1)
        write_atomic(Path(path), lambda partial: partial.write_text(text, encoding="utf-8"))
