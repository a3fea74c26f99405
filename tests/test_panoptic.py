"""COCO's panoptic format: loading, augmentation, panoptic quality, results and pictures."""

import json

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close

from enact_common.boxes import box_cxcywh_to_xyxy, boxes_of_masks
from enact_common.data.cache import cache_images
from enact_common.data.coco import collate, seeded
from enact_common.data.images import decode_image
from enact_common.data.panoptic import (
    CocoPanoptic,
    PanopticTruth,
    encode_id_map,
    find_panoptic_split,
    panoptic_label_map,
    read_id_map,
)
from enact_common.data.transforms import eval_transforms, random_crop, train_transforms
from enact_common.drawing.detections import colour_of
from enact_common.drawing.panoptic import draw_panoptic
from enact_common.evaluation.panoptic import (
    METRICS,
    PanopticEvaluator,
    PanopticQuality,
    compare,
    panoptic_record,
    panoptic_text,
    total,
)
from enact_common.utils.errors import UserError

CATEGORIES = [
    {"id": 1, "name": "person", "isthing": 1},
    {"id": 3, "name": "car", "isthing": 1},
    {"id": 149, "name": "road", "isthing": 0},
    {"id": 187, "name": "sky", "isthing": 0},
]
SIZE = (48, 64)

# image id: {segment id: (category, iscrowd, rectangles (left, top, right, bottom))}. Later rectangles cover earlier
# ones. The person of image 5 has two pieces and an id that needs all three bytes.
SCENES = {
    5: {7: (187, 0, [(0, 0, 64, 20)]), 301: (149, 0, [(0, 20, 64, 44)]),
        70000: (1, 0, [(4, 4, 12, 40), (30, 8, 40, 30)])},
    2: {1: (149, 0, [(0, 0, 64, 48)]), 2: (3, 0, [(10, 10, 30, 30)]), 3: (3, 0, [(30, 10, 50, 30)]),
        4: (1, 1, [(0, 32, 40, 48)])},
    9: {16777215: (187, 0, [(0, 0, 64, 48)])},
}  # fmt: skip


def id_map_of(scene, size=SIZE):
    """The id map of a scene, int64 (height, width)."""
    ids = np.zeros(size, dtype=np.int64)
    for number, (_, _, rectangles) in scene.items():
        for left, top, right, bottom in rectangles:
            ids[top:bottom, left:right] = number
    return ids


def colours(ids):
    """An image, uint8 (height, width, 3): each segment has its own grey above 50, void is black."""
    return np.where(ids > 0, 60 + 45 * (ids % 5), 0).astype(np.uint8)[..., None].repeat(3, axis=2)


def write_data(root, scenes=SCENES, change=None):
    """Write a data set in COCO's layout, split "val"; `change` may edit the JSON object first."""
    folder = root / "annotations" / "panoptic_val2017"
    folder.mkdir(parents=True)
    (root / "val2017").mkdir()
    data = {"images": [], "annotations": [], "categories": CATEGORIES}
    for image_id, scene in scenes.items():
        ids = id_map_of(scene)
        Image.fromarray(colours(ids)).save(root / "val2017" / f"{image_id}.png")
        (folder / f"m{image_id}.png").write_bytes(encode_id_map(ids))
        data["images"].append({"id": image_id, "file_name": f"{image_id}.png", "width": SIZE[1], "height": SIZE[0]})
        segments = [
            {
                "id": number, "category_id": category, "iscrowd": crowd, "area": int((ids == number).sum()),
                "bbox": list(cv2.boundingRect((ids == number).astype(np.uint8))),
            }
            for number, (category, crowd, _) in scene.items()
        ]  # fmt: skip
        data["annotations"].append({"image_id": image_id, "file_name": f"m{image_id}.png", "segments_info": segments})
    if change:
        change(data)
    (root / "annotations" / "panoptic_val2017.json").write_text(json.dumps(data))
    return root


def dataset_of(root, transforms=None, **options):
    """The data set of `write_data`."""
    files = find_panoptic_split(str(root), str(root), "val")
    return CocoPanoptic(*files, transforms or eval_transforms(SIZE[0], 200), **options)


# Data ---------------------------------------------------------------------------------------------------------------


def test_targets_hold_things_and_stuff_without_crowds(tmp_path):
    dataset = dataset_of(write_data(tmp_path))
    assert dataset.image_ids == [2, 5, 9] and dataset.num_objects == 7 and dataset.label_map.num_classes == 250
    _, target = dataset[1]
    assert {name: (value.dtype, tuple(value.shape)) for name, value in target.items()} == {
        "image_id": (torch.int64, (1,)), "orig_size": (torch.int64, (2,)), "size": (torch.int64, (2,)),
        "labels": (torch.int64, (3,)), "boxes": (torch.float32, (3, 4)), "masks": (torch.bool, (3, 48, 64)),
    }  # fmt: skip
    assert all(type(value) is torch.Tensor for value in target.values())
    assert target["labels"].tolist() == [187, 149, 1]
    ids = id_map_of(SCENES[5])
    assert torch.equal(target["masks"], torch.from_numpy(np.stack([ids == i for i in (7, 301, 70000)])))
    boxes = box_cxcywh_to_xyxy(target["boxes"]) * torch.tensor([64, 48, 64, 48])
    assert_close(boxes, torch.tensor([[0.0, 0, 64, 20], [0, 20, 64, 44], [4, 4, 40, 40]]))
    # Both cars are targets, the crowd is not.
    assert dataset[0][1]["labels"].tolist() == [149, 3, 3]


