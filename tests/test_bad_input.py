"""Odd, damaged and hostile images and annotations.

See also test_data, test_checks, test_convert and test_predict.
"""

import io
import itertools
import json
import logging
import os
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL, read_log, run, train
from PIL import Image, ImageOps
from torchvision import tv_tensors

from enact_common import UserError, predict
from enact_common.compare.pictures import read_scenes
from enact_common.convert import __main__ as convert_command
from enact_common.convert.voc import mentioned_image
from enact_common.data import coco, images, transforms
from enact_common.data.annotations import lies_in, load_annotations
from enact_common.data.checks import __main__ as checks_command
from enact_common.data.checks import images as check_images
from enact_common.data.checks import rules
from enact_common.data.checks.split import Split
from enact_common.data.coco import CocoDetection, seeded
from enact_common.data.exif import exif_orientation
from enact_common.data.images import decode_image
from enact_common.data.synthetic import make_shapes
from enact_common.data.transforms import eval_transforms, resized_shape, train_transforms
from enact_common.evaluation import coco as evaluation
from enact_common.evaluation.coco import CocoBoxEvaluator
from enact_common.inference.detector import as_pixels
from enact_common.training.logs import setup_logging
from enact_common.variants import VARIANTS

# Images --------------------------------------------------------------------------------------------------------------

HEIGHT, WIDTH = 60, 80
Y, X = np.mgrid[0:HEIGHT, 0:WIDTH]
RGB = np.stack([X * 3, Y * 4, 255 - X * 2], axis=-1).astype(np.uint8)  # smooth, so that JPEG loses little
GREY = RGB[:, :, 0]
# 16 bits: the lower eight are arbitrary, because they are cut off.
DEEP = RGB.astype(np.uint16) * 256 + (X * 3)[:, :, None].astype(np.uint16)
ALPHA = (X * 3).astype(np.uint8)  # from transparent to opaque
OTHER = Image.fromarray(255 - RGB)  # a second frame


def encoded(pixels, kind: str, **options) -> bytes:
    """Encode pixels, an array or a PIL image, as the content of an image file."""
    image, stream = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels), io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def encoded_16(pixels: np.ndarray, suffix: str) -> bytes:
    """Encode 16 bits per colour, RGB or RGBA, with OpenCV: PIL cannot write them."""
    pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR if pixels.shape[2] == 3 else cv2.COLOR_RGBA2BGRA)
    return cv2.imencode(suffix, pixels)[1].tobytes()


def with_alpha(pixels: np.ndarray, alpha=ALPHA) -> np.ndarray:
    return np.dstack([pixels, alpha.astype(pixels.dtype)])


def palette() -> Image.Image:
    return Image.fromarray(RGB).convert("P")


TRANSPARENT = int(np.array(palette())[5, 7])
PALETTE_RGB = np.array(palette().convert("RGB"))
FRAMES = {"save_all": True, "append_images": [OTHER], "duration": 100}

# File content, expected pixels (2D for three equal colours), and their largest allowed difference.
READABLE = {
    "one pixel": (encoded(RGB[:1, :1], "PNG"), RGB[:1, :1], 0),
    "one row": (encoded(RGB[:1], "PNG"), RGB[:1], 0),
    "grey with alpha": (encoded(with_alpha(GREY), "PNG"), GREY, 0),
    "grey with alpha, TIFF": (encoded(with_alpha(GREY), "TIFF"), GREY, 0),
    "grey with a transparent level": (encoded(GREY, "PNG", transparency=int(GREY[5, 7])), GREY, 0),
    "black and white": (encoded(Image.fromarray(GREY > 99), "PNG"), np.where(GREY > 99, 255, 0), 0),
    "16-bit grey": (encoded(DEEP[:, :, 0], "PNG"), GREY, 0),
    "16-bit colour": (encoded_16(DEEP, ".png"), RGB, 0),
    "16-bit colour with alpha": (encoded_16(with_alpha(DEEP, ALPHA * 257.0), ".png"), RGB, 0),
    "16-bit grey, TIFF": (encoded(DEEP[:, :, 0], "TIFF"), GREY, 0),
    # OpenCV's TIFF library divides by 257 and does not cut off bits.
    "16-bit colour, TIFF": (encoded_16(DEEP, ".tiff"), RGB, 1),
    "16-bit colour with alpha, TIFF": (encoded_16(with_alpha(DEEP, ALPHA * 257.0), ".tiff"), RGB, 0),
    "CMYK, JPEG": (encoded(Image.fromarray(RGB).convert("CMYK"), "JPEG", quality=95), RGB, 4),
    "CMYK, TIFF": (encoded(Image.fromarray(RGB).convert("CMYK"), "TIFF"), RGB, 1),
    "RGBA, TIFF": (encoded(with_alpha(RGB), "TIFF"), RGB, 0),
    "RGBA, WebP": (encoded(with_alpha(RGB), "WEBP", lossless=True, exact=True), RGB, 0),
    "colour with a transparent colour": (encoded(RGB, "PNG", transparency=tuple(map(int, RGB[5, 7]))), RGB, 0),
    "palette with transparency": (encoded(palette(), "PNG", transparency=TRANSPARENT), PALETTE_RGB, 0),
    "palette with transparency, GIF": (encoded(palette(), "GIF", transparency=TRANSPARENT), PALETTE_RGB, 0),
    "animated GIF": (encoded(palette(), "GIF", **FRAMES), PALETTE_RGB, 0),
    "animated PNG": (encoded(RGB, "PNG", **FRAMES), RGB, 0),
    "animated PNG with a separate default image": (encoded(RGB, "PNG", **FRAMES, default_image=True), RGB, 0),
    "animated WebP": (encoded(RGB, "WEBP", **FRAMES, lossless=True), RGB, 0),
    "TIFF of two pages": (encoded(RGB, "TIFF", save_all=True, append_images=[OTHER]), RGB, 0),
}


