"""What the study found: tables in Markdown and charts, from the trainings' files. Charts need matplotlib (extra
`plots`)."""

import importlib.util
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from enact_common.benchmark.labels import MIB
from enact_common.benchmark.report import LEFT, RIGHT, figure, markdown_table
from enact_common.study.arms import LONGER, NONE, PLAIN, UNIFORM, fix_lengths, join_all
from enact_common.study.images import Shapes
from enact_common.study.presets import ARMS, Preset, Trial, sources_of
from enact_common.study.schedule import tasks_of
from enact_common.study.training import Results, start_of
from enact_common.utils.files import write_atomically

METRICS = ("AP", "AP50", "APS", "APM", "APL")

# Changes that leave nothing to the scores.
FIXED = {fix_lengths, join_all}


def results_of(preset: Preset, trial: Trial, results: Results) -> dict[str, dict[int, dict[str, Any]]]:
    """The trainings of a trial that are done: by arm, by seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in trial.arms}
    for task in tasks_of(replace(preset, trials=(trial,))):
        result = results.read(task)
        if result is not None:
            found[task.arm.name][task.seed] = result
    return {name: by_seed for name, by_seed in found.items() if by_seed}


def mean_and_spread(values: Sequence[float]) -> str:
    """The mean of percentages, and their standard deviation where there are several; a dash where there are none."""
    known = [100 * value for value in values if value is not None and value >= 0]
    if not known:
        return "-"
    text = format(statistics.mean(known), ".1f")
    return text + (f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else "")


def difference(ours: Mapping[int, dict], theirs: Mapping[int, dict]) -> tuple[float, float | None] | None:
    """Points of AP between two arms, the mean over the seeds that both have, and its standard error, None of one
    seed; None without a common seed."""
    both = sorted(set(ours) & set(theirs))
    if not both:
        return None
    points = [100 * (ours[seed]["figures"]["AP"] - theirs[seed]["figures"]["AP"]) for seed in both]
    error = statistics.stdev(points) / math.sqrt(len(points)) if len(points) > 1 else None
    return statistics.mean(points), error


def difference_text(value: tuple[float, float | None] | None) -> str:
    """A difference with its standard error; a dash where there is none."""
    if value is None:
        return "-"
    return f"{value[0]:+.1f}" + ("" if value[1] is None else f" ± {value[1]:.1f}")


def accuracy_table(
    shown: Mapping[str, Mapping[int, dict]], found: Mapping[str, Mapping[int, dict]], references: tuple[str, str]
) -> str:
    """COCO's figures of some arms, and how far their AP is from that of others among all that were found."""
    columns = {"arm": LEFT, "encoder attention": LEFT, "seeds": RIGHT, **dict.fromkeys((*METRICS, "class"), RIGHT)}
    columns |= {f"to `{name}`": RIGHT for name in references}
    rows = []
    for name, by_seed in shown.items():
        cells = [mean_and_spread([run["figures"][key] for run in by_seed.values()]) for key in METRICS]
        cells.append(mean_and_spread([run["right"] for run in by_seed.values()]))
        against = [
            "" if name == other else difference_text(difference(by_seed, found.get(other, {}))) for other in references
        ]
        rows.append([f"`{name}`", ARMS[name].title, str(len(by_seed)), *cells, *against])
    return markdown_table(columns, rows)


def follows_scores(name: str) -> bool:
    """Whether an arm's clusters follow learned scores, its windows' lengths at least."""
    return name not in (PLAIN, NONE, LONGER) and not FIXED & set(ARMS[name].changes)


def layers_text(values: Sequence[float | None], form: str) -> str:
    """A figure of each layer, side by side."""
    return " / ".join(figure(value, form) for value in values) or "-"


def mean_layers(rows: Sequence[Sequence[float | None]]) -> list[float | None]:
    """The mean of each layer over the seeds."""
    columns = ([value for value in column if value is not None] for column in zip(*rows, strict=True))
    return [statistics.mean(column) if column else None for column in columns]


def inside_table(found: Mapping[str, Mapping[int, dict]]) -> str:
    """Clusters at the beginning and at the end of the training, and what the information has to do with objects."""
    columns = {"arm": LEFT, "clusters, first step": RIGHT, "last": RIGHT}
    columns |= {"largest share, before": RIGHT, "after": RIGHT, "r with objects, before": RIGHT, "after ": RIGHT}
    rows = []
    for name, by_seed in found.items():
        runs = list(by_seed.values()) if follows_scores(name) else []
        if not runs:
            continue
        ends = [layers_text(mean_layers([run["clusters"][i]["clusters"] for run in runs]), ".0f") for i in (0, -1)]
        cells = [
            layers_text(mean_layers([run[when][key] for run in runs]), form)
            for key, form in (("inequality", ".3f"), ("correlation", "+.2f"))
            for when in ("before", "after")
        ]
        rows.append([f"`{name}`", *ends, *cells])
    return markdown_table(columns, rows)


