"""Detect in images and videos with a trained detector: pictures with boxes, and their numbers in COCO's format.

`python -m enact_common.predict --checkpoint CKPT IMAGE_OR_FOLDER_OR_VIDEO ... --output_dir DIR`. The detector, its
classes and its settings come from the checkpoint (`enact_common.inference.detector.load_detector`).
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from enact_common.cli.program import program
from enact_common.cli.types import HelpFormatter, fraction
from enact_common.data.images import Found, image_suffixes, search
from enact_common.drawing.detections import draw_detections
from enact_common.drawing.panoptic import draw_panoptic
from enact_common.evaluation.panoptic import FOLDER, PanopticEvaluator, check_results_folder
from enact_common.inference.detector import THRESHOLD, Detections, LoadedDetector, as_pixels, load_detector
from enact_common.inference.introspection import SHOWN, check_kinds, write_introspection
from enact_common.models.segmentation import PostProcessPanoptic, encode_masks
from enact_common.utils.errors import UserError, exit_status
from enact_common.utils.files import check_no_folder, make_folder, write_file, writing
from enact_common.utils.signals import interruption, uninterrupted

# What a folder is searched for beside images. Files that are named themselves may be called anything.
VIDEO_SUFFIXES = frozenset(".3gp .avi .flv .m4v .mkv .mov .mp4 .mpeg .mpg .ogv .webm .wmv".split())
# Those that store how many frames they have. Of others OpenCV takes the longest track's duration times the frame rate:
# a guess, and too high where the sound is longer.
COUNTED_SUFFIXES = frozenset(".3gp .avi .m4v .mov .mp4".split())
# Pictures of these stay JPEG; all others become PNG.
JPEG_SUFFIXES = frozenset(".jfif .jpe .jpeg .jpg".split())
# Little is lost, and coloured text keeps sharp edges.
JPEG_OPTIONS = {"quality": 95, "subsampling": 0}

PREDICTIONS = "predictions.json"

# Frames a second of a video that does not say.
USUAL_RATE = 25.0
# MPEG-4 gives times as multiples of 1 / n of a second, n up to this.
FINEST_TIME = 65535


class SkippedError(Exception):
    """An input cannot be read, or its video not be written. The message names it; the others go on."""


@dataclass(frozen=True)
class Input:
    """A file to detect in.

    Attributes:
        path: of the file, as it was named or found.
        picture: what will be written.
    """

    path: Path
    picture: Path

    @property
    def is_video(self) -> bool:
        """Whether it is read frame by frame."""
        return is_video(self.path)


@dataclass
class Tally:
    """What was done so far, for `predictions.json` and the last line.

    Attributes:
        entries: COCO's results format, with `width`, `height`, `file_name`, of videos `frame`, and of models with masks
            `segmentation`.
        images, videos, frames: how many were read; frames are those of the videos.
        panoptic: the segments of panoptic models' images; None of other models.
        categories: of the segments, in COCO's panoptic format.
        pictures: COCO's entries of the images and frames with segments.
        skipped, incomplete: files that could not be read at all, or whose video could not be written, and videos that
            could not be read to their end.
        others: files in folders that are neither images nor videos.
        next_id: the image id that comes next, from 1.
    """

    panoptic: PanopticEvaluator | None = None
    categories: list[dict] = field(default_factory=list)
    entries: list[dict] = field(default_factory=list)
    pictures: list[dict] = field(default_factory=list)
    images: int = 0
    videos: int = 0
    frames: int = 0
    skipped: int = 0
    incomplete: int = 0
    others: int = 0
    next_id: int = 1

    def add(self, found: Detections, size: tuple[int, int], path: Path, frame: int | None = None) -> None:
        """Take the detections of an image, or of a frame of a video, under the next image id.

        Args:
            found: the detections.
            size: (height, width) in pixels that they refer to.
            path: of the image or video.
            frame: number, from 0; None for an image.
        """
        height, width = size
        where = {"width": width, "height": height, "file_name": path.as_posix()}
        where |= {} if frame is None else {"frame": frame}
        corners = found.boxes.double()
        boxes = torch.cat((corners[:, :2], corners[:, 2:] - corners[:, :2]), dim=1).tolist()  # x, y, width, height
        masks = [{}] * len(found)
        if found.masks is not None and len(found):
            masks = [{"segmentation": code} for code in encode_masks(found.masks)]
        # Rounded as `results.json` of an evaluation is.
        self.entries += [
            {
                "image_id": self.next_id,
                "category_id": category,
                "bbox": [round(side, 2) for side in box],
                "score": round(score, 5),
                **mask,
                **where,
            }
            for category, box, score, mask in zip(found.category_ids, boxes, found.scores.tolist(), masks, strict=True)
        ]
        if self.panoptic is not None:
            self.panoptic.update([self.next_id], [vars(found.panoptic)])
            self.pictures.append({"id": self.next_id, **where})
        self.next_id += 1

    def write(self, output_dir: Path) -> None:
        """Write the entries as JSON, whole or not at all, and what there is of segments in COCO's panoptic format."""
        write_file(output_dir / PREDICTIONS, lambda file: file.write(json.dumps(self.entries).encode()), sync=False)
        if self.panoptic is not None:
            self.panoptic.write_results(output_dir / FOLDER, self.pictures, self.categories)

    def summary(self, output_dir: Path) -> str:
        """One line that says what was done."""
        parts = [counted(self.images, "image")]
        if self.videos:
            parts.append(f"{counted(self.videos, 'video')} ({counted(self.frames, 'frame')})")
        parts += [counted(len(self.entries), "detection"), f"{self.skipped + self.others} skipped"]
        if self.incomplete:
            parts.append(f"{self.incomplete} incomplete")
        written = f"pictures and {PREDICTIONS}" if self.panoptic is None else f"pictures, {PREDICTIONS} and {FOLDER}"
        return f"{', '.join(parts)}; {written} in {output_dir}"


