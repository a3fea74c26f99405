"""Measure what the models cost and what ENACT saves, on your machine.

    python -m enact_common.benchmark table      the models of the published table: memory, time, operations
    python -m enact_common.benchmark scaling    one attention layer on feature maps of growing size
    python -m enact_common.benchmark pipeline   the data loader, and how long training waits for it
    python -m enact_common.benchmark rowcol     the row and column sums of Anchor DETR's attention
    python -m enact_common.benchmark runtimes   inference time of models exported to ONNX and TorchScript
    python -m enact_common.benchmark agreement  accuracy that a trained detector loses when exported

docs/results/benchmarks.md describes how each is measured, docs/use/export.md covers the last two.
"""
