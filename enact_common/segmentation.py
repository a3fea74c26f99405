"""Masks of the objects that DETR finds (Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020,
section 4.4 and appendix A.6): the mask head, its losses, and what becomes of its outputs.

Each query's attention to the encoder's memory is a coarse picture of where its object is. A convolutional head makes a
mask of it on a quarter of the image's size, step by step with the backbone's finer maps (a feature pyramid: Lin et al.,
CVPR 2017). The clustering of ENACT is the encoder's own: nothing here depends on it.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.ops import sigmoid_focal_loss

from enact_common.acceleration import Recomputed
from enact_common.criterion import SetCriterion
from enact_common.detector import Detector
from enact_common.matcher import Matches
from enact_common.nested_tensor import NestedTensor
from enact_common.recording import Scriptable, recording

# Queries whose masks are computed at a time: what bounds the head's memory, at 800 x 1333 pixels about 40 MB a query.
HEAD_CHUNK = 16

# Masks that are held at the image's size at a time.
FULL_SIZE_CHUNK = 8

# Group norm makes so many groups, where the channels can be divided by it.
GROUPS = 8

# Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017.
ALPHA, GAMMA = 0.25, 2.0


class AttentionMaps(nn.Module):
    """Multi-head attention without values: how much each query attends to each cell.

    The weights of all heads and cells of a query together are one softmax: a head whose query finds nothing can be
    dark.

    Args:
        d_model: channels d of queries and memory.
        nhead: heads.
    """

    def __init__(self, d_model: int, nhead: int):
        super().__init__()
        self.nhead = nhead
        self.q_linear = nn.Linear(d_model, d_model)
        self.k_linear = nn.Linear(d_model, d_model)
        for linear in (self.q_linear, self.k_linear):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, queries: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """The attention's weights.

        Args:
            queries: (batch, Q, d).
            memory: (batch, d, h, w).
            mask: bool (batch, h, w), True where padded: no query attends there.

        Returns:
            float32 (batch, Q, heads, h, w), in [0, 1]; those of a query add up to 1.
        """
        q = self.q_linear(queries).unflatten(-1, (self.nhead, -1))  # (batch, Q, heads, e)
        k = self.k_linear(memory.flatten(2).transpose(1, 2)).unflatten(-1, (self.nhead, -1))  # (batch, h w, heads, e)
        logits = torch.einsum("bqne,btne->bqnt", q * q.shape[-1] ** -0.5, k).float()
        logits = logits.masked_fill(mask.flatten(1)[:, None, None], -torch.inf)
        return logits.flatten(2).softmax(dim=-1).view(*logits.shape[:3], *mask.shape[1:])


class MaskHead(Recomputed):
    """Convolutions from a query's attention maps to its mask, up along the backbone's maps.

    Modifications:
        - convolutions add up, so what the first one makes of the image's own channels is computed once an image, not
          once a query: of 264 channels, 256;
        - group norms have fewer than eight groups where eight do not divide the channels, as in small models.

    Args:
        d_model: channels d of the map that went into the transformer.
        nhead: attention maps of a query.
        fpn_channels: of the backbone's maps that are added, from coarse to fine.
    """

    def __init__(self, d_model: int, nhead: int, fpn_channels: Sequence[int]):
        super().__init__()
        widths = [d_model + nhead, *(max(d_model // part, 1) for part in (2, 4, 8, 16))]
        inputs = [widths[0], *widths[:-1]]
        for number, (n, m) in enumerate(zip(inputs, widths, strict=True), start=1):
            setattr(self, f"lay{number}", nn.Conv2d(n, m, 3, padding=1))
            setattr(self, f"gn{number}", nn.GroupNorm(math.gcd(GROUPS, m), m))
        self.out_lay = nn.Conv2d(widths[-1], 1, 3, padding=1)
        for number, (channels, m) in enumerate(zip(fpn_channels, widths[1:], strict=False), start=1):
            setattr(self, f"adapter{number}", nn.Conv2d(channels, m, 1))
        self.d_model = d_model
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)

    def share(self, src: Tensor, fpns: Sequence[Tensor]) -> list[Tensor]:
        """What all queries of an image have in common: the first layer's part for src (batch, d, h, w), and the
        adapted maps, from coarse to fine."""
        first = F.conv2d(src, self.lay1.weight[:, : self.d_model], self.lay1.bias, padding=1)
        adapters = (self.adapter1, self.adapter2, self.adapter3)
        return [first, *(adapter(map_) for adapter, map_ in zip(adapters, fpns, strict=True))]

    def forward(self, maps: Tensor, image: Tensor, first: Tensor, *adapted: Tensor) -> Tensor:
        """Masks of some queries.

        Args:
            maps: (n, heads, h, w), the queries' attention.
            image: int64 (n,), the image of each.
            first, adapted: of `share`.

        Returns:
            logits (n, h', w'), of the size of the finest map.
        """
        # Attention maps are float32, whatever dtype the model was cast to.
        x = first[image] + F.conv2d(maps.to(first.dtype), self.lay1.weight[:, self.d_model :], padding=1)
        x = F.relu_(self.gn1(x))
        x = F.relu_(self.gn2(self.lay2(x)))
        stages = ((self.lay3, self.gn3), (self.lay4, self.gn4), (self.lay5, self.gn5))
        for (conv, norm), map_ in zip(stages, adapted, strict=True):
            x = F.interpolate(x, size=map_.shape[-2:]) + map_[image]
            x = F.relu_(norm(conv(x)))
        return self.out_lay(x).squeeze(1)


@dataclass
class QueryMasks:
    """The masks of all queries of a batch, computed for those that are asked for: in training, a few of them are.

    Attributes:
        head: makes masks.
        maps: (batch, Q, heads, h, w), attention maps.
        shared: of `MaskHead.share`.
        autocast: the lower precision that the model ran in; None for none.
    """

    head: MaskHead
    maps: Tensor
    shared: list[Tensor]
    autocast: torch.dtype | None

    def select(self, image: Tensor, query: Tensor) -> Tensor:
        """Logits of some queries' masks: int64 (n,) and (n,) to float32 (n, h', w').

        Of more than `HEAD_CHUNK` queries, the inside of the head is computed again in the backward pass, chunk by
        chunk.
        """
        chunks = list(zip(image.split(HEAD_CHUNK), query.split(HEAD_CHUNK), strict=True))
        run: Callable = self.head
        if len(chunks) > 1 and torch.is_grad_enabled() and not self.head.recompute:
            run = recomputed(self.head)
        with torch.autocast(self.maps.device.type, self.autocast, enabled=self.autocast is not None):
            masks = [run(self.maps[i, q], i, *self.shared) for i, q in chunks]
        return torch.cat(masks).float()

    def all(self) -> Tensor:
        """Logits of all queries' masks: float32 (batch, Q, h', w')."""
        batch, queries = self.maps.shape[:2]
        if recording():
            # As many steps for any batch: some queries of all images at a time.
            parts = [self.of_batch(maps) for maps in self.maps.split(HEAD_CHUNK, dim=1)]
            return torch.cat(parts, dim=1)
        image, query = (
            index.flatten()
            for index in torch.meshgrid(
                *(torch.arange(n, device=self.maps.device) for n in (batch, queries)), indexing="ij"
            )
        )
        return self.select(image, query).unflatten(0, (batch, queries))

    def of_batch(self, maps: Tensor) -> Tensor:
        """Logits float32 (batch, n, h', w') of n queries of each image, from their maps (batch, n, heads, h, w)."""
        batch, count = maps.shape[:2]
        image = torch.arange(batch, device=maps.device).unsqueeze(1).expand(batch, count).flatten()
        return self.head(maps.flatten(0, 1), image, *self.shared).unflatten(0, (batch, count)).float()


