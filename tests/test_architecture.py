"""The order of the folders: docs/dev/architecture.md states it, and the imports keep to it."""

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
    """The dotted name of a file of the package or of a variant."""
    variants = dict(VARIANTS.values())
    first, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([variants.get(first, first), *rest]).removesuffix(".__init__")


FILES = {
    module_name(path): path
    for folder in ("enact_common", *(folder for folder, _ in VARIANTS.values()))
    for path in (ROOT / folder).rglob("*.py")
}


def imports_of(module: str) -> set[str]:
    """The project's modules that a module imports, at its top or inside a function."""
    path, found = FILES[module], set()
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
        found.update(name for name in names if name in FILES)
    return found - {module}


def room(module: str) -> str:
    """The folder, or the file at the package's root, that a module belongs to."""
    if module.startswith("enact_common.variants."):
        return "variant folders"
    return module.split(".")[1] if "." in module else "enact_common"


def arrows() -> dict[tuple[str, str], set[str]]:
    """From (room, room that it imports) to the modules that do."""
    found = defaultdict(set)
    for module in FILES:
        for other in imports_of(module):
            if room(other) != room(module):
                found[room(module), room(other)].add(f"{module} imports {other}")
    return found


def floors() -> dict[str, int]:
    """Each room's floor, from the page's table; the lowest is 1."""
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


def test_no_file_imports_itself_by_way_of_others():
    graphlib.TopologicalSorter({module: imports_of(module) for module in FILES}).prepare()


def test_the_diagram_shows_what_is_imported():
    """Arrows that follow from others are left out of the diagram."""
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


def test_attention_works_copied_alone_into_another_project(tmp_path):
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
    """A checkpoint of Conditional DETR with ENACT, written before the modules moved; its weights are multiples of 1/32,
    and the optimizer's moments zero, so that it compresses."""
    path = tmp_path / "recorded.pth"
    path.write_bytes(lzma.decompress((RECORDED / "checkpoint.pth.xz").read_bytes()))
    return path


def test_checkpoints_of_earlier_versions_detect_the_same(recorded):
    pixels = (torch.arange(3 * 64 * 80).view(3, 64, 80) * 7 % 256).to(torch.uint8)
    found = load_detector(recorded, "cpu", threshold=0.0)(pixels)
    expected = json.loads((RECORDED / "detections.json").read_text())
    torch.testing.assert_close(found.scores[:8].tolist(), expected["scores"], rtol=1e-3, atol=1e-4)
    assert set(found.names[:8]) == set(expected["names"])


def test_checkpoints_of_earlier_versions_resume(recorded, shapes, tmp_path):
    flags = ["--backbone_stages", "2", "--hidden_dim", "16", "--dim_feedforward", "32", "--ema", "0.9"]
    flags += ["--resume", str(recorded), "--epochs", "2", "--limit_val", "2"]
    assert train("conditional", shapes, tmp_path / "out", *flags) == 0
    written = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)
    before = torch.load(recorded, weights_only=True)
    assert written["epoch"] == 1 and written["args"]["enact_clusters"] == "regions"
    assert written.keys() == before.keys() and written["model"].keys() == before["model"].keys()
    assert before["args"].keys() - written["args"].keys() == {"rank", "distributed"}
