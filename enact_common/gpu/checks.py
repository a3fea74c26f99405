"""Checks of correctness and speed on a device; each returns the rows of a table.

A check is a function of a `Setting`, listed in `CHECKS`. All checks also run on a CPU with `small`, which tries the
code without useful timings.
"""

import contextlib
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from enact_common.attention.clustering import (
    clusterings,
    count_regions,
    gaussian_kernel,
    self_information,
    smooth,
    window_length,
)
from enact_common.attention.clusters import Windows
from enact_common.attention.kernels import TORCH, TRITON, failed_kernels
from enact_common.attention.layer import EnactSelfAttention
from enact_common.attention.packed import PACKED_ATTENTION, packed_windows
from enact_common.benchmark.detectors import build_detector, build_train_step, noise_batch, parse_flags
from enact_common.benchmark.isolated import numerics
from enact_common.benchmark.measuring import synchronizer, take_turns
from enact_common.data.synthetic import make_shapes
from enact_common.gpu import golden
from enact_common.models.graphed import graph_encoder
from enact_common.models.layers import TransformerEncoderLayer
from enact_common.models.transformer import TransformerEncoder
from enact_common.training.engine import NonFiniteLossError, to_device
from enact_common.training.run import main as run_variant
from enact_common.utils.acceleration import prepare
from enact_common.utils.device import autocast
from enact_common.variants import load_variant

# Absolute and relative tolerance that rounding on a CPU stays within; errors are in units of it.
UNIT = 1e-4

# (batch, tokens) of an encoder layer: the published sizes of DETR-C5 and Anchor DETR-DC5, and a small one for trials.
PUBLISHED = ((8, 850), (4, 4200))
SMALL = ((2, 60),)

# Triton's kernels with packed windows, where checks name the kernels.
PACKED = "packed"

# PyTorch's error messages for inputs that an attention backend does not support, on a GPU and on a CPU.
NO_BACKEND = ("No available kernel", "No viable backend")

SMALL_DETECTOR = "--backbone resnet18 --enc_layers 1 --dec_layers 1".split()

# Flags of the training whose resume must be exact.
TRAINING = (
    "--backbone resnet18 --backbone_weights none --enc_layers 2 --dec_layers 2 --batch_size 8 "
    "--num_workers 2 --lr 2e-4 --lr_backbone 2e-4 --deterministic"
).split()


