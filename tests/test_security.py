"""Security: checkpoints execute nothing, downloads are verified, and the source makes no dangerous calls."""

import ast
import hashlib
import io
import pickle
import re
import sys
import tarfile
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torchvision
import yaml
from conftest import train
from PIL import Image
from torch import nn

from enact_common import UserError, load_detector
from enact_common.checkpoints.files import load_checkpoint
from enact_common.compare.__main__ import main as compare
from enact_common.models.backbone import BACKBONES, load_backbone_weights
from enact_common.predict import main as predict
from enact_common.utils.download import cached, download
from enact_common.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[1]

# ---------------------------------------------------------------------------------------------------------------------
# Files of tensors


class Payload:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def write_tar(path: Path, payload: Payload) -> None:
    """Write PyTorch's format from before 2018: a tar archive of three pickles."""
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(payload, 2)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_torchscript(path: Path, payload: Payload) -> None:
    """Write a zip archive that looks like TorchScript, which is code."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl"):
            archive.writestr(f"archive/{name}", pickle.dumps(payload, 2))
        archive.writestr("archive/version", "3\n")


def hidden(place: Callable[[Payload], dict], **options) -> Callable[[Path, Payload], None]:
    """A function that writes a checkpoint with a payload in the entries of `place`."""
    return lambda path, payload: torch.save({"model": {"a": torch.zeros(1)}, **place(payload)}, path, **options)


MALICIOUS = {
    "alone": lambda path, payload: torch.save(payload, path),
    "model": hidden(lambda payload: {"model": {"a": payload}}),
    "args": hidden(lambda payload: {"args": {"backbone": payload}}),
    "namespace": hidden(lambda payload: {"args": Namespace(backbone=payload)}),
    "optimizer": hidden(lambda payload: {"optimizer": {"state": {0: payload}, "param_groups": []}}),
    "legacy": hidden(lambda payload: {"args": {"backbone": payload}}, _use_new_zipfile_serialization=False),
    "pickle": lambda path, payload: path.write_bytes(pickle.dumps({"model": {"a": payload}})),
    "old-pickle": lambda path, payload: path.write_bytes(pickle.dumps({"model": {"a": payload}}, 2)),
    "tar": write_tar,
    "torchscript": write_torchscript,
}

# Each command that reads a file of tensors: (file, data set, folder) -> exit status. auto_resume and compare find the
# file in a folder.
DOORS = {
    "resume": lambda file, shapes, tmp: train("detr", shapes, tmp / "out", "--resume", file),
    "eval": lambda file, shapes, tmp: train("conditional", shapes, tmp / "out", "--resume", file, "--eval"),
    "pretrained": lambda file, shapes, tmp: train("anchor", shapes, tmp / "out", "--pretrained", file),
    "pretrained-eval": lambda file, shapes, tmp: train("detr", shapes, "", "--pretrained", file, "--eval"),
    "auto_resume": lambda file, shapes, tmp: train("detr", shapes, file.parent, "--auto_resume"),
    "backbone_weights": lambda file, shapes, tmp: train("detr", shapes, tmp / "out", "--backbone_weights", file),
    "predict": lambda file, shapes, tmp: predict(
        ["--checkpoint", str(file), "--output_dir", str(tmp / "out"), str(shapes / "val2017")]
    ),
    "compare": lambda file, shapes, tmp: compare([str(file.parent), "--output_dir", str(tmp / "out")]),
}


@pytest.mark.parametrize("form", MALICIOUS)
def test_the_malicious_files_would_fire(form, tmp_path):
    # Without this the next test proves nothing. The fake TorchScript archive does not load, so unpickle its member.
    fired, path = tmp_path / "fired", tmp_path / "checkpoint.pth"
    MALICIOUS[form](path, Payload(fired))
    if form == "torchscript":
        with zipfile.ZipFile(path) as archive:
            pickle.loads(archive.read("archive/data.pkl"))
    else:
        load = pickle.load if form.endswith("pickle") else lambda file: torch.load(file, weights_only=False)
        try:
            with open(path, "rb") as file:
                load(file)
        except Exception:  # the payload fires before the archive turns out invalid
            assert form == "tar"
    assert fired.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:'torch.load' received a zip file")
@pytest.mark.parametrize("form", MALICIOUS)
@pytest.mark.parametrize("door", [*DOORS, "load_detector"])
def test_a_malicious_file_executes_nothing_and_is_refused_by_name(door, form, shapes, tmp_path, capsys):
    fired, path = tmp_path / "fired", tmp_path / "run" / "checkpoint.pth"
    path.parent.mkdir()
    MALICIOUS[form](path, Payload(fired))
    if door == "load_detector":
        with pytest.raises(UserError) as raised:
            load_detector(path, "cpu")
        message = str(raised.value)
    else:
        assert DOORS[door](path, shapes, tmp_path) == 2
        message = capsys.readouterr().err
    assert not fired.exists()
    assert str(path) in message and "not a file of tensors" in message
    if form in ("tar", "torchscript"):
        assert "archive, and was not executed" in message
    elif form != "pickle":
        assert "io.open, which is neither a tensor nor a built-in type, and was not executed" in message
    # PyTorch's message would explain how to load the file unsafely.
    assert "weights_only` set to `False" not in message and "add_safe_globals" not in message


def test_a_malicious_file_behind_a_url(website, tmp_path):
    # The hash is right, since an attacker controls both URL and file.
    MALICIOUS["args"](website.folder / "file.pth", Payload(tmp_path / "fired"))
    digest = hashlib.sha256((website.folder / "file.pth").read_bytes()).hexdigest()
    with pytest.raises(UserError, match="io.open, .* was not executed"):
        load_checkpoint(f"{website.url}/file.pth#sha256={digest}")
    assert not (tmp_path / "fired").exists()


@pytest.mark.parametrize("form", ["tar", "torchscript"])
def test_pytorch_does_not_get_what_older_ones_would_execute(form, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    # An ordinary checkpoint is still read.
    torch.save({"model": {"a": torch.ones(1)}}, path)
    assert load_checkpoint(str(path))["model"]["a"].item() == 1
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("torch.load was called"))
    MALICIOUS[form](path, Payload(tmp_path / "fired"))
    with pytest.raises(UserError, match=f"{path}: not a file .*(tar|TorchScript) archive, and was not executed"):
        load_checkpoint(str(path))


def image_bytes(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, kind)
    return buffer.getvalue()


def zip_bytes(**members: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def save_onnx(path: Path) -> None:
    """Write an ONNX model like PyTorch's exporter."""
    onnx = pytest.importorskip("onnx")
    sizes = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", sizes[:1], sizes[1:])
    onnx.save(onnx.helper.make_model(graph, producer_name="pytorch"), path)


