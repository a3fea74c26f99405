"""EXIF orientation: how viewers rotate a photo whose pixels are stored as the camera was held.

Detection in photos applies it (`enact_common.predict`, `load_detector`). Training, checks and COCO's evaluation do not:
COCO's boxes refer to the pixels as stored.
"""

from pathlib import Path

from torch import Tensor

from enact_common.data.images import decode_bytes, open_image, read_file

# The EXIF tag of the orientation; 1 is upright.
EXIF_ORIENTATION = 0x0112

# Orientations that swap rows and columns, and the axes of (3, height, width) to flip after that.
TRANSPOSED = (5, 6, 7, 8)
FLIPPED = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}


def exif_orientation(source: Path | bytes) -> int:
    """The EXIF orientation of an image file or its encoded bytes, 1 (upright) to 8.

    Always 1 for TIFF: there the orientation is part of the format, and every reader applies it.
    """
    try:
        with open_image(source) as image:
            orientation = 1 if image.format == "TIFF" else image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # damaged metadata can raise any error, and the pixels have been decoded without one
        return 1
    return orientation if orientation in range(1, 9) else 1


def decode_upright(path: Path) -> Tensor:
    """An image file as viewers show it, rotated by its EXIF orientation: RGB, uint8 (3, height, width).

    Raises:
        UserError: the file is missing, or is not a complete image.
    """
    encoded = read_file(path)
    pixels = decode_bytes(encoded, path)  # (3, height, width), as stored
    orientation = exif_orientation(encoded.tobytes())
    if orientation in TRANSPOSED:
        pixels = pixels.transpose(1, 2)
    return pixels.flip(FLIPPED.get(orientation, ())).contiguous()
