"""Presets of the study: at most an hour per call on two CPU cores, or slices of ten minutes on a GPU."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from enact_common.study.arms import (
    CONVERTED,
    LONGER,
    NONE,
    PLAIN,
    UNIFORM,
    UNTRAINED,
    WINDOWS,
    Arm,
    Change,
    ChangeShares,
    EqualShares,
    LearnedTemperature,
    MiddleAlone,
    attend_to_nothing,
    fix_lengths,
    join_all,
    keep_scores,
    weigh_by_size,
)
from enact_common.study.families import CURVE, DIFFERING, FAMILIES, RECOMMENDED, SCALED, ZERO, arms_of
from enact_common.study.images import Shapes
from enact_common.study.photographs import Pasted, Photographs
from enact_common.study.sources import Source

# Arms that continue a finished training use a tenth of its images and learning rates, since the full learning rates
# would undo the training with any attention.
TENTH = 0.1


def conversions(
    kind: str, title: str, flags: tuple[str, ...] = (), changes: tuple[Change, ...] = (), trained: bool = True
) -> list[Arm]:
    """Return the arms of trained plain attention, converted: without further training, and `trained` further.

    `kind` is the kind of clusters, for the arms' names; "" for ENACT's windows. Other arguments are those of `Arm`.
    """
    suffix = f"_{kind}" * bool(kind)
    made = []
    for name, how, part in ((UNTRAINED, "untrained", 0.0), (CONVERTED, "a tenth longer", TENTH))[: 1 + trained]:
        lengths_of = name if fix_lengths in changes else None
        made.append(
            Arm(name + suffix, f"plain, converted to {title}, {how}", flags, changes, lengths_of, PLAIN, part, part)
        )
    return made


SHORTER = ("--smoothing_sigma", "1")

LIST = (
    Arm(PLAIN, "plain attention", ("--encoder_attention", "mhsa")),
    Arm(NONE, "none: only the encoder's feed-forward networks", ("--encoder_attention", "mhsa"), (attend_to_nothing,)),
    *(arm for name in FAMILIES for arm in arms_of(name)),
    Arm(WINDOWS, "ENACT: windows, as published"),
    Arm("regions", "ENACT: regions", ("--enact_clusters", "regions")),
    Arm("per_image", "ENACT: windows of each image, without padding", ("--enact_per_image", "--enact_mask_padding")),
    Arm(
        UNIFORM,
        "average pooling over windows of the same lengths",
        changes=(fix_lengths, ChangeShares(EqualShares)),
        lengths_of=WINDOWS,
    ),
    Arm("strided", "every c-th token", changes=(fix_lengths, ChangeShares(MiddleAlone)), lengths_of=WINDOWS),
    Arm("sigma_1", "shorter windows, from less smoothed information", SHORTER),
    Arm("hilbert", "windows along a Hilbert curve", CURVE),
    Arm("temperature", "windows, unequal pooling weights", DIFFERING),
    Arm("scaled", "windows, logits scaled", SCALED),
    Arm("scaled_hilbert", "windows along a Hilbert curve, logits scaled", (*SCALED, *CURVE)),
    Arm("scaled_hilbert_sigma_1", "shorter windows along a Hilbert curve, logits scaled", (*SCALED, *CURVE, *SHORTER)),
    Arm(
        "scaled_hilbert_temperature",
        "windows along a Hilbert curve, logits scaled, unequal pooling weights",
        RECOMMENDED,
    ),
    Arm(
        "scaled_hilbert_zero",
        "windows along a Hilbert curve, logits scaled, unequal pooling weights, scores that start at zero",
        (*RECOMMENDED, *ZERO),
    ),
    Arm(
        "scaled_hilbert_random",
        "windows along a Hilbert curve, logits scaled, unequal pooling weights by random scores",
        RECOMMENDED,
        (keep_scores,),
    ),
    Arm(
        "scaled_hilbert_sharp",
        "windows along a Hilbert curve, logits scaled, more unequal pooling weights",
        (*SCALED, *CURVE, "--enact_temperature", "0.25"),
    ),
    Arm(
        "scaled_hilbert_sigma_1_temperature",
        "shorter windows along a Hilbert curve, logits scaled, unequal pooling weights",
        (*SCALED, *CURVE, *SHORTER, *DIFFERING),
    ),
    Arm(
        "scaled_uniform",
        "average pooling over windows of the same lengths, logits scaled",
        SCALED,
        (fix_lengths, ChangeShares(EqualShares)),
        lengths_of="scaled",
    ),
    Arm(
        "learned",
        "windows, unequal pooling weights by a learned temperature",
        changes=(ChangeShares(LearnedTemperature),),
    ),
    Arm("regions_by_size", "regions weighted by their size", ("--enact_clusters", "regions"), changes=(weigh_by_size,)),
    *conversions("", "ENACT's windows"),
    Arm(LONGER, "plain, a tenth longer", ("--encoder_attention", "mhsa"), begins_with=PLAIN, budget=TENTH, rate=TENTH),
    *conversions("sigma_1", "shorter windows", SHORTER),
    *conversions("hilbert", "windows along a Hilbert curve", CURVE),
    *conversions("temperature", "windows, unequal pooling weights", DIFFERING, trained=False),
    *conversions("hilbert_temperature", "windows along a Hilbert curve, unequal pooling weights", (*CURVE, *DIFFERING)),
    *conversions(
        "hilbert_sigma_1_temperature",
        "shorter windows along a Hilbert curve, unequal pooling weights",
        (*CURVE, *SHORTER, *DIFFERING),
    ),
    *conversions("regions", "regions", ("--enact_clusters", "regions"), trained=False),
    *conversions(
        "uniform", "averages of the same lengths", changes=(fix_lengths, ChangeShares(EqualShares)), trained=False
    ),
    *conversions("strided", "every c-th token", changes=(fix_lengths, ChangeShares(MiddleAlone)), trained=False),
    *conversions("single", "the average of all tokens", changes=(join_all, ChangeShares(EqualShares)), trained=False),
)
ARMS = {arm.name: arm for arm in LIST}


@dataclass(frozen=True)
class Trial:
    """Arms that are compared with each other.

    Attributes:
        arms: names in `ARMS`, plain attention first.
        flags: flags for the variant's command line, for all arms.
        images: number of training images of each arm, counting repeats.
        start_images: number of images of the start training without encoder attention; 0 to start from random weights.
        seeds: number of seeds.
        start_source, encoder_alone: as in `Task`.
        backbone_of: trial whose start training provides the backbone for this trial's; None for random weights.
    """

    source: Source
    variant: str
    arms: tuple[str, ...]
    flags: tuple[str, ...]
    images: int
    start_images: int
    seeds: int
    start_source: Source | None = None
    encoder_alone: bool = False
    backbone_of: "Trial | None" = None

    @property
    def name(self) -> str:
        """Name in files."""
        return f"{self.source.name}-{self.variant}"


@dataclass(frozen=True)
class Preset:
    """The settings of a study.

    Attributes:
        jobs: number of parallel trainings.
        threads: CPU threads of each training.
        seconds: time after which running trainings save their state, for the next call to continue.
        cost_map: height and width of the feature map that encoders are timed on.
        cost_batch: number of images when encoders are timed.
        amp: precision when encoders are timed, a key of `AMP_DTYPE`.
    """

    trials: tuple[Trial, ...]
    device: str
    jobs: int
    threads: int
    seconds: float
    cost_map: tuple[int, int] = (50, 80)
    cost_batch: int = 1
    amp: str = "none"


def sources_of(preset: Preset) -> tuple[Source, ...]:
    """Return the data sets of a preset, each once, with a trial's start source before its own."""
    both = (source for trial in preset.trials for source in (trial.start_source, trial.source))
    return tuple(dict.fromkeys(source for source in both if source is not None))


