"""The benchmarks on tiny inputs: measured quantities, written files and error handling, but never speed."""

import builtins
import csv
import json
import os
import re
import shlex
import signal
import statistics
from pathlib import Path

import pytest
import torch
from conftest import ALL_STAGES, SMALL_MODEL, assert_close, build, parse
from PIL import Image
from processes import FORKS
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from enact_common.attention.layer import EnactSelfAttention
from enact_common.attention.rivals import RIVALS
from enact_common.benchmark import detectors, isolated, masks, parts, pipeline, report, scaling, table
from enact_common.benchmark.__main__ import build_parser, main
from enact_common.benchmark.eager import NAIVE_PRODUCTS, eager_attention, replaced
from enact_common.benchmark.isolated import (
    DONE,
    FAILED,
    OUT_OF_MEMORY,
    Outcome,
    Worker,
    attempt,
    died,
    numerics,
    run_isolated,
)
from enact_common.benchmark.measuring import MemoryMeter, spread, take_turns
from enact_common.benchmark.report import heading
from enact_common.data.cache import physical_memory
from enact_common.models import backbone, mask_head
from enact_common.nested_tensor import nested_tensor_from_tensor_list
from enact_common.utils.errors import UserError
from enact_common.variants import VARIANTS, load_variant

QUICK = "--size 64 96 --batch 2 --repeat 2 --warmup 1 --device cpu".split()
COMMANDS = {"table": table, "parts": parts, "scaling": scaling, "pipeline": pipeline, "masks": masks}


@pytest.fixture
def in_process(monkeypatch):
    """Measure in this process, because a new one takes seconds to import PyTorch."""
    for module in (parts, pipeline, masks):
        monkeypatch.setattr(module, "run_isolated", lambda function, *args, limit=False: attempt(function, *args))
    replace_workers(monkeypatch, attempt, table, scaling)


@pytest.fixture
def in_forks(monkeypatch):
    """Measure in processes forked from one that has imported PyTorch, instead of new interpreters."""
    monkeypatch.setattr(isolated.multiprocessing, "get_context", lambda method: FORKS)


def replace_workers(monkeypatch, call, *modules) -> None:
    """Replace the modules' workers by a function."""

    class Answering(Worker):
        def call(self, function, *args):
            return call(function, *args)

    for module in modules:
        monkeypatch.setattr(module, "worker_for", lambda device: Answering())


def run_benchmark(command: str, folder, *argv: str) -> tuple[int, dict]:
    """Run a benchmark; (exit status, parsed JSON)."""
    status = main([command, "--output_dir", str(folder), *argv])
    return status, json.loads((folder / f"{command}.json").read_text())


def read_csv(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def assert_is_chart(path) -> None:
    with Image.open(path) as image:
        assert min(image.size) > 300 and len(image.convert("RGB").getcolors(2**24)) > 50


# Isolated processes


def test_errors_and_out_of_memory_are_distinguished():
    assert attempt(max, 1, 2) == Outcome(DONE, 2, numerics=numerics())
    failed = attempt(int, "x")
    assert failed.status == FAILED and failed.message.startswith("ValueError") and "Traceback" in failed.details
    assert attempt(bytearray, 2**62).status == OUT_OF_MEMORY
    assert attempt(torch.empty, 2**60).status == OUT_OF_MEMORY

    def complain():
        raise UserError("--flag: wrong\nin two lines")

    assert attempt(complain) == Outcome(FAILED, message="--flag: wrong")


def test_out_of_memory_is_recognised_by_the_message():
    def fail(error):
        raise error

    assert attempt(fail, torch.cuda.OutOfMemoryError("CUDA out of memory.")).status == OUT_OF_MEMORY
    assert attempt(fail, RuntimeError("CUDA error: out of memory")).status == OUT_OF_MEMORY
    assert attempt(fail, OSError(12, "Cannot allocate memory")).status == OUT_OF_MEMORY
    assert attempt(fail, OSError(2, "No such file")).status == FAILED


def test_a_killed_process_is_reported():
    outcome = run_isolated(signal.raise_signal, signal.SIGKILL)
    assert outcome == Outcome(OUT_OF_MEMORY, message="killed by signal 9, probably out of memory")
    assert died(-signal.SIGSEGV, limit=True) == Outcome(FAILED, message="killed by signal 11")
    assert died(-signal.SIGABRT, limit=True).status == OUT_OF_MEMORY
    assert died(-signal.SIGABRT, limit=False).status == FAILED
    assert died(3, limit=True) == Outcome(FAILED, message="ended with status 3")


def test_a_worker_restarts_only_after_a_failed_call(in_forks):
    with Worker() as worker:
        first, second = (worker.call(os.getpid).value for _ in range(2))
        assert first == second != os.getpid()
        assert worker.call(bytearray, 2**62).status == OUT_OF_MEMORY
        third = worker.call(os.getpid).value
        assert third != first
        assert worker.call(signal.raise_signal, signal.SIGKILL).status == OUT_OF_MEMORY
        assert worker.call(os.getpid).value != third
    with pytest.raises(ProcessLookupError):
        os.kill(third, 0)


def test_results_of_a_gpu_state_the_numerics():
    figures = {"machine": "M", "date": "2026-11-28T01:00", "command": "c", "device": "cuda", "rows": [{}]}
    assert "convolved" not in heading(figures)
    figures["rows"].append({"numerics": numerics()})
    assert "convolved in TF32 and multiplied in float32" in heading(figures)
    assert "memory-efficient" in heading(figures)
    assert "convolved" not in heading(figures | {"device": "cpu"})


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="the limit is Linux's")
def test_a_limited_process_cannot_allocate_all_memory(in_forks):
    assert run_isolated(bytearray, physical_memory(), limit=True).status == OUT_OF_MEMORY


