"""Matching and losses, on cases computed by hand."""

import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import assert_close

from enact_common.boxes import (
    box_cxcywh_to_xyxy,
    box_xyxy_to_cxcywh,
    boxes_at_points,
    generalized_box_iou,
    paired_box_giou,
)
from enact_common.models.criterion import FocalClassLoss, SetCriterion, SoftmaxClassLoss, build_weights
from enact_common.models.matcher import HungarianMatcher, focal_class_cost, warn_of_costs

# Boxes in xyxy: a square, the square shifted by half its width, and one far away.
SQUARE, SHIFTED, AWAY = [0.0, 0.0, 2.0, 2.0], [1.0, 0.0, 3.0, 2.0], [4.0, 0.0, 6.0, 2.0]


def test_generalized_iou_by_hand():
    boxes = torch.tensor([SQUARE, SHIFTED, AWAY])
    giou = paired_box_giou(boxes[:, None], boxes[None])
    # SQUARE, SHIFTED: overlap 2, union 6, hull 6. SQUARE, AWAY: union 8, hull 12. SHIFTED, AWAY: union 8, hull 10.
    assert_close(giou, [[1, 1 / 3, -1 / 3], [1 / 3, 1, 0 - 2 / 10], [-1 / 3, -2 / 10, 1]], 1e-6)
    assert_close(giou, generalized_box_iou(boxes, boxes), 1e-6)


def test_box_formats_convert_and_back():
    boxes = torch.tensor([[0.5, 0.25, 0.2, 0.5]])
    assert_close(box_cxcywh_to_xyxy(boxes), [[0.4, 0.0, 0.6, 0.5]], 1e-6)
    assert_close(box_xyxy_to_cxcywh(box_cxcywh_to_xyxy(boxes)), boxes, 1e-6)


def target(labels, boxes):
    """The target of one image."""
    return {
        "labels": torch.tensor(labels, dtype=torch.int64),
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
    }


LEFT, RIGHT = [0.25, 0.5, 0.2, 0.2], [0.75, 0.5, 0.2, 0.2]


def predictions(boxes, labels=None, classes=3, certainty=5.0):
    """Outputs for one image; the logits predict `labels`, or "no object" (the last class) if they are None."""
    logits = torch.zeros(1, len(boxes), classes + 1)
    for i, label in enumerate(labels or [classes] * len(boxes)):
        logits[0, i, label] = certainty
    return {"pred_logits": logits, "pred_boxes": torch.tensor([boxes])}


def test_each_object_gets_the_nearest_query():
    outputs = predictions([RIGHT, [0.5, 0.5, 0.9, 0.9], LEFT])
    ((queries, objects),) = HungarianMatcher(1, 5, 2)(outputs, [target([0, 1], [LEFT, RIGHT])])
    assert dict(zip(queries.tolist(), objects.tolist(), strict=True)) == {2: 0, 0: 1}
    assert queries.dtype == objects.dtype == torch.int64


def test_the_class_decides_between_equal_boxes():
    outputs = predictions([LEFT, LEFT], labels=[2, 1])
    ((queries, objects),) = HungarianMatcher(1, 5, 2)(outputs, [target([1, 2], [LEFT, LEFT])])
    assert dict(zip(queries.tolist(), objects.tolist(), strict=True)) == {0: 1, 1: 0}


def test_the_matching_minimizes_the_sum_of_costs():
    # Distances to (0.1, 0.2): query 0 is 0.1 and 0.05 away, query 1 is 0.3 and 0.25.
    outputs = predictions([[0.15, 0.5, 0.1, 0.1], [0.4, 0.5, 0.1, 0.1]])
    objects = target([0, 0], [[0.2, 0.5, 0.1, 0.1], [0.1, 0.5, 0.1, 0.1]])
    ((queries, matched),) = HungarianMatcher(0, 1, 0)(outputs, [objects])
    assert dict(zip(queries.tolist(), matched.tolist(), strict=True)) in ({0: 1, 1: 0}, {0: 0, 1: 1})
    cost = (outputs["pred_boxes"][0, queries, 0] - objects["boxes"][matched, 0]).abs().sum().item()
    assert cost == pytest.approx(0.25)


def test_with_more_objects_than_queries_each_query_matches_one_object():
    boxes = [LEFT, RIGHT, [0.5, 0.1, 0.1, 0.1]]
    ((queries, objects),) = HungarianMatcher(1, 5, 2)(predictions([RIGHT]), [target([0, 1, 2], boxes)])
    assert queries.tolist() == [0] and objects.tolist() == [1]


def test_images_without_objects_match_nothing():
    outputs = {k: v.expand(3, -1, -1) for k, v in predictions([LEFT, RIGHT]).items()}
    targets = [target([], []), target([1], [RIGHT]), target([], [])]
    matched = HungarianMatcher(1, 5, 2)(outputs, targets)
    assert [len(queries) for queries, _ in matched] == [0, 1, 0]
    assert matched[1][0].tolist() == [1]


