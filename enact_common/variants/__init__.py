"""The variant folders as importable packages.

`DETR-ENACT` is not a Python identifier, and all variants call their packages `models` and `datasets`. So each folder is
the package `enact_common.variants.NAME`: variants can be used side by side, and pickled models find their classes in
any process. A wheel holds the folders under these names; in a checkout, `register_folders` points to them. Code in a
variant's `models` and `datasets` imports relatively or from `enact_common`.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from enact_common.utils.errors import UserError

# name: (folder in the checkout, package)
VARIANTS = {
    name: (folder, f"{__name__}.{name}")
    for name, folder in {
        "detr": "DETR-ENACT",
        "conditional": "Conditional-DETR-ENACT",
        "anchor": "Anchor-DETR-ENACT",
    }.items()
}


def register_folders() -> None:
    """Register the checkout's folders as packages, without importing their modules."""
    checkout = Path(__file__).resolve().parents[2]
    for name, (folder, package) in VARIANTS.items():
        if package not in sys.modules and (checkout / folder).is_dir():
            spec = importlib.machinery.ModuleSpec(package, loader=None, is_package=True)
            spec.submodule_search_locations = [str(checkout / folder)]
            sys.modules[package] = globals()[name] = importlib.util.module_from_spec(spec)


register_folders()


def load_variant(name: str) -> ModuleType:
    """Return a variant as a package with the submodules `main`, `models` and `datasets`.

    Args:
        name: a key of `VARIANTS`.

    Raises:
        UserError: the variant is unknown, or its folder is missing next to `enact_common`.
    """
    if name not in VARIANTS:
        raise UserError(f"no variant {name!r}: choose from {', '.join(VARIANTS)}")
    folder, package = VARIANTS[name]
    if importlib.util.find_spec(package) is None:
        path = Path(__file__).resolve().parents[2] / folder
        raise UserError(f"variant {name!r}: no folder {path}: the installation is damaged; install the package again")
    for part in ("models", "datasets", "main"):
        importlib.import_module(f"{package}.{part}")
    return importlib.import_module(package)
