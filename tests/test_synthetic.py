"""The data set of drawn shapes: scenes, files, and protection against overwriting."""

import json
import math
import os

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from enact_common.data import synthetic
from enact_common.data.scenes import SHAPES, draw_scene
from enact_common.data.synthetic import SPLITS, main, make_shapes

SMALL = {"train": 4, "val": 2, "size": (48, 64), "object_size": (0.2, 0.6)}


def scenes(count, height=96, width=128, **options):
    return [draw_scene(np.random.default_rng(seed), height, width, **options) for seed in range(count)]


def visible_mask(item, height, width):
    encoded = coco_mask.frPyObjects(item.polygons, height, width)
    return coco_mask.decode(coco_mask.merge(encoded)).astype(bool)  # (H, W)


def snapshot(folder):
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def contents(folder):
    return {name: content for name, (content, _) in snapshot(folder).items()}


def annotations(folder, split="train2017"):
    return json.loads((folder / "annotations" / f"instances_{split}.json").read_text())


# Scenes


def test_scene_is_determined_by_the_generator_state():
    first, objects = draw_scene(np.random.default_rng(3), 64, 80)
    second, same_objects = draw_scene(np.random.default_rng(3), 64, 80)
    other, _ = draw_scene(np.random.default_rng(4), 64, 80)
    assert first.shape == (64, 80, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, second)
    assert objects == same_objects
    assert (first != other).any()


def test_box_and_area_match_the_polygons():
    height, width = 96, 128
    for _, objects in scenes(30, height, width, objects=(3, 8), object_size=(0.1, 0.6)):
        for item in objects:
            assert item.polygons and all(len(p) >= 6 and len(p) % 2 == 0 for p in item.polygons)
            mask = visible_mask(item, height, width)
            rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            x, y, w, h = item.bbox
            # The raster mask misses sharp tips that cover less than a pixel.
            assert abs(cols[0] - x) <= 2 and abs(cols[-1] + 1 - (x + w)) <= 2
            assert abs(rows[0] - y) <= 2 and abs(rows[-1] + 1 - (y + h)) <= 2
            assert mask.sum() == pytest.approx(item.area, rel=0.05, abs=6)
            assert 0 < item.area <= w * h


def test_polygons_match_the_drawn_shape():
    for image, (item,) in scenes(12, objects=(1, 1), object_size=(0.4, 0.5), classes=("cross",)):
        mask = visible_mask(item, *image.shape[:2]).astype(np.uint8)
        inside = cv2.erode(mask, np.ones((3, 3), np.uint8)).astype(bool)
        outside = ~cv2.dilate(mask, np.ones((3, 3), np.uint8)).astype(bool)
        distance = np.linalg.norm(image - image[inside].mean(axis=0), axis=2)
        is_nearer = distance < np.linalg.norm(image - image[outside].mean(axis=0), axis=2)
        assert is_nearer[inside].mean() > 0.98 and is_nearer[outside].mean() < 0.02


def test_objects_contrast_with_the_background():
    for image, objects in scenes(20):
        masks = [visible_mask(item, *image.shape[:2]) for item in objects]
        lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
        ground = lab[~np.any(masks, axis=0)]
        spread = np.linalg.norm(ground - ground.mean(axis=0), axis=1).mean()
        for mask in masks:
            assert np.linalg.norm(lab[mask].mean(axis=0) - ground.mean(axis=0)) > 2 * spread