def test_take_turns_and_spread():
    calls = []
    seconds = take_turns({name: lambda name=name: calls.append(name) for name in "ab"}, repeat=2, warmup=2)
    assert calls == ["a", "b"] * 4 and [len(runs) for runs in seconds.values()] == [2, 2]
    assert spread([3.0, 1.0, 2.0, 10.0]) == {"median": 2.5, "least": 1.0, "most": 10.0}


def test_memory_meter_counts_allocations_since_its_start():
    meter = MemoryMeter(torch.device("cpu"))
    block = torch.ones(2**24)  # 64 MiB
    memory = meter.read()
    assert memory["rise"] == pytest.approx(block.nbytes, rel=0.2) and memory["peak"] > memory["rise"]
    assert memory["reserved"] is None


# Eager attention, as in the originals


def test_eager_attention_is_restored():
    module = load_variant("anchor").models.row_column_decoupled_attention
    before = {name: getattr(module, name) for name in NAIVE_PRODUCTS}

    def functions():
        return {name: getattr(module, name) for name in NAIVE_PRODUCTS}

    with pytest.raises(ZeroDivisionError), eager_attention("anchor"):
        assert functions() == NAIVE_PRODUCTS
        assert not torch.backends.cuda.flash_sdp_enabled()
        raise ZeroDivisionError
    assert functions() == before and torch.backends.cuda.flash_sdp_enabled()
    with eager_attention("detr"):
        assert functions() == before


@pytest.mark.parametrize("variant", VARIANTS)
def test_eager_attention_gives_the_same_outputs(variant):
    model, _, _ = build(variant, *SMALL_MODEL[variant], "--encoder_attention", "mhsa")
    model.eval()
    images = nested_tensor_from_tensor_list([torch.randn(3, 64, 96), torch.randn(3, 50, 70)])
    with torch.no_grad():
        efficient = model(images)
        with eager_attention(variant):
            eager = model(images)
    for name in ("pred_logits", "pred_boxes"):
        assert_close(eager[name], efficient[name], 1e-5)


# Detectors and their batches


def test_noise_batches_look_like_a_loaders():
    args = parse("detr", *SMALL_MODEL["detr"], "--batch_size", "2")
    samples, targets = detectors.noise_batch(args, (40, 64))
    assert samples.tensors.shape == (2, 3, 40, 64) and not samples.mask.any()
    again = detectors.noise_batch(args, (40, 64))[0]
    assert torch.equal(again.tensors, samples.tensors) and not torch.equal(samples.tensors[0], samples.tensors[1])
    for target in targets:
        centre, extent = target["boxes"].split(2, dim=1)
        assert target["boxes"].shape == (detectors.OBJECTS, 4) and (extent > 0).all()
        assert (centre - extent / 2 >= 0).all() and (centre + extent / 2 <= 1.0001).all()
        assert target["orig_size"].tolist() == [40, 64] and target["labels"].max() < 91


