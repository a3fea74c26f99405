"""The study's results as tables in Markdown and charts, from the trainings' files. Charts need matplotlib (extra
`plots`)."""

import importlib.util
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from enact_common.benchmark.labels import MIB
from enact_common.benchmark.report import LEFT, RIGHT, figure, markdown_table
from enact_common.study.arms import LONGER, NONE, PLAIN, UNIFORM, fix_lengths, join_all
from enact_common.study.families import FAMILIES
from enact_common.study.images import Shapes
from enact_common.study.presets import ARMS, Preset, Trial, sources_of
from enact_common.study.schedule import tasks_of
from enact_common.study.training import Results, start_of
from enact_common.utils.files import read_json, write_atomically

METRICS = ("AP", "AP50", "APS", "APM", "APL")

# Changes that make clusters independent of the scores.
FIXED = {fix_lengths, join_all}


def results_of(preset: Preset, trial: Trial, results: Results) -> dict[str, dict[int, dict[str, Any]]]:
    """Return the results of a trial's finished trainings, by arm and seed."""
    by_arm: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in trial.arms}
    for task in tasks_of(replace(preset, trials=(trial,))):
        result = results.read(task)
        if result is not None:
            by_arm[task.arm.name][task.seed] = result
    return {name: by_seed for name, by_seed in by_arm.items() if by_seed}


def mean_and_spread(values: Sequence[float]) -> str:
    """Return the mean of fractions in percent, with the standard deviation of several; a dash without values."""
    known = [100 * value for value in values if value is not None and value >= 0]
    if not known:
        return "-"
    text = format(statistics.mean(known), ".1f")
    return text + (f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else "")


def difference(ours: Mapping[int, dict], theirs: Mapping[int, dict]) -> tuple[float, float | None] | None:
    """Return the mean difference in AP of two arms over their common seeds, in points, and its standard error, None for
    one seed. Return None without a common seed."""
    both = sorted(set(ours) & set(theirs))
    if not both:
        return None
    points = [100 * (ours[seed]["figures"]["AP"] - theirs[seed]["figures"]["AP"]) for seed in both]
    error = statistics.stdev(points) / math.sqrt(len(points)) if len(points) > 1 else None
    return statistics.mean(points), error


def differences_to_plain(by_trial: Mapping[str, Mapping[str, Mapping[int, dict]]]) -> dict[str, dict]:
    """Return each arm's `difference` to plain attention, by trial and arm; results are by trial, arm and seed."""
    differences = {}
    for title, arms in by_trial.items():
        to_plain = {name: difference(runs, arms.get(PLAIN, {})) for name, runs in arms.items() if name != PLAIN}
        differences[title] = {name: value for name, value in to_plain.items() if value is not None}
    return {title: arms for title, arms in differences.items() if arms}


def difference_text(value: tuple[float, float | None] | None) -> str:
    """Return a difference with its standard error as text; a dash for None."""
    if value is None:
        return "-"
    return f"{value[0]:+.1f}" + ("" if value[1] is None else f" ± {value[1]:.1f}")


def accuracy_table(
    arms: Mapping[str, Mapping[int, dict]], by_arm: Mapping[str, Mapping[int, dict]], references: tuple[str, str]
) -> str:
    """Return COCO metrics of `arms`, and their differences in AP to reference arms among `by_arm`."""
    columns = {"arm": LEFT, "encoder attention": LEFT, "seeds": RIGHT, **dict.fromkeys((*METRICS, "class"), RIGHT)}
    columns |= {f"to `{name}`": RIGHT for name in references}
    rows = []
    for name, by_seed in arms.items():
        cells = [mean_and_spread([run["figures"][key] for run in by_seed.values()]) for key in METRICS]
        cells.append(mean_and_spread([run["right"] for run in by_seed.values()]))
        against = [
            "" if name == other else difference_text(difference(by_seed, by_arm.get(other, {}))) for other in references
        ]
        rows.append([f"`{name}`", ARMS[name].title, str(len(by_seed)), *cells, *against])
    return markdown_table(columns, rows)


def points_of(by_arm: Mapping[str, Mapping[int, dict]]) -> dict[str, dict[int | None, tuple[float, float | None]]]:
    """Return the main figure's points: the difference in AP to plain attention and its standard error, by family and
    number of clusters, None where the method sets it."""
    points: dict[str, dict[int | None, tuple[float, float | None]]] = {}
    for name, runs in by_arm.items():
        arm, value = ARMS[name], difference(runs, by_arm.get(PLAIN, {}))
        if arm.family and value is not None:
            points.setdefault(arm.family, {})[arm.clusters] = value
    return points


