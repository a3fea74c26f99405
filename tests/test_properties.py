"""Properties of boxes, matching, batches, augmentation and clustering, tested on random examples."""

import itertools

import pytest
import torch
import torchvision.ops
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torchvision import tv_tensors

from enact_common import nested_tensor_from_tensor_list
from enact_common.attention.clustering import CLUSTERS, EQUAL, REGIONS, WINDOWS, EntropyClustering, equal_information
from enact_common.attention.clusters import default_budget
from enact_common.boxes import (
    box_cxcywh_to_xyxy,
    box_xyxy_to_cxcywh,
    boxes_at_points,
    generalized_box_iou,
    paired_box_giou,
)
from enact_common.data.coco import seeded
from enact_common.data.transforms import eval_transforms, train_transforms
from enact_common.models.matcher import HungarianMatcher, focal_class_cost, softmax_class_cost

# The same examples in every run, whatever `--hypothesis-seed` is.
few = settings(deadline=None, derandomize=True, max_examples=40)
seeds = st.integers(0, 10**6)


# Boxes ---------------------------------------------------------------------------------------------------------------


def side(least: float):
    return st.floats(least, 1000, width=32)


# xyxy; the sides are long enough not to vanish in float32 at these positions.
box = st.tuples(side(-1000), side(-1000), side(0.5), side(0.5)).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))
boxes = st.lists(box, min_size=1, max_size=6).map(lambda rows: torch.tensor(rows, dtype=torch.float64))


@few
@given(boxes)
def test_box_conversions_are_inverse_to_each_other(boxes):
    assert_close(box_cxcywh_to_xyxy(box_xyxy_to_cxcywh(boxes)), boxes)
    assert_close(box_xyxy_to_cxcywh(box_cxcywh_to_xyxy(boxes.abs())), boxes.abs())


@few
@given(boxes, boxes)
def test_generalized_iou_is_symmetric_in_range_and_equals_torchvision(ours, others):
    giou = paired_box_giou(ours[:, None], others)  # (n, m)
    assert_close(giou, generalized_box_iou(ours, others))
    assert torch.equal(giou, paired_box_giou(others[:, None], ours).T)
    assert (giou > -1).all() and (giou <= 1 + 1e-12).all()
    assert (giou <= torchvision.ops.box_iou(ours, others) + 1e-12).all()
    assert_close(paired_box_giou(ours, ours), torch.ones(len(ours), dtype=torch.float64))
    loss = torchvision.ops.generalized_box_iou_loss(ours[:1].expand_as(others), others, eps=0)
    assert_close(1 - giou[0], loss)


@few
@given(boxes, boxes, st.floats(1e-3, 1e3), st.tuples(side(-1000), side(-1000)))
def test_generalized_iou_is_invariant_to_scale_and_shift(ours, others, scale, shift):
    shift = torch.tensor(shift * 2, dtype=torch.float64)
    moved = paired_box_giou(ours[:, None] * scale + shift, others * scale + shift)
    assert_close(moved, paired_box_giou(ours[:, None], others), rtol=1e-6, atol=1e-6)


@few
@given(st.lists(st.tuples(*[st.floats(0, 1)] * 2), min_size=1, max_size=5), st.floats(-1e4, 1e4), seeds)
def test_boxes_at_points_are_in_0_to_1_and_start_at_their_points(points, far, seed):
    points = torch.tensor(points)
    assert_close(boxes_at_points(points, torch.zeros(len(points), 4))[:, :2], points, atol=2e-5, rtol=0)
    offsets = torch.randn(len(points), 4, generator=torch.Generator().manual_seed(seed)) * far
    found = boxes_at_points(points, offsets)
    assert found.dtype == torch.float32 and (found >= 0).all() and (found <= 1).all()


# Matcher -------------------------------------------------------------------------------------------------------------

CLASSES = 4


