"""The mapping between the model's labels and the data set's categories."""

from dataclasses import dataclass
from functools import cache

from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from enact_common.utils.errors import UserError

# COCO's stuff categories by id, as in its panoptic annotations. Its things have the ids of `coco_names`.
COCO_STUFF = {
    92: "banner", 93: "blanket", 95: "bridge", 100: "cardboard", 107: "counter", 109: "curtain", 112: "door-stuff",
    118: "floor-wood", 119: "flower", 122: "fruit", 125: "gravel", 128: "house", 130: "light", 133: "mirror-stuff",
    138: "net", 141: "pillow", 144: "platform", 145: "playingfield", 147: "railroad", 148: "river", 149: "road",
    151: "roof", 154: "sand", 155: "sea", 156: "shelf", 159: "snow", 161: "stairs", 166: "tent", 168: "towel",
    171: "wall-brick", 175: "wall-stone", 176: "wall-tile", 177: "wall-wood", 178: "water-other", 180: "window-blind",
    181: "window-other", 184: "tree-merged", 185: "fence-merged", 186: "ceiling-merged", 187: "sky-other-merged",
    188: "cabinet-merged", 189: "table-merged", 190: "floor-other-merged", 191: "pavement-merged",
    192: "mountain-merged", 193: "grass-merged", 194: "dirt-merged", 195: "paper-merged", 196: "food-other-merged",
    197: "building-other-merged", 198: "rock-merged", 199: "wall-other-merged", 200: "rug-merged",
}  # fmt: skip


@cache
def coco_names() -> tuple[str, ...]:
    """COCO's 91 category names by id, "N/A" for unused ids (torchvision's list)."""
    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return ("N/A", *names[1:])


@dataclass(frozen=True)
class LabelMap:
    """The categories behind a model's labels.

    Attributes:
        category_ids: the data set's category id of each label, None for an unused label.
        names: each label's name.
        things: the labels of countable things in panoptic data, ascending; all other labels are stuff. None if the
            data do not distinguish things from stuff.
    """

    category_ids: tuple[int | None, ...]
    names: tuple[str, ...]
    things: tuple[int, ...] | None = None

    @classmethod
    def from_categories(cls, categories: list[dict], num_classes: int | None = None) -> "LabelMap":
        """The map for a COCO-format `categories` list.

        COCO's categories, or a subset of them, keep their ids as labels, which makes released checkpoints fit. Other
        categories are numbered from 0 in the order of their ids.

        Raises:
            UserError: `num_classes` (`--num_classes`; None for as many as needed) is too small.
        """
        names = {int(category["id"]): str(category["name"]) for category in categories}
        coco = coco_names()
        if all(0 < i < len(coco) and coco[i] == name for i, name in names.items()):
            ids = [None if name == "N/A" else i for i, name in enumerate(coco)]
            needed, last = max(names) + 1, max(names)
            why = f"these are COCO's categories, whose labels are their ids, up to {last} ({names[last]}) here"
            names = dict(enumerate(coco))
        else:
            ids = sorted(names)
            needed = len(ids)
            why = f"the annotations have {needed} categories, including those without objects"
        size = num_classes or len(ids)
        if size < needed:
            raise UserError(
                f"--num_classes {num_classes}: {why}, so at least {needed} are needed; pass --num_classes {needed}, or "
                f"leave the flag out (which makes {len(ids)} labels)"
            )
        ids = (ids + [None] * size)[:size]
        return cls(tuple(ids), tuple("N/A" if i is None else names[i] for i in ids))

    @classmethod
    def from_dict(cls, state: dict) -> "LabelMap":
        """The map from the output of `to_dict`."""
        things = state.get("things")
        return cls(tuple(state["category_ids"]), tuple(state["names"]), None if things is None else tuple(things))

    def to_dict(self) -> dict:
        """The map in built-in types, for checkpoints. A `things` of None is left out."""
        return {key: list(value) for key, value in vars(self).items() if value is not None}

    @property
    def num_classes(self) -> int:
        """The number of labels, including unused ones."""
        return len(self.category_ids)

    def known_names(self) -> list[str]:
        """The names of the labels that are used, in the labels' order."""
        return [name for name, i in zip(self.names, self.category_ids, strict=True) if i is not None]

    def labels(self) -> dict[int, int]:
        """The label of each category id."""
        return {i: label for label, i in enumerate(self.category_ids) if i is not None}

    def check_categories(self, categories: list[dict], source: str) -> None:
        """Refuse categories that the map lacks or names differently.

        Raises:
            UserError: names the source and the first such category.
        """
        labels = self.labels()
        for category in categories:
            label = labels.get(int(category["id"]))
            if label is None or self.names[label] != str(category["name"]):
                known = ", ".join(f"{i} {self.names[label]}" for i, label in list(labels.items())[:8])
                raise UserError(
                    f"{source}: category {category['id']} ({category['name']}) is not one of the model's ({known}"
                    f"{', ...' if len(labels) > 8 else ''}); train and val annotations and the checkpoint must agree"
                )