def save_pickle_of(module: str) -> Callable[[Path], None]:
    """A function that writes a checkpoint with an object of a class in `module`, which need not be installed."""

    def write(path: Path) -> None:
        kind = type("Kind", (), {"__module__": module})
        parents = [module[:end] for end, letter in enumerate(module) if letter == "."]
        modules = dict.fromkeys(parents, SimpleNamespace()) | {module: SimpleNamespace(Kind=kind)}
        buffer = io.BytesIO()
        with mock.patch.dict(sys.modules, modules):
            torch.save({"model": kind(), "epoch": 3}, buffer)
        path.write_bytes(buffer.getvalue())

    return write


def save_traced(path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)


def make_folder_with(name: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.mkdir()
        (path / name).touch()

    return write


PAGE = "\n<!DOCTYPE html>\n<html><title>weights.pth</title></html>"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 166618694\n"
NO_MODULE = "save its tensors: torch.save({'model': model.state_dict()}, FILE)"

# Files passed instead of a checkpoint: (function that writes the file, expected message).
FOREIGN = {
    "empty": (lambda path: path.touch(), "an empty file; download or copy it again"),
    "zeros": (lambda path: path.write_bytes(bytes(5000)), "a file of zeros"),
    "html": (lambda path: path.write_text(PAGE), "a web page; download the file itself"),
    "lfs": (lambda path: path.write_text(POINTER), "a Git LFS pointer; .* git lfs pull"),
    "text": (lambda path: path.write_text("lr: 0.1\nträining: yes\n"), "a text file; pass a checkpoint"),
    "json": (lambda path: path.write_text('{"model": []}'), "a text file; pass a checkpoint"),
    "gzip": (lambda path: path.write_bytes(b"\x1f\x8b" + bytes(9)), "a gzip archive; unpack it"),
    "zip": (lambda path: path.write_bytes(zip_bytes(readme="x")), "a zip archive of readme; unpack it"),
    "empty-zip": (lambda path: path.write_bytes(zip_bytes()), "a zip archive without files"),
    "numpy": (lambda path: path.write_bytes(zip_bytes(**{"a.npy": "x", "b.npy": "y"})), "a NumPy archive"),
    "torchscript": (save_traced, "a TorchScript archive, and was not executed; pass the PyTorch checkpoint"),
    "onnx": (save_onnx, "an ONNX model, .*; pass the PyTorch checkpoint"),
    "module": (lambda path: torch.save(nn.Linear(2, 2), path), f"a whole pickled module .*{re.escape(NO_MODULE)}"),
    "module-in-a-dict": (lambda path: torch.save({"model": nn.Linear(2, 2)}, path), "a whole pickled module"),
    "old-module": (
        lambda path: torch.save(nn.Linear(2, 2), path, _use_new_zipfile_serialization=False),
        "a whole pickled module",
    ),
    "ultralytics": (save_pickle_of("ultralytics.nn.tasks"), "an Ultralytics YOLO checkpoint, and was not executed"),
    "yolov5": (save_pickle_of("models.yolo"), "a YOLO checkpoint"),
    "mmdet": (save_pickle_of("mmengine.logging.history_buffer"), "an MMDetection .* checkpoint"),
    "detectron2": (save_pickle_of("detectron2.config"), "a Detectron2 checkpoint"),
    "hugging-face": (make_folder_with("config.json"), "a Hugging Face model's folder"),
    "run": (make_folder_with("checkpoint.pth"), "a run's folder; pass .*file.pth/checkpoint.pth"),
    "folder": (make_folder_with("a.pth"), "a folder; pass the checkpoint in it"),
    **{
        kind: (lambda path, kind=kind: path.write_bytes(image_bytes(kind)), f"a {said} image")
        for kind, said in {"PNG": "PNG", "JPEG": "JPEG", "BMP": "BMP", "GIF": "GIF", "TIFF": "TIFF"}.items()
    },
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_of_another_kind_is_named(kind, tmp_path, recwarn):
    make, said = FOREIGN[kind]
    path = tmp_path / "file.pth"
    make(path)
    with pytest.raises(UserError, match=f"^{path}: not a file of tensors but {said}") as raised:
        load_checkpoint(str(path))
    assert "\n" not in str(raised.value) and not len(recwarn)
    with pytest.raises(UserError, match=f"{path}: not? .*file"):
        load_backbone_weights("resnet18", str(path))


def test_safetensors_are_recognized_by_content_and_need_their_package(tmp_path, monkeypatch):
    save_file = pytest.importorskip("safetensors.torch").save_file
    path = tmp_path / "weights.bin"
    save_file({"a": torch.ones(1)}, path)
    assert load_checkpoint(str(path))["model"]["a"].item() == 1
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(UserError, match="weights.bin: truncated"):
        load_checkpoint(str(path))
    path.write_bytes(whole)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match="weights.bin: reading it needs safetensors: pip install 'safetensors>=0.4'"):
        load_checkpoint(str(path))


# ---------------------------------------------------------------------------------------------------------------------
# Downloads


def publish(website, name: str, content: bytes = b"content") -> str:
    """Put a file on the test website; return its SHA-256."""
    path = website.folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def cached_files(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "torch_home").rglob("*") if path.is_file())


