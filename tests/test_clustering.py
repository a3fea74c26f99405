"""The clustering's functions on cases worked by hand, and the layer against the recorded reference."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import GOLDEN, assert_close
from torch.nn import functional as F
from torch.testing import assert_close as assert_tensors_close
from torch.utils._python_dispatch import TorchDispatchMode

from enact_common.attention import clustering
from enact_common.attention.clustering import (
    EntropyClustering,
    count_regions,
    gaussian_kernel,
    self_information,
    smooth,
    window_length,
)
from enact_common.attention.clusters import RaggedClusters, TracedRaggedClusters, Windows, cut_windows

RECORDED = np.load(GOLDEN / "attention.npz")


def test_gaussian_kernel_has_17_taps_for_sigma_3():
    kernel = gaussian_kernel(3.0)
    assert kernel.shape == (17,)
    assert kernel[8].item() == pytest.approx(1 / (3 * math.sqrt(2 * math.pi)))
    assert kernel[0].item() == pytest.approx(math.exp(-64 / 18) / (3 * math.sqrt(2 * math.pi)))
    # The kernel is truncated and not normalised again.
    assert 0.98 < kernel.sum() < 0.999


@pytest.mark.parametrize("sigma, taps", [(1.0, 5), (1.5, 8), (2.5, 14), (1.4, 7), (5.0, 29)])
def test_gaussian_kernels_number_of_taps(sigma, taps):
    assert gaussian_kernel(sigma).shape == (taps,)


@pytest.mark.parametrize("sigma", [0.0, 1 / 3, -1.0, float("nan")])
def test_gaussian_kernel_refuses_a_sigma_without_taps(sigma):
    with pytest.raises(ValueError, match="sigma"):
        gaussian_kernel(sigma)


def test_self_information_of_equal_scores_is_equal():
    # Four equal tokens: p = 1/4, -p log2 p = 1/2.
    assert_close(self_information(torch.zeros(1, 4)), [[0.5] * 4], 1e-6)


def test_self_information_stays_finite_for_a_certain_token():
    information = self_information(torch.tensor([[0.0, 200.0, 0.0]], requires_grad=True))
    assert torch.isfinite(information).all()
    information.sum().backward()


def test_smooth_pads_with_zeros_and_keeps_the_length():
    signal = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    assert_close(smooth(signal, torch.tensor([0.25, 0.5, 0.25])), [[0.5, 0.25, 0.0, 0.0]])


@pytest.mark.parametrize(
    "signal, regions",
    [
        # Second differences -1, 2, -1 of the signal, zeros beyond its ends; runs of (> 0).
        ([1.0], 1),  # 2 > 0
        ([0.0, 0.0, 0.0], 1),  # all 0: not positive
        ([1.0, 1.0, 1.0], 3),  # 1, 0, 1
        ([0.0, 1.0, 0.0], 3),  # -1, 2, -1
        ([1.0, 2.0, 3.0, 4.0], 2),  # 0, 0, 0, 5
        ([0.0, 4.0, 0.0, 4.0, 0.0], 5),  # -4, 8, -8, 8, -4
    ],
)
def test_regions_are_runs_of_the_second_differences_sign(signal, regions):
    assert count_regions(torch.tensor([signal])).tolist() == [regions]


@pytest.mark.parametrize(
    "tokens, regions, length",
    [
        (10, [4], 2),  # 2.5 rounds half to even
        (14, [4], 4),  # 3.5 does too
        (12, [3, 6], 3),  # mean of 4 and 2
        (7, [7], 1),
        (5, [1], 5),
    ],
)
def test_window_length_is_the_rounded_mean_region_length(tokens, regions, length):
    regions = torch.tensor(regions)
    assert window_length(torch.full_like(regions, tokens), regions).unique().tolist() == [length]


@pytest.mark.parametrize("sigma", [1.4, 1.5, 2.5, 3.0, 5.0])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_smooth_matches_conv1d(sigma, tokens):
    kernel = gaussian_kernel(sigma).double()
    signal = torch.rand(3, tokens, dtype=torch.float64, requires_grad=True)
    expected = F.conv1d(signal.unsqueeze(1), kernel.view(1, 1, -1), padding="same").squeeze(1)
    assert_tensors_close(smooth(signal, kernel), expected)
    torch.autograd.gradcheck(lambda s: smooth(s, kernel), signal)


class MatrixProducts(TorchDispatchMode):
    """Record the operations that a GPU could run in TF32."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "mv", "addmm", "addmv", "bmm", "baddbmm", "dot", "matmul", "linear", "convolution"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "settings", [{}, {"per_image": True}, {"clusters": "regions"}, {"mask_padding": True}], ids=str
)
def test_clustering_uses_no_operation_that_can_run_in_tf32(settings):
    layer, tokens = EntropyClustering(16, **settings), torch.randn(2, 30, 16)
    with MatrixProducts() as products:
        layer.cluster(tokens, torch.arange(30).expand(2, -1) > 25)
    assert products.names == []
    with MatrixProducts() as products:
        layer.W_prob(tokens)
    assert products.names  # the recording works


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_clusters_equal_those_of_a_float32_module_with_the_same_weights(dtype):
    """If the clustering ran in the scores' dtype, bf16 would give other windows and fp16 NaN."""
    torch.manual_seed(0)
    layer, tokens = EntropyClustering(32).to(dtype), (5 * torch.randn(2, 900, 32)).to(dtype)
    assert layer.kernel.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(layer.kernel.float(), gaussian_kernel(3.0))
    precise = EntropyClustering(32)
    precise.load_state_dict(layer.state_dict())
    clusters, expected = layer.cluster(tokens), precise.cluster(tokens.float())
    assert clusters.weights.dtype == torch.promote_types(dtype, torch.float32)
    assert_tensors_close(clusters.weights.float(), expected.weights)
    (pooled,) = layer(tokens)
    assert pooled.dtype == dtype and torch.isfinite(pooled).all()
    assert_tensors_close(pooled.float(), precise(tokens.float())[0], rtol=1e-2, atol=1e-2)
    # Casting back to float32 restores the kernel exactly.
    assert torch.equal(layer.float().kernel, gaussian_kernel(3.0))


