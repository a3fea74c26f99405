"""EXIF's orientation: how viewers turn a photo whose pixels are stored as the camera was held.

Detection in photos turns them (`enact_common.predict`, `load_detector`). Training, checks and COCO's evaluation do not:
COCO's boxes refer to the pixels as stored.
"""

from pathlib import Path

from torch import Tensor

from enact_common.data.images import decode_bytes, open_image, read_file

# EXIF's tag for how to turn the pixels, 1 for not at all.
EXIF_ORIENTATION = 0x0112

# Orientations whose rows are stored as columns, and the axes of (3, height, width) that are flipped after that.
TRANSPOSED = (5, 6, 7, 8)
FLIPPED = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}


def exif_orientation(source: Path | bytes) -> int:
    """How viewers turn an image, its path or its encoded bytes: 1 for not at all, to 8.

    A TIFF's is always 1: there it is a part of the format, which every reader applies.
    """
    try:
        with open_image(source) as image:
            orientation = 1 if image.format == "TIFF" else image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # what damaged metadata raises has no end, and decoding has shown that the pixels are there
        return 1
    return orientation if orientation in range(1, 9) else 1


def decode_upright(path: Path) -> Tensor:
    """An image file as viewers show it: RGB, uint8 (3, height, width), turned as EXIF says.

    Raises:
        UserError: the file is missing, or is no image that can be read whole.
    """
    encoded = read_file(path)
    pixels = decode_bytes(encoded, path)  # (3, height, width), as stored
    orientation = exif_orientation(encoded.tobytes())
    if orientation in TRANSPOSED:
        pixels = pixels.transpose(1, 2)
    return pixels.flip(FLIPPED.get(orientation, ())).contiguous()