def counted(count: int, noun: str) -> str:
    """A number of things, in words."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program("enact_common.predict"), description=__doc__.splitlines()[0], formatter_class=HelpFormatter
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT",
        help="image, video, or folder, which is searched with its sub-folders, linked ones included, in the order of "
        "the names; hidden files and the output folder are left out",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint", required=True, metavar="CKPT",
        help="trained detector: a path, or an https URL with the file's SHA-256 (8 digits of it or more) in the file's "
        "name, name-HASH.pth, or at its end, #sha256=HASH; of this project, ENACT's authors or the original "
        "repositories",
    )  # fmt: skip
    parser.add_argument(
        "--output_dir", required=True, metavar="DIR",
        help=f"for the pictures, in sub-folders as the inputs are, and {PREDICTIONS}: COCO's results format (boxes x, "
        "y, width, height in pixels of the upright image; masks as run-length codes), with that image's width and "
        "height, file_name and, of videos, frame, from 0; "
        "image_id counts the images and frames in the order of the inputs, from 1, those that cannot be read and those "
        f"without detections included; of panoptic models also {FOLDER}: COCO's panoptic format, JSON and PNG files, "
        "with the same image_id",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", type=fraction, metavar="SCORE",
        help=f"least score of a detection, and of a panoptic model's segment, 0 to 1 (default: {THRESHOLD}; of "
        f"panoptic models {PostProcessPanoptic.THRESHOLD})",
    )  # fmt: skip
    parser.add_argument(
        "--no_exif", action="store_true",
        help="take photos as their pixels are stored, as training does; default: upright, as viewers show them, by the "
        "orientation in their EXIF data, and boxes refer to the upright image",
    )  # fmt: skip
    parser.add_argument("--device", help="cuda, cuda:1, cpu; default: a GPU where there is one")
    parser.add_argument(
        "--dilation", action=argparse.BooleanOptionalAction, default=None,
        help="whether the backbone is dilated (DC5), for files of weights alone, which do not say; default: as the "
        "checkpoint says, else as the variant's published model",
    )  # fmt: skip
    parser.add_argument(
        "--show", nargs="+", choices=SHOWN, default=(), metavar="KIND",
        help=f"of each image, also draw what goes on inside: {', '.join(SHOWN)}; not for videos; needs matplotlib; "
        "default: nothing",
    )  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: its words; None for the process's own.

    Returns:
        the exit status: 0; 1 where a file was skipped, or could not be read to its end; 2 for what the user can mend;
        130 after Ctrl-C, 143 after SIGTERM.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    return exit_status(parser.prog, lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Check everything, then detect, draw and write.

    Args:
        args: parsed arguments.

    Returns:
        the exit status, as `main` says.

    Raises:
        UserError: something is wrong that the user can mend. All but a full disk is found before any work starts.
    """
    output_dir = Path(args.output_dir)
    kinds = tuple(dict.fromkeys(args.show))
    files, passed_over = find_files(args.inputs, output_dir)
    inputs = plan(files, output_dir, kinds)
    check_no_folder(output_dir / PREDICTIONS)
    if kinds and all(item.is_video for item in inputs):
        raise UserError("--show: there are only videos, and it is for images; leave it out")
    if kinds:
        check_matplotlib()
    flags = {} if args.dilation is None else {"dilation": args.dilation}
    detector = load_detector(args.checkpoint, args.device, args.threshold, **flags)
    if kinds:
        check_kinds(detector, kinds)
    tally = new_tally(detector, inputs, output_dir)
    for name, found in passed_over.items():
        print(found.passed_over(f"{name}: ", "\n"), end="", file=sys.stderr)
        tally.skipped += len(found.unreadable()) + len(found.closed)
        tally.others += len(found.others) - len(found.unreadable())
    for folder in sorted({output_dir, *(item.picture.parent for item in inputs)}):
        make_folder(folder)

    stopped = None
    try:
        for item in tqdm(inputs, unit="file", disable=None):
            try:
                if item.is_video:
                    predict_video(detector, item, tally)
                else:
                    predict_image(detector, item, kinds, tally, not args.no_exif)
            except SkippedError as error:
                tally.skipped += 1
                # What is skipped has its number all the same: numbers do not depend on it.
                tally.next_id += 1
                tqdm.write(f"skipped: {error}", file=sys.stderr)
    except KeyboardInterrupt as error:
        stopped = error
    finally:
        with uninterrupted():
            tally.write(output_dir)
    status = int(tally.skipped + tally.incomplete > 0)
    if stopped:
        status, text = interruption(stopped)
        print(f"{text}: what was done so far is kept", file=sys.stderr)
    print(tally.summary(output_dir))
    return status