# 32 x 32 to 32 x 36 cells of 4 pixels: a deeper backbone would take too long on two CPU cores.
CPU_MODEL = (
    "--backbone resnet18 --backbone_stages 1 --backbone_weights none --backbone_norm batch --enc_layers 1 "
    "--dec_layers 2 --hidden_dim 64 --nheads 4 --dim_feedforward 256 --dropout 0 --batch_size 4 --epochs 1 --lr 1e-3 "
    "--lr_backbone 1e-3 --lr_schedule cosine --warmup_steps 20 --bbox_loss_coef 1.25 --giou_loss_coef 0.5"
)
# 64 x 64 to 64 x 72 cells of 8 pixels: as many tokens as the published DC5 models have.
GPU_MODEL = (
    "--backbone resnet18 --backbone_stages 2 --backbone_weights none --backbone_norm batch --enc_layers 4 "
    "--dec_layers 4 --hidden_dim 256 --nheads 8 --dim_feedforward 1024 --dropout 0 --batch_size 16 --epochs 1 "
    "--lr 2e-4 --lr_backbone 5e-4 --lr_schedule cosine --warmup_steps 200 --bbox_loss_coef 1.25 --giou_loss_coef 0.5 "
    "--amp bf16"
)
QUERIES = {
    "detr": "--num_queries 40 --eos_coef 0.4",
    "conditional": "--num_queries 40",
    "anchor": "--num_query_position 36 --num_query_pattern 1 --no-dilation --spatial_prior grid",
}