def test_real_images_are_padded_to_the_size(shapes):
    args = parse("detr", *SMALL_MODEL["detr"], "--coco_path", str(shapes))
    samples, targets = detectors.coco_batch(args, (96, 96))  # of images of 64 x 80 pixels
    assert samples.tensors.shape == (4, 3, 96, 96) and args.num_classes == 6
    padded = torch.zeros(4, 96, 96, dtype=torch.bool)
    padded[:, round(64 * 96 / 80) :] = True
    assert torch.equal(samples.mask, padded) and (samples.tensors * padded[:, None]).abs().max() == 0
    assert all(len(target["boxes"]) and target["orig_size"].tolist() == [64, 80] for target in targets)
    with pytest.raises(UserError, match="has 6 validation images, a batch needs 7"):
        detectors.coco_batch(parse("detr", "--coco_path", str(shapes), "--batch_size", "7"), (96, 96))


def test_a_random_backbone_gets_batch_norm_statistics():
    flags = "--device cpu --backbone resnet18 --backbone_weights none".split()
    args = parse("detr", *flags, "--batch_size", "2")
    samples, _ = detectors.noise_batch(args, (64, 96))
    model, _, _ = detectors.build_detector("detr", args, samples, torch.device("cpu"))
    moments = []

    def measured(x, conv, norm):
        x = norm(conv(x))
        moments.append(torch.stack(torch.var_mean(x)))
        return x

    with torch.no_grad(), replaced(backbone, {"convolve_and_norm": measured}):
        model(nested_tensor_from_tensor_list(samples.tensors[:1]))
    expected = torch.tensor([1.0, 0.0]).expand(len(moments), 2)
    torch.testing.assert_close(torch.stack(moments), expected, rtol=0, atol=0.05)
    # The context restores the function.
    assert backbone.convolve_and_norm is not measured


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_clusters_and_operations_are_counted(variant):
    args = parse(variant, *SMALL_MODEL[variant], "--enc_layers", "2", "--batch_size", "2")
    samples, _ = detectors.noise_batch(args, (128, 160))
    model, _, _ = build(variant, *SMALL_MODEL[variant], "--enc_layers", "2")
    model.eval()
    counts = detectors.inspect_forward(model, samples, "none")
    assert counts["tokens"] == 16 * 20 and len(counts["clusters"]) == 2
    assert all(1 <= clusters <= 320 for clusters in counts["clusters"])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.backbone(model.normalize(samples))
    assert counts["flops"] > counter.get_total_flops() / 2
    # The hooks are removed.
    assert not any(module._forward_hooks for module in model.modules())


def test_flops_of_an_encoder_layer_match_the_formula():
    flags = [*SMALL_MODEL["detr"], "--encoder_attention", "mhsa", "--batch_size", "2"]
    samples, _ = detectors.noise_batch(parse("detr", *flags), (128, 160))
    counts = []
    for layers in ("1", "2"):
        model, _, _ = build("detr", *flags, "--enc_layers", layers)
        counts.append(detectors.inspect_forward(model.eval(), samples, "none")["flops"])
    n, d, hidden = 320, 32, 64
    projections, attention, feed_forward = 4 * n * d * d, 2 * n * n * d, 2 * n * d * hidden
    assert counts[1] - counts[0] == 2 * (projections + attention + feed_forward)


def test_counted_clusters_match_the_attention():
    layer = EnactSelfAttention(8, 2, sigma=1.0)
    tokens = torch.randn(50, 2, 8)
    cluster_counts = []
    layer.W_v.register_forward_hook(lambda module, inputs, output: cluster_counts.append(inputs[0].shape[1]))
    with detectors.counted_clusters(nn.Sequential(layer)) as counts:
        layer(tokens, tokens, tokens)
        layer(tokens[:20], tokens[:20], tokens[:20])
    assert counts == cluster_counts and counts[0] > counts[1]


# table


def check_table(figures: dict, folder) -> None:
    """Check that the table's files agree, and that its ratios follow from its numbers."""
    rows = {row["row"]: row for row in figures["rows"]}
    for row in rows.values():
        for phase in table.PHASES:
            part = row[phase]
            assert part["status"] == DONE and len(part["seconds"]) == 2
            median = statistics.median(part["seconds"]) / row["batch"]
            assert part["seconds_per_image"]["median"] == pytest.approx(median)
            assert part["memory"]["peak"] >= part["memory"]["rise"] >= 0
    assert rows["eager"]["clusters"] == [] and rows["eager"]["mean_clusters"] is None
    assert rows["enact"]["mean_clusters"] == statistics.mean(rows["enact"]["clusters"])

    assert [ratio["over"] for ratio in figures["ratios"]] == ["eager", "efficient"]
    for ratio in figures["ratios"]:
        ours, plain = rows["enact"], rows[ratio["over"]]
        for phase in table.PHASES:
            seconds = [row[phase]["seconds_per_image"]["median"] for row in (ours, plain)]
            assert ratio[f"{phase}_seconds"] == seconds[0] / seconds[1]
            memory = [row[phase]["memory"]["peak"] for row in (ours, plain)]
            assert ratio[f"{phase}_memory"] == memory[0] / memory[1]
        assert ratio["flops"] == ours["flops_per_image"] / plain["flops_per_image"]

    flat = read_csv(folder / "table.csv")
    assert [line["row"] for line in flat] == list(rows)
    for line, row in zip(flat, rows.values(), strict=True):
        assert float(line["training_seconds_per_image_median"]) == row["training"]["seconds_per_image"]["median"]
        assert int(line["parameters"]) == row["parameters"] and line["training_reserved_bytes"] == ""
    assert_is_chart(folder / "table.png")


