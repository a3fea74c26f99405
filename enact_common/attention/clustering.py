"""Entropy clustering: pool a token sequence into far fewer tokens, by its learned information.

The algorithm of ENACT (Savathrakis and Argyros, arXiv:2409.07541): one learned linear map scores the tokens of a
feature map; the softmax of the scores is read as a probability; the smoothed self-information of that probability
has inflection points along the sequence, and their spacing sets how long the windows are over which tokens are
averaged, with weights that the information itself provides.

Everything up to `EntropyClustering` is a pure function of tensors, so that another host (another attention layer,
another way of choosing regions) can use the pieces it needs. Clusters come in two forms: `Windows`, of one length for
all images, which are views of the tokens; and `RaggedClusters`, of any lengths.
"""

import math
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from .clusters import Clusters, RaggedClusters, TracedRaggedClusters, Windows, cut_windows, move_to_front
from .tracing import is_tracing, size_from_data, smaller_size

# Added to every probability, so that the logarithm of an underflown one stays finite. Released weights know it.
PROBABILITY_FLOOR = 1e-8

# Clamp on information over its mean, so that summed exponentials fit float32.
GREATEST_LOGIT = 60.0

# bits: less than any mean that is not rounding alone, which for N tokens is about log2(N) / N.
LEAST_MEAN = 1e-6

# Kinds of clusters: windows as long as the regions are on average, or the regions themselves.
CLUSTERS = ("windows", "regions")


