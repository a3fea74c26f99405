"""Triton kernels that score, cluster and pool tokens: windows of one length, or clusters of equal information.

They compute what `..clustering` and `..clusters` compute in PyTorch, with the same formulas. Tokens are visited at
their places: row by row, or with a padding mask the tokens that are not padding first. All sums are float32 in a fixed
order, without atomics, so results repeat to the bit. Importing this file imports Triton.

The kernels run in this order, with a grid of (blocks of places, images) or (clusters, images):

    score         tokens to logits; the largest and the sum of exponentials of each block
    information   logits to smoothed information; sums, and the borders of regions, of each block
    equal_borders or window_length   where each cluster starts
    pool          keys and values to clusters
    weight_grad   gradients of the pooled tensors to those of the smoothed information
    prob_grad     to those of the probabilities
    token_grad    to those of the tokens, and of the scoring weights in each block

With `SIDES`, the tokens are the cells of a map whose columns have scores too. Instead of values, each cluster gets the
sum of its pooling weights in every column and every row of the map, which pool the positions of columns and rows.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# Places of a block, of the loops over a whole image, and of a mask's sum.
BLOCK, SCAN, MASK_SCAN = 64, 1024, 4096

# Elements of a tile (tokens x channels): 32 registers a thread in a program of four warps.
TILE = 4096

# Sizes that change from batch to batch: kernels are not compiled anew where one is 1 or a multiple of 16.
kernel = triton.jit(
    do_not_specialize=[
        "num_images", "num_tokens", "num_clusters", "num_blocks", "max_clusters", "capacity", "width",
    ]
)  # fmt: skip

LOG2_E = tl.constexpr(1.4426950408889634)

# The constants of `..clustering`, whose import would be circular; the tests compare them.
PROBABILITY_FLOOR = tl.constexpr(1e-8)
GREATEST_LOGIT = tl.constexpr(60.0)
LEAST_MEAN = tl.constexpr(1e-6)
MASS_STEPS = tl.constexpr(1073741824.0)
LEAST_TOTAL = tl.constexpr(torch.finfo(torch.float32).tiny)


@kernel
def score(
    tokens, weight, bias, columns, padded, logits, order, present, block_stats,
    num_tokens, channels, image_stride, token_stride, num_blocks, width,
    MASKED: tl.constexpr, SIDES: tl.constexpr, PLACES: tl.constexpr, CHANNELS: tl.constexpr, MASK_PLACES: tl.constexpr,
):  # fmt: skip
    """Score the tokens of a block, and store the scores at the tokens' places."""
    block, image = tl.program_id(0), tl.program_id(1)
    token = block * PLACES + tl.arange(0, PLACES)
    inside = token < num_tokens
    logit = tl.zeros((PLACES,), tl.float32)
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        address = tokens + image * image_stride + token[:, None] * token_stride + channel[None, :]
        tile = tl.load(address, mask=inside[:, None] & (channel < channels)[None, :], other=0.0).to(tl.float32)
        factors = tl.load(weight + channel, mask=channel < channels, other=0.0).to(tl.float32)
        logit += tl.sum(tile * factors[None, :], axis=1)
    logit += tl.load(bias).to(tl.float32)
    if SIDES > 0:
        logit += tl.load(columns + image * width + token % width, mask=inside, other=0.0)

    kept, place = inside, token
    if MASKED:
        # Every block adds up the whole mask: a few thousand bytes from the cache, and no further kernel.
        before, total = 0, 0
        for start in range(0, num_tokens, MASK_PLACES):
            other = start + tl.arange(0, MASK_PLACES)
            free = (tl.load(padded + image * num_tokens + other, mask=other < num_tokens, other=1) == 0).to(tl.int32)
            total += tl.sum(free, axis=0)
            before += tl.sum(tl.where(other < block * PLACES, free, 0), axis=0)
        kept = (tl.load(padded + image * num_tokens + token, mask=inside, other=1) == 0) & inside
        rank = before + tl.cumsum(kept.to(tl.int32), axis=0) - kept.to(tl.int32)
        place = tl.where(kept, rank, total + token - rank)
        tl.store(order + image * num_tokens + place, token, mask=inside)
        tl.store(present + image, total, mask=block == 0)
    tl.store(logits + image * num_tokens + place, logit, mask=kept)
    top = tl.max(tl.where(kept, logit, float("-inf")), axis=0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    stats = block_stats + (image * num_blocks + block) * 2
    tl.store(stats, top)
    tl.store(stats + 1, tl.sum(tl.where(kept, tl.exp(logit - shift), 0.0), axis=0))


@triton.jit
def softmax_terms(block_stats, image, num_blocks, BLOCKS: tl.constexpr):
    """The greatest logit of an image, and the sum of the exponentials of the logits less the greatest."""
    block = tl.arange(0, BLOCKS)
    stats = block_stats + (image * num_blocks + block) * 2
    top = tl.load(stats, mask=block < num_blocks, other=float("-inf"))
    total = tl.load(stats + 1, mask=block < num_blocks, other=0.0)
    greatest = tl.max(top, axis=0)
    # Blocks of only padding have no greatest logit: minus infinity minus itself would be NaN.
    return greatest, tl.sum(total * tl.exp(tl.where(top == float("-inf"), top, top - greatest)), axis=0)


@triton.jit
def smoothed(logits, taps, place, count, greatest, total, TAPS: tl.constexpr):
    """The smoothed information at places of an image with `count` tokens, and zero beyond them."""
    information = tl.zeros_like(place).to(tl.float32)
    for tap in range(TAPS):
        other = place + tap - (TAPS - 1) // 2
        inside = (other >= 0) & (other < count)
        logit = tl.load(logits + other, mask=inside, other=0.0)
        probability = tl.exp(logit - greatest) / total + PROBABILITY_FLOOR
        information += tl.where(inside, -probability * tl.log2(probability), 0.0) * tl.load(taps + tap)
    return tl.where((place >= 0) & (place < count), information, 0.0)


@kernel
def information(
    logits, block_stats, taps, present, smooth, block_sums, block_borders, num_tokens, num_blocks,
    MASKED: tl.constexpr, BORDERS: tl.constexpr, TAPS: tl.constexpr, PLACES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Smooth the information; add it up over each block, all of it and what is positive; count borders of regions."""
    block, image = tl.program_id(0), tl.program_id(1)
    place = block * PLACES + tl.arange(0, PLACES)
    count = num_tokens
    if MASKED:
        count = tl.load(present + image)
    greatest, total = softmax_terms(block_stats, image, num_blocks, BLOCKS)
    row = logits + image * num_tokens
    here = smoothed(row, taps, place, count, greatest, total, TAPS)
    tl.store(smooth + image * num_tokens + place, here, mask=place < num_tokens)
    sums = block_sums + (image * num_blocks + block) * 2
    tl.store(sums, tl.sum(here, axis=0))
    tl.store(sums + 1, tl.sum(tl.where(here > 0, here, 0.0), axis=0))
    if BORDERS:
        # Computing the neighbours anew needs no barrier between blocks, and gives the bits that their block has.
        before = smoothed(row, taps, place - 1, count, greatest, total, TAPS)
        after = smoothed(row, taps, place + 1, count, greatest, total, TAPS)
        later = smoothed(row, taps, place + 2, count, greatest, total, TAPS)
        border = ((2 * here - before - after > 0) != (2 * after - here - later > 0)) & (place < count - 1)
        tl.store(block_borders + image * num_blocks + block, tl.sum(border.to(tl.int32), axis=0))


@triton.jit
def smaller(one, other):
    """The smaller of two numbers."""
    return tl.minimum(one, other)


@triton.jit
def mass_of(smooth, place, count, total):
    """The integer information of places, as in `equal_information`; NaN counts as none."""
    value = tl.load(smooth + place, mask=(place >= 0) & (place < count), other=0.0)
    value = tl.where(value > 0, value, 0.0)
    # The quotient is rounded as PyTorch rounds it, since its integer part decides borders.
    part = tl.div_rn(value, total)
    return (tl.where(part == part, part, 0.0) * MASS_STEPS).to(tl.int64)


@triton.jit
def divisor_of(block_sums, image, count, num_blocks, temperature, TEMPERED: tl.constexpr, BLOCKS: tl.constexpr):
    """Return the divisor that makes logits of an image's information, and the sum of its positive information."""
    block = tl.arange(0, BLOCKS)
    sums = block_sums + (image * num_blocks + block) * 2
    positive = tl.sum(tl.load(sums + 1, mask=block < num_blocks, other=0.0), axis=0)
    divisor = 1.0
    if TEMPERED:
        mean = tl.sum(tl.load(sums, mask=block < num_blocks, other=0.0), axis=0) / tl.maximum(count, 1)
        divisor = temperature * tl.maximum(mean, LEAST_MEAN)
    return divisor, positive


@kernel
def equal_borders(
    smooth, block_sums, present, cluster, first, counts, divisors, num_tokens, num_clusters, num_blocks, temperature,
    MASKED: tl.constexpr, SHARE: tl.constexpr, TEMPERED: tl.constexpr, PLACES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Cut an image's places into clusters of equal information: the cluster of each, and where each starts.

    SHARE: tokens per cluster; 0 for `num_clusters` clusters in each image with as many tokens.
    """
    image = tl.program_id(0)
    count = num_tokens
    if MASKED:
        count = tl.load(present + image)
    if SHARE > 0:
        clusters = tl.maximum((count + SHARE - 1) // SHARE, 1)
    else:
        clusters = tl.maximum(tl.minimum(count, num_clusters), 1)
    divisor, positive = divisor_of(block_sums, image, count, num_blocks, temperature, TEMPERED, BLOCKS)
    tl.store(divisors + image, divisor)
    tl.store(counts + image, clusters)
    positive = tl.maximum(positive, LEAST_TOTAL)
    row = smooth + image * num_tokens
    total = tl.zeros((), tl.int64)
    for start in range(0, num_tokens, PLACES):
        total += tl.sum(mass_of(row, start + tl.arange(0, PLACES), count, positive), axis=0)
    whole = tl.maximum(2 * total, 1)

    # The place before each is computed beside it, so that no program reads what another thread has stored.
    passed = tl.zeros((), tl.int64)
    low, low_before = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    for start in range(0, num_tokens, PLACES):
        place = start + tl.arange(0, PLACES)
        mass, mass_before = mass_of(row, place, count, positive), mass_of(row, place - 1, count, positive)
        up_to = passed + tl.cumsum(mass, axis=0)
        gap = (2 * up_to - mass) * clusters // whole - place
        gap_before = (2 * (up_to - mass) - mass_before) * clusters // whole - (place - 1)
        # The first place has none before it.
        gap_before = tl.where(place == 0, 0, gap_before)
        lowest = tl.minimum(tl.associative_scan(gap, 0, smaller), low)
        lowest_before = tl.minimum(tl.associative_scan(gap_before, 0, smaller), low_before)
        own = tl.minimum(tl.maximum(place + lowest, clusters - count + place), clusters - 1)
        last = tl.minimum(tl.maximum(place - 1 + lowest_before, clusters - count + place - 1), clusters - 1)
        last = tl.where(place == 0, -1, last)
        tl.store(cluster + image * num_tokens + place, own.to(tl.int32), mask=place < num_tokens)
        starts = first + image * (num_clusters + 1) + own
        tl.store(starts, place, mask=(place < count) & (own != last))
        passed += tl.sum(mass, axis=0)
        low = tl.min(lowest, axis=0)
        low_before = tl.min(lowest_before, axis=0)
    # Missing clusters, and the end of the last one. An image without tokens has one empty cluster.
    for start in range(0, num_clusters + 1, PLACES):
        slot = start + tl.arange(0, PLACES)
        missing = (slot >= tl.minimum(clusters, count)) & (slot <= num_clusters)
        tl.store(first + image * (num_clusters + 1) + slot, count, mask=missing)


@kernel
def window_length(
    block_sums, block_borders, first, divisors, num_images, num_tokens, num_blocks, max_clusters, capacity, temperature,
    TEMPERED: tl.constexpr, IMAGES: tl.constexpr, CHUNK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Compute the windows' common length as `window_length` of `..clustering`, in one program; fill `Started.first`.

    max_clusters: 0 for no limit. capacity: rows of an image; more windows than that are noted and made longer.
    """
    image = tl.arange(0, IMAGES)
    borders = tl.zeros((IMAGES,), tl.int32)
    for start in range(0, num_blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        known = (image < num_images)[:, None] & (block < num_blocks)[None, :]
        address = block_borders + image[:, None] * num_blocks + block[None, :]
        borders += tl.sum(tl.load(address, mask=known, other=0), axis=1)
    lengths = num_tokens.to(tl.float64) / (borders + 1).to(tl.float64)
    mean = tl.sum(tl.where(image < num_images, lengths, 0.0), axis=0) / num_images
    whole = mean.to(tl.int64)
    rest = mean - whole.to(tl.float64)
    up = (rest > 0.5) | ((rest == 0.5) & (whole % 2 == 1))  # half to even
    tokens = tl.maximum(whole + up.to(tl.int64), 1)
    if max_clusters > 0:
        tokens = tl.maximum(tokens, num_tokens // (max_clusters + 1) + 1)
    least = num_tokens // (capacity + 1) + 1
    tl.store(first + 1, (tokens < least).to(tl.int32))
    tokens = tl.maximum(tokens, least).to(tl.int32)
    tl.store(first, tokens)
    tl.store(first + 2, 0)
    for one in range(0, num_images):
        divisor, _ = divisor_of(block_sums, one, num_tokens, num_blocks, temperature, TEMPERED, BLOCKS)
        tl.store(divisors + one, divisor)
        tl.store(first + 3 + one, (one + 1) * (num_tokens // tokens))


@triton.jit
def windows_of(first, num_tokens):
    """The windows' length, their number in each image, and the place of the first one."""
    length = tl.load(first)
    count = num_tokens // length
    return length, count, (num_tokens - count * length) // 2


@triton.jit
def span_of(first, image, cluster, num_tokens, num_clusters, WINDOWS: tl.constexpr):
    """The first place of a cluster, the place behind its last one, and its row in pooled tensors.

    Windows of all images are packed: the rows of missing ones, which have no places, come last.
    """
    if WINDOWS:
        length, count, begin = windows_of(first, num_tokens)
        begin += cluster * length
        there = cluster < count
        end = tl.where(there, begin + length, begin)
        missing = tl.num_programs(1) * count + image * (num_clusters - count) + cluster - count
        row = tl.where(there, image * count + cluster, missing)
    else:
        address = first + image * (num_clusters + 1) + cluster
        begin = tl.load(address)
        end = tl.load(address + 1)
        row = image * num_clusters + cluster
    return begin, end, row


@kernel
def pool(
    key, value, smooth, divisors, first, order, pooled_key, pooled_value,
    num_tokens, num_clusters, channels, width, key_image, key_token, value_image, value_token,
    MASKED: tl.constexpr, WINDOWS: tl.constexpr, SIDES: tl.constexpr, PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Pool the keys of one cluster, and its values, or its weights in the columns and rows of the map."""
    cluster, image = tl.program_id(0), tl.program_id(1)
    begin, end, row = span_of(first, image, cluster, num_tokens, num_clusters, WINDOWS)
    divisor = tl.load(divisors + image)
    channel = tl.arange(0, CHANNELS)
    side = tl.arange(0, SIDES if SIDES > 0 else CHANNELS)
    key_sum, value_sum = tl.zeros_like(channel).to(tl.float32), tl.zeros_like(side).to(tl.float32)
    total = 0.0
    for start in range(begin, end, PLACES):
        place = start + tl.arange(0, PLACES)
        inside = place < end
        logit = tl.load(smooth + image * num_tokens + place, mask=inside, other=0.0) / divisor
        weight = tl.where(inside, tl.exp(tl.where(logit > GREATEST_LOGIT, GREATEST_LOGIT, logit)), 0.0)
        token = place
        if MASKED:
            token = tl.load(order + image * num_tokens + place, mask=inside, other=0)
        both = inside[:, None] & (channel < channels)[None, :]
        keys = tl.load(key + image * key_image + token[:, None] * key_token + channel[None, :], mask=both, other=0.0)
        key_sum += tl.sum(keys.to(tl.float32) * weight[:, None], axis=0)
        if SIDES > 0:
            own = ((token % width)[:, None] == side[None, :]) | ((width + token // width)[:, None] == side[None, :])
            value_sum += tl.sum(tl.where(own, weight[:, None], 0.0), axis=0)
        else:
            values = tl.load(
                value + image * value_image + token[:, None] * value_token + channel[None, :], mask=both, other=0.0
            )
            value_sum += tl.sum(values.to(tl.float32) * weight[:, None], axis=0)
        total += tl.sum(weight, axis=0)
    # A missing cluster has no tokens; NaN must stay NaN.
    total = tl.where(begin < end, total, 1.0)
    tl.store(pooled_key + row * channels + channel, key_sum / total, mask=channel < channels)
    sides = channels
    if SIDES > 0:
        sides = width + num_tokens // width
    tl.store(pooled_value + row * sides + side, value_sum / total, mask=side < sides)


@kernel
def weight_grad(
    key, value, smooth, divisors, first, order, key_grad, value_grad, smooth_grad, weights,
    num_tokens, num_clusters, channels, width, key_image, key_token, value_image, value_token,
    MASKED: tl.constexpr, WINDOWS: tl.constexpr, SIDES: tl.constexpr, PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute the pooling weights w of one cluster, and the gradient of its smoothed information.

    With a_j the sum of token j's keys and values times their cluster's gradients: w_j (a_j - sum_i w_i a_i) / divisor.
    """
    cluster, image = tl.program_id(0), tl.program_id(1)
    begin, end, row = span_of(first, image, cluster, num_tokens, num_clusters, WINDOWS)
    divisor = tl.load(divisors + image)
    channel = tl.arange(0, CHANNELS)
    of_keys = tl.load(key_grad + row * channels + channel, mask=channel < channels, other=0.0).to(tl.float32)
    if SIDES > 0:
        of_sides = value_grad + row * (width + num_tokens // width)
    else:
        of_values = tl.load(value_grad + row * channels + channel, mask=channel < channels, other=0.0).to(tl.float32)
    total, mean = 0.0, 0.0
    for start in range(begin, end, PLACES):
        place = start + tl.arange(0, PLACES)
        inside = place < end
        address = image * num_tokens + place
        logit = tl.load(smooth + address, mask=inside, other=0.0) / divisor
        weight = tl.where(inside, tl.exp(tl.where(logit > GREATEST_LOGIT, GREATEST_LOGIT, logit)), 0.0)
        token = place
        if MASKED:
            token = tl.load(order + address, mask=inside, other=0)
        both = inside[:, None] & (channel < channels)[None, :]
        keys = tl.load(key + image * key_image + token[:, None] * key_token + channel[None, :], mask=both, other=0.0)
        product = keys.to(tl.float32) * of_keys[None, :]
        if SIDES > 0:
            product = tl.sum(product, axis=1) + tl.load(of_sides + token % width, mask=inside, other=0.0)
            product += tl.load(of_sides + width + token // width, mask=inside, other=0.0)
        else:
            values = tl.load(
                value + image * value_image + token[:, None] * value_token + channel[None, :], mask=both, other=0.0
            )
            product = tl.sum(product + values.to(tl.float32) * of_values[None, :], axis=1)
        tl.store(smooth_grad + address, product, mask=inside)
        total += tl.sum(weight, axis=0)
        mean += tl.sum(weight * product, axis=0)
    total = tl.where(begin < end, total, 1.0)
    mean = mean / total
    # Other threads of this program have stored the products.
    tl.debug_barrier()
    for start in range(begin, end, PLACES):
        place = start + tl.arange(0, PLACES)
        inside = place < end
        address = image * num_tokens + place
        logit = tl.load(smooth + address, mask=inside, other=0.0) / divisor
        weight = tl.exp(tl.where(logit > GREATEST_LOGIT, GREATEST_LOGIT, logit)) / total
        product = tl.load(smooth_grad + address, mask=inside, other=0.0)
        slope = tl.where(logit > GREATEST_LOGIT, 0.0, 1.0 / divisor)
        tl.store(smooth_grad + address, weight * (product - mean) * slope, mask=inside)
        tl.store(weights + address, weight, mask=inside)


@kernel
def prob_grad(
    logits, block_stats, taps, present, first, smooth_grad, probability_grad, block_sums, num_tokens, num_blocks,
    MASKED: tl.constexpr, WINDOWS: tl.constexpr, TAPS: tl.constexpr, PLACES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Pass the gradient through the smoothing and `-p log2 p`; add up p times its gradient over each block."""
    block, image = tl.program_id(0), tl.program_id(1)
    place = block * PLACES + tl.arange(0, PLACES)
    count = num_tokens
    if MASKED:
        count = tl.load(present + image)
    # Places in no cluster have no gradient, and none is stored for them.
    begin, end = 0, count
    if WINDOWS:
        length, clusters, begin = windows_of(first, num_tokens)
        end = begin + clusters * length
    greatest, total = softmax_terms(block_stats, image, num_blocks, BLOCKS)
    grad = tl.zeros((PLACES,), tl.float32)
    for tap in range(TAPS):
        other = place - tap + (TAPS - 1) // 2
        inside = (other >= begin) & (other < end)
        grad += tl.load(smooth_grad + image * num_tokens + other, mask=inside, other=0.0) * tl.load(taps + tap)
    inside = place < count
    logit = tl.load(logits + image * num_tokens + place, mask=inside, other=0.0)
    probability = tl.exp(logit - greatest) / total
    grad = -grad * (tl.log2(probability + PROBABILITY_FLOOR) + LOG2_E)
    tl.store(probability_grad + image * num_tokens + place, grad, mask=inside)
    tl.store(block_sums + image * num_blocks + block, tl.sum(tl.where(inside, probability * grad, 0.0), axis=0))


@kernel
def token_grad(
    key, weight, logits, block_stats, present, order, cluster, first, weights, probability_grad, block_sums,
    key_grad, value_grad, scored_out, value_out, weight_out, num_tokens, num_clusters, channels, num_blocks,
    key_image, key_token, scored_image, scored_token, value_image, value_token,
    MASKED: tl.constexpr, WINDOWS: tl.constexpr, SIDES: tl.constexpr, PLACES: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a block's tokens, and its part of the gradient of the scoring weights and bias.

    With `SIDES`, `value_out` gets the gradients of the scores.
    """
    block, image = tl.program_id(0), tl.program_id(1)
    place = block * PLACES + tl.arange(0, PLACES)
    inside = place < num_tokens
    count = num_tokens
    token = place
    if MASKED:
        count = tl.load(present + image)
        token = tl.load(order + image * num_tokens + place, mask=inside, other=0)
    greatest, total = softmax_terms(block_stats, image, num_blocks, BLOCKS)
    other = tl.arange(0, BLOCKS)
    mean = tl.sum(tl.load(block_sums + image * num_blocks + other, mask=other < num_blocks, other=0.0), axis=0)
    kept = place < count
    address = image * num_tokens + place
    probability = tl.exp(tl.load(logits + address, mask=kept, other=0.0) - greatest) / total
    grad = probability * (tl.load(probability_grad + address, mask=kept, other=0.0) - mean)
    grad = tl.where(kept, grad, 0.0)  # (PLACES,), of the logits
    if WINDOWS:
        length, clusters, begin = windows_of(first, num_tokens)
        own = (place - begin) // length
        pooled = (place >= begin) & (own < clusters)
    else:
        clusters = num_clusters
        own = tl.load(cluster + address, mask=kept, other=0)
        pooled = kept
    share = tl.load(weights + address, mask=pooled, other=0.0)
    row = (image * clusters + own) * channels
    out = weight_out + (image * num_blocks + block) * (channels + 1)
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        known = channel < channels
        stored = inside[:, None] & known[None, :]
        read = (pooled & inside)[:, None] & known[None, :]
        keys = tl.load(
            key + image * key_image + token[:, None] * key_token + channel[None, :],
            mask=kept[:, None] & known[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        tl.store(out + channel, tl.sum(keys * grad[:, None], axis=0), mask=known)
        factors = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
        of_keys = tl.load(key_grad + row[:, None] + channel[None, :], mask=read, other=0.0).to(tl.float32)
        result = of_keys * share[:, None] + grad[:, None] * factors[None, :]
        tl.store(scored_out + image * scored_image + token[:, None] * scored_token + channel[None, :], result, stored)
        if SIDES == 0:
            of_values = tl.load(value_grad + row[:, None] + channel[None, :], mask=read, other=0.0).to(tl.float32)
            result = of_values * share[:, None]
            tl.store(value_out + image * value_image + token[:, None] * value_token + channel[None, :], result, stored)
    if SIDES > 0:
        tl.store(value_out + image * value_image + token, grad, mask=inside)
    tl.store(out + channels, tl.sum(grad, axis=0))


@dataclass(frozen=True)
class Setting:
    """How tokens are clustered, as in `EntropyClustering`.

    Attributes:
        equal: clusters of equal information; False for windows of one length.
        num_clusters: clusters of an image with enough tokens, if equal.
        share: tokens per cluster of any image, if equal; 0 for `num_clusters` in each.
        max_clusters: limit of the number of windows; None for none.
        temperature: of the pooling weights; None for the softmax of the information.
        packed: the host does not wait for the number of windows. The rows of all images' windows are packed, and zeros
            follow, up to a number of rows that is known.
    """

    equal: bool
    num_clusters: int = 0
    share: int = 0
    max_clusters: int | None = None
    temperature: float | None = None
    packed: bool = False


class Started:
    """Clusters of one batch: kernels that are queued up to the clusters' borders, and what they write.

    Args:
        scored: (batch, N, d), the tokens to score.
        padded: bool (batch, N), True where padded; None for no padding. Only for clusters of equal information.
        weight, bias: (d,) and (1,), of the scores.
        taps: float32 (taps,), of the smoothing.
        setting: how the tokens are clustered.
        columns: float32 (batch, W), added to the scores of the tokens in each of a map's columns, instead of values;
            None for values.

    Attributes:
        counts: int32 (batch,), clusters of each image, if equal.
        first: int32 (batch, M + 1), the first place of each cluster, if equal. Of windows: (3 + batch,), their length;
            1 if packed windows would have been more than the rows, and were made longer, else 0; and the first row of
            each image's packed windows, with the row behind the last.
        shape: (batch, M), after `await_length`; M is the number of rows an image if packed.
    """

    def __init__(
        self,
        scored: Tensor,
        padded: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        taps: Tensor,
        setting: Setting,
        columns: Tensor | None = None,
    ):
        batch, num_tokens, channels = scored.shape
        self.scored_layout = torch.empty_like(scored, device="meta")
        self.setting = setting
        self.masked = padded is not None
        self.width = 0 if columns is None else columns.shape[1]
        self.sides = self.width + num_tokens // self.width if self.width else 0
        self.taps = taps
        self.num_blocks = triton.cdiv(num_tokens, BLOCK)
        self.blocks = triton.next_power_of_2(self.num_blocks)
        device = scored.device
        # Kinds that do not need them get tensors without elements.
        masked_size, equal_size = (batch * self.masked, num_tokens), (batch * setting.equal, num_tokens)
        self.logits = torch.empty(batch, num_tokens, device=device)
        self.smooth = torch.empty_like(self.logits)
        self.divisors = torch.empty(batch, device=device)
        self.block_stats = torch.empty(batch, self.num_blocks, 2, device=device)
        self.order = torch.empty(masked_size, dtype=torch.int32, device=device)
        self.present = torch.empty(masked_size[:1], dtype=torch.int32, device=device)
        self.cluster = torch.empty(equal_size, dtype=torch.int32, device=device)
        first_size = (batch, setting.num_clusters + 1) if setting.equal else (3 + batch,)
        self.first = torch.empty(first_size, dtype=torch.int32, device=device)
        self.counts = torch.empty(equal_size[:1], dtype=torch.int32, device=device)
        block_sums = torch.empty_like(self.block_stats)
        borders = torch.empty(batch * (not setting.equal), self.num_blocks, dtype=torch.int32, device=device)
        self.length = 0
        self.read_back: ReadBack | None = None
        grid = self.num_blocks, batch
        score[grid](
            scored, weight, bias, columns if self.width else bias, padded if self.masked else scored, self.logits,
            self.order, self.present, self.block_stats, num_tokens, channels, *scored.stride()[:2], self.num_blocks,
            self.width, MASKED=self.masked, SIDES=self.sides_tile(), PLACES=BLOCK, CHANNELS=TILE // BLOCK,
            MASK_PLACES=MASK_SCAN,
        )  # fmt: skip
        information[grid](
            self.logits, self.block_stats, taps, self.present, self.smooth, block_sums, borders, num_tokens,
            self.num_blocks, MASKED=self.masked, BORDERS=not setting.equal, TAPS=len(taps), PLACES=BLOCK,
            BLOCKS=self.blocks,
        )  # fmt: skip
        temperature = {"temperature": setting.temperature or 0.0, "TEMPERED": setting.temperature is not None}
        if setting.equal:
            equal_borders[(batch,)](
                self.smooth, block_sums, self.present, self.cluster, self.first, self.counts, self.divisors,
                num_tokens, setting.num_clusters, self.num_blocks, MASKED=self.masked, SHARE=setting.share,
                PLACES=SCAN, BLOCKS=self.blocks, **temperature,
            )  # fmt: skip
            self.shape = batch, setting.num_clusters
        else:
            images = triton.next_power_of_2(batch)
            capacity = max(num_tokens // 2, 1) if setting.packed else num_tokens
            capacity = min(capacity, setting.max_clusters or capacity)
            window_length[(1,)](
                block_sums, borders, self.first, self.divisors, batch, num_tokens, self.num_blocks,
                setting.max_clusters or 0, capacity, IMAGES=images, CHUNK=max(min(TILE // images, self.blocks), 1),
                BLOCKS=self.blocks, **temperature,
            )  # fmt: skip
            self.shape = batch, capacity
            if not setting.packed:
                self.read_back = ReadBack(self.first[:1])

    def await_length(self) -> None:
        """Wait for the length of the windows, if the shape depends on it."""
        if self.read_back is not None:
            batch, num_tokens = self.logits.shape
            self.length = self.read_back.wait()
            self.read_back = None  # frees its pinned memory
            self.shape = batch, num_tokens // self.length

    def sizes(self) -> tuple[int, ...]:
        """The integers that `pool` and `weight_grad` take behind the tensors."""
        return self.logits.shape[1], self.shape[1], self.scored_layout.shape[2], self.width

    def kinds(self) -> dict[str, bool]:
        """The constants that choose between kinds of clusters."""
        return {"MASKED": self.masked, "WINDOWS": not self.setting.equal}

    def sides_tile(self) -> int:
        """The constant `SIDES`: a power of 2, at least the map's width and height together; 0 with values."""
        return triton.next_power_of_2(self.sides) if self.width else 0

    def tile(self) -> dict[str, int]:
        """The constants of a tile with all channels."""
        channels, sides = triton.next_power_of_2(self.scored_layout.shape[2]), self.sides_tile()
        places = max(min(TILE // (channels + sides), 16), 1)
        return {"SIDES": sides, "PLACES": places, "CHANNELS": channels}


class ReadBack:
    """A copy to the host of one integer on a device, which runs while the host queues more work."""

    def __init__(self, number: Tensor):
        self.event = None
        self.number = number
        if number.is_cuda:
            self.number = torch.empty(1, dtype=number.dtype, device="cpu", pin_memory=True)
            self.number.copy_(number, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def wait(self) -> int:
        """Return the number."""
        if self.event is not None:
            self.event.synchronize()
        return int(self.number)


def pool_clusters(started: Started, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Pool keys and values (batch, N, d): (batch, M, d) each, in their dtypes.

    With scores of columns instead of values, the second result is float32 (batch, M, W + H): the sums of each cluster's
    pooling weights in every column and row of the map.
    """
    pooled_key = key.new_empty(*started.shape, key.shape[2])
    pooled_value = value.new_empty(*started.shape, started.sides or key.shape[2])
    pool[started.shape[::-1]](
        key, value, started.smooth, started.divisors, started.first, started.order, pooled_key, pooled_value,
        *started.sizes(), *key.stride()[:2], *value.stride()[:2], **started.kinds(), **started.tile(),
    )  # fmt: skip
    return pooled_key, pooled_value


def pool_gradients(
    started: Started, key: Tensor, value: Tensor, weight: Tensor, key_grad: Tensor, value_grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of scored tokens and values, and float32 (d + 1,) of the scoring weights and the bias.

    Args:
        started: the clusters.
        key: (batch, N, d), what was pooled.
        value: the same, or the scores of columns.
        weight: (d,), of the scores.
        key_grad, value_grad: gradients of the results of `pool_clusters`.
    """
    batch, num_tokens, channels = key.shape
    num_blocks, logits = started.num_blocks, started.logits
    key_grad, value_grad = key_grad.contiguous(), value_grad.contiguous()
    smooth_grad, weights, probability_grad = (torch.empty_like(logits) for _ in range(3))
    block_sums = logits.new_empty(batch, num_blocks)
    weight_out = logits.new_empty(batch, num_blocks, channels + 1)
    scored_out = torch.empty_like(started.scored_layout, device=key.device)
    value_out = torch.empty_like(logits if started.width else value)
    weight_grad[started.shape[::-1]](
        key, value, started.smooth, started.divisors, started.first, started.order, key_grad, value_grad, smooth_grad,
        weights, *started.sizes(), *key.stride()[:2], *value.stride()[:2], **started.kinds(), **started.tile(),
    )  # fmt: skip
    prob_grad[(num_blocks, batch)](
        logits, started.block_stats, started.taps, started.present, started.first, smooth_grad, probability_grad,
        block_sums, num_tokens, num_blocks, **started.kinds(), TAPS=len(started.taps), PLACES=BLOCK,
        BLOCKS=started.blocks,
    )  # fmt: skip
    token_grad[(num_blocks, batch)](
        key, weight, logits, started.block_stats, started.present, started.order, started.cluster, started.first,
        weights, probability_grad, block_sums, key_grad, value_grad, scored_out, value_out, weight_out,
        num_tokens, started.shape[1], channels, num_blocks,
        *key.stride()[:2], *scored_out.stride()[:2], *value_out.stride()[:2], **started.kinds(),
        SIDES=started.sides_tile(), PLACES=BLOCK, CHANNELS=TILE // BLOCK // 2, BLOCKS=started.blocks,
    )  # fmt: skip
    if started.width:
        value_out = value_out.unflatten(1, (-1, started.width)).sum(dim=1)  # (batch, H, W) -> (batch, W)
    return scored_out, value_out, weight_out.sum(dim=(0, 1))


class _Pool(torch.autograd.Function):
    """Scoring, clustering and pooling as one function of scored tokens, values or scores of columns, weights and bias.

    `key` holds the scored tokens, perhaps in a lower precision: its gradient is part of that of `scored`.
    """

    @staticmethod
    def forward(
        ctx, scored: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor, started: Started
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(key, value, weight)
        ctx.started = started
        ctx.bias_dtype = bias.dtype
        return pool_clusters(started, key, value)

    @staticmethod
    @once_differentiable
    def backward(ctx, key_grad: Tensor, value_grad: Tensor) -> tuple[Tensor | None, ...]:
        key, value, weight = ctx.saved_tensors
        with torch.cuda.device_of(key):
            scored, values, scoring = pool_gradients(ctx.started, key, value, weight, key_grad, value_grad)
        return scored, None, values, scoring[:-1].to(weight.dtype), scoring[-1:].to(ctx.bias_dtype), None


class PooledClusters:
    """The clusters of pooled tensors, for the attention behind them: only their number, their sizes, the missing ones.

    Attributes:
        shape: (batch, M).
        padding_mask: bool (batch, M), True where an image has no such cluster; None if all images have M clusters.
        starts: int32 (batch + 1,), the first row of each image's packed windows, with the row behind the last; None if
            not packed.
        overflow: int32 (), 1 if packed windows would have been more than the rows, and were made longer, else 0.
    """

    def __init__(self, started: Started):
        self.shape = started.shape
        self.overflow, self.starts = (started.first[1], started.first[2:]) if started.setting.packed else (None, None)
        self.padding_mask: Tensor | None = None
        if started.masked:
            slot = torch.arange(self.shape[1], device=started.counts.device)
            self.padding_mask = slot >= started.counts.unsqueeze(1)
        self.started = started

    def sizes(self) -> Tensor:
        """Return the number of tokens in each cluster: int64 (batch, M), 0 at missing clusters. Not if packed."""
        if self.started.setting.equal:
            return self.started.first.long().diff(dim=1)
        return torch.full(self.shape, self.started.length, device=self.started.logits.device)


def start(scored: Tensor, *others) -> Started:
    """Queue the kernels up to the clusters' borders. Arguments: as in `Started`."""
    with torch.no_grad(), torch.cuda.device_of(scored):
        return Started(rows_contiguous(scored), *others)


def finish(
    started: Started, scored: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor
) -> tuple[tuple[Tensor, Tensor], PooledClusters]:
    """Return the result of `pool_clusters`, and the clusters.

    Args:
        started: the result of `start` for these scored tokens.
        scored: (batch, N, d).
        value: the same, or the scores of columns that `started` has.
        key: the scored tokens, or a copy of them in a lower precision, which is kept for the backward pass. Its
            gradient is added to that of `scored`.
        weight, bias: (d,) and (1,), of the scores.
    """
    with torch.cuda.device_of(scored):
        started.await_length()
        scored, key, value = (rows_contiguous(tensor) for tensor in (scored, key, value))
        pooled = _Pool.apply(scored, key, value, weight, bias, started)
        if torch.is_grad_enabled():
            check_gradients(started, key, value, weight, pooled)
    return pooled, PooledClusters(started)


def rows_contiguous(tokens: Tensor) -> Tensor:
    """Return tokens whose channels lie side by side in memory, as the kernels expect; a copy only if they do not."""
    return tokens if tokens.stride(-1) == 1 else tokens.contiguous()


# The kinds of inputs whose backward kernels have run once.
_checked: set[tuple] = set()


def check_gradients(
    started: Started, key: Tensor, value: Tensor, weight: Tensor, pooled: tuple[Tensor, Tensor]
) -> None:
    """Run the backward kernels once for each kind of input: PyTorch cannot take over once a forward pass is done."""
    kind = (key.dtype, value.dtype, weight.dtype, started.masked, started.setting.equal, started.blocks)
    kind += key.device, key.shape[2], len(started.taps), started.sides_tile()
    if kind not in _checked:
        with torch.no_grad():
            pool_gradients(started, key, value, weight, *map(torch.zeros_like, pooled))
        _checked.add(kind)