@dataclass(frozen=True)
class Setting:
    """The device and sizes of the checks.

    Attributes:
        device: the device to check.
        small: use sizes that take seconds on a CPU.
    """

    device: torch.device
    small: bool

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def maps(self) -> tuple[tuple[int, int], ...]:
        """The (batch, tokens) of encoder layers to check."""
        return SMALL if self.small else PUBLISHED

    def milliseconds(self, step: Callable[[], object], runs: int | None = None, warmup: int = 3) -> float:
        """Return the median time of a step, milliseconds, with the device synchronized."""
        runs = runs or (2 if self.small else 12)
        return 1e3 * statistics.median(take_turns({"": step}, runs, synchronizer(self.device), warmup)[""])


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Context in which TF32 is allowed or forbidden in convolutions, and forbidden in matrix products."""
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [flag.allow_tf32 for flag in flags]
    flags[0].allow_tf32, flags[1].allow_tf32 = allowed, False
    try:
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


def error_in_units(ours: Tensor | float, recorded: np.ndarray) -> float:
    """Return the largest difference, in units of `UNIT` absolute plus `UNIT` relative."""
    ours, recorded = np.asarray(ours, dtype=np.float64), np.asarray(recorded, dtype=np.float64)
    return float((np.abs(ours - recorded) / (UNIT + UNIT * np.abs(recorded))).max(initial=0))


@contextlib.contextmanager
def collect_window_lengths(model: nn.Module) -> Iterator[list[int]]:
    """Yield a list to which each call of a clustering appends its window length."""
    lengths: list[int] = []

    def note(information: Tensor, clusters) -> None:
        if isinstance(clusters, Windows):
            lengths.append(clusters.weights.shape[-1])

    with contextlib.ExitStack() as handles:
        for layer in clusterings(model):
            handles.enter_context(layer.register_cluster_hook(note))
        yield lengths


def check_golden(setting: Setting) -> list[dict]:
    """The recorded reference cases, with TF32 off, at the default flags, and in bf16.

    `outputs` and `losses`: errors in units of 1e-4 absolute and relative. `gradients`: the largest relative error of a
    parameter's gradient norm. `matches`: the matcher chose the recorded pairs. `lengths`: all window lengths equal
    those on the CPU.
    """
    recipe = golden.load_recipe()
    rows = []
    for case in list(golden.cases())[: 1 if setting.small else None]:
        variant = load_variant(case.variant)
        args = variant.main.get_args_parser().parse_args(["--coco_path", "none", *case.argv])
        model, criterion, _ = variant.models.build_model(args)
        recipe.fill(model)
        samples, targets = golden.golden_batch(recipe, case.spec)
        with torch.no_grad(), collect_window_lengths(model) as on_cpu:
            model.eval()(samples)
        model.to(setting.device), criterion.to(setting.device)
        moved = to_device(samples, targets, setting.device)
        for how, allowed, amp in (("TF32 off", False, "none"), ("default", True, "none"), ("bf16", True, "bf16")):
            with tf32(allowed):
                rows.append({"case": case.name, "numerics": how, **compare(case, model, criterion, moved, amp, on_cpu)})
    return rows


def compare(case: golden.Case, model: nn.Module, criterion: nn.Module, batch, amp: str, on_cpu: list[int]) -> dict:
    """Return the errors of one row of `check_golden`."""
    samples, targets = batch
    device = samples.tensors.device
    with torch.no_grad(), collect_window_lengths(model) as lengths, autocast(device, amp):
        outputs = model.eval()(samples)
    expected = {name: case.recorded[f"eval/{name}"] for name in outputs if f"eval/{name}" in case.recorded}
    model.train().zero_grad()
    with autocast(device, amp):
        trained = model(samples)
    losses = criterion(trained, targets)
    criterion.total(losses).backward()
    norms = json.loads(str(case.recorded["grad_norms"]))
    grad_norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    pairs = criterion.matcher(trained, targets)
    return {
        "outputs": max(error_in_units(outputs[name].float().cpu(), value) for name, value in expected.items()),
        "losses": max(error_in_units(value.item(), case.recorded[f"loss/{name}"]) for name, value in losses.items()),
        "gradients": max(abs(grad_norms[name] - norm) / (norm + 1e-5) for name, norm in norms.items()),
        "matches": all(
            np.array_equal(np.stack([np.asarray(part.cpu()) for part in pair]), case.recorded[f"match/{i}"])
            for i, pair in enumerate(pairs)
        ),
        "lengths": lengths == on_cpu,
    }


def common_window_length(tokens: int, information: torch.Tensor) -> int:
    """Return the window length of a batch of images with `tokens` tokens and smoothed information (batch, tokens)."""
    regions = count_regions(information)
    return int(window_length(torch.full_like(regions, tokens), regions)[0])


def check_windows(setting: Setting) -> list[dict]:
    """Smoothing on the device against float64, with TF32 allowed and off: relative error and window length."""
    rows = []
    for batch, tokens in setting.maps:
        for gain in (1.0, 10.0):
            torch.manual_seed(0)
            logits = gain * F.avg_pool1d(torch.randn(batch, 1, tokens), 5, 1, 2).squeeze(1)  # (batch, tokens)
            for sigma in (3.0, 5.0):
                kernel = gaussian_kernel(sigma)
                exact = smooth(self_information(logits.double()), kernel.double())
                row = {"batch": batch, "tokens": tokens, "gain": gain, "sigma": sigma}
                row["float64"] = common_window_length(tokens, exact)
                for allowed in (False, True):
                    with tf32(allowed):
                        information = self_information(logits.to(setting.device))
                        ours = smooth(information, kernel.to(setting.device)).cpu()
                    name = "TF32 allowed" if allowed else "TF32 off"
                    row[name] = common_window_length(tokens, ours)
                    row[f"{name}: error"] = float((ours - exact).abs().max() / exact.abs().max())
                rows.append(row)
    return rows


def check_attention(setting: Setting) -> list[dict]:
    """Scaled dot-product attention only, forward and backward, milliseconds.

    `all keys`: as many keys as queries. `a fifth`: a fifth as many keys. `new number`: the first call with a new number
    of keys, as in every step of ENACT.
    """
    rows = []
    backends = {"chosen": None, "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
    if setting.cuda:
        backends["cuDNN"] = SDPBackend.CUDNN_ATTENTION
    for batch, tokens in setting.maps:
        for dtype in (torch.bfloat16, torch.float32):
            for name, backend in backends.items():
                for masked in (False, True):
                    row = {"batch": batch, "tokens": tokens, "dtype": str(dtype).removeprefix("torch.")}
                    rows.append({**row, "backend": name, "mask": masked})
                    times = attempt_attention(setting, batch, tokens, dtype, backend, masked)
                    rows[-1] |= times or dict.fromkeys(("all keys", "a fifth", "new number"))
    return rows


def attempt_attention(setting: Setting, batch: int, tokens: int, dtype, backend, masked: bool) -> dict | None:
    """Return the times of one row of `check_attention`; None if the backend does not support the inputs."""

    def step(keys: int) -> Callable[[], None]:
        def random(length: int) -> Tensor:
            return torch.randn(batch, 8, length, 32, device=setting.device, dtype=dtype, requires_grad=True)

        query, key, value = random(tokens), random(keys), random(keys)
        mask = torch.zeros(batch, 1, 1, keys, device=setting.device, dtype=dtype) if masked else None
        gradient = torch.randn_like(query)

        def forward_backward() -> None:
            with sdpa_kernel(backend) if backend else contextlib.nullcontext():
                F.scaled_dot_product_attention(query, key, value, mask, scale=1.0).backward(gradient)

        return forward_backward

    try:
        step(tokens // 5)()
        first_calls = []
        for part in (4, 6, 7, 8):
            forward_backward = step(tokens // part)
            synchronizer(setting.device)()
            start = time.perf_counter()
            forward_backward()
            synchronizer(setting.device)()
            first_calls.append(1e3 * (time.perf_counter() - start))
        times = {"all keys": setting.milliseconds(step(tokens)), "a fifth": setting.milliseconds(step(tokens // 5))}
        return {**times, "new number": statistics.median(first_calls)}
    except RuntimeError as error:
        if any(words in str(error) for words in NO_BACKEND):
            return None
        raise


LAYERS = {
    "plain": None,
    "plain, padded": None,
    "ENACT": {},
    "ENACT, regions": {"clusters": "regions"},
    "ENACT, equal information": {"clusters": "equal", "max_clusters": 256},
    "ENACT, per image": {"per_image": True, "mask_padding": True},
}


def check_layers(setting: Setting) -> list[dict]:
    """One encoder layer's self-attention: milliseconds; on a GPU also its kernels, and MiB kept for backward."""
    rows = []
    for batch, tokens in setting.maps:
        for amp in ("none", "bf16"):
            for name, settings in LAYERS.items():
                torch.manual_seed(0)
                layer = nn.MultiheadAttention(256, 8) if settings is None else EnactSelfAttention(256, 8, **settings)
                layer.to(setting.device)
                size = (tokens, batch, 256)
                src = torch.randn(size, device=setting.device, requires_grad=True)
                pos, gradient = (torch.randn(size, device=setting.device) for _ in range(2))
                mask = None if name == "plain" else torch.zeros(batch, tokens, dtype=torch.bool, device=setting.device)

                def forward(layer=layer, src=src, pos=pos, mask=mask, amp=amp) -> Tensor:
                    with autocast(setting.device, amp):
                        placed = src + pos
                        return layer(placed, placed, src, key_padding_mask=mask, need_weights=False)[0]

                def forward_backward(layer=layer, src=src, gradient=gradient, forward=forward) -> None:
                    forward().float().backward(gradient)
                    src.grad = None
                    layer.zero_grad(set_to_none=True)

                row = {"batch": batch, "tokens": tokens, "amp": amp, "layer": name}
                row |= {"forward": setting.milliseconds(forward), "both": setting.milliseconds(forward_backward)}
                rows.append(
                    row | (kernel_stats(forward_backward) | {"kept": kept_mib(forward)} if setting.cuda else {})
                )
    return rows


