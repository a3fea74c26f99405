"""A trained detector in one call: from a checkpoint and an image to boxes with names."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors

from enact_common.arguments import CLUSTERING_FLAGS, MODEL_FLAGS
from enact_common.backbone import SHALLOW_BACKBONES, STAGES
from enact_common.checkpoint import load_checkpoint, load_model
from enact_common.data.categories import LabelMap, coco_names
from enact_common.data.coco import decode_image
from enact_common.data.transforms import eval_transforms
from enact_common.device import default_device, find_device
from enact_common.errors import UserError
from enact_common.variants import VARIANTS, load_variant

ImageLike = str | Path | Image.Image | np.ndarray | Tensor

# A parameter that one variant alone has.
SIGNATURES = {
    "anchor": "transformer.pattern.weight",
    "conditional": "transformer.decoder.layers.0.sa_qcontent_proj.weight",
    "detr": "transformer.decoder.layers.0.multihead_attn.in_proj_weight",
}

# Flags beside the model's own that decide what a checkpoint's detector sees.
IMAGE_FLAGS = ("eval_size", "max_size")


@dataclass
class Detections:
    """What was found in one image, the likeliest first. All tensors are on the CPU.

    Attributes:
        boxes: float32 (n, 4), left, top, right, bottom in pixels of the image as it was given.
        scores: float32 (n,), in [0, 1], falling.
        labels: int64 (n,), the model's.
        names: of the labels.
        category_ids: the data set's own id of each label.
        queries: int64 (n,), which of the model's queries found it.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    names: list[str]
    category_ids: list[int]
    queries: Tensor

    def __len__(self) -> int:
        return len(self.scores)


class LoadedDetector:
    """A trained detector that takes images as they come; `load_detector` makes it.

    Images go through the model one by one: with ENACT's default settings a result would depend on its batch mates.

    Attributes:
        variant: a key of `VARIANTS`.
        args: the arguments that the model was built with.
        model: in evaluation mode, on `device`.
        label_map: what its labels mean.
        threshold: least score of a detection, in [0, 1].
        device: where the model is.
    """

    def __init__(
        self,
        variant: str,
        args: argparse.Namespace,
        model: nn.Module,
        postprocess: nn.Module,
        label_map: LabelMap,
        threshold: float,
        device: torch.device,
    ):
        self.variant = variant
        self.args = args
        self.model = model.to(device).eval()
        self.postprocess = postprocess
        self.label_map = label_map
        self.threshold = threshold
        self.device = device
        self._resize = eval_transforms(args.eval_size, args.max_size)

    def __call__(
        self, images: ImageLike | Sequence[ImageLike], threshold: float | None = None
    ) -> Detections | list[Detections]:
        """Detect.

        Args:
            images: one image or a list of them. An image is a path; a PIL image; an array (height, width, 3) or
                (height, width); or a tensor (3, height, width). Arrays and tensors are RGB, uint8 0 to 255 or floating
                point 0 to 1. Files and PIL images are taken as their pixels are stored: no EXIF rotation.
            threshold: least score; None for the detector's own.

        Returns:
            the image's detections, or a list of them for a list of images.

        Raises:
            UserError: a file is missing or cannot be read.
            ValueError: an array or tensor is no image.
        """
        if isinstance(images, list | tuple):
            return [self.detect(as_pixels(image), threshold) for image in images]
        return self.detect(as_pixels(images), threshold)

    def model_input(self, pixels: Tensor) -> Tensor:
        """An image uint8 (3, height, width) at the evaluation's size: uint8 (1, 3, h, w), on the model's device."""
        no_boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=tuple(pixels.shape[-2:]))
        resized, _ = self._resize(tv_tensors.Image(pixels), {"boxes": no_boxes})
        return resized.unsqueeze(0).to(self.device)

    def detect(self, pixels: Tensor, threshold: float | None = None) -> Detections:
        """The detections in an image uint8 (3, height, width)."""
        with torch.inference_mode():
            outputs = self.model(self.model_input(pixels))
        # Decoded outside of it, so that what the caller gets are ordinary tensors, which can be changed in place.
        return self.decode(outputs, tuple(pixels.shape[-2:]), threshold)

    def decode(self, outputs: dict[str, Any], size: tuple[int, int], threshold: float | None = None) -> Detections:
        """The detections in the model's outputs for one image.

        Args:
            outputs: of the model, for a batch of one.
            size: (height, width) in pixels that the boxes shall refer to.
            threshold: least score; None for the detector's own.
        """
        threshold = self.threshold if threshold is None else threshold
        (found,) = self.postprocess(outputs, torch.tensor([size], device=self.device))
        height, width = size
        scores, labels, boxes, queries = (found[key].cpu() for key in ("scores", "labels", "boxes", "queries"))
        boxes = boxes.clamp(min=torch.zeros(4), max=torch.tensor([width, height, width, height]))
        known = torch.tensor([i is not None for i in self.label_map.category_ids])
        order = scores.argsort(descending=True, stable=True)
        order = order[((scores >= threshold) & known[labels])[order]]
        kept = labels[order].tolist()
        return Detections(
            boxes[order],
            scores[order],
            labels[order],
            [self.label_map.names[label] for label in kept],
            [self.label_map.category_ids[label] for label in kept],
            queries[order],
        )


