"""Entropy clustering: pool a token sequence into far fewer tokens, by its learned information.

The algorithm of ENACT (Savathrakis and Argyros, arXiv:2409.07541): one learned linear map scores the tokens of a
feature map; the softmax of the scores is read as a probability; the smoothed self-information of that probability
has inflection points along the sequence, and their spacing sets how long the windows are over which tokens are
averaged, with weights that the information itself provides.

Everything up to `EntropyClustering` is a pure function of tensors, so that another host (another attention layer,
another way of choosing regions) can use the pieces it needs.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Added to every probability, so that the logarithm of an underflown one stays finite. Released weights know it.
PROBABILITY_FLOOR = 1e-8


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


def self_information(logits: Tensor) -> Tensor:
    """Each token's share of the entropy, `-p log2 p`, of the softmax over all tokens.

    Args:
        logits: (batch, N), any range.

    Returns:
        (batch, N), bits, in [0, log2(e) / e].
    """
    probability = logits.softmax(dim=-1) + PROBABILITY_FLOOR
    return -probability * probability.log2()


def smooth(signal: Tensor, kernel: Tensor) -> Tensor:
    """Convolve along the tokens with zero padding, keeping the length. Both: (batch, N); kernel: (taps,)."""
    return F.conv1d(signal.unsqueeze(1), kernel.view(1, 1, -1), padding="same").squeeze(1)  # (batch, N)


def count_regions(signal: Tensor) -> Tensor:
    """The number of maximal runs in which the second difference `[-1, 2, -1]` keeps its sign (positive or not).

    Args:
        signal: (batch, N), taken as zero beyond its ends.

    Returns:
        int64 (batch,), in 1..N. No gradient passes.
    """
    signal = F.pad(signal.detach(), (1, 1))  # (batch, N + 2)
    # The reference's order of summation: near an inflection point another one could round to the other sign.
    curved = (2 * signal[:, 1:-1] - signal[:, :-2] - signal[:, 2:]) > 0  # (batch, N)
    return (curved[:, 1:] != curved[:, :-1]).sum(dim=-1) + 1


def window_length(num_tokens: int, num_regions: list[int]) -> int:
    """One window length for a batch: the mean over its images of the mean region length, rounded half to even.

    Args:
        num_tokens: N, tokens an image.
        num_regions: regions of each image, each in 1..N.

    Returns:
        tokens a window, in 1..N.
    """
    return round(sum(num_tokens / regions for regions in num_regions) / len(num_regions))


def cut_windows(tokens: Tensor, length: int) -> Tensor:
    """Cut the sequence into whole windows; what is left over is dropped, half at the front, the rest at the back.

    Args:
        tokens: (batch, N, ...).
        length: tokens a window, in 1..N.

    Returns:
        (batch, M, length, ...) with M = N // length: a view.
    """
    num_windows, left_over = divmod(tokens.shape[1], length)
    kept = tokens.narrow(1, left_over // 2, num_windows * length)
    return kept.unflatten(1, (num_windows, length))  # (batch, M, length, ...)


def pool_windows(weights: Tensor, tokens: Tensor) -> Tensor:
    """The weighted sum of each window's tokens.

    Args:
        weights: (batch, M, length), each window's adding up to one.
        tokens: (batch, N, d).

    Returns:
        (batch, M, d), in the tokens' dtype.
    """
    windows = cut_windows(tokens, weights.shape[-1]).to(weights.dtype)  # (batch, M, length, d)
    # Image by image: over the whole batch, the product would copy windows that leave tokens over, and keep the copy.
    pooled = [w.unsqueeze(1) @ image for w, image in zip(weights, windows, strict=True)]  # (M, 1, d) each
    return torch.stack(pooled).squeeze(2).to(tokens.dtype)


def pool_shared(weights: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """`pool_windows` of tokens that share their values, without laying these out for every token.

    Args:
        weights: (batch, M, length), each window's adding up to one.
        values: (batch, S, d).
        index: int64 (N,), which of the S values each token has.

    Returns:
        (batch, M, d), in the values' dtype.
    """
    (windows,) = cut_windows(index.unsqueeze(0), weights.shape[-1])  # (M, length)
    member = F.one_hot(windows, values.shape[1]).to(weights.dtype)  # (M, length, S)
    shares = torch.einsum("bml,mls->bms", weights, member)
    return (shares @ values.to(weights.dtype)).to(values.dtype)


class EntropyClustering(nn.Module):
    """Pool tokens into windows whose length and weights come from the tokens' learned information.

    The length is one for the whole batch (so the result for an image depends on its batch mates), and every token
    takes part, padded ones included: this is how the released weights were trained.

    The scores reach the result through the window weights alone: the window length is a constant to the gradient.
    It is also what the only host read-back of a call is for: the result's shape depends on it.

    Args:
        embed_dim: channels d of the tokens that are scored.
        sigma: standard deviation of the smoothing, tokens; above 1/3. Larger means longer windows.
    """

    def __init__(self, embed_dim: int, sigma: float = 3.0):
        super().__init__()
        self.sigma = sigma
        self.W_prob = nn.Linear(embed_dim, 1)
        # A constant, so it moves with the module but stays out of checkpoints.
        self.register_buffer("kernel", gaussian_kernel(sigma), persistent=False)

    def forward(self, scored: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """Score the first tensor, and pool all of them with the one set of weights that results.

        Args:
            scored: (batch, N, d), row-major order of the feature map, N >= 1.
            others: each (batch, N, channels).

        Returns:
            as many tensors as were given, each (batch, M, channels) in its own dtype; 1 <= M <= N.

        Raises:
            ValueError: a tensor is not (batch, N, channels) with the first one's batch and N, or N is 0.
        """
        for tensor in (scored, *others):
            if tensor.ndim != 3 or tensor.shape[:2] != scored.shape[:2] or tensor.shape[1] == 0:
                shapes = [tuple(t.shape) for t in (scored, *others)]
                raise ValueError(f"expected tensors (batch, N, channels) of one batch and one N >= 1, got {shapes}")

        # bf16 cannot tell the probabilities of thousands of tokens apart: float32 whatever autocast says.
        with torch.autocast(scored.device.type, enabled=False):
            weights = self.window_weights(self.W_prob(scored.to(self.W_prob.weight.dtype)).squeeze(-1))
            return tuple(pool_windows(weights, tensor) for tensor in (scored, *others))

    def window_weights(self, logits: Tensor) -> Tensor:
        """Weights (batch, M, length) of the tokens in each window, for their scores (batch, N)."""
        information = smooth(self_information(logits), self.kernel)  # (batch, N)
        regions = count_regions(information).tolist()
        length = window_length(information.shape[1], regions)
        return cut_windows(information, length).softmax(dim=-1)  # (batch, M, length)

    def extra_repr(self) -> str:
        return f"sigma={self.sigma}"