def test_polygons_exclude_objects_in_front():
    height, width = 96, 96
    holes = 0
    for _, objects in scenes(40, height, width, objects=(6, 6), object_size=(0.15, 0.9)):
        masks = [visible_mask(item, height, width) for item in objects]
        assert max(sum(mask.astype(int) for mask in masks).ravel()) <= 2
        for index, front in enumerate(masks):
            for back in masks[:index]:
                # Only pixels on the common edge may belong to both.
                inner = cv2.erode(front.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
                assert not (back & inner).any()
        holes += any(len(item.polygons) > 1 for item in objects)
    assert holes >= 3  # the scenes must include objects that are cut or have holes


def test_boxes_lie_inside_the_image():
    for height, width in ((96, 64), (64, 96)):
        for _, objects in scenes(20, height, width, objects=(2, 5), object_size=(0.3, 1.0)):
            for x, y, w, h in (item.bbox for item in objects):
                assert x >= 0 and y >= 0 and w > 0 and h > 0
                assert x + w <= width and y + h <= height


def test_every_object_stays_visible_enough():
    fractions = []
    for _, objects in scenes(40, objects=(5, 8), object_size=(0.3, 0.6), classes=("circle",)):
        for item in objects:
            fractions.append(item.visible_fraction)
            # For a circle the visible fraction follows from its known whole area.
            whole = math.pi / 4 * item.extent**2
            assert item.area / whole == pytest.approx(item.visible_fraction, abs=0.04)
    assert 0.6 <= min(fractions) < 0.8 and max(fractions) == 1


def test_objects_need_not_hide_each_other():
    drawn = [objects for _, objects in scenes(20, objects=(3, 3), object_size=(0.3, 0.6), min_visible=1)]
    assert {item.visible_fraction for objects in drawn for item in objects} == {1}
    assert any(len(objects) == 3 for objects in drawn)


def test_object_counts_fill_the_range():
    counts = {len(objects) for _, objects in scenes(60, 64, 64, objects=(2, 4), object_size=(0.15, 0.3))}
    assert counts == {2, 3, 4}


def test_scenes_may_have_no_objects():
    assert all(objects == [] for _, objects in scenes(3, objects=(0, 0)))
    assert {len(objects) for _, objects in scenes(30, objects=(0, 1))} == {0, 1}


def test_object_sizes_fill_the_range():
    extents = []
    for _, objects in scenes(150, 100, 160, objects=(1, 2), object_size=(0.1, 0.4)):
        for item in objects:
            extents.append(item.extent)
            if item.visible_fraction == 1:
                assert max(item.bbox[2:]) == pytest.approx(item.extent, abs=0.6)
    assert 10 <= min(extents) < 12 and 36 < max(extents) <= 40
    # Log-uniform: half of the sizes are below 20, the geometric mean of 10 and 40.
    assert np.mean(np.array(extents) < 20) == pytest.approx(0.5, abs=0.12)


def test_object_size_can_limit_objects_to_small_ones():
    for _, objects in scenes(10, 192, 192, object_size=(0.08, 31 / 192)):
        assert all(item.area < 32**2 for item in objects)


@pytest.mark.parametrize(
    ("shape", "fill", "solidity"),
    [
        ("circle", 1.0, 1.0),
        ("square", 2 / math.pi, 1.0),
        ("triangle", 0.75 * math.sqrt(3) / math.pi, 1.0),
        ("star", 0.393, 0.519),
        ("crescent", 0.470, 0.574),
        ("cross", 0.633, 0.711),
    ],
)
def test_every_shape_has_its_form_and_a_random_rotation(shape, fill, solidity):
    """`fill` is area / area of the enclosing circle, `solidity` area / area of the convex hull."""
    directions = set()
    for _, (item,) in scenes(12, objects=(1, 1), object_size=(0.5, 0.8), classes=(shape,)):
        points = np.array(item.polygons[0], np.float32).reshape(-1, 2)  # (N, 2)
        centre, radius = cv2.minEnclosingCircle(points)
        assert item.area / (math.pi * radius**2) == pytest.approx(fill, abs=0.03)
        assert item.area / cv2.contourArea(cv2.convexHull(points)) == pytest.approx(solidity, abs=0.03)
        x, y = points[np.linalg.norm(points - centre, axis=1).argmax()] - centre
        directions.add(round(math.degrees(math.atan2(y, x)) / 5))
    assert len(directions) > 6


def test_all_classes_are_drawn_and_class_indices_follow_their_order():
    drawn = [item.class_index for _, objects in scenes(30) for item in objects]
    assert set(drawn) == set(range(len(SHAPES)))
    round_first = scenes(8, objects=(1, 1), classes=("circle", "star"))
    for _, (item,) in round_first:
        is_round = item.area / (item.bbox[2] * item.bbox[3]) > 0.7
        assert item.class_index == (0 if is_round else 1)
    assert len({item.class_index for _, (item,) in round_first}) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"objects": (3, 2)},
        {"objects": (-1, 2)},
        {"objects": (1, 256)},
        {"objects": (1, 2, 3)},
        {"object_size": (0.5, 0.2)},
        {"object_size": (0.0, 0.2)},
        {"object_size": (0.5, 1.1)},
        {"object_size": (float("nan"), 0.5)},
        {"object_size": (0.01, 0.5)},
        {"classes": ()},
        {"classes": ("circle", "circle")},
        {"classes": ("hexagon",)},
        {"classes": "circle"},
        {"min_visible": 1.1},
        {"min_visible": float("nan")},
    ],
)
def test_bad_scene_options_raise(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        draw_scene(np.random.default_rng(0), 64, 64, **options)


# Files


def test_pycocotools_reads_the_layout(tmp_path):
    root = make_shapes(tmp_path / "set", **SMALL, classes=("star", "circle"))
    for split, count in zip(SPLITS, (4, 2), strict=True):
        assert sorted(path.name for path in (root / split).iterdir()) == [
            f"{index:012d}.jpg" for index in range(1, count + 1)
        ]
        coco = COCO(str(root / "annotations" / f"instances_{split}.json"))
        assert coco.dataset["licenses"] == []
        assert coco.dataset["categories"] == [
            {"id": 1, "name": "star", "supercategory": "shape"},
            {"id": 2, "name": "circle", "supercategory": "shape"},
        ]
        assert sorted(coco.imgs) == list(range(1, count + 1))
        for image_id, image in coco.imgs.items():
            assert image["file_name"] == f"{image_id:012d}.jpg"
            pixels = cv2.imread(str(root / split / image["file_name"]))
            assert pixels.shape == (image["height"], image["width"], 3) == (48, 64, 3)
        listed = coco.dataset["annotations"]
        assert [item["id"] for item in listed] == list(range(1, len(listed) + 1))
        for item in listed:
            assert item["category_id"] in (1, 2) and item["iscrowd"] == 0
            assert coco.annToMask(item).sum() == pytest.approx(item["area"], rel=0.1, abs=8)


def test_files_hold_the_scenes_of_draw_scene(tmp_path):
    root = make_shapes(tmp_path, **SMALL, seed=5, objects=(2, 2))
    stream = np.random.SeedSequence(5, spawn_key=(1, 1))  # second image of the second split
    drawn, objects = draw_scene(np.random.default_rng(stream), 48, 64, objects=(2, 2), object_size=SMALL["object_size"])
    stored = cv2.imread(str(root / "val2017" / "000000000002.jpg"))[..., ::-1]  # BGR to RGB
    assert np.abs(stored.astype(int) - drawn).mean() < 5
    listed = [item for item in annotations(root, "val2017")["annotations"] if item["image_id"] == 2]
    assert [item["bbox"] for item in listed] == [list(item.bbox) for item in objects]
    assert [item["segmentation"] for item in listed] == [item.polygons for item in objects]
    assert [item["category_id"] for item in listed] == [i.class_index + 1 for i in objects]


def test_same_seed_same_bytes_other_seed_other_images(tmp_path):
    first = contents(make_shapes(tmp_path / "a", **SMALL, seed=1))
    assert first == contents(make_shapes(tmp_path / "b", **SMALL, seed=1))
    other = contents(make_shapes(tmp_path / "c", **SMALL, seed=2))
    assert all(first[name] != other[name] for name in first)


def test_images_do_not_depend_on_their_number(tmp_path):
    few = make_shapes(tmp_path / "few", **SMALL)
    many = make_shapes(tmp_path / "many", **{**SMALL, "train": 6, "val": 5})
    names = [name for name in contents(few) if name.endswith(".jpg")]
    assert len(names) == 6
    assert all(contents(few)[name] == contents(many)[name] for name in names)
    for split in SPLITS:
        listed = annotations(few, split)["annotations"]
        assert listed == annotations(many, split)["annotations"][: len(listed)]


def test_several_processes_draw_the_same_images_and_only_if_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "PARALLEL_FROM", 4)
    make_shapes(tmp_path / "several", **SMALL, parallel=True)
    # A script without a main guard must not start processes: each would run the script again.
    monkeypatch.setattr("enact_common.utils.pool.ProcessPoolExecutor", None)
    make_shapes(tmp_path / "one", **SMALL)
    assert contents(tmp_path / "several") == contents(tmp_path / "one")


