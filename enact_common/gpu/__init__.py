"""The run that shows what there is to know on a GPU, and the page of its results."""
