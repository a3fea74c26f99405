"""Masks: the mask head, its losses, data, outputs, training and prediction. `test_golden.py` has recorded numbers."""

import json
import math
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ALL_STAGES, SMALL_MODEL, assert_close, build, equal_states, read_log, run, train
from PIL import Image
from processes import Forked
from pycocotools import mask as coco_mask
from torch.nn import functional as F
from torchvision import tv_tensors

from enact_common import load_detector, predict
from enact_common.data.annotations import find_split
from enact_common.data.checks.findings import FAULT
from enact_common.data.checks.rules import check_masks
from enact_common.data.checks.split import Split
from enact_common.data.coco import CocoDetection
from enact_common.data.images import decode_image
from enact_common.data.masks import PackedMasks, decode_mask, normalize_all, normalize_segmentation
from enact_common.data.masks import normalize_segmentations as normalize
from enact_common.data.panoptic import encode_id_map, read_id_map
from enact_common.data.transforms import eval_transforms, train_transforms
from enact_common.drawing.detections import draw_detections
from enact_common.drawing.panoptic import draw_panoptic
from enact_common.models import mask_head, segmentation
from enact_common.models import mask_losses as mask_losses_module
from enact_common.models.mask_head import AttentionMaps, MaskHead, QueryMasks
from enact_common.models.mask_losses import dice_loss, mask_losses, padded_masks
from enact_common.models.segmentation import PostProcessPanoptic, PostProcessSegm, encode_masks, full_size_masks
from enact_common.training.logs import main_metric
from enact_common.utils.errors import UserError

# Flags of a model with a mask head, which uses the features of all stages.
MASKS = ("--masks", *ALL_STAGES)

# The model ---------------------------------------------------------------------------------------------------------


def test_attention_is_one_softmax_over_heads_and_cells_without_padding():
    attention = AttentionMaps(8, nhead=2)
    queries, memory = torch.randn(1, 3, 8), torch.randn(1, 8, 2, 3)
    mask = torch.zeros(1, 2, 3, dtype=torch.bool)
    mask[..., 2] = True
    maps = attention(queries, memory, mask)
    assert maps.shape == (1, 3, 2, 2, 3)
    q, k = attention.q_linear(queries)[0].detach(), attention.k_linear(memory[0].flatten(1).T).detach()
    for i in range(3):
        logits = [[float(q[i, 4 * n : 4 * n + 4] @ k[t, 4 * n : 4 * n + 4]) / 2 for t in range(6)] for n in range(2)]
        total = sum(math.exp(logits[n][t]) for n in range(2) for t in (0, 1, 3, 4))
        for n in range(2):
            for t in range(6):
                expected = 0 if t in (2, 5) else math.exp(logits[n][t]) / total
                assert maps[0, i, n].flatten()[t].item() == pytest.approx(expected, abs=1e-6)


def direct_masks(head, src, maps, fpns):
    """The head's masks as in the paper: each query's maps are concatenated with the image's channels."""
    x = torch.cat((src, maps), dim=1)
    x = head.gn1(head.lay1(x)).relu()
    x = head.gn2(head.lay2(x)).relu()
    for i, map_ in enumerate(fpns, start=1):
        x = getattr(head, f"adapter{i}")(map_) + F.interpolate(x, size=map_.shape[-2:])
        x = getattr(head, f"gn{i + 2}")(getattr(head, f"lay{i + 2}")(x)).relu()
    return head.out_lay(x)[:, 0]


@pytest.mark.parametrize("chunk", [1, 100])
def test_masks_and_gradients_equal_the_direct_computation(monkeypatch, chunk):
    monkeypatch.setattr(mask_head, "HEAD_CHUNK", chunk)
    head = MaskHead(32, 4, (24, 12, 6))
    src, maps = torch.randn(2, 32, 3, 4, requires_grad=True), torch.rand(2, 5, 4, 3, 4)
    fpns = [torch.randn(2, channels, *size) for channels, size in ((24, (6, 7)), (12, (11, 14)), (6, (22, 27)))]
    image, query = torch.tensor([0, 1, 1]), torch.tensor([4, 0, 2])
    expected = direct_masks(head, src[image], maps[image, query], [map_[image] for map_ in fpns])
    expected.square().sum().backward()
    wanted = [p.grad for p in (src, *head.parameters())]
    src.grad = None
    head.zero_grad()

    masks = QueryMasks(head, maps, head.share(src, fpns), None)
    selected = masks.select(image, query)
    assert_close(selected, expected.detach())
    selected.square().sum().backward()
    for found, gradient in zip((src, *head.parameters()), wanted, strict=True):
        assert_close(found.grad, gradient, tolerance=1e-3)
    with torch.no_grad():
        assert_close(masks.all()[image, query], expected.detach())


def outputs_and_losses(objects: tuple[int, ...], sizes=((64, 80), (72, 64))):
    """A small model in training mode, its losses for images with these numbers of objects, and its criterion."""
    model, criterion, _ = build("detr", *SMALL_MODEL["detr"], "--num_classes", "5", *MASKS)
    model.train()
    images = [torch.rand(3, *size) for size in sizes[: len(objects)]]
    targets = [
        {
            "labels": torch.zeros(n, dtype=torch.int64),
            "boxes": torch.rand(n, 4) / 4 + 0.3,
            "masks": torch.rand(n, *size) > 0.5,
        }
        for n, size in zip(objects, sizes, strict=False)
    ]
    return model, criterion(model(images), targets), criterion


@pytest.mark.parametrize("objects", [(2, 1), (0, 3), (0, 0)])
def test_every_parameter_of_the_head_has_a_gradient(objects):
    # Otherwise a process whose batch has no object would keep the others waiting in the all-reduce.
    model, losses, criterion = outputs_and_losses(objects)
    criterion.total(losses).backward()
    assert all(p.grad is not None for p in (*model.mask_head.parameters(), *model.bbox_attention.parameters()))
    assert (losses["loss_mask"] > 0) == (sum(objects) > 0)


def test_a_frozen_detector_stays_in_evaluation_mode():
    flags = (*SMALL_MODEL["detr"], "--num_classes", "5", *MASKS, "--frozen_weights", "boxes.pth", "--dropout", "0.5")
    model, _, _ = build("detr", *flags)
    model.train()
    assert model.mask_head.training and not any(module.training for module in model.detr.modules())
    image = [torch.rand(3, 64, 80)]
    assert torch.equal(model(image)["pred_boxes"], model(image)["pred_boxes"])
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"mask_head", "bbox_attention"}


