"""Conversion of Pascal VOC and YOLO to COCO's layout: boxes, reports and refusals."""

import json
import os
import shutil
import signal
from collections import defaultdict
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import pytest
import yaml
from conftest import SMALL_MODEL, real_data, run
from PIL import Image

from enact_common.convert import __main__ as convert_command
from enact_common.data.annotations import find_split, load_annotations
from enact_common.data.checks import __main__ as checks_command
from enact_common.data.coco import CocoDetection
from enact_common.data.transforms import eval_transforms
from enact_common.utils.signals import Interrupted, interruption

SIZE = (60, 40)  # width and height of the small images, in pixels


def save_image(path: Path, size=SIZE, seed: int = 0, **options) -> Path:
    """Save an image of noise; every seed gives a different image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def voc_xml(objects=(), size=SIZE, filename="", declared: str = "") -> str:
    """A VOC annotation; objects are (name, xmin, ymin, xmax, ymax) or the same with difficult appended."""
    text = f'<?xml version="1.0" encoding="utf-8"?>{declared}<annotation><filename>{escape(filename)}</filename>'
    if size:
        text += f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    for name, *box in objects:
        sides = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=False))
        difficult = f"<difficult>{box[4]}</difficult>" if len(box) > 4 else ""
        # A part has a separate box, which must not be taken for the object's.
        part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
        text += f"<object><name>{escape(name)}</name>{difficult}{part}<bndbox>{sides}</bndbox></object>"
    return text + "</annotation>"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


CELL = ("cell", 11, 6, 30, 25)


@pytest.fixture
def voc(tmp_path) -> Path:
    """A flat folder of four images with one object each; tests change a.jpg."""
    root = tmp_path / "voc"
    for i, name in enumerate("abcd"):
        save_image(root / f"{name}.jpg", seed=i)
        write(root / f"{name}.xml", voc_xml([CELL]))
    return root


@pytest.fixture
def yolo(tmp_path) -> Path:
    """images/train, images/val, labels and data.yaml: two images with one object each in train, one in val."""
    root = tmp_path / "yolo"
    for i, name in enumerate(("train/a", "train/b", "val/c")):
        save_image(root / "images" / f"{name}.jpg", seed=i)
        write(root / "labels" / f"{name}.txt", "0 0.5 0.5 0.5 0.25\n")
    write(root / "data.yaml", "train: images/train\nval: images/val\nnames: [cell, plate]\n")
    return root


def convert_to(out: Path, *argv) -> int:
    return convert_command.main([*map(str, argv), "--output_dir", str(out)])


def boxes_of(out: Path, split: str) -> dict[str, list]:
    """The sorted (class, x, y, width, height) of each image in a split; empty for an image without objects."""
    data = load_annotations(out / "annotations" / f"instances_{split}2017.json")
    files = {image["id"]: image["file_name"] for image in data["images"]}
    names = {category["id"]: category["name"] for category in data["categories"]}
    boxes = {name: [] for name in files.values()}
    for annotation in data["annotations"]:
        boxes[files[annotation["image_id"]]].append((names[annotation["category_id"]], *annotation["bbox"]))
    return {name: sorted(own) for name, own in boxes.items()}


def all_boxes(out: Path) -> dict[str, list]:
    return boxes_of(out, "train") | boxes_of(out, "val")


def annotations_of(out: Path, stem: str) -> list[dict]:
    """The annotations of the image with this stem, in either split."""
    for split in ("train", "val"):
        data = json.loads((out / "annotations" / f"instances_{split}2017.json").read_text())
        ids = [image["id"] for image in data["images"] if Path(image["file_name"]).stem == stem]
        if ids:
            return [annotation for annotation in data["annotations"] if annotation["image_id"] in ids]
    raise AssertionError(f"{stem} is in neither split")


# Round trips --------------------------------------------------------------------------------------------------------


def write_as_voc(coco: Path, root: Path) -> None:
    """Write a COCO-format data set in VOC2007's layout: corners count from 1 and are inclusive."""
    for split in ("train", "val"):
        folder, file = find_split(str(coco), split)
        data, boxes = load_annotations(file), defaultdict(list)
        names = {category["id"]: category["name"] for category in data["categories"]}
        for a in data["annotations"]:
            x, y, w, h = a["bbox"]
            boxes[a["image_id"]].append((names[a["category_id"]], x + 1, y + 1, x + w, y + h))
        stems = []
        for image in data["images"]:
            stem = f"{split} {Path(image['file_name']).stem}"
            stems.append(stem)
            place = root / "JPEGImages" / f"{stem}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / image["file_name"], place)
            xml = voc_xml(boxes[image["id"]], (image["width"], image["height"]))
            write(root / "Annotations" / f"{stem}.xml", xml)
        write(root / "ImageSets" / "Main" / f"{split}.txt", "\n".join(stems))


def write_as_yolo(coco: Path, root: Path) -> None:
    """Write a COCO-format data set in YOLO's layout with data.yaml; fractions have six digits."""
    for split in ("train", "val"):
        folder, file = find_split(str(coco), split)
        data, lines = load_annotations(file), defaultdict(list)
        index = {category["id"]: i for i, category in enumerate(data["categories"])}
        sizes = {image["id"]: (image["width"], image["height"]) for image in data["images"]}
        for a in data["annotations"]:
            (x, y, w, h), (width, height) = a["bbox"], sizes[a["image_id"]]
            numbers = (x + w / 2) / width, (y + h / 2) / height, w / width, h / height
            lines[a["image_id"]].append(" ".join([str(index[a["category_id"]]), *(f"{n:.6f}" for n in numbers)]))
        for image in data["images"]:
            name = f"{split} {Path(image['file_name']).stem}"
            place = root / "images" / split / f"{name}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / image["file_name"], place)
            write(root / "labels" / split / f"{name}.txt", "\n".join(lines[image["id"]]))
    names = {i: category["name"] for i, category in enumerate(data["categories"])}
    config = {"path": ".", "train": "images/train", "val": "images/val", "names": names}
    write(root / "data.yaml", yaml.safe_dump(config))


