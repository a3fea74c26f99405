"""The demo at a tiny size."""

import json
import sys

import pytest
from PIL import Image
from processes import Forked

from enact_common import demo
from enact_common.variants import VARIANTS

TINY = (
    "--device cpu --backbone resnet18 --backbone_stages 2 --backbone_weights none --backbone_norm batch "
    "--hidden_dim 32 --nheads 4 --dim_feedforward 32 --enc_layers 1 --dec_layers 1 --train_sizes 64 --eval_size 64 "
    "--max_size 64 --no_augmentation --batch_size 4 --epochs 2 --num_workers 0"
).split()


@pytest.fixture
def tiny_demo(monkeypatch):
    """Shrink the demo's images and model; it does not learn at this size."""
    monkeypatch.setattr(demo, "SHAPES", {**demo.SHAPES, "train": 8, "val": 7, "size": 64})
    monkeypatch.setattr(demo, "TRAINING", TINY)


@pytest.fixture
def in_forks(monkeypatch):
    """Fork the demo's trainings and evaluations, since a new process takes seconds to import PyTorch.

    `installed.py` runs a demo in new processes.
    """

    def fork(command: list[str], env: dict[str, str]) -> Forked:
        assert command[0] == sys.executable
        return Forked(command[1:], env)

    monkeypatch.setattr(demo.subprocess, "Popen", fork)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_demo_trains_evaluates_and_draws(variant, tiny_demo, in_forks, tmp_path, capfd):
    assert demo.main(["--variant", variant, "--output_dir", str(tmp_path / "demo")]) == 0
    text = capfd.readouterr().out
    assert f"$ enact train {variant} --coco_path" in text and "--eval" in text
    last = json.loads((tmp_path / "demo" / "run" / "log.txt").read_text().splitlines()[-1])
    assert f"AP {last['test_coco_eval_bbox'][0]:.3f}, AP50" in text
    for name in ("detections.png", "curves.png"):
        assert str(tmp_path / "demo" / name) in text
        with Image.open(tmp_path / "demo" / name) as picture:
            assert min(picture.size) > 300 and len(picture.convert("RGB").getcolors(2**24)) > 50


def test_a_second_demo_reuses_the_images_and_restarts_the_run(tiny_demo, in_forks, tmp_path):
    images = tmp_path / "demo" / "shapes" / "val2017"
    made = []
    for flags in ([], ["--", "--epochs", "1"]):
        assert demo.main(["--output_dir", str(tmp_path / "demo"), *flags]) == 0
        made.append({path.name: path.stat().st_mtime_ns for path in images.iterdir()})
    assert made[0] == made[1]
    assert len((tmp_path / "demo" / "run" / "log.txt").read_text().splitlines()) == 1


def test_a_failed_training_ends_the_demo(tiny_demo, in_forks, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "TRAINING", [*TINY, "--dropout", "2"])
    with pytest.raises(SystemExit) as stop:
        demo.main(["--output_dir", str(tmp_path)])
    assert stop.value.code == 2
    assert not (tmp_path / "curves.png").exists()
