"""Conversion of CVAT's, Label Studio's, Roboflow's, Open Images' and DOTA's formats: boxes, sets, reports, refusals."""

import json
from pathlib import Path

import hotcoco
import numpy as np
import pytest
from test_convert import SIZE, all_boxes, annotations_of, boxes_of, convert_to, save_image, write

from enact_common.data.annotations import find_split, load_annotations
from enact_common.data.checks import __main__ as checks_command

NAMES = ("train/a", "train/b", "val/c")

# Each format, written with one box (left 10, top 8, right 40, bottom 24) of class cell in every image.


def write_cvat(root: Path, shapes: str = "", names=NAMES) -> None:
    """annotations.xml of CVAT for images 1.1; `shapes` come after the box of image a."""
    images = ""
    for i, name in enumerate(names):
        box = '<box label="cell" occluded="0" xtl="10" ytl="8" xbr="40" ybr="24" z_order="0"/>'
        subset, file = name.split("/")
        images += f'<image id="{i}" name="{file}.jpg" subset="{subset.title()}" width="{SIZE[0]}" height="{SIZE[1]}">'
        images += box + (shapes if i == 0 else "") + "</image>"
    labels = "".join(f"<label><name>{name}</name></label>" for name in ("cell", "plate"))
    meta = f"<version>1.1</version><meta><task><labels>{labels}</labels></task></meta>"
    write(root / "annotations.xml", f'<?xml version="1.0"?><annotations>{meta}{images}</annotations>')


def coco_json(names, annotations=None, categories=((0, "cell"), (1, "plate")), rename=lambda name: name) -> str:
    images = [{"id": i, "file_name": rename(n), "width": SIZE[0], "height": SIZE[1]} for i, n in enumerate(names)]
    if annotations is None:
        annotations = [{"image_id": i, "category_id": 0, "bbox": [10, 8, 30, 16]} for i in range(len(names))]
    annotations = [{"id": i, **annotation} for i, annotation in enumerate(annotations)]
    named = [{"id": i, "name": name} for i, name in categories]
    return json.dumps({"images": images, "annotations": annotations, "categories": named})


def write_coco(root: Path) -> None:
    """Label Studio's export: one result.json per set, with an upload's prefix and backslashes in the names."""
    for split in ("train", "val"):
        names = [name.split("/")[1] for name in NAMES if name.startswith(split)]
        text = coco_json(names, rename=lambda name: f"images\\0a1b2c3d-{name}.jpg")
        write(root / split / "result.json", text)


def write_openimages(root: Path, rows: str = "") -> None:
    header = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction\n"
    for split, table in (("train", "oidv6-train"), ("val", "validation")):
        ids = [name.split("/")[1] for name in NAMES if name.startswith(split)] + ["elsewhere"]
        lines = "".join(f"{i},x,/m/01,1,{10 / 60},{40 / 60},0.2,0.6,0,0,0,0\n" for i in ids)
        write(root / f"{table}-annotations-bbox.csv", header + lines + (rows if split == "train" else ""))
    write(root / "oidv7-class-descriptions-boxable.csv", "LabelName,DisplayName\n/m/01,cell\n/m/02,plate\n")


def write_dota(root: Path, lines: str = "") -> None:
    for name in NAMES:
        split, stem = name.split("/")
        text = "imagesource:GoogleEarth\ngsd:0.1\n10 8 40 8 40 24 10 24 cell 0\n"
        write(root / split / "labelTxt" / f"{stem}.txt", text + (lines if stem == "a" else ""))


WRITERS = {"cvat": write_cvat, "coco": write_coco, "openimages": write_openimages, "dota": write_dota}


def make(kind: str, root: Path, **options) -> Path:
    """A data set of a format: images a, b of train and c of val."""
    for i, name in enumerate(NAMES):
        split, stem = name.split("/")
        save_image(root / (f"{split}/images" if kind == "dota" else "images") / f"{stem}.jpg", seed=i)
    WRITERS[kind](root, **options)
    return root


