"""The rival layers: agreement with plain attention, padding, gradients, precision, export and refusals."""

import pytest
import torch
from conftest import SMALL_MODEL, build
from torch import Tensor, nn
from torch.testing import assert_close

from enact_common.attention.conversion import clustered_weights
from enact_common.attention.rivals import RIVALS, RivalSelfAttention
from enact_common.attention.rivals.base import average_by_index, bias_to_channels, spread_evenly
from enact_common.attention.rivals.kmeans import nearest
from enact_common.export.formats import EXPORTING
from enact_common.utils.device import TORCH_VERSION

DIM, HEADS, SIZE = 16, 4, (6, 8)
NUM_TOKENS = SIZE[0] * SIZE[1]

every_rival = pytest.mark.parametrize("name", RIVALS)
with_budget = pytest.mark.parametrize("name", [name for name, rival in RIVALS.items() if rival.takes_budget])


def rival(name: str, budget: int | None = None, dropout: float = 0.0, batch_first: bool = True) -> RivalSelfAttention:
    """A layer with biases, so that padded or empty keys would show; methods without a budget get none."""
    budget = budget if RIVALS[name].takes_budget else None
    layer = RIVALS[name](DIM, HEADS, dropout, batch_first, budget, SIZE)
    for projection in (layer.W_q, layer.W_k, layer.W_v):
        nn.init.normal_(projection.bias)
    return layer


def tokens(batch: int = 2, num_tokens: int = NUM_TOKENS) -> tuple[Tensor, Tensor]:
    """Keys and values (batch, N, d)."""
    return torch.randn(batch, num_tokens, DIM), torch.randn(batch, num_tokens, DIM)


