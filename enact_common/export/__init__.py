"""Trained detectors as files for other runtimes: ONNX, TorchScript and PyTorch's exported programs.

`python -m enact_common.export CHECKPOINT --format onnx` writes one; `load_exported` runs it. docs/use/export.md lists
the inputs and outputs of such a file.
"""

from enact_common.export.formats import ExportedDetector, load_exported

__all__ = ["ExportedDetector", "load_exported"]
