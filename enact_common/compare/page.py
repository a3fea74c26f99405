"""The comparison as one self-contained HTML page, with style, script, chart data and pictures inside."""

import json
from collections.abc import Sequence
from datetime import datetime
from html import escape
from importlib.resources import files
from string import Template

from enact_common.compare.pictures import Panel
from enact_common.compare.recorded import RecordedRun
from enact_common.compare.tables import Cell, Table
from enact_common.compare.terms import EQUAL
from enact_common.training.run_logs import CURVES, series

# Number of run colours in page.css.
RUN_COLOURS = 8


def part(name: str) -> str:
    """Return the text of a page file next to this module."""
    return (files(__package__) / name).read_text(encoding="utf-8")


def swatch(run: int) -> str:
    """Return a patch of a run's colour."""
    return f'<span class="swatch" style="--run: var(--run-{run % RUN_COLOURS})"></span>'


def cell_html(cell: Cell, room: bool) -> str:
    """Return a body cell of a table; `room` reserves width for a difference."""
    text = f"<b>{escape(cell.text)}</b>" if cell.best else escape(cell.text)
    # An empty span keeps the numbers of a column aligned.
    difference = f' <span class="difference">{escape(cell.difference)}</span>' if room else ""
    return f'<td data-value="{escape(cell.text)}">{text}{difference}</td>'


def section_html(title: str, table: str, note: str = "") -> str:
    """Return a section with a table, and how to read it."""
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    # A scrolling region must be reachable by keyboard.
    region = f'<div class="wide" tabindex="0" role="region" aria-label="{escape(title)}">'
    return f"<section><h2>{escape(title)}</h2>\n{region}\n{table}</div>\n{below}</section>"


def table_html(table: Table, runs: Sequence[RecordedRun], sortable: bool = False) -> str:
    """Return a table with its title and a colour patch at each run's name.

    If it is `sortable`, a click on a column head sorts the rows.
    """
    places = {run.name: i for i, run in enumerate(runs)}
    heads = []
    for name in table.header:
        # "AP50 ENACT" belongs to the run ENACT.
        own = name if name in places else name.partition(" ")[2]
        heads.append(f'<th scope="col">{swatch(places[own]) if own in places else ""}{escape(name)}</th>')
    rooms = [any(cell.difference for cell in column) for column in list(zip(*table.rows, strict=True))[1:]]
    lines = []
    for i, (head, *cells) in enumerate(table.rows):
        marked = ' class="marked"' if table.marked and table.marked[i] else ""
        body = "".join(cell_html(cell, room) for cell, room in zip(cells, rooms, strict=True))
        lines.append(f'<tr{marked}><th scope="row">{escape(head.text)}</th>{body}</tr>')
    kinds = " ".join(kind for kind, holds in (("numeric", table.numeric), ("sortable", sortable)) if holds)
    body = "\n".join(lines)
    content = (
        f'<table class="{kinds}"><caption>{escape(table.title)}</caption>\n<thead><tr>{"".join(heads)}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table>"
    )
    return section_html(table.title, content, table.note)


def terms_html(inequalities: Sequence[str]) -> str:
    """Return the section on whether the runs are on equal terms."""
    if not inequalities:
        return f'<section class="terms equal">{escape(EQUAL)}</section>'
    return list_html("Not on equal terms.", inequalities)


def list_html(lead: str, texts: Sequence[str]) -> str:
    """Return a section with a list of sentences."""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f'<section class="terms"><strong>{lead}</strong><ul>{items}</ul></section>'


def curves(runs: Sequence[RecordedRun]) -> dict:
    """Return the data for page.js: names and colours of the runs, and the lines of each chart."""
    charts = []
    for title, quantities in CURVES.items():
        lines = [
            {"run": i, "kind": kind, "style": style, "points": points}
            for i, run in enumerate(runs)
            for style, (kind, key, place) in enumerate(quantities)
            if (points := series(run.epochs, key, place))
        ]
        if lines:
            charts.append({"title": title, "kinds": [kind for kind, _, _ in quantities], "series": lines})
    return {
        "runs": [{"name": run.name, "colour": i % RUN_COLOURS} for i, run in enumerate(runs)],
        "charts": charts,
    }


