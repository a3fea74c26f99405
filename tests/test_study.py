"""The accuracy study: its arms, images, schedule and output files."""

import itertools
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import SMALL_MODEL, build
from processes import FORKS
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from enact_common.attention.clustering import EntropyClustering, clusterings
from enact_common.attention.hilbert import hilbert_order
from enact_common.attention.layer import EnactSelfAttention
from enact_common.attention.plug_in import replacement
from enact_common.attention.rivals import RivalSelfAttention
from enact_common.benchmark.isolated import attempt
from enact_common.study import __main__ as command
from enact_common.study import schedule
from enact_common.study.arms import (
    EqualShares,
    LearnedTemperature,
    MiddleAlone,
    Setting,
    encoder_layers,
    share_border_tokens,
)
from enact_common.study.images import DOTS, TRAIN, VAL, Shapes, draw_one
from enact_common.study.page import difference, difference_text, mean_and_spread
from enact_common.study.presets import ARMS, LIST, PRESETS, in_context
from enact_common.study.schedule import needed, tasks_of
from enact_common.study.sources import load_images
from enact_common.study.training import (
    ClusterTrace,
    Results,
    Task,
    initial_weights,
    look,
    order_of,
    prepared_model,
    right_classes,
    set_training,
    start_of,
    train,
)
from enact_common.utils.errors import UserError

SOURCE = Shapes(train=6, val=4, height=96, widths=(96, 112), scale=0.5)
SETTING = Setting((3, 4), (12, 14))


def task_of(arm: str, variant="conditional", **changes) -> Task:
    """A training of the CPU preset on eight images."""
    trial = next(trial for trial in PRESETS["cpu"].trials if trial.variant == variant)
    made = Task(SOURCE, variant, trial.flags, ARMS[arm], 0, 8, 8, "cpu")
    return replace(made, **changes)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return load_images(SOURCE, tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (4, 4), (8, 8), (7, 12), (13, 6), (3, 50), (33, 34)])