def kernel_stats(step: Callable[[], None]) -> dict:
    """Return a GPU step's number of `kernels`, their `busy` time (milliseconds), and the host's `waits`."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    events = profiler.events()
    kernels = [event for event in events if str(event.device_type).endswith("CUDA")]
    waiting = ("cudaStreamSynchronize", "cudaEventSynchronize")
    return {
        "kernels": len(kernels),
        "busy": sum(event.time_range.elapsed_us() for event in kernels) / 1e3,
        "waits": sum(event.name in waiting for event in events),
    }


def kept_mib(forward: Callable[[], Tensor]) -> float:
    """Return the MiB that a forward pass on a GPU keeps for its backward pass, including its output."""
    before = torch.cuda.memory_allocated()
    output = forward()
    kept = torch.cuda.memory_allocated() - before
    del output
    return kept / 2**20


def check_kernels(setting: Setting) -> list[dict]:
    """Triton's kernels and PyTorch, forward and backward: one encoder layer, and Anchor DETR's clusters and products.

    `difference`: the largest one of outputs and gradients, relative to the largest value of each. It is large where
    rounding gives other borders. `ran`: whether the kernels ran; otherwise PyTorch took over, as it does on a CPU.
    """
    rows = []
    for batch, tokens in setting.maps:
        for amp in ("none", "bf16"):
            for name in ("ENACT", "ENACT, equal information"):
                layer = EnactSelfAttention(256, 8, **LAYERS[name]).to(setting.device)
                step = partial(layer_gradients, setting, layer, batch, tokens, amp)
                row = {"of": f"{name}, {batch} x {tokens} tokens", "precision": amp}
                rows.append(row | compare_kernels(setting, {"clusters"}, step))
    height, width, heads = (3, 5, 2) if setting.small else (50, 84, 32)
    for amp in ("none", "bf16"):
        for name in ("ENACT", "ENACT, equal information"):
            layer = load_variant("anchor").models.transformer.MapClustering(256, **LAYERS[name]).to(setting.device)
            step = partial(map_gradients, setting, layer, (4, height, width), amp)
            row = {"of": f"{name}, clusters of 4 maps of {height} x {width}", "precision": amp}
            rows.append(row | compare_kernels(setting, {"clusters"}, step))
    for dtype in (torch.float32, torch.bfloat16):
        for kind in ("clusters", "map"):
            step = partial(product_gradients, setting, kind, heads, height, width, dtype)
            row = {"of": f"product over the {kind}, {height} x {width}", "precision": str(dtype).removeprefix("torch.")}
            rows.append(row | compare_kernels(setting, {"row-column products"}, step))
    return rows


def check_packed(setting: Setting) -> list[dict]:
    """Windows of one encoder layer with Triton's kernels: read back, and packed as in training.

    Columns as of the kernels' check. On a CPU, PyTorch computes both.
    """
    rows = []
    for batch, tokens in setting.maps:
        for amp in ("none", "bf16"):
            layer = EnactSelfAttention(256, 8).to(setting.device)
            step = partial(layer_gradients, setting, layer, batch, tokens, amp)
            row = {"of": f"windows, {batch} x {tokens} tokens", "precision": amp}
            rows.append(row | compare_kernels(setting, {"clusters", PACKED_ATTENTION}, step, (TRITON, PACKED)))
    return rows


def check_graphs(setting: Setting) -> list[dict]:
    """Encoders of six layers with clusters of equal information, in bf16, as CUDA graphs and eagerly.

    Columns as of the kernels' check. On a CPU, both are eager.
    """
    rows = []
    for batch, tokens in setting.maps:
        for kernels in (TORCH, TRITON):
            step = encoder_step(setting, batch, tokens, kernels)
            row = {"of": f"kernels {kernels}, {batch} x {tokens} tokens"}
            rows.append(row | compare_kernels(setting, {"clusters"}, step, ("eager", "graph")))
    return rows


def compare_kernels(
    setting: Setting, names: set[str], step: Callable[[str], list[Tensor]], choices: tuple[str, str] = (TORCH, TRITON)
) -> dict:
    """Return the difference, the times and on a GPU the kernels of a step in PyTorch and with Triton's kernels.

    `names` are those of the kernels in `failed_kernels`. The step computes outputs and gradients with one of `choices`.
    """
    expected, results = map(step, choices)
    differences = [
        ((result - other).abs().max() / other.abs().max().clamp(min=UNIT)).item()
        for result, other in zip(results, expected, strict=True)
    ]
    row = {"ran": setting.cuda and not names & failed_kernels(), "difference": max(differences)}
    for choice in choices:
        row[f"{choice}: ms"] = setting.milliseconds(partial(step, choice))
    for choice in choices if setting.cuda else ():
        row |= {f"{choice}: {key}": value for key, value in kernel_stats(partial(step, choice)).items()}
    return row


def layer_gradients(setting: Setting, layer: EnactSelfAttention, batch: int, tokens: int, amp: str, kernels: str):
    """Return the output of a layer with these kernels, and the gradients of its input and its scores, in float32.

    `PACKED`: with Triton's kernels and packed windows.
    """
    torch.manual_seed(0)
    layer.kernels = TRITON if kernels == PACKED else kernels
    src, gradient = torch.randn(2, tokens, batch, 256, device=setting.device)
    src.requires_grad_()
    with autocast(setting.device, amp), packed_windows() if kernels == PACKED else contextlib.nullcontext():
        output = layer(src, src, src)[0].float()
    return [output.detach(), *torch.autograd.grad(output, [src, layer.W_prob.weight], gradient)]


def encoder_step(setting: Setting, batch: int, tokens: int, kernels: str) -> Callable[[str], list[Tensor]]:
    """Return a step in bf16 of an encoder with clusters of equal information, which takes "eager" or "graph".

    It returns the output, and the gradients of the input and of a scoring weight. On a CPU, "graph" is eager too.
    """
    attention = EnactSelfAttention(256, 8, kernels=kernels, **LAYERS["ENACT, equal information"])
    layer = TransformerEncoderLayer(attention, 256, dropout=0.0)
    eager = TransformerEncoder(layer, 1 if setting.small else 6).to(setting.device)
    encoders = {"eager": eager, "graph": copy.deepcopy(eager)}
    if setting.cuda:
        graph_encoder(encoders["graph"])
    mask = torch.zeros(batch, tokens, dtype=torch.bool, device=setting.device)

    def step(choice: str) -> list[Tensor]:
        torch.manual_seed(0)
        src, pos, gradient = torch.randn(3, tokens, batch, 256, device=setting.device)
        src.requires_grad_()
        with autocast(setting.device, "bf16"):
            output = encoders[choice](src, mask, pos, (1, tokens)).float()
        weight = encoders[choice].layers[0].self_attn.W_prob.weight
        return [output.detach(), *torch.autograd.grad(output, [src, weight], gradient)]

    return step


def map_gradients(setting: Setting, layer: nn.Module, size: tuple[int, int, int], amp: str, kernels: str):
    """Return the clusters of maps of Anchor DETR with these kernels, and the gradients of all inputs, in float32."""
    torch.manual_seed(0)
    layer.kernels = kernels
    batch, height, width = size
    shapes = ((batch, height, width, 256), (batch, width, 256), (batch, height, 256))
    inputs = [torch.randn(shape, device=setting.device, requires_grad=True) for shape in shapes]
    with autocast(setting.device, amp):
        pooled = [tensor.float() for tensor in layer(*inputs)[:3]]
    weights = [torch.randn_like(tensor) for tensor in pooled]
    return [
        *(tensor.detach() for tensor in pooled),
        *torch.autograd.grad(pooled, [*inputs, layer.W_prob.weight], weights),
    ]


def product_gradients(
    setting: Setting, kind: str, heads: int, height: int, width: int, dtype: torch.dtype, kernels: str
) -> list[Tensor]:
    """Return a row-column product with these kernels, and its gradients, in float32."""
    torch.manual_seed(0)
    products = load_variant("anchor").models.row_column_product
    members = height * width // 5

    def weights(*size: int) -> Tensor:
        # A softmax over the last side, as in the attention.
        return torch.randn(heads, *size, device=setting.device).softmax(-1).to(dtype)

    if kind == "clusters":
        inputs = [weights(height, members), weights(width, members)]
        inputs.append(torch.randn(heads, members, 32, device=setting.device, dtype=dtype))
        function = products.clustered_row_column_product
    else:
        inputs = [weights(members, width), weights(members, height)]
        inputs.append(torch.randn(heads, height, width, 32, device=setting.device, dtype=dtype))
        function = products.row_column_product
    inputs = [tensor.requires_grad_() for tensor in inputs]
    output = function(*inputs, kernels)
    gradients = torch.autograd.grad(output, inputs, torch.randn_like(output))
    return [tensor.detach().float() for tensor in (output, *gradients)]


def train_step(setting: Setting, flags: list[str], amp: str, size: tuple[int, int], batch: int):
    """Return (arguments, model, training step, samples, targets) of DETR on noise, prepared as in a run."""
    flags = [*flags, *(SMALL_DETECTOR if setting.small else [])]
    overrides = ["--coco_path", "none", "--amp", amp, "--batch_size", str(batch)]
    args = parse_flags("detr", str(setting.device), flags, overrides)
    samples, targets = noise_batch(args, size)
    model, criterion, _ = build_detector("detr", args, samples, setting.device)
    prepare(model, args, setting.device)
    return args, model, build_train_step(model, criterion, args, setting.device), samples, targets


def check_sizes(setting: Setting) -> list[dict]:
    """Training steps of DETR in bf16 on ten image sizes: milliseconds on the first and on later visits of a size.

    On a GPU also with cuDNN attention, which builds a new plan for each number of clusters.
    """
    rows = []
    sizes = [(480 + 32 * (i % 11), 640 + 32 * (7 * i % 13)) for i in range(10)]
    if setting.small:
        sizes = [(64, 96), (96, 64)]
    for attention in ("mhsa", "enact"):
        for cudnn in (False, True) if setting.cuda else (False,):
            batch = 2 if setting.small else 4
            args, _, step, *_ = train_step(setting, ["--encoder_attention", attention], "bf16", sizes[0], batch)
            batches = [noise_batch(args, size) for size in sizes]
            before = torch.backends.cuda.cudnn_sdp_enabled()
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            try:
                times = [
                    setting.milliseconds(lambda pair=pair, step=step: step(*pair), runs=1, warmup=0)
                    for _ in range(3) for pair in batches
                ]  # fmt: skip
            finally:
                torch.backends.cuda.enable_cudnn_sdp(before)
            step.check()
            row = {"attention": attention, "cuDNN attention": cudnn}
            new, again = times[: len(sizes)], times[len(sizes) :]
            rows.append({**row, "new": statistics.median(new), "new, most": max(new), "seen": statistics.median(again)})
    return rows


def check_faults(setting: Setting) -> list[dict]:
    """NaN losses: whether they are reported, and whether the weights stay unchanged."""
    rows = []
    for amp in ("none", "bf16", *(["fp16"] if setting.cuda else [])):
        _, model, step, samples, targets = train_step(setting, SMALL_DETECTOR, amp, (96, 128), 2)
        for _ in range(2):
            step(samples, targets)
        step.check()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        bad = [{**target, "boxes": target["boxes"] * torch.nan} for target in targets]
        reported = False
        try:
            for _ in range(40):  # fp16's scaler first lowers its scale for some steps
                step(samples, bad)
            step.check()
        except NonFiniteLossError:
            reported = True
        same = all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
        rows.append({"amp": amp, "reported": reported, "weights unchanged": same})
    return rows


def check_resume(setting: Setting) -> list[dict]:
    """A short `--deterministic` training, uninterrupted and resumed: the last losses, and whether all weights agree."""
    rows = []
    sizes = "--train_sizes 224 256 --eval_size 256 --max_size 400".split()
    train, val, size = 96, 16, (256, 320)
    if setting.small:
        sizes = "--train_sizes 64 --eval_size 64 --max_size 96".split()
        train, val, size = 8, 2, (64, 80)
    for amp in ("none", "bf16"):
        with tempfile.TemporaryDirectory() as folder:
            shapes = make_shapes(Path(folder) / "shapes", train=train, val=val, size=size, seed=3)
            flags = ["--coco_path", shapes, "--device", setting.device, "--amp", amp, *sizes]
            flags += SMALL_DETECTOR if setting.small else []
            whole, parts = Path(folder) / "whole", Path(folder) / "parts"
            for output, more in (
                (whole, ["--epochs", 2]),
                (parts, ["--epochs", 1]),
                (parts, ["--epochs", 2, "--resume", parts / "checkpoint.pth"]),
            ):
                variant = load_variant("detr")
                argv = [str(word) for word in (*TRAINING, *flags, "--output_dir", output, *more)]
                build = variant.models.build_model, variant.datasets.build_dataset
                status = run_variant("detr", variant.main.get_args_parser(), *build, argv)
                if status:
                    raise RuntimeError(f"the training ended with status {status}: {' '.join(argv)}")
            weights = [torch.load(output / "checkpoint.pth", weights_only=True)["model"] for output in (whole, parts)]
            losses = [json.loads((output / "log.txt").read_text().splitlines()[-1]) for output in (whole, parts)]
            row = {"amp": amp, "loss, whole": losses[0]["train_loss"], "loss, resumed": losses[1]["train_loss"]}
            same = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
            rows.append({**row, "weights equal": same})
    return rows


CHECKS = {
    "golden": check_golden,
    "windows": check_windows,
    "faults": check_faults,
    "resume": check_resume,
    "attention": check_attention,
    "layers": check_layers,
    "kernels": check_kernels,
    "packed": check_packed,
    "graphs": check_graphs,
    "sizes": check_sizes,
}


def run_check(name: str, setting: Setting) -> dict:
    """Run a check; return its rows, description, time, and the settings that select kernels."""
    start = time.perf_counter()
    rows = CHECKS[name](setting)
    about = " ".join(CHECKS[name].__doc__.split())
    seconds = time.perf_counter() - start
    where = {"device": str(setting.device), "numerics": numerics()}
    return {"check": name, "about": about, "rows": rows, "seconds": seconds, **where}