@pytest.mark.parametrize("name", READABLE)
def test_images_of_all_kinds_become_8_bit_rgb(name, tmp_path):
    content, expected, tolerance = READABLE[name]
    path = tmp_path / "image.jpg"  # the suffix is ignored
    path.write_bytes(content)
    expected = np.stack([expected] * 3, axis=-1) if expected.ndim == 2 else expected
    decoded = decode_image(path)
    assert decoded.dtype == torch.uint8 and decoded.shape == (3, *expected.shape[:2])
    assert np.abs(decoded.permute(1, 2, 0).numpy().astype(int) - expected).max() <= tolerance
    # PIL reads the same image, but converts CMYK and TIFF colours slightly differently.
    if not name.startswith("16-bit colour with alpha"):
        with Image.open(path) as image:
            assert (as_pixels(image).int() - decoded.int()).abs().max() <= max(tolerance, 1)


@pytest.mark.parametrize("kind, options", [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {}), ("TIFF", {})])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_only_to_tiffs(tmp_path, kind, options, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned"
    path.write_bytes(encoded(RGB, kind, exif=exif, **options))
    plain = Image.open(io.BytesIO(encoded(RGB, kind, **options))).convert("RGB")
    plain.getexif()[0x0112] = orientation if kind == "TIFF" else 1
    expected = np.array(ImageOps.exif_transpose(plain))
    decoded = decode_image(path).permute(1, 2, 0).numpy()
    assert decoded.shape == expected.shape
    assert np.abs(decoded.astype(int) - expected).max() <= (1 if kind == "JPEG" else 0)
    # Readers apply a TIFF's orientation, so the checks report it as 1.
    assert exif_orientation(path) == (1 if kind == "TIFF" else orientation)
    assert check_images.inspect_image(path).size == expected.shape[1::-1]


TIFF_32 = [encoded((GREY / 255).astype(np.float32), "TIFF"), encoded(DEEP[:, :, 0].astype(np.int32) * 2**14, "TIFF")]
UNREADABLE = {
    "32-bit floats, TIFF": (TIFF_32[0], "32 bits per channel"),
    "32-bit integers, TIFF": (TIFF_32[1], "32 bits per channel"),
    "no bytes": (b"", "unknown format"),
    "text": (b"no image", "unknown format"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_images_are_named_with_the_reason(name, tmp_path):
    content, reason = UNREADABLE[name]
    (tmp_path / "image.png").write_bytes(content)
    with pytest.raises(UserError, match=rf"image\.png: not an image that can be read whole \(.*{reason}"):
        decode_image(tmp_path / "image.png")
    if "32" in reason:
        with pytest.raises(ValueError, match=reason):
            as_pixels(Image.open(tmp_path / "image.png"))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.98])
@pytest.mark.parametrize(
    "kind, options",
    [
        ("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("GIF", {}), ("BMP", {}), ("PPM", {}),
        ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}),
    ],
    ids=str,
)  # fmt: skip
def test_truncated_images_are_refused(tmp_path, kind, options, part):
    pixels = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    content = encoded(pixels, kind, **options)
    path = tmp_path / "image"
    path.write_bytes(content)
    assert decode_image(path).shape == (3, HEIGHT, WIDTH)
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(UserError, match="not an image that can be read whole"):
        decode_image(path)


