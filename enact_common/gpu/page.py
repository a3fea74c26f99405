"""Page of a run on a GPU; all figures come from the run's JSON files."""

import json
from pathlib import Path

from enact_common.benchmark import charts, scaling, table
from enact_common.benchmark.labels import MIB
from enact_common.benchmark.measuring import spread
from enact_common.benchmark.report import LEFT, RIGHT, figure_range, markdown_table, numerics_text
from enact_common.cli.program import enact
from enact_common.utils.errors import UserError
from enact_common.utils.files import make_folder, read_json, write_atomically

TABLES = {"table": table.to_markdown, "scaling": scaling.to_markdown}

INTRODUCTION = """# On a GPU

Made by `python -m enact_common.gpu report` from the JSON files of one run."""


def write_page(folder: Path, page: Path) -> None:
    """Write the tables of a run, in `folder`, to a Markdown page, and its charts to a folder named after the page.

    Raises:
        UserError: the folder has no run.json or a broken one, or the page's folder cannot be created.
    """
    summary = read_json(folder / "run.json")
    if summary is None:
        if (folder / "run.json").exists():
            raise UserError(f"{folder / 'run.json'}: broken, perhaps cut off; copy the folder of results again")
        raise UserError(f"{folder}: no run.json; name the folder of results of {enact()} gpu run")
    pictures = page.parent / page.stem
    make_folder(pictures)
    warning = "\n\n**Tiny sizes: a trial of the code, nothing was measured.**" if summary["small"] else ""
    about = f"Machine: {summary['machine']}; {summary['date'][:10]}\n\n`{summary['command']}`{warning}"
    columns = {"step": LEFT, "ended": LEFT, "seconds": RIGHT, "command": LEFT}
    rows = [
        [step["step"], "done" if step["status"] == 0 else str(step["status"]), f"{step['seconds']:.0f}",
         f"`{step['command']}`"]
        for step in summary["steps"]
    ]  # fmt: skip
    sections = [INTRODUCTION, about, markdown_table(columns, rows)]
    for step in summary["steps"]:
        sections.append(f"## {step['step']}")
        parts = [section_of(path, pictures) for path in sorted((folder / step["step"]).glob("*.json"))]
        sections += parts or ["No results."]
    text = "\n\n".join(sections) + "\n"
    write_atomically(page, lambda file: file.write(text.encode()), sync=False)


def section_of(path: Path, pictures: Path) -> str:
    """Return a step's JSON file as Markdown; a benchmark's chart is written to `pictures`."""
    result = json.loads(path.read_text())
    if "check" in result:
        return check_text(result)
    if path.stem == "rowcol":
        return rowcol_text(result)
    picture = pictures / f"{path.parent.name}.png"
    charts.CHARTS[path.stem](result, picture)
    return f"{TABLES[path.stem](result)}\n\n![{path.parent.name}]({pictures.name}/{picture.name})"


def check_text(result: dict) -> str:
    """Return a check's rows as Markdown: heading, description and table."""
    head = f"### {result['check']}"
    if "problem" in result:
        return f"{head}\n\nFailed: {result['problem']}"
    columns = {
        name: LEFT if isinstance(value, str | bool) else RIGHT for row in result["rows"] for name, value in row.items()
    }
    rows = [[cell(row.get(name)) for name in columns] for row in result["rows"]]
    how = f"\n\n{numerics_text(result['numerics'])}" if result["device"].startswith("cuda") else ""
    return f"{head}\n\n{result['about']}{how}\n\n{markdown_table(columns, rows)}"


def cell(value) -> str:
    """Format a value for a table; floats get three significant digits."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def rowcol_text(result: dict) -> str:
    """Return the result of `benchmark rowcol` as Markdown."""
    columns = {"map": LEFT, "naive ms": RIGHT, "ours ms": RIGHT, "naive saves MiB": RIGHT, "ours saves MiB": RIGHT}
    rows = [
        [
            row["case"],
            *(figure_range(spread(row["seconds"][name]), ".2f", 1000) for name in ("naive", "ours")),
            *(f"{row['saved_bytes'][name] / MIB:.1f}" for name in ("naive", "ours")),
        ]
        for row in result["rows"]
    ]
    about = f"Batch times heads {result['batch']}, head_dim {result['channels']}, float32."
    return f"Machine: {result['machine']}\n\n{about}\n\n{markdown_table(columns, rows)}"