def test_all_images_differ(tmp_path):
    root = make_shapes(tmp_path, **{**SMALL, "train": 6, "val": 6})
    images = [content for name, content in contents(root).items() if name.endswith(".jpg")]
    assert len(set(images)) == 12


def test_one_size_makes_square_images_and_counts_may_be_zero(tmp_path):
    root = make_shapes(tmp_path, train=0, val=1, size=40, objects=(0, 0))
    assert annotations(root)["images"] == []
    assert annotations(root, "val2017")["images"] == [
        {"id": 1, "file_name": "000000000001.jpg", "height": 40, "width": 40}
    ]
    assert annotations(root, "val2017")["annotations"] == []


def test_second_call_writes_nothing_and_draws_nothing(tmp_path, monkeypatch):
    root = make_shapes(tmp_path / "set", **SMALL)
    before = snapshot(root)

    def no_drawing(*arguments, **options):
        raise AssertionError("drew an existing scene")

    monkeypatch.setattr(synthetic, "draw_scene", no_drawing)
    # A list counts as the same parameter as a tuple.
    assert make_shapes(root, **{**SMALL, "size": [48, 64]}) == root
    assert snapshot(root) == before


@pytest.mark.parametrize(
    "change",
    [
        {"train": 5},
        {"val": 1},
        {"size": 48},
        {"seed": 1},
        {"objects": (1, 4)},
        {"object_size": (0.2, 0.5)},
        {"classes": SHAPES[:3]},
        {"min_visible": 1},
    ],
)
def test_other_parameters_are_refused_without_force(tmp_path, change):
    root = make_shapes(tmp_path / "set", **SMALL)
    before = snapshot(root)
    with pytest.raises(FileExistsError, match=next(iter(change))):
        make_shapes(root, **{**SMALL, **change})
    assert snapshot(root) == before