# Anchor DETR has row-column attention, so only the kinds of clusters are compared.
ANCHOR_ARMS = (
    PLAIN, NONE, *(name for name, arm in ARMS.items() if arm.family and FAMILIES[arm.family].rows),
    WINDOWS, "regions", "per_image", UNIFORM, "strided", "temperature", UNTRAINED, CONVERTED,
)  # fmt: skip
ROWS_ALONE = ("rows_equal", "rows_zero", "rows_temperature")
OTHER_ARMS = tuple(name for name, arm in ARMS.items() if arm.family not in ROWS_ALONE)


def trials(
    source: Source,
    model: str,
    images: int,
    variants: Mapping[str, tuple[int, int]],
    start_source: Source | None = None,
    encoder_alone: bool = False,
) -> tuple[Trial, ...]:
    """Return the trials of several variants on one data set.

    `model` has the flags for all variants, `variants` the `start_images` and `seeds` of each. With start images, the
    start training of the first variant provides the backbone for the others. Other arguments are those of `Trial`.
    """
    made: list[Trial] = []
    for variant, (start_images, seeds) in variants.items():
        arms = ANCHOR_ARMS if variant == "anchor" else OTHER_ARMS
        flags = tuple(f"{model} {QUERIES[variant]}".split())
        first = made[0] if made and start_images else None
        made.append(
            Trial(source, variant, arms, flags, images, start_images, seeds, start_source, encoder_alone, first)
        )
    return tuple(made)


CPU_SHAPES = Shapes(
    train=6000, val=300, height=192, widths=(192, 216), scale=2 / 3, objects=(3, 7), object_size=(0.1, 0.75)
)
GPU_SHAPES = Shapes(
    train=8000, val=500, height=512, widths=(512, 576), scale=1, objects=(4, 16), object_size=(0.03, 0.6)
)


# Many small objects: at most a third of CPU_SHAPES' objects are as small.
CPU_SMALL = replace(CPU_SHAPES, objects=(8, 16), object_size=(0.1, 0.25))


def in_context(shapes: Shapes, dotted: str = "one", names: tuple[str, str] = ("dots", "context")) -> dict[str, Any]:
    """Return settings for a problem that needs attention: small objects' dots set the class of others.

    In the start training, detectors learn to find objects, with and without dots, and to read an object's own dots. The
    arms then train only the encoder: to the frozen decoder, each object must look as if it had the dots. So accuracy
    shows the encoder attention's contribution. `names` are those of the data sets of the start training and of the
    arms.
    """
    own, others = replace(shapes, name=names[0], dotted="some"), replace(shapes, name=names[1], dotted=dotted)
    return {"source": others, "start_source": own, "encoder_alone": True}


