"""The arms of the study. An arm is a set of command-line flags, plus a change of the built model if no flag exists.

Two baselines are added to the published comparison: average pooling over windows of ENACT's lengths, and strided
selection of tokens. Neither learns where to look.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from enact_common.attention.clustering import (
    GREATEST_LOGIT,
    LEAST_MEAN,
    EntropyClustering,
    clusterings,
    self_information,
    smooth,
)
from enact_common.attention.clusters import cut_windows

PLAIN, NONE, WINDOWS, UNIFORM = "plain", "none", "windows", "uniform"
CONVERTED, UNTRAINED, LONGER = "converted", "untrained", "longer"

# Names of the attention's output projection in the variants.
OUTPUTS = ("W_o", "out_proj")


@dataclass(frozen=True)
class Setting:
    """Settings that a change of a model may depend on.

    Attributes:
        lengths: window length in each encoder layer, averaged over the training of the arm `Arm.lengths_of`; empty
            without that arm.
        map_size: height and width of the feature map.
    """

    lengths: tuple[int, ...]
    map_size: tuple[int, int]


Change = Callable[[nn.Module, Setting], None]


@dataclass(frozen=True)
class Arm:
    """One kind of encoder attention.

    Attributes:
        name: name on the command line and in files.
        flags: flags for the variant's command line.
        changes: changes of the built model, applied in order.
        lengths_of: another arm, whose window lengths the changes use.
        begins_with: another arm, whose weights this arm starts from, converted from plain attention if this arm uses
            ENACT; None for the weights that all arms share.
        budget: training images, as a fraction of the other arms'; at least one step is trained.
        rate: learning rates, as a fraction of the other arms'; 0 trains only the batch norm statistics.
        family: the line of the main figure that this arm is a point of; None for none.
        clusters: most clusters, or keys, per image; None where the method sets their number.
    """

    name: str
    title: str
    flags: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()
    lengths_of: str | None = None
    begins_with: str | None = None
    budget: float = 1.0
    rate: float = 1.0
    family: str | None = None
    clusters: int | None = None


class NoAttention(nn.Module):
    """A stand-in for an encoder layer's attention, with its call signature: only the feed-forward network is left."""

    def __init__(self, replaced: nn.Module):
        super().__init__()
        self.returns_pair = isinstance(replaced, nn.MultiheadAttention)

    def forward(self, query: Tensor, *others: Tensor, **options) -> Tensor | tuple[Tensor, None]:
        """Return zeros of the query's shape."""
        nothing = torch.zeros_like(query)
        return (nothing, None) if self.returns_pair else nothing