@pytest.mark.parametrize("length", [1, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cpu_and_gpu_pooling_agree(length, dtype):
    weights, tokens = torch.rand(2, 30 // length, length), torch.randn(30, 2, 8, dtype=dtype).transpose(0, 1)
    expected = torch.einsum("bml,bmld->bmd", weights, cut_windows(tokens, length).float())
    assert_tensors_close(Windows(weights).pool(tokens), expected.to(dtype))
    # The GPU form, on a tensor that pretends to be on a GPU.
    assert_tensors_close(Windows(weights).pool(tokens.as_subclass(OnGpu)).as_subclass(torch.Tensor), expected.to(dtype))


class OnGpu(torch.Tensor):
    device = torch.device("cuda")


def test_windows_split_the_remainder_between_both_ends():
    # 11 tokens in windows of 4: 3 left over, 1 in front and 2 behind.
    windows = cut_windows(torch.arange(11).view(1, 11, 1), 4)
    assert windows.squeeze(-1).tolist() == [[[1, 2, 3, 4], [5, 6, 7, 8]]]


def test_pooling_is_the_weighted_sum_of_a_window():
    tokens = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0]]])
    weights = torch.tensor([[[0.25, 0.75], [1.0, 0.0]]])
    assert Windows(weights).pool(tokens).tolist() == [[[1.75, 17.5], [3.0, 30.0]]]


def test_the_scores_gradient_flows_through_the_pooling_weights():
    torch.manual_seed(1)
    layer = EntropyClustering(4, 1.0).double()
    others = torch.randn(1, 12, 2, dtype=torch.float64)
    scored = torch.randn(1, 12, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda s: layer(s, others)[1], scored)
    layer(scored, others)[1].sum().backward()
    # A window's weights add up to one, so their gradients cancel only in sum.
    assert layer.W_prob.weight.grad.abs().sum() > 0


