"""What the detectors of this project share; the names here are for users' own code."""

from enact_common.attention import EnactSelfAttention, EntropyClustering, plug_in
from enact_common.inference import Detections, LoadedDetector, load_detector
from enact_common.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from enact_common.utils.errors import UserError
from enact_common.variants import load_variant

__all__ = [
    "Detections",
    "EnactSelfAttention",
    "EntropyClustering",
    "LoadedDetector",
    "NestedTensor",
    "UserError",
    "load_detector",
    "load_variant",
    "nested_tensor_from_tensor_list",
    "plug_in",
]