@pytest.mark.parametrize("digits", [8, 20, 64])
@pytest.mark.parametrize("form", ["name-{hash}.pth", "name-{hash}.pth.tar", "name.pth#sha256={hash}", "#sha256={hash}"])
def test_a_download_with_the_right_hash_is_cached(form, digits, website):
    digest = hashlib.sha256(b"content").hexdigest()[:digits]
    name = form.format(hash=digest).partition("#")[0]
    publish(website, name or "index.html")
    path = download(f"{website.url}/{form.format(hash=digest)}")
    assert path.read_bytes() == b"content" and website.asked == [f"/{name}"]
    assert download(f"{website.url}/{form.format(hash=digest)}") == path
    assert len(website.asked) == 1  # the second download used the cache


def test_the_hash_after_a_url_overrides_the_one_in_its_name(website):
    # The eight digits of a date look like a hash.
    digest = publish(website, "model-20240131.pth")
    with pytest.raises(UserError, match="If 20240131 is not a hash, end the URL with #sha256="):
        download(f"{website.url}/model-20240131.pth")
    assert download(f"{website.url}/model-20240131.pth#SHA256={digest.upper()}").read_bytes() == b"content"


@pytest.mark.parametrize(
    "url, message",
    [
        ("http://weights.test/a-0123abcd.pth", "only https URLs are downloaded; pass an https URL, or download it"),
        ("HTTP://weights.test/a-0123abcd.pth", "only https"),
        ("ftp://weights.test/a-0123abcd.pth", "only https"),
        ("file:///a-0123abcd.pth", "only https"),
        ("https://weights.test/a.pth", "end it with #sha256= .* or download it elsewhere and pass its path"),
        ("https://weights.test/a-.pth", "end it with #sha256="),
        ("https://weights.test/detr-dc5.pth", "end it with #sha256="),
        ("https://weights.test/a.pth?b-0123abcd.pth", "end it with #sha256="),
        ("https://weights.test/a-0123abcd.pth#sha256=", "expected #sha256= and 8 to 64 hexadecimal digits"),
        ("https://weights.test/a.pth#sha256=0123abc", "expected #sha256= and 8"),
        ("https://weights.test/a.pth#md5=0123abcd", "expected #sha256= and 8"),
        ("https://weights.test/a.pth#sha256=0123abcdx", "expected #sha256= and 8"),
        (f"https://weights.test/a.pth#sha256={'0' * 65}", "expected #sha256= and 8"),
        ("https://[weights.test/a-0123abcd.pth", "cannot be downloaded .* download it elsewhere"),
        ("https://weights.test/missing-0123abcd.pth", "cannot be downloaded .*404.* download it elsewhere"),
        (f"https://weights.test/{'a' * 300}-0123abcd.pth", "cannot be downloaded .*too long"),
    ],
)
def test_a_url_that_is_refused(url, message, website, tmp_path):
    publish(website, "a.pth")
    with pytest.raises(UserError, match=f"(?s)^{re.escape(url)}: .*{message}"):
        load_checkpoint(url)
    assert cached_files(tmp_path) == []