def curves_html(data: dict) -> str:
    """Return the chart containers, with their content in words for screen readers."""
    if not data["charts"]:
        return '<h2>Learning curves</h2><p class="missing">No run has a log.</p>'
    boxes = "".join(
        f'<label><input type="checkbox" value="{i}" checked> {swatch(i)}{escape(run["name"])}</label>'
        for i, run in enumerate(data["runs"])
    )
    figures = []
    for chart in data["charts"]:
        description = "; ".join(
            f"{data['runs'][line['run']]['name']} {line['kind']} from {line['points'][0][1]:.4g} to "
            f"{line['points'][-1][1]:.4g} at epoch {line['points'][-1][0]}"
            for line in chart["series"]
        )
        key = "".join(
            f'<span><svg aria-hidden="true"><line x2="100%" y1="50%" y2="50%" stroke-dasharray="{dash}"/></svg>'
            f"{escape(kind)}</span>"
            for kind, dash in zip(chart["kinds"], ("none", "6 4"), strict=False)
        )
        figures.append(
            f'<figure class="chart"><h3>{escape(chart["title"])}</h3>'
            f'<p class="key">{key}</p><div class="plot" tabindex="0" role="img" '
            f'aria-label="{escape(chart["title"])} by epochs: {escape(description)}"></div>'
            '<output class="readout"></output></figure>'
        )
    return (
        f'<h2>Learning curves</h2><fieldset class="runs"><legend>Shown:</legend>{boxes}</fieldset>'
        f'<div class="charts">{"".join(figures)}</div>'
        "<noscript><p>The curves need JavaScript; the tables do not.</p></noscript>"
    )


def panel_html(image: str, panel: Panel) -> str:
    """Return a panel of an image."""
    caption = f"<figcaption>{escape(panel.caption)}</figcaption>"
    if panel.source is None:
        return f'<figure><div class="missing">No detections: {escape(panel.reason)}</div>{caption}</figure>'
    words = escape(f"{image}, {panel.caption}")
    picture = f'<img src="{escape(panel.source)}" alt="{words}">'
    return f'<figure><button type="button" title="Enlarge">{picture}</button>{caption}</figure>'


def pictures_html(title: str, scenes: Sequence[tuple[str, Sequence[Panel]]], reason: str, note: str) -> str:
    """Return a section with the panels of images side by side, or the reason why there are none.

    `scenes` are the name and panels of each image, `note` is how to read them.
    """
    if not scenes:
        return f'<h2>{escape(title)}</h2><p class="missing">No pictures: {escape(reason)}</p>'
    rows = "".join(
        f'<h3>{escape(name)}</h3><div class="scene">{"".join(panel_html(name, panel) for panel in panels)}</div>'
        for name, panels in scenes
    )
    return f'<h2>{escape(title)}</h2><p class="note">{escape(note)}</p>{rows}'


def build_page(
    title: str,
    runs: Sequence[RecordedRun],
    inequalities: Sequence[str],
    settings: Sequence[Table],
    figures: Sequence[Table],
    differences: Table | None,
    unmeasured: str,
    classes: Table | None,
    scenes: Sequence[tuple[str, Sequence[Panel]]],
    reason: str,
    threshold: float,
) -> str:
    """Return the page of the compared runs.

    Args:
        inequalities: sentences on why the runs are not on equal terms.
        settings, figures: tables of the settings, and of metrics and costs.
        differences, unmeasured: the table of differences in AP, or None and the reason.
        classes: the table of classes, or None.
        scenes, reason: name and panels of each image; the reason if there are none.
        threshold: minimum score of the drawn detections.
    """
    data = curves(runs)
    sections = [
        terms_html(inequalities),
        *(
            f'<div class="tables">{"".join(table_html(table, runs) for table in group)}</div>'
            for group in (settings, figures)
        ),
        table_html(differences, runs)
        if differences
        else f'<h2>Differences</h2><p class="missing">No intervals: {escape(unmeasured)}</p>',
        curves_html(data),
        table_html(classes, runs, sortable=True) if classes else "",
        pictures_html("Detections", scenes, reason, f"Scores of at least {threshold:g}. Click to enlarge."),
    ]
    return document(title, __package__, sections, data)


def document(title: str, maker: str, sections: Sequence[str], data: dict) -> str:
    """Return a page of the module `maker`, with its style and script inside.

    Empty `sections` are left out; `data` are the charts', from `curves`.
    """
    # A run name may contain "</script>".
    embedded = json.dumps(data).replace("<", "\\u003c")
    return Template(part("page.html")).substitute(
        title=escape(title),
        made=f"Made by {maker} on {datetime.now():%Y-%m-%d %H:%M}.",
        style=part("page.css"),
        content="\n".join(section for section in sections if section),
        curves=embedded,
        script=part("page.js"),
    )