WRITERS = {"voc": write_as_voc, "yolo": write_as_yolo}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("data", ["shapes", pytest.param("bccd", marks=pytest.mark.slow)])
def test_boxes_survive_a_round_trip(kind, data, request, tmp_path, capsys):
    coco = request.getfixturevalue("shapes") if data == "shapes" else real_data("ENACT_BCCD")
    WRITERS[kind](coco, tmp_path / "other")
    assert convert_to(tmp_path / "out", kind, tmp_path / "other") == 0
    for split in ("train", "val"):
        folder, file = find_split(str(coco), split)
        original = load_annotations(file)
        bounds = {image["file_name"]: (image["width"], image["height"]) for image in original["images"]}
        names = {category["id"]: category["name"] for category in original["categories"]}
        files = {image["id"]: image["file_name"] for image in original["images"]}
        expected = {f"{split} {Path(name).stem}.jpg": [] for name in bounds}
        for a in original["annotations"]:
            name, (x, y, w, h) = files[a["image_id"]], a["bbox"]
            width, height = bounds[name]
            x1, y1 = min(x + w, width), min(y + h, height)
            x, y = max(x, 0), max(y, 0)
            expected[f"{split} {Path(name).stem}.jpg"].append((names[a["category_id"]], x, y, x1 - x, y1 - y))
        converted = boxes_of(tmp_path / "out", split)
        assert set(converted) == set(expected)
        for name, boxes in expected.items():
            assert [box[0] for box in converted[name]] == [box[0] for box in sorted(boxes)]
            for own, box in zip(in_stable_order(converted[name]), in_stable_order(boxes), strict=True):
                np.testing.assert_allclose(own[1:], box[1:], atol=2e-3)
    assert "enact_common check" in capsys.readouterr().out


def in_stable_order(boxes: list) -> list:
    """Sort boxes by rounded values, so that the last digits do not change the order."""
    return sorted(boxes, key=lambda box: (box[0], *(round(side) for side in box[1:])))


@pytest.mark.parametrize("kind", WRITERS)
def test_converted_data_passes_the_checks_and_trains(kind, shapes, tmp_path):
    out = tmp_path / "out"
    WRITERS[kind](shapes, tmp_path / "other")
    assert convert_to(out, kind, tmp_path / "other") == 0
    assert checks_command.main([str(out)]) == 0
    data = CocoDetection(*find_split(str(out), "train"), eval_transforms(64, 96))
    image, target = data[0]
    assert image.shape[0] == 3 and len(target["labels"]) > 0
    assert target["boxes"].min() >= 0 and target["boxes"].max() <= 1
    argv = [*SMALL_MODEL["conditional"], "--coco_path", out, "--output_dir", tmp_path / "run", "--epochs", "1"]
    assert run("conditional", *argv, "--limit_train", "4", "--limit_val", "2") == 0


# Pascal VOC ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, box", [((), [10, 5, 20, 20]), (("--zero_based",), [11, 6, 19, 19])])
def test_voc_counts_pixels_from_1_unless_zero_based(voc, tmp_path, flags, box):
    assert convert_to(tmp_path / "out", "voc", voc, *flags) == 0
    (annotation,) = annotations_of(tmp_path / "out", "a")
    assert annotation["bbox"] == box and annotation["area"] == box[2] * box[3]


def test_a_box_of_the_whole_image_is_not_clipped(voc, tmp_path, capsys):
    write(voc / "a.xml", voc_xml([("cell", 1, 1, *SIZE)]))
    assert convert_to(tmp_path / "out", "voc", voc) == 0
    assert annotations_of(tmp_path / "out", "a")[0]["bbox"] == [0, 0, *SIZE]
    assert "clipped" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "objects, boxes, text",
    [
        ([("cell", 41, 31, 70, 50)], [[40, 30, 20, 10]], "reach beyond the image: clipped"),
        ([("cell", 71, 31, 90, 50), CELL], [[10, 5, 20, 20]], "without area inside the image: dropped"),
        ([("cell", 20, 10, 5, 30), CELL], [[10, 5, 20, 20]], "without area inside the image: dropped"),
        ([("cell", 0, 10, 5, 30)], [[0, 9, 5, 21]], "are they --zero_based?"),
    ],
)
def test_voc_boxes_beyond_the_image_are_clipped_or_dropped_and_named(voc, tmp_path, capsys, objects, boxes, text):
    write(voc / "a.xml", voc_xml(objects))
    assert convert_to(tmp_path / "out", "voc", voc) == 0
    assert [annotation["bbox"] for annotation in annotations_of(tmp_path / "out", "a")] == boxes
    printed, report = capsys.readouterr().out, (tmp_path / "out" / "conversion.txt").read_text()
    assert text in " ".join(printed.split()) and f"{voc / 'a.xml'}: object 1, cell" in printed
    assert f"{text}: 1\n" in report


@pytest.mark.parametrize(
    "objects, shown",
    [
        ([("cell", "x", 1, 5, 5)], "object 1, cell: x, 1, 5, 5"),
        ([("cell", 1, 1, 5)], "object 1, cell: 1, 1, 5, ?"),
        ([("cell", "nan", 1, 5, 5)], "object 1, cell: nan, 1, 5, 5"),
        ([("", 1, 1, 5, 5)], "object 1, without a name"),
    ],
)
def test_invalid_voc_objects_are_named_and_give_status_1(voc, tmp_path, capsys, objects, shown):
    write(voc / "a.xml", voc_xml([*objects, CELL]))
    assert convert_to(tmp_path / "out", "voc", voc) == 1
    assert len(annotations_of(tmp_path / "out", "a")) == 1
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize("size", [None, (40, 60), ("?", 40)])
def test_the_image_files_size_overrides_the_xml(voc, tmp_path, capsys, size):
    write(voc / "a.xml", voc_xml([CELL], size=size))
    assert convert_to(tmp_path / "out", "voc", voc) == 0
    assert "the image is 60 x 40" in capsys.readouterr().out
    data = json.loads((tmp_path / "out" / "annotations" / "instances_train2017.json").read_text())
    assert {(image["width"], image["height"]) for image in data["images"]} == {SIZE}


def test_difficult_objects_keep_their_mark(voc, tmp_path):
    write(voc / "a.xml", voc_xml([(*CELL, 1), ("plate", 1, 1, 5, 5, 0)]))
    assert convert_to(tmp_path / "out", "voc", voc) == 0
    assert [annotation.get("difficult") for annotation in annotations_of(tmp_path / "out", "a")] == [1, None]


