"""The variant folders as importable packages.

`DETR-ENACT` is no Python identifier, and all variants call their packages `models` and `datasets`. Each folder is the
package `enact_common.variants.NAME`, so that the variants can be used side by side, and so that any process finds their
classes by name: pickled models import what they need. A wheel holds the folders under these names; in a checkout,
`register_folders` points to them. Code in a variant's `models` and `datasets` imports relatively or from
`enact_common`.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from enact_common.utils.errors import UserError

# name: folder in the checkout, and the package
VARIANTS = {
    name: (folder, f"{__name__}.{name}")
    for name, folder in {
        "detr": "DETR-ENACT",
        "conditional": "Conditional-DETR-ENACT",
        "anchor": "Anchor-DETR-ENACT",
    }.items()
}


def register_folders() -> None:
    """Make the checkout's folders packages, without importing what is in them."""
    checkout = Path(__file__).resolve().parents[2]
    for name, (folder, package) in VARIANTS.items():
        if package not in sys.modules and (checkout / folder).is_dir():
            spec = importlib.machinery.ModuleSpec(package, loader=None, is_package=True)
            spec.submodule_search_locations = [str(checkout / folder)]
            sys.modules[package] = globals()[name] = importlib.util.module_from_spec(spec)


register_folders()


def load_variant(name: str) -> ModuleType:
    """A variant as a package with the submodules `main`, `models` and `datasets`.

    Args:
        name: a key of `VARIANTS`.

    Raises:
        UserError: there is no such variant, or its folder is not beside the package.
    """
    if name not in VARIANTS:
        raise UserError(f"no variant {name!r}: choose from {', '.join(VARIANTS)}")
    folder, package = VARIANTS[name]
    if importlib.util.find_spec(package) is None:
        path = Path(__file__).resolve().parents[2] / folder
        raise UserError(f"variant {name!r}: no folder {path}: the installation is damaged; install the package anew")
    for part in ("models", "datasets", "main"):
        importlib.import_module(f"{package}.{part}")
    return importlib.import_module(package)