def test_ids_fill_three_bytes(tmp_path):
    ids = np.array([[0, 1, 255], [256, 65536, 2**24 - 1]])
    (tmp_path / "a.png").write_bytes(encode_id_map(ids))
    assert np.array_equal(read_id_map(tmp_path / "a.png", tmp_path / "a.png"), ids)
    assert cv2.imread(str(tmp_path / "a.png"))[1, 1].tolist() == [1, 0, 0]  # blue, green, red


@pytest.mark.parametrize("seed", range(6))
def test_masks_and_boxes_stay_with_their_pixels_and_each_other(tmp_path, seed):
    scene = {**SCENES[5], 14: (3, 0, [(45, 1, 63, 19)])}
    dataset = dataset_of(write_data(tmp_path, {5: scene}), train_transforms([40, 56, 72], 120), seed=seed)
    seen = set()
    for epoch in range(12):
        dataset.set_epoch(epoch)
        image, target = dataset[0]
        masks, size = target["masks"], image.shape[-2:]
        assert masks.shape == (len(target["labels"]), *size) and target["size"].tolist() == list(size)
        assert masks.flatten(1).any(dim=1).all()
        height, width = size
        edges = box_cxcywh_to_xyxy(target["boxes"]) * torch.tensor([width, height, width, height])
        # Masks are resized with nearest neighbours, which rounds differently from boxes.
        assert (edges - boxes_of_masks(masks)).abs().max() <= 2.01
        grey = image.float().mean(dim=0)
        for mask, label in zip(masks, target["labels"].tolist(), strict=True):
            number = next(i for i, (category, _, _) in scene.items() if category == label)
            # Skip slivers at a crop's edge, whose grey is blended with their neighbours.
            if min(boxes_of_masks(mask[None])[0, 2:] - boxes_of_masks(mask[None])[0, :2]) > 9:
                assert grey[mask].median() == pytest.approx(60 + 45 * (number % 5), abs=5)
                seen.add(number)
    assert seen == set(scene)


def test_crops_keep_segments_that_have_pixels_left(tmp_path):
    dataset = dataset_of(write_data(tmp_path))
    counts = []
    for seed in range(40):
        with seeded(seed):
            image, target = random_crop(*dataset.item(1), 8, 20)
        greys = image[0].unique()
        assert greys[greys > 0].tolist() == sorted(60 + 45 * (n % 5) for n in SCENES[5] if n in ids_of(target))
        assert torch.equal(target["boxes"].as_subclass(torch.Tensor), boxes_of_masks(target["masks"]))
        assert len(target["masks"]) == len(target["labels"])
        counts.append(len(target["labels"]))
    assert set(counts) == {1, 2, 3}


def ids_of(target):
    """The ids of image 5's segments whose category is in a target."""
    return {i for i, (category, _, _) in SCENES[5].items() if category in target["labels"].tolist()}


def test_segments_without_a_pixel_after_resizing_are_dropped(tmp_path):
    scene = {1: (187, 0, [(0, 0, 64, 48)]), 2: (1, 0, [(33, 5, 34, 6)])}
    dataset = dataset_of(write_data(tmp_path, {1: scene}))
    assert dataset[0][1]["labels"].tolist() == [187, 1]
    dataset.transforms = eval_transforms(12, 200)
    target = dataset[0][1]
    assert target["labels"].tolist() == [187] and len(target["masks"]) == len(target["boxes"]) == 1


def test_boxes_of_masks_reach_to_the_pixels_far_edge():
    masks = torch.zeros(3, 4, 6, dtype=torch.bool)
    masks[0, 2, 3] = True
    masks[1, 1:3, 0] = masks[1, 0, 5] = True
    assert boxes_of_masks(masks).tolist() == [[3, 2, 4, 3], [0, 0, 6, 3], [0, 0, 0, 0]]
    assert boxes_of_masks(masks[:0]).shape == (0, 4)


@pytest.mark.parametrize("mode", ["encoded", "decoded"])
def test_cached_images_give_the_same_items(tmp_path, mode):
    write_data(tmp_path)
    dataset, cached = (dataset_of(tmp_path, train_transforms([40, 56], 120)) for _ in range(2))
    expected = [dataset[i] for i in range(3)]
    cache_images([cached], mode)
    for file in (tmp_path / "val2017").iterdir():
        file.write_bytes(b"gone")
    with pytest.raises(UserError, match="not an image"):
        dataset[0]
    for i, (image, target) in enumerate(expected):
        assert torch.equal(cached[i][0], image) and torch.equal(cached[i][1]["masks"], target["masks"])