def test_a_wrong_hash_leaves_nothing_behind(website, tmp_path):
    digest = publish(website, "a.pth")
    with pytest.raises(UserError, match=f"its SHA-256 is {digest}, expected was 00000000.* was deleted"):
        download(f"{website.url}/a.pth#sha256=00000000")
    assert cached_files(tmp_path) == []


def test_files_of_one_name_are_not_confused(website):
    first = publish(website, "a.pth", b"first")
    path = download(f"{website.url}/a.pth#sha256={first}")
    second = publish(website, "a.pth", b"second")
    other = download(f"{website.url}/a.pth#sha256={second}")
    assert path.read_bytes() == b"first" and other.read_bytes() == b"second"
    with pytest.raises(UserError, match="is not the expected file"):
        download(f"{website.url}/a.pth#sha256={'0' * 64}")


def test_a_cached_file_that_was_changed_is_fetched_anew(website):
    digest = publish(website, "a.pth")
    url = f"{website.url}/a.pth#sha256={digest}"
    download(url).write_bytes(b"changed")
    assert download(url).read_bytes() == b"content"


def test_redirects_lead_to_https_alone(website, tmp_path):
    digest = publish(website, "a.pth")
    website.moved["/moved.pth"] = "https://weights.test/a.pth"
    assert download(f"{website.url}/moved.pth#sha256={digest}").read_bytes() == b"content"
    website.moved["/lowered.pth"] = f"{website.plain}/a.pth"
    website.asked.clear()
    with pytest.raises(UserError, match=f"redirected to {website.plain}/a.pth, which is not https"):
        download(f"{website.url}/lowered.pth#sha256={digest}")
    assert website.asked == ["/lowered.pth"] and len(cached_files(tmp_path)) == 1


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_weights_are_downloaded_by_https_and_checked(name, website, tmp_path):
    weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    path, expected = cached(weights.url)
    assert weights.url.startswith("https:") and re.fullmatch("[0-9a-f]{8,}", expected) and path.name in weights.url
    # torchvision would load this malicious file from PyTorch's cache without a check.
    path.parent.mkdir(parents=True)
    MALICIOUS["alone"](path, Payload(tmp_path / "fired"))
    publish(website, f"models/{path.name}")
    with pytest.raises(UserError, match="--backbone_weights default: .*the expected file .*--backbone_weights PATH"):
        load_backbone_weights(name, "default")
    assert not (tmp_path / "fired").exists()


