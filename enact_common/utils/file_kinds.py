"""The kind of a file that is not a checkpoint, and what to do about it. Nothing here executes a file."""

import re
import zipfile
from collections.abc import Collection
from pathlib import Path

# Bytes read from a file's start, and the part of them that is tested for text.
HEAD, TEXT = 2**20, 4096

ANOTHER_FORMAT = "pass the PyTorch checkpoint that it was made from"
UNPACK = "unpack it and pass the checkpoint in it"
NO_CHECKPOINT = "pass a checkpoint"
STATE_DICT = "in the program that made it, save its tensors: torch.save({'model': model.state_dict()}, FILE)"
OTHER_LIBRARY = "pass a checkpoint of this project, DETR, Conditional DETR or Anchor DETR"

# First bytes of a file: (kind, what to do).
MAGIC = {
    b"version https://git-lfs": ("a Git LFS pointer", "fetch the file itself: git lfs pull"),
    b"\x89PNG": ("a PNG image", NO_CHECKPOINT),
    b"\xff\xd8\xff": ("a JPEG image", NO_CHECKPOINT),
    b"GIF8": ("a GIF image", NO_CHECKPOINT),
    b"BM": ("a BMP image", NO_CHECKPOINT),
    b"RIFF": ("a WebP image or an AVI video", NO_CHECKPOINT),
    b"II*\0": ("a TIFF image", NO_CHECKPOINT),
    b"MM\0*": ("a TIFF image", NO_CHECKPOINT),
    b"%PDF": ("a PDF", NO_CHECKPOINT),
    b"\x89HDF": ("an HDF5 file, as Keras writes", OTHER_LIBRARY),
    b"\x93NUMPY": ("a NumPy array", STATE_DICT),
    b"\x1f\x8b": ("a gzip archive", UNPACK),
    b"BZh": ("a bzip2 archive", UNPACK),
    b"\xfd7zXZ": ("an xz archive", UNPACK),
    b"\x28\xb5\x2f\xfd": ("a Zstandard archive", UNPACK),
    b"7z\xbc\xaf": ("a 7-Zip archive", UNPACK),
    b"Rar!": ("a RAR archive", UNPACK),
}  # fmt: skip

# Names of files in the archive of an exported program.
EXPORTED = re.compile(r"serialized_exported_program|\.pt2$|models/.*\.json$")

# Packages whose classes a pickled checkpoint names: kind of the checkpoint.
PACKAGES = {
    "ultralytics": "an Ultralytics YOLO checkpoint",
    **dict.fromkeys(("models.yolo", "models.common"), "a YOLO checkpoint"),
    **dict.fromkeys(("mmengine", "mmcv", "mmdet"), "an MMDetection (OpenMMLab) checkpoint"),
    **dict.fromkeys(("detectron2", "fvcore"), "a Detectron2 checkpoint"),
    "transformers": "a Hugging Face model",
}

# Parts of tensor names that are unique to one library: kind of the checkpoint.
NAMES = {
    "class_labels_classifier.": "a Hugging Face DETR",
    "model.encoder.layers.0.self_attn.q_proj.": "a Hugging Face transformer",
    "embeddings.patch_embeddings.": "a Hugging Face transformer",
    "sampling_offsets.": "a Deformable DETR or one of its successors (DINO, RT-DETR)",
    "backbone.bottom_up.": "a Detectron2 checkpoint",
    "proposal_generator.": "a Detectron2 checkpoint",
    "bbox_head.": "an MMDetection (OpenMMLab) checkpoint",
    "rpn_head.": "an MMDetection (OpenMMLab) checkpoint",
    "rpn.head.": "a torchvision detector",
    "head.classification_head.": "a torchvision detector",
    "model.0.conv.": "a YOLO checkpoint",
    "0.conv.weight": "a YOLO checkpoint",
}