def test_classes_are_sorted_or_in_the_given_order(voc, tmp_path, capsys):
    write(voc / "a.xml", voc_xml([("plate", 1, 1, 5, 5), CELL, ("Zelle", 1, 1, 9, 9)]))

    def categories(out, *flags):
        assert convert_to(out, "voc", voc, *flags) == 0
        data = json.loads((out / "annotations" / "instances_val2017.json").read_text())
        return {category["id"]: category["name"] for category in data["categories"]}

    assert categories(tmp_path / "sorted") == {1: "Zelle", 2: "cell", 3: "plate"}
    capsys.readouterr()
    assert categories(tmp_path / "asked", "--classes", "plate", "cell", "fork") == {1: "plate", 2: "cell", 3: "fork"}
    text = capsys.readouterr().out
    assert "object 3, Zelle" in text and "classes without objects" in text and "- fork" in text


ENTITIES = '<!DOCTYPE a [<!ENTITY b "&c;&c;"><!ENTITY c "ha">]>'


@pytest.mark.parametrize(
    "text, reason",
    [
        (voc_xml([CELL], filename="&b;", declared=ENTITIES), "document type"),
        (voc_xml([CELL], declared='<!DOCTYPE a SYSTEM "file:///etc/hostname">'), "document type"),
        ("<annotation><object>", "no element found"),
        ("<html></html>", "its root is <html>"),
        ("", "no element found"),
    ],
)
def test_unreadable_xml_files_are_left_out_with_their_images(voc, tmp_path, capsys, text, reason):
    write(voc / "a.xml", text)
    assert convert_to(tmp_path / "out", "voc", voc) == 1
    assert "a.jpg" not in all_boxes(tmp_path / "out") and len(all_boxes(tmp_path / "out")) == 3
    printed = capsys.readouterr().out
    assert f"{voc / 'a.xml'}: " in printed and reason in printed


def make_kit(root: Path, names: str, lists: dict[str, str], seed: int = 0) -> Path:
    """Write a folder like VOC2007 with one image per letter, and image lists."""
    for i, name in enumerate(names):
        save_image(root / "JPEGImages" / f"{name}.jpg", seed=seed + i)
        write(root / "Annotations" / f"{name}.xml", voc_xml([CELL]))
    for name, letters in lists.items():
        write(root / "ImageSets" / "Main" / f"{name}.txt", "\n".join(letters) + "\n")
    return root


@pytest.mark.parametrize(
    "lists, flags, train, val",
    [
        ({"train": "ab", "val": "c", "trainval": "abc", "test": "d"}, (), "ab", "c"),
        ({"trainval": "abc", "test": "d"}, (), "abc", "d"),
        ({"train": "ab", "test": "cd"}, (), "ab", "cd"),
        (
            {"train": "ab", "val": "c", "trainval": "abc", "test": "d"},
            ("--train_set", "trainval", "--val_set", "test"),
            "abc",
            "d",
        ),
    ],
)
def test_lists_decide_the_splits(tmp_path, lists, flags, train, val):
    kit = make_kit(tmp_path / "VOC2007", "abcd", lists)
    assert convert_to(tmp_path / "out", "voc", kit, *flags) == 0
    assert "".join(Path(name).stem for name in boxes_of(tmp_path / "out", "train")) == train
    assert "".join(Path(name).stem for name in boxes_of(tmp_path / "out", "val")) == val


def test_several_kits_with_equal_names_are_merged(tmp_path):
    for i, year in enumerate(("VOC2007", "VOC2012")):
        make_kit(tmp_path / "VOCdevkit" / year, "abc", {"train": "ab", "val": "c"}, seed=10 * i)
    assert convert_to(tmp_path / "out", "voc", tmp_path / "VOCdevkit") == 0
    assert len(boxes_of(tmp_path / "out", "train")) == 4
    assert set(boxes_of(tmp_path / "out", "val")) == {"VOC2007/JPEGImages/c.jpg", "VOC2012/JPEGImages/c.jpg"}


def test_a_listed_but_missing_image_is_named(tmp_path, capsys):
    kit = make_kit(tmp_path / "VOC2007", "abc", {"train": "abz", "val": "c"})
    assert convert_to(tmp_path / "out", "voc", kit) == 1
    assert "train.txt: z" in capsys.readouterr().out


def flat_folders(root: Path, split: str, seed: int) -> None:
    """A Roboflow export: images and XML files in one folder per split."""
    for i, name in enumerate("ab"):
        save_image(root / split / f"{name}.jpg", seed=seed + i)
        write(root / split / f"{name}.xml", voc_xml([CELL]))


def one_kit_per_split(root: Path, split: str, seed: int) -> None:
    make_kit(root / split, "ab", {}, seed)


def folders_in_one_kit(root: Path, split: str, seed: int) -> None:
    for i, name in enumerate("ab"):
        save_image(root / "JPEGImages" / split / f"{name}.jpg", seed=seed + i)
        write(root / "Annotations" / split / f"{name}.xml", voc_xml([CELL]))


def split_of_images(out: Path, root: Path) -> dict[str, set[str]]:
    """The split-like source folders of the images in each output split."""
    origins = {}
    for split in ("train", "val"):
        converted = [out / f"{split}2017" / name for name in boxes_of(out, split)]
        sources = [path for place in converted for path in root.rglob("*.jpg") if os.path.samefile(path, place)]
        assert len(sources) == len(converted)
        origins[split] = {part for path in sources for part in path.relative_to(root).parts if part in FOLDERS}
    return origins


FOLDERS = ("train", "val", "valid", "validation", "test")


@pytest.mark.parametrize("arrange", [flat_folders, one_kit_per_split, folders_in_one_kit])
@pytest.mark.parametrize(
    "names, flags, train, val, left_out",
    [
        (("train", "val", "test"), (), "train", "val", "test"),
        (("train", "valid", "test"), (), "train", "valid", "test"),
        (("train", "validation"), (), "train", "validation", None),
        (("train", "test"), (), "train", "test", None),
        (("train", "valid", "test"), ("--train_set", "train", "--val_set", "test"), "train", "test", "valid"),
    ],
)
def test_folders_decide_the_splits(tmp_path, capsys, arrange, names, flags, train, val, left_out):
    root = tmp_path / "voc"
    for i, name in enumerate(names):
        arrange(root, name, 10 * i)
    assert convert_to(tmp_path / "out", "voc", root, *flags) == 0
    assert split_of_images(tmp_path / "out", root) == {"train": {train}, "val": {val}}
    text = capsys.readouterr().out
    assert "drawn at random" not in text
    assert ("in neither split: left out" in text) == bool(left_out)
    assert left_out is None or f"{left_out}: 2 images" in text or f"{left_out}/JPEGImages: 2 images" in text


