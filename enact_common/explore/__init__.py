"""Look at a detector in a browser: detections, clusters, attention, and what ENACT's settings change."""
