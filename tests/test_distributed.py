"""Several processes on gloo: the same figures, the same batches, and all fail where one does."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from conftest import free_port, read_log, start, train
from test_stopping import end
from test_train import toy_batch, toy_step
from torch import nn

from enact_common.data import loading
from enact_common.data.loading import EvaluationBatches, TrainSampler
from enact_common.data.synthetic import make_shapes
from enact_common.evaluation.coco import EVALUATION, METRICS
from enact_common.nested_tensor import nested_tensor_from_tensor_list
from enact_common.training import setup
from enact_common.training.engine import GRADIENTS, NonFiniteLossError, first_non_finite_output, keep_frozen_norms
from enact_common.utils.acceleration import BATCH_NORMS


@pytest.fixture
def as_process(monkeypatch):
    """Let this process take itself for one of several."""

    def become(rank: int, processes: int) -> None:
        monkeypatch.setattr(loading, "get_rank", lambda: rank)
        monkeypatch.setattr(loading, "get_world_size", lambda: processes)

    return become


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("size, batch_size", [(7, 2), (6, 3), (1, 4), (13, 1)])
def test_evaluation_deals_out_the_batches_of_one_process(as_process, processes, size, batch_size):
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
        shares = []
        for rank in range(count):
            as_process(rank, count)
            sampler = TrainSampler(range(24), seed=5)
            sampler.set_epoch(3)
            sampler.first = first * 6 // count
            shares.append(list(sampler))
            assert len(sampler) == 24 // count  # of the whole share, whatever of it is left
        each = 6 // count
        return [
            {i for share in shares for i in share[begin : begin + each]} for begin in range(0, len(shares[0]), each)
        ]

    assert batches(processes) == batches(1)
    assert batches(processes, first=2) == batches(1)[2:]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Seven images, and a model that has begun to learn them by heart, so that there is something to compare."""
    root = tmp_path_factory.mktemp("learned")
    data = make_shapes(root / "data", train=7, val=1, size=(64, 80), seed=3)
    argv = ["--epochs", "60", "--no_augmentation", "--eval_set", "train", "--eval_every", "99", "--dropout", "0"]
    argv += ["--batch_size", "7", "--lr", "2e-3", "--num_queries", "20"]
    assert train("detr", data, root / "out", *argv) == 0
    return data, root / "out" / "checkpoint.pth"


@pytest.mark.xdist_group("learned")
def test_the_figures_do_not_depend_on_the_number_of_processes(learned, tmp_path):
    data, checkpoint = learned
    # Batches of two, since ENACT's windows depend on an image's batch mates; four batches for up to three processes,
    # and one for two of them.
    argv = ["--num_queries", "20", "--resume", checkpoint, "--eval", "--eval_set", "train"]
    for batch_size, numbers in (("2", (1, 2, 3)), ("7", (1, 2))):
        found = {}
        for processes in numbers:
            output = tmp_path / f"{batch_size} {processes}"
            running = start(processes, "detr", data, output, *argv, "--batch_size", batch_size)
            assert end(running) == [0] * processes
            assert sum(process.said.count("Average Precision") for process in running) == 6
            record = json.loads((output / EVALUATION).read_text())
            results = json.loads((output / "results.json").read_text())
            found[processes] = record, results
        (alone, results), *others = found.values()
        assert alone["figures"]["AP"] > 0.02 and alone["images"] == 7 and len(results) == 7 * 20
        for record, theirs in others:
            assert theirs == results
            assert [record["figures"][name] for name in METRICS] == pytest.approx(
                [alone["figures"][name] for name in METRICS], abs=1e-6
            )