def test_lists_override_folders(tmp_path):
    kit = make_kit(tmp_path / "VOC2007", "ab", {"train": ["a", "train/a"], "val": ["val/a"]})
    for i, name in enumerate(("train", "val")):
        folders_in_one_kit(kit, name, 10 * (i + 1))
    assert convert_to(tmp_path / "out", "voc", kit) == 0
    assert set(boxes_of(tmp_path / "out", "train")) == {"a.jpg", "train/a.jpg"}


def test_missing_split_folders_are_named(tmp_path, capsys):
    for name in ("train", "valid"):
        flat_folders(tmp_path / "voc", name, 0)
    flags = ("--train_set", "train", "--val_set", "val")
    assert convert_to(tmp_path / "out", "voc", tmp_path / "voc", *flags) == 2
    assert "no folder val with annotated images" in (error := capsys.readouterr().err)
    assert "lists: none; folders: train, valid" in error


@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_a_random_split_is_reported(kind, request, tmp_path, capsys):
    root = request.getfixturevalue(kind)
    if kind == "yolo":
        write(root / "data.yaml", "train: [images/train, images/val]\nnames: [cell, plate]\n")
    assert convert_to(tmp_path / "out", kind, root, "--val_fraction", 0.4, "--seed", 7) == 0
    drawn, whole = (2, 4) if kind == "voc" else (1, 3)
    text = " ".join(capsys.readouterr().out.split())
    assert "warning 1 images drawn at random for val" in text
    assert f"- {drawn} of {whole}, by --val_fraction 0.4 and --seed 7" in text


def test_without_lists_the_split_depends_on_the_seed(voc, tmp_path):
    drawn = {}
    for name, flags in {"0": (), "again": (), "1": ("--seed", 1), "half": ("--val_fraction", 0.5)}.items():
        assert convert_to(tmp_path / name, "voc", voc, *flags) == 0
        drawn[name] = [set(boxes_of(tmp_path / name, split)) for split in ("train", "val")]
        assert drawn[name][0] | drawn[name][1] == {"a.jpg", "b.jpg", "c.jpg", "d.jpg"}
        assert not drawn[name][0] & drawn[name][1]
    assert drawn["0"] == drawn["again"] != drawn["1"]
    assert len(drawn["0"][1]) == 1 and len(drawn["half"][1]) == 2


def test_equal_names_in_sub_folders_and_names_in_any_script(tmp_path):
    root = tmp_path / "été"
    for i, name in enumerate(("x/1", "y/1", "y/Blut Zelle ß", "y/細胞 2.v1")):
        save_image(root / "pictures" / f"{name}.png", seed=i)
        write(root / "marks" / f"{name}.xml", voc_xml([("globule élevé", 1 + i, 1, 20, 20)]))
    assert convert_to(tmp_path / "out", "voc", root) == 0
    boxes = all_boxes(tmp_path / "out")
    assert boxes["x/1.png"] == [("globule élevé", 0, 0, 20, 20)]
    assert boxes["y/1.png"] == [("globule élevé", 1, 0, 19, 20)]
    assert checks_command.main([str(tmp_path / "out")]) == 0


def test_an_xml_file_may_name_an_image_with_another_stem(voc, tmp_path):
    (voc / "a.jpg").rename(voc / "other.jpg")
    write(voc / "a.xml", voc_xml([CELL], filename="C:\\pictures\\other.jpg"))
    assert convert_to(tmp_path / "out", "voc", voc) == 0
    assert "other.jpg" in all_boxes(tmp_path / "out")


def test_voc_files_without_a_partner_are_named(voc, tmp_path, capsys):
    write(voc / "lonely.xml", voc_xml([CELL]))
    save_image(voc / "bare.jpg")
    assert convert_to(tmp_path / "out", "voc", voc) == 1
    text = capsys.readouterr().out
    assert f"- {voc / 'lonely.xml'}" in text and f"- {voc / 'bare.jpg'}" in text
    assert "bare.jpg" not in all_boxes(tmp_path / "out")


# YOLO ----------------------------------------------------------------------------------------------------------------


def test_yolo_boxes_are_fractions_of_centre_and_size(yolo, tmp_path):
    assert convert_to(tmp_path / "out", "yolo", yolo) == 0
    assert boxes_of(tmp_path / "out", "train") == dict.fromkeys(("a.jpg", "b.jpg"), [("cell", 15, 15, 30, 10)])
    data = json.loads((tmp_path / "out" / "annotations" / "instances_val2017.json").read_text())
    assert [category["name"] for category in data["categories"]] == ["cell", "plate"]


def test_polygons_become_boxes_and_segmentations(yolo, tmp_path):
    write(yolo / "labels" / "train" / "a.txt", "1 0.5 0.25 0.75 0.5 0.5 0.75 0.25 0.5\n")
    assert convert_to(tmp_path / "out", "yolo", yolo) == 0
    (annotation,) = annotations_of(tmp_path / "out", "a")
    assert annotation["bbox"] == [15, 10, 30, 20] and annotation["category_id"] == 2
    assert annotation["segmentation"] == [[30, 10, 45, 20, 30, 30, 15, 20]]
    assert annotation["area"] == 300  # a rhombus: half the product of its diagonals, 30 and 20


@pytest.mark.parametrize(
    "line, text",
    [
        ("2 0.5 0.5 0.1 0.1", "class number that has no name"),
        ("-1 0.5 0.5 0.1 0.1", "class number that has no name"),
        ("0 30 20 10 10", "coordinates outside 0 to 1"),
        ("0 0.5 0.5 -0.1 0.1", "coordinates outside 0 to 1"),
        ("0 0.5 0.5 0.1", "neither a box nor an outline"),
        ("0 0.5 0.5 0.1 0.1 0.9", "the sixth number"),
        ("cell 0.5 0.5 0.1 0.1", "neither a box nor an outline"),
        ("0.5 0.5 0.5 0.1 0.1", "neither a box nor an outline"),
        ("0 0.5 0.5 nan 0.1", "neither a box nor an outline"),
    ],
)
def test_invalid_lines_are_named_by_file_and_line(yolo, tmp_path, capsys, line, text):
    file = write(yolo / "labels" / "train" / "a.txt", f"0 0.5 0.5 0.5 0.25\n\n{line}\n")
    assert convert_to(tmp_path / "out", "yolo", yolo) == 1
    assert len(annotations_of(tmp_path / "out", "a")) == 1
    printed = capsys.readouterr().out
    assert text in printed and f"{file}:3: {line}" in printed


