"""The command `enact`, the packages of the wheel, and imports that do not load PyTorch."""

import subprocess
import sys
from pathlib import Path

import pytest
from processes import Forked

import enact_common
from enact_common import __main__ as enact
from enact_common.cli import program
from enact_common.variants import VARIANTS

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def called_by_nobody(monkeypatch):
    """Reset the command name that an earlier test set."""
    monkeypatch.setattr(program, "called_as", None)


def test_the_wheel_holds_every_package():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = setuptools["package-dir"]
    expected = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "enact_common").rglob("__init__.py")}
    for folder, package in VARIANTS.values():
        assert folders[package] == folder
        expected |= {package, f"{package}.models", f"{package}.datasets"}
    assert folders["enact_common.configs"] == "configs"
    assert set(setuptools["packages"]) == expected | {"enact_common.configs"}
    assert len(setuptools["packages"]) == len(set(setuptools["packages"]))


def test_the_help_fits_a_screen_and_loads_no_pytorch():
    code = "import sys; from enact_common.__main__ import main; main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"  {name} " in done.stdout for name in enact.COMMANDS) and done.stdout.count("\n") < 24


@pytest.mark.parametrize("name", [name for name in enact.COMMANDS if name not in ("train", "eval")])
def test_each_command_shows_its_help_under_its_name(name, capsys):
    with pytest.raises(SystemExit) as end:
        enact.main([name, "--help"])
    assert end.value.code == 0 and f"usage: enact {name}" in capsys.readouterr().out


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("command", ["train", "eval"])
def test_variants_are_trained_and_evaluated_by_name(command, variant, capsys):
    with pytest.raises(SystemExit) as end:
        enact.main([command, variant, "--help"])
    assert end.value.code == 0 and f"usage: enact {command} {variant}" in capsys.readouterr().out
    assert enact.main([command, variant, "--coco_path", "nowhere", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"enact {command} {variant}: error: ")
    assert ("--resume" in said) == (command == "eval")


@pytest.mark.parametrize(
    "words, hint",
    [
        ("train detr --coco_pathh data", "--coco_pathh is no flag: did you mean --coco_path?"),
        ("predict photo.jpg --checkpont best.pth", "--checkpont is no flag: did you mean --checkpoint?"),
        ("convert coco data --output_dir out --trian_set x", "--trian_set is no flag: did you mean --train_set?"),
        ("demo --xyz", "enact demo --help lists the flags"),
        ("demo fast --variant fast -- --output_dri out", "enact demo --help lists the flags"),
        ("train detr --lr", "enact train detr --help lists the flags"),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_the_nearest(words, hint, capsys):
    with pytest.raises(SystemExit) as end:
        enact.main(words.split())
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("enact ") and said.endswith(f"; {hint}\n") and said.count("\n") == 1


def test_unknown_commands_and_variants_are_named(capsys):
    assert enact.main(["trian"]) == 2
    assert "no command 'trian'; did you mean train?" in capsys.readouterr().err
    assert enact.main(["xyz"]) == 2
    assert capsys.readouterr().err == "enact: error: no command 'xyz'; enact --help lists them all\n"
    assert enact.main(["eval", "--resume", "nowhere.pth"]) == 2
    assert capsys.readouterr().err.startswith("enact eval: error: nowhere.pth: no such file")
    with pytest.raises(SystemExit) as end:
        enact.main(["eval"])
    assert end.value.code == 2 and "VARIANT" in capsys.readouterr().err
    assert enact.main([]) == 2
    with pytest.raises(SystemExit) as end:
        enact.main(["train", "dert"])
    assert end.value.code == 2 and "'detr'" in capsys.readouterr().err


@pytest.mark.parametrize("shell", enact.SHELLS)
def test_completion_knows_commands_and_flags(shell, capsys):
    pytest.importorskip("shtab")
    assert enact.main([enact.COMPLETION, shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in (*enact.COMMANDS, "--smoothing_sigma", "hilbert"))


def test_completion_without_shtab_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert enact.main([enact.COMPLETION, "bash"]) == 2
    assert "pip install 'enact-detection[completion]'" in capsys.readouterr().err


def test_public_names_are_imported_lazily():
    for name in enact_common.__all__:
        assert getattr(enact_common, name) is not None and name in dir(enact_common)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = enact_common.nothing
    code = "import sys; from enact_common import cli, UserError; assert cli and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_commands_that_draw_start_without_matplotlib():
    code = (
        "import sys; assert 'matplotlib' not in sys.modules; sys.modules['matplotlib'] = None\n"
        "from enact_common.__main__ import main\n"
        "sys.exit(main(['completion', 'bash']))"
    )
    pytest.importorskip("shtab")
    process = Forked(["-c", code], folder=ROOT)
    _, complained = process.communicate()
    assert process.returncode == 0, complained
