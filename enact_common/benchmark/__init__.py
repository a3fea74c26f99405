"""What the models of this project cost, and what ENACT saves, measured on one's own machine.

    python -m enact_common.benchmark table      the published table's models: memory, time, operations
    python -m enact_common.benchmark scaling    one attention layer by the size of the map
    python -m enact_common.benchmark pipeline   the data loader, and how long training waits for it
    python -m enact_common.benchmark rowcol     the sums of Anchor DETR's attention
    python -m enact_common.benchmark runtimes   exported to ONNX and others: time
    python -m enact_common.benchmark agreement  a trained detector exported: what it loses

docs/results/benchmarks.md says how each is measured, docs/use/export.md how the last two are.
"""
