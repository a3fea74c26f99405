"""Slurm jobs: the submitted script, the processes of a job, and jobs that a signal stops."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL_MODEL, read_log, train
from processes import Forked

from enact_common.slurm import __main__ as command
from enact_common.training import run
from enact_common.utils.signals import SIGNALS, STOPPED, listening

submitit = pytest.importorskip("submitit")

from submitit.core.submission import process_job  # noqa: E402
from submitit.core.utils import UncompletedJobError  # noqa: E402

from enact_common.slurm import submission, task  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]

CPU = ["--gpus_per_node", "0"]

# Replacements of Slurm's commands that record how they were called.
SCRIPTS = {
    "sbatch": 'cp "$1" "$CLUSTER/submitted.sh"\necho "Submitted batch job 42"',
    "srun": "exit 1",
    "scontrol": 'echo "$@" >> "$CLUSTER/asked"\necho "JobId=42 PreemptEligibleTime=None PreemptTime=$PREEMPTED"',
    "sacct": "exit 1",
}


@pytest.fixture(autouse=True)
def environment_and_handlers(monkeypatch):
    """Remove Slurm variables before a test; restore environment and handlers after it, since jobs change them."""
    before = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGCONT, signal.SIGINT)}
    for name in list(os.environ):
        if name.startswith(("SLURM_", "SUBMITIT_", "CUDA_VISIBLE", "RANK", "WORLD_SIZE", "MASTER_")):
            del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Path:
    """A folder, first in PATH, with the replaced Slurm commands and their records."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    for name, text in SCRIPTS.items():
        script = folder / name
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CLUSTER", str(folder))
    monkeypatch.setenv("PREEMPTED", "None")
    return folder


def training(folder: Path, output: Path, variant: str = "detr", *argv) -> list[str]:
    """The words of a small training that follow `--`."""
    return [*map(str, ["--coco_path", folder, "--output_dir", output, *SMALL_MODEL[variant], "--epochs", 1, *argv])]


def submit(folder: Path, output: Path, *flags) -> None:
    """Submit a small training on the shapes."""
    assert command.main(["detr", *map(str, flags), "--", *training(folder, output)]) == 0


def requested(cluster: Path) -> tuple[dict[str, str], list[str]]:
    """The parameters in the submitted script, and the words of its last command."""
    text = (cluster / "submitted.sh").read_text()
    parameters = {}
    for line in text.splitlines():
        if line.startswith("#SBATCH "):
            name, _, value = "".join(shlex.split(line[len("#SBATCH ") :])).partition("=")
            parameters[name.removeprefix("--")] = value
    return parameters, shlex.split(text.strip().splitlines()[-1])


def test_a_failed_job_is_reported(tmp_path, capsys):
    argv = training(tmp_path / "nowhere", tmp_path / "run")
    assert command.main(["detr", "--cluster", "local", *CPU, "--wait", "--", *argv]) == 1
    assert "DETR-ENACT/main.py ended with status 2" in capsys.readouterr().err
    (log,) = (tmp_path / "run" / "slurm").glob("*_0_log.err")
    assert "nowhere: no such folder" in log.read_text()


def test_waiting_ends_with_the_first_process_that_fails(tmp_path, capsys, monkeypatch):
    def first_waits_for_second():
        if submitit.JobEnvironment().global_rank:
            raise ValueError("the second one's own")
        time.sleep(600)

    monkeypatch.setattr(submission, "LOOK_EVERY", 0.1)
    args = command.build_parser().parse_args(["detr", "--cluster", "local", *CPU, "--tasks_per_node", "2"])
    job = submission.make_executor(args, tmp_path, num_workers=0).submit(first_waits_for_second)
    assert submission.wait(job) == 1
    assert "ValueError: the second one's own" in capsys.readouterr().err
    assert not job.done()
    submission.end_others(job)
    job._process.wait(timeout=60)


def test_one_process_trains_in_process_for_a_debugger(shapes, tmp_path):
    argv = training(shapes, tmp_path / "run", "anchor")
    assert command.main(["anchor", "--cluster", "debug", *CPU, "--", *argv]) == 0
    assert [row["epoch"] for row in read_log(tmp_path / "run")] == [0]


