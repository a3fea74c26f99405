"""Write a plain DETR or Conditional DETR as a folder that Hugging Face's transformers loads."""

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from enact_common.checkpoints.huggingface import (
    CONFIG,
    MODEL_TYPES,
    PREPROCESSOR,
    SAFETENSORS,
    config_of,
    preprocessor_of,
    to_hugging_face,
)
from enact_common.cli.flags import CLUSTERING_FLAGS
from enact_common.inference.detector import LoadedDetector
from enact_common.models.backbone import ALL_STAGES
from enact_common.nested_tensor import NestedTensor
from enact_common.utils.errors import UserError
from enact_common.utils.extras import needed
from enact_common.utils.files import make_folder

FORMAT = "huggingface"

# Flags of the other formats, whose files hold a graph.
GRAPH_FLAGS = ("size", "batch", "dynamic", "mask", "raw", "clusters", "quantize")


def check_folder(args: argparse.Namespace, output: Path) -> None:
    """Refuse flags of the other formats, an output that exists, and missing packages, before any work."""
    given = [flag for flag in GRAPH_FLAGS if getattr(args, flag)]
    given += [flag for flag in CLUSTERING_FLAGS if getattr(args, flag, None) is not None]
    if given:
        raise UserError(
            f"--{given[0]} does not work with --format {FORMAT}, which writes weights of plain attention and no graph; "
            "leave it out"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: already exists; choose another folder")
    needed("transformers", f"--format {FORMAT}", "huggingface")


def check_model(detector: LoadedDetector) -> None:
    """Refuse models that Hugging Face's library does not have."""
    args = detector.args
    if detector.variant not in MODEL_TYPES.values():
        raise UserError(
            f"--format {FORMAT}: Hugging Face has no model of the variant {detector.variant}; share it with "
            "EnactDetector.save_pretrained, or pass another --format"
        )
    if args.encoder_attention != "mhsa":
        raise UserError(
            f"--format {FORMAT}: Hugging Face's models have plain attention, this one has --encoder_attention "
            f"{args.encoder_attention}. Share it with EnactDetector.save_pretrained; or load a plain model in "
            "transformers and add ENACT there with enact_common.plug_in (docs/use/plug_in.md)"
        )
    for flag, given, why in (
        ("masks", args.masks, "mask heads are not converted"),
        ("pre_norm", args.pre_norm, "Hugging Face's layers are post-norm"),
        ("position_embedding learned", args.position_embedding == "learned",
         "releases of transformers disagree on the names of learned positions"),
    ):  # fmt: skip
        if given:
            raise UserError(f"--format {FORMAT}: the model has --{flag}, and {why}; pass another --format")


def write_folder(detector: LoadedDetector, output: Path) -> float:
    """Write the folder, after loading it with transformers and comparing its outputs.

    Returns the greatest difference of logits and boxes on noise, in a batch with padding.

    Raises:
        UserError: a package is missing, or the folder cannot be written.
    """
    args, variant = detector.args, detector.variant
    # Hugging Face's own ResNet cannot be dilated.
    timm_backbone = bool(args.dilation) and args.backbone_stages == len(ALL_STAGES)
    if timm_backbone:
        needed("timm", f"--format {FORMAT} with a dilated backbone", "huggingface")
    save = needed("safetensors.torch", f"--format {FORMAT}", "huggingface").save
    weights = to_hugging_face(detector.model.state_dict(), variant, timm_backbone)
    make_folder(output.parent, "--output")
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        content = save({name: tensor.contiguous() for name, tensor in weights.items()}, {"format": "pt"})
        (folder / SAFETENSORS).write_bytes(content)
        for name, settings in (
            (CONFIG, config_of(args, variant, detector.label_map, timm_backbone)),
            (PREPROCESSOR, preprocessor_of(args, variant)),
        ):
            (folder / name).write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
        difference = compare(detector, folder)
        os.replace(folder, output)
    return difference


def compare(detector: LoadedDetector, folder: Path) -> float:
    """Return the greatest difference of a folder's outputs from a detector's: logits, and boxes as fractions."""
    loaded = load_quietly(folder)
    pixels, padded = padded_noise()
    with torch.inference_mode():
        ours = detector.model(NestedTensor(pixels, padded))
        theirs = loaded(pixel_values=pixels, pixel_mask=(~padded).long())
    pairs = ((ours["pred_logits"], theirs.logits), (ours["pred_boxes"], theirs.pred_boxes))
    return max(float((a - b).abs().nan_to_num(torch.inf).max()) for a, b in pairs)


def load_quietly(folder: Path) -> nn.Module:
    """Return the model in a folder, from Hugging Face's library, without progress bars."""
    import transformers

    shows_bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        return transformers.AutoModelForObjectDetection.from_pretrained(folder, local_files_only=True).eval()
    finally:
        if shows_bars:
            transformers.utils.logging.enable_progress_bar()


def padded_noise() -> tuple[Tensor, Tensor]:
    """Return normalised noise float32 (2, 3, 128, 160), and its padding mask: the second image fills 96 x 128."""
    pixels = torch.randn(2, 3, 128, 160, generator=torch.Generator().manual_seed(0))
    padded = torch.zeros(2, 128, 160, dtype=torch.bool)
    padded[1, 96:] = padded[1, :, 128:] = True
    return pixels.masked_fill(padded.unsqueeze(1), 0), padded