def points_table(by_arm: Mapping[str, Mapping[int, dict]]) -> str:
    """Return the AP lost to plain attention, by family and number of clusters; "" without such arms."""
    points = points_of(by_arm)
    if not points:
        return ""
    budgets = sorted({budget for values in points.values() for budget in values if budget is not None})
    fixed = any(None in values for values in points.values())
    columns = {"method": LEFT, "encoder attention": LEFT, **dict.fromkeys(map(str, budgets), RIGHT)}
    columns |= {"none to set": RIGHT} if fixed else {}
    rows = []
    for family, values in points.items():
        texts = [difference_text(values.get(budget)) for budget in (*budgets, *[None] * fixed)]
        rows.append([f"`{family}`", FAMILIES[family].title, *texts])
    return markdown_table(columns, rows)


def timed_points(
    by_arm: Mapping[str, Mapping[int, dict]], encoders: Mapping[str, dict]
) -> dict[str, list[tuple[float, float, float | None]]]:
    """Return (time of the encoder layer over plain attention's, difference in AP, standard error) by family."""
    base = encoders.get(PLAIN)
    timed: dict[str, list[tuple[float, float, float | None]]] = {}
    for name, runs in by_arm.items():
        arm, value = ARMS[name], difference(runs, by_arm.get(PLAIN, {}))
        if arm.family and value is not None and base and name in encoders:
            ratio = statistics.median(encoders[name]["seconds"]) / statistics.median(base["seconds"])
            timed.setdefault(arm.family, []).append((ratio, *value))
    return timed


def follows_scores(name: str) -> bool:
    """Return whether an arm's clusters, or at least its window lengths, follow learned scores."""
    return name not in (PLAIN, NONE, LONGER) and not FIXED & set(ARMS[name].changes)


def layers_text(values: Sequence[float | None], form: str) -> str:
    """Return a value of each layer as text, side by side."""
    return " / ".join(figure(value, form) for value in values) or "-"


