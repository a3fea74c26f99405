"""`plug_in`: ENACT's attention in models of other libraries."""

import copy
import importlib
import os
import pickle
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import SMALL_MODEL, build
from torch import Tensor, nn
from torch.testing import assert_close

import enact_common.clustering
from enact_common import EnactSelfAttention, nested_tensor_from_tensor_list, plug_in
from enact_common.attention.foreign import padded_keys
from enact_common.attention.rivals import RIVALS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "use" / "plug_in.md"

close = partial(assert_close, rtol=1e-5, atol=1e-5)


@pytest.fixture
def clusters_of_one_token(monkeypatch):
    """Make every token a region, so that windows have one token."""

    def borders(signal: Tensor) -> Tensor:
        return torch.ones_like(signal[:, 1:], dtype=torch.bool)

    monkeypatch.setattr(enact_common.attention.clustering, "region_borders", borders)


def trained(model: nn.Module) -> nn.Module:
    """The model with perturbed weights, so that no bias is zero and no norm weight is one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def torch_encoder(batch_first: bool = True, norm_first: bool = False, layers: int = 2, **settings) -> nn.Module:
    """PyTorch's encoder with 16 channels and 4 heads, without dropout."""
    layer = nn.TransformerEncoderLayer(
        16, 4, 32, dropout=0.0, batch_first=batch_first, norm_first=norm_first, **settings
    )
    return trained(nn.TransformerEncoder(layer, layers, enable_nested_tensor=batch_first and not norm_first))


class Stranger(nn.Module):
    """A foreign detector with its own encoder and decoder layer; its calls leave need_weights at the default."""

    def __init__(self, **settings):
        super().__init__()
        self.encoder = nn.ModuleList([nn.ModuleDict({"attn": nn.MultiheadAttention(16, 4, **settings)})])
        self.decoder = nn.ModuleDict({"attn": nn.MultiheadAttention(16, 4), "cross": nn.MultiheadAttention(16, 4)})

    def forward(self, x: Tensor, **call) -> Tensor:
        x = x + self.encoder[0]["attn"](x, x, x, **call)[0]
        return self.decoder["cross"](x[:3], x, x)[0]