def test_backbone_weights_with_the_right_hash_are_loaded(website, monkeypatch):
    state = torchvision.models.resnet18().state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=False)
    digest = publish(website, "resnet18.pth", buffer.getvalue())
    weights = Namespace(IMAGENET1K_V1=Namespace(url=f"{website.url}/resnet18.pth#sha256={digest}"))
    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda name: weights)
    loaded = load_backbone_weights("resnet18", "default")
    assert loaded.keys() == state.keys() and torch.equal(loaded["conv1.weight"], state["conv1.weight"])


# ---------------------------------------------------------------------------------------------------------------------
# The source

# Modules whose files can run code when read.
FORBIDDEN_MODULES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "code"}

FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "builtins.compile",
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
    "yaml.load_all", "yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load", "yaml.unsafe_load_all",
    "torch.jit.load", "torch.package.PackageImporter", "torch.export.load",
    # These fetch code or unverified files; use `enact_common.utils.download` and `read_tensors` instead.
    "torch.hub.load", "torch.hub.load_state_dict_from_url", "torch.hub.download_url_to_file",
    "torch.utils.model_zoo.load_url", "urllib.request.urlopen", "urllib.request.urlretrieve",
}  # fmt: skip
FORBIDDEN_METHODS = {"get_state_dict"}  # torchvision's weights; calls `torch.hub.load_state_dict_from_url`

SAFE_LOADERS = {"yaml.SafeLoader", "yaml.CSafeLoader"}


def imported_names(tree: ast.AST) -> dict[str, str]:
    """{name in the module: full name} of everything that a module imports."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                names[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def full_name(node: ast.AST, names: dict[str, str]) -> str:
    """The full name, `np.load` as numpy.load; "" for other expressions, ".attribute" for their attributes."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value, names)}.{node.attr}"
    return ""


