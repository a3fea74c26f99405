"""What each task of a job runs: a variant's command line, as one process of a group.

`submitit` (https://github.com/facebookincubator/submitit, MIT licence) starts the tasks and puts a job back into the
queue. Before it calls a task it installs a handler of the signal that Slurm sends before the time is up. A training
has its own handlers meanwhile (`enact_common.utils.signals`); when one has stopped it, submitit's is called.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import submitit
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

from enact_common.cli.arguments import VariantParser
from enact_common.training import run
from enact_common.utils.signals import STOPPED, stop_requested
from enact_common.variants import VARIANTS, load_variant

# What submitit asks Slurm to send, SIGUSR2 where the environment says nothing else.
TIME_IS_UP = getattr(signal, f"SIG{submitit.JobEnvironment.USR_SIG}")

# Seconds that the main process may take to write a checkpoint and put the job back into the queue.
MAIN_PROCESS_NEEDS = 600

# Seconds after which Slurm's controller is not waited for any more.
SCONTROL_TAKES = 60

# Seconds between a signal's arrival at the first and at the last process of a job.
SIGNALS_DIFFER_BY = 10


def variant_parser(variant: str) -> VariantParser:
    """A variant's command line, under the name of its script."""
    parser = load_variant(variant).main.get_args_parser()
    parser.prog = f"{VARIANTS[variant][0]}/main.py"
    return parser


class Task:
    """A variant's command line, to be called in each task of a job.

    Args:
        variant: a key of `VARIANTS`.
        argv: the command line's words.
    """

    def __init__(self, variant: str, argv: Sequence[str]):
        self.variant = variant
        self.argv = list(argv)

    def __call__(self) -> int:
        """Run it.

        Returns:
            0.

        Raises:
            RuntimeError: it ended with a status that says that it failed.
            SystemExit: a signal stopped it. Unlike an exception, this leaves no result, for the job is not done.
        """
        join_group()
        requeue = signal.getsignal(TIME_IS_UP)
        package, parser = load_variant(self.variant), variant_parser(self.variant)
        build_model, build_dataset = package.models.build_model, package.datasets.build_dataset
        status = run.main(self.variant, parser, build_model, build_dataset, self.argv)
        if status == STOPPED:
            end_stopped(requeue)
        if status:
            raise RuntimeError(f"{parser.prog} ended with status {status}: its log says why")
        return status

    def checkpoint(self) -> DelayedSubmission:
        """What the job runs when its turn comes again: the same, since `--auto_resume` finds the checkpoint."""
        return DelayedSubmission(self)


def join_group() -> None:
    """Describe the group of processes in the environment, as torchrun does."""
    environment = submitit.JobEnvironment()
    # Each process chooses its GPU among all of the machine's. What a shell within another job left behind is replaced.
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    if environment.num_nodes == 1:
        # Not all machines know their own name.
        os.environ["MASTER_ADDR"] = "localhost"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if visible and "," not in visible:
        # The cluster shows each task its own GPU alone, or there is one only.
        os.environ["LOCAL_RANK"] = "0"


def end_stopped(requeue: Callable | int | None) -> None:
    """End a task whose training was stopped by a signal.

    The main process puts the job back into the queue where its time was up, or where it is preempted, but not where it
    was cancelled. The others leave the end to the main process: the first task that ends makes Slurm end all.

    Args:
        requeue: submitit's handler, which ends the main process; with --cluster debug there is none.

    Raises:
        SystemExit: always, but for the next.
        submitit.core.utils.UncompletedJobError: the job's time was up too often.
    """
    environment = submitit.JobEnvironment()
    if environment.global_rank == 0:
        if stop_requested() is None:
            # Another process's signal came first; with this one's, submitit's handler takes over.
            time.sleep(SIGNALS_DIFFER_BY)
        elif callable(requeue) and (stop_requested() == TIME_IS_UP or is_preempted(environment)):
            requeue(TIME_IS_UP, None)
    elif environment.cluster == "slurm":
        # Slurm's SIGTERM, which submitit ignores, comes when the main process has ended.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(STOPPED))
        time.sleep(MAIN_PROCESS_NEEDS)
    sys.exit(STOPPED)


def is_preempted(environment: submitit.JobEnvironment) -> bool:
    """Whether Slurm wants this job's machines for another job, rather than that somebody cancelled it.

    SIGTERM announces both. Slurm puts a preempted job back by itself, but not one that ends within its grace time.
    """
    if environment.cluster != "slurm":
        return False
    command = ["scontrol", "show", "job", environment.job_id]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=SCONTROL_TAKES).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    return re.search(r"\bPreemptTime=\d", shown) is not None
