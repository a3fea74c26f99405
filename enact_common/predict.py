"""Detect objects in images and videos: write pictures with boxes, and the detections in COCO's results format.

`python -m enact_common.predict --checkpoint CKPT IMAGE_OR_FOLDER_OR_VIDEO ... --output_dir DIR`. The detector, its
classes and its settings come from the checkpoint (`enact_common.inference.detector.load_detector`).
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from enact_common.checkpoints.bundled import BUNDLED, images_or_bundled
from enact_common.cli.program import Parser, program
from enact_common.cli.types import HelpFormatter, fraction, positive_int
from enact_common.data.images import Found, image_suffixes, search
from enact_common.drawing.detections import draw_detections
from enact_common.drawing.panoptic import draw_panoptic
from enact_common.evaluation.panoptic import FOLDER, PanopticEvaluator, check_results_folder
from enact_common.inference.detector import THRESHOLD, Detections, LoadedDetector, as_pixels, load_detector
from enact_common.inference.introspection import SHOWN, check_kinds, check_matplotlib, write_introspection
from enact_common.inference.slicing import OVERLAP, check_sliceable, detect_in_slices
from enact_common.models.segmentation import PostProcessPanoptic, encode_masks
from enact_common.utils.errors import UserError, exit_status
from enact_common.utils.files import check_no_folder, make_folder, write_file, writing
from enact_common.utils.signals import interruption, uninterrupted

# Suffixes of the videos in searched folders. Files given as inputs may have any suffix.
VIDEO_SUFFIXES = frozenset(".3gp .avi .flv .m4v .mkv .mov .mp4 .mpeg .mpg .ogv .webm .wmv".split())
# Formats that store their number of frames. For other formats, OpenCV estimates it from the longest track's duration
# and the frame rate, which is too high if the sound is longer.
COUNTED_SUFFIXES = frozenset(".3gp .avi .m4v .mov .mp4".split())
# Pictures of JPEG inputs stay JPEG; all others become PNG.
JPEG_SUFFIXES = frozenset(".jfif .jpe .jpeg .jpg".split())
# High quality without chroma subsampling, to keep the edges of coloured text sharp.
JPEG_OPTIONS = {"quality": 95, "subsampling": 0}

PREDICTIONS = "predictions.json"

# Frames per second of a video that does not store its frame rate.
USUAL_RATE = 25.0
# MPEG-4 stores times as multiples of 1 / n of a second, with n up to this.
FINEST_TIME = 65535


class SkippedError(Exception):
    """An input cannot be read, or its video cannot be written. The message names the file; the run continues."""


@dataclass(frozen=True)
class Input:
    """An image or video to detect objects in, and the picture or video to write."""

    path: Path
    picture: Path


@dataclass
class Tally:
    """The results and counts so far, for `predictions.json` and the summary line.

    Attributes:
        panoptic: collects the segments of panoptic models; None for other models.
        categories: the segments' categories, in COCO's panoptic format.
        entries: COCO's results format with `width`, `height`, `file_name`; `frame` for videos; and `segmentation` for
            models with a mask head.
        pictures: COCO's image entries for the images and frames with segments.
        images, videos, frames: numbers of images, videos and video frames that were read.
        skipped: number of files that could not be read, or whose video could not be written.
        incomplete: number of videos that could not be read to their end.
        others: number of files in folders that are neither images nor videos.
        next_id: the next image id, from 1.
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

    def add(self, detections: Detections, size: tuple[int, int], path: Path, frame: int | None = None) -> None:
        """Add the detections of an image, or of a video's frame, of (height, width) pixels under the next id."""
        height, width = size
        where = {"width": width, "height": height, "file_name": path.as_posix()}
        where |= {} if frame is None else {"frame": frame}
        corners = detections.boxes.double()
        boxes = torch.cat((corners[:, :2], corners[:, 2:] - corners[:, :2]), dim=1).tolist()  # x, y, width, height
        masks = [{}] * len(detections)
        if detections.masks is not None and len(detections):
            masks = [{"segmentation": code} for code in encode_masks(detections.masks)]
        # Round like the evaluation's `results.json`.
        rows = zip(detections.category_ids, boxes, detections.scores.tolist(), masks, strict=True)
        for category, box, score, mask in rows:
            own = {"bbox": [round(side, 2) for side in box], "score": round(score, 5)}
            self.entries.append({"image_id": self.next_id, "category_id": category, **own, **mask, **where})
        if self.panoptic is not None:
            self.panoptic.update([self.next_id], [vars(detections.panoptic)])
            self.pictures.append({"id": self.next_id, **where})
        self.next_id += 1

    def write(self, output_dir: Path) -> None:
        """Write the entries as JSON, atomically, and any segments in COCO's panoptic format."""
        write_file(output_dir / PREDICTIONS, lambda file: file.write(json.dumps(self.entries).encode()), sync=False)
        if self.panoptic is not None:
            self.panoptic.write_results(output_dir / FOLDER, self.pictures, self.categories)

    def summary(self, output_dir: Path) -> str:
        """The summary line."""
        parts = [counted(self.images, "image")]
        if self.videos:
            parts.append(f"{counted(self.videos, 'video')} ({counted(self.frames, 'frame')})")
        parts += [counted(len(self.entries), "detection"), f"{self.skipped + self.others} skipped"]
        if self.incomplete:
            parts.append(f"{self.incomplete} incomplete")
        written = ["pictures"] if self.images + self.videos else []
        written += [PREDICTIONS] if self.panoptic is None else [PREDICTIONS, FOLDER]
        *others, last = written
        files = f"{', '.join(others)} and {last}" if others else last
        return f"{', '.join(parts)}; {files} in {output_dir}"


