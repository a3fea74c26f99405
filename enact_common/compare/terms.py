"""Terms of a comparison: the runs' settings, their differences, and whether only the encoder attention differs."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from enact_common.attention.rivals import RIVALS
from enact_common.cli.flags import CLUSTERING_FLAGS, ENACT_FLAGS
from enact_common.compare.recorded import RecordedRun
from enact_common.compare.tables import DASH, Table
from enact_common.models.layers import encoder_settings, rival_text

# Shown if the runs are comparable.
EQUAL = "Equal terms: according to their records, these runs differ at most in the encoder attention."

# Flags under comparison.
SUBJECT = ("encoder_attention", *ENACT_FLAGS, *CLUSTERING_FLAGS)

# Flags that change time and memory, but not the trained weights.
COSTS = ("device", "compile", "checkpoint_activations", "cache_mode", "num_workers")

# Flags that change neither, including the original repositories' flags for distributed runs.
IDLE = (
    "output_dir", "auto_resume", "start_epoch", "eval", "eval_every", "print_freq", "dist_url", "dist_backend", "rank",
    "gpu", "local_rank", "distributed", "log",
)  # fmt: skip


def value_text(value: Any) -> str:
    """Return a flag's value as readable text."""
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " ".join(map(value_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def flag_value(run: RecordedRun, flag: str) -> str | None:
    """Return a flag's value as text, or None if the run lacks the flag."""
    if flag not in run.args:
        return None
    value = run.args[flag]
    # Resuming from its own folder does not set a run apart.
    if flag == "resume" and value and Path(value).parent == Path(run.args.get("output_dir") or "."):
        value = ""
    return value_text(value)


def differing_flags(runs: Sequence[RecordedRun]) -> dict[str, list[str | None]]:
    """Return the flags that differ, with each run's value, or None if the run lacks the flag.

    ENACT's flags and flags without effect are left out.
    """
    differing = {}
    for flag in sorted({flag for run in runs for flag in run.args} - {*SUBJECT, *IDLE}):
        values = [flag_value(run, flag) for run in runs]
        if len({value for value in values if value is not None}) > 1:
            differing[flag] = values
    return differing


def attention_text(run: RecordedRun) -> str | None:
    """Return a run's encoder attention in words, or None if unknown."""
    kinds = {"enact": "ENACT", "mhsa": "plain (mhsa)"}
    attention = run.args.get("encoder_attention")
    return (
        rival_text(attention, run.args.get("token_budget")) if attention in RIVALS else kinds.get(attention, attention)
    )


def enact_text(run: RecordedRun) -> str | None:
    """Return a run's ENACT settings in words, or None without ENACT."""
    if run.args.get("encoder_attention") != "enact" or "smoothing_sigma" not in run.args:
        return None
    settings = encoder_settings(SimpleNamespace(**run.args))
    words = [f"{name.replace('_', ' ')} {value_text(value)}" for name, value in settings.items() if value]
    return ", ".join(words).replace(" yes", "")


def batch(run: RecordedRun) -> str | None:
    """Return the number of images per step, with its factors."""
    if "batch_size" not in run.args:
        return None
    parts = [run.args["batch_size"], run.args.get("accumulate") or 1, run.args.get("world_size") or 1]
    product = parts[0] * parts[1] * parts[2]
    return str(product) if product == parts[0] else f"{product} = {' x '.join(map(str, parts))}"


def joined(run: RecordedRun, form: str, *flags: str) -> str | None:
    """Return the flags' values formatted by `form`, or None if the run lacks any of the flags."""
    values = [flag_value(run, flag) for flag in flags]
    return None if None in values else form.format(*values)


def settings_table(runs: Sequence[RecordedRun]) -> Table:
    """Return the table of the runs' settings. Rows in which the runs differ are marked."""

    def epochs(run: RecordedRun) -> str | None:
        asked = run.args.get("epochs")
        return None if run.epochs_done is None else f"{run.epochs_done}" + (f" of {asked}" if asked else "")

    def backbone(run: RecordedRun) -> str | None:
        return joined(run, "{}" + (" DC5" if run.args.get("dilation") else ""), "backbone")

    def evaluated(run: RecordedRun) -> str | None:
        record = run.evaluation or {}
        words = [
            record.get("set"),
            f"{record['images']:,} images" if isinstance(record.get("images"), int) else None,
            f"after epoch {run.evaluated_epoch}" if run.evaluated_epoch else None,
        ]
        return ", ".join(str(word) for word in words if word) or None

    def checkpoint(run: RecordedRun) -> str | None:
        after = f", after epoch {run.trained}" if run.trained else ""
        return run.checkpoint and run.checkpoint.name + after

    rows = {
        "detector": lambda run: run.variant,
        "encoder attention": attention_text,
        "ENACT's settings": enact_text,
        "backbone": backbone,
        "parameters": lambda run: run.parameters and f"{run.parameters:,}",
        "epochs": epochs,
        "images per step": batch,
        "learning rate": lambda run: joined(run, "{}, backbone {}", "lr", "lr_backbone"),
        "image size": lambda run: joined(run, "{} (longer side at most {})", "eval_size", "max_size"),
        "precision": lambda run: joined(run, "{}", "amp") and run.args["amp"].replace("none", "float32"),
        "seed": lambda run: joined(run, "{}", "seed"),
        "data": lambda run: run.args.get("val_annotations") or run.args.get("coco_path"),
        "evaluated on": evaluated,
        "checkpoint": checkpoint,
    }
    texts = {name: [text_of(run) for run in runs] for name, text_of in rows.items()}
    return Table(
        "The runs",
        ["", *(run.name for run in runs)],
        [[name, *(text or DASH for text in row)] for name, row in texts.items() if any(row)],
        note="Marked rows differ.",
        # An unknown value does not count as a difference.
        marked=[len(set(row) - {None}) > 1 for row in texts.values() if any(row)],
    )


def flags_table(runs: Sequence[RecordedRun]) -> Table | None:
    """Return the table of the differing flags of `differing_flags`, or None if no flag differs."""
    rows = [[f"--{flag}", *(value or DASH for value in row)] for flag, row in differing_flags(runs).items()]
    return Table("Flags that differ", ["flag", *(run.name for run in runs)], rows) if rows else None


def inequalities(runs: Sequence[RecordedRun]) -> list[str]:
    """Return why the runs are not on equal terms, one sentence per reason; empty if they are."""
    reasons = []
    unknown = [run.name for run in runs if not run.args]
    if unknown:
        reasons.append(f"The settings of {', '.join(unknown)} are unknown, since there is no checkpoint.")
    variants = [run.variant for run in runs if run.variant]
    if len(set(variants)) > 1:
        reasons.append(f"These are different detectors: {', '.join(variants)}.")
    flags = differing_flags(runs)
    terms = [f"--{flag} ({versus(values)})" for flag, values in flags.items() if flag not in COSTS]
    if terms:
        reasons.append(f"These runs differ in more than the encoder attention: {', '.join(terms)}.")
    for predicate, values in (
        ("were trained for different numbers of epochs", [run.epochs_done for run in runs]),
        ("were evaluated after different numbers of epochs", [run.evaluated_epoch for run in runs]),
        ("were evaluated on different sets", [(run.evaluation or {}).get("set") for run in runs]),
        ("were evaluated on different numbers of images", [(run.evaluation or {}).get("images") for run in runs]),
        ("were evaluated on different classes or objects", [objects(run) for run in runs]),
    ):
        known = [value for value in values if value is not None]
        if len(set(known)) > 1:
            listed = "" if isinstance(known[0], tuple) else f" ({versus(values)})"
            reasons.append(f"These runs {predicate}{listed}.")
    costs = [f"--{flag} ({versus(values)})" for flag, values in flags.items() if flag in COSTS]
    if costs:
        reasons.append(f"Time and memory are not on equal terms: {', '.join(costs)}.")
    return reasons


def versus(values: Sequence[Any]) -> str:
    """Join the runs' values by "against"."""
    return " against ".join(DASH if value is None else str(value) for value in values)


def objects(run: RecordedRun) -> tuple | None:
    """Return (class name, number of objects) for each class of a run's evaluation, or None."""
    if run.evaluation is None:
        return None
    return tuple((row["name"], row["objects"]) for row in run.evaluation["classes"])
