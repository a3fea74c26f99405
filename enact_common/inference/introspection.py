"""Look inside a trained detector: what its encoder takes for informative, what it clusters, where queries attend.

All of it is taken from one forward pass over the image. The clusters come from a hook on the clustering. The
decoder's attention is repeated with its recorded inputs: a decoder layer says in `MEMORY_ATTENTION` which of its parts
attends to the feature map, and that part is an `nn.MultiheadAttention`, or has `with_weights`, which takes what its
`forward` takes and returns the output and the weights. Nothing of this costs anything otherwise.
"""

import importlib.util
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from enact_common.attention.clustering import clusterings
from enact_common.attention.clusters import Clusters
from enact_common.attention.hilbert import HILBERT, ROWS, hilbert_permutations
from enact_common.inference.detector import Detections, LoadedDetector
from enact_common.utils.errors import UserError

SHOWN = ("entropy", "clusters", "attention")

# Detections whose attention is drawn, one panel each.
MAX_DETECTIONS = 6


@dataclass
class ClusteredMaps:
    """What one encoder layer's clustering made of an image's feature maps. Both tensors are on the CPU.

    Attributes:
        information: float (levels, h, w), bits, smoothed: what the clusters and their weights come from.
        clusters: int64 (levels, h, w), the cluster of each cell, from 0 in the order that they are clustered in, or -1
            where it is in none.
    """

    information: Tensor
    clusters: Tensor


@dataclass
class Introspection:
    """The result of `introspect`.

    Attributes:
        layers: of the encoder, those that cluster, the first one first.
        attention: float (n, h, w), on the CPU: of each query that was asked for, the last decoder layer's weights over
            the feature map, the mean of the heads and, with several levels, of their maps. Each adds up to one.
    """

    layers: list[ClusteredMaps]
    attention: Tensor


def memory_attention(model: nn.Module) -> nn.Module:
    """What attends to the feature map in a detector's last decoder layer."""
    layers = [module for module in model.modules() if hasattr(module, "MEMORY_ATTENTION")]
    return getattr(layers[-1], layers[-1].MEMORY_ATTENTION)


def output_and_weights(attention: nn.Module, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
    """The output of an attention for arguments of its `forward`, and its weights (batch, heads, Q, N)."""
    if isinstance(attention, nn.MultiheadAttention):
        return attention(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})
    return attention.with_weights(*args, **kwargs)


@torch.inference_mode()
def introspect(detector: LoadedDetector, pixels: Tensor, queries: Tensor) -> Introspection:
    """Detect in an image, and look on.

    Args:
        detector: of any variant, with or without ENACT.
        pixels: uint8 (3, height, width), RGB.
        queries: int64 (n,), the model's queries whose attention is wanted.
    """
    attention = memory_attention(detector.model)
    maps: list[tuple[int, int]] = []
    calls: list[tuple[tuple, dict]] = []
    clustered: list[tuple[Tensor, Tensor]] = []

    def note_map(_, args: tuple) -> None:
        # Every detector hands its transformer the feature map's mask (batch, h, w) in second place.
        maps.append(tuple(args[1].shape[-2:]))

    def note_call(_, args: tuple, kwargs: dict) -> None:
        calls.append((args, kwargs))

    def note_clusters(information: Tensor, clusters: Clusters) -> None:
        clustered.append((information.cpu(), clusters.assignment(information.shape[1]).cpu()))

    with ExitStack() as stack:
        stack.callback(detector.model.transformer.register_forward_pre_hook(note_map).remove)
        stack.callback(attention.register_forward_pre_hook(note_call, with_kwargs=True).remove)
        for clustering in clusterings(detector.model):
            stack.enter_context(clustering.register_cluster_hook(note_clusters))
        detector.model(detector.model_input(pixels))

    (size,), (call,) = maps, calls
    if getattr(getattr(detector.model.transformer, "encoder", None), "order", ROWS) == HILBERT:
        _, back = hilbert_permutations(*size, torch.device("cpu"))
        clustered = [tuple(tensor[:, back] for tensor in tensors) for tensors in clustered]
    layers = [ClusteredMaps(*(tensor.unflatten(1, size) for tensor in tensors)) for tensors in clustered]
    if len(queries) == 0:
        return Introspection(layers, torch.zeros(0, *size))
    _, weights = output_and_weights(attention, *call)  # (levels, heads, Q, h w)
    chosen = weights[:, :, queries.to(weights.device)].float().mean(dim=(0, 1))  # (n, h w)
    return Introspection(layers, chosen.unflatten(1, size).cpu())


def check_kinds(detector: LoadedDetector, kinds: Sequence[str]) -> None:
    """Refuse pictures that cannot be made, before any work starts.

    Args:
        detector: the detector to look into.
        kinds: names in `SHOWN`.

    Raises:
        UserError: there is no such kind, the model has nothing of the kind, or matplotlib is missing.
    """
    possible = SHOWN if clusterings(detector.model) else ("attention",)
    for kind in kinds:
        if kind not in SHOWN:
            raise UserError(f"--show {kind}: no such picture, choose from {', '.join(SHOWN)}")
        if kind not in possible:
            raise UserError(
                f"--show {kind}: this detector's encoder clusters nothing, its attention is plain; it can show "
                f"{', '.join(possible)}. Checkpoints of models trained with --encoder_attention enact can show {kind}"
            )
    if kinds and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--show draws with matplotlib, which is not installed: pip install 'enact-detection[plots]'")


def write_introspection(
    detector: LoadedDetector, pixels: Tensor, found: Detections, kinds: Sequence[str], folder: Path, stem: str
) -> list[Path]:
    """Draw what is inside the detector when it sees an image.

    Args:
        detector: the detector.
        pixels: uint8 (3, height, width), RGB.
        found: what it found in them; of these, the likeliest six queries' attention is drawn.
        kinds: names in `SHOWN`: "entropy", the learned information of each encoder layer; "clusters", which cells each
            layer pools; "attention", where the detections' queries attend.
        folder: where to, made if it is missing.
        stem: the pictures' names begin with it: `<stem>_<kind>.png`.

    Returns:
        the pictures' paths, in the order of `kinds`.

    Raises:
        UserError: as `check_kinds`; or a picture cannot be written.
    """
    check_kinds(detector, kinds)
    # Only here is matplotlib needed, an optional extra.
    from enact_common.drawing.figures import save
    from enact_common.inference import introspection_plots

    best = best_of_each_query(found)[:MAX_DETECTIONS] if "attention" in kinds else []
    inside = introspect(detector, pixels, found.queries[best])
    image = pixels.permute(1, 2, 0).cpu().numpy()
    draw = {
        "entropy": lambda: introspection_plots.draw_information(image, [layer.information for layer in inside.layers]),
        "clusters": lambda: introspection_plots.draw_clusters(image, [layer.clusters for layer in inside.layers]),
        "attention": lambda: introspection_plots.draw_attention(
            image,
            inside.attention,
            found.boxes[best],
            [found.names[i] for i in best],
            found.scores[best],
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for kind in dict.fromkeys(kinds):
        written.append(folder / f"{stem}_{kind}.png")
        save(draw[kind](), written[-1])
    return written


def best_of_each_query(found: Detections) -> list[int]:
    """Which detections are their query's likeliest: a query that is found under two labels attends but once."""
    first: dict[int, int] = {}
    for i, query in enumerate(found.queries.tolist()):
        first.setdefault(query, i)
    return list(first.values())
