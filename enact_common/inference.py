"""A trained detector in one call: from a checkpoint and an image to boxes with names."""

import argparse
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors

from enact_common.arguments import CLUSTERING_FLAGS, COCO, MODEL_FLAGS, PANOPTIC
from enact_common.backbone import ALL_STAGES, SHALLOW_BACKBONES, STAGES, keep_folded
from enact_common.checkpoint import detector_weights, has_masks, load_checkpoint, load_model
from enact_common.data.categories import LabelMap, coco_names
from enact_common.data.exif import decode_upright
from enact_common.data.images import decode_image, pil_to_rgb
from enact_common.data.panoptic import NUM_CLASSES, VOID, coco_panoptic_names, panoptic_label_map, things_of
from enact_common.data.transforms import eval_transforms, resized_shape
from enact_common.device import check_precision, default_device, find_device
from enact_common.engine import autocast
from enact_common.errors import UserError
from enact_common.file_kinds import describe_names
from enact_common.optimization import AMP_DTYPE
from enact_common.segmentation import PostProcessPanoptic, full_size_masks
from enact_common.variants import VARIANTS, load_variant

logger = logging.getLogger("enact")

ImageLike = str | Path | Image.Image | np.ndarray | Tensor

# A parameter that one variant alone has.
SIGNATURES = {
    "anchor": "transformer.pattern.weight",
    "conditional": "transformer.decoder.layers.0.sa_qcontent_proj.weight",
    "detr": "transformer.decoder.layers.0.multihead_attn.in_proj_weight",
}

# Flags of the model that its tensors do not show.
UNSEEN = ("dilation", "nheads")

# A tensor of an encoder or decoder layer, and which one.
LAYER = re.compile(r"transformer\.((?:en|de)coder(?:\.layers|_layers|_layers_level))\.(\d+)\.")

# Least score of a detection; that of a panoptic model's segments is `PostProcessPanoptic.THRESHOLD`.
THRESHOLD = 0.5

# Flags beside the model's own that decide what a checkpoint's detector sees.
IMAGE_FLAGS = ("eval_size", "max_size")


@dataclass
class Panoptic:
    """What an image's pixels belong to: things, each of them a segment, and stuff, a segment of each kind.

    Attributes:
        id_map: int64 (height, width), of the image as it was given, on the CPU: each pixel's segment, 0 for none.
        segments: dicts of `id`, from 1; `category_id`, the data set's own; `name`; `isthing`, a bool; `area` in
            pixels, at least 1; and `score`, the likeliest query's, in [0, 1].
    """

    id_map: Tensor
    segments: list[dict[str, Any]]


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
        masks: bool (n, height, width), each object's pixels of the image as it was given; None where the model finds
            boxes alone.
        panoptic: what each pixel belongs to, of panoptic models, whose detections are of stuff too; None of others.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    names: list[str]
    category_ids: list[int]
    queries: Tensor
    masks: Tensor | None = None
    panoptic: Panoptic | None = None

    def __len__(self) -> int:
        return len(self.scores)


