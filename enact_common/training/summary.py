"""The summary that a run prints before it starts: model, data, device, learning rates."""

import argparse
import logging
from pathlib import Path

import torch

from enact_common.attention.clustering import WINDOWS
from enact_common.attention.rivals import RIVALS
from enact_common.cli.flags import CLUSTERING_FLAGS, ENACT_LR, PLAIN_LR
from enact_common.models.layers import encoder_settings, has_effect, rival_text
from enact_common.training.setup import Data, Network
from enact_common.utils.distributed import get_world_size

logger = logging.getLogger("enact")


def log_summary(
    variant: str,
    args: argparse.Namespace,
    data: Data,
    network: Network,
    device: torch.device,
    output_dir: Path | None,
    optimizer: torch.optim.Optimizer | None = None,
    start_epoch: int = 0,
) -> None:
    """Log the summary of an evaluation, or with an optimizer of a training from `start_epoch` on."""
    processes = get_world_size()
    attention = "row-column" if getattr(args, "attention_type", "") == "RCDA" else "multi-head"
    if args.encoder_attention == "enact":
        settings = {name: value for name, value in encoder_settings(args).items() if value}
        if settings["clusters"] != WINDOWS:
            # The other kinds are always per image.
            settings.pop("per_image", None)
        attention += f" over ENACT's clusters ({', '.join(f'{name} {value}' for name, value in settings.items())})"
    elif args.encoder_attention in RIVALS:
        attention += f", {rival_text(args.encoder_attention, args.token_budget)}"
    dilated = " DC5" if args.dilation else ""
    names = [data.label_map.names[label] for label in data.label_map.labels().values()]
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    precision = "float32" if args.amp == "none" else args.amp
    checkpoint = args.resume or args.pretrained or args.frozen_weights
    rows = {
        "model": f"{variant}, {args.backbone}{dilated}, {network.model.num_queries} queries",
        "encoder attention": attention,
        "parameters": f"{network.num_parameters:,} trained",
        "weights": checkpoint or f"backbone {args.backbone_weights}, the rest random",
        "classes": f"{len(names)} ({shown}), {args.num_classes} labels",
        "device": f"{device}, {processes} {'process' if processes == 1 else 'processes'}, {precision}"
        + ", deterministic" * args.deterministic,
    }
    if optimizer:
        rates = ", ".join(f"{g['name']} {g['initial_lr']:g}".strip() for g in optimizer.param_groups)
        batch = args.batch_size * args.accumulate * processes
        made_of = f"{args.batch_size} images x {args.accumulate} accumulated x {processes} processes"
        rows |= {
            "train images": f"{len(data.train_set):,} with {data.train_set.num_objects:,} objects",
            "effective batch": f"{batch} = {made_of}",
            "learning rates": f"{rates}; {args.lr_schedule} schedule",
            "rate and batch": rate_rule(args, batch),
            "epochs": f"{start_epoch} to {args.epochs}, {len(data.train_loader)} batches each",
        }
        if args.frozen_weights:
            rows["frozen"] = "all except the mask head"
        if args.freeze:
            rows["frozen"] = f"parameters named with {', '.join(args.freeze)}"
        if args.ema is not None:
            rows["evaluated weights"] = f"EMA with decay {args.ema:g}"
    truth = "" if args.eval_set == "test" else f" with {data.val_set.num_objects:,} objects"
    rows["evaluated images"] = f"{len(data.val_set):,}{truth}, of {args.eval_set}"
    rows["output"] = str(output_dir or "none (--output_dir)")
    logger.info("\n".join(f"{name:<18} {text}" for name, text in rows.items()))
    given = [flag for flag in (*CLUSTERING_FLAGS, "enact_scale_logits", "enact_zero_scores") if getattr(args, flag)]
    idle = [f"--{flag}" for flag in given if not has_effect(flag, args.encoder_attention)]
    if idle:
        logger.info("note: %s: no effect with --encoder_attention %s", ", ".join(idle), args.encoder_attention)
    if args.backbone_norm == "frozen" and args.backbone_weights == "none" and not checkpoint:
        logger.info("note: a random backbone hardly trains with frozen batch norm; pass --backbone_norm batch")


def rate_rule(args: argparse.Namespace, batch: int) -> str:
    """Return a line that compares learning rate and effective batch with the published ones."""
    published = args.published_batch
    default = ENACT_LR if args.encoder_attention == "enact" else PLAIN_LR
    rule = f"--lr does not scale with the batch; {default:g} was published with {published} images per step"
    if args.lr == default and batch != published:
        # Goyal et al., arXiv:1706.02677; for Adam, Malladi et al., arXiv:2205.10287.
        ratio = batch / published
        linear, root = args.lr * ratio, args.lr * ratio**0.5
        rule += f"; for {batch}, the linear rule gives {linear:.2g}, the square-root rule for Adam {root:.2g}"
    return rule
