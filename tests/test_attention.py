"""ENACT's self-attention: agreement with the recorded reference, and use in place of `nn.MultiheadAttention`."""

import json

import pytest
import torch
from conftest import assert_close
from test_clustering import RECORDED
from torch import nn
from torch.testing import assert_close as assert_tensors_close

from enact_common import EnactSelfAttention


@pytest.mark.parametrize("name", sorted({key.split("/")[0] for key in RECORDED.files if key.startswith("mhsa")}))
def test_attention_matches_the_recorded_reference(name):
    import recipe

    meta = json.loads(str(RECORDED[f"{name}/meta"]))
    layer = EnactSelfAttention(meta["d_model"], meta["heads"], sigma=meta["sigma"])
    recipe.fill(layer)
    with torch.no_grad():
        layer.W_prob.weight.mul_(meta["w_prob_gain"])
    inputs = {
        part: recipe.tokens(f"{name}/{part}", meta["batch"], meta["tokens"], meta["d_model"])
        .transpose(0, 1)
        .contiguous()
        .requires_grad_()
        for part in "qkv"
    }
    output, weights = layer(*inputs.values())
    assert weights is None
    assert_close(output, RECORDED[f"{name}/out"])

    (output * recipe.tokens(f"{name}/g", *output.shape, smooth=False)).sum().backward()
    for part, tensor in inputs.items():
        assert_close(tensor.grad, RECORDED[f"{name}/d{part}"])
    for parameter, tensor in layer.named_parameters():
        assert_close(tensor.grad, RECORDED[f"{name}/grad/{parameter}"])


def by_definition(layer: EnactSelfAttention, query, key, value):
    """The layer's definition, batch first: softmax of unscaled logits, then division by head_dim."""
    key, value = super(EnactSelfAttention, layer).forward(key, value)
    head_dim = layer.embed_dim // layer.num_heads

    def heads(x):
        return x.unflatten(-1, (layer.num_heads, head_dim)).transpose(1, 2)

    q, k, v = heads(layer.W_q(query)), heads(layer.W_k(key)), heads(layer.W_v(value))
    attended = (q @ k.transpose(-1, -2)).softmax(-1) @ v / head_dim
    return layer.W_o(attended.transpose(1, 2).flatten(2))


def test_batch_first_only_swaps_axes():
    layer = EnactSelfAttention(32, 4)
    first = EnactSelfAttention(32, 4, batch_first=True)
    first.load_state_dict(layer.state_dict())
    q, k, v = torch.randn(3, 2, 40, 32)
    expected = by_definition(layer, q, k, v)
    assert_tensors_close(first(q, k, v)[0], expected)
    assert_tensors_close(layer(*(x.transpose(0, 1) for x in (q, k, v)))[0], expected.transpose(0, 1))


def test_queries_may_differ_from_keys():
    layer = EnactSelfAttention(32, 4, batch_first=True)
    q, k, v = torch.randn(2, 7, 32), torch.randn(2, 40, 32), torch.randn(2, 40, 32)
    assert_tensors_close(layer(q, k, v)[0], by_definition(layer, q, k, v))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_replaces_multihead_attention_in_pytorchs_encoder(batch_first, training, grad):
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=batch_first)
    layer.self_attn = EnactSelfAttention(32, 4, batch_first=batch_first)
    encoder = nn.TransformerEncoder(layer, 2)
    encoder.train(training)
    x = torch.randn(2, 30, 32)
    padding = torch.zeros(2, 30, dtype=torch.bool)
    with torch.set_grad_enabled(grad):
        out = encoder(x if batch_first else x.transpose(0, 1), src_key_padding_mask=padding)
        out = out if batch_first else out.transpose(0, 1)
        expected = x
        for layer in encoder.layers:
            attended = by_definition(layer.self_attn, expected, expected, expected)
            expected = layer.norm1(expected + attended)
            expected = layer.norm2(expected + layer.linear2(layer.linear1(expected).relu()))
    assert_tensors_close(out, expected)


