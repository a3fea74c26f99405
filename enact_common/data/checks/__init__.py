"""What is in a data set, and what is wrong with it: `python -m enact_common.data.checks DATA`."""
