"""Entropy clustering: pool a token sequence into far fewer tokens, guided by their learned information.

The algorithm of ENACT (Savathrakis and Argyros, arXiv:2409.07541): one learned linear map scores the tokens of a
feature map. The softmax of the scores is read as a probability, and its self-information is smoothed along the
sequence. The spacing of the inflection points sets the length of the windows over which tokens are averaged. The
averaging weights come from the same information.

Everything above `EntropyClustering` is a pure function of tensors, so other attention layers or other region rules can
reuse the pieces. Clusters come in two forms: `Windows` have one length in all images and are views of the tokens;
`RaggedClusters` have any lengths.
"""

import math
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from .clusters import (
    DEFAULT_SHARE,
    Clusters,
    RaggedClusters,
    TracedRaggedClusters,
    Windows,
    clusters_of_images,
    cut_windows,
    most_clusters,
    move_to_front,
)
from .kernels import AUTO, attempt, check_kernels, reason_against_pooling, wants_triton
from .tracing import is_tracing, running_minimum, size_from_data, smaller_size

# Added to every probability, to keep the logarithm of an underflowed one finite. Released weights were trained with it.
PROBABILITY_FLOOR = 1e-8

# Clamp on information / (temperature * mean), so that summed exponentials fit float32.
GREATEST_LOGIT = 60.0

# bits; below every real mean, which is about log2(N) / N for N tokens. A smaller mean is rounding error.
LEAST_MEAN = 1e-6

# An image's information is rounded to this many parts before it is added up; times 2 N they must fit int64.
MASS_STEPS = 2**30

# Kinds of clusters: windows of the mean region length, the regions themselves, or clusters of equal information.
CLUSTERS = WINDOWS, REGIONS, EQUAL = ("windows", "regions", "equal")