def make_poses(root: Path) -> None:
    """Give every object two keypoints with their visibility; 2 is not a fraction."""
    for file in (root / "labels").rglob("*.txt"):
        write(file, "0 0.5 0.5 0.5 0.25 0.1 0.1 2 0.9 0.9 0\n")
    config = root / "data.yaml"
    write(config, config.read_text() + "kpt_shape: [2, 3]\n")


def test_pose_data_gives_boxes_without_keypoints(yolo, tmp_path):
    make_poses(yolo)
    assert convert_to(tmp_path / "out", "yolo", yolo) == 0
    assert boxes_of(tmp_path / "out", "train") == dict.fromkeys(("a.jpg", "b.jpg"), [("cell", 15, 15, 30, 10)])
    assert annotations_of(tmp_path / "out", "a")[0]["segmentation"] == []


@pytest.mark.parametrize("line", ["0 0.5 0.5 0.5 0.25", "0 0.5 0.5 0.5 0.25 0.1 0.1 0.9 0.9"])
def test_pose_lines_of_another_length_are_named(yolo, tmp_path, capsys, line):
    make_poses(yolo)
    file = write(yolo / "labels" / "train" / "a.txt", line)
    assert convert_to(tmp_path / "out", "yolo", yolo) == 1
    assert annotations_of(tmp_path / "out", "a") == []
    text = capsys.readouterr().out
    assert (
        "kpt_shape" in text
        and f"{file}:1: {line} ({len(line.split())} numbers instead of 5 and 6 of keypoints)" in text
    )


def test_yolo_boxes_beyond_the_image_are_clipped_or_dropped_and_named(yolo, tmp_path, capsys):
    file = write(yolo / "labels" / "train" / "a.txt", "0 1 0.5 0.5 0.5\n0 0.5 0.5 0 0.5\n0 0.5 0.5 1.0000001 1\n")
    assert convert_to(tmp_path / "out", "yolo", yolo) == 0
    assert [a["bbox"] for a in annotations_of(tmp_path / "out", "a")] == [[45, 10, 15, 20], [0, 0, 60, 40]]
    text = capsys.readouterr().out
    assert "clipped" in text and f"{file}:1: cell" in text and "dropped" in text and f"{file}:2: cell" in text
    assert f"{file}:3" not in text


def test_missing_and_stray_label_files_are_named(yolo, tmp_path, capsys):
    (yolo / "labels" / "train" / "a.txt").rename(yolo / "labels" / "train" / "z.txt")
    assert convert_to(tmp_path / "out", "yolo", yolo) == 0
    assert boxes_of(tmp_path / "out", "train")["a.jpg"] == []
    text = capsys.readouterr().out
    assert f"- {yolo / 'images' / 'train' / 'a.jpg'}" in text and f"- {yolo / 'labels' / 'train' / 'z.txt'}" in text


def test_label_files_that_are_not_text_are_left_out_with_their_images(yolo, tmp_path, capsys):
    (yolo / "labels" / "train" / "a.txt").write_bytes(b"\xff\xfe\x00")
    assert convert_to(tmp_path / "out", "yolo", yolo) == 1
    assert "a.jpg" not in all_boxes(tmp_path / "out")
    assert "a.txt: not a text file" in capsys.readouterr().out


def path_lists(root: Path) -> None:
    write(root / "lists" / "train.txt", "../images/train/a.jpg\n./images/train/b.jpg\n")
    write(root / "lists" / "val.txt", f"{root / 'images' / 'val' / 'c.jpg'}\n")
    write(root / "data.yaml", "train: lists/train.txt\nval: [lists/val.txt]\nnames: {0: cell, 1: plate}\nnc: 2\n")


def another_machines_path(root: Path) -> None:
    write(root / "data.yaml", "path: ../datasets/mine\ntrain: images/train\nval: images/val\nnames: [cell, plate]\n")


def roboflow_folders(root: Path) -> None:
    for split, name in (("train", "train"), ("val", "valid")):
        for kind in ("images", "labels"):
            (root / name).mkdir(exist_ok=True)
            (root / kind / split).rename(root / name / kind)
    write(root / "data.yaml", "train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['cell', 'plate']\n")


def without_yaml(root: Path) -> None:
    (root / "data.yaml").unlink()
    write(root / "classes.txt", "cell\nplate\n")


def roboflow_folders_without_yaml(root: Path) -> None:
    roboflow_folders(root)
    without_yaml(root)


def several_yamls(root: Path) -> None:
    (root / "data.yaml").rename(root / "mine.yaml")
    write(root / "yours.yaml", "names: [cell]\n")


def without_training_images(root: Path) -> None:
    without_yaml(root)
    (root / "images" / "train").rename(root / "images" / "learning")


@pytest.mark.parametrize(
    "rearrange, flags, said",
    [
        (several_yamls, (), "several YAML files (mine.yaml, yours.yaml); pass one as DIR"),
        (without_yaml, ("--train_set", "learning", "--val_set", "val"), "--train_set learning: neither"),
        (without_training_images, (), "no folder images/train or train/images; pass --train_set and --val_set"),
    ],
)
def test_unclear_yolo_folders_are_refused_with_the_way_out(rearrange, flags, said, yolo, tmp_path, capsys):
    rearrange(yolo)
    assert convert_to(tmp_path / "out", "yolo", yolo, *flags) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "rearrange", [path_lists, another_machines_path, roboflow_folders, without_yaml, roboflow_folders_without_yaml]
)
def test_all_yolo_folder_layouts_are_read(yolo, tmp_path, rearrange, capsys):
    rearrange(yolo)
    assert convert_to(tmp_path / "out", "yolo", yolo) == 0
    assert boxes_of(tmp_path / "out", "train") == dict.fromkeys(("a.jpg", "b.jpg"), [("cell", 15, 15, 30, 10)])
    assert list(boxes_of(tmp_path / "out", "val")) == ["c.jpg"]
    assert "class" in capsys.readouterr().out


