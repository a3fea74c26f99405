"""The detectors for `torch.hub`: `torch.hub.load(CHECKOUT, "detr_resnet50_enact", source="local")`.

`enact_common.hub` says which there are, and builds them.
"""

from enact_common.hub import ENTRIES as _ENTRIES

# As they are imported.
dependencies = ["torch", "torchvision", "numpy", "scipy", "pycocotools", "cv2", "PIL", "tqdm", "yaml"]

globals().update(_ENTRIES)