def deep(bits: int) -> np.ndarray:
    """An image whose highest value has this many bits, uint16 (height, width, 3)."""
    return (RGB.astype(np.uint32) * (2**bits - 1) // RGB.max()).astype(np.uint16)


DEEP_KINDS = {
    "grey, PNG": lambda pixels: encoded(pixels[:, :, 0], "PNG"),
    "grey, TIFF": lambda pixels: encoded(pixels[:, :, 0], "TIFF"),
    "colour, PNG": lambda pixels: encoded_16(pixels, ".png"),
    "colour, TIFF": lambda pixels: encoded_16(pixels, ".tiff"),
    "colour, JPEG 2000": lambda pixels: encoded_16(pixels, ".jp2"),
    "colour with alpha, PNG": lambda pixels: encoded_16(with_alpha(pixels, ALPHA * 257.0), ".png"),
    "colour with alpha, TIFF": lambda pixels: encoded_16(with_alpha(pixels, ALPHA * 257.0), ".tiff"),
}


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("kind", DEEP_KINDS)
def test_16_bit_files_are_read_by_the_bits_in_use(tmp_path, kind, bits):
    pixels = deep(bits)
    if kind.startswith("grey"):
        pixels = np.repeat(pixels[:, :, :1], 3, axis=2)
        pixels[0, 0] = 2**bits - 1
    path = tmp_path / "deep"
    path.write_bytes(DEEP_KINDS[kind](pixels))
    decoded = decode_image(path).permute(1, 2, 0).numpy().astype(int)
    # JPEG 2000 loses a little.
    assert np.abs(decoded - (pixels >> (bits - 8))).max() <= (2 if "2000" in kind else 0)
    if kind.startswith("grey"):
        with Image.open(path) as image:
            assert torch.equal(as_pixels(image), decode_image(path))


def test_a_dark_16_bit_image_is_read_at_a_camera_depth():
    """1,500 has 11 bits, but no camera has that depth: it counts as 12."""
    dark = np.full((2, 2), 1500, np.uint16)
    assert (images.eight_bits(dark, "dark") == 1500 >> 4).all()
    assert not images.eight_bits(np.zeros((2, 2), np.uint16), "black").any()


def test_fewer_used_bits_are_logged_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(images, "_depth_is_logged", bytearray(1))
    for name, bits in (("full", 16), ("a", 12), ("b", 10)):
        (tmp_path / name).write_bytes(encoded(deep(bits)[:, :, 0], "PNG"))
        decode_image(tmp_path / name)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{tmp_path / 'a'}: a 16-bit image") and "12 bits" in record.getMessage()


def test_pillows_limit_of_pixels_is_neither_used_nor_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "TGA"):
        path = tmp_path / f"image.{kind.lower()}"
        path.write_bytes(encoded(palette() if kind == "GIF" else RGB, kind))
        assert images.image_size(path) == (WIDTH, HEIGHT) and decode_image(path).shape == (3, HEIGHT, WIDTH)
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "GIF", "TGA"])
def test_all_readers_share_one_limit_of_pixels(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(images, "MAX_PIXELS", HEIGHT * WIDTH - 1)
    path = tmp_path / f"image.{kind.lower()}"
    path.write_bytes(encoded(palette() if kind == "GIF" else with_alpha(RGB), kind))
    for read in (decode_image, images.image_size):
        with pytest.raises(UserError, match=r"it has 80 x 60 pixels \(width x height\), more than the limit of 4,799"):
            read(path)


def test_every_image_suffix_of_the_search_can_be_read(tmp_path):
    suffixes = images.image_suffixes()
    assert {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"} <= suffixes
    assert not suffixes & {".txt", ".pdf", ".eps", ".mpg", ".h5", ".heic"}
    registered = Image.registered_extensions()
    tried = [suffix for suffix in suffixes if registered.get(suffix) in Image.SAVE and registered[suffix] != "ICO"]
    assert len(tried) > 20
    for suffix in tried:
        path = tmp_path / f"image{suffix}"
        mode = {"MSP": "1", "XBM": "1", "BLP": "P"}.get(registered[suffix], "RGB")
        Image.fromarray(RGB).convert(mode).save(path, registered[suffix])
        if suffix == ".icns":
            assert decode_image(path).shape[0] == 3  # ICNS has fixed sizes
        else:
            assert decode_image(path).shape == (3, HEIGHT, WIDTH) and images.image_size(path) == (WIDTH, HEIGHT)


def test_suffixes_depend_on_the_builds_of_pillow_and_opencv(monkeypatch):
    monkeypatch.setattr(images.features, "check", lambda name: False)
    assert ".j2k" not in images.image_suffixes()
    monkeypatch.setattr(Image, "EXTENSION", {s: f for s, f in Image.EXTENSION.items() if f != "WEBP"})
    assert ".webp" in images.image_suffixes()  # OpenCV reads WebP
    monkeypatch.setattr(images.cv2, "haveImageWriter", lambda name: False)
    assert ".webp" not in images.image_suffixes()
    monkeypatch.setitem(Image.OPEN, "HEIF", (None, None))  # as a Pillow plug-in does
    monkeypatch.setattr(Image, "ID", [*Image.ID, "HEIF"])
    monkeypatch.setitem(Image.EXTENSION, ".heic", "HEIF")
    assert ".heic" in images.image_suffixes()


def test_a_format_without_a_reader_is_refused_with_advice(tmp_path):
    path = tmp_path / "photo.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    with pytest.raises(UserError, match=r"photo\.heic: .*no reader for \.heic; save such images as JPEG or PNG"):
        decode_image(path)


# Folders -------------------------------------------------------------------------------------------------------------


def names_in(folder: Path, paths: list[Path]) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in paths]


def test_a_search_follows_links_once_and_skips_hidden_files(tmp_path):
    root, pool = tmp_path / "root", tmp_path / "pool"
    names = ("c.jpg", "b.PNG", "sub/a.jpg", "sub/note.txt", ".d.jpg", ".git/e.jpg", "__MACOSX/f.jpg", "._c.jpg")
    for name in (*(root / name for name in names), pool / "g.jpg", pool / "deep" / "h.jpg"):
        name.parent.mkdir(parents=True, exist_ok=True)
        name.touch()
    (root / "link").symlink_to(pool)
    (root / "again").symlink_to("sub")
    (root / "sub" / "up").symlink_to(root)
    (pool / "deep" / "out").symlink_to(tmp_path)
    (root / "gone.jpg").symlink_to("nothing")
    os.mkfifo(root / "pipe.jpg")
    found = images.search(root, {".jpg", ".png"})
    expected = ["b.PNG", "c.jpg", "gone.jpg", "link/g.jpg", "link/deep/h.jpg", "sub/a.jpg"]
    assert names_in(root, found.files) == expected
    assert names_in(root, found.hidden) == ["._c.jpg", ".d.jpg", ".git", "__MACOSX"]
    assert names_in(root, found.others) == ["sub/note.txt"]
    assert sorted(names_in(root, found.again)) == ["again", "link/deep/out", "sub/up"]
    line = found.passed_over("root: ")
    assert line.startswith("root: skipped: 1 file by its suffix (1 .txt), 4 hidden, 3 links to")
    assert images.Found().passed_over("root: ") == ""
    assert names_in(root, images.search(root, {".jpg"}, (root / "sub").resolve()).files)[-1] == "link/deep/h.jpg"


def test_a_hidden_folder_is_searched_if_it_is_the_argument(tmp_path):
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "a.jpg").touch()
    assert len(images.search(tmp_path / ".cache", {".jpg"}).files) == 1


