"""The state of a training: saved, resumed to the bit, and old checkpoints removed."""

import argparse
import logging
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from enact_common.checkpoints.files import (
    LATEST,
    optimizer_state_by_name,
    random_states,
    restore_random_states,
    save_checkpoint,
)
from enact_common.data.categories import LabelMap
from enact_common.training.logs import AverageMeter
from enact_common.training.optimization import Optimization, drops_until
from enact_common.training.setup import Network
from enact_common.utils.distributed import failing_together, gather_objects, get_rank, get_world_size, is_main_process
from enact_common.utils.errors import UserError

logger = logging.getLogger("enact")

# A checkpoint that `--keep` counts, by the number of its epoch.
NUMBERED = re.compile(r"checkpoint(\d{4,})\.pth")


@dataclass
class WithinEpoch:
    """How far an epoch had come when a checkpoint was written in its middle.

    Attributes:
        images: done, of all processes.
        batch: images in a batch of all processes.
        processes: how many there were.
        meters: each one's losses, `AverageMeter.state`.
        seconds: of training in this epoch.
    """

    images: int
    batch: int
    processes: int
    meters: list[dict]
    seconds: float


@dataclass
class Position:
    """The place where a training goes on.

    Attributes:
        epoch: the first one that is not done.
        batches: done in that epoch.
        meter: the losses of those batches.
        seconds: they took.
    """

    epoch: int
    batches: int
    meter: AverageMeter
    seconds: float


