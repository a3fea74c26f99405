"""From files to batches: annotations, categories, decoding, augmentation."""

import itertools
import json
import re
import shutil
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import parse, read_log, real_data, train
from PIL import Image
from pycocotools import mask as coco_mask
from torch.testing import assert_close
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from enact_common import NestedTensor, UserError, nested_tensor_from_tensor_list
from enact_common.boxes import box_cxcywh_to_xyxy
from enact_common.data import cache
from enact_common.data.annotations import find_split, load_annotations
from enact_common.data.build import build_dataset
from enact_common.data.cache import cache_images
from enact_common.data.categories import LabelMap, coco_names
from enact_common.data.checks import __main__ as checks_command
from enact_common.data.checks import rules
from enact_common.data.checks.images import inspect_image
from enact_common.data.checks.split import Split
from enact_common.data.coco import CocoDetection, collate, seeded
from enact_common.data.images import decode_image, image_size
from enact_common.data.transforms import eval_transforms, random_crop, random_resize, resized_shape, train_transforms
from enact_common.data.values import normalise
from enact_common.evaluation.coco import CocoBoxEvaluator
from enact_common.models.normalization import IMAGENET_MEAN, IMAGENET_STD, PixelNormalization

COCO_CATEGORIES = [{"id": i, "name": name} for i, name in enumerate(coco_names()) if name != "N/A"]
OWN_CATEGORIES = [{"id": 7, "name": "bolt"}, {"id": 3, "name": "nut"}]


# Categories ---------------------------------------------------------------------------------------------------------


def test_cocos_categories_keep_their_ids():
    label_map = LabelMap.from_categories(COCO_CATEGORIES)
    assert label_map.num_classes == 91
    assert label_map.labels()[90] == 90 and label_map.names[90] == "toothbrush"
    # COCO has no category 12.
    assert label_map.category_ids[12] is None and 12 not in label_map.labels()


def test_a_subset_of_cocos_categories_keeps_cocos_labels():
    assert LabelMap.from_categories(COCO_CATEGORIES[:3]).num_classes == 91


def test_other_categories_are_numbered_by_id():
    label_map = LabelMap.from_categories(OWN_CATEGORIES)
    assert label_map.category_ids == (3, 7) and label_map.names == ("nut", "bolt")


def test_cocos_ids_with_other_names_are_not_coco():
    # Other data sets also number their categories from 1.
    label_map = LabelMap.from_categories([{"id": 1, "name": "RBC"}, {"id": 2, "name": "WBC"}])
    assert label_map.num_classes == 2


def test_num_classes_may_be_larger_but_not_too_small():
    assert LabelMap.from_categories(OWN_CATEGORIES, 5).category_ids == (3, 7, None, None, None)
    with pytest.raises(UserError, match="--num_classes 1: .* at least 2"):
        LabelMap.from_categories(OWN_CATEGORIES, 1)
    with pytest.raises(UserError, match="at least 91"):
        LabelMap.from_categories(COCO_CATEGORIES, 80)


@pytest.mark.parametrize(
    "categories, num_classes, needed, without",
    [
        ([{"id": 1, "name": "person"}], 1, 2, 91),
        (COCO_CATEGORIES[:3], 3, 4, 91),
        (OWN_CATEGORIES, 1, 2, 2),
        ([{"id": 0, "name": "cells"}, {"id": 5, "name": "RBC"}, {"id": 9, "name": "WBC"}], 2, 3, 3),
    ],
)
def test_too_few_classes_are_refused_with_advice(categories, num_classes, needed, without):
    with pytest.raises(UserError, match=f"^--num_classes {num_classes}: .* pass --num_classes {needed}, or leave") as e:
        LabelMap.from_categories(categories, num_classes)
    assert LabelMap.from_categories(categories, needed).num_classes == needed
    assert LabelMap.from_categories(categories).num_classes == without and f"makes {without} labels" in str(e.value)


def test_label_map_survives_a_checkpoint():
    label_map = LabelMap.from_categories(COCO_CATEGORIES)
    assert LabelMap.from_dict(json.loads(json.dumps(label_map.to_dict()))) == label_map


def test_mismatched_categories_are_named():
    label_map = LabelMap.from_categories(OWN_CATEGORIES)
    with pytest.raises(UserError, match=r"val.json: category 7 \(screw\)"):
        label_map.check_categories([{"id": 7, "name": "screw"}], "val.json")


# Annotations --------------------------------------------------------------------------------------------------------


def annotation_file(folder, **changes):
    """Write a small COCO-format file to `folder/annotations.json`; `changes` replaces lists."""
    data = {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
        "annotations": [
            {"id": 0, "image_id": 1, "category_id": 3, "bbox": [1, 2, 10, 20], "area": 90.0},
            {"id": 0, "image_id": 1, "category_id": 7, "bbox": [5, 5, 4, 4], "iscrowd": 1},
            {"id": 5, "image_id": 1, "category_id": 7, "bbox": [5, 5, 0, 4]},
            {"id": 6, "image_id": 1, "category_id": 7, "bbox": [30, 30, 50, 50]},
        ],
        "categories": OWN_CATEGORIES,
        **changes,
    }
    path = folder / "annotations.json"
    path.write_text(json.dumps(data))
    return path


@pytest.fixture
def two_images(tmp_path):
    """A data set of two 40 x 50 images, the second without objects."""
    for name in ("a.png", "b.png"):
        cv2.imwrite(str(tmp_path / name), np.full((40, 50, 3), 100, np.uint8))
    return CocoDetection(tmp_path, annotation_file(tmp_path), eval_transforms(40, 100))


