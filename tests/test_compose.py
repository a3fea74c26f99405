"""The commands in docker-compose.yml, parsed as compose does and run without a container."""

import os
import re
import shlex
import signal
import time
import urllib.request
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml
from conftest import SMALL_MODEL, free_port, read_log
from processes import Forked

ROOT = Path(__file__).resolve().parents[1]
VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")

SERVICES = ("train", "eval", "benchmark", "tensorboard", "explore")


def substitute(value: Any, settings: dict[str, str]) -> Any:
    """A value of the file with `${NAME:-default}` replaced by the setting, or by the default if it is empty."""
    if isinstance(value, dict):
        return {key: substitute(item, settings) for key, item in value.items()}
    if isinstance(value, list):
        return [substitute(item, settings) for item in value]
    return VARIABLE.sub(lambda match: settings.get(match[1]) or match[2], value) if isinstance(value, str) else value


def services(**settings: str) -> dict[str, dict]:
    """The services with these settings."""
    return substitute(yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8")), settings)["services"]


def paths_in(service: dict) -> list[str]:
    """The absolute paths in a service's command and environment."""
    words = [*shlex.split(service["command"]), *service.get("environment", {}).values()]
    return [word for word in (word.rpartition("=")[2] for word in words) if word.startswith("/")]


def mount_of(path: str, service: dict) -> dict | None:
    """The volume that holds a path of the container."""
    places = [PurePosixPath(path), *PurePosixPath(path).parents]
    return next((volume for volume in service["volumes"] if PurePosixPath(volume["target"]) in places), None)


def host_path(word: str, service: dict) -> str:
    """Replace a path in the container by its path on the host; other words are returned unchanged."""
    volume = mount_of(word, service) if word.startswith("/") else None
    return str(Path(volume["source"]) / PurePosixPath(word).relative_to(volume["target"])) if volume else word


def start(name: str, settings: dict[str, str], *more: str) -> Forked:
    """Start a service's command in a fork of this Python, which replaces the image's entry point."""
    service = services(**settings)[name]
    command = [host_path(word, service) for word in shlex.split(service["command"])]
    environment = {key: host_path(value, service) for key, value in service.get("environment", {}).items()}
    return Forked([*command, *more], os.environ | environment, ROOT)


def finish(name: str, settings: dict[str, str]) -> str:
    """Run a service's command, which must succeed; its output."""
    process = start(name, settings)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stdout + stderr
    return stdout


@pytest.mark.parametrize("name", SERVICES)
def test_paths_are_mounted(name):
    service = services()[name]
    assert paths_in(service) != []
    for path in paths_in(service):
        assert mount_of(path, service), f"{path} is not mounted"
    output_dir = re.search(r"--output_dir (\S+)", service["command"])
    for path in [*output_dir.groups()] if output_dir else []:
        assert not mount_of(path, service).get("read_only")
    if "TORCH_HOME" in service.get("environment", {}):
        assert not mount_of(service["environment"]["TORCH_HOME"], service).get("read_only")


def test_compose_up_trains_on_all_gpus_and_resumes():
    by_default = [name for name, service in services().items() if "profiles" not in service]
    assert by_default == ["train"] and set(services()) == set(SERVICES)
    train = services()["train"]
    words = shlex.split(train["command"])
    assert "--nproc_per_node=gpu" in words and "--auto_resume" in words
    assert train["deploy"]["resources"]["reservations"]["devices"][0]["count"] == "all"
    # torchrun waits for its processes, and Docker waits longer for torchrun.
    assert train["stop_grace_period"] == "150s" and train["environment"]["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "120"
    assert train["restart"] == "on-failure:3"
    assert all("restart" not in service for name, service in services().items() if name != "train")


def test_the_image_installs_the_services_dependencies():
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert 'ENTRYPOINT ["python"]' in dockerfile  # the commands are its arguments
    installed = re.search(r'-e "\.\[([\w,-]+)\]"', dockerfile)[1].split(",")
    assert {"logging", "plots", "explore"} <= set(installed)  # TensorBoard, the benchmark's charts, the explorer


def test_settings_override_defaults():
    train = services(VARIANT="Anchor-DETR-ENACT", PROCESSES="2", ARGS="--batch_size 2", GPU_COUNT="")["train"]
    words = shlex.split(train["command"])
    assert words[3:5] == ["--nproc_per_node=2", "Anchor-DETR-ENACT/main.py"] and words[-2:] == ["--batch_size", "2"]
    assert "/outputs/Anchor-DETR-ENACT" in words
    assert train["deploy"]["resources"]["reservations"]["devices"][0]["count"] == "all"


@pytest.mark.parametrize("name, port", [("tensorboard", "6006"), ("explore", "7860")])
def test_pages_are_reachable_only_from_this_machine(name, port):
    service = services(**{f"{name.upper()}_PORT": "8080"})[name]
    assert service["ports"] == [f"127.0.0.1:8080:{port}"]
    assert shlex.split(service["command"])[-4:] == ["--host", "0.0.0.0", "--port", port]
    assert all(volume["read_only"] for volume in service["volumes"])


@pytest.fixture(scope="module")
def settings(shapes, tmp_path_factory) -> dict[str, str]:
    """Settings for a small model on the CPU, in two processes, with the test's folders."""
    model = shlex.join([*SMALL_MODEL["detr"], "--epochs", "1", "--limit_train", "8"])
    return {
        "COCO_PATH": str(shapes),
        "OUTPUT_PATH": str(tmp_path_factory.mktemp("outputs")),
        "PROCESSES": "2",
        "ARGS": model,
        "CHECKPOINT": "best.pth",
        "BENCHMARK_ARGS": "--variants detr --rows enact --size 64 96 --batch 1 --repeat 1 --warmup 0 --device cpu "
        f"--coco_path /data/coco -- {shlex.join(SMALL_MODEL['detr'])}",
    }


@pytest.fixture(scope="module")
def trained(settings) -> Path:
    """The output folder of the training service."""
    finish("train", settings)
    return Path(settings["OUTPUT_PATH"]) / "DETR-ENACT"


@pytest.mark.slow
def test_the_training_service_runs(trained):
    assert len(read_log(trained)) == 1
    assert {"checkpoint.pth", "best.pth", "evaluation.json"} <= {path.name for path in trained.iterdir()}


@pytest.mark.slow
def test_the_evaluation_service_runs_on_the_trained_checkpoint(trained, settings):
    output = finish("eval", settings | {"PROCESSES": "1"})
    assert "Average Precision" in output and (trained / "results.json").is_file()


@pytest.mark.slow
def test_the_benchmark_service_runs(settings):
    finish("benchmark", settings)
    assert (Path(settings["OUTPUT_PATH"]) / "benchmarks" / "table.md").is_file()


@pytest.mark.slow
def test_tensorboard_shows_the_training(trained, settings):
    page, runs = pages_of("tensorboard", settings, "", "data/runs")
    assert "<title>TensorBoard</title>" in page and "DETR-ENACT" in runs


@pytest.mark.slow
def test_the_explorer_shows_the_trained_checkpoint(trained, settings):
    page, configuration = pages_of("explore", settings, "", "config")
    assert "ENACT explorer" in page and "/DETR-ENACT/best.pth" in configuration


def pages_of(name: str, settings: dict[str, str], *paths: str) -> list[str]:
    """Start a service that shows pages, and fetch these paths from it."""
    port = free_port()
    # The last flags win. A container has its own network, but here the default port may be in use.
    process = start(name, settings, "--host", "127.0.0.1", "--port", str(port))
    try:
        return [fetch(f"http://127.0.0.1:{port}/{path}", process) for path in paths]
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def fetch(url: str, process: Forked, seconds: float = 120) -> str:
    """Fetch a page from a server that is starting; retry for `seconds`."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + seconds
    while True:
        try:
            return opener.open(url, timeout=10).read().decode()
        except OSError:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < end, f"{url} did not answer"
            time.sleep(0.2)