MANY_SMALL = in_context(CPU_SMALL, "each", ("small_dots", "small"))


PRESETS = {
    "cpu": Preset(
        trials=(
            *trials(
                model=CPU_MODEL,
                images=2400,
                # Without a trained backbone, Anchor DETR learns nothing in this time.
                variants={"conditional": (32000, 3), "anchor": (12000, 3)},
                **in_context(CPU_SHAPES),
            ),
            *trials(model=CPU_MODEL, images=2400, variants={"conditional": (32000, 3)}, **MANY_SMALL),
        ),
        device="cpu",
        jobs=2,
        threads=1,
        seconds=3240,
    ),
    "gpu": Preset(
        trials=(
            *trials(
                model=GPU_MODEL,
                images=48000,
                variants={"conditional": (96000, 3), "anchor": (96000, 3)},
                **in_context(GPU_SHAPES),
            ),
            *trials(GPU_SHAPES, GPU_MODEL, 96000, {"conditional": (0, 3), "anchor": (0, 3)}),
        ),
        device="cuda",
        jobs=3,
        threads=4,
        seconds=200,
        cost_batch=8,
        amp="bf16",
    ),
}

# Height and width in pixels of photographs: 30 x 40 cells.
PHOTOGRAPH_SIZE = (240, 320)
PASTED = Pasted("pasted", "", *PHOTOGRAPH_SIZE, train=4000, val=400, objects=(3, 6), object_size=(0.2, 0.6), cue=None)
# Most images of the start training: half of those on drawn images, because the frozen backbone has learned to see.
PASTED_START = 16000
# Images of the start training and of each arm on blood cells; fewer than for others, since the data set is small.
CELLS_START, CELLS_IMAGES = 8000, 2000
# Arms on ordinary detection, which hardly needs the encoder's attention.
ORDINARY_ARMS = (PLAIN, NONE, WINDOWS, UNIFORM, CONVERTED)


def in_company(folder: str) -> dict[str, Any]:
    """Return settings for the problem that needs attention on photographs of COCO, or a part of it.

    An animal or a vehicle sets the class of all people. As `in_context`: in the start training, animals and vehicles
    among the people show their own class, and that of people is random. To the frozen decoder, people must then look
    like the animal or the vehicle of their image.
    """
    near, company = (
        replace(PASTED, name=name, folder=folder, cue=cue) for name, cue in (("near", "some"), ("company", "one"))
    )
    return {"source": company, "start_source": near, "encoder_alone": True}


def photograph_trials(preset: str, bccd: str | None, coco_mini: str | None) -> tuple[Trial, ...]:
    """Return the trials on photographs, of a preset's first variant; a folder of None leaves out its trials."""
    model, first = {"cpu": CPU_MODEL, "gpu": GPU_MODEL}[preset], PRESETS[preset].trials[0]
    made: tuple[Trial, ...] = ()
    if coco_mini:
        amounts = {first.variant: (min(first.start_images, PASTED_START), first.seeds)}
        made += trials(model=model, images=first.images, variants=amounts, **in_company(coco_mini))
        ordinary = replace(PASTED, folder=coco_mini)
        (trial,) = trials(ordinary, model, first.images, amounts, encoder_alone=True)
        made += (replace(trial, arms=ORDINARY_ARMS),)
    if bccd:
        amounts = {first.variant: (min(first.start_images, CELLS_START), first.seeds)}
        (trial,) = trials(Photographs("bccd", bccd, *PHOTOGRAPH_SIZE), model, CELLS_IMAGES, amounts)
        made += (replace(trial, arms=ORDINARY_ARMS),)
    return made
