"""Clusters that pool tokens: windows of one length, or ragged clusters of any lengths."""

from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .tracing import is_tracing, size_from_data, smaller_size

# Elements of an intermediate in `_RaggedSum`'s backward pass: far fewer than the tokens', enough per kernel launch.
GRADIENT_PART = 2**20


# Tokens per cluster where no budget is given.
DEFAULT_SHARE = 16


def default_budget(num_tokens: int | Tensor) -> int | Tensor:
    """Return the default number of clusters for N tokens: a sixteenth of them, rounded up."""
    # Not -(-N // 16): ONNX rounds the quotient of sizes towards zero.
    return (num_tokens + DEFAULT_SHARE - 1) // DEFAULT_SHARE


def most_clusters(limit: int | None, num_tokens: int) -> int:
    """Return M, the clusters of an image with N tokens: `limit`, or `default_budget` for None; at most N."""
    return default_budget(num_tokens) if limit is None else smaller_size(limit, num_tokens)


def clusters_of_images(limit: int | None, tokens: Tensor) -> Tensor:
    """Return `most_clusters`, but at least 1, for the tokens of each image: int64 (batch,) both."""
    return (default_budget(tokens) if limit is None else tokens.clamp(max=limit)).clamp(min=1)


def cut_windows(tokens: Tensor, length: int) -> Tensor:
    """Cut the sequence into whole windows. Drop the remainder: half at the front, the rest at the back.

    Args:
        tokens: (batch, N, ...).
        length: tokens per window, in 1..N.

    Returns:
        (batch, M, length, ...) with M = N // length: a view.
    """
    num_windows = tokens.shape[1] // length
    left_over = tokens.shape[1] - num_windows * length
    whole = tokens.narrow(1, left_over // 2, num_windows * length)
    return whole.unflatten(1, (num_windows, length))  # (batch, M, length, ...)


class Clusters(Protocol):
    """The clusters of a batch.

    Attributes:
        shape: (batch, M), M the largest number of clusters of an image.
        weights: the pooling weights; those of a cluster add up to one.
        padding_mask: bool (batch, M), True where an image has no such cluster; None if all images have M clusters.
    """

    shape: tuple[int, int]
    weights: Tensor
    padding_mask: Tensor | None

    def pool(self, tokens: Tensor) -> Tensor:
        """Return the weighted sums (batch, M, d) of tokens (batch, N, d), same dtype; zero at missing clusters."""

    def pool_shared(self, values: Tensor, index: Tensor) -> Tensor:
        """`pool`, for tokens that share their values.

        Args:
            values: (batch, S, d).
            index: int64 (N,), each token's index into the S values.

        Returns:
            (batch, M, d), in the values' dtype.
        """

    def sizes(self) -> Tensor:
        """Return the number of tokens in each cluster: int64 (batch, M), 0 at missing clusters."""

    def assignment(self, num_tokens: int) -> Tensor:
        """Return the cluster of each of an image's N tokens: int64 (batch, N), in 0..M - 1, or -1 for no cluster."""


class Windows:
    """Windows: clusters of the same length in all images of a batch.

    Args:
        weights: (batch, M, length), the pooling weights of each window's tokens.
    """

    padding_mask: Tensor | None = None

    def __init__(self, weights: Tensor):
        self.weights = weights
        self.shape = tuple(weights.shape[:2])

    def pool(self, tokens: Tensor) -> Tensor:
        """As in `Clusters`."""
        windows = cut_windows(tokens, self.weights.shape[-1])  # (batch, M, length, d)
        if tokens.device.type == "cpu" and tokens.dtype == self.weights.dtype and not is_tracing():
            # Matrix products are faster on CPUs. One product for the whole batch would copy and keep the windows.
            pooled = [w.unsqueeze(1) @ image for w, image in zip(self.weights, windows, strict=True)]  # (M, 1, d) each
            return torch.stack(pooled).squeeze(2)
        # The multiplication converts low-precision tokens as it reads them: backward keeps no float32 copy.
        return (self.weights.unsqueeze(-1) * windows).sum(dim=2).to(tokens.dtype)

    def pool_shared(self, values: Tensor, index: Tensor) -> Tensor:
        """As in `Clusters`, without a copy of the values for every token."""
        if is_tracing():
            return self.pool(values.index_select(1, index))
        (windows,) = cut_windows(index.unsqueeze(0), self.weights.shape[-1])  # (M, length)
        member = F.one_hot(windows, values.shape[1]).to(self.weights.dtype)  # (M, length, S)
        weights = torch.einsum("bml,mls->bms", self.weights, member)
        return (weights @ values.to(self.weights.dtype)).to(values.dtype)

    def sizes(self) -> Tensor:
        """As in `Clusters`."""
        return torch.full(self.shape, self.weights.shape[-1], device=self.weights.device)

    def assignment(self, num_tokens: int) -> Tensor:
        """As in `Clusters`."""
        batch, num_windows, length = self.weights.shape
        clusters = torch.full((batch, num_tokens), -1, device=self.weights.device)
        # `cut_windows` returns a view; the remainder keeps its -1.
        cut_windows(clusters, length).copy_(torch.arange(num_windows, device=clusters.device).unsqueeze(1))
        return clusters


class RaggedClusters:
    """Clusters of any lengths, and any number of them per image. M is the largest number; other images are padded.

    The K tokens that belong to a cluster are listed by image, then by cluster.

    Args:
        logits: (batch, N), at most `GREATEST_LOGIT`; their softmax over a cluster gives the pooling weights.
        token: int64 (batch, N), the token at each place: its index in the image.
        cluster: int64 (batch, N), the cluster of each place, in ascending order over the places in clusters.
        in_cluster: bool (batch, N), whether the place's token is in a cluster.
        num_clusters: int64 (batch,), clusters of each image, at least 1.
        most: M, if it is known; then all N places of an image are listed, those outside clusters in an extra cluster
            that the results leave out. None: M and K are read from the device.
        full: with `most`, whether all images are known to have M clusters.

    Attributes:
        weights: (K,), the pooling weights of the listed tokens; those of a cluster add up to one.
        padding_mask: bool (batch, M), True where an image has no such cluster; None if all images have M clusters.
    """

    def __init__(
        self,
        logits: Tensor,
        token: Tensor,
        cluster: Tensor,
        in_cluster: Tensor,
        num_clusters: Tensor,
        most: int | None = None,
        full: bool = False,
    ):
        batch, num_tokens = logits.shape
        image = torch.arange(batch, device=token.device).unsqueeze(1).expand(-1, num_tokens)
        # Logits are at most GREATEST_LOGIT, so the exponentials need no shift.
        listed = [tensor.flatten() for tensor in (image, token, cluster, in_cluster, logits.exp())]
        known = most is not None
        if not known:
            # The only host read-back: shapes depend on it.
            counts, lengths = torch.stack((num_clusters, in_cluster.sum(dim=1))).tolist()
            most, full = max(counts), min(counts) == max(counts)
            place = move_to_front(listed[3].unsqueeze(0)).squeeze(0)[: sum(lengths)]  # (K,)
            listed = [tensor[place] for tensor in listed]
        self.shape = batch, most
        self.slots = most + (known and not full)  # with the extra cluster
        self.image, self.token, cluster, inside, exponentials = listed  # (K,) each; token: into the image's tokens
        # (K,), into all images' clusters
        self.cluster = self.image * self.slots + (cluster.where(inside, most) if self.slots > most else cluster)
        every = torch.arange(batch * self.slots, device=token.device)
        self.first = torch.searchsorted(self.cluster, every)  # (batch slots,), where each cluster starts in the list

        total = exponentials.new_zeros(len(every)).index_add(0, self.cluster, exponentials)
        self.weights = exponentials / total[self.cluster]
        self.padding_mask: Tensor | None = None
        if not full:
            self.padding_mask = torch.arange(most, device=token.device) >= num_clusters.unsqueeze(1)

    def pool(self, tokens: Tensor) -> Tensor:
        """As in `Clusters`."""
        batch, num_tokens = tokens.shape[:2]
        if batch > 1 and tokens.transpose(0, 1).is_contiguous():
            # These tokens are length first in memory, so indexing them in that order needs no copy.
            flat, token = tokens.transpose(0, 1).flatten(0, 1), self.token * batch + self.image
        else:
            flat, token = tokens.flatten(0, 1), self.image * num_tokens + self.token
        pooled = _RaggedSum.apply(flat, self.weights, token, self.cluster, self.first)
        return self.by_image(pooled).to(tokens.dtype)

    def by_image(self, values: Tensor) -> Tensor:
        """Return the values (batch slots, ...) of all images' clusters as (batch, M, ...)."""
        return values.unflatten(0, (-1, self.slots))[:, : self.shape[1]]

    def pool_shared(self, values: Tensor, index: Tensor) -> Tensor:
        """As in `Clusters`, without a copy of the values for every token."""
        num_values = values.shape[1]
        slot = self.cluster * num_values + index[self.token]  # (K,)
        weights = self.weights.new_zeros(len(self.first) * num_values).index_add(0, slot, self.weights)
        weights = self.by_image(weights.view(-1, num_values))  # (batch, M, S)
        return (weights @ values.to(weights.dtype)).to(values.dtype)

    def sizes(self) -> Tensor:
        """As in `Clusters`."""
        return self.by_image(torch.zeros_like(self.first).index_add(0, self.cluster, torch.ones_like(self.cluster)))

    def assignment(self, num_tokens: int) -> Tensor:
        """As in `Clusters`."""
        clusters = torch.full((self.shape[0], num_tokens), -1, device=self.cluster.device)
        cluster = self.cluster % self.slots
        clusters[self.image, self.token] = cluster.where(cluster < self.shape[1], -1)
        return clusters


class TracedRaggedClusters:
    """`RaggedClusters` for traced graphs: one entry per token, and an extra cluster for tokens outside all clusters.

    Args:
        logits, token, cluster, in_cluster, num_clusters, most, full: as in `RaggedClusters`.

    Attributes:
        padding_mask: bool (batch, M), True where an image has no such cluster; None if `full`.
    """

    def __init__(
        self,
        logits: Tensor,
        token: Tensor,
        cluster: Tensor,
        in_cluster: Tensor,
        num_clusters: Tensor,
        most: int | None = None,
        full: bool = False,
    ):
        batch, num_tokens = logits.shape
        max_count = size_from_data(num_clusters.max(), num_tokens) if most is None else most
        self.shape = batch, max_count
        image = torch.arange(batch, device=token.device).unsqueeze(1)
        # Index batch * M collects the tokens outside all clusters.
        cluster = (image * max_count + cluster).where(in_cluster, batch * max_count)
        self.cluster = torch.zeros_like(token).scatter(1, token, cluster).flatten()  # (batch N,)
        exponentials = torch.zeros_like(logits).scatter(1, token, logits).exp()  # (batch, N)
        total = self.add_up(exponentials.flatten())  # (batch M + 1,)
        self.weights = exponentials / total.index_select(0, self.cluster).view_as(exponentials)  # (batch, N)
        self.padding_mask: Tensor | None = None
        if not full:
            self.padding_mask = torch.arange(max_count, device=token.device) >= num_clusters.unsqueeze(1)

    def add_up(self, values: Tensor) -> Tensor:
        """Sum values (batch N, ...) of all images' tokens over each cluster: (batch M + 1, ...)."""
        batch, max_count = self.shape
        return values.new_zeros(batch * max_count + 1, *values.shape[1:]).index_add(0, self.cluster, values)

    def pool(self, tokens: Tensor) -> Tensor:
        """As in `Clusters`."""
        weighted = tokens.to(self.weights.dtype) * self.weights.unsqueeze(-1)
        return self.add_up(weighted.flatten(0, 1))[:-1].unflatten(0, self.shape).to(tokens.dtype)

    def pool_shared(self, values: Tensor, index: Tensor) -> Tensor:
        """As in `Clusters`, with a copy of the values for every token."""
        return self.pool(values.index_select(1, index))

    def sizes(self) -> Tensor:
        """As in `Clusters`."""
        return self.add_up(torch.ones_like(self.cluster))[:-1].view(self.shape)

    def assignment(self, num_tokens: int) -> Tensor:
        """As in `Clusters`."""
        batch, max_count = self.shape
        cluster = self.cluster.view(batch, num_tokens)
        return torch.where(cluster == batch * max_count, -1, cluster % max_count)


class _RaggedSum(torch.autograd.Function):
    """`out[cluster[i]] += weights[i] tokens[token[i]]`, for clusters listed in order.

    `F.embedding_bag` stores no product of weights and tokens, but its own backward pass would sort the list again.
    """

    @staticmethod
    def forward(ctx, tokens: Tensor, weights: Tensor, token: Tensor, cluster: Tensor, first: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, weights, token, cluster)
        return F.embedding_bag(token, tokens.to(weights.dtype), first, mode="sum", per_sample_weights=weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weights, token, cluster = ctx.saved_tensors
        needs_tokens, needs_weights = ctx.needs_input_grad[:2]
        grad_tokens = torch.zeros_like(tokens) if needs_tokens else None
        grad_weights = torch.empty_like(weights) if needs_weights else None
        # In parts, so that no intermediate is as large as the tokens.
        length = max(GRADIENT_PART // tokens.shape[1], 1)
        for start in range(0, len(token), length):
            part = slice(start, start + length)
            spread = grad.index_select(0, cluster[part])  # (k, d)
            if needs_weights:
                grad_weights[part] = (tokens.index_select(0, token[part]) * spread).sum(dim=1)
            if needs_tokens:
                spread = spread.mul_(weights[part].unsqueeze(1)).to(tokens.dtype)
                grad_tokens.index_copy_(0, token[part], spread)
        return grad_tokens, grad_weights, None, None, None


def move_to_front(mask: Tensor) -> Tensor:
    """Return the stable order, int64 (batch, N), that puts the places in mask, bool (batch, N), first."""
    front = mask.cumsum(dim=1)
    behind = front[:, -1:] + mask.logical_not().cumsum(dim=1)
    target = front.where(mask, behind) - 1  # (batch, N), where each place goes
    place = torch.arange(mask.shape[1], device=mask.device).expand_as(target)
    return torch.zeros_like(target).scatter(1, target, place)
