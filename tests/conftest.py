"""Shared fixtures and helpers: small data sets, small models, runs of a variant's command line.

Functions import PyTorch, since pytest-xdist's controller loads this file too before it starts the processes that test.
"""

import copy
import functools
import gc
import http.client
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

# Set before PyTorch is imported; child processes inherit it. Models this small gain nothing from threads, and threads
# wait for each other when other work shares the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from processes import Forked

from enact_common.variants import VARIANTS, load_variant

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))

ATTENTIONS = ("enact", "mhsa")

# Appended to SMALL_MODEL: mask heads need all backbone stages.
ALL_STAGES = ("--backbone_stages", "4")

# A small model of each variant: 8 queries, random weights. Two backbone stages keep checkpoints at 9 MB and give
# feature maps of at least 64 cells, enough for ENACT's clusters to differ.
SMALL_MODEL = {
    variant: (
        "--device cpu --backbone resnet18 --backbone_stages 2 --backbone_weights none --backbone_norm batch "
        "--hidden_dim 32 --nheads 4 "
        "--dim_feedforward 64 --enc_layers 1 --dec_layers 2 --num_workers 0 --batch_size 4 --train_sizes 64 72 "
        f"--eval_size 64 --max_size 96 --lr 1e-3 --lr_backbone 1e-4 {own}"
    ).split()
    for variant, own in {
        "detr": "--num_queries 8",
        "conditional": "--num_queries 8",
        "anchor": "--num_query_position 4 --num_query_pattern 2 --no-dilation",
    }.items()
}


# Flags with which a variant's encoder attends between cells, as the rivals of ENACT need.
TOKENS = {"detr": (), "conditional": (), "anchor": ("--attention_type", "nn.MultiheadAttention")}

# Test files that mostly train, export, compile or start processes, slowest first. `make test-fast` skips them, and
# single tests marked as slow.
SLOW_FILES = (
    "export acceleration stopping kernels compose golden slurm study segmentation gpu tools distributed benchmark "
    "upstream train weights plug_in_huggingface soak unreadable compare finetune plots trackers explore auto_batch "
    "properties hub study_photographs architecture"
).split()


# Started processes read the compiled sources, even where the environment forbids to store them: compiling the package
# anew took each a tenth of its start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Imports and collection make objects that stay: looking for garbage among them took a fifth of the time.
gc.disable()


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_ignore_collect(collection_path, config):
    # `make test-fast` would deselect all tests of these files, but import the files first.
    if config.option.markexpr == "not slow" and collection_path.stem.removeprefix("test_") in SLOW_FILES:
        return True


def pytest_collection_modifyitems(items):
    for item in items:
        if file_order(item) < len(SLOW_FILES):
            item.add_marker(pytest.mark.slow)
    # A file runs in one process: starting with the slowest keeps all processes busy to the end.
    items.sort(key=file_order)


def file_order(item) -> int:
    """Return the place of a test's file in `SLOW_FILES`, and their number for other files."""
    name = item.path.stem.removeprefix("test_")
    return SLOW_FILES.index(name) if name in SLOW_FILES else len(SLOW_FILES)


