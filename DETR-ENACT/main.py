"""Train and evaluate DETR, with ENACT or plain: `python DETR-ENACT/main.py --help`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Makes a checkout importable when only the dependencies are installed.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from enact_common.cli.arguments import VariantParser, add_query_flags, common_parser  # noqa: E402
from enact_common.cli.flags import LOSSES  # noqa: E402
from enact_common.cli.types import non_negative_float  # noqa: E402
from enact_common.training.run import main  # noqa: E402


def get_args_parser() -> VariantParser:
    """Return DETR's parser: the shared flags, with the defaults of the published training."""
    parser = common_parser("DETR with ENACT (default) or plain (--encoder_attention mhsa)")
    add_query_flags(parser, num_queries=100)
    parser.group(LOSSES).add_argument(
        "--eos_coef", type=non_negative_float, default=0.1, metavar="W", help="loss: weight of the no-object class"
    )
    return parser


if __name__ == "__main__":
    from datasets import build_dataset
    from models import build_model

    sys.exit(main("detr", get_args_parser(), build_model, build_dataset))