def test_evaluation_gives_the_losses_of_training():
    model, criterion, _ = build("detr", *SMALL_MODEL["detr"], "--num_classes", "5", *MASKS, "--dropout", "0")
    targets = [
        {"labels": torch.tensor([1, 2]), "boxes": torch.rand(2, 4) / 4 + 0.3, "masks": torch.rand(2, 64, 80) > 0.5}
    ]
    for module in model.modules():
        # Use batch statistics in both modes; running statistics would change the losses.
        if isinstance(module, torch.nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    image = [torch.rand(3, 64, 80)]
    losses = []
    for mode in (True, False):
        model.train(mode)
        losses.append(criterion(model(image), targets))
    assert losses[0].keys() == losses[1].keys()
    for name in ("loss_mask", "loss_dice"):
        assert_close(losses[0][name], losses[1][name].detach())
    assert model(image)["pred_masks"].shape == (1, 8, 16, 20)


# Losses ------------------------------------------------------------------------------------------------------------


def test_mask_losses_by_hand():
    # Probabilities 3/4 and 1/2; the object covers the first pixel.
    logits = torch.tensor([[[math.log(3), 0.0]]])
    losses = mask_losses(logits, torch.tensor([[[True, False]]]))
    focal = (0.25 * (1 / 4) ** 2 * -math.log(3 / 4) + 0.75 * (1 / 2) ** 2 * -math.log(1 / 2)) / 2
    assert losses["loss_mask"].tolist() == pytest.approx([focal])
    assert losses["loss_dice"].tolist() == pytest.approx([1 - (2 * 3 / 4 + 1) / (5 / 4 + 1 + 1)])
    # A certain right mask costs nothing; a certain wrong one nearly 1.
    sure = torch.tensor([[50.0, -50.0, -50.0]])
    assert dice_loss(sure, torch.tensor([[1.0, 0, 0]])).item() == pytest.approx(0, abs=1e-6)
    assert dice_loss(sure, torch.tensor([[0.0, 1, 1]])).item() == pytest.approx(1 - 1 / 4)


def test_losses_do_not_depend_on_the_chunks(monkeypatch):
    logits = torch.randn(5, 4, 6, requires_grad=True)
    masks = torch.rand(5, 17, 23) > 0.5
    found = []
    for chunk in (2, 100):
        monkeypatch.setattr(mask_losses_module, "FULL_SIZE_CHUNK", chunk)
        losses = mask_losses(logits, masks)
        (gradient,) = torch.autograd.grad(losses["loss_mask"].sum() + losses["loss_dice"].sum(), logits)
        found.append((losses["loss_mask"].detach(), losses["loss_dice"].detach(), gradient))
    for first, second in zip(*found, strict=True):
        assert_close(first, second, tolerance=1e-6)


def test_masks_of_a_batch_are_padded_to_one_size():
    masks = [torch.ones(2, 2, 3, dtype=torch.bool), torch.ones(0, 4, 2, dtype=torch.bool)]
    padded = padded_masks(masks)
    assert padded.shape == (2, 4, 3)
    assert padded[:, :2].all() and not padded[:, 2:].any()


# Data --------------------------------------------------------------------------------------------------------------

SQUARE = [[2, 1, 6, 1, 6, 4, 2, 4]]
CODE = {"size": [8, 10], "counts": [80]}


def test_polygons_and_codes_are_decoded():
    square = np.zeros((8, 10), dtype=bool)
    square[1:4, 2:6] = True
    code = coco_mask.encode(np.asfortranarray(square.astype(np.uint8)))
    runs = {"size": [8, 10], "counts": [17, 3, 5, 3, 5, 3, 5, 3, 36]}
    text = {"size": [8, 10], "counts": code["counts"].decode()}
    two = [*SQUARE, [8, 6, 10, 6, 10, 8, 8, 8]]
    packed = PackedMasks([SQUARE, runs, text, two])
    masks = packed.decode(slice(0, 4), 8, 10, "photo.jpg")
    assert masks.dtype == torch.bool
    assert all(np.array_equal(mask, square) for mask in masks[:3].numpy())
    assert masks[3, 1:4, 2:6].all() and masks[3, 6:, 8:].all() and masks[3].sum() == 16
    assert packed.decode(slice(2, 2), 8, 10, "photo.jpg").shape == (0, 8, 10)
    with pytest.raises(UserError, match=r"photo.jpg: .* code of size \[8, 10\], but its image is \[9, 10\]"):
        packed.decode(slice(2, 3), 9, 10, "photo.jpg")
    with pytest.raises(UserError, match="photo.jpg: .* has a damaged run-length code"):
        PackedMasks([{"size": [8, 10], "counts": "abc"}]).decode(slice(0, 1), 8, 10, "photo.jpg")


@pytest.mark.parametrize(
    "segmentation, message",
    [
        (None, "has no segmentation"),
        ([], "has no segmentation"),
        ([[1, 2, 3, 4]], "a polygon of 4 numbers"),
        ([[1, 2, 3, 4, 5, 6, 7]], "a polygon of 7 numbers"),
        ([[1, 2, 3, 4, 5, float("nan")]], "a polygon with nan in it: expected finite numbers"),
        ([[float("nan"), 2, 3, 4, 5, 6]], "a polygon with nan in it"),
        ([[1, 2, 3, 4, 5, float("-inf")]], "a polygon with -inf in it"),
        ([[1, 2, 3, 4, 5, 10**400]], "a polygon with 10000.* in it"),
        ([[1e9, 2, 3, 4, 5, 6]], "a polygon with 1000000000.0 in it: .* pixels in or near its image of"),
        ([[1, -60_000] * 2 + [1, 60_000] * 2], "a polygon with an outline of 240000 pixels, too long for its image"),
        ([[1, 2, 3, 4, 5, True]], "a polygon with True in it"),
        ([[1, 2, 3, 4, 5, "6"]], "a polygon with the text '6' in it"),
        ([*SQUARE, []], "a polygon of 0 numbers"),
        ([[[1, 2], [3, 4], [5, 6]]], "a polygon with a list in it"),
        ([1, 2, 3, 4, 5, 6], "neither a list of polygons nor"),
        ([*SQUARE, CODE], "a list of run-length codes"),
        (json.dumps(SQUARE), "neither a list of polygons nor"),
        (7, "neither a list of polygons nor"),
        ({"size": [10, 8], "counts": [80]}, r"of size \[10, 8\], but its image is \[8, 10\]"),
        ({"size": [8, 10, 1], "counts": [80]}, r"of size \[8, 10, 1\]"),
        ({"size": [8, 10.5], "counts": [80]}, r"of size \[8, 10.5\]"),
        ({"size": "8x10", "counts": [80]}, "of size the text '8x10'"),
        ({"counts": [80]}, "of size None"),
        ({"size": [8, 10]}, "neither a string nor a list of integers"),
        ({"size": [8, 10], "counts": 3}, "neither a string nor a list of integers"),
        ({"size": [8, 10], "counts": ["80"]}, "neither a string nor a list of integers"),
        ({"size": [8, 10], "counts": [True, 79]}, "neither a string nor a list of integers"),
        ({"size": [8, 10], "counts": [79]}, "do not add up to its image's pixels"),
        ({"size": [8, 10], "counts": [40, 41]}, "do not add up to its image's pixels"),
        ({"size": [8, 10], "counts": [-1, 81]}, "a run is negative, or longer than its image"),
        ({"size": [8, 10], "counts": [2**32, 80]}, "a run is negative, or longer than its image"),
        ({"size": [8, 10], "counts": [79.5, 0.5]}, "a run is not an integer"),
        ({"size": [8, 10], "counts": [80, float("nan")]}, "a run is not an integer"),
        ({"size": [8, 10], "counts": []}, "an empty run-length code"),
        ({"size": [8, 10], "counts": ""}, "an empty run-length code"),
        ({"size": [8, 10], "counts": "b'`2'"}, r"repr of Python bytes .* counts.decode\(\)"),
        ({"size": [8, 10], "counts": "`"}, "it ends inside a number"),
        ({"size": [8, 10], "counts": "`2`"}, "it ends inside a number"),
        ({"size": [8, 10], "counts": "PPPPPP0`2"}, "a number of more than 6 digits"),
        ({"size": [8, 10], "counts": "O`2"}, "a negative run"),
        ({"size": [8, 10], "counts": "a2"}, "do not add up to its image's pixels"),
        ({"size": [8, 10], "counts": "`2 "}, "invalid characters"),
        ({"size": [8, 10], "counts": "`2\0"}, "invalid characters"),
        ({"size": [8, 10], "counts": "`2\u0130"}, "invalid characters"),
        ({"size": [8, 10], "counts": "p2"}, "invalid characters"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_segmentations_that_cannot_be_learned_from_are_named(segmentation, message):
    images = [{"id": 7, "height": 8, "width": 10}]
    annotation = {"id": 3, "image_id": 7, "segmentation": segmentation}
    good = {"id": 1, "image_id": 7, "segmentation": SQUARE}
    with pytest.raises(UserError, match=f"truth.json: annotation 3 of image 7.*({message})"):
        normalize(images, [good, annotation], "truth.json")
    # Annotations of another image are left out.
    other = {**annotation, "image_id": 8}
    assert normalize(images, [good, {**good, "segmentation": CODE}, other], "truth.json")[1][0] == good
    with pytest.raises(UserError, match="photo.jpg: an object .*; use annotations"):
        decode_mask(segmentation, 8, 10, "photo.jpg")


@pytest.mark.parametrize("size", [(None, 10), (0, 10), (8, -1), (8.5, 10), (True, 10), ("8 px", 10), ([8], 10),
                                  (float("inf"), 10), ("nan", 10)], ids=str)  # fmt: skip
def test_image_sizes_that_masks_cannot_have_are_named(size):
    image = {"id": 7, "height": size[0], "width": size[1]}
    with pytest.raises(UserError, match="truth.json: image 7 states height .* not integers above 0.*--masks"):
        normalize([image], [], "truth.json")


def test_masks_of_more_pixels_than_codes_are_made_for_are_refused():
    for given in (SQUARE, {"size": [2**15, 2**14], "counts": [2**29]}):
        with pytest.raises(ValueError, match="masks have fewer than 536870912 pixels"):
            normalize_segmentation(given, [2**15, 2**14])


@pytest.mark.parametrize("height, width", [(8, 10), (8.0, 10.0), ("8", "10"), ("8.0", 10)])
@pytest.mark.parametrize("counts", [[17, 3, 5, 3, 52], [17.0, 3, 5, 3.0, 52], [17, 3, 0, 0, 5, 0, 0, 3, 52, 0],
                                    [10, 0, 7, 3, 5, 1, 0, 2, 52], "a0350_1", "a030M53_1", b"a0350_1"],
                         ids=str)  # fmt: skip
def test_sizes_and_runs_are_the_same_however_they_are_written(height, width, counts):
    image = {"id": 7, "height": height, "width": width}
    given = {"id": 1, "image_id": 7, "segmentation": {"size": [height, width], "counts": counts}}
    before = json.dumps([image, str(given)])
    expected = np.zeros(80, dtype=np.uint8)
    expected[17:20] = expected[25:28] = 1
    expected = expected.reshape(10, 8).T
    ((sized,), (annotation,)) = normalize([image], [given], "truth.json")
    assert json.dumps([image, str(given)]) == before
    code = annotation["segmentation"]
    for side in (sized["height"], sized["width"], *code["size"]):
        assert type(side) is int
    assert isinstance(code["counts"], str) or all(type(run) is int and run > 0 for run in code["counts"])
    assert np.array_equal(decode_mask(code, 8, 10, "x"), expected)
    runs = coco_mask.frPyObjects(code, 8, 10) if isinstance(code["counts"], list) else code
    assert np.array_equal(coco_mask.decode(runs), expected)


def test_many_segmentations_are_read_like_single_ones():
    good = {"size": [8, 10], "counts": "a0350_1"}
    kinds = [good, SQUARE, {"size": [8, 10], "counts": "a035"}, CODE, {"size": [8, 10], "counts": "`2"}, None, "x",
             {"size": [8, 10], "counts": "`"}, {"size": ["8", 10.0], "counts": "0`2"}]  # fmt: skip
    order = np.random.default_rng(0).integers(0, len(kinds), 700)
    sizes = [[8, 10], [10, 8]]
    which = np.random.default_rng(1).random(700) < 0.1
    several = list(normalize_all([kinds[i] for i in order], [sizes[int(w)] for w in which]))
    assert len(several) == 700
    for i, w, found in zip(order, which, several, strict=True):
        if isinstance(found, str):
            with pytest.raises(ValueError, match=re.escape(found)):
                normalize_segmentation(kinds[i], sizes[int(w)])
        else:
            assert found == normalize_segmentation(kinds[i], sizes[int(w)])
    assert sum(isinstance(found, str) for found in several) > 300


DAMAGED_CODES = """
import numpy as np
from pycocotools import mask as coco_mask
from enact_common.data.masks import decode_mask, normalize_all

rng, codes, sizes, masks = np.random.default_rng(0), [], [], []
for i in range(1500):
    height, width = (int(side) for side in rng.integers(1, 30, 2))
    mask = rng.random((height, width)) < rng.random()
    if i % 3 == 0:  # longer runs
        mask = np.kron(mask, np.ones((9, 7), dtype=bool))
    size, text = list(mask.shape), coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    codes.append({"size": size, "counts": text}), masks.append(mask)
    for kind in range(4):
        letters, place = list(text), int(rng.integers(0, len(text)))
        if kind == 0:
            letters = letters[:place]
        elif kind == 1:
            letters[place] = chr(rng.integers(48, 112))
        elif kind == 2:
            letters[place:place] = [chr(c) for c in rng.integers(40, 120, rng.integers(1, 9))]
        else:
            i, j = rng.integers(0, len(letters), 2)
            letters[i], letters[j] = letters[j], letters[i]
        codes.append({"size": size, "counts": "".join(letters)}), masks.append(None)
counts = [0, 0]
for code, mask, found in zip(codes, masks, normalize_all(codes, [code["size"] for code in codes])):
    refused = isinstance(found, str)
    counts[refused] += 1
    assert not (refused and mask is not None), (code, found)
    if refused:
        continue
    size = code["size"]
    ours = decode_mask(found, *size, "x")
    assert mask is None or np.array_equal(ours, mask), code
    compressed = found if isinstance(found["counts"], str) else coco_mask.frPyObjects(found, *size)
    assert np.array_equal(coco_mask.decode(compressed), ours), code
    assert coco_mask.area(compressed) == ours.sum() == coco_mask.area(coco_mask.merge([compressed])), code
assert counts[0] > 1500 and counts[1] > 3000, counts
print("all read or refused")
"""


def test_damaged_codes_crash_nothing_and_none_is_read_wrong():
    # Run in a separate process, since C code that writes outside its memory may crash much later.
    process = Forked(["-c", DAMAGED_CODES])
    said, complained = process.communicate()
    assert (process.returncode, said) == (0, "all read or refused\n"), complained[-2000:]


@pytest.mark.parametrize("shift", [-70, -3, 0, 3, 70, 5000])
def test_polygons_near_the_image_are_drawn_like_pycocotools(shift):
    polygon = [x + shift for x in SQUARE[0]]
    assert normalize_segmentation([polygon], [8, 10]) == [polygon]
    drawn = coco_mask.decode(coco_mask.frPyObjects([polygon], 8, 10))[..., 0]
    assert np.array_equal(decode_mask([polygon], 8, 10, "x"), drawn)


def coco_code(annotation, image):
    """An annotation's box as a compressed run-length code."""
    mask = np.zeros((image["height"], image["width"]), np.uint8, order="F")
    left, top, width, height = (max(round(side), 0) for side in annotation["bbox"])
    mask[top : top + height, left : left + width] = 1
    return {"size": list(mask.shape), "counts": coco_mask.encode(mask)["counts"].decode()}


def with_codes(shapes, folder, split, change):
    """Write a copy of a split's annotation file whose masks are compressed run-length codes; return its path.

    Args:
        change: function that edits the file's object before it is written.
    """
    data = json.loads((shapes / "annotations" / f"instances_{split}2017.json").read_text())
    images = {image["id"]: image for image in data["images"]}
    for annotation in data["annotations"]:
        annotation["segmentation"] = coco_code(annotation, images[annotation["image_id"]])
    change(data)
    path = folder / f"{split}.json"
    path.write_text(json.dumps(data))
    return path


def cut_short(data):
    data["annotations"][2]["segmentation"]["counts"] = data["annotations"][2]["segmentation"]["counts"][:2]


def text_of_bytes(data):
    for annotation in data["annotations"]:
        annotation["segmentation"]["counts"] = str(annotation["segmentation"]["counts"].encode())


def far_polygon(data):
    data["annotations"][0]["segmentation"] = [[0, 0, 1e9, 0, 1e9, 5]]


def nested_points(data):
    data["annotations"][0]["segmentation"] = [[[1, 2], [3, 4], [5, 6]]]


def list_of_codes(data):
    data["annotations"][0]["segmentation"] = [data["annotations"][0]["segmentation"]]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("damage", [cut_short, text_of_bytes, far_polygon, nested_points, list_of_codes])
def test_the_loader_and_the_checks_refuse_the_same(shapes, tmp_path, split, damage):
    file, folder = with_codes(shapes, tmp_path, split, damage), shapes / f"{split}2017"
    with pytest.raises(UserError, match=f"{split}.json: annotation [13] of image 1.*leave --masks out") as refused:
        CocoDetection(folder, file, lambda *item: item, masks=True)
    (finding,) = check_masks(Split(split, folder, file))
    assert finding.severity == FAULT and "segmentations that --masks refuses" in finding.text
    said = re.search(r"has .*(?=; use)", str(refused.value))[0]
    assert finding.examples[0].endswith(said)
    # Without masks, neither targets nor the evaluation get segmentations.
    dataset = CocoDetection(folder, file, lambda *item: item)
    assert len(dataset[0][1]["boxes"]) and "masks" not in dataset[0][1]
    assert all("segmentation" not in annotation for annotation in dataset.coco_api().dataset["annotations"])


def test_the_checks_count_missing_segmentations_and_sizes(shapes, tmp_path):
    def change(data):
        data["annotations"][1]["segmentation"] = []
        data["images"][-1]["height"] = None

    file = with_codes(shapes, tmp_path, "val", change)
    texts = {finding.text: finding.count for finding in check_masks(Split("val", shapes / "val2017", file))}
    assert texts == {
        "annotations without a segmentation, which --masks refuses": 1,
        "images without the height and width that --masks needs: integers above 0": 1,
    }
    none = with_codes(shapes, tmp_path, "val", lambda data: [a.pop("segmentation") for a in data["annotations"]])
    assert check_masks(Split("val", shapes / "val2017", none)) == []


@pytest.mark.parametrize("seed", range(6))
def test_masks_stay_with_their_pixels(seed):
    # Each of two objects has its own shade, so the image shows where it moved.
    masks, image = torch.zeros(2, 64, 80, dtype=torch.bool), torch.zeros(3, 64, 80, dtype=torch.uint8)
    corners = torch.tensor([[6, 8, 36, 52], [44, 12, 70, 60]])
    for mask, (left, top, right, bottom), shade in zip(masks, corners.tolist(), (100, 200), strict=True):
        mask[top:bottom, left:right] = True
        image[:, mask] = shade
    boxes = tv_tensors.BoundingBoxes(corners.float(), format="XYXY", canvas_size=(64, 80))
    target = {"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": tv_tensors.Mask(masks)}
    torch.manual_seed(seed)
    moved, after = train_transforms([120], 200)(tv_tensors.Image(image), target)
    assert after["masks"].dtype == torch.bool and after["masks"].shape[1:] == moved.shape[1:]
    assert len(after["masks"]) == len(after["boxes"]) == len(after["labels"]) > 0
    height, width = moved.shape[1:]
    for mask, box, label in zip(after["masks"], after["boxes"], after["labels"].tolist(), strict=True):
        painted = (moved[0].float() - 100 * label).abs() < 50
        if label == 1:
            # Interpolation at the edge of the brighter object produces the shade of the darker one.
            painted &= ~F.max_pool2d((moved[0] > 150)[None].float(), 9, 1, 4)[0].bool()
        assert (mask & painted).sum() / (mask | painted).sum() > 0.9
        rows, columns = mask.nonzero().unbind(dim=1)
        extent = torch.stack((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
        centre, side = box[:2] * torch.tensor([width, height]), box[2:] * torch.tensor([width, height])
        assert (torch.cat((centre - side / 2, centre + side / 2)) - extent).abs().max() <= 2


def test_targets_have_masks_only_on_request(shapes):
    split = find_split(str(shapes), "val")
    _, target = CocoDetection(*split, eval_transforms(64, 96))[0]
    assert "masks" not in target
    image, target = CocoDetection(*split, eval_transforms(128, 200), masks=True)[0]
    assert target["masks"].shape == (len(target["boxes"]), *image.shape[1:])
    truth = json.loads(split[1].read_text())
    areas = [a["area"] for a in truth["annotations"] if a["image_id"] == 1]
    assert target["masks"].flatten(1).sum(dim=1).tolist() == pytest.approx([4 * area for area in areas], rel=0.05)


# Outputs -----------------------------------------------------------------------------------------------------------


def test_masks_are_resized_to_the_original_image(monkeypatch):
    monkeypatch.setattr(segmentation, "FULL_SIZE_CHUNK", 2)
    logits = torch.randn(5, 6, 8)
    padded, size, original = (24, 32), (20, 32), (33, 47)
    seen = F.interpolate(logits[:, None], size=padded, mode="bilinear")[:, :, :20].sigmoid() > 0.5
    expected = F.interpolate(seen.float(), size=original)[:, 0].bool()
    found = torch.cat(list(full_size_masks(logits, padded, size, original)))
    assert torch.equal(found, expected)

    outputs = {"pred_masks": logits.unsqueeze(0)}
    sizes = torch.tensor([[24, 32]])
    (result,) = PostProcessSegm()([{"queries": torch.tensor([4, 0])}], outputs, sizes, sizes)
    masks = coco_mask.decode(result["segmentations"])
    assert np.array_equal(masks[..., 1], next(full_size_masks(logits[:1], padded, padded, padded))[0])
    assert not list(full_size_masks(logits[:0], padded, size, original))


def test_encoded_masks_decode_to_the_same_masks():
    masks = torch.rand(3, 7, 5) > 0.5
    codes = encode_masks(masks)
    assert json.loads(json.dumps(codes)) == codes
    assert np.array_equal(coco_mask.decode(codes).transpose(2, 0, 1), masks)


def panoptic(masks, classes, scores, things=(1, 2), original=(4, 6)):
    """(id_map, segments) for n mask logits (4, 6), which need no resizing, with these classes and scores."""
    logits = torch.full((1, len(classes), 6), -20.0)
    for i, (label, score) in enumerate(zip(classes, scores, strict=True)):
        logits[0, i, label], logits[0, i, 5] = math.log(score), math.log(1 - score)
    size = torch.tensor([[4, 6]])
    outputs = {"pred_logits": logits, "pred_masks": torch.tensor(masks).float().view(1, len(classes), 4, 6)}
    (result,) = PostProcessPanoptic(things)(outputs, size, torch.tensor([original]))
    return result["id_map"], [
        (s["id"], s["category_id"], s["isthing"], s["area"], round(s["score"], 3)) for s in result["segments"]
    ]


def columns(*numbers):
    """Mask logits (4, 6) that are positive in these columns."""
    return [[4.0 if i in numbers else -4.0 for i in range(6)]] * 4


def test_queries_above_the_threshold_share_the_pixels():
    id_map, segments = panoptic(
        [columns(0, 1), columns(2, 3), columns(0, 1, 2, 3, 4, 5), columns(4, 5), columns(0)],
        [1, 1, 2, 3, 5],
        [0.9, 0.95, 0.84, 0.99, 0.99],  # the third is below the threshold, the last is "no object"
    )
    assert segments == [(1, 1, True, 8, 0.9), (2, 1, True, 8, 0.95), (3, 3, False, 8, 0.99)]
    assert (id_map == torch.tensor([1, 1, 2, 2, 3, 3])).all()


def test_queries_of_the_same_stuff_are_one_segment():
    masks = [columns(0, 1), columns(2, 3), columns(4, 5)]
    id_map, segments = panoptic(masks, [4, 1, 4], [0.9, 0.9, 0.95])
    assert segments == [(1, 4, False, 16, 0.95), (2, 1, True, 8, 0.9)]
    assert id_map[0].tolist() == [1, 1, 2, 2, 1, 1]
    # Each thing is a separate segment.
    assert len(panoptic(masks, [1, 1, 1], [0.9, 0.9, 0.95])[1]) == 3


def test_small_segments_leave_their_pixels_to_the_next():
    weak = [[1.0] * 6] * 4
    id_map, segments = panoptic([weak, columns(5)], [1, 2], [0.9, 0.9])
    assert segments == [(1, 1, True, 24, 0.9)] and (id_map == 1).all()
    # At twice the size, the segment has more than four pixels and stays.
    id_map, segments = panoptic([weak, columns(5)], [1, 2], [0.9, 0.9], original=(8, 12))
    assert [(number, area) for number, _, _, area, _ in segments] == [(1, 80), (2, 16)]
    assert (id_map[:, 10:] == 2).all() and (id_map[:, :10] == 1).all()


def test_without_a_query_above_the_threshold_there_is_no_segment():
    id_map, segments = panoptic([columns(0)], [1], [0.5])
    assert segments == [] and id_map.shape == (4, 6) and not id_map.any()


def test_masks_are_drawn_translucent_with_an_outline():
    pixels = np.full((200, 300, 3), 100, dtype=np.uint8)
    masks = np.zeros((1, 200, 300), dtype=bool)
    masks[0, 40:120, 50:150] = True
    plain, filmed = (
        draw_detections(pixels, [[200, 150, 280, 190]], ["shape"], [0.5], [0], enlarge=False, masks=drawn)
        for drawn in (None, masks)
    )
    changed = (plain != filmed).any(axis=2)
    assert np.array_equal(changed, masks[0])
    assert filmed[40, 60].tolist() == [230, 159, 0] and filmed[80, 100].tolist() == [152, 124, 60]


# Training ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
    """{attention: output folder} of small models that were trained with masks for two epochs."""
    folders = {}
    for attention in ("enact", "mhsa"):
        folders[attention] = tmp_path_factory.mktemp(attention) / "run"
        flags = (*MASKS, "--epochs", 2, "--encoder_attention", attention, "--num_workers", 0)
        assert train("detr", shapes, folders[attention], *flags) == 0
    return folders


@pytest.mark.parametrize("attention", ["enact", "mhsa"])
def test_training_logs_mask_metrics(trained, shapes, tmp_path, attention):
    rows = read_log(trained[attention])
    assert len(rows) == 2
    for row in rows:
        assert len(row["test_coco_eval_masks"]) == len(row["test_coco_eval_bbox"]) == 12
        for part in ("train", "test"):
            assert 0 < row[f"{part}_loss_mask"] < 1 and 0 < row[f"{part}_loss_dice"] < 1
    record = json.loads((trained[attention] / "evaluation.json").read_text())
    assert list(record["masks"]["figures"].values()) == rows[-1]["test_coco_eval_masks"]

    words = ("--coco_path", shapes, *SMALL_MODEL["detr"], "--encoder_attention", attention, "--eval")
    checkpoint = ("--resume", trained[attention] / "checkpoint.pth")
    assert run("detr", *words, *checkpoint, "--output_dir", tmp_path / "eval", *MASKS) == 0
    record = json.loads((tmp_path / "eval" / "evaluation.json").read_text())
    assert list(record["masks"]["figures"].values()) == rows[-1]["test_coco_eval_masks"]
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert len(results) == 6 * 8
    assert coco_mask.decode(results[0]["segmentation"]).shape == (64, 80)


def test_perfect_masks_have_an_ap_of_one(shapes):
    from enact_common.data.categories import LabelMap
    from enact_common.evaluation.coco import CocoBoxEvaluator

    dataset = CocoDetection(*find_split(str(shapes), "val"), lambda *item: item, masks=True)
    evaluator = CocoBoxEvaluator(LabelMap.from_dict(dataset.label_map.to_dict()))
    for i, image_id in enumerate(dataset.image_ids):
        _, target = dataset[i]
        result = {
            "scores": torch.ones(len(target["labels"])),
            "labels": target["labels"],
            # Useless boxes, since only the masks should count.
            "boxes": torch.zeros(len(target["labels"]), 4),
            "segmentations": encode_masks(target["masks"].as_subclass(torch.Tensor)),
        }
        evaluator.update([image_id], [result])
    evaluator.synchronize()
    truth = dataset.coco_api()
    assert evaluator.evaluate(truth, masks=True).stats[0] == pytest.approx(1)
    assert evaluator.evaluate(truth).stats[0] == pytest.approx(0)


def test_a_resumed_training_with_masks_equals_the_uninterrupted_one(trained, shapes, tmp_path):
    output = tmp_path / "halves"
    assert train("detr", shapes, output, *MASKS, "--epochs", 1) == 0
    assert train("detr", shapes, output, *MASKS, "--epochs", 2, "--auto_resume") == 0
    whole, halves = (
        torch.load(folder / "checkpoint.pth", weights_only=True)["model"] for folder in (trained["enact"], output)
    )
    assert equal_states(whole, halves)
    assert read_log(trained["enact"]) == read_log(output)


def test_frozen_weights_stay_and_the_head_learns(shapes, tmp_path, capsys):
    boxes, masks = tmp_path / "boxes", tmp_path / "masks"
    assert train("detr", shapes, boxes, *ALL_STAGES, "--epochs", 1) == 0
    frozen = (*MASKS, "--frozen_weights", boxes / "checkpoint.pth")
    assert train("detr", shapes, masks, *frozen, "--epochs", 1) == 0
    detector, both = (torch.load(folder / "checkpoint.pth", weights_only=True) for folder in (boxes, masks))
    assert equal_states(detector["model"], {n[5:]: t for n, t in both["model"].items() if n.startswith("detr.")})
    assert all(torch.isfinite(t).all() for n, t in both["model"].items() if n.startswith("mask_head."))
    first, second = read_log(boxes)[-1], read_log(masks)[-1]
    # Box metrics and losses equal the detector's.
    assert first["test_coco_eval_bbox"] == second["test_coco_eval_bbox"]
    assert second["test_loss_ce"] == pytest.approx(first["test_loss_ce"], rel=1e-5)

    head = {n: t for n, t in both["model"].items() if n.startswith("mask_head.")}
    assert train("detr", shapes, masks, *frozen, "--epochs", 2, "--auto_resume") == 0
    later = torch.load(masks / "checkpoint.pth", weights_only=True)["model"]
    assert all(not torch.equal(head[n], later[n]) for n in head if n.endswith("lay1.weight"))
    assert equal_states(detector["model"], {n[5:]: t for n, t in later.items() if n.startswith("detr.")})

    capsys.readouterr()
    assert train("detr", shapes, masks, *MASKS, "--epochs", 3, "--auto_resume") == 2
    assert "was trained with --frozen_weights CKPT; pass the same" in capsys.readouterr().err


def test_pretrained_weights_load_with_and_without_a_mask_head(trained, shapes, tmp_path, capsys):
    box_model = tmp_path / "boxes"
    words = (*ALL_STAGES, "--pretrained", trained["enact"] / "checkpoint.pth", "--epochs", 1)
    assert train("detr", shapes, box_model, *words) == 0
    assert "skipped, not in the model: bbox_attention" in capsys.readouterr().out
    words = (*MASKS, "--pretrained", box_model / "checkpoint.pth", "--epochs", 0)
    assert train("detr", shapes, tmp_path / "masks", *words) == 0
    said = capsys.readouterr().out
    assert re.search(r"left as initialised: bbox_attention.q_linear.weight.* and 29 more", said)
    assert "skipped" not in said


def test_resuming_a_model_with_masks_needs_the_flag(trained, shapes, tmp_path, capsys):
    checkpoint = trained["enact"] / "checkpoint.pth"
    assert train("detr", shapes, tmp_path / "out", *ALL_STAGES, "--resume", checkpoint) == 2
    assert "Pass the flags of that run: --masks" in capsys.readouterr().err


@pytest.mark.parametrize("variant", ["conditional", "anchor"])
@pytest.mark.parametrize("flags", [["--masks"], ["--masks", "--frozen_weights", "x.pth"]], ids=" ".join)
def test_other_variants_refuse_masks(variant, flags, capsys):
    assert run(variant, "--coco_path", "/nowhere", "--device", "cpu", *flags) == 2
    assert "only DETR has a mask head" in capsys.readouterr().err


def test_data_without_masks_are_refused_before_any_work(shapes, tmp_path, capsys):
    truth = json.loads((shapes / "annotations" / "instances_val2017.json").read_text())
    for annotation in truth["annotations"]:
        annotation["segmentation"] = []
    (tmp_path / "val.json").write_text(json.dumps(truth))
    own = ("--val_images", shapes / "val2017", "--val_annotations", tmp_path / "val.json")
    own += ("--train_images", shapes / "train2017")
    own += ("--train_annotations", shapes / "annotations" / "instances_train2017.json")
    output = tmp_path / "out"
    assert train("detr", shapes, output, *own, *MASKS) == 2
    assert re.search(
        r"val.json: annotation 1 of image 1.* has no segmentation, .*leave --masks out", capsys.readouterr().err
    )
    assert not output.exists() or not list(output.iterdir())


def panoptic_data(shapes, root):
    """Write the shapes as panoptic data, with crosses and the background as stuff; return the flags that load them."""
    for split in ("train", "val"):
        truth = json.loads((shapes / "annotations" / f"instances_{split}2017.json").read_text())
        dataset = CocoDetection(*find_split(str(shapes), split), lambda *item: item, masks=True)
        folder = root / "annotations" / f"panoptic_{split}2017"
        folder.mkdir(parents=True)
        annotations = []
        for i, image_id in enumerate(dataset.image_ids):
            _, target = dataset[i]
            id_map = np.full(target["masks"].shape[1:], 200)
            segments = [{"id": 200, "category_id": 9}]
            objects = zip(target["masks"].numpy(), target["labels"].tolist(), strict=True)
            for number, (mask, label) in enumerate(objects):
                rows, cols = mask.nonzero()
                id_map[mask] = number + 1
                box = [int(cols.min()), int(rows.min()), int(np.ptp(cols)) + 1, int(np.ptp(rows)) + 1]
                segments.append({"id": number + 1, "category_id": label + 1, "bbox": box, "area": int(mask.sum())})
            seen = set(np.unique(id_map).tolist())
            (folder / f"{image_id}.png").write_bytes(encode_id_map(id_map))
            segments = [segment for segment in segments if segment["id"] in seen]
            annotations.append({"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": segments})
        categories = [{**c, "isthing": int(c["name"] != "cross")} for c in truth["categories"]]
        categories.append({"id": 9, "name": "background", "isthing": 0})
        content = {"images": truth["images"], "annotations": annotations, "categories": categories}
        folder.with_suffix(".json").write_text(json.dumps(content))
    return ("--dataset_file", "coco_panoptic", "--coco_panoptic_path", root)


@pytest.fixture(scope="module")
def panoptic_run(shapes, tmp_path_factory):
    """(data and model flags, output folder) of a small panoptic model after one epoch."""
    root = tmp_path_factory.mktemp("panoptic")
    flags = (*MASKS, *panoptic_data(shapes, root / "data"), "--encoder_attention", "mhsa")
    assert train("detr", shapes, root / "run", *flags, "--epochs", 1) == 0
    return flags, root / "run"


def test_panoptic_training_logs_panoptic_quality(panoptic_run, shapes, tmp_path):
    flags, output = panoptic_run
    (row,) = read_log(output)
    assert row["train_loss_mask"] > 0 and len(row["test_coco_eval_bbox"]) == 12
    for group in ("all", "th", "st"):
        assert row[f"test_PQ_{group}"].keys() == {"pq", "sq", "rq", "n"}
    assert row["test_PQ_all"]["n"] == row["test_PQ_th"]["n"] + row["test_PQ_st"]["n"] > 2
    state = torch.load(output / "checkpoint.pth", weights_only=True)
    things = [label for label, name in enumerate(state["label_map"]["names"]) if name not in ("cross", "background")]
    assert state["args"]["num_classes"] == 250
    assert state["label_map"]["things"] == [label for label in things if state["label_map"]["category_ids"][label]]

    resume = ("--resume", output / "checkpoint.pth", "--eval")
    assert train("detr", shapes, tmp_path / "eval", *flags, *resume) == 0
    record = json.loads((tmp_path / "eval" / "evaluation.json").read_text())
    assert record["panoptic"]["figures"]["PQ"] == row["test_PQ_all"]["pq"]
    written = json.loads((tmp_path / "eval" / "panoptic_results" / "panoptic.json").read_text())
    assert len(written["annotations"]) == 6


def test_the_main_metric_is_that_of_the_task():
    boxes, masks = {"test_coco_eval_bbox": [0.1] * 12}, {"test_coco_eval_masks": [0.2] * 12}
    quality = {"test_PQ_all": {"pq": 0.3}}
    assert [main_metric(row) for row in ({}, boxes, boxes | masks, boxes | quality)] == [None, 0.1, 0.2, 0.3]
    # -1 and NaN mean that the metric could not be measured.
    for number in (-1, float("nan")):
        assert main_metric({"test_coco_eval_bbox": [number] * 12}) is None
        assert main_metric(quality | {"test_PQ_all": {"pq": number}}) is None


# Prediction --------------------------------------------------------------------------------------------------------


def test_prediction_returns_and_writes_masks(trained, shapes, tmp_path):
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(photo)
    detector = load_detector(trained["enact"] / "checkpoint.pth", "cpu", threshold=0)
    found = detector(photo)
    assert found.masks.shape == (8, 50, 70) and found.masks.dtype == torch.bool
    assert detector(photo, threshold=1.0).masks.shape == (0, 50, 70)

    argv = [
        "--checkpoint",
        trained["enact"] / "checkpoint.pth",
        photo,
        "--threshold",
        0,
        "--output_dir",
        tmp_path / "out",
    ]
    assert predict.main([str(word) for word in (*argv, "--device", "cpu")]) == 0
    entries = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(entries) == 8
    for entry, mask in zip(entries, found.masks, strict=True):
        assert np.array_equal(coco_mask.decode(entry["segmentation"]), mask)
    drawn = np.array(Image.open(tmp_path / "out" / "photo.png"))
    assert drawn.shape[0] % 50 == 0


@pytest.fixture(scope="module")
def sure(panoptic_run, tmp_path_factory):
    """The panoptic checkpoint, changed to predict things and stuff with high scores at different places."""
    state = torch.load(panoptic_run[1] / "checkpoint.pth", weights_only=True)
    weights, generator = state["model"], torch.Generator().manual_seed(1)
    known = [label for label, i in enumerate(state["label_map"]["category_ids"]) if i is not None]
    weights["detr.class_embed.bias"].fill_(-1e4)
    weights["detr.class_embed.bias"][known] = 0
    weights["detr.class_embed.weight"] = 20 * torch.randn(251, 32, generator=generator)
    weights["detr.query_embed.weight"] = 5 * torch.randn(8, 32, generator=generator)
    for name, tensor in weights.items():
        if "multihead_attn.in_proj_weight" in name or name.startswith("bbox_attention"):
            # Sharper attention makes queries attend to different places.
            tensor *= 10
    path = tmp_path_factory.mktemp("sure") / "checkpoint.pth"
    torch.save(state, path)
    return path


def relabelled(checkpoint, path, **changes):
    """A copy of a checkpoint with a changed label map; None removes an entry."""
    state = torch.load(checkpoint, weights_only=True)
    label_map = state["label_map"] | changes
    state["label_map"] = {name: value for name, value in label_map.items() if value is not None}
    torch.save(state, path)
    return path


def run_predict(checkpoint, output, *inputs):
    """Run the prediction command; return its exit status."""
    return predict.main(
        [str(w) for w in ("--checkpoint", checkpoint, "--output_dir", output, "--device", "cpu", *inputs)]
    )


def read_segments(folder):
    """{file name: (id map, segments)} from a folder of panoptic results."""
    content = json.loads((folder / "panoptic.json").read_text())
    names = {image["id"]: Path(image["file_name"]).name for image in content["images"]}
    return {
        names[entry["image_id"]]: (
            read_id_map(folder / "panoptic" / entry["file_name"], folder),
            entry["segments_info"],
        )
        for entry in content["annotations"]
    }


def test_a_panoptic_prediction_equals_that_of_an_evaluation(sure, panoptic_run, shapes, tmp_path, capsys):
    output = tmp_path / "out"
    assert run_predict(sure, output, shapes / "val2017") == 0
    assert f"pictures, predictions.json and panoptic_results in {output}" in capsys.readouterr().out
    # For a checkpoint without `things`, the evaluation takes them from the annotations.
    old = relabelled(sure, tmp_path / "old.pth", things=None)
    flags = (*panoptic_run[0], "--resume", old, "--eval", "--batch_size", 1)
    assert train("detr", shapes, tmp_path / "eval", *flags) == 0
    ours, theirs = (read_segments(folder / "panoptic_results") for folder in (output, tmp_path / "eval"))
    assert ours.keys() == theirs.keys() and len(ours) == 6
    for name, (id_map, segments) in ours.items():
        assert np.array_equal(id_map, theirs[name][0]) and segments == theirs[name][1]
    assert len({segment["category_id"] for _, segments in ours.values() for segment in segments}) > 1
    content, other = (
        json.loads((folder / "panoptic_results" / "panoptic.json").read_text())
        for folder in (output, tmp_path / "eval")
    )
    assert content["categories"] == [
        {name: category[name] for name in ("id", "name", "isthing")} for category in other["categories"]
    ]


def test_panoptic_segments_have_pixels_names_and_a_picture(sure, shapes, tmp_path):
    photo = tmp_path / "photo.png"
    Image.open(sorted((shapes / "val2017").iterdir())[0]).save(photo)
    detector = load_detector(sure, "cpu")
    found = detector(photo)
    id_map, segments = found.panoptic.id_map, found.panoptic.segments
    assert id_map.dtype == torch.int64 and id_map.shape == (64, 80) and segments
    assert detector.threshold == 0.85 and min(segment["score"] for segment in segments) >= 0.85
    for segment in segments:
        assert segment["area"] == (id_map == segment["id"]).sum() > 0
        assert segment["name"] == detector.label_map.names[segment["category_id"]]
        assert segment["isthing"] == (segment["name"] not in ("cross", "background"))
    assert set(id_map.unique().tolist()) - {0} == {segment["id"] for segment in segments}
    assert detector(photo, threshold=1.0).panoptic.segments == []

    assert run_predict(sure, tmp_path / "out", photo) == 0
    drawn = np.array(Image.open(tmp_path / "out" / "photo.png"))
    assert np.array_equal(drawn, draw_panoptic(decode_image(photo), id_map, segments, detector.label_map.names))


def test_labels_without_a_category_make_no_segments(sure, shapes, tmp_path):
    photo = sorted((shapes / "val2017").iterdir())[0]
    segment = load_detector(sure, "cpu")(photo).panoptic.segments[0]
    ids = load_detector(sure, "cpu").label_map.category_ids
    fewer = [None if i == segment["category_id"] else i for i in ids]
    found = load_detector(relabelled(sure, tmp_path / "fewer.pth", category_ids=fewer), "cpu")(photo).panoptic
    assert segment["category_id"] not in [other["category_id"] for other in found.segments]
    assert set(found.id_map.unique().tolist()) - {0} == {other["id"] for other in found.segments}


def test_segments_of_a_video_are_written_frame_by_frame(sure, tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "clip.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 5, (80, 64))
    for shade in (40, 200):
        writer.write(np.full((64, 80, 3), shade, np.uint8))
    writer.release()
    assert run_predict(sure, tmp_path / "out", tmp_path / "clip.avi") == 0
    content = json.loads((tmp_path / "out" / "panoptic_results" / "panoptic.json").read_text())
    assert [(image["id"], image["frame"]) for image in content["images"]] == [(1, 0), (2, 1)]
    assert [entry["image_id"] for entry in content["annotations"]] == [1, 2]
    assert (tmp_path / "out" / "clip.mp4").is_file()


def test_a_panoptic_prediction_is_refused_before_any_work_if_impossible(sure, shapes, tmp_path, capsys):
    old = relabelled(sure, tmp_path / "old.pth", things=None)
    assert run_predict(old, tmp_path / "out", shapes / "val2017") == 2
    assert f"{old}: does not say which categories are things" in capsys.readouterr().err
    kept = tmp_path / "out" / "panoptic_results" / "notes.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    assert run_predict(sure, tmp_path / "out", shapes / "val2017") == 2
    assert "panoptic_results: contains other files than panoptic results" in capsys.readouterr().err
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [kept]
    inputs = tmp_path / "in" / "panoptic_results"
    inputs.mkdir(parents=True)
    Image.new("RGB", (80, 64)).save(inputs / "a.png")
    assert run_predict(sure, tmp_path / "new", tmp_path / "in") == 2
    assert "in the folder of the panoptic results" in capsys.readouterr().err
    assert run_predict(sure, tmp_path / "new", inputs) == 0