def test_padding_mask_has_no_effect_yet():
    layer = EnactSelfAttention(16, 2)
    x = torch.randn(20, 2, 16)
    padding = torch.arange(20).expand(2, 20) > 12
    assert_tensors_close(layer(x, x, x, key_padding_mask=padding)[0], layer(x, x, x)[0])


@pytest.mark.parametrize(
    "request_", [{"need_weights": True}, {"attn_mask": torch.zeros(20, 20)}, {"is_causal": True}], ids=str
)
def test_unsupported_arguments_are_refused(request_):
    x = torch.randn(20, 2, 16)
    with pytest.raises(ValueError, match="need_weights=False"):
        EnactSelfAttention(16, 2)(x, x, x, **request_)


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="multiple"):
        EnactSelfAttention(30, 4)


def test_parameters_are_named_as_in_the_reference():
    names = {name.split(".")[0] for name in EnactSelfAttention(16, 2).state_dict()}
    assert names == {"W_q", "W_k", "W_v", "W_o", "W_prob"}


def test_dropout_acts_only_in_training():
    layer = EnactSelfAttention(16, 2, dropout=0.5)
    x = torch.randn(40, 1, 16)
    assert not torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])
    layer.eval()
    assert torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])


def saved_bytes(layer, tokens: int, batch: int, amp: bool) -> int:
    """Bytes that a layer's forward pass in an encoder keeps for the backward pass, without the parameters."""
    source, position = torch.randn(2, tokens, batch, layer.embed_dim)
    source.requires_grad_()
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    storages, held = {}, []

    def keep(tensor):
        held.append(tensor)  # kept alive, so that no address is reused
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp),
    ):
        placed = source + position
        layer(placed, placed, value=source, need_weights=False)
    return sum(size for address, size in storages.items() if address not in parameters)


@pytest.mark.parametrize("amp, share", [(False, 0.85), (True, 0.8)], ids=["float32", "bf16"])
@pytest.mark.parametrize("tokens, batch", [(850, 2), (4200, 1)])
@pytest.mark.parametrize("settings", [{}, {"clusters": "regions"}, {"per_image": True}], ids=str)
def test_saves_less_for_the_backward_pass_than_plain_attention(tokens, batch, amp, share, settings):
    """Token counts of the published models, with half their heads and channels."""
    plain, ours = nn.MultiheadAttention(128, 4), EnactSelfAttention(128, 4, **settings)
    assert saved_bytes(ours, tokens, batch, amp) < share * saved_bytes(plain, tokens, batch, amp)


@pytest.mark.parametrize("batch_first", [False, True])
def test_clusters_under_autocast_equal_those_in_float32(batch_first):
    torch.manual_seed(0)
    layer, tokens = EnactSelfAttention(32, 4, batch_first=batch_first), 5 * torch.randn(400, 2, 32)
    tokens = (tokens.transpose(0, 1) if batch_first else tokens).requires_grad_()
    weights = []
    layer.register_cluster_hook(lambda information, clusters: weights.append(clusters.weights))
    expected = layer(tokens, tokens, tokens)[0]
    gradients = torch.autograd.grad(expected.square().mean(), (tokens, layer.W_prob.weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(tokens, tokens, tokens)[0]
    assert output.dtype == torch.bfloat16
    assert_tensors_close(weights[1], weights[0], rtol=0, atol=0)
    assert_tensors_close(output.float(), expected, rtol=0.05, atol=0.05)
    for ours, theirs in zip(
        torch.autograd.grad(output.float().square().mean(), (tokens, layer.W_prob.weight)), gradients, strict=True
    ):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.05 * theirs.norm()


def test_the_attention_matrix_is_not_saved_for_the_backward_pass():
    tokens, heads = 600, 8
    layer = EnactSelfAttention(64, heads)
    x = torch.randn(tokens, 1, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        layer(x, x, x)
    clusters = super(EnactSelfAttention, layer).forward(x.transpose(0, 1))[0].shape[1]
    assert clusters >= 60
    assert max(saved) < heads * tokens * clusters / 4