class LoadedDetector:
    """A trained detector that takes images as they come; `load_detector` makes it.

    It can be pickled, deep-copied and sent to other processes; `detector.model` can be moved and cast to another dtype.

    Images go through the model one by one: with ENACT's default settings a result would depend on its batch mates.

    Attributes:
        variant: a key of `VARIANTS`.
        args: the arguments that the model was built with.
        model: in evaluation mode, on `device`.
        label_map: what its labels mean.
        threshold: least score of a detection, and of a segment, in [0, 1].
        amp: the precision that the model runs in: "bf16" or "fp16", or None for the weights' own.
        things: of a panoptic model, the labels of what can be counted; None of others.
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
        things: Collection[int] | None = None,
        amp: str | None = None,
    ):
        self.variant = variant
        self.args = args
        self.model = model.to(device, memory_format=torch.channels_last).eval()
        keep_folded(self.model)
        self.amp = amp
        self.postprocess = postprocess
        self.label_map = label_map
        self.threshold = threshold
        self.things = things
        self._resize = eval_transforms(args.eval_size, args.max_size)

    @property
    def device(self) -> torch.device:
        """The device of the model's parameters."""
        return next(self.model.parameters()).device

    def __call__(
        self, images: ImageLike | Sequence[ImageLike], threshold: float | None = None, exif: bool = True
    ) -> Detections | list[Detections]:
        """Detect.

        Args:
            images: one image or a list of them. An image is a path; a PIL image; an array (height, width, 3) or
                (height, width); or a tensor (3, height, width). Arrays and tensors are RGB, uint8 0 to 255 or floating
                point 0 to 1. PIL images are taken as their pixels are stored.
            threshold: least score; None for the detector's own.
            exif: turn the images of paths as EXIF says and viewers do; boxes and masks then refer to the upright
                image. False takes the pixels as they are stored, as training and COCO's evaluation do.

        Returns:
            the image's detections, or a list of them for a list of images.

        Raises:
            UserError: a file is missing or cannot be read.
            ValueError: an array or tensor is no image, or a PIL image has 32 bits a colour.
        """
        if isinstance(images, list | tuple):
            return [self.detect(as_pixels(image, exif), threshold) for image in images]
        return self.detect(as_pixels(images, exif), threshold)

    def model_input(self, pixels: Tensor) -> Tensor:
        """An image uint8 (3, height, width) at the evaluation's size: uint8 (1, 3, h, w), on the model's device."""
        no_boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=tuple(pixels.shape[-2:]))
        resized, _ = self._resize(tv_tensors.Image(pixels), {"boxes": no_boxes})
        return resized.unsqueeze(0).to(self.device)

    def detect(self, pixels: Tensor, threshold: float | None = None) -> Detections:
        """The detections in an image uint8 (3, height, width)."""
        with torch.inference_mode(), autocast(self.device, self.amp or "none"):
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
        masks = None
        # One image is a batch without padding.
        seen = resized_shape(height, width, self.args.eval_size, self.args.max_size)
        if "pred_masks" in outputs:
            logits = outputs["pred_masks"][0, queries[order].to(self.device)]
            parts = [part.cpu() for part in full_size_masks(logits, seen, seen, size)]
            masks = torch.cat([torch.zeros(0, height, width, dtype=torch.bool), *parts])
        return Detections(
            boxes[order],
            scores[order],
            labels[order],
            [self.label_map.names[label] for label in kept],
            [self.label_map.category_ids[label] for label in kept],
            queries[order],
            masks,
            None if self.things is None else self.lay_out(outputs, seen, size, threshold),
        )

    def lay_out(
        self, outputs: dict[str, Any], seen: tuple[int, int], size: tuple[int, int], threshold: float
    ) -> Panoptic:
        """The segments in a panoptic model's outputs for one image.

        Args:
            outputs: of the model, for a batch of one.
            seen: (height, width) of the image as the model saw it.
            size: (height, width) that the map shall have.
            threshold: least score.
        """
        postprocess = PostProcessPanoptic(self.things, threshold)
        (found,) = postprocess(outputs, torch.tensor([seen]), torch.tensor([size]))
        id_map, segments = found["id_map"], []
        for segment in found["segments"]:
            label = segment["category_id"]
            category = self.label_map.category_ids[label]
            if category is None:
                # As in an evaluation's results, what is of no category is no segment.
                id_map[id_map == segment["id"]] = VOID
            else:
                segments.append({**segment, "category_id": category, "name": self.label_map.names[label]})
        return Panoptic(id_map, segments)


def load_detector(
    checkpoint: str | Path,
    device: str | torch.device | None = None,
    threshold: float | None = None,
    amp: str | None = None,
    **flags,
) -> LoadedDetector:
    """The detector in a checkpoint: ours, or one of the original repositories or of ENACT's authors.

    The variant, the classes and the settings come from the checkpoint. Where it has averaged weights (`--ema`), those
    are taken.

    Args:
        checkpoint: a path, or an https URL that says the file's hash (`enact_common.download.download`).
        device: "cuda", "cuda:1", "cpu"; None for a GPU where there is one.
        threshold: least score of a detection, in [0, 1], and of a panoptic model's segment; None for 0.5, and of
            panoptic models for 0.85, with which they are evaluated.
        amp: mixed precision, "bf16" or "fp16", the latter on GPUs alone; None for float32.
        flags: of the model, where a checkpoint of weights alone does not show them: `dilation=True` for DC5.

    Raises:
        UserError: the file is missing, is no checkpoint, or fits no variant; or there is no such device or precision;
            or it is panoptic, and does not say which of its categories are things.
    """
    source = str(checkpoint)
    device = find_device(default_device() if device is None else str(device))
    if amp not in (None, *AMP_DTYPE):
        raise UserError(f"amp={amp!r}: no such precision; pass one of {', '.join(AMP_DTYPE)}")
    check_precision(amp, device)
    state = load_checkpoint(source)
    variant = known_variant(state, source)
    try:
        args, label_map = arguments_of(state, variant, flags)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    model, _, postprocessors = load_variant(variant).models.build_model(args)
    load_model(model, averaged_weights(state, source), source)
    things = things_of(label_map, source) if args.dataset_file == PANOPTIC else None
    if threshold is None:
        threshold = THRESHOLD if things is None else PostProcessPanoptic.THRESHOLD
    return LoadedDetector(variant, args, model, postprocessors["bbox"], label_map, threshold, device, things, amp)


