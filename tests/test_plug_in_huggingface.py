"""`plug_in` in the detectors of Hugging Face: exact with clusters of one token, trained, saved and loaded again."""

import copy
import json
import os
import re
import shutil
import sys
from functools import partial

import pytest
import torch
from test_plug_in import PIXEL_MASK, close, clusters_of_one_token, trained, transformers  # noqa: F401
from torch import nn

from enact_common import EnactSelfAttention, MapTokens, UserError, load_plugged, plug_in
from enact_common.attention.foreign import HUGGING_FACE_RIVALS
from enact_common.attention.rivals import RIVALS

STAGES = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1] * 4, "layer_type": "basic"}
DETR = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 5,
    "dropout": 0.0,
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
}
RT_DETR = {
    "d_model": 32,
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [8, 8, 16],
    "encoder_layers": 1,  # as published; transformers 4 fails with more
    "encoder_ffn_dim": 32,
    "encoder_attention_heads": 4,
    "num_queries": 5,
    "decoder_in_channels": [32] * 3,
    "decoder_ffn_dim": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "num_denoising": 0,  # it draws random numbers in training
    "hidden_expansion": 0.5,
}
D_FINE = RT_DETR | {"lqe_hidden_dim": 16, "depth_mult": 0.34, "max_num_bins": 8}
YOLOS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "image_size": [96, 128],
    "patch_size": 16,
    "num_detection_tokens": 7,
    "hidden_dropout_prob": 0.0,
}
HG_NET = {
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8] * 4,
    "stage_mid_channels": [8] * 4,
    "stage_out_channels": [8, 8, 8, 16],
    "stage_num_blocks": [1] * 4,
    "stage_downsample": [False, True, True, True],
    "stage_light_block": [False] * 4,
    "stage_kernel_size": [3] * 4,
    "stage_numb_of_layers": [1] * 4,
    "hidden_sizes": [8, 8, 8, 16],
    "depths": [1] * 4,
}
THREE = ["stage2", "stage3", "stage4"]

# name: the configuration's settings, its backbone, and the backbone's settings
MODELS = {
    "Detr": (DETR, "ResNet", STAGES | {"out_features": THREE[2:]}),
    "ConditionalDetr": (DETR, "ResNet", STAGES | {"out_features": THREE[2:]}),
    "DabDetr": (
        {"hidden_size" if name == "d_model" else name: value for name, value in DETR.items()},
        "ResNet",
        STAGES | {"out_features": THREE[2:]},
    ),
    "TableTransformer": (DETR, "ResNet", STAGES | {"out_features": THREE[2:]}),
    "RTDetr": (RT_DETR, "RTDetrResNet", STAGES | {"out_features": THREE}),
    "RTDetrV2": (RT_DETR, "RTDetrResNet", STAGES | {"out_features": THREE}),
    "DFine": (D_FINE, "HGNetV2", HG_NET | {"out_features": THREE}),
    "Deimv2": (D_FINE, "HGNetV2", HG_NET | {"out_features": THREE}),
    "Yolos": (YOLOS, None, {}),
}
MASKED = ("Detr", "ConditionalDetr", "DabDetr", "TableTransformer")


@pytest.fixture(params=MODELS)
def name(request) -> str:
    return request.param


