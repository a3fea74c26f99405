"""The diagnosis as tables, and as one self-contained HTML page with pictures."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from enact_common.compare.page import curves, document, list_html, pictures_html, section_html, table_html
from enact_common.compare.pictures import Objects, Panel, corners, draw_objects
from enact_common.compare.tables import DASH, Table
from enact_common.data.images import decode_image
from enact_common.diagnose.analysis import ANNOTATED_TWICE, NOT_ANNOTATED, WRONG_CLASS
from enact_common.utils.errors import UserError

# Colour numbers of `enact_common.drawing.detections`: bluish green, vermilion, sky blue.
RIGHT, WRONG, DOUBTED = 2, 5, 1

# Greatest number of classes in the page's confusion matrix, and of rows in tables of single cases.
MOST_CLASSES, MOST_ROWS = 20, 20

# Width of the surroundings in a picture of a likely label error, in widths of the box, and least width in pixels.
SURROUNDINGS, LEAST_CROP = 1.5, 48

CONFUSION_NOTE = "Rows are annotated classes, columns detected ones, at IoU 0.5."


def ap_text(value: float | None) -> str:
    """Return an AP as text."""
    return DASH if value is None else f"{value:.3f}"


def summary(diagnosis: dict[str, Any]) -> list[str]:
    """Return the diagnosis in a few sentences, the most important first."""
    metrics, types = diagnosis["metrics"], diagnosis["errors"]["types"]
    if not diagnosis["objects"]:
        return [f"The {diagnosis['images']:,} images have no annotated objects, so there is nothing to measure."]
    sentences = [
        f"AP {ap_text(metrics['AP'])}, AP50 {ap_text(metrics['AP50'])} on {diagnosis['images']:,} images with "
        f"{diagnosis['objects']:,} objects."
    ]
    costly = [row for row in sorted(types, key=lambda row: -row["costs"]) if row["costs"] >= 0.0005]
    if costly:
        listed = ", ".join(f"{row['error']} {row['costs']:.3f}" for row in costly[:3])
        sentences.append(f"The costliest kinds of errors, in AP50: {listed}.")
    for key, form, rows in (
        ("size", "{} objects", diagnosis["sizes"]),
        ("objects_per_image", "objects per image {}", diagnosis["crowding"]),
        ("name", "class {}", diagnosis["classes"]),
    ):
        known = [row for row in rows if row["AP"] is not None]
        if len(known) > 1:
            weakest, best = (choose(known, key=lambda row: row["AP"]) for choose in (min, max))
            sentences.append(
                f"Weakest: {form.format(weakest[key])}, AP {weakest['AP']:.3f} over {weakest['objects']:,} objects. "
                f"Best: {form.format(best[key])}, AP {best['AP']:.3f} over {best['objects']:,}."
            )
    pairs = confused_pairs(diagnosis)
    if pairs:
        sentences.append(f"Most frequent confusion: {pairs[0][0]} detected as {pairs[0][1]}, {pairs[0][2]:,} times.")
    count = len(diagnosis["label_errors"])
    if count:
        plural = "s" if count > 1 else ""
        sentences.append(f"{count:,} label{plural} may be wrong, or the detector is: look at the pictures.")
    return sentences


def confused_pairs(diagnosis: dict[str, Any]) -> list[tuple[str, str, int]]:
    """Return (annotated class, detected class, count) of all confusions, the most frequent first."""
    names, matrix = diagnosis["confusion"]["classes"], diagnosis["confusion"]["matrix"]
    pairs = [
        (name, other, matrix[i][j]) for i, name in enumerate(names) for j, other in enumerate(names)
        if i != j and matrix[i][j]
    ]  # fmt: skip
    return sorted(pairs, key=lambda pair: -pair[2])


def errors_table(diagnosis: dict[str, Any]) -> Table:
    """Return the table of TIDE's error types."""
    found = diagnosis["errors"]
    rows = [[row["error"], f"{row['count']:,}", f"{row['costs']:.3f}", row["meaning"]] for row in found["types"]]
    return Table(
        "Errors by kind",
        ["error", "count", "costs AP50", "meaning"],
        rows,
        note="Costs: how much AP50 would gain if only these errors were corrected; they do not add up. All false "
        f"positives together cost {found['all_false_positives_cost']:.3f}, all missed objects "
        f"{found['all_missed_objects_cost']:.3f}. Counts include detections of any score. The kinds are TIDE's.",
    )


