"""Train and evaluate Anchor DETR, with ENACT or plain: `python Anchor-DETR-ENACT/main.py --help`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Makes a checkout importable when only the dependencies are installed.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from enact_common.cli.arguments import VariantParser, add_focal_flags, common_parser  # noqa: E402
from enact_common.cli.checks import refuse_masks, refuse_rivals_of_row_column_attention  # noqa: E402
from enact_common.cli.flags import MODEL  # noqa: E402
from enact_common.cli.types import positive_int  # noqa: E402
from enact_common.training.run import main  # noqa: E402
from enact_common.utils.errors import UserError  # noqa: E402


def get_args_parser() -> VariantParser:
    """Return Anchor DETR's parser: shared and own flags, with the defaults of the published training."""
    parser = common_parser("Anchor DETR with ENACT (default) or plain (--encoder_attention mhsa)")
    group = parser.group(MODEL)
    group.add_argument(
        "--attention_type", choices=("RCDA", "nn.MultiheadAttention"), default="RCDA",
        help="attention to the feature map: row-column decoupled (RCDA), or to single cells",
    )  # fmt: skip
    group.add_argument(
        "--num_feature_levels", type=int, choices=(1, 3), default=1,
        help="feature maps: the backbone's last one, or its last three (only with --dilation, which makes sizes equal)",
    )  # fmt: skip
    group.add_argument(
        "--separate_images", action="store_true",
        help="with --num_feature_levels 3: keep the images of a batch apart, except in ENACT's window length; the "
        "reference mixes images between levels",
    )  # fmt: skip
    group.add_argument(
        "--spatial_prior", choices=("learned", "grid"), default="learned", help="positions of the anchor points"
    )
    group.add_argument(
        "--num_query_position", type=positive_int, default=300, metavar="N",
        help="anchor points; a grid uses the nearest square number",
    )  # fmt: skip
    group.add_argument(
        "--num_query_pattern", type=positive_int, default=3, metavar="N", help="objects per anchor point"
    )
    add_focal_flags(parser)
    parser.set_defaults(
        published_batch=4,
        coco_path="/data/coco", dilation=True, smoothing_sigma=5.0, dim_feedforward=1024, dropout=0.0, batch_size=1,
        epochs=50, lr_drop=40,
    )  # fmt: skip
    parser.checks += [check_arguments, refuse_masks, refuse_rivals_of_row_column_attention]
    return parser


def check_arguments(args) -> None:
    """Check Anchor DETR's flags for conflicts.

    Raises:
        UserError: naming the flag and what to do.
    """
    if args.num_feature_levels > 1 and not args.dilation:
        raise UserError(
            f"--num_feature_levels {args.num_feature_levels} needs --dilation: without it the maps have different sizes"
        )
    if args.enact_scale_logits and args.attention_type == "RCDA":
        raise UserError(
            "--enact_scale_logits: row-column attention scales its logits anyway, so the flag has no effect: leave it "
            "out, or pass --attention_type nn.MultiheadAttention"
        )
    if args.separate_images and args.num_feature_levels == 1:
        raise UserError("--separate_images has no effect with --num_feature_levels 1: leave it out")


if __name__ == "__main__":
    from datasets import build_dataset
    from models import build_model

    sys.exit(main("anchor", get_args_parser(), build_model, build_dataset))
