"""Files of tensors from the network: by https alone, and only what has the SHA-256 that was asked for.

The convention that a file's name ends with the beginning of its SHA-256, and the folder, are those of `torch.hub`.
"""

import hashlib
import os
import re
import shutil
import uuid
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import torch
from tqdm import tqdm

from enact_common.utils.errors import UserError

HASH_IN_NAME = re.compile(r"-([a-f0-9]{8,64})\.")  # torch.hub's own pattern also takes fewer digits, and none
HASH_IN_FRAGMENT = re.compile(r"sha256=([a-f0-9]{8,64})", re.IGNORECASE)
CHUNK = 1 << 20  # bytes
TIMEOUT = 60  # seconds without an answer

WAY_OUT = "download it elsewhere and pass its path"


class ToHttpsAlone(HTTPRedirectHandler):
    """Follows a redirect to another https address, and to nothing else."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        if urlsplit(newurl).scheme != "https":
            raise URLError(f"passed on to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def is_url(source: str) -> bool:
    """Whether a checkpoint's name is a URL, of whatever scheme, rather than a path."""
    return re.match(r"[a-z][a-z0-9+.-]+://", source, re.IGNORECASE) is not None


def download(url: str) -> Path:
    """The file behind a URL, in PyTorch's cache of checkpoints.

    Its content is checked whenever it is asked for, in the cache too: others write there, and names repeat.

    Args:
        url: https, with the beginning of the file's SHA-256, eight hexadecimal digits or more, in the file's name
            (`detr-r50-e632da11.pth`) or after it (`checkpoint.pth#sha256=e632da11`), which goes before the name.

    Raises:
        UserError: another scheme, no hash, another content than the hash says, or it cannot be had.
    """
    try:
        path, expected = cached(url)
        if not (path.is_file() and sha256(path).startswith(expected)):
            path.parent.mkdir(parents=True, exist_ok=True)
            fetch(url, path, expected)
    except (OSError, HTTPException, ValueError) as error:
        raise UserError(f"{url}: cannot be downloaded ({error}); {WAY_OUT}") from error
    return path


def cached(url: str) -> tuple[Path, str]:
    """Where a URL's file lies in the cache, and what its SHA-256 begins with.

    Raises:
        UserError: the URL is not https, or does not say the hash as it should.
        ValueError: it is no URL.
    """
    parts = urlsplit(url)
    if parts.scheme != "https":
        raise UserError(f"{url}: only https is downloaded from; pass an https URL, or {WAY_OUT}")
    name = Path(parts.path).name
    if parts.fragment:
        given = HASH_IN_FRAGMENT.fullmatch(parts.fragment)
        if not given:
            raise UserError(f"{url}: expected #sha256= and 8 to 64 hexadecimal digits at its end, or {WAY_OUT}")
        expected = given[1].lower()
        # Files of one name and of different contents lie side by side.
        name = f"{Path(name).stem}-{expected}{Path(name).suffix}"
    else:
        named = HASH_IN_NAME.search(name)
        if not named:
            raise UserError(
                f"{url}: does not say which content is expected; end it with #sha256= and the file's SHA-256 (8 digits "
                f"at least), or {WAY_OUT}"
            )
        expected = named[1]
    return Path(torch.hub.get_dir()) / "checkpoints" / name, expected


def fetch(url: str, path: Path, expected: str) -> None:
    """Write what is behind an https URL to a file, whole and checked or not at all.

    Args:
        url: its fragment does not matter.
        path: the file to make or replace.
        expected: what its SHA-256 must begin with.

    Raises:
        UserError: its SHA-256 is another.
        OSError, HTTPException, ValueError: it cannot be had, or not by https all the way.
    """
    request = Request(url, headers={"User-Agent": "enact-detection"})
    # A name of its own: the processes of one training may fetch the file at once.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with build_opener(ToHttpsAlone).open(request, timeout=TIMEOUT) as answer, open(partial, "xb") as file:
            total = int(answer.headers.get("Content-Length", 0)) or None
            with tqdm.wrapattr(answer, "read", total=total, desc=path.name) as content:
                shutil.copyfileobj(content, file, CHUNK)
        digest = sha256(partial)
        if not digest.startswith(expected):
            raise UserError(
                f"{url}: is not the file that was asked for (its SHA-256 is {digest}, expected was {expected}...), and "
                f"was thrown away. Where {expected} is no hash, end the URL with #sha256= and the right one; or "
                f"{WAY_OUT}"
            )
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """A file's SHA-256: 64 hexadecimal digits in lower case."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