def variant_of(checkpoint: dict[str, Any]) -> str | None:
    """The variant that a checkpoint is of, by its own word or by the names of its tensors; None for none."""
    if checkpoint.get("variant") in VARIANTS:
        return checkpoint["variant"]
    weights = detector_weights(checkpoint["model"])
    return next((variant for variant, name in SIGNATURES.items() if name in weights), None)


def known_variant(checkpoint: dict[str, Any], source: str) -> str:
    """The variant that a checkpoint is of.

    Raises:
        UserError: it is of none; the message says whose model it is, where the tensors' names show it.
    """
    variant = variant_of(checkpoint)
    if variant is None:
        kind = describe_names(checkpoint["model"])
        named = f"it is {kind}" if kind else f"its tensors are named {', '.join(list(checkpoint['model'])[:3])}, ..."
        raise UserError(
            f"{source}: is a checkpoint of none of the variants ({', '.join(VARIANTS)}): {named}. Pass one of this "
            "project, or of DETR, Conditional DETR or Anchor DETR"
        )
    return variant


def averaged_weights(checkpoint: dict[str, Any], source: str) -> dict[str, Tensor]:
    """A checkpoint's averaged weights, which the log then says, or else its only ones."""
    if not checkpoint.get("model_ema"):
        return checkpoint["model"]
    logger.info("%s: its averaged weights (--ema) are taken", source)
    return checkpoint["model_ema"]


def arguments_of(
    checkpoint: dict[str, Any], variant: str, flags: Mapping[str, Any] | None = None
) -> tuple[argparse.Namespace, LabelMap]:
    """The arguments that build a checkpoint's model, and what its labels mean.

    What the checkpoint's own arguments do not say is read off its tensors. What these do not show (`UNSEEN`) is the
    variant's default, which a warning says.

    Args:
        checkpoint: of `load_checkpoint`.
        variant: a key of `VARIANTS`.
        flags: values of the model's flags that are known otherwise.

    Raises:
        UserError: it was made with a value that a flag of ours does not have.
    """
    weights, saved = detector_weights(checkpoint["model"]), checkpoint["args"]
    parser = load_variant(variant).main.get_args_parser()
    args = parser.parse_args([])
    choices = {action.dest: action.choices for action in parser._actions if action.choices}
    clustered = any(name.endswith("W_prob.weight") for name in weights)
    args.encoder_attention = "enact" if clustered else "mhsa"
    args.masks = has_masks(checkpoint["model"])
    args.backbone = backbone_of(weights) or args.backbone
    for flag, value in sizes_of(weights).items():
        setattr(args, flag, value)
    args.backbone_norm = "batch" if any(name.endswith("num_batches_tracked") for name in weights) else "frozen"
    for flag in (*MODEL_FLAGS, *CLUSTERING_FLAGS, *IMAGE_FLAGS):
        if saved.get(flag) is not None and hasattr(args, flag):
            if saved[flag] not in choices.get(flag, (saved[flag],)):
                known = ", ".join(map(str, choices[flag]))
                raise UserError(f"was made with --{flag} {saved[flag]}; the variant {variant} has {known}")
            setattr(args, flag, saved[flag])
    args.dilation &= args.backbone not in SHALLOW_BACKBONES
    for flag, value in (flags or {}).items():
        if flag not in (*MODEL_FLAGS, *CLUSTERING_FLAGS, *IMAGE_FLAGS) or not hasattr(args, flag):
            raise UserError(f"no flag {flag} of the variant {variant}'s models")
        setattr(args, flag, value)
    unseen = {flag: getattr(args, flag) for flag in UNSEEN if flag not in (*saved, *(flags or ()))}
    if unseen:
        logger.warning(
            "the checkpoint does not say with which flags its model was made; beside what its tensors show, taken are: "
            "%s", ", ".join(f"{flag} {value}" for flag, value in unseen.items()),
        )  # fmt: skip
    # Nothing is fetched, and nothing trains.
    args.backbone_weights, args.aux_loss = "none", False
    label_map = labels_of(checkpoint, variant)
    args.num_classes = label_map.num_classes
    # The published panoptic models do not say that they are.
    silent = PANOPTIC if "label_map" not in checkpoint and args.num_classes == NUM_CLASSES else COCO
    args.dataset_file = PANOPTIC if args.masks and saved.get("dataset_file", silent) == PANOPTIC else COCO
    return args, label_map


