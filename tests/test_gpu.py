"""The GPU run at tiny sizes on a CPU: its steps, their output files, and the page made from them."""

import dataclasses
import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from enact_common.benchmark.__main__ import build_parser as benchmark_parser
from enact_common.benchmark.__main__ import main as benchmark
from enact_common.benchmark.isolated import Worker, attempt, numerics
from enact_common.gpu import __main__ as command
from enact_common.gpu import checks, golden
from enact_common.gpu.checks import CHECKS, Setting, run_check

SMALL = Setting(torch.device("cpu"), small=True)

# Columns of each check whose values must be true.
PROMISES = {
    "golden": ("matches", "lengths"),
    "faults": ("reported", "weights unchanged"),
    "resume": ("weights equal",),
}


@pytest.mark.parametrize("name", CHECKS)
def test_checks_run_on_a_cpu(name, monkeypatch):
    # The resume check trains three times and writes several checkpoints.
    smaller = "--backbone_stages 2 --hidden_dim 32 --nheads 4 --dim_feedforward 64 --num_queries 8".split()
    monkeypatch.setattr(checks, "SMALL_DETECTOR", [*checks.SMALL_DETECTOR, *smaller])
    result = run_check(name, SMALL)
    assert result["rows"]
    for row in result["rows"]:
        assert all(row[column] for column in PROMISES.get(name, ()) if row.get("numerics") != "bf16"), row
    # The results survive JSON.
    assert json.loads(json.dumps(result)) == result
    if name == "golden":
        # Errors are in units of the tolerance: at most 1 in float32, far more in bf16.
        *float32, bf16 = result["rows"]
        assert all(row["outputs"] <= 1 and row["losses"] <= 1 for row in float32) and bf16["outputs"] > 5


def test_every_recorded_model_is_compared():
    recorded = {case.name.split()[0] for case in golden.cases()}
    assert recorded == {path.stem for path in golden.FOLDER.glob("*_*.npz")} and len(recorded) == 6


def test_the_commands_of_all_steps_are_valid():
    """Only parses the commands, since the full sizes take too long to run."""
    for step in command.STEPS:
        for small in (False, True):
            _, module, *words = command.command_of(step, Path("out"), "cpu", small)[1:]
            parser = command.build_parser() if module == "enact_common.gpu" else benchmark_parser()
            assert parser.parse_args(words).device == "cpu", step.name


@pytest.fixture
def steps(monkeypatch):
    """Three steps: one that succeeds, one that fails, and one that hits its time limit."""
    done = command.checks("right", 60, "windows")
    fails = dataclasses.replace(done, name="fails", small=("check", "nothing"))
    slow = dataclasses.replace(done, name="slow", limit=0)
    monkeypatch.setattr(command, "STEPS", (done, fails, slow))


@pytest.mark.slow
def test_other_steps_run_after_one_fails_or_takes_too_long(steps, tmp_path, capsys):
    folder = tmp_path / "run"
    assert command.main(["run", "--small", "--device", "cpu", "--output_dir", str(folder)]) == 1
    summary = json.loads((folder / "run.json").read_text())
    assert [step["status"] for step in summary["steps"]] == [0, 2, "time limit"] and summary["small"]
    assert "invalid choice" in capsys.readouterr().err
    with tarfile.open(folder / "results.tgz") as archive:
        assert {"run.json", "right/windows.json", "right/log.txt", "fails/log.txt"} <= set(archive.getnames())
    assert command.main(["report", str(folder), "--page", str(tmp_path / "docs" / "gpu.md")]) == 0
    text = (tmp_path / "docs" / "gpu.md").read_text()
    assert "nothing was measured" in text and "| slow | time limit |" in text and "## fails\n\nNo results." in text
    assert "| 2 | 60 | 1 | 3 | 8 | 8 |" in text


def test_the_page_has_every_kind_of_result(tmp_path, monkeypatch):
    """The page is made from files of real benchmarks and checks; for a GPU it names the numerics (TF32)."""
    monkeypatch.setattr(Worker, "call", lambda worker, *call: attempt(*call))
    folder = tmp_path / "run"
    for name, words in {
        "scaling": "scaling --tokens 48 --layers mha --channels 8 --heads 2 --repeat 1 --output_dir {}",
        "rowcol": "rowcol --batch 1 --channels 8 --repeat 1 --clustered 4 5 3 --plain 4 5 6 --output {}/rowcol.json",
    }.items():
        (folder / name).mkdir(parents=True)
        assert benchmark([*words.format(folder / name).split(), "--device", "cpu"]) == 0
    (folder / "right").mkdir()
    result = {"check": "faults", "about": "A.", "rows": [{"amp": "none", "reported": False, "ms": 1.23456}]}
    result |= {"device": "cuda", "numerics": numerics()}
    (folder / "right" / "faults.json").write_text(json.dumps(result))
    (folder / "right" / "resume.json").write_text(json.dumps({"check": "resume", "problem": "KeyError: 1"}))
    steps = [{"step": name, "status": 0, "seconds": 1.0, "command": "c"} for name in ("right", "scaling", "rowcol")]
    summary = {"machine": "M", "date": "2026-11-28T00:00", "command": "c", "small": False, "steps": steps}
    (folder / "run.json").write_text(json.dumps(summary))
    page = tmp_path / "docs" / "gpu.md"
    assert command.main(["report", str(folder), "--page", str(page)]) == 0
    text = page.read_text()
    assert "convolved in TF32" in text and "| none | no | 1.23 |" in text and "Failed: KeyError: 1" in text
    assert "| 48 | 6 x 8 | nn.MultiheadAttention |" in text and "| 4 x 5, 3 clusters |" in text
    assert (page.parent / "gpu" / "scaling.png").stat().st_size > 1000 and "nothing was measured" not in text


@pytest.mark.parametrize(
    "argv, message",
    [
        (["run", "--device", "cpu"], "pass --small to try the commands"),
        (["run", "--device", "cuda:9"], "--device cuda:9"),
        (["report", "{folder}"], "no run.json; name the folder"),
    ],
)
def test_invalid_runs_and_reports_are_refused(argv, message, tmp_path, capsys):
    assert command.main([word.format(folder=tmp_path) for word in argv]) == 2
    assert message in capsys.readouterr().err


def test_a_broken_summary_is_named(tmp_path, capsys):
    (tmp_path / "run.json").write_text("{")
    assert command.main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path / 'run.json'}: broken" in capsys.readouterr().err


def test_a_backend_without_support_for_the_input_has_no_times(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError(checks.NO_BACKEND[0] + ". Aborting execution.")

    monkeypatch.setattr(checks.F, "scaled_dot_product_attention", fail)
    assert checks.attempt_attention(SMALL, 1, 60, torch.float32, None, False) is None


def test_golden_cases_outside_a_checkout_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(golden, "FOLDER", tmp_path)
    with pytest.raises(golden.UserError, match="come with a checkout"):
        golden.load_recipe()


def test_steps_run_in_the_same_python(tmp_path):
    assert command.command_of(command.STEPS[0], tmp_path, "cuda", small=False)[0] == sys.executable
