"""The Triton kernels: their results in Triton's interpreter, what they need on GPUs, and when PyTorch takes over."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL_MODEL, build, parse
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from enact_common.attention import EnactSelfAttention, EntropyClustering, kernels, packed
from enact_common.attention.clustering import InformationLogits
from enact_common.models.layers import clustering_settings, encoder_settings
from enact_common.training.engine import packs_windows
from enact_common.utils import acceleration
from enact_common.variants import VARIANTS, load_variant

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "dev" / "kernels.md"
CPU = "PyTorch instead of Triton kernels, since they run on GPUs, not on cpu"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Forgets what was logged and what failed."""
    monkeypatch.setattr(kernels, "_logged", set())
    monkeypatch.setattr(kernels, "_failed", set())


@pytest.fixture
def pretended(monkeypatch):
    """Lets the kernels try to run on the CPU, which fails outside of the interpreter."""
    monkeypatch.setattr(kernels, "is_interpreted", lambda: True)


def test_kernels_agree_with_pytorch_in_the_interpreter():
    """In a process of its own: the interpreter must be chosen before Triton is imported."""
    # The interpreter of 3.6 fails with numpy 2.4.
    pytest.importorskip("triton", minversion="3.9")
    command = [sys.executable, "-m", "pytest", "--noconftest", "-x", "-p", "no:cacheprovider", "-W", "ignore"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command.append("tests/interpreted_kernels.py")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def needs(tmp_path_factory):
    """The resources of each kernel, compiled anew: tuples (name, capability, `Needs`)."""
    pytest.importorskip("triton", minversion="3.6")  # earlier ones were not tried
    from enact_common.attention.kernels import report

    os.environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    try:
        launches = [
            (launch, capability)
            for purpose, of_purpose in report.all_launches(torch.bfloat16).items()
            for launch in of_purpose
            # The kernels of the other purposes are the same ones with other constants.
            for capability in (report.CAPABILITIES if purpose in ("equal clusters", "product over clusters") else (90,))
            if purpose != "equal clusters of maps"
        ]
        # Float32 differs most where matrices are multiplied.
        launches += [(launch, 90) for launch in report.row_column_launches(True, torch.float32)]
        return [(launch.name, capability, report.needs_of(launch, capability)) for launch, capability in launches]
    finally:
        del os.environ["TRITON_CACHE_DIR"]


def test_kernels_compile_for_gpus_without_spills(needs):
    assert {capability for _, capability, _ in needs} == {80, 90}
    for name, capability, need in needs:
        assert need.spilled == 0 and 0 < need.registers <= 255, (name, capability, need)
        assert need.shared <= 48 * 2**10, (name, capability, need)


def test_the_page_lists_every_kernel(needs):
    text = PAGE.read_text()
    assert all(f"| `{name}` |" in text for name, _, _ in needs)


def layers(**settings) -> tuple[EnactSelfAttention, EnactSelfAttention]:
    """Two equal layers: in PyTorch, and asking for the kernels."""
    pair = tuple(EnactSelfAttention(16, 2, sigma=1.0, kernels=choice, **settings) for choice in ("torch", "triton"))
    pair[1].load_state_dict(pair[0].state_dict())
    return pair


@pytest.mark.parametrize("settings", [{}, {"clusters": "equal"}], ids=["windows", "equal"])
def test_pytorch_takes_over_on_a_cpu_and_says_so_once(settings, caplog):
    plain, asking = layers(**settings)
    tokens = torch.randn(30, 2, 16)
    for _ in range(2):
        assert_close(asking(tokens, tokens, tokens)[0], plain(tokens, tokens, tokens)[0], rtol=0, atol=0)
    assert [record.message for record in caplog.records] == [f"clusters: {CPU}"]


def test_auto_is_pytorch_and_silent(pretended, caplog):
    layer = EnactSelfAttention(16, 2)
    assert layer.kernels == "auto" and not kernels.wants_triton("auto")
    tokens = torch.randn(30, 2, 16)
    layer(tokens, tokens, tokens)
    assert not caplog.records


def test_pytorch_takes_over_from_kernels_that_fail(pretended, caplog):
    """Compiled kernels cannot read the memory of a CPU; without Triton, its import fails."""
    plain, asking = layers(clusters="equal")
    tokens = torch.randn(30, 2, 16)
    for _ in range(2):
        assert_close(asking(tokens, tokens, tokens)[0], plain(tokens, tokens, tokens)[0], rtol=0, atol=0)
    (record,) = caplog.records
    assert record.message.startswith("clusters: the GPU kernels failed, PyTorch takes over (")


def test_pytorch_takes_over_without_triton(pretended, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "enact_common.attention.kernels.pooling", None)
    monkeypatch.delattr(kernels, "pooling", raising=False)
    plain, asking = layers()
    tokens = torch.randn(30, 2, 16)
    assert_close(asking(tokens, tokens, tokens)[0], plain(tokens, tokens, tokens)[0], rtol=0, atol=0)
    assert "ModuleNotFoundError" in caplog.text


def test_the_package_does_not_import_triton():
    code = "import sys; sys.modules['triton'] = None; import enact_common.attention, enact_common.attention.kernels"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def other_logits(clustering: EntropyClustering) -> None:
    clustering.pooling_logits = nn.Sequential(InformationLogits())


@pytest.mark.parametrize(
    "settings, change, masked, reason",
    [
        ({"clusters": "regions"}, None, False, "regions are clustered"),
        ({"per_image": True}, None, False, "each image has its own window length"),
        ({"mask_padding": True}, None, True, "windows leave out padding"),
        ({"mask_padding": True}, None, False, None),
        ({"clusters": "equal", "per_image": True}, None, True, None),
        ({"fixed_length": 3}, None, False, "the window length is fixed"),
        ({}, lambda layer: layer.double(), False, "scores are float64"),
        ({}, lambda layer: layer.register_cluster_hook(print), False, "the clusters are traced"),
        ({}, other_logits, False, "the layer's parts were changed"),
        ({"clusters": "equal"}, lambda layer: setattr(layer, "uniform_share", 0.5), True, "the layer's parts were"),
        ({"max_clusters": 3, "temperature": 1.0}, None, True, None),
    ],
)
def test_settings_that_the_kernels_do_not_cover(settings, change, masked, reason):
    layer = EntropyClustering(8, **settings)
    if change:
        change(layer)
    text = layer.reason_against_kernels(torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool) if masked else None)
    assert text is None if reason is None else text.startswith(reason)


