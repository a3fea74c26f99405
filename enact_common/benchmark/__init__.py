"""What the models of this project cost, and what ENACT saves, measured on one's own machine.

    python -m enact_common.benchmark table      the published table's models: memory, time, operations
    python -m enact_common.benchmark scaling    one attention layer by the size of the map
    python -m enact_common.benchmark pipeline   the data loader, and how long training waits for it
    python -m enact_common.benchmark rowcol     the sums of Anchor DETR's attention

docs/benchmarks.md says how each is measured.
"""