@pytest.mark.parametrize("variant", ["detr", "anchor"])
def test_the_table_compares_three_rows(variant, in_process, tmp_path, capsys):
    flags = ["--variants", variant, *QUICK, "--", *SMALL_MODEL[variant]]
    status, figures = run_benchmark("table", tmp_path, *flags)
    assert status == 0
    check_table(figures, tmp_path)
    shown = capsys.readouterr()
    text = (tmp_path / "table.md").read_text()
    assert text.strip() in shown.out and "random noise" in text and f"PyTorch {torch.__version__}" in text
    assert sum(line.startswith(f"| {detectors.NAMES[variant]}-C5, R18 |") for line in text.splitlines()) == 3
    assert shown.err.count("s an image, peak") == 6
    assert figures["command"].endswith(" ".join(flags[-8:])) and figures["versions"]["torch"] == torch.__version__
    # The efficient and the eager row share one model; FLOPs are counted with unfused attention.
    eager, efficient, enact = figures["rows"]
    assert eager["parameters"] == efficient["parameters"] and enact["tokens"] == eager["tokens"] == 96
    if variant == "detr":
        assert eager["flops_per_image"] == efficient["flops_per_image"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_parts_of_a_step_are_timed(variant, in_process, tmp_path, capsys):
    flags = ["--variants", variant, *QUICK, "--", *SMALL_MODEL[variant]]
    status, figures = run_benchmark("parts", tmp_path, *flags)
    assert status == 0, capsys.readouterr().err
    for row in figures["rows"]:
        assert row["seconds"].keys() == {*parts.PARTS, parts.WHOLE}
        assert all(len(runs) == 2 for runs in row["runs"].values())
        assert row["seconds"]["backbone"]["median"] > 0 and row["seconds"]["encoder attention"]["median"] > 0
    text = (tmp_path / "parts.md").read_text()
    assert text.strip() in capsys.readouterr().out and text.count(f"| {detectors.NAMES[variant]}-C5, R18 |") == 3
    assert len(read_csv(tmp_path / "parts.csv")) == 3
    assert_is_chart(tmp_path / "parts.png")


def test_recorded_calls_can_be_replayed():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    x = torch.randn(2, 3, requires_grad=True)
    with parts.recorded_calls([model[0]], "forward") as calls:
        result = model(x * 2)
    assert "forward" not in vars(model[0])
    (call,) = calls
    again = call.function(*parts.detached(call.args))
    assert torch.equal(torch.relu(again), result)
    # The replayed graph ends at the call's arguments.
    again.sum().backward()
    assert x.grad is None and model[0].weight.grad is not None


def test_nested_values_are_detached():
    tensor = torch.ones(2, requires_grad=True) * 2
    constant, samples = torch.zeros(2), nested_tensor_from_tensor_list([torch.ones(3, 4, 4)])
    value = {"a": [tensor, (constant, 1)], "b": samples}
    detached = parts.detached(value)
    assert parts.differentiable(value) == [tensor] and len(parts.differentiable(detached)) == 1
    assert detached["a"][0].is_leaf and detached["a"][1][1] == 1 and torch.equal(detached["b"].tensors, samples.tensors)


def test_the_table_in_isolated_processes_on_coco_images(in_forks, shapes, tmp_path, capsys):
    flags = ["--variants", "conditional", "--rows", "enact", "--coco_path", str(shapes), *QUICK]
    status, figures = run_benchmark("table", tmp_path, *flags, "--", *SMALL_MODEL["conditional"])
    assert status == 0, capsys.readouterr().err
    (row,) = figures["rows"]
    assert row["batch"] == 2 and row["training"]["status"] == row["inference"]["status"] == DONE
    assert figures["ratios"] == [] and f"validation images of {shapes}, padded" in (tmp_path / "table.md").read_text()


def test_rows_that_run_out_of_memory_or_fail_do_not_stop_the_others(monkeypatch, tmp_path, capsys):
    def run(function, what, phase):
        if what.row == "eager":
            return Outcome(OUT_OF_MEMORY, message="killed by signal 9, probably out of memory")
        if what.row == "efficient" and phase == "inference":
            return Outcome(FAILED, message="ValueError: odd", details="Traceback ...\n")
        counted = {"parameters": 10, "tokens": 6, "clusters": [2, 4], "flops": 1e9} if phase == "inference" else {}
        return Outcome(DONE, {"seconds": [1.0, 2.0], "memory": {"peak": 2**30, "rise": 5, "reserved": None}, **counted})

    replace_workers(monkeypatch, run, table)
    status, figures = run_benchmark("table", tmp_path, "--variants", "detr", *QUICK, "--", *SMALL_MODEL["detr"])
    assert status == 1
    over_eager, over_efficient = figures["ratios"]
    assert over_eager["training_seconds"] is None and over_eager["flops"] is None
    assert over_efficient["training_seconds"] == 1 and over_efficient["inference_seconds"] is None
    text = (tmp_path / "table.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| DETR-C5, R18 |")]
    assert rows[0].count("out of memory") == 4 and rows[1].count("failed") == 2
    assert "0.7500 (0.5000 to 1.0000)" in rows[2] and rows[2].endswith("| 3 |")
    errors = capsys.readouterr().err
    assert "killed by signal 9, probably out of memory" in errors and "ValueError: odd" in errors
    assert "Traceback ..." in errors
    assert_is_chart(tmp_path / "table.png")

    # Running out of memory is not a failure.
    argv = ["--variants", "detr", "--rows", "eager", *QUICK, "--", *SMALL_MODEL["detr"]]
    assert run_benchmark("table", tmp_path, *argv)[0] == 0