def test_an_unreadable_png_counts_as_an_unreadable_image(tmp_path):
    write_data(tmp_path)
    bad = tmp_path / "annotations" / "panoptic_val2017" / "m5.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(UserError, match=f"{bad}: segment ids cannot be read"):
        dataset_of(tmp_path)[1]
    left_out = dataset_of(tmp_path, on_unreadable="leave out")
    assert left_out[1] is None and left_out.unreadable() == [1]
    assert left_out.why_unreadable(1).startswith(str(bad))
    assert len(collate([left_out[i] for i in range(3)])[1]) == 2
    replaced = dataset_of(tmp_path, on_unreadable="replace")[1]
    assert int(replaced[1]["image_id"]) in (2, 9)


def test_images_without_an_annotation_are_left_out_and_counted(tmp_path, caplog):
    def change(data):
        del data["annotations"][1]

    dataset = dataset_of(write_data(tmp_path, change=change))
    assert dataset.image_ids == [5, 9] and dataset.truth().image_ids == [5, 9]
    assert "1 images have no annotation and are skipped" in caplog.text
    assert dataset_of(tmp_path, limit=1).truth().image_ids == [5]


def test_boxes_of_things_are_the_ground_truth_of_box_metrics(tmp_path):
    def change(data):
        # Unchecked masks must not reach pycocotools' C code.
        data["annotations"][0]["segments_info"][0]["segmentation"] = {"size": [8, 8], "counts": "b'damaged'"}

    coco = dataset_of(write_data(tmp_path, change=change)).coco_api()
    assert all(
        set(a) == {"id", "image_id", "category_id", "bbox", "area", "iscrowd"} for a in coco.dataset["annotations"]
    )
    found = [(a["image_id"], a["category_id"], a["iscrowd"], a["bbox"]) for a in coco.dataset["annotations"]]
    assert found == [(5, 1, 0, [4, 4, 36, 36]), (2, 3, 0, [10, 10, 20, 20]), (2, 3, 0, [30, 10, 20, 20]),
                     (2, 1, 1, [0, 32, 40, 16])]  # fmt: skip
    assert coco.getCatIds() == [1, 3]


def first(data):
    """The first annotation of the JSON object, which belongs to image 5."""
    return data["annotations"][0]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.pop("annotations"), "no list 'annotations'"),
        (lambda d: d["annotations"].clear(), "'annotations' is empty"),
        (lambda d: d["categories"][0].pop("isthing"), "category 1 does not say whether it is a thing"),
        (lambda d: first(d).pop("segments_info"), "no list segments_info; --coco_panoptic_path"),
        (lambda d: first(d).update(image_id=99), "belongs to image 99, which is not in 'images'"),
        (lambda d: first(d).update(image_id=[]), r"belongs to image \[\]: expected an integer"),
        (lambda d: first(d).update(image_id="img_5"), "belongs to image the text 'img_5': expected an integer"),
        (lambda d: d["annotations"].append(first(d)), "annotation of image 5 occurs twice"),
        (lambda d: first(d).update(file_name="../secret.png"), "file_name '../secret.png': expected the name"),
        (lambda d: first(d).update(file_name=None), "file_name None"),
        (lambda d: first(d)["segments_info"][0].update(id=0), "image 5 has a segment without an id in 1"),
        (lambda d: first(d)["segments_info"][0].update(id="s7"), "without an id in 1 .*'s7'"),
        (lambda d: first(d)["segments_info"][0].update(category_id="sky"), "of category the text 'sky': expected"),
        (lambda d: first(d)["segments_info"].append(7), "image 5 has a segment without an id in 1"),
        (lambda d: first(d)["segments_info"][0].update(id=301), "image 5 has two segments 301"),
        (lambda d: first(d)["segments_info"][0].update(category_id=8), "segment 7 of category 8, which is not"),
        (lambda d: d["categories"].append({"id": 250, "name": "x", "isthing": 0}), "--num_classes .* at least 251"),
        (lambda d: first(d).update(file_name="none.png"), "1 of its 3 PNG files are missing.*--coco_panoptic_path"),
        (lambda d: d["images"][0].update(file_name="none.jpg"), "1 of its 3 image files are missing"),
    ],
)  # fmt: skip
def test_annotation_faults_are_named_with_their_file(tmp_path, change, message):
    def altered(data):
        data["categories"] = [dict(category) for category in data["categories"]]
        change(data)

    write_data(tmp_path, change=altered)
    with pytest.raises(UserError, match=f"(panoptic_val2017.json: .*|not given, .*){message}|{message}") as raised:
        dataset_of(tmp_path)
    assert "panoptic_val2017" in str(raised.value) or "--num_classes" in str(raised.value)


def test_numbers_as_text_and_marks_in_words_are_read(tmp_path, caplog):
    def as_text(data):
        data["images"][0]["id"] = str(data["images"][0]["id"])
        data["categories"] = [{**c, "id": float(c["id"]), "isthing": str(c["isthing"])} for c in data["categories"]]
        for entry in data["annotations"]:
            entry["image_id"] = f" {entry['image_id']} "
            for segment in entry["segments_info"]:
                segment |= {"id": str(segment["id"]), "category_id": float(segment["category_id"])}
                segment["iscrowd"] = str(segment["iscrowd"])

    plain, text = (dataset_of(write_data(tmp_path / name, change=change)) for name, change in
                   (("plain", lambda data: None), ("text", as_text)))  # fmt: skip
    assert caplog.text.count("read as numbers") == 1 and "image_id of annotations: 3" in caplog.text
    assert text.num_objects == plain.num_objects and text.image_ids == plain.image_ids
    truths = text.truth(), plain.truth()
    assert truths[0].segments == truths[1].segments and truths[0].categories == truths[1].categories
    # The file is read a second time for the evaluation, without a second warning.
    assert caplog.text.count("read as numbers") == 1


