"""The files around the code: they parse, and they agree with each other."""

import re
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from enact_common.variants import VARIANTS

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]

# The brackets keep this file from matching its own patterns.
HOME = re.compile(r"/(?:home|Users)/\w|/[r]oot/|[A-Z]:\\[U]sers\\")
REGISTRY = re.compile(
    r"(?:\bpypi|pythonhosted|registry\.npmjs|deb\.debian|conda\.anaconda)\.(?:org|com)"
    r"|download\.pytorch\.org/[w]hl"
)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def project_files() -> list[Path]:
    """The files that git tracks or would add; skips the test without git or a repository."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"git cannot list the files: {error}")
    paths = [ROOT / name for name in found.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]  # a deleted file is listed until committed


@pytest.mark.parametrize("python", PYTHONS)
def test_each_dependency_has_one_pin_within_its_range(python):
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}

    def applies(requirement: Requirement) -> bool:
        return requirement.marker is None or requirement.marker.evaluate(environment)

    pins: dict[str, str] = {}
    for line in read("constraints.txt").splitlines():
        if line.split("#")[0].strip():
            pin = Requirement(line)
            if applies(pin):
                assert pin.name not in pins, f"{pin.name} has two pins on Python {python}"
                (specifier,) = pin.specifier
                assert specifier.operator == "==", f"{line} is no exact pin"
                pins[pin.name] = specifier.version

    project = tomllib.loads(read("pyproject.toml"))["project"]
    lines = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
    for requirement in map(Requirement, lines):
        if requirement.name != project["name"] and applies(requirement):
            assert requirement.name in pins, f"{requirement.name} has no pin on Python {python}"
            assert requirement.specifier.contains(pins[requirement.name]), str(requirement)


def test_compose_file_needs_no_environment_variables():
    text = read("docker-compose.yml")
    assert not HOME.search(text)
    variables = re.findall(r"\$(?:\{[^}]*\}|\w+)", text)
    assert [variable for variable in variables if ":-" not in variable] == []


def test_env_example_lists_the_settings_of_the_compose_file():
    used = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", read("docker-compose.yml")))
    listed = dict(re.findall(r"^(\w+)=(.*)$", read(".env.example"), re.MULTILINE))
    assert listed == used


def test_conda_environment_installs_the_tested_versions():
    dependencies = yaml.safe_load(read("environment.yml"))["dependencies"]
    (pip,) = [entry["pip"] for entry in dependencies if isinstance(entry, dict)]
    assert pip == ["-c constraints.txt", "-e .[dev]"]


def test_version_is_the_same_everywhere():
    version = tomllib.loads(read("pyproject.toml"))["project"]["version"]
    assert yaml.safe_load(read("CITATION.cff"))["version"] == version


def test_no_file_holds_a_home_folder_or_a_registry_host():
    found = []
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a binary file
        for number, line in enumerate(text.splitlines(), 1):
            if HOME.search(line) or REGISTRY.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


def test_variant_folders_do_not_repeat_each_other():
    # Shared code belongs in enact_common: no six consecutive lines may be in two variant folders.
    run = 6
    folders = defaultdict(set)
    for folder, _ in VARIANTS.values():
        for path in sorted((ROOT / folder).rglob("*.py")):
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            for i in range(len(lines) - run + 1):
                folders["\n".join(lines[i : i + run])].add(folder)
    assert [text for text, where in folders.items() if len(where) > 1] == []


def test_makefile_has_the_targets_in_the_readme():
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    named = set()
    for code in re.findall(r"```.*?```|`[^`\n]+`", read("README.md"), re.DOTALL):
        for arguments in re.findall(r"\bmake((?: +[\w./=-]+)+)", re.sub(r"#.*", "", code)):
            named |= {word for word in arguments.split() if "=" not in word}
    assert {"demo", "test"} <= named <= targets
