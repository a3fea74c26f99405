"""The study's command line: `python -m enact_common.study --preset cpu --output_dir study`."""

import argparse
import difflib
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import torch

from enact_common import study
from enact_common.benchmark.isolated import DONE, run_isolated
from enact_common.benchmark.measuring import machine
from enact_common.cli.program import Parser, program
from enact_common.cli.types import HelpFormatter, fraction, positive_int
from enact_common.study.arms import NONE, PLAIN, WINDOWS
from enact_common.study.costs import measure_encoders, measure_step
from enact_common.study.families import BUDGETS, FAMILIES
from enact_common.study.images import Shapes
from enact_common.study.page import write_page
from enact_common.study.photographs import Pasted
from enact_common.study.presets import ARMS, PRESETS, Preset, Trial, photograph_trials, sources_of
from enact_common.study.schedule import run_trainings, tasks_of
from enact_common.study.sources import Source, load_images
from enact_common.study.training import Results
from enact_common.utils.device import find_device
from enact_common.utils.errors import UserError, exit_status
from enact_common.utils.files import make_folder, write_atomically

# Timed runs of each encoder: on the published size, and on the study's own maps, where a run takes few milliseconds.
REPEAT, POINT_REPEAT = 5, 25

# Minimum number of images that `--fraction` leaves of a data set.
FEWEST = 16


def build_parser() -> argparse.ArgumentParser:
    """Return the command-line parser."""
    description = study.__doc__.splitlines()[0]
    parser = Parser(prog=program("enact_common.study"), description=description, formatter_class=HelpFormatter)
    parser.add_argument("--preset", choices=tuple(PRESETS), required=True, default=argparse.SUPPRESS, help="study size")
    parser.add_argument(
        "--output_dir", required=True, metavar="DIR", default=argparse.SUPPRESS,
        help="folder for the page and the results, a small JSON file per training. Finished trainings are kept. "
        "On a machine without permanent storage, copy results/ and weights/ there first and back afterwards; without "
        "weights/, the trainings that others start from are repeated",
    )  # fmt: skip
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="variants to study (default: the preset's)")
    parser.add_argument(
        "--arms", nargs="+", type=arm_name, choices=tuple(ARMS), metavar="NAME",
        help="arms to train, with the arms they start from (default: those of the preset): "
        f"{', '.join(name for name, arm in ARMS.items() if not arm.clusters)}; and by the most clusters M, of "
        f"{', '.join(map(str, BUDGETS))}: {', '.join(f'{name}_M' for name in FAMILIES if name not in ARMS)}",
    )  # fmt: skip
    parser.add_argument("--seeds", type=positive_int, metavar="N", help="number of seeds (default: the preset's)")
    parser.add_argument(
        "--coco_mini", metavar="DIR",
        help="folder of COCO 2017, or of a part, whose objects are pasted into its photographs, to use instead of "
        "the drawn images; needs the extra photographs",
    )  # fmt: skip
    parser.add_argument(
        "--bccd", metavar="DIR",
        help="folder of a real data set in COCO's layout, to use instead of the drawn images; needs the extra "
        "photographs",
    )  # fmt: skip
    parser.add_argument(
        "--problems", nargs="+", metavar="NAME",
        help="problems to study (default: all): context and small, drawn; company and pasted with --coco_mini; bccd "
        "with --bccd",
    )  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: the preset's)")
    parser.add_argument("--jobs", type=positive_int, metavar="N", help="parallel trainings (default: the preset's)")
    parser.add_argument(
        "--seconds", type=positive_int, metavar="S",
        help="after this many seconds, save the running trainings, which the next call continues (default: the "
        "preset's)",
    )  # fmt: skip
    parser.add_argument(
        "--fraction", type=fraction, default=1.0, metavar="F",
        help="fraction of the preset's images, 0 to 1; below 1 only for a dry run, whose metrics are meaningless",
    )  # fmt: skip
    parser.add_argument(
        "--skip_costs", action="store_true", help="do not measure time and memory, e.g. on a busy machine"
    )
    return parser


def arm_name(text: str) -> str:
    """The name of an arm, for argparse, whose own message would list all of them."""
    if text not in ARMS:
        near = difflib.get_close_matches(text, ARMS, 3)
        raise argparse.ArgumentTypeError(f"no arm {text!r}" + (f"; nearest: {', '.join(near)}" if near else ""))
    return text


def chosen_preset(args: argparse.Namespace) -> Preset:
    """Return the preset with the changes of the command line; refuse unknown folders, problems and variants."""
    preset = PRESETS[args.preset]
    folders = {"coco_mini": args.coco_mini, "bccd": args.bccd}
    for name, folder in folders.items():
        if folder and not (Path(folder) / "annotations").is_dir():
            raise UserError(f"--{name} {folder}: has no annotations/ folder; pass a data set in COCO's layout")
    made = list(photograph_trials(args.preset, **folders) if any(folders.values()) else preset.trials)
    made = only(made, "problems", args.problems, [trial.source.name for trial in made])
    made = only(made, "variants", args.variants, [trial.variant for trial in made])
    if args.arms:
        wanted = set(args.arms)
        for name in args.arms:
            wanted |= {ARMS[name].lengths_of, ARMS[name].begins_with}
        made = [replace(trial, arms=tuple(name for name in trial.arms if name in wanted)) for trial in made]
    made = [shrunk(trial, args.fraction) for trial in made]
    if args.seeds:
        made = [replace(trial, seeds=args.seeds) for trial in made]
    changes = {name: getattr(args, name) for name in ("device", "jobs", "seconds") if getattr(args, name)}
    if args.fraction < 1:
        changes |= {"cost_map": (10, 16)}
    return replace(preset, trials=tuple(made), **changes)


