"""The state of a training: saving it, resuming it bit for bit, and removing old checkpoints."""

import argparse
import logging
import re
from dataclasses import asdict, dataclass, field
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

# Name of a numbered checkpoint, with its epoch; `--keep` counts these.
NUMBERED = re.compile(r"checkpoint(\d{4,})\.pth")


@dataclass
class WithinEpoch:
    """The progress within an epoch, as stored in a checkpoint.

    Attributes:
        images: images done, over all processes.
        batch: images per batch, over all processes.
        processes: number of processes.
        meters: losses of each process, from `AverageMeter.state`.
        seconds: training time in this epoch.
    """

    images: int
    batch: int
    processes: int
    meters: list[dict]
    seconds: float


@dataclass
class Position:
    """The position at which a training resumes.

    Attributes:
        epoch: the first epoch that is not complete.
        batches: batches done in that epoch.
        meter: losses of those batches.
        seconds: training time of those batches.
    """

    epoch: int
    batches: int = 0
    meter: AverageMeter = field(default_factory=AverageMeter)
    seconds: float = 0.0


@dataclass
class TrainingState:
    """The state of a training that checkpoints save and restore.

    Attributes:
        output_dir: folder of the checkpoints; None writes none.
    """

    variant: str
    args: argparse.Namespace
    network: Network
    optimization: Optimization
    label_map: LabelMap
    output_dir: Path | None
    device: torch.device

    def save(self, epoch: int, names: list[str], more: dict) -> None:
        """Write a checkpoint under each of these names, atomically, with additional entries.

        `epoch` is the last complete one, -1 before the first.

        Raises:
            UserError: the file cannot be written; raised in all processes.
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
        """Write the latest checkpoint within an epoch, after `batches` of its batches."""
        batch = self.args.batch_size * get_world_size()
        position = WithinEpoch(batches * batch, batch, get_world_size(), gather_objects(meter.state()), seconds)
        self.save(epoch - 1, [LATEST], {"within_epoch": asdict(position)})

    def save_epoch(self, epoch: int, train_stats: dict[str, float]) -> None:
        """Write an epoch's checkpoints, and with `--keep N` remove all numbered checkpoints except the latest N."""
        self.save(epoch, [LATEST, *self.numbered(epoch)], {"train_stats": train_stats})
        if self.args.keep and self.output_dir and is_main_process():
            numbered = [path for path in self.output_dir.iterdir() if NUMBERED.fullmatch(path.name)]
            numbered.sort(key=lambda path: int(NUMBERED.fullmatch(path.name)[1]))
            for path in numbered[: -self.args.keep]:
                path.unlink()

    def numbered(self, epoch: int) -> list[str]:
        """Return the name of an epoch's numbered checkpoint, if it has one: every `--save_every` epochs, and before the
        learning rate drops."""
        args = self.args
        before, after = (drops_until(done, args.lr_drop, args.lr_drop_epochs) for done in (epoch, epoch + 1))
        drops = args.lr_schedule == "step" and after > before
        return [f"checkpoint{epoch:04}.pth"] if drops or (epoch + 1) % args.save_every == 0 else []

    def resume(self, checkpoint: dict | None, num_batches: int) -> Position:
        """Restore optimizer, scaler, EMA weights and random states; return the position at which the training resumes.

        Without a checkpoint, it is `--start_epoch`. An epoch has `num_batches` batches.

        Raises:
            UserError: the checkpoint's training froze other parameters, kept EMA weights while this one does not, or
                had another optimizer.
        """
        args, start = self.args, Position(self.args.start_epoch)
        if not checkpoint:
            return start
        if "optimizer" not in checkpoint or "epoch" not in checkpoint:
            logger.info("%s holds only weights: training starts from them at epoch %d", args.resume, args.start_epoch)
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
            # Checkpoints of the original repositories have neither entry.
            group["name"] = name
            group.setdefault("initial_lr", group["lr"])
        if [(group["name"], group["initial_lr"]) for group in optimizer.param_groups] != asked:
            logger.info("note: the checkpoint's learning rates are used, not this command's")
        if average and checkpoint.get("model_ema"):
            average.load(checkpoint["model_ema"], checkpoint["ema_steps"])
        if checkpoint.get("scaler"):
            self.optimization.scaler.load_state_dict(checkpoint["scaler"])
        if "random_states" in checkpoint:
            restore_random_states(checkpoint["random_states"][get_rank() % len(checkpoint["random_states"])])
        epoch = checkpoint["epoch"] + 1
        if checkpoint.get("within_epoch"):
            return self.resume_within_epoch(epoch, WithinEpoch(**checkpoint["within_epoch"]), num_batches)
        return Position(epoch)

    def check_same_training(self, checkpoint: dict) -> None:
        """Refuse to resume a training that froze other parameters, or whose EMA weights would be lost."""
        args, saved = self.args, checkpoint.get("args", {})
        frozen = saved.get("freeze") or []
        saved_flag = None
        if sorted(frozen) != sorted(args.freeze):
            saved_flag = f"--freeze {' '.join(frozen)}" if frozen else "no --freeze"
        elif bool(saved.get("frozen_weights")) != bool(args.frozen_weights):
            saved_flag = "--frozen_weights CKPT" if saved.get("frozen_weights") else "no --frozen_weights"
        if saved_flag:
            raise UserError(
                f"{args.resume}: was trained with {saved_flag}; pass the same, or start anew with --pretrained"
            )
        if checkpoint.get("model_ema") and not self.network.average:
            raise UserError(
                f"{args.resume}: holds EMA weights, which would be lost: pass --ema {saved.get('ema')}, as it was "
                "trained, or start anew with --pretrained"
            )

    def resume_within_epoch(self, epoch: int, progress: WithinEpoch, num_batches: int) -> Position:
        """Return the position within an epoch at which its remaining images start."""
        args, batch = self.args, self.args.batch_size * get_world_size()
        # Round down to whole optimizer steps, in case the batch size has changed.
        batches = progress.images // batch // args.accumulate * args.accumulate
        if (progress.batch, progress.processes) == (batch, get_world_size()):
            meter = AverageMeter.merged([progress.meters[get_rank()]], self.device)
        else:
            meter = AverageMeter.merged(progress.meters if is_main_process() else [], self.device)
            logger.info(
                "note: the epoch started with batches of %d images in %d processes and resumes with %d in %d: the same "
                "images remain, up to rounding to whole steps, but the training will not be bit-identical",
                progress.batch, progress.processes, batch, get_world_size(),
            )  # fmt: skip
        return Position(epoch, min(batches, num_batches), meter, progress.seconds)
