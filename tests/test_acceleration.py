"""Compilation, activation checkpointing and mixed precision do not change a model's outputs."""

import copy
import os

import pytest
import torch
from conftest import SMALL_MODEL, build, parse, train
from torch import nn
from torch.testing import assert_close

from enact_common import UserError, load_variant
from enact_common.cli import checks
from enact_common.nested_tensor import nested_tensor_from_tensor_list
from enact_common.utils import acceleration, device
from enact_common.utils.acceleration import Recomputed, checkpoint_activations, compile_parts, prepare
from enact_common.variants import VARIANTS

CPU = torch.device("cpu")


# Slow tests cover every variant and both attentions, but not every pair.
PAIRS = [("detr", "enact"), ("conditional", "mhsa"), ("anchor", "enact")]


@pytest.fixture
def model_and_batch(variant_and_attention):
    """A small model without dropout, and two images of different sizes."""
    variant, attention = variant_and_attention
    flags = [*SMALL_MODEL[variant], "--backbone_norm", "frozen", "--dropout", "0", "--encoder_attention", attention]
    images = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in ((64, 80), (72, 64))]
    return build(variant, *flags)[0].train(), nested_tensor_from_tensor_list(images)


def outputs_and_gradients(model, batch):
    """The last layer's predictions and the gradient of every parameter, by name."""
    model.zero_grad()
    outputs = model(batch)
    (outputs["pred_boxes"].square().mean() + outputs["pred_logits"].square().mean()).backward()
    predictions = {"logits": outputs["pred_logits"], "boxes": outputs["pred_boxes"]}
    return predictions | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_activation_checkpointing_keeps_outputs_and_gradients(model_and_batch):
    model, batch = model_and_batch
    expected, names = outputs_and_gradients(model, batch), set(model.state_dict())
    calls = []
    for layer in [m for m in model.modules() if isinstance(m, Recomputed)]:
        layer.register_forward_pre_hook(lambda module, args: calls.append(module))
    checkpoint_activations(model)
    assert_same(outputs_and_gradients(model, batch), expected)
    assert set(model.state_dict()) == names
    # Every encoder layer, decoder layer and trainable block runs twice.
    twice = {module for module in calls if calls.count(module) == 2}
    assert len([m for m in twice if "Layer" in type(m).__name__]) == 3
    assert len([m for m in twice if "Block" in type(m).__name__]) == 2
    with torch.no_grad():
        calls.clear()
        model(batch)
        assert len(calls) == len(set(calls))


def test_activation_checkpointing_saves_memory(variant_and_attention):
    variant, attention = variant_and_attention
    flags = [*SMALL_MODEL[variant], "--backbone_norm", "frozen", "--encoder_attention", attention, "--enc_layers", "4"]
    model, images = build(variant, *flags)[0].train(), torch.randint(256, (1, 3, 96, 96), dtype=torch.uint8)

    def kept() -> int:
        storages = {}

        def keep(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = model(images)  # noqa: F841, keeps the counted tensors alive
        return sum(storages.values())

    parameters = sum(p.numel() for p in model.parameters()) * 4
    before = kept()
    checkpoint_activations(model)
    assert kept() - parameters < 0.6 * (before - parameters)


def test_activation_checkpointing_repeats_dropout():
    flags = [*SMALL_MODEL["detr"], "--backbone_norm", "frozen", "--dropout", "0.3"]
    model, images = build("detr", *flags)[0].train(), torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)
    torch.manual_seed(1)
    expected = outputs_and_gradients(model, images)
    checkpoint_activations(model)
    torch.manual_seed(1)
    assert_same(outputs_and_gradients(model, images), expected)


def test_blocks_with_trainable_norms_are_not_recomputed():
    model = build("detr", *SMALL_MODEL["detr"])[0]
    checkpoint_activations(model)
    assert not any(m.recompute for m in model.backbone.modules() if isinstance(m, Recomputed))
    assert all(m.recompute for m in model.transformer.modules() if isinstance(m, Recomputed))


