"""The cluster's command line: `python -m enact_common.slurm VARIANT [flags] -- [the variant's own flags]`."""

import argparse
import importlib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from enact_common import slurm
from enact_common.checkpoints.files import LATEST
from enact_common.cli.program import program
from enact_common.cli.types import HelpFormatter, natural_int, positive_int
from enact_common.utils.device import check_precision, parse_device
from enact_common.utils.errors import UserError, exit_status
from enact_common.utils.files import make_folder
from enact_common.variants import VARIANTS

CLUSTERS = ("slurm", "local", "debug")

# What --slurm_parameter must leave alone: the flag that says it, where there is one.
TAKEN = {
    "nodes": "--nodes", "ntasks": "--tasks_per_node", "ntasks_per_node": "--tasks_per_node", "time": "--time",
    "signal": "--signal_seconds", "cpus_per_task": "--cpus_per_task", "mem": "--mem_gb", "partition": "--partition",
    "account": "--account", "qos": "--qos", "constraint": "--constraint", "comment": "--comment",
    "exclude": "--exclude", "job_name": "--job_name", "output": "--log_dir", "error": "--log_dir",
}  # fmt: skip


def slurm_parameter(text: str) -> tuple[str, str | bool]:
    """One of sbatch's parameters as its name, with underscores, and its value, True where it has none; for argparse."""
    name, equals, value = text.partition("=")
    name = name.strip().lstrip("-").replace("-", "_")
    if not name or (equals and not value):
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, or KEY alone, got {text!r}")
    if name in TAKEN:
        raise argparse.ArgumentTypeError(f"{name} is what {TAKEN[name]} says: pass that")
    return name, value if equals else True


