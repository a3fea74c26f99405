"""A task of a job: runs a variant's command line as one process of a group.

`submitit` (https://github.com/facebookincubator/submitit, MIT licence) starts the tasks and requeues a job. Before it
calls a task, it installs a handler for the signal that Slurm sends before the time limit. A training replaces it with
its own handlers (`enact_common.utils.signals`); after a signal stopped the training, submitit's handler is called.
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

# Signal that submitit asks Slurm to send before the time limit; SIGUSR2 unless the environment sets another.
TIMEOUT_SIGNAL = getattr(signal, f"SIG{submitit.JobEnvironment.USR_SIG}")

# Seconds that the main process may take to write a checkpoint and requeue the job.
MAIN_PROCESS_NEEDS = 600

# Seconds to wait for an answer of Slurm's controller.
SCONTROL_TIMEOUT = 60

# Maximum seconds between a signal's arrival at the first and at the last process of a job.
SIGNAL_SKEW = 10


def variant_parser(variant: str) -> VariantParser:
    """Return a variant's parser, named after its script."""
    parser = load_variant(variant).main.get_args_parser()
    parser.prog = f"{VARIANTS[variant][0]}/main.py"
    return parser


class Task:
    """A callable that runs a variant's command line, `argv`, called in each task of a job."""

    def __init__(self, variant: str, argv: Sequence[str]):
        self.variant = variant
        self.argv = list(argv)

    def __call__(self) -> int:
        """Run the command line.

        Raises:
            RuntimeError: the command line failed.
            SystemExit: a signal stopped it. Unlike an exception, this writes no result, since the job is unfinished.
        """
        join_group()
        requeue = signal.getsignal(TIMEOUT_SIGNAL)
        package, parser = load_variant(self.variant), variant_parser(self.variant)
        build_model, build_dataset = package.models.build_model, package.datasets.build_dataset
        status = run.main(self.variant, parser, build_model, build_dataset, self.argv)
        if status == STOPPED:
            end_stopped(requeue)
        if status:
            raise RuntimeError(f"{parser.prog} ended with status {status}: see its log")
        return status

    def checkpoint(self) -> DelayedSubmission:
        """Return the task for the requeued job: the same one, since `--auto_resume` finds the checkpoint."""
        return DelayedSubmission(self)


def join_group() -> None:
    """Set the environment variables of the process group, as torchrun does."""
    environment = submitit.JobEnvironment()
    # Each process selects its GPU itself. Overwrite variables that were inherited from a shell in another job.
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    if environment.num_nodes == 1:
        # Some machines cannot resolve their own host name.
        os.environ["MASTER_ADDR"] = "localhost"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if visible and "," not in visible:
        # The task sees only one GPU, so its index is 0.
        os.environ["LOCAL_RANK"] = "0"


def end_stopped(requeue: Callable | int | None) -> None:
    """End a task whose training was stopped by a signal.

    The main process requeues the job after a time-out or a preemption, but not after a cancellation. The other tasks
    wait for the main process to end, because Slurm ends all tasks when the first one ends. `requeue` is submitit's
    signal handler, which ends the main process, or raises an error after too many time-outs; with --cluster debug there
    is none.
    """
    environment = submitit.JobEnvironment()
    if environment.global_rank == 0:
        if stop_requested() is None:
            # Another process got the signal first; when it arrives here, submitit's handler takes over.
            time.sleep(SIGNAL_SKEW)
        elif callable(requeue) and (stop_requested() == TIMEOUT_SIGNAL or is_preempted(environment)):
            requeue(TIMEOUT_SIGNAL, None)
    elif environment.cluster == "slurm":
        # Slurm sends SIGTERM when the main process has ended; replace submitit's handler, which ignores it.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(STOPPED))
        time.sleep(MAIN_PROCESS_NEEDS)
    sys.exit(STOPPED)


def is_preempted(environment: submitit.JobEnvironment) -> bool:
    """Whether Slurm preempted this job, as opposed to a cancellation.

    Slurm sends SIGTERM in both cases. It requeues a preempted job itself, except one that ends in its grace time.
    """
    if environment.cluster != "slurm":
        return False
    command = ["scontrol", "show", "job", environment.job_id]
    try:
        job_text = subprocess.run(command, capture_output=True, text=True, timeout=SCONTROL_TIMEOUT).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    return re.search(r"\bPreemptTime=\d", job_text) is not None
