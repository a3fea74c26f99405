"""Whole models against outputs, losses and gradients of the reference implementations.

`golden/README.md` lists the recorded values and the tolerances for float32 on a CPU.
"""

import functools
import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN, assert_close, build, parse

from enact_common.checkpoints.files import Undrawn
from enact_common.gpu.golden import golden_batch, load_recipe
from enact_common.models import backbone
from enact_common.training.optimization import parameter_groups

# recorded file: (variant, encoder attention)
FILES = {
    "detr_enact": ("detr", "enact"),
    "detr_mhsa": ("detr", "mhsa"),
    "conditional_enact": ("conditional", "enact"),
    "conditional_mhsa": ("conditional", "mhsa"),
    "anchor_enact": ("anchor", "enact"),
    "anchor_rcda": ("anchor", "mhsa"),
}
FILL_VALUE = functools.cache(load_recipe().fill_value)
RECORDED = {file: np.load(GOLDEN / f"{file}.npz") for file in FILES}


def cases(suffix: str) -> list[tuple[str, str]]:
    """The (file, case) pairs that have a recorded entry `suffix`."""
    return [
        (file, key.split("/")[0]) for file, data in RECORDED.items() for key in data.files if key.endswith(f"/{suffix}")
    ]


def arguments(file: str, argv: list[str]) -> list[str]:
    """The flags that build the recorded model here. Weights are not downloaded: `fill` makes them."""
    return [*argv, "--encoder_attention", FILES[file][1], "--backbone_weights", "none"]


@pytest.fixture(scope="module", params=cases("spec"), ids="-".join)
def case(request):
    """(recorded entries by name, spec, arguments, model, criterion, postprocessors) of one recorded case."""
    recipe = load_recipe()
    file, name = request.param
    data = RECORDED[file]
    recorded = {key.removeprefix(f"{name}/"): data[key] for key in data.files if key.startswith(f"{name}/")}
    spec = {"case": name, **json.loads(str(recorded["spec"]))}
    argv = arguments(file, spec["argv"])
    variant = FILES[file][0]
    with Undrawn():
        model, criterion, postprocessors = build(variant, *argv)
    # Cases share most names and shapes.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "fill_value", FILL_VALUE)
        recipe.fill(model)
    return recorded, spec, parse(variant, *argv), model, criterion, postprocessors


def test_outputs_and_boxes(case):
    recorded, spec, _, model, _, postprocessors = case
    samples, _ = golden_batch(load_recipe(), spec)
    model.eval()
    with torch.no_grad():
        outputs = model(samples)
    predicted = {key.removeprefix("eval/") for key in recorded if key.startswith("eval/")}
    assert predicted == {"pred_logits", "pred_boxes"} | ({"pred_masks"} if "--masks" in spec["argv"] else set())
    for name in predicted:
        assert_close(outputs[name], recorded[f"eval/{name}"])
    # Postprocess the recorded outputs, since rounding could swap two nearly equal scores of our own.
    outputs = {name: torch.from_numpy(recorded[f"eval/{name}"]) for name in ("pred_logits", "pred_boxes")}
    results = postprocessors["bbox"](outputs, torch.tensor([[2 * h, 2 * w] for h, w in spec["sizes"]]))
    assert len(results) == len(spec["sizes"])
    for i, result in enumerate(results):
        for name in ("scores", "labels", "boxes"):
            assert_close(result[name], recorded[f"post/{i}/{name}"])


