"""Load a trained detector from a checkpoint in one call, and detect named boxes in images."""

import argparse
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors

from enact_common.checkpoints.contents import arguments_of, averaged_weights, known_variant
from enact_common.checkpoints.files import Undrawn, load_checkpoint, load_model
from enact_common.cli.flags import PANOPTIC
from enact_common.data.categories import LabelMap
from enact_common.data.exif import decode_upright
from enact_common.data.images import decode_image, pil_to_rgb
from enact_common.data.panoptic import VOID, things_of
from enact_common.data.transforms import eval_transforms, resized_shape
from enact_common.models.backbone import keep_folded
from enact_common.models.segmentation import PostProcessPanoptic, full_size_masks
from enact_common.utils.device import AMP_DTYPE, autocast, check_precision, default_device, find_device
from enact_common.utils.errors import UserError
from enact_common.utils.extras import needed
from enact_common.variants import load_variant

if TYPE_CHECKING:
    from supervision import Detections as SupervisionDetections

logger = logging.getLogger("enact")

ImageLike = str | Path | Image.Image | np.ndarray | Tensor

# Least score of a detection. Panoptic models use `PostProcessPanoptic.THRESHOLD`.
THRESHOLD = 0.5


@dataclass
class Panoptic:
    """A panoptic segmentation of one image: one segment per thing, and one per category of stuff.

    Attributes:
        id_map: int64 (height, width) of the original image, on the CPU: each pixel's segment id, 0 for none.
        segments: dicts with `id`, from 1; `category_id`, from the data set; `name`; `isthing`, a bool; `area` in
            pixels, at least 1; and `score`, of the segment's likeliest query, in [0, 1].
    """

    id_map: Tensor
    segments: list[dict[str, Any]]


@dataclass
class Detections:
    """The detections in one image, sorted by falling score. All tensors are on the CPU.

    Attributes:
        boxes: float32 (n, 4), left, top, right, bottom in pixels of the original image.
        scores: float32 (n,), in [0, 1], falling.
        labels: int64 (n,), the model's labels.
        names: the label names.
        category_ids: the data set's category id of each label.
        queries: int64 (n,), the index of the query behind each detection.
        masks: bool (n, height, width), at the original image's size; None for models without a mask head.
        panoptic: the panoptic segmentation, from panoptic models only. Their detections include stuff.
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

    def to_supervision(self) -> "SupervisionDetections":
        """Return the detections as `supervision.Detections`, for its zones, annotators and the trackers that take them.

        `class_id` holds the model's labels; `data` holds `class_name` and `category_id`, from the data set. The
        panoptic segmentation and the query numbers are left out.

        Raises:
            UserError: the package supervision is not installed.
        """
        return needed("supervision", "to_supervision()", "supervision").Detections(
            xyxy=self.boxes.numpy(),
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy(),
            mask=None if self.masks is None else self.masks.numpy(),
            data={
                "class_name": np.array(self.names, dtype=str),
                "category_id": np.array(self.category_ids, dtype=np.int64),
            },
        )


class LoadedDetector:
    """A trained detector for images of any size, made by `load_detector`.

    It can be pickled, deep-copied and sent to other processes. `detector.model` can be moved and cast to another dtype.

    Each image is a batch of one: with ENACT's default settings, a result would depend on the other images in the batch.

    Attributes:
        variant: a key of `VARIANTS`.
        args: the arguments that the model was built with.
        model: in evaluation mode, on `device`.
        label_map: the label names and category ids.
        threshold: least score of a detection, and of a segment, in [0, 1].
        amp: mixed precision: "bf16", "fp16", or None for the dtype of the weights.
        things: the labels of things, for panoptic models; None for other models.
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
        """Detect objects.

        Args:
            images: one image or a list of them. An image is a path; a PIL image; an array (height, width, 3) or
                (height, width); or a tensor (3, height, width). Arrays and tensors are RGB, uint8 0 to 255 or floating
                point 0 to 1. PIL images are not rotated by EXIF.
            threshold: least score; None for the detector's threshold.
            exif: rotate images loaded from paths by their EXIF orientation, as viewers do. Boxes and masks then refer
                to the upright image. False keeps the stored pixels, as training and COCO's evaluation do.

        Returns:
            the image's detections, or a list of them for a list of images.

        Raises:
            UserError: a file is missing or cannot be read.
            ValueError: an array or tensor is not an image, or a PIL image has 32 bits per colour.
        """
        if isinstance(images, list | tuple):
            return [self.detect(as_pixels(image, exif), threshold) for image in images]
        return self.detect(as_pixels(images, exif), threshold)

    def model_input(self, pixels: Tensor) -> Tensor:
        """Resize an image uint8 (3, height, width) to the evaluation size: uint8 (1, 3, h, w), on `device`."""
        no_boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=tuple(pixels.shape[-2:]))
        resized, _ = self._resize(tv_tensors.Image(pixels), {"boxes": no_boxes})
        return resized.unsqueeze(0).to(self.device)

    def detect(self, pixels: Tensor, threshold: float | None = None) -> Detections:
        """Return the detections in an image uint8 (3, height, width)."""
        with torch.inference_mode(), autocast(self.device, self.amp or "none"):
            outputs = self.model(self.model_input(pixels))
        # Decode outside of inference mode, so the caller can change the tensors in place.
        return self.decode(outputs, tuple(pixels.shape[-2:]), threshold)

    def decode(self, outputs: dict[str, Any], size: tuple[int, int], threshold: float | None = None) -> Detections:
        """Return the detections in the model's outputs for a batch of one image.

        Args:
            outputs: the model's outputs.
            size: (height, width) of the original image, in pixels.
            threshold: least score; None for the detector's threshold.
        """
        threshold = self.threshold if threshold is None else threshold
        (results,) = self.postprocess(outputs, torch.tensor([size], device=self.device))
        height, width = size
        scores, labels, boxes, queries = (results[key].cpu() for key in ("scores", "labels", "boxes", "queries"))
        boxes = boxes.clamp(min=torch.zeros(4), max=torch.tensor([width, height, width, height]))
        known = torch.tensor([i is not None for i in self.label_map.category_ids])
        order = scores.argsort(descending=True, stable=True)
        order = order[((scores >= threshold) & known[labels])[order]]
        kept = labels[order].tolist()
        masks = None
        # One image is a batch without padding.
        input_size = resized_shape(height, width, self.args.eval_size, self.args.max_size)
        if "pred_masks" in outputs:
            logits = outputs["pred_masks"][0, queries[order].to(self.device)]
            parts = [part.cpu() for part in full_size_masks(logits, input_size, input_size, size)]
            masks = torch.cat([torch.zeros(0, height, width, dtype=torch.bool), *parts])
        return Detections(
            boxes[order],
            scores[order],
            labels[order],
            [self.label_map.names[label] for label in kept],
            [self.label_map.category_ids[label] for label in kept],
            queries[order],
            masks,
            None if self.things is None else self.lay_out(outputs, input_size, size, threshold),
        )

    def lay_out(
        self, outputs: dict[str, Any], input_size: tuple[int, int], size: tuple[int, int], threshold: float
    ) -> Panoptic:
        """Return the panoptic segmentation in the model's outputs for a batch of one image.

        Args:
            outputs: the model's outputs.
            input_size: (height, width) of the resized image.
            size: (height, width) of the original image, and of the id map.
            threshold: least score.
        """
        postprocess = PostProcessPanoptic(self.things, threshold)
        (results,) = postprocess(outputs, torch.tensor([input_size]), torch.tensor([size]))
        id_map, segments = results["id_map"], []
        for segment in results["segments"]:
            label = segment["category_id"]
            category = self.label_map.category_ids[label]
            if category is None:
                # The evaluation also drops segments without a category.
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
    """Load a detector from a checkpoint of this project, the original repositories, ENACT's authors or Hugging Face.

    The variant, the classes and the settings come from the checkpoint. EMA weights (`--ema`) are preferred.

    Args:
        checkpoint: a path, or an https URL with the file's hash (`enact_common.utils.download.download`); a folder of
            Hugging Face's DETR or Conditional DETR, or of `EnactDetector.save_pretrained`; or the name of a detector
            that comes with the package (`enact_common.checkpoints.bundled.BUNDLED`).
        device: "cuda", "cuda:1", "cpu"; None for a GPU if there is one.
        threshold: least score of a detection, in [0, 1], and of a panoptic model's segment. None means 0.5, or 0.85
            for panoptic models, as in their evaluation.
        amp: mixed precision, "bf16" or "fp16" (GPUs only); None for float32.
        flags: model flags that weights without arguments do not show: `dilation=True` for DC5.

    Raises:
        UserError: the file is missing, is not a checkpoint, or fits no variant; the device or precision does not
            exist; or a panoptic checkpoint does not say which categories are things.
    """
    device = find_inference_device(device, amp)
    source = str(checkpoint)
    return LoadedDetector(**detector_parts(load_checkpoint(source), source, device, threshold, amp, flags))


