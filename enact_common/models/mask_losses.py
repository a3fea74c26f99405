"""Mask losses: focal and dice, as in DETR's segmentation."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from enact_common.models.criterion import SetCriterion
from enact_common.models.matcher import Matches
from enact_common.models.segmentation import FULL_SIZE_CHUNK
from enact_common.utils.acceleration import recompute_in_backward

# Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017.
ALPHA, GAMMA = 0.25, 2.0


class MaskCriterion(SetCriterion):
    """A `SetCriterion` with DETR's losses, plus a focal loss and a dice loss on the masks of matched queries."""

    def last_layer_losses(
        self, outputs: dict, targets: list[dict[str, Tensor]], matches: Matches, objects: Tensor
    ) -> dict[str, Tensor]:
        """Return `loss_mask` and `loss_dice`, divided by the number of objects in the batch.

        Targets have `masks` bool (n, h, w) at the image's size without padding.
        """
        query = matches.query[-1]
        if "query_masks" in outputs:
            logits = outputs["query_masks"].select(matches.image, query)
        else:
            logits = outputs["pred_masks"][matches.image, query]
        target_masks = padded_masks([target["masks"] for target in targets]).to(logits.device)[matches.target[-1]]
        losses = mask_losses(logits, target_masks)
        return {name: values.sum() / objects for name, values in losses.items()}


def padded_masks(masks: Sequence[Tensor]) -> Tensor:
    """Concatenate and pad the masks of a batch's images, bool (n, h, w) each: bool (objects, H, W)."""
    height, width = (max(mask.shape[axis] for mask in masks) for axis in (1, 2))
    padded = masks[0].new_zeros(sum(len(mask) for mask in masks), height, width)
    for part, mask in zip(padded.split([len(mask) for mask in masks]), masks, strict=True):
        part[:, : mask.shape[1], : mask.shape[2]] = mask
    return padded


def mask_losses(logits: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """Return per-mask losses: `loss_mask`, the focal loss's mean over the pixels, and `loss_dice`, in [0, 1]: (n,)
    each.

    Logits (n, h', w') are resized to the masks bool (n, h, w), a few at a time, and again in the backward pass, to save
    memory.
    """
    chunk_losses = recompute_in_backward(full_size_losses) if torch.is_grad_enabled() else full_size_losses
    # Without objects there is one empty chunk, so the losses are empty tensors.
    chunks = zip(logits.split(FULL_SIZE_CHUNK), masks.split(FULL_SIZE_CHUNK), strict=True)
    parts = [chunk_losses(part, target) for part, target in chunks]
    focal, dice = (torch.cat(values) for values in zip(*parts, strict=True))
    return {"loss_mask": focal, "loss_dice": dice}


def full_size_losses(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Focal and dice loss, (n,) each, of logits (n, h', w') for masks (n, h, w)."""
    if not len(logits):
        # `F.interpolate` rejects empty input.
        return logits.sum(dim=(1, 2)), logits.sum(dim=(1, 2))
    logits = F.interpolate(logits.unsqueeze(1), size=masks.shape[-2:], mode="bilinear").flatten(1)
    masks = masks.flatten(1).float()
    focal = sigmoid_focal_loss(logits, masks, ALPHA, GAMMA, reduction="none").mean(dim=1)
    return focal, dice_loss(logits, masks)


def dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Return 1 - Dice coefficient (n,), in [0, 1], of logits and targets (n, pixels), smoothed by one pixel.

    Source: Milletari et al., "V-Net", 3DV 2016.
    """
    probability = logits.sigmoid()
    common = 2 * (probability * masks).sum(dim=1)
    return 1 - (common + 1) / (probability.sum(dim=1) + masks.sum(dim=1) + 1)