def test_inference_is_measured_even_if_counting_runs_out_of_memory(in_process, monkeypatch, tmp_path):
    def exhaust(*args):
        raise MemoryError

    monkeypatch.setattr(table, "inspect_forward", exhaust)
    argv = ["--variants", "detr", "--rows", "efficient", *QUICK, "--", *SMALL_MODEL["detr"]]
    status, figures = run_benchmark("table", tmp_path, *argv)
    (row,) = figures["rows"]
    assert status == 0 and row["inference"]["status"] == DONE and row["flops_per_image"] is None
    assert "| - | 0.7 |" in (tmp_path / "table.md").read_text()


def test_batch_sizes_come_from_the_published_table_or_from_flags():
    plan = detectors.parse_flags
    assert [plan(v, "cpu", [], ["--coco_path", "x"]).batch_size for v in VARIANTS] == [8, 8, 4]
    assert plan("anchor", "cpu", ["--batch_size", "3"], []).batch_size == 3
    args = plan("anchor", "cpu", ["--batch_size", "3"], ["--batch_size", "2"])
    assert (args.batch_size, args.device, args.backbone_weights) == (2, "cpu", "none")
    names = [detectors.model_name(v, plan(v, "cpu", [], ["--coco_path", "x"])) for v in VARIANTS]
    assert names == ["DETR-C5, R50", "Conditional DETR-C5, R101", "Anchor DETR-DC5, R50"]


# scaling


def test_scaling_compares_all_layers(in_process, tmp_path, capsys):
    argv = "--tokens 1200 48 1000 --channels 8 --heads 2 --repeat 2 --device cpu".split()
    status, figures = run_benchmark("scaling", tmp_path, *argv)
    assert status == 0
    names = [name for name in scaling.LAYERS if name not in scaling.GPU_LAYERS]
    rows, layers = figures["rows"], len(names)
    assert [row["tokens"] for row in rows] == [48] * layers + [1000] * layers + [1200] * layers
    assert [row["layer"] for row in rows[:layers]] == names
    for row in rows:
        base = next(r for r in rows if r["layer"] == "mha" and r["tokens"] == row["tokens"])
        assert row["time_ratio"] == row["seconds"]["median"] / base["seconds"]["median"]
        assert row["memory"] >= 0 and len(row["runs"]) == 2
        budget = row["layer"] in RIVALS and RIVALS[row["layer"]].takes_budget
        has_clusters = budget or "enact" in row["layer"] or row["layer"] == "clustered_rcda"
        assert (row["clusters"] is not None) == has_clusters
        assert row["layer"] != "enact_limited" or row["clusters"] <= 256
        assert not (budget or row["layer"] == "enact_equal") or row["clusters"] == min(row["tokens"], 256)
    times = {row["tokens"]: row["seconds"]["median"] for row in rows if row["layer"] == "rcda"}
    expected = scaling.fit_exponent(list(times), list(times.values()))
    assert figures["fits"]["rcda"]["time"] == pytest.approx(expected)
    text = (tmp_path / "scaling.md").read_text()
    assert text.strip() in capsys.readouterr().out and text.count("| 1200 | 30 x 40 | ") == layers
    assert [int(line["tokens"]) for line in read_csv(tmp_path / "scaling.csv")] == [row["tokens"] for row in rows]
    assert_is_chart(tmp_path / "scaling.png")