@pytest.mark.parametrize("kind", WRITERS)
def test_boxes_classes_and_sets_of_each_format(kind, tmp_path, capsys):
    assert convert_to(tmp_path / "out", kind, make(kind, tmp_path / kind)) == 0
    boxes = boxes_of(tmp_path / "out", "train"), boxes_of(tmp_path / "out", "val")
    assert [[Path(name).name for name in own] for own in boxes] == [["a.jpg", "b.jpg"], ["c.jpg"]]
    for own in boxes:
        assert list(own.values()) == [[("cell", 10, 8, 30, 16)]] * len(own)
    assert checks_command.main([str(tmp_path / "out")]) == 0
    assert "Next:" in capsys.readouterr().out


@pytest.mark.parametrize("kind", WRITERS)
def test_sets_can_be_named_and_others_are_reported(kind, tmp_path, capsys):
    val = "validation" if kind == "openimages" else "val"
    root = make(kind, tmp_path / kind)
    assert convert_to(tmp_path / "out", kind, root, "--train_set", val, "--val_set", "train") == 0
    assert len(boxes_of(tmp_path / "out", "val")) == 2
    assert convert_to(tmp_path / "no", kind, root, "--train_set", "train", "--val_set", "nothing") == 2
    assert f"has no set nothing (--train_set, --val_set); its sets are train, {val}" in capsys.readouterr().err


@pytest.mark.parametrize("kind", WRITERS)
def test_a_folder_without_the_format_is_refused(kind, tmp_path, capsys):
    save_image(tmp_path / "in" / "a.jpg")
    assert convert_to(tmp_path / "out", kind, tmp_path / "in") == 2
    assert not (tmp_path / "out").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "in") in line


