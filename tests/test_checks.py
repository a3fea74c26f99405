"""The data checks: each fault, planted in a small clean data set, is named and counted."""

import json
import shutil
import unicodedata
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import real_data
from PIL import Image

from enact_common import UserError
from enact_common.data.annotations import find_split, load_annotations
from enact_common.data.categories import LabelMap
from enact_common.data.checks import __main__ as checks_command
from enact_common.data.checks import report as checks_report
from enact_common.data.checks import rules
from enact_common.data.checks.findings import Finding
from enact_common.data.checks.rules import quick_checks
from enact_common.data.checks.split import Split
from enact_common.data.coco import CocoDetection
from enact_common.data.transforms import eval_transforms


@pytest.fixture
def data(tmp_path) -> Path:
    """A clean data set in COCO's layout: four training and two validation images of 50 x 40, two objects each."""
    root = tmp_path / "data"
    (root / "annotations").mkdir(parents=True)
    random = np.random.default_rng(0)
    for split, first, count in (("train", 1, 4), ("val", 5, 2)):
        (root / f"{split}2017").mkdir()
        images, annotations = [], []
        for i in range(first, first + count):
            name = f"{split}{i}.png"
            cv2.imwrite(str(root / f"{split}2017" / name), random.integers(0, 255, (40, 50, 3), dtype=np.uint8))
            images.append({"id": i, "file_name": name, "width": 50, "height": 40})
            for category, box in ((1, [5, 5, 20, 10]), (2, [30, 20, 10, 20])):
                number = len(annotations) + 1
                owner = {"id": number, "image_id": i, "category_id": category}
                annotations.append({**owner, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
        categories = [{"id": 1, "name": "cell"}, {"id": 2, "name": "plate"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        file_of(root, split).write_text(json.dumps(content))
    return root


def file_of(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}2017.json"


def change(root: Path, split: str, edit) -> None:
    """Apply `edit` to the content of an annotation file."""
    content = json.loads(file_of(root, split).read_text())
    edit(content)
    file_of(root, split).write_text(json.dumps(content))


def setter(key: str, index: int, **values):
    """An edit that sets values of a list's entry; None deletes a key."""

    def edit(content):
        entry = content[key][index]
        entry.update(values)
        for name, value in values.items():
            if value is None:
                del entry[name]

    return edit


def adder(key: str, *entries):
    """An edit that adds entries to a list."""
    return lambda content: content[key].extend(entries)


def annotation(number: int, box=(1, 1, 5, 5), image: int = 1, category: int = 1, **more) -> dict:
    return {"id": number, "image_id": image, "category_id": category, "bbox": list(box), **more}


def splits_of(root: Path) -> list[Split]:
    return [Split(name, *find_split(str(root), name)) for name in ("train", "val")]


def full(root: Path, num_queries: int = 100) -> list[Finding]:
    return rules.check_fully(splits_of(root), num_queries)


def quick(root: Path, num_queries: int = 100) -> list[Finding]:
    return quick_checks({name: find_split(str(root), name) for name in ("train", "val")}, num_queries)


def quick_findings(root: Path) -> list[Finding]:
    """The quick checks' findings about the training split."""
    return [finding for finding in rules.check_quickly(splits_of(root), 100) if finding.source == "train"]


def the_finding(findings: list[Finding], text: str) -> Finding:
    """The only finding whose text contains `text`."""
    matching = [finding for finding in findings if text in finding.text]
    assert len(matching) == 1, f"{text!r} in {[str(finding) for finding in findings]}"
    return matching[0]


# Clean data ----------------------------------------------------------------------------------------------------------


def test_a_clean_data_set_has_no_findings(data, capsys):
    assert full(data) == [] and quick(data) == []
    assert checks_command.main([str(data)]) == 0
    assert "nothing wrong" in capsys.readouterr().out


def test_drawn_shapes_only_get_notes(shapes):
    assert {finding.severity for finding in full(shapes)} <= {"note"}
    assert quick(shapes) == []


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["ENACT_BCCD", "ENACT_COCO_MINI"])
def test_real_data_have_no_errors_or_faults(variable):
    assert {finding.severity for finding in full(real_data(variable))} <= {"warning", "note"}


# Faults of the annotations -------------------------------------------------------------------------------------------

ERRORS = {
    "a list is missing": (lambda c: c.pop("categories"), "lacks a list", 1, "'categories'"),
    "no categories": (lambda c: c.update(categories=[]), "the list 'categories' is empty", 1, None),
    "no images": (lambda c: c.update(images=[]), "the list 'images' is empty", 1, None),
    "no boxes": (lambda c: c.update(annotations=[]), "no boxes to learn from", 1, None),
    "only crowds": (lambda c: [a.update(iscrowd=1) for a in c["annotations"]], "no boxes to learn from", 1, None),
    "an image that is not an object": (adder("images", 7), "'images' without an id and a file_name", 1, "7"),
    "an image without a name": (setter("images", 0, file_name=None), "'images' without an id", 1, "'id': 1"),
    "an image named in another field": (
        setter("images", 0, file_name=None, coco_url="http://x.org/train2017/train1.png?s=1"),
        "images without a file_name but with another field that names the file",
        1,
        "image 1: coco_url 'http://x.org/train2017/train1.png?s=1' (there is train1.png)",
    ),
    "an image id that is text": (
        setter("images", 0, id="img_1"),
        "invalid ids in 'images'",
        1,
        "the text 'img_1' in {'id': 'img_1'",
    ),
    "a category id that is a bool": (
        setter("categories", 0, id=True),
        "invalid ids in 'categories'",
        1,
        "True in {'id': True",
    ),
    "a category id with an exponent": (
        setter("categories", 0, id="1e0"),
        "invalid ids in 'categories'",
        1,
        "the text '1e0'",
    ),
    "a repeated image id, once as text": (
        setter("images", 0, id="2"),
        "duplicate ids in 'images'",
        1,
        "2",
    ),
    "a category without a name": (setter("categories", 0, name=None), "'categories' without", 1, "{'id': 1}"),
    "an annotation that is not an object": (adder("annotations", [], 3), "without the form of a JSON object", 2, "[]"),
    "a repeated image id": (
        adder("images", {"id": 2, "file_name": "train2.png"}),
        "duplicate ids in 'images'",
        1,
        "2",
    ),
    "a repeated category id": (
        adder("categories", {"id": 2, "name": "fork"}),
        "duplicate ids in 'categories'",
        1,
        "2",
    ),
    "an unknown image": (
        adder("annotations", annotation(90, image=77), annotation(91, image="78")),
        "annotations of images that are not listed",
        2,
        "annotation 90: image 77",
    ),
    "an invalid image_id": (
        adder("annotations", annotation(90, image="img_7"), annotation(91, image=[1]), annotation(92, image=True)),
        "annotations with an invalid image_id",
        3,
        "annotation 90: image the text 'img_7'",
    ),
    "an invalid category_id": (
        adder("annotations", annotation(90, category="cell")),
        "annotations with an invalid category_id",
        1,
        "annotation 90: category the text 'cell'",
    ),
    "an unknown category": (
        adder("annotations", annotation(90, category=9)),
        "annotations of categories that are not listed",
        1,
        "annotation 90: category 9",
    ),
    "invalid boxes": (
        adder("annotations", *(annotation(90 + i, box) for i, box in enumerate(((1, 2, 3), ("a", 2, 3, 4), ())))),
        "invalid boxes: expected a list of four finite numbers",
        3,
        "annotation 90 in train1.png: bbox [1, 2, 3]",
    ),
    "a box as one text": (
        setter("annotations", 0, bbox="[1, 2, 3, 4]"),
        "invalid boxes: expected a list of four finite numbers",
        1,
        "annotation 1 in train1.png: bbox the text '[1, 2, 3, 4]'",
    ),
    "a bool in a box": (
        setter("annotations", 0, bbox=[True, 2, 3, 4]),
        "invalid boxes",
        1,
        "bbox [True, 2, 3, 4]",
    ),
    "a box that is not finite": (
        adder("annotations", annotation(90, (1, 2, float("nan"), 4)), annotation(91, (1, 2, 3, float("inf")))),
        "invalid boxes: expected a list of four finite numbers",
        2,
        "annotation 90",
    ),
}

FAULTS = {
    "boxes without area": (
        adder("annotations", annotation(90, (1, 1, 0, 5)), annotation(91, (1, 1, 5, -2))),
        "without width or height",
        2,
        "annotation 90 in train1.png: bbox [1, 1, 0, 5]",
    ),
    "a box outside": (
        adder("annotations", annotation(90, (50, 1, 5, 5)), annotation(91, (-9, 1, 5, 5))),
        "entirely outside their image",
        2,
        "annotation 90",
    ),
    "an image listed twice": (
        adder("images", {"id": 9, "file_name": "train1.png", "width": 50, "height": 40}),
        "listed under two ids",
        1,
        "train1.png",
    ),
    "fractions": (
        lambda c: [a.update(bbox=[0.1, 0.2, 0.3, 0.4]) for a in c["annotations"]],
        "look like fractions of the image",
        8,
        "annotation 1",
    ),
    "corners": (
        lambda c: [a.update(bbox=[20, 20, 45, 40]) for a in c["annotations"]],
        "look like left, top, right, bottom",
        8,
        "annotation 1",
    ),
}

WARNINGS = {
    "numbers as text": (
        lambda c: [a.update(image_id=str(a["image_id"]), bbox=[str(n) for n in a["bbox"]]) for a in c["annotations"]],
        "read as numbers (image_id of annotations: 8, bbox of annotations: 8)",
        16,
        "entry 1 of annotations: image_id '1'",
    ),
    "ids as text": (
        lambda c: [entry.update(id=f" {entry['id']} ") for key in ("images", "categories") for entry in c[key]],
        "read as numbers (id of images: 4, id of categories: 2)",
        6,
        "entry 1 of images: id ' 1 '",
    ),
    "ids as floats": (
        lambda c: [a.update(category_id=float(a["category_id"])) for a in c["annotations"]],
        "read as numbers (category_id of annotations: 8)",
        8,
        "entry 1 of annotations: category_id 1.0",
    ),
    "an invalid ignore mark": (
        setter("annotations", 0, ignore="maybe"),
        "values of ignore other than 0 and 1",
        1,
        "annotation 1: 'maybe'",
    ),
    "a box over the edge": (
        adder("annotations", annotation(90, (40, 30, 20, 5))),
        "past the image's edge",
        1,
        "annotation 90 in train1.png: bbox [40, 30, 20, 5]",
    ),
    "a repeated box": (
        adder("annotations", annotation(90, (5, 5, 20, 10)), annotation(91, (5, 5, 20, 10), category=2)),
        "duplicates of another box of the same class",
        1,
        "annotation 90",
    ),
    "repeated annotation ids": (setter("annotations", 3, id=1), "duplicate annotation ids", 1, "id 1, 2 times"),
    "id 0": (setter("annotations", 3, id=0), "annotations with id 0", 1, "annotation 0 in train2.png"),
    "no id": (setter("annotations", 3, id=None), "without an integer id", 1, "None"),
    "no size": (setter("images", 0, width=None), "without width and height above 0", 1, "train1.png: ? x 40"),
    "a width below 0": (setter("images", 1, width=-50), "without width and height above 0", 1, "train2.png: -50 x 40"),
    "a height as text": (setter("images", 1, height="forty"), "without width and height", 1, "train2.png: 50 x forty"),
    "an infinite width": (setter("images", 0, width=1e400), "without width and height", 1, "train1.png: inf x 40"),
    "an unused category": (
        lambda c: [a.update(category_id=1) for a in c["annotations"]],
        "categories without objects",
        1,
        "plate",
    ),
    "a name of two categories": (
        adder("categories", {"id": 3, "name": "cell"}),
        "names that two categories share",
        1,
        "'cell'",
    ),
}

IGNORE_MARKS = (1, "true", True, 0, "false", "0", None, False)

NOTES = {
    "a crowd": (setter("annotations", 0, iscrowd=1), "crowds", 1, "annotation 1 in train1.png"),
    "an object to ignore": (
        lambda c: [a.update(ignore=mark) for a, mark in zip(c["annotations"], IGNORE_MARKS, strict=False)],
        "they count as crowds",
        3,
        "annotation 1 in train1.png",
    ),
    "a difficult object": (setter("annotations", 0, difficult=1), "--remove_difficult", 1, "annotation 1"),
    "an empty image": (
        lambda c: c.update(annotations=c["annotations"][2:]),
        "images without objects",
        1,
        "train1.png",
    ),
}

PLANTED = {
    name: (severity, *case)
    for severity, cases in (("error", ERRORS), ("fault", FAULTS), ("warning", WARNINGS), ("note", NOTES))
    for name, case in cases.items()
}


@pytest.mark.parametrize("name", PLANTED)
def test_annotation_faults_are_named_and_counted(name, data, capsys):
    severity, edit, text, count, example = PLANTED[name]
    change(data, "train", edit)
    own = [finding for finding in full(data) if finding.source == "train"]
    finding = the_finding(own, text)
    assert (finding.severity, finding.count) == (severity, count)
    assert example is None or example in finding.examples[0]
    assert checks_command.main([str(data), "--quick"]) == (1 if severity in ("error", "fault") else 0)
    assert text.split(",")[0] in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", PLANTED)
def test_errors_stop_training_and_other_findings_are_reported(name, data):
    severity, edit, text, _, example = PLANTED[name]
    change(data, "train", edit)
    if severity == "error":
        with pytest.raises(UserError, match="python -m enact_common.data.checks lists all faults") as error:
            quick(data)
        assert "train: " in str(error.value) and str(file_of(data, "train")) in str(error.value)
        return
    own = [finding for finding in quick(data) if finding.source == "train"]
    # Training reports values read as numbers when it loads the file, not in the checks.
    assert any(text in str(finding) for finding in own) == (severity != "note" and "read as numbers" not in text)


def test_findings_are_listed_once_by_severity(data):
    for split in ("train", "val"):
        change(data, split, adder("annotations", annotation(90, (1, 1, 0, 5), image=5 if split == "val" else 1)))
        change(data, split, setter("annotations", 0, iscrowd=1))
    change(data, "train", adder("annotations", annotation(91, image=99)))
    listed = [(finding.source, finding.severity) for finding in full(data)]
    assert listed == [("train", "error"), ("train", "fault"), ("train", "note"), ("val", "fault"), ("val", "note")]


ODD = {"null": None, "true": True, "empty text": "", "text": "x", "negative": -1, "infinite": 1e400, "huge": 10**400}
ODD |= {"empty list": [], "nested list": [[1]], "object": {"a": 1}}

# Required and optional keys of an entry.
REQUIRED = [("images", "id"), ("images", "file_name"), ("categories", "id")]
REQUIRED += [("annotations", name) for name in ("image_id", "category_id", "bbox")]
OPTIONAL = [("images", "width"), ("images", "height"), ("categories", "name")]
OPTIONAL += [("annotations", name) for name in ("id", "area", "iscrowd", "difficult")]


@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
@pytest.mark.parametrize(
    "key, name", [(key, None) for key in ("images", "annotations", "categories")] + REQUIRED + OPTIONAL
)
def test_any_value_in_the_file_gives_a_report(data, key, name, value, capsys):
    def edit(content):
        if name is None:
            content[key] = value
        else:
            content[key][0][name] = value

    change(data, "train", edit)
    status = checks_command.main([str(data), "--quick"])
    assert status in (0, 1) and "objects (no crowds)" in capsys.readouterr().out
    if name is None or ((key, name) in REQUIRED and value == {"a": 1}):
        assert status == 1


def test_findings_show_the_first_examples_and_the_full_count(data):
    change(data, "train", adder("annotations", *(annotation(100 + i, (1, 1, 0, 5)) for i in range(7))))
    finding = the_finding(full(data), "without width or height")
    assert finding.count == 7
    assert [example.split(" in ")[0] for example in finding.examples] == [f"annotation {100 + i}" for i in range(3)]
    assert str(finding).endswith(", ...)") and ": 7 (annotation 100" in str(finding)


@pytest.mark.parametrize("queries, count", [(1, 4), (2, 0)])
def test_images_with_more_objects_than_queries_are_named(data, queries, count):
    findings = [finding for finding in quick(data, queries) if finding.source == "train"]
    assert sum(finding.count for finding in findings) == count
    assert all("queries" in finding.text and finding.examples[0] == "train1.png: 2" for finding in findings)


def test_annotation_ids_replaced_by_the_loader_are_not_reported(data):
    change(data, "train", lambda c: [a.update(id=0) for a in c["annotations"]])
    paths = {name: find_split(str(data), name) for name in ("train", "val")}
    parsed = {"train": load_annotations(file_of(data, "train"))}
    assert len(quick_checks(paths, 100)) == 2
    assert quick_checks(paths, 100, parsed) == []


def test_image_sizes_as_text_are_read(data):
    change(data, "train", setter("images", 0, width="50", height="40"))
    change(data, "train", adder("annotations", annotation(90, (50, 1, 5, 5))))
    findings = full(data)
    assert [finding.text for finding in findings if finding.source == "train"] == [
        "boxes entirely outside their image: dropped"
    ]


@pytest.mark.parametrize("limited", [(), ("train",), ("val",)])
def test_with_a_limit_the_message_names_the_limit_and_not_the_command(data, limited):
    paths = {name: find_split(str(data), name) for name in ("train", "val")}
    parsed = {"train": {**json.loads(file_of(data, "train").read_text()), "annotations": []}}
    with pytest.raises(UserError) as error:
        quick_checks(paths, 100, parsed, limited=limited)
    message = str(error.value)
    # The message ends without a count.
    assert message.startswith("train: no boxes to learn from [")
    assert ("among the images that --limit_train keeps" in message) == ("train" in limited)
    assert ("enact_common.data.checks" in message) == ("train" not in limited)


def test_parsed_annotations_are_not_read_again(data):
    paths = {name: find_split(str(data), name) for name in ("train", "val")}
    parsed = {name: json.loads(file_of(data, name).read_text()) for name in paths}
    for name in paths:
        file_of(data, name).unlink()
    assert quick_checks(paths, 100, parsed) == []


def test_test_images_need_no_annotations(data):
    change(data, "val", lambda c: c.pop("annotations"))
    assert quick_checks({"test": find_split(str(data), "val")}, 100) == []


# Faults of the files -------------------------------------------------------------------------------------------------


def missing(image: Path) -> None:
    image.unlink()


def upper_case_suffix(image: Path) -> None:
    image.rename(image.with_suffix(".PNG"))


def no_image(image: Path) -> None:
    image.write_text("this is text")


def cut_short(image: Path) -> None:
    image.write_bytes(image.read_bytes()[:-500])


def empty(image: Path) -> None:
    image.write_bytes(b"")


def smaller(image: Path) -> None:
    cv2.imwrite(str(image), np.random.default_rng(5).integers(0, 255, (30, 45, 3), dtype=np.uint8))


def rotated(image: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.random.default_rng(5).integers(0, 255, (50, 40, 3), dtype=np.uint8)).save(image, exif=exif)


def duplicated(image: Path) -> None:
    shutil.copy(image.with_name("train1.png"), image)


def not_listed(image: Path) -> None:
    for name in ("new.png", "._new.png"):  # hidden files are not reported
        shutil.copy(image, image.with_name(name))


@pytest.mark.parametrize(
    "spoil, severity, text, example",
    [
        (missing, "error", "missing image files", "train2.png"),
        (upper_case_suffix, "error", "missing image files", "train2.png (there is train2.PNG)"),
        (no_image, "error", "unreadable or damaged", "train2.png"),
        (empty, "error", "unreadable or damaged", "train2.png"),
        (smaller, "fault", "size differs", "train2.png: 45 x 30, annotated as 50 x 40"),
        (rotated, "fault", "size differs", "matches after EXIF rotation"),
        (rotated, "warning", "EXIF orientation", "train2.png: 6"),
        (duplicated, "warning", "same pixels under several names", "train1.png = train2.png"),
        (not_listed, "note", "do not list", "new.png"),
    ],
)
def test_file_faults_are_found(data, spoil, severity, text, example):
    spoil(data / "train2017" / "train2.png")
    finding = the_finding([finding for finding in full(data) if finding.source == "train"], text)
    assert (finding.severity, finding.count) == (severity, 1)
    assert example in finding.examples[0]


ACCENTED = {form: unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD")}


@pytest.mark.parametrize("listed, stored", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_that_differ_only_in_unicode_form_are_explained(data, listed, stored):
    (data / "train2017" / "train2.png").rename(data / "train2017" / ACCENTED[stored])
    if (data / "train2017" / ACCENTED[listed]).exists():
        pytest.skip("this file system takes both for the same name")
    change(data, "train", setter("images", 1, file_name=ACCENTED[listed]))
    finding = the_finding(full(data), "missing image files")
    assert f"(there is {ACCENTED[stored]}, with its accents stored differently)" in finding.examples[0]


# file_name in the JSON, the file's path in the image folder, and the hint in brackets.
MISNAMED = {
    "backslashes": ("train2017\\train2.png", "train2.png", "there is train2.png"),
    "backslashes and a folder": ("C:\\data\\sub\\train2.png", "sub/train2.png", "there is sub/train2.png"),
    "a backslash in the file's own name": ("sub/train2.png", "sub\\train2.png", "there is sub\\train2.png"),
    "an extra folder": ("train2017/train2.png", "train2.png", "there is train2.png"),
    "a missing folder": ("train2.png", "sub/train2.png", "there is sub/train2.png"),
    "a parent folder": ("../../upload/4/train2.png", "train2.png", "there is train2.png"),
    "another machine's folder": ("/data/upload/4/train2.png", "train2.png", "there is train2.png"),
    "a URL": ("https://x.org/a/train2.png?size=1#top", "train2.png", "there is train2.png"),
    "a URL of nothing": ("https://x.org/a/b.png", "train2.png", "a URL: images are read only from the folder"),
    "quoted": ("my%20image%231.png", "my image#1.png", "there is my image#1.png"),
    "upper case": ("TRAIN2.PNG", "train2.png", "there is train2.png"),
    "another suffix": ("train2.jpeg", "train2.png", "there is train2.png"),
    "an upload's name": ("/data/upload/4/1a2b3c4d-my_image.png", "my image.png", "there is my image.png"),
    "an upload's file": ("my image.png", "1a2b3c4d-my_image.png", "there is 1a2b3c4d-my_image.png"),
}


@pytest.mark.parametrize("name", MISNAMED)
def test_missing_files_are_reported_with_the_file_meant(data, name):
    listed, stored, words = MISNAMED[name]
    folder = data / "train2017"
    (folder / "sub").mkdir()
    (folder / "train2.png").rename(folder / stored)
    change(data, "train", setter("images", 1, file_name=listed))
    findings = [finding for finding in full(data) if finding.source == "train"]
    (error,) = [finding for finding in findings if finding.severity == "error"]
    assert error.count == 1 and error.examples[0].endswith(f" ({words})")
    assert ("as file_name into instances_train2017.json" in error.text) == ("there is" in words or "read" in words)
    with pytest.raises(UserError, match="enact_common.data.checks lists .* and the files they may mean") as raised:
        CocoDetection(*find_split(str(data), "train"), eval_transforms(40, 100))
    assert f"({words})" in str(raised.value)


def test_the_file_meant_is_the_nearest_in_path_and_has_no_entry(data):
    folder = data / "train2017"
    (folder / "train3.png").unlink()
    for sub in ("left", "right", "third"):
        (folder / sub).mkdir()
        shutil.copy(folder / "train2.png", folder / sub / "train2.png")
        shutil.copy(folder / "train2.png", folder / sub / "train3.png")
    change(data, "train", setter("images", 0, file_name="x\\Left\\train2.png"))
    change(data, "train", setter("images", 2, file_name="train3.png"))
    finding = the_finding(quick_findings(data), "missing image files")
    assert finding.examples == (
        "x\\Left\\train2.png (there is left/train2.png)",
        "train3.png (there are 3 files of that name, left/train3.png first)",
    )
    for sub in ("left", "right", "third"):
        shutil.rmtree(folder / sub)
    finding = the_finding(quick_findings(data), "missing image files")
    # train2.png has its own entry, so it is not suggested.
    assert finding.examples == ("x\\Left\\train2.png", "train3.png")


def test_annotations_of_a_refused_image_are_not_reported_as_unlisted(data):
    change(data, "train", setter("images", 0, file_name="../a.png"))
    change(data, "train", setter("images", 1, file_name=None, coco_url="http://x.org/train2.png"))
    own = [finding for finding in quick_findings(data) if finding.severity == "error"]
    assert not any("not listed" in finding.text for finding in own) and len(own) == 2
    change(data, "train", lambda c: [image.update(file_name="../a.png") for image in c["images"]])
    own = [finding for finding in quick_findings(data) if finding.severity == "error"]
    assert len(own) == 1 and "is not a file below" in own[0].text


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "x" * 300 + "/a.png"])
def test_impossible_file_names_count_as_missing_files(data, name):
    for split in ("train", "val"):
        change(data, split, setter("images", 1, file_name=name))
    for findings in (full(data), rules.check_quickly(splits_of(data), 100)):
        own = [finding for finding in findings if finding.source == "train"]
        assert the_finding(own, "missing image files").count == 1
    with pytest.raises(UserError, match="1 of its 4 image files are missing"):
        CocoDetection(*find_split(str(data), "train"), eval_transforms(40, 100))


def test_truncated_jpegs_cannot_be_read_whole(data):
    image = data / "train2017" / "train2.jpg"
    Image.open(image.with_suffix(".png")).save(image)
    image.with_suffix(".png").unlink()
    change(data, "train", setter("images", 1, file_name="train2.jpg"))
    assert full(data) == []
    cut_short(image)
    assert the_finding(full(data), "unreadable or damaged").count == 1


def test_quick_checks_find_missing_files_but_open_none(data):
    for spoil in (no_image, rotated):
        spoil(data / "train2017" / "train2.png")
        assert quick(data) == []
    missing(data / "train2017" / "train2.png")
    with pytest.raises(UserError, match=r"missing image files in .*train2017: 1 \(train2.png\)"):
        quick(data)


def test_a_missing_image_folder_is_named(data):
    paths = {"train": (data / "elsewhere", file_of(data, "train"))}
    with pytest.raises(UserError, match="elsewhere is missing"):
        quick_checks(paths, 100)


def test_images_in_sub_folders_are_found(data):
    folder = data / "train2017"
    (folder / "sub").mkdir()
    (folder / "train2.png").rename(folder / "sub" / "train1.png")
    change(data, "train", setter("images", 1, file_name="sub/train1.png"))
    assert full(data) == []


# Both splits ---------------------------------------------------------------------------------------------------------


def test_leaks_between_splits_are_found_by_name_and_by_pixels(data):
    shutil.copy(data / "train2017" / "train1.png", data / "val2017" / "train1.png")
    change(data, "val", setter("images", 0, file_name="train1.png"))
    finding = the_finding(quick(data), "same name and file size in both")
    assert (finding.source, finding.severity, finding.count) == ("train and val", "warning", 1)
    assert the_finding(full(data), "same pixels in both").severity == "fault"
    # With another name and format, only the pixels reveal the leak.
    (data / "val2017" / "train1.png").unlink()
    Image.open(data / "train2017" / "train1.png").save(data / "val2017" / "val5.bmp")
    change(data, "val", setter("images", 0, file_name="val5.bmp"))
    assert quick(data) == []
    assert the_finding(full(data), "same pixels in both").examples == ("train1.png = val5.bmp",)


def test_equal_names_of_different_images_are_only_a_note(data):
    (data / "val2017" / "val5.png").rename(data / "val2017" / "train1.png")
    smaller(data / "val2017" / "train1.png")
    change(data, "val", setter("images", 0, file_name="train1.png", width=45, height=30))
    change(data, "val", setter("annotations", 1, bbox=[3, 3, 4, 4]))
    assert quick(data) == []
    assert the_finding(full(data), "image names in both").severity == "note"


@pytest.mark.parametrize(
    "split, edit, severity, text, example",
    [
        (
            "val",
            setter("categories", 1, name="fork"),
            "error",
            "categories in val that train lacks",
            "2 'fork', in train 'plate'",
        ),
        ("val", adder("categories", {"id": 3, "name": "f"}), "error", "categories in val that train lacks", "3 'f'"),
        ("train", adder("categories", {"id": 3, "name": "fork"}), "warning", "in train that val lacks", "3 'fork'"),
    ],
)
def test_differing_categories_are_named(data, split, edit, severity, text, example):
    change(data, split, edit)
    finding = the_finding(full(data), text)
    assert (finding.severity, finding.examples) == (severity, (example,))


def test_a_label_map_replaces_the_training_categories(data):
    change(data, "val", adder("categories", {"id": 3, "name": "fork"}))
    paths = {name: find_split(str(data), name) for name in ("train", "val")}
    own = json.loads(file_of(data, "val").read_text())["categories"]
    assert quick_checks(paths, 100, label_map=LabelMap.from_categories(own)) == []
    with pytest.raises(UserError, match=r"categories in val that the model lacks: 2 \(2 'plate', 3 'fork'\)"):
        quick_checks(paths, 100, label_map=LabelMap.from_categories(own[:1]))


def test_subsets_of_cocos_categories_agree(data):
    # COCO's categories have fixed labels, whichever of them a data set has.
    for split, categories in (("train", {1: "person", 2: "bicycle"}), ("val", {1: "person", 2: "bicycle", 3: "car"})):
        named = [{"id": i, "name": name} for i, name in categories.items()]
        change(data, split, lambda c, named=named: c.update(categories=named))
    assert quick(data) == []


# The command line ----------------------------------------------------------------------------------------------------


def test_the_report_counts_images_and_objects(data, capsys):
    change(data, "train", setter("annotations", 0, area=96**2, bbox=[0, 0, 50, 40]))
    assert checks_command.main([str(data)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    for row in (
        "images 4 2",
        "objects (no crowds) 8 4",
        "per image, mean 2.0 2.0",
        "small (below 32 x 32) 87.5% 100.0%",
        "large (from 96 x 96) 12.5% 0.0%",
        "most common size 50 x 40 50 x 40",
        "1 cell 4 4 2 2",
    ):
        assert row.split() in rows, row


def test_the_report_is_aligned_and_not_too_wide(data, capsys):
    change(data, "train", adder("annotations", *(annotation(90 + i, (1, 1, 0, 5)) for i in range(2000))))
    change(data, "train", lambda c: c["categories"].append({"id": 12345, "name": "a very long name " * 5}))
    assert checks_command.main([str(data)]) == 1
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith("  ") and line.split()[-1] in ("images", "2", "-")]
    assert len({len(line) for line in table[-4:]}) == 1
    # Examples are not wrapped, so that they can be copied.
    assert max(len(line) for line in lines[3:] if "- " not in line) <= checks_report.LINE_WIDTH
    assert "  fault       2,000  boxes without width or height: dropped" in lines
    assert any(line.endswith("- and 1,997 more") for line in lines)


def test_quick_says_that_no_image_was_read(data, capsys):
    no_image(data / "train2017" / "train2.png")
    assert checks_command.main([str(data), "--quick"]) == 0
    assert "not read (--quick)" in capsys.readouterr().out
    assert checks_command.main([str(data)]) == 1


def test_splits_can_be_given_one_by_one(data, capsys):
    flags = ["--val_images", str(data / "train2017"), "--val_annotations", str(file_of(data, "train"))]
    assert checks_command.main(flags) == 0
    assert "train and val" not in capsys.readouterr().out
    assert checks_command.main([str(data), *flags]) == 1
    assert "the same pixels in both" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "no data: pass a folder"),
        (["nowhere"], "nowhere: no such folder"),
        (["--train_images", "here"], "--train_images and --train_annotations go together"),
        (["--train_images", "here", "--train_annotations", "gone.json"], "gone.json: cannot be read"),
    ],
)
def test_unreadable_arguments_give_status_2(argv, message, capsys):
    assert checks_command.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m enact_common.data.checks: error: ") and message in error


@pytest.mark.parametrize(
    "content, message", [(b"{", "not a JSON file"), (b"\xff\xfe\xfd", "not a JSON file"), (b"[1]", "it holds a list")]
)
def test_files_that_are_not_annotations_are_refused(data, content, message, capsys):
    file_of(data, "val").write_bytes(content)
    assert checks_command.main([str(data)]) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(UserError, match=message):
        quick(data)


def test_an_empty_folder_is_refused_with_the_missing_parts(tmp_path, capsys):
    assert checks_command.main([str(tmp_path)]) == 2
    assert "train2017" in capsys.readouterr().err