def new_tally(detector: LoadedDetector, inputs: Sequence[Input], output_dir: Path) -> Tally:
    """A tally of nothing yet, of a panoptic model with room for its segments.

    Raises:
        UserError: in the place of the segments' folder is something else, or would be.
    """
    if detector.things is None:
        return Tally()
    folder = output_dir / FOLDER
    check_results_folder(folder)
    inside = next((item for item in inputs if folder in item.picture.parents), None)
    if inside:
        raise UserError(
            f"{inside.path}: its picture would be {inside.picture}, in the folder of the panoptic results; name the "
            "file itself, or its folder, as an input"
        )
    names = detector.label_map.names
    categories = [
        {"id": i, "name": names[label], "isthing": int(label in detector.things)}
        for i, label in detector.label_map.labels().items()
    ]
    return Tally(panoptic=PanopticEvaluator(), categories=categories)


def is_video(path: Path) -> bool:
    """Whether a file is a video, by its suffix."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def find_files(names: Sequence[str], output_dir: Path) -> tuple[list[tuple[Path, Path]], dict[str, Found]]:
    """The files that the command line names, folders searched; a file that is named twice is taken once.

    Args:
        names: of files and folders.
        output_dir: not searched where it lies in one of the folders.

    Returns:
        of each file its path, and its place below the folder that was named, or its name; and what each folder that
        was named holds.

    Raises:
        UserError: one does not exist, or a folder has nothing in it.
    """
    found: dict[Path, tuple[Path, Path]] = {}
    searched: dict[str, Found] = {}
    for name in names:
        root = Path(name)
        if root.is_dir():
            searched[name] = search(root, image_suffixes() | VIDEO_SUFFIXES, output_dir.resolve())
            files = [(path, path.relative_to(root)) for path in searched[name].files]
            if not files:
                raise UserError(
                    f"{name}: no image or video in this folder, by their suffixes; name files of other suffixes "
                    f"themselves (the output folder is not searched{searched[name].passed_over('; ')})"
                )
        elif root.exists():
            files = [(root, Path(root.name))]
        else:
            raise UserError(f"{name}: no such file or folder")
        for path, place in files:
            found.setdefault(path.resolve(), (path, place))
    return list(found.values()), searched


def plan(files: Sequence[tuple[Path, Path]], output_dir: Path, kinds: Sequence[str] = ()) -> list[Input]:
    """Give each file a picture of its own: where two would have one name, the later ones are numbered.

    Names are compared without suffixes and case, so that they remain apart on any disk, and so do the pictures that
    `--show` adds.

    Args:
        files: paths, and places below `output_dir`.
        output_dir: where the pictures go.
        kinds: of `--show`.

    Raises:
        UserError: a picture would take the place of an input or of a folder.
    """
    inputs, taken = [], set()
    originals = {path.resolve() for path, _ in files}
    for path, place in files:
        number = 1
        while True:
            stem = place.stem + (f"_{number}" if number > 1 else "")
            names = {(place.parent / name).as_posix().casefold() for name in (stem, *(f"{stem}_{k}" for k in kinds))}
            if not names & taken:
                break
            number += 1
        taken |= names
        suffix = ".mp4" if is_video(path) else ".jpg" if path.suffix.lower() in JPEG_SUFFIXES else ".png"
        picture = output_dir / place.parent / (stem + suffix)
        for written in (picture, *(picture.with_name(f"{stem}_{kind}.png") for kind in kinds)):
            check_no_folder(written)
        if picture.resolve() in originals:
            raise UserError(
                f"--output_dir {output_dir}: {picture} is an input and would be lost; choose another folder"
            )
        inputs.append(Input(path, picture))
    return inputs


def check_matplotlib() -> None:
    """Refuse `--show` where there is nothing to draw it with.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("--show needs matplotlib: pip install 'enact-detection[plots]'") from error


