"""Look inside a trained detector: the encoder's information maps, its clusters, and the queries' attention.

Hooks collect everything in one forward pass over the image, at no cost otherwise. The clusters come from a hook on the
clustering. The decoder's attention is recomputed from its recorded inputs: a decoder layer names the submodule that
attends to the feature map in `MEMORY_ATTENTION`. The submodule is an `nn.MultiheadAttention`, or has `with_weights`,
which takes the arguments of `forward` and returns the output and the weights.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from enact_common.attention.clustering import clusterings
from enact_common.attention.clusters import Clusters
from enact_common.attention.hilbert import HILBERT, ROWS, hilbert_permutations
from enact_common.cli.checks import is_installed
from enact_common.inference.detector import Detections, LoadedDetector
from enact_common.utils.errors import UserError

SHOWN = ("entropy", "clusters", "attention")

# At most this many attention panels, one per detection.
MAX_DETECTIONS = 6


@dataclass
class ClusteredMaps:
    """The information and clusters of one encoder layer for one image. Both tensors are on the CPU.

    Attributes:
        information: float (levels, h, w), smoothed self-information in bits, the source of the clusters and their
            pooling weights.
        clusters: int64 (levels, h, w), the cluster of each cell, numbered from 0 in clustering order; -1 for cells in
            no cluster.
    """

    information: Tensor
    clusters: Tensor


@dataclass
class Introspection:
    """The result of `introspect`.

    Attributes:
        layers: the maps of each encoder layer that clusters, in order.
        by_layer: float (decoder layers, n, h, w), on the CPU: each decoder layer's attention weights of each requested
            query over the feature map, averaged over heads and levels. Each map adds up to one.
    """

    layers: list[ClusteredMaps]
    by_layer: Tensor

    @property
    def attention(self) -> Tensor:
        """The last decoder layer's weights in `by_layer`: float (n, h, w)."""
        return self.by_layer[-1]


def memory_attentions(model: nn.Module) -> list[nn.Module]:
    """Return the module of each decoder layer that attends to the feature map."""
    return [
        getattr(module, module.MEMORY_ATTENTION) for module in model.modules() if hasattr(module, "MEMORY_ATTENTION")
    ]


def output_and_weights(attention: nn.Module, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
    """Return an attention's output for arguments of its `forward`, and its weights (batch, heads, Q, N)."""
    if isinstance(attention, nn.MultiheadAttention):
        return attention(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})
    return attention.with_weights(*args, **kwargs)


@torch.inference_mode()
def introspect(detector: LoadedDetector, pixels: Tensor, queries: Tensor) -> Introspection:
    """Run a detector on an image, uint8 (3, height, width), RGB, and record its clusters and its queries' attention.

    The queries, int64 (n,), are those to record attention for.
    """
    attentions = memory_attentions(detector.model)
    maps: list[tuple[int, int]] = []
    calls: list[tuple[tuple, dict]] = []
    clustered: list[tuple[Tensor, Tensor]] = []

    def note_map(_, args: tuple) -> None:
        # Every detector passes the feature map's padding mask (batch, h, w) as the second argument.
        maps.append(tuple(args[1].shape[-2:]))

    def note_call(_, args: tuple, kwargs: dict) -> None:
        calls.append((args, kwargs))

    def note_clusters(information: Tensor, clusters: Clusters) -> None:
        clustered.append((information.cpu(), clusters.assignment(information.shape[1]).cpu()))

    with ExitStack() as stack:
        stack.callback(detector.model.transformer.register_forward_pre_hook(note_map).remove)
        for attention in attentions:
            stack.callback(attention.register_forward_pre_hook(note_call, with_kwargs=True).remove)
        for clustering in clusterings(detector.model):
            stack.enter_context(clustering.register_cluster_hook(note_clusters))
        detector.model(detector.model_input(pixels))

    (size,) = maps
    if getattr(getattr(detector.model.transformer, "encoder", None), "order", ROWS) == HILBERT:
        _, inverse_order = hilbert_permutations(*size, torch.device("cpu"))
        clustered = [tuple(tensor[:, inverse_order] for tensor in tensors) for tensors in clustered]
    layers = [ClusteredMaps(*(tensor.unflatten(1, size) for tensor in tensors)) for tensors in clustered]
    if len(queries) == 0:
        return Introspection(layers, torch.zeros(len(attentions), 0, *size))
    by_layer = []
    for attention, call in zip(attentions, calls, strict=True):
        _, weights = output_and_weights(attention, *call)  # (levels, heads, Q, h w)
        chosen = weights[:, :, queries.to(weights.device)].float().mean(dim=(0, 1))  # (n, h w)
        by_layer.append(chosen.unflatten(1, size).cpu())
    return Introspection(layers, torch.stack(by_layer))