def test_a_set_from_before_a_parameter_was_added_is_the_default_one(tmp_path):
    root = make_shapes(tmp_path / "set", **SMALL)
    for path in (root / "synthetic_shapes.json", root / "annotations" / "instances_val2017.json"):
        content = json.loads(path.read_bytes())
        del content.get("info", content)["parameters"]["min_visible"]
        path.write_text(json.dumps(content))
    assert make_shapes(root, **SMALL) == root
    with pytest.raises(FileExistsError, match="min_visible 0.6 instead of 1"):
        make_shapes(root, **SMALL, min_visible=1)


def test_other_version_is_refused_without_force(tmp_path, monkeypatch):
    root = make_shapes(tmp_path / "set", **SMALL)
    monkeypatch.setattr(synthetic, "VERSION", synthetic.VERSION + 1)
    with pytest.raises(FileExistsError, match="version"):
        make_shapes(root, **SMALL)


def test_force_replaces_the_set_and_nothing_else(tmp_path):
    root = make_shapes(tmp_path / "set", **SMALL)
    (root / "train2017" / "notes.txt").write_text("mine")
    changed = {**SMALL, "train": 2, "seed": 9}
    make_shapes(root, **changed, force=True)
    fresh = contents(make_shapes(tmp_path / "fresh", **changed))
    assert contents(root) == {**fresh, os.path.join("train2017", "notes.txt"): b"mine"}


def test_force_does_not_adopt_a_foreign_image(tmp_path):
    root = make_shapes(tmp_path / "set", **SMALL)
    (root / "train2017" / "000000000005.jpg").write_bytes(b"mine")
    before = snapshot(root)
    with pytest.raises(FileExistsError, match="000000000005"):
        make_shapes(root, **{**SMALL, "train": 5}, force=True)
    assert snapshot(root) == before


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("marker", [None, "[]", "no json", '{"generator": "another"}'])
def test_foreign_folder_is_refused_and_untouched(tmp_path, force, marker):
    # The layout of the real COCO, which must never be mistaken for a set of this module.
    (tmp_path / "train2017").mkdir()
    (tmp_path / "train2017" / "000000000001.jpg").write_bytes(b"a photograph")
    if marker is not None:
        (tmp_path / synthetic.MARKER).write_text(marker)
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError, match="not empty"):
        make_shapes(tmp_path, **SMALL, force=force)
    assert snapshot(tmp_path) == before


def test_replaced_annotation_file_is_not_overwritten(tmp_path):
    root = make_shapes(tmp_path, **SMALL)
    path = root / "annotations" / "instances_val2017.json"
    path.write_text('{"info": {}, "images": []}')
    before = snapshot(root)
    with pytest.raises(FileExistsError, match="instances_val2017"):
        make_shapes(root, **SMALL)
    assert snapshot(root) == before


