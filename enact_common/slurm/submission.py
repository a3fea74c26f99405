"""A job's way to the cluster, and the wait for its end."""

import argparse
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import submitit
from submitit.core.utils import pickle_load

from enact_common.utils.errors import UserError

# Parameters with which --slurm_parameter asks for GPUs of a kind, or in another way.
GPU_PARAMETERS = ("gpus", "gpus_per_node", "gpus_per_task", "gres")

# Seconds between two looks at a job that is waited for.
LOOK_EVERY = 1.0

# Looks after which tasks that have not noticed another one's failure are ended.
NOTICE_WITHIN = 10


def slurm_parameters(args: argparse.Namespace, num_workers: int) -> dict:
    """What submitit's Slurm executor is told.

    Args:
        args: of the command line, checked.
        num_workers: processes that load images, in each task.
    """
    extra = dict(args.slurm_parameter)
    cpus = args.cpus_per_task or num_workers + 1
    parameters = {
        "job_name": args.job_name or f"enact_{args.variant}",
        "nodes": args.nodes,
        "ntasks_per_node": args.tasks_per_node,
        "cpus_per_task": cpus,
        "time": args.time,
        "signal_delay_s": args.signal_seconds,
        "mem": args.mem_gb and f"{args.mem_gb}G",
        "setup": args.setup or None,
        # submitit's own is unknown to clusters that keep a list of them.
        "wckey": None,
        # A task that fails ends the others, which would wait for it; one that is done lets them go on, however long.
        # Since 22.05, srun does not take the cores over from sbatch.
        "srun_args": ["--kill-on-bad-exit=1", "--wait=0", f"--cpus-per-task={cpus}"],
    }
    parameters |= {name: getattr(args, name) for name in ("partition", "account", "qos", "constraint", "exclude")}
    parameters["comment"] = args.comment
    if args.gpus_per_node and not any(name in extra for name in GPU_PARAMETERS):
        parameters["gpus_per_node"] = args.gpus_per_node
    # Where the cluster's default forbids it, a job could not be put into the queue again.
    parameters["additional_parameters"] = ({"requeue": True} if args.max_requeues else {}) | extra
    return parameters


def make_executor(args: argparse.Namespace, folder: Path, num_workers: int) -> submitit.Executor:
    """submitit's executor for this job.

    Args:
        args: of the command line, checked.
        folder: for its files and the logs.
        num_workers: processes that load images, in each task.

    Raises:
        UserError: there is no Slurm here.
    """
    if args.cluster == "debug":
        return submitit.DebugExecutor(folder)
    if args.cluster == "local":
        # SIGINT is how submitit ends a local job. In the background of a script it is ignored, and so by the job, too.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        gpus = [int(number) for number in chosen if number.isdecimal()] or list(range(args.gpus_per_node))
        executor = submitit.LocalExecutor(folder, max_num_timeout=args.max_requeues)
        executor.update_parameters(
            timeout_min=args.time, signal_delay_s=args.signal_seconds, tasks_per_node=args.tasks_per_node,
            gpus_per_node=args.gpus_per_node, visible_gpus=gpus, setup=args.setup,
        )  # fmt: skip
        return executor
    if shutil.which("srun") is None:
        raise UserError("--cluster slurm: there is no srun here; pass --cluster local to train on this machine")
    executor = submitit.SlurmExecutor(folder, max_num_timeout=args.max_requeues)
    executor.update_parameters(**slurm_parameters(args, num_workers))
    return executor


def wait(job: submitit.Job) -> int:
    """Wait for the end of a job, or for the first of its tasks that fails.

    Returns:
        0; 1 where a task failed, whose error is printed.
    """
    tasks = [job.task(number) for number in range(job.num_tasks)]
    while True:
        done = job.done()
        for task in tasks:
            error = failure(task, done)
            if error is not None:
                print(error, file=sys.stderr)
                return 1
        if done:
            return 0
        time.sleep(LOOK_EVERY)


def failure(task: submitit.Job, done: bool) -> str | Exception | None:
    """What a task failed with; None where it did not, or is not at its end.

    Args:
        task: of a job.
        done: the job is at its end, so that a task without a result has failed.
    """
    result = task.paths.result_pickle
    if result.is_file():
        # Asked by its own method, a task of a local job would wait for all others.
        outcome, value = pickle_load(result)
        return value if outcome == "error" else None
    return task.exception() if done else None


def end_others(job: submitit.LocalJob) -> None:
    """End the tasks of a local job that go on although one has failed; Slurm does so by itself."""
    for _ in range(NOTICE_WITHIN):
        if job.done():
            return
        time.sleep(LOOK_EVERY)
    job.cancel()