def test_all_layers_are_matched_as_one_layer_at_a_time():
    torch.manual_seed(2)
    logits, boxes = torch.randn(3, 2, 7, 5), torch.rand(3, 2, 7, 4) * 0.4 + 0.1
    targets = [target([0, 3], torch.rand(2, 4).tolist()), target([1, 2, 2], torch.rand(3, 4).tolist())]
    matcher = HungarianMatcher(1, 5, 2)
    together = matcher.match_layers(logits, boxes, targets)
    assert together.image.tolist() == [0, 0, 1, 1, 1]
    for layer in range(3):
        alone = matcher({"pred_logits": logits[layer], "pred_boxes": boxes[layer]}, targets)
        assert together.query[layer].tolist() == torch.cat([q for q, _ in alone]).tolist()
        assert together.target[layer].tolist() == torch.cat([alone[0][1], alone[1][1] + 2]).tolist()


@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
def test_costs_that_are_not_finite_are_replaced_and_warned_about_once(fault, caplog):
    outputs, objects = predictions([LEFT, RIGHT, RIGHT]), [target([0, 1], [LEFT, RIGHT])]
    warn_of_costs.cache_clear()
    HungarianMatcher(1, 5, 2)(outputs, objects)
    assert not caplog.records
    outputs["pred_boxes"][0, 1] = fault
    for _ in range(3):
        ((queries, matched),) = HungarianMatcher(1, 5, 2)(outputs, objects)
        assert queries.tolist() == [0, 2] and matched.tolist() == [0, 1]
    (record,) = caplog.records
    assert record.name == "enact" and record.levelname == "WARNING"
    assert "costs are not finite" in record.getMessage() and "\n" not in record.getMessage()


def test_an_infinitely_low_class_cost_wins_no_match():
    outputs, objects = predictions([LEFT, LEFT]), [target([0], [LEFT])]
    matcher = HungarianMatcher(1, 0, 0, class_cost=lambda logits: logits)
    outputs["pred_logits"][0, 0, 0] = -math.inf
    assert matcher(outputs, objects)[0][0].tolist() == [1]


def test_matching_without_any_cost_is_refused():
    with pytest.raises(ValueError, match="--set_cost_class"):
        HungarianMatcher(0, 0, 0)


def weights(cls, layers, aux_loss=True):
    """Loss weights, with the published weights for boxes."""
    return build_weights(Namespace(bbox_loss_coef=5, giou_loss_coef=2, dec_layers=layers, aux_loss=aux_loss), cls)


def criterion(eos_coef=0.1, classes=3):
    """DETR's criterion and loss weights."""
    class_loss = SoftmaxClassLoss(classes, eos_coef)
    return SetCriterion(classes, HungarianMatcher(1, 5, 2), weights(1, layers=1), class_loss)


def focal_criterion(classes=3):
    """Conditional DETR's criterion and loss weights."""
    matcher = HungarianMatcher(2, 5, 2, focal_class_cost)
    return SetCriterion(classes, matcher, weights(2, layers=2), FocalClassLoss(0.25))


def test_losses_by_hand():
    outputs = predictions([[0.3, 0.5, 0.2, 0.2], RIGHT], labels=[1, 3], certainty=2.0)
    losses = criterion()(outputs, [target([1], [LEFT])])
    # Both queries are right and have the same loss, -log(e^2 / (e^2 + 3)), so class weights cancel.
    assert losses["loss_ce"].item() == pytest.approx(-math.log(math.e**2 / (math.e**2 + 3)), rel=1e-5)
    assert losses["loss_bbox"].item() == pytest.approx(0.05, rel=1e-4)
    # Overlap 0.15 x 0.2, union 0.05; the hull equals the union.
    assert losses["loss_giou"].item() == pytest.approx(1 - 0.03 / 0.05, rel=1e-4)
    assert losses["class_error"].item() == 0
    assert losses["cardinality_error"].item() == 0
    total = losses["loss_ce"] + 5 * losses["loss_bbox"] + 2 * losses["loss_giou"]
    assert criterion().total(losses).item() == pytest.approx(total.item())


def test_no_object_is_weighted_by_eos_coef():
    # Query 0 predicts the object's class; query 1 predicts class 0 where there is no object.
    outputs = predictions([LEFT, RIGHT], labels=[1, 0], certainty=2.0)
    z = math.log(math.e**2 + 3)
    right, wrong = z - 2, z
    for eos in (1.0, 0.1):
        loss = criterion(eos)(outputs, [target([1], [LEFT])])["loss_ce"].item()
        assert loss == pytest.approx((right + eos * wrong) / (1 + eos), rel=1e-5)


def test_box_losses_are_averaged_over_the_objects_of_the_batch():
    outputs = {k: v.expand(2, -1, -1) for k, v in predictions([LEFT, RIGHT]).items()}
    shifted = [LEFT[0] + 0.1, *LEFT[1:]]
    losses = criterion()(outputs, [target([0], [shifted]), target([0, 1], [LEFT, RIGHT])])
    assert losses["loss_bbox"].item() == pytest.approx(0.1 / 3, rel=1e-4)