def build_parser() -> argparse.ArgumentParser:
    """The command line, up to the `--`."""
    parser = argparse.ArgumentParser(
        prog=program("enact_common.slurm"),
        usage="%(prog)s VARIANT [flags] -- [the variant's own flags]",
        description=f"{slurm.__doc__} What follows the -- is the command line of the variant's main.py, with "
        "--output_dir on a file system that all nodes share; a training is given --auto_resume. It is checked here, "
        "before anything is submitted. docs/use/clusters.md has examples.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("variant", choices=tuple(VARIANTS), help="the model: " + ", ".join(VARIANTS))
    parser.add_argument(
        "--cluster", choices=CLUSTERS,
        help="slurm; local: processes on this machine; debug: in this process, with a debugger where it fails; "
        "default: slurm, where there is srun",
    )  # fmt: skip
    parser.add_argument(
        "--wait", action="store_true", help="wait for the job's end; exit status 0, or 1 where the job failed"
    )

    group = parser.add_argument_group("resources")
    group.add_argument("--nodes", type=positive_int, default=1, metavar="N", help="machines")
    group.add_argument(
        "--gpus_per_node", type=natural_int, default=1, metavar="N",
        help="GPUs of each machine, one process for each; 0 trains on CPUs, with --device cpu behind the --",
    )  # fmt: skip
    group.add_argument(
        "--tasks_per_node", type=positive_int, metavar="N",
        help="processes on each machine, with --gpus_per_node 0; default: 1",
    )  # fmt: skip
    group.add_argument(
        "--time", type=positive_int, default=1440, metavar="MINUTES",
        help="limit; a training that needs more goes on in a new turn",
    )  # fmt: skip
    group.add_argument(
        "--signal_seconds", type=positive_int, default=120, metavar="SECONDS",
        help="before the limit, the training is told to stop: enough for a step and a checkpoint",
    )  # fmt: skip
    group.add_argument(
        "--max_requeues", type=natural_int, default=3, metavar="N",
        help="times that a job whose time was up is put into the queue again",
    )  # fmt: skip

    group = parser.add_argument_group("job")
    group.add_argument("--job_name", metavar="NAME", help="in the queue; default: enact_VARIANT")
    group.add_argument(
        "--log_dir", metavar="DIR",
        help="for the job's script and the logs of its processes, on a file system that all nodes share; default: "
        "OUTPUT_DIR/slurm",
    )  # fmt: skip
    group.add_argument(
        "--setup", action="append", default=[], metavar="COMMAND",
        help="shell command to run before the processes start, on the first machine: module load cuda, say; may be "
        "given several times; default: none",
    )  # fmt: skip

    group = parser.add_argument_group("Slurm alone (no effect with --cluster local and debug)")
    group.add_argument(
        "--cpus_per_task", type=positive_int, metavar="N",
        help="processor cores of each process; default: the variant's --num_workers, and one",
    )  # fmt: skip
    group.add_argument(
        "--mem_gb", type=positive_int, metavar="GB", help="main memory of each machine; default: the cluster's own"
    )
    for flag, meaning in (
        ("partition", "queue to wait in"),
        ("account", "whom the time is charged to"),
        ("qos", "quality of service"),
        ("constraint", "features that the machines must have"),
    ):
        group.add_argument(f"--{flag}", metavar="NAME", help=f"{meaning}; default: the cluster's own")
    group.add_argument("--exclude", metavar="NODES", help="machines to leave out; default: none")
    group.add_argument("--comment", metavar="TEXT", help="kept with the job; default: none")
    group.add_argument(
        "--slurm_parameter", action="append", type=slurm_parameter, default=[], metavar="KEY=VALUE",
        help="any other parameter of sbatch: gres=gpu:a100:4 in place of --gpus_per_node's number alone, exclusive, "
        "...; may be given several times; default: none",
    )  # fmt: skip
    return parser


def job_module(name: str) -> ModuleType:
    """A module of this package that needs submitit.

    Raises:
        UserError: submitit is not installed.
    """
    try:
        return importlib.import_module(f"{slurm.__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name not in ("submitit", "cloudpickle"):
            raise
        raise UserError("jobs need submitit: pip install 'enact-detection[slurm]'") from error


def check_flags(args: argparse.Namespace) -> None:
    """Fill in what follows from the other flags, and refuse what cannot work.

    Raises:
        UserError: naming the flag and the way out.
    """
    if args.cluster is None:
        if shutil.which("srun") is None:
            raise UserError("there is no srun here, so no Slurm: pass --cluster local to train on this machine")
        args.cluster = "slurm"
    if args.gpus_per_node and args.tasks_per_node:
        raise UserError("--tasks_per_node goes with --gpus_per_node 0: with GPUs, there is one process for each")
    args.tasks_per_node = args.gpus_per_node or args.tasks_per_node or 1
    if args.cluster != "slurm" and args.nodes > 1:
        raise UserError(f"--nodes {args.nodes}: --cluster {args.cluster} has this machine alone")
    if args.cluster == "debug" and args.tasks_per_node > 1:
        raise UserError("--cluster debug is one process: pass --gpus_per_node 1, or 0 without --tasks_per_node")
    # A signal ten minutes or a fifth of the time before the limit is a preemption for submitit, which --max_requeues
    # does not count. Slurm may send it a minute early.
    seconds = 60 * args.time
    most = min(seconds - 1, max(600, seconds // 5) - 60)
    if args.signal_seconds > most:
        raise UserError(f"--signal_seconds {args.signal_seconds}: at most {most} with --time {args.time}")


def check_variant(args: argparse.Namespace, argv: Sequence[str]) -> tuple[list[str], argparse.Namespace]:
    """Parse and check the variant's command line, as far as that goes without the data and the job's machines.

    Returns:
        the command line to run, and its arguments.

    Raises:
        UserError: naming the flag and the way out.
        SystemExit: the parser refuses a flag.
    """
    parser = job_module("task").variant_parser(args.variant)
    flags = parser.parse_args(argv)
    parser.check(flags)
    if not flags.output_dir:
        raise UserError(
            "--output_dir is missing: pass it behind the --, with a folder on a file system that all nodes share"
        )
    kind, _ = parse_device(flags.device)
    if kind not in ("cpu", "cuda"):
        raise UserError(f"--device {flags.device}: a job runs on the nodes' GPUs or CPUs; pass --device cuda or cpu")
    check_precision(flags.amp, torch.device(kind))
    if kind == "cpu" and args.gpus_per_node:
        raise UserError(
            f"--device {flags.device} would leave the GPUs idle: pass --gpus_per_node 0 before the --, or leave it out"
        )
    if kind != "cpu" and not args.gpus_per_node:
        raise UserError("--gpus_per_node 0 asks for no GPU: pass --device cpu behind the --")
    if args.cluster != "slurm" and torch.cuda.device_count() < args.gpus_per_node:
        raise UserError(f"--gpus_per_node {args.gpus_per_node}: PyTorch sees {torch.cuda.device_count()} GPUs here")
    latest = Path(flags.output_dir) / LATEST
    if flags.eval:
        return list(argv), flags
    if flags.resume and Path(flags.resume).resolve() != latest.resolve():
        # It goes before --auto_resume: each turn of the job would begin with it again.
        raise UserError(
            f"--resume {flags.resume}: a job goes on from {latest}, in each of its turns. Copy the checkpoint there "
            "and leave --resume out, or begin anew with --pretrained"
        )
    return [*argv, *([] if flags.auto_resume else ["--auto_resume"])], flags


def submit(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Check everything, then submit the job.

    Args:
        args: of the command line.
        argv: the variant's command line.

    Returns:
        the exit status.

    Raises:
        UserError: something in the arguments is wrong, or the cluster refuses the job; nothing has been submitted.
    """
    submission = job_module("submission")
    check_flags(args)
    argv, flags = check_variant(args, argv)
    folder = Path(args.log_dir or Path(flags.output_dir) / "slurm").absolute()
    make_folder(folder, "--log_dir")
    executor = submission.make_executor(args, folder, flags.num_workers)
    try:
        job = executor.submit(job_module("task").Task(args.variant, argv))
    except (RuntimeError, OSError) as error:
        raise UserError(f"the job could not be submitted: {' '.join(str(error).split())}") from error
    if args.cluster == "debug":
        return job.result()
    processes = "1 process" if job.num_tasks == 1 else f"{job.num_tasks} processes"
    print(f"job {job.job_id} of {processes}; log of the first: {job.paths.stdout}", flush=True)
    if not args.wait:
        return 0
    status = submission.wait(job)
    if status and args.cluster == "local":
        submission.end_others(job)
    return status


def main(argv: list[str] | None = None) -> int:
    """Submit what the command line names.

    Returns:
        the exit status: 0; with --wait 1 where the job failed; 2 for what the user can mend.
    """
    words = sys.argv[1:] if argv is None else argv
    split = words.index("--") if "--" in words else len(words)
    parser = build_parser()
    args = parser.parse_args(words[:split])
    return exit_status(parser.prog, lambda: submit(args, words[split + 1 :]))


if __name__ == "__main__":
    sys.exit(main())