class EqualShares(nn.Module):
    """Pooling logits that weight all tokens of a cluster equally: an average."""

    def __init__(self, length: int | None = None):
        super().__init__()

    def forward(self, information: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Return logits of the pooling weights, as `InformationLogits` does."""
        return torch.zeros_like(information)


class MiddleAlone(nn.Module):
    """Pooling logits that select the middle token of each window of `length` tokens: strided selection of tokens."""

    def __init__(self, length: int):
        super().__init__()
        self.length = length

    def forward(self, information: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Return pooling logits (batch, N): 0 for one token of each window, minus infinity for the others."""
        logits = torch.full_like(information, -torch.inf)
        length = min(self.length, information.shape[1])
        cut_windows(logits, length)[..., length // 2] = 0  # a view
        return logits


class LearnedTemperature(nn.Module):
    """Pooling logits with a learned `temperature` of `EntropyClustering`, starting at 1: the information over its mean
    in an image's tokens, times a learned factor."""

    def __init__(self, length: int | None = None):
        super().__init__()
        self.log_factor = nn.Parameter(torch.zeros(()))

    def forward(self, information: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Return logits of the pooling weights, as `InformationLogits` does."""
        count = information.shape[1] if tokens is None else tokens.clamp(min=1).unsqueeze(1)
        mean = information.detach().sum(dim=1, keepdim=True) / count  # (batch, 1)
        relative = information / mean.clamp(min=LEAST_MEAN)
        return (relative * self.log_factor.exp()).clamp(max=GREATEST_LOGIT)


class SharedClusters:
    """Clusters that may share a token; an ablation of `equal_information` whose borders pass a gradient.

    `weights` (batch, M, N) are the pooling weights; those of a cluster add up to one.
    """

    padding_mask = None

    def __init__(self, weights: Tensor):
        self.weights = weights
        self.shape = tuple(weights.shape[:2])

    def pool(self, tokens: Tensor) -> Tensor:
        """Return the weighted sums (batch, M, d) of tokens (batch, N, d)."""
        return (self.weights @ tokens.to(self.weights.dtype)).to(tokens.dtype)


def share_border_tokens(clustering: EntropyClustering, logits: Tensor, key_padding_mask: Tensor | None):
    """Cut the information exactly, through tokens; the pooling weights are the parts of the tokens' information.

    The clustering has `max_clusters`; other arguments are those of `EntropyClustering.cluster_scores`.
    """
    if key_padding_mask is not None:
        logits = logits.masked_fill(key_padding_mask, torch.finfo(logits.dtype).min)
    information = smooth(self_information(logits), clustering.kernel).clamp(min=0)  # (batch, N)
    if key_padding_mask is not None:
        information = information.masked_fill(key_padding_mask, 0)
    count = clustering.max_clusters
    mass = information / information.sum(dim=1, keepdim=True) * count
    end = mass.cumsum(dim=1).unsqueeze(1)  # (batch, 1, N)
    cluster = torch.arange(count, device=logits.device).unsqueeze(1)  # (M, 1)
    overlap = (end.minimum(cluster + 1) - (end - mass.unsqueeze(1)).maximum(cluster)).clamp(min=0)  # (batch, M, N)
    clusters = SharedClusters(overlap / overlap.sum(dim=2, keepdim=True))
    for hook in clustering._cluster_hooks.values():
        hook(information, clusters)
    return clusters


@dataclass(frozen=True)
class FixedCount:
    """A change that cuts every map into at most `clusters` windows of one length, regardless of the scores."""

    clusters: int

    @property
    def __name__(self) -> str:
        """Name of the change in the results' settings, like the `__name__` of a function."""
        return f"FixedCount({self.clusters})"

    def __call__(self, model: nn.Module, setting: Setting) -> None:
        """Apply the change to a model."""
        tokens = setting.map_size[0] * setting.map_size[1]
        for clustering in clusterings(model):
            clustering.fixed_length = tokens // (self.clusters + 1) + 1


@dataclass(frozen=True)
class ChangeShares:
    """A change that gives each clustering other pooling weights.

    `kind` is the class of the module that computes the pooling logits; its argument is the fixed window length.
    """

    kind: type[nn.Module]

    @property
    def __name__(self) -> str:
        """Name of the change in the results' settings, like the `__name__` of a function."""
        return f"ChangeShares({self.kind.__name__})"

    def __call__(self, model: nn.Module, setting: Setting) -> None:
        """Apply the change to a model."""
        for clustering in clusterings(model):
            clustering.pooling_logits = self.kind(clustering.fixed_length)


def encoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the encoder layers of a detector."""
    transformer = model.transformer
    return transformer.encoder_layers if hasattr(transformer, "encoder_layers") else transformer.encoder.layers


def zero_output_projections(model: nn.Module) -> None:
    """Zero the output projections of the encoder's attentions, so that all arms start as the same function (as residual
    branches in Goyal et al., "Accurate, Large Minibatch SGD", arXiv:1706.02677, section 5.1)."""
    for layer in encoder_layers(model):
        for name, projection in layer.self_attn.named_children():
            if name in OUTPUTS:
                nn.init.zeros_(projection.weight)
                nn.init.zeros_(projection.bias)


def attend_to_nothing(model: nn.Module, setting: Setting) -> None:
    """Remove the encoder's attention."""
    for layer in encoder_layers(model):
        layer.self_attn = NoAttention(layer.self_attn)


def fix_lengths(model: nn.Module, setting: Setting) -> None:
    """Fix the window lengths to another arm's, regardless of the scores."""
    for clustering, length in zip(clusterings(model), setting.lengths, strict=True):
        clustering.fixed_length = length


def keep_scores(model: nn.Module, setting: Setting) -> None:
    """Freeze the random scoring projection, which still determines clusters and pooling weights."""
    for clustering in clusterings(model):
        clustering.W_prob.requires_grad_(False)


def mix_with_lengths(model: nn.Module, setting: Setting) -> None:
    """Let half of the information count as spread evenly, so that clusters differ less in length."""
    for clustering in clusterings(model):
        clustering.uniform_share = 0.5


def share_tokens(model: nn.Module, setting: Setting) -> None:
    """Let neighbouring clusters of equal information share the token at their border, which passes a gradient."""
    for clustering in clusterings(model):
        clustering.cluster_scores = partial(share_border_tokens, clustering)


def join_all(model: nn.Module, setting: Setting) -> None:
    """Pool all tokens into one window, which leaves the attention nothing to distinguish."""
    for clustering in clusterings(model):
        clustering.fixed_length = setting.map_size[0] * setting.map_size[1]


def weigh_by_size(model: nn.Module, setting: Setting) -> None:
    """Weight each cluster by its number of tokens (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023,
    equation 1)."""
    for attention in clusterings(model):
        attention.weigh_by_size = True