@st.composite
def problems(draw, most_queries=6, most_objects=6):
    """A matcher, the outputs (batch, Q, ...) of one layer, and targets with zero or more objects."""
    weights = draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, 5.0]), min_size=3, max_size=3).filter(any))
    matcher = HungarianMatcher(*weights, draw(st.sampled_from([softmax_class_cost, focal_class_cost])))
    counts = draw(st.lists(st.integers(0, most_objects), min_size=1, max_size=3))
    queries = draw(st.integers(1, most_queries))
    torch.manual_seed(draw(seeds))
    outputs = {
        "pred_logits": torch.randn(len(counts), queries, CLASSES),
        "pred_boxes": torch.rand(len(counts), queries, 4) * 0.4 + 0.1,
    }
    targets = [{"labels": torch.randint(CLASSES, (n,)), "boxes": torch.rand(n, 4) * 0.4 + 0.1} for n in counts]
    return matcher, outputs, targets


def pair_costs(matcher, outputs, targets, i):
    """The costs (Q, n) of all queries and objects of image i, by their definition."""
    logits, predicted = outputs["pred_logits"][i], outputs["pred_boxes"][i]
    costs = torch.zeros(len(logits), len(targets[i]["labels"]))
    for j, (label, own) in enumerate(zip(targets[i]["labels"], targets[i]["boxes"], strict=True)):
        giou = generalized_box_iou(box_cxcywh_to_xyxy(predicted), box_cxcywh_to_xyxy(own[None]))[:, 0]
        distance = torch.cdist(predicted, own[None], p=1)[:, 0]
        costs[:, j] = matcher.cost_class * matcher.class_cost(logits)[:, label] + matcher.cost_bbox * distance
        costs[:, j] -= matcher.cost_giou * giou
    return costs


@few
@given(problems())
def test_matches_are_one_to_one_complete_and_of_least_cost(problem):
    matcher, outputs, targets = problem
    for i, (query, obj) in enumerate(matcher(outputs, targets)):
        costs = pair_costs(matcher, outputs, targets, i)
        pairs = min(costs.shape)
        assert len(query) == len(obj) == pairs
        assert len(set(query.tolist())) == len(set(obj.tolist())) == pairs
        assert not pairs or (query.max() < costs.shape[0] and obj.max() < costs.shape[1])
        scarce = (costs if costs.shape[0] == pairs else costs.T).tolist()  # rows: the smaller set
        choices = itertools.permutations(range(max(costs.shape)), pairs)
        best = min(sum(row[other] for row, other in zip(scarce, chosen, strict=True)) for chosen in choices)
        assert costs[query, obj].sum().item() == pytest.approx(best, rel=1e-4, abs=1e-4)


@few
@given(problems(most_queries=12, most_objects=20), seeds)
def test_the_order_of_queries_and_objects_does_not_matter(problem, seed):
    matcher, outputs, targets = problem
    # With only the class cost, objects of one class tie.
    assume(matcher.cost_bbox or matcher.cost_giou)
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randperm(outputs["pred_logits"].shape[1], generator=generator)
    orders = [torch.randperm(len(target["labels"]), generator=generator) for target in targets]
    shuffled = [{key: value[o] for key, value in target.items()} for target, o in zip(targets, orders, strict=True)]
    moved = matcher({key: value[:, queries] for key, value in outputs.items()}, shuffled)
    for (query, obj), order, (new_query, new_obj) in zip(matcher(outputs, targets), orders, moved, strict=True):
        expected = set(zip(query.tolist(), obj.tolist(), strict=True))
        assert set(zip(queries[new_query].tolist(), order[new_obj].tolist(), strict=True)) == expected


# Batches -------------------------------------------------------------------------------------------------------------


@few
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=5),
    st.integers(1, 4),
    st.sampled_from([torch.uint8, torch.float32, torch.bfloat16]),
)
def test_padding_keeps_images_and_the_mask_marks_exactly_the_padding(sizes, channels, dtype):
    images = [torch.randint(1, 255, (channels, *size)).to(dtype) for size in sizes]
    batch = nested_tensor_from_tensor_list(images)
    height, width = (max(lengths) for lengths in zip(*sizes, strict=True))
    assert batch.tensors.shape == (len(sizes), channels, height, width) and batch.tensors.dtype == dtype
    assert batch.mask.shape == (len(sizes), height, width) and batch.mask.dtype == torch.bool
    for image, tensor, mask, (h, w) in zip(images, batch.tensors, batch.mask, sizes, strict=True):
        assert torch.equal(tensor[:, :h, :w], image)
        assert not mask[:h, :w].any() and mask.sum() == height * width - h * w
        assert (tensor[:, mask] == 0).all()