def counted(count: int, noun: str) -> str:
    """A count with its noun, in singular or plural."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        prog=program("enact_common.predict"), description=__doc__.splitlines()[0], formatter_class=HelpFormatter
    )
    parser.add_argument(
        "inputs", nargs="*", metavar="INPUT",
        help="image, video or folder; folders are searched with their sub-folders and linked folders, sorted by name, "
        "without hidden files and the output folder; a bundled detector has an image to try it without any",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint", required=True, metavar="CKPT",
        help="checkpoint of this project, ENACT's authors, the original repositories or Hugging Face: a path; a folder "
        "with a config.json; an https URL with the file's SHA-256 (at least 8 digits) in its name, name-HASH.pth, or "
        f"at its end, #sha256=HASH; or a bundled detector: {', '.join(BUNDLED)}",
    )  # fmt: skip
    parser.add_argument(
        "--output_dir", required=True, metavar="DIR",
        help=f"output folder for the pictures, in sub-folders like the inputs, and {PREDICTIONS}: COCO's results "
        "format (boxes x, y, width, height in pixels of the upright image; masks as run-length codes), with the "
        "upright image's width and height, file_name and, for videos, frame, from 0; image_id numbers the images and "
        "frames in input order, from 1, including unreadable ones and those without detections; panoptic models also "
        f"write {FOLDER}: COCO's panoptic format, JSON and PNG files, with the same image_id",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", type=fraction, metavar="SCORE",
        help=f"least score of a detection, and of a panoptic model's segment, 0 to 1 (default: {THRESHOLD}; "
        f"{PostProcessPanoptic.THRESHOLD} for panoptic models)",
    )  # fmt: skip
    parser.add_argument(
        "--slice", type=positive_int, metavar="PIXELS",
        help="also detect in square slices of this side, for small objects in large images; slices overlap by "
        f"{OVERLAP:.0%}%, and boxes found twice are merged; not for masks; default: the whole image only",
    )  # fmt: skip
    parser.add_argument(
        "--no_exif", action="store_true",
        help="keep photos as stored, as training does; default: rotate them upright by their EXIF orientation, as "
        "viewers do; boxes refer to the upright image",
    )  # fmt: skip
    add_detector_flags(parser)
    parser.add_argument(
        "--show", nargs="+", choices=SHOWN, default=(), metavar="KIND",
        help=f"also draw the model's internals for each image, not for videos: {', '.join(SHOWN)}; needs matplotlib; "
        "default: none",
    )  # fmt: skip
    return parser


def add_detector_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how to load a detector, which `detector_from` reads."""
    parser.add_argument("--device", help="cuda, cuda:1, cpu; default: a GPU if there is one")
    parser.add_argument(
        "--dilation", action=argparse.BooleanOptionalAction, default=None,
        help="dilated backbone (DC5), for files with only weights; default: the checkpoint's setting, else the "
        "variant's default",
    )  # fmt: skip


