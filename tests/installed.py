"""Build the wheel, install it into a clean environment outside the checkout, and run the commands a user would run.

    python tests/installed.py

The environment borrows this one's packages, such as PyTorch, but takes the project from the wheel.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

LIBRARY = """
import pickle, subprocess, sys
import torch
import enact_common
from enact_common import EnactSelfAttention, load_detector, load_variant
from enact_common.hub import ENTRIES

assert {prefix!r} in enact_common.__file__, enact_common.__file__
x = torch.randn(2, 60, 32)
EnactSelfAttention(32, 4, batch_first=True)(x, x, x)[0].sum().backward()
detector = load_detector("demo/run/checkpoint.pth", "cpu", threshold=0.0)
picture = "demo/shapes/val2017/000000000001.jpg"
found = detector(picture)
assert len(found)
with open("detector.pickle", "wb") as file:
    pickle.dump(detector, file)
code = "import pickle, sys; d = pickle.load(open('detector.pickle', 'rb')); print(len(d(sys.argv[1])))"
assert int(subprocess.check_output([sys.executable, "-c", code, picture])) == len(found)
assert len(ENTRIES) > 20
for name, entry in ENTRIES.items():
    assert entry(hidden_dim=32, dim_feedforward=32, enc_layers=1, dec_layers=1), name
print(f"{{len(ENTRIES)}} hub names")
"""


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="enact-installed-") as folder:
        work = Path(folder)
        pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        # Build from a copy, because a build leaves folders next to the source.
        source = work / "source"
        listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT).decode().split("\0")
        for name in filter(None, listed):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
        subprocess.check_call([*pip, "wheel", str(source), "--no-deps", "-w", str(work / "wheel")], env=environment)
        venv.create(work / "env", with_pip=False)
        python = work / "env" / "bin" / "python"
        query = "import sysconfig; print(sysconfig.get_path('purelib'))"
        packages = Path(subprocess.check_output([str(python), "-c", query]).decode().strip())
        (wheel,) = (work / "wheel").glob("*.whl")
        subprocess.check_call([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], env=environment)
        # After the installation: otherwise pip would find the project in the borrowed packages and skip it.
        (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")

        environment["PATH"] = f"{work / 'env' / 'bin'}{os.pathsep}{environment['PATH']}"
        small = "--epochs 1 --limit_train 24 --limit_val 8".split()
        picture = "demo/shapes/val2017/000000000001.jpg"
        checkpoint = "demo/run/checkpoint.pth"
        for command in (
            ["enact", "--help"],
            ["enact", "demo", "--output_dir", "demo", "--", *small],
            ["enact", "check", "demo/shapes", "--quick"],
            ["enact", "eval", "--config", "demo/run/config.yaml", "--resume", checkpoint],
            ["enact", "predict", picture, "--checkpoint", checkpoint, "--output_dir", "seen", "--device", "cpu"],
            ["enact", "predict", "--checkpoint", "blood_cells", "--output_dir", "cells", "--device", "cpu"],
            ["enact", "export", checkpoint, "--output", "detector.onnx"],
            ["enact", "completion", "bash"],
            ["python", "-c", LIBRARY.format(prefix=str(packages))],
        ):
            begin = time.perf_counter()
            print(f"$ {' '.join(command[:4])} ...", flush=True)
            done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{done.stdout}\n{done.stderr}\nexit status {done.returncode}")
            print(f"  {time.perf_counter() - begin:.1f} s; {(done.stdout.strip().splitlines() or ['-'])[-1][:100]}")


if __name__ == "__main__":
    main()
