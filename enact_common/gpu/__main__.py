"""Check and measure the project on a GPU, and write a page of the results.

    python -m enact_common.gpu run --output_dir gpu_run           # about ten minutes on one GPU
    python -m enact_common.gpu report gpu_run --page docs/results/gpu.md  # later, on any machine: tables and charts

`run` starts one command after the other, each with a time limit, and packs the results so far into results.tgz after
each. The other commands run even if one fails or exceeds its limit.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from enact_common.benchmark.isolated import attempt
from enact_common.benchmark.measuring import machine
from enact_common.cli.program import Parser, program
from enact_common.cli.types import HelpFormatter
from enact_common.gpu.checks import CHECKS, Setting, run_check
from enact_common.utils.device import default_device, find_device
from enact_common.utils.errors import UserError, exit_status
from enact_common.utils.files import make_folder, write_atomically

# File names of a run's summary, and of the archive of all results except charts.
SUMMARY, ARCHIVE = "run.json", "results.tgz"

# Flags that shrink a benchmark to seconds on a CPU.
TINY = "--size 64 96 --batch 1 --repeat 1 --warmup 0 --variants detr --rows enact".split()
TINY_MODEL = "--backbone resnet18 --enc_layers 1 --dec_layers 1".split()


@dataclass(frozen=True)
class Step:
    """One command of the run.

    Attributes:
        name: name of the step and its folder.
        limit: time limit, seconds; the command is killed after it.
        module: module in `enact_common` to run.
        small: the command line of a trial that takes seconds on a CPU.
    """

    name: str
    limit: int
    module: str
    words: tuple[str, ...]
    small: tuple[str, ...]


def checks(name: str, limit: int, *names: str) -> Step:
    """Return a step that runs the named checks."""
    return Step(name, limit, "gpu", ("check", *names), ("check", *names, "--small"))


def table(name: str, limit: int, words: str, flags: str = "") -> Step:
    """Return a step that runs `benchmark table`; `flags` go to the model."""
    small = ("table", *TINY, *(["--compile"] if "--compile" in words else []), "--", *TINY_MODEL)
    return Step(name, limit, "benchmark", ("table", *words.split(), *(["--", *flags.split()] if flags else [])), small)


# The most important steps come first, in case a run is cut short.
STEPS = (
    checks("right", 90, "golden", "windows", "faults"),
    checks("resume", 60, "resume"),
    table("table_bf16", 110, "--amp bf16 --repeat 5 --warmup 3"),
    table("table_float32", 120, "--repeat 5 --warmup 3"),
    table("detr_dc5", 40, "--variants detr --amp bf16 --batch 4 --repeat 5 --warmup 3", "--dilation"),
    checks("attention", 80, "attention", "layers"),
    checks("kernels", 60, "kernels", "packed"),
    table("table_triton", 70, "--rows enact --amp bf16 --repeat 5 --warmup 3", "--enact_kernels triton"),
    checks("graphs", 40, "graphs"),
    table(
        "table_graph", 40, "--variants detr --rows efficient enact --graph_encoder --amp bf16 --repeat 5 --warmup 3",
        "--enact_clusters equal",
    ),
    checks("sizes", 60, "sizes"),
    Step(
        "scaling", 60, "benchmark", ("scaling", "--amp", "bf16"),
        tuple("scaling --tokens 60 --layers mha enact --repeat 1 --channels 16 --heads 2".split()),
    ),
    Step(
        "rowcol", 20, "benchmark", ("rowcol",),
        tuple("rowcol --batch 1 --channels 8 --repeat 1 --clustered 4 5 3 --plain 4 5 6".split()),
    ),
    table("compile", 110, "--variants detr --rows enact --amp bf16 --compile --repeat 5 --warmup 4"),
)  # fmt: skip


def command_of(step: Step, folder: Path, device: str, small: bool) -> list[str]:
    """Return the command line of a step that writes its results to `folder`."""
    words = list(step.small if small else step.words)
    # Insert flags before `--`, since the words after it go to the model.
    position = words.index("--") if "--" in words else len(words)
    output = ["--output", str(folder / "rowcol.json")] if step.name == "rowcol" else ["--output_dir", str(folder)]
    words[position:position] = ["--device", device, *output]
    return [sys.executable, "-m", f"enact_common.{step.module}", *words]


def run_step(step: Step, folder: Path, device: str, small: bool) -> dict:
    """Run a step and return its `step`, `status` (exit status or "time limit"), `seconds` and `command`."""
    folder.mkdir(parents=True, exist_ok=True)
    command = command_of(step, folder, device, small)
    start = time.perf_counter()
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status: int | str = process.wait(timeout=10 * step.limit if small else step.limit)
        except subprocess.TimeoutExpired:
            status = "time limit"
        finally:
            # Kill the process group, since measurements run in child processes.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    command_text = shlex.join(["python", *command[1:]])
    return {"step": step.name, "status": status, "seconds": time.perf_counter() - start, "command": command_text}


def run(args: argparse.Namespace) -> int:
    """Run the steps; return 1 if one failed, else 0."""
    device = find_device(args.device or default_device())
    if device.type == "cpu" and not args.small:
        raise UserError("no GPU found: a full run would take hours on a CPU; pass --small to try the commands")
    output = Path(args.output_dir)
    make_folder(output)
    summary = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": f"python -m enact_common.gpu {shlex.join(args.argv)}",
        "machine": machine(device),
        "device": str(device),
        "small": args.small,
        "steps": [],
    }
    for step in STEPS:
        if args.only and step.name not in args.only:
            continue
        summary["steps"].append(run_step(step, output / step.name, str(device), args.small))
        result = summary["steps"][-1]
        print(f"{step.name}: status {result['status']}, {result['seconds']:.0f} s", flush=True)
        if result["status"] != 0:
            last_lines = (output / step.name / "log.txt").read_text().splitlines()[-5:]
            print("\n".join(last_lines), file=sys.stderr, flush=True)
        write_atomically(output / SUMMARY, lambda file: file.write(json.dumps(summary, indent=1).encode()), sync=False)
        write_atomically(output / ARCHIVE, lambda file: pack(output, file), sync=False)
    return int(any(result["status"] != 0 for result in summary["steps"]))


def pack(folder: Path, file) -> None:
    """Write all results except charts to `file`, a compressed archive."""
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".json", ".md", ".csv", ".txt"):
                archive.add(path, path.relative_to(folder))


def check(args: argparse.Namespace) -> int:
    """Run checks and write a JSON file for each; return 1 if one failed, else 0."""
    setting = Setting(find_device(args.device or default_device()), args.small)
    output = Path(args.output_dir)
    make_folder(output)
    failed = 0
    for name in args.names or CHECKS:
        outcome = attempt(run_check, name, setting)
        failed += outcome.value is None
        print(f"{name}: {outcome.status} {outcome.message}\n{outcome.details}", flush=True)
        result = outcome.value or {"check": name, "problem": outcome.message}
        result["machine"] = machine(setting.device)
        text = json.dumps(result, indent=1)
        write_atomically(output / f"{name}.json", lambda file, text=text: file.write(text.encode()), sync=False)
    return int(failed > 0)


def report(args: argparse.Namespace) -> int:
    """Write the page of a run's results; return 0."""
    # Imported here, since only the page needs matplotlib, which a GPU server may lack.
    from enact_common.gpu.page import write_page

    write_page(Path(args.folder), Path(args.page))
    print(args.page)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `run`, `check` and `report`."""
    parser = Parser(prog=program("enact_common.gpu"), description=" ".join(__doc__.split("\n\n")[0].split()))
    commands = parser.add_subparsers(dest="command", required=True)
    device = {"help": "cuda, cuda:1, ..., or cpu with --small (default: a GPU if there is one)"}
    small = {"action": "store_true", "help": "tiny sizes: try the code in a minute or two, without useful timings"}

    run_parser = commands.add_parser("run", help="run all steps: checks and benchmarks", formatter_class=HelpFormatter)
    run_parser.add_argument("--output_dir", default="gpu_run", metavar="DIR", help="folder for the results")
    run_parser.add_argument("--device", **device)
    run_parser.add_argument("--small", **small)
    run_parser.add_argument(
        "--only", nargs="+", choices=[step.name for step in STEPS], metavar="STEP",
        help=f"run only these steps of {', '.join(step.name for step in STEPS)}; default: all",
    )  # fmt: skip
    run_parser.set_defaults(run=run)

    check_parser = commands.add_parser("check", help="run only checks", formatter_class=HelpFormatter)
    check_parser.add_argument(
        "names", nargs="*", choices=tuple(CHECKS), metavar="CHECK",
        help=f"checks to run, of {', '.join(CHECKS)}; default: all",
    )  # fmt: skip
    check_parser.add_argument("--output_dir", default="gpu_run", metavar="DIR", help="folder for the JSON files")
    check_parser.add_argument("--device", **device)
    check_parser.add_argument("--small", **small)
    check_parser.set_defaults(run=check)

    report_parser = commands.add_parser("report", help="write a page of a run's results", formatter_class=HelpFormatter)
    report_parser.add_argument("folder", metavar="DIR", help="output folder of `run`")
    report_parser.add_argument(
        "--page", default="docs/results/gpu.md", metavar="FILE", help="page to write; charts go to a folder next to it"
    )
    report_parser.set_defaults(run=report)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 if a step or a check failed, or 2 for an error that the user can fix."""
    parser = build_parser()
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else list(argv)
    return exit_status(parser.prog, lambda: args.run(args))


if __name__ == "__main__":
    sys.exit(main())