def only(made: list[Trial], flag: str, wanted: list[str] | None, names: list[str]) -> list[Trial]:
    """Return the trials whose names are wanted; all if None. Refuse if there is none."""
    chosen = [trial for trial, name in zip(made, names, strict=True) if wanted is None or name in wanted]
    if not chosen:
        known = ", ".join(dict.fromkeys(names))
        raise UserError(f"--{flag} {' '.join(wanted or [])}: this preset has none of these; choose from {known}")
    return chosen


def shrunk(trial: Trial, part: float) -> Trial:
    """Return a trial with a fraction of its images."""
    if part == 1:
        return trial
    few = {name: max(round(getattr(trial, name) * part), FEWEST) for name in ("images", "start_images")}
    if not trial.start_images:
        few["start_images"] = 0
    fewer = {name: shrunk_source(getattr(trial, name), part) for name in ("source", "start_source")}
    first = trial.backbone_of and shrunk(trial.backbone_of, part)
    return replace(trial, backbone_of=first, **fewer, **few)


def shrunk_source(source: Source | None, part: float) -> Source | None:
    """Return a source with a fraction of its images, at least `FEWEST`, if they are made; real images are all kept."""
    if not isinstance(source, Shapes | Pasted):
        return source
    return replace(source, **{name: max(round(getattr(source, name) * part), FEWEST) for name in ("train", "val")})


def measure_costs(preset: Preset, folder: Path) -> None:
    """Measure time and memory of each arm, and write them to `costs.json`."""
    results = Results(folder)
    costs: dict[str, dict] = {"machine": machine(torch.device("cpu")), "steps": {}, "encoders": {}, "points": {}}
    for trial in preset.trials:
        tasks = [task for task in tasks_of(replace(preset, trials=(trial,))) if task.seed == 0]
        tasks = [task for task in tasks if results.read(task) is not None and not task.arm.begins_with]
        settings = [task for task in tasks if not task.arm.family]
        for task in settings:
            outcome = run_isolated(measure_step, task, folder, preset.threads)
            if outcome.status == DONE:
                costs["steps"][task.name.rsplit("-", 1)[0]] = outcome.value
            else:
                print(f"{task.name}: {outcome.message}", file=sys.stderr)
        windows = next((results.read(task) for task in tasks if task.arm.name == WINDOWS), None)
        if trial.variant in costs["encoders"] or not tasks:
            continue
        lengths = windows["mean_lengths"] if windows else [5]
        arms = tuple(task.arm for task in settings if task.arm.name != NONE)
        # The points of the main figure are timed on the study's own map, which their numbers of clusters belong to.
        points = tuple(task.arm for task in tasks if task.arm.family or task.arm.name == PLAIN)
        own_map = results.read(tasks[0])["map_size"]
        for kind, measured, shape, repeat in (
            ("encoders", arms, preset.cost_map, REPEAT), ("points", points, own_map, POINT_REPEAT)
        ):  # fmt: skip
            outcome = run_isolated(
                measure_encoders, trial.variant, measured, round(sum(lengths) / len(lengths)), tuple(shape),
                preset.cost_batch, preset.device, preset.amp, preset.jobs * preset.threads, repeat,
            )  # fmt: skip
            if outcome.status != DONE:
                raise UserError(f"encoders of {trial.variant}: {outcome.message}\n{outcome.details}")
            costs[kind][trial.variant] = outcome.value
    write_atomically(folder / "costs.json", lambda file: file.write(json.dumps(costs, indent=1).encode()), sync=False)


def run(args: argparse.Namespace) -> int:
    """Train, measure, and write the page."""
    begin = time.perf_counter()
    preset = chosen_preset(args)
    device = find_device(preset.device)
    folder = Path(args.output_dir)
    make_folder(folder)
    for source in sources_of(preset):
        # Draw once, before any training, so that the processes find the images in the cache.
        load_images(source, folder / "data")
    left = run_trainings(preset, folder, begin + preset.seconds)
    # Measure once, at the end: it would take up a time slice.
    if not left and not args.skip_costs:
        measure_costs(preset, folder)
    about = {
        "command": f"python -m enact_common.study {shlex.join(args.argv)}",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": machine(device),
        "seconds": time.perf_counter() - begin,
        "fraction": args.fraction,
    }
    print(f"written to {write_page(preset, folder, about)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study; return the exit status: 0, or 2 for a user error."""
    parser = build_parser()
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else list(argv)
    return exit_status(parser.prog, lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