def check_kinds(detector: LoadedDetector, kinds: Sequence[str]) -> None:
    """Refuse pictures that cannot be drawn, before any work starts.

    Raises:
        UserError: a kind is not in `SHOWN`, the model does not cluster, or matplotlib is missing.
    """
    possible = SHOWN if clusterings(detector.model) else ("attention",)
    for kind in kinds:
        if kind not in SHOWN:
            raise UserError(f"--show {kind}: unknown picture; choose from {', '.join(SHOWN)}")
        if kind not in possible:
            raise UserError(
                f"--show {kind}: this detector's encoder has no clusters of ENACT; it can show "
                f"{', '.join(possible)}. Checkpoints of models trained with --encoder_attention enact can show {kind}"
            )
    if kinds:
        check_matplotlib()


def check_matplotlib() -> None:
    """Refuse `--show` without matplotlib."""
    if not is_installed("matplotlib"):
        raise UserError("--show needs matplotlib, which is not installed: pip install 'enact-detection[plots]'")


def write_introspection(
    detector: LoadedDetector, pixels: Tensor, detections: Detections, kinds: Sequence[str], folder: Path, stem: str
) -> list[Path]:
    """Draw the detector's information, clusters or attention for an image, and return the pictures' paths.

    Args:
        detector: the detector.
        pixels: uint8 (3, height, width), RGB.
        detections: the detections in the image. Attention is drawn for the six likeliest queries.
        kinds: names in `SHOWN`: "entropy", the information of each encoder layer; "clusters", the cells that each layer
            pools together; "attention", where the detections' queries attend.
        folder: output folder, created if missing.
        stem: start of the file names: `<stem>_<kind>.png`.

    Raises:
        UserError: see `check_kinds`; or a picture cannot be written.
    """
    check_kinds(detector, kinds)
    # Imported here, because matplotlib is an optional extra.
    from enact_common.drawing.figures import save
    from enact_common.inference import introspection_plots as plots

    best_indices = best_of_each_query(detections)[:MAX_DETECTIONS] if "attention" in kinds else []
    introspection = introspect(detector, pixels, detections.queries[best_indices])
    image = pixels.permute(1, 2, 0).cpu().numpy()
    layers, names = introspection.layers, [detections.names[i] for i in best_indices]
    boxes, scores = detections.boxes[best_indices], detections.scores[best_indices]
    draw = {
        "entropy": lambda: plots.draw_information(image, [layer.information for layer in layers]),
        "clusters": lambda: plots.draw_clusters(image, [layer.clusters for layer in layers]),
        "attention": lambda: plots.draw_attention(image, introspection.attention, boxes, names, scores),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for kind in dict.fromkeys(kinds):
        paths.append(folder / f"{stem}_{kind}.png")
        save(draw[kind](), paths[-1])
    return paths


def best_of_each_query(detections: Detections) -> list[int]:
    """Return the index of each query's likeliest detection: a query can have two labels, but attends only once."""
    best_index: dict[int, int] = {}
    for i, query in enumerate(detections.queries.tolist()):
        best_index.setdefault(query, i)
    return list(best_index.values())
