"""The files: how each format is written, and how it is run again.

Each holds the graph, the weights and the metadata (`enact_common.export.graph.describe`), as JSON under one name.
"""

import contextlib
import importlib
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from enact_common.export.graph import GREATEST_BATCH, LEAST_SIDE, DetectorGraph, to_text
from enact_common.models.scripting import traced
from enact_common.utils.device import TORCH_VERSION
from enact_common.utils.errors import UserError
from enact_common.utils.files import write_file

# Where the metadata is, in all formats.
METADATA = "enact.json"

# The release that `torch.export` was tried with: earlier ones refuse sizes that depend on data, or fix them.
EXPORTING = (2, 15)

# Operations with 8-bit weights: the transformer's products. Quantized convolutions are slower than those in floating
# point on CPUs, and the backbone's activations lose more.
QUANTIZED = ["MatMul", "Gemm"]


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        suffix: of its files.
        write: (graph, metadata, path): records and writes; may raise a UserError.
        load: from a path to (metadata, what takes the inputs and returns the outputs as tensors).
    """

    suffix: str
    write: Callable[[DetectorGraph, dict, Path], None]
    load: Callable[[Path], tuple[dict, Callable[..., Sequence[Tensor]]]]


class ExportedDetector:
    """A file in its runtime, on the CPU.

    Attributes:
        metadata: what it says about itself.
    """

    def __init__(self, metadata: dict, run: Callable[..., Sequence[Tensor]]):
        self.metadata = metadata
        self._run = run

    def __call__(self, images: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """The outputs by name, for inputs as the metadata describe them; mask only where the file takes one."""
        inputs = (images,) if mask is None else (images, mask)
        return dict(zip(self.metadata["outputs"], self._run(*inputs), strict=True))


def needed(module: str, why: str) -> ModuleType:
    """A package of the extra `export`.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise UserError(
            f"{why} needs the package {error.name}, which is not installed: pip install 'enact-detection[export]'"
        ) from error


@contextlib.contextmanager
def quiet(name: str | None = None) -> Iterator[None]:
    """Within it, no warnings, and nothing below an error of the logger of this name, or of the root's."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def export_program(graph: DetectorGraph) -> ExportedProgram:
    """The graph as PyTorch's exported program.

    Raises:
        UserError: this PyTorch is too old.
    """
    if TORCH_VERSION < EXPORTING:
        tried = ".".join(map(str, EXPORTING))
        raise UserError(
            f"this PyTorch is {torch.__version__}; --format onnx and exported_program were tried with {tried}: install "
            "that, or pass --format torchscript"
        )
    interface = graph.interface
    free: dict[int, Dim] = {}
    if interface.batch is None:
        free[0] = Dim("batch", max=GREATEST_BATCH)
    if interface.size is None:
        free |= {
            axis: Dim(name, min=LEAST_SIDE, max=interface.greatest_side) for axis, name in ((2, "height"), (3, "width"))
        }
    # The mask has no channels.
    shapes = (free, {axis - (axis > 1): dim for axis, dim in free.items()})[: len(interface.inputs)]
    # Of comparisons of sizes that hold for all it is made for, some are beyond the exporter's algebra: those are
    # checked whenever the graph runs.
    return torch.export.export(
        graph, interface.example(), dynamic_shapes=shapes, prefer_deferred_runtime_asserts_over_guards=True
    )


def write_onnx(graph: DetectorGraph, metadata: dict, path: Path) -> None:
    """Write ONNX, with weights inside, after `onnx.checker`."""
    onnx = needed("onnx", "--format onnx")
    needed("onnxscript", "--format onnx")
    program = export_program(graph)
    with quiet("onnxscript"):
        exported = torch.onnx.export(
            program,
            input_names=graph.interface.inputs,
            output_names=list(graph.interface.outputs),
            dynamo=True,
            verbose=False,
        )
    save_onnx(onnx, exported.model_proto, metadata, path)


def save_onnx(onnx: ModuleType, model, metadata: dict, path: Path) -> None:
    """Check and write a model of ONNX's."""
    onnx.helper.set_model_props(model, {METADATA: to_text(metadata)})
    onnx.checker.check_model(model)
    write_file(path, lambda file: file.write(model.SerializeToString()))