def breakdown_tables(diagnosis: dict[str, Any]) -> list[Table]:
    """Return the tables of AP by size and by crowding."""

    def rows(key: str, columns: Sequence[str]) -> list[list[str]]:
        return [
            [row[columns[0]], *(ap_text(row[c]) if c.startswith("AP") else f"{row[c]:,}" for c in columns[1:])]
            for row in diagnosis[key]
        ]

    return [
        Table("AP by size", ["size", "objects", "AP"], rows("sizes", ("size", "objects", "AP")), numeric=True,
              note="COCO's sizes by area: small below 32 x 32 pixels, large from 96 x 96 on."),
        Table("AP by crowding", ["objects in the image", "images", "objects", "AP", "AP50"],
              rows("crowding", ("objects_per_image", "images", "objects", "AP", "AP50")), numeric=True,
              note="Without crowds."),
    ]  # fmt: skip


def classes_table(diagnosis: dict[str, Any]) -> Table:
    """Return the table of AP by class, the weakest first."""
    rows = [
        [row["name"], f"{row['objects']}", ap_text(row["AP"]), ap_text(row["AP50"])]
        for row in sorted(diagnosis["classes"], key=lambda row: row["AP"])
    ]
    return Table("AP by class", ["class", "objects", "AP", "AP50"], rows, numeric=True)


def confusions_table(diagnosis: dict[str, Any]) -> Table:
    """Return the table of the most frequent confusions, for the terminal."""
    rows = [[name, other, f"{count:,}"] for name, other, count in confused_pairs(diagnosis)]
    more = len(rows) - MOST_ROWS
    note = f"Scores of at least {diagnosis['threshold']:.3g}."
    return Table(
        "Confusions",
        ["annotated", "detected", "times"],
        rows[:MOST_ROWS],
        note + (f" {more:,} rarer pairs are only in the JSON file." if more > 0 else "" if rows else " None."),
    )


def labels_table(diagnosis: dict[str, Any]) -> Table:
    """Return the table of likely label errors."""
    cases = diagnosis["label_errors"]
    rows = [
        [
            *(case["file_name"], case["kind"], case["annotated"] or DASH, case["detected"] or DASH),
            DASH if case["score"] is None else f"{case['score']:.2f}",
            ", ".join(f"{side:.0f}" for side in case["bbox"]),
        ]
        for case in cases[:MOST_ROWS]
    ]
    left = f" The other {len(cases) - MOST_ROWS:,} are in the JSON file." if len(cases) > MOST_ROWS else ""
    return Table(
        "Likely label errors",
        ["image", "kind", "annotated", "detected", "score", "box: left, top, width, height"],
        rows,
        note=(f"{WRONG_CLASS}: a detection of another class fits the object, and none of its own. {NOT_ANNOTATED}: a "
              f"detection where nothing is annotated. {ANNOTATED_TWICE}: two boxes of a class with an IoU of at least "
              f"0.9. A wrong detection looks the same, so check each by eye.{left}") if rows else "None.",
    )  # fmt: skip


def worst_table(diagnosis: dict[str, Any]) -> Table:
    """Return the table of the images with most errors."""
    rows = [
        [row["file_name"], *(str(row[key]) for key in ("right", "wrong", "missed"))]
        for row in diagnosis["worst_images"][:MOST_ROWS]
    ]
    note = f"Detections with scores of at least {diagnosis['threshold']:.3g}, right from IoU 0.5 on."
    return Table("Worst images", ["image", "right", "wrong", "missed"], rows, note if rows else "None.", numeric=True)


