"""ENACT and the three detectors of this project. This module exports the public names.

Each name is imported on first use: `import enact_common` does not load PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from enact_common.attention import EnactSelfAttention, EntropyClustering, MapTokens, plug_in
    from enact_common.inference import Detections, LoadedDetector, load_detector
    from enact_common.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
    from enact_common.plugged import load_plugged
    from enact_common.utils.errors import UserError
    from enact_common.variants import load_variant
    from enact_common.weights.sharing import EnactDetector

# name: its module
_MODULES = {
    "Detections": "inference",
    "EnactDetector": "weights.sharing",
    "EnactSelfAttention": "attention",
    "EntropyClustering": "attention",
    "LoadedDetector": "inference",
    "MapTokens": "attention",
    "NestedTensor": "nested_tensor",
    "UserError": "utils.errors",
    "load_detector": "inference",
    "load_plugged": "plugged",
    "load_variant": "variants",
    "nested_tensor_from_tensor_list": "nested_tensor",
    "plug_in": "attention",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