def draw(detector: LoadedDetector, pixels: Tensor, found: Detections, enlarge: bool = True) -> np.ndarray:
    """An image uint8 (3, height, width) with its detections, or its segments: uint8 (height, width, 3)."""
    if found.panoptic is not None:
        # A panoptic model's labels are its category ids.
        names = detector.label_map.names
        return draw_panoptic(pixels, found.panoptic.id_map, found.panoptic.segments, names, enlarge)
    return draw_detections(pixels, found.boxes, found.names, found.scores, found.labels, enlarge, found.masks)


def predict_image(detector: LoadedDetector, item: Input, kinds: Sequence[str], tally: Tally, exif: bool = True) -> None:
    """Detect in an image, turned as EXIF says unless `exif` is False, and write its picture.

    Raises:
        SkippedError: it cannot be read.
    """
    try:
        pixels = as_pixels(item.path, exif)
    except UserError as error:
        raise SkippedError(str(error)) from error
    found = detector.detect(pixels)
    drawn = Image.fromarray(draw(detector, pixels, found))
    options = {"format": "JPEG", **JPEG_OPTIONS} if item.picture.suffix == ".jpg" else {"format": "PNG"}
    with uninterrupted():
        write_file(item.picture, lambda file: drawn.save(file, **options), sync=False)
        if kinds:
            write_introspection(detector, pixels, found, kinds, item.picture.parent, item.picture.stem)
        tally.images += 1
        tally.add(found, pixels.shape[-2:], item.path)


