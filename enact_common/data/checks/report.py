"""The checks' report as text: contents, classes, findings, verdict."""

import math
import textwrap
from collections import Counter
from collections.abc import Sequence

import numpy as np

from enact_common.data.checks.findings import EXAMPLES, NOTE, SEVERITIES, Finding
from enact_common.data.checks.split import Split

# The exclusive upper bounds of COCO's object areas, in square pixels.
AREAS = {"small (below 32 x 32)": 32**2, "medium": 96**2, "large (from 96 x 96)": math.inf}

LINE_WIDTH = 110


def contents_text(splits: Sequence[Split]) -> str:
    """Two tables of the splits' contents: totals, then counts by class."""
    columns = [contents(split) for split in splits]
    rows = [("", *(split.name for split in splits))]
    rows += [(key, *(column[key] for column in columns)) for key in columns[0]]
    return f"{table_text(rows)}\n\n{table_text(class_rows(splits))}"


def contents(split: Split) -> dict[str, str]:
    """The totals of a split as text, by row title."""
    objects = np.bincount(split.image_of[split.objects], minlength=len(split.images))
    areas, lower = split.areas[split.objects], 0.0
    rows = {
        "images": f"{len(split.images):,}",
        "without objects": f"{(objects == 0).sum():,}",
        "objects (no crowds)": f"{split.objects.sum():,}",
        "crowds": f"{split.crowd.sum():,}",
        "per image, mean": f"{objects.mean():.1f}" if len(objects) else "-",
        "per image, max": f"{objects.max():,}" if len(objects) else "-",
    }
    for name, upper in AREAS.items():
        share = ((areas >= lower) & (areas < upper)).mean() if len(areas) else 0.0
        rows[name] = f"{share:.1%}"
        lower = upper
    known = split.sizes[np.isfinite(split.sizes[:, 0])].astype(np.int64)
    if len(known):
        sizes, counts = np.unique(known, axis=0, return_counts=True)
        rows["different sizes"] = f"{len(sizes):,}"
        rows["most common size"] = "{} x {}".format(*sizes[counts.argmax()])
        for side, lengths in (("shorter side", known.min(axis=1)), ("longer side", known.max(axis=1))):
            rows[side] = f"{lengths.min()} to {lengths.max()}"
    else:
        rows |= dict.fromkeys(("different sizes", "most common size", "shorter side", "longer side"), "-")
    return rows


def class_rows(splits: Sequence[Split]) -> list[tuple[str, ...]]:
    """A header row, then a row per class: the counts of its objects and of images with them, in each split."""
    rows = [("class", *(f"{split.name} {what}" for split in splits for what in ("objects", "images")))]
    names = {category["id"]: str(category["name"]) for split in splits for category in split.categories}
    numbers = []
    for split in splits:
        ids = [category["id"] for category in split.categories]
        labels, images = split.category_of[split.objects], split.image_of[split.objects]
        pairs = np.unique(np.column_stack((labels, images)), axis=0)
        objects_of = np.bincount(labels, minlength=len(ids))
        images_of = np.bincount(pairs[:, 0], minlength=len(ids))
        numbers.append(dict(zip(ids, zip(objects_of, images_of, strict=True), strict=True)))
    width = max((len(str(i)) for i in names), default=0)
    for i in sorted(names):
        cells = [f"{n:,}" if i in own else "-" for own in numbers for n in own.get(i, (0, 0))]
        name = names[i] if len(names[i]) <= 32 else names[i][:29] + "..."
        rows.append((f"{i:>{width}}  {name}", *cells))
    return rows


def table_text(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned lines: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [f"{cell:>{width + 3}}" for cell, width in zip(others, widths[1:], strict=True)]
        lines.append(f"  {first:<{widths[0]}}{''.join(cells)}".rstrip())
    return "\n".join(lines)


def findings_text(findings: Sequence[Finding]) -> str:
    """The findings by source, each with its severity, count and first cases."""
    blocks = []
    for source in dict.fromkeys(finding.source for finding in findings):
        lines = [source]
        for finding in findings:
            if finding.source != source:
                continue
            count = f"{finding.count:,}" if finding.examples else ""
            head = f"  {finding.severity:<8}{count:>9}  "
            indent = " " * len(head)
            lines.append(textwrap.fill(finding.text, LINE_WIDTH, initial_indent=head, subsequent_indent=indent))
            lines += [f"{indent}- {example}" for example in finding.examples[:EXAMPLES]]
            if finding.examples and finding.count > EXAMPLES:
                lines.append(f"{indent}- and {finding.count - EXAMPLES:,} more")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def verdict_text(findings: Sequence[Finding]) -> str:
    """The number of findings of each severity, in one line."""
    counts = Counter(finding.severity for finding in findings)
    kinds = [f"{severity}s: {counts[severity]}" for severity in SEVERITIES if counts[severity]]
    return f"kinds of {', '.join(kinds)}" if set(counts) - {NOTE} else "nothing wrong"