def test_a_hilbert_curve_visits_every_cell_from_neighbour_to_neighbour(shape):
    order = hilbert_order(*shape)
    assert order.sort().values.equal(torch.arange(math.prod(shape)))
    steps = torch.stack((order // shape[1], order % shape[1])).diff(dim=1).abs()
    assert (steps.amax(dim=0) == 1).all() if order.numel() > 1 else True
    assert (steps.sum(dim=0) == 2).sum() <= 1


def test_segments_of_a_hilbert_curve_are_square_patches():
    cells = hilbert_order(32, 32).view(-1, 16)
    rows, columns = cells // 32, cells % 32
    extent = rows.amax(1) - rows.amin(1), columns.amax(1) - columns.amin(1)
    assert (extent[0] == 3).all() and (extent[1] == 3).all()


def test_images_are_padded_and_the_mask_marks_the_padding(images):
    data = images[TRAIN]
    samples, targets = data.batch(torch.arange(6))
    assert samples.tensors.shape == (6, 3, 48, 56) and samples.tensors.dtype == torch.uint8
    widths = (~samples.mask[:, 0]).sum(dim=1).tolist()
    assert widths == data.sizes[:, 1].tolist() and set(widths) == {48, 56}
    assert samples.tensors[samples.mask.unsqueeze(1).expand(-1, 3, -1, -1)].max() == 0
    assert all(2 <= len(t["labels"]) <= 6 and t["boxes"].shape == (len(t["labels"]), 4) for t in targets)
    assert all((t["boxes"] >= 0).all() and (t["boxes"] <= 1).all() for t in targets)


def test_the_ground_truth_is_in_pixels_of_the_drawn_image(images):
    data, truth = images[VAL], images[VAL].truth()
    assert sorted(truth.imgs) == [0, 1, 2, 3]
    assert len(truth.anns) == sum(len(labels) for labels in data.labels)
    for annotation in truth.loadAnns(truth.getAnnIds(imgIds=[2])):
        left, top, width, height = annotation["bbox"]
        assert left >= 0 and left + width <= data.original[2, 1] and top + height <= 96
        assert annotation["area"] <= width * height + 1


def test_cells_are_on_objects_if_boxes_cover_their_centres(images):
    data = images[TRAIN]
    data = replace_boxes(data, torch.tensor([[0.25, 0.5, 0.5, 1.0]]))
    inside, mask = data.on_object(torch.tensor([0]), (12, 14))
    own = int(data.sizes[0, 1]) // 4
    assert inside[0].sum(dim=1).tolist() == [own // 2] * 12
    assert (~mask[0]).sum(dim=1).tolist() == [own] * 12


def replace_boxes(data, boxes):
    """The same images, but the first has these objects, all of class 0."""
    return replace(data, boxes=[boxes, *data.boxes[1:]], labels=[torch.zeros(len(boxes)).long(), *data.labels[1:]])


@pytest.mark.parametrize("dotted", ["some", "one", "each"])
def test_dots_show_the_class_of_their_object_or_of_all_objects(dotted):
    """Compare each scene with the same scene without dots: the grey of the difference shows the class."""
    bare = replace(SOURCE, height=192, widths=(192,), scale=1.0)
    assert bare.classes == ["circle", "triangle", "cross"]
    source = replace(bare, dotted=dotted)
    assert source.classes == ["dark", "light"]
    seen = set()
    for index in range(12):
        before, _, objects, _ = draw_one(bare, TRAIN, index)
        after, _, same, labels = draw_one(source, TRAIN, index)
        assert same == objects and len(labels) == len(objects)
        changed = (before != after).any(axis=2)
        assert set(after[changed].ravel().tolist()) <= set(DOTS.values())
        bearers = 0
        for found, label in zip(objects, labels, strict=True):
            x, y, w, h = found.bbox
            box = slice(int(y), math.ceil(y + h)), slice(int(x), math.ceil(x + w))
            others = [o.bbox for o in objects if o is not found]
            apart = all(a >= x + w or x >= a + c or b >= y + h or y >= b + d for a, b, c, d in others)
            if apart and changed[box].any():
                assert set(after[box][changed[box]].ravel().tolist()) == {list(DOTS.values())[label]}
                bearers += 1
        assert changed.any() and bearers <= {"some": (len(objects) + 1) // 2, "one": 1, "each": 3}[dotted]
        if dotted == "one":
            x, y, w, h = min(objects, key=lambda found: found.area).bbox
            rows, columns = changed.nonzero()
            assert rows.min() >= y - 1 and rows.max() <= y + h and columns.min() >= x - 1 and columns.max() <= x + w
            assert len(set(labels)) == 1
        elif dotted == "each":
            groups = {found.class_index for found in objects}
            pairs = {(found.class_index, label) for found, label in zip(objects, labels, strict=True)}
            assert len(pairs) == len(groups)
        seen |= set(labels)
    assert seen == {0, 1}


def test_damaged_images_are_named(tmp_path):
    load_images(SOURCE, tmp_path)
    path = tmp_path / "shapes.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="shapes.pt: .*expected the study's images: remove the file"):
        load_images(SOURCE, tmp_path)
    path.unlink()
    load_images(SOURCE, tmp_path)
    with pytest.raises(UserError, match="contains images of another preset"):
        load_images(replace(SOURCE, objects=(3, 3)), tmp_path)


def test_pooling_weights_are_equal_one_hot_or_have_a_learned_temperature():
    torch.manual_seed(0)
    layer, tokens = EntropyClustering(8), torch.randn(2, 40, 8)
    layer.fixed_length = 4
    expected = {EqualShares: [0.25] * 4, MiddleAlone: [0, 0, 1, 0]}
    for kind, shares in expected.items():
        layer.pooling_logits = kind(4)
        assert layer.cluster(tokens).weights[1, 3].tolist() == shares
    layer.pooling_logits = temperature = LearnedTemperature()
    assert "pooling_logits.log_factor" in dict(layer.named_parameters())
    mild = layer.cluster(tokens).weights.amax(dim=-1).mean()
    temperature.log_factor.data.fill_(2.0)
    assert layer.cluster(tokens).weights.amax(dim=-1).mean() > mild
    layer.cluster(tokens).weights.amax(dim=-1).sum().backward()
    assert temperature.log_factor.grad.abs() > 0


@pytest.mark.parametrize("arm", ["scaled", "hilbert", "scaled_hilbert"])
def test_an_arm_with_clusters_of_one_token_computes_plain_attention(arm):
    torch.manual_seed(0)
    plain, ours = (build("conditional", *task_of(name).flags, *ARMS[name].flags)[0] for name in ("plain", arm))
    weights = plain.state_dict()
    for layer, attention in zip(plain.transformer.encoder.layers, ours.transformer.encoder.layers, strict=True):
        converted = replacement(layer.self_attn, "enact", {"sigma": 3.0, "scale_logits": "scaled" in arm})
        attention.self_attn.load_state_dict(converted.state_dict())
        attention.load_state_dict({k: v for k, v in layer.state_dict().items() if "self_attn" not in k}, strict=False)
    for change in ARMS[arm].changes:
        change(ours, SETTING)
    for clustering in clusterings(ours):
        clustering.fixed_length = 1
    assert weights.keys() - ours.state_dict().keys()
    src, pos = torch.randn(2, 168, 2, 64)
    mask = torch.zeros(2, 168, dtype=torch.bool)
    with torch.no_grad():
        expected, got = (m.transformer.encoder(src, mask, pos, (12, 14)) for m in (plain, ours))
    assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_weighing_by_size_counts_a_cluster_once_per_token():
    torch.manual_seed(0)
    layer = EnactSelfAttention(8, 2, clusters="regions", batch_first=True)
    layer.weigh_by_size = True
    query, key = torch.randn(1, 5, 8), torch.randn(1, 60, 8)
    clusters = layer.cluster(key)
    sizes = clusters.sizes()[0]
    assert sizes.sum() == 60 and len(set(sizes.tolist())) > 1
    pooled = clusters.pool(key)[0].repeat_interleave(sizes, dim=0).unsqueeze(0)  # (1, 60, 8)
    q, k, v = (
        linear(x).unflatten(-1, (2, 4)).transpose(1, 2)
        for linear, x in ((layer.W_q, query), (layer.W_k, pooled), (layer.W_v, pooled))
    )
    expected = layer.W_o(F.scaled_dot_product_attention(q, k, v / 4, scale=1.0).transpose(1, 2).flatten(2))
    assert_close(layer(query, key, key)[0], expected)


@pytest.mark.parametrize(
    "arm, attribute, value", [("regions_by_size", "weigh_by_size", True), ("untrained_single", "fixed_length", 12 * 14)]
)
def test_arms_without_a_flag_change_the_built_model(arm, attribute, value):
    model = build("conditional", *SMALL_MODEL["conditional"])[0]
    for change in ARMS[arm].changes:
        change(model, SETTING)
    assert [getattr(clustering, attribute) for clustering in clusterings(model)] == [value]


def test_all_arms_start_from_the_same_weights_and_see_the_same_images(tmp_path):
    results = Results(tmp_path)
    tasks = [task_of(name, start_images=0) for name in ("plain", "windows", "hilbert")]
    models = [prepared_model(task, load_images(SOURCE, tmp_path)[TRAIN], (12, 14), results)[0] for task in tasks]
    names = [name for name in models[0].state_dict() if "encoder" not in name]
    assert len(names) > 50
    for model in models[1:]:
        assert all(model.state_dict()[name].equal(models[0].state_dict()[name]) for name in names)
    inner = models[2].transformer.encoder.layers[0].self_attn
    assert inner.W_q.weight.equal(models[1].transformer.encoder.layers[0].self_attn.W_q.weight)
    first, again, other = (
        [next(order).tolist() for _ in range(4)] for order in map(order_of, [6] * 3, [3] * 3, [1, 1, 2])
    )
    assert first == again != other
    assert sorted(first[0] + first[1]) == sorted(first[2] + first[3]) == list(range(6))


@pytest.fixture(scope="module", params=["conditional", "anchor"])
def started(request, tmp_path_factory):
    """(variant, results folder with the weights of a training without attention, model with these weights)."""
    results, task = Results(tmp_path_factory.mktemp("started")), task_of("windows", request.param)
    model, *_ = prepared_model(start_of(task), load_images(SOURCE, results.folder)[TRAIN], (12, 14), results)
    path = results.weights(start_of(task))
    path.parent.mkdir(parents=True)
    torch.save(model.state_dict(), path)
    return request.param, results, model.eval()


def test_an_arm_starts_from_the_training_without_attention(started):
    variant, results, model = started
    weights = initial_weights(task_of("windows", variant), 3, results)
    assert all(weights[name].equal(tensor) for name, tensor in model.state_dict().items())
    attentions = {name for name in weights if "self_attn" in name and "decoder" not in name}
    assert attentions and not attentions & set(model.state_dict())


@pytest.mark.parametrize("arm", ["plain", "none", "windows", "regions"])
def test_all_arms_start_as_the_same_function_and_train_only_their_encoder(started, arm):
    variant, results, model = started
    images = load_images(SOURCE, results.folder)[TRAIN]
    task = task_of(arm, variant, encoder_alone=True)
    ours, criterion, *_ = prepared_model(task, images, (12, 14), results)
    samples, targets = images.batch(torch.arange(2))
    with torch.no_grad():
        expected, got = (m.eval()(samples) for m in (model, ours))
    assert_close(got["pred_boxes"], expected["pred_boxes"], atol=1e-5, rtol=0)

    set_training(ours, task)
    criterion.total(criterion(ours(samples), targets)).backward()
    inside = {id(parameter) for parameter in encoder_layers(ours).parameters()}
    trained = {id(parameter) for parameter in ours.parameters() if parameter.grad is not None}
    assert trained and trained <= inside
    assert {id(parameter) for parameter in ours.parameters() if parameter.requires_grad} == inside
    norms = [module for module in ours.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and ours.training and not any(norm.training for norm in norms)


@pytest.mark.parametrize("arm, learned", [("scaled_hilbert_random", False), ("scaled_hilbert_temperature", True)])
def test_scores_can_stay_random(tmp_path, arm, learned):
    images = load_images(SOURCE, tmp_path)[TRAIN]
    task = task_of(arm, start_images=0, encoder_alone=True)
    model, criterion, *_ = prepared_model(task, images, (12, 14), Results(tmp_path))
    samples, targets = images.batch(torch.arange(2))
    criterion.total(criterion(model(samples), targets)).backward()
    layer = model.transformer.encoder.layers[0].self_attn
    assert layer.W_v.weight.grad is not None
    assert (layer.W_prob.weight.grad is not None) == learned


def test_information_that_marks_objects_correlates_with_them(images):
    data = images[TRAIN]

    class Marks(nn.Module):
        """A detector whose information is higher on cells with objects."""

        def __init__(self):
            super().__init__()
            self.clustering = EntropyClustering(1)
            self.transformer = nn.Identity()

        def forward(self, samples):
            cells, _ = data.on_object(torch.arange(len(samples.tensors)), (12, 14))
            clusters = EntropyClustering(1).cluster(torch.zeros(6, 168, 1))
            for hook in self.clustering._cluster_hooks.values():
                hook(cells.flatten(1).float() + 1, clusters)

    found = look(Marks(), data, (12, 14), "none")
    assert found["correlation"] == pytest.approx([1.0])
    assert found["inequality"] == pytest.approx([1.0], abs=1e-3)


@pytest.mark.parametrize("variant", ["conditional", "anchor"])
def test_the_arms_of_the_main_figure_attend_to_as_many_keys_as_they_say(tmp_path, variant):
    images = load_images(SOURCE, tmp_path)[TRAIN]
    samples, _ = images.batch(torch.arange(2))
    trial = next(trial for trial in PRESETS["cpu"].trials if trial.variant == variant)
    arms = [ARMS[name] for name in trial.arms if ARMS[name].clusters == 48 or ARMS[name].family == "linear"]
    assert len({arm.family for arm in arms}) == len(arms) >= (15 if variant == "conditional" else 3)
    for arm in arms:
        model, *_ = prepared_model(task_of(arm.name, variant, start_images=0), images, (12, 14), Results(tmp_path))
        trace = ClusterTrace(model)
        rivals = [module for module in model.modules() if isinstance(module, RivalSelfAttention)]
        with torch.no_grad():
            assert model(samples)["pred_boxes"].isfinite().all()
        counts = [row["clusters"][0] for row in trace.as_json()]
        if rivals:
            assert arm.family == "linear" or {rival.budget(168) for rival in rivals} == {48}
        elif arm.family.startswith(("equal", "rows_equal")):
            assert counts == [48]
        else:
            assert 0 < counts[0] <= 48


def test_borders_that_cut_tokens_give_clusters_of_exactly_equal_information():
    layer = EntropyClustering(4, 1.0, clusters="equal", max_clusters=5)
    tokens = torch.randn(2, 30, 4)
    mask = torch.zeros(2, 30, dtype=torch.bool)
    mask[1, 20:] = True
    hooked = []
    layer.register_cluster_hook(lambda information, clusters: hooked.append(information))
    clusters = share_border_tokens(layer, layer.score(tokens), mask)
    (information,) = hooked
    # A cluster's weights are the parts of its fifth of the information.
    assert_close(clusters.weights.sum(dim=1), 5 * information / information.sum(dim=1, keepdim=True))
    assert_close(clusters.weights.sum(dim=2), torch.ones(2, 5))
    assert (clusters.weights[1, :, 20:] == 0).all() and ((clusters.weights > 0).sum(dim=1) <= 2).all()
    clusters.pool(tokens).square().sum().backward()
    assert layer.W_prob.weight.grad.abs().sum() > 0


def test_a_training_that_runs_out_of_time_continues_to_the_same_result(tmp_path, monkeypatch):
    task = task_of("equal_12", start_images=0, images=16)
    whole, parts = Results(tmp_path / "whole"), Results(tmp_path / "parts")
    expected = train(task, whole)
    pauses = 0
    clock = itertools.count()  # a second passes between two readings
    monkeypatch.setattr(time, "perf_counter", clock.__next__)
    while (result := train(task, parts, until=next(clock) + 3)) is None:
        assert parts.paused(task).is_file() and parts.read(task) is None
        pauses += 1
    assert pauses == 1 and not parts.paused(task).exists()
    assert {key: result[key] for key in ("loss", "figures", "clusters", "steps")} == {
        key: expected[key] for key in ("loss", "figures", "clusters", "steps")
    }


def test_every_arm_is_known_and_comes_after_the_trainings_it_needs():
    for preset in PRESETS.values():
        tasks = tasks_of(preset)
        assert len({task.name for task in tasks}) == len(tasks)
        names = [task.name for task in tasks]
        for trial in preset.trials:
            assert trial.arms[0] == "plain"
            assert {"windows", "regions", "per_image", "uniform", "strided", "converted"} <= set(trial.arms)
        for task in tasks:
            before = [name for name in needed(task) if "-start-" not in name]
            assert all(names.index(name) < names.index(task.name) for name in before)
        assert len({trial.variant for trial in preset.trials}) >= 2
    assert len(ARMS) == len(LIST)


def test_classes_are_judged_for_the_query_that_covers_an_object_best():
    boxes = torch.tensor([[0.25, 0.5, 0.5, 1.0], [0.3, 0.5, 0.5, 1.0], [0.8, 0.8, 0.2, 0.2]])
    targets = [{"boxes": boxes[[0, 2]], "labels": torch.tensor([0, 1])}, {"boxes": boxes[:0], "labels": boxes[:0, 0]}]
    # Query 1 overlaps the first object less than query 0 does. Query 2 has an IoU of 0.4 with the second object.
    predicted = torch.stack((boxes, boxes))
    predicted[:, 2, 2] = 0.08
    logits = torch.tensor([[2.0, 1.0, 9.0], [0.0, 1.0, 9.0], [0.0, 1.0, 9.0]]).expand(2, -1, -1)
    outputs = {"pred_logits": logits, "pred_boxes": predicted}
    assert right_classes(outputs, targets, 2) == [True]
    predicted[:, 2, 2] = 0.12
    assert right_classes(outputs, targets, 2) == [True, True]
    targets[0]["labels"] = torch.tensor([1, 1])
    assert right_classes(outputs, targets, 2) == [False, True]


POOL = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from enact_common.utils.signals import end_with_parent

if __name__ == "__main__":
    with ProcessPoolExecutor(1, get_context("spawn"), end_with_parent) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(600)
"""


def test_a_killed_study_leaves_no_process(tmp_path):
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as study:
        worker = int(study.stdout.readline())
        study.kill()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the pool's process is still running")


def test_differences_compare_the_same_seeds():
    ours, theirs = (
        {seed: {"figures": {"AP": v}} for seed, v in runs.items()}
        for runs in ({0: 0.3, 1: 0.2, 2: 0.9}, {0: 0.2, 1: 0.4})
    )
    mean, error = difference(ours, theirs)
    # +10 and -20 points: mean -5, standard error 21.2 / sqrt(2) = 15.
    assert (mean, error) == pytest.approx((-5, 15))
    assert difference_text((mean, error)) == "-5.0 ± 15.0"
    assert difference(ours, {7: {}}) is None and difference_text(None) == "-"
    assert (
        mean_and_spread([0.1, 0.2, -1]) == "15.0 ± 7.1"
        and mean_and_spread([0.25]) == "25.0"
        and mean_and_spread([-1]) == "-"
    )


def test_wrong_flags_and_damaged_results_are_refused(tmp_path, capsys):
    argv = ["--preset", "cpu", "--output_dir", str(tmp_path)]
    assert command.main([*argv, "--variants", "detr"]) == 2
    assert "this preset has none of these; choose from conditional, anchor" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main([*argv, "--arms", "plain", "equal_zero_47"])
    assert "no arm 'equal_zero_47'; nearest: equal_zero_48" in capsys.readouterr().err
    results, task = Results(tmp_path), task_of("plain")
    results.write(task, {})
    assert results.read(task)["settings"] == task.settings
    results.path(task).write_text("{")
    with pytest.raises(UserError, match="plain-0.json: not the result of a training .* remove the file"):
        results.read(task)


def test_without_time_nothing_is_trained_or_measured(tmp_path, capsys, monkeypatch):
    # Each reading of the clock is hours after the last one.
    monkeypatch.setattr(command.time, "perf_counter", itertools.count(0, 10_000).__next__)
    argv = ["--preset", "cpu", "--output_dir", str(tmp_path), "--fraction", "0.002", "--variants", "conditional"]
    argv += ["--problems", "context"]
    assert command.main([*argv, "--arms", "plain", "--seeds", "1"]) == 0
    assert "out of time: 2 trainings are left" in capsys.readouterr().out
    assert not (tmp_path / "costs.json").exists() and "No results yet" in (tmp_path / "accuracy.md").read_text()


@pytest.mark.slow
def test_a_small_study_runs_resumes_and_writes_its_page(tmp_path, capsys, monkeypatch):
    # Fork this process, since new ones take seconds to import PyTorch.
    monkeypatch.setattr(schedule, "get_context", lambda method: FORKS)
    monkeypatch.setattr(command, "run_isolated", attempt)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # two threads on a busy machine only wait
    preset, drawn = PRESETS["cpu"], in_context(SOURCE)
    monkeypatch.setitem(PRESETS, "cpu", replace(preset, trials=(replace(preset.trials[0], **drawn),)))
    argv = ["--preset", "cpu", "--output_dir", str(tmp_path), "--fraction", "0.0005", "--seeds", "1", "--jobs", "2"]
    argv += ["--variants", "conditional", "--problems", "context"]
    argv += ["--arms", "uniform", "plain", "converted", "equal_12", "linear"]
    assert command.main(argv) == 0
    files = {path.name: path for path in (tmp_path / "results").iterdir()}
    assert {name.split("-")[2] for name in files} == {
        "start", "plain", "windows", "uniform", "converted", "equal_12", "linear"
    }  # fmt: skip
    result = json.loads(files["context-conditional-windows-0.json"].read_text())
    assert result["settings"]["arm"]["name"] == "windows" and len(result["mean_lengths"]) == 1
    assert len(result["clusters"][0]["clusters"]) == 1 and -1 <= result["after"]["correlation"][0] <= 1
    uniform = json.loads(files["context-conditional-uniform-0.json"].read_text())
    tokens = math.prod(uniform["map_size"])
    assert uniform["clusters"][0]["clusters"] == [tokens // length for length in result["mean_lengths"]]
    assert uniform["after"]["inequality"] == pytest.approx([1])
    page = (tmp_path / "accuracy.md").read_text()
    for name in ("plain", "windows", "uniform", "converted", "equal", "linear"):
        assert f"| `{name}` |" in page
    measured = json.loads((tmp_path / "costs.json").read_text())
    assert set(measured["encoders"]["conditional"]) == {"plain", "windows", "uniform"}
    assert measured["steps"]["context-conditional-plain"]["seconds"] > 0
    assert set(measured["points"]["conditional"]) == {"plain", "equal_12", "linear"}
    assert (tmp_path / "differences.png").is_file() and (tmp_path / "by_clusters.png").is_file()

    before = {name: path.stat().st_mtime_ns for name, path in files.items()}
    assert command.main([*argv, "--skip_costs"]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "results").iterdir()} == before
    assert command.main([*argv, "--variants", "detr"]) == 2
    assert "this preset has none of these" in capsys.readouterr().err
