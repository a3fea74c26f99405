"""Train and evaluate Conditional DETR, with ENACT or plain: `python Conditional-DETR-ENACT/main.py --help`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Makes a checkout importable when only the dependencies are installed.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from enact_common.cli.arguments import VariantParser, add_focal_flags, add_query_flags, common_parser  # noqa: E402
from enact_common.cli.checks import refuse_masks  # noqa: E402
from enact_common.training.run import main  # noqa: E402


def get_args_parser() -> VariantParser:
    """Return Conditional DETR's parser: the shared flags, with the defaults of the published training."""
    parser = common_parser("Conditional DETR with ENACT (default) or plain (--encoder_attention mhsa)")
    add_query_flags(parser, num_queries=300)
    add_focal_flags(parser)
    parser.set_defaults(backbone="resnet101", epochs=50, lr_drop=40)
    parser.checks.append(refuse_masks)
    return parser


if __name__ == "__main__":
    from datasets import build_dataset
    from models import build_model

    sys.exit(main("conditional", get_args_parser(), build_model, build_dataset))
