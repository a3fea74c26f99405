"""Findings of the checks, and their severities."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

# From worst to mildest: `Finding.severity` explains them.
ERROR, FAULT, WARNING, NOTE = SEVERITIES = ("error", "fault", "warning", "note")

# Number of cases that a finding lists.
EXAMPLES = 3


@dataclass(frozen=True)
class Finding:
    """One kind of fault in one split or file.

    Attributes:
        severity: "error", training stops or refuses to start; "fault", training runs on wrong data; "warning", training
            copes, or the data may be intended; "note", good to know.
        source: the split or file with the fault.
        text: the fault and its consequence.
        count: number of cases.
        examples: the first cases, or all of them; empty if there is nothing to count.
    """

    severity: str
    source: str
    text: str
    count: int
    examples: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The finding in one line, for a log or an error message."""
        more = ", ..." if self.count > EXAMPLES else ""
        cases = f": {self.count:,} ({', '.join(self.examples[:EXAMPLES])}{more})" if self.examples else ""
        return f"{self.source}: {self.text}{cases}"


def if_any(
    severity: str, source: str, text: str, cases: Sequence, describe: Callable[[Any], str] = str
) -> list[Finding]:
    """A list of one finding with its first cases; empty if there are no cases."""
    if not len(cases):
        return []
    return [Finding(severity, source, text, len(cases), tuple(describe(case) for case in cases[:EXAMPLES]))]


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """The findings sorted from worst to mildest, otherwise in their order."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))
