"""Submission of a job to a cluster, and waiting for its end."""

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

# Slurm parameters that request GPUs; one of them in --slurm_parameter replaces --gpus_per_node.
GPU_PARAMETERS = ("gpus", "gpus_per_node", "gpus_per_task", "gres")

# Seconds between two polls of a job's state.
LOOK_EVERY = 1.0

# Polls that the other tasks get to end by themselves after one has failed.
GRACE_POLLS = 10


def slurm_parameters(args: argparse.Namespace, num_workers: int) -> dict:
    """Return the parameters of submitit's Slurm executor; each task has `num_workers` loader processes."""
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
        # Clusters with a list of permitted wckeys reject submitit's default.
        "wckey": None,
        # A failed task ends the others, which would wait for it forever; a finished task does not (--wait=0). Since
        # Slurm 22.05, srun does not inherit --cpus-per-task from sbatch.
        "srun_args": ["--kill-on-bad-exit=1", "--wait=0", f"--cpus-per-task={cpus}"],
    }
    names = ("partition", "account", "qos", "constraint", "exclude", "comment")
    parameters |= {name: getattr(args, name) for name in names}
    if args.gpus_per_node and not any(name in extra for name in GPU_PARAMETERS):
        parameters["gpus_per_node"] = args.gpus_per_node
    # A cluster's default may forbid requeueing, so allow it explicitly.
    parameters["additional_parameters"] = ({"requeue": True} if args.max_requeues else {}) | extra
    return parameters


def make_executor(args: argparse.Namespace, folder: Path, num_workers: int) -> submitit.Executor:
    """Return submitit's executor for this job, with its files and the logs in `folder`.

    Raises:
        UserError: Slurm is missing on this machine.
    """
    if args.cluster == "debug":
        return submitit.DebugExecutor(folder)
    if args.cluster == "local":
        # submitit ends a local job with SIGINT. A script's background processes ignore SIGINT, and the job would too.
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
        raise UserError("--cluster slurm: no srun here; pass --cluster local to train on this machine")
    executor = submitit.SlurmExecutor(folder, max_num_timeout=args.max_requeues)
    executor.update_parameters(**slurm_parameters(args, num_workers))
    return executor


def wait(job: submitit.Job) -> int:
    """Wait until the job ends or its first task fails; return 0, or 1 after printing the error of a failed task."""
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
    """Return the error of a failed task; None if the task succeeded or is running.

    If the job is `done`, a task without a result has failed.
    """
    result = task.paths.result_pickle
    if result.is_file():
        # Read the file, since `task.exception()` of a local job waits for all other tasks.
        outcome, value = pickle_load(result)
        return value if outcome == "error" else None
    return task.exception() if done else None


def end_others(job: submitit.LocalJob) -> None:
    """End the tasks of a local job that still run after one has failed; Slurm does this itself."""
    for _ in range(GRACE_POLLS):
        if job.done():
            return
        time.sleep(LOOK_EVERY)
    job.cancel()
