"""What is exported of a detector: one graph from pixels to detections, and words that say how it is used."""

import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor, nn

from enact_common.attention.clustering import clusterings
from enact_common.attention.clusters import Clusters
from enact_common.attention.hilbert import HILBERT, ROWS
from enact_common.boxes import box_cxcywh_to_xyxy
from enact_common.cli.flags import CLUSTERING_FLAGS
from enact_common.inference.detector import LoadedDetector
from enact_common.models.backbone import stride_of
from enact_common.models.position_encoding import PositionEmbeddingLearned
from enact_common.models.scripting import EXAMPLE_SIZE, TensorDetector
from enact_common.utils.errors import UserError

# Sides, in pixels, that a file of any size is made for: of the least, a feature map still has two cells each way.
LEAST_SIDE, GREATEST_SIDE = 64, 4096
GREATEST_BATCH = 1024

IMAGES = (
    "uint8 (batch, 3, height, width): pixels as they are stored, 0 to 255, red, green, blue; the file normalises them"
)
MASK = "bool (batch, height, width): true where an image is padded, at its right and bottom"
DECODED = {
    "scores": "float32 (batch, n), 0 to 1",
    "labels": "int64 (batch, n): places in the metadata's lists `names` and `category_ids`; one without an id is none",
    "boxes": "float32 (batch, n, 4): left, top, right, bottom as fractions of the image's width and height, without "
    "its padding; clip them to 0 to 1",
}
RAW = {
    "pred_logits": "float32 (batch, queries, logits)",
    "pred_boxes": "float32 (batch, queries, 4): centre x, centre y, width, height as fractions of the image's width "
    "and height, without its padding",
}
# Of models with masks, beside these, in the same order.
MASKS = (
    "float32 (batch, {n}, h, w), on about a quarter of the images' height and width, padding included: enlarged "
    "bilinearly, above 0 where the object is; sigmoid makes probabilities of them"
)
LOGITS = {
    "detr": "; the last one is no object: softmax makes probabilities of them",
    "conditional": ", one a label: sigmoid makes probabilities of them",
    "anchor": ", one a label: sigmoid makes probabilities of them",
}


@dataclass(frozen=True)
class Interface:
    """What a file takes and gives.

    Attributes:
        batch: images a call; None for any number.
        size: (height, width) in pixels; None for any from `LEAST_SIDE` to `greatest_side`.
        mask: it takes a padding mask beside the images.
        raw: it gives logits and boxes of all queries, not detections.
        masks: it gives masks, too.
        greatest_side: pixels.
    """

    batch: int | None = 1
    size: tuple[int, int] | None = None
    mask: bool = False
    raw: bool = False
    masks: bool = False
    greatest_side: int = GREATEST_SIDE

    @property
    def inputs(self) -> list[str]:
        """Their names."""
        return ["images", "mask"] if self.mask else ["images"]

    @property
    def outputs(self) -> dict[str, str]:
        """What each one is, by its name."""
        if self.raw:
            return RAW | ({"pred_masks": MASKS.format(n="queries")} if self.masks else {})
        return DECODED | ({"masks": MASKS.format(n="n")} if self.masks else {})

    def example(self) -> tuple[Tensor, ...]:
        """Inputs to record a graph with."""
        height, width = self.size or EXAMPLE_SIZE
        # A batch of one would pass for a constant.
        images = torch.zeros(self.batch or 2, 3, height, width, dtype=torch.uint8)
        return (images, torch.zeros_like(images[:, 0], dtype=torch.bool)) if self.mask else (images,)