def test_a_batch_without_objects_has_losses_and_gradients():
    outputs = {name: value.requires_grad_() for name, value in predictions([LEFT, RIGHT]).items()}
    losses = criterion()(outputs, [target([], [])])
    assert losses["loss_bbox"].item() == losses["loss_giou"].item() == 0
    assert losses["class_error"].item() == 100
    criterion().total(losses).backward()
    assert torch.isfinite(outputs["pred_boxes"].grad).all() and outputs["pred_logits"].grad.abs().sum() > 0


def test_class_error_counts_matched_queries_of_the_last_layer():
    outputs = predictions([LEFT, RIGHT], labels=[1, 2])
    outputs["aux_outputs"] = [predictions([LEFT, RIGHT], labels=[0, 0])]
    losses = criterion()(outputs, [target([1, 0], [LEFT, RIGHT])])
    assert losses["class_error"].item() == 50
    assert "class_error_0" not in losses and "loss_ce_0" in losses


def test_losses_are_float32_under_autocast():
    outputs = {name: value.bfloat16() for name, value in predictions([LEFT, RIGHT]).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = criterion()(outputs, [target([1], [LEFT])])
    assert {value.dtype for value in losses.values()} == {torch.float32}


def test_the_gradient_of_paired_giou_is_right_and_finite():
    boxes = torch.tensor([SQUARE, SHIFTED], dtype=torch.float64, requires_grad=True)
    others = torch.tensor([[0.3, 0.1, 1.7, 2.2], [3.3, 0.2, 4.0, 1.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(paired_box_giou, (boxes, others))
    assert np.isfinite(paired_box_giou(boxes, others).detach().numpy()).all()


def test_focal_loss_by_hand():
    # Query 0: probability 0.9 for its object's class, 0.5 for the others. Query 1: 0.1 for every class.
    rare, even = math.log(0.1 / 0.9), 0.0
    outputs = {
        "pred_logits": torch.tensor([[[even, -rare, even], [rare, rare, rare]]]),
        "pred_boxes": torch.tensor([[LEFT, RIGHT]]),
    }
    losses = focal_criterion()(outputs, [target([1], [LEFT])])
    present = 0.25 * 0.1**2 * -math.log(0.9)
    absent = 0.75 * (2 * 0.5**2 * -math.log(0.5) + 3 * 0.1**2 * -math.log(0.9))
    assert losses["loss_ce"].item() == pytest.approx(present + absent, rel=1e-5)
    assert losses["class_error"].item() == 0
    # Only query 0 has a class above 0.5, and there is one object.
    assert losses["cardinality_error"].item() == 0


def test_focal_loss_is_averaged_over_objects():
    outputs = predictions([LEFT, RIGHT], labels=[1, 2])
    outputs["pred_logits"] = outputs["pred_logits"][..., :3]
    twice = {name: value.repeat(2, 1, 1) for name, value in outputs.items()}
    objects = target([1, 2], [LEFT, RIGHT])
    one, two = focal_criterion()(outputs, [objects]), focal_criterion()(twice, [objects, objects])
    assert one["loss_ce"].item() == pytest.approx(two["loss_ce"].item())
    without = focal_criterion()(outputs, [target([], [])])["loss_ce"].item()
    # Without objects the divisor is 1, and both confident labels are wrong.
    assert without > one["loss_ce"].item() * 2


def test_focal_cost_is_the_change_of_the_loss_by_a_match():
    logits = torch.tensor([-3.0, 0.0, 2.0])
    p = logits.sigmoid()
    present, absent = -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log()
    assert_close(focal_class_cost(logits), present - absent, 1e-5)
    # A higher probability makes the match cheaper.
    assert focal_class_cost(logits).diff().lt(0).all()


def test_loss_weights_cover_every_supervised_layer():
    last = {"loss_ce": 3, "loss_bbox": 5, "loss_giou": 2}
    assert weights(3, layers=3) == {
        **last,
        **{"loss_ce_0": 3, "loss_bbox_0": 5, "loss_giou_0": 2},
        **{"loss_ce_1": 3, "loss_bbox_1": 5, "loss_giou_1": 2},
    }
    assert weights(3, layers=3, aux_loss=False) == last


def test_boxes_at_points_by_hand():
    points = torch.tensor([[0.25, 0.8], [0.0, 1.0]])
    offsets = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, math.log(3), 0.0]])
    boxes = boxes_at_points(points, offsets)
    # A point on the border stays there: the inverse sigmoid does not become infinite.
    assert_close(boxes, [[0.25, 0.8, 0.5, 0.5], [0.0, 1.0, 0.75, 0.5]], 2e-5)
    assert boxes_at_points(points, offsets.bfloat16()).dtype == torch.float32
