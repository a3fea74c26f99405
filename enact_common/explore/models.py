"""A checkpoint's detector, and copies of it that share its weights but cluster otherwise or attend plainly."""

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from enact_common.attention.clustering import CLUSTERS, clusterings
from enact_common.attention.conversion import plain_weights
from enact_common.attention.hilbert import HILBERT, ROWS
from enact_common.checkpoints.files import Undrawn
from enact_common.checkpoints.pretrained import fit_weights
from enact_common.cli.flags import with_flags
from enact_common.inference.detector import LoadedDetector
from enact_common.models.layers import scales_logits
from enact_common.variants import load_variant

ENACT, PLAIN = "enact", "mhsa"

# Copies that are kept. They share their weights, so one costs little more than its Python objects.
KEPT = 32


@dataclass(frozen=True)
class Settings:
    """The encoder attention and the settings of ENACT that work with any weights, and sigma.

    Attributes:
        attention: "enact", "mhsa" for plain attention, or the name of a rival.
        sigma: standard deviation of the information's smoothing, tokens.
        clusters: one of `CLUSTERS`.
        order: "rows" or "hilbert", the order of the tokens.
        temperature: of the pooling weights; None for the published weights.
        max_clusters: the most clusters per image; None for no limit.
    """

    attention: str
    sigma: float
    clusters: str
    order: str
    temperature: float | None
    max_clusters: int | None

    def flags(self) -> dict[str, Any]:
        """The flags of a training with these settings."""
        return {
            "encoder_attention": self.attention,
            "smoothing_sigma": self.sigma,
            "enact_clusters": self.clusters,
            "enact_order": self.order,
            "enact_temperature": self.temperature,
            "enact_max_clusters": self.max_clusters,
        }

    def text(self) -> str:
        """The settings in words."""
        if self.attention == PLAIN:
            return "plain attention"
        if self.attention != ENACT:
            return self.attention
        parts = [f"ENACT: clusters {self.clusters}", f"order {self.order}", f"sigma {self.sigma:g}"]
        parts += [f"temperature {self.temperature:g}"] if self.temperature else []
        parts += [f"at most {self.max_clusters} clusters"] if self.max_clusters else []
        return ", ".join(parts)


def settings_of(detector: LoadedDetector) -> Settings:
    """Return a detector's settings. A plain detector gets those of its checkpoint's flags, for a switch to ENACT."""
    args = detector.args
    return Settings(
        args.encoder_attention,
        args.smoothing_sigma,
        getattr(args, "enact_clusters", None) or CLUSTERS[0],
        getattr(args, "enact_order", None) or ROWS,
        getattr(args, "enact_temperature", None) or None,
        getattr(args, "enact_max_clusters", None) or None,
    )


def why_not_convertible(detector: LoadedDetector) -> str | None:
    """Return why a detector's weights cannot be switched between ENACT and plain attention; None if they can."""
    args = detector.args
    if args.encoder_attention not in (ENACT, PLAIN):
        return f"its encoder attention is {args.encoder_attention}, whose weights are not converted"
    if getattr(args, "attention_type", None) == "RCDA":
        return "row-column attention computes another function with ENACT, so its weights cannot be converted"
    if detector.variant == "detr" and args.pre_norm:
        return "DETR with --pre_norm has post-norm encoder layers with ENACT, so its weights cannot be converted"
    return None


def orders_of(detector: LoadedDetector) -> list[str]:
    """Return the orders of tokens that a detector supports."""
    return [ROWS] if detector.variant == "anchor" else [ROWS, HILBERT]


def with_settings(detector: LoadedDetector, settings: Settings) -> LoadedDetector:
    """Return a checkpoint's detector with other settings, which shares the weights that it need not convert.

    The attention is the detector's, or a convertible one (`why_not_convertible`). From plain attention to ENACT,
    `W_prob` has no weights to start from and is drawn with a fixed seed.
    """
    args = with_flags(detector.args, **settings.flags())
    with Undrawn():
        model, _, postprocessors = load_variant(detector.variant).models.build_model(args)
    model.to(detector.device)
    weights = detector.model.state_dict()
    if args.encoder_attention == PLAIN != detector.args.encoder_attention:
        weights = with_plain_attention(weights, args.nheads, scales_logits(detector.args))
    generator = torch.Generator().manual_seed(0)
    for clustering in clusterings(model):
        scores = clustering.W_prob
        # As a new model draws it.
        scores.weight = nn.Parameter(
            nn.init.xavier_uniform_(torch.empty(scores.weight.shape), generator=generator).to(scores.weight.device)
        )
        nn.init.zeros_(scores.bias)
    fit = fit_weights(weights, model.state_dict(), args.nheads, True, scales_logits(args))
    model.load_state_dict(fit.weights, strict=False, assign=True)
    return LoadedDetector(
        detector.variant, args, model, postprocessors["bbox"], detector.label_map, detector.threshold,
        detector.device, detector.things, detector.amp,
    )  # fmt: skip


def with_plain_attention(weights: dict[str, Tensor], num_heads: int, scale_logits: bool) -> dict[str, Tensor]:
    """Return a detector's state dict with every layer of ENACT converted to plain multi-head attention."""
    converted = dict(weights)
    for name in weights:
        prefix = name.removesuffix("W_q.weight")
        if prefix != name:
            own = {part.removeprefix(prefix): converted.pop(part) for part in weights if part.startswith(prefix)}
            plain = plain_weights(own, num_heads, scale_logits)
            converted |= {prefix + part: tensor for part, tensor in plain.items()}
    return converted


class Models:
    """A checkpoint's detector in all settings asked for so far, each built once. One thread at a time may use them.

    Attributes:
        detector: as in the checkpoint.
        lock: held while a model is built or runs, so that users take turns and do not disturb each other's times.
    """

    def __init__(self, detector: LoadedDetector):
        self.detector = detector
        self.lock = threading.RLock()
        self.built: OrderedDict[Settings, LoadedDetector] = OrderedDict()

    def get(self, settings: Settings) -> LoadedDetector:
        """Return the detector with these settings."""
        if settings == settings_of(self.detector):
            return self.detector
        with self.lock:
            if settings not in self.built:
                self.built[settings] = with_settings(self.detector, settings)
            self.built.move_to_end(settings)
            while len(self.built) > KEPT:
                self.built.popitem(last=False)
            return self.built[settings]
