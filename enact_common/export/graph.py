"""The exported graph, from pixels to detections, and the metadata that describe it."""

import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor, nn

from enact_common.attention.clustering import EQUAL, WINDOWS, clusterings
from enact_common.attention.clusters import Clusters
from enact_common.attention.hilbert import HILBERT, ROWS
from enact_common.attention.rivals import RIVALS
from enact_common.boxes import box_cxcywh_to_xyxy
from enact_common.cli.flags import CLUSTERING_FLAGS
from enact_common.inference.detector import LoadedDetector
from enact_common.models.backbone import stride_of
from enact_common.models.layers import has_effect
from enact_common.models.position_encoding import PositionEmbeddingLearned
from enact_common.models.scripting import EXAMPLE_SIZE, TensorDetector
from enact_common.utils.errors import UserError

# Sides in pixels that a file with dynamic sizes takes. The least gives a feature map of two by two cells.
LEAST_SIDE, GREATEST_SIDE = 64, 4096
GREATEST_BATCH = 1024

IMAGES = (
    "uint8 (batch, 3, height, width): pixels as they are stored, 0 to 255, red, green, blue; the file normalises them"
)
MASK = "bool (batch, height, width): padding mask, true for padding, which must be at the right and bottom"
DECODED = {
    "scores": "float32 (batch, n), 0 to 1",
    "labels": "int64 (batch, n): indices into the metadata's lists `names` and `category_ids`; ignore detections whose "
    "category id is null",
    "boxes": "float32 (batch, n, 4): left, top, right, bottom as fractions of the image's width and height, without "
    "its padding; clip them to 0 to 1",
}
RAW = {
    "pred_logits": "float32 (batch, queries, logits)",
    "pred_boxes": "float32 (batch, queries, 4): centre x, centre y, width, height as fractions of the image's width "
    "and height, without its padding",
}
# Additional output of models with a mask head, in the order of the other outputs.
MASKS = (
    "float32 (batch, {n}, h, w), mask logits at about a quarter of the images' height and width, padding included: "
    "resize bilinearly; the object is where they are above 0; sigmoid gives probabilities"
)
LOGITS = {
    "detr": "; the last one is no object; softmax gives probabilities",
    "conditional": ", one per label; sigmoid gives probabilities",
    "anchor": ", one per label; sigmoid gives probabilities",
}


@dataclass(frozen=True)
class Interface:
    """The inputs and outputs of an exported file.

    Attributes:
        batch: batch size; None for any.
        size: (height, width) in pixels; None for any from `LEAST_SIDE` to `greatest_side`.
        mask: whether the second input is a padding mask.
        raw: whether the outputs are the logits and boxes of all queries, not detections.
        masks: whether the outputs include masks.
        greatest_side: longest side of an image in pixels.
    """

    batch: int | None = 1
    size: tuple[int, int] | None = None
    mask: bool = False
    raw: bool = False
    masks: bool = False
    greatest_side: int = GREATEST_SIDE

    @property
    def inputs(self) -> list[str]:
        """The names of the inputs."""
        return ["images", "mask"] if self.mask else ["images"]

    @property
    def outputs(self) -> dict[str, str]:
        """The description of each output by name."""
        if self.raw:
            return RAW | ({"pred_masks": MASKS.format(n="queries")} if self.masks else {})
        return DECODED | ({"masks": MASKS.format(n="n")} if self.masks else {})

    def example(self) -> tuple[Tensor, ...]:
        """Return inputs for tracing."""
        height, width = self.size or EXAMPLE_SIZE
        # Tracing takes a batch size of one for a constant.
        images = torch.zeros(self.batch or 2, 3, height, width, dtype=torch.uint8)
        return (images, torch.zeros_like(images[:, 0], dtype=torch.bool)) if self.mask else (images,)