@pytest.fixture(scope="module")
def transformers():
    """Hugging Face's library in offline mode."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    library = pytest.importorskip("transformers")
    if not library.is_torch_available():
        pytest.skip(f"transformers {library.__version__} does not support PyTorch {torch.__version__}")
    return library


def hugging_face(transformers, name: str, **settings) -> nn.Module:
    """A small DETR ("Detr") or Conditional DETR ("ConditionalDetr") with random weights."""
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 16], depths=[1] * 4, layer_type="basic", out_features=["stage4"]
    )
    config = getattr(transformers, f"{name}Config")(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=5,
        **{"dropout": 0.0, **settings},
    )
    return trained(getattr(transformers, f"{name}ForObjectDetection")(config)).eval()


HUGGING_FACE = ("Detr", "ConditionalDetr")
ENCODER_LAYERS = ["model.encoder.layers.0.self_attn", "model.encoder.layers.1.self_attn"]

# The pixel mask of a batch of two images: the first fills it, the second fills 64 x 96 of 96 x 128 pixels.
PIXEL_MASK = torch.zeros(2, 96, 128, dtype=torch.long)
PIXEL_MASK[0] = 1
PIXEL_MASK[1, :64, :96] = 1


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["length_first", "batch_first"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post_norm", "pre_norm"])
def test_pytorchs_encoder_gives_the_same_output(clusters_of_one_token, norm_first, batch_first, padded, training, grad):
    plain = torch_encoder(batch_first, norm_first).train(training)
    encoder = copy.deepcopy(plain)
    assert plug_in(encoder, mask_padding=padded) == ["layers.0.self_attn", "layers.1.self_attn"]
    x = torch.randn(3, 10, 16)
    # Padding at the end of sequences, for which PyTorch would use nested tensors.
    padding = torch.arange(10) >= torch.tensor([[10], [7], [4]]) if padded else None
    with torch.set_grad_enabled(grad):
        found, expected = (
            model(x if batch_first else x.transpose(0, 1), src_key_padding_mask=padding) for model in (encoder, plain)
        )
    if not batch_first:
        found, expected = found.transpose(0, 1), expected.transpose(0, 1)
    present = slice(None) if padding is None else ~padding  # outputs at padding are arbitrary
    close(found[present], expected[present])


def test_one_replaced_layer_turns_nested_tensors_off(clusters_of_one_token):
    plain = torch_encoder().eval()
    encoder = copy.deepcopy(plain)
    plug_in(encoder, where="layers.1.self_attn", mask_padding=True)
    x, padding = torch.randn(2, 10, 16), torch.arange(10) >= torch.tensor([[10], [6]])
    with torch.no_grad():
        close(encoder(x, src_key_padding_mask=padding)[~padding], plain(x, src_key_padding_mask=padding)[~padding])


def test_only_the_encoder_of_pytorchs_transformer_is_replaced(clusters_of_one_token):
    plain = trained(nn.Transformer(16, 4, 2, 2, 32, dropout=0.0, batch_first=True)).eval()
    model = copy.deepcopy(plain)
    assert plug_in(model) == ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]
    source, target = torch.randn(2, 10, 16), torch.randn(2, 5, 16)
    close(model(source, target), plain(source, target))


@pytest.mark.parametrize("scale_logits", [False, True], ids=["as_published", "scaled"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_a_foreign_encoder_gives_the_same_output(clusters_of_one_token, bias, scale_logits):
    plain = trained(Stranger(bias=bias))
    model = copy.deepcopy(plain)
    assert plug_in(model, scale_logits=scale_logits) == ["encoder.0.attn"]
    assert model.encoder[0].attn.scale_logits == scale_logits
    x = torch.randn(12, 2, 16)
    close(model(x), plain(x))


@pytest.mark.parametrize("variant", ["detr", "conditional"])
def test_our_plain_models_become_models_with_enact(variant, monkeypatch):
    plain = trained(build(variant, *SMALL_MODEL[variant], "--encoder_attention", "mhsa")[0]).eval()
    images = nested_tensor_from_tensor_list([torch.rand(3, 64, 96), torch.rand(3, 96, 64)])
    plugged = copy.deepcopy(plain)
    assert plug_in(plugged, mask_padding=True) == ["transformer.encoder.layers.0.self_attn"]
    with torch.no_grad():
        with monkeypatch.context() as patch:
            clusters_of_one_token.__wrapped__(patch)
            found, expected = plugged(images), plain(images)
            for name in ("pred_logits", "pred_boxes"):
                close(found[name], expected[name])

        enact = build(variant, *SMALL_MODEL[variant], "--encoder_attention", "enact", "--enact_mask_padding")[0].eval()
        enact.load_state_dict(plugged.state_dict())
        close(plugged(images)["pred_logits"], enact(images)["pred_logits"])


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("attention", [{}, {"attn_implementation": "eager"}], ids=["default", "eager"])
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_faces_models_give_the_same_output(clusters_of_one_token, transformers, name, attention, padded):
    plain = hugging_face(transformers, name, **attention)
    model = copy.deepcopy(plain)
    assert plug_in(model, mask_padding=padded) == ENCODER_LAYERS
    inputs = {"pixel_values": torch.rand(2, 3, 96, 128), "pixel_mask": PIXEL_MASK if padded else None}
    for training in (False, True):
        with torch.no_grad():
            found, expected = model.train(training)(**inputs), plain.train(training)(**inputs)
        close(found.logits, expected.logits)
        close(found.pred_boxes, expected.pred_boxes)


def encoder_and_inputs() -> tuple[nn.Module, dict]:
    return torch_encoder(), {"src": torch.randn(2, 60, 16)}


@pytest.fixture(params=["torch", *HUGGING_FACE])
def model_and_inputs(request):
    """A plain model, and inputs with at least 60 tokens."""
    if request.param == "torch":
        return encoder_and_inputs()
    transformers = request.getfixturevalue("transformers")
    pixels = torch.rand(2, 3, 256, 288)
    return hugging_face(transformers, request.param), {"pixel_values": pixels}


def output(model: nn.Module, inputs: dict) -> Tensor:
    out = model(**inputs)
    return out if isinstance(out, Tensor) else out.logits


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clusters": "regions", "per_image": True, "mask_padding": True, "max_clusters": 9},
        {"temperature": 0.5, "kernels": "torch"},
    ],
    ids=str,
)
def test_all_parts_are_trained_with_real_clusters(model_and_inputs, settings):
    plain, inputs = model_and_inputs
    model = copy.deepcopy(plain)
    names = plug_in(model, 2.0, **settings)
    found = output(model, inputs)
    assert found.isfinite().all()
    assert not torch.allclose(found, output(plain, inputs), atol=1e-4)
    found.square().sum().backward()
    for name in names:
        attention = model.get_submodule(name)
        assert attention.sigma == 2.0 and attention.max_clusters == settings.get("max_clusters")
        assert attention.kernels == settings.get("kernels", "auto")
        # W_k.bias and W_prob.bias shift all logits equally, so their gradients are only rounding.
        for part in ("W_prob.weight", "W_q.weight", "W_q.bias", "W_k.weight", "W_v.weight", "W_v.bias", "W_o.weight"):
            assert attention.get_parameter(part).grad.abs().max() > 0, part


def test_state_dicts_and_copies_carry_the_scores(model_and_inputs):
    plain, inputs = model_and_inputs
    first, second = copy.deepcopy(plain), copy.deepcopy(plain)
    for model in (first, second):
        plug_in(model)
        model.eval()
    before = output(first, inputs)
    # Each plug_in call initializes W_prob randomly.
    assert not torch.equal(output(second, inputs), before)
    second.load_state_dict(first.state_dict())
    assert torch.equal(output(second, inputs), before)
    copied = copy.deepcopy(first)
    trained(first)
    assert torch.equal(output(copied, inputs), before)


def test_mask_padding_keeps_padding_out_of_hugging_faces_clusters(transformers):
    model = hugging_face(transformers, "Detr")
    plug_in(model, mask_padding=True, per_image=True)
    pixels = torch.rand(2, 3, 96, 128)
    # The map has 3 x 4 cells and the second image fills 2 x 3; put noise in all others.
    present = torch.ones(2, 3, 4, dtype=torch.bool)
    present[1, 2] = present[1, :, 3] = False
    noise = torch.randn(2, 32, 3, 4) * ~present.unsqueeze(1)
    present = present.flatten(1)
    with torch.no_grad():
        before = model(pixels, PIXEL_MASK).encoder_last_hidden_state
        model.model.input_projection.register_forward_hook(lambda module, args, out: out + noise)
        after = model(pixels, PIXEL_MASK).encoder_last_hidden_state
    close(after[present], before[present])
    assert not torch.allclose(after[~present], before[~present], atol=1e-3)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_faces_encoder_returns_no_attention_weights(transformers, name):
    model = hugging_face(transformers, name, attn_implementation="eager")
    plug_in(model)
    out = model(pixel_values=torch.rand(1, 3, 96, 128), output_attentions=True)
    assert not any(weights is not None for weights in out.encoder_attentions or ())
    assert out.cross_attentions[0].shape[-1] == 12


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtype_mode_and_frozen_parameters_are_kept(dtype, training):
    encoder = torch_encoder(layers=1, dtype=dtype).train(training)
    frozen = encoder.layers[0].self_attn
    frozen.in_proj_weight.requires_grad_(False)
    frozen.out_proj.bias.requires_grad_(False)
    plug_in(encoder)
    attention = encoder.layers[0].self_attn
    assert all(part.training == training for part in attention.modules())
    trains = {name for name, parameter in attention.named_parameters() if parameter.requires_grad}
    assert trains == {"W_q.bias", "W_k.bias", "W_v.bias", "W_o.weight", "W_prob.weight", "W_prob.bias"}
    assert {p.dtype for name, p in attention.named_parameters() if not name.startswith("W_prob")} == {dtype}
    assert attention.W_prob.weight.dtype == attention.kernel.dtype == torch.promote_types(dtype, torch.float32)
    assert encoder(torch.randn(2, 40, 16, dtype=dtype)).dtype == dtype


def test_the_device_is_kept():
    attention = nn.Sequential(nn.MultiheadAttention(16, 4, device="meta"))
    plug_in(attention, where="0")
    assert {tensor.device.type for tensor in (*attention.parameters(), *attention.buffers())} == {"meta"}


def rival_settings(name: str, budget: int, size: tuple[int, int]) -> dict:
    """The arguments of `plug_in` for a rival: its kind and, where it has them, budget and map size."""
    rival = RIVALS[name]
    settings = {"token_budget": budget} if rival.takes_budget else {}
    return {"kind": name, **settings, **({"map_size": size} if rival.needs_map_size else {})}


@pytest.mark.parametrize("name", RIVALS)
def test_rivals_are_plugged_in(name):
    plain = torch_encoder().eval()
    encoder = copy.deepcopy(plain)
    encoder.layers[1].self_attn.in_proj_weight.requires_grad_(False)
    assert plug_in(encoder, **rival_settings(name, 99, (3, 4))) == ["layers.0.self_attn", "layers.1.self_attn"]
    attention = encoder.layers[1].self_attn
    assert type(attention) is RIVALS[name] and attention.batch_first
    assert not attention.W_q.weight.requires_grad and attention.W_o.weight.requires_grad
    # The lower part of the second map is padding.
    x, padding = torch.randn(2, 12, 16), torch.arange(12) >= torch.tensor([[12], [8]])
    found, expected = (model(x, src_key_padding_mask=padding) for model in (encoder, plain))
    assert torch.allclose(found[~padding], expected[~padding], atol=1e-5) == RIVALS[name].exact_at_full_budget
    with pytest.raises(ValueError, match=r"(?s)ENACT cannot replace.*a rival's already"):
        plug_in(encoder, where=".*self_attn")
    half = torch_encoder(dtype=torch.bfloat16)
    plug_in(half, **rival_settings(name, 5, (3, 4)))
    assert half(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", RIVALS)
def test_rivals_are_plugged_into_hugging_faces_models(transformers, name):
    plain = hugging_face(transformers, "Detr")
    model = copy.deepcopy(plain)
    assert plug_in(model, **rival_settings(name, 99, (3, 4))) == ENCODER_LAYERS
    model = pickle.loads(pickle.dumps(model))
    inputs = {"pixel_values": torch.rand(2, 3, 96, 128), "pixel_mask": PIXEL_MASK}
    with torch.no_grad():
        found, expected = (m(**inputs).logits for m in (model, plain))
    assert torch.allclose(found, expected, atol=1e-5) == RIVALS[name].exact_at_full_budget


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"kind": "mhsa"}, "kind='mhsa': choose from enact, avgpool"),
        ({"kind": "avgpool", "sigma": 1.0}, "sigma=1.0 has no effect with kind='avgpool'"),
        ({"kind": "avgpool", "scale_logits": True}, "scale_logits=True has no effect"),
        ({"kind": "avgpool", "kernels": "triton"}, "kernels='triton' has no effect"),
        ({"kind": "avgpool", "token_budget": 0}, "token_budget must be at least 1"),
        ({"token_budget": 9}, "token_budget=9 has no effect with kind='enact'"),
        ({"map_size": (3, 4)}, "map_size=.* has no effect with kind='enact'"),
        *(({"kind": name, "map_size": (3, 4)}, "map_size") for name in RIVALS if not RIVALS[name].needs_map_size),
        *(({"kind": name, "token_budget": 9}, "token_budget") for name in RIVALS if not RIVALS[name].takes_budget),
    ],
    ids=str,
)
def test_settings_of_another_kind_are_refused(settings, message):
    model = Stranger()
    with pytest.raises(ValueError, match=message):
        plug_in(model, **settings)
    assert type(model.encoder[0]["attn"]) is nn.MultiheadAttention


def test_missing_biases_become_zero_and_frozen():
    model = Stranger(bias=False)
    plug_in(model)
    attention = model.encoder[0]["attn"]
    for name in ("W_q", "W_k", "W_v", "W_o"):
        bias = attention.get_parameter(f"{name}.bias")
        assert not bias.any() and not bias.requires_grad


def test_dropout_is_kept():
    model = Stranger(dropout=0.25)
    plug_in(model)
    assert model.encoder[0]["attn"].dropout == 0.25


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_faces_dropout_is_kept(transformers, name):
    model = hugging_face(transformers, name, attention_dropout=0.5)
    assert {model.get_submodule(layer).dropout for layer in plug_in(model)} == {0.5}


def test_the_old_attention_is_not_changed():
    model = Stranger()
    old = model.encoder[0]["attn"]
    before = copy.deepcopy(old.state_dict())
    plug_in(model)
    trained(model)
    assert all(torch.equal(old.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_shared_layer_stays_shared():
    layer = nn.TransformerEncoderLayer(16, 4, 32)
    model = nn.ModuleList([layer, layer])
    assert plug_in(model) == ["0.self_attn", "1.self_attn"]
    assert model[0].self_attn is model[1].self_attn and isinstance(layer.self_attn, EnactSelfAttention)


@pytest.mark.parametrize(
    "where, names",
    [
        (r"decoder\.attn", ["decoder.attn"]),
        (re.compile(r".*\.attn"), ["encoder.0.attn", "decoder.attn"]),
        (lambda name, module: "cross" in name and module.embed_dim == 16, ["decoder.cross"]),
    ],
    ids=["pattern", "compiled", "function"],
)
def test_where_selects_by_name_pattern_or_function(where, names):
    model = Stranger()
    attentions = dict(model.named_modules())
    assert plug_in(model, where=where) == names
    for name, module in model.named_modules():
        if isinstance(attentions.get(name), nn.MultiheadAttention):
            assert isinstance(module, EnactSelfAttention) == (name in names)


class EncoderBlock(nn.Module):
    """An encoder that only its class name shows to be one, with self- and cross-attention."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4)
        self.cross_attn = nn.MultiheadAttention(16, 4)


class DecoderOfBlocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = EncoderBlock()


class EncoderDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4)
        self.down = EncoderBlock()
        self.up = DecoderOfBlocks()


def test_encoders_are_recognized_by_names_and_classes():
    assert plug_in(EncoderDecoder()) == ["down.attn"]


class OwnAttention(nn.MultiheadAttention):
    """A subclass that may compute anything."""


class LinearAttention(nn.Module):
    """Another kind of attention."""


def hooked(part: str = "") -> nn.Module:
    attention = nn.MultiheadAttention(16, 4)
    attention.get_submodule(part).register_forward_hook(lambda *_: None)
    return attention


def normed() -> nn.Module:
    attention = nn.MultiheadAttention(16, 4)
    nn.utils.parametrizations.spectral_norm(attention.out_proj)
    return attention


@pytest.mark.parametrize(
    "attention, reason",
    [
        (partial(nn.MultiheadAttention, 16, 4, kdim=8), "kdim"),
        (partial(nn.MultiheadAttention, 16, 4, vdim=8), "vdim"),
        (partial(nn.MultiheadAttention, 16, 4, add_bias_kv=True), "add_bias_kv"),
        (partial(nn.MultiheadAttention, 16, 4, add_zero_attn=True), "add_zero_attn"),
        (partial(OwnAttention, 16, 4), "OwnAttention.*subclass"),
        (LinearAttention, "LinearAttention.*neither"),
        (partial(EnactSelfAttention, 16, 4), "ENACT's attention or a rival's already"),
        (hooked, "hooks"),
        (partial(hooked, "out_proj"), "output projection"),
        (normed, "output projection"),
    ],
    ids=["kdim", "vdim", "bias_kv", "zero_attn", "subclass", "unknown", "enact", "hooks", "hooked_out", "normed_out"],
)
def test_nothing_is_replaced_if_one_attention_cannot_be(attention, reason):
    model = nn.ModuleDict({"first": nn.MultiheadAttention(16, 4), "second": attention()})
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=rf"second \(.*{reason}"):
        plug_in(model, where=".*")
    assert dict(model.named_modules()) == before