@pytest.mark.parametrize("variant_and_attention", [("anchor", "enact")], ids="-".join, indirect=True)
def test_compiled_parts_match_eager(model_and_batch, monkeypatch):
    model, batch = model_and_batch
    expected, names = outputs_and_gradients(model, batch), set(model.state_dict())
    # Trace and differentiate, but skip minutes of code generation.
    monkeypatch.setattr(acceleration, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    compile_parts(model, CPU)
    assert_same(outputs_and_gradients(model, batch), expected)
    assert set(model.state_dict()) == names
    with torch.no_grad():
        model.eval()(batch)


def test_compile_with_activation_checkpointing_needs_a_recent_pytorch(monkeypatch, shapes):
    flags = ["--coco_path", str(shapes), "--compile", "--checkpoint_activations"]
    parser = load_variant("detr").main.get_args_parser()
    monkeypatch.setattr(checks, "TORCH_VERSION", (2, 4))
    with pytest.raises(UserError, match="--compile with --checkpoint_activations needs PyTorch 2.15"):
        parser.check(parser.parse_args(flags))
    monkeypatch.setattr(checks, "TORCH_VERSION", (2, 15))
    parser.check(parser.parse_args(flags))


@pytest.mark.skipif(
    device.TORCH_VERSION < checks.COMPILED_AND_RECOMPUTED, reason="this PyTorch is too old, and the parser says so"
)
def test_compile_with_activation_checkpointing_matches_eager(monkeypatch):
    flags = [*SMALL_MODEL["detr"], "--backbone_norm", "frozen", "--dropout", "0"]
    model, images = build("detr", *flags)[0].train(), torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)
    expected = outputs_and_gradients(model, images)
    monkeypatch.setattr(acceleration, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    prepare(model, parse("detr", *flags, "--compile", "--checkpoint_activations"), CPU)
    assert_same(outputs_and_gradients(model, images), expected)


@pytest.mark.slow
@pytest.mark.skipif(
    "ONEDNN_MAX_CPU_ISA" in os.environ,
    reason="with oneDNN restricted to older instructions, PyTorch itself compiles linear layers wrongly",
)
def test_generated_code_matches_eager():
    """The default backend, which generates code."""
    torch._dynamo.reset()
    layers = nn.Sequential(*(build("anchor", *SMALL_MODEL["anchor"])[0].transformer.encoder_layers[0].ffn,))
    x = torch.randn(2, 5, 32)
    expected = layers(x)
    compile_parts(layers, CPU)
    assert_close(layers(x), expected, rtol=1e-4, atol=1e-5)


def test_without_a_compiler_one_line_warns(monkeypatch, caplog):
    def broken(graph, inputs):
        raise OSError("no compiler here\nand a long story")

    monkeypatch.setattr(acceleration, "BACKEND", broken)
    torch._dynamo.reset()
    model = build("detr", *SMALL_MODEL["detr"])[0]
    with caplog.at_level("WARNING", logger="enact"):
        compile_parts(model, CPU)
    (record,) = caplog.records
    assert record.message.startswith("--compile: nothing can be compiled here (") and "\n" not in record.message
    assert "no compiler here" in record.message
    model(torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8))


def forty_losses(variant: str, attention: str, amp: str, shapes) -> torch.Tensor:
    """Losses of forty steps with batches of two images; weights and order are the same in every call."""
    from enact_common.data.build import build_dataset
    from enact_common.data.coco import collate
    from enact_common.training.engine import TrainStep
    from enact_common.training.optimization import build_optimization

    torch.manual_seed(0)
    flags = [*SMALL_MODEL[variant], "--coco_path", str(shapes), "--dropout", "0"]
    flags += ["--lr", "1e-4", "--amp", amp]
    args = parse(variant, *flags, "--encoder_attention", attention, "--num_classes", "6")
    model, criterion, _ = build(variant, *flags, "--encoder_attention", attention, "--num_classes", "6")
    prepare(model, args, CPU)
    dataset = build_dataset("train", args)
    step = TrainStep(model.train(), criterion, build_optimization(model, args, CPU), CPU)
    losses = []
    for i in range(40):
        dataset.set_epoch(i)
        items = [dataset[(2 * i + k) % len(dataset)] for k in range(2)]
        losses.append(criterion.total(step(*collate(items))))
    return torch.stack(losses)


@pytest.mark.parametrize("variant_and_attention", PAIRS, ids="-".join)
def test_losses_in_bf16_stay_within_two_percent(variant_and_attention, shapes):
    expected, ours = (forty_losses(*variant_and_attention, amp, shapes) for amp in ("none", "bf16"))
    # The model must learn. Single steps are noisy, so means of ten steps are compared. The learning rate is that of the
    # plain models; at several times that rate, bf16 can deviate by more than the noise of float32.
    assert expected[-10:].mean() < 0.97 * expected[:10].mean()
    assert_close(ours.view(-1, 10).mean(1), expected.view(-1, 10).mean(1), rtol=0.02, atol=0)


@pytest.fixture
def gpu_settings(monkeypatch):
    """Record the calls of `prepare_gpu` to PyTorch instead of executing them."""
    recorded = {}
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: recorded.update(device=device))
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda enabled: recorded.update(cudnn=enabled))
    return recorded