def arrange_like_darknet(
    root: Path,
    lists=("train", "valid"),
    subsets=("train", "valid"),
    prefix: str = "data/",
    text: str = "classes = 2\n{lists}names = data/obj.names\nbackup = backup/\n",
) -> None:
    """Rearrange the data like CVAT's "YOLO 1.1": images next to labels, lists, obj.data and obj.names.

    Args:
        root: the folder of the fixture `yolo`.
        lists: keys of the lists in obj.data; None writes no list, although obj.data names it.
        subsets: names of the two parts.
        prefix: of the paths in the lists.
        text: content of obj.data.
    """
    (root / "data.yaml").unlink()
    keys = ""
    for split, key, subset in zip(("train", "val"), lists, subsets, strict=True):
        folder = root / f"obj_{subset}_data"
        (root / "images" / split).rename(folder)
        for label in (root / "labels" / split).iterdir():
            label.rename(folder / label.name)
        keys += f"{key or subset} = data/{subset}.txt\n"
        if key:
            paths = sorted(folder.glob("*.jpg"))
            write(root / f"{subset}.txt", "".join(f"{prefix}{folder.name}/{path.name}\n" for path in paths))
    shutil.rmtree(root / "images")
    shutil.rmtree(root / "labels")
    write(root / "obj.data", text.format(lists=keys))
    write(root / "obj.names", "cell\nplate\n")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lists": ("Train", "Validation"), "subsets": ("Train", "Validation")},
        {"lists": ("train", "val"), "prefix": "/content/darknet/data/"},
        {"prefix": ""},
        {"prefix": "build\\darknet\\data\\"},
        {"prefix": "C:\\Users\\me\\data\\"},
        {"text": "names=obj.names\r\n{lists}"},
    ],
    ids=str,
)
def test_darknets_data_files_are_read(yolo, tmp_path, changes):
    arrange_like_darknet(yolo, **changes)
    for name, data in (("out", yolo), ("named", yolo / "obj.data")):
        assert convert_to(tmp_path / name, "yolo", data) == 0
        assert boxes_of(tmp_path / name, "train") == dict.fromkeys(("a.jpg", "b.jpg"), [("cell", 15, 15, 30, 10)])
        assert list(boxes_of(tmp_path / name, "val")) == ["c.jpg"]


def test_without_cvats_validation_list_the_split_is_drawn_at_random(yolo, tmp_path, capsys):
    arrange_like_darknet(yolo, lists=("train", None))
    assert convert_to(tmp_path / "out", "yolo", yolo) == 0
    assert [len(boxes_of(tmp_path / "out", split)) for split in ("train", "val")] == [1, 1]
    text = " ".join(capsys.readouterr().out.split())
    assert "validation lists that do not exist" in text and "valid = data/valid.txt" in text
    assert "drawn at random" in text and "--val_fraction 0.2" in text


@pytest.mark.parametrize(
    "text, message",
    [
        ("train = data/nothing.txt\nnames = obj.names\n", "names data/nothing.txt, but there is no"),
        ("{lists}names = other.names\n", "names other.names, but there is no such file; pass --classes"),
        ("{lists}", "no class names"),
        ("names = obj.names\n", "'train' names no images; the file has the keys names"),
    ],
)
def test_incomplete_darknet_data_files_are_refused(yolo, tmp_path, capsys, text, message):
    arrange_like_darknet(yolo, text=text)
    assert convert_to(tmp_path / "out", "yolo", yolo) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["/content/data/images/{}", "D:\\data\\images\\{}", ".\\images\\{}"])
def test_paths_of_another_machine_are_found_by_their_ends(yolo, tmp_path, place):
    names = "names: [cell, plate]\n"
    write(yolo / "data.yaml", f"train: '{place.format('train')}'\nval: '{place.format('val')}'\n{names}")
    assert convert_to(tmp_path / "folders", "yolo", yolo) == 0
    for split, letters in (("train", "ab"), ("val", "c")):
        write(yolo / f"{split}.txt", "".join(place.format(f"{split}/{letter}.jpg") + "\n" for letter in letters))
    write(yolo / "data.yaml", f"train: train.txt\nval: val.txt\n{names}")
    assert convert_to(tmp_path / "lists", "yolo", yolo) == 0
    assert all_boxes(tmp_path / "folders") == all_boxes(tmp_path / "lists")
    assert len(all_boxes(tmp_path / "lists")) == 3


def test_a_yaml_file_as_argument_with_other_split_keys(yolo, tmp_path):
    config = write(yolo / "mine.yaml", "fit: images/train\ntest: images/val\nnames: [cell]\n")
    flags = ("--train_set", "fit", "--val_set", "test")
    assert convert_to(tmp_path / "out", "yolo", config, *flags) == 0
    assert list(boxes_of(tmp_path / "out", "val")) == ["c.jpg"]


def test_without_val_a_part_of_train_is_drawn(yolo, tmp_path):
    write(yolo / "data.yaml", "train: [images/train, images/val]\nnames: [cell, plate]\n")
    assert convert_to(tmp_path / "out", "yolo", yolo) == 0
    assert len(boxes_of(tmp_path / "out", "train")) == 2 and len(boxes_of(tmp_path / "out", "val")) == 1


def test_images_in_both_splits_are_named(yolo, tmp_path, capsys):
    write(yolo / "data.yaml", "train: images/train\nval: images/train\nnc: 3\nnames: [cell, plate]\n")
    assert convert_to(tmp_path / "out", "yolo", yolo) == 0
    text = capsys.readouterr().out
    assert "in train and in val" in text and "nc 3, 2 names" in text