def test_adapters_on_hugging_faces_projections_are_refused(transformers):
    model = hugging_face(transformers, "Detr")
    attention = model.model.encoder.layers[1].self_attn
    attention.k_proj = nn.Sequential(attention.k_proj)
    with pytest.raises(ValueError, match=re.escape(ENCODER_LAYERS[1]) + ".*nn.Linear"):
        plug_in(model)
    assert not any(isinstance(module, EnactSelfAttention) for module in model.modules())


def test_a_module_shared_with_an_unselected_place_is_refused():
    model = Stranger()
    model.decoder["attn"] = model.encoder[0]["attn"]
    with pytest.raises(ValueError, match=r"encoder\.0\.attn.*same module as decoder\.attn"):
        plug_in(model)


@pytest.mark.parametrize(
    "model, where, message",
    [
        (lambda: nn.Linear(3, 3), None, "Linear has no attention"),
        (lambda: nn.MultiheadAttention(16, 4), None, "pass the module that holds it"),
        (lambda: nn.ModuleList([nn.MultiheadAttention(16, 4)]), None, r"no encoder .*\n  \\d\+ \(MultiheadAtt"),
        (Stranger, "encoder", r"where='encoder' matches none(.|\n)*  encoder\.\\d\+\.attn \(MultiheadAttention\)"),
        (Stranger, lambda name, module: False, r"decoder\.cross \(MultiheadAttention\)"),
        (Stranger, "*", "not a valid regular expression"),
    ],
    ids=["no_attention", "itself", "no_encoder", "pattern", "function", "no_pattern"],
)
def test_models_without_a_matching_attention_are_refused(model, where, message):
    with pytest.raises(ValueError, match=message):
        plug_in(model(), where=where)


