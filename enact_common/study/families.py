"""The lines of the study's main figure: each way to attend to few keys, at several numbers of keys."""

from dataclasses import dataclass

from enact_common.attention.rivals import RIVALS
from enact_common.study.arms import (
    Arm,
    Change,
    ChangeShares,
    EqualShares,
    FixedCount,
    keep_scores,
    mix_with_lengths,
    share_tokens,
)

# Most keys per image. The CPU preset's maps have 1,024 or 1,152 tokens, the GPU preset's four times as many.
BUDGETS = (12, 24, 48, 96, 192, 288)

# Standard attention: logits divided by the square root of head_dim, values unscaled.
SCALED = ("--enact_scale_logits",)
CURVE = ("--enact_order", "hilbert")
DIFFERING = ("--enact_temperature", "1")
RECOMMENDED = (*SCALED, *CURVE, *DIFFERING)
EQUAL = ("--enact_clusters", "equal")
ZERO = ("--enact_zero_scores",)

LIMIT = "--enact_max_clusters"


@dataclass(frozen=True)
class Family:
    """One line of the main figure.

    Attributes:
        title: title in tables and in the legend.
        flags, changes: as in `Arm`.
        limit: the flag that sets the number of keys; "" for none.
        fixed: cut maps into the number of windows, regardless of the scores.
        budgets: numbers of keys.
        rows: whether the method also works in Anchor DETR's row-column attention.
    """

    title: str
    flags: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()
    limit: str = LIMIT
    fixed: bool = False
    budgets: tuple[int, ...] = BUDGETS
    rows: bool = False


# The published windows have about 164 clusters without a limit.
FEW = tuple(budget for budget in BUDGETS if budget <= 96)

FAMILIES = {
    "published": Family("ENACT: windows, as published", budgets=FEW, rows=True),
    "recommended": Family("ENACT: scaled windows, Hilbert, temperature 1", RECOMMENDED, budgets=FEW),
    "recommended_random": Family("the same windows, random scores", RECOMMENDED, (keep_scores,), budgets=FEW),
    "recommended_zero": Family("ENACT: these windows, scores start at zero", (*RECOMMENDED, *ZERO), budgets=FEW),
    "equal": Family("ENACT: equal information, scaled, Hilbert, temperature 1", (*RECOMMENDED, *EQUAL)),
    "equal_zero": Family("ENACT: these clusters, scores start at zero", (*RECOMMENDED, *EQUAL, *ZERO)),
    "equal_random": Family("equal information, random scores", (*RECOMMENDED, *EQUAL), (keep_scores,)),
    "rows_equal": Family("ENACT: equal information, temperature 1", (*DIFFERING, *EQUAL), rows=True),
    "rows_zero": Family(
        "ENACT: equal information, temperature 1, scores start at zero",
        (*DIFFERING, *EQUAL, *ZERO),
        budgets=(24, 48, 96),
        rows=True,
    ),
    "rows_temperature": Family("ENACT: windows, temperature 1", DIFFERING, budgets=FEW, rows=True),
    "averages": Family(
        "averages of equal windows, scaled, Hilbert", (*SCALED, *CURVE), (ChangeShares(EqualShares),), "", True
    ),
    "equal_mixed": Family(
        "equal information, half of it spread evenly", (*RECOMMENDED, *EQUAL), (mix_with_lengths,), budgets=(48,)
    ),
    "equal_shared": Family(
        "equal information, borders that pass a gradient", (*RECOMMENDED, *EQUAL), (share_tokens,), budgets=(48,)
    ),
    **{
        name: Family(kind.title, ("--encoder_attention", name), limit="--token_budget" * kind.takes_budget)
        for name, kind in RIVALS.items()
    },
    **{
        f"{name}_zero": Family(
            f"{kind.title}, scores start at zero",
            ("--encoder_attention", name, *ZERO),
            limit="--token_budget",
            budgets=(48,),
        )
        for name, kind in RIVALS.items()
        if kind.learns_scores
    },
}


def arms_of(name: str) -> list[Arm]:
    """Return the arms of a family, one for each number of keys."""
    family = FAMILIES[name]
    if not family.limit and not family.fixed:
        return [Arm(name, family.title, family.flags, family.changes, family=name)]
    return [
        Arm(
            f"{name}_{budget}",
            f"{family.title}, {budget}",
            (*family.flags, family.limit, str(budget)) if family.limit else family.flags,
            (FixedCount(budget), *family.changes) if family.fixed else family.changes,
            family=name,
            clusters=budget,
        )
        for budget in family.budgets
    ]
