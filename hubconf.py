"""The detectors for `torch.hub`: `torch.hub.load(CHECKOUT, "detr_resnet50_enact", source="local")`.

`enact_common.hub` builds them and lists their names.
"""

from enact_common.hub import ENTRIES as _ENTRIES

# Import names, not package names.
dependencies = ["torch", "torchvision", "numpy", "scipy", "pycocotools", "cv2", "PIL", "tqdm", "yaml"]

globals().update(_ENTRIES)