def detector_from(args: argparse.Namespace) -> LoadedDetector:
    """Load the detector of parsed arguments: `checkpoint`, `threshold` and those of `add_detector_flags`."""
    flags = {} if args.dilation is None else {"dilation": args.dilation}
    return load_detector(args.checkpoint, args.device, args.threshold, **flags)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 if a file was skipped or a video ended early, or what `exit_status` returns."""
    parser = build_parser()
    args = parser.parse_args(argv)
    return exit_status(parser.prog, lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Check all inputs before any work starts, then detect, draw and write; return the status as `main`."""
    output_dir = Path(args.output_dir)
    kinds = tuple(dict.fromkeys(args.show))
    names = images_or_bundled(args.inputs, args.checkpoint)
    if not names:
        raise UserError("pass at least one INPUT: an image, a video or a folder of them")
    files, passed_over = find_files(names, output_dir)
    inputs = plan(files, output_dir, kinds)
    check_no_folder(output_dir / PREDICTIONS)
    if kinds and args.slice:
        raise UserError("--show draws the model's view of whole images: leave out --slice or --show")
    if kinds and all(is_video(item.path) for item in inputs):
        raise UserError("--show: works only for images, and all inputs are videos; leave out --show")
    if kinds:
        check_matplotlib()
    detector = detector_from(args)
    if kinds:
        check_kinds(detector, kinds)
    if args.slice:
        check_sliceable(detector, args.slice)
    detect = partial(detect_in_slices, detector, side=args.slice) if args.slice else detector.detect
    tally = new_tally(detector, inputs, output_dir)
    for name, search_result in passed_over.items():
        print(search_result.passed_over(f"{name}: ", "\n"), end="", file=sys.stderr)
        tally.skipped += len(search_result.unreadable()) + len(search_result.closed)
        tally.others += len(search_result.others) - len(search_result.unreadable())
    for folder in sorted({output_dir, *(item.picture.parent for item in inputs)}):
        make_folder(folder)

    stopped = None
    try:
        for item in tqdm(inputs, unit="file", disable=None):
            try:
                if is_video(item.path):
                    predict_video(detector, item, tally, detect)
                else:
                    predict_image(detector, item, kinds, tally, detect, not args.no_exif)
            except SkippedError as error:
                tally.skipped += 1
                # Skipped files still use up an image id.
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
        print(f"{text}: the results so far are saved", file=sys.stderr)
    print(tally.summary(output_dir))
    return status


def new_tally(detector: LoadedDetector, inputs: Sequence[Input], output_dir: Path) -> Tally:
    """Return an empty tally, prepared for segments if the model is panoptic; a UserError if their folder is taken."""
    if detector.things is None:
        return Tally()
    folder = output_dir / FOLDER
    check_results_folder(folder)
    conflict = next((item for item in inputs if folder in item.picture.parents), None)
    if conflict:
        raise UserError(
            f"{conflict.path}: its picture would be {conflict.picture}, in the folder of the panoptic results; pass "
            "the file or its folder as an input"
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
    """Find the input files, without duplicates, and search the input folders, but not the output folder.

    Returns:
        (path, path relative to its input folder, or its name) of each file; and the search result of each folder.

    Raises:
        UserError: an input does not exist, or a folder has no image or video.
    """
    inputs: dict[Path, tuple[Path, Path]] = {}
    searches: dict[str, Found] = {}
    for name in names:
        root = Path(name)
        if root.is_dir():
            searches[name] = search(root, image_suffixes() | VIDEO_SUFFIXES, output_dir.resolve())
            files = [(path, path.relative_to(root)) for path in searches[name].files]
            if not files:
                raise UserError(
                    f"{name}: no image or video in this folder, judged by suffix; pass files of other suffixes as "
                    f"inputs (the output folder is not searched{searches[name].passed_over('; ')})"
                )
        elif root.exists():
            files = [(root, Path(root.name))]
        else:
            raise UserError(f"{name}: no such file or folder")
        for path, place in files:
            inputs.setdefault(path.resolve(), (path, place))
    return list(inputs.values()), searches


def plan(files: Sequence[tuple[Path, Path]], output_dir: Path, kinds: Sequence[str] = ()) -> list[Input]:
    """Give each file a unique output path. Files with the same name are numbered.

    Names are compared without suffix and case, to be unique on any file system, and include the pictures of `--show`.

    Args:
        files: input paths, and paths relative to `output_dir`.
        output_dir: output folder of the pictures.
        kinds: values of `--show`.

    Raises:
        UserError: a picture would overwrite an input or a folder.
    """
    inputs, used_names = [], set()
    originals = {path.resolve() for path, _ in files}
    for path, place in files:
        number = 1
        while True:
            stem = place.stem + (f"_{number}" if number > 1 else "")
            names = {(place.parent / name).as_posix().casefold() for name in (stem, *(f"{stem}_{k}" for k in kinds))}
            if not names & used_names:
                break
            number += 1
        used_names |= names
        suffix = ".mp4" if is_video(path) else ".jpg" if path.suffix.lower() in JPEG_SUFFIXES else ".png"
        picture = output_dir / place.parent / (stem + suffix)
        for output in (picture, *(picture.with_name(f"{stem}_{kind}.png") for kind in kinds)):
            check_no_folder(output)
        if picture.resolve() in originals:
            raise UserError(
                f"--output_dir {output_dir}: {picture} is an input and would be overwritten; choose another folder"
            )
        inputs.append(Input(path, picture))
    return inputs


def draw(detector: LoadedDetector, pixels: Tensor, detections: Detections, enlarge: bool = True) -> np.ndarray:
    """Draw detections or segments on an image uint8 (3, height, width); returns uint8 (height, width, 3)."""
    if detections.panoptic is not None:
        # A panoptic model's labels are category ids.
        names = detector.label_map.names
        return draw_panoptic(pixels, detections.panoptic.id_map, detections.panoptic.segments, names, enlarge)
    return draw_detections(
        pixels, detections.boxes, detections.names, detections.scores, detections.labels, enlarge, detections.masks
    )


def predict_image(
    detector: LoadedDetector,
    item: Input,
    kinds: Sequence[str],
    tally: Tally,
    detect: Callable[[Tensor], Detections],
    exif: bool = True,
) -> None:
    """Detect objects in an image, rotated by EXIF unless `exif` is False, and write its picture."""
    try:
        pixels = as_pixels(item.path, exif)
    except UserError as error:
        raise SkippedError(str(error)) from error
    detections = detect(pixels)
    drawn = Image.fromarray(draw(detector, pixels, detections))
    options = {"format": "JPEG", **JPEG_OPTIONS} if item.picture.suffix == ".jpg" else {"format": "PNG"}
    with uninterrupted():
        write_file(item.picture, lambda file: drawn.save(file, **options), sync=False)
        if kinds:
            write_introspection(detector, pixels, detections, kinds, item.picture.parent, item.picture.stem)
        tally.images += 1
        tally.add(detections, pixels.shape[-2:], item.path)


def predict_video(detector: LoadedDetector, item: Input, tally: Tally, detect: Callable[[Tensor], Detections]) -> None:
    """Detect objects in each frame of a video, and write a video of the same size and frame rate.

    After Ctrl-C or SIGTERM, the finished frames are kept as a complete video. A video with fewer frames than it
    declares is reported and counted as incomplete.
    """
    reader = cv2.VideoCapture(str(item.path))
    frame_count, rate = reader.get(cv2.CAP_PROP_FRAME_COUNT), reader.get(cv2.CAP_PROP_FPS)
    # Some containers store neither value, which OpenCV reports as 0, negative or NaN.
    frame_count = int(frame_count) if 0 < frame_count < math.inf else None
    read = 0
    try:
        with VideoFile(item.picture, rate if 0 < rate < math.inf else USUAL_RATE) as video:
            for pixels in tqdm(frames(reader), item.path.name, frame_count, unit="frame", leave=False, disable=None):
                detections = detect(pixels)
                picture = draw(detector, pixels, detections, enlarge=False)
                with uninterrupted():
                    video.write(picture)
                    tally.add(detections, pixels.shape[-2:], item.path, read)
                    read += 1
    finally:
        reader.release()
        tally.frames += read
        tally.videos += read > 0
    if not read:
        raise SkippedError(f"{item.path}: not a readable video")
    if frame_count and read < frame_count and item.path.suffix.lower() in COUNTED_SUFFIXES:
        tally.incomplete += 1
        tqdm.write(f"incomplete: {item.path}: ends after {read} of its {frame_count} frames", file=sys.stderr)


def frames(reader: cv2.VideoCapture) -> Iterator[Tensor]:
    """Yield the frames of an open video, RGB uint8 (3, height, width)."""
    while True:
        complete, bgr = reader.read()
        if not complete:
            return
        yield torch.from_numpy(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)).permute(2, 0, 1).contiguous()