def is_constant(node: ast.AST | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def openings(source: str) -> Iterator[str]:
    """Yield "line: reason" for each place of a module where text or a file could become code."""
    tree = ast.parse(source)
    names = imported_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        members = [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        for name in (*modules, *members):
            if name in FORBIDDEN_CALLS or name.partition(".")[0] in FORBIDDEN_MODULES:
                yield f"{node.lineno}: imports {name}"
        # Any mention counts, since a function may be renamed or passed on before its call.
        if isinstance(node, (ast.Name, ast.Attribute)) and full_name(node, names) in FORBIDDEN_CALLS:
            yield f"{node.lineno}: {full_name(node, names)}"
        if isinstance(node, ast.Attribute) and node.attr in FORBIDDEN_METHODS:
            yield f"{node.lineno}: {node.attr}"
        if not isinstance(node, ast.Call):
            continue
        called = full_name(node.func, names)
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if called in ("torch.load", "torch.serialization.load") and not is_constant(given.get("weights_only"), True):
            yield f"{node.lineno}: {called} without weights_only=True"
        if called == "yaml.load" and full_name(given.get("Loader", node), names) not in SAFE_LOADERS:
            yield f"{node.lineno}: yaml.load without SafeLoader"
        if "allow_pickle" in given and not is_constant(given["allow_pickle"], False):
            yield f"{node.lineno}: {called} with allow_pickle"
        if "shell" in given and not is_constant(given["shell"], False):
            yield f"{node.lineno}: {called} in a shell"
        # The only class that `torch.load` may accept beyond tensors and built-in types is Namespace.
        if called.endswith(("add_safe_globals", ".safe_globals")):
            let_in = [full_name(item, names) for argument in node.args for item in getattr(argument, "elts", [None])]
            if let_in != ["argparse.Namespace"]:
                yield f"{node.lineno}: {called} lets in {let_in}"


@pytest.mark.parametrize(
    "source",
    [
        "import torch; torch.load(path)",
        "import torch; torch.load(path, weights_only=False)",
        "import torch; torch.load(path, weights_only=flag)",
        "import torch as t; t.load(path)",
        "from torch import load; load(path)",
        "from torch import load as read; read(path, map_location='cpu')",
        "import pickle",
        "from pickle import loads",
        "def f():\n    import marshal",
        "eval('1')",
        "exec('1')",
        "f = eval",
        "import os; os.system('ls')",
        "from os import system; system('ls')",
        "import yaml; yaml.load(text)",
        "import yaml; yaml.load(text, Loader=yaml.Loader)",
        "import yaml; yaml.unsafe_load(text)",
        "import numpy as np; np.load(path, allow_pickle=True)",
        "import subprocess; subprocess.run('ls', shell=True)",
        "import torch; torch.hub.load('owner/name', 'model')",
        "from torch.hub import load_state_dict_from_url",
        "weights.get_state_dict(progress=True)",
        "from urllib.request import urlopen; urlopen(url)",
        "import torch; torch.serialization.add_safe_globals([argparse.Namespace, print])",
        "import torch; torch.serialization.add_safe_globals(names)",
    ],
)
def test_an_opening_in_the_source_is_found(source):
    assert list(openings(source)) != []


@pytest.mark.parametrize(
    "source",
    [
        "import torch; torch.load(path, map_location='cpu', weights_only=True)",
        "model.eval()",
        "import re; re.compile('a')",
        "import torch; torch.compile(model)",
        "import yaml; yaml.safe_load(text); yaml.load(text, Loader=yaml.SafeLoader)",
        "import numpy as np; np.load(path); np.load(path, allow_pickle=False)",
        "import subprocess; subprocess.run(['ls'], check=True)",
        "import json; json.load(file)",
        "import argparse, torch; torch.serialization.add_safe_globals([argparse.Namespace])",
    ],
)
def test_safe_calls_are_not_openings(source):
    assert list(openings(source)) == []


@pytest.mark.slow
def test_no_opening_in_the_source():
    folders = [ROOT / "enact_common", *(ROOT / folder for folder, _ in VARIANTS.values())]
    files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    assert len(files) > 80
    found = {str(path.relative_to(ROOT)): list(openings(path.read_text(encoding="utf-8"))) for path in files}
    # Exported files are programs, so formats.py runs them; SECURITY.md says to load only one's own.
    programs = {call.split(": ")[1] for call in found.pop("enact_common/export/formats.py")}
    assert programs == {"torch.jit.load", "torch.export.load"}
    assert {name: lines for name, lines in found.items() if lines} == {}


# ---------------------------------------------------------------------------------------------------------------------
# The container


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """The (instruction, argument) pairs of a Dockerfile, with continued lines joined."""
    lines = [line for line in dockerfile.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [(line.split(None, 1)[0].upper(), line.split(None, 1)[1]) for line in joined]


def test_the_container_runs_as_a_user_without_rights():
    found = instructions((ROOT / "Dockerfile").read_text(encoding="utf-8"))
    defaults = dict(argument.split("=") for name, argument in found if name == "ARG")
    user = [argument for name, argument in found if name == "USER"][-1]
    user = re.sub(r"\$\{(\w+)\}", lambda variable: defaults[variable[1]], user)
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert not any(re.search(r"\bsudo\b|\bsetcap\b|chmod .*s", argument) for _, argument in found)
    # Only Debian's and Python's packages come from the network; their installers verify them.
    assert "ADD" not in dict(found)
    assert not any(re.search(r"\bcurl\b|\bwget\b|https?://", argument) for _, argument in found)


def test_services_get_no_rights_over_the_host():
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    for name, service in services.items():
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.keys() & {"privileged", "cap_add", "network_mode", "pid", "ipc", "user", "devices"}, name
        assert {volume["target"] for volume in service["volumes"]} <= {"/data/coco", "/outputs"}, name


# ---------------------------------------------------------------------------------------------------------------------
# The promises of SECURITY.md


def test_every_test_in_the_security_page_exists():
    promised = re.findall(r"`(?:(test_\w+)\.py::)?(test_\w+)`", (ROOT / "SECURITY.md").read_text(encoding="utf-8"))
    assert len(promised) > 8
    for file, test in promised:
        source = (ROOT / "tests" / f"{file or 'test_security'}.py").read_text(encoding="utf-8")
        assert f"def {test}(" in source, f"{file}::{test}"
