"""The README and the pages: their commands, their worked example, their figures, and how they are written."""

import importlib
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch

from enact_common.__main__ import COMMANDS
from enact_common.attention.clustering import (
    InformationLogits,
    gaussian_kernel,
    region_borders,
    self_information,
    smooth,
    window_length,
)
from enact_common.variants import VARIANTS, load_variant

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
FOLDERS = {folder: name for name, (folder, _) in VARIANTS.items()}

# The commands that are not parsed below: what runs them, or what they need.
OTHERS = {
    "make test": "CI",
    "make lint": "CI",
    "make wheel": "CI",
    "make docs": "CI",
    "make install": "CI, as a part of the others",
    "make test-fast": "CI runs all tests",
    "make demo": "tests/test_tools.py, shrunk",
    "make gpu": "a GPU; tests/test_gpu.py runs its steps on a CPU",
    "make soak": "half an hour; tests/test_soak.py runs its loops, shortened",
    "make audit": "the network",
    "pip install": "CI, as a part of make install and make wheel",
    "enact completion": "tests/test_product.py",
    "python -m pytest": "CI runs all tests",
    ".venv/bin/python -m pytest": "CI runs all tests",
    "TRITON_INTERPRET=1 python -m pytest": "tests/test_kernels.py",
    "python -m enact_common.attention.kernels.report": "tests/test_kernels.py compiles the same kernels",
    "python tests/soak.py": "tests/test_soak.py",
    "python docs/figures/draw.py": "below",
    "python docs/figures/explore.py": "a running explorer and Chromium",
    "docker compose": "Docker; tests/test_compose.py runs each service's command",
    "cp .env.example": "a shell",
    "mkdir": "a shell",
    "sha256sum": "a downloaded file",
    "wandb": "a W&B account",
    "mlflow": "the whole package; tests/test_trackers.py reads the folder",
    "git": "a shell",
}

# Lines of shell scripts that run nothing of this project.
SHELL = re.compile(r"(for|case|esac|done|exit|export|srun|status=|\[|[\w*-]+\))")


def code_lines(page: Path) -> list[str]:
    """The lines of a page's shell blocks, with continued lines joined and comments removed."""
    lines = []
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        block = re.sub(r"\\\n\s*", " ", block)
        block = re.sub(r'"([^"]*)"', lambda quoted: quoted[0].replace("\n", " "), block)
        lines += [re.sub(r"(^|\s)#.*", "", line).strip() for line in block.splitlines()]
    return [line for line in lines if line]


def commands_of(page: Path) -> list[list[str]]:
    """The page's commands as words, with its shell variables and functions filled in."""
    variables = {"variant": "DETR", "attention": "enact", "queries": "", "ENACT_COCO_MINI": "path/to/coco"}
    functions, commands = {}, []
    for line in code_lines(page):
        if SHELL.match(line):
            continue
        if assignment := re.fullmatch(r'(\w+)="([^$]*)"', line):
            variables[assignment[1]] = assignment[2]
            continue
        line = re.sub(r"\$\{?(\w+)\}?", lambda use: variables.get(use[1], use[0]), line)
        if function := re.fullmatch(r'(\w+)\(\) \{ (.*) "\$@"; \}', line):
            functions[function[1]] = function[2]
            continue
        words = shlex.split(line.rstrip("'") if line.count("'") % 2 else line)
        while words and (re.match(r"\w+=", words[0]) or words[0] in ("exec", "do", "then")):
            words = words[1:]
        if words and words[0] in functions:
            words = shlex.split(functions[words[0]]) + words[1:]
        if words:
            commands.append([word for word in words if not word.startswith("$")])
    return commands


