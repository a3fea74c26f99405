"""Splits into train and val: stratified, seeded, whole groups, unchanged annotations, refusals."""

import json
from collections import Counter

import numpy as np
import pytest
from test_convert import save_image, write

from enact_common import split
from enact_common.data.annotations import find_split


def make(root, images, categories=("cell", "plate", "rod")):
    """A folder of images and its JSON; `images` maps each file name to the indices of its objects' classes."""
    (root / "images").mkdir(parents=True)
    entries, annotations = [], []
    for i, (name, classes) in enumerate(images.items(), start=1):
        save_image(root / "images" / name, seed=i)
        entries.append({"id": i, "file_name": name, "width": 60, "height": 40, "camera": "x"})
        for category in classes:
            box = {"bbox": [1, 2, 10, 20], "segmentation": {"size": [40, 60], "counts": "abc"}, "score": 0.5}
            annotations.append({"id": len(annotations) + 5, "image_id": i, "category_id": category, **box})
    named = [{"id": i, "name": name} for i, name in enumerate(categories)]
    data = {"info": {"year": 2026}, "images": entries, "annotations": annotations, "categories": named}
    write(root / "all.json", json.dumps(data))
    return root


def run(root, out, *argv) -> int:
    return split.main([str(root / "images"), str(root / "all.json"), "--output_dir", str(out), *map(str, argv)])


def parts(out) -> dict[str, dict]:
    return {part: json.loads(find_split(str(out), part)[1].read_text()) for part in ("train", "val")}


def names_in(out) -> dict[str, set[str]]:
    return {part: {image["file_name"] for image in data["images"]} for part, data in parts(out).items()}


TEN = {f"{i}.png": [i % 2] for i in range(10)}


def test_a_split_keeps_all_entries_unchanged(tmp_path, capsys):
    root = make(tmp_path / "in", TEN)
    assert run(root, tmp_path / "out") == 0
    whole, both = json.loads((root / "all.json").read_text()), parts(tmp_path / "out")
    for key in ("images", "annotations"):
        joined = sorted((entry for data in both.values() for entry in data[key]), key=lambda entry: entry["id"])
        assert joined == whole[key]
    assert all(data["categories"] == whole["categories"] and data["info"] == whole["info"] for data in both.values())
    assert len(both["val"]["images"]) == 2
    assert Counter(a["category_id"] for a in both["val"]["annotations"]) == {0: 1, 1: 1}
    for part, data in both.items():
        folder = find_split(str(tmp_path / "out"), part)[0]
        assert sorted(path.name for path in folder.iterdir()) == sorted(i["file_name"] for i in data["images"])
    assert "Next:" in capsys.readouterr().out


def test_the_seed_decides_the_split(tmp_path):
    root = make(tmp_path / "in", TEN)
    chosen = {}
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        assert run(root, tmp_path / name, "--seed", seed) == 0
        chosen[name] = names_in(tmp_path / name)
    assert chosen["first"] == chosen["again"] != chosen["other"]


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5])
def test_each_class_is_split_by_the_fraction(fraction):
    rng = np.random.default_rng(0)
    images = []
    for _ in range(400):
        # The last class is in one of fifty images, the first in every second.
        classes = [k for k, chance in enumerate((0.5, 0.2, 0.1, 0.02)) if rng.random() < chance]
        images.append(Counter({None: 1} | dict.fromkeys(classes, 1)))
    val = split.split_groups(images, fraction, seed=3)
    total, chosen = sum(images, Counter()), sum((images[i] for i in val), Counter())
    for key, count in total.items():
        assert abs(chosen[key] - count * fraction) <= max(1.5, 0.02 * count), key