def test_plugging_in_twice_is_refused():
    model = torch_encoder()
    plug_in(model)
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"layers\.\\d\+\.self_attn \(EnactSelfAttention\)"):
        plug_in(model)
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize(
    "settings",
    [{"sigma": 0.1}, {"clusters": "circles"}, {"max_clusters": 0}, {"temperature": -1}, {"kernels": "cuda"}],
    ids=str,
)
def test_wrong_settings_replace_nothing(settings):
    model = Stranger()
    with pytest.raises(ValueError, match=next(iter(settings)).split("_")[0]):
        plug_in(model, **settings)
    assert type(model.encoder[0]["attn"]) is nn.MultiheadAttention


@pytest.mark.parametrize("call", [{"need_weights": True}, {"attn_mask": torch.zeros(12, 12)}], ids=["weights", "mask"])
def test_calls_that_need_weights_or_an_attention_mask_are_errors(call):
    model = Stranger()
    plug_in(model)
    model(torch.randn(12, 2, 16), need_weights=False, average_attn_weights=False)
    with pytest.raises(ValueError, match="need_weights=False"):
        model(torch.randn(12, 2, 16), **call)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("batch", [lambda x: x, lambda x: torch.nested.nested_tensor([x])], ids=["none", "nested"])
def test_tensors_without_a_batch_axis_are_errors(batch):
    model = torch_encoder()
    plug_in(model)
    x = batch(torch.randn(12, 16))
    with pytest.raises(ValueError, match="three axes"):
        model.layers[0].self_attn(x, x, x)


