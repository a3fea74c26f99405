"""The Triton kernels in Triton's interpreter, against PyTorch: values, gradients, borders.

`test_kernels.py` runs this file in a process of its own, since the interpreter must be chosen before Triton is
imported:

    TRITON_INTERPRET=1 python -m pytest --noconftest tests/interpreted_kernels.py
"""

import pytest
import torch
import triton.language as tl
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from triton.runtime.interpreter import InterpreterBuilder

from enact_common.attention import EnactSelfAttention, EntropyClustering, kernels, packed
from enact_common.attention.clustering import (
    GREATEST_LOGIT,
    LEAST_MEAN,
    MASS_STEPS,
    PROBABILITY_FLOOR,
    equal_information,
    window_length,
)
from enact_common.attention.kernels import pooling, row_column
from enact_common.attention.map_tokens import MapTokens
from enact_common.variants import load_variant


class Everything(set):
    """A set that contains everything."""

    def __contains__(self, item) -> bool:
        return True


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks so small that few tokens fill several, and the backward kernels run only where a test needs them."""
    torch.manual_seed(0)
    monkeypatch.setattr(pooling, "BLOCK", 16)
    monkeypatch.setattr(pooling, "SCAN", 16)
    monkeypatch.setattr(pooling, "MASK_SCAN", 16)
    monkeypatch.setattr(row_column, "PLACES", 16)
    monkeypatch.setattr(row_column, "INNER", 16)
    for module in (pooling, row_column):
        monkeypatch.setattr(module, "_checked", Everything())
    multiply = InterpreterBuilder.create_dot

    def widen_and_multiply(builder, a, b, *others):
        wide = [factor if factor.dtype != tl.bfloat16 else builder.cast_impl(factor, tl.float32) for factor in (a, b)]
        return multiply(builder, *wide, *others)

    # The interpreter would multiply the bits of bfloat16 as integers.
    monkeypatch.setattr(InterpreterBuilder, "create_dot", widen_and_multiply)
    yield
    assert not kernels._logged  # neither failures nor reasons for PyTorch


def random_mask(batch: int, num_tokens: int) -> torch.Tensor:
    """A padding mask that leaves different images different tokens, and the last one none."""
    mask = torch.rand(batch, num_tokens) > 0.6
    mask[0, 0], mask[-1] = False, True
    return mask


def pooled_both_ways(layer: EntropyClustering, key, value, mask=None, dtype=torch.float32) -> tuple[list, list]:
    """Pooled key and value, the missing clusters, sizes and gradients: of PyTorch, and of the kernels."""
    results = []
    for choice in ("torch", "triton"):
        layer.kernels = choice
        layer.zero_grad()
        leaves = [tensor.clone().requires_grad_() for tensor in (key, value)]
        narrow = leaves[0].to(dtype) if dtype != torch.float32 else None
        pooled, clusters = layer.pool(leaves[0], leaves[1].to(dtype), key_padding_mask=mask, narrow=narrow)
        assert (type(clusters) is pooling.PooledClusters) == (choice == "triton")
        torch.manual_seed(1)
        sum((tensor.float() * torch.randn(tensor.shape)).sum() for tensor in pooled).backward()
        missing = clusters.padding_mask
        results.append([*pooled, missing if missing is None else missing.long(), clusters.sizes()])
        results[-1] += [leaf.grad for leaf in leaves] + [layer.W_prob.weight.grad.clone(), layer.W_prob.bias.grad]
    return tuple(results)


CASES = {
    "windows": (2, 21, 16, {}),
    "wide windows of a large batch": (9, 7, 20, {"max_clusters": 2}),
    "windows with a temperature": (1, 35, 16, {"max_clusters": 4, "temperature": 0.5}),
    "one token, windows": (2, 1, 16, {}),
    "one window": (1, 19, 16, {"max_clusters": 1}),
    "equal": (2, 30, 16, {"clusters": "equal", "max_clusters": 7}),
    "large batch, equal": (9, 6, 20, {"clusters": "equal"}),
    "equal with a temperature": (2, 21, 16, {"clusters": "equal", "max_clusters": 4, "temperature": 0.5}),
    "equal, one token": (1, 1, 16, {"clusters": "equal"}),
    "equal, one cluster each": (1, 5, 16, {"clusters": "equal", "max_clusters": 9}),
    "equal, padded": (3, 25, 16, {"clusters": "equal", "max_clusters": 12, "temperature": 1.0}),
    "equal, padded, a share each": (2, 37, 16, {"clusters": "equal"}),
}


@pytest.mark.parametrize("name", CASES)
def test_pooled_tensors_and_gradients_are_those_of_pytorch(name):
    batch, num_tokens, channels, settings = CASES[name]
    layer = EntropyClustering(channels, 1.0, **settings)
    with torch.no_grad():
        layer.W_prob.weight.mul_(3)  # scores that differ
    # Length first in memory, as in DETR's encoder.
    key, value = (torch.randn(num_tokens, batch, channels).transpose(0, 1) for _ in range(2))
    mask = random_mask(batch, num_tokens) if "padded" in name else None
    expected, results = pooled_both_ways(layer, key, value, mask)
    # The bias has no gradient, but for rounding.
    assert_close(results, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"clusters": "equal", "max_clusters": 5}], ids=["windows", "equal"])
def test_lower_precision_is_as_close_as_its_rounding(settings):
    layer = EntropyClustering(16, 1.0, **settings)
    key, value = torch.randn(2, 2, 18, 16)
    expected, results = pooled_both_ways(layer, key, value, dtype=torch.bfloat16)
    assert [result.dtype for result in results[:2]] == [torch.bfloat16] * 2
    assert_close(results, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("settings", [{}, {"clusters": "equal", "max_clusters": 5}], ids=["windows", "equal"])
def test_nan_stays_in_its_image(settings):
    layer = EntropyClustering(16, 1.0, **settings)
    key, value = torch.randn(2, 2, 18, 16)
    key[1, 7, 3] = torch.nan
    expected, results = pooled_both_ways(layer, key, value)
    for result, other in zip(results[:2], expected[:2], strict=True):
        assert result[1].isnan().all() and other[1].isnan().all()
        assert_close(result[0], other[0], rtol=1e-4, atol=1e-5)
    assert_close(results[4][0], expected[4][0], rtol=1e-4, atol=1e-5)


MAPS = {
    "windows": {},
    "equal, padded": {"clusters": "equal", "max_clusters": 6, "temperature": 1.0},
    "bfloat16": {},
    "NaN": {"clusters": "equal"},
}


@pytest.mark.parametrize("name", MAPS)
def test_maps_of_anchor_detr_are_clustered_as_in_pytorch(name):
    anchor = load_variant("anchor").models.transformer
    layer = anchor.MapClustering(16, 1.0, **MAPS[name])
    leaves = [torch.randn(size, requires_grad=True) for size in ((2, 5, 7, 16), (2, 7, 16), (2, 5, 16))]
    mask = random_mask(2, 35).view(2, 5, 7) if "padded" in name else None
    if name == "NaN":
        leaves[0].data[1, 2, 3, 4] = torch.nan
    results = []
    for layer.kernels in ("torch", "triton"):
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "bfloat16"):
            *pooled, missing = layer(*leaves, mask)
        torch.manual_seed(1)
        total = sum((tensor.float() * torch.randn(tensor.shape)).sum() for tensor in pooled)
        # The bias has no gradient, but for rounding.
        gradients = torch.autograd.grad(total, [*leaves, layer.W_prob.weight, layer.W_prob.bias])
        results.append([*pooled, missing if missing is None else missing.long(), *gradients])
    if name == "NaN":
        assert all(tensor[1].isnan().all() for tensor in results[1][:3])
        results = [[tensor[:1] for tensor in (*result[:3], *result[4:7])] for result in results]
    assert_close(*results, **({"rtol": 3e-2, "atol": 3e-2} if name == "bfloat16" else {"rtol": 1e-4, "atol": 1e-5}))


LAYERS = {"windows beside a token": {"tokens": MapTokens(before=1)}, "equal": {"clusters": "equal", "max_clusters": 6}}


@pytest.mark.parametrize("settings", LAYERS.values(), ids=LAYERS)
def test_the_layer_computes_the_same_under_autocast(settings, monkeypatch):
    # The first call also tries the backward kernels, which changes nothing.
    monkeypatch.setattr(pooling, "_checked", set())
    layer = EnactSelfAttention(16, 2, sigma=1.0, **settings)
    layer.weigh_by_size = True
    src = torch.randn(18, 2, 16)
    results = []
    for layer.kernels in ("torch", "triton"):
        results.append(layer_results(layer, src, amp=True))
    assert pooling._checked
    assert_close(results[1], results[0], rtol=3e-2, atol=3e-2)


class Unwritten(torch.autograd.Function):
    """Packed rows as they are. Behind the last image's, their gradients are NaN, as fused kernels may leave them."""

    @staticmethod
    def forward(ctx, rows, starts):
        ctx.written = int(starts[-1])
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[ctx.written :] = torch.nan
        return grad, None


