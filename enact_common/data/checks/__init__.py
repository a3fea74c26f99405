"""Report the contents and faults of a data set: `python -m enact_common.data.checks DATA`."""