@pytest.mark.parametrize("name, device", [("cuda", None), ("cuda:0", "cuda:0"), ("cuda:1", "cuda:1")])
def test_prepare_selects_the_gpu_and_disables_cudnn_attention(gpu_settings, monkeypatch, name, device):
    # The model is not moved, so no GPU is needed.
    monkeypatch.setattr(nn.Module, "to", lambda self, *args, **kwargs: self)
    prepare(nn.Linear(1, 1), parse("detr"), torch.device(name))
    assert gpu_settings == {"cudnn": False} | ({"device": torch.device(device)} if device else {})


def test_prepare_on_cpu_leaves_gpu_settings(gpu_settings):
    prepare(nn.Linear(1, 1), parse("detr"), CPU)
    assert gpu_settings == {}


@pytest.fixture
def deterministic_flags(monkeypatch):
    """Reset PyTorch's deterministic settings before and after the test."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.parametrize("asked", [False, True])
def test_deterministic_settings_only_with_the_flag(deterministic_flags, asked):
    prepare(nn.Linear(1, 1), parse("detr", *["--deterministic"] * asked), CPU)
    assert torch.are_deterministic_algorithms_enabled() == asked
    assert torch.backends.cudnn.deterministic == asked and torch.backends.cudnn.benchmark != asked
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == asked


@pytest.mark.parametrize("variant, clusters", [*((v, "windows") for v in VARIANTS), ("anchor", "regions")])
def test_every_variant_trains_deterministically(
    variant, clusters, deterministic_flags, monkeypatch, shapes, tmp_path, capsys
):
    """PyTorch refuses nondeterministic operations, but knows few on a CPU. On a GPU, the cumulative sum of floats is
    nondeterministic, so the test also checks the dtype of every `cumsum`."""
    summed, original = [], torch.Tensor.cumsum

    def watched(self, *args, **kwargs):
        summed.append(original(self, *args, **kwargs))
        return summed[-1]

    monkeypatch.setattr(torch.Tensor, "cumsum", watched)
    flags = ["--deterministic", "--epochs", "1", "--encoder_attention", "enact", "--enact_clusters", clusters]
    assert train(variant, shapes, tmp_path, *flags) == 0
    assert "float32, deterministic" in capsys.readouterr().out
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["args"]["deterministic"]
    assert summed and not any(tensor.is_floating_point() for tensor in summed)


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_parts_take_any_size_without_falling_back(variant, monkeypatch):
    """Train on images of many sizes, with a shorter last batch and, for one variant, an evaluation in between."""
    graphs, calls = [], []

    def counting(graph, inputs):
        graphs.append(graph)

        def run(*args):
            calls.append(graph)
            return graph(*args)

        return run

    flags = [*SMALL_MODEL[variant], "--backbone_norm", "frozen", "--dropout", "0"]
    model = build(variant, *flags, "--enc_layers", "2")[0]
    eager = copy.deepcopy(model)
    monkeypatch.setattr(acceleration, "BACKEND", counting)
    torch._dynamo.reset()
    compile_parts(model, CPU)
    # Raise at the recompilation limit, where PyTorch would warn and run uncompiled code.
    name = "fail_on_recompile_limit_hit"
    strict = {name: True} if hasattr(torch._dynamo.config, name) else {}

    def run_sizes(sizes, batch):
        counts = []
        for height, width in sizes:
            calls.clear()
            images = torch.randint(256, (batch, 3, height, width), dtype=torch.uint8)
            if model.training:
                assert_same(outputs_and_gradients(model, images), outputs_and_gradients(eager, images))
            else:
                with torch.no_grad():
                    model(images)
            counts.append(len(calls))
        return counts

    with torch._dynamo.config.patch(suppress_errors=False, **strict):
        sizes = [(64, 96), (96, 64), (128, 96)]
        runs = run_sizes(sizes, 4) + run_sizes(sizes[:1], 1)
        if variant == "detr":
            model.eval()
            run_sizes(sizes, 2)
            model.train()
        num_graphs = len(graphs)
        runs += run_sizes([(96, 96), (64, 160)], 4) + run_sizes([(160, 96)], 2)
        # New sizes compile nothing.
        assert len(graphs) == num_graphs
        runs += run_sizes([(96, 128)], 1)
    # For a single image, PyTorch chooses the convolution by size, which may compile the backbone once more.
    assert len(graphs) <= num_graphs + 1
    # Every part runs compiled in every step.
    assert len(set(runs)) == 1 and runs[0] > 0