# Formats and what each cannot express in COCO: (writer's options, boxes of image a, exit status, reported text).
CELL = ("cell", 10, 8, 30, 16)
LOSSES = {
    "cvat turned": (
        "cvat", '<box label="cell" xtl="10" ytl="10" xbr="30" ybr="20" rotation="90"/>',
        [CELL, ("cell", 15, 5, 10, 20)], 0, "rotated boxes: replaced by the upright boxes around them: 1",
    ),
    "cvat polygon": ("cvat", '<polygon label="plate" points="1,2;9,2;9,7"/>', [CELL, ("plate", 1, 2, 8, 5)], 0, ""),
    "cvat mask": (
        "cvat", '<mask label="plate" rle="1, 5" left="3" top="4" width="6" height="2"/>',
        [CELL, ("plate", 3, 4, 6, 2)], 0, "masks and ellipses: only their boxes are kept: 1",
    ),
    "cvat ellipse": (
        "cvat", '<ellipse label="plate" cx="20" cy="20" rx="4" ry="6" rotation="90"/>',
        [CELL, ("plate", 14, 16, 12, 8)], 0, "rotated boxes: replaced by the upright boxes around them: 1",
    ),
    "cvat line": (
        "cvat", '<polyline label="plate" points="1,1;2,2"/><tag label="plate"/>', [CELL], 0,
        "shapes that give no box (polylines, points, cuboids, skeletons, tags): left out: 2",
    ),
    "cvat number": (
        "cvat", '<box label="cell" xtl="nan" ytl="1" xbr="3" ybr="4"/>', [CELL], 1,
        "objects without a class or a box of finite numbers: dropped: 1",
    ),
    "cvat attribute": (
        "cvat", '<box label="cell" xtl="1" ytl="1" xbr="3" ybr="4"><attribute name="age">3</attribute></box>',
        [("cell", 1, 1, 2, 3), CELL], 0, "attributes that are not kept: 1\n  cell: age",
    ),
    "openimages group": (
        "openimages", "a,x,/m/02,1,0,0.5,0,0.5,1,0,1,0\n", [CELL, ("plate", 0, 0, 30, 20)], 0,
        "boxes of groups (IsGroupOf): written as crowds, which training ignores: 1",
    ),
    "openimages marks": (
        "openimages", "a,x,/m/02,1,0,0.5,0,0.5,1,0,0,0\n", [CELL, ("plate", 0, 0, 30, 20)], 0, "IsOccluded",
    ),
    "openimages code": (
        "openimages", "a,x,/m/03,1,0,0.5,0,0.5,0,0,0,0\n", [("/m/03", 0, 0, 30, 20), CELL], 0,
        "classes without a name in the tables: the code is used: 1",
    ),
    "openimages absent": (
        "openimages", "a,x,/m/02,0,0,0.5,0,0.5,0,0,0,0\n", [CELL], 0, "rows with a confidence of 0",
    ),
    "openimages number": ("openimages", "a,x,/m/02,1,x,0.5,0,0.5,0,0,0,0\n", [CELL], 1, "box of finite numbers"),
    "openimages short row": ("openimages", "\"\",x,/m/02,1,0,0.5,0,0.5,0,0,0,0\n", [CELL], 1, "without an ImageID"),
    "dota turned": (
        "dota", "20 10 30 20 20 30 10 20 plate 1\n", [CELL, ("plate", 10, 10, 20, 20)], 0, "rotated boxes",
    ),
    "dota line": (
        "dota", "1 2 3 4 cell 0\n", [CELL], 1, "lines that are not four corners, a class and a mark",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind, text, boxes, status, report", LOSSES.values(), ids=LOSSES)
def test_each_loss_is_reported(kind, text, boxes, status, report, tmp_path):
    option = {"cvat": "shapes", "openimages": "rows", "dota": "lines"}[kind]
    root = make(kind, tmp_path / kind, **{option: text})
    assert convert_to(tmp_path / "out", kind, root) == status
    (found,) = (own for name, own in all_boxes(tmp_path / "out").items() if name.endswith("a.jpg"))
    assert [box[0] for box in found] == [box[0] for box in boxes]
    np.testing.assert_allclose([box[1:] for box in found], [box[1:] for box in boxes], atol=1e-3)
    assert report in (tmp_path / "out" / "conversion.txt").read_text()


def test_dota_keeps_corners_and_difficult_objects(tmp_path):
    root = make("dota", tmp_path / "dota", lines="20 10 30 20 20 30 10 20 plate 1\n")
    assert convert_to(tmp_path / "out", "dota", root) == 0
    turned = annotations_of(tmp_path / "out", "a")[1]
    assert turned["segmentation"] == [[20, 10, 30, 20, 20, 30, 10, 20]] and turned["area"] == 200
    assert turned["difficult"] == 1 and turned["iscrowd"] == 0


def test_dota_files_are_paired_by_name(tmp_path, capsys):
    root = make("dota", tmp_path / "dota")
    write(root / "train" / "labels" / "a.txt", "10 8 40 8 40 24 10 24 plate 0\n")
    assert convert_to(tmp_path / "out", "dota", root) == 1
    assert "a.jpg" not in all_boxes(tmp_path / "out")
    assert "images with several label files: left out: 1" in (tmp_path / "out" / "conversion.txt").read_text()
    for path in list(root.rglob("*.txt")):
        path.rename(path.with_stem(f"{path.stem}_label"))
    assert convert_to(tmp_path / "none", "dota", root) == 2
    assert "3 images and 4 text files, but no pair of the same name" in capsys.readouterr().err


def test_other_csv_files_are_left_out_of_open_images(tmp_path):
    root = make("openimages", tmp_path / "in")
    write(root / "notes.csv", "a,b,c\n")
    (root / "broken.csv").write_bytes(b"\xff\xfe\xff")
    assert convert_to(tmp_path / "out", "openimages", root) == 1
    text = (tmp_path / "out" / "conversion.txt").read_text()
    assert "CSV files that are not Open Images' boxes or class names: ignored: 1" in text and "notes.csv" in text
    assert "CSV files that cannot be read: left out: 1" in text and "broken.csv" in text


def test_open_images_groups_are_crowds(tmp_path):
    root = make("openimages", tmp_path / "oid", rows="a,x,/m/02,1,0,0.5,0,0.5,1,0,1,0\n")
    assert convert_to(tmp_path / "out", "openimages", root) == 0
    assert [a["iscrowd"] for a in annotations_of(tmp_path / "out", "a")] == [0, 1]
    assert "images in the tables without an image file: left out: 2" in (tmp_path / "out/conversion.txt").read_text()


SQUARE = [10, 8, 40, 8, 40, 24, 10, 24]


@pytest.mark.parametrize(
    "annotation, kept, status, report",
    [
        ({"segmentation": [SQUARE]}, [SQUARE], 0, "Nothing was changed"),
        ({"segmentation": [SQUARE, SQUARE]}, [], 0, "only their boxes are kept: 1"),
        ({"segmentation": {"counts": [1], "size": [40, 60]}}, [], 0, "only their boxes are kept: 1"),
        ({"bbox": [], "segmentation": [SQUARE]}, [SQUARE], 0, "Nothing was changed"),
        ({"attributes": {"occluded": True}}, [], 0, "fields of annotations that are not kept: 1"),
        ({"bbox": None}, None, 1, "objects without a class or a box of finite numbers: dropped: 1"),
        ({"category_id": 7}, None, 1, "category_id 7"),
        ({"image_id": 7}, None, 1, "image_id 7"),
        ({"category_id": [0]}, None, 1, "category_id [0]"),
        ({"image_id": {"a": 0}}, None, 1, "image_id {'a': 0}"),
    ],
)
def test_coco_exports_keep_outlines_and_report_losses(annotation, kept, status, report, tmp_path):
    for i, name in enumerate("abcd"):
        save_image(tmp_path / "in" / f"{name}.jpg", seed=i)
    base = {"image_id": 0, "category_id": 0, "bbox": [10, 8, 30, 16]}
    boxes = [{**base, **annotation}, *({**base, "image_id": i} for i in (1, 2, 3))]
    write(tmp_path / "in" / "result.json", coco_json([f"{n}.jpg" for n in "abcd"], boxes, [(0, "cell")]))
    assert convert_to(tmp_path / "out", "coco", tmp_path / "in" / "result.json") == status
    found = annotations_of(tmp_path / "out", "a")
    assert [a["segmentation"] for a in found] == ([] if kept is None else [kept])
    # The random split is always reported.
    text = (tmp_path / "out" / "conversion.txt").read_text()
    assert report in text or report == "Nothing was changed" and text.count("\n") == 2


def test_roboflows_project_category_is_left_out_and_its_folders_are_sets(tmp_path):
    for i, name in enumerate(("train/a", "train/b", "valid/a", "test/d")):
        save_image(tmp_path / "in" / f"{name}.jpg", seed=i)
    for split in ("train", "valid", "test"):
        names = [path.name for path in sorted((tmp_path / "in" / split).glob("*.jpg"))]
        boxes = [{"image_id": i, "category_id": 1, "bbox": [10, 8, 30, 16]} for i in range(len(names))]
        data = json.loads(coco_json(names, boxes, [(0, "blood"), (1, "cell")]))
        data["categories"][1]["supercategory"] = "blood"
        write(tmp_path / "in" / split / "_annotations.coco.json", json.dumps(data))
    write(tmp_path / "in" / "notes.json", "[]")
    assert convert_to(tmp_path / "out", "coco", tmp_path / "in") == 0
    assert set(boxes_of(tmp_path / "out", "train")) == {"a.jpg", "b.jpg"}
    assert boxes_of(tmp_path / "out", "val") == {"a.jpg": [CELL]}
    text = (tmp_path / "out" / "conversion.txt").read_text()
    assert "0 blood" in text and "notes.json" in text and "test: 1 images" in text


@pytest.mark.parametrize(
    "text, said",
    [
        ("<annotations><track/></annotations>", "CVAT for video"),
        ("<annotation/>", "root is <annotation>"),
        ('<!DOCTYPE x [<!ENTITY a "b">]><annotations/>', "document type"),
        ("<annotations>", "no element found"),
    ],
)
def test_other_xml_is_refused_with_the_reason(text, said, tmp_path, capsys):
    save_image(tmp_path / "in" / "a.jpg")
    file = write(tmp_path / "in" / "annotations.xml", text)
    assert convert_to(tmp_path / "out", "cvat", file) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["cvat", "coco", "openimages"])
def test_annotations_without_their_images_are_refused_with_the_cause(kind, tmp_path, capsys):
    WRITERS[kind](tmp_path / "in")
    assert convert_to(tmp_path / "out", kind, tmp_path / "in") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "none of the annotated images is in this folder" in line and "without an image file" in line


def test_missing_ambiguous_and_resized_images_are_reported(tmp_path, capsys):
    root = make("cvat", tmp_path / "in", names=("train/a", "train/b", "val/c", "val/gone"))
    save_image(root / "other" / "b.jpg", seed=9)
    save_image(root / "images" / "c.jpg", (30, 40), seed=3)
    assert convert_to(tmp_path / "out", "cvat", root) == 1
    text = (tmp_path / "out" / "conversion.txt").read_text()
    assert "annotated images without an image file: left out: 1" in text and "gone.jpg" in text
    assert "image names that fit several files: left out: 1" in text
    assert "60 x 40, the image is 30 x 40" in text


@pytest.mark.parametrize("kind", ["cvat", "openimages", "dota"])
def test_files_written_by_another_library_are_read_alike(kind, shapes, tmp_path):
    """hotcoco writes the drawn shapes in each format; our reader finds the boxes that it was given."""
    for split in ("train", "val"):
        folder, file = find_split(str(shapes), split)
        data = load_annotations(file)
        for annotation in data["annotations"]:
            x, y, w, h = annotation["bbox"]
            del annotation["segmentation"]  # hotcoco would write one CVAT shape per part
            annotation["obb"] = [x + w / 2, y + h / 2, w, h, 0.0]
        for image in data["images"]:
            target = tmp_path / "in" / split / "images" / image["file_name"]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(folder / image["file_name"])
        dataset, root = hotcoco.COCO(data), tmp_path / "in" / split
        if kind == "dota":
            dataset.to_dota(str(root / "labelTxt"))
        elif kind == "cvat":
            for image in data["images"]:
                image["file_name"] = f"{split}/images/{image['file_name']}"
            hotcoco.COCO(data).to_cvat(str(root / "annotations.xml"))
        else:
            (root / "images").rename(root / "pictures")
            for path in (root / "pictures").iterdir():
                path.rename(path.with_stem(f"{split}{path.stem}"))
            for image in data["images"]:
                image["file_name"] = f"{split}{image['file_name']}"
            hotcoco.COCO(data).to_oid(str(root / "annotations-bbox.csv"))
    assert convert_to(tmp_path / "out", kind, tmp_path / "in") == 0
    for split in ("train", "val"):
        data = load_annotations(find_split(str(shapes), split)[1])
        names = {category["id"]: category["name"] for category in data["categories"]}
        expected = sorted((names[a["category_id"]], *a["bbox"]) for a in data["annotations"])
        # hotcoco writes DOTA corners to 0.1 pixel.
        found = sorted(box for own in boxes_of(tmp_path / "out", split).values() for box in own)
        assert [box[0] for box in found] == [box[0] for box in expected]
        np.testing.assert_allclose([box[1:] for box in found], [box[1:] for box in expected], atol=0.1)