class DetectorGraph(nn.Module):
    """From images, and where asked for their padding mask, to the outputs in the interface's order.

    Args:
        model: a detector, in evaluation mode.
        postprocess: its post-processing.
        interface: what the graph gives.
    """

    def __init__(self, model: nn.Module, postprocess: nn.Module, interface: Interface):
        super().__init__()
        self.detector = TensorDetector(model)
        self.postprocess = postprocess
        self.interface = interface

    def forward(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """As `IMAGES` and `MASK` say, to what the interface's outputs are."""
        outputs = self.detector(images, mask)
        if not self.interface.raw:
            decoded = self.postprocess.select(outputs)
            decoded = decoded | {"boxes": box_cxcywh_to_xyxy(decoded["boxes"])}
            if self.interface.masks:
                # Models with masks have a detection of each query, in the queries' order.
                decoded["masks"] = outputs["pred_masks"]
            outputs = decoded
        return tuple(outputs[name] for name in self.interface.outputs)


def fix_window_lengths(model: nn.Module, lengths: Sequence[int] | None) -> None:
    """Let all windows of each encoder layer have one length, tokens; with None, that which follows from the image."""
    for i, clustering in enumerate(clusterings(model)):
        clustering.fixed_length = None if lengths is None else lengths[i]


def calibrated_lengths(model: nn.Module, images: Iterable[Tensor]) -> list[int]:
    """The median length of each encoder layer's clusters over images, tokens, at least 1.

    Args:
        model: a detector, in evaluation mode.
        images: each as a batch of one, (1, 3, height, width), at the evaluation's size.
    """
    layers = clusterings(model)
    seen: list[list[float]] = [[] for _ in layers]

    def note(lengths: list[float], information: Tensor, clusters: Clusters) -> None:
        lengths.append(clusters.weights.numel() / clusters.shape[1])

    with ExitStack() as handles, torch.inference_mode():
        for layer, lengths in zip(layers, seen, strict=True):
            handles.enter_context(layer.register_cluster_hook(partial(note, lengths)))
        for image in images:
            model(image)
    return [max(round(float(torch.tensor(lengths).median())), 1) for lengths in seen]


def check_interface(detector: LoadedDetector, interface: Interface, lengths: Sequence[int] | None) -> None:
    """Refuse what a detector cannot be exported as.

    Raises:
        UserError: naming the flag and the way out.
    """
    if interface.size is not None and not (
        LEAST_SIDE <= min(interface.size) <= max(interface.size) <= interface.greatest_side
    ):
        height, width = interface.size
        raise UserError(
            f"--size {height} {width}: each must be from {LEAST_SIDE} to {interface.greatest_side} pixels for this "
            "model"
        )
    if detector.args.encoder_attention == "enact" and detector.args.enact_order == HILBERT:
        raise UserError(
            f"--enact_order {HILBERT}: exported files cluster row by row alone, pass --enact_order {ROWS}: the weights "
            "work with either, but see with --eval what it changes"
        )
    if lengths is None:
        return
    layers = clusterings(detector.model)
    if not layers:
        raise UserError("--clusters: this is a plain model, which has none: leave it out")
    if detector.args.enact_clusters == "regions":
        raise UserError(
            "--clusters: the model's clusters are the regions themselves, which have no common length; leave it out, "
            "or pass --enact_clusters windows"
        )
    if interface.mask and detector.args.enact_mask_padding:
        raise UserError(
            "--clusters with --mask: windows of a fixed length cannot leave padding out, as this model does; leave one "
            "of them out, or pass --no-enact_mask_padding"
        )


def greatest_side(detector: LoadedDetector) -> int:
    """The longest side, in pixels, that a model can be exported for."""
    learned = any(isinstance(module, PositionEmbeddingLearned) for module in detector.model.modules())
    if not learned:
        return GREATEST_SIDE
    return PositionEmbeddingLearned.MAX_CELLS * stride_of(detector.args)


def describe(detector: LoadedDetector, source: str, interface: Interface, lengths: Sequence[int] | None) -> dict:
    """What a file says about itself, in JSON's types."""
    args = detector.args
    outputs = interface.outputs
    if interface.raw:
        outputs["pred_logits"] += LOGITS[detector.variant]
    clustered = args.encoder_attention == "enact"
    clusters = "follow from the image" if lengths is None else "windows of fixed length"
    settings = {flag: getattr(args, flag) for flag in CLUSTERING_FLAGS if getattr(args, flag) is not None}
    return {
        "made_by": f"enact-detection {own_version()}, PyTorch {torch.__version__}",
        "checkpoint": source,
        "variant": detector.variant,
        "encoder_attention": args.encoder_attention,
        "settings": settings if clustered else {},
        "clusters": clusters if clustered else None,
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
    """This project's, where it is installed."""
    try:
        return version("enact-detection")
    except PackageNotFoundError:
        return "from a checkout"


def to_text(metadata: dict) -> str:
    """The metadata as JSON."""
    return json.dumps(metadata, ensure_ascii=False)