def test_unreadable_folders_are_named(tmp_path, monkeypatch):
    (tmp_path / "shut").mkdir()
    listdir = os.listdir

    def refuse(place):
        if Path(place).name == "shut":
            raise PermissionError(13, "Permission denied")
        return listdir(place)

    monkeypatch.setattr(os, "listdir", refuse)
    assert images.search(tmp_path, {".jpg"}).closed == [f"{tmp_path / 'shut'} (Permission denied)"]


def write_data(root: Path, images: dict[str, bytes], boxes=((5, 5, 20, 10),), **changes) -> Path:
    """Write a data set in COCO's layout; both splits have the same images and boxes.

    Args:
        root: folder to write to.
        images: file names and contents.
        boxes: (x, y, width, height) in pixels for every image, all of one class.
        changes: lists that replace those of the annotation files.
    """
    entries = [{"id": i, "file_name": name} for i, name in enumerate(images, start=1)]
    objects = [
        {"id": n, "image_id": entry["id"], "category_id": 1, "bbox": list(box)}
        for n, (entry, box) in enumerate(itertools.product(entries, boxes), start=1)
    ]
    content = {"images": entries, "annotations": objects, "categories": [{"id": 1, "name": "cell"}], **changes}
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        for name, data in images.items():
            path = root / f"{split}2017" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        file_of(root, split).write_text(json.dumps(content))
    return root


def file_of(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}2017.json"


def dataset_of(root: Path, split: str = "train") -> CocoDetection:
    return CocoDetection(root / f"{split}2017", file_of(root, split), eval_transforms(40, 100))


def test_a_folder_in_place_of_an_image_is_named(tmp_path, capsys):
    root = write_data(tmp_path / "data", {"a.png": encoded(RGB, "PNG"), "b.png": b""})
    for split in ("train", "val"):
        (root / f"{split}2017" / "b.png").unlink()
        (root / f"{split}2017" / "b.png").mkdir()
    with pytest.raises(UserError, match=r"b\.png: cannot be read \(Is a directory"):
        dataset_of(root)[1]
    assert checks_command.main([str(root)]) == 1
    assert "b.png: cannot be read (Is a directory)" in capsys.readouterr().out


SMALL = {f"{h}x{w}.png": encoded(np.resize(RGB, (h, w, 3)), "PNG") for h, w in ((1, 1), (1, 3000), (3000, 1), (2, 3))}


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_takes_images_of_one_pixel_or_one_line(variant, tmp_path):
    root = write_data(tmp_path / "data", SMALL, boxes=[(0, 0, 1, 1)])
    assert train(variant, root, tmp_path / "out", "--epochs", "1", "--batch_size", "2") == 0
    assert np.isfinite(read_log(tmp_path / "out")[0]["train_loss"])