class DetectorGraph(nn.Module):
    """The exported module: a detector with its post-processing, from image tensors to output tensors."""

    def __init__(self, model: nn.Module, postprocess: nn.Module, interface: Interface):
        super().__init__()
        self.detector = TensorDetector(model)
        self.postprocess = postprocess
        self.interface = interface

    def forward(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the outputs in the interface's order. `IMAGES` and `MASK` describe the inputs."""
        outputs = self.detector(images, mask)
        if not self.interface.raw:
            decoded = self.postprocess.select(outputs)
            decoded = decoded | {"boxes": box_cxcywh_to_xyxy(decoded["boxes"])}
            if self.interface.masks:
                # Models with masks return one detection per query, in query order.
                decoded["masks"] = outputs["pred_masks"]
            outputs = decoded
        return tuple(outputs[name] for name in self.interface.outputs)


def fix_window_lengths(model: nn.Module, lengths: Sequence[int] | None) -> None:
    """Fix each encoder layer's window length, in tokens; None computes it from each image."""
    for i, clustering in enumerate(clusterings(model)):
        clustering.fixed_length = None if lengths is None else lengths[i]


def calibrated_lengths(model: nn.Module, images: Iterable[Tensor]) -> list[int]:
    """The median cluster length of each encoder layer over images, in tokens, at least 1.

    The model is in evaluation mode; images are batches of one, (1, 3, height, width), at the evaluation size.
    """
    layers = clusterings(model)
    layer_lengths: list[list[float]] = [[] for _ in layers]

    def record(lengths: list[float], information: Tensor, clusters: Clusters) -> None:
        lengths.append(clusters.weights.numel() / clusters.shape[1])

    with ExitStack() as handles, torch.inference_mode():
        for layer, lengths in zip(layers, layer_lengths, strict=True):
            handles.enter_context(layer.register_cluster_hook(partial(record, lengths)))
        for image in images:
            model(image)
    return [max(round(float(torch.tensor(lengths).median())), 1) for lengths in layer_lengths]


def check_interface(detector: LoadedDetector, interface: Interface, lengths: Sequence[int] | None) -> None:
    """Refuse interfaces and settings that cannot be exported; the message names the flag to change."""
    if interface.size is not None and not (
        LEAST_SIDE <= min(interface.size) <= max(interface.size) <= interface.greatest_side
    ):
        height, width = interface.size
        raise UserError(
            f"--size {height} {width}: each side must be from {LEAST_SIDE} to {interface.greatest_side} pixels for "
            "this model"
        )
    if detector.args.encoder_attention == "enact" and detector.args.enact_order == HILBERT:
        raise UserError(
            f"--enact_order {HILBERT}: exported files only cluster row by row; pass --enact_order {ROWS}. The weights "
            "work with both orders; measure the change with --eval"
        )
    refuse_rival(detector.args.encoder_attention, dynamic=interface.size is None)
    if lengths is None:
        return
    layers = clusterings(detector.model)
    if not layers:
        raise UserError("--clusters: this is a plain model without clusters; leave out --clusters")
    if detector.args.enact_clusters not in (None, WINDOWS):
        raise UserError(
            f"--clusters: the model has --enact_clusters {detector.args.enact_clusters}, whose clusters have no common "
            "length; leave out --clusters, or pass --enact_clusters windows"
        )
    if interface.mask and detector.args.enact_mask_padding:
        raise UserError(
            "--clusters with --mask: fixed windows cannot leave padding out of the clusters, as this model does; drop "
            "one of the flags, or pass --no-enact_mask_padding"
        )


def refuse_rival(attention: str, dynamic: bool) -> None:
    """Refuse encoder attentions that cannot be exported, or not for a file that takes images of any size (`dynamic`).

    Raises:
        UserError: naming the attention, and what to do.
    """
    if attention not in RIVALS:
        return
    rival = RIVALS[attention]
    if rival.export_fault:
        raise UserError(
            f"--encoder_attention {attention} cannot be exported: {rival.export_fault}; run the checkpoint in PyTorch "
            "(enact_common.load_detector)"
        )
    if dynamic and (rival.takes_budget or rival.needs_map_size):
        raise UserError(
            f"--dynamic: a file with --encoder_attention {attention} holds the number of its keys, which follows from "
            "the image size; pass --size and --batch instead"
        )


def greatest_side(detector: LoadedDetector) -> int:
    """The longest image side in pixels that a model can be exported for."""
    learned = any(isinstance(module, PositionEmbeddingLearned) for module in detector.model.modules())
    if not learned:
        return GREATEST_SIDE
    return PositionEmbeddingLearned.MAX_CELLS * stride_of(detector.args)


def describe(detector: LoadedDetector, source: str, interface: Interface, lengths: Sequence[int] | None) -> dict:
    """Return a file's metadata, in JSON types."""
    args = detector.args
    outputs = interface.outputs
    if interface.raw:
        outputs["pred_logits"] += LOGITS[detector.variant]
    has_clusters = args.encoder_attention == "enact"
    clusters = "follow from the image" if lengths is None else "windows of fixed length"
    if args.enact_clusters == EQUAL:
        clusters = "follow from the image; their number does not"
    # Graphs hold PyTorch's operations, whatever kernels the checkpoint names.
    given = [flag for flag in CLUSTERING_FLAGS if flag != "enact_kernels" and getattr(args, flag) is not None]
    settings = {flag: getattr(args, flag) for flag in given if has_effect(flag, args.encoder_attention)}
    return {
        "made_by": f"enact-detection {own_version()}, PyTorch {torch.__version__}",
        "checkpoint": source,
        "variant": detector.variant,
        "encoder_attention": args.encoder_attention,
        "settings": settings,
        "clusters": clusters if has_clusters else None,
        "window_lengths": None if lengths is None else list(lengths),
        "inputs": {"images": IMAGES} | ({"mask": MASK} if interface.mask else {}),
        "outputs": outputs,
        "batch": interface.batch,
        "size": interface.size and list(interface.size),
        "sides": None if interface.size else [LEAST_SIDE, interface.greatest_side],
        "evaluation": {"shorter_side": args.eval_size, "longer_side_at_most": args.max_size},
        "names": list(detector.label_map.names),
        "category_ids": list(detector.label_map.category_ids),
        "things": None if detector.things is None else sorted(detector.things),
        "quantized": False,
    }


def own_version() -> str:
    """This project's version, or "from a checkout" if it is not installed."""
    try:
        return version("enact-detection")
    except PackageNotFoundError:
        return "from a checkout"


def to_text(metadata: dict) -> str:
    """The metadata as JSON."""
    return json.dumps(metadata, ensure_ascii=False)