def attend_one_by_one(q, k, v, q_starts, k_starts, most, dropout, scale):
    """Takes the place of `packed.attend_sequences`."""
    k, v = (Unwritten.apply(rows, k_starts) for rows in (k, v))
    results = []
    for image in range(len(k_starts) - 1):
        queries, members = (slice(*starts[image : image + 2].tolist()) for starts in (q_starts, k_starts))
        assert queries.stop - queries.start == most[0] and members.stop - members.start <= most[1]
        parts = (rows.transpose(0, 1) for rows in (q[queries], k[members], v[members]))
        results.append(scaled_dot_product_attention(*parts, dropout_p=dropout, scale=scale).transpose(0, 1))
    return torch.cat(results)


def layer_results(layer: EnactSelfAttention, src, amp: bool) -> list:
    """The layer's output, and the gradients of its input and its weights."""
    layer.zero_grad()
    leaf = src.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        output = layer(leaf, leaf, leaf)[0]
    output.float().square().sum().backward()
    return [output, leaf.grad, *(parameter.grad.clone() for parameter in layer.parameters())]


PACKED = {
    "few windows": (30, 3, False, {"sigma": 1.0}),
    "limited, with a temperature": (35, 2, False, {"max_clusters": 4, "temperature": 0.5, "scale_logits": True}),
    "large batch in bfloat16, batch first": (18, 9, True, {"sigma": 0.5, "batch_first": True}),
    "one token": (1, 2, False, {}),
}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "read back"])
@pytest.mark.parametrize("name", PACKED)
def test_packed_windows_give_the_layer_the_same_results(name, fused, monkeypatch):
    num_tokens, batch, amp, settings = PACKED[name]
    monkeypatch.setattr(packed, "takes_packed", lambda q: fused)
    monkeypatch.setattr(packed, "attend_sequences", attend_one_by_one)
    monkeypatch.setattr(packed, "_checked", set())
    layer = EnactSelfAttention(16, 2, **settings)
    src = torch.randn(num_tokens, batch, 16)
    src = src.transpose(0, 1) if layer.batch_first else src
    expected = layer_results(layer, src, amp)
    layer.kernels = "triton"
    with packed.packed_windows() as overflows:
        results = layer_results(layer, src, amp)
    assert_close(results, expected, **({"rtol": 3e-2, "atol": 3e-2} if amp else {"rtol": 1e-4, "atol": 1e-5}))
    assert [int(overflow) for overflow in overflows] == [0] and bool(packed._checked) == fused