def test_resizing_a_strip_stays_within_the_maximum_size(monkeypatch):
    assert resized_shape(1, 12000, 800, 1333) == (1, 1333) and resized_shape(12000, 1, 800, 1333) == (1333, 1)
    pixels = []
    original = transforms.F.resize

    def resize(image, shape, **options):
        pixels.append(shape[0] * shape[1])
        return original(image, shape, **options)

    monkeypatch.setattr(transforms.F, "resize", resize)
    image = tv_tensors.Image(torch.zeros(3, 2, 12000, dtype=torch.uint8))
    boxes = tv_tensors.BoundingBoxes([[0, 0, 12000, 2]], format="XYXY", canvas_size=(2, 12000), dtype=torch.float32)
    for seed in range(8):
        with seeded(seed):
            train_transforms([480, 800], 1333)(image, {"boxes": boxes, "labels": torch.tensor([0])})
    # More than one resize per image shows that some images were cropped.
    assert len(pixels) > 16 and max(pixels) <= 800 * 1333


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
@pytest.mark.slow
def test_an_image_of_13500_x_13500_pixels_is_read_and_resized(tmp_path):
    """The image has more pixels than Pillow's limit."""
    large = Image.new("1", (13500, 13500))
    large.paste(1, (6750, 3375, 13500, 6750))
    root = write_data(tmp_path / "data", {"large.png": encoded(large, "PNG")}, boxes=[(6750, 3375, 6750, 3375)])
    del large
    image, target = dataset_of(root)[0]
    assert image.shape == (3, 40, 40) and target["orig_size"].tolist() == [13500, 13500]
    assert target["boxes"].tolist() == [[0.75, 0.375, 0.5, 0.25]]
    inside = torch.zeros(40, 40, dtype=torch.bool)
    inside[10:20, 20:] = True
    assert torch.equal(image[0] > 127, inside)


# Annotations ---------------------------------------------------------------------------------------------------------

IMAGE = {"a.png": encoded(RGB, "PNG")}

ODD_BOXES = {
    "NaN": [0, 0, float("nan"), 5], "infinity": [0, 0, float("inf"), 5], "text": ["0", "0", "x", "5"],
    "one text": "[0, 0, 5, 5]",
    "null": [0, 0, None, 5], "nested": [[0, 0, 5, 5]], "an object": {"x": 0, "y": 0, "w": 5, "h": 5},
}  # fmt: skip


@pytest.mark.parametrize("box", ODD_BOXES.values(), ids=ODD_BOXES)
def test_boxes_that_are_not_four_finite_numbers_are_refused(box, tmp_path, capsys):
    annotations = [{"id": 7, "image_id": 1, "category_id": 1, "bbox": box}]
    root = write_data(tmp_path / "data", IMAGE, annotations=annotations)
    assert train("detr", root, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"{file_of(root, 'train')}: annotation 7 has bbox " in error and "list of four finite numbers" in error


def test_boxes_of_negative_size_are_dropped_and_counted(tmp_path, caplog):
    root = write_data(tmp_path / "data", IMAGE, boxes=[(5, 5, 10, 10), (20, 20, -10, 10), (20, 20, 10, -10)])
    with caplog.at_level("WARNING"):
        dataset = dataset_of(root)
    assert "2 boxes without area are dropped" in caplog.text
    assert dataset.num_objects == len(dataset[0][1]["boxes"]) == 1


@pytest.mark.parametrize("key", ["images", "categories"])
@pytest.mark.parametrize("number", [True, 1.5, "one", 2**53, -(2**70)])
def test_ids_that_are_not_integers_below_2_53_are_refused(key, number, tmp_path):
    root = write_data(tmp_path / "data", IMAGE)
    content = json.loads(file_of(root, "train").read_text())
    content[key][0]["id"] = number
    content["annotations"][0]["image_id" if key == "images" else "category_id"] = number
    file_of(root, "train").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"an id in '{key}' is .*{number}.*: expected an integer below 2\\^53"):
        dataset_of(root)
    findings = rules.check_quickly([Split("train", root / "train2017", file_of(root, "train"))], 100)
    assert any(f.severity == "error" and f"invalid ids in '{key}'" in f.text for f in findings)


def coco_metrics(dataset: CocoDetection) -> list[float]:
    """COCO metrics, AP to APL, if the detections of image 1 equal its annotated boxes, crowds included."""
    truth, evaluator = dataset.coco_api(), CocoBoxEvaluator(dataset.label_map)
    boxes = torch.tensor([annotation["bbox"] for annotation in truth.dataset["annotations"]])
    boxes[:, 2:] += boxes[:, :2]
    labels = torch.zeros(len(boxes), dtype=torch.int64)
    evaluator.update([1], [{"scores": torch.ones(len(boxes)), "labels": labels, "boxes": boxes}])
    return evaluator.evaluate(truth).stats[:6]


@pytest.fixture(params=["pycocotools", "faster-coco-eval"])
def package(request, monkeypatch):
    """Compute the metrics with each evaluation package that is installed."""
    if request.param == "faster-coco-eval":
        pytest.importorskip("faster_coco_eval")
    else:
        monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    assert evaluation.evaluation_package()[0] == request.param