@pytest.fixture(autouse=True)
def one_seed():
    """Seed PyTorch, so that the order of tests does not matter."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def known_resnets():
    """Copy a ResNet that was drawn from the same random state before: drawing takes ten times longer."""
    import torch

    from enact_common.models import backbone

    original = backbone.ResNet

    def make(block: type, layers: tuple[int, ...], norm_layer: type, dilated: tuple[bool, ...]):
        return original(block, list(layers), norm_layer=norm_layer, replace_stride_with_dilation=list(dilated))

    @functools.lru_cache(maxsize=8)
    def drawn(random_state: bytes, *parts):
        return make(*parts), torch.get_rng_state()

    def resnet(block, layers, *, norm_layer, replace_stride_with_dilation):
        parts = block, tuple(layers), norm_layer, tuple(replace_stride_with_dilation)
        # A mode may leave weights undrawn or make them on another device.
        if torch._C._len_torch_function_stack():
            return make(*parts)
        made, after = drawn(torch.get_rng_state().numpy().tobytes(), *parts)
        torch.set_rng_state(after)
        # Frozen norms notice that their tensors were copied; this refreshes them, as if they were new.
        return copy.deepcopy(made).float()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone, "ResNet", resnet)
        yield


@pytest.fixture(params=[(v, a) for v in VARIANTS for a in ATTENTIONS], ids="-".join)
def variant_and_attention(request):
    """Every variant, with and without ENACT."""
    return request.param


@pytest.fixture
def heard_signals() -> Iterator[None]:
    """Terminal signal handlers: under `nohup` or in a script's background, some signals are ignored."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """A data set of drawn shapes in COCO's layout: 12 training images, 6 validation images."""
    from enact_common.data.synthetic import make_shapes

    return make_shapes(tmp_path_factory.mktemp("shapes") / "data", train=12, val=6, size=(64, 80), seed=3)


@pytest.fixture
def coco_mini() -> Path:
    """The folder of real COCO images that ENACT_COCO_MINI names; else the test is skipped."""
    return real_data("ENACT_COCO_MINI")


class Website:
    """A local stand-in for https://weights.test/: serves the files of a folder, without encryption.

    Attributes:
        folder: the served files.
        moved: redirected paths, and the URLs they lead to.
        asked: the requested paths, in order.
        plain: the server's http:// address.
    """

    url = "https://weights.test"

    def __init__(self, folder: Path):
        self.folder = folder
        self.moved: dict[str, str] = {}
        self.asked: list[str] = []
        website = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self):
                website.asked.append(self.path)
                if self.path not in website.moved:
                    return super().do_GET()
                self.send_response(302)
                self.send_header("Location", website.moved[self.path])
                self.end_headers()

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
        )
        self.plain = f"http://127.0.0.1:{self.server.server_port}"

    def https_open(self, handler: urllib.request.HTTPSHandler, request: urllib.request.Request):
        """Replacement for `HTTPSHandler.https_open`."""
        port = self.server.server_port
        return handler.do_open(lambda _, **options: http.client.HTTPConnection("127.0.0.1", port, **options), request)


def make_font(path: Path, characters: str) -> Path:
    """Write a font with these characters, digits and a dot; each glyph is a bar of a different width."""
    builder = pytest.importorskip("fontTools.fontBuilder")
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    glyphs = {}
    for i, name in enumerate([".notdef", *(f"u{ord(c):04X}" for c in dict.fromkeys(characters + "0123456789."))]):
        pen = TTGlyphPen(None)
        pen.moveTo((50, 0))
        for corner in ((50, 700), (150 + 20 * i, 700), (150 + 20 * i, 0)):
            pen.lineTo(corner)
        pen.closePath()
        glyphs[name] = pen.glyph()
    font = builder.FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(list(glyphs))
    font.setupCharacterMap({int(name[1:], 16): name for name in glyphs if name != ".notdef"})
    font.setupGlyf(glyphs)
    font.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 50)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    font.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    font.setupPost()
    path.parent.mkdir(parents=True, exist_ok=True)
    font.save(path)
    return path


@pytest.fixture
def fonts(monkeypatch, tmp_path) -> Path:
    """The user's font folder, empty; only the fonts of Pillow and matplotlib remain."""
    from enact_common.drawing import fonts as drawing_fonts

    caches = (drawing_fonts.font_sources, drawing_fonts.readable_name, drawing_fonts.open_font, drawing_fonts.has_glyph)
    home = tmp_path / "share"
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(home))
    monkeypatch.setenv("XDG_DATA_DIRS", str(home))
    for function in caches:
        function.cache_clear()
    drawing_fonts._said.clear()
    yield home / "fonts"
    for function in caches:
        function.cache_clear()


@pytest.fixture
def website(tmp_path, monkeypatch) -> Iterator[Website]:
    """https://weights.test/, with an empty download cache."""
    import torch

    folder = tmp_path / "website"
    folder.mkdir()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("no_proxy", "*")
    site = Website(folder)
    monkeypatch.setattr(
        urllib.request.HTTPSHandler, "https_open", lambda handler, request: site.https_open(handler, request)
    )
    with site.server:
        threading.Thread(target=site.server.serve_forever, args=(0.01,), daemon=True).start()
        yield site
        site.server.shutdown()