def test_too_many_windows_are_noted_and_made_longer(monkeypatch):
    monkeypatch.setattr(packed, "takes_packed", lambda q: True)
    monkeypatch.setattr(packed, "attend_sequences", attend_one_by_one)
    layer = EnactSelfAttention(16, 2, sigma=0.4)  # one tap
    src = torch.randn(21, 2, 16)
    src[::2] = -src[1]  # alternating scores
    src[1::2] = src[1]
    with layer.register_cluster_hook(lambda _, clusters: lengths.append(clusters.weights.shape[2])):
        lengths: list[int] = []
        layer_results(layer, src, False)
        layer.max_clusters = 10
        expected = layer_results(layer, src, False)
    assert lengths == [1, 2]
    layer.kernels, layer.max_clusters = "triton", None
    with packed.packed_windows() as overflows:
        results = layer_results(layer, src, False)
    assert [int(overflow) for overflow in overflows] == [1]
    assert_close(results, expected, rtol=1e-4, atol=1e-5)


def test_layers_read_the_number_of_windows_once_fused_attention_has_failed(monkeypatch):
    monkeypatch.setattr(packed, "takes_packed", lambda q: True)
    monkeypatch.setattr(kernels, "_failed", set())
    layer = EnactSelfAttention(16, 2)  # on a CPU, which has no such kernels
    src = torch.randn(21, 2, 16)
    expected = layer_results(layer, src, False)
    layer.kernels = "triton"
    for noted in (1, 0):
        with packed.packed_windows() as overflows:
            results = layer_results(layer, src, False)
        assert_close(results, expected, rtol=1e-4, atol=1e-5)
        assert len(overflows) == noted
    (message,) = kernels._logged
    assert message.startswith("packed attention: the GPU kernels failed, PyTorch takes over (NotImplementedError")
    kernels._logged.clear()