def detector(transformers, name: str, **more) -> nn.Module:  # noqa: F811
    """A small detector of that name with random weights, in evaluation mode."""
    if not hasattr(transformers, f"{name}ForObjectDetection"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    settings, backbone, stages = MODELS[name]
    if backbone is not None:
        settings = settings | {"backbone_config": getattr(transformers, f"{backbone}Config")(**stages)}
    config = getattr(transformers, f"{name}Config")(**{"num_labels": 3, **settings, **more})
    return trained(getattr(transformers, f"{name}ForObjectDetection")(config)).eval()


def attention_names(name: str) -> str:
    """A regular expression for the names of the replaced modules."""
    if name == "Yolos":
        return r"vit\.encoder\.layer\.[01]\.attention"
    # transformers 4 has "encoder" for "aifi".
    return r"model\.encoder\.((aifi|encoder)\.0\.)?layers\.[01]\.self_attn"


def test_clusters_of_one_token_give_the_same_output(clusters_of_one_token, transformers, name):  # noqa: F811
    plain = detector(transformers, name)
    model = copy.deepcopy(plain)
    names = plug_in(model, mask_padding=True, scale_logits=name == "Yolos")
    assert len(names) == (1 if "aifi" in names[0] or "encoder.encoder" in names[0] else 2)
    assert all(re.fullmatch(attention_names(name), layer) for layer in names)
    inputs = {"pixel_values": torch.rand(2, 3, 96, 128)}
    if name in MASKED:
        inputs["pixel_mask"] = PIXEL_MASK
    for training in (False, True):
        for part in (*model.modules(), *plain.modules()):
            # Over so few pixels, batch statistics would blow up rounding.
            part.training = training and not isinstance(part, nn.BatchNorm2d)
        with torch.no_grad():
            found, expected = model(**inputs), plain(**inputs)
        close(found.logits, expected.logits)
        close(found.pred_boxes, expected.pred_boxes)


@pytest.mark.parametrize("settings", [{}, {"clusters": "equal", "max_clusters": 9}], ids=["windows", "equal"])
def test_real_clusters_run(transformers, name, settings):  # noqa: F811
    model = detector(transformers, name)
    names = plug_in(model, **settings)
    counts = []
    for layer in names:
        model.get_submodule(layer).register_cluster_hook(lambda _, clusters: counts.append(clusters.shape[1]))
    pixels = torch.rand(2, 3, 96, 128) if name == "Yolos" else torch.rand(2, 3, 192, 256)
    found = model(pixels)
    assert found.logits.isfinite().all()
    assert counts == [9] * len(names) if settings else max(counts) < 48
    found.logits.square().sum().backward()
    assert model.get_submodule(names[0]).W_q.weight.grad.abs().max() > 0


class Drawn(torch.utils.data.Dataset):
    """Images of noise with one box each, as Hugging Face's detectors take them."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        box = 0.2 + 0.3 * torch.rand(1, 4, generator=generator)
        return {
            "pixel_values": torch.rand(3, 96, 128, generator=generator),
            "labels": {"class_labels": torch.tensor([index % 3]), "boxes": box},
        }


def batch(samples: list[dict]) -> dict:
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": [sample["labels"] for sample in samples],
    }


def test_trained_with_the_trainer_saved_and_loaded(transformers, name, tmp_path):  # noqa: F811
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = detector(transformers, name)
    names = plug_in(model, sigma=2.0, scale_logits=True, temperature=1.0, kernels="torch")
    before = copy.deepcopy(model.state_dict())
    settings = transformers.TrainingArguments(
        output_dir=tmp_path / "run",
        max_steps=20,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    trainer = transformers.Trainer(model=model, args=settings, train_dataset=Drawn(), data_collator=batch)
    outcome = trainer.train()
    assert outcome.global_step == 20 and torch.tensor(outcome.training_loss).isfinite()
    for layer in names:
        for part in ("W_prob.weight", "W_q.weight", "W_k.weight", "W_v.weight", "W_o.weight"):
            assert not torch.equal(model.state_dict()[f"{layer}.{part}"], before[f"{layer}.{part}"]), part

    trainer.save_model(tmp_path / "saved")
    noted = json.loads((tmp_path / "saved" / "config.json").read_text())["enact"]
    assert list(noted) == names and noted[names[0]]["sigma"] == 2.0 and noted[names[0]]["kind"] == "enact"
    assert noted[names[0]]["kernels"] == "torch"
    loaded = load_plugged(transformers.AutoModelForObjectDetection, tmp_path / "saved")
    assert type(loaded) is type(model) and not loaded.training
    assert_same(loaded, model.eval())


def assert_same(loaded: nn.Module, model: nn.Module) -> None:
    """Assert that a loaded model equals a model with 96 x 128 pixels bit for bit: state, settings, output."""
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(state[key], tensor), key
    for (key, tensor), other in zip(model.named_buffers(), loaded.buffers(), strict=True):
        assert torch.equal(other, tensor), key
    assert loaded.config.enact == model.config.enact
    for old, new in zip(model.modules(), loaded.modules(), strict=True):
        if isinstance(old, EnactSelfAttention):
            assert repr(new) == repr(old)
    pixels = torch.rand(2, 3, 96, 128).to(next(model.parameters()).dtype)
    with torch.no_grad():
        assert torch.equal(loaded(pixels).logits, model(pixels).logits)


@pytest.mark.parametrize("kind", RIVALS)
def test_rivals_are_saved_and_loaded(transformers, kind, tmp_path):  # noqa: F811
    model = detector(transformers, "Detr")
    settings = {"token_budget": 5} if RIVALS[kind].takes_budget else {}
    plug_in(model, kind=kind, map_size=(3, 4) if RIVALS[kind].needs_map_size else None, **settings)
    model.save_pretrained(tmp_path)
    loaded = load_plugged(transformers.DetrForObjectDetection, tmp_path)
    assert type(loaded.model.encoder.layers[1].self_attn) is HUGGING_FACE_RIVALS[kind]
    assert_same(loaded, model)


def test_two_calls_with_other_settings_are_both_noted(transformers, tmp_path):  # noqa: F811
    model = detector(transformers, "Yolos")
    first, second = (f"vit.encoder.layer.{i}.attention" for i in range(2))
    plug_in(model, where=first, max_clusters=4)
    plug_in(model, where=second, clusters="regions", tokens=MapTokens(1, 7, size=(6, 8)))
    model.save_pretrained(tmp_path)
    loaded = load_plugged(transformers.YolosForObjectDetection, tmp_path)
    assert loaded.get_submodule(second).tokens == MapTokens(1, 7, size=(6, 8))
    assert_same(loaded, model)


def test_biases_that_the_plain_model_lacks_stay_frozen(transformers, tmp_path):  # noqa: F811
    model = detector(transformers, "Yolos", qkv_bias=False)
    names = plug_in(model)
    model.save_pretrained(tmp_path)
    loaded = load_plugged(transformers.YolosForObjectDetection, tmp_path)
    for attention in (model.get_submodule(names[0]), loaded.get_submodule(names[0])):
        frozen = {name for name, parameter in attention.named_parameters() if not parameter.requires_grad}
        assert frozen == {"W_q.bias", "W_k.bias", "W_v.bias"}
    assert_same(loaded, model)


def test_a_model_of_low_precision_is_loaded_with_its_scores_in_float32(transformers, tmp_path):  # noqa: F811
    model = detector(transformers, "RTDetr").bfloat16()
    layer = plug_in(model)[0]
    model.save_pretrained(tmp_path)
    loaded = load_plugged(transformers.AutoModelForObjectDetection, tmp_path, torch_dtype="auto")
    assert loaded.get_submodule(layer).W_q.weight.dtype == torch.bfloat16
    assert loaded.get_submodule(layer).W_prob.weight.dtype == torch.float32
    assert_same(loaded, model)


def test_the_model_without_heads_is_loaded_too(transformers, tmp_path):  # noqa: F811
    model = detector(transformers, "Detr")
    plug_in(model)
    model.save_pretrained(tmp_path / "whole")
    bare = load_plugged(transformers.AutoModel, tmp_path / "whole")
    assert type(bare) is transformers.DetrModel
    pixels = torch.rand(1, 3, 96, 128)
    with torch.no_grad():
        expected = model(pixels).encoder_last_hidden_state
        assert torch.equal(bare(pixels).encoder_last_hidden_state, expected)
        bare.save_pretrained(tmp_path / "bare")
        whole = load_plugged(transformers.AutoModelForObjectDetection, tmp_path / "bare")
        assert torch.equal(whole(pixels).encoder_last_hidden_state, expected)


@pytest.fixture(scope="module")
def saved(transformers, tmp_path_factory):  # noqa: F811
    """A folder with a saved small YOLOS with ENACT."""
    folder = tmp_path_factory.mktemp("saved")
    model = detector(transformers, "Yolos")
    plug_in(model)
    model.save_pretrained(folder)
    return folder


def without_settings(folder, config):
    del config["enact"]


def of_a_part(folder, config):
    config["enact"] = {"layers.0.self_attn": {"kind": "enact"}}


def of_another_version(folder, config):
    config["enact"] = {"vit.encoder.layer.0.attention": {"kind": "enact", "colour": 3}}


def without_weights(folder, config):
    (folder / "model.safetensors").unlink()


def with_plain_weights(folder, config, transformers):  # noqa: F811
    detector(transformers, "Yolos").save_pretrained(folder)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (without_settings, r"no settings of ENACT.*from_pretrained, then call plug_in"),
        (of_a_part, r"no module layers\.0\.self_attn.*a part of the model"),
        (of_another_version, "cannot be built with the settings.*colour"),
        (without_weights, "weights cannot be read"),
        (with_plain_weights, r"weights lack vit\.encoder\.layer.*saved before plug_in"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_folders_that_cannot_be_loaded(transformers, saved, tmp_path, spoil, message):  # noqa: F811
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    config = json.loads((folder / "config.json").read_text())
    if spoil is with_plain_weights:
        spoil = partial(with_plain_weights, transformers=transformers)
    spoil(folder, config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"(?s){folder}.*{message}"):
        load_plugged(transformers.YolosForObjectDetection, folder)


@pytest.mark.parametrize("name", ["DetrForObjectDetection", "AutoModelForCausalLM", "YolosConfig"])
def test_a_wrong_class_is_refused(transformers, saved, name):  # noqa: F811
    with pytest.raises(UserError, match=f"{name} cannot load it.*YolosConfig: pass YolosForObjectDetection"):
        load_plugged(getattr(transformers, name), saved)


def test_a_folder_of_something_else_is_refused(transformers, tmp_path):  # noqa: F811
    (tmp_path / "checkpoint.pth").write_bytes(b"")
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=f"{folder}.*config.json.*load_detector"):
            load_plugged(transformers.AutoModelForObjectDetection, folder)


def test_without_transformers_the_error_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'enact-detection\[huggingface\]'"):
        load_plugged(object, tmp_path)


@pytest.mark.parametrize("what", ["facebook/detr-resnet-50", nn.Transformer], ids=["name", "class"])
def test_plug_in_wants_a_model(what):
    with pytest.raises(ValueError, match="an nn.Module with its weights"):
        plug_in(what)


def test_a_part_of_yolos_needs_to_know_its_tokens(transformers):  # noqa: F811
    encoder = detector(transformers, "Yolos").vit.encoder
    with pytest.raises(ValueError, match=r"tokens=MapTokens\(before"):
        plug_in(encoder)
    assert len(plug_in(encoder, tokens=MapTokens(1, 7))) == 2


def test_rivals_have_no_keys_for_tokens_beside_the_map(transformers):  # noqa: F811
    with pytest.raises(ValueError, match=r"(?s)avgpool cannot replace.*rivals have no keys"):
        plug_in(detector(transformers, "Yolos"), kind="avgpool", map_size=(6, 8))


def test_masks_and_hooks_of_yolos_are_errors(transformers):  # noqa: F811
    model = detector(transformers, "Yolos")
    attention = model.vit.encoder.layer[0].attention
    handle = attention.attention.query.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks"):
        plug_in(model)
    handle.remove()
    plug_in(model)
    x = torch.randn(1, 56, 32)
    with pytest.raises(ValueError, match="takes no masks"):
        model.vit.encoder.layer[0].attention(x, attention_mask=torch.zeros(56, 56))


def vit(library: str) -> tuple[nn.Module, list[str], int]:
    """A small vision transformer with a class token and, in timm, two registers; its names, and tokens per map."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if library == "torchvision":
        from torchvision.models import VisionTransformer

        model = VisionTransformer(64, 8, 2, 4, 32, 32, num_classes=5)
        return model, [f"encoder.layers.encoder_layer_{i}.self_attention" for i in range(2)], 64
    timm = pytest.importorskip("timm")
    model = timm.models.VisionTransformer(
        img_size=64, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5, reg_tokens=2, init_values=0.5
    )
    return model, ["blocks.0.attn", "blocks.1.attn"], 64


@pytest.mark.parametrize("library", ["timm", "torchvision"])
@pytest.mark.parametrize("scale_logits", [False, True])
def test_vision_transformers(clusters_of_one_token, library, scale_logits):  # noqa: F811
    plain, names, _ = vit(library)
    plain = trained(plain).eval()
    model = copy.deepcopy(plain)
    assert plug_in(model, scale_logits=scale_logits, kernels="torch") == names
    before = 3 if library == "timm" else 1
    layer = model.get_submodule(names[0])
    assert layer.tokens == MapTokens(before=before) and layer.kernels == "torch"
    images = torch.rand(2, 3, 64, 64)
    close(model(images), plain(images))


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_vision_transformers_train_with_real_clusters(library):
    model, names, tokens = vit(library)
    trained(model)  # torchvision's head starts at zero
    counts = []
    plug_in(model, scale_logits=True, temperature=1.0)
    model.get_submodule(names[0]).register_cluster_hook(lambda _, clusters: counts.append(clusters.shape[1]))
    model(torch.rand(2, 3, 64, 64)).square().sum().backward()
    assert counts[0] < tokens
    assert model.get_submodule(names[0]).W_prob.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"qk_norm": True}, "q_norm, k_norm"),
        ({"block_fn": "parallel"}, "no encoder self-attention|has no attention"),
    ],
    ids=["norms", "parallel"],
)
def test_other_attention_of_timm_is_refused(settings, reason):
    timm = pytest.importorskip("timm")
    if settings.get("block_fn"):
        settings = {"block_fn": timm.models.vision_transformer.ParallelScalingBlock}
    model = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=4, **settings)
    with pytest.raises(ValueError, match=reason):
        plug_in(model)