def tables(diagnosis: dict[str, Any]) -> list[Table]:
    """Return all tables, in the order of the page."""
    return [
        errors_table(diagnosis),
        *breakdown_tables(diagnosis),
        classes_table(diagnosis),
        confusions_table(diagnosis),
        worst_table(diagnosis),
        labels_table(diagnosis),
    ]


def errors_html(diagnosis: dict[str, Any]) -> str:
    """Return the table of error types with a bar for each cost."""
    table = errors_table(diagnosis)
    most = max(max(row["costs"] for row in diagnosis["errors"]["types"]), 1e-9)
    lines = []
    for row, (name, count, costs, meaning) in zip(diagnosis["errors"]["types"], table.rows, strict=True):
        bar = f'<span class="bar" style="width: {max(row["costs"], 0) / most * 9:.2f}rem"></span>'
        lines.append(
            f'<tr><th scope="row">{name.text}</th><td>{meaning.text}</td><td class="number">{count.text}</td>'
            f'<td class="number">{costs.text}</td><td>{bar}</td></tr>'
        )
    content = (
        '<table><thead><tr><th scope="col">error</th><th scope="col">meaning</th><th scope="col">count</th>'
        f'<th scope="col" colspan="2">costs AP50</th></tr></thead><tbody>{"".join(lines)}</tbody></table>'
    )
    return section_html(table.title, content, table.note)


def confusion_html(diagnosis: dict[str, Any]) -> str:
    """Return the confusion matrix, of the classes with most errors if there are many, with a darker cell for more."""
    names, matrix = diagnosis["confusion"]["classes"], np.array(diagnosis["confusion"]["matrix"])
    background = len(names)
    wrong = matrix.sum(axis=0) + matrix.sum(axis=1) - 2 * matrix.diagonal()
    chosen = sorted(np.argsort(-wrong[:background], kind="stable")[:MOST_CLASSES].tolist())
    places = [*chosen, background]
    most = max(matrix[np.ix_(places, places)].max(), 1)

    def cell(i: int, j: int) -> str:
        colour = "var(--run-0)" if i == j else "var(--run-1)"
        shade = f"color-mix(in srgb, {colour} {matrix[i, j] / most * 60:.0f}%, transparent)"
        text = "" if i == j == background else f"{matrix[i, j]:,}"
        return f'<td class="number" style="background: {shade}">{text}</td>'

    heads = "".join(f'<th scope="col">{escape(names[j])}</th>' for j in chosen) + '<th scope="col">missed</th>'
    lines = "".join(
        f'<tr><th scope="row">{escape(names[i]) if i < background else "background"}</th>'
        f"{''.join(cell(i, j) for j in places)}</tr>"
        for i in places
    )
    part = f" The {MOST_CLASSES} classes with most errors of {background}." if background > MOST_CLASSES else ""
    content = f'<table class="matrix"><thead><tr><td></td>{heads}</tr></thead><tbody>{lines}</tbody></table>'
    note = f"{CONFUSION_NOTE} Scores of at least {diagnosis['threshold']:.3g}.{part}"
    return section_html("Confusion matrix", content, note)


def panel(caption: str, pixels: np.ndarray, rows: Sequence[tuple[Sequence[float], str, int, float | None]]) -> Panel:
    """Return a picture with boxes in pixels uint8 (height, width, 3).

    `rows` has (xywh box in pixels, text, colour number, score) of each box; either all or none have a score.
    """
    scores = [score for *_, score in rows if score is not None] or None
    # A text has one colour, so texts tell right from wrong.
    objects = Objects(corners([box for box, *_ in rows]), [text for _, text, *_ in rows], scores)
    return Panel(caption, draw_objects(pixels, objects, {text: colour for _, text, colour, _ in rows}))


