"""The explorer's command line: `python -m enact_common.explore CHECKPOINT [IMAGE_OR_FOLDER ...]`."""

import argparse
import atexit
import errno
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from enact_common import explore
from enact_common.checkpoints.bundled import BUNDLED, images_or_bundled
from enact_common.cli.checks import is_installed
from enact_common.cli.program import Parser, program
from enact_common.cli.types import HelpFormatter, fraction
from enact_common.data.images import image_size, images_in
from enact_common.explore.models import Models
from enact_common.predict import add_detector_flags, detector_from
from enact_common.utils.errors import UserError, exit_status

HOST, PORT = "127.0.0.1", 7860

# The packages of the extra `explore`.
NEEDED = ("gradio", "matplotlib")


def build_parser() -> argparse.ArgumentParser:
    """Return the command-line parser."""
    parser = Parser(prog=program("enact_common.explore"), description=explore.__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT",
        help="trained detector, as for enact predict: a path, an https URL, a folder with a config.json, or a bundled "
        f"detector, which has an image to try: {', '.join(BUNDLED)}",
    )  # fmt: skip
    parser.add_argument(
        "images", nargs="*", type=Path, metavar="IMAGE",
        help="images to choose from, or folders of them; more can be dropped onto the page",
    )  # fmt: skip
    parser.add_argument(
        "--port", type=port_number, default=PORT, help="port of the page; 0 for any free one (default: %(default)s)"
    )
    parser.add_argument(
        "--host", default=HOST,
        help="address to listen on; the default is reachable from this machine alone. 0.0.0.0 opens the page, which "
        "has no password, to the network (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", type=fraction, metavar="SCORE",
        help="start of the slider for the least score, 0 to 1 (default: as for enact predict)",
    )  # fmt: skip
    parser.add_argument("--no_browser", action="store_true", help="do not open the page in a browser")
    add_detector_flags(parser)
    return parser


def port_number(text: str) -> int:
    """A port from 0 to 65535, for argparse."""
    value = int(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"must be 0 to 65535, got {text}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 2 for user errors, 130 after Ctrl-C, 143 after SIGTERM."""
    parser = build_parser()
    # Intermixed, because images may come after flags, as in the container's command.
    args = parser.parse_intermixed_args(argv)
    return exit_status(parser.prog, lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Check the arguments, load the detector and serve the page until a signal."""
    check_extra()
    images = find_images(images_or_bundled(args.images, args.checkpoint))
    port = free_port(args.host, args.port)
    # Loading a large checkpoint and Gradio takes a while.
    print(f"loading {args.checkpoint} ...", flush=True)
    models = Models(detector_from(args))
    folder = Path(tempfile.mkdtemp(prefix="enact_explore_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    go_offline(folder)
    # Imported here, because Gradio is an optional extra and takes seconds.
    from enact_common.explore.page import build_page, serve

    page = build_page(models, args.checkpoint, images, models.detector.threshold, folder)
    address = serve(page, args.host, port, not args.no_browser and has_browser())
    print(f"open {address} in a browser; Ctrl-C ends it", flush=True)
    if args.host not in (HOST, "localhost", "::1"):
        print(f"--host {args.host}: everyone who reaches this machine can use the page; it has no password", flush=True)
    while True:
        time.sleep(3600)


def check_extra() -> None:
    """Refuse to start without the extra `explore`."""
    missing = [name for name in NEEDED if not is_installed(name)]
    if missing:
        raise UserError(
            f"the explorer needs {' and '.join(missing)}, not installed: pip install 'enact-detection[explore]'"
        )


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Return the images among the arguments, and those in the folders; a UserError if there is none at a path."""
    images = []
    for path in paths:
        if path.is_dir():
            images += images_in(path, str(path))
        elif path.exists():
            image_size(path)
            images.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    return images


def free_port(host: str, port: int) -> int:
    """Return the port, or a free one for 0, after a try to listen on it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            if os.name == "posix":
                # As the server does: a port of a server that has just ended is free.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return probe.getsockname()[1]
    except (socket.gaierror, UnicodeError) as error:  # UnicodeError: a label is empty or too long
        raise UserError(f"--host {host}: no such host; pass an address of this machine, such as {HOST}") from error
    except PermissionError as error:
        raise UserError(f"--port {port}: not allowed to this user; pass one above 1023, such as {PORT}") from error
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise UserError(f"--host {host}: not an address of this machine; pass one, such as {HOST}") from error
        raise UserError(
            f"--port {port}: already in use on {host}; pass another one, or --port 0 for any free one"
        ) from error


def go_offline(folder: Path) -> None:
    """Set the environment that Gradio reads when it is imported; the folder is for uploads and pictures."""
    os.environ.update(
        GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1", GRADIO_TEMP_DIR=str(folder / "gradio")
    )
    # Gradio asks its own server whether it answers; a proxy cannot reach it.
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), "localhost,127.0.0.1,::1")))


def has_browser() -> bool:
    """Whether this machine shows windows. Without them, a browser would fill the terminal."""
    return sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


if __name__ == "__main__":
    sys.exit(main())