@pytest.mark.xdist_group("learned")
def test_the_losses_of_a_step_do_not_depend_on_it_either(learned, tmp_path):
    data, _ = learned
    argv = ["--epochs", "1", "--dropout", "0", "--encoder_attention", "mhsa", "--backbone_norm", "frozen"]
    argv += ["--no_augmentation", "--limit_train", "6", "--eval_set", "train"]
    logs = {}
    for processes, batch_size in ((1, "6"), (2, "3"), (3, "2")):
        output = tmp_path / str(processes)
        running = start(processes, "detr", data, output, *argv, "--batch_size", batch_size)
        assert end(running) == [0] * processes
        (logs[processes],) = read_log(output)
    # DETR's class loss is a mean over a process's own queries, weighted by their classes: that of the original.
    names = [name for name in logs[1] if name.startswith(("train_loss_bbox", "train_loss_giou"))]
    assert len(names) == 8
    for processes in (2, 3):
        for name in names:
            assert logs[processes][name] == pytest.approx(logs[1][name], rel=1e-5), name


def test_all_fail_where_one_finds_something_wrong_before_it_starts(shapes, tmp_path):
    # One machine lacks the data: its folder is of the same name, and empty.
    running = start(2, "detr", shapes, tmp_path / "out", "--epochs", "1", of_rank={1: ["--coco_path", tmp_path]})
    assert end(running) == [2, 2]
    said = [process.complained for process in running]
    assert said[0].count(f"error: --coco_path {tmp_path}: {tmp_path / 'train2017'} is missing") == 1
    assert said[1] == "" and not (tmp_path / "out" / "log.txt").exists()


def test_all_fail_where_one_fails_in_the_middle_of_a_step(shapes, tmp_path):
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


def test_all_end_where_one_is_killed(shapes, tmp_path):
    running = start(2, "detr", shapes, tmp_path, "--epochs", "99", "--limit_val", "1", "--print_freq", "1")
    for line in running[0].stdout:
        if line.startswith("epoch 0"):
            break
    running[1].kill()
    assert end(running) == [1, -9]
    assert "stopped: another process has ended" in running[0].complained


def fault_in_one(rank: int, folder: str, port: int) -> None:
    """Two steps of the toy model, of which the second is not finite in process 1 alone; the outcome goes to a file."""
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


def test_a_loss_that_is_not_finite_in_one_process_stops_all(tmp_path):
    mp.start_processes(fault_in_one, (str(tmp_path), free_port()), nprocs=2, start_method="forkserver")
    texts = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    # Both tell what the process at fault has found.
    assert texts[0] == texts[1] and "at step 1" in texts[0]
    assert "first tensor at fault: input images" in texts[0] and GRADIENTS not in texts[0]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--sync_bn"], "--sync_bn: PyTorch synchronises batch norm only on GPUs"),
        (["--sync_bn", "--backbone_norm", "frozen"], "--sync_bn has no effect with --backbone_norm frozen"),
    ],
    ids=" ".join,
)
def test_synchronised_batch_norm_is_refused_where_there_is_none(shapes, tmp_path, capsys, argv, message):
    assert train("detr", shapes, tmp_path, *argv) == 2
    assert message in capsys.readouterr().err


def test_synchronised_batch_norm_keeps_the_weights_names_and_is_frozen_alike():
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


def test_buffers_are_not_sent_in_every_step(monkeypatch):
    asked = {}
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda model, **options: asked.update(options))
    monkeypatch.setattr(setup, "is_distributed", lambda: True)
    setup.wrap_model(nn.Linear(1, 1), torch.device("cpu"))
    assert asked["broadcast_buffers"] is False


def test_a_report_does_not_wait_in_synchronised_batch_norms():
    # On CPUs, one that trains refuses to run at all.
    class Model(nn.Sequential):
        def forward(self, samples):
            return super().forward(samples.tensors)

    model = nn.SyncBatchNorm.convert_sync_batchnorm(Model(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())).train()
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    found = first_non_finite_output(model, nested_tensor_from_tensor_list([torch.zeros(3, 4, 4)]))
    assert found == "output of 0 (Conv2d)" and model[1].training
