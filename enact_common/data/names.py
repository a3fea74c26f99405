"""Find the file that a missing file name may mean, since other tools and systems write names differently."""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from enact_common.data.images import image_suffixes, search

# Label Studio prefixes the name of each uploaded file with eight hexadecimal digits.
UPLOAD_PREFIX = re.compile(r"[0-9a-f]{8}-(?=.)")

# Fields that name an image's file in other tools' annotations.
OTHER_NAMES = ("coco_url", "flickr_url", "url", "path", "filename", "name")


def comparable(name: str) -> str:
    """A file name with case and the storage of accents normalised, since file systems differ in them."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def parts_of(name: str) -> list[str]:
    """The parts of a path or URL, split at slashes and backslashes."""
    if "://" in name:
        name = re.split("[?#]", name, maxsplit=1)[0]
    return [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]


def keys_of(last: str) -> list[str]:
    """Keys of a file name, from the strictest to the loosest; two spellings of one name share a key."""
    same = comparable(last)
    plain = comparable(unquote(last))
    stem = os.path.splitext(plain)[0] or plain
    # Uploads also replace spaces.
    return [last, same, plain, stem, re.sub("[ +]", "_", UPLOAD_PREFIX.sub("", stem))]


def index_files(folder: Path, taken: Iterable[str] = ()) -> list[dict[str, list[str]]]:
    """Index the images in a folder and its sub-folders by each of `keys_of` their names.

    Names in `taken`, which other entries use, are left out. An unreadable folder gives an empty index.

    Returns:
        a dict for each key of `keys_of`: from the key to the names below the folder, with slashes.
    """
    taken = {os.path.normpath(name) for name in taken}
    by_key: list[defaultdict[str, list[str]]] = [defaultdict(list) for _ in keys_of("")]
    for path in search(folder, image_suffixes()).files:
        name = os.path.relpath(path, folder)
        if name in taken:
            continue
        # A file name can contain backslashes if an archive from Windows was unpacked elsewhere.
        for index, key in zip(by_key, keys_of(parts_of(path.name)[-1]), strict=True):
            index[key].append(name.replace(os.sep, "/"))
    return by_key


def matches(name: str, by_key: list[dict[str, list[str]]]) -> list[str]:
    """The files in `index_files` that a name may mean: those nearest in path, by the strictest key with files."""
    parts = parts_of(name)
    if not parts:
        return []
    for index, key in zip(by_key, keys_of(parts[-1]), strict=True):
        if files := index.get(key):
            shared = [common_folders(parts, parts_of(file)) for file in files]
            return [file for file, count in zip(files, shared, strict=True) if count == max(shared)]
    return []


def common_folders(first: list[str], second: list[str]) -> int:
    """The number of folders that two paths share, counted from the file upwards."""
    count = 0
    for one, other in zip(first[-2::-1], second[-2::-1], strict=False):
        if comparable(one) != comparable(other):
            break
        count += 1
    return count


def hint(name: str, by_key: list[dict[str, list[str]]]) -> str:
    """A note in brackets, after a space, on the files that a name may mean; empty if there are none."""
    files = matches(name, by_key)
    if not files:
        return " (a URL: images are read only from the folder)" if "://" in name else ""
    if len(files) > 2:
        return f" (there are {len(files)} files of that name, {files[0]} first)"
    # Names that differ only in the storage of accents look the same.
    looks_same = unicodedata.normalize("NFC", files[0]) == unicodedata.normalize("NFC", name)
    return f" (there is {' and '.join(files)}{', with its accents stored differently' if looks_same else ''})"


def other_name(image: Any) -> tuple[str, str] | None:
    """The field and name of the file in an entry of `images` without `file_name`, as in LVIS; None if there is none."""
    if not isinstance(image, dict) or "file_name" in image:
        return None
    names = ((key, image.get(key)) for key in OTHER_NAMES)
    return next(((key, name) for key, name in names if isinstance(name, str) and parts_of(name)), None)
