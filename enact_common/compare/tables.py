"""Tables of the runs' figures, costs and classes, and tables as text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from enact_common.compare.recorded import RecordedRun
from enact_common.evaluation.coco import METRICS
from enact_common.training.run_logs import classes_by_name

# Where there is no figure.
DASH = "-"


@dataclass
class Cell:
    """What stands in one place of a table.

    Attributes:
        text: the figure or word.
        difference: to the first run; empty for none.
        best: of its row.
    """

    text: str
    difference: str = ""
    best: bool = False

    def plain(self) -> str:
        """As Markdown."""
        text = f"**{self.text}**" if self.best else self.text
        # A bar would end the cell, a line break the table.
        return " ".join(f"{text} ({self.difference})".split() if self.difference else text.split()).replace("|", "\\|")


@dataclass
class Table:
    """A table; the first column holds the rows' names.

    Attributes:
        title: above it.
        header: names of the columns.
        rows: as many cells as there are columns, each.
        note: how to read it.
        marked: of each row whether it is to be marked; none are where this is empty.
        numeric: whether all columns but the first hold numbers.
    """

    title: str
    header: list[str]
    rows: list[list[Cell]]
    note: str = ""
    marked: list[bool] = field(default_factory=list)
    numeric: bool = False

    def markdown(self) -> str:
        """The table as Markdown whose columns are aligned, so that it is read on a terminal as well."""
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
    """A row of figures, with what they are against the first.

    Args:
        name: the row's.
        values: of each run; None where it has none.
        form: a figure's text.
        difference: from a run's figure and the first run's to a text.
        best: `max` or `min`; None where no figure is better than another.
    """
    texts = [DASH if value is None else form(value) for value in values]
    known = [value for value in values if value is not None]
    # Where all read the same, none is the best.
    top = form(best(known)) if best and len({form(value) for value in known}) > 1 else None
    row = [Cell(name)]
    for i, (value, text) in enumerate(zip(values, texts, strict=True)):
        against = difference(value, values[0]) if i and None not in (value, values[0]) else ""
        row.append(Cell(text, against, top is not None and text == top))
    return row


def ap_row(name: str, values: Sequence[float | None]) -> list[Cell]:
    """A row of APs or recalls, in [0, 1]."""
    # Adding 0 makes what rounds to -0 a 0.
    return compared(name, values, "{:.3f}".format, lambda own, first: f"{round(own - first, 3) + 0:+.3f}", max)


def cost_row(name: str, values: Sequence[float | None], form: str) -> list[Cell]:
    """A row of what should be small, with ratios to the first."""
    return compared(name, values, form.format, ratio_text, min)


def ratio_text(own: float, first: float) -> str:
    """How many times the first run's figure a run's own is."""
    return f"x {own / first:.2f}" if first else ""


def figures_table(runs: Sequence[RecordedRun]) -> Table:
    """COCO's twelve figures, and the best AP on the way."""
    rows = [ap_row(name, [run.figures.get(name) for run in runs]) for name in METRICS]
    rows.append(ap_row("highest AP", [run.best and run.best[1] for run in runs]))
    rows.append([Cell("at epoch"), *(Cell(str(run.best[0]) if run.best else DASH) for run in runs)])
    return Table(
        "COCO's figures",
        ["figure", *(run.name for run in runs)],
        rows,
        note=f"Of the latest evaluation; the last two rows are the log's best epoch. The best of a row is bold, "
        f"differences are to {runs[0].name}.",
        numeric=True,
    )


def costs_table(runs: Sequence[RecordedRun]) -> Table:
    """Time and memory, as far as the logs have them."""
    whole = [sum(seconds) / 3600 if (seconds := run.logged("train_seconds")) else None for run in runs]
    rows = [
        cost_row("training, seconds an epoch", [run.median("train_seconds") for run in runs], "{:,.1f}"),
        cost_row("evaluation, seconds", [run.median("test_seconds") for run in runs], "{:,.1f}"),
        cost_row("training in all, hours", whole, "{:,.2f}"),
        cost_row("peak memory, GiB", [max(run.logged("peak_memory_gib"), default=None) for run in runs], "{:.2f}"),
        compared("parameters", [run.parameters for run in runs], "{:,.0f}".format, ratio_text),
    ]
    return Table(
        "Time and memory",
        ["", *(run.name for run in runs)],
        rows,
        note="Medians over the epochs. Figures of different machines, or of machines that did other work too, cannot "
        "be compared. Logs of earlier versions and of the original repositories have none.",
        numeric=True,
    )


def classes_table(runs: Sequence[RecordedRun]) -> Table | None:
    """AP and AP50 of each class that a run was evaluated on; None where no run has a record of it."""
    by_run = classes_by_name([run.evaluation or {"classes": []} for run in runs])
    names = list(dict.fromkeys(name for rows in by_run for name in rows))
    if not names:
        return None
    rows = []
    for name in names:
        known = [rows_of.get(name) for rows_of in by_run]
        counts = list(dict.fromkeys(str(row["objects"]) for row in known if row))
        cells = [ap_row("", [row and row[figure] for row in known])[1:] for figure in ("AP", "AP50")]
        rows.append([Cell(name), Cell(" / ".join(counts)), *cells[0], *cells[1]])
    columns = [f"{figure} {run.name}" for figure in ("AP", "AP50") for run in runs]
    return Table("Classes", ["class", "objects", *columns], rows, note="", numeric=True)