class TrainingState:
    """Everything that a checkpoint holds of a training.

    Args:
        variant: its name.
        args: resolved arguments.
        network: the model and its average.
        optimization: optimizer and scaler.
        label_map: of the model.
        output_dir: where checkpoints go; None writes none.
        device: where the model is.
    """

    def __init__(
        self,
        variant: str,
        args: argparse.Namespace,
        network: Network,
        optimization: Optimization,
        label_map: LabelMap,
        output_dir: Path | None,
        device: torch.device,
    ):
        self.variant = variant
        self.args = args
        self.network = network
        self.optimization = optimization
        self.label_map = label_map
        self.output_dir = output_dir
        self.device = device

    def save(self, epoch: int, names: list[str], more: dict) -> None:
        """Write a checkpoint, whole or not at all.

        Args:
            epoch: the last one that is done, -1 before the first.
            names: of the files.
            more: what else goes in.

        Raises:
            UserError: it cannot be written; in all processes.
        """
        states = gather_objects(random_states())
        if self.output_dir is None:
            return
        with failing_together():
            if not is_main_process():
                return
            average = self.network.average
            if average:
                more = {**more, "model_ema": average.model.state_dict(), "ema_steps": average.steps}
            content = {
                "model": self.network.model.state_dict(),
                "optimizer": self.optimization.optimizer.state_dict(),
                "scaler": self.optimization.scaler.state_dict(),
                "epoch": epoch,
                "args": dict(vars(self.args)),
                "variant": self.variant,
                "label_map": self.label_map.to_dict(),
                "random_states": states,
                **more,
            }
            for name in names:
                save_checkpoint(self.output_dir / name, content)

    def save_within_epoch(self, epoch: int, batches: int, meter: AverageMeter, seconds: float) -> None:
        """Write the latest checkpoint in the middle of an epoch, with `batches` of it done."""
        batch = self.args.batch_size * get_world_size()
        position = WithinEpoch(batches * batch, batch, get_world_size(), gather_objects(meter.state()), seconds)
        self.save(epoch - 1, [LATEST], {"within_epoch": asdict(position)})

    def save_epoch(self, epoch: int, train_stats: dict[str, float]) -> None:
        """Write an epoch's checkpoints, and with `--keep` remove all numbered ones but the latest."""
        self.save(epoch, [LATEST, *self.numbered(epoch)], {"train_stats": train_stats})
        if self.args.keep and self.output_dir and is_main_process():
            numbered = [path for path in self.output_dir.iterdir() if NUMBERED.fullmatch(path.name)]
            numbered.sort(key=lambda path: int(NUMBERED.fullmatch(path.name)[1]))
            for path in numbered[: -self.args.keep]:
                path.unlink()

    def numbered(self, epoch: int) -> list[str]:
        """The checkpoint that an epoch leaves for good: every `--save_every` epochs, and before the learning rate
        drops."""
        args = self.args
        before, after = (drops_until(done, args.lr_drop, args.lr_drop_epochs) for done in (epoch, epoch + 1))
        drops = args.lr_schedule == "step" and after > before
        return [f"checkpoint{epoch:04}.pth"] if drops or (epoch + 1) % args.save_every == 0 else []

    def resume(self, checkpoint: dict | None, num_batches: int) -> Position:
        """Put optimizer, scaler and random states where a checkpoint left them.

        Args:
            checkpoint: None begins at `--start_epoch`.
            num_batches: of an epoch.

        Returns:
            where the training goes on.

        Raises:
            UserError: the checkpoint's training froze other parts, averaged its weights, or had another optimizer.
        """
        args, start = self.args, Position(self.args.start_epoch, 0, AverageMeter(), 0.0)
        if not checkpoint:
            return start
        if "optimizer" not in checkpoint or "epoch" not in checkpoint:
            logger.info("%s has weights alone: training starts from them at epoch %d", args.resume, args.start_epoch)
            return start
        self.check_same_training(checkpoint)
        optimizer, average = self.optimization.optimizer, self.network.average
        try:
            state = optimizer_state_by_name(checkpoint, self.network.model, optimizer)
        except UserError as error:
            raise UserError(f"{args.resume}: {error}") from error
        asked = [(group["name"], group["initial_lr"]) for group in optimizer.param_groups]
        optimizer.load_state_dict(state)
        for group, (name, _) in zip(optimizer.param_groups, asked, strict=True):
            # Other projects' checkpoints have neither.
            group["name"] = name
            group.setdefault("initial_lr", group["lr"])
        if [(group["name"], group["initial_lr"]) for group in optimizer.param_groups] != asked:
            logger.info("note: the checkpoint's learning rates go on, not this command's")
        if average and checkpoint.get("model_ema"):
            average.load(checkpoint["model_ema"], checkpoint["ema_steps"])
        if checkpoint.get("scaler"):
            self.optimization.scaler.load_state_dict(checkpoint["scaler"])
        if "random_states" in checkpoint:
            restore_random_states(checkpoint["random_states"][get_rank() % len(checkpoint["random_states"])])
        epoch = checkpoint["epoch"] + 1
        if checkpoint.get("within_epoch"):
            return self.resume_within_epoch(epoch, WithinEpoch(**checkpoint["within_epoch"]), num_batches)
        return Position(epoch, 0, AverageMeter(), 0.0)

    def check_same_training(self, checkpoint: dict) -> None:
        """Refuse to go on with what the checkpoint's training did not do.

        Raises:
            UserError: it froze other parts, or averaged weights that would be lost.
        """
        args, saved = self.args, checkpoint.get("args", {})
        frozen = saved.get("freeze") or []
        if sorted(frozen) != sorted(args.freeze):
            asked = f"--freeze {' '.join(frozen)}" if frozen else "no --freeze"
            raise UserError(f"{args.resume}: was trained with {asked}; pass the same, or begin anew with --pretrained")
        if bool(saved.get("frozen_weights")) != bool(args.frozen_weights):
            asked = "--frozen_weights CKPT" if saved.get("frozen_weights") else "no --frozen_weights"
            raise UserError(f"{args.resume}: was trained with {asked}; pass the same, or begin anew with --pretrained")
        if checkpoint.get("model_ema") and not self.network.average:
            raise UserError(
                f"{args.resume}: holds averaged weights, which would be lost: pass --ema, as then "
                f"({saved.get('ema')}), or begin anew with --pretrained"
            )

    def resume_within_epoch(self, epoch: int, begun: WithinEpoch, num_batches: int) -> Position:
        """Go on in the middle of an epoch, with the images that are left."""
        args, batch = self.args, self.args.batch_size * get_world_size()
        # Whole steps of the optimizer, should the batch have changed.
        batches = begun.images // batch // args.accumulate * args.accumulate
        if (begun.batch, begun.processes) == (batch, get_world_size()):
            meter = AverageMeter.merged([begun.meters[get_rank()]], self.device)
        else:
            meter = AverageMeter.merged(begun.meters if is_main_process() else [], self.device)
            logger.info(
                "note: the epoch was begun with batches of %d images in %d processes, now they are of %d in %d: the "
                "images that are left are the same but for some at the cut, the course of the training is not",
                begun.batch, begun.processes, batch, get_world_size(),
            )  # fmt: skip
        return Position(epoch, min(batches, num_batches), meter, begun.seconds)