def test_a_layer_that_runs_out_of_memory_is_skipped_on_larger_maps(monkeypatch, tmp_path):
    def run(function, *args):
        if function is scaling.measure_memory:
            name, (height, width), _ = args
            if name == "mha_eager" and height * width >= 108:
                return Outcome(OUT_OF_MEMORY, message="too much")
            return Outcome(DONE, {"memory": 100, "clusters": None})
        return Outcome(DONE, {name: [1.0] for name in args[0]})

    replace_workers(monkeypatch, run, scaling)
    argv = "--tokens 48 108 300 --layers mha_eager mha --device cpu".split()
    status, figures = run_benchmark("scaling", tmp_path, *argv)
    assert status == 0
    statuses = [(row["tokens"], row["layer"], row["status"]) for row in figures["rows"]]
    assert statuses == [
        (48, "mha_eager", DONE), (48, "mha", DONE), (108, "mha_eager", OUT_OF_MEMORY), (108, "mha", DONE),
        (300, "mha", DONE),
    ]  # fmt: skip
    assert "| out of memory | - | - | - |" in (tmp_path / "scaling.md").read_text()


def test_a_layer_that_fails_is_shown(monkeypatch, tmp_path, capsys):
    def run(function, *args):
        return Outcome(FAILED, message="ValueError: odd", details="Traceback ...\n")

    replace_workers(monkeypatch, run, scaling)
    status, figures = run_benchmark("scaling", tmp_path, "--tokens", "48", "--layers", "mha", "--device", "cpu")
    assert status == 1 and "Traceback ..." in capsys.readouterr().err
    assert figures["rows"][0]["seconds"] is None and figures["fits"]["mha"] == {"time": None, "memory": None}


def test_exponents_of_power_laws():
    tokens = [300, 1000, 2000, 4000, 17000]
    for exponent in (0.5, 1.0, 2.0):
        values = [1e9] + [3 * n**exponent for n in tokens[1:]]  # the first map is too small to count
        assert scaling.fit_exponent(tokens, values) == pytest.approx(exponent)
    assert scaling.fit_exponent(tokens, [None, 5.0, None, 20.0, 0]) == pytest.approx(1.0)
    assert scaling.fit_exponent([300, 900, 1000], [1.0, 2.0, 3.0]) is None


def test_map_shapes_are_about_3_to_4():
    shapes = {n: scaling.map_shape(n) for n in (1, 300, 600, 1050, 2100, 4200, 8400, 17000)}
    assert all(height * width == n for n, (height, width) in shapes.items())
    assert shapes[300] == (15, 20) and shapes[4200] == (56, 75)
    assert all(0.5 <= height / width <= 1 for height, width in shapes.values())
    height, width = scaling.map_shape(997)  # a prime
    assert abs(height * width - 997) < 15 and 0.6 < height / width < 0.9


def test_smooth_maps_have_fewer_clusters():
    problem = {"batch": 1, "channels": 16, "heads": 2, "device": "cpu", "amp": "none"}
    for layer in ("enact", "enact_regions", "clustered_rcda"):
        rough, smooth = (
            scaling.Workload(layer, (30, 40), scaling.Problem(**problem, smooth=cells)).clusters() for cells in (0, 3)
        )
        assert 1 < smooth < rough < 1200
    maps = torch.randn(2, 12, 16, 8)
    blurred = scaling.blur(maps, 1.5)
    assert blurred.shape == maps.shape and blurred.std() == pytest.approx(float(maps.std()))
    assert (blurred[:, 1:] - blurred[:, :-1]).std() < 0.5 * (maps[:, 1:] - maps[:, :-1]).std()
    constant = torch.full((1, 4, 4, 1), 2.0) + torch.tensor([0.0, 1.0])
    assert_close(scaling.blur(constant, 5.0), constant)
    assert scaling.blur(maps, 0) is maps


# pipeline