@pytest.mark.parametrize(
    "config, message",
    [
        ("- a list", "expected the keys train, val and names"),
        ("train: [", "not a YAML file"),
        ("train: !!python/object/apply:os.getcwd []", "not a YAML file"),
        ("train: elsewhere\nnames: [a]", "names elsewhere, but there is no"),
        ("val: images/val\nnames: [a]", "'train' names no images"),
        ("train: 3\nnames: [a]", "'train' names no images"),
        ("train: images/train\nnames: {1: a, 2: b}", "numbered from 0"),
        ("train: images/train\nnames: cell", "'names' must be class names"),
        ("train: images/train\nnames: [[a], [b]]", "'names' must be class names"),
        ("train: images/train\nnames: [yes, no]", "quote the names: 'yes', 'no'"),
        ("train: images/train\nnames: {0: cell, 1: off}", "quote the names: 'yes', 'no'"),
        ("train: images/train\nnames: [cell]\ndate: 2024-02-30", "not a YAML file (day is out of range"),
        ("train: " + "[" * 800, "not a YAML file"),
        ("train: images/train\nnames: [cell]\nkpt_shape: 17", "like [17, 3]"),
        ("train: images/train\nnames: [cell]\nkpt_shape: [17, x]", "like [17, 3]"),
        ("train: images/train\nnames: [a, a]", "class name a is listed twice"),
        ("train: images/train", "pass --classes"),
    ],
)
def test_invalid_yaml_files_are_refused(yolo, tmp_path, capsys, config, message):
    write(yolo / "data.yaml", config)
    assert convert_to(tmp_path / "out", "yolo", yolo) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


# Folders -------------------------------------------------------------------------------------------------------------


def link_away(folder: Path, place: Path) -> None:
    """Move a folder and replace it by a link."""
    place.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(place)
    folder.symlink_to(place)


@pytest.mark.parametrize("linked", ["images/train", "images/train/sub", "labels/train", "labels/train/sub"])
def test_linked_folders_are_searched_with_labels_next_to_the_link(yolo, tmp_path, linked):
    for kind, name in (("images", "b.jpg"), ("labels", "b.txt")):
        (yolo / kind / "train" / "sub").mkdir()
        (yolo / kind / "train" / name).rename(yolo / kind / "train" / "sub" / name)
    link_away(yolo / linked, tmp_path / "elsewhere" / "pool")
    (yolo / "images" / "train" / "round").symlink_to(yolo / "images")  # a circle
    assert convert_to(tmp_path / "out", "yolo", yolo) == 0
    assert boxes_of(tmp_path / "out", "train") == dict.fromkeys(("a.jpg", "sub/b.jpg"), [("cell", 15, 15, 30, 10)])
    assert "lead in a circle: not followed: 1\n" in (tmp_path / "out" / "conversion.txt").read_text()


@pytest.mark.parametrize("linked", ["JPEGImages", "Annotations", "JPEGImages/sub"])
def test_linked_voc_folders_are_searched(tmp_path, linked):
    root = make_kit(tmp_path / "voc", "abc", {})
    (root / "JPEGImages" / "sub").mkdir()
    (root / "JPEGImages" / "c.jpg").rename(root / "JPEGImages" / "sub" / "c.jpg")
    link_away(root / linked, tmp_path / "elsewhere" / "pool")
    assert convert_to(tmp_path / "out", "voc", root) == 0
    assert {Path(name).name for name in all_boxes(tmp_path / "out")} == {"a.jpg", "b.jpg", "c.jpg"}


def test_images_in_both_splits_by_a_link_are_named(yolo, tmp_path):
    (yolo / "images" / "val" / "more").symlink_to(yolo / "images" / "train")
    assert convert_to(tmp_path / "out", "yolo", yolo) == 0
    assert "images that are in train and in val: 2\n" in (tmp_path / "out" / "conversion.txt").read_text()


def test_a_link_to_a_missing_image_is_named(yolo, tmp_path, capsys):
    (yolo / "images" / "train" / "gone.jpg").symlink_to("nowhere.jpg")
    assert convert_to(tmp_path / "out", "yolo", yolo) == 1
    assert "gone.jpg: cannot be read (No such file" in " ".join(capsys.readouterr().out.split())


