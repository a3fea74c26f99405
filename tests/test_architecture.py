"""The imports follow the order of folders that docs/dev/architecture.md states."""

import ast
import graphlib
import json
import lzma
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from conftest import train

from enact_common import load_detector
from enact_common.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "enact_common"
PAGE = (ROOT / "docs" / "dev" / "architecture.md").read_text()
RECORDED = Path(__file__).parent / "recorded"


def module_name(path: Path) -> str:
    """The dotted module name of a file in the package or a variant folder."""
    variants = dict(VARIANTS.values())
    first, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([variants.get(first, first), *rest]).removesuffix(".__init__")


FILES = {
    module_name(path): path
    for folder in ("enact_common", *(folder for folder, _ in VARIANTS.values()))
    for path in (ROOT / folder).rglob("*.py")
}


def imports_of(module: str) -> set[str]:
    """The project's modules that a module imports, at the top or inside a function."""
    path, imported = FILES[module], set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base for alias in node.names]
        else:
            continue
        imported.update(name for name in names if name in FILES)
    return imported - {module}


def room(module: str) -> str:
    """The folder of a module, or its file if it is at the package's root."""
    if module.startswith("enact_common.variants."):
        return "variant folders"
    return module.split(".")[1] if "." in module else "enact_common"


def arrows() -> dict[tuple[str, str], set[str]]:
    """Map (importing room, imported room) to the imports between their modules."""
    imports = defaultdict(set)
    for module in FILES:
        for other in imports_of(module):
            if room(other) != room(module):
                imports[room(module), room(other)].add(f"{module} imports {other}")
    return imports


def floors() -> dict[str, int]:
    """Map each room to its floor in the page's table; the lowest floor is 1."""
    table = {}
    for number, rooms in re.findall(r"(?m)^\| (\d+) \| ([^|]+) \|", PAGE):
        table |= {name: int(number) for name in re.findall(r"`([^`]+)`", rooms)}
    return table


def test_every_room_has_a_floor():
    assert set(floors()) == {room(module) for module in FILES}


def test_imports_lead_to_lower_floors():
    floor = floors()
    upwards = [why for (one, other), why in arrows().items() if floor[other] >= floor[one]]
    assert not upwards


def test_no_circular_imports():
    graphlib.TopologicalSorter({module: imports_of(module) for module in FILES}).prepare()


def test_the_diagram_shows_all_imports_between_rooms():
    """The diagram omits arrows that follow from other arrows."""
    below = defaultdict(set)
    for one, other in arrows():
        below[one].add(other)

    def reaches(one: str, other: str) -> bool:
        return other in below[one] or any(reaches(between, other) for between in below[one])

    direct = {(a, b) for a, b in arrows() if not any(reaches(between, b) for between in below[a] - {b})}
    diagram = re.search(r"```mermaid\n(.*?)```", PAGE, re.DOTALL)[1]
    names = dict(re.findall(r"(?m)^ +(\w+)\[\"?([^\]\"]+)\"?\]$", diagram))
    drawn = re.findall(r"(?m)^ +(\w+) --> (\w+)$", diagram)
    assert {(names[a], names[b]) for a, b in drawn} == direct


def test_the_attention_folder_works_as_a_copy_in_another_project(tmp_path):
    shutil.copytree(PACKAGE / "attention", tmp_path / "borrowed")
    code = (
        f"import sys; sys.path = [p for p in sys.path if p != {str(ROOT)!r}]\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "import torch\n"
        "from borrowed import EnactSelfAttention, plug_in\n"
        "layer = EnactSelfAttention(32, 4, batch_first=True)\n"
        "optimizer = torch.optim.SGD(layer.parameters(), 0.1)\n"
        "x = torch.randn(2, 60, 32)\n"
        "before = layer.W_prob.weight.clone()\n"
        "layer(x, x, x)[0].square().mean().backward()\n"
        "optimizer.step()\n"
        "assert not torch.equal(layer.W_prob.weight, before)\n"
        "assert not [name for name in sys.modules if name.startswith('enact_common')]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={})
    assert done.returncode == 0, done.stderr


@pytest.fixture
def recorded(tmp_path) -> Path:
    """A checkpoint of Conditional DETR with ENACT from before the modules moved. Its weights are multiples of 1/32 and
    its optimizer moments zero, so it compresses well."""
    path = tmp_path / "recorded.pth"
    path.write_bytes(lzma.decompress((RECORDED / "checkpoint.pth.xz").read_bytes()))
    return path


def test_an_old_checkpoint_detects_as_recorded(recorded):
    pixels = (torch.arange(3 * 64 * 80).view(3, 64, 80) * 7 % 256).to(torch.uint8)
    detections = load_detector(recorded, "cpu", threshold=0.0)(pixels)
    expected = json.loads((RECORDED / "detections.json").read_text())
    torch.testing.assert_close(detections.scores[:8].tolist(), expected["scores"], rtol=1e-3, atol=1e-4)
    assert set(detections.names[:8]) == set(expected["names"])


def test_an_old_checkpoint_resumes(recorded, shapes, tmp_path):
    flags = ["--backbone_stages", "2", "--hidden_dim", "16", "--dim_feedforward", "32", "--ema", "0.9"]
    flags += ["--resume", str(recorded), "--epochs", "2", "--limit_val", "2"]
    assert train("conditional", shapes, tmp_path / "out", *flags) == 0
    resumed = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)
    original = torch.load(recorded, weights_only=True)
    assert resumed["epoch"] == 1 and resumed["args"]["enact_clusters"] == "regions"
    assert resumed.keys() == original.keys() and resumed["model"].keys() == original["model"].keys()
    assert original["args"].keys() - resumed["args"].keys() == {"rank", "distributed"}