def mean_layers(rows: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Return the mean of each layer over the seeds."""
    columns = ([value for value in column if value is not None] for column in zip(*rows, strict=True))
    return [statistics.mean(column) if column else None for column in columns]


def introspection_table(by_arm: Mapping[str, Mapping[int, dict]]) -> str:
    """Return the clusters at the start and end of training, and how the information relates to objects."""
    columns = {"arm": LEFT, "clusters, first step": RIGHT, "last": RIGHT}
    columns |= {"largest weight, before": RIGHT, "after": RIGHT, "r with objects, before": RIGHT, "after ": RIGHT}
    rows = []
    for name, by_seed in by_arm.items():
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


def costs_table(by_arm: Mapping[str, Mapping[int, dict]], trial: Trial, costs: Mapping[str, Any]) -> str:
    """Return time and memory of each arm, and their ratios to plain attention's."""
    encoders = costs["encoders"].get(trial.variant, {})
    steps = {name: costs["steps"].get(f"{trial.name}-{name}") for name in by_arm}
    columns = {
        "arm": LEFT, "step ms": RIGHT, "ratio": RIGHT, "peak MiB": RIGHT, "ratio ": RIGHT, "layer ms": RIGHT,
        "ratio  ": RIGHT, "clusters": RIGHT, "trained s": RIGHT,
    }  # fmt: skip
    rows = []
    for name, by_seed in by_arm.items():
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
    """Return a trial's title."""
    return f"{trial.variant} on {trial.source.name}"


def trial_text(preset: Preset, trial: Trial, results: Results, costs: Mapping[str, Any]) -> str:
    """Return a trial's section of the page."""
    by_arm = results_of(preset, trial, results)
    title = f"## {title_of(trial)}"
    if not by_arm:
        return f"{title}\n\nNo results yet."
    run = next(iter(next(iter(by_arm.values())).values()))
    size = " x ".join(map(str, run["map_size"]))
    start = next((results.read(start_of(task)) for task in tasks_of(replace(preset, trials=(trial,)))), None)
    start_text = "All arms start from random weights."
    if start is not None:
        start_text = (
            f"All arms start from the weights of one training without encoder attention, on {start['images']:,} images "
            f"(AP {100 * start['figures']['AP']:.1f} on its own data set). The encoder attention is initialised at "
            "random by the seed, with its output projection at zero."
        )
    if trial.encoder_alone:
        start_text += " Only the encoder is trained."
    converted = {name: runs for name, runs in by_arm.items() if ARMS[name].begins_with}
    trained = {name: runs for name, runs in by_arm.items() if name not in converted and not ARMS[name].family}
    parts = [
        title,
        f"Feature maps have {size} cells. Each arm is trained on {run['images']:,} images. {start_text}",
    ]
    by_clusters = points_table(by_arm)
    if by_clusters:
        parts += [
            "AP of each method minus plain attention's, in points, by the most clusters (or keys) of an image: mean "
            "over seeds ± standard error.",
            by_clusters,
        ]
    parts.append(accuracy_table(trained, by_arm, (PLAIN, UNIFORM)))
    if converted:
        parts += [
            "The trained plain attention, converted: without further training, and after a tenth more images.",
            accuracy_table(converted, by_arm, (PLAIN, LONGER)),
        ]
    parts += [
        "Mean ± standard deviation over the seeds, in percent. Class: fraction of objects with the right class, among "
        "those that a query's box covers (IoU of 0.5 or more). To another arm: mean difference in AP over common seeds "
        "± its standard error, in points.",
        introspection_table({name: runs for name, runs in by_arm.items() if not ARMS[name].family}),
        "Clusters: number per image in each encoder layer. Largest weight: the largest pooling weight in a window, "
        "relative to equal weights (1: all equal). r: correlation of a cell's information with being in an object's "
        "box. Before and after training.",
    ]
    if costs:
        parts += [
            costs_table(trained, trial, costs),
            f"Step: one training step of this study, including its batch, without other load, and its rise in peak "
            f"memory. Layer: forward and backward of one encoder layer of the published width on a map of "
            f"{' x '.join(map(str, preset.cost_map))} cells, batch {preset.cost_batch}, median of the runs. "
            "Trained: the whole training, in parallel with another one.",
        ]
    return "\n\n".join(parts)


def write_page(preset: Preset, folder: Path, about: Mapping[str, Any]) -> Path:
    """Write the tables and, if matplotlib is installed, the charts; return the page's path.

    Args:
        preset: the study.
        folder: folder of the results, where the page is written.
        about: `command`, `date`, `machine`, `seconds` and `fraction`.
    """
    results = Results(folder)
    costs = read_json(folder / "costs.json") or {}
    head = [
        "# Results of the study",
        f"Machine: {about['machine']}; {about['date']}; {about['seconds'] / 60:.0f} minutes",
        f"`{about['command']}`",
    ]
    if about["fraction"] < 1:
        head.append(f"A dry run with {about['fraction']:g} of the images, whose metrics are meaningless.")
    sections = [trial_text(preset, trial, results, costs) for trial in preset.trials]
    pictures = []
    if importlib.util.find_spec("matplotlib"):
        from enact_common.study.charts import draw_by_clusters, draw_clusters, draw_differences, draw_examples

        by_trial = {title_of(trial): results_of(preset, trial, results) for trial in preset.trials}
        by_trial = {name: arms for name, arms in by_trial.items() if arms}
        others = {
            title: {name: runs for name, runs in arms.items() if not ARMS[name].family}
            for title, arms in by_trial.items()
        }
        with_scores = {
            title: {name: runs for name, runs in arms.items() if follows_scores(name) and ARMS[name].rate}
            for title, arms in others.items()
        }
        panels = {
            title_of(trial): (
                points_of(by_trial[title_of(trial)]),
                timed_points(by_trial[title_of(trial)], costs.get("points", {}).get(trial.variant, {})),
            )
            for trial in preset.trials
            if points_of(by_trial.get(title_of(trial), {}))
        }
        shapes = {source.name: source for source in sources_of(preset) if isinstance(source, Shapes)}
        draw: dict[str, tuple[Callable, Any]] = {
            "images.png": (draw_examples, list(shapes.values())),
            "by_clusters.png": (draw_by_clusters, panels),
            "differences.png": (draw_differences, differences_to_plain(others)),
            "clusters.png": (draw_clusters, {title: arms for title, arms in with_scores.items() if arms}),
        }
        for name, (chart, content) in draw.items():
            if not content:
                continue
            chart(content, folder / name)
            pictures.append(f"![{name.removesuffix('.png').capitalize()}]({name})")
    path = folder / "accuracy.md"
    text = "\n\n".join([*head, *pictures, *sections]) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()), sync=False)
    return path
