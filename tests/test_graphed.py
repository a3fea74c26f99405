"""Encoders as CUDA graphs: what the host may not do inside of one, and which calls replay it."""

import contextlib

import pytest
import torch
from conftest import SMALL_MODEL, build
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from enact_common.attention import EnactSelfAttention, kernels, packed
from enact_common.attention.hilbert import HILBERT, ROWS
from enact_common.attention.rivals import RIVALS
from enact_common.models.graphed import encoder_of, graph_encoder, reason_against_graphs
from enact_common.models.layers import TransformerEncoderLayer
from enact_common.models.transformer import TransformerEncoder


class NoTraffic(TorchDispatchMode):
    """Raises at a copy between two devices. Reads of a meta tensor by the host raise anyway."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        devices = {t.device.type for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"{function} copies between {devices}")
        return result


def encoder(attention: nn.Module, order: str = ROWS) -> TransformerEncoder:
    """A small encoder of one layer."""
    return TransformerEncoder(TransformerEncoderLayer(attention, 16, 32, 0.1), 1, order=order)


def enact(**settings) -> EnactSelfAttention:
    return EnactSelfAttention(16, 2, **settings)


def inputs(batch: int = 2, device: str = "cpu") -> tuple:
    """Arguments of an encoder for maps of 4 x 5 cells."""
    src, pos = torch.randn(2, 20, batch, 16, device=device)
    return src.requires_grad_(), torch.zeros(batch, 20, dtype=torch.bool, device=device), pos, (4, 5)


@pytest.fixture
def meta(monkeypatch):
    """The meta device: like a GPU, it is not the host's, and its tensors have no data that the host could read."""
    # Autocast does not know it.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


@pytest.mark.parametrize(
    "attention, order, message",
    [
        (lambda: enact(clusters="equal"), ROWS, None),
        (lambda: enact(clusters="equal", max_clusters=6, temperature=1.0, scale_logits=True), ROWS, None),
        (lambda: nn.MultiheadAttention(16, 2), ROWS, None),
        (lambda: enact(), ROWS, "item()"),
        (lambda: enact(clusters="regions"), ROWS, "Cannot copy out of meta tensor"),
        (lambda: enact(clusters="equal"), HILBERT, "copies between"),  # only at a size's first call, before a capture
    ],
    ids=["equal", "equal, set", "plain", "windows", "regions", "hilbert"],
)
def test_the_host_neither_reads_nor_copies_with_clusters_of_equal_information(attention, order, message, meta):
    model, arguments = encoder(attention(), order).to("meta"), inputs(device="meta")
    expected = contextlib.nullcontext() if message is None else pytest.raises((RuntimeError, NotImplementedError))
    with expected as error, NoTraffic():
        model(*arguments).sum().backward()
    assert message is None or message in str(error.value)
    gradients = [parameter.grad is not None for parameter in model.parameters()]
    assert all(gradients) if message is None else not any(gradients)


@pytest.mark.parametrize(
    "settings, packs, launched",
    [
        ({"clusters": "equal"}, False, True),
        ({}, True, True),
        ({"max_clusters": 6, "temperature": 1.0, "scale_logits": True}, True, True),
        ({}, False, False),
    ],
    ids=["equal", "packed windows", "packed windows, set", "windows"],
)
def test_the_host_only_launches_kernels_unless_it_reads_the_number_of_windows(
    settings, packs, launched, meta, monkeypatch
):
    pytest.importorskip("triton", minversion="3.6")
    from enact_common.attention.kernels import pooling, report

    monkeypatch.setattr(kernels, "reason_against", lambda _: None)
    monkeypatch.setattr(kernels, "_failed", set())
    monkeypatch.setattr(kernels, "_logged", set())
    monkeypatch.setattr(packed, "takes_packed", lambda q: True)
    for module in (pooling, packed):
        monkeypatch.setattr(module, "_checked", set())
    # In float32, the meta function of fused attention's backward pass fails in PyTorch 2.11.
    dtype = torch.bfloat16 if packs else torch.float32
    model = encoder(enact(kernels="triton", **settings)).to("meta", dtype)
    src, mask, pos, size = inputs(device="meta")
    expected = contextlib.nullcontext() if launched else pytest.raises(RuntimeError, match="item()")
    packing = packed.packed_windows() if packs else contextlib.nullcontext([])
    with expected, report.recorded(pooling) as launches, NoTraffic(), packing as overflows:
        model(src.to(dtype), mask, pos.to(dtype), size).sum().backward()
    assert ("pool" in {launch.name for launch in launches}) == launched
    assert bool(kernels.failed_kernels()) != launched and len(overflows) == packs


@pytest.fixture
def captures(monkeypatch) -> list:
    """Lets functions be "captured" without a GPU; lists the copies of the inputs, and calls of the graphs as None."""
    found = []

    def make(module, samples):
        assert not torch.is_autocast_cache_enabled()
        found.append(samples)
        module.register_forward_hook(lambda *_: found.append(None))
        return module

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make)
    return found


def test_calls_of_one_size_replay_a_graph_and_others_do_not(captures):
    torch.manual_seed(0)
    model = encoder(enact(clusters="equal")).eval()
    arguments, others = inputs(), inputs(batch=3)
    expected = [model(*arguments), model(*others)]
    names = list(model.state_dict())
    graph_encoder(model)
    for _ in range(2):
        assert_close([model(*arguments), model(*others)], expected)
    (samples, *replays), captures[:] = list(captures), []
    assert replays == [None, None] and list(model.state_dict()) == names
    assert [sample.requires_grad for sample in samples] == [True, False, False] and samples[0].is_leaf
    assert samples[0].data_ptr() != arguments[0].data_ptr()

    with torch.no_grad():
        assert_close(model(*arguments), expected[0])
    with torch.autocast("cpu", torch.bfloat16):
        model(*arguments)  # was captured in float32
    assert len(captures) == 2 and not captures[0][0].requires_grad  # inference has its own graph
    model.train()(*arguments).sum().backward()
    assert len(captures) == 4 and all(parameter.grad is not None for parameter in model.parameters())


def recomputed() -> nn.Module:
    model = encoder(enact(clusters="equal"))
    model.layers[0].recompute = True
    return model


@pytest.mark.parametrize(
    "model, reason",
    [
        (lambda: encoder(enact(clusters="equal")), None),
        (lambda: encoder(nn.MultiheadAttention(16, 2)), None),
        (lambda: encoder(enact()), "the host reads the number of clusters of windows; pass --enact_clusters equal"),
        (lambda: encoder(RIVALS["avgpool"](16, 2)), "AveragePoolSelfAttention was not tried"),
        (recomputed, "its activations are recomputed"),
        (lambda: nn.Linear(1, 1), "only DETR's and Conditional DETR's"),
    ],
)
def test_encoders_that_cannot_be_captured_are_refused(model, reason):
    model = model()
    if reason is None:
        assert reason_against_graphs(model) is None
    else:
        with pytest.raises(ValueError, match=f"cannot be a CUDA graph: .*{reason}"):
            graph_encoder(model)


@pytest.mark.parametrize("variant", ["detr", "conditional", "anchor"])
def test_the_detectors_encoder_is_found(variant):
    model = build(variant, *SMALL_MODEL[variant], "--enact_clusters", "equal")[0]
    assert (encoder_of(model) is None) == (variant == "anchor")