def test_annotations_are_renumbered_and_completed(tmp_path):
    annotations = load_annotations(annotation_file(tmp_path))["annotations"]
    assert [a["id"] for a in annotations] == [1, 2, 3, 4]
    assert [a["iscrowd"] for a in annotations] == [0, 1, 0, 0]
    assert [a["area"] for a in annotations] == [90.0, 16, 0, 2500]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"categories": None}, "no list 'categories'"),
        ({"categories": []}, "'categories' is empty"),
        ({"images": []}, "'images' is empty"),
        ({"images": [{"id": 1}]}, "lacks one of id, file_name"),
        (
            {"images": [{"id": "img_1", "file_name": "a"}]},
            r"an id in 'images' is the text 'img_1': expected an integer below 2\^53",
        ),
        ({"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}]}, "duplicate id in 'images': 1$"),
        (
            {"images": [{"id": "01", "file_name": "a"}, {"id": 1, "file_name": "b"}]},
            "duplicate id in 'images': '01' and 1$",
        ),
        ({"images": [{"id": 1, "coco_url": "http://x.org/a.jpg"}]}, "'http://x.org/a.jpg', as in LVIS .*file_name"),
        (
            {"annotations": [{"id": 4, "image_id": 9, "category_id": 3, "bbox": [0, 0, 1, 1]}]},
            "annotation 4 .* image 9",
        ),
        ({"annotations": [{"id": 4, "image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1]}]}, "category 1"),
        ({"annotations": [{"id": 4, "image_id": 1, "category_id": 3, "bbox": [0, 0, 1]}]}, r"bbox \[0, 0, 1\]"),
        (
            {"annotations": [{"id": 4, "image_id": 1, "category_id": 3, "bbox": [0, float("nan"), 1, 1]}]},
            "four finite numbers",
        ),
        ({"annotations": [{"id": 4, "image_id": 1, "category_id": 3}]}, "bbox None"),
        ({"annotations": [5]}, "annotation 1 is not a JSON object"),
        ({"annotations": [{"id": 4, "image_id": [1], "category_id": 3}]}, r"annotation 4 belongs to image \[1\]: exp"),
        ({"annotations": [{"id": 4, "image_id": True, "category_id": 3}]}, "annotation 4 belongs to image True: exp"),
        ({"annotations": [{"id": 4, "image_id": "i", "category_id": 3}]}, "belongs to image the text 'i': expected"),
        ({"annotations": [{"id": 4, "image_id": 1, "category_id": "nut"}]}, "has category the text 'nut': expected"),
        ({"annotations": [{"id": 4, "image_id": "9", "category_id": 3}]}, "to image 9, which is not in 'images'"),
        (
            {"annotations": [{"id": 4, "image_id": 1, "category_id": 3, "bbox": "[1, 2, 3, 4]"}]},
            r"annotation 4 has bbox the text '\[1, 2, 3, 4\]': expected a list of four finite numbers",
        ),
        ({"annotations": [{"id": 4, "image_id": 1, "category_id": {}}]}, r"annotation 4 has category \{\}"),
        (
            {"annotations": [{"id": 4, "image_id": 1, "category_id": 3, "bbox": [0, 0, 1, 10**400]}]},
            "annotation 4 has bbox .* four finite numbers",
        ),
        ({"images": [{"id": 1, "file_name": 7}]}, "a file_name in 'images' is not a string: .* 7"),
    ],
)
def test_annotation_faults_are_named_with_their_file(tmp_path, changes, message):
    path = annotation_file(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as error:
        load_annotations(path)
    assert str(path) in str(error.value)


# Spellings of an id and its value; None for invalid ids.
WRITTEN_IDS = {
    "text": ("7", 7), "blanks": (" 7 ", 7), "zeros": ("007", 7), "text of a float": ("7.0", 7), "a float": (7.0, 7),
    "negative": ("-7", -7), "large": (str(2**53 - 1), 2**53 - 1), "too large": (str(2**53), None),
    "too large, float": (2.0**53, None), "too large, int": (2**60, None), "many digits": ("9" * 5000, None),
    "exponent": ("1e3", None), "other digits": ("\u0663", None), "half": (7.5, None), "half as text": ("7.5", None),
    "true": (True, None), "NaN": (float("nan"), None), "infinity": (float("inf"), None), "a name": ("img_7", None),
    "nothing": ("", None), "null": (None, None), "underscore": ("1_0", None),
}  # fmt: skip


@pytest.mark.parametrize("field", ["id", "category_id", "image_id"])
@pytest.mark.parametrize("name", WRITTEN_IDS)
def test_ids_are_read_in_any_spelling_of_a_whole_number(tmp_path, two_images, caplog, field, name):
    """The id is spelled so in `images` and `categories` or in the annotations, and is a plain number in the other."""
    spelling, number = WRITTEN_IDS[name]
    plain = 7 if number is None else number
    entries = {
        "images": [{"id": spelling if field == "id" else plain, "file_name": "a.png"}],
        "categories": [{"id": spelling if field == "id" else plain, "name": "nut"}],
        "annotations": [
            {"id": "x", "image_id": plain, "category_id": plain, "bbox": [1, 2, 10, 20]} | ({field: spelling})
        ],
    }
    path = annotation_file(tmp_path, **entries)
    split = Split("train", tmp_path, path)
    errors = [f for f in rules.check_quickly([split], 100) if f.severity == "error"]
    if number is None:
        with pytest.raises(UserError, match="expected an integer below 2"):
            load_annotations(path)
        assert any("expected an integer below 2" in error.text for error in errors)
        assert field == "id" or not any("not listed" in error.text for error in errors)
        return
    assert not errors
    dataset = CocoDetection(tmp_path, path, eval_transforms(40, 100))
    truth = dataset.coco_api()
    assert dataset.image_ids == truth.getImgIds() == [number] and dataset.num_objects == 1
    assert dataset.label_map.category_ids == (number,) == tuple(truth.getCatIds())
    assert (truth.anns[1]["image_id"], truth.anns[1]["category_id"]) == (number, number)
    assert caplog.text.count("read as numbers") == 1
    assert split.rewritten.counts.total() == (3 if field == "id" else 1)


@pytest.mark.parametrize(
    "box, area",
    [
        (["1", " 2.5", "1e1", "20"], "200.0"), ([1, 2.5, "10.", 2e1], "2e2"), ([1, "2.50", 10, "+20"], 200),
    ],
)  # fmt: skip
def test_numbers_of_boxes_and_areas_may_be_text(tmp_path, two_images, box, area):
    annotations = [{"id": 1, "image_id": 1, "category_id": 3, "bbox": box, "area": area}]
    path = annotation_file(tmp_path, annotations=annotations)
    (read,) = load_annotations(path)["annotations"]
    assert (read["bbox"], read["area"]) == ([1, 2.5, 10, 20], 200)
    split = Split("train", tmp_path, path)
    assert split.boxes.tolist() == [[1, 2.5, 10, 20]] and split.areas.tolist() == [200]
    assert CocoDetection(tmp_path, path, eval_transforms(40, 100)).num_objects == 1


@pytest.mark.parametrize(
    "box", ["1 2 3 4", ["1", "a", 3, 4], ["1", "nan", 3, 4], ["1,5", 2, 3, 4], [1, "\u0663", 3, 4]]
)
def test_invalid_boxes_are_quoted_as_in_the_file(tmp_path, box):
    path = annotation_file(tmp_path, annotations=[{"id": 4, "image_id": 1, "category_id": 3, "bbox": box}])
    with pytest.raises(UserError) as error:
        load_annotations(path)
    assert f"annotation 4 has bbox {'the text ' * isinstance(box, str)}{box!r}: expected a list" in str(error.value)


def test_normalise_does_not_modify_its_input():
    entries = [{"id": "1", "image_id": "2", "bbox": ["1", 2, 3, 4]}, 7, {"bbox": [1, "a"]}, {"bbox": {}}]
    data = {"annotations": entries, "images": {}, "other": "5"}
    before = json.dumps(data)
    read, rewritten = normalise(data)
    assert json.dumps(data) == before and rewritten.counts.total() == 3
    assert read["annotations"][0] == {"id": 1, "image_id": 2, "bbox": [1, 2, 3, 4]}
    assert read["annotations"][1:] == entries[1:] and read["images"] == {} and read["other"] == "5"
    # A second call changes nothing.
    assert normalise(read)[1].counts.total() == 0


@pytest.mark.parametrize(
    "content, message",
    [('{"images": [', "not a JSON file"), ("[" * 10**5, "not a JSON file"), (None, r"cannot be read \(No such file")],
)
def test_files_that_are_not_json_are_named(tmp_path, content, message):
    path = tmp_path / "broken.json"
    if content:
        path.write_text(content)
    with pytest.raises(UserError, match=f"broken.json: {message}"):
        load_annotations(path)


def test_targets_leave_out_crowds_and_boxes_without_area(two_images, caplog):
    _, target = two_images[0]
    assert target["labels"].tolist() == [0, 1]
    # The second box reaches beyond the image and is clipped.
    expected = torch.tensor([[6 / 50, 12 / 40, 10 / 50, 20 / 40], [40 / 50, 35 / 40, 20 / 50, 10 / 40]])
    assert_close(target["boxes"], expected)
    assert target["orig_size"].tolist() == [40, 50] and target["image_id"].tolist() == [1]


def test_boxes_without_area_are_counted(tmp_path, caplog, two_images):
    with caplog.at_level("WARNING"):
        CocoDetection(tmp_path, annotation_file(tmp_path), eval_transforms(40, 100))
    assert "1 boxes without area are dropped" in caplog.text


@pytest.mark.parametrize(
    "box, clipped",
    [
        ([-10, 0, 30, 20], [0, 0, 20, 20]),
        ([-50, 0, 30, 20], None),
        ([60, 5, 10, 10], None),
        ([40, 30, 50, 50], [40, 30, 50, 40]),
    ],
)
@pytest.mark.parametrize(
    "sizes_known, size",
    [
        (False, {}),
        (True, {"width": 50, "height": 40}),
        (True, {"width": "50", "height": "40"}),
        (False, {"width": "fifty", "height": 40}),
        (False, {"width": 10**400, "height": [40]}),
        (False, {"width": -50, "height": 0}),
    ],
)
def test_boxes_are_clipped_to_the_image(tmp_path, two_images, box, clipped, sizes_known, size):
    path = annotation_file(
        tmp_path,
        images=[{"id": 1, "file_name": "a.png", **size}],
        annotations=[{"id": 1, "image_id": 1, "category_id": 3, "bbox": box}],
    )
    dataset = CocoDetection(tmp_path, path, eval_transforms(40, 100))
    boxes = box_cxcywh_to_xyxy(dataset[0][1]["boxes"]) * torch.tensor([50, 40, 50, 40])
    assert_close(boxes, torch.tensor([clipped] if clipped else []).reshape(-1, 4).float())
    if sizes_known:
        assert dataset.num_objects == len(boxes)


def test_an_image_without_objects_has_empty_targets(two_images):
    image, target = two_images[1]
    assert image.shape == (3, 40, 50)
    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)


def test_limit_keeps_the_first_images(tmp_path, two_images):
    dataset = CocoDetection(tmp_path, annotation_file(tmp_path), eval_transforms(40, 100), limit=1)
    assert dataset.image_ids == [1] and len(dataset.coco_api().getImgIds()) == 1


def test_missing_images_are_counted_and_named(tmp_path, two_images):
    (tmp_path / "b.png").unlink()
    with pytest.raises(UserError, match=r"1 of its 2 image files are missing, .*b\.png"):
        CocoDetection(tmp_path, annotation_file(tmp_path), eval_transforms(40, 100))


def test_ground_truth_keeps_crowds_and_every_annotation(two_images):
    coco = two_images.coco_api()
    assert len(coco.getAnnIds()) == 4 and len(coco.getAnnIds(iscrowd=True)) == 1
    assert len(coco.getImgIds()) == 2


@pytest.mark.parametrize("mark, left_out", [(1, True), (True, True), ("1", True), (0, False), ("0", False)])
def test_difficult_annotations_become_crowds_with_remove_difficult(tmp_path, two_images, mark, left_out):
    boxes = [[1, 2, 10, 20], [20, 20, 5, 5]]
    annotations = [{"id": n, "image_id": 1, "category_id": 3, "bbox": box} for n, box in enumerate(boxes)]
    annotations[1] |= {"difficult": mark, "iscrowd": 0}
    path = annotation_file(tmp_path, annotations=annotations)
    assert [a["iscrowd"] for a in load_annotations(path)["annotations"]] == [0, 0]
    for asked in (False, True):
        dataset = CocoDetection(tmp_path, path, eval_transforms(40, 100), remove_difficult=asked)
        assert len(dataset[0][1]["labels"]) == dataset.num_objects == (1 if asked and left_out else 2)
        # In evaluation they stay as crowds, whose detections count neither as correct nor as wrong.
        truth = dataset.coco_api()
        assert len(truth.getAnnIds()) == 2 and len(truth.getAnnIds(iscrowd=True)) == (asked and left_out)


MARKS = [(1, 1), (True, 1), ("1", 1), ("true", 1), (" True", 1), ("1.0", 1), (1.0, 1)]
MARKS += [(0, 0), (False, 0), ("0", 0), ("false", 0), ("False", 0), (None, 0), ("x", 0), (2, 0), ([], 0), ("", 0)]


@pytest.mark.parametrize("key", ["ignore", "iscrowd"])
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("mark, crowd", MARKS, ids=lambda value: repr(value))
def test_ignored_objects_count_as_crowds(tmp_path, two_images, caplog, key, mark, crowd, masks):
    boxes = [[1, 2, 10, 20], [20, 20, 5, 5]]
    corners = [[x, y, x + w, y, x + w, y + h, x, y + h] for x, y, w, h in boxes]
    annotations = [
        {"id": n, "image_id": 1, "category_id": 3, "bbox": box, "segmentation": [polygon]}
        for n, (box, polygon) in enumerate(zip(boxes, corners, strict=True))
    ]
    annotations[1] |= {"iscrowd": 0, key: mark}
    images = [{"id": 1, "file_name": "a.png", "width": 50, "height": 40}]
    path = annotation_file(tmp_path, images=images, annotations=annotations)
    dataset = CocoDetection(tmp_path, path, eval_transforms(40, 100), masks=masks)
    assert dataset.num_objects == len(dataset[0][1]["labels"]) == 2 - crowd
    assert Split("train", tmp_path, path).crowd.tolist() == [False, crowd]
    truth = dataset.coco_api()
    assert len(truth.getAnnIds(iscrowd=True)) == crowd
    warning = '1 annotations have "ignore": 1 and count as crowds'
    assert caplog.text.count(warning) == (crowd and key == "ignore")
    # The second object's detection is wrong at high IoU thresholds, unless the object is a crowd.
    evaluator = CocoBoxEvaluator(dataset.label_map)
    detections = {"scores": torch.tensor([0.8, 0.9]), "labels": torch.tensor([0, 0])}
    detections["boxes"] = torch.tensor([[1.0, 2, 11, 22], [20, 20, 23, 25]])
    if masks:
        sides = np.zeros((2, 40, 50), np.uint8)
        sides[0, 2:22, 1:11] = sides[1, 20:25, 20:23] = 1
        detections["segmentations"] = [coco_mask.encode(np.asfortranarray(mask)) for mask in sides]
    evaluator.update([1], [detections])
    stats = evaluator.evaluate(truth, masks).stats
    assert stats[1] == pytest.approx(1)
    assert (stats[0] == pytest.approx(1)) == bool(crowd)


def test_only_the_test_split_may_lack_annotations(tmp_path, two_images):
    path = annotation_file(tmp_path)
    data = json.loads(path.read_text())
    del data["annotations"]
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match="no list 'annotations'"):
        load_annotations(path)
    assert load_annotations(path, annotated=False) == {**data, "annotations": []}
    dataset = CocoDetection(tmp_path, path, eval_transforms(40, 100), annotated=False)
    image, target = dataset[1]
    assert len(dataset) == 2 and image.shape == (3, 40, 50) and target["boxes"].shape == (0, 4)
    assert target["orig_size"].tolist() == [40, 50] and target["image_id"].tolist() == [2]
    # Images and categories are still checked.
    path.write_text(json.dumps({**data, "images": []}))
    with pytest.raises(UserError, match="'images' is empty"):
        load_annotations(path, annotated=False)


def test_the_test_split_is_test_dev_or_all_test_images(tmp_path):
    annotations = tmp_path / "annotations"
    (tmp_path / "images" / "test2017").mkdir(parents=True)
    annotations.mkdir()
    with pytest.raises(UserError, match="image_info_test-dev2017.json is missing .* or image_info_test2017.json"):
        find_split(str(tmp_path), "test")
    for name in ("image_info_test2017.json", "image_info_test-dev2017.json"):
        (annotations / name).write_text("{}")
        assert find_split(str(tmp_path), "test") == (tmp_path / "images" / "test2017", annotations / name)
    (tmp_path / "test2017").mkdir()
    assert find_split(str(tmp_path), "test")[0] == tmp_path / "test2017"


def test_both_folder_layouts_are_found(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text("{}")
    with pytest.raises(UserError, match="val2017 is missing"):
        find_split(str(tmp_path), "val")
    (tmp_path / "images" / "val2017").mkdir(parents=True)
    assert find_split(str(tmp_path), "val")[0] == tmp_path / "images" / "val2017"
    (tmp_path / "val2017").mkdir()
    assert find_split(str(tmp_path), "val")[0] == tmp_path / "val2017"
    with pytest.raises(UserError, match="no such folder"):
        find_split(str(tmp_path / "nowhere"), "val")


@pytest.fixture
def exported(tmp_path) -> Path:
    """A Roboflow export: annotations next to the images, and a first category without objects."""
    categories = [{"id": 0, "name": "cells", "supercategory": "none"}]
    categories += [{"id": i, "name": name, "supercategory": "cells"} for i, name in enumerate(("RBC", "WBC"), start=1)]
    for part in ("train", "valid", "test"):
        folder = tmp_path / "export" / part
        folder.mkdir(parents=True)
        annotation_file(
            folder,
            images=[{"id": i, "file_name": f"{part}{i}.png", "width": 50, "height": 40} for i in range(2)],
            annotations=[
                {"id": i, "image_id": i, "category_id": 1 + i, "bbox": [5, 5, 20, 20 + i], "iscrowd": 0}
                for i in range(2)
            ],
            categories=categories,
        ).rename(folder / "_annotations.coco.json")
        for i in range(2):
            pixels = np.random.default_rng(ord(part[1]) + i).integers(0, 255, (40, 50, 3), dtype=np.uint8)
            cv2.imwrite(str(folder / f"{part}{i}.png"), pixels)
    return tmp_path / "export"


@pytest.mark.parametrize("val", ["valid", "val"])
def test_roboflows_layout_is_found(exported, val):
    (exported / "valid").rename(exported / val)
    for split, folder in (("train", "train"), ("val", val), ("test", "test")):
        file = exported / folder / "_annotations.coco.json"
        assert find_split(str(exported), split) == (exported / folder, file)
    assert checks_command.main([str(exported)]) == 0
    dataset = CocoDetection(*find_split(str(exported), "train"), eval_transforms(40, 100))
    # The first category has no objects, but keeps its label.
    assert dataset.label_map.names == ("cells", "RBC", "WBC") and dataset.label_map.category_ids == (0, 1, 2)
    assert [dataset[i][1]["labels"].tolist() for i in range(2)] == [[1], [2]]


def test_a_roboflow_export_trains(exported, tmp_path):
    assert train("detr", exported, tmp_path / "out", "--epochs", "1", "--batch_size", "2") == 0
    (row,) = read_log(tmp_path / "out")
    assert np.isfinite(row["train_loss"]) and row["test_coco_eval_bbox"][0] >= 0


def remove_valid(root: Path) -> None:
    shutil.rmtree(root / "valid")


def remove_json(root: Path) -> None:
    (root / "valid" / "_annotations.coco.json").unlink()


def add_coco(root: Path) -> None:
    remove_valid(root)
    (root / "val2017").mkdir()
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_val2017.json").write_text("{}")


def add_val(root: Path) -> None:
    shutil.copytree(root / "valid", root / "val")


def remove_all(root: Path) -> None:
    for part in ("train", "valid", "test"):
        (root / part / "_annotations.coco.json").unlink()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (remove_valid, "valid/_annotations.coco.json is missing"),
        (remove_json, "valid/_annotations.coco.json is missing"),
        (add_coco, "mixes two layouts, .*instances_val2017.json and .*_annotations.coco.json"),
        (add_val, "valid/_annotations.coco.json and .*val/_annotations.coco.json both exist"),
        (remove_all, "val2017 is missing"),
    ],
)
def test_mixed_and_missing_parts_are_refused_with_the_known_layouts(exported, spoil, message):
    spoil(exported)
    with pytest.raises(UserError, match=message) as error:
        find_split(str(exported), "val")
    if spoil is not add_val:
        assert all(words in str(error.value) for words in ("known layouts: COCO's", "Roboflow's", "--val_images"))


# Decoding -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def picture():
    """A smooth RGB image as a PIL image, 60 x 80."""
    y, x = np.mgrid[0:60, 0:80]
    return Image.fromarray(np.stack([x * 3, y * 4, 255 - x * 2], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("name", ["rgb.jpg", "rgb.png", "rgb.bmp", "rgb.webp"])
def test_decoding_agrees_with_pil(tmp_path, picture, name):
    picture.save(tmp_path / name)
    expected = torch.from_numpy(np.array(Image.open(tmp_path / name).convert("RGB"))).permute(2, 0, 1)
    assert_close(decode_image(tmp_path / name).int(), expected.int(), atol=1, rtol=0)


@pytest.mark.parametrize(
    "mode, name", [("L", "g.jpg"), ("L", "g.png"), ("CMYK", "c.jpg"), ("RGBA", "a.png"), ("P", "p.png")]
)
def test_other_colours_become_rgb(tmp_path, picture, mode, name):
    picture.convert(mode).save(tmp_path / name)
    expected = torch.from_numpy(np.array(Image.open(tmp_path / name).convert("RGB"))).permute(2, 0, 1)
    decoded = decode_image(tmp_path / name)
    assert decoded.shape == (3, 60, 80) and decoded.dtype == torch.uint8
    # OpenCV converts CMYK slightly differently.
    assert_close(decoded.int(), expected.int(), atol=4 if mode == "CMYK" else 1, rtol=0)


def test_16_bit_images_become_8_bit(tmp_path):
    ramp = np.linspace(0, 65535, 80, dtype=np.uint16)[None].repeat(60, axis=0)
    cv2.imwrite(str(tmp_path / "deep.png"), ramp)
    assert_close(
        decode_image(tmp_path / "deep.png")[0, 0].int(), torch.from_numpy(ramp[0] // 257).int(), atol=1, rtol=0
    )


def test_bytes_after_the_end_of_a_jpeg_are_ignored(tmp_path, picture):
    picture.save(tmp_path / "plain.jpg")
    (tmp_path / "longer.jpg").write_bytes((tmp_path / "plain.jpg").read_bytes() + b"camera maker's notes")
    assert_close(
        decode_image(tmp_path / "longer.jpg").int(), decode_image(tmp_path / "plain.jpg").int(), atol=1, rtol=0
    )


def test_exif_rotation_is_not_applied(tmp_path, picture):
    exif = Image.Exif()
    exif[0x0112] = 6  # viewers rotate it by 90 degrees
    picture.save(tmp_path / "turned.jpg", exif=exif)
    picture.save(tmp_path / "plain.jpg")
    assert torch.equal(decode_image(tmp_path / "turned.jpg"), decode_image(tmp_path / "plain.jpg"))


@pytest.mark.parametrize("content", [b"", b"plain text", "truncated"], ids=str)
def test_files_that_are_not_images_are_named(tmp_path, picture, content):
    path = tmp_path / "bad.jpg"
    if content == "truncated":
        picture.resize((400, 300)).save(path)
        content = path.read_bytes()[:3000]
    path.write_bytes(content)
    with pytest.raises(UserError, match="bad.jpg: not an image"):
        decode_image(path)
    with pytest.raises(UserError, match=r"gone.jpg: cannot be read \(No such file"):
        decode_image(tmp_path / "gone.jpg")


def with_header_size(png: bytes, width: int, height: int) -> bytes:
    """A PNG file with this size in its header."""
    header = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def test_an_image_with_too_many_pixels_is_refused(tmp_path, two_images):
    path = tmp_path / "b.png"
    bomb = with_header_size(path.read_bytes(), 60000, 60000)
    with pytest.raises(cv2.error):
        cv2.imdecode(np.frombuffer(bomb, np.uint8), cv2.IMREAD_COLOR)
    path.write_bytes(bomb)
    reason = r"b\.png: not an image that can be read whole \(it has 60,000 x 60,000 pixels .* 1,073,741,824; make"
    for read in (lambda: two_images[1], lambda: image_size(path), lambda: cache_images([two_images], "decoded")):
        with pytest.raises(UserError, match=reason):
            read()
    assert re.search(reason, inspect_image(path).error)


@pytest.mark.parametrize("kind, places", [("bmp", (18, 22, 28, 30)), ("tiff", (4, 8, 10, 12))])
def test_damaged_headers_give_an_image_or_a_user_error(tmp_path, picture, kind, places):
    path = tmp_path / f"damaged.{kind}"
    picture.save(path)
    whole, refused = path.read_bytes(), 0
    for place, value in itertools.product(places, (0, 127, 255)):
        path.write_bytes(whole[:place] + bytes([value]) * 4 + whole[place + 4 :])
        try:
            assert decode_image(path).shape[0] == 3
        except UserError as error:
            assert f"damaged.{kind}: not an image" in str(error)
            refused += 1
    assert refused


# Transforms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, size, max_size, expected",
    [
        ((480, 640), 800, 1333, (800, 1066)),
        ((640, 480), 800, 1333, (1066, 800)),
        ((426, 640), 800, 1333, (800, 1201)),
        ((300, 900), 800, 1333, (444, 1332)),  # the longer side is bounded
        ((500, 500), 600, 1333, (600, 600)),
        ((1, 1000), 800, 1333, (1, 1000)),
    ],
)
def test_resize_rounds_as_the_original(shape, size, max_size, expected):
    assert resized_shape(*shape, size, max_size) == expected


def marked_image(height=100, width=160, box=(40, 30, 80, 60)):
    """A black image with a white box, and its target."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    left, top, right, bottom = box
    image[:, top:bottom, left:right] = 255
    boxes = tv_tensors.BoundingBoxes([box], format="XYXY", canvas_size=(height, width), dtype=torch.float32)
    return tv_tensors.Image(image), {"boxes": boxes, "labels": torch.tensor([4])}


def test_augmentation_depends_on_the_seed():
    transform = train_transforms([96, 128, 160], 200)
    outputs = []
    for seed in [*range(30), 0]:
        with seeded(seed):
            image, target = transform(*marked_image())
        outputs.append((tuple(image.shape), tuple(target["boxes"].flatten().tolist())))
    assert outputs[0] == outputs[-1]
    assert len(set(outputs)) > 20
    flipped = [boxes[0] > 0.5 for shape, boxes in outputs if shape == (3, 125, 200) and boxes]
    assert len(set(flipped)) == 2


def test_crops_drop_boxes_outside():
    num_boxes = 0
    for seed in range(30):
        with seeded(seed):
            image, target = random_crop(*marked_image(), 20, 30)
        assert 20 <= image.shape[1] <= 30 and 20 <= image.shape[2] <= 30
        assert len(target["boxes"]) == len(target["labels"]) == int(bool((image > 0).any()))
        num_boxes += len(target["boxes"])
    assert 0 < num_boxes < 30


def test_crops_of_small_images_keep_their_sides():
    image, target = random_crop(*marked_image(), 384, 600)
    assert image.shape == (3, 100, 160) and len(target["boxes"]) == 1


def test_resize_scales_boxes():
    image, target = random_resize(*marked_image(), [50], 1000)
    assert image.shape == (3, 50, 80)
    assert target["boxes"].tolist() == [[20, 15, 40, 30]]


def test_seeded_restores_the_generator():
    state = torch.get_rng_state()
    with seeded(1, 2, 3):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)
    with seeded(1, 2, 3):
        assert torch.equal(torch.rand(3), first)
    with seeded(1, 2, 4):
        assert not torch.equal(torch.rand(3), first)


# Pixels -------------------------------------------------------------------------------------------------------------


def random_pixels(*shapes):
    """Random images, uint8 (3, height, width); every image contains 0 and 255."""
    images = [torch.randint(256, (3, *shape), dtype=torch.uint8) for shape in shapes]
    for image in images:
        image[:, 0, :2] = torch.tensor([0, 255], dtype=torch.uint8)
    return images


def test_normalising_a_batch_equals_normalising_each_image_before_padding():
    images = random_pixels((30, 50), (41, 23), (16, 16))
    each = [F.normalize(F.to_dtype(image, torch.float32, scale=True), IMAGENET_MEAN, IMAGENET_STD) for image in images]
    expected = nested_tensor_from_tensor_list(each)
    batch, targets = collate([(image, {}) for image in images])
    assert batch.tensors.dtype == torch.uint8 and (batch.tensors.amax(dim=1)[batch.mask] == 0).all()
    pixels = batch.tensors.clone()
    normalized = PixelNormalization()(batch)
    assert normalized.tensors.dtype == torch.float32
    assert torch.equal(normalized.tensors, expected.tensors) and torch.equal(normalized.mask, expected.mask)
    # The input is not modified, because a non-finite loss runs the batch through the model again.
    assert torch.equal(batch.tensors, pixels)


def test_floating_point_pixels_count_as_normalised():
    for dtype in (torch.float32, torch.bfloat16):
        batch = nested_tensor_from_tensor_list([torch.randn(3, 4, 6, dtype=dtype), torch.randn(3, 6, 4, dtype=dtype)])
        normalized = PixelNormalization()(batch)
        assert normalized.tensors.equal(batch.tensors.float()) and normalized.mask is batch.mask


def test_pixels_of_another_type_are_refused():
    batch = NestedTensor(torch.zeros(1, 3, 4, 4, dtype=torch.int64), torch.zeros(1, 4, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="uint8, 0 to 255, or floating point and normalised, got torch.int64"):
        PixelNormalization()(batch)


def test_normalisation_follows_the_models_dtype_and_adds_no_state():
    normalize = PixelNormalization()
    assert not normalize.state_dict() and not list(normalize.parameters())
    (image,) = random_pixels((5, 7))
    converted = normalize.double()(nested_tensor_from_tensor_list([image])).tensors
    assert converted.dtype == torch.float64
    # The meta device has no values to read, so the layer cannot depend on a device read-back.
    batch = nested_tensor_from_tensor_list(random_pixels((8, 8), (4, 9)))
    assert PixelNormalization().to("meta")(batch.to("meta")).tensors.is_meta


# Data sets ----------------------------------------------------------------------------------------------------------


def shapes_set(shapes, split="train", *argv):
    """The data set of drawn shapes for DETR's arguments."""
    args = parse("detr", "--coco_path", str(shapes), "--train_sizes", "48", "64", "--eval_size", "64", *argv)
    return build_dataset(split, args)


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_depends_on_the_epoch_and_not_on_the_workers(shapes, workers):
    dataset = shapes_set(shapes)
    loader = DataLoader(dataset, 3, collate_fn=collate, num_workers=workers, persistent_workers=workers > 0)
    expected = {}
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        expected[epoch] = [dataset[i][0] for i in range(len(dataset))]
    assert any(not torch.equal(a, b) for a, b in zip(expected[0], expected[1], strict=True))
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        i = 0
        for batch, _ in loader:
            for tensor, mask in zip(batch.tensors, batch.mask, strict=True):
                h, w = (~mask).any(1).sum(), (~mask).any(0).sum()
                assert torch.equal(tensor[:, :h, :w], expected[epoch][i])
                i += 1


both_modes = pytest.mark.parametrize("mode", ["encoded", "decoded"])


@both_modes
@pytest.mark.parametrize("workers", [0, 2])
def test_cached_images_give_the_same_items_without_the_disk(shapes, tmp_path, workers, mode):
    data = shutil.copytree(shapes, tmp_path / "data")
    train, val = shapes_set(data), shapes_set(data, "val", "--limit_val", "4")
    expected = [[dataset[i] for i in range(len(dataset))] for dataset in (train, val)]
    cache_images([train, val], mode)
    for split in ("train2017", "val2017"):
        shutil.rmtree(data / split)
    for dataset, items in zip((train, val), expected, strict=True):
        loader = DataLoader(dataset, None, num_workers=workers)
        for (image, target), (wanted, wanted_target) in zip(loader, items, strict=True):
            assert torch.equal(image, wanted)
            assert all(torch.equal(target[name], value) for name, value in wanted_target.items())


@both_modes
def test_cached_images_are_not_modified(two_images, mode):
    expected = two_images.image(0).clone()
    cache_images([two_images], mode)
    for _ in range(2):
        assert torch.equal(two_images.image(0), expected)
        two_images.image(0).zero_()


def test_grey_and_transparent_images_are_cached_as_decoded(tmp_path, two_images):
    Image.fromarray(np.arange(40 * 50, dtype=np.uint32).astype(np.uint8).reshape(40, 50)).save(tmp_path / "a.png")
    Image.fromarray(np.full((30, 20, 4), 77, np.uint8)).save(tmp_path / "b.png")
    expected = [two_images.image(i) for i in range(2)]
    cache_images([two_images], "decoded")
    assert [tuple(image.shape) for image in expected] == [(3, 40, 50), (3, 30, 20)]
    assert all(torch.equal(two_images.image(i), image) for i, image in enumerate(expected))


@both_modes
def test_images_shared_by_data_sets_are_cached_once(shapes, monkeypatch, mode):
    train, subset = shapes_set(shapes), shapes_set(shapes, "val", "--eval_set", "train", "--limit_val", "5")
    expected = [dataset.image(i) for dataset in (train, subset) for i in range(len(dataset))]
    read = []
    monkeypatch.setattr(cache, "read_file", lambda path, original=cache.read_file: read.append(path) or original(path))
    cache_images([train, subset], mode)
    assert sorted(read) == sorted(train.path(i) for i in range(12))
    cached = [dataset.image(i) for dataset in (train, subset) for i in range(len(dataset))]
    assert all(torch.equal(*pair) for pair in zip(cached, expected, strict=True))
    assert len(read) == 12


def test_caching_names_unreadable_files(tmp_path, two_images):
    path = tmp_path / "b.png"
    path.write_bytes(b"no image")
    cache_images([two_images], "encoded")
    assert two_images[0][0].shape == (3, 40, 50)
    with pytest.raises(UserError, match="b.png: not an image that can be read whole"):
        two_images[1]
    with pytest.raises(UserError, match="b.png: not an image that can be read whole"):
        cache_images([two_images], "decoded")
    path.unlink()
    for mode in ("encoded", "decoded"):
        with pytest.raises(UserError, match=r"b.png: cannot be read \(No such file"):
            cache_images([two_images], mode)


def test_an_image_that_ends_after_its_header_is_named(tmp_path, two_images):
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[:60])
    with pytest.raises(UserError, match="b.png: not an image that can be read whole"):
        cache_images([two_images], "decoded")


@pytest.mark.parametrize(
    "mode, message",
    [
        ("encoded", "a.png: changed while it was read"),
        ("decoded", "a.png: has 20 x 30 pixels .* its header says 40 x 50; .* pass --cache_mode encoded"),
    ],
)
def test_a_file_that_changes_its_size_is_named(two_images, monkeypatch, mode, message):
    other = cv2.imencode(".png", np.zeros((20, 30, 3), np.uint8))[1]
    monkeypatch.setattr(cache, "read_file", lambda path: other)
    with pytest.raises(UserError, match=message):
        cache_images([two_images], mode)
    # The failed cache is discarded, and the image is read from disk.
    assert two_images.image(0).shape == (3, 40, 50)


@both_modes
def test_a_cache_larger_than_the_memory_is_refused(tmp_path, two_images, monkeypatch, mode):
    decoded = mode == "decoded"
    size = 2 * 3 * 40 * 50 if decoded else sum((tmp_path / name).stat().st_size for name in ("a.png", "b.png"))
    assert cache.physical_memory() > 2**28
    monkeypatch.setattr(cache, "physical_memory", lambda: size)
    cache_images([two_images], mode)
    monkeypatch.setattr(cache, "physical_memory", lambda: size - 1)
    monkeypatch.setattr(cache, "read_file", lambda path: pytest.fail("read before its size was known to fit"))
    what = "the decoded images" if decoded else "the image files"
    way_out = "; pass --cache_mode encoded, or leave the flag out" if decoded else "; leave the flag out"
    needed, there = (f"{number / 2**30:.4g} GiB" for number in (size, size - 1))
    with pytest.raises(UserError, match=f"--cache_mode {mode}: {what} are {needed}, .* memory is {there}{way_out}"):
        cache_images([two_images], mode)
    # Each rank on a machine has a separate cache.
    monkeypatch.setattr(cache, "physical_memory", lambda: size)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="GiB in each of 2 processes"):
        cache_images([two_images], mode)


def test_no_augmentation_gives_whole_images(shapes):
    dataset = shapes_set(shapes, "train", "--no_augmentation")
    assert {dataset[i][0].shape for i in range(len(dataset))} == {(3, 64, 80)}
    dataset.set_epoch(1)
    assert dataset[0][0].shape == (3, 64, 80)


def test_real_coco_images(coco_mini):
    args = parse("detr", "--coco_path", str(coco_mini), "--train_sizes", "160", "--eval_size", "160")
    train, val = (build_dataset(split, args) for split in ("train", "val"))
    assert len(train) == 295 and len(val) == 188
    assert train.label_map.num_classes == 91
    image, target = val[0]
    assert min(image.shape[-2:]) == 160 and set(target["labels"].tolist()) <= set(train.label_map.labels().values())
    assert len(val.coco_api().getAnnIds()) == 1692


def test_real_data_with_other_categories():
    args = parse("detr", "--coco_path", str(real_data("ENACT_BCCD")))
    dataset = build_dataset("train", args)
    assert dataset.label_map.names == ("RBC", "WBC", "Platelets") and dataset.label_map.num_classes == 3
    assert len(dataset) == 292


def test_remove_difficult_drops_difficult_objects(shapes, tmp_path):
    data = shutil.copytree(shapes, tmp_path / "data")
    for split in ("train", "val"):
        path = data / "annotations" / f"instances_{split}2017.json"
        content = json.loads(path.read_text())
        content["annotations"][0]["difficult"] = 1
        path.write_text(json.dumps(content))
        every = shapes_set(data, split).num_objects
        assert shapes_set(data, split, "--remove_difficult").num_objects == every - 1


def test_eval_set_train_evaluates_on_training_images(shapes):
    dataset = shapes_set(shapes, "val", "--eval_set", "train", "--limit_val", "5")
    assert len(dataset) == 5 and dataset.image_folder == shapes / "train2017"
    # The images are not augmented.
    assert {dataset[i][0].shape for i in range(5)} == {(3, 64, 80)}
