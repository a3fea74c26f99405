"""The long loops behind docs/dev/reliability.md: dozens of kills, thousands of damaged files, seeds, ranks.

    make soak

runs all of them in about half an hour on two cores and records the results in soak.json and soak.md in
docs/dev/reliability/. The test suite runs the same functions with smaller numbers.
"""

import argparse
import io
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import torch
from conftest import equal_states, read_log, start, train
from PIL import Image

from enact_common.benchmark.report import environment
from enact_common.checkpoints.files import load_checkpoint
from enact_common.data.annotations import load_annotations
from enact_common.data.images import decode_image
from enact_common.data.synthetic import make_shapes
from enact_common.evaluation.coco import EVALUATION, METRICS
from enact_common.utils.errors import UserError

RECORD = Path(__file__).resolve().parents[1] / "docs" / "dev" / "reliability" / "soak.json"

# Dropout, EMA weights, two data loader workers: state that a checkpoint must restore. A checkpoint at every step.
KILLED = "--batch_size 2 --dropout 0.1 --ema 0.9 --num_workers 2 --limit_val 2 --eval_every 5 --save_every_steps 1"


def kills(folder: Path, count: int, processes: int, seed: int = 0) -> dict:
    """Kill a training at random moments, resume it each time, and compare its end with an uninterrupted training.

    Args:
        folder: for the runs.
        count: number of kills.
        processes: number of ranks.
        seed: of the random moments.

    Returns:
        `kills`, the number of kills; `during_saves`, how many of them hit a save; `identical`, whether the resumed
        training ended like the uninterrupted one. The checkpoint is read after every kill.
    """
    data = make_shapes(folder / "data", train=12, val=2, size=(64, 80), seed=3)
    # One epoch per kill: 12 images are 6 steps with one process, 3 with two.
    argv = [*KILLED.split(), "--epochs", str(count), "--auto_resume"]
    whole, ours = folder / "whole", folder / "killed"
    wait(start(processes, "detr", data, whole, *argv))

    moments, killed, during_saves = random.Random(seed), 0, 0
    latest, partial = ours / "checkpoint.pth", ours / "checkpoint.pth.partial"
    for number in range(count):
        before = latest.stat().st_mtime_ns if latest.exists() else 0
        running = start(processes, "detr", data, ours, *argv)
        for process in running:
            # Nobody reads the pipes, and a full pipe would block the process.
            process.stdout.close()
            process.stderr.close()
        # Each run completes at least one step and is killed in a later one, every third run in a save.
        while running[0].poll() is None and not (latest.exists() and latest.stat().st_mtime_ns > before):
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.3))
        while number % 3 == 0 and running[0].poll() is None and not partial.exists():
            time.sleep(0.0005)
        time.sleep(moments.uniform(0, 0.02))
        for process in running:
            process.kill()
        killed += {process.wait() for process in running} == {-signal.SIGKILL}
        during_saves += partial.exists()
        load_checkpoint(str(latest))  # raises if incomplete
    wait(start(processes, "detr", data, ours, *argv))
    first, second = (load_checkpoint(str(path / "checkpoint.pth")) for path in (ours, whole))
    identical = read_log(ours) == read_log(whole) and all(
        equal_states(first[key], second[key]) for key in ("model", "model_ema", "optimizer", "random_states")
    )
    return {"kills": killed, "during_saves": during_saves, "identical": identical}


def wait(running: list) -> None:
    """Wait for the processes; raise if one fails."""
    for process in running:
        _, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(f"a training ended with status {process.returncode}: {errors}")


def outcome(path: Path, read: Callable[[Path], object]) -> str:
    """Read a file: "read", or "refused" if a UserError names the file. Other errors propagate."""
    try:
        read(path)
    except UserError as error:
        if str(path) not in str(error):
            raise AssertionError(f"the message does not name the file: {error}") from error
        return "refused"
    return "read"


