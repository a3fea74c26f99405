"""Trained detectors that come with the package, by name, each with an image to try it on."""

from pathlib import Path

# Folder of NAME.pth, the checkpoints, and NAME.jpg, the images.
FOLDER = Path(__file__).with_name("bundled")
# docs/results/blood_cells.md tells how it was trained.
BUNDLED = ("blood_cells",)


def bundled_file(checkpoint: str | Path, suffix: str = ".pth") -> Path | None:
    """Return a bundled detector's checkpoint, or its image for the suffix ".jpg".

    None if the checkpoint is none of `BUNDLED`, or a file or folder of its name exists, which is meant then.
    """
    name = str(checkpoint)
    return FOLDER / f"{name}{suffix}" if name in BUNDLED and not Path(name).exists() else None


def images_or_bundled(images: list, checkpoint: str | Path) -> list:
    """Return the images that a command was given; without any, the image of a bundled detector, and say so."""
    sample = bundled_file(checkpoint, ".jpg")
    if images or sample is None:
        return images
    print(f"no image given: using the sample image of {checkpoint}")
    return [sample]