ODD = [None, "", "x", "no", -1, float("nan"), float("inf"), 10**400, [], [[1]], {"a": 1}]


@pytest.mark.parametrize("area", [*ODD, "-1", "nan"], ids=lambda v: repr(v)[:12])
def test_an_invalid_area_is_replaced_by_the_boxs_area(area, tmp_path, package):
    """An area such as text or null ended a training in its first evaluation."""
    annotations = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 20, 10], "area": area}]
    root = write_data(tmp_path / "data", IMAGE, annotations=annotations)
    assert load_annotations(file_of(root, "val"))["annotations"][0]["area"] == 200
    # The box is small; there are none of other sizes.
    assert coco_metrics(dataset_of(root, "val")) == pytest.approx([1, 1, 1, 1, -1, -1])
    findings = rules.check_quickly([Split("val", root / "val2017", file_of(root, "val"))], 100)
    (finding,) = [f for f in findings if "areas that are not numbers" in f.text]
    assert finding.severity == "warning" and finding.examples[0].startswith("annotation 1: ")


@pytest.mark.parametrize("crowd", [*ODD, "0", False, "1", True, 1], ids=lambda v: repr(v)[:12])
def test_only_a_valid_iscrowd_marks_a_crowd(crowd, tmp_path, package):
    boxes = ([0, 0, 20, 10], [30, 30, 20, 10])
    annotations = [{"id": n, "image_id": 1, "category_id": 1, "bbox": box} for n, box in enumerate(boxes)]
    annotations[0]["iscrowd"] = crowd
    root = write_data(tmp_path / "data", IMAGE, annotations=annotations)
    dataset = dataset_of(root, "val")
    is_crowd = crowd in (1, "1")
    assert dataset.num_objects == (1 if is_crowd else 2)
    assert coco_metrics(dataset)[0] == pytest.approx(1)
    split = Split("val", root / "val2017", file_of(root, "val"))
    assert split.crowd.tolist() == [is_crowd, False]
    odd = [f for f in rules.check_quickly([split], 100) if "iscrowd" in f.text]
    assert len(odd) == (crowd not in (0, 1, "0", "1", None))


def test_training_without_boxes_is_refused(shapes, tmp_path, capsys):
    root = shutil.copytree(shapes, tmp_path / "data")
    content = json.loads(file_of(root, "train").read_text())
    file_of(root, "train").write_text(json.dumps({**content, "annotations": []}))
    assert train("detr", root, tmp_path / "out", "--epochs", "1", "--limit_train", "4") == 2
    assert "train: no boxes to learn from" in capsys.readouterr().err


@pytest.mark.parametrize("variant", VARIANTS)
def test_more_objects_than_queries_train_and_are_reported(variant, tmp_path, capsys):
    boxes = np.random.default_rng(0).uniform(1, 35, (1000, 4)).tolist()
    root = write_data(tmp_path / "data", {"many.png": IMAGE["a.png"]}, boxes=boxes)
    argv = ("--epochs", "2", "--batch_size", "1", "--no_augmentation")
    assert train(variant, root, tmp_path / "out", *argv) == 0
    out = capsys.readouterr().out
    text = "data: train: images with more objects than the model has queries (8): the rest cannot be found: 1 (many.png"
    assert out.count(text) == 1 and f"{text}: 1000)" in out
    rows = read_log(tmp_path / "out")
    assert len(rows) == 2 and all(np.isfinite(row[key]) for row in rows for key in ("train_loss", "test_loss"))


# Composed and decomposed accents, two scripts without spaces, and characters beyond 16 bits.
FOLDER = "数据 e\u0301té 🦋"
NAMES = ("café 1 🙂.jpg", "cafe\u0301 1 🙂.jpg", "細胞 и клетки/图 #2 %20 'x'.jpg", "a b  c .jpg")


@pytest.mark.slow
def test_names_in_any_script_work_from_checks_to_predictions(tmp_path, capsys):
    root = make_shapes(tmp_path / FOLDER / "data", train=4, val=4, size=(64, 80), seed=3)
    for split in ("train", "val"):
        content = json.loads(file_of(root, split).read_text())
        for image, name in zip(content["images"], NAMES, strict=True):
            place = root / f"{split}2017" / name
            place.parent.mkdir(exist_ok=True)
            (root / f"{split}2017" / image["file_name"]).rename(place)
            image["file_name"] = name
        for category in content["categories"]:
            category["name"] += " é 形 🔷"
        # Unescaped in one split, escaped in the other.
        file_of(root, split).write_text(json.dumps(content, ensure_ascii=split == "val"), encoding="utf-8")
    if len(list((root / "val2017").iterdir())) < len(NAMES):
        pytest.skip("this file system takes two of the names for one")
    assert checks_command.main([str(root)]) == 0
    output = tmp_path / FOLDER / "出力 o\u0308 🚀"
    assert train("conditional", root, output, "--epochs", "1") == 0
    again = tmp_path / FOLDER / "评估"
    argv = ["--coco_path", root, "--output_dir", again, *SMALL_MODEL["conditional"]]
    assert run("conditional", *argv, "--resume", output / "checkpoint.pth", "--eval") == 0
    assert "circle é 形 🔷" in capsys.readouterr().out
    record = json.loads((again / "evaluation.json").read_text())
    assert record["checkpoint"] == str(output / "checkpoint.pth")
    argv = ["--checkpoint", output / "checkpoint.pth", root / "val2017", "--output_dir", again, "--device", "cpu"]
    assert predict.main([*map(str, argv), "--threshold", "0"]) == 0
    assert all((again / name).is_file() for name in NAMES)
    predicted = {entry["file_name"] for entry in json.loads((again / "predictions.json").read_text())}
    assert predicted == {(root / "val2017" / name).as_posix() for name in NAMES}