def gaussian_kernel(sigma: float) -> Tensor:
    """The smoothing taps: a Gaussian density at -(3 sigma - 1), ..., 3 sigma - 1 in steps of 1, not renormalised.

    Args:
        sigma: standard deviation in tokens, above 1/3.

    Returns:
        float32 (taps,): 17 taps for sigma = 3. A sigma that is no multiple of 1/2 gives an even number of taps.

    Raises:
        ValueError: sigma is too small to leave a tap.
    """
    reach = 3 * sigma - 1
    if not reach > 0:
        raise ValueError(f"sigma must be above 1/3 token, got {sigma}")
    # The small excess keeps the right end although 3 * sigma may be rounded down (1.4, say).
    taps = torch.arange(-reach, reach + 1e-6, 1.0, dtype=torch.float64)
    density = torch.exp(-(taps**2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    return density.to(torch.float32)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype to score in: bf16 cannot tell the probabilities of thousands of tokens apart."""
    return torch.promote_types(dtype, torch.float32)


def self_information(logits: Tensor) -> Tensor:
    """Each token's share of the entropy, `-p log2 p`, of the softmax over all tokens.

    Args:
        logits: (batch, N), any range.

    Returns:
        (batch, N), bits, in [0, log2(e) / e]; float32, or float64 for float64 logits.
    """
    probability = logits.to(at_least_float32(logits.dtype)).softmax(dim=-1)
    # ONNX's optimizer takes a number this small for zero, and drops the addition; of a tensor it does not.
    probability = probability + (probability.new_full((1,), PROBABILITY_FLOOR) if is_tracing() else PROBABILITY_FLOOR)
    return -probability * probability.log2()


def smooth(signal: Tensor, kernel: Tensor) -> Tensor:
    """Convolve along the tokens with zero padding, keeping the length. Both: (batch, N); kernel: (taps,)."""
    taps = len(kernel)
    # A convolution or a matrix product could run in TF32, whose rounding moves the borders of regions.
    neighbours = F.pad(signal, ((taps - 1) // 2, taps // 2)).unfold(1, taps, 1)  # (batch, N, taps)
    if is_tracing():
        # The product's layout depends on whether N < taps, and a recorded graph would fix that.
        neighbours = neighbours.clone(memory_format=torch.contiguous_format)
    return (neighbours * kernel).sum(dim=-1)


def region_borders(signal: Tensor) -> Tensor:
    """Borders of regions: the sign (positive or not) of the second difference `[-1, 2, -1]` changes there.

    Args:
        signal: (batch, N), taken as zero beyond its ends.

    Returns:
        bool (batch, N - 1), between each token and the next. No gradient passes.
    """
    signal = F.pad(signal.detach(), (1, 1))  # (batch, N + 2)
    # The reference's order of summation: near an inflection point another one could round to the other sign.
    curved = (2 * signal[:, 1:-1] - signal[:, :-2] - signal[:, 2:]) > 0  # (batch, N)
    return curved[:, 1:] != curved[:, :-1]


def count_regions(signal: Tensor) -> Tensor:
    """The number of regions, maximal runs without a border, in signals (batch, N): int64 (batch,), in 1..N."""
    return region_borders(signal).sum(dim=-1) + 1


def window_length(tokens: Tensor, regions: Tensor, max_clusters: int | None = None, per_image: bool = False) -> Tensor:
    """The length of each image's windows: the mean region length over the batch, rounded half to even.

    Args:
        tokens: int64 (batch,), tokens of each image. An image of none does not count.
        regions: int64 (batch,), regions of each image, at least 1.
        max_clusters: windows are long enough to leave at most so many whole ones; None sets no limit.
        per_image: each image's own mean region length, in place of one length for all.

    Returns:
        int64 (batch,), tokens a window, at least 1.
    """
    length = tokens.double() / regions
    if not per_image:
        length = (length.sum() / (tokens > 0).sum().clamp(min=1)).expand_as(length)
    length = length.round().long().clamp(min=1)
    if max_clusters is not None:
        shortest = tokens // (max_clusters + 1) + 1
        length = torch.maximum(length, shortest if per_image else shortest.max())
    return length


class _Score(torch.autograd.Function):
    """`tokens @ weight`, which keeps `narrow`, the tokens in a lower precision, for the backward pass."""

    @staticmethod
    def forward(ctx, tokens: Tensor, narrow: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(narrow, weight)
        return (tokens * weight).sum(dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        narrow, weight = ctx.saved_tensors
        grad = grad.unsqueeze(-1)
        return grad * weight, None, (grad * narrow).flatten(0, -2).sum(dim=0)


def weigh_channels(tokens: Tensor, weight: Tensor, narrow: Tensor | None = None) -> Tensor:
    """The sums (...) of tokens (..., d) times weight (d,) over the channels; `narrow` as in `EntropyClustering.score`.

    Not a matrix product: that could run in TF32.
    """
    weight = weight.to(at_least_float32(weight.dtype))
    if narrow is None or narrow.dtype == tokens.dtype:
        return (tokens * weight).sum(dim=-1)
    return _Score.apply(tokens, narrow, weight)


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that autocast gives a tensor in a matrix product; the tensor's own without autocast."""
    device = tensor.device.type
    if tensor.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tensor.dtype


class InformationLogits(nn.Module):
    """Makes pooling weights' logits of the smoothed information; it has no parameters.

    Args:
        temperature: as in `EntropyClustering`.
    """

    def __init__(self, temperature: float | None = None):
        super().__init__()
        self.temperature = temperature

    def forward(self, information: Tensor, tokens: Tensor | None = None) -> Tensor:
        """The logits whose softmax over a cluster makes the pooling weights of its tokens.

        Args:
            information: (batch, N), smoothed, zero where padding is masked.
            tokens: int64 (batch,), how many of an image's N are no padding; None for all.

        Returns:
            (batch, N), at most `GREATEST_LOGIT`. To the gradient, the mean is a constant.
        """
        if self.temperature is None:
            return information
        count = information.shape[1] if tokens is None else tokens.clamp(min=1).unsqueeze(1)
        mean = information.detach().sum(dim=1, keepdim=True) / count  # (batch, 1)
        return (information / (self.temperature * mean.clamp(min=LEAST_MEAN))).clamp(max=GREATEST_LOGIT)


class EntropyClustering(nn.Module):
    """Pool tokens into clusters whose lengths and weights come from the tokens' learned information.

    By default as the released weights were trained: windows whose length is one for the whole batch (so the result for
    an image depends on its batch mates), and every token takes part, padded ones included. The other settings have no
    parameters of their own: any weights work with any of them.

    The scores reach the result through the tokens' weights alone: the clusters' borders are constants to the gradient.
    They are also what the only host read-back of a call is for: the result's shape depends on them.

    Args:
        embed_dim: channels d of the tokens that are scored.
        sigma: standard deviation of the smoothing, tokens; above 1/3. Larger means longer clusters.
        clusters: "windows", as long as regions of one sign of the second difference are on average, or "regions", each
            of them a cluster, which is how the paper's figure draws it.
        per_image: each image has its own window length. Regions are always an image's own.
        mask_padding: tokens that are padding are not scored and in no cluster: the others are what they would be
            without it.
        max_clusters: clusters grow until there are at most so many an image: longer windows, or as many neighbouring
            regions together as it takes. None sets no limit.
        temperature: above 0; tokens' shares in their cluster are the softmax of the information over so many times its
            mean in the image, so that they can differ. None: of the information itself, in bits, as published; of N
            tokens that score alike each has log2(N) / N bits, so shares are all but equal, whatever the scores.

        fixed_length: the length of all windows, tokens, whatever the information says: for graphs without sizes that
            depend on data. Padding is then clustered like any other token. None lets the information decide.

    Attributes:
        pooling_logits: the submodule that makes the logits of the pooling weights, `InformationLogits`; another module
            with its signature may take its place, and trains along.

    Raises:
        ValueError: no such kind of clusters, `max_clusters` is below 1, or the temperature is not above 0.
    """

    def __init__(
        self,
        embed_dim: int,
        sigma: float = 3.0,
        clusters: str = "windows",
        per_image: bool = False,
        mask_padding: bool = False,
        max_clusters: int | None = None,
        temperature: float | None = None,
        fixed_length: int | None = None,
    ):
        super().__init__()
        if clusters not in CLUSTERS:
            raise ValueError(f"clusters must be one of {', '.join(CLUSTERS)}, got {clusters!r}")
        if max_clusters is not None and max_clusters < 1:
            raise ValueError(f"max_clusters must be at least 1, or None for no limit, got {max_clusters}")
        if temperature is not None and not temperature > 0:
            raise ValueError(f"temperature must be above 0, or None for the published shares, got {temperature}")
        self.sigma = sigma
        self.clusters = clusters
        self.per_image = per_image
        self.mask_padding = mask_padding
        self.max_clusters = max_clusters
        self.fixed_length = fixed_length
        self.pooling_logits = InformationLogits(temperature)
        self._cluster_hooks: dict[int, Callable[[Tensor, Clusters], None]] = OrderedDict()
        self.W_prob = nn.Linear(embed_dim, 1)
        # A constant, so it moves with the module but stays out of checkpoints.
        self.register_buffer("kernel", gaussian_kernel(sigma), persistent=False)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        # `.bfloat16()` has rounded the taps.
        dtype = at_least_float32(self.kernel.dtype)
        self.kernel = gaussian_kernel(self.sigma).to(self.kernel.device, dtype)
        return self

    def register_cluster_hook(self, hook: Callable[[Tensor, Clusters], None]) -> RemovableHandle:
        """Call a hook at the end of every clustering.

        Args:
            hook: takes the smoothed information (batch, N), bits, each token in its place and zero where padding is
                masked, and the clusters.

        Returns:
            a handle whose `remove()` removes the hook; it serves as a context manager too.
        """
        handle = RemovableHandle(self._cluster_hooks)
        self._cluster_hooks[handle.id] = hook
        return handle

    def forward(self, scored: Tensor, *others: Tensor, key_padding_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Score the first tensor, and pool all of them with the one set of weights that results.

        Args:
            scored: (batch, N, d), row-major order of the feature map, N >= 1.
            others: each (batch, N, channels).
            key_padding_mask: bool (batch, N), True where padded; without effect unless `mask_padding`.

        Returns:
            as many tensors as were given, each (batch, M, channels) in its own dtype; 1 <= M <= N. Where images have
            different numbers of clusters, those of the smaller ones are followed by zeros: `cluster` says where.

        Raises:
            ValueError: a tensor is not (batch, N, channels) with the first one's batch and N, or N is 0.
        """
        for tensor in (scored, *others):
            if tensor.ndim != 3 or tensor.shape[:2] != scored.shape[:2] or tensor.shape[1] == 0:
                shapes = [tuple(t.shape) for t in (scored, *others)]
                raise ValueError(f"expected tensors (batch, N, channels) of one batch and one N >= 1, got {shapes}")
        return self.pool(scored, *others, key_padding_mask=key_padding_mask)[0]

    def pool(
        self,
        scored: Tensor,
        *others: Tensor,
        key_padding_mask: Tensor | None = None,
        narrow: Tensor | None = None,
    ) -> tuple[tuple[Tensor, ...], Clusters]:
        """The result of `forward`, and the clusters. `narrow`, as in `score`, is pooled in place of `scored`."""
        clusters = self.cluster(scored, key_padding_mask, narrow)
        with torch.autocast(scored.device.type, enabled=False):
            return tuple(clusters.pool(tensor) for tensor in (scored if narrow is None else narrow, *others)), clusters

    def cluster(self, scored: Tensor, key_padding_mask: Tensor | None = None, narrow: Tensor | None = None) -> Clusters:
        """The clusters of tokens (batch, N, d), which pool any tensor (batch, N, channels) with the same weights.

        `narrow`: as in `score`.
        """
        with torch.autocast(scored.device.type, enabled=False):
            return self.cluster_scores(self.score(scored, narrow), key_padding_mask)

    def score(self, tokens: Tensor, narrow: Tensor | None = None) -> Tensor:
        """The scores (...) of tokens (..., d), float32, or float64 if the tokens or the weights are.

        Args:
            tokens: any layout in memory; no copy is made.
            narrow: the tokens in a lower precision, which is kept for the gradient of `W_prob` in their place.
        """
        return weigh_channels(tokens, self.W_prob.weight[0], narrow) + self.W_prob.bias

    def cluster_scores(self, logits: Tensor, key_padding_mask: Tensor | None = None) -> Clusters:
        """The clusters of tokens with these scores (batch, N); key_padding_mask: bool (batch, N), True where padded."""
        if not self.mask_padding:
            key_padding_mask = None
        common = self.clusters == "windows" and not self.per_image and key_padding_mask is None
        if common or self.fixed_length is not None:
            information = smooth(self_information(logits), self.kernel)  # (batch, N)
            logits = cut_windows(self.pooling_logits(information), self.common_length(information))
            windows = Windows(logits.softmax(dim=-1))  # (batch, M, length)
            for hook in self._cluster_hooks.values():
                hook(information, windows)
            return windows

        batch, num_tokens = logits.shape
        place = torch.arange(num_tokens, device=logits.device).expand(batch, -1)  # (batch, N)
        if key_padding_mask is None:
            token, present = place, torch.ones_like(place, dtype=torch.bool)
            information = smooth(self_information(logits), self.kernel)
        else:
            # Tokens that are not padding move together, in row-major order: the image's own sequence.
            token = move_to_front(~key_padding_mask)
            present = ~key_padding_mask.gather(1, token)
            # Not minus infinity, whose softmax over an image of padding alone would be no number.
            logits = logits.gather(1, token).masked_fill(~present, torch.finfo(logits.dtype).min)
            information = smooth(self_information(logits) * present, self.kernel) * present
        borders = region_borders(information) & present[:, 1:]  # (batch, N - 1)
        tokens = present.sum(dim=1)  # (batch,)
        if self.clusters == "regions":
            kept, cluster, count = present, *self.join_regions(borders)
        else:
            kept, cluster, count = self.cut_by_length(place, tokens, borders.sum(dim=1) + 1)
        logits = self.pooling_logits(information, tokens)
        ragged = (TracedRaggedClusters if is_tracing() else RaggedClusters)(logits, token, cluster, kept, count)
        for hook in self._cluster_hooks.values():
            hook(torch.empty_like(information).scatter(1, token, information), ragged)
        return ragged

    def common_length(self, information: Tensor) -> int:
        """The length of all windows of a batch, for its information (batch, N), smoothed."""
        num_tokens = information.shape[1]
        if self.fixed_length is not None:
            return smaller_size(self.fixed_length, num_tokens)
        regions = count_regions(information)
        length = window_length(torch.ones_like(regions) * num_tokens, regions, self.max_clusters)[0]
        return size_from_data(length, num_tokens) if is_tracing() else length.item()

    def join_regions(self, borders: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's cluster (batch, N) and their number (batch,), for borders of regions (batch, N - 1)."""
        cluster = F.pad(borders.cumsum(dim=1), (1, 0))  # (batch, N)
        count = borders.sum(dim=1) + 1
        if self.max_clusters is not None:
            together = -(-count // self.max_clusters)  # (batch,)
            cluster = cluster // together.unsqueeze(1)
            count = -(-count // together)
        return cluster, count

    def cut_by_length(self, place: Tensor, tokens: Tensor, regions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cut each image's own tokens into windows, dropping what is left over as `cut_windows` does.

        Args:
            place: int64 (batch, N), 0..N - 1 in each image.
            tokens, regions: int64 (batch,), how many an image has.

        Returns:
            which places are kept, bool (batch, N); their windows, int64 (batch, N); the number of windows (batch,).
        """
        # With one length for all, an image of fewer tokens than that is one window.
        length = window_length(tokens, regions, self.max_clusters, self.per_image).minimum(tokens.clamp(min=1))
        count = tokens // length
        place = place - ((tokens - count * length) // 2).unsqueeze(1)
        cluster = place.div(length.unsqueeze(1), rounding_mode="floor")
        kept = (cluster >= 0) & (cluster < count.unsqueeze(1))
        # An image of padding alone has one cluster, of nothing.
        return kept, cluster, count.clamp(min=1)

    def extra_repr(self) -> str:
        options = f"sigma={self.sigma}, clusters={self.clusters}"
        options += ", per_image" * self.per_image + ", mask_padding" * self.mask_padding
        options += f", max_clusters={self.max_clusters}" if self.max_clusters is not None else ""
        temperature = getattr(self.pooling_logits, "temperature", None)
        return options + (f", temperature={temperature}" if temperature is not None else "")


def clusterings(model: nn.Module) -> list[EntropyClustering]:
    """The clusterings of a model's layers, in order; empty for plain attention."""
    return [module for module in model.modules() if isinstance(module, EntropyClustering)]
