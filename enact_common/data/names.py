"""Which file of a folder a name means that is none there: other tools and systems write names in their own way."""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from enact_common.data.images import image_suffixes, search

# Label Studio puts eight hexadecimal digits before the name of each file that is uploaded.
UPLOAD_PREFIX = re.compile(r"[0-9a-f]{8}-(?=.)")

# Fields that name an image in other tools' files.
OTHER_NAMES = ("coco_url", "flickr_url", "url", "path", "filename", "name")


def comparable(name: str) -> str:
    """A file name without what file systems disagree about: upper and lower case, and how accents are stored."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def parts_of(name: str) -> list[str]:
    """A path's or a URL's parts, whichever way its slashes lean."""
    if "://" in name:
        name = re.split("[?#]", name, maxsplit=1)[0]
    return [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]


def keys_of(last: str) -> list[str]:
    """A file's name, from itself to less and less of it: what two spellings of one name may have in common."""
    same = comparable(last)
    plain = comparable(unquote(last))
    stem = os.path.splitext(plain)[0] or plain
    # Uploads also lose their blanks.
    return [last, same, plain, stem, re.sub("[ +]", "_", UPLOAD_PREFIX.sub("", stem))]


def index_files(folder: Path, taken: Iterable[str] = ()) -> list[dict[str, list[str]]]:
    """The images of a folder and of the folders below it, by each of `keys_of` their names.

    Args:
        folder: where the files are. One that cannot be listed has none.
        taken: file names below the folder that are no match, since other entries have them.

    Returns:
        for each key the names below the folder, with slashes.
    """
    taken = {os.path.normpath(name) for name in taken}
    by_key: list[defaultdict[str, list[str]]] = [defaultdict(list) for _ in keys_of("")]
    for path in search(folder, image_suffixes()).files:
        name = os.path.relpath(path, folder)
        if name in taken:
            continue
        # A file may have backslashes in its name: an archive of Windows, unpacked elsewhere.
        for index, key in zip(by_key, keys_of(parts_of(path.name)[-1]), strict=True):
            index[key].append(name.replace(os.sep, "/"))
    return by_key


def matches(name: str, by_key: list[dict[str, list[str]]]) -> list[str]:
    """The files of `index_files` that a name may mean: by the strictest key that has any, those nearest in path."""
    parts = parts_of(name)
    if not parts:
        return []
    for index, key in zip(by_key, keys_of(parts[-1]), strict=True):
        if files := index.get(key):
            shared = [common_folders(parts, parts_of(file)) for file in files]
            return [file for file, count in zip(files, shared, strict=True) if count == max(shared)]
    return []


def common_folders(first: list[str], second: list[str]) -> int:
    """How many folders, from the file upwards, two paths have in common."""
    count = 0
    for one, other in zip(first[-2::-1], second[-2::-1], strict=False):
        if comparable(one) != comparable(other):
            break
        count += 1
    return count


def hint(name: str, by_key: list[dict[str, list[str]]]) -> str:
    """The file that is there instead of a name, in brackets after a blank; empty where nothing is like it."""
    found = matches(name, by_key)
    if not found:
        return " (a URL: images are read from the folder alone)" if "://" in name else ""
    if len(found) > 2:
        return f" (there are {len(found)} files of that name, {found[0]} first)"
    # Two names look the same where they differ in how accents are stored alone.
    looks_same = unicodedata.normalize("NFC", found[0]) == unicodedata.normalize("NFC", name)
    return f" (there is {' and '.join(found)}{', with its accents stored in another way' if looks_same else ''})"


def other_name(image: Any) -> tuple[str, str] | None:
    """The field in which an entry of `images` without `file_name` names its file, and that name; None for no such one.

    LVIS, for one, has `coco_url` alone.
    """
    if not isinstance(image, dict) or "file_name" in image:
        return None
    names = ((key, image.get(key)) for key in OTHER_NAMES)
    return next(((key, name) for key, name in names if isinstance(name, str) and parts_of(name)), None)