def tokens_beside(before: int, after: int, **settings) -> tuple[EnactSelfAttention, nn.Module]:
    """The layer with tokens beside the map, and PyTorch's attention with the same weights."""
    plain = trained(nn.MultiheadAttention(16, 4, batch_first=True))
    holder = nn.Sequential(copy.deepcopy(plain))
    plug_in(holder, where="0", tokens=MapTokens(before, after), **settings)
    return holder[0].eval(), plain.eval()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"per_image": True, "mask_padding": True},
        {"clusters": "regions", "mask_padding": True},
        {"clusters": "equal", "max_clusters": 12},
        {"scale_logits": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("before, after", [(1, 0), (0, 3), (2, 3)])
@pytest.mark.parametrize("batch_first", [True, False])
def test_tokens_beside_the_map_stay_keys(clusters_of_one_token, before, after, settings, batch_first):  # noqa: F811
    layer, plain = tokens_beside(before, after, **settings)
    layer.batch_first = plain.batch_first = batch_first
    x = torch.randn(2, before + 12 + after, 16)
    padding = None
    if layer.mask_padding:
        # The second map's last third, and the last token of all.
        padding = torch.zeros(2, x.shape[1], dtype=torch.bool)
        padding[1, before + 8 : before + 12] = True
        padding[1, -1] = True
    inputs = x if batch_first else x.transpose(0, 1)
    found, expected = (
        attention(inputs, inputs, inputs, key_padding_mask=padding, need_weights=False)[0]
        for attention in (layer, plain)
    )
    if batch_first and padding is not None:
        found, expected = found[~padding], expected[~padding]
    close(found, expected)


@pytest.mark.parametrize("settings", [{}, {"clusters": "equal", "max_clusters": 3}], ids=["windows", "equal"])
def test_tokens_beside_the_map_are_never_clustered(settings):
    layer, _ = tokens_beside(1, 2, **settings)
    tokens = []
    layer.register_cluster_hook(lambda information, _: tokens.append(information.shape[1]))
    x = torch.randn(1, 43, 16)
    values = x.clone().requires_grad_()
    output = layer(x, x, values)[0]
    assert tokens == [40]
    grad = torch.autograd.grad(output.square().sum(), values)[0]
    assert (grad[0, [0, -2, -1]].abs().sum(dim=-1) > 0).all()


def test_the_size_of_clusters_may_weigh_beside_other_tokens(clusters_of_one_token):  # noqa: F811
    layer, plain = tokens_beside(1, 2)
    layer.weigh_by_size = True
    x = torch.randn(2, 15, 16)
    close(layer(x, x, x)[0], plain(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize(
    "tokens, message",
    [
        (MapTokens(1, 4), "leaves no token of the map: the sequence has 5"),
        (MapTokens(1, 0, size=(2, 3)), r"means 1 \+ 2 \* 3 \+ 0 tokens, but the sequence has 5"),
    ],
    ids=["too_many", "size"],
)
def test_sequences_that_cannot_have_the_map_are_errors(tokens, message):
    layer = EnactSelfAttention(16, 4, batch_first=True, tokens=tokens)
    x = torch.randn(1, 5, 16)
    with pytest.raises(ValueError, match=message):
        layer(x, x, x)


@pytest.mark.parametrize(
    "wrong",
    [{"before": -1}, {"after": -1}, {"before": 1.5}, {"size": (0, 3)}, {"size": (1, 2, 3)}, {"size": 6}],
    ids=str,
)
def test_impossible_maps_are_errors(wrong):
    with pytest.raises(ValueError, match="at least"):
        MapTokens(**wrong)


def test_tokens_that_are_no_map_tokens_change_nothing():
    model = nn.Transformer(16, 4, 1, 1, 32)
    with pytest.raises(ValueError, match=r"tokens must be a MapTokens, .* got \(1, 100\)"):
        plug_in(model, tokens=(1, 100))
    assert isinstance(model.encoder.layers[0].self_attn, nn.MultiheadAttention)


def test_tokens_are_no_setting_of_rivals():
    model = nn.Transformer(16, 4, 1, 1, 32)
    with pytest.raises(ValueError, match="tokens=.* has no effect with kind='tome'"):
        plug_in(model, kind="tome", tokens=MapTokens(1))


def test_a_layer_with_tokens_beside_the_map_is_traced():
    layer = tokens_beside(1, 2, clusters="equal", max_clusters=3)[0].requires_grad_(False)
    example, x = torch.randn(2, 23, 16), torch.randn(2, 43, 16)
    graph = torch.jit.trace(lambda x: layer(x, x, x)[0], example, check_trace=False)
    close(graph(x), layer(x, x, x)[0])