def parser_of(words: list[str]):
    """The parser of a command of this project and the command's arguments; None for another command."""
    if words[0] == "torchrun":
        script = next(i for i, word in enumerate(words) if word.endswith("main.py"))
        words = ["python", *words[script:]]
    if words[0] == "enact" and words[1] in COMMANDS:
        if words[1] in ("train", "eval"):
            name = words[2] if words[1] == "train" else "detr"
            return load_variant(name).main.get_args_parser(), words[3 if words[1] == "train" else 2 :]
        curves = words[1] == "plots" and words[2] not in ("curves", "precision-recall")  # as its `main` does
        parser = importlib.import_module(f"enact_common.{COMMANDS[words[1]][0]}").build_parser()
        return parser, ["curves"] * curves + words[2:]
    if words[:2] == ["python", "-m"] and words[2].startswith("enact_common."):
        name = words[2]
        module = f"{name}.__main__" if (ROOT / name.replace(".", "/")).is_dir() else name
        return importlib.import_module(module).build_parser(), words[3:]
    if words[0] == "python" and words[1].endswith("/main.py"):
        return load_variant(FOLDERS[words[1].split("/")[0]]).main.get_args_parser(), words[2:]
    return None


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_command_parses_or_says_what_it_needs(page):
    for words in commands_of(page):
        line = " ".join(words)
        if any(line.startswith(start) for start in OTHERS):
            continue
        parser_and_arguments = parser_of(words)
        assert parser_and_arguments is not None, f"not listed: {line}"
        parser, arguments = parser_and_arguments
        arguments = arguments[: arguments.index(">")] if ">" in arguments else arguments
        # The config of a training that does not exist here.
        arguments = [re.sub(r"outputs/.*/config\.yaml", "detr_resnet50_enact", word) for word in arguments]
        if "--" in arguments and "slurm" in words:  # the training's own flags follow
            split = arguments.index("--")
            load_variant(arguments[0]).main.get_args_parser().parse_args(arguments[split + 1 :])
            arguments = arguments[:split]
        if "..." not in arguments:
            parser.parse_args(arguments)


def test_what_the_list_of_commands_names_exists():
    for reason in OTHERS.values():
        for name in re.findall(r"tests/\w+\.py", reason):
            assert (ROOT / name).is_file(), name


def paragraphs(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```|<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    blocks = re.split(r"\n\s*\n|\n(?=- |\d+\. )", text)
    return [block.strip() for block in blocks if not block.lstrip().startswith(("|", "    "))]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_paragraphs_are_short(page):
    def shown(text: str) -> str:
        return re.sub(r"\]\([^)]*\)", "]", text)  # a link's target is not read

    assert [text[:80] for text in paragraphs(page) if len(shown(text)) > 400] == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)\s#]+)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if not re.match(r"\w+:", target)]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_the_worked_example_is_what_the_code_computes():
    text = (ROOT / "docs" / "method" / "enact.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    tokens = torch.tensor([[float(cell) for cell in row] for row in rows if len(row) == 7])
    windows = [row for row in rows if len(row) == 4]
    z, probability, information, smoothed, second, region = tokens[:, 1:].unbind(1)
    found = self_information(z[None])
    signal = smooth(found, gaussian_kernel(1.0))
    padded = torch.nn.functional.pad(signal[0], (1, 1))
    borders = region_borders(signal)
    half = 0.51e-4  # of the last printed digit
    for printed, computed in (
        (probability, z.softmax(0)),
        (information, found[0]),
        (smoothed, signal[0]),
        (second, 2 * padded[1:-1] - padded[:-2] - padded[2:]),
    ):
        torch.testing.assert_close(printed, computed, rtol=0, atol=half)
    assert region.tolist() == [0, *borders[0].cumsum(0).tolist()]
    length = int(window_length(torch.tensor([len(z)]), borders.sum(1) + 1)[0])
    assert [row[1] for row in windows] == [f"{i}, {i + 1}" for i in range(0, len(z), length)]
    for column, temperature in ((2, None), (3, 1.0)):
        weights = InformationLogits(temperature)(signal).view(-1, length).softmax(1)
        printed = torch.tensor([[float(cell) for cell in row[column].split(", ")] for row in windows])
        torch.testing.assert_close(printed, weights, rtol=0, atol=half)


def test_the_figures_are_what_the_code_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    runpy.run_path(str(ROOT / "docs" / "figures" / "draw.py"))["main"](["--output_dir", str(tmp_path)])
    drawn = sorted(tmp_path.glob("*.svg"))
    assert [path.name for path in drawn] == sorted(path.name for path in (ROOT / "docs" / "figures").glob("*.svg"))
    for path in drawn:
        assert parts(path) == parts(ROOT / "docs" / "figures" / path.name), f"{path.name}: python docs/figures/draw.py"


def parts(path: Path) -> list[str]:
    """An SVG's elements without numbers, whose last digits may differ between CPUs."""
    return [re.sub(r"-?\d+(\.\d+)?|#\w{6}", "0", line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_flag_page_lists_every_flag():
    hooks = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
    page = hooks["on_page_markdown"](hooks["PLACE"])
    for name in VARIANTS:
        usage = load_variant(name).main.get_args_parser().format_usage()
        flags = set(re.findall(r"(?<=\[)--[\w-]+", usage))
        assert len(flags) > 80 and [flag for flag in flags if f"`{flag}`" not in page] == []
    assert "| `--smoothing_sigma` |" in page and "anchor: 5" in page