def test_the_script_requests_what_the_flags_say(shapes, tmp_path, cluster):
    flags = (
        "--nodes 2 --gpus_per_node 4 --cpus_per_task 6 --mem_gb 200 --time 600 --partition gpu --account lab "
        "--qos long --constraint a100 --exclude node[3-4] --job_name trial --signal_seconds 300 "
        "--slurm_parameter exclusive --slurm_parameter mail-user=me@lab"
    ).split()
    argv = [word for word in training(shapes, tmp_path / "run") if word not in ("--device", "cpu")]
    setup = ["--setup", "module load cuda", "--setup", "ulimit -n 4096", "--comment", "a long name"]
    assert command.main(["detr", *flags, *setup, "--", *argv]) == 0
    parameters, words = requested(cluster)
    logs = tmp_path / "run" / "slurm"
    assert parameters == {
        "nodes": "2", "ntasks-per-node": "4", "gpus-per-node": "4", "cpus-per-task": "6", "mem": "200G", "time": "600",
        "partition": "gpu", "account": "lab", "qos": "long", "constraint": "a100", "exclude": "node[3-4]",
        "comment": "a long name", "job-name": "trial", "signal": "USR2@300", "requeue": "", "exclusive": "",
        "mail-user": "me@lab", "open-mode": "append",
        "output": f"{logs}/%j_0_log.out", "error": f"{logs}/%j_0_log.err",
    }  # fmt: skip
    assert "\nmodule load cuda\nulimit -n 4096\n" in (cluster / "submitted.sh").read_text()
    assert words[0] == "srun" and {"--kill-on-bad-exit=1", "--wait=0", "--cpus-per-task=6"} <= set(words)
    assert words[-1] == str(logs)


def test_parameters_without_a_flag_are_left_to_the_cluster(shapes, tmp_path, cluster):
    submit(shapes, tmp_path / "run", *CPU, "--tasks_per_node", 3, "--max_requeues", 0, "--log_dir", tmp_path / "logs")
    parameters, _ = requested(cluster)
    assert set(parameters) == {
        "nodes", "ntasks-per-node", "cpus-per-task", "time", "signal", "job-name", "open-mode", "output", "error",
    }  # fmt: skip
    assert (parameters["ntasks-per-node"], parameters["cpus-per-task"]) == ("3", "1")
    assert (parameters["time"], parameters["job-name"]) == ("1440", "enact_detr")
    assert parameters["output"] == f"{tmp_path}/logs/%j_0_log.out"


@pytest.mark.parametrize("parameter", ["gres=gpu:a100:4", "gpus-per-node=a100:4"])
def test_gpus_can_be_requested_by_another_slurm_parameter(shapes, tmp_path, cluster, parameter):
    argv = [word for word in training(shapes, tmp_path / "run") if word not in ("--device", "cpu")]
    assert command.main(["detr", "--gpus_per_node", "4", "--slurm_parameter", parameter, "--", *argv]) == 0
    parameters, _ = requested(cluster)
    name, _, value = parameter.partition("=")
    assert {key: parameters[key] for key in parameters if key.startswith("g")} == {name: value}
    assert parameters["ntasks-per-node"] == "4"


