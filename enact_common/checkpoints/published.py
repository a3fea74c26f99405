"""The published checkpoints: name, AP and address of each, as their authors' tables gave them on 2026-11-27.

`enact weights` lists them, and a test compares docs/method/weights.md with this table.
"""

import argparse
from dataclasses import dataclass
from typing import Any

from enact_common.cli.flags import COCO, PANOPTIC

TITLES = {"detr": "DETR", "conditional": "Conditional DETR", "anchor": "Anchor DETR"}

# Model flags that the model's name sets.
NAMED = ("backbone", "dilation", "encoder_attention")

DRIVE = "https://drive.google.com/file/d/{}/view"
# This page has a table "Model Zoo", which links the files and the logs.
CONDITIONAL_ZOO = "https://github.com/Atten4Vis/ConditionalDETR"
HUGGING_FACE = "https://huggingface.co/{}"


@dataclass(frozen=True)
class Model:
    """The configuration of a named model.

    Attributes:
        variant: a key of `VARIANTS`.
        backbone: "resnet50" or "resnet101".
        dilation: stride 16 instead of 32 (DC5).
        encoder_attention: one of `ENCODER_ATTENTIONS`; the hub has names for "enact" and "mhsa".
        panoptic: has a mask head, for things and stuff.
    """

    variant: str
    backbone: str
    dilation: bool
    encoder_attention: str
    panoptic: bool = False

    @property
    def name(self) -> str:
        """The name in the hub."""
        prefix = "" if self.variant == "detr" else f"{self.variant}_"
        attention = "" if self.encoder_attention == "mhsa" else f"_{self.encoder_attention}"
        suffixes = "_dc5" * self.dilation + "_panoptic" * self.panoptic + attention
        return f"{prefix}detr_{self.backbone}{suffixes}"

    @property
    def flags(self) -> dict[str, Any]:
        """The flags that make a variant this model."""
        flags = {name: getattr(self, name) for name in NAMED}
        return {**flags, "masks": self.panoptic, "dataset_file": PANOPTIC if self.panoptic else COCO}

    @classmethod
    def of(cls, args: argparse.Namespace, variant: str) -> "Model":
        """Return the model that has the parts of these arguments; its sizes may differ."""
        return cls(variant, args.backbone, bool(args.dilation), args.encoder_attention, args.dataset_file == PANOPTIC)

    @property
    def title(self) -> str:
        """A readable description."""
        names = {"mhsa": "plain", "enact": "with ENACT"}
        attention = names.get(self.encoder_attention, f"with {self.encoder_attention}")
        stride = ", its last stage dilated (DC5)" if self.dilation else ""
        kind = ", panoptic" if self.panoptic else ""
        return f"{TITLES[self.variant]}{kind}, {attention}, on a ResNet-{self.backbone.removeprefix('resnet')}{stride}"

    @property
    def authors_title(self) -> str:
        """A short title in the manner of the authors' tables, such as "DETR-DC5 + ENACT"."""
        stride = "DC5" if self.dilation else "C5"
        enact = " + ENACT" if self.encoder_attention == "enact" else ""
        return f"{TITLES[self.variant]}-{stride}{' panoptic' * self.panoptic}{enact}"


@dataclass(frozen=True)
class PublishedFile:
    """A checkpoint that a paper's authors published.

    Attributes:
        epochs: epochs of its training; None if the table does not say.
        ap: AP on COCO val2017 as its authors report it, as text; of panoptic models the boxes' AP and PQ, in percent.
        url: address of the file, or of the page that links it.
        log: address of the training's log; None if there is none.
        hugging_face: name of the same weights on Hugging Face; None if they are not there.
    """

    model: Model
    epochs: int | None
    ap: str
    url: str
    log: str | None = None
    hugging_face: str | None = None

    @property
    def name(self) -> str:
        """The model's name in the hub."""
        return self.model.name


def drive_file(
    variant: str, backbone: str, dilation: bool, attention: str, epochs: int, ap: str, file: str, log: str
) -> PublishedFile:
    """A checkpoint and its log on Google Drive, by their ids."""
    model = Model(variant, backbone, dilation, attention)
    return PublishedFile(model, epochs, ap, DRIVE.format(file), DRIVE.format(log))


