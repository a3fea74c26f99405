"""Read ids, numbers and marks in annotation files, which some tools write as text, or as floats instead of integers.

Loading, the checks and evaluation all use the output of `normalise`.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

# Evaluation stores ids in float64, which is exact for integers below this limit.
ID_LIMIT = 2**53

# ASCII digits only. Ids have no exponent: "1e3" is more likely part of a hash.
WHOLE_TEXT = re.compile(r"([+-]?)0*([0-9]{1,16})(?:\.0*)?")
NUMBER_TEXT = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")

# Values in messages and findings are cut to this many characters.
SHOWN = 80

# Number of examples that `Rewritten` keeps.
EXAMPLES = 3

ID_WANTED = "expected an integer below 2^53"
BOX_WANTED = "expected a list of four finite numbers: x, y, width, height in pixels"


def is_integer(value: Any) -> bool:
    """Whether a value is an integer and not a boolean."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a number that fits a float, including NaN and infinity, and not a boolean."""
    return isinstance(value, float) or (is_integer(value) and abs(value) < 2**1000)


def is_id(value: Any) -> bool:
    """Whether a value is an integer that float64 represents exactly, and not a boolean."""
    return is_integer(value) and abs(value) < ID_LIMIT


def is_area(value: Any) -> bool:
    """Whether a value is a finite number >= 0."""
    return is_number(value) and 0 <= value < math.inf


def is_box(value: Any) -> bool:
    """Whether a value is a list of four finite numbers."""
    return isinstance(value, list) and len(value) == 4 and all(is_number(v) and math.isfinite(v) for v in value)


def as_mark(value: Any) -> bool | None:
    """Whether a mark such as `iscrowd`, `ignore` or `difficult` is set; None for an invalid value.

    1 and true, also as text ("1", "1.0", "True"), are set. 0, false and null are not set, nor are "0" and "false".
    """
    if isinstance(value, str):
        value = {"true": 1, "false": 0}.get(value.strip().lower(), as_number(value))
    if value is None:
        return False
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None


def is_set(value: Any) -> bool:
    """Whether a mark is set, as `as_mark` reads it."""
    return as_mark(value) is True


def is_crowd(annotation: dict) -> bool:
    """Whether an annotation or a segment is a crowd, which training and evaluation ignore.

    `ignore` is read like `iscrowd`, because pycocotools would silently overwrite it.
    """
    return is_set(annotation.get("iscrowd")) or is_set(annotation.get("ignore"))


def as_whole(value: Any) -> Any:
    """Convert an integer below 2^53 that is written as text or as a float to int; return other values unchanged."""
    if isinstance(value, float) and value.is_integer() and abs(value) < ID_LIMIT:
        return int(value)
    if isinstance(value, str) and (match := WHOLE_TEXT.fullmatch(value.strip())):
        number = int("".join(match.groups()))
        return number if abs(number) < ID_LIMIT else value
    return value


def as_number(value: Any) -> Any:
    """Convert a number that is written as text to int or float; return other values unchanged."""
    if not isinstance(value, str) or not NUMBER_TEXT.fullmatch(value.strip()):
        return value
    whole = as_whole(value)
    return float(value) if isinstance(whole, str) else whole


def as_box(value: Any) -> Any:
    """Convert a list with numbers written as text to a list of numbers; return other values unchanged."""
    if not isinstance(value, list) or str not in map(type, value):
        return value
    numbers = list(map(as_number, value))
    return value if str in map(type, numbers) else numbers


def shown(value: Any) -> str:
    """A value from a file as text for a message, cut short and marked if it is a string."""
    text = repr(value)
    text = text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
    return f"the text {text}" if isinstance(value, str) else text


def wrong_id(value: Any) -> str:
    """Why a value is not a valid id, as text that starts with the value."""
    if is_integer(value):
        return f"{shown(value)}, which is too large: {ID_WANTED}"
    return f"{shown(value)}: {ID_WANTED}"


# The numeric fields of each list, and their readers.
FIELDS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "images": {"id": as_whole},
    "categories": {"id": as_whole},
    "annotations": {"id": as_whole, "image_id": as_whole, "category_id": as_whole, "area": as_number, "bbox": as_box},
    "segments_info": {"id": as_whole, "category_id": as_whole, "area": as_number, "bbox": as_box},
}


@dataclass
class Rewritten:
    """The values that `normalise` converted to numbers.

    Attributes:
        counts: number of converted values, by field, such as "image_id of annotations".
        examples: the first converted values, as text.
    """

    counts: Counter = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """The rewritten fields with their counts."""
        fields = ", ".join(f"{name}: {count:,}" for name, count in self.counts.items())
        return f"numbers written as text, or ids written as floats: read as numbers ({fields})"


def normalise(data: dict) -> tuple[dict, Rewritten]:
    """Convert ids, boxes and areas in an annotation file's object to numbers; return it and the converted values.

    Ids below 2^53 that are written as text ("7", " 7 ", "7.0") or as floats (7.0) become integers, in `images`,
    `categories` and the annotations. Numbers in a bbox or an area that are written as text ("12.5", "1e-3") become
    numbers. All other values are kept for the caller to refuse or ignore: other text, booleans, NaN, numbers from 2^53
    on. Lists may be missing, and entries may be anything. The input object is not modified.
    """
    rewritten = Rewritten()
    lists = {
        key: normalise_entries(data[key], key, rewritten)
        for key in ("images", "categories", "annotations")
        if isinstance(data.get(key), list)
    }
    return {**data, **lists}, rewritten


def normalise_entries(entries: list, key: str, rewritten: Rewritten) -> list:
    """`normalise` for the entries of one list; adds the converted values to `rewritten`."""
    # Most files need no conversion, and checking a million types is much faster than converting.
    readers = {name: read for name, read in FIELDS[key].items() if may_change(entries, name, read)}
    nested = any(isinstance(entry, dict) and "segments_info" in entry for entry in entries)
    if not readers and not nested:
        return entries
    result = []
    for number, entry in enumerate(entries, start=1):
        if isinstance(entry, dict):
            changed = {}
            for name, read in readers.items():
                value = entry.get(name)
                if (new := read(value)) is not value:
                    changed[name] = new
                    rewritten.counts[f"{name} of {key}"] += 1
                    if len(rewritten.examples) < EXAMPLES:
                        rewritten.examples.append(f"entry {number} of {key}: {name} {repr(value)[:SHOWN]}")
            if isinstance(segments := entry.get("segments_info"), list):
                changed["segments_info"] = normalise_entries(segments, "segments_info", rewritten)
            if changed:
                entry = {**entry, **changed}
        result.append(entry)
    return result


def may_change(entries: list, name: str, read: Callable[[Any], Any]) -> bool:
    """Whether a field has values of a type that its reader converts."""
    values = [entry.get(name) for entry in entries if isinstance(entry, dict)]
    types = set(map(type, values))
    if list in types:
        types |= set(map(type, chain.from_iterable(value for value in values if isinstance(value, list))))
    return str in types or (float in types and read is as_whole)
