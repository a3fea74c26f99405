"""Which label of the model means which category of the data set."""

from dataclasses import asdict, dataclass
from functools import cache

from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from enact_common.errors import UserError


@cache
def coco_names() -> tuple[str, ...]:
    """COCO's 91 category names by id, "N/A" for the ids that no category has (torchvision's list)."""
    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return ("N/A", *names[1:])


@dataclass(frozen=True)
class LabelMap:
    """The categories behind a model's labels.

    Attributes:
        category_ids: the data set's own category id of each label, None for a label that means nothing.
        names: each label's name.
    """

    category_ids: tuple[int | None, ...]
    names: tuple[str, ...]

    @classmethod
    def from_categories(cls, categories: list[dict], num_classes: int | None = None) -> "LabelMap":
        """The map for a COCO-format `categories` list.

        COCO's own categories, or some of them, keep their ids as labels, so that released checkpoints fit. All
        others are numbered from 0 in the order of their ids.

        Args:
            categories: dicts with `id` and `name`.
            num_classes: labels of the model (`--num_classes`); None for as many as are needed.

        Raises:
            UserError: num_classes is too small.
        """
        names = {int(category["id"]): str(category["name"]) for category in categories}
        coco = coco_names()
        if all(0 < i < len(coco) and coco[i] == name for i, name in names.items()):
            ids = [None if name == "N/A" else i for i, name in enumerate(coco)]
            needed = max(names) + 1
            names = dict(enumerate(coco))
        else:
            ids = sorted(names)
            needed = len(ids)
        size = num_classes or len(ids)
        if size < needed:
            raise UserError(f"--num_classes {num_classes}: the annotations' categories need at least {needed}")
        ids = (ids + [None] * size)[:size]
        return cls(tuple(ids), tuple("N/A" if i is None else names[i] for i in ids))

    @classmethod
    def from_dict(cls, state: dict) -> "LabelMap":
        """The map that `to_dict` gave."""
        return cls(tuple(state["category_ids"]), tuple(state["names"]))

    def to_dict(self) -> dict:
        """Built-in types alone, for checkpoints."""
        return {key: list(value) for key, value in asdict(self).items()}

    @property
    def num_classes(self) -> int:
        """Labels, those without a meaning included."""
        return len(self.category_ids)

    def labels(self) -> dict[int, int]:
        """Category id to label."""
        return {i: label for label, i in enumerate(self.category_ids) if i is not None}

    def check_categories(self, categories: list[dict], source: str) -> None:
        """Refuse categories that the map does not have, or has under another name.

        Raises:
            UserError: naming the source and the first category at fault.
        """
        labels = self.labels()
        for category in categories:
            label = labels.get(int(category["id"]))
            if label is None or self.names[label] != str(category["name"]):
                known = ", ".join(f"{i} {self.names[label]}" for i, label in list(labels.items())[:8])
                raise UserError(
                    f"{source}: category {category['id']} ({category['name']}) is not among the model's ({known}"
                    f"{', ...' if len(labels) > 8 else ''}); train and val annotations, and the checkpoint, must agree"
                )