@pytest.mark.parametrize(
    "tensors, reason",
    [
        ([torch.zeros(2, 5, 8)] * 3, None),
        ([torch.zeros(2, 5, 8)] * 2, "they pool two tensors of one shape"),
        ([torch.zeros(2, 5, 8)] * 2 + [torch.zeros(2, 5, 4)], "they pool two tensors of one shape"),
        ([torch.zeros(2, 6, 8)] * 2 + [torch.zeros(2, 3)], None),
        ([torch.zeros(1, 2048, 8)] * 2 + [torch.zeros(1, 1)], "they pool maps of at most 2048 columns and rows"),
        ([torch.zeros(2, 5, 8).double()] * 3, "no support for torch.float64"),
        ([torch.zeros(0, 5, 8)] * 3, "an input is empty"),
        ([torch.zeros(1, 1, 4096)] * 3, "they pool at most 2048 channels"),
        ([torch.empty(2**20, 2**12, 8, device="meta")] * 3, "they run on GPUs, not on meta"),
        ([torch.zeros(1, 1, 1).expand(9, 9, 9)] * 3, None),
    ],
)
def test_tensors_that_the_kernels_do_not_take(tensors, reason, pretended):
    text = kernels.reason_against_pooling(*tensors)
    assert text is None if reason is None else text.startswith(reason)


def test_addresses_must_fit_32_bits():
    assert kernels.fits_int32(torch.empty(2**31, device="meta"))
    assert not kernels.fits_int32(torch.empty(2**31 + 1, device="meta"))
    assert not kernels.fits_int32(torch.empty(2, 2, device="meta").as_strided((2, 2), (2**31, 1)))


def test_unknown_kernels_are_refused():
    rcda = load_variant("anchor").models.row_column_decoupled_attention
    for make in (lambda: EntropyClustering(8, kernels="cuda"), lambda: rcda.MultiheadRCDA(8, 2, kernels="cuda")):
        with pytest.raises(ValueError, match="kernels must be one of auto, torch, triton, got 'cuda'"):
            make()


def test_row_column_products_take_over_from_kernels(caplog):
    product = load_variant("anchor").models.row_column_product
    row, col, value = torch.randn(2, 6, 5), torch.randn(2, 6, 4), torch.randn(2, 4, 5, 3)
    assert_close(product.row_column_product(row, col, value, "triton"), product.row_column_product(row, col, value))
    row, col, value = row.transpose(1, 2), col.transpose(1, 2), torch.randn(2, 6, 3)
    results = [product.clustered_row_column_product(col, row, value, choice) for choice in ("torch", "triton")]
    assert_close(*results)
    assert [record.message for record in caplog.records] == [f"row-column products: {CPU}"]


