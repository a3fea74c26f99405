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
from enact_common.cli.program import Parser, program
from enact_common.cli.types import HelpFormatter, natural_int, positive_int
from enact_common.utils.device import check_precision, parse_device
from enact_common.utils.errors import UserError, exit_status
from enact_common.utils.files import make_folder
from enact_common.variants import VARIANTS

CLUSTERS = ("slurm", "local", "debug")

# Parameters that --slurm_parameter must not set, with the flag that sets each.
RESERVED_PARAMETERS = {
    "nodes": "--nodes", "ntasks": "--tasks_per_node", "ntasks_per_node": "--tasks_per_node", "time": "--time",
    "signal": "--signal_seconds", "cpus_per_task": "--cpus_per_task", "mem": "--mem_gb", "partition": "--partition",
    "account": "--account", "qos": "--qos", "constraint": "--constraint", "comment": "--comment",
    "exclude": "--exclude", "job_name": "--job_name", "output": "--log_dir", "error": "--log_dir",
}  # fmt: skip


def slurm_parameter(text: str) -> tuple[str, str | bool]:
    """Parse an sbatch parameter into (name with underscores, value), True without a value; for argparse."""
    name, equals, value = text.partition("=")
    name = name.strip().lstrip("-").replace("-", "_")
    if not name or (equals and not value):
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE or KEY, got {text!r}")
    if name in RESERVED_PARAMETERS:
        raise argparse.ArgumentTypeError(f"{name} is set by {RESERVED_PARAMETERS[name]}: pass that flag")
    return name, value if equals else True


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line before the `--`."""
    parser = Parser(
        prog=program("enact_common.slurm"),
        usage="%(prog)s VARIANT [flags] -- [the variant's own flags]",
        description=f"{slurm.__doc__} The flags after the -- go to the variant's main.py and must set --output_dir, "
        "on a file system that all nodes share. Trainings get --auto_resume. The flags are checked before the job is "
        "submitted. docs/use/clusters.md has examples.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("variant", choices=tuple(VARIANTS), help="the model: " + ", ".join(VARIANTS))
    parser.add_argument(
        "--cluster", choices=CLUSTERS,
        help="slurm: submit a job; local: run processes on this machine; debug: run in this process, with a "
        "debugger on an error; default: slurm, which needs srun",
    )  # fmt: skip
    parser.add_argument(
        "--wait", action="store_true", help="wait for the job to end; exit status 0, or 1 if the job failed"
    )

    group = parser.add_argument_group("resources")
    group.add_argument("--nodes", type=positive_int, default=1, metavar="N", help="number of machines")
    group.add_argument(
        "--gpus_per_node", type=natural_int, default=1, metavar="N",
        help="GPUs per machine, one process for each; 0 trains on CPUs and needs --device cpu after the --",
    )  # fmt: skip
    group.add_argument(
        "--tasks_per_node", type=positive_int, metavar="N",
        help="processes per machine, only with --gpus_per_node 0; default: 1",
    )  # fmt: skip
    group.add_argument(
        "--time", type=positive_int, default=1440, metavar="MINUTES",
        help="time limit; a longer training is requeued and resumes",
    )  # fmt: skip
    group.add_argument(
        "--signal_seconds", type=positive_int, default=120, metavar="SECONDS",
        help="time before the limit at which the training is told to stop; allow for a step and a checkpoint",
    )  # fmt: skip
    group.add_argument(
        "--max_requeues", type=natural_int, default=3, metavar="N",
        help="maximum number of requeues after a time-out",
    )  # fmt: skip

    group = parser.add_argument_group("job")
    group.add_argument("--job_name", metavar="NAME", help="name in the queue; default: enact_VARIANT")
    group.add_argument(
        "--log_dir", metavar="DIR",
        help="folder for the job's script and the logs of its processes, on a file system that all nodes share; "
        "default: OUTPUT_DIR/slurm",
    )  # fmt: skip
    group.add_argument(
        "--setup", action="append", default=[], metavar="COMMAND",
        help="shell command to run on the first machine before the processes start, such as module load cuda; "
        "repeatable; default: none",
    )  # fmt: skip

    group = parser.add_argument_group("Slurm only (no effect with --cluster local or debug)")
    group.add_argument(
        "--cpus_per_task", type=positive_int, metavar="N",
        help="CPU cores per process; default: the variant's --num_workers plus one",
    )  # fmt: skip
    group.add_argument(
        "--mem_gb", type=positive_int, metavar="GB", help="main memory per machine, GB; default: the cluster's"
    )
    for flag, meaning in (
        ("partition", "partition (queue) of the job"),
        ("account", "account to charge"),
        ("qos", "quality of service"),
        ("constraint", "required features of the machines"),
    ):
        group.add_argument(f"--{flag}", metavar="NAME", help=f"{meaning}; default: the cluster's")
    group.add_argument("--exclude", metavar="NODES", help="machines to exclude; default: none")
    group.add_argument("--comment", metavar="TEXT", help="comment stored with the job; default: none")
    group.add_argument(
        "--slurm_parameter", action="append", type=slurm_parameter, default=[], metavar="KEY=VALUE",
        help="any other sbatch parameter, such as exclusive, or gres=gpu:a100:4 to request GPUs of a type with "
        "--gpus_per_node 4; repeatable; default: none",
    )  # fmt: skip
    return parser


def job_module(name: str) -> ModuleType:
    """Import a module of this package that needs submitit."""
    try:
        return importlib.import_module(f"{slurm.__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name not in ("submitit", "cloudpickle"):
            raise
        raise UserError("jobs need submitit: pip install 'enact-detection[slurm]'") from error


def check_flags(args: argparse.Namespace) -> None:
    """Check the flags, and set `cluster` and `tasks_per_node` if they are not given."""
    if args.cluster is None:
        if shutil.which("srun") is None:
            raise UserError("no srun here, so Slurm is missing: pass --cluster local to train on this machine")
        args.cluster = "slurm"
    if args.gpus_per_node and args.tasks_per_node:
        raise UserError(
            "--tasks_per_node goes with --gpus_per_node 0: with GPUs, each GPU gets one process, so leave it out"
        )
    args.tasks_per_node = args.gpus_per_node or args.tasks_per_node or 1
    if args.cluster != "slurm" and args.nodes > 1:
        raise UserError(f"--nodes {args.nodes}: --cluster {args.cluster} runs on this machine only; leave --nodes out")
    if args.cluster == "debug" and args.tasks_per_node > 1:
        raise UserError("--cluster debug runs one process: pass --gpus_per_node 1, or 0 without --tasks_per_node")
    # submitit takes a signal that comes 10 minutes or a fifth of the limit early for a preemption, which --max_requeues
    # does not count. Slurm may send it a minute early.
    seconds = 60 * args.time
    longest = min(seconds - 1, max(600, seconds // 5) - 60)
    if args.signal_seconds > longest:
        raise UserError(f"--signal_seconds {args.signal_seconds}: at most {longest} with --time {args.time}; reduce it")


def check_variant(args: argparse.Namespace, argv: Sequence[str]) -> tuple[list[str], argparse.Namespace]:
    """Return the variant's command line to run, and its parsed arguments, without looking at the data or the machines.

    Raises:
        UserError: a flag does not work with the others or in a job.
        SystemExit: the parser rejects a flag.
    """
    parser = job_module("task").variant_parser(args.variant)
    flags = parser.parse_args(argv)
    parser.check(flags)
    if not flags.output_dir:
        raise UserError(
            "--output_dir is missing: pass it after the --, with a folder on a file system that all nodes share"
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
        raise UserError("--gpus_per_node 0 asks for no GPU: pass --device cpu after the --")
    if args.cluster != "slurm" and torch.cuda.device_count() < args.gpus_per_node:
        raise UserError(
            f"--gpus_per_node {args.gpus_per_node}: PyTorch sees {torch.cuda.device_count()} GPUs here; pass fewer"
        )
    latest = Path(flags.output_dir) / LATEST
    if flags.eval:
        return list(argv), flags
    if flags.resume and Path(flags.resume).resolve() != latest.resolve():
        # --resume overrides --auto_resume, so the job would restart from that checkpoint after each requeue.
        raise UserError(
            f"--resume {flags.resume}: a job resumes from {latest}, also after a requeue. Copy the checkpoint there "
            "and leave --resume out, or start a new training with --pretrained"
        )
    return [*argv, *([] if flags.auto_resume else ["--auto_resume"])], flags


def submit(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Check all arguments, then submit the job; return the exit status. `argv` is the variant's command line.

    Raises:
        UserError: an argument is invalid, or the cluster rejects the job; no job was submitted.
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
    """Submit the job; return 0, with --wait 1 if the job failed, or 2 for an error that the user can fix."""
    words = sys.argv[1:] if argv is None else argv
    separator = words.index("--") if "--" in words else len(words)
    parser = build_parser()
    args = parser.parse_args(words[:separator])
    return exit_status(parser.prog, lambda: submit(args, words[separator + 1 :]))


if __name__ == "__main__":
    sys.exit(main())
