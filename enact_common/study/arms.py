"""What the study compares. An arm is the flags of a command line, and where there is no flag for it, a change of the
model that was built.

The two baselines that the published comparison lacks are here: average pooling over windows as long as ENACT's, and
every so many tokens in place of them. Neither learns anything of where to look.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from enact_common.attention.clustering import GREATEST_LOGIT, LEAST_MEAN, clusterings
from enact_common.attention.clusters import cut_windows

PLAIN, NONE, WINDOWS, UNIFORM = "plain", "none", "windows", "uniform"
CONVERTED, UNTRAINED, LONGER = "converted", "untrained", "longer"

# The projection that ends an attention, by the names that the variants' have.
OUTPUTS = ("W_o", "out_proj")


@dataclass(frozen=True)
class Setting:
    """What a change of a model may depend on.

    Attributes:
        lengths: of the windows in each encoder layer, as the arm of `Arm.lengths_of` had them in the mean of its
            training; empty without.
        map_size: height and width of the feature map.
    """

    lengths: tuple[int, ...]
    map_size: tuple[int, int]


Change = Callable[[nn.Module, Setting], None]


@dataclass(frozen=True)
class Arm:
    """One way for the encoder to attend.

    Attributes:
        name: on the command line and in files.
        title: in tables.
        flags: of the variant's command line.
        changes: of the built model, one after the other.
        lengths_of: another arm, whose windows' lengths a change takes.
        begins_with: another arm, whose weights this one begins with, plain attention's turned into ENACT's where it
            has that; None for those that all begin with.
        budget: of the images that the others are trained on, a fraction; one step is the least.
        rate: of their learning rates, a fraction; 0 trains nothing but batch norm's statistics.
    """

    name: str
    title: str
    flags: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()
    lengths_of: str | None = None
    begins_with: str | None = None
    budget: float = 1.0
    rate: float = 1.0


class NoAttention(nn.Module):
    """In place of an encoder layer's attention: what is left is its feed-forward network.

    Args:
        replaced: the attention, to be called as it is.
    """

    def __init__(self, replaced: nn.Module):
        super().__init__()
        self.returns_pair = isinstance(replaced, nn.MultiheadAttention)

    def forward(self, query: Tensor, *others: Tensor, **options) -> Tensor | tuple[Tensor, None]:
        """Zeros of the query's shape."""
        nothing = torch.zeros_like(query)
        return (nothing, None) if self.returns_pair else nothing


class EqualShares(nn.Module):
    """All tokens of a cluster alike: an average."""

    def __init__(self, length: int | None = None):
        super().__init__()

    def forward(self, information: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Logits of the pooling weights, as `InformationLogits`."""
        return torch.zeros_like(information)


class MiddleAlone(nn.Module):
    """The middle token of each window alone: every so many tokens of the sequence.

    Args:
        length: of the windows, tokens.
    """

    def __init__(self, length: int):
        super().__init__()
        self.length = length

    def forward(self, information: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Logits of the pooling weights (batch, N): 0 for one token of each window, minus infinity for the others."""
        logits = torch.full_like(information, -torch.inf)
        length = min(self.length, information.shape[1])
        cut_windows(logits, length)[..., length // 2] = 0  # a view
        return logits


class LearnedTemperature(nn.Module):
    """The `temperature` of `EntropyClustering`, learned, from 1: the information over its mean in an image's tokens,
    times a factor that is a parameter."""

    def __init__(self, length: int | None = None):
        super().__init__()
        self.log_factor = nn.Parameter(torch.zeros(()))

    def forward(self, information: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Logits of the pooling weights, as `InformationLogits`."""
        count = information.shape[1] if tokens is None else tokens.clamp(min=1).unsqueeze(1)
        mean = information.detach().sum(dim=1, keepdim=True) / count  # (batch, 1)
        relative = information / mean.clamp(min=LEAST_MEAN)
        return (relative * self.log_factor.exp()).clamp(max=GREATEST_LOGIT)


@dataclass(frozen=True)
class ChangeShares:
    """The change that gives each clustering other pooling weights.

    Attributes:
        kind: the module that makes their logits; it takes the windows' fixed length.
    """

    kind: type[nn.Module]

    @property
    def __name__(self) -> str:
        """As functions have one: what the change is called where results say how they were made."""
        return f"ChangeShares({self.kind.__name__})"

    def __call__(self, model: nn.Module, setting: Setting) -> None:
        """Change a model."""
        for clustering in clusterings(model):
            clustering.pooling_logits = self.kind(clustering.fixed_length)


def encoder_layers(model: nn.Module) -> nn.ModuleList:
    """The encoder layers of a detector."""
    transformer = model.transformer
    return transformer.encoder_layers if hasattr(transformer, "encoder_layers") else transformer.encoder.layers


def begin_silently(model: nn.Module) -> None:
    """The encoder's attentions add nothing before they have learned to: their last projections are zero, so that all
    arms begin as one and the same function (as residual branches in Goyal et al., "Accurate, Large Minibatch SGD",
    arXiv:1706.02677, section 5.1)."""
    for layer in encoder_layers(model):
        for name, projection in layer.self_attn.named_children():
            if name in OUTPUTS:
                nn.init.zeros_(projection.weight)
                nn.init.zeros_(projection.bias)


def attend_to_nothing(model: nn.Module, setting: Setting) -> None:
    """No attention in the encoder."""
    for layer in encoder_layers(model):
        layer.self_attn = NoAttention(layer.self_attn)


def fix_lengths(model: nn.Module, setting: Setting) -> None:
    """Windows are as long as another arm's, whatever the scores say."""
    for clustering, length in zip(clusterings(model), setting.lengths, strict=True):
        clustering.fixed_length = length


def keep_scores(model: nn.Module, setting: Setting) -> None:
    """What scores the tokens stays as it began, random: clusters and shares follow from it, but nothing is learned."""
    for clustering in clusterings(model):
        clustering.W_prob.requires_grad_(False)


def join_all(model: nn.Module, setting: Setting) -> None:
    """One window of all tokens: what is left of attention when it cannot tell them apart."""
    for clustering in clusterings(model):
        clustering.fixed_length = setting.map_size[0] * setting.map_size[1]


def weigh_by_size(model: nn.Module, setting: Setting) -> None:
    """A cluster counts as often as it has tokens (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023,
    equation 1)."""
    for attention in clusterings(model):
        attention.weigh_by_size = True