def original_detr(backbone: str, dilation: bool, ap: str, digits: str, panoptic: bool = False) -> PublishedFile:
    """A checkpoint of DETR's authors, whose file name ends with the first digits of its SHA-256."""
    name = backbone.replace("resnet", "r") + "-dc5" * dilation + "-panoptic" * panoptic
    server = "https://dl.fbaipublicfiles.com/detr"
    return PublishedFile(
        Model("detr", backbone, dilation, "mhsa", panoptic),
        None if panoptic else 500,
        ap,
        f"{server}/detr-{name}-{digits}.pth",
        None if panoptic else f"{server}/logs/detr-{name}_log.txt",
        f"facebook/detr-{name.replace('r', 'resnet-', 1)}",
    )


def original_conditional(backbone: str, dilation: bool, ap: str) -> PublishedFile:
    """A checkpoint of Conditional DETR's authors."""
    on_hugging_face = (backbone, dilation) == ("resnet50", False)
    return PublishedFile(
        Model("conditional", backbone, dilation, "mhsa"), 50, ap, CONDITIONAL_ZOO, CONDITIONAL_ZOO,
        "microsoft/conditional-detr-resnet-50" if on_hugging_face else None,
    )  # fmt: skip


FILES = (
    drive_file("detr", "resnet50", False, "enact", 300, "39.0",
               "1SSPlsywBkV5qUk4h4K0gstD8kgJldvaN", "1sTyChBg0PA-Blf1upRdQ9rkSRemgf530"),
    drive_file("conditional", "resnet101", False, "enact", 50, "41.5",
               "1_RyhT_xn9TqqJy1-4mb39KUexjJrMV_d", "1OLhlMNd2k7g9lIb7mbWg82gkdeykAG6E"),
    drive_file("anchor", "resnet50", True, "enact", 50, "42.9",
               "1CLWJl49gE8vCdBbCAMHrcgzeiK6JKiza", "1arBV_A-HCi_lXlUxNGNAGOhKIxjs_D1Z"),
    original_detr("resnet50", False, "42.0", "e632da11"),
    original_detr("resnet50", True, "43.3", "f0fb7ef5"),
    original_detr("resnet101", False, "43.5", "2c7b67e5"),
    original_detr("resnet101", True, "44.9", "a2e86def"),
    original_detr("resnet50", False, "box 38.8, PQ 43.4", "00ce5173", panoptic=True),
    original_detr("resnet50", True, "box 40.2, PQ 44.6", "da08f1b1", panoptic=True),
    original_detr("resnet101", False, "box 40.1, PQ 45.1", "40021d53", panoptic=True),
    original_conditional("resnet50", False, "41.0"),
    original_conditional("resnet50", True, "43.7"),
    original_conditional("resnet101", False, "42.8"),
    original_conditional("resnet101", True, "45.0"),
    drive_file("anchor", "resnet50", False, "mhsa", 50, "42.1",
               "1ktLJyw4PGdaXkOn61W537Z67WHcttXDs", "1CoEUzs6pxYw-z1ew04qC1jFJwVjdDlPv"),
    drive_file("anchor", "resnet50", True, "mhsa", 50, "44.3",
               "1lJZWdIlHj6KKmAdU28Y01tTyO0hc6Jxs", "1ywmE02P7ORj_1HQOR2lYW11kfuqX00v-"),
    drive_file("anchor", "resnet101", False, "mhsa", 50, "43.5",
               "1eBLYzlKWwSF_RRcfjgRXqIplRKetsvtg", "1XIDSpYCioYlK5NwdJnbUHQls-PUr_xwi"),
    drive_file("anchor", "resnet101", True, "mhsa", 50, "45.1",
               "1irmZPSALME4Nht3_qhM9WLExDyO9Sj-J", "1KIIYid8mmoAWX7w6T6VPhORc86STqoXR"),
)  # fmt: skip