def test_only_missing_files_are_made_again(tmp_path):
    root = make_shapes(tmp_path, **SMALL)
    before = snapshot(root)
    missing = {os.path.join("train2017", "000000000002.jpg"), os.path.join("annotations", "instances_val2017.json")}
    for name in missing:
        (root / name).unlink()
    make_shapes(root, **SMALL)
    after = snapshot(root)
    assert {name for name in before if before[name] != after[name]} == missing
    assert {name: after[name][0] for name in after} == {name: before[name][0] for name in before}


def test_partial_files_of_an_ended_process_are_removed(tmp_path):
    root = make_shapes(tmp_path / "set", **SMALL)
    before = contents(root)
    (root / "train2017" / "000000000002.jpg.partial").write_bytes(b"half")
    assert contents(make_shapes(root, **SMALL)) == before


def test_interrupted_run_is_completed_by_the_next(tmp_path, monkeypatch):
    whole = contents(make_shapes(tmp_path / "whole", **SMALL))
    drawn = []

    def interrupted(*arguments, **options):
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.append(1)
        return draw_scene(*arguments, **options)

    monkeypatch.setattr(synthetic, "draw_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_shapes(tmp_path / "part", **SMALL)
    assert not (tmp_path / "part" / "annotations").exists()
    assert len(list((tmp_path / "part" / "train2017").iterdir())) == 3
    monkeypatch.undo()
    assert contents(make_shapes(tmp_path / "part", **SMALL)) == whole


def test_failed_write_leaves_no_partial_file(tmp_path, monkeypatch):
    def fail(source, target):
        raise OSError("disk is gone")

    monkeypatch.setattr(synthetic.os, "replace", fail)
    with pytest.raises(OSError, match="disk is gone"):
        make_shapes(tmp_path / "set", **SMALL)
    assert list((tmp_path / "set").iterdir()) == []


@pytest.mark.parametrize("options", [{"train": -1}, {"val": -1}, {"seed": -1}, {"size": (1, 2, 3)}, {"size": 0}])
def test_bad_parameters_raise_before_any_work(tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        make_shapes(tmp_path / "set", **options)
    assert not (tmp_path / "set").exists()


def test_counts_must_be_integers(tmp_path):
    with pytest.raises(TypeError):
        make_shapes(tmp_path / "set", train=1.5)
    assert not (tmp_path / "set").exists()


# Command line


def test_command_line_makes_the_same_set_as_python(tmp_path, capsys):
    main(
        [
            "--output_dir",
            str(tmp_path / "cli"),
            "--train",
            "2",
            "--val",
            "1",
            "--size",
            "40",
            "48",
            "--seed",
            "3",
            "--objects",
            "0",
            "2",
            "--object_size",
            "0.2",
            "0.4",
            "--classes",
            "star",
            "circle",
            "--min_visible",
            "1",
        ]
    )
    assert str(tmp_path / "cli") in capsys.readouterr().out
    same = make_shapes(
        tmp_path / "python",
        train=2,
        val=1,
        size=(40, 48),
        seed=3,
        objects=(0, 2),
        object_size=(0.2, 0.4),
        classes=("star", "circle"),
        min_visible=1,
    )
    assert contents(tmp_path / "cli") == contents(same)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "-1"], "train"),
        (["--val", "x"], "val"),
        (["--seed", "-2"], "seed"),
        (["--size", "1", "2", "3"], "size"),
        (["--size", "0"], "size"),
        (["--objects", "3", "1"], "objects"),
        (["--objects", "3"], "objects"),
        (["--object_size", "0.1", "1.5"], "object_size"),
        (["--classes", "hexagon"], "hexagon"),
        (["--classes", "star", "star"], "classes"),
        (["--size", "20"], "at least 6"),
        (["--min_visible", "60"], "min_visible"),
    ],
)
def test_command_line_errors(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(["--output_dir", str(tmp_path / "set"), *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "set").exists()


def test_command_line_refuses_a_foreign_folder_and_a_file(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    for target in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(SystemExit) as stop:
            main(["--output_dir", str(target), "--train", "1", "--val", "1", "--force"])
        assert stop.value.code == 2
        assert str(target) in capsys.readouterr().err
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}


def test_help_states_every_default(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for default in ("1000", "200", "[192]", "[1, 5]", "[0.15, 0.5]", "0.6"):
        assert f"(default: {default})" in text