def writable_rate(rate: float) -> float:
    """The nearest frame rate, in frames per second, that MPEG-4 can store with up to three decimals."""
    rate = min(max(rate, 0.01), FINEST_TIME)
    return round(rate, min(3, int(math.log10(FINEST_TIME / rate))))


class VideoFile:
    """A video (MPEG-4 in mp4), written to a temporary file that is renamed when complete.

    A context manager: the video is kept after the block or an interruption (Ctrl-C, SIGTERM), and removed after other
    errors. The rate, in frames per second, is rounded to the nearest that MPEG-4 can store.
    """

    def __init__(self, path: Path, rate: float):
        self.path = path
        self.rate = writable_rate(rate)
        # OpenCV chooses the container by the suffix.
        self._partial = path.with_name(f"{path.stem}.partial{path.suffix}")
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)

    def __enter__(self) -> "VideoFile":
        return self

    def write(self, frame: np.ndarray) -> None:
        """Add a frame, RGB uint8 (height, width, 3). The first frame's size, made even, is the video's size."""
        height, width = frame.shape[:2]
        # The codec needs even sides, so repeat the last column or row.
        frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._writer is None:
            self._size = (frame.shape[1], frame.shape[0])
            self._writer = cv2.VideoWriter(str(self._partial), cv2.VideoWriter_fourcc(*"mp4v"), self.rate, self._size)
            if not self._writer.isOpened():
                raise SkippedError(
                    f"{self.path}: cannot be written as MPEG-4 of {self._size[0]} x {self._size[1]} pixels: the disk "
                    "is full, OpenCV has no encoder, or a side is longer than 8,191 pixels"
                )
        bgr = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
        # OpenCV silently drops frames of another size.
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
