"""Export detectors to other runtimes: ONNX, TorchScript and PyTorch's exported programs.

`python -m enact_common.export CHECKPOINT --format onnx` writes a file, and `load_exported` runs it. docs/use/export.md
describes the inputs and outputs.
"""

from enact_common.export.formats import ExportedDetector, load_exported

__all__ = ["ExportedDetector", "load_exported"]
