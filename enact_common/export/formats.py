"""Write and run each export format.

Each file holds the graph, the weights and the metadata (`enact_common.export.graph.describe`) as JSON.
"""

import contextlib
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from enact_common.export.graph import GREATEST_BATCH, LEAST_SIDE, DetectorGraph, to_text
from enact_common.models.scripting import traced
from enact_common.utils import extras
from enact_common.utils.device import TORCH_VERSION
from enact_common.utils.errors import UserError
from enact_common.utils.files import write_file

# Key of the metadata in all formats.
METADATA = "enact.json"

# Least tested PyTorch for `torch.export`: earlier releases refuse data-dependent sizes, or make them constant.
EXPORTING = (2, 15)

# Quantize only the transformer's matrix products: on CPUs, quantized convolutions are slower than float ones, and the
# backbone's activations lose more accuracy.
QUANTIZED = ["MatMul", "Gemm"]


@dataclass(frozen=True)
class Format:
    """An export format with its file suffix.

    Attributes:
        write: takes (graph, metadata, path), traces the graph and writes it; may raise a UserError.
        load: takes a path and returns (metadata, function from input tensors to output tensors).
    """

    suffix: str
    write: Callable[[DetectorGraph, dict, Path], None]
    load: Callable[[Path], tuple[dict, Callable[..., Sequence[Tensor]]]]


class ExportedDetector:
    """An exported detector, loaded into its runtime on the CPU.

    Attributes:
        metadata: the file's description of its inputs, outputs and model.
    """

    def __init__(self, metadata: dict, run: Callable[..., Sequence[Tensor]]):
        self.metadata = metadata
        self._run = run

    def __call__(self, images: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Return the outputs by name. The metadata describe the inputs; pass `mask` only if the file takes one."""
        inputs = (images,) if mask is None else (images, mask)
        return dict(zip(self.metadata["outputs"], self._run(*inputs), strict=True))


needed = partial(extras.needed, extra="export")


@contextlib.contextmanager
def silenced(name: str | None = None) -> Iterator[None]:
    """Silence Python warnings, and log records below ERROR from the logger `name` (default: the root logger)."""
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
    """Trace the graph into PyTorch's exported program."""
    if TORCH_VERSION < EXPORTING:
        tried = ".".join(map(str, EXPORTING))
        raise UserError(
            f"PyTorch {torch.__version__} is too old for --format onnx and exported_program: install {tried} or newer, "
            "or pass --format torchscript"
        )
    interface = graph.interface
    dims: dict[int, Dim] = {}
    if interface.batch is None:
        dims[0] = Dim("batch", max=GREATEST_BATCH)
    if interface.size is None:
        dims |= {
            axis: Dim(name, min=LEAST_SIDE, max=interface.greatest_side) for axis, name in ((2, "height"), (3, "width"))
        }
    # The mask has no channels.
    shapes = (dims, {axis - (axis > 1): dim for axis, dim in dims.items()})[: len(interface.inputs)]
    # The exporter cannot prove some size comparisons, although they hold for all allowed sizes: check them at run time.
    return torch.export.export(
        graph, interface.example(), dynamic_shapes=shapes, prefer_deferred_runtime_asserts_over_guards=True
    )


def write_onnx(graph: DetectorGraph, metadata: dict, path: Path) -> None:
    """Write an ONNX file with its weights, after `onnx.checker`."""
    onnx = needed("onnx", "--format onnx")
    needed("onnxscript", "--format onnx")
    program = export_program(graph)
    with silenced("onnxscript"):
        names = {"input_names": graph.interface.inputs, "output_names": list(graph.interface.outputs)}
        exported = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    save_onnx(onnx, exported.model_proto, metadata, path)


def save_onnx(onnx: ModuleType, model, metadata: dict, path: Path) -> None:
    """Check and write an ONNX model."""
    onnx.helper.set_model_props(model, {METADATA: to_text(metadata)})
    onnx.checker.check_model(model)
    write_file(path, lambda file: file.write(model.SerializeToString()))


def load_onnx(path: Path) -> tuple[dict, Callable[..., Sequence[Tensor]]]:
    """Load an ONNX file into ONNX Runtime, with as many threads as PyTorch."""
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
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript's deprecation
        write_file(path, lambda file: torch.jit.save(module, file, _extra_files={METADATA: to_text(metadata)}))


def load_torchscript(path: Path) -> tuple[dict, Callable[..., Sequence[Tensor]]]:
    """Load a file into TorchScript's interpreter."""
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
    """Load an exported program, which PyTorch runs eagerly."""
    extra = {METADATA: ""}
    module = torch.export.load(path, extra_files=extra).module()
    return read_metadata(path, extra[METADATA]), torch.inference_mode()(module)


def read_metadata(path: Path, text: str | bytes) -> dict:
    """Parse a file's metadata."""
    if not text:
        raise UserError(f"{path}: has no metadata of this project; export it with python -m enact_common.export")
    return json.loads(text)


FORMATS = {
    "onnx": Format(".onnx", write_onnx, load_onnx),
    "torchscript": Format(".pt", write_torchscript, load_torchscript),
    "exported_program": Format(".pt2", write_program, load_program),
}


def load_exported(path: str | Path) -> ExportedDetector:
    """Load a file of `python -m enact_common.export` on the CPU. The suffix selects the format.

    TorchScript files and exported programs can run code: load only files that you trust.

    Raises:
        UserError: the file is missing or damaged, its suffix is unknown, or its runtime is not installed.
    """
    path = Path(path)
    kind = next((form for form in FORMATS.values() if form.suffix == path.suffix), None)
    if kind is None:
        suffixes = ", ".join(form.suffix for form in FORMATS.values())
        raise UserError(f"{path}: unknown suffix for an exported detector; use one of {suffixes}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        metadata, run = kind.load(path)
    except UserError:
        raise
    except Exception as error:  # each runtime raises different errors for damaged files
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: cannot be loaded ({first[:200]}); export it again") from error
    return ExportedDetector(metadata, run)


def quantize(source: Path, path: Path) -> None:
    """Rewrite an ONNX file with 8-bit weights in its matrix products. Activations are quantized at run time.

    Weights are unsigned, like activations. For signed weights, ONNX Runtime uses an instruction that adds two products
    in 16 bits (vpmaddubsw) and saturates: on a CPU without VNNI, the same file gives other boxes. Its kernel for
    unsigned weights widens to 16 bits and adds in 32 bits on every CPU.

    ENACT's scores are not a matrix product and stay float32: rounded scores would move the clusters' borders.

    Raises:
        UserError: ONNX Runtime or ONNX is not installed.
    """
    onnx = needed("onnx", "--quantize")
    quantization = needed("onnxruntime.quantization", "--quantize")
    model = onnx.load(source)
    (metadata,) = (prop.value for prop in model.metadata_props if prop.key == METADATA)
    with tempfile.TemporaryDirectory() as folder, silenced():
        quantized = Path(folder) / "int8.onnx"
        kind = quantization.QuantType.QUInt8
        quantization.quantize_dynamic(
            model, quantized, weight_type=kind, per_channel=True, op_types_to_quantize=QUANTIZED
        )
        model = onnx.load(quantized)
    save_onnx(onnx, model, json.loads(metadata) | {"quantized": True}, path)