def load_onnx(path: Path) -> tuple[dict, Callable[..., Sequence[Tensor]]]:
    """Run by ONNX Runtime, in as many threads as PyTorch has."""
    runtime = needed("onnxruntime", f"{path}: running it")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        arrays = dict(zip(names, (tensor.numpy() for tensor in inputs), strict=True))
        return [torch.from_numpy(array) for array in session.run(None, arrays)]

    return read_metadata(path, session.get_modelmeta().custom_metadata_map.get(METADATA, "")), run


def write_torchscript(graph: DetectorGraph, metadata: dict, path: Path) -> None:
    """Write a traced module."""
    module = traced(graph, *graph.interface.example())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that TorchScript goes out of use
        write_file(path, lambda file: torch.jit.save(module, file, _extra_files={METADATA: to_text(metadata)}))


def load_torchscript(path: Path) -> tuple[dict, Callable[..., Sequence[Tensor]]]:
    """Run by TorchScript's interpreter."""
    extra = {METADATA: ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        module = torch.jit.load(str(path), map_location="cpu", _extra_files=extra)
    return read_metadata(path, extra[METADATA]), torch.inference_mode()(module.forward)


def write_program(graph: DetectorGraph, metadata: dict, path: Path) -> None:
    """Write an exported program."""
    program = export_program(graph)
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={METADATA: to_text(metadata)})
    write_file(path, lambda file: file.write(content.getbuffer()))


def load_program(path: Path) -> tuple[dict, Callable[..., Sequence[Tensor]]]:
    """Run by PyTorch, operation by operation."""
    extra = {METADATA: ""}
    module = torch.export.load(path, extra_files=extra).module()
    return read_metadata(path, extra[METADATA]), torch.inference_mode()(module)


def read_metadata(path: Path, text: str | bytes) -> dict:
    """The metadata that a file holds.

    Raises:
        UserError: it holds none.
    """
    if not text:
        raise UserError(f"{path}: was not made by python -m enact_common.export: it does not describe itself")
    return json.loads(text)


FORMATS = {
    "onnx": Format(".onnx", write_onnx, load_onnx),
    "torchscript": Format(".pt", write_torchscript, load_torchscript),
    "exported_program": Format(".pt2", write_program, load_program),
}


def load_exported(path: str | Path) -> ExportedDetector:
    """A file of `python -m enact_common.export`, ready to run on the CPU. Its suffix says what it is.

    TorchScript files and exported programs are programs: load those alone that you trust.

    Raises:
        UserError: there is no such file, it is of none of the formats, or its runtime is not installed.
    """
    path = Path(path)
    kind = next((form for form in FORMATS.values() if form.suffix == path.suffix), None)
    if kind is None:
        suffixes = ", ".join(form.suffix for form in FORMATS.values())
        raise UserError(f"{path}: no exported detector by its suffix, there are {suffixes}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        metadata, run = kind.load(path)
    except UserError:
        raise
    except Exception as error:  # each runtime has its own, for each kind of damage
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: cannot be loaded ({first[:200]}); export it again") from error
    return ExportedDetector(metadata, run)


def quantize(source: Path, path: Path) -> None:
    """Write an ONNX file again with 8-bit weights in its matrix products; activations are quantized as it runs.

    Weights are unsigned, as activations are. ONNX Runtime multiplies unsigned activations by signed weights with an
    instruction that adds two products in 16 bits (vpmaddubsw), where they saturate: on a CPU without VNNI the same file
    then gives other boxes. Its kernel for unsigned weights widens to 16 bits first and adds in 32, on every CPU.

    ENACT's scores stay float32, since they are no matrix product: a rounded score would move the clusters' borders.

    Raises:
        UserError: ONNX Runtime or ONNX is not installed.
    """
    onnx = needed("onnx", "--quantize")
    quantization = needed("onnxruntime.quantization", "--quantize")
    model = onnx.load(source)
    (metadata,) = (prop.value for prop in model.metadata_props if prop.key == METADATA)
    with tempfile.TemporaryDirectory() as folder, quiet():
        made = Path(folder) / "int8.onnx"
        quantization.quantize_dynamic(
            model,
            made,
            weight_type=quantization.QuantType.QUInt8,
            per_channel=True,
            op_types_to_quantize=QUANTIZED,
        )
        model = onnx.load(made)
    save_onnx(onnx, model, json.loads(metadata) | {"quantized": True}, path)