def test_segments_marked_ignore_are_crowds(tmp_path):
    root = write_data(tmp_path, change=lambda d: first(d)["segments_info"][0].update(iscrowd=0, ignore="true"))
    dataset = dataset_of(root)
    assert dataset.truth().segments[5][0]["iscrowd"] == 1
    assert len(dataset[dataset.image_ids.index(5)][1]["labels"]) == 2


def replace_png(ids=None, mode=None):
    """A function that replaces image 5's PNG by one with other ids or another mode."""

    def change(path):
        if ids is not None:
            path.write_bytes(encode_id_map(ids))
        else:
            Image.fromarray(np.zeros(SIZE, np.uint8)).convert(mode).save(path)

    return change


SCENE = id_map_of(SCENES[5])


@pytest.mark.parametrize(
    "change, message",
    [
        (replace_png(ids=np.where(SCENE == 7, 8, SCENE)), r"pixels of segment 8, which .*val2017.json does not list"),
        (replace_png(ids=np.where(SCENE == 7, 0, SCENE)), r"no pixel of segment 7, which .*val2017.json lists"),
        (
            replace_png(ids=np.pad(SCENE, ((0, 1), (0, 0)))),
            r"64 x 49 pixels, but its image .*5.png has 64 x 48.*--coco",
        ),
        (replace_png(mode="L"), "a PNG of mode L, but segment ids are 8-bit RGB.*--coco_panoptic_path"),
        (replace_png(mode="RGBA"), "a PNG of mode RGBA"),
        (lambda path: path.write_bytes(b""), "segment ids cannot be read"),
    ],
)
def test_faults_of_a_png_are_named_with_its_file(tmp_path, change, message):
    write_data(tmp_path)
    path = tmp_path / "annotations" / "panoptic_val2017" / "m5.png"
    change(path)
    with pytest.raises(UserError, match=f"{path}: .*{message}|{path}: {message}"):
        dataset_of(tmp_path)[1]


def test_a_split_is_found_in_both_layouts_and_missing_parts_are_named(tmp_path):
    root, apart = write_data(tmp_path / "coco"), tmp_path / "apart"
    file, masks = (root / "annotations" / name for name in ("panoptic_val2017.json", "panoptic_val2017"))
    for path in (root, root / "annotations"):
        assert find_panoptic_split(str(root), str(path), "val") == (root / "val2017", file, masks)
    with pytest.raises(UserError, match=f"--coco_panoptic_path {apart}: no such folder"):
        find_panoptic_split(str(root), str(apart), "val")
    with pytest.raises(UserError, match=f"--coco_panoptic_path {root}: .*panoptic_train2017.json is missing|train2017"):
        find_panoptic_split(str(root), str(root), "train")
    (apart / "annotations").mkdir(parents=True)
    with pytest.raises(UserError, match="panoptic_val2017.json is missing"):
        find_panoptic_split(str(root), str(apart), "val")
    # The original's layout: the JSON in annotations/, the PNG files next to that folder.
    file.rename(apart / "annotations" / file.name)
    (apart / "annotations" / "panoptic_val2017.zip").touch()
    with pytest.raises(UserError, match="annotations/panoptic_val2017 is missing; unpack it"):
        find_panoptic_split(str(root), str(apart), "val")
    masks.rename(apart / masks.name)
    found = find_panoptic_split(str(root), str(apart), "val")
    assert found[1:] == (apart / "annotations" / file.name, apart / masks.name)
    (root / "val2017").rename(root / "images")
    with pytest.raises(UserError, match=f"--coco_path {root}: .*val2017 is missing"):
        find_panoptic_split(str(root), str(apart), "val")
    with pytest.raises(UserError, match="--coco_path .*nowhere: no such folder"):
        find_panoptic_split(str(tmp_path / "nowhere"), str(apart), "val")


def test_labels_are_category_ids():
    label_map = panoptic_label_map(CATEGORIES)
    assert label_map.labels() == {i: i for i in (1, 3, 149, 187)} and label_map.names[187] == "sky"
    assert panoptic_label_map(CATEGORIES, 188).num_classes == 188
    with pytest.raises(UserError, match="--num_classes 187: .* at least 188"):
        panoptic_label_map(CATEGORIES, 187)
    with pytest.raises(UserError, match="category -1 .*0 or more"):
        panoptic_label_map([{"id": -1, "name": "x"}])


# Panoptic quality ---------------------------------------------------------------------------------------------------


def quality_of(pairs):
    """The quality of pairs (true ids, true segments, predicted ids, predicted segments); segments map an id to a
    category, which is negative for a crowd."""
    ids = [category["id"] for category in CATEGORIES]
    counts = []
    for truth, true_segments, found, found_segments in pairs:
        counts.append(
            compare(
                np.array(truth),
                [{"id": i, "category_id": abs(c), "iscrowd": int(c < 0)} for i, c in true_segments.items()],
                np.array(found),
                [{"id": i, "category_id": c} for i, c in found_segments.items()],
                ids,
            )
        )
    return PanopticQuality(CATEGORIES, total(counts), len(pairs))