def padding(*sizes: tuple[int, int]) -> Tensor:
    """The padding mask, bool (batch, N), of images with these heights and widths."""
    mask = torch.ones(len(sizes), *SIZE, dtype=torch.bool)
    for image, (height, width) in zip(mask, sizes, strict=True):
        image[:height, :width] = False
    return mask.flatten(1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", [name for name, rival in RIVALS.items() if rival.exact_at_full_budget])
def test_a_full_budget_is_plain_attention(name, padded):
    plain = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    nn.init.normal_(plain.in_proj_bias)
    layer = rival(name, NUM_TOKENS)
    learned = set(layer.state_dict()) - set(clustered_weights(plain.state_dict(), HEADS, scale_logits=True))
    assert learned <= {"W_score.weight", "W_pool.weight"}
    layer.load_state_dict(clustered_weights(plain.state_dict(), HEADS, scale_logits=True), strict=False)
    key, value = tokens()
    mask = padding(SIZE, (3, 5)) if padded else None
    expected = plain(key, key, value, key_padding_mask=mask)[0]
    close = torch.ones(key.shape[:2], dtype=torch.bool) if mask is None else ~mask
    assert_close(layer(key, key, value, key_padding_mask=mask)[0][close], expected[close], rtol=1e-5, atol=1e-5)


@every_rival
def test_scores_can_start_at_zero(name):
    argv = (*SMALL_MODEL["conditional"], "--encoder_attention", name, "--enact_zero_scores")
    model, *_ = build("conditional", *argv)
    scores = [tensor for key, tensor in model.state_dict().items() if key.endswith("W_score.weight")]
    assert bool(scores) == RIVALS[name].learns_scores and not any(tensor.any() for tensor in scores)
    if not scores:
        with pytest.raises(ValueError, match="learns no scores"):
            RIVALS[name](DIM, HEADS, zero_scores=True)


@pytest.mark.parametrize("budget", [None, 1, 10, 20, 1000])
@every_rival
def test_padding_and_batch_mates_change_nothing(name, budget):
    layer = rival(name, budget)
    key, value = tokens(3)
    sizes = (SIZE, (4, 5), (2, 3))
    mask = padding(*sizes)
    # Large values where padded would show in any average.
    key, value = (tensor + 100 * mask.unsqueeze(-1) for tensor in (key, value))
    batch = layer(key, key, value, key_padding_mask=mask)[0]
    for i, size in enumerate(sizes):
        own = ~mask[i]
        alone = layer(key[i : i + 1, own], key[i : i + 1, own], value[i : i + 1, own], map_size=size)[0]
        assert_close(batch[i, own], alone[0], rtol=1e-5, atol=1e-5)


@every_rival
def test_floating_point_masks_are_masks(name):
    layer = rival(name, 10)
    key, value = tokens()
    mask = padding(SIZE, (4, 5))
    expected = layer(key, key, value, key_padding_mask=mask)[0]
    assert torch.equal(
        layer(key, key, value, key_padding_mask=torch.zeros(mask.shape).where(~mask, -torch.inf))[0], expected
    )


@every_rival
def test_an_image_of_only_padding_stays_finite(name):
    layer = rival(name, 10)
    key, value = (tensor.requires_grad_() for tensor in tokens())
    output = layer(key, key, value, key_padding_mask=padding(SIZE, (0, 0)))[0]
    output.sum().backward()
    assert all(torch.isfinite(tensor).all() for tensor in (output, key.grad, value.grad))


@every_rival
def test_gradients_reach_every_parameter_and_lower_a_loss(name):
    layer = rival(name, 12)
    key, value = (tensor.requires_grad_() for tensor in tokens())
    target, mask = torch.randn(2, NUM_TOKENS, DIM), padding(SIZE, (4, 6))
    optimizer = torch.optim.Adam(layer.parameters(), 0.01)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (layer(key, key, value, key_padding_mask=mask)[0] - target)[~mask].square().mean()
        loss.backward()
        if not losses:
            gradients = dict(layer.named_parameters(), key=key, value=value)
            # A bias of the keys changes all logits of a query alike, except in linear attention.
            assert {n for n, p in gradients.items() if p.grad.abs().max() < 1e-7} <= {"W_k.bias"}
            assert all(torch.isfinite(p.grad).all() for p in gradients.values())
            assert not key.grad[mask].any() and not value.grad[mask].any()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < losses[0]


@every_rival
def test_results_repeat_in_a_copy(name):
    layer, copy = rival(name, 10), rival(name, 10)
    copy.load_state_dict(layer.state_dict())
    key, value = tokens()
    output = layer(key, key, value)[0]
    assert torch.equal(output, layer(key, key, value)[0])
    assert torch.equal(output, copy(key, key, value)[0])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@every_rival
def test_length_first_swaps_axes_and_dropout_acts_only_in_training(name, dropout):
    layer, other = rival(name, 10, dropout), rival(name, 10, dropout, batch_first=False)
    other.load_state_dict(layer.state_dict())
    key, value = tokens()
    swapped = (tensor.transpose(0, 1) for tensor in (key, key, value))
    assert_close(other.eval()(*swapped)[0].transpose(0, 1), layer.eval()(key, key, value)[0])
    if dropout and name != "linear":
        layer.train()
        assert not torch.equal(layer(key, key, value)[0], layer(key, key, value)[0])


@pytest.mark.parametrize("form", ["autocast", torch.bfloat16, torch.float64], ids=str)
@every_rival
def test_other_precisions_agree_with_float32(name, form):
    layer = rival(name, 12)
    key, value = (tensor.bfloat16().float() for tensor in tokens())
    if form is torch.bfloat16:
        # Round the weights first, so that both select and cluster the same tokens.
        layer.bfloat16().float()
    mask = padding(SIZE, (4, 5))
    expected = layer(key, key, value, key_padding_mask=mask)[0]
    dtype = torch.float32 if form == "autocast" else form
    key, value = (tensor.to(dtype).requires_grad_() for tensor in (key, value))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=form == "autocast"):
        output = layer.to(dtype)(key, key, value, key_padding_mask=mask)[0]
    output.float().sum().backward()
    assert output.dtype == (torch.bfloat16 if form == "autocast" else form)
    assert torch.isfinite(key.grad).all()
    tolerance = 1e-5 if form is torch.float64 else 0.05
    assert_close(output.float()[~mask], expected[~mask], rtol=tolerance, atol=tolerance)


@every_rival
def test_queries_may_differ_from_keys(name):
    layer = rival(name, 10)
    key, value = tokens()
    assert layer(torch.randn(2, 7, DIM), key, value)[0].shape == (2, 7, DIM)


@pytest.mark.parametrize("budget, keys", [(None, 3), (1, 1), (10, 10), (1000, NUM_TOKENS)])
@pytest.mark.parametrize("name", [name for name in RIVALS if name not in ("act", "linear")])
def test_no_more_keys_than_the_budget(name, budget, keys, monkeypatch):
    layer = rival(name, budget)
    seen = []
    attend = layer.softmax_attention
    monkeypatch.setattr(layer, "softmax_attention", lambda *args: seen.append(args[1]) or attend(*args))
    key, value = tokens()
    layer(key, key, value)
    assert [tuple(key.shape) for key in seen] == [(2, keys, DIM)]