def load_detector(
    checkpoint: str | Path, device: str | torch.device | None = None, threshold: float = 0.5
) -> LoadedDetector:
    """The detector in a checkpoint: ours, or one of the original repositories or of ENACT's authors.

    The variant, the classes and the settings come from the checkpoint. Where it has averaged weights (`--ema`), those
    are taken.

    Args:
        checkpoint: a path or an https URL.
        device: "cuda", "cuda:1", "cpu"; None for a GPU where there is one.
        threshold: least score of a detection, in [0, 1].

    Raises:
        UserError: the file is missing, is no checkpoint, or fits no variant; or there is no such device.
    """
    source = str(checkpoint)
    device = find_device(default_device() if device is None else str(device))
    state = load_checkpoint(source)
    variant = variant_of(state)
    if variant is None:
        raise UserError(
            f"{source}: is of none of the variants ({', '.join(VARIANTS)}); its tensors are named "
            f"{', '.join(map(str, list(state['model'])[:3]))}, ..."
        )
    try:
        args, label_map = arguments_of(state, variant)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    model, _, postprocessors = load_variant(variant).models.build_model(args)
    load_model(model, state.get("model_ema") or state["model"], source)
    return LoadedDetector(variant, args, model, postprocessors["bbox"], label_map, threshold, device)


def variant_of(checkpoint: dict[str, Any]) -> str | None:
    """The variant that a checkpoint is of, by its own word or by the names of its tensors; None for none."""
    if checkpoint.get("variant") in VARIANTS:
        return checkpoint["variant"]
    return next((variant for variant, name in SIGNATURES.items() if name in checkpoint["model"]), None)


def arguments_of(checkpoint: dict[str, Any], variant: str) -> tuple[argparse.Namespace, LabelMap]:
    """The arguments that build a checkpoint's model, and what its labels mean.

    What the checkpoint's own arguments do not say is read off its tensors or, last, is the variant's default.

    Args:
        checkpoint: of `load_checkpoint`.
        variant: a key of `VARIANTS`.

    Raises:
        UserError: it was made with a value that a flag of ours does not have.
    """
    weights, saved = checkpoint["model"], checkpoint["args"]
    parser = load_variant(variant).main.get_args_parser()
    args = parser.parse_args([])
    choices = {action.dest: action.choices for action in parser._actions if action.choices}
    clustered = any(name.endswith("W_prob.weight") for name in weights)
    args.encoder_attention = "enact" if clustered else "mhsa"
    args.backbone = backbone_of(weights) or args.backbone
    args.backbone_norm = "batch" if any(name.endswith("num_batches_tracked") for name in weights) else "frozen"
    for flag in (*MODEL_FLAGS, *CLUSTERING_FLAGS, *IMAGE_FLAGS):
        if saved.get(flag) is not None and hasattr(args, flag):
            if saved[flag] not in choices.get(flag, (saved[flag],)):
                known = ", ".join(map(str, choices[flag]))
                raise UserError(f"was made with --{flag} {saved[flag]}; the variant {variant} has {known}")
            setattr(args, flag, saved[flag])
    # Nothing is fetched, and nothing trains.
    args.backbone_weights, args.aux_loss = "none", False
    label_map = labels_of(checkpoint, variant)
    args.num_classes = label_map.num_classes
    return args, label_map