def add_hidden_files(root: Path) -> int:
    """Add hidden files as macOS and Jupyter do; the number of files and folders."""
    count = 0
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        (path.parent / f"._{path.name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
        count += 1
    for name in (".ipynb_checkpoints", "__MACOSX"):
        for folder in {path.parent for path in root.rglob("*.jpg") if not path.name.startswith("._")}:
            (folder / name).mkdir()
            shutil.copy(next(folder.glob("[!.]*.jpg")), folder / name / "copy.jpg")
            count += 1
    return count


def write_full_list(root: Path) -> None:
    """Write a list of all images in the folder, hidden ones included."""
    names = sorted(path.relative_to(root).as_posix() for path in (root / "images").rglob("*.jpg"))
    write(root / "train.txt", "\n".join(names))
    write(root / "data.yaml", "train: train.txt\nnames: [cell, plate]\n")


@pytest.mark.parametrize("kind", ["voc", "kit", "yolo", "folders", "list", "darknet"])
def test_hidden_files_and_folders_are_skipped_and_counted(kind, request, tmp_path):
    """Hidden files change neither the converted images nor the random split."""
    if kind == "kit":
        root = make_kit(tmp_path / "kit", "abcd", {"train": "ab", "val": "cd"})
    else:
        root = request.getfixturevalue("voc" if kind == "voc" else "yolo")
    if kind == "darknet":
        arrange_like_darknet(root)
    if kind == "folders":
        without_yaml(root)
    if kind == "list":
        write_full_list(root)
    reader = "voc" if kind in ("voc", "kit") else "yolo"
    assert convert_to(tmp_path / "before", reader, root) == 0
    count = add_hidden_files(root)
    if kind == "list":
        write_full_list(root)
        count -= 1  # the hidden copy of data.yaml
    assert convert_to(tmp_path / "after", reader, root) == 0
    for split in ("train", "val"):
        assert boxes_of(tmp_path / "after", split) == boxes_of(tmp_path / "before", split)
    report = (tmp_path / "after" / "conversion.txt").read_text()
    assert "hidden files and folders: ignored: " in report and "cannot be read" not in report


def test_a_data_set_below_a_hidden_folder_is_read(yolo, tmp_path):
    write_full_list(yolo)
    (tmp_path / ".cache").mkdir()
    yolo.rename(tmp_path / ".cache" / "yolo")
    assert convert_to(tmp_path / "out", "yolo", tmp_path / ".cache" / "yolo") == 0
    assert len(all_boxes(tmp_path / "out")) == 3


def test_readable_formats_are_converted_and_others_counted_by_suffix(yolo, tmp_path, capsys):
    folder = yolo / "images" / "train"
    for name in ("b.jfif", "c.j2k", "d.tga"):
        save_image(folder / name)
        write(yolo / "labels" / "train" / f"{name[0]}.txt", "0 0.5 0.5 0.5 0.25\n")
    (folder / "b.jpg").unlink()
    for name in ("e.HEIC", "f.heic", "e.pdf", "e.txt"):
        write(folder / name, "no image")
    write(yolo / "labels" / "train" / "e.txt", "0 0.5 0.5 0.5 0.25\n")
    assert convert_to(tmp_path / "out", "yolo", yolo) == 1
    assert set(boxes_of(tmp_path / "out", "train")) == {"a.jpg", "b.jfif", "c.j2k", "d.tga"}
    text = " ".join(capsys.readouterr().out.split())
    assert "fault 2 images in unsupported formats: left out; save such images as JPEG or PNG" in text
    assert f"{folder}: 2 .heic" in text and f"{folder}: 1 .pdf" in text and ".txt:" not in text
    assert "label files without an image" not in text


@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_images_beyond_pillows_limit_are_converted(kind, request, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert convert_to(tmp_path / "out", kind, request.getfixturevalue(kind)) == 0
    assert len(all_boxes(tmp_path / "out")) == (4 if kind == "voc" else 3)


# Both ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_unreadable_images_are_left_out_and_give_status_1(kind, request, tmp_path, capsys):
    root = request.getfixturevalue(kind)
    image = next(root.rglob("a.jpg"))
    image.write_text("no image")
    assert convert_to(tmp_path / "out", kind, root) == 1
    assert str(image) in capsys.readouterr().out
    assert "a.jpg" not in all_boxes(tmp_path / "out")
    assert not list((tmp_path / "out").rglob("a.jpg"))


def test_rotated_images_are_named(voc, tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    save_image(voc / "a.jpg", exif=exif)
    assert convert_to(tmp_path / "out", "voc", voc) == 0
    assert "EXIF orientation" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["link", "copy", "symlink"])
def test_images_are_linked_or_copied(voc, tmp_path, mode):
    assert convert_to(tmp_path / "out", "voc", voc, "--images", mode) == 0
    (place,) = (tmp_path / "out").rglob("a.jpg")
    assert place.read_bytes() == (voc / "a.jpg").read_bytes()
    assert place.is_symlink() == (mode == "symlink")
    assert os.path.samefile(place, voc / "a.jpg") == (mode != "copy")


def test_images_are_copied_if_links_fail(voc, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("another disk")

    monkeypatch.setattr(os, "link", refuse)
    assert convert_to(tmp_path / "out", "voc", voc) == 0
    (place,) = (tmp_path / "out").rglob("a.jpg")
    assert place.read_bytes() == (voc / "a.jpg").read_bytes() and not os.path.samefile(place, voc / "a.jpg")


@pytest.mark.parametrize(
    "stopped_by", [OSError(28, "No space left on device"), KeyboardInterrupt(), Interrupted(signal.SIGTERM)], ids=repr
)
@pytest.mark.parametrize("made_before", [False, True])
@pytest.mark.parametrize("step, times", [("put_image", 2), ("write_atomically", 1), ("write_atomically", 3)])
def test_a_conversion_that_ends_early_leaves_nothing(
    voc, tmp_path, monkeypatch, capsys, stopped_by, made_before, step, times
):
    original, calls = getattr(convert_command, step), []

    def stop(*args):
        calls.append(args)
        if len(calls) == times:
            raise stopped_by
        original(*args)

    monkeypatch.setattr(convert_command, step, stop)
    out = tmp_path / "new" / "out"
    if made_before:
        out.mkdir(parents=True)
    if isinstance(stopped_by, OSError):
        assert convert_to(out, "voc", voc) == 2
        assert f"--output_dir {out}: cannot be written" in capsys.readouterr().err
    else:
        assert convert_to(out, "voc", voc) == interruption(stopped_by)[0]
    assert out.exists() == out.parent.exists() == made_before and not list(tmp_path.glob("new/out/*"))
    assert len(list(voc.iterdir())) == 8


def fill_the_output(root: Path, out: Path) -> None:
    write(out / "notes.txt", "mine")


def make_the_output_a_file(root: Path, out: Path) -> None:
    write(out, "mine")


def empty_the_data(root: Path, out: Path) -> None:
    shutil.rmtree(root)
    root.mkdir()


def remove_the_data(root: Path, out: Path) -> None:
    shutil.rmtree(root)


def empty_the_annotations(root: Path, out: Path) -> None:
    for xml in root.glob("*.xml"):
        xml.write_text(voc_xml())


def leave_one_image(root: Path, out: Path) -> None:
    for file in [*root.glob("[bcd].*")]:
        file.unlink()


@pytest.mark.parametrize(
    "spoil, flags, message",
    [
        (fill_the_output, (), "the folder is not empty"),
        (make_the_output_a_file, (), "is a file"),
        (empty_the_data, (), "no XML files with images"),
        (remove_the_data, (), "no such folder"),
        (empty_the_annotations, (), "no objects are left to train on"),
        (leave_one_image, (), "too few to draw train and val from"),
        (None, ("--train_set", "train", "--val_set", "val"), "no list ImageSets/Main/train.txt and no folder train"),
        (None, ("--train_set", "train"), "--train_set and --val_set go together"),
        (None, ("--classes", "a", "a"), "--classes: a is listed twice"),
        (None, ("--classes", "other"), "no objects are left to train on"),
        (None, ("--classes", "other"), "objects of classes that --classes does not list"),
        (None, ("--seed", "-1"), "--seed -1: must be 0 or more"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(voc, tmp_path, capsys, spoil, flags, message):
    out = tmp_path / "out"
    if spoil:
        spoil(voc, out)
    before = sorted(tmp_path.rglob("*"))
    assert convert_to(out, "voc", voc, *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m enact_common.convert: error: ") and message in error
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_folder_inside_the_data_is_refused(voc, capsys):
    assert convert_to(voc / "coco", "voc", voc) == 2
    assert "choose a folder outside" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "1", "x"])
def test_val_fraction_outside_0_to_1_is_refused(voc, tmp_path, value, capsys):
    with pytest.raises(SystemExit) as stop:
        convert_to(tmp_path / "out", "voc", voc, "--val_fraction", value)
    assert stop.value.code == 2 and "between 0 and 1" in capsys.readouterr().err


def test_the_next_command_can_be_pasted(voc, tmp_path, capsys):
    assert convert_to(tmp_path / "my cells", "voc", voc) == 0
    assert f"--coco_path '{tmp_path / 'my cells'}'" in capsys.readouterr().out