@pytest.mark.parametrize("budget, most", [(1, 1), (2, 2), (3, 2), (10, 8)])
def test_prototypes_stay_within_the_budget(budget, most):
    key, value = tokens()
    output = rival("act", budget)(key, key, value)[0]
    assert len(output[0].unique(dim=0)) <= most


@pytest.mark.slow
@pytest.mark.skipif(TORCH_VERSION < EXPORTING, reason="this PyTorch's torch.export is too old")
@pytest.mark.parametrize("name", [name for name, rival in RIVALS.items() if rival.export_fault is None])
def test_exported_layers_take_other_images_and_padding(name):
    layer = rival(name, 10).eval()
    key, value = tokens()
    exported = torch.export.export(layer, (key, key, value, padding(SIZE, (4, 5)))).module()
    key, value = tokens()
    mask = padding((2, 3), (0, 0))
    assert_close(exported(key, key, value, mask)[0], layer(key, key, value, mask)[0])


@pytest.mark.parametrize(
    "call",
    [{"need_weights": True}, {"attn_mask": torch.zeros(48, 48)}, {"is_causal": True}],
    ids=lambda call: min(call),
)
@every_rival
def test_unsupported_calls_are_refused(name, call):
    key, value = tokens()
    with pytest.raises(ValueError, match=f"{RIVALS[name].__name__}.*need_weights=False"):
        rival(name)(key, key, value, **call)


@pytest.mark.parametrize("size", [None, (6, 7)])
@pytest.mark.parametrize("name", [name for name, rival in RIVALS.items() if rival.needs_map_size])
def test_missing_and_wrong_map_sizes_are_refused(name, size):
    key, value = tokens()
    with pytest.raises(ValueError, match="map_size"):
        RIVALS[name](DIM, HEADS, batch_first=True)(key, key, value, map_size=size)


@with_budget
def test_budgets_below_one_are_refused(name):
    with pytest.raises(ValueError, match="token_budget must be at least 1.*got 0"):
        rival(name, 0)


@pytest.mark.parametrize("name", [name for name, rival in RIVALS.items() if not rival.takes_budget])
def test_a_budget_without_meaning_is_refused(name):
    with pytest.raises(ValueError, match="has no token_budget, got 7"):
        RIVALS[name](DIM, HEADS, token_budget=7)


@every_rival
def test_heads_must_divide_the_channels(name):
    with pytest.raises(ValueError, match="multiple"):
        RIVALS[name](30, 4)


def test_tokens_are_spread_evenly_over_an_images_own():
    present = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 0, 1, 0, 1], [0, 0, 0, 1, 0, 0, 0, 0]]).bool()
    index, kept = spread_evenly(present, torch.tensor([4, 2, 1]), 4)
    assert index[0].tolist() == [1, 3, 5, 7]
    assert index[1, :2].tolist() == [3, 7]
    assert index[2, 0] == 3
    assert kept.sum(dim=1).tolist() == [4, 2, 1]
    assert all(len(set(row)) == 4 for row in index.tolist())


def test_averages_by_index():
    values = torch.tensor([[[1.0], [3.0], [5.0], [100.0]]])
    present = torch.tensor([[True, True, True, False]])
    (averages,), sizes = average_by_index((values,), torch.tensor([[0, 0, 2, 1]]), present, 3)
    assert averages.flatten().tolist() == [2.0, 0.0, 5.0]
    assert sizes.tolist() == [[2.0, 0.0, 1.0]]


def test_nearest_centres_leave_out_those_that_do_not_count():
    features, centres = torch.tensor([[[0.0], [9.0]]]), torch.tensor([[[1.0], [8.0], [0.0]]])
    assert nearest(features, centres, torch.tensor([[True, True, False]])).tolist() == [[0, 1]]


def test_a_bias_in_more_channels_has_the_same_gradient():
    q, k, v, weight = torch.randn(4, 2, HEADS, 5, 8)
    bias = torch.randn(2, 5, requires_grad=True)
    missing = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    given = bias.masked_fill(missing, -torch.inf)
    wider_q, wider_k, wider_v, rest = bias_to_channels(q, k, v, given)
    assert not rest.requires_grad
    attention = nn.functional.scaled_dot_product_attention
    output = attention(wider_q, wider_k, wider_v, rest[:, None, None], scale=8**-0.5)[..., :8]
    expected = attention(q, k, v, given[:, None, None])
    assert_close(output, expected)
    gradients = [torch.autograd.grad(result, bias, weight, retain_graph=True)[0] for result in (output, expected)]
    assert_close(*gradients)
