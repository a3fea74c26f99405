"""Findings of the checks, and their severities."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

# From what ends a training, over what spoils it and what it copes with, to what is good to know.
ERROR, FAULT, WARNING, NOTE = SEVERITIES = ("error", "fault", "warning", "note")

# Cases that a finding names.
EXAMPLES = 3


@dataclass(frozen=True)
class Finding:
    """One kind of fault in one place.

    Attributes:
        severity: "error", training stops or refuses to start; "fault", it runs on data that are wrong; "warning", it
            copes, or the data may be meant so; "note", good to know.
        source: the split or file that has it.
        text: what it is, and what comes of it.
        count: how many cases there are.
        examples: the first cases, or all of them; none where the text says it all and there is nothing to count.
    """

    severity: str
    source: str
    text: str
    count: int
    examples: tuple[str, ...] = ()

    def __str__(self) -> str:
        """In one line, for a log or an error message."""
        more = ", ..." if self.count > EXAMPLES else ""
        cases = f": {self.count:,} ({', '.join(self.examples[:EXAMPLES])}{more})" if self.examples else ""
        return f"{self.source}: {self.text}{cases}"


def if_any(
    severity: str, source: str, text: str, cases: Sequence, describe: Callable[[Any], str] = str
) -> list[Finding]:
    """One finding that names the first cases; none where there are no cases."""
    if not len(cases):
        return []
    return [Finding(severity, source, text, len(cases), tuple(describe(case) for case in cases[:EXAMPLES]))]


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """The worst first, otherwise in their order."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))