def test_groups_stay_together(tmp_path, capsys):
    images = {f"{patient}_{i}.png": [patient % 3] for patient in range(8) for i in range(patient % 4 + 1)}
    root = make(tmp_path / "in", images | {"alone.png": []})
    assert run(root, tmp_path / "out", "--group_by", "^([0-9]+)_", "--val_fraction", 0.3) == 0
    chosen = names_in(tmp_path / "out")
    patients = {part: {name.split("_")[0] for name in names} for part, names in chosen.items()}
    assert not patients["train"] & patients["val"]
    assert set().union(*chosen.values()) == {*images, "alone.png"}
    assert 4 <= len(chosen["val"]) <= 9
    assert "alone.png" in capsys.readouterr().out


def test_folders_can_be_groups_and_a_class_of_one_group_is_reported(tmp_path, capsys):
    images = {f"{folder}/{i}.png": [k] for k, folder in enumerate("abc") for i in range(2)}
    root = make(tmp_path / "in", images)
    assert run(root, tmp_path / "out", "--group_by", "^(.*)/") == 0
    assert len({name[0] for name in names_in(tmp_path / "out")["val"]}) == 1
    assert "classes whose images are all in one split" in " ".join(capsys.readouterr().out.split())


def test_missing_files_and_orphans_are_left_out_and_give_status_1(tmp_path, capsys):
    root = make(tmp_path / "in", TEN)
    data = json.loads((root / "all.json").read_text())
    data["annotations"] += [{"id": 90, "image_id": 99, "category_id": 0}, {"image_id": 1, "category_id": 9}, None]
    data["annotations"] += [{"image_id": [1], "category_id": 0}, {"image_id": 1, "category_id": {}}]
    write(root / "all.json", json.dumps(data))
    (root / "images" / "3.png").unlink()
    assert run(root, tmp_path / "out") == 1
    assert "3.png" not in set().union(*names_in(tmp_path / "out").values())
    report = (tmp_path / "out" / "conversion.txt").read_text()
    assert "the file does not list: left out: 5" in report and "3.png" in report


def test_a_file_that_is_listed_twice_is_in_one_part(tmp_path):
    root = make(tmp_path / "in", {"a.png": [0], "b.png": [0]})
    data = json.loads((root / "all.json").read_text())
    data["images"] += [{**image, "id": image["id"] + 10} for image in data["images"]]
    write(root / "all.json", json.dumps(data))
    assert run(root, tmp_path / "out", "--val_fraction", "0.5") == 0
    names = names_in(tmp_path / "out")
    assert len(names["train"]) == len(names["val"]) == 1 and names["train"] != names["val"]


@pytest.mark.parametrize(
    "images, argv, said",
    [
        ({"a.png": [0]}, (), "has all 1 images in one group"),
        (TEN, ("--group_by", "png"), "--group_by png puts all 10 images in one group"),
        (TEN, ("--group_by", "x"), "--group_by x: matches no file_name, such as 0.png"),
        (TEN, ("--seed", "-1"), "--seed -1: must be 0 or more"),
        ({}, (), "the list 'images' is empty"),
        ({"../a.png": [0], "b.png": [0]}, (), "not a file below"),
    ],
)
def test_data_that_cannot_be_split_are_refused(images, argv, said, tmp_path, capsys):
    assert run(make(tmp_path / "in", images), tmp_path / "out", *argv) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv", [("--group_by", "("), ("--val_fraction", "1")])
def test_values_that_are_no_pattern_or_fraction_are_refused(argv, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(make(tmp_path / "in", TEN), tmp_path / "out", *argv)
    assert argv[0] in capsys.readouterr().err


def test_wrong_folders_are_refused(tmp_path, capsys):
    root = make(tmp_path / "in", TEN)
    (tmp_path / "empty").mkdir()
    for folder, said in (("nothing", "no such folder"), ("empty", "none of its 10 images is in")):
        argv = [str(tmp_path / folder), str(root / "all.json"), "--output_dir", str(tmp_path / "out")]
        assert split.main(argv) == 2
        assert said in capsys.readouterr().err
    assert run(root, root / "images") == 2
    assert "the folder is not empty" in capsys.readouterr().err