@pytest.mark.parametrize("attention", ["enact", "mhsa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_flag_reaches_every_layer(variant, attention):
    flags = [*SMALL_MODEL[variant], "--encoder_attention", attention, "--enact_kernels", "triton"]
    model = build(variant, *flags)[0]
    choices = [module.kernels for module in model.modules() if hasattr(module, "kernels")]
    assert set(choices) <= {"triton"} and bool(choices) == (attention == "enact" or variant == "anchor")


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--enact_kernels", "triton"], True),
        ([], False),  # `auto` is PyTorch
        (["--enact_kernels", "triton", "--enact_clusters", "equal"], False),
        (["--enact_kernels", "triton", "--checkpoint_activations"], False),
        (["--enact_kernels", "triton", "--encoder_attention", "mhsa"], False),
    ],
    ids=str,
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_training_packs_windows_that_the_kernels_make(variant, flags, expected):
    args = parse(variant, *SMALL_MODEL[variant], *flags)
    model = load_variant(variant).models.build_model(args)[0]
    acceleration.prepare(model, args, torch.device("cpu"))
    # Anchor DETR's products need the number of windows.
    assert packs_windows(model) == (expected and variant != "anchor")


class Operations(TorchDispatchMode):
    """Counts PyTorch's operations that compute something, for each of which a GPU would launch a kernel."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.number += not (function.is_view or "empty" in name or name in ("_unsafe_view", "detach"))
        return function(*args, **(kwargs or {}))


class OneOperation(torch.autograd.Function):
    """Takes the place of fused attention: an operation forward and one backward, with results of the right shapes."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return torch.ones_like(q)

    @staticmethod
    def backward(ctx, grad):
        q, k, v = ctx.saved_tensors
        return torch.ones_like(q), torch.empty_like(k), torch.empty_like(v)


def launches_of(layer: nn.Module, packs: bool = False) -> int:
    """Operations and kernels of a layer in bf16, forward and backward. Kernels are counted, but not run."""
    report = pytest.importorskip("enact_common.attention.kernels.report")
    src, pos = torch.randn(2, 60, 2, 16)
    query = src.requires_grad_() + pos
    packing = packed.packed_windows() if packs else contextlib.nullcontext()
    with report.recorded(report.pooling) as launches, Operations() as operations:
        with torch.autocast("cpu", torch.bfloat16), packing:
            output = layer(query, query, src, need_weights=False)[0]
        torch.autograd.backward(output, torch.empty_like(output))
    return operations.number + len(launches)


def test_layers_with_kernels_launch_hardly_more_than_plain_attention(pretended, monkeypatch):
    report = pytest.importorskip("enact_common.attention.kernels.report")
    monkeypatch.setattr(report.pooling, "ReadBack", report.KnownLength)
    monkeypatch.setattr(report.pooling, "check_gradients", lambda *_: None)
    monkeypatch.setattr(packed, "takes_packed", lambda q: True)
    monkeypatch.setattr(packed, "try_fused", packed.fused_attention)
    monkeypatch.setattr(packed, "attend_sequences", lambda q, k, v, *_: OneOperation.apply(q, k, v))
    plain = launches_of(nn.MultiheadAttention(16, 2))
    for settings, packs in (({"clusters": "equal"}, False), ({}, False), ({}, True)):
        count = launches_of(EnactSelfAttention(16, 2, kernels="triton", **settings), packs)
        assert not kernels.failed_kernels() and count <= plain + (10 if packs else 4), (settings, packs, count, plain)
        assert 3 * count < 2 * launches_of(EnactSelfAttention(16, 2, **settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_attention_within_sequences_has_the_shapes_and_dtypes_of_its_inputs(dtype):
    """On tensors without data, whose contents the host cannot read."""
    pytest.importorskip("triton", minversion="3.6")  # earlier versions of PyTorch cannot
    q, k, v = (torch.empty(2, size, 4, 32, dtype=dtype, device="meta", requires_grad=True) for size in (50, 25, 25))
    starts = torch.empty(3, dtype=torch.int32, device="meta")
    attended = packed.fused_attention(q, k.flatten(0, 1), v.flatten(0, 1), starts, 0.1, 0.5)
    assert attended.shape == q.shape and attended.dtype == dtype
    try:
        gradients = torch.autograd.grad(attended.sum(), [q, k, v])
    except TypeError as error:
        # A fault of PyTorch 2.11, of this function on the meta device alone.
        assert dtype == torch.float32 and "meta__efficient_attention_backward" in str(error)
        return
    assert [grad.shape for grad in gradients] == [q.shape, k.shape, v.shape]


def test_the_flag_is_reported_only_if_it_is_not_the_default():
    assert clustering_settings(parse("detr"))["kernels"] == "auto" and not encoder_settings(parse("detr"))["kernels"]
    assert encoder_settings(parse("detr", "--enact_kernels", "torch"))["kernels"] == "torch"
