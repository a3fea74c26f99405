"""The clustering's pieces on hand-worked cases, and the layer against the recorded reference."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import GOLDEN, assert_close
from torch.testing import assert_close as assert_tensors_close

from enact_common.clustering import (
    EntropyClustering,
    Windows,
    count_regions,
    cut_windows,
    gaussian_kernel,
    self_information,
    smooth,
    window_length,
)

RECORDED = np.load(GOLDEN / "attention.npz")


def test_gaussian_kernel_has_17_taps_for_sigma_3():
    kernel = gaussian_kernel(3.0)
    assert kernel.shape == (17,)
    assert kernel[8].item() == pytest.approx(1 / (3 * math.sqrt(2 * math.pi)))
    assert kernel[0].item() == pytest.approx(math.exp(-64 / 18) / (3 * math.sqrt(2 * math.pi)))
    # The tails that are cut off are not made up for.
    assert 0.98 < kernel.sum() < 0.999


@pytest.mark.parametrize("sigma, taps", [(1.0, 5), (1.5, 8), (2.5, 14), (1.4, 7), (5.0, 29)])
def test_gaussian_kernel_spans_three_sigmas_less_one(sigma, taps):
    assert gaussian_kernel(sigma).shape == (taps,)


@pytest.mark.parametrize("sigma", [0.0, 1 / 3, -1.0, float("nan")])
def test_gaussian_kernel_refuses_a_sigma_without_taps(sigma):
    with pytest.raises(ValueError, match="sigma"):
        gaussian_kernel(sigma)


def test_self_information_of_equal_scores_is_shared_out():
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
    assert window_length(tokens, regions) == length


def test_windows_drop_the_remainder_mostly_at_the_back():
    # 11 tokens in windows of 4: 3 left over, 1 in front and 2 behind.
    windows = cut_windows(torch.arange(11).view(1, 11, 1), 4)
    assert windows.squeeze(-1).tolist() == [[[1, 2, 3, 4], [5, 6, 7, 8]]]


def test_pooling_is_the_weighted_sum_of_a_window():
    tokens = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0]]])
    weights = torch.tensor([[[0.25, 0.75], [1.0, 0.0]]])
    assert Windows(weights).pool(tokens).tolist() == [[[1.75, 17.5], [3.0, 30.0]]]


def test_the_scores_gradient_comes_through_the_weights_alone():
    torch.manual_seed(1)
    layer = EntropyClustering(4, 1.0).double()
    others = torch.randn(1, 12, 2, dtype=torch.float64)
    scored = torch.randn(1, 12, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda s: layer(s, others)[1], scored)
    layer(scored, others)[1].sum().backward()
    # All windows' sums move with their weights, which always add up to one: this gradient is zero only in sum.
    assert layer.W_prob.weight.grad.abs().sum() > 0


def test_one_host_read_back(monkeypatch):
    reads = []
    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, _name=name, _original=original, **kwargs):
            reads.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    EntropyClustering(8)(torch.randn(4, 50, 8), torch.randn(4, 50, 8))
    assert reads == ["tolist"]


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
def test_unfit_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match="expected tensors"):
        EntropyClustering(4)(*(torch.zeros(shape) for shape in shapes))


def test_the_kernel_is_no_part_of_checkpoints():
    assert set(EntropyClustering(4).state_dict()) == {"W_prob.weight", "W_prob.bias"}


@pytest.mark.parametrize("name", sorted({key.split("/")[0] for key in RECORDED.files if key.startswith("rowcol")}))
def test_recorded_row_column_clustering(name):
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
