"""The forms of clusters, windows of one length or ragged clusters of any lengths: each pools tokens."""

from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .tracing import is_tracing, size_from_data

# Elements of an intermediate in the gradient of segments: small against the tokens, large against a kernel's launch.
GRADIENT_PART = 2**20


def cut_windows(tokens: Tensor, length: int) -> Tensor:
    """Cut the sequence into whole windows; what is left over is dropped, half at the front, the rest at the back.

    Args:
        tokens: (batch, N, ...).
        length: tokens a window, in 1..N.

    Returns:
        (batch, M, length, ...) with M = N // length: a view.
    """
    num_windows = tokens.shape[1] // length
    left_over = tokens.shape[1] - num_windows * length
    kept = tokens.narrow(1, left_over // 2, num_windows * length)
    return kept.unflatten(1, (num_windows, length))  # (batch, M, length, ...)


class Clusters(Protocol):
    """A batch's clusters, of whatever form.

    Attributes:
        shape: (batch, M), M the largest number of clusters of an image.
        weights: the pooling weights, each cluster's adding up to one.
        padding_mask: bool (batch, M), True where an image has no such cluster; None where all have M.
    """

    shape: tuple[int, int]
    weights: Tensor
    padding_mask: Tensor | None

    def pool(self, tokens: Tensor) -> Tensor:
        """The weighted sums of tokens (batch, N, d): (batch, M, d), in their dtype; zero where an image has fewer."""

    def pool_shared(self, values: Tensor, index: Tensor) -> Tensor:
        """`pool` of tokens that share their values.

        Args:
            values: (batch, S, d).
            index: int64 (N,), which of the S values each token has.

        Returns:
            (batch, M, d), in the values' dtype.
        """

    def sizes(self) -> Tensor:
        """Tokens of each cluster: int64 (batch, M), 0 where an image has no such cluster."""

    def assignment(self, num_tokens: int) -> Tensor:
        """The cluster of each of an image's N tokens: int64 (batch, N), in 0..M - 1, or -1 where it is in none."""


class Windows:
    """Clusters of one length in all images of a batch.

    Args:
        weights: (batch, M, length), of each window's tokens.
    """

    padding_mask: Tensor | None = None

    def __init__(self, weights: Tensor):
        self.weights = weights
        self.shape = tuple(weights.shape[:2])

    def pool(self, tokens: Tensor) -> Tensor:
        """As in `Clusters`."""
        windows = cut_windows(tokens, self.weights.shape[-1])  # (batch, M, length, d)
        if tokens.device.type == "cpu" and tokens.dtype == self.weights.dtype and not is_tracing():
            # Matrix products are faster on CPUs; one for the whole batch would copy the windows and keep the copy.
            pooled = [w.unsqueeze(1) @ image for w, image in zip(self.weights, windows, strict=True)]  # (M, 1, d) each
            return torch.stack(pooled).squeeze(2)
        # The multiplication converts narrower tokens as it reads them, so the backward pass keeps no wide copy.
        return (self.weights.unsqueeze(-1) * windows).sum(dim=2).to(tokens.dtype)

    def pool_shared(self, values: Tensor, index: Tensor) -> Tensor:
        """As in `Clusters`, without laying the values out for every token."""
        if is_tracing():
            return self.pool(values.index_select(1, index))
        (windows,) = cut_windows(index.unsqueeze(0), self.weights.shape[-1])  # (M, length)
        member = F.one_hot(windows, values.shape[1]).to(self.weights.dtype)  # (M, length, S)
        shares = torch.einsum("bml,mls->bms", self.weights, member)
        return (shares @ values.to(self.weights.dtype)).to(values.dtype)

    def sizes(self) -> Tensor:
        """As in `Clusters`."""
        return torch.full(self.shape, self.weights.shape[-1], device=self.weights.device)

    def assignment(self, num_tokens: int) -> Tensor:
        """As in `Clusters`."""
        batch, num_windows, length = self.weights.shape
        clusters = torch.full((batch, num_tokens), -1, device=self.weights.device)
        # Cut as tokens are, which gives a view: what is left over keeps its -1.
        cut_windows(clusters, length).copy_(torch.arange(num_windows, device=clusters.device).unsqueeze(1))
        return clusters


class RaggedClusters:
    """Clusters of any lengths, and of any number in each image. The longest list of them sets M; others are padded.

    Tokens that belong to a cluster are listed image by image, cluster by cluster, K in all; tokens in no cluster are
    not listed.

    Args:
        logits: (batch, N), at most `GREATEST_LOGIT`; each cluster's softmax of them makes the weights of its tokens.
        token: int64 (batch, N), which token each place is about: its index in the image.
        cluster: int64 (batch, N), the cluster of each place, not falling along the places that are kept.
        kept: bool (batch, N), whether the place's token is in a cluster.
        num_clusters: int64 (batch,), of each image, at least 1.

    Attributes:
        weights: (K,), of the listed tokens, each cluster's adding up to one.
        padding_mask: bool (batch, M), True where an image has no such cluster; None where all have M.
    """

    def __init__(self, logits: Tensor, token: Tensor, cluster: Tensor, kept: Tensor, num_clusters: Tensor):
        batch, num_tokens = logits.shape
        # The one read-back: shapes depend on it.
        counts, listed = torch.stack((num_clusters, kept.sum(dim=1))).tolist()
        self.shape = batch, max(counts)
        image = torch.arange(batch, device=token.device).unsqueeze(1)
        place = move_to_front(kept.flatten().unsqueeze(0)).squeeze(0)[: sum(listed)]  # (K,)
        self.image = image.expand(-1, num_tokens).flatten()[place]  # (K,)
        self.token = token.flatten()[place]  # (K,), into the image's tokens
        self.cluster = (image * self.shape[1] + cluster).flatten()[place]  # (K,), into all images' clusters
        every = torch.arange(batch * self.shape[1], device=token.device)
        self.first = torch.searchsorted(self.cluster, every)  # (batch M,), where each cluster begins in the list

        # So small that their exponentials need no shift.
        share = logits.flatten()[place].exp()
        total = share.new_zeros(len(every)).index_add(0, self.cluster, share)
        self.weights = share / total[self.cluster]
        self.padding_mask: Tensor | None = None
        if min(counts) < self.shape[1]:
            self.padding_mask = torch.arange(self.shape[1], device=token.device) >= num_clusters.unsqueeze(1)

    def pool(self, tokens: Tensor) -> Tensor:
        """As in `Clusters`."""
        batch, num_tokens = tokens.shape[:2]
        if batch > 1 and tokens.transpose(0, 1).is_contiguous():
            # Length first in memory: listed so, they need no copy.
            flat, token = tokens.transpose(0, 1).flatten(0, 1), self.token * batch + self.image
        else:
            flat, token = tokens.flatten(0, 1), self.image * num_tokens + self.token
        pooled = _RaggedSum.apply(flat, self.weights, token, self.cluster, self.first)
        return pooled.unflatten(0, self.shape).to(tokens.dtype)

    def pool_shared(self, values: Tensor, index: Tensor) -> Tensor:
        """As in `Clusters`, without laying the values out for every token."""
        num_values = values.shape[1]
        slot = self.cluster * num_values + index[self.token]  # (K,)
        shares = self.weights.new_zeros(self.shape[0] * self.shape[1] * num_values).index_add(0, slot, self.weights)
        shares = shares.view(*self.shape, num_values)
        return (shares @ values.to(shares.dtype)).to(values.dtype)

    def sizes(self) -> Tensor:
        """As in `Clusters`."""
        return torch.bincount(self.cluster, minlength=self.shape[0] * self.shape[1]).view(self.shape)

    def assignment(self, num_tokens: int) -> Tensor:
        """As in `Clusters`."""
        clusters = torch.full((self.shape[0], num_tokens), -1, device=self.cluster.device)
        clusters[self.image, self.token] = self.cluster % self.shape[1]
        return clusters


class TracedRaggedClusters:
    """`RaggedClusters` in a traced graph: one entry a token, with one more cluster for tokens that are in none.

    Args:
        logits, token, cluster, kept, num_clusters: as in `RaggedClusters`.

    Attributes:
        padding_mask: bool (batch, M), True where an image has no such cluster.
    """

    def __init__(self, logits: Tensor, token: Tensor, cluster: Tensor, kept: Tensor, num_clusters: Tensor):
        batch, num_tokens = logits.shape
        most = size_from_data(num_clusters.max(), num_tokens)
        self.shape = batch, most
        image = torch.arange(batch, device=token.device).unsqueeze(1)
        # Those in none go behind all images' clusters.
        cluster = (image * most + cluster).where(kept, batch * most)
        self.cluster = torch.zeros_like(token).scatter(1, token, cluster).flatten()  # (batch N,)
        share = torch.zeros_like(logits).scatter(1, token, logits).exp()  # (batch, N)
        total = self.add_up(share.flatten())  # (batch M + 1,)
        self.weights = share / total.index_select(0, self.cluster).view_as(share)  # (batch, N)
        self.padding_mask = torch.arange(most, device=token.device) >= num_clusters.unsqueeze(1)

    def add_up(self, listed: Tensor) -> Tensor:
        """The sums over each cluster's part of all images' tokens (batch N, ...): (batch M + 1, ...)."""
        batch, most = self.shape
        return listed.new_zeros(batch * most + 1, *listed.shape[1:]).index_add(0, self.cluster, listed)

    def pool(self, tokens: Tensor) -> Tensor:
        """As in `Clusters`."""
        weighted = tokens.to(self.weights.dtype) * self.weights.unsqueeze(-1)
        return self.add_up(weighted.flatten(0, 1))[:-1].unflatten(0, self.shape).to(tokens.dtype)

    def pool_shared(self, values: Tensor, index: Tensor) -> Tensor:
        """As in `Clusters`, but laid out for every token."""
        return self.pool(values.index_select(1, index))

    def sizes(self) -> Tensor:
        """As in `Clusters`."""
        return self.add_up(torch.ones_like(self.cluster))[:-1].view(self.shape)

    def assignment(self, num_tokens: int) -> Tensor:
        """As in `Clusters`."""
        batch, most = self.shape
        cluster = self.cluster.view(batch, num_tokens)
        return torch.where(cluster == batch * most, -1, cluster % most)


class _RaggedSum(torch.autograd.Function):
    """`out[cluster[i]] += weights[i] tokens[token[i]]`, for clusters that are listed in order.

    An embedding bag, which holds no product of weights and tokens; its own backward pass would sort the list again.
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
        # In parts, so that no intermediate has the size of the tokens.
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


def move_to_front(wanted: Tensor) -> Tensor:
    """An order (batch, N) of the places in which the wanted ones, bool (batch, N), come first, else as they were."""
    front = wanted.cumsum(dim=1)
    behind = front[:, -1:] + wanted.logical_not().cumsum(dim=1)
    target = front.where(wanted, behind) - 1  # (batch, N), where each place goes
    place = torch.arange(wanted.shape[1], device=wanted.device).expand_as(target)
    return torch.zeros_like(target).scatter(1, target, place)