def predict_video(detector: LoadedDetector, item: Input, tally: Tally) -> None:
    """Detect in each frame of a video, and write a video of the same size and frame rate.

    After Ctrl-C or SIGTERM, the frames that are done stay, as a whole video. A video that ends before the number of
    frames that it stores is named and counted.

    Raises:
        SkippedError: not one frame can be read, or none be written.
    """
    reader = cv2.VideoCapture(str(item.path))
    promised, rate = reader.get(cv2.CAP_PROP_FRAME_COUNT), reader.get(cv2.CAP_PROP_FPS)
    # Some containers say neither: the values are then 0, below 0 or not a number.
    promised = int(promised) if 0 < promised < math.inf else None
    read = 0
    try:
        with VideoFile(item.picture, rate if 0 < rate < math.inf else USUAL_RATE) as video:
            for pixels in tqdm(frames(reader), item.path.name, promised, unit="frame", leave=False, disable=None):
                found = detector.detect(pixels)
                picture = draw(detector, pixels, found, enlarge=False)
                with uninterrupted():
                    video.write(picture)
                    tally.add(found, pixels.shape[-2:], item.path, read)
                    read += 1
    finally:
        reader.release()
        tally.frames += read
        tally.videos += read > 0
    if not read:
        raise SkippedError(f"{item.path}: not a video that can be read")
    if promised and read < promised and item.path.suffix.lower() in COUNTED_SUFFIXES:
        tally.incomplete += 1
        tqdm.write(f"incomplete: {item.path}: ends after {read} of its {promised} frames", file=sys.stderr)


def frames(reader: cv2.VideoCapture) -> Iterator[Tensor]:
    """The frames of an open video, each RGB uint8 (3, height, width)."""
    while True:
        complete, bgr = reader.read()
        if not complete:
            return
        yield torch.from_numpy(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)).permute(2, 0, 1).contiguous()


def writable_rate(rate: float) -> float:
    """The nearest rate, in frames a second, that MPEG-4 can have with up to three decimals."""
    rate = min(max(rate, 0.01), FINEST_TIME)
    return round(rate, min(3, int(math.log10(FINEST_TIME / rate))))


class VideoFile:
    """A video (MPEG-4 in mp4) that is written beside its path and renamed when it is complete.

    As a context manager: it is kept when the block ends or is interrupted (Ctrl-C, SIGTERM), and removed after other
    errors.

    Args:
        path: the file to make or replace.
        rate: frames a second, above 0; the video's is the nearest that it can have.
    """

    def __init__(self, path: Path, rate: float):
        self.path = path
        self.rate = writable_rate(rate)
        # OpenCV goes by the suffix.
        self._partial = path.with_name(f"{path.stem}.partial{path.suffix}")
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)

    def __enter__(self) -> "VideoFile":
        return self

    def write(self, frame: np.ndarray) -> None:
        """Add a frame, RGB uint8 (height, width, 3). The first one's size, made even, is that of the video.

        Raises:
            SkippedError: OpenCV cannot write such a file here.
        """
        height, width = frame.shape[:2]
        # The codec takes even sides alone: the last column and row stand twice.
        frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._writer is None:
            self._size = (frame.shape[1], frame.shape[0])
            self._writer = cv2.VideoWriter(str(self._partial), cv2.VideoWriter_fourcc(*"mp4v"), self.rate, self._size)
            if not self._writer.isOpened():
                raise SkippedError(
                    f"{self.path}: cannot be written as MPEG-4 of {self._size[0]} x {self._size[1]} pixels: OpenCV "
                    "finds no room or no encoder here, or a side is longer than 8,191"
                )
        bgr = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
        # A frame of another size would be passed over without a word.
        self._writer.write(bgr if bgr.shape[1::-1] == self._size else cv2.resize(bgr, self._size))

    def __exit__(self, kind, error, traceback) -> None:
        if self._writer is None:
            return
        with uninterrupted():
            self._writer.release()
            try:
                if kind is None or issubclass(kind, KeyboardInterrupt):
                    with writing(self.path):
                        os.replace(self._partial, self.path)
            finally:
                self._partial.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