@pytest.mark.parametrize("settings", [{}, {"clusters": "equal"}], ids=["windows", "equal"])
def test_clusters_can_be_recomputed_in_the_backward_pass(settings):
    """An error ends the recomputation in the kernels' own function, whose tensors are the last to be kept."""
    layer = EntropyClustering(16, kernels="triton", **settings)
    key, value = torch.randn(2, 2, 21, 16, requires_grad=True)
    leaves = [key, value, layer.W_prob.weight]
    gradients = [
        torch.autograd.grad(sum(tensor.square().sum() for tensor in pooled), leaves)
        for pooled in (layer(key, value), checkpoint(layer, key, value, use_reentrant=False))
    ]
    assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("count", [1, 4, 20])
@pytest.mark.parametrize("kind", ["any", "one large", "none"])
def test_borders_are_those_of_pytorch_to_the_token(kind, count):
    """Information whose sum is exact, so the masses are equal to the bit."""
    information = torch.randint(0, 64, (2, 40)) / 1024
    if kind == "one large":
        information[:, 13] = 8.0
    information *= kind != "none"
    tokens = torch.tensor([40, 22])
    information[1, 22:] = 0
    sums = torch.zeros(2, 1, 2)
    sums[:, 0, 1] = information.sum(dim=1)
    cluster, first = torch.empty(2, 40, dtype=torch.int32), torch.full((2, count + 1), -1, dtype=torch.int32)
    counts, divisors = torch.empty(2, dtype=torch.int32), torch.empty(2)
    pooling.equal_borders[(2,)](
        information, sums, tokens.int(), cluster, first, counts, divisors, 40, count, 1, 0.0,
        MASKED=True, SHARE=0, TEMPERED=False, PLACES=16, BLOCKS=1,
    )  # fmt: skip
    number = tokens.clamp(max=count)
    expected = equal_information(information, tokens, number)
    assert torch.equal(cluster.long(), expected) and torch.equal(counts.long(), number)
    for image in range(2):
        inside = expected[image, : tokens[image]]
        assert first[image].tolist() == torch.searchsorted(inside, torch.arange(count + 1)).tolist()


@pytest.mark.parametrize("max_clusters", [None, 3])
@pytest.mark.parametrize("num_tokens, regions", [(5, [2]), (7, [2]), (5, [2, 2, 1]), (30, [4, 9, 7, 30, 1]), (3, [3])])
def test_the_window_length_is_rounded_half_to_even(num_tokens, regions, max_clusters):
    batch = len(regions)
    borders = torch.zeros(batch, 5, dtype=torch.int32)
    borders[:, 3] = torch.tensor(regions) - 1
    first, divisors = torch.empty(3 + batch, dtype=torch.int32), torch.empty(batch)
    pooling.window_length[(1,)](
        torch.zeros(batch, 5, 2), borders, first, divisors, batch, num_tokens, 5, max_clusters or 0, num_tokens, 0.0,
        TEMPERED=False, IMAGES=8, CHUNK=2, BLOCKS=8,
    )  # fmt: skip
    expected = window_length(torch.full((batch,), num_tokens), torch.tensor(regions), max_clusters)[0]
    assert first[0] == expected and divisors.tolist() == [1.0] * batch


PRODUCTS = {"clusters": "bhm,bwm,bme->bhwe", "map": "bmh,bmw,bhwe->bme"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(2, 3, 20, 19, 8), (1, 5, 2, 1, 20)], ids=str)
@pytest.mark.parametrize("kind", PRODUCTS)
def test_row_column_products_and_gradients_follow_their_definition(kind, sizes, dtype):
    size = dict(zip("bhwme", sizes, strict=True))
    names = PRODUCTS[kind].partition("->")[0].split(",")
    leaves = [torch.randn([size[name] for name in axes], requires_grad=True) for axes in names]
    expected = torch.einsum(PRODUCTS[kind], *leaves)
    result = row_column.product(*(leaf.to(dtype) for leaf in leaves))
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert result.dtype == dtype
    assert_close(result.float(), expected, rtol=tolerance, atol=tolerance)
    weights = torch.randn(expected.shape)
    gradients = [torch.autograd.grad(output, leaves, weights.to(output.dtype)) for output in (result, expected)]
    assert_close(*gradients, rtol=tolerance, atol=tolerance * 2)


def test_kernels_and_pytorch_share_their_constants():
    shared = (PROBABILITY_FLOOR, GREATEST_LOGIT, LEAST_MEAN, MASS_STEPS)
    own = (pooling.PROBABILITY_FLOOR, pooling.GREATEST_LOGIT, pooling.LEAST_MEAN, pooling.MASS_STEPS)
    assert shared == tuple(constant.value for constant in own)