@pytest.mark.parametrize("encoding, name", [("utf-8", "half \ud83d"), ("latin-1", "細胞")])
def test_names_that_the_terminal_cannot_show_are_escaped(tmp_path, monkeypatch, encoding, name):
    root = write_data(tmp_path / "data", IMAGE, categories=[{"id": 1, "name": name}])
    stream = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stream, encoding=encoding))
    assert checks_command.main([str(root), "--quick"]) == 0
    setup_logging()
    logging.getLogger("enact").info("classes: %s", name)
    escaped = name.encode("ascii", "backslashreplace")
    assert escaped in stream.getvalue() and b"classes: " + escaped in stream.getvalue()


# Paths that lead out of the folder -----------------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path) -> Path:
    """An image next to the data folder, which annotation files must not reach."""
    path = tmp_path / "secret.png"
    path.write_bytes(encoded(255 - RGB, "PNG"))
    return path


OUTSIDE = {
    "up": "../secret.png",
    "up two": "../../secret.png",
    "up behind a folder": "sub/../../../secret.png",
    "up only": "..",
    "next to the folder": "../{folder.name}b/a.png",
    "absolute": "{secret}",
    "nothing": "",
    "the folder": ".",
    "the folder by its path": "{folder}",
    "a null character": "a\0.png",
    "a null character after a path": "../secret.png\0.png",
}


@pytest.fixture(params=OUTSIDE.values(), ids=OUTSIDE)
def outside(request, tmp_path, secret) -> Path:
    """A data set in which the second image's name leads out of its folder or is no file name."""
    root = write_data(tmp_path / "data", {"a.png": IMAGE["a.png"], "sub/b.png": IMAGE["a.png"]})
    for split in ("train", "val"):
        content = json.loads(file_of(root, split).read_text())
        content["images"][1]["file_name"] = request.param.format(secret=secret, folder=root / f"{split}2017")
        file_of(root, split).write_text(json.dumps(content))
    return root


