"""Loads the recorded reference cases of `tests/golden`, which only a checkout has."""

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from enact_common.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from enact_common.utils.errors import UserError

FOLDER = Path(__file__).resolve().parents[2] / "tests" / "golden"


@dataclass(frozen=True)
class Case:
    """One recorded model on one batch.

    Attributes:
        name: names of the file and the case.
        argv: the flags that make our model equal to the recorded one.
        spec: `argv`, `sizes`, `objects` and `seed`, as `tests/golden/README.md` describes them.
        recorded: recorded arrays by name, such as `eval/pred_logits`.
    """

    name: str
    variant: str
    argv: list[str]
    spec: dict
    recorded: dict[str, np.ndarray]


def load_recipe() -> ModuleType:
    """Load the module that makes the weights, images and targets of the recorded cases."""
    path = FOLDER / "recipe.py"
    if not path.is_file():
        raise UserError(f"{FOLDER}: no such folder; the recorded cases come with a checkout: run this in one")
    spec = importlib.util.spec_from_file_location("recipe", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cases() -> Iterator[Case]:
    """Yield all recorded cases, file by file."""
    for path in sorted(FOLDER.glob("*_*.npz")):
        variant, attention = path.stem.split("_")
        own = ["--encoder_attention", "enact" if attention == "enact" else "mhsa", "--backbone_weights", "none"]
        with np.load(path) as data:
            names = [key.removesuffix("/spec") for key in data.files if key.endswith("/spec")]
            for name in names:
                recorded = {k.removeprefix(f"{name}/"): data[k] for k in data.files if k.startswith(f"{name}/")}
                spec = json.loads(str(recorded["spec"]))
                yield Case(f"{path.stem} {name}", variant, [*spec["argv"], *own], spec, recorded)


def golden_batch(recipe: ModuleType, spec: dict) -> tuple[NestedTensor, list[dict[str, Tensor]]]:
    """Return the images of a recorded case as a padded batch, and their targets."""
    images = [torch.from_numpy(recipe.image(i + spec["seed"], *hw)) for i, hw in enumerate(spec["sizes"])]
    targets = [
        {name: torch.from_numpy(value) for name, value in recipe.targets(i + spec["seed"], count).items()}
        for i, count in enumerate(spec["objects"])
    ]
    if "--masks" in spec["argv"]:
        for target, size in zip(targets, spec["sizes"], strict=True):
            target["masks"] = recipe.box_masks(target["boxes"], *size)
    return nested_tensor_from_tensor_list(images), targets
