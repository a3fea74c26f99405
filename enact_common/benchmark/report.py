"""Reports of the benchmarks: a table on the terminal, and JSON, CSV, Markdown and a chart in a folder."""

import argparse
import csv
import io
import json
import platform
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torchvision

from enact_common.benchmark.isolated import FAILED, attempt, run_isolated
from enact_common.benchmark.labels import GIB
from enact_common.benchmark.measuring import machine
from enact_common.utils.files import make_folder, write_atomically

# Alignments of a Markdown table's columns.
LEFT, RIGHT = "---", "---:"


def markdown_table(columns: Mapping[str, str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; `columns` maps each header to `LEFT` or `RIGHT`."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "|".join(columns.values()) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def figure(value: float | None, form: str) -> str:
    """Format a number for a table with a format spec such as ".2f"; None becomes a dash."""
    return "-" if value is None else format(value, form)


def figure_range(values: Mapping[str, float] | None, form: str, scale: float = 1) -> str:
    """Format a result of `spread`, multiplied by `scale`, as "median (least to most)"; None becomes a dash."""
    if values is None:
        return "-"
    median, least, most = (format(scale * values[name], form) for name in ("median", "least", "most"))
    return f"{median} ({least} to {most})"


def memory_text(memory: dict | None, device: str) -> str:
    """Return the peak in GiB, followed by the reserved memory on a GPU, or the rise on a CPU, in brackets."""
    if memory is None:
        return "-"
    other = memory["reserved" if device.startswith("cuda") else "rise"]
    return f"{memory['peak'] / GIB:.2f} ({other / GIB:.2f})"


def memory_note(device: str) -> str:
    """Return what `memory_text` shows, for a table's text."""
    return "allocated (reserved)" if device.startswith("cuda") else "resident in the process (rise in the runs)"


def quotient(numerator: float | None, denominator: float | None) -> float | None:
    """Return a ratio; None if a value is missing or the denominator is 0."""
    return None if numerator is None or not denominator else numerator / denominator


def environment(argv: Sequence[str], device: torch.device) -> dict:
    """Return the environment of a benchmark: `command`, `date`, `machine`, `versions` and `device`."""
    # Asking for a GPU's name creates a CUDA context, which takes GPU memory until the process ends.
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
    """Return the machine, date and command in Markdown, and on a GPU the settings that select kernels."""
    text = f"Machine: {figures['machine']}; {figures['date'][:10]}\n\n`{figures['command']}`"
    numerics = next((row["numerics"] for row in figures["rows"] if row.get("numerics")), None)
    if numerics and figures["device"].startswith("cuda"):
        text += f"\n\n{numerics_text(numerics)}"
    return text


def numerics_text(numerics: dict) -> str:
    """Describe the result of `isolated.numerics` in a sentence, for a GPU."""
    convolutions = "TF32" if numerics["tf32_convolutions"] else "float32"
    products = {"highest": "float32", "high": "TF32", "medium": "bf16"}[numerics["matmul_precision"]]
    kernels = "deterministic kernels" if numerics["deterministic"] else "kernels may be nondeterministic"
    return (
        f"Float32 tensors are convolved in {convolutions} and multiplied in {products}; attention may run as "
        f"{', '.join(numerics['attention'])}; {kernels}."
    )


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flag for the reports' folder."""
    parser.add_argument(
        "--output_dir", metavar="DIR",
        help="write JSON, CSV, Markdown and a chart to this folder (default: write no files)",
    )  # fmt: skip


class Report:
    """The report files of one run.

    Args:
        output_dir: folder to create; None writes no files.
        name: file name without suffix.

    Raises:
        UserError: the folder cannot be created.
    """

    def __init__(self, output_dir: str | None, name: str):
        self.folder = Path(output_dir) if output_dir else None
        self.name = name
        if self.folder is not None:
            make_folder(self.folder)

    def measure(
        self,
        figures: dict,
        measurements: Iterable[Any],
        measure_row: Callable[[Any], dict],
        to_markdown: Callable[[dict], str],
        to_csv: Callable[[list[dict]], list[dict]],
    ) -> int:
        """Measure all rows into `figures`, print the table and write the files.

        Returns:
            the exit status: 1 if a row failed for a reason other than memory, else 0.
        """
        figures["rows"] = []
        for measurement in measurements:
            figures["rows"].append(measure_row(measurement))
            self.save_figures(figures)
        self.save(figures, to_markdown(figures), to_csv(figures["rows"]))
        return int(any(row["status"] == FAILED for row in figures["rows"]))

    def save_figures(self, figures: dict) -> None:
        """Write the JSON file; called after each row, so that an interrupted run keeps its rows."""
        self._write("json", json.dumps(figures, indent=1))

    def save(self, figures: dict, text: str, flat: Sequence[dict]) -> None:
        """Print the table and write all files.

        Args:
            figures: all results, for the JSON and the chart.
            text: the table in Markdown.
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
            print(
                f"\n{self.name}.png not written: matplotlib is missing (pip install matplotlib, or the extra `plots`)"
            )
            return
        if self.name in charts.CHARTS:
            charts.CHARTS[self.name](figures, self.folder / f"{self.name}.png")
