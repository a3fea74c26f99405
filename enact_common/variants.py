"""The variant folders as importable packages.

`DETR-ENACT` is no Python identifier, and all variants call their packages `models` and `datasets`. Each is loaded
under an alias instead, so that they stand side by side in one process. That works as long as the code in a variant's
`models` and `datasets` imports relatively or from `enact_common`.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from enact_common.errors import UserError

# name: (folder, alias)
VARIANTS = {
    "detr": ("DETR-ENACT", "detr_enact"),
    "conditional": ("Conditional-DETR-ENACT", "conditional_detr_enact"),
    "anchor": ("Anchor-DETR-ENACT", "anchor_detr_enact"),
}


def load_variant(name: str) -> ModuleType:
    """A variant as a package with the submodules `main`, `models` and `datasets`.

    Args:
        name: a key of `VARIANTS`.

    Raises:
        UserError: there is no such variant, or its folder is not beside the package.
    """
    if name not in VARIANTS:
        raise UserError(f"no variant {name!r}: choose from {', '.join(VARIANTS)}")
    folder, alias = VARIANTS[name]
    if alias not in sys.modules:
        path = Path(__file__).resolve().parent.parent / folder
        if not path.is_dir():
            raise UserError(
                f"variant {name!r}: no folder {path}. The variants live in a checkout of the project: install the "
                "package from there with pip install -e ."
            )
        spec = importlib.machinery.ModuleSpec(alias, loader=None, is_package=True)
        spec.submodule_search_locations = [str(path)]
        sys.modules[alias] = importlib.util.module_from_spec(spec)
    package = sys.modules[alias]
    for part in ("models", "datasets", "main"):
        importlib.import_module(f"{alias}.{part}")
    return package