def labels_of(checkpoint: dict[str, Any], variant: str) -> LabelMap:
    """What a checkpoint's labels mean; where it does not say: COCO's classes if there are as many, else numbers.

    Args:
        checkpoint: of `load_checkpoint`.
        variant: a key of `VARIANTS`.
    """
    if "label_map" in checkpoint:
        return LabelMap.from_dict(checkpoint["label_map"])
    names = coco_names()
    heads = (t for name, t in checkpoint["model"].items() if name.endswith(("class_embed.bias", "class_embed.0.bias")))
    head = next(heads, None)
    # DETR's last logit is no object.
    count = len(names) if head is None else len(head) - (variant == "detr")
    if count == len(names):
        ids = tuple(None if name == "N/A" else i for i, name in enumerate(names))
        return LabelMap(ids, names)
    return LabelMap(tuple(range(count)), tuple(f"class {i}" for i in range(count)))


def backbone_of(weights: dict[str, Tensor]) -> str | None:
    """The name of the ResNet whose blocks a state dict has; None where it has none that we know."""
    first = [name for name in weights if name.endswith("conv1.weight")]
    blocks = [sum(f"layer{stage}." in name for name in first) for stage in range(1, 5)]
    shallow = not any("layer1.0.conv3.weight" in name for name in weights)
    found = (n for n, stages in STAGES.items() if list(stages) == blocks and (n in SHALLOW_BACKBONES) == shallow)
    return next(found, None)


def as_pixels(image: ImageLike) -> Tensor:
    """An image as uint8 (3, height, width), RGB, on the CPU.

    Raises:
        UserError: a file is missing or cannot be read.
        ValueError: an array or tensor is no image.
    """
    if isinstance(image, str | Path):
        return decode_image(Path(image))
    if isinstance(image, Image.Image):
        if image.mode.startswith("I;16"):
            # PIL would cut 16 bits off at 255; the upper eight are what a file of 16 bits is decoded to as well.
            image = (np.asarray(image) >> 8).astype(np.uint8)
        else:
            image = np.asarray(image.convert("RGB"))
    if isinstance(image, np.ndarray):
        # A copy: PyTorch warns of arrays that cannot be written to, as `np.asarray` of a PIL image gives.
        image = torch.from_numpy(np.array(image, order="C"))
        image = image.unsqueeze(-1).expand(-1, -1, 3) if image.ndim == 2 else image
        image = image.permute(2, 0, 1) if image.ndim == 3 else image  # (height, width, 3) -> (3, height, width)
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        shape = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(
            f"expected a path, a PIL image, an array (height, width, 3) or (height, width), or a tensor "
            f"(3, height, width), got {shape}"
        )
    if image.is_floating_point():
        if not (image.min() >= 0 and image.max() <= 1):
            raise ValueError("pixels in floating point must be in [0, 1]; pass uint8 for 0 to 255")
        image = (image * 255).round()
    elif image.dtype != torch.uint8:
        raise ValueError(f"pixels must be uint8, 0 to 255, or floating point, 0 to 1, got {image.dtype}")
    return image.to("cpu", torch.uint8).contiguous()