def labels_of(checkpoint: dict[str, Any], variant: str) -> LabelMap:
    """What a checkpoint's labels mean; where it does not say: COCO's classes, or those of its panoptic data, if there
    are as many, else numbers.

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
    if count == NUM_CLASSES:
        return panoptic_label_map([{"id": i, "name": name} for i, name in coco_panoptic_names().items()])
    return LabelMap(tuple(range(count)), tuple(f"class {i}" for i in range(count)))


def sizes_of(weights: dict[str, Tensor]) -> dict[str, Any]:
    """The model's flags that show in the names and shapes of a state dict of any variant."""
    found: dict[str, Any] = {}
    for flag, endings, axis in (
        ("hidden_dim", ("class_embed.weight", "class_embed.0.weight"), 1),
        ("dim_feedforward", ("linear1.weight",), 0),
        ("num_queries", ("query_embed.weight",), 0),
        ("num_query_position", ("transformer.position.weight",), 0),
        ("num_query_pattern", ("transformer.pattern.weight",), 0),
    ):
        tensor = next((tensor for name, tensor in weights.items() if name.endswith(endings)), None)
        if tensor is not None:
            found[flag] = tensor.shape[axis]
    found["backbone_stages"] = stages_of(weights) or len(ALL_STAGES)
    layers = {(match[1], match[2]) for match in map(LAYER.match, weights) if match}
    for flag, part in (("enc_layers", "encoder"), ("dec_layers", "decoder")):
        found[flag] = sum(name.startswith(part) for name, _ in layers)
    if "transformer.pattern.weight" in weights:
        tokens = any("encoder_layers.0.self_attn.W_q" in name for name in weights)
        packed = weights.get("transformer.encoder_layers.0.self_attn.in_proj_weight")
        tokens |= packed is not None and packed.shape[0] == 3 * packed.shape[1]
        found |= {
            "attention_type": "nn.MultiheadAttention" if tokens else "RCDA",
            "num_feature_levels": 3 if "transformer.level_embed.weight" in weights else 1,
            "spatial_prior": "learned" if "transformer.position.weight" in weights else "grid",
        }
    else:
        found |= {
            "pre_norm": "transformer.encoder.norm.weight" in weights,
            "position_embedding": "learned" if "backbone.1.row_embed.weight" in weights else "sine",
        }
    return found


def stages_of(weights: dict[str, Tensor]) -> int:
    """How many of a ResNet's stages a state dict has."""
    return sum(any(f"{name}." in key for key in weights) for name in ALL_STAGES)


def backbone_of(weights: dict[str, Tensor]) -> str | None:
    """The name of the ResNet whose blocks, up to some stage, a state dict has; None where it has none that we know."""
    first = [name for name in weights if name.endswith("conv1.weight")]
    blocks = [count for name in ALL_STAGES if (count := sum(f"{name}." in key for key in first))]
    shallow = not any("layer1.0.conv3.weight" in name for name in weights)
    for name, stages in STAGES.items():
        if blocks and list(stages[: len(blocks)]) == blocks and (name in SHALLOW_BACKBONES) == shallow:
            return name
    return None


def as_pixels(image: ImageLike, exif: bool = True) -> Tensor:
    """An image as uint8 (3, height, width), RGB, on the CPU.

    Args:
        image: as `LoadedDetector` takes it.
        exif: turn the image of a path as EXIF says.

    Raises:
        UserError: a file is missing or cannot be read.
        ValueError: an array or tensor is no image, or a PIL image has 32 bits a colour.
    """
    if isinstance(image, str | Path):
        return (decode_upright if exif else decode_image)(Path(image))
    if isinstance(image, Image.Image):
        image = pil_to_rgb(image)
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
