"""Download of tensor files: only over https, and only with the expected SHA-256.

As in `torch.hub`, a file's name ends with the first digits of its SHA-256, and files go to the same cache folder.
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

HASH_IN_NAME = re.compile(r"-([a-f0-9]{8,64})\.")  # torch.hub's pattern also accepts fewer digits, or none
HASH_IN_FRAGMENT = re.compile(r"sha256=([a-f0-9]{8,64})", re.IGNORECASE)
CHUNK = 1 << 20  # bytes
TIMEOUT = 60  # seconds without an answer

WAY_OUT = "download it elsewhere and pass its path"


class ToHttpsAlone(HTTPRedirectHandler):
    """A redirect handler that follows redirects only to https addresses."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        if urlsplit(newurl).scheme != "https":
            raise URLError(f"redirected to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def is_url(source: str) -> bool:
    """Whether a checkpoint's name is a URL of any scheme instead of a path."""
    return re.match(r"[a-z][a-z0-9+.-]+://", source, re.IGNORECASE) is not None


def download(url: str) -> Path:
    """Return the path of a URL's file in PyTorch's checkpoint cache, downloading it if necessary.

    The content is checked at every call, also of a cached file, because other programs write to the cache too and names
    repeat.

    Args:
        url: https URL with the first digits (at least eight, hexadecimal) of the file's SHA-256, in the file's name
            (`detr-r50-e632da11.pth`) or after it (`checkpoint.pth#sha256=e632da11`), which takes precedence.

    Raises:
        UserError: the URL is not https or has no hash, the content does not match the hash, or the download failed.
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
    """Return the path of a URL's file in the cache, and the first digits of its SHA-256."""
    parts = urlsplit(url)
    if parts.scheme != "https":
        raise UserError(f"{url}: only https URLs are downloaded; pass an https URL, or {WAY_OUT}")
    name = Path(parts.path).name
    if parts.fragment:
        given = HASH_IN_FRAGMENT.fullmatch(parts.fragment)
        if not given:
            raise UserError(f"{url}: expected #sha256= and 8 to 64 hexadecimal digits at its end, or {WAY_OUT}")
        expected = given[1].lower()
        # The hash in the name keeps files of the same name and different contents apart.
        name = f"{Path(name).stem}-{expected}{Path(name).suffix}"
    else:
        named = HASH_IN_NAME.search(name)
        if not named:
            raise UserError(
                f"{url}: has no hash of the expected content; end it with #sha256= and at least 8 digits of the file's "
                f"SHA-256, or {WAY_OUT}"
            )
        expected = named[1]
    return Path(torch.hub.get_dir()) / "checkpoints" / name, expected


def fetch(url: str, path: Path, expected: str) -> None:
    """Download an https URL to a file, and keep it only if its SHA-256 starts with the expected digits."""
    request = Request(url, headers={"User-Agent": "enact-detection"})
    # A unique name, because several processes of a training may download the file at once.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with build_opener(ToHttpsAlone).open(request, timeout=TIMEOUT) as answer, open(partial, "xb") as file:
            total = int(answer.headers.get("Content-Length", 0)) or None
            with tqdm.wrapattr(answer, "read", total=total, desc=path.name) as content:
                shutil.copyfileobj(content, file, CHUNK)
        digest = sha256(partial)
        if not digest.startswith(expected):
            raise UserError(
                f"{url}: is not the expected file (its SHA-256 is {digest}, expected was {expected}...), and was "
                f"deleted. If {expected} is not a hash, end the URL with #sha256= and the right one; or {WAY_OUT}"
            )
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Return a file's SHA-256: 64 hexadecimal digits in lower case."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
