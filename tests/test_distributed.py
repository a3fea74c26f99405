"""Several processes on gloo: equal metrics, equal batches, and a failure in one ends all."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from conftest import free_port, read_log, start, train
from test_stopping import end
from test_train import PackingToyModel, toy_batch, toy_step
from torch import nn

from enact_common.data import loading
from enact_common.data.loading import EvaluationBatches, TrainSampler
from enact_common.data.synthetic import make_shapes
from enact_common.evaluation.coco import EVALUATION, METRICS
from enact_common.nested_tensor import nested_tensor_from_tensor_list
from enact_common.training import engine, setup
from enact_common.training.engine import GRADIENTS, NonFiniteLossError, first_non_finite_output, keep_frozen_norms
from enact_common.utils.acceleration import BATCH_NORMS


@pytest.fixture
def as_process(monkeypatch):
    """Make this process act as one of several ranks in the data loading."""

    def become(rank: int, processes: int) -> None:
        monkeypatch.setattr(loading, "get_rank", lambda: rank)
        monkeypatch.setattr(loading, "get_world_size", lambda: processes)

    return become


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("size, batch_size", [(7, 2), (6, 3), (1, 4), (13, 1)])
def test_evaluation_batches_are_dealt_out_to_the_processes(as_process, processes, size, batch_size):
    dealt = []
    for rank in range(processes):
        as_process(rank, processes)
        own = EvaluationBatches(size, batch_size)
        assert len(list(own)) == len(own)
        dealt += list(own)
    as_process(0, 1)
    assert sorted(dealt) == list(EvaluationBatches(size, batch_size))
    assert sorted(i for batch in dealt for i in batch) == list(range(size))


@pytest.mark.parametrize("processes", [2, 3])
def test_training_batches_hold_the_same_images_for_any_number_of_processes(as_process, processes):
    def batches(count: int, first: int = 0) -> list[set[int]]:
        samples = []
        for rank in range(count):
            as_process(rank, count)
            sampler = TrainSampler(range(24), seed=5)
            sampler.set_epoch(3)
            sampler.first = first * 6 // count
            samples.append(list(sampler))
            assert len(sampler) == 24 // count  # counts skipped samples too
        each = 6 // count
        return [{i for own in samples for i in own[begin : begin + each]} for begin in range(0, len(samples[0]), each)]

    assert batches(processes) == batches(1)
    assert batches(processes, first=2) == batches(1)[2:]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Seven images and a model that has partly memorised them, so that its AP is above 0."""
    root = tmp_path_factory.mktemp("learned")
    data = make_shapes(root / "data", train=7, val=1, size=(64, 80), seed=3)
    argv = ["--epochs", "60", "--no_augmentation", "--eval_set", "train", "--eval_every", "99", "--dropout", "0"]
    argv += ["--batch_size", "7", "--lr", "2e-3", "--num_queries", "20"]
    assert train("detr", data, root / "out", *argv) == 0
    return data, root / "out" / "checkpoint.pth"


def test_metrics_do_not_depend_on_the_number_of_processes(learned, tmp_path):
    data, checkpoint = learned
    # A fixed batch size, because ENACT's windows depend on the other images of the batch: four batches for three
    # processes, and one batch for two.
    argv = ["--num_queries", "20", "--resume", checkpoint, "--eval", "--eval_set", "train"]
    for batch_size, numbers in (("2", (1, 3)), ("7", (1, 2))):
        outputs = {}
        for processes in numbers:
            output = tmp_path / f"{batch_size} {processes}"
            running = start(processes, "detr", data, output, *argv, "--batch_size", batch_size)
            assert end(running) == [0] * processes
            assert sum(process.said.count("Average Precision") for process in running) == 6
            record = json.loads((output / EVALUATION).read_text())
            results = json.loads((output / "results.json").read_text())
            outputs[processes] = record, results
        (alone, results), *others = outputs.values()
        assert alone["figures"]["AP"] > 0.02 and alone["images"] == 7 and len(results) == 7 * 20
        for record, theirs in others:
            assert theirs == results
            assert [record["figures"][name] for name in METRICS] == pytest.approx(
                [alone["figures"][name] for name in METRICS], abs=1e-6
            )


def test_box_losses_do_not_depend_on_the_number_of_processes(learned, tmp_path):
    data, _ = learned
    argv = ["--epochs", "1", "--dropout", "0", "--encoder_attention", "mhsa", "--backbone_norm", "frozen"]
    argv += ["--no_augmentation", "--limit_train", "6", "--eval_set", "train"]
    logs = {}
    for processes, batch_size in ((1, "6"), (2, "3"), (3, "2")):
        output = tmp_path / str(processes)
        running = start(processes, "detr", data, output, *argv, "--batch_size", batch_size)
        assert end(running) == [0] * processes
        (logs[processes],) = read_log(output)
    # DETR's class loss is a weighted mean over each process's queries, as in the original, so it is not compared.
    names = [name for name in logs[1] if name.startswith(("train_loss_bbox", "train_loss_giou"))]
    assert len(names) == 8
    for processes in (2, 3):
        for name in names:
            assert logs[processes][name] == pytest.approx(logs[1][name], rel=1e-5), name


def test_an_error_in_one_process_before_training_ends_all(shapes, tmp_path):
    # Rank 1 has an empty data folder.
    running = start(2, "detr", shapes, tmp_path / "out", "--epochs", "1", of_rank={1: ["--coco_path", tmp_path]})
    assert end(running) == [2, 2]
    errors = [process.complained for process in running]
    assert errors[0].count(f"error: --coco_path {tmp_path}: {tmp_path / 'train2017'} is missing") == 1
    assert errors[1] == "" and not (tmp_path / "out" / "log.txt").exists()