def describe_file(path: Path) -> tuple[str, str] | None:
    """Return (kind, what to do) for a file that PyTorch could not read; None if it may be a damaged checkpoint."""
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if not head.strip(b"\0"):
        kind = "an empty file" if not head else "a file of zeros, probably from a broken download"
        return kind, "download or copy it again"
    for magic, description in MAGIC.items():
        if head.startswith(magic):
            return description
    if head[4:8] == b"ftyp":
        return "a video or a phone's image", NO_CHECKPOINT
    if head[257:262] == b"ustar":
        return "a tar archive, and was not executed", UNPACK
    if head.startswith(b"PK"):
        return describe_zip(path)
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html", b"<head", b"<?xml", b"<!--")):
        return "a web page", "download the file itself: a browser may have saved the page that links to it"
    # Protocol buffers have no magic: ONNX starts with its version (field 1), then the producer's name or the graph.
    if path.suffix == ".onnx" or (head[:1] == b"\x08" and head[1:2] < b"\x20" and head[2:3] in (b"\x12", b"\x3a")):
        return "an ONNX model, which has no state dict", ANOTHER_FORMAT
    if is_text(head[:TEXT]):
        return "a text file", NO_CHECKPOINT
    return describe_pickle(head)


def describe_zip(path: Path) -> tuple[str, str] | None:
    """Return (kind, what to do) for a zip archive; None if `torch.save` may have written it, or it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if any(name.endswith("constants.pkl") for name in names):
                return "a TorchScript archive, and was not executed", ANOTHER_FORMAT
            pickles = [name for name in names if name.endswith("/data.pkl")]
            if pickles:
                return describe_pickle(archive.read(pickles[0]))
    except Exception:  # a damaged archive raises many types: BadZipFile, zlib.error, UnicodeDecodeError, ...
        return None
    if any(EXPORTED.search(name) for name in names):
        return "an exported program, and was not executed", ANOTHER_FORMAT
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy archive", STATE_DICT
    content = f" of {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else " without files"
    return f"a zip archive{content}", UNPACK


def describe_pickle(content: bytes) -> tuple[str, str] | None:
    """Return (kind, what to do) for another library's pickle or a pickled module; None otherwise. Loads nothing."""
    for package, kind in PACKAGES.items():
        if f"c{package}.".encode() in content or f"c{package}\n".encode() in content:
            return f"{kind}, and was not executed", OTHER_LIBRARY
    if b"_parameters" in content and b"_modules" in content:
        return "a whole pickled module (torch.save(model)), and was not executed", STATE_DICT
    return None


def describe_folder(path: Path) -> tuple[str, str]:
    """Return (kind, what to do) for a folder that was given instead of a file."""
    if (path / "config.json").is_file():
        return "a Hugging Face model's folder", OTHER_LIBRARY
    if (path / "checkpoint.pth").is_file():
        return "a run's folder", f"pass {path / 'checkpoint.pth'}"
    if (path / "data.pkl").is_file():
        return "an unpacked checkpoint", "pass the packed file"
    if not any(path.iterdir()):
        return "an empty folder", NO_CHECKPOINT
    return "a folder", "pass the checkpoint in it"


def describe_names(names: Collection[str]) -> str | None:
    """Return the kind of the checkpoint that has tensors of these names; None if it is unknown."""
    for part, kind in NAMES.items():
        if any(part in name for name in names):
            return kind
    if any(name.endswith("layer1.0.conv1.weight") for name in names) and not any("coder" in name for name in names):
        return "only a backbone, for --backbone_weights"
    return None


def is_safetensors(path: Path) -> bool:
    """Whether a file has the safetensors format: the length of a JSON header, then the header."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return path.stat().st_size >= 8 + length > 8 and file.read(1) == b"{"


def is_text(head: bytes) -> bool:
    """Whether the first bytes of a file are text."""
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        # The read may have cut the last character.
        if error.start < len(head) - 3:
            return False
        text = head[: error.start].decode("utf-8")
    return all(c.isprintable() or c.isspace() for c in text)