def read_image(path: Path) -> None:
    """Read an image and check the pixels' dtype and shape."""
    with silence(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged metadata
        image = decode_image(path)
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise AssertionError(f"{path}: gave {image.dtype} {tuple(image.shape)}")


def damaged_images(folder: Path, count: int, seed: int = 0) -> dict:
    """Read randomly damaged images of several formats: each must give pixels or a UserError that names the file.

    Args:
        folder: for the files.
        count: number of damaged files.
        seed: of the damage.

    Returns:
        the number of files per outcome.
    """
    drawn, outcomes = np.random.default_rng(seed), Counter()
    pixels = cv2.resize(drawn.integers(0, 256, (8, 10, 3), dtype=np.uint8), (80, 64))
    originals = []
    for form, more in (("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("GIF", {}), ("TIFF", {}),
                       ("TIFF", {"compression": "tiff_lzw"}), ("BMP", {}), ("WEBP", {}), ("PPM", {})):  # fmt: skip
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, form, **more)
        originals.append((form, np.frombuffer(buffer.getvalue(), dtype=np.uint8)))
    for number in range(count):
        form, content = originals[number % len(originals)]
        path = folder / f"damaged.{form.lower()}"
        path.write_bytes(damage(content, drawn).tobytes())
        outcomes[outcome(path, read_image)] += 1
    return dict(outcomes)


@contextmanager
def silence() -> Iterator[None]:
    """Discard stderr, also of C libraries, which print several lines per damaged image."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def damage(content: np.ndarray, drawn: np.random.Generator) -> np.ndarray:
    """Damage bytes in one of five ways: truncate, change some, zero a part, drop a part, repeat a part."""
    content, size = content.copy(), len(content)
    begin, end = sorted(drawn.integers(0, size + 1, 2).tolist())
    match int(drawn.integers(5)):
        case 0:
            return content[:begin]
        case 1:
            places = drawn.integers(0, size, int(drawn.integers(1, 20)))
            content[places] = drawn.integers(0, 256, len(places), dtype=np.uint8)
            return content
        case 2:
            content[begin:end] = 0
            return content
        case 3:
            return np.concatenate((content[:begin], content[end:]))
        case _:
            return np.concatenate((content[:end], content[begin:]))


def damaged_annotations(folder: Path, count: int, seed: int = 0) -> dict:
    """Read annotation files with randomly damaged bytes or values: each is read or raises a UserError.

    Args, returns: as of `damaged_images`.
    """
    data = make_shapes(folder / "small", train=2, val=1, size=(64, 80), seed=3)
    original = (data / "annotations" / "instances_train2017.json").read_bytes()
    drawn, outcomes, path = np.random.default_rng(seed), Counter(), folder / "damaged.json"
    oddities = [None, True, -1, 0, 1e308, float("nan"), float("inf"), 2**70, "", "x", [], [1, 2], {}, {"id": 1}]
    for number in range(count):
        if number % 2:
            content = damage(np.frombuffer(original, dtype=np.uint8), drawn).tobytes()
        else:
            value = json.loads(original)
            place, key = value, drawn.choice(sorted(value))
            # Replace one value at a random depth by an odd one.
            while isinstance(place[key], list | dict) and place[key] and drawn.random() < 0.85:
                place = place[key]
                key = int(drawn.integers(len(place))) if isinstance(place, list) else drawn.choice(sorted(place))
            place[key] = oddities[drawn.integers(len(oddities))]
            content = json.dumps(value).encode()
        path.write_bytes(content)
        outcomes[outcome(path, load_annotations)] += 1
    return dict(outcomes)


def damaged_checkpoints(folder: Path, count: int, seed: int = 0) -> dict:
    """Read randomly damaged checkpoints: each is read or raises a UserError.

    Args, returns: as of `damaged_images`.
    """
    buffer = io.BytesIO()
    torch.save({"model": {"weight": torch.arange(100.0)}, "epoch": 3, "args": {"lr": 1.0}}, buffer)
    original = np.frombuffer(buffer.getvalue(), dtype=np.uint8)
    drawn, outcomes, path = np.random.default_rng(seed), Counter(), folder / "damaged.pth"
    for _ in range(count):
        path.write_bytes(damage(original, drawn).tobytes())
        outcomes[outcome(path, lambda path: load_checkpoint(str(path)))] += 1
    return dict(outcomes)


def seeds(folder: Path, count: int, epochs: int) -> dict:
    """Train on shapes for a few epochs from several seeds, in float32 and in bf16.

    Args:
        folder: for the data and the runs.
        count: number of seeds.
        epochs: epochs of 48 images in batches of 4.

    Returns:
        for each precision the last epoch's training `losses` by seed, their `mean` and standard `deviation`; and
        `difference`, the largest difference of a seed's two losses, divided by the mean in float32.
    """
    data = make_shapes(folder / "seeds", train=48, val=2, size=(64, 80), seed=3)
    result: dict = {}
    for amp, name in (("none", "float32"), ("bf16", "bf16")):
        losses = []
        for seed in range(count):
            output = folder / f"{name} {seed}"
            argv = ["--epochs", epochs, "--eval_every", epochs, "--amp", amp, "--seed", seed, "--lr", "5e-4"]
            if train("detr", data, output, *argv):
                raise RuntimeError(f"the training with seed {seed} in {name} failed")
            losses.append(read_log(output)[-1]["train_loss"])
        result[name] = {
            "losses": losses,
            "mean": statistics.mean(losses),
            "deviation": statistics.stdev(losses) if count > 1 else 0.0,
        }
    pairs = zip(result["float32"]["losses"], result["bf16"]["losses"], strict=True)
    return result | {"difference": max(abs(a - b) for a, b in pairs) / result["float32"]["mean"]}


def processes(folder: Path, numbers: Sequence[int], images: Sequence[int]) -> dict:
    """Evaluate one model with several numbers of images and of processes.

    Args:
        folder: for the data and the runs.
        numbers: numbers of processes; the others are compared with the first.
        images: numbers of images.

    Returns:
        `evaluations`, their number; `difference`, the largest of any of the twelve metrics; `identical`, whether all
        detections are equal; `AP`, the highest AP compared.
    """
    data = make_shapes(folder / "ranks", train=max(images), val=1, size=(64, 80), seed=3)
    learned = folder / "learned"
    argv = ["--epochs", "60", "--no_augmentation", "--eval_set", "train", "--eval_every", "99", "--dropout", "0"]
    assert train("detr", data, learned, *argv, "--lr", "2e-3", "--batch_size", "8") == 0
    difference, identical, best, evaluations = 0.0, True, 0.0, 0
    for size in images:
        outputs = []
        for number in numbers:
            output = folder / f"{size} in {number}"
            resume = ["--resume", learned / "checkpoint.pth", "--eval", "--eval_set", "train"]
            wait(start(number, "detr", data, output, *resume, "--limit_val", size, "--batch_size", "2"))
            record = json.loads((output / EVALUATION).read_text())["figures"]
            outputs.append(([record[name] for name in METRICS], (output / "results.json").read_bytes()))
            evaluations += 1
        for metrics, results in outputs[1:]:
            difference = max(difference, *(abs(a - b) for a, b in zip(metrics, outputs[0][0], strict=True)))
            identical = identical and results == outputs[0][1]
        best = max(best, outputs[0][0][0])
    return {"evaluations": evaluations, "difference": difference, "identical": identical, "AP": best}


# The functions of `make soak`, with its numbers.
PARTS: dict[str, Callable[[Path], dict]] = {
    "kills of one process": lambda folder: kills(folder, count=50, processes=1),
    "kills of two processes": lambda folder: kills(folder, count=20, processes=2),
    "damaged images": lambda folder: damaged_images(folder, count=20_000),
    "damaged annotations": lambda folder: damaged_annotations(folder, count=4_000),
    "damaged checkpoints": lambda folder: damaged_checkpoints(folder, count=4_000),
    "processes": lambda folder: processes(folder, numbers=(1, 2, 3, 4), images=(1, 5, 7, 10)),
    "seeds": lambda folder: seeds(folder, count=10, epochs=12),
}


def describe(name: str, result: dict) -> str:
    """A part's result as a sentence."""
    if name.startswith("kills"):
        end = "equal bit for bit to" if result["identical"] else "different from"
        return (
            f"{result['kills']} kills, {result['during_saves']} of them during a save; after each, the checkpoint was "
            f"intact and the training resumed; its end is {end} that of an uninterrupted training"
        )
    if name.startswith("damaged"):
        return f"{result.get('read', 0):,} read, {result.get('refused', 0):,} refused by name, nothing else"
    if name == "processes":
        alike = "equal" if result["identical"] else "not equal"
        return (
            f"{result['evaluations']} evaluations; largest difference of any of the twelve metrics "
            f"{result['difference']:.1g}; all detections {alike}; AP up to {result['AP']:.3f}"
        )
    means = ", ".join(f"{k} {result[k]['mean']:.2f} ± {result[k]['deviation']:.2f}" for k in ("float32", "bf16"))
    return (
        f"{len(result['bf16']['losses'])} seeds; last training loss {means} (mean ± standard deviation); a seed's two "
        f"losses differ by at most {result['difference']:.1%} of the mean; no NaN or Inf"
    )


def to_markdown(record: dict) -> str:
    """The record as a table."""
    lines = ["| loop | result | minutes | date |", "|---|---|---:|---|"]
    for name, result in record.items():
        date = result["environment"]["date"][:10]
        lines.append(f"| {name} | {describe(name, result)} | {result['seconds'] / 60:.1f} | {date} |")
    machines = {
        f"{r['environment']['machine']}, Python {r['environment']['versions']['python']}" for r in record.values()
    }
    return "\n".join(
        [*lines, "", f'`make soak`, or `python tests/soak.py "LOOP"`, on {"; ".join(sorted(machines))}', ""]
    )


def main() -> int:
    """Run the parts named on the command line, by default all, and record the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"loops to run: {', '.join(PARTS)}; default: all")
    parser.add_argument("--record", type=Path, default=RECORD, metavar="FILE", help="JSON file to update")
    args = parser.parse_args()
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    record = json.loads(args.record.read_text()) if args.record.exists() else {}
    for name in args.parts or PARTS:
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            result = PARTS[name](Path(folder))
        record[name] = {
            **result,
            "seconds": round(time.perf_counter() - begin),
            "environment": environment([], torch.device("cpu")) | {"command": f"python tests/soak.py {name!r}"},
        }
        print(f"{name}: {json.dumps(result)}", flush=True)
        args.record.parent.mkdir(parents=True, exist_ok=True)
        args.record.write_text(json.dumps(record, indent=1) + "\n")
        args.record.with_suffix(".md").write_text(to_markdown(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