def test_an_error_in_one_process_during_a_step_ends_all(shapes, tmp_path):
    argv = ["--epochs", "9", "--limit_val", "1", "--strict_data", "--batch_size", "2"]
    blocked = sorted((shapes / "train2017").iterdir())[5]
    data = tmp_path / "data"
    (data / "train2017").mkdir(parents=True)
    for folder in ("annotations", "val2017"):
        (data / folder).symlink_to(shapes / folder)
    for path in (shapes / "train2017").iterdir():
        (data / "train2017" / path.name).symlink_to(path)
    bad = data / "train2017" / blocked.name
    bad.unlink()
    bad.write_bytes(b"no image")
    running = start(2, "detr", data, tmp_path / "out", *argv)
    assert sorted(end(running)) == [1, 2]
    for process in running:
        assert "Traceback" not in process.complained
        if process.returncode == 2:
            assert f"error: {bad}: not an image" in process.complained
        else:
            assert "stopped: another process has ended" in process.complained


def test_a_killed_process_ends_all(shapes, tmp_path):
    running = start(2, "detr", shapes, tmp_path, "--epochs", "99", "--limit_val", "1", "--print_freq", "1")
    for line in running[0].stdout:
        if line.startswith("epoch 0"):
            break
    running[1].kill()
    assert end(running) == [1, -9]
    assert "stopped: another process has ended" in running[0].complained


def non_finite_loss_in_rank_1(rank: int, folder: str, port: int) -> None:
    """Run two steps of the toy model; the second is not finite in rank 1 only. Write the outcome to a file."""
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    step = toy_step(lambda output: output**2)
    step(*toy_batch(1.0), "step 0")
    text = "nothing"
    try:
        step(*toy_batch(math.inf if rank else 1.0), "step 1")
        step.check()
    except NonFiniteLossError as error:
        text = str(error)
    Path(folder, str(rank)).write_text(text)
    torch.distributed.destroy_process_group()


def test_a_non_finite_loss_in_one_process_stops_all(tmp_path):
    mp.start_processes(non_finite_loss_in_rank_1, (str(tmp_path), free_port()), nprocs=2, start_method="forkserver")
    texts = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    # Both report the fault found in rank 1.
    assert texts[0] == texts[1] and "at step 1" in texts[0]
    assert "first tensor at fault: input images" in texts[0] and GRADIENTS not in texts[0]


def too_many_windows_in_rank_1(rank: int, folder: str, port: int) -> None:
    """Run three steps of the toy model; at the second, packed windows do not fit in rank 1. Write calls and result."""
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    engine.packs_windows = lambda model: True
    step = toy_step(lambda output: output**2, 0.0, torch.optim.SGD, toy=PackingToyModel)
    toy, step.model = step.model, setup.wrap_model(step.model, step.device)
    for value in (1.0, 1.0 - rank, 1.0):
        step(*toy_batch(value))
    step.check()
    Path(folder, str(rank)).write_text(f"{toy.calls} {toy.number.item()}")
    torch.distributed.destroy_process_group()


def test_all_processes_repeat_a_batch_whose_packed_windows_do_not_fit_in_one(tmp_path):
    mp.start_processes(too_many_windows_in_rank_1, (str(tmp_path), free_port()), nprocs=2, start_method="forkserver")
    results = [(tmp_path / str(rank)).read_text().split() for rank in range(2)]
    assert results[0] == results[1] and results[0][0] == "4"
    # Gradients of the two processes are averaged, here those of two batches.
    step = toy_step(lambda output: output**2, 0.0, torch.optim.SGD, toy=PackingToyModel)
    for values in ((1.0, 1.0), (1.0, 0.0), (1.0, 1.0)):
        for place, value in enumerate(values):
            step(*toy_batch(value), group=2, complete=place == 1)
    assert float(results[0][1]) == pytest.approx(step.model.number.item())


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--sync_bn"], "--sync_bn: PyTorch synchronises batch norm only on GPUs"),
        (["--sync_bn", "--backbone_norm", "frozen"], "--sync_bn has no effect with --backbone_norm frozen"),
    ],
    ids=" ".join,
)
def test_sync_bn_is_refused_on_a_cpu_or_with_frozen_norms(shapes, tmp_path, capsys, argv, message):
    assert train("detr", shapes, tmp_path, *argv) == 2
    assert message in capsys.readouterr().err


def test_sync_bn_keeps_the_state_dict_names_and_can_be_frozen():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    names = list(model.state_dict())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert list(converted.state_dict()) == names and isinstance(converted[1], BATCH_NORMS)
    converted.train()
    keep_frozen_norms(converted)
    assert converted[1].training
    converted[1].requires_grad_(False)
    keep_frozen_norms(converted)
    assert not converted[1].training


def test_buffers_are_not_broadcast_in_every_step(monkeypatch):
    ddp_options = {}
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda model, **options: ddp_options.update(options))
    monkeypatch.setattr(setup, "is_distributed", lambda: True)
    setup.wrap_model(nn.Linear(1, 1), torch.device("cpu"))
    assert ddp_options["broadcast_buffers"] is False


def test_the_report_of_a_non_finite_loss_does_not_synchronise_batch_norms():
    # On a CPU, a synchronised batch norm in training mode raises.
    class Model(nn.Sequential):
        def forward(self, samples):
            return super().forward(samples.tensors)

    model = nn.SyncBatchNorm.convert_sync_batchnorm(Model(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())).train()
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    tensor = first_non_finite_output(model, nested_tensor_from_tensor_list([torch.zeros(3, 4, 4)]))
    assert tensor == "output of 0 (Conv2d)" and model[1].training