def test_hugging_faces_cross_attention_is_an_error(transformers):
    model = hugging_face(transformers, "Detr")
    plug_in(model)
    x = torch.randn(1, 12, 32)
    with pytest.raises(ValueError, match="key_value_states"):
        model.get_submodule(ENCODER_LAYERS[0])(x, key_value_states=x)


PADDED = torch.tensor([[False, False, True], [False, True, True]])
ADDED = torch.zeros(2, 1, 3, 3).masked_fill(PADDED[:, None, None], torch.finfo(torch.float32).min)


@pytest.mark.parametrize(
    "mask",
    [ADDED, ADDED.clamp(min=-torch.inf) * 2, ~PADDED[:, None, None].expand(-1, 1, 3, -1), ~PADDED, (~PADDED).long()],
    ids=["added", "infinite", "boolean", "flash_boolean", "flash"],
)
def test_padded_keys_of_hugging_faces_masks(mask):
    assert torch.equal(padded_keys(mask), PADDED)


@pytest.mark.parametrize("mask", [torch.zeros(2, 3, 3), "causal"], ids=["three_axes", "no_tensor"])
def test_masks_of_other_forms_are_errors(mask):
    with pytest.raises(ValueError, match="sdpa"):
        padded_keys(mask)


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
def test_the_code_of_the_documentation_page_runs(block, request, tmp_path, monkeypatch):
    if "transformers" in block:
        request.getfixturevalue("transformers")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(PAGE), "exec"), {})


def test_transformers_need_not_be_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "enact_common.attention.plug_in")
    plug = importlib.import_module("enact_common.attention.plug_in")
    assert plug.plug_in(nn.Transformer(16, 4, 1, 1, 32)) == ["encoder.layers.0.self_attn"]