def find_inference_device(device: str | torch.device | None, amp: str | None) -> torch.device:
    """Return the device that `load_detector` asks for; a UserError if it or the precision does not exist."""
    found = find_device(default_device() if device is None else str(device))
    if amp not in (None, *AMP_DTYPE):
        raise UserError(f"amp={amp!r}: unknown precision; pass one of {', '.join(AMP_DTYPE)}")
    check_precision(amp, found)
    return found


def detector_parts(
    state: dict[str, Any],
    source: str,
    device: torch.device,
    threshold: float | None,
    amp: str | None,
    flags: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the arguments that make a `LoadedDetector` of a checkpoint from `load_checkpoint`, as in `load_detector`.

    Raises:
        UserError: the checkpoint fits no variant, or does not say which of its panoptic categories are things.
    """
    variant = known_variant(state, source)
    try:
        args, label_map = arguments_of(state, variant, flags)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    with Undrawn():
        model, _, postprocessors = load_variant(variant).models.build_model(args)
    load_model(model, averaged_weights(state, source), source)
    things = things_of(label_map, source) if args.dataset_file == PANOPTIC else None
    if threshold is None:
        threshold = THRESHOLD if things is None else PostProcessPanoptic.THRESHOLD
    return {
        "variant": variant, "args": args, "model": model, "postprocess": postprocessors["bbox"], "label_map": label_map,
        "threshold": threshold, "device": device, "things": things, "amp": amp,
    }  # fmt: skip


def as_pixels(image: ImageLike, exif: bool = True) -> Tensor:
    """Return an image, of any kind that `LoadedDetector` takes, as uint8 (3, height, width), RGB, on the CPU.

    Raises:
        UserError: a file is missing or cannot be read.
        ValueError: an array or tensor is not an image, or a PIL image has 32 bits per colour.
    """
    if isinstance(image, str | Path):
        return (decode_upright if exif else decode_image)(Path(image))
    if isinstance(image, Image.Image):
        image = pil_to_rgb(image)
    if isinstance(image, np.ndarray):
        # Copy: PyTorch warns about read-only arrays, such as `np.asarray` of a PIL image.
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
            raise ValueError("floating-point pixels must be in [0, 1]; pass uint8 for 0 to 255")
        image = (image * 255).round()
    elif image.dtype != torch.uint8:
        raise ValueError(f"pixels must be uint8 (0 to 255) or floating point (0 to 1), got {image.dtype}")
    return image.to("cpu", torch.uint8).contiguous()