def worst_panels(row: dict[str, Any], pixels: np.ndarray) -> list[Panel]:
    """Return the pictures of an image of `worst_images`: its annotations and its detections."""
    truth = [
        (o["bbox"], o["class"] if o["found"] else f"missed: {o['class']}", RIGHT if o["found"] else WRONG, None)
        for o in row["objects"]
    ]
    detections = [
        (d["bbox"], f"{d['error']}: {d['class']}" if d["error"] else d["class"], WRONG if d["error"] else RIGHT,
         d["score"])
        for d in row["detections"]
    ]  # fmt: skip
    return [
        panel(f"annotated: {len(truth)}, {row['missed']} missed", pixels, truth),
        panel(f"detected: {len(detections)}, {row['wrong']} wrong", pixels, detections),
    ]


def label_panels(case: dict[str, Any], pixels: np.ndarray) -> list[Panel]:
    """Return the pictures of a likely label error, cut to its surroundings: as annotated and as detected."""
    height, width = pixels.shape[:2]
    left, top, wide, tall = case["bbox"]
    side = max(max(wide, tall) * (0.5 + SURROUNDINGS), LEAST_CROP / 2)
    x, y = left + wide / 2, top + tall / 2
    low = np.floor(np.clip([x - side, y - side], 0, [max(width - 1, 0), max(height - 1, 0)])).astype(int)
    high = np.ceil(np.clip([x + side, y + side], low + 1, [width, height])).astype(int)
    cut = np.ascontiguousarray(pixels[low[1] : high[1], low[0] : high[0]])

    def moved(box: Sequence[float]) -> list[float]:
        return [box[0] - low[0], box[1] - low[1], *box[2:]]

    annotated = [(moved(case["bbox"]), case["annotated"], DOUBTED, None)] if case["annotated"] else []
    panels = [panel(f"annotated: {case['annotated'] or 'nothing'}", cut, annotated)]
    if case["detected"]:
        box = [(moved(case["other_bbox"]), case["detected"], RIGHT, case["score"])]
        return [*panels, panel(f"detected: {case['detected']}, score {case['score']:.2f}", cut, box)]
    box = [(moved(case["other_bbox"]), case["annotated"], DOUBTED, None)]
    return [*panels, panel(f"annotated again: {case['annotated']}", cut, box)]


def scenes(rows: Sequence[dict[str, Any]], folder: Path, most: int, panels_of: Any) -> list[tuple[str, list[Panel]]]:
    """Return name and pictures, from `panels_of`, of the first `most` rows of `worst_images` or `label_errors`."""
    shown = []
    for row in rows[:most]:
        name = f"{row['file_name']}: {row['kind']}" if "kind" in row else row["file_name"]
        try:
            pixels = decode_image(folder / row["file_name"]).permute(1, 2, 0).numpy()  # (height, width, 3)
            shown.append((name, panels_of(row, pixels)))
        except UserError as error:
            shown.append((name, [Panel("", reason=str(error))]))
    return shown


def build_page(name: str, diagnosis: dict[str, Any], folder: Path, pictures: int) -> str:
    """Return the page of a run or checkpoint.

    Args:
        name: its name.
        diagnosis: from `diagnose`.
        folder: folder of the images.
        pictures: greatest number of worst images, and of likely label errors, that are drawn.
    """
    none = "--pictures is 0" if not pictures else "there are none"
    sizes, crowding = breakdown_tables(diagnosis)
    sections = [
        list_html("In short", summary(diagnosis)),
        errors_html(diagnosis),
        f'<div class="tables">{"".join(table_html(t, ()) for t in (sizes, crowding))}</div>',
        table_html(classes_table(diagnosis), (), sortable=True),
        confusion_html(diagnosis),
        pictures_html(
            "Worst images",
            scenes(diagnosis["worst_images"], folder, pictures, worst_panels),
            none,
            f"The images with most errors among detections with scores of at least {diagnosis['threshold']:.3g}. "
            "Green: right. Orange: wrong, with the kind of error, or missed. Click to enlarge.",
        ),
        table_html(labels_table(diagnosis), ()),
        pictures_html(
            "Likely label errors, drawn",
            scenes(diagnosis["label_errors"], folder, pictures, label_panels),
            none,
            "Left: as annotated. Right: as detected, or the other annotation. Click to enlarge.",
        ),
    ]
    return document(f"Diagnosis of {name}", __package__, sections, curves([]))