def recomputed(function: Callable) -> Callable:
    """The function, with what is inside of it computed again in the backward pass. It must not be random."""

    def run(*args):
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)

    return run


class DETRsegm(Scriptable):
    """A DETR with a mask head.

    Modifications:
        - in training, the masks of the matched queries alone are computed: the criterion asks for them;
        - a frozen detector is in evaluation mode, without dropout, so that the head learns from what it will get.

    Args:
        detr: the detector, whose backbone returns the maps of all four stages.
        nhead: heads of the attention that masks are made from.
        frozen: let the detector's weights be.
    """

    def __init__(self, detr: Detector, nhead: int, frozen: bool = False):
        super().__init__()
        self.detr = detr
        self.frozen = frozen
        if frozen:
            self.detr.requires_grad_(False)
        d_model, channels = detr.transformer.d_model, detr.backbone.num_channels
        self.bbox_attention = AttentionMaps(d_model, nhead)
        self.mask_head = MaskHead(d_model, nhead, [channels // 2, channels // 4, channels // 8])

    @property
    def num_queries(self) -> int:
        """Objects that can be found in one image."""
        return self.detr.num_queries

    @property
    def transformer(self) -> nn.Module:
        """The detector's."""
        return self.detr.transformer

    def train(self, mode: bool = True) -> "DETRsegm":
        super().train(mode)
        if self.frozen:
            self.detr.eval()
        return self

    def forward(self, samples: NestedTensor | list[Tensor] | Tensor) -> dict:
        """Detect.

        Args:
            samples: as a `Detector` takes them.

        Returns:
            what the detector returns, and of each query a mask of the padded batch's extent, on about a quarter of its
            height and width (h', w'): in evaluation mode `pred_masks` float32 (batch, Q, h', w'), before the sigmoid;
            in training `query_masks`, a `QueryMasks`, which computes those that it is asked for.
        """
        outputs, seen = self.detr.detect(samples)
        *finer, last = seen.features
        maps = self.bbox_attention(seen.decoded[-1], seen.memory, last.mask)
        shared = self.mask_head.share(seen.src, [map_.tensors for map_ in reversed(finer)])
        device = maps.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        masks = QueryMasks(self.mask_head, maps, shared, autocast)
        return outputs | ({"query_masks": masks} if self.training else {"pred_masks": masks.all()})


class MaskCriterion(SetCriterion):
    """DETR's losses, and on the masks of matched queries a focal loss and a dice loss.

    Arguments are those of `SetCriterion`.
    """

    def last_layer_losses(
        self, outputs: dict, targets: list[dict[str, Tensor]], matches: Matches, objects: Tensor
    ) -> dict[str, Tensor]:
        """`loss_mask` and `loss_dice`, over the objects of the batch.

        Args:
            outputs: of `DETRsegm`.
            targets: for each image, beside the rest, `masks` bool (n, h, w), of the image without its padding.
            matches: the last layer's are taken.
            objects: (), to divide by.
        """
        query = matches.query[-1]
        if "query_masks" in outputs:
            logits = outputs["query_masks"].select(matches.image, query)
        else:
            logits = outputs["pred_masks"][matches.image, query]
        wanted = padded_masks([target["masks"] for target in targets]).to(logits.device)[matches.target[-1]]
        losses = mask_losses(logits, wanted)
        return {name: values.sum() / objects for name, values in losses.items()}


def padded_masks(masks: Sequence[Tensor]) -> Tensor:
    """The masks of a batch's images, bool (n, h, w) each, laid end to end and padded: bool (objects, H, W)."""
    height, width = (max(mask.shape[axis] for mask in masks) for axis in (1, 2))
    padded = masks[0].new_zeros(sum(len(mask) for mask in masks), height, width)
    for part, mask in zip(padded.split([len(mask) for mask in masks]), masks, strict=True):
        part[:, : mask.shape[1], : mask.shape[2]] = mask
    return padded


def mask_losses(logits: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """The losses of single masks, brought to the size of what they shall be.

    A few masks are at that size at a time, and are brought there again in the backward pass.

    Args:
        logits: float32 (n, h', w').
        masks: bool (n, h, w).

    Returns:
        `loss_mask`, the mean over the pixels of the focal loss, and `loss_dice`, in [0, 1]: (n,) each.
    """
    of_chunk = recomputed(full_size_losses) if torch.is_grad_enabled() else full_size_losses
    # Without objects, one empty chunk: the losses are then empty, too.
    chunks = zip(logits.split(FULL_SIZE_CHUNK), masks.split(FULL_SIZE_CHUNK), strict=True)
    parts = [of_chunk(part, wanted) for part, wanted in chunks]
    focal, dice = (torch.cat(values) for values in zip(*parts, strict=True))
    return {"loss_mask": focal, "loss_dice": dice}


def full_size_losses(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Focal and dice loss, (n,) each, of logits (n, h', w') for masks (n, h, w)."""
    if not len(logits):
        # What interpolates does not take nothing.
        return logits.sum(dim=(1, 2)), logits.sum(dim=(1, 2))
    logits = F.interpolate(logits.unsqueeze(1), size=masks.shape[-2:], mode="bilinear").flatten(1)
    masks = masks.flatten(1).float()
    focal = sigmoid_focal_loss(logits, masks, ALPHA, GAMMA, reduction="none").mean(dim=1)
    return focal, dice_loss(logits, masks)


def dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """1 - Dice's coefficient of probability and truth (Milletari et al., "V-Net", 3DV 2016), smoothed by one pixel.

    Args:
        logits: (n, pixels), before the sigmoid.
        masks: (n, pixels), 0 or 1.

    Returns:
        (n,), in [0, 1].
    """
    probability = logits.sigmoid()
    common = 2 * (probability * masks).sum(dim=1)
    return 1 - (common + 1) / (probability.sum(dim=1) + masks.sum(dim=1) + 1)


def full_size_masks(
    logits: Tensor, padded: tuple[int, int], size: tuple[int, int], original: tuple[int, int]
) -> Iterator[Tensor]:
    """The masks of one image at the size that it was stored in, a few at a time.

    As in the original, masks are first brought to the size that the model saw, decided there, and then sampled.

    Args:
        logits: (n, h', w'), of the padded batch's extent.
        padded: (height, width) of the padded batch.
        size: (height, width) of the image in it.
        original: (height, width) that the masks shall have.

    Yields:
        bool, up to `FULL_SIZE_CHUNK` masks (..., height, width).
    """
    rows, columns = sampled(size, original, logits.device)
    for part in logits.split(FULL_SIZE_CHUNK):
        if len(part):
            seen = F.interpolate(part.unsqueeze(1).float(), size=padded, mode="bilinear").squeeze(1)
            yield seen[:, rows][:, :, columns] > 0


def sampled(
    size: tuple[int, int], wanted: tuple[int, int], device: torch.device, centred: bool = False
) -> tuple[Tensor, Tensor]:
    """The rows and columns that nearest-neighbour sampling takes: no more of a mask has to be decided.

    Args:
        size: (height, width) of what is sampled.
        wanted: (height, width) of the result.
        device: of the indices.
        centred: compare the middles of pixels, rather than their upper left corners.

    Returns:
        int64 (height,) and (width,).
    """
    return tuple(
        ((torch.arange(new, device=device) + centred * 0.5) * (old / new)).long().clamp(max=old - 1)
        for old, new in zip(size, wanted, strict=True)
    )


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """Masks bool (n, height, width) as COCO's run-length codes: dicts of `size` and `counts`, a text."""
    # pycocotools wants (height, width, n), the columns' pixels side by side.
    columns = np.asfortranarray(masks.permute(1, 2, 0).cpu().numpy().astype(np.uint8))
    return [{"size": list(code["size"]), "counts": code["counts"].decode()} for code in coco_mask.encode(columns)]


class PostProcessSegm(nn.Module):
    """Adds each query's mask to what `PostProcess` found."""

    @torch.no_grad()
    def forward(
        self, results: list[dict], outputs: dict[str, Tensor], sizes: Tensor, original_sizes: Tensor
    ) -> list[dict]:
        """Bring a batch's masks to the size of the original images, image by image.

        Args:
            results: of each image, `queries` among others.
            outputs: `pred_masks` (batch, Q, h', w'), before the sigmoid.
            sizes: int (batch, 2), (height, width) of each image as the model saw it. The batch is padded to the largest
                of each.
            original_sizes: int (batch, 2), (height, width) that the masks shall have.

        Returns:
            the results with `segmentations` each: the detections' masks as COCO's run-length codes, in their order.
        """
        padded = tuple(sizes.amax(dim=0).tolist())
        found = zip(results, outputs["pred_masks"], sizes.tolist(), original_sizes.tolist(), strict=True)
        return [
            {
                **result,
                "segmentations": [
                    code
                    for masks in full_size_masks(logits[result["queries"]], padded, tuple(size), tuple(original))
                    for code in encode_masks(masks)
                ],
            }
            for result, logits, size, original in found
        ]


class PostProcessPanoptic(nn.Module):
    """Lays the masks of all queries that are sure of a class over the image, so that each pixel has one segment.

    Each pixel goes to the query whose mask is likeliest there. Queries of the same stuff are one segment; segments that
    are too small are left out, and their pixels go to the next.

    Modifications:
        - an image is cut out of its padded batch before anything else; the original stretches its masks over the whole
          batch, which is the same for a batch of one;
        - where small segments are left out, queries of the same stuff stay together; the original takes the first of
          them alone, and hands the pixels of the others to whichever query is next;
        - where nothing is found, there is no segment, in place of one of class 1.

    Args:
        things: the labels of what can be counted; all others are stuff.
        threshold: least probability of a query's class, in [0, 1].
    """

    # Segments need more pixels than this.
    SMALL = 4
    # The least probability of the published evaluation.
    THRESHOLD = 0.85

    def __init__(self, things: Collection[int], threshold: float = THRESHOLD):
        super().__init__()
        self.things = frozenset(things)
        self.threshold = threshold

    @torch.no_grad()
    def forward(
        self, outputs: dict[str, Tensor], sizes: Tensor, original_sizes: Tensor | None = None
    ) -> list[dict[str, Any]]:
        """Decode a batch, image by image.

        Args:
            outputs: `pred_logits` (batch, Q, classes + 1), the last being no object; `pred_masks` (batch, Q, h', w').
            sizes: as for `PostProcessSegm`.
            original_sizes: likewise; None for `sizes`.

        Returns:
            for each image `id_map`, int64 (height, width) on the CPU, each pixel's segment, 0 for none; and `segments`,
            dicts of `id`, from 1; `category_id`, the label; `isthing`; `area` in pixels; and `score`, the likeliest
            query's, in [0, 1].
        """
        original_sizes = sizes if original_sizes is None else original_sizes
        padded = tuple(sizes.amax(dim=0).tolist())
        scores, labels = outputs["pred_logits"].float().softmax(dim=-1).max(dim=-1)  # (batch, Q) each
        sure = (scores > self.threshold) & (labels < outputs["pred_logits"].shape[-1] - 1)
        images = zip(scores, labels, sure, outputs["pred_masks"], sizes.tolist(), original_sizes.tolist(), strict=True)
        return [
            self.lay_out(score[kept], label[kept], masks[kept], padded, tuple(size), tuple(original))
            for score, label, kept, masks, size, original in images
        ]

    def lay_out(
        self,
        scores: Tensor,
        labels: Tensor,
        logits: Tensor,
        padded: tuple[int, int],
        size: tuple[int, int],
        original: tuple[int, int],
    ) -> dict[str, Any]:
        """One image's `id_map` and `segments`, from n queries' scores (n,), labels (n,) and masks (n, h', w')."""
        names = labels.tolist()
        # Of each query the segment that it belongs to, named by its first query.
        group = torch.tensor([i if label in self.things else names.index(label) for i, label in enumerate(names)])
        group = group.to(logits.device, torch.int64)
        kept = torch.arange(len(names), device=logits.device)
        while True:
            place = likeliest(logits[kept], padded, size, original)
            owner = group[kept][place] if len(kept) else place  # (height, width)
            area = torch.bincount(owner.flatten(), minlength=len(names) or 1)
            small = (area > 0) & (area <= self.SMALL)
            if not len(kept) or not small.any():
                break
            kept = kept[~small[group[kept]]]
        if not len(kept):
            return {"id_map": torch.zeros(original, dtype=torch.int64), "segments": []}
        present = area.nonzero().flatten()
        number = torch.zeros_like(area)
        number[present] = torch.arange(1, len(present) + 1, device=area.device)
        best = torch.zeros(len(names), device=scores.device).scatter_reduce(0, group, scores, "amax")
        segments = [
            {
                "id": i,
                "category_id": names[first],
                "isthing": names[first] in self.things,
                "area": pixels,
                "score": score,
            }
            for i, (first, pixels, score) in enumerate(
                zip(present.tolist(), area[present].tolist(), best[present].tolist(), strict=True), start=1
            )
        ]
        return {"id_map": number[owner].cpu(), "segments": segments}


def likeliest(logits: Tensor, padded: tuple[int, int], size: tuple[int, int], original: tuple[int, int]) -> Tensor:
    """Which mask is likeliest at each pixel of an image as it was stored, the first where several are.

    Args:
        logits: (n, h', w'), of the padded batch's extent.
        padded, size, original: as for `full_size_masks`.

    Returns:
        int64 (height, width), 0 where there is no mask.
    """
    rows, columns = sampled(size, original, logits.device, centred=True)
    place = torch.zeros(original, dtype=torch.int64, device=logits.device)
    highest = torch.full(original, -torch.inf, device=logits.device)
    for number, part in enumerate(logits.split(FULL_SIZE_CHUNK) if len(logits) else ()):
        seen = F.interpolate(part.unsqueeze(1).float(), size=padded, mode="bilinear").squeeze(1)
        value, index = seen[:, rows][:, :, columns].max(dim=0)
        place = torch.where(value > highest, index + number * FULL_SIZE_CHUNK, place)
        highest = torch.maximum(highest, value)
    return place
