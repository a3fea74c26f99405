"""Drawing of detections, segments and plots, with fonts that cover the texts' characters."""
