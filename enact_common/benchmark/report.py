"""What a benchmark leaves behind: a table on the terminal, and JSON, CSV, Markdown and a chart in a folder."""

import argparse
import csv
import io
import json
import platform
import shlex
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
import torchvision

from enact_common.benchmark.isolated import attempt, run_isolated
from enact_common.benchmark.measuring import machine
from enact_common.utils.files import make_folder, write_atomically

# Alignments of a Markdown table's columns.
LEFT, RIGHT = "---", "---:"


def markdown_table(columns: Mapping[str, str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown.

    Args:
        columns: headers, each with `LEFT` or `RIGHT`.
        rows: as many cells as there are columns, each.
    """
    lines = ["| " + " | ".join(columns) + " |", "|" + "|".join(columns.values()) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def figure(value: float | None, form: str) -> str:
    """A number in a table, in a format such as ".2f"; a dash where there is none."""
    return "-" if value is None else format(value, form)


def figure_range(values: Mapping[str, float] | None, form: str, scale: float = 1) -> str:
    """A median with the least and the most, as `spread` gives them, times a scale; a dash where there are none."""
    if values is None:
        return "-"
    median, least, most = (format(scale * values[name], form) for name in ("median", "least", "most"))
    return f"{median} ({least} to {most})"


def quotient(numerator: float | None, denominator: float | None) -> float | None:
    """A ratio; None where a part of it is missing or it has no meaning."""
    return None if numerator is None or not denominator else numerator / denominator


def environment(argv: Sequence[str], device: torch.device) -> dict:
    """What figures depend on beside the settings: `command`, `date`, `machine`, `versions` and `device`.

    Args:
        argv: the benchmark's command line.
        device: where it computes.
    """
    # Whoever asks a GPU for its name holds a part of its memory from then on.
    outcome = run_isolated(machine, device) if device.type == "cuda" else attempt(machine, device)
    return {
        "command": f"python -m enact_common.benchmark {shlex.join(argv)}",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": outcome.value or outcome.message,
        "device": str(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        },
    }


def heading(figures: dict) -> str:
    """The machine, the date, the command and, for a GPU, how it computed; in Markdown."""
    text = f"Machine: {figures['machine']}; {figures['date'][:10]}\n\n`{figures['command']}`"
    numerics = next((row["numerics"] for row in figures["rows"] if row.get("numerics")), None)
    if numerics and figures["device"].startswith("cuda"):
        text += f"\n\n{numerics_text(numerics)}"
    return text


def numerics_text(numerics: dict) -> str:
    """The result of `isolated.numerics` as a sentence about a GPU."""
    convolutions = "TF32" if numerics["tf32_convolutions"] else "float32"
    products = {"highest": "float32", "high": "TF32", "medium": "bf16"}[numerics["matmul_precision"]]
    kernels = "deterministic kernels" if numerics["deterministic"] else "kernels that need not be deterministic"
    return (
        f"Float32 tensors are convolved in {convolutions} and multiplied in {products}; attention may run as "
        f"{', '.join(numerics['attention'])}; {kernels}."
    )


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the files go."""
    parser.add_argument("--output_dir", metavar="DIR", help="write JSON, CSV, Markdown and a chart to this folder")


class Report:
    """The files of one run.

    Args:
        output_dir: folder, made here; None writes nothing.
        name: of the files, without suffix.

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(self, output_dir: str | None, name: str):
        self.folder = Path(output_dir) if output_dir else None
        self.name = name
        if self.folder is None:
            return
        make_folder(self.folder)

    def save_figures(self, figures: dict) -> None:
        """Write the JSON: after each row, so that a run that is stopped leaves what it has."""
        self._write("json", json.dumps(figures, indent=1))

    def save(self, figures: dict, text: str, flat: Sequence[dict]) -> None:
        """Print the text, and write all files.

        Args:
            figures: all of them, for the JSON and the chart.
            text: Markdown.
            flat: rows of the CSV, all with the same keys.
        """
        print(text)
        if self.folder is None:
            return
        self.save_figures(figures)
        self._write("md", text + "\n")
        table = io.StringIO()
        writer = csv.DictWriter(table, list(flat[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
        self._write("csv", table.getvalue())
        self._draw(figures)

    def _write(self, suffix: str, text: str) -> None:
        if self.folder is not None:
            path = self.folder / f"{self.name}.{suffix}"
            write_atomically(path, lambda file: file.write(text.encode()), sync=False)

    def _draw(self, figures: dict) -> None:
        try:
            from enact_common.benchmark import charts
        except ModuleNotFoundError as error:
            if error.name != "matplotlib":
                raise
            print(f"\nno {self.name}.png: matplotlib is missing (pip install matplotlib, or the extra `plots`)")
            return
        if self.name in charts.CHARTS:
            charts.CHARTS[self.name](figures, self.folder / f"{self.name}.png")