@pytest.mark.parametrize(
    "flags, argv, message",
    [
        ("", "--epochs nine", "argument --epochs: invalid"),
        ("", "--no_such_flag", "unrecognized arguments: --no_such_flag"),
        ("--epochs 3", "", "unrecognized arguments: --epochs 3"),
        ("", "--hidden_dim 30", "--hidden_dim 30: must be a multiple"),
        ("", "--output_dir=", "--output_dir is missing: .* all nodes share"),
        ("", "--device tpu9", "--device tpu9: not a device's name"),
        ("", "--amp fp16", "--amp fp16 needs a GPU"),
        ("--gpus_per_node 1", "--device mps", "--device mps: a job runs on the nodes' GPUs or CPUs; pass"),
        ("", "--device meta", "--device meta: a job runs on the nodes' GPUs or CPUs"),
        ("", "--device cuda", "--gpus_per_node 0 asks for no GPU: pass --device cpu"),
        ("--gpus_per_node 2", "", "--device cpu would leave the GPUs idle: pass --gpus_per_node 0"),
        ("--gpus_per_node 2 --tasks_per_node 2", "", "--tasks_per_node goes with --gpus_per_node 0"),
        ("", "--resume elsewhere.pth", "--resume elsewhere.pth: a job resumes from .*checkpoint.pth"),
        ("", "--eval", "--eval needs the checkpoint"),
        ("--gpus_per_node 99 --cluster local", "--device cuda", "--gpus_per_node 99: PyTorch sees"),
        ("--nodes 2 --cluster local", "", "--nodes 2: --cluster local runs on this machine only"),
        ("--tasks_per_node 2 --cluster debug", "", "--cluster debug runs one process"),
        ("--time 10 --signal_seconds 541", "", "--signal_seconds 541: at most 540 with --time 10"),
        ("--time 1 --signal_seconds 60", "", "--signal_seconds 60: at most 59 with --time 1"),
        ("--time 600 --signal_seconds 7141", "", "--signal_seconds 7141: at most 7140 with --time 600"),
        ("--nodes 0", "", "argument --nodes: must be at least 1"),
        ("--slurm_parameter =3", "", "must be KEY=VALUE or KEY, got '=3'"),
        ("--slurm_parameter ntasks-per-node=3", "", "ntasks_per_node is set by --tasks_per_node"),
        ("--cluster kubernetes", "", "argument --cluster: invalid choice"),
    ],
)  # fmt: skip
def test_wrong_flags_are_refused_and_nothing_is_submitted(shapes, tmp_path, cluster, capsys, flags, argv, message):
    flags = flags.split() if "--gpus_per_node" in flags else [*CPU, *flags.split()]
    try:
        status = command.main(["detr", *flags, "--", *training(shapes, tmp_path / "run"), *argv.split()])
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (cluster / "submitted.sh").exists() and not (tmp_path / "run").exists()


def test_resume_accepts_the_jobs_own_checkpoint_and_any_with_eval(shapes, tmp_path, cluster):
    latest = str(tmp_path / "run" / "checkpoint.pth")
    for more, added in ([["--resume", latest], True], [["--eval", "--resume", "elsewhere.pth"], False]):
        argv = training(shapes, tmp_path / "run", "detr", *more)
        assert command.main(["detr", *CPU, "--", *argv]) == 0
        job = submitit.SlurmJob(tmp_path / "run" / "slurm", "42")
        assert job.submission().function.argv == argv + ["--auto_resume"] * added


def test_a_missing_submitit_is_reported(shapes, tmp_path, monkeypatch, capsys):
    for name in [*filter(re.compile(r"submitit\b|enact_common\.slurm\.").match, list(command.sys.modules))]:
        monkeypatch.delitem(command.sys.modules, name)
    monkeypatch.setitem(command.sys.modules, "submitit", None)
    assert command.main(["detr", *CPU, "--", *training(shapes, tmp_path / "run")]) == 2
    assert "pip install 'enact-detection[slurm]'" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--cluster", "slurm"]], ids=["auto", "slurm"])
def test_a_machine_without_slurm_is_reported(shapes, tmp_path, monkeypatch, capsys, flags):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command.main(["detr", *CPU, *flags, "--", *training(shapes, tmp_path / "run")]) == 2
    assert re.search("no srun here.* pass --cluster local", capsys.readouterr().err)


def test_an_error_of_sbatch_is_reported(shapes, tmp_path, cluster, capsys):
    (cluster / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: moon' >&2\nexit 1\n")
    argv = ["detr", *CPU, "--partition", "moon", "--", *training(shapes, tmp_path / "run")]
    assert command.main(argv) == 2
    assert "could not be submitted: sbatch: error: invalid partition specified: moon" in capsys.readouterr().err


# The processes of a job ---------------------------------------------------------------------------------------------


def slurm_environment(monkeypatch, rank: int = 0, nodes: int = 1, tasks_per_node: int = 1) -> None:
    """Set the environment that srun gives a process of job 42."""
    for name, value in {
        "SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": 42, "SLURM_NTASKS": nodes * tasks_per_node, "SLURM_PROCID": rank,
        "SLURM_JOB_NUM_NODES": nodes, "SLURM_NODEID": rank // tasks_per_node, "SLURM_LOCALID": rank % tasks_per_node,
        "SLURM_JOB_NODELIST": "rack[07-10],login",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))


