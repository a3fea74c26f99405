"""The study's data sets: drawn images, or frozen features of photographs, made once and kept in a file."""

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

from enact_common.study.features import with_features
from enact_common.study.images import TRAIN, VAL, Images, Shapes, draw_images
from enact_common.study.photographs import Pasted, Photographs, paste_images, read_photographs
from enact_common.utils.errors import UserError
from enact_common.utils.files import read_tensors, write_atomically

Source = Shapes | Photographs | Pasted


def keep(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file of the study atomically, and create its folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write, sync=False)


def load_images(source: Source, cache: Path) -> dict[str, Images]:
    """Return both splits of a data set, by `TRAIN` and `VAL`: drawn images, or frozen features of photographs.

    They are cached in a file in the folder `cache`.

    Raises:
        UserError: a real data set is missing, or the cached file is damaged or of another preset.
    """
    path = cache / f"{source.name}.pt"
    if not path.is_file():
        made = {part: vars(make_images(source, part)) for part in (TRAIN, VAL)}
        keep(path, lambda file: torch.save((str(source), made), file))
    made_from, made = read_tensors(path, "the study's images: remove the file to make them again")
    if made_from != str(source):
        raise UserError(f"{path}: contains images of another preset; remove it, or choose another --output_dir")
    return {part: Images(**content) for part, content in made.items()}


def make_images(source: Source, part: str) -> Images:
    """Return one split of a data set."""
    if isinstance(source, Shapes):
        return draw_images(source, part)
    return with_features((paste_images if isinstance(source, Pasted) else read_photographs)(source, part))