def test_the_pipeline_with_workers_and_caches(in_process, shapes, tmp_path, capsys):
    argv = ["--workers", "0", "1", "--steps", "2", "--repeat", "2", "--batch", "3", "--device", "cpu"]
    flags = [*argv, "--coco_path", str(shapes), "--", *SMALL_MODEL["detr"]]
    status, figures = run_benchmark("pipeline", tmp_path, *flags)
    assert status == 0, capsys.readouterr().err
    rows = figures["rows"]
    wanted = [(mode, workers) for mode in ("off", "encoded", "decoded") for workers in (0, 1)]
    assert [(row["cache_mode"], row["workers"]) for row in rows] == wanted
    for row in rows:
        assert all(len(runs) == 2 for runs in row["runs"].values())
        assert 0 < row["wait_share"]["median"] < 1 and row["images_per_second"]["least"] > 0
    text = (tmp_path / "pipeline.md").read_text()
    assert text.strip() in capsys.readouterr().out and "DETR-C5, R18, batch 3" in text and "| encoded | 1 | " in text
    assert len(read_csv(tmp_path / "pipeline.csv")) == 6
    assert_is_chart(tmp_path / "pipeline.png")


def test_the_loader_without_training_on_drawn_images(in_process, tmp_path):
    argv = "--variant anchor --workers 0 --cache_mode off --images 2 --steps 0 --repeat 1 --batch 1 --device cpu"
    status, figures = run_benchmark("pipeline", tmp_path, *argv.split(), "--", *SMALL_MODEL["anchor"])
    (row,) = figures["rows"]
    assert status == 0 and row["images_per_second"]["median"] > 0 and row["wait_share"] is None
    assert "2 JPEG files of drawn shapes" in (tmp_path / "pipeline.md").read_text()
    assert_is_chart(tmp_path / "pipeline.png")


def test_fewer_images_than_a_batch_are_refused(in_process, shapes, tmp_path, capsys):
    argv = ["--workers", "0", "--cache_mode", "off", "--images", "2", "--coco_path", str(shapes), "--device", "cpu"]
    status, figures = run_benchmark("pipeline", tmp_path, *argv, "--", *SMALL_MODEL["detr"])
    assert status == 1 and figures["rows"][0]["status"] == FAILED
    assert "2 images do not fill a batch of 4" in capsys.readouterr().err


# masks


def test_masks_are_compared_with_predicting_all_masks_at_once(in_process, tmp_path, capsys):
    flags = [*QUICK, "--objects", "3", "--", *SMALL_MODEL["detr"], *ALL_STAGES]
    status, figures = run_benchmark("masks", tmp_path, *flags)
    assert status == 0, capsys.readouterr().err
    rows = {row["row"]: row for row in figures["rows"]}
    assert list(rows) == list(masks.ROWS)
    for row in rows.values():
        assert row["status"] == DONE and len(row["runs"]) == 2 and row["memory"]["peak"] >= row["memory"]["rise"] >= 0
    text, shown = (tmp_path / "masks.md").read_text(), capsys.readouterr()
    assert text.strip() in shown.out and "2 x 64 x 96 pixels of noise with 3 objects" in text
    assert [text.count(f"| {words} |") for words in masks.ROWS.values()] == [1, 1, 1]
    for line, row in zip(read_csv(tmp_path / "masks.csv"), rows.values(), strict=True):
        ratio = row["seconds"]["median"] / rows["boxes"]["seconds"]["median"]
        assert float(line["seconds_over_boxes"]) == pytest.approx(ratio) and int(line["peak_bytes"]) > 0
    assert mask_head.HEAD_CHUNK == 16


def test_predicting_all_masks_at_once_gives_the_same_losses():
    args = parse("detr", *SMALL_MODEL["detr"], *ALL_STAGES, "--masks", "--dropout", "0", "--batch_size", "2")
    samples, targets = masks.masks_batch(args, (64, 96), 3)
    for target in targets:
        height, width = target["boxes"][:, 3] * 64, target["boxes"][:, 2] * 96
        area = target["masks"].flatten(1).sum(dim=1)
        assert target["masks"].shape == (3, 64, 96) and ((area - height * width).abs() <= height + width + 1).all()
    model, criterion, _ = detectors.build_detector("detr", args, samples, torch.device("cpu"))
    model.train()
    ours = criterion(model(samples), targets)
    with masks.at_once():
        outputs = masks.AllMasks(model)(samples)
        assert outputs["pred_masks"].shape == (2, 8, 16, 24)
        theirs = criterion(outputs, targets)
    assert ours["loss_mask"] > 0 and ours.keys() == theirs.keys()
    for name in ours:
        assert_close(ours[name].detach(), theirs[name].detach())


# Arguments and files

