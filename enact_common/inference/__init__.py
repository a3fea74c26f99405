"""Load a trained detector in one call, and look inside it."""

from enact_common.inference.detector import Detections, LoadedDetector, load_detector

__all__ = ["Detections", "LoadedDetector", "load_detector"]
