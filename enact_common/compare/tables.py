"""Tables of the runs' metrics, costs and classes, and their form in Markdown."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from enact_common.compare.recorded import RecordedRun
from enact_common.evaluation.coco import METRICS
from enact_common.training.run_logs import classes_by_name

# Shown for a missing value.
DASH = "-"


@dataclass
class Cell:
    """A cell of a table.

    Attributes:
        difference: difference to the first run; empty for none.
        best: whether the value is the best of its row.
    """

    text: str
    difference: str = ""
    best: bool = False

    def plain(self) -> str:
        """Return the cell as Markdown."""
        text = f"**{self.text}**" if self.best else self.text
        # A bar would end the cell, a line break the table.
        return " ".join(f"{text} ({self.difference})".split() if self.difference else text.split()).replace("|", "\\|")


@dataclass
class Table:
    """A table whose first column holds the row names.

    Attributes:
        rows: for each row, one cell per column; texts become cells.
        note: how to read the table.
        marked: for each row, whether to highlight it; empty for none.
        numeric: whether all columns except the first hold numbers.
    """

    title: str
    header: list[str]
    rows: list[list[Cell | str]]
    note: str = ""
    marked: list[bool] = field(default_factory=list)
    numeric: bool = False

    def __post_init__(self):
        self.rows = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in self.rows]

    def markdown(self) -> str:
        """Return the table as Markdown, with aligned columns to be readable on a terminal."""
        cells = [[Cell(name).plain() for name in self.header], *([cell.plain() for cell in row] for row in self.rows)]
        for row, marked in zip(cells[1:], self.marked, strict=False):
            row[0] = f"**{row[0]}**" if marked else row[0]
        widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
        align = [str.ljust] + [str.rjust if self.numeric else str.ljust] * (len(widths) - 1)
        lines = [
            "| " + " | ".join(put(text, width) for put, text, width in zip(align, row, widths, strict=True)) + " |"
            for row in cells
        ]
        rule = [
            "-" * (width + 1) + (":" if put is str.rjust else "-") for put, width in zip(align, widths, strict=True)
        ]
        lines.insert(1, "|" + "|".join(rule) + "|")
        return "\n".join([f"## {self.title}", "", *lines, *(("", self.note) if self.note else ())])


def compared(
    name: str,
    values: Sequence[float | None],
    form: Callable[[float], str],
    difference: Callable[[float, float], str],
    best: Callable[[Sequence[float]], float] | None = None,
) -> list[Cell]:
    """Return a row of values, one per run, with their differences to the first run.

    `form` and `difference` make texts of a value, and of a run's and the first run's value. `best` is `max` or `min`;
    None if no value is better than another.
    """
    texts = [DASH if value is None else form(value) for value in values]
    known = [value for value in values if value is not None]
    # No value is the best if all print alike.
    top = form(best(known)) if best and len({form(value) for value in known}) > 1 else None
    row = [Cell(name)]
    for i, (value, text) in enumerate(zip(values, texts, strict=True)):
        against = difference(value, values[0]) if i and None not in (value, values[0]) else ""
        row.append(Cell(text, against, top is not None and text == top))
    return row


def ap_row(name: str, values: Sequence[float | None]) -> list[Cell]:
    """Return a row of APs or recalls, in [0, 1]."""
    # Adding 0 turns -0 into 0.
    return compared(name, values, "{:.3f}".format, lambda own, first: f"{round(own - first, 3) + 0:+.3f}", max)


def cost_row(name: str, values: Sequence[float | None], form: str) -> list[Cell]:
    """Return a row of costs, of which the smallest is best, with ratios to the first run."""
    return compared(name, values, form.format, ratio_text, min)


def ratio_text(own: float, first: float) -> str:
    """Return the ratio of a run's value to the first run's, as text."""
    return f"x {own / first:.2f}" if first else ""


def figures_table(runs: Sequence[RecordedRun]) -> Table:
    """Return the twelve COCO metrics, and the best AP in the log."""
    rows = [ap_row(name, [run.figures.get(name) for run in runs]) for name in METRICS]
    rows.append(ap_row("highest AP", [run.best and run.best[1] for run in runs]))
    rows.append(["at epoch", *(str(run.best[0]) if run.best else DASH for run in runs)])
    return Table(
        "COCO metrics",
        ["metric", *(run.name for run in runs)],
        rows,
        note="From the latest evaluation; the last two rows show the best epoch in the log. The best value of a row is "
        f"bold, differences are to {runs[0].name}.",
        numeric=True,
    )


def costs_table(runs: Sequence[RecordedRun]) -> Table:
    """Return time and memory, as far as they are logged."""
    whole = [sum(seconds) / 3600 if (seconds := run.logged("train_seconds")) else None for run in runs]
    rows = [
        cost_row("training, seconds per epoch", [run.median("train_seconds") for run in runs], "{:,.1f}"),
        cost_row("evaluation, seconds", [run.median("test_seconds") for run in runs], "{:,.1f}"),
        cost_row("training in total, hours", whole, "{:,.2f}"),
        cost_row("peak memory, GiB", [max(run.logged("peak_memory_gib"), default=None) for run in runs], "{:.2f}"),
        compared("parameters", [run.parameters for run in runs], "{:,.0f}".format, ratio_text),
    ]
    return Table(
        "Time and memory",
        ["", *(run.name for run in runs)],
        rows,
        note="Medians over the epochs, comparable only between runs on the same machine without other load. Logs of "
        "earlier versions and of the original repositories lack these values.",
        numeric=True,
    )


def classes_table(runs: Sequence[RecordedRun]) -> Table | None:
    """Return AP and AP50 of each evaluated class, or None if no run has an evaluation record."""
    by_run = classes_by_name([run.evaluation or {"classes": []} for run in runs])
    names = list(dict.fromkeys(name for rows in by_run for name in rows))
    if not names:
        return None
    rows = []
    for name in names:
        known = [rows_of.get(name) for rows_of in by_run]
        counts = list(dict.fromkeys(str(row["objects"]) for row in known if row))
        cells = [ap_row("", [row and row[figure] for row in known])[1:] for figure in ("AP", "AP50")]
        rows.append([name, " / ".join(counts), *cells[0], *cells[1]])
    columns = [f"{figure} {run.name}" for figure in ("AP", "AP50") for run in runs]
    return Table("Classes", ["class", "objects", *columns], rows, note="", numeric=True)
