"""Published weights, and detectors to share: `enact weights`, `EnactDetector`."""