def row(**lengths):
    """An id map of one row: `s1=4, s2=6` means four pixels of segment 1, then six of segment 2."""
    return [[int(name[1:].split("_")[0]) for name, length in lengths.items() for _ in range(length)]]


# Computed by hand: true ids and segments, predicted ids and segments, and for category 1 the sum of IoU and the numbers
# of matched, wrong and missed segments.
CASES = {
    "perfect": (row(s1=6, s2=4), {1: 1, 2: 149}, row(s5=6, s6=4), {5: 1, 6: 149}, (1, 1, 0, 0)),
    # 6 of 10 pixels match; the other 4 are a false positive.
    "split": (row(s1=10), {1: 1}, row(s1=6, s2=4), {1: 1, 2: 1}, (0.6, 1, 1, 0)),
    # Neither half has an IoU above 0.5.
    "split in halves": (row(s1=10), {1: 1}, row(s1=5, s2=5), {1: 1, 2: 1}, (0, 0, 2, 1)),
    "missed": (row(s1=5, s2=5), {1: 1, 2: 1}, row(s1=5, s0=5), {1: 1}, (1, 1, 0, 1)),
    "wrong class": (row(s1=10), {1: 1}, row(s1=10), {1: 3}, (0, 0, 0, 1)),
    # Void is excluded from the union: 6 / (8 + 6 - 6 - 2) = 1; otherwise 6 / 8.
    "void nearby": (row(s1=6, s0=4), {1: 1}, row(s1=8, s0=2), {1: 1}, (1, 1, 0, 0)),
    # 3 of 5 pixels are void: not a false positive.
    "mostly void": (row(s1=7, s0=3), {1: 149}, row(s0=5, s1=5), {1: 1}, (0, 0, 0, 0)),
    # Exactly half is not more than half: a false positive.
    "half void": (row(s1=7, s0=3), {1: 149}, row(s0=4, s1=6), {1: 1}, (0, 0, 1, 0)),
    # A crowd is neither missed nor matched, and segments inside it are not false positives ...
    "in a crowd": (row(s1=10), {1: -1}, row(s1=4, s2=4, s0=2), {1: 1, 2: 1}, (0, 0, 0, 0)),
    "whole crowd predicted": (row(s1=10), {1: -1}, row(s1=10), {1: 1}, (0, 0, 0, 0)),
    # ... unless the crowd has another category.
    "in another's crowd": (row(s1=10), {1: -3}, row(s1=10), {1: 1}, (0, 0, 1, 0)),
    # But crowd pixels count in the union: 6 / 10; with void it would be 1.
    "crowd nearby": (row(s1=6, s2=4), {1: 1, 2: -1}, row(s1=10), {1: 1}, (0.6, 1, 0, 0)),
    # Void and crowd pixels are added: 2 + 2 of 6 are more than half.
    "void and crowd": (row(s1=4, s0=2, s2=4), {1: -1, 2: 149}, row(s0=2, s1=6, s0_=2), {1: 1}, (0, 0, 0, 0)),
    # One predicted segment for two true ones: IoU 6 / 10 with one; the other is missed.
    "merged": (row(s1=6, s2=4), {1: 1, 2: 1}, row(s1=10), {1: 1}, (0.6, 1, 0, 1)),
    # A category that is not in the data counts as void.
    "unknown category": (row(s1=10), {1: 1}, row(s1=6, s2=4), {1: 1, 2: 12}, (0.6, 1, 0, 0)),
    "nothing predicted": (row(s1=10), {1: 1}, row(s0=10), {}, (0, 0, 0, 1)),
    "nothing there": (row(s0=10), {}, row(s0=10), {}, (0, 0, 0, 0)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_counts_match_those_by_hand(case):
    *pair, (iou, matched, wrong, missed) = CASES[case]
    counts = quality_of([pair]).counts
    assert (counts.matched[0], counts.wrong[0], counts.missed[0]) == (matched, wrong, missed)
    assert counts.iou[0] == pytest.approx(iou)


def test_metrics_are_means_over_categories_that_occur():
    # Person: IoU 0.6, one match, one false positive. Road: IoU 1. Car and sky do not occur.
    quality = quality_of([(row(s1=10, s2=5), {1: 1, 2: 149}, row(s1=6, s3=4, s2=5), {1: 1, 2: 149, 3: 1})])
    figures = quality.figures()
    assert tuple(figures) == METRICS
    assert [figures[name] for name in ("PQ_th", "SQ_th", "RQ_th")] == pytest.approx([0.4, 0.6, 2 / 3])
    assert [figures[name] for name in ("PQ_st", "SQ_st", "RQ_st")] == pytest.approx([1, 1, 1])
    assert [figures[name] for name in ("PQ", "SQ", "RQ")] == pytest.approx([0.7, 0.8, 5 / 6])
    record = json.loads(json.dumps(panoptic_record(quality)))
    assert [c["name"] for c in record["classes"]] == ["person", "road"] and record["figures"] == figures
    assert record["classes"][0]["wrong"] == 1 and record["images"] == 1
    assert panoptic_text(quality).splitlines()[1].split() == ["all", "0.700", "0.800", "0.833"]


def test_a_wrong_class_costs_both_classes():
    figures = quality_of([CASES["wrong class"][:4]]).figures()
    assert figures["PQ"] == figures["PQ_th"] == 0 and figures["PQ_st"] == -1


scenes = st.builds(
    lambda seed, count, crowds: random_scene(np.random.default_rng(seed), count, crowds),
    st.integers(0, 2**32 - 1), st.integers(0, 6), st.booleans(),
)  # fmt: skip


def random_scene(rng, count, crowds):
    """An id map (12, 16) of at most `count` rectangles, and its segments in the form of `quality_of`."""
    ids, segments = np.zeros((12, 16), dtype=np.int64), {}
    for number in (rng.permutation(40)[:count] + 1).tolist():
        top, left = rng.integers(0, 9), rng.integers(0, 12)
        ids[top : top + rng.integers(1, 12), left : left + rng.integers(1, 16)] = number
        segments[number] = CATEGORIES[rng.integers(4)]["id"] * (-1 if crowds and rng.random() < 0.3 else 1)
    return ids, {number: category for number, category in segments.items() if (ids == number).any()}


@settings(max_examples=80, deadline=None)
@given(scenes, scenes)
def test_quality_is_segmentation_times_recognition_and_independent_of_ids(truth, found):
    found = (found[0], {number: abs(category) for number, category in found[1].items()})
    quality = quality_of([(*truth, *found)])
    pq, sq, rq = quality.by_category()
    np.testing.assert_allclose(pq, sq * rq)
    assert (pq >= 0).all() and (sq[quality.counts.matched > 0] > 0.5).all() and (sq <= 1 + 1e-12).all()

    def renumbered(ids, segments):
        return np.where(ids > 0, 2**24 - ids, 0), {2**24 - i: c for i, c in reversed(segments.items())}

    other = quality_of([(*renumbered(*truth), *renumbered(*found))])
    assert other.figures() == pytest.approx(quality.figures())


@settings(max_examples=40, deadline=None)
@given(scenes)
def test_the_ground_truth_as_prediction_scores_one(truth):
    figures = quality_of([(*truth, truth[0], {i: abs(c) for i, c in truth[1].items()})]).figures()
    assert set(figures.values()) <= {1.0, -1.0}


def test_maps_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match="the truth has"):
        quality_of([(row(s1=3), {1: 1}, row(s1=4), {1: 1})])


# Evaluator ----------------------------------------------------------------------------------------------------------


def truth_of(root):
    """The ground truth of `write_data`."""
    return PanopticTruth.load(*find_panoptic_split(str(root), str(root), "val")[1:])


def result(ids, categories, **more):
    """A result with this id map and segments {id: category}."""
    return {"id_map": ids, "segments": [{"id": i, "category_id": c, **more} for i, c in categories.items()]}


def perfect(image_id):
    """The ground truth of an image as a result."""
    return result(id_map_of(SCENES[image_id]), {i: category for i, (category, _, _) in SCENES[image_id].items()})


def test_images_without_a_result_count_as_missed_and_repeated_images_once(tmp_path, monkeypatch):
    truth = truth_of(write_data(tmp_path))
    evaluator = PanopticEvaluator()
    evaluator.update([5, 2], [perfect(5), perfect(2)])
    evaluator.update([2], [{**perfect(2), "id_map": torch.from_numpy(perfect(2)["id_map"])}])
    before = evaluator.evaluate(truth)
    # The sky of image 9 is missed: IoU 1, one match of two.
    assert panoptic_record(before)["classes"][-1] == {
        "category_id": 187, "name": "sky", "isthing": False, "PQ": pytest.approx(2 / 3), "SQ": 1,
        "RQ": pytest.approx(2 / 3), "matched": 1, "wrong": 0, "missed": 1,
    }  # fmt: skip
    other = PanopticEvaluator()
    other.update([9, 2], [perfect(9), perfect(2)])
    monkeypatch.setattr("enact_common.evaluation.panoptic.gather_objects", lambda value: [value, dict(other._by_image)])
    evaluator.synchronize()
    after = evaluator.evaluate(truth)
    assert after.figures() == dict.fromkeys(METRICS, 1.0) and after.images == 3
    assert after.counts.matched.tolist() == [1, 2, 2, 2]


def test_an_image_with_unreadable_ground_truth_is_left_out(tmp_path, caplog):
    truth = truth_of(write_data(tmp_path))
    evaluator = PanopticEvaluator()
    evaluator.update([9], [perfect(9)])
    for image_id in (5, 2):
        (truth.mask_folder / f"m{image_id}.png").unlink()
    quality = evaluator.evaluate(truth)
    assert quality.images == 1 and quality.figures()["PQ"] == 1 and "m5.png" in caplog.text
    (truth.mask_folder / "m9.png").unlink()
    with pytest.raises(UserError, match="no PNG file can be evaluated"):
        evaluator.evaluate(truth)


@pytest.mark.parametrize(
    "bad, message",
    [
        (result(np.ones(SIZE, int), {}), r"the map has segments \[1\], but the list has \[\]"),
        (result(np.zeros(SIZE, int), {1: 1}), r"segments \[\], but the list has \[1\]"),
        (result(np.full(SIZE, 2**24), {2**24: 1}), "from 1 to 2"),
        (result(np.full(SIZE, -1), {-1: 1}), "from 1 to 2"),
        ({"id_map": np.ones(SIZE, int), "segments": [{"id": 1, "category_id": 1}] * 2}, r"but the list has \[1, 1\]"),
    ],
)
def test_results_whose_map_and_segments_differ_are_refused(bad, message):
    with pytest.raises(ValueError, match=f"image 5: .*{message}"):
        PanopticEvaluator().update([5], [bad])


def test_results_of_another_size_are_refused(tmp_path):
    evaluator = PanopticEvaluator()
    evaluator.update([5], [result(np.ones((3, 3), int), {1: 1})])
    with pytest.raises(ValueError, match="image 5: the result has"):
        evaluator.evaluate(truth_of(write_data(tmp_path)))


def test_written_results_load_as_a_data_set(tmp_path):
    root, out = write_data(tmp_path / "data"), tmp_path / "out" / "results"
    truth, evaluator = truth_of(root), PanopticEvaluator()
    ids = perfect(9)["id_map"].copy()
    ids[:10] = 4
    # Includes image 77 and category 12, which are not in the data.
    evaluator.update([5, 9, 77], [perfect(5), result(ids, {2**24 - 1: 187, 4: 12}, score=0.25), perfect(9)])
    for _ in range(2):  # the second call replaces the first result
        assert evaluator.write_results(out, truth.images, truth.categories) == 2
    assert sorted(path.name for path in out.parent.iterdir()) == ["results"]
    again = CocoPanoptic(root / "val2017", out / "panoptic.json", out / "panoptic", eval_transforms(SIZE[0], 200))
    ours, theirs = again[0][1], dataset_of(root)[1][1]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert again.num_objects == 4 and (again.id_map(1)[:10] == 0).all()
    (segment,) = again.truth().segments[9]
    assert segment["score"] == 0.25 and segment["bbox"] == [0, 10, 64, 38] and segment["area"] == 38 * 64
    assert len(again.coco_api().dataset["annotations"]) == 1


def test_results_replace_only_results_and_stay_complete(tmp_path, monkeypatch):
    truth, evaluator, out = truth_of(write_data(tmp_path / "data")), PanopticEvaluator(), tmp_path / "out"
    evaluator.update([5], [perfect(5)])
    evaluator.write_results(out, truth.images, truth.categories)
    (out / "checkpoint.pth").touch()
    with pytest.raises(UserError, match=f"{out}: contains other files than panoptic results"):
        evaluator.write_results(out, truth.images, truth.categories)
    (out / "checkpoint.pth").unlink()
    before = (out / "panoptic.json").read_bytes()
    evaluator.update([9], [perfect(9)])

    def full(path, write, sync=True):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("enact_common.evaluation.panoptic.write_atomically", full)
    with pytest.raises(UserError, match=f"{out}: cannot be written .No space left"):
        evaluator.write_results(out, truth.images, truth.categories)
    assert (out / "panoptic.json").read_bytes() == before and len(list((out / "panoptic").iterdir())) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out"]


def compare_with_hotcoco(evaluator, truth, folder):
    """Our metrics, compared with those of hotcoco; skips the test if hotcoco is not installed."""
    hotcoco = pytest.importorskip("hotcoco.panoptic", reason="hotcoco is not installed")
    evaluator.write_results(folder, truth.images, truth.categories)
    theirs = hotcoco.pq_compute(
        str(truth.annotation_file), str(folder / "panoptic.json"), str(truth.mask_folder), str(folder / "panoptic")
    )
    ours = evaluator.evaluate(truth).figures()
    for suffix, group in (("", "All"), ("_th", "Things"), ("_st", "Stuff")):
        if theirs[group]["n"]:
            for name in ("PQ", "SQ", "RQ"):
                assert ours[name + suffix] == pytest.approx(theirs[group][name.lower()]), name + suffix
    return ours


@pytest.mark.parametrize("seed", range(4))
def test_metrics_agree_with_another_package(tmp_path, seed):
    rng = np.random.default_rng(seed)
    truth, evaluator = {}, PanopticEvaluator()
    for image_id in range(1, 13):
        ids, segments = random_scene(rng, int(rng.integers(1, 7)), crowds=True)
        # With several crowds of one category COCO's evaluation differs, so keep at most one.
        crowds = [c for c in segments.values() if c < 0]
        segments = {i: abs(c) if crowds.count(c) > 1 else c for i, c in segments.items()}
        truth[image_id] = (ids, segments)
        moved = np.roll(ids, (int(rng.integers(-1, 2)), int(rng.integers(-1, 2))), axis=(0, 1))
        found = {i: abs(c) if rng.random() < 0.8 else 3 for i, c in segments.items() if rng.random() < 0.9}
        moved = np.where(np.isin(moved, list(found)), moved, 0)
        evaluator.update([image_id], [result(moved, {i: c for i, c in found.items() if (moved == i).any()})])
    (tmp_path / "masks").mkdir()
    data = {"images": [], "annotations": [], "categories": CATEGORIES}
    for image_id, (ids, segments) in truth.items():
        (tmp_path / "masks" / f"{image_id}.png").write_bytes(encode_id_map(ids))
        data["images"].append({"id": image_id, "file_name": "x.jpg", "height": 12, "width": 16})
        infos = [
            {"id": i, "category_id": abs(c), "iscrowd": int(c < 0), "area": int((ids == i).sum()), "bbox": [0, 0, 1, 1]}
            for i, c in segments.items()
        ]
        data["annotations"].append({"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": infos})
    (tmp_path / "truth.json").write_text(json.dumps(data))
    truth = PanopticTruth.load(tmp_path / "truth.json", tmp_path / "masks")
    figures = compare_with_hotcoco(evaluator, truth, tmp_path / "out")
    assert 0 < figures["PQ"] < 1


# Pictures -----------------------------------------------------------------------------------------------------------


def test_segments_are_drawn_in_their_colours_and_void_is_unchanged():
    image, ids = np.full((480, 640, 3), 100, np.uint8), np.zeros((480, 640), np.int64)
    ids[100:400, 50:250], ids[100:400, 400:600] = 3, 4
    names = {1: "person", 187: "sky"}
    segments = [{"id": 3, "category_id": 187}, {"id": 4, "category_id": 1, "score": 0.5}, {"id": 9, "category_id": 1}]
    picture = draw_panoptic(torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(ids), segments, names)
    assert picture.shape == image.shape and (picture[ids == 0] == 100).all() and (image == 100).all()
    for number, label in ((3, 187), (4, 1)):
        tint = (np.array(colour_of(label)) + 100) / 2
        assert np.abs(np.median(picture[ids == number], axis=0) - tint).max() <= 1
        # The name is in the middle, on the label's colour.
        rows, columns = (ids == number).nonzero()
        middle = picture[
            int(rows.mean()) - 4 : int(rows.mean()) + 5, int(columns.mean()) - 20 : int(columns.mean()) + 20
        ]
        assert (middle == colour_of(label)).all(axis=-1).any() and len(np.unique(middle.reshape(-1, 3), axis=0)) > 2
    assert np.array_equal(draw_panoptic(image, ids, [], names), image)


def test_a_small_picture_is_enlarged_by_default():
    image, ids = np.zeros((*SIZE, 3), np.uint8), id_map_of(SCENES[5])
    segments, names = perfect(5)["segments"], panoptic_label_map(CATEGORIES).names
    assert draw_panoptic(image, ids, segments, names, enlarge=False).shape == image.shape
    large = draw_panoptic(image, ids, segments, names)
    assert large.shape == (48 * 8, 64 * 8, 3)


@pytest.mark.parametrize("image, ids", [(np.zeros((4, 4), np.uint8), SCENE), (np.zeros((4, 5, 3), np.uint8), SCENE)])
def test_pictures_need_an_image_and_a_map_of_its_size(image, ids):
    with pytest.raises(ValueError, match="expected RGB uint8|the map has"):
        draw_panoptic(image, ids, [], [])


# Real data ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_panoptic_images_load_evaluate_and_draw(coco_mini, tmp_path):
    images, file, masks = find_panoptic_split(str(coco_mini), str(coco_mini / "annotations"), "val")
    dataset = CocoPanoptic(images, file, masks, eval_transforms(160, 256))
    truth, evaluator = dataset.truth(), PanopticEvaluator()
    # The folder has 210 images; only the 26 with a panoptic annotation are in the data set.
    assert len(dataset) == len(truth.images) == 26 and len(list(images.iterdir())) == 210
    assert dataset.num_objects == 277 and dataset.label_map.num_classes == 250
    for i in range(4):
        image, target = dataset[i]
        assert target["masks"].shape[1:] == image.shape[1:] and (target["masks"].sum(dim=0) <= 1).all()
    ids = {image_id: truth.id_map(image_id) for image_id in truth.image_ids}
    evaluator.update(ids, [{"id_map": ids[i], "segments": truth.segments[i]} for i in ids])
    assert evaluator.evaluate(truth).figures() == dict.fromkeys(METRICS, 1.0)
    picture = draw_panoptic(
        decode_image(dataset.path(0)), ids[dataset.image_ids[0]], truth.segments[dataset.image_ids[0]],
        dataset.label_map.names,
    )  # fmt: skip
    assert picture.dtype == np.uint8

    rng = np.random.default_rng(0)
    for image_id, own in ids.items():
        moved, segments = np.roll(own, (int(rng.integers(-12, 13)), int(rng.integers(-12, 13))), axis=(0, 1)), []
        for segment in truth.segments[image_id]:
            if rng.random() < 0.1:
                moved[moved == segment["id"]] = 0
            elif (moved == segment["id"]).any():
                other = truth.categories[rng.integers(len(truth.categories))]["id"]
                segments.append({**segment, "category_id": other if rng.random() < 0.2 else segment["category_id"]})
        evaluator.update([image_id], [{"id_map": moved, "segments": segments}])
    assert 0.1 < compare_with_hotcoco(evaluator, truth, tmp_path / "out")["PQ"] < 0.9