def test_losses_matches_and_gradients(case, monkeypatch):
    recorded, spec, _, model, criterion, _ = case
    # Folding the frozen norms into the convolutions rounds differently: about three of 19 million activations change
    # between zero and positive, and one of them can move a gradient norm by more than a thousandth. So they are apart
    # here, and folded in the five steps. Other CPU instructions do the same: norms moved by up to 1.4e-3 with AVX2
    # instead of AVX-512.
    monkeypatch.setattr(backbone, "convolve_and_norm", lambda x, conv, norm: norm(conv(x)))
    samples, targets = golden_batch(load_recipe(), spec)
    model.train()
    model.zero_grad()
    outputs = model(samples)
    losses = criterion(outputs, targets)
    assert set(losses) == {key.split("/")[1] for key in recorded if key.startswith("loss/")}
    for name, value in losses.items():
        assert_close(value, recorded[f"loss/{name}"])
    assert criterion.weight_dict == json.loads(str(recorded["weight_dict"]))
    total = criterion.total(losses)
    assert_close(total, recorded["loss_total"])

    for i, (queries, objects) in enumerate(criterion.matcher(outputs, targets)):
        assert np.array_equal(np.stack((queries, objects)), recorded[f"match/{i}"])

    total.backward()
    grads = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    expected = json.loads(str(recorded["grad_norms"]))
    assert grads.keys() == expected.keys()
    masks = "--masks" in spec["argv"]
    # The gradient of a key bias is pure rounding, so norms far below all others are compared absolutely. In the masks
    # case the unscaled attention saturates, and the gradient of W_q is rounding too (3e-9; 2e-3 with AVX2 and
    # 4e-3 with neither, where rounding makes two logits of one query equal).
    floor = 2e-4 * max(expected.values()) if masks else 1e-5
    for name, norm in grads.items():
        # With masks the backbone is ResNet-50, where activations switch between zero and positive even without folding.
        deep = "backbone" in name and masks
        assert norm == pytest.approx(expected[name], rel=1e-2 if deep else 3e-3, abs=floor), name


def test_training_steps(case):
    """Five steps of the padded cases; three of the others, since the later steps hold the same promise again.

    The last test of a case, since it changes the model's weights.
    """
    recorded, spec, args, model, criterion, _ = case
    steps = 5 if spec["case"] == "padded" else 3
    samples, targets = golden_batch(load_recipe(), spec)
    model.train()
    groups = parameter_groups(model, args.lr, args.lr_backbone)
    optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=True)
    totals = []
    for _ in range(steps):
        total = criterion.total(criterion(model(samples), targets))
        totals.append(total.item())
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_max_norm)
        optimizer.step()
    assert_close(totals[0], recorded["loss_total"])
    # Rounding grows with each step: 1.3e-3 in the fifth on a CPU with AVX2 but no AVX-512.
    tolerance = 3e-3
    if "--masks" in spec["argv"]:
        # Rounding grows faster at the plain model's learning rate: one code gave 21.99 and 22.59 for the third step
        # with two threads and with one.
        np.testing.assert_allclose(totals[:2], recorded["train5"][:2], rtol=1e-3)
        tolerance = 2e-2 if args.encoder_attention == "enact" else 5e-2
    np.testing.assert_allclose(totals, recorded["train5"][:steps], rtol=tolerance)


@pytest.mark.parametrize("file, name", cases("argv"))
def test_parameters_of_the_published_models(file, name):
    data = RECORDED[file]
    argv = arguments(file, json.loads(str(data[f"{name}/argv"])))
    with Undrawn():
        model, _, _ = build(FILES[file][0], *argv)
    expected = json.loads(str(data[f"{name}/params"]))
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == expected
    if f"{name}/n_trainable" in data.files:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained == int(data[f"{name}/n_trainable"])


# Flags that are not compared. `dataset_path` belongs to a data set that is no longer published. For the others, the
# plain model's parser has another default than the one with ENACT, but `--encoder_attention mhsa` changes only the
# learning rate, so that ENACT on and off are compared on equal terms.
GONE = {
    "detr_enact": {"dataset_path"},
    "detr_mhsa": {"dataset_path"},
    "conditional_mhsa": {"backbone"},
    "anchor_rcda": {"output_dir"},
}


@pytest.mark.parametrize("file", FILES)
def test_flags_have_the_defaults_of_the_reference(file):
    variant, attention = FILES[file]
    flags = json.loads(str(RECORDED[file]["flags"]))
    ours = vars(parse(variant, "--encoder_attention", attention))
    for name, flag in flags.items():
        if name in GONE.get(file, ()):
            continue
        assert ours[name] == flag["default"], name
        # The parser takes the flag with the same number of values.
        words = [] if flag["nargs"] == 0 else [str((flag["choices"] or [first(flag["default"]) or "1"])[0])]
        parse(variant, flag["options"][0], *words)


def first(default):
    """A flag's default, or its first element."""
    return default[0] if isinstance(default, list) and default else default