def test_clustering_reads_back_to_the_host_once(monkeypatch):
    reads = []
    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, _name=name, _original=original, **kwargs):
            reads.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    EntropyClustering(8)(torch.randn(4, 50, 8), torch.randn(4, 50, 8))
    assert len(reads) == 1


def test_clustering_stays_in_float32_under_autocast():
    layer = EntropyClustering(16)
    scored, other = torch.randn(2, 300, 16) * 5, torch.randn(2, 300, 16)
    expected = layer(scored, other)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = layer(scored, other)
        halves = layer(scored, other.bfloat16())[1]
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        assert_tensors_close(a, e, rtol=0, atol=0)
    assert halves.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "shapes",
    [[(2, 5)], [(2, 0, 4)], [(2, 5, 4), (2, 6, 4)], [(2, 5, 4), (1, 5, 4)]],
)
def test_mismatched_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match="expected tensors"):
        EntropyClustering(4)(*(torch.zeros(shape) for shape in shapes))


def test_the_kernel_is_not_in_the_state_dict():
    assert set(EntropyClustering(4).state_dict()) == {"W_prob.weight", "W_prob.bias"}


@pytest.mark.parametrize("name", sorted({key.split("/")[0] for key in RECORDED.files if key.startswith("rowcol")}))
def test_row_column_clustering_matches_the_recorded_reference(name):
    import recipe

    meta = json.loads(str(RECORDED[f"{name}/meta"]))
    layer = EntropyClustering(meta["d_model"], meta["sigma"])
    recipe.fill(layer)
    with torch.no_grad():
        layer.W_prob.weight.mul_(meta["w_prob_gain"])
    names = ("k_row", "k_col", "value")
    shape = meta["batch"], meta["height"] * meta["width"], meta["d_model"]
    inputs = [recipe.tokens(f"{name}/{part}", *shape).requires_grad_() for part in names]

    outputs = layer(*inputs)
    assert outputs[0].shape[1] == meta["clusters"]
    for part, output in zip(names, outputs, strict=True):
        assert_close(output, RECORDED[f"{name}/{part}"])
    sum(
        (output * recipe.tokens(f"{name}/g{i}", *output.shape, smooth=False)).sum() for i, output in enumerate(outputs)
    ).backward()
    for part, tensor in zip(names, inputs, strict=True):
        assert_close(tensor.grad, RECORDED[f"{name}/d{part}"])
    for parameter, tensor in layer.named_parameters():
        assert_close(tensor.grad, RECORDED[f"{name}/grad/{parameter}"])


@pytest.mark.parametrize(
    "settings",
    [{"clusters": "regions", "max_clusters": 4}, {"clusters": "equal", "max_clusters": 5}, {"per_image": True}],
    ids=lambda settings: settings.get("clusters", "per_image"),
)
def test_traced_clusters_are_the_listed_ones(settings, monkeypatch):
    """Graphs use another class for the same clusters, of which a trace runs only a part."""
    layer = EntropyClustering(8, sigma=1.0, mask_padding=True, **settings)
    tokens, padding = torch.randn(2, 30, 8), torch.arange(30) >= torch.tensor([[30], [21]])
    listed = layer.cluster(tokens, padding)
    monkeypatch.setattr(clustering, "is_tracing", lambda: True)
    traced = layer.cluster(tokens, padding)
    assert type(listed) is RaggedClusters and type(traced) is TracedRaggedClusters
    assert listed.shape == traced.shape and torch.equal(listed.sizes(), traced.sizes())
    assert torch.equal(listed.assignment(30), traced.assignment(30)) and listed.assignment(30).min() == -1
    assert_tensors_close(traced.pool(tokens), listed.pool(tokens))
    index = torch.arange(30) // 5
    assert_tensors_close(traced.pool_shared(tokens[:, :6], index), listed.pool_shared(tokens[:, :6], index))
