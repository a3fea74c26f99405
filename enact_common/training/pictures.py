"""Pictures of an evaluation for trackers: annotated objects on the left, detections on the right."""

import numpy as np
from PIL import Image

from enact_common.data.images import decode_image
from enact_common.drawing.detections import draw_detections
from enact_common.evaluation.coco import CocoBoxEvaluator
from enact_common.training.setup import Data
from enact_common.utils.errors import UserError

# The first images of the validation set are drawn.
PICTURES = 4

# Least score of a drawn detection.
SCORE = 0.3

# Longest side of a picture, in pixels.
LONGEST = 1280


def evaluation_pictures(data: Data, evaluator: CocoBoxEvaluator) -> dict[str, np.ndarray]:
    """Return pictures of the first validation images, without images that cannot be read.

    RGB uint8 (height, width, 3), by `pictures/` and the image's file name without suffix.
    """
    names, labels = data.label_map.names, data.label_map.labels()
    pictures = {}
    for image_id, file_name in list(zip(data.val_set.image_ids, data.val_set.file_names, strict=True))[:PICTURES]:
        try:
            pixels = decode_image(data.val_set.image_folder / file_name)
        except UserError:
            continue
        truth = [a for a in data.ground_truth.imgToAnns[image_id] if not a["iscrowd"]]
        found = evaluator.of_image(image_id)
        found = found[found[:, 5] >= SCORE]
        halves = []
        for boxes, scores, categories in (
            (np.array([a["bbox"] for a in truth]).reshape(-1, 4), None, [a["category_id"] for a in truth]),
            (found[:, 1:5], found[:, 5], found[:, 6].astype(int).tolist()),
        ):
            numbers = [labels[category] for category in categories]
            corners = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1)
            halves.append(draw_detections(pixels, corners, [names[i] for i in numbers], scores, numbers))
        picture = Image.fromarray(np.concatenate(halves, axis=1))
        picture.thumbnail((LONGEST, LONGEST))
        pictures[f"pictures/{file_name.rsplit('.', 1)[0]}"] = np.asarray(picture)
    return pictures