@pytest.fixture
def job(shapes, tmp_path, cluster, monkeypatch) -> submitit.SlurmJob:
    """A submitted job of one process, this one, with a limit of ten minutes and one requeue."""
    submit(shapes, tmp_path / "run", *CPU, "--time", 10, "--max_requeues", 1)
    slurm_environment(monkeypatch)
    return submitit.SlurmJob(tmp_path / "run" / "slurm", "42")


def stub_main(monkeypatch, *numbers: int, status: int = STOPPED) -> None:
    """Replace the training by one that receives these signals and returns this status."""

    def main(*args) -> int:
        with listening():
            for number in numbers:
                os.kill(os.getpid(), number)
        return status

    monkeypatch.setattr(run, "main", main)


def requeued(cluster: Path) -> int:
    """The number of requests to requeue the job."""
    asked = cluster / "asked"
    return asked.read_text().splitlines().count("requeue 42") if asked.exists() else 0


@pytest.mark.parametrize(
    "rank, nodes, gpus, expected",
    [
        (5, 2, "0,1,2,3", {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "rack07"}),
        (3, 1, "0,1,2,3", {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "MASTER_ADDR": "localhost"}),
        # The cluster shows each process only its own GPU.
        (3, 1, "3", {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}),
    ],
)
def test_each_process_gets_its_rank_from_the_environment(monkeypatch, rank, nodes, gpus, expected):
    seen = {}
    monkeypatch.setattr(run, "main", lambda variant, *others: seen.update(os.environ) or 0)
    slurm_environment(monkeypatch, rank, nodes, tasks_per_node=4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    monkeypatch.setenv("RANK", "77")  # left over from the submitting shell
    assert task.Task("detr", [])() == 0
    assert {name: seen[name] for name in expected} == expected
    assert seen["LOCAL_WORLD_SIZE"] == "4" and seen["CUDA_VISIBLE_DEVICES"] == gpus
    assert 20000 <= int(seen["MASTER_PORT"]) <= 60000


def test_the_result_of_a_job_is_the_status_of_its_process(job, monkeypatch):
    stub_main(monkeypatch, status=0)
    process_job(job.paths.folder)
    assert job.result() == 0
    stub_main(monkeypatch, status=2)
    with pytest.raises(RuntimeError, match="DETR-ENACT/main.py ended with status 2"):
        process_job(job.paths.folder)
    assert "ended with status 2" in str(job.exception())


def test_a_job_is_requeued_at_time_outs_up_to_the_limit(job, cluster, monkeypatch):
    stub_main(monkeypatch, signal.SIGUSR2)
    argv = job.submission().function.argv
    with pytest.raises(SystemExit):
        process_job(job.paths.folder)
    assert requeued(cluster) == 1
    # The requeued job has no result and the same arguments.
    assert not job.paths.result_pickle.exists()
    assert job.submission().function.argv == argv and "--auto_resume" in argv
    with pytest.raises(UncompletedJobError, match="timed-out too many times"):
        process_job(job.paths.folder)
    assert requeued(cluster) == 1
    assert "timed-out too many times" in str(job.exception())


@pytest.mark.parametrize(
    "numbers, preempted, times",
    [
        ((signal.SIGTERM,), "None", 0),
        ((signal.SIGTERM, signal.SIGUSR2), "None", 0),
        ((signal.SIGUSR1,), "None", 0),
        ((signal.SIGTERM,), "2026-11-25T21:06:26", 1),
    ],
    ids=["cancelled", "cancelled and out of time", "asked to stop", "preempted"],
)
def test_a_cancelled_job_is_not_requeued_but_a_preempted_one_is(job, cluster, monkeypatch, numbers, preempted, times):
    monkeypatch.setenv("PREEMPTED", preempted)
    stub_main(monkeypatch, *numbers)
    with pytest.raises(SystemExit) as end:
        process_job(job.paths.folder)
    assert requeued(cluster) == times
    assert end.value.code == (-1 if times else STOPPED)
    assert not job.paths.result_pickle.exists()


def test_without_scontrol_a_job_counts_as_cancelled(job, cluster, monkeypatch):
    (cluster / "scontrol").unlink()
    monkeypatch.setenv("PATH", str(cluster))
    stub_main(monkeypatch, signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        process_job(job.paths.folder)
    assert end.value.code == STOPPED


def test_only_the_main_process_requeues_and_ends_the_job(job, cluster, monkeypatch):
    waited = []

    def the_main_process_ends(seconds: float) -> None:
        waited.append(seconds)
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("SIGTERM did not end the process")

    slurm_environment(monkeypatch, rank=1, tasks_per_node=2)
    stub_main(monkeypatch, signal.SIGUSR2)
    monkeypatch.setattr(task, "time", SimpleNamespace(sleep=the_main_process_ends))
    with pytest.raises(SystemExit) as end:
        process_job(job.paths.folder)
    assert end.value.code == STOPPED and waited == [task.MAIN_PROCESS_NEEDS]
    assert requeued(cluster) == 0 and not list(job.paths.folder.glob("*result*"))


def test_the_main_process_waits_for_a_signal_that_another_got_first(job, cluster, monkeypatch):
    stub_main(monkeypatch)  # stopped, although no signal came
    late = SimpleNamespace(sleep=lambda seconds: os.kill(os.getpid(), signal.SIGUSR2))
    monkeypatch.setattr(task, "time", late)
    with pytest.raises(SystemExit):
        process_job(job.paths.folder)
    assert requeued(cluster) == 1


@pytest.mark.skipif(shutil.which("pgrep") is None, reason="pgrep is not installed")
def test_a_job_of_two_processes_trains_one_model_and_resumes_after_a_time_out(shapes, tmp_path):
    few = "--epochs 2 --batch_size 1 --limit_val 2 --print_freq 1".split()
    argv = training(shapes, tmp_path / "run", "conditional", *few)
    flags = ["--cluster", "local", *CPU, "--tasks_per_node", "2", "--log_dir", str(tmp_path / "logs"), "--wait"]
    submitter = Forked(["-m", "enact_common.slurm", "conditional", *flags, "--", *argv], folder=ROOT)
    tasks = []
    while submitter.poll() is None:
        logs = sorted((tmp_path / "logs").glob("*_0_log.out"))
        if not tasks and logs and "epoch 0 [" in logs[0].read_text():
            # Like submitit and Slurm, signal all tasks.
            controller = logs[0].name.split("_")[0]
            tasks = subprocess.run(["pgrep", "-P", controller], capture_output=True, text=True).stdout.split()
            for number in tasks:
                os.kill(int(number), signal.SIGUSR2)
        time.sleep(0.02)
    said, _ = submitter.communicate()
    assert submitter.returncode == 0 and len(tasks) == 2
    assert re.findall(r"log of the first: (.*)", said) == [str(logs[0])] and len(logs) == 1
    text = logs[0].read_text()
    assert "effective batch    2 = 1 images x 1 accumulated x 2 processes" in text and "Requeued job" in text
    assert not (tmp_path / "run" / "slurm").exists()
    assert [row["epoch"] for row in read_log(tmp_path / "run")] == [0, 1]
    saved = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
    assert saved["variant"] == "conditional" and saved["args"]["auto_resume"]


def test_a_single_process_within_a_slurm_job_trains_alone(shapes, tmp_path, monkeypatch, capsys):
    slurm_environment(monkeypatch, rank=3, nodes=2, tasks_per_node=4)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **more: pytest.fail("joined a group"))
    assert train("detr", shapes, tmp_path, "--epochs", "1") == 0
    assert ", 1 process," in capsys.readouterr().out
    assert [row["epoch"] for row in read_log(tmp_path)] == [0]


def test_help_shows_every_flag_with_its_default():
    parser = command.build_parser()
    for action in parser._actions:
        assert action.help, action.option_strings
        switch = isinstance(action.default, bool) and action.nargs == 0
        if action.option_strings and not switch and action.dest != "help":
            assert "default" in parser._get_formatter()._expand_help(action), action.option_strings
