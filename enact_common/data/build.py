"""Build a data set from parsed arguments."""

from pathlib import Path

from enact_common.cli.flags import PANOPTIC
from enact_common.data.annotations import find_split
from enact_common.data.categories import LabelMap
from enact_common.data.coco import CocoDetection
from enact_common.data.panoptic import CocoPanoptic, find_panoptic_split
from enact_common.data.transforms import eval_transforms, train_transforms
from enact_common.utils.errors import UserError


def data_files(args, split: str) -> tuple[Path, Path]:
    """Return the image folder and the annotation file of a split: "train", "val" or "test".

    Raises:
        UserError: a file or folder is missing.
    """
    if args.dataset_file == PANOPTIC:
        return find_panoptic_split(args.coco_path, args.coco_panoptic_path, split)[:2]
    images = vars(args).get(f"{split}_images")
    if not images:
        return find_split(args.coco_path, split)
    annotations = getattr(args, f"{split}_annotations")
    if not Path(images).is_dir():
        raise UserError(f"--{split}_images {images}: no such folder")
    if not Path(annotations).is_file():
        raise UserError(f"--{split}_annotations {annotations}: no such file")
    return Path(images), Path(annotations)


def build_dataset(image_set: str, args, label_map: LabelMap | None = None) -> CocoDetection:
    """Return the training or evaluation data set.

    Args:
        image_set: "train" for the augmented training images; "val" for the evaluation split that `--eval_set` names.
        args: parsed arguments.
        label_map: the model's labels; None derives them from the annotations.

    Raises:
        UserError: the data are invalid or incomplete.
    """
    train = image_set == "train"
    augmented = train and args.augmentation
    split = "train" if train else args.eval_set
    settings = {
        "transforms": train_transforms(args.train_sizes, args.max_size)
        if augmented
        else eval_transforms(args.eval_size, args.max_size),
        "label_map": label_map,
        "num_classes": args.num_classes,
        "limit": args.limit_train if train else args.limit_val,
        "seed": args.seed,
        # In evaluation, a replacement image would be counted twice.
        "on_unreadable": "raise" if args.strict_data else "replace" if train else "leave out",
    }
    if args.dataset_file == PANOPTIC:
        return CocoPanoptic(*find_panoptic_split(args.coco_path, args.coco_panoptic_path, split), **settings)
    return CocoDetection(
        *data_files(args, split),
        **settings,
        annotated=split != "test",
        remove_difficult=args.remove_difficult,
        masks=args.masks and split != "test",
    )
