"""Unreadable images: replaced in training, left out of evaluation, reported, and an error if too many."""

import json
import multiprocessing
import os
import re
import shutil
import signal
from collections import Counter

import pytest
import torch
from conftest import equal_states, read_log, train

from enact_common.checkpoints.files import load_checkpoint
from enact_common.data import images
from enact_common.data.annotations import find_split
from enact_common.data.coco import CocoDetection, collate
from enact_common.data.loading import worker_death
from enact_common.data.transforms import eval_transforms
from enact_common.evaluation.coco import EVALUATION
from enact_common.utils.errors import UserError

CACHES = ([], ["--cache_mode"], ["--cache_mode", "decoded"])
# Each cache with one of two numbers of loading processes.
LOADING = list(zip(CACHES, ("2", "0", "2"), strict=True))


@pytest.fixture
def spoilt(shapes, tmp_path):
    """A copy of the shapes, and a function that damages images of a split by number."""
    data = shutil.copytree(shapes, tmp_path / "spoilt")

    def spoil(split: str, *numbers: int):
        files = sorted((data / f"{split}2017").iterdir())
        for way, number in enumerate(numbers):
            content = files[number].read_bytes()
            # An empty file, text, and a truncated image.
            files[number].write_bytes((b"", b"no image", content[: len(content) // 2])[way % 3])
        return [files[number] for number in numbers]

    return data, spoil


@pytest.mark.parametrize("cache, workers", LOADING)
def test_training_goes_on_with_another_image(spoilt, tmp_path, capsys, cache, workers):
    data, spoil = spoilt
    bad = spoil("train", 0, 3, 7)
    argv = ["--epochs", "2", "--num_workers", workers, "--batch_size", "12", "--limit_val", "1", *cache]
    assert train("detr", data, tmp_path / "out", *argv) == 0
    text = capsys.readouterr().out
    # Each file is reported once, although both epochs read it.
    assert text.count(f"data: 3 of 12 images in {data / 'train2017'} cannot be read; others take their places") == 1
    for path in bad:
        assert text.count(f"{path}: not an image that can be read whole") == 1
    assert [row["unreadable_images"] for row in read_log(tmp_path / "out")] == [3, 3]


def test_replacements_do_not_depend_on_workers_cache_or_resume(spoilt, tmp_path):
    data, spoil = spoilt
    spoil("train", 1, 5, 6, 10)
    logs = []
    for number, argv in enumerate((["--num_workers", "2"], ["--cache_mode", "decoded"])):
        output = tmp_path / str(number)
        assert train("detr", data, output, "--epochs", "1", "--limit_val", "1", *argv) == 0
        assert train("detr", data, output, "--epochs", "2", "--limit_val", "1", *argv, "--auto_resume") == 0
        logs.append(output)
    whole = tmp_path / "whole"
    assert train("detr", data, whole, "--epochs", "2", "--limit_val", "1") == 0
    for output in logs:
        ours, theirs = (load_checkpoint(str(folder / "checkpoint.pth")) for folder in (output, whole))
        assert equal_states(ours["model"], theirs["model"])


def test_each_epoch_draws_another_readable_replacement(spoilt):
    data, spoil = spoilt
    spoil("train", 2, 4)
    dataset = CocoDetection(*find_split(str(data), "train"), eval_transforms(64, 96), on_unreadable="replace")
    drawn = []
    for epoch in range(12):
        dataset.set_epoch(epoch)
        image, target = dataset[2]
        drawn.append(int(target["image_id"]))
        # The image and the boxes belong together.
        other, expected = dataset[dataset.image_ids.index(drawn[-1])]
        assert torch.equal(image, other) and torch.equal(target["boxes"], expected["boxes"])
    assert len(set(drawn)) > 3
    assert dataset.image_ids[2] not in drawn and dataset.image_ids[4] not in drawn
    # Only images that were tried are counted as unreadable.
    assert set(dataset.unreadable()) <= {2, 4} and 2 in dataset.unreadable()


@pytest.mark.parametrize("cache", CACHES, ids=" ".join)
def test_evaluation_counts_objects_of_unreadable_images_as_missed(spoilt, tmp_path, capsys, cache):
    data, spoil = spoilt
    argv = ["--epochs", "1", "--batch_size", "2", *cache]
    assert train("detr", data, tmp_path / "out", *argv) == 0
    (bad, *_) = spoil("val", 0, 1, 3)  # a whole batch, and one image of another
    capsys.readouterr()
    resume = ["--resume", tmp_path / "out" / "checkpoint.pth", "--eval"]
    assert train("detr", data, tmp_path / "eval", *argv, *resume) == 0
    text = capsys.readouterr().out
    assert f"data: 3 of 6 images in {data / 'val2017'} cannot be read; their objects count as missed" in text
    assert text.count(f"{bad}: not an image") == 1
    found = Counter(result["image_id"] for result in json.loads((tmp_path / "eval" / "results.json").read_text()))
    assert len(found) == 3 and set(found.values()) == {8}
    # The metrics still cover all six images.
    assert json.loads((tmp_path / "eval" / EVALUATION).read_text())["images"] == 6


@pytest.mark.parametrize(
    "split, cache, workers",
    [*(("train", *loading) for loading in LOADING), ("train", [], "0"), ("val", CACHES[2], "0")],
)
def test_strict_data_ends_the_run_at_the_first_unreadable_image(spoilt, tmp_path, capsys, split, workers, cache):
    data, spoil = spoilt
    (bad,) = spoil(split, 2)
    argv = ["--epochs", "1", "--strict_data", "--num_workers", workers, *cache]
    assert train("detr", data, tmp_path / "out", *argv) == 2
    error = capsys.readouterr().err
    assert re.search(f"error: {re.escape(str(bad))}: (not an image|its header does not)", error)
    assert "Traceback" not in error


@pytest.mark.parametrize("cache, workers", LOADING)
def test_mostly_unreadable_images_end_the_run(spoilt, tmp_path, capsys, workers, cache):
    data, spoil = spoilt
    spoil("train", *range(0, 7))
    argv = ["--epochs", "3", "--num_workers", workers, "--batch_size", "12", *cache]
    assert train("detr", data, tmp_path / "out", *argv) == 2
    error = capsys.readouterr().err
    assert re.search(r"error: .*\b\d+ of \d+ images .*cannot be read", error) and "Traceback" not in error


def test_half_of_the_images_may_be_unreadable_even_if_they_come_first(spoilt):
    data, spoil = spoilt
    spoil("train", 0, 1, 2, 3, 4, 5)
    dataset = CocoDetection(*find_split(str(data), "train"), eval_transforms(64, 96), on_unreadable="replace")
    # Six of twelve are not more than half of the data set, although all images tried first are bad.
    assert all(dataset[i] is not None for i in range(12))
    assert dataset.unreadable() == list(range(6))
    with pytest.raises(UserError, match="train2017: 7 of 1. images tried cannot be read, most recently"):
        spoil("train", 11)
        dataset._state.zero_()
        for i in reversed(range(12)):
            dataset[i]


def test_a_batch_without_a_readable_image_is_none(spoilt):
    data, spoil = spoilt
    spoil("val", 1, 2)
    dataset = CocoDetection(*find_split(str(data), "val"), eval_transforms(64, 96), on_unreadable="leave out")
    assert dataset[1] is None and collate([dataset[1], dataset[2]]) is None
    samples, targets = collate([dataset[i] for i in range(4)])
    assert len(samples.tensors) == 2 and [int(t["image_id"]) for t in targets] == [dataset.image_ids[i] for i in (0, 3)]


def test_an_unknown_value_of_on_unreadable_is_refused(shapes):
    with pytest.raises(ValueError, match="on_unreadable must be one of raise, replace, leave out, got 'skip'"):
        CocoDetection(*find_split(str(shapes), "val"), eval_transforms(64, 96), on_unreadable="skip")


@pytest.mark.parametrize(
    "end, said",
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "signal: Killed. .*out of memory.*fewer --num_workers"),
        (lambda: os._exit(3), "exited unexpectedly.*--num_workers 0 to load in the main process"),
    ],
    ids=["killed", "exit"],
)
def test_the_death_of_a_loading_process_is_reported_with_its_cause(shapes, tmp_path, monkeypatch, capsys, end, said):
    original = images.read_file

    def read(path):
        if multiprocessing.parent_process() is not None:
            end()
        return original(path)

    monkeypatch.setattr(images, "read_file", read)
    assert train("detr", shapes, tmp_path, "--epochs", "1", "--num_workers", "2") == 1
    error = capsys.readouterr().err
    assert re.search(f"stopped: an image-loading process died: .*{said}", error) and "Traceback" not in error


def test_other_errors_are_not_taken_for_the_death_of_a_loading_process():
    text = "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out"
    assert "--shm-size" in worker_death(RuntimeError(text))
    assert worker_death(RuntimeError("CUDA out of memory")) is None
    assert worker_death(ValueError(text)) is None