def costs_table(found: Mapping[str, Mapping[int, dict]], trial: Trial, costs: Mapping[str, Any]) -> str:
    """Time and memory of each arm, and over plain attention's."""
    encoders = costs["encoders"].get(trial.variant, {})
    steps = {name: costs["steps"].get(f"{trial.name}-{name}") for name in found}
    columns = {
        "arm": LEFT, "step ms": RIGHT, "ratio": RIGHT, "peak MiB": RIGHT, "ratio ": RIGHT, "layer ms": RIGHT,
        "ratio  ": RIGHT, "clusters": RIGHT, "trained s": RIGHT,
    }  # fmt: skip
    rows = []
    for name, by_seed in found.items():
        step, base = steps[name], steps.get(PLAIN)
        encoder, plain = (
            statistics.median(encoders[key]["seconds"]) if key in encoders else None for key in (name, PLAIN)
        )
        rows.append(
            [
                f"`{name}`",
                figure(step and 1000 * step["seconds"], ".0f"),
                figure(step["seconds"] / base["seconds"] if step and base else None, ".2f"),
                figure(step and step["memory"] / MIB, ".0f"),
                figure(step["memory"] / base["memory"] if step and base and base["memory"] else None, ".2f"),
                figure(encoder and 1000 * encoder, ".0f"),
                figure(encoder / plain if encoder and plain else None, ".2f"),
                figure(encoders.get(name, {}).get("clusters"), "d"),
                figure(statistics.mean(run["seconds"] for run in by_seed.values()), ".0f"),
            ]
        )
    return markdown_table(columns, rows)


def title_of(trial: Trial) -> str:
    """What a trial is about."""
    return f"{trial.variant} on {trial.source.name}"


def trial_text(preset: Preset, trial: Trial, results: Results, costs: Mapping[str, Any]) -> str:
    """One trial's section."""
    found = results_of(preset, trial, results)
    title = f"## {title_of(trial)}"
    if not found:
        return f"{title}\n\nNothing is done yet."
    run = next(iter(next(iter(found.values())).values()))
    size = " x ".join(map(str, run["map_size"]))
    start = next((results.read(start_of(task)) for task in tasks_of(replace(preset, trials=(trial,)))), None)
    began = "All begin with random weights."
    if start is not None:
        began = (
            f"All begin with the weights of one training without attention in the encoder, on {start['images']:,} "
            f"images (AP {100 * start['figures']['AP']:.1f} on images of its own kind); the encoder's attention is "
            "random, and the seed's, but for its last projection, which is zero."
        )
    if trial.encoder_alone:
        began += " The encoder alone is trained."
    trained = {name: runs for name, runs in found.items() if not ARMS[name].begins_with}
    converted = {name: runs for name, runs in found.items() if name not in trained}
    parts = [
        title,
        f"Feature maps of {size} cells; each arm is trained on {run['images']:,} images. {began}",
        accuracy_table(trained, found, (PLAIN, UNIFORM)),
    ]
    if converted:
        parts += [
            "Plain attention as it came out of that, converted: as it is then, and after a tenth of the images more.",
            accuracy_table(converted, found, (PLAIN, LONGER)),
        ]
    parts += [
        "Mean ± standard deviation over the seeds, in percent. Class: of the objects that a query's box covers (an IoU "
        "of 0.5 or more), those whose class is right. To another arm: points of AP, the mean difference of the same "
        "seeds ± its standard error.",
        inside_table(found),
        "Clusters of an image in each encoder layer; largest share: of a window's tokens, over what each would have in "
        "an average (1: all alike); r: of a cell's information with being in an object's box. Before and after the "
        "training.",
    ]
    if costs:
        parts += [
            costs_table(trained, trial, costs),
            f"Step: of the training here, batch and all, alone on the machine, and by how much it raises the peak. "
            f"Layer: forward and backward of one encoder layer of the published width on a map of "
            f"{' x '.join(map(str, preset.cost_map))} cells, batch {preset.cost_batch}, the median of the runs. "
            "Trained: the whole training, beside another one.",
        ]
    return "\n\n".join(parts)


def write_page(preset: Preset, folder: Path, about: Mapping[str, Any]) -> Path:
    """Write the tables and, where matplotlib is there, the charts.

    Args:
        preset: what was studied.
        folder: with the results; the page goes there.
        about: `command`, `date`, `machine`, `seconds` and `fraction`.

    Returns:
        the page's path.
    """
    results = Results(folder)
    costs_file = folder / "costs.json"
    costs = json.loads(costs_file.read_text()) if costs_file.is_file() else {}
    head = [
        "# Figures of the study",
        f"Machine: {about['machine']}; {about['date']}; {about['seconds'] / 60:.0f} minutes",
        f"`{about['command']}`",
    ]
    if about["fraction"] < 1:
        head.append(f"With {about['fraction']:g} of the images: a trial run, whose figures mean nothing.")
    sections = [trial_text(preset, trial, results, costs) for trial in preset.trials]
    pictures = []
    if importlib.util.find_spec("matplotlib"):
        from enact_common.study.charts import draw_clusters, draw_examples, draw_precision

        found = {title_of(trial): results_of(preset, trial, results) for trial in preset.trials}
        found = {name: arms for name, arms in found.items() if arms}
        moving = {
            title: {name: runs for name, runs in arms.items() if follows_scores(name) and ARMS[name].rate}
            for title, arms in found.items()
        }
        drawn = {source.name: source for source in sources_of(preset) if isinstance(source, Shapes)}
        draw: dict[str, tuple[Callable, Any]] = {
            "images.png": (draw_examples, list(drawn.values())),
            "precision.png": (draw_precision, found),
            "clusters.png": (draw_clusters, {title: arms for title, arms in moving.items() if arms}),
        }
        for name, (picture, shown) in draw.items():
            if not shown:
                continue
            picture(shown, folder / name)
            pictures.append(f"![{name.removesuffix('.png').capitalize()}]({name})")
    path = folder / "accuracy.md"
    text = "\n\n".join([*head, *pictures, *sections]) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()), sync=False)
    return path