def test_training_refuses_names_outside_the_folder_before_searching_files(outside, tmp_path, monkeypatch, capsys):
    name = json.loads(file_of(outside, "train").read_text())["images"][1]["file_name"]
    monkeypatch.setattr(coco, "missing_files", lambda paths: pytest.fail("looked for files"))
    assert train("detr", outside, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"{file_of(outside, 'train')}: image 2 has the file_name {name!r}, which is not a file below" in error
    with pytest.raises(UserError, match="image 2 has the file_name"):
        read_scenes(outside / "val2017", file_of(outside, "val"), 1)


def test_checks_report_names_outside_the_folder_without_opening_them(outside, monkeypatch, capsys):
    opened, original = [], check_images.read_file
    monkeypatch.setattr(check_images, "read_file", lambda path: opened.append(path) or original(path))
    for flags in ([], ["--quick"]):
        assert checks_command.main([str(outside), *flags]) == 1
        lines = capsys.readouterr().out.splitlines()
        found = [i for i, line in enumerate(lines) if "images whose file_name is not a file below" in line]
        assert [lines[i].split()[:2] for i in found] == [["error", "1"]] * 2
        assert all("- image 2: '" in "".join(lines[i + 1 : i + 6]) for i in found)
        assert not any(f"{outside.parent / 'secret.png'}" in line for line in lines if "- image 2" not in line)
    assert [path.name for path in opened] == ["a.png"] * 2
    paths = {"train": (outside / "train2017", file_of(outside, "train"))}
    with pytest.raises(UserError, match=r"train: images whose file_name is not a file below .*: 1 \(image 2: '"):
        rules.quick_checks(paths, 100)


def test_any_path_to_a_file_inside_the_folder_is_allowed(tmp_path, secret):
    root = write_data(tmp_path / "data", {"a.png": IMAGE["a.png"], "sub/b.png": IMAGE["a.png"], "..c.png": b""})
    folder = root / "train2017"
    (folder / "..c.png").unlink()
    # A link is the user's choice, so it is followed.
    (folder / "..c.png").symlink_to(secret)
    names = ["./sub/../a.png", str(folder / "sub" / "b.png"), "..c.png"]
    images = [{"id": i, "file_name": name} for i, name in enumerate(names, start=1)]
    content = {**json.loads(file_of(root, "train").read_text()), "images": images}
    file_of(root, "train").write_text(json.dumps(content))
    dataset = dataset_of(root)
    expected = torch.from_numpy(RGB).permute(2, 0, 1)
    assert [torch.equal(dataset.image(i), expected) for i in range(3)] == [True, True, False]
    findings = rules.check_fully([Split("train", folder, file_of(root, "train"))], 100)
    assert not any(finding.severity == "error" for finding in findings)


def test_relative_folders_start_at_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (Path("data"), Path("."), Path("../x")):
        assert lies_in(folder, "a.png") and lies_in(folder, os.path.abspath(folder / "a.png"))
        assert not lies_in(folder, "../a.png") and not lies_in(folder, os.path.abspath(folder))
    assert lies_in(Path("/"), "a.png") and not lies_in(Path("/"), "")


def voc_of(root: Path, filename: str, image: str | None) -> Path:
    """Write two images with VOC's XML files, and a third XML file that mentions `filename`."""
    sides = "".join(f"<{side}>{value}</{side}>" for side, value in {"xmin": 2, "ymin": 2, "xmax": 9, "ymax": 9}.items())
    thing = f"<object><name>cell</name><bndbox>{sides}</bndbox></object>"
    root.mkdir()
    for stem in ("a", "b"):
        (root / f"{stem}.png").write_bytes(encoded(RGB + ord(stem), "PNG"))
        (root / f"{stem}.xml").write_text(f"<annotation>{thing}</annotation>")
    (root / "c.xml").write_text(f"<annotation><filename>{filename}</filename>{thing}</annotation>")
    if image:
        (root / image).write_bytes(encoded(RGB, "PNG"))
    return root


@pytest.mark.parametrize("filename", ["../secret.png", "{secret}", "..\\secret.png", "sub/../../secret.png", "..", ""])
def test_an_xml_file_only_gets_an_image_of_its_folder(filename, tmp_path, secret, capsys):
    filename = filename.format(secret=secret)
    # Folders in the name may be another machine's, so they are dropped; the data may have a file with that name.
    for there, count in ((None, 2), ("secret.png", 3)):
        root = voc_of(tmp_path / f"voc{count}", filename, there)
        out = tmp_path / f"out{count}"
        named = there and "secret" in filename
        assert convert_command.main(["voc", str(root), "--output_dir", str(out)]) == (0 if named else 1)
        assert ("XML files without an image: left out" in capsys.readouterr().out) == (not named)
        images = sorted(out.rglob("*.png"))
        assert len(images) == (3 if named else 2)
        assert not any(os.path.samefile(image, secret) for image in images)


def test_xml_with_null_characters_mentions_no_image(tmp_path):
    root = voc_of(tmp_path / "voc", "a\0.png", None)
    assert mentioned_image(root / "c.xml") == ""


def yolo_of(root: Path, listed: list[str]) -> Path:
    """Write two images with labels, and a list of training images with these lines."""
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True)
    for i, stem in enumerate("ab"):
        (root / "images" / f"{stem}.png").write_bytes(encoded(RGB + i, "PNG"))
        (root / "labels" / f"{stem}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (root / "train.txt").write_text("\n".join(listed) + "\n")
    (root / "data.yaml").write_text("train: train.txt\nval: images\nnames: [cell]\n")
    return root


def test_lists_of_images_may_name_other_folders(tmp_path, secret):
    """YOLO's lists may do so by design, for data sets in several places."""
    secret.with_suffix(".txt").write_text("0 0.5 0.5 0.5 0.5\n")
    root = yolo_of(tmp_path / "yolo", ["images/a.png", "../secret.png", str(tmp_path / "yolo" / "images" / "b.png")])
    assert convert_command.main(["yolo", str(root), "--output_dir", str(tmp_path / "out")]) == 0
    # In the converted data, no name leads out of its folder.
    for split in ("train", "val"):
        data = load_annotations(file_of(tmp_path / "out", split))
        assert all(lies_in(tmp_path / "out" / f"{split}2017", image["file_name"]) for image in data["images"])
    assert len(dataset_of(tmp_path / "out")) == 3


def test_list_lines_with_null_characters_are_dropped(tmp_path, capsys):
    root = yolo_of(tmp_path / "yolo", ["images/a.png", "images/b\0.png"])
    assert convert_command.main(["yolo", str(root), "--output_dir", str(tmp_path / "out")]) == 1
    assert "images that cannot be read: left out" in capsys.readouterr().out
    assert len(dataset_of(tmp_path / "out")) == 1
    (root / "data.yaml").write_text('train: "images\\0"\nval: images\nnames: [cell]\n')
    assert convert_command.main(["yolo", str(root), "--output_dir", str(tmp_path / "other")]) == 2
    assert "data.yaml: names images" in capsys.readouterr().err