# Augmentation --------------------------------------------------------------------------------------------------------

# One colour per object. A mixture of a colour with black, as at a blurred edge, is within half of the distance of that
# colour or of no colour.
COLOURS = torch.tensor(
    [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255], [0, 255, 255], [255, 255, 255]]
)


def painted_image(height: int, width: int, rows: int, columns: int):
    """An image and target with one box per grid cell, at a random place and filled with its label's colour."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    corners = []
    for row, column in list(itertools.product(range(rows), range(columns)))[: len(COLOURS)]:
        edges = []
        for place, cells, length in ((column, columns, width), (row, rows, height)):
            low, high = length * place // cells + 1, length * (place + 1) // cells - 1
            first = int(torch.randint(low, high - 3, ()))
            edges.append((first, int(torch.randint(first + 3, high + 1, ()))))
        (left, right), (top, bottom) = edges
        image[:, top:bottom, left:right] = COLOURS[len(corners)].view(3, 1, 1)
        corners.append((left, top, right, bottom))
    boxes = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(height, width), dtype=torch.float32)
    return tv_tensors.Image(image), {"boxes": boxes, "labels": torch.arange(len(corners))}


# Tolerance in pixels between a box and the edge of its colour, which interpolation blurs.
SLACK = 1.5


def check_colours_are_in_their_boxes(image, target, objects: int) -> None:
    """Assert that each box encloses the pixels of its colour tightly, and that colours of dropped boxes are gone.

    Args:
        image: uint8 (3, h, w).
        target: `boxes` (n, 4) cxcywh in fractions of the image, and `labels` (n,).
        objects: number of objects before the augmentation.
    """
    height, width = image.shape[-2:]
    assert target["size"].tolist() == [height, width]
    kept = dict(zip(target["labels"].tolist(), box_cxcywh_to_xyxy(target["boxes"]), strict=True))
    for label in range(objects):
        rows, columns = torch.where(((image.int() - COLOURS[label].view(3, 1, 1)).abs() < 120).all(dim=0))
        if label not in kept:
            assert len(rows) == 0
            continue
        left, top, right, bottom = (kept[label] * torch.tensor([width, height, width, height])).tolist()
        assert -1e-3 < left < right < width + 1e-3 and -1e-3 < top < bottom < height + 1e-3
        if min(right - left, bottom - top) < 2 * SLACK:
            continue  # a thin box may have lost its colour to blurring
        edges = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
        assert_close(edges, torch.tensor([left, top, right, bottom]), atol=SLACK, rtol=0)


sizes = st.integers(60, 260)
grids = st.tuples(st.integers(1, 3), st.integers(1, 3))


@few
@given(sizes, sizes, grids, seeds)
def test_boxes_stay_with_their_pixels_through_the_augmentation(height, width, grid, seed):
    transform = train_transforms([96, 128, 160], 200)
    torch.manual_seed(seed)
    image, target = painted_image(height, width, *grid)
    objects, most = len(target["labels"]), 0
    for draw in range(4):
        with seeded(seed, draw):
            output, found = transform(image, target)
        assert type(output) is torch.Tensor and output.dtype == torch.uint8
        # Rounding the shorter side can make the longer one slightly exceed its limit.
        assert min(output.shape[-2:]) in (96, 128, 160) or max(output.shape[-2:]) <= 205
        check_colours_are_in_their_boxes(output, found, objects)
        most = max(most, len(found["labels"]))
    assert most


@few
@given(sizes, sizes, grids, st.integers(40, 300), seeds)
def test_boxes_stay_with_their_pixels_through_the_resize_of_an_evaluation(height, width, grid, size, seed):
    torch.manual_seed(seed)
    image, target = painted_image(height, width, *grid)
    output, found = eval_transforms(size, 320)(image, target)
    assert min(output.shape[-2:]) == size or max(output.shape[-2:]) in range(316, 325)
    assert torch.equal(found["labels"], target["labels"])
    check_colours_are_in_their_boxes(output, found, len(target["labels"]))


def test_augmentation_crops_flips_and_drops():
    """Crops, flips and dropped boxes do occur, so the tests above cover them."""
    torch.manual_seed(0)
    image, target = painted_image(200, 260, 3, 3)
    transform, counts, flipped = train_transforms([96, 128, 160], 200), set(), set()
    for draw in range(40):
        with seeded(draw):
            _, found = transform(image, target)
        counts.add(len(found["labels"]))
        centre = dict(zip(found["labels"].tolist(), found["boxes"][:, 0].tolist(), strict=True))
        if 0 in centre and 2 in centre:
            flipped.add(centre[0] > centre[2])
    assert len(counts) > 2 and max(counts) == len(COLOURS) and flipped == {False, True}


# Clustering ----------------------------------------------------------------------------------------------------------

combinations = st.fixed_dictionaries(
    {
        "clusters": st.sampled_from(CLUSTERS),
        "per_image": st.booleans(),
        "mask_padding": st.booleans(),
        "max_clusters": st.sampled_from([None, 1, 2, 7, 1000]),
        "temperature": st.sampled_from([None, 0.1, 1.0]),
    }
)


@st.composite
def clusterings(draw, settings=combinations):
    """A layer, tokens (batch, N, 4) and their padding mask, bool (batch, N); whole images may be padding."""
    layer_settings, sigma = draw(settings), draw(st.sampled_from([0.5, 1.0, 1.5, 3.0]))
    batch, num_tokens = draw(st.integers(1, 4)), draw(st.integers(1, 70))
    torch.manual_seed(draw(seeds))
    layer = EntropyClustering(4, sigma, **layer_settings)
    padded = torch.rand(batch, num_tokens) < torch.rand(batch, 1) * draw(st.sampled_from([0.0, 1.0, 2.0]))
    return layer, torch.randn(batch, num_tokens, 4), padded


@settings(few, max_examples=100)
@given(clusterings())
def test_clusters_partition_the_tokens_and_their_weights_sum_to_one(drawn):
    layer, tokens, padded = drawn
    batch, num_tokens = tokens.shape[:2]
    clusters = layer.cluster(tokens, padded)
    # Pooling one-hot tokens gives the pooling weight of each token in each cluster.
    weights = clusters.pool(torch.eye(num_tokens).expand(batch, -1, -1))  # (batch, M, N)
    kept = weights > 0
    assert 1 <= weights.shape[1] <= num_tokens
    assert layer.max_clusters is None or weights.shape[1] <= layer.max_clusters
    absent = torch.zeros(weights.shape[:2], dtype=torch.bool)
    absent = absent if clusters.padding_mask is None else clusters.padding_mask
    present = torch.ones(batch, num_tokens, dtype=torch.bool) if not layer.mask_padding else ~padded
    for i in range(batch):
        if not present[i].any():
            assert not kept[i].any()
            continue
        assert_close(weights[i].sum(dim=1), (~absent[i]).float())
        # A token is in at most one cluster, and padding in none.
        assert (kept[i].sum(dim=0) <= present[i]).all()
        # Clusters follow the order of the tokens.
        order = kept[i].to(torch.uint8).argmax(dim=0)[kept[i].any(dim=0)]
        assert (order.diff() >= 0).all() and (order.diff() <= 1).all()
        if layer.clusters in (REGIONS, EQUAL):
            assert torch.equal(kept[i].any(dim=0), present[i])
        if layer.clusters == EQUAL:
            wanted = layer.max_clusters or default_budget(int(present[i].sum()))
            assert (~absent[i]).sum() == min(wanted, int(present[i].sum()))
        if layer.clusters == WINDOWS:
            # Windows have equal lengths; fewer tokens than one window are left over at the ends.
            lengths = kept[i].sum(dim=1)[~absent[i]]
            assert (lengths == lengths[0]).all() and present[i].sum() - lengths.sum() < lengths[0]


@few
@given(clusterings(), st.floats(-100, 100))
def test_pooling_keeps_constants_and_stays_in_the_range_of_the_tokens(drawn, constant):
    layer, tokens, padded = drawn
    clusters = layer.cluster(tokens, padded)
    pooled = layer(tokens, torch.full((*tokens.shape[:2], 2), constant), key_padding_mask=padded)
    present = torch.ones(len(tokens), pooled[0].shape[1], dtype=torch.bool)
    present = present if clusters.padding_mask is None else ~clusters.padding_mask
    if layer.mask_padding:
        # An image that is all padding has one empty cluster.
        present = present & ~padded.all(dim=1, keepdim=True)
    assert_close(pooled[1], constant * present.float().unsqueeze(-1).expand_as(pooled[1]))
    assert (pooled[0][~present] == 0).all()
    for own, there, whole in zip(pooled[0], present, tokens, strict=True):
        assert (own[there] <= whole.amax(dim=0) + 1e-6).all() and (own[there] >= whole.amin(dim=0) - 1e-6).all()


@few
@given(clusterings(combinations.map(lambda c: {**c, "mask_padding": True})), st.sampled_from([1.0, 1e4, float("nan")]))
def test_masked_padding_never_contributes(drawn, value):
    layer, tokens, padded = drawn
    expected = layer(tokens, key_padding_mask=padded)[0]
    assert expected.isfinite().all()
    other = torch.where(padded.unsqueeze(-1), value * torch.randn_like(tokens), tokens).requires_grad_()
    pooled = layer(other, key_padding_mask=padded)[0]
    assert torch.equal(pooled, expected)
    if value == value:
        pooled.square().sum().backward()
        assert (other.grad[padded] == 0).all()


@few
@given(st.integers(1, 3), st.integers(1, 90), st.integers(1, 90), st.sampled_from([0.0, 1.0, 6.0]), seeds)
def test_clusters_of_equal_information_differ_by_less_than_one_token(batch, num_tokens, count, spread, seed):
    """As long as no token has more than a cluster's share; else clusters still have one token at least."""
    torch.manual_seed(seed)
    information = (spread * torch.randn(batch, num_tokens)).exp()
    tokens = torch.randint(1, num_tokens + 1, (batch,))
    information *= torch.arange(num_tokens) < tokens.unsqueeze(1)
    counts = tokens.clamp(max=count)
    clusters = equal_information(information, tokens, counts)
    for own, cluster, length, number in zip(information, clusters, tokens, counts, strict=True):
        sizes = torch.bincount(cluster[:length], minlength=number)
        assert len(sizes) == number and (sizes > 0).all() and (cluster.diff() >= 0).all()
        assert (cluster[length:] == number - 1).all()
        share = own.sum() / number
        if own.max() <= share:
            masses = own.new_zeros(number).index_add(0, cluster, own)
            assert ((masses - share).abs() <= own.max() * (1 + 1e-4)).all()


independent = combinations.map(
    lambda c: {**c, "mask_padding": True, "per_image": c["per_image"] or c["clusters"] == "windows"}
)


@few
@given(clusterings(independent))
def test_with_independent_images_the_order_of_the_batch_does_not_matter(drawn):
    layer, tokens, padded = drawn
    order = torch.randperm(len(tokens))
    shuffled = layer(tokens[order], key_padding_mask=padded[order])[0]
    assert_close(shuffled, layer(tokens, key_padding_mask=padded)[0][order])


@pytest.mark.parametrize("clusters", CLUSTERS)
def test_one_image_of_every_length_is_clustered(clusters):
    """Tries every number of tokens from 1 to 39."""
    layer = EntropyClustering(4, 1.0, clusters=clusters, per_image=True, mask_padding=True, max_clusters=5)
    for num_tokens in range(1, 40):
        pooled, ones = layer(torch.randn(1, num_tokens, 4), torch.ones(1, num_tokens, 1))
        assert 1 <= pooled.shape[1] <= 5
        assert_close(ones, torch.ones_like(ones))