GRAPHED = "table --device cpu --graph_encoder".split()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["table", "--", "--encoder_attention", "mhsa"], "choose with --rows"),
        (["table", "--", "--amp=bf16"], "--amp after --: pass it before --"),
        (["table", "--", "--resume", "checkpoint.pth"], "--resume after --: checkpoints are not loaded"),
        (["table", "--device", "nowhere"], "--device nowhere"),
        (["table", "--device", "cpu", "--amp", "fp16"], "--amp fp16 needs a GPU"),
        (["table", "--coco_path", "nowhere"], "--coco_path nowhere: no such folder"),
        (["table", "--variants", "detr", "--", "--backbone", "resnet18", "--dilation"], "has no dilated form"),
        (["scaling", "--channels", "30", "--heads", "4"], "--channels 30: must be a multiple of --heads (4)"),
        (["scaling", "--device", "cpu", "--amp", "fp16"], "--amp fp16 needs a GPU"),
        (["scaling", "--device", "cpu", "--layers", "enact_triton"], "needs a GPU, not cpu; pass enact"),
        (
            ["scaling", "--device", "cpu", "--layers", "enact_equal_triton_graph"],
            "needs a GPU, not cpu; pass enact_equal",
        ),
        ([*GRAPHED, "--variants", "anchor"], "--graph_encoder: Anchor DETR's encoder is not captured; pass --variants"),
        ([*GRAPHED, "--variants", "detr"], "number of windows; pass -- --enact_clusters equal"),
        ([*GRAPHED, "--variants", "detr", "--", "--enact_clusters", "equal"], "CUDA graphs need a GPU, not cpu"),
        ([*GRAPHED, "--variants", "detr", "--rows", "efficient", "--compile"], "leave out --compile"),
        (["masks", "--", "--masks"], "--masks after --: choose with --rows"),
        (["masks", "--objects", "9", "--", "--num_queries", "8"], "--objects 9: more than the model's 8 queries"),
        (["pipeline", "--coco_path", "nowhere"], "--coco_path nowhere: no such folder"),
        (["pipeline", "--", "--cache_mode"], "--cache_mode after --: pass it before --"),
    ],
)
def test_wrong_arguments_are_refused(argv, message, capsys):
    assert main(argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "required: command"),
        (["table", "--size", "0", "64"], "must be at least 1"),
        (["table", "--variants", "yolo"], "invalid choice"),
        (["table", "--variants", "detr", "--", "--num_query_position", "4"], "unrecognized arguments"),
        (["scaling", "--smooth", "-1"], "must be a number of at least 0"),
        (["scaling", "--layers", "lstm"], "invalid choice"),
        (["pipeline", "--cache_mode", "paper"], "invalid choice"),
    ],
)
def test_unknown_arguments_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_documented_commands_parse():
    root = Path(__file__).resolve().parents[1]
    commands = []
    for path in (root / "README.md", *sorted((root / "docs").rglob("*.md"))):
        commands += re.findall(
            r"(?:python -m enact_common\.|\benact )benchmark (.+?)(?:`|\)|$)", path.read_text(), re.MULTILINE
        )
    assert {command.split()[0] for command in commands} == {*COMMANDS, "rowcol", "runtimes", "agreement"}
    for command in commands:
        build_parser().parse_args(shlex.split(command, comments=True))


def test_an_output_folder_that_cannot_be_created_is_refused_before_measuring(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for command in COMMANDS:
        assert main([command, "--device", "cpu", "--output_dir", str(tmp_path / "file")]) == 2
        assert "--output_dir" in capsys.readouterr().err


def test_without_matplotlib_all_but_the_chart_is_written(monkeypatch, tmp_path, capsys):
    real = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib") or "charts" in (args[2] or () if len(args) > 2 else ()):
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    result = report.Report(str(tmp_path / "a" / "b"), "scaling")
    result.save({"rows": []}, "| text |", [{"x": 1, "y": None}])
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == [
        "scaling.csv", "scaling.json", "scaling.md"
    ]  # fmt: skip
    assert (tmp_path / "a" / "b" / "scaling.csv").read_text() == "x,y\n1,\n"
    out = capsys.readouterr().out
    assert out.count("matplotlib is missing") == 1 and "| text |" in out


def test_without_a_folder_nothing_is_written(in_process, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert main("scaling --tokens 48 --layers enact --channels 8 --heads 2 --repeat 1 --device cpu".split()) == 0
    assert list(tmp_path.iterdir()) == [] and "| 48 | 6 x 8 | EnactSelfAttention |" in capsys.readouterr().out
