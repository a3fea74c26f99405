"""Takes the pictures of docs/use/explore.md from a running explorer, with a headless Chromium.

enact explore CHECKPOINT IMAGES --threshold 0.35 --port 7871 --no_browser
python docs/figures/explore.py http://127.0.0.1:7871/ IMAGE_NAME WBC
"""

import argparse
import io
import json
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

IMAGES = Path(__file__).resolve().parents[1] / "images"
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync".split()
)
# Pixels of the window; the page is as wide as the pictures in the documentation can show.
WINDOW = {"width": 1400, "height": 1000}


def main() -> None:
    """Choose an image, switch the second model to regions, click on a detection, and take two pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", help="the explorer's address")
    parser.add_argument("image", help="name of the image to choose")
    parser.add_argument("name", help="class name of the detection to click on")
    args = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport=WINDOW)
        page.set_default_timeout(120_000)
        page.goto(args.address)
        page.wait_for_selector("#detections_2 img")
        page.click("#choice input")
        page.click(f"[role=option]:has-text('{args.image}')")
        page.wait_for_selector(f"#note:has-text('{args.image}')")
        page.click("#attention label:has-text('ENACT')")
        page.wait_for_selector("#caption_2:has-text('ENACT')")
        page.click("#clusters label:has-text('regions')")
        page.wait_for_selector("#caption_2:has-text('regions')")
        click_on(page, args.name)
        page.wait_for_selector("#attention_map_2 img")
        take(page, "explore_attention.png")
        page.click("button[role=tab]:has-text('Clusters')")
        take(page, "explore.png")
        browser.close()


def click_on(page: Page, name: str) -> None:
    """Click on the middle of the likeliest detection with this name in the first model's picture."""
    with page.expect_download() as download:
        page.click("#save_json")
    values = json.loads(Path(download.value.path()).read_text())
    left, top, right, bottom = next(row["box"] for row in values["models"][0]["detections"] if row["name"] == name)
    picture, image = page.locator("#detections_1 img"), values["image"]
    shown = picture.bounding_box()
    x = (left + right) / 2 / image["width"] * shown["width"]
    y = (top + bottom) / 2 / image["height"] * shown["height"]
    picture.click(position={"x": x, "y": y})


def take(page: Page, name: str) -> None:
    """Write a picture of the whole page, with 256 colours to keep it small."""
    page.mouse.move(0, 0)
    page.wait_for_timeout(3000)
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    picture.quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(IMAGES / name, optimize=True)


if __name__ == "__main__":
    main()