def real_data(variable: str) -> Path:
    """The folder in an environment variable; skips the test if the variable is not set."""
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} does not say where the data set is")
    return Path(folder)


def parse(variant: str, *argv: str):
    """Parse a variant's arguments."""
    return load_variant(variant).main.get_args_parser().parse_args(list(argv))


def build(variant: str, *argv: str):
    """(model, criterion, postprocessors) of a variant.

    A small model is copied if the same arguments built it from the same random state before: drawing a whole ResNet
    takes ten times longer, and most tests start from one seed.
    """
    import torch

    if list(argv[: len(SMALL_MODEL[variant])]) != SMALL_MODEL[variant]:
        return load_variant(variant).models.build_model(parse(variant, *argv))
    made, random_state = small_model(variant, argv, torch.get_rng_state().numpy().tobytes())
    torch.set_rng_state(random_state)
    return copy.deepcopy(made)


@functools.lru_cache(maxsize=16)
def small_model(variant: str, argv: tuple[str, ...], random_state: bytes):
    """((model, criterion, postprocessors), random state afterwards); `random_state` is the current one."""
    import torch

    return load_variant(variant).models.build_model(parse(variant, *argv)), torch.get_rng_state()


def run(variant: str, *argv: str) -> int:
    """Run a variant's command line in this process; the exit status."""
    from enact_common.training.run import main

    package = load_variant(variant)
    return main(
        variant,
        package.main.get_args_parser(),
        package.models.build_model,
        package.datasets.build_dataset,
        [str(word) for word in argv],
    )


def train(variant: str, shapes: Path, output: Path, *argv) -> int:
    """Train a small model of a variant on the shapes; the exit status."""
    return run(variant, "--coco_path", shapes, "--output_dir", output, *SMALL_MODEL[variant], *argv)


def free_port() -> int:
    """A free local TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(
    processes: int,
    variant: str,
    shapes: Path,
    output: Path,
    *argv,
    torchrun: bool = False,
    of_rank: dict | None = None,
    fresh: bool = False,
) -> list[subprocess.Popen | Forked]:
    """Start the training of a small model in child processes, each in a new process group.

    Args:
        processes: number of ranks; 1 trains without a process group.
        variant, shapes, output, argv: see `train`.
        torchrun: let torchrun start the ranks.
        of_rank: further arguments by rank.
        fresh: start new interpreters, which takes seconds, instead of forks.

    Returns:
        one `Popen` or `Forked` per rank; with torchrun, only torchrun's.
    """
    script = ROOT / VARIANTS[variant][0] / "main.py"
    words = [script, "--coco_path", shapes, "--output_dir", output, *SMALL_MODEL[variant], *argv]
    environments: list[dict[str, str]] = [{}]
    if torchrun:
        words = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *words]
    elif processes > 1:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        ranks = [{"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(processes)]
        environments = [{**meeting, **rank, "WORLD_SIZE": str(processes)} for rank in ranks]
    started = []
    for rank, more in enumerate(environments):
        own = [*map(str, words), *map(str, (of_rank or {}).get(rank, ()))]
        environment = {**os.environ, **more, "PYTHONUNBUFFERED": "1"}
        if torchrun or fresh:
            pipe = subprocess.PIPE
            options = {"stdout": pipe, "stderr": pipe, "text": True, "start_new_session": True, "env": environment}
            started.append(subprocess.Popen([sys.executable, *own], **options))
        else:
            started.append(Forked(own, environment))
    return started


def equal_states(first, second) -> bool:
    """Whether two nested states hold the same tensors and values."""
    import torch

    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal_states(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal_states, first, second))
    return first == second


# Keys of `log.txt` that differ between runs: time and memory.
COST = ("train_seconds", "test_seconds", "peak_memory_gib")


def read_log(output_dir: Path) -> list[dict]:
    """The epochs in `log.txt`, without the keys in COST."""
    rows = [json.loads(line) for line in (output_dir / "log.txt").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in COST} for row in rows]


def assert_close(actual, expected, tolerance: float = 1e-4) -> None:
    """Assert equality within a relative and absolute tolerance."""
    import numpy as np
    import torch

    actual = actual.detach() if isinstance(actual, torch.Tensor) else actual
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=tolerance, atol=tolerance)
