"""The study's trainings and their order: several in parallel, each after those that it starts from."""

import os
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

import torch

from enact_common.study.presets import ARMS, Preset, Trial
from enact_common.study.training import START, Results, Task, start_of, train
from enact_common.utils.signals import cancelling, end_with_parent


def tasks_of(preset: Preset) -> list[Task]:
    """Return all trainings, seed by seed, so that an unfinished study has all arms of some seeds."""
    made = []
    for seed in range(max(trial.seeds for trial in preset.trials)):
        for trial in preset.trials:
            if seed < trial.seeds:
                made += [task_of(trial, name, seed, preset.device) for name in trial.arms]
    return made


def task_of(trial: Trial, arm: str, seed: int, device: str) -> Task:
    """Return one training of a trial."""
    first = trial.backbone_of
    before = None if first is None else start_of(task_of(first, arm, 0, device))
    return Task(
        trial.source, trial.variant, trial.flags, ARMS[arm], seed, trial.images, trial.start_images, device,
        trial.start_source, trial.encoder_alone, before,
    )  # fmt: skip


def run_task(task: Task, folder: Path, threads: int, seconds: float) -> tuple[float | None, float]:
    """Train in a pool process for at most some seconds; return its AP, None if it is unfinished, and its seconds."""
    torch.set_num_threads(threads)
    begin = time.perf_counter()
    result = train(task, Results(folder), begin + seconds)
    return result and result["figures"]["AP"], time.perf_counter() - begin


def run_trainings(preset: Preset, folder: Path, until: float) -> int:
    """Run the unfinished trainings, in parallel as the preset says, until a time of `time.perf_counter`.

    At that time, running ones save their state, and continue in the next call. Returns the number of trainings left.
    """
    results = Results(folder)
    tasks = tasks_of(preset)
    starts = {start.name: start for start in map(start_of, tasks) if start.images}
    waiting = [*starts.values(), *tasks]
    waiting = [task for task in waiting if results.read(task) is None or missing_weights(task, tasks, results)]
    running: dict[Future, Task] = {}
    environment = {"OMP_NUM_THREADS": str(preset.threads)}
    os.environ.update(environment)
    with ProcessPoolExecutor(preset.jobs, get_context("spawn"), end_with_parent) as pool, cancelling(pool):
        while waiting or running:
            undone = {task.name for task in (*running.values(), *waiting)}
            ready = [task for task in waiting if not undone & set(needed(task))]
            # A training that all others wait for gets all threads.
            threads = preset.threads * (preset.jobs if not running and len(ready) == 1 else 1)
            for task in ready[: preset.jobs - len(running)]:
                seconds = until - time.perf_counter()
                if seconds > 0:
                    waiting.remove(task)
                    running[pool.submit(run_task, task, folder, threads, seconds)] = task
            if not running:
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                task, (precision, seconds) = running.pop(future), future.result()
                if precision is None:
                    waiting.append(task)
                else:
                    print(f"{task.name}: AP {precision:.3f}, {seconds:.0f} s; {len(waiting)} waiting", flush=True)
    if waiting:
        print(f"out of time: {len(waiting)} trainings are left; run the same command to continue")
    return len(waiting)


def missing_weights(task: Task, tasks: list[Task], results: Results) -> bool:
    """Return whether a finished training must be repeated, since an unfinished one needs its missing weights."""
    wanted = any(task.name in needed(other) and results.read(other) is None for other in tasks)
    return wanted and task.arm.name == START.name and not results.weights(task).is_file()


def needed(task: Task) -> list[str]:
    """Return the names of the trainings that a training depends on."""
    if task.arm.name == START.name:
        return [task.backbone_of.name] if task.backbone_of else []
    names = [start_of(task).name] if task.start_images else []
    return names + [task.other(ARMS[name]).name for name in (task.arm.lengths_of, task.arm.begins_with) if name]