def gaussian_kernel(sigma: float) -> Tensor:
    """The smoothing taps: a Gaussian density at -(3 sigma - 1), ..., 3 sigma - 1 in steps of 1, not renormalised.

    Args:
        sigma: standard deviation in tokens, above 1/3.

    Returns:
        float32 (taps,): floor(6 sigma - 1) taps, 17 for sigma = 3.

    Raises:
        ValueError: sigma is too small for a single tap.
    """
    reach = 3 * sigma - 1
    if not reach > 0:
        raise ValueError(f"sigma must be above 1/3 token, got {sigma}")
    # The epsilon includes the right end, even if 3 * sigma is rounded down.
    taps = torch.arange(-reach, reach + 1e-6, 1.0, dtype=torch.float64)
    density = torch.exp(-(taps**2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    return density.to(torch.float32)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to score in: bf16 cannot tell the probabilities of thousands of tokens apart."""
    return torch.promote_types(dtype, torch.float32)


def self_information(logits: Tensor) -> Tensor:
    """Each token's term in the entropy, `-p log2 p`, p being the softmax over all tokens.

    Args:
        logits: (batch, N), any range.

    Returns:
        (batch, N), bits, in [0, log2(e) / e]; float32, or float64 for float64 logits.
    """
    probability = logits.to(at_least_float32(logits.dtype)).softmax(dim=-1)
    # ONNX's optimizer drops the addition of such a small Python number, but not of a tensor.
    probability = probability + (probability.new_full((1,), PROBABILITY_FLOOR) if is_tracing() else PROBABILITY_FLOOR)
    return -probability * probability.log2()


def smooth(signal: Tensor, kernel: Tensor) -> Tensor:
    """Convolve signal (batch, N) with kernel (taps,) along the tokens, zero-padded: (batch, N)."""
    taps = len(kernel)
    # No convolution or matrix product: either could run in TF32, whose rounding moves region borders.
    neighbours = F.pad(signal, ((taps - 1) // 2, taps // 2)).unfold(1, taps, 1)  # (batch, N, taps)
    if is_tracing():
        # The product's layout depends on whether N < taps, and a traced graph would fix it.
        neighbours = neighbours.clone(memory_format=torch.contiguous_format)
    return (neighbours * kernel).sum(dim=-1)


def region_borders(signal: Tensor) -> Tensor:
    """Borders of regions: places where the second difference `[-1, 2, -1]` turns from positive to not, or back.

    Args:
        signal: (batch, N), zero-padded at both ends.

    Returns:
        bool (batch, N - 1), between each token and the next. No gradient flows.
    """
    signal = F.pad(signal.detach(), (1, 1))  # (batch, N + 2)
    # Keep the reference's order of summation: another order could round to the other sign at inflection points.
    curved = (2 * signal[:, 1:-1] - signal[:, :-2] - signal[:, 2:]) > 0  # (batch, N)
    return curved[:, 1:] != curved[:, :-1]


def count_regions(signal: Tensor) -> Tensor:
    """Count the regions (maximal runs without a border) of signals (batch, N): int64 (batch,), in 1..N."""
    return region_borders(signal).sum(dim=-1) + 1


def window_length(tokens: Tensor, regions: Tensor, max_clusters: int | None = None, per_image: bool = False) -> Tensor:
    """The window length of each image: the mean region length over the batch, rounded half to even.

    Args:
        tokens: int64 (batch,), tokens of each image. Images with 0 tokens do not count.
        regions: int64 (batch,), regions of each image, at least 1.
        max_clusters: lengthen the windows until no image has more whole windows than this; None sets no limit.
        per_image: use each image's own mean region length instead of one length for all.

    Returns:
        int64 (batch,), tokens per window, at least 1.
    """
    length = tokens.double() / regions
    if not per_image:
        length = (length.sum() / (tokens > 0).sum().clamp(min=1)).expand_as(length)
    length = length.round().long().clamp(min=1)
    if max_clusters is not None:
        shortest = tokens // (max_clusters + 1) + 1
        length = torch.maximum(length, shortest if per_image else shortest.max())
    return length


def equal_information(information: Tensor, tokens: Tensor, count: Tensor, uniform_share: float = 0.0) -> Tensor:
    """Cut each image's sequence into clusters of equal information, so that informative parts get small clusters.

    Token i wants the cluster `floor(count * (I_1 + ... + I_{i-1} + I_i / 2) / I)`, I being the image's sum, so the
    information of a cluster differs from `I / count` by less than one token's. Where a token holds more than a
    cluster's share, the following borders move, so that no cluster is empty.

    Args:
        information: (batch, N), zero behind an image's tokens.
        tokens: int64 (batch,), tokens of each image, in 0..N.
        count: int64 (batch,), clusters of each image, in 1..max(tokens, 1).
        uniform_share: the part of an image's information, 0 to 1, that counts as spread evenly over its tokens; at 1,
            clusters have equal lengths.

    Returns:
        int64 (batch, N), the cluster of each place: ascending by steps of at most 1, and the last cluster behind an
        image's tokens. No gradient flows.
    """
    # Rounding makes the information of a probability of 1 negative. NaN would give clusters that do not exist.
    information = information.detach()
    information = information.where(information > 0, 0)
    total = information.sum(dim=1, keepdim=True).clamp(min=torch.finfo(information.dtype).tiny)
    # Integers: their cumulative sum is deterministic on GPUs and does not depend on padding or the summation order.
    mass = information / total
    tokens, count = tokens.unsqueeze(1), count.unsqueeze(1)
    place = torch.arange(information.shape[1], device=information.device)
    if uniform_share:
        mass = torch.lerp(mass, (place < tokens) / tokens.clamp(min=1), uniform_share)
    mass = (mass * MASS_STEPS).long()  # (batch, N)
    passed = mass.cumsum(dim=1)
    wanted = (2 * passed - mass) * count // (2 * passed[:, -1:]).clamp(min=1)  # (batch, N)
    # Clusters 0, 1, ... without a gap: at most one more at each token, and enough left for the last cluster.
    cluster = place + running_minimum(wanted - place).clamp(max=0)
    return cluster.maximum(count - tokens + place).minimum(count - 1)


class _Score(torch.autograd.Function):
    """`tokens @ weight`; saves `narrow`, a low-precision copy of the tokens, for the backward pass."""

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
    """The weighted sum over the channels of tokens (..., d), with weight (d,): (...).

    `narrow`: as in `EntropyClustering.score`. A matrix product could run in TF32, so this uses none.
    """
    weight = weight.to(at_least_float32(weight.dtype))
    if narrow is None or narrow.dtype == tokens.dtype:
        return (tokens * weight).sum(dim=-1)
    return _Score.apply(tokens, narrow, weight)


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype that autocast gives this tensor in a matrix product; its own dtype without autocast."""
    device = tensor.device.type
    if tensor.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tensor.dtype


class InformationLogits(nn.Module):
    """Turns the smoothed information into the logits of the pooling weights; it has no parameters.

    Args:
        temperature: as in `EntropyClustering`.
    """

    def __init__(self, temperature: float | None = None):
        super().__init__()
        self.temperature = temperature

    def forward(self, information: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Return logits whose softmax over a cluster gives the pooling weights of its tokens.

        Args:
            information: (batch, N), smoothed, zero at masked padding.
            tokens: int64 (batch,), tokens of each image without padding; None for all N.

        Returns:
            (batch, N), at most `GREATEST_LOGIT`. The gradient treats the mean as a constant.
        """
        if self.temperature is None:
            return information
        count = information.shape[1] if tokens is None else tokens.clamp(min=1).unsqueeze(1)
        mean = information.detach().sum(dim=1, keepdim=True) / count  # (batch, 1)
        return (information / (self.temperature * mean.clamp(min=LEAST_MEAN))).clamp(max=GREATEST_LOGIT)


class EntropyClustering(nn.Module):
    """Pools tokens into clusters whose lengths and weights come from the tokens' learned information.

    The defaults are those of the released weights: one window length for the whole batch (so an image's result depends
    on its batch mates), and padded tokens are clustered too. The settings add no parameters: any weights work with all
    of them.

    The scores reach the result only through the pooling weights: the gradient treats the borders as constants. The
    borders also cause the only host read-back of a call, since the result's shape depends on them, except "equal"
    and in `packed_windows`.

    Args:
        embed_dim: channels d of the scored tokens.
        sigma: standard deviation of the smoothing, tokens; above 1/3. Larger means longer clusters.
        clusters: "windows": all as long as the mean region. "regions": each region is a cluster, as in the paper's
            figure. A region is a run of tokens whose second difference keeps its sign. "equal": clusters of equal
            information (`equal_information`); their number is known in advance, so a call needs no host read-back.
        per_image: give each image its own window length. The other kinds are always per image.
        mask_padding: leave padded tokens out of the scores and the clusters, so that padding does not change the rest.
            "equal" always does.
        max_clusters: the most clusters per image: windows get longer, neighbouring regions are joined. None sets no
            limit. "equal" makes exactly as many, or one per token of a smaller image; None: `default_budget`.
        temperature: above 0. The pooling weights are the softmax of information / (temperature * its mean in the
            image), which lets them differ. None: the softmax of the information in bits, as published. N tokens with
            equal scores have log2(N) / N bits each, so the published weights are nearly equal for any scores.
        zero_scores: start with scores of zero, so that all tokens count alike until training tells them apart. Random
            scores, as published, prefer random tokens at first. Weights that are loaded later replace the zeros.
        fixed_length: the length of all windows, tokens, whatever the information: for graphs whose sizes must not
            depend on data. Padding is then clustered too. None: the information sets the length.
        kernels: "torch", "triton" or "auto", which is "torch" for now. Triton's kernels pool pairs of tensors into
            common windows or clusters of equal information on GPUs; PyTorch does the rest (docs/dev/kernels.md).

    Attributes:
        uniform_share: as in `equal_information`; an ablation in `enact_common.study`.
        pooling_logits: the submodule that makes the logits of the pooling weights, by default `InformationLogits`. Any
            module with the same signature can replace it, and is trained with the rest.

    Raises:
        ValueError: `clusters` or `kernels` is unknown, `max_clusters` is below 1, or the temperature is not above 0.
    """

    uniform_share = 0.0

    def __init__(
        self,
        embed_dim: int,
        sigma: float = 3.0,
        clusters: str = WINDOWS,
        per_image: bool = False,
        mask_padding: bool = False,
        max_clusters: int | None = None,
        temperature: float | None = None,
        fixed_length: int | None = None,
        kernels: str = AUTO,
        zero_scores: bool = False,
    ):
        super().__init__()
        if clusters not in CLUSTERS:
            raise ValueError(f"clusters must be one of {', '.join(CLUSTERS)}, got {clusters!r}")
        if max_clusters is not None and max_clusters < 1:
            raise ValueError(f"max_clusters must be at least 1, or None for no limit, got {max_clusters}")
        if temperature is not None and not temperature > 0:
            raise ValueError(f"temperature must be above 0, or None for the published weights, got {temperature}")
        self.sigma = sigma
        self.clusters = clusters
        self.per_image = per_image
        self.mask_padding = mask_padding or clusters == EQUAL
        self.max_clusters = max_clusters
        self.fixed_length = fixed_length
        self.kernels = check_kernels(kernels)
        self.pooling_logits = InformationLogits(temperature)
        self._cluster_hooks: dict[int, Callable[[Tensor, Clusters], None]] = OrderedDict()
        self.zero_scores = zero_scores
        self.W_prob = nn.Linear(embed_dim, 1)
        self.start_scores()
        # A constant: it moves with the module but stays out of checkpoints.
        self.register_buffer("kernel", gaussian_kernel(sigma), persistent=False)

    def start_scores(self) -> None:
        """With `zero_scores`, zero the scoring weights; call it again after initialising all weights of a model."""
        if self.zero_scores:
            nn.init.zeros_(self.W_prob.weight)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        # `.bfloat16()` has rounded the taps, so compute them again.
        dtype = at_least_float32(self.kernel.dtype)
        self.kernel = gaussian_kernel(self.sigma).to(self.kernel.device, dtype)
        return self

    def register_cluster_hook(self, hook: Callable[[Tensor, Clusters], None]) -> RemovableHandle:
        """Register a hook that runs at the end of every clustering.

        Args:
            hook: called with the smoothed information (batch, N), bits, in token order and zero at masked padding, and
                with the clusters.

        Returns:
            a handle whose `remove()` removes the hook; it is also a context manager.
        """
        handle = RemovableHandle(self._cluster_hooks)
        self._cluster_hooks[handle.id] = hook
        return handle

    def forward(self, scored: Tensor, *others: Tensor, key_padding_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Score the first tensor, and pool all tensors with the same weights.

        Args:
            scored: (batch, N, d), row-major order of the feature map, N >= 1.
            others: each (batch, N, channels).
            key_padding_mask: bool (batch, N), True where padded; ignored unless `mask_padding`.

        Returns:
            the pooled tensors, each (batch, M, channels) in its own dtype; 1 <= M <= N. Images with fewer than M
            clusters are padded with zeros: see the padding mask from `cluster`.

        Raises:
            ValueError: a tensor is not (batch, N, channels), batch or N differ, or N is 0.
        """
        for tensor in (scored, *others):
            if tensor.ndim != 3 or tensor.shape[:2] != scored.shape[:2] or tensor.shape[1] == 0:
                shapes = [tuple(t.shape) for t in (scored, *others)]
                raise ValueError(f"expected tensors (batch, N, channels) with the same batch and N >= 1, got {shapes}")
        return self.pool(scored, *others, key_padding_mask=key_padding_mask)[0]

    def pool(
        self,
        scored: Tensor,
        *others: Tensor,
        key_padding_mask: Tensor | None = None,
        narrow: Tensor | None = None,
    ) -> tuple[tuple[Tensor, ...], Clusters]:
        """Return the result of `forward`, and the clusters. `narrow`, as in `score`, is pooled instead of `scored`."""
        return self.start_pooling(scored, *others, key_padding_mask=key_padding_mask, narrow=narrow)()

    def start_pooling(
        self,
        scored: Tensor,
        *others: Tensor,
        key_padding_mask: Tensor | None = None,
        narrow: Tensor | None = None,
        packed: bool = False,
    ) -> Callable[[], tuple[tuple[Tensor, ...], Clusters]]:
        """Return a function that returns the result of `pool`. Arguments: as in `pool`.

        What is computed between the two calls runs on the GPU while the host waits for the length of the windows.
        `packed`: whether the host may not wait instead. If the clusters then have `starts`, the pooled tensors are
        packed, see `packed.packed_windows`.
        """

        def pool() -> tuple[tuple[Tensor, ...], Clusters]:
            clusters = self.cluster(scored, key_padding_mask, narrow)
            with torch.autocast(scored.device.type, enabled=False):
                pooled = tuple(clusters.pool(tensor) for tensor in (scored if narrow is None else narrow, *others))
            return pooled, clusters

        inputs = scored, scored if narrow is None else narrow, *others
        return self.prefer_kernels(inputs, key_padding_mask, pool, packed)

    def prefer_kernels(
        self, inputs: tuple[Tensor, ...], key_padding_mask: Tensor | None, pool: Callable, packed: bool = False
    ) -> Callable:
        """Start Triton's kernels where they cover the inputs.

        Args:
            inputs: the scored tokens, these or `narrow`, and the other tensors to pool; see `start_kernels`.
            key_padding_mask: as in `pool`.
            pool: computes the same with PyTorch.
            packed: as in `start_pooling`.

        Returns:
            a function that returns the kernels' result, or that of `pool`.
        """
        if not wants_triton(self.kernels):
            return pool
        reason = reason_against_pooling(*inputs) or self.reason_against_kernels(inputs[0], key_padding_mask)
        finish = attempt("clusters", self.kernels, reason, lambda: self.start_kernels(inputs, key_padding_mask, packed))
        return pool if finish is None else lambda: attempt("clusters", self.kernels, None, finish) or pool()

    def reason_against_kernels(self, scored: Tensor, key_padding_mask: Tensor | None) -> str | None:
        """Return why Triton's kernels cannot cluster with this layer's settings; None if they can."""
        masked = key_padding_mask is not None and self.mask_padding
        fits = not masked or key_padding_mask.shape == scored.shape[:2]
        reasons = {
            "shapes do not fit": not fits or scored.shape[2] != self.W_prob.in_features,
            "scores are float64": self.W_prob.weight.dtype == torch.float64,
            "regions are clustered": self.clusters == REGIONS,
            "each image has its own window length": self.clusters == WINDOWS and self.per_image,
            "windows leave out padding": self.clusters == WINDOWS and masked,
            "the window length is fixed": self.fixed_length is not None,
            "the clusters are traced": bool(self._cluster_hooks),
            "the layer's parts were changed": self.uniform_share != 0
            or type(self.pooling_logits) is not InformationLogits
            or "cluster_scores" in vars(self),
        }
        return next((reason for reason, applies in reasons.items() if applies), None)

    def start_kernels(
        self, inputs: tuple[Tensor, Tensor, Tensor], key_padding_mask: Tensor | None, packed: bool
    ) -> Callable[[], tuple[tuple[Tensor, Tensor], Clusters]]:
        """Do what `start_pooling` does, with Triton.

        Args:
            inputs: the scored tokens, these or `narrow`, and the values, (batch, N, d) each. Instead of the values:
                float32 (batch, W), scores that are added in each of a map's columns; see `pooling.pool_clusters`.
            key_padding_mask: as in `pool`.
            packed: as in `start_pooling`.
        """
        # Imported here, since Triton is optional.
        from .kernels import pooling

        setting = pooling.Setting(
            equal=self.clusters == EQUAL,
            num_clusters=most_clusters(self.max_clusters, inputs[0].shape[1]) if self.clusters == EQUAL else 0,
            share=DEFAULT_SHARE if self.max_clusters is None else 0,
            max_clusters=self.max_clusters,
            temperature=self.pooling_logits.temperature,
            packed=packed,
        )
        weight, bias = self.W_prob.weight.flatten(), self.W_prob.bias
        padded = key_padding_mask.contiguous() if setting.equal and key_padding_mask is not None else None
        columns = inputs[2] if inputs[2].ndim == 2 else None
        started = pooling.start(inputs[0], padded, weight, bias, self.kernel, setting, columns)
        return lambda: pooling.finish(started, *inputs, weight, bias)

    def cluster(self, scored: Tensor, key_padding_mask: Tensor | None = None, narrow: Tensor | None = None) -> Clusters:
        """Cluster tokens (batch, N, d). The clusters pool any tensor (batch, N, channels) with the same weights.

        `narrow`: as in `score`.
        """
        with torch.autocast(scored.device.type, enabled=False):
            return self.cluster_scores(self.score(scored, narrow), key_padding_mask)

    def score(self, tokens: Tensor, narrow: Tensor | None = None) -> Tensor:
        """The scores (...) of tokens (..., d), float32, or float64 if the tokens or the weights are.

        Args:
            tokens: any memory layout; no copy is made.
            narrow: the tokens in a lower precision, saved instead of them for the gradient of `W_prob`.
        """
        return weigh_channels(tokens, self.W_prob.weight.flatten(), narrow) + self.W_prob.bias

    def cluster_scores(self, logits: Tensor, key_padding_mask: Tensor | None = None) -> Clusters:
        """Cluster tokens with scores (batch, N); key_padding_mask: bool (batch, N), True where padded."""
        if not self.mask_padding:
            key_padding_mask = None
        common = self.clusters == WINDOWS and not self.per_image and key_padding_mask is None
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
            # Move the tokens that are not padding to the front, in row-major order: the image's own sequence.
            token = move_to_front(~key_padding_mask)
            present = ~key_padding_mask.gather(1, token)
            # Not minus infinity: its softmax over an image of only padding would be NaN.
            logits = logits.gather(1, token).masked_fill(~present, torch.finfo(logits.dtype).min)
            information = smooth(self_information(logits) * present, self.kernel) * present
        tokens = present.sum(dim=1)  # (batch,)
        in_cluster, most, full = present, None, False
        if self.clusters == EQUAL:
            most, count = most_clusters(self.max_clusters, num_tokens), clusters_of_images(self.max_clusters, tokens)
            full = key_padding_mask is None
            cluster = equal_information(information, tokens, count, self.uniform_share)
        else:
            borders = region_borders(information) & present[:, 1:]  # (batch, N - 1)
            if self.clusters == REGIONS:
                cluster, count = self.join_regions(borders)
            else:
                in_cluster, cluster, count = self.cut_by_length(place, tokens, borders.sum(dim=1) + 1)
        logits = self.pooling_logits(information, tokens)
        kind = TracedRaggedClusters if is_tracing() else RaggedClusters
        ragged = kind(logits, token, cluster, in_cluster, count, most, full)
        for hook in self._cluster_hooks.values():
            hook(torch.empty_like(information).scatter(1, token, information), ragged)
        return ragged

    def common_length(self, information: Tensor) -> int:
        """Return the window length of a batch with smoothed information (batch, N)."""
        num_tokens = information.shape[1]
        if self.fixed_length is not None:
            return smaller_size(self.fixed_length, num_tokens)
        regions = count_regions(information)
        length = window_length(torch.ones_like(regions) * num_tokens, regions, self.max_clusters)[0]
        return size_from_data(length, num_tokens) if is_tracing() else length.item()

    def join_regions(self, borders: Tensor) -> tuple[Tensor, Tensor]:
        """Return each token's cluster (batch, N) and the number of clusters (batch,), for borders (batch, N - 1)."""
        cluster = F.pad(borders.cumsum(dim=1), (1, 0))  # (batch, N)
        count = borders.sum(dim=1) + 1
        if self.max_clusters is not None:
            per_cluster = -(-count // self.max_clusters)  # (batch,)
            cluster = cluster // per_cluster.unsqueeze(1)
            count = -(-count // per_cluster)
        return cluster, count

    def cut_by_length(self, place: Tensor, tokens: Tensor, regions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cut each image's tokens into windows, dropping the remainder as `cut_windows` does.

        Args:
            place: int64 (batch, N), 0..N - 1 in each image.
            tokens, regions: int64 (batch,), tokens and regions of each image.

        Returns:
            whether a place is in a window, bool (batch, N); its window, int64 (batch, N); windows per image (batch,).
        """
        # With one length for all, an image with fewer tokens is one window.
        length = window_length(tokens, regions, self.max_clusters, self.per_image).minimum(tokens.clamp(min=1))
        count = tokens // length
        place = place - ((tokens - count * length) // 2).unsqueeze(1)
        cluster = place.div(length.unsqueeze(1), rounding_mode="floor")
        in_cluster = (cluster >= 0) & (cluster < count.unsqueeze(1))
        # An image of only padding has one empty cluster.
        return in_cluster, cluster, count.clamp(min=1)

    def extra_repr(self) -> str:
        options = f"sigma={self.sigma}, clusters={self.clusters}"
        options += ", per_image" * self.per_image + ", mask_padding" * self.mask_padding
        options += f", max_clusters={self.max_clusters}" if self.max_clusters is not None else ""
        options += f", kernels={self.kernels}" if self.kernels != AUTO else ""
        temperature = getattr(self.pooling_logits, "temperature", None)
        return options + (f", temperature={temperature}" if temperature is not None else "")


def clusterings(model: nn.Module) -> list[EntropyClustering]:
    """Return the clusterings of a model's layers, in order; empty for plain attention."""
    return [module for module in model.modules() if isinstance(module, EntropyClustering)]
