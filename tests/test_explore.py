"""The explorer: its pictures, files and refusals without a browser, and its page in a headless Chromium."""

import importlib.util
import json
import os
import re
import shutil
import socket
import threading
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import free_port
from PIL import Image
from test_introspection import detector
from torch.testing import assert_close

from enact_common.attention.clustering import clusterings
from enact_common.attention.conversion import clustered_weights, plain_weights
from enact_common.cli.flags import with_flags
from enact_common.explore import __main__ as command
from enact_common.explore import view as views
from enact_common.explore.models import ENACT, PLAIN, Models, orders_of, settings_of, why_not_convertible
from enact_common.inference.detector import Detections
from enact_common.inference.introspection import introspect
from enact_common.utils.errors import UserError

# Per kind of model, the detector and why its attention cannot be switched.
KINDS = {
    "detr": (("detr", ""), None),
    "hilbert": (("conditional", "--enact_order hilbert --enact_scale_logits"), None),
    "plain": (("conditional", "--encoder_attention mhsa"), None),
    "tokens": (("anchor", "--attention_type nn.MultiheadAttention"), None),
    "row-column": (("anchor", ""), "row-column"),
    "pre-norm": (("detr", "--pre_norm"), "pre_norm"),
    "rival": (("detr", "--encoder_attention avgpool"), "avgpool"),
}


def save_image(path: Path, width: int = 80, height: int = 64, seed: int = 0) -> Path:
    """Write an image of noise; its path."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def models() -> Models:
    """A small DETR with ENACT."""
    return Models(detector("detr"))


@pytest.fixture
def picture(tmp_path) -> views.Picture:
    """A picture of noise, 64 x 80 pixels."""
    return views.read_picture(save_image(tmp_path / "noise.png"))


@pytest.fixture
def view(models, picture) -> views.View:
    """The picture seen with ENACT and with plain attention."""
    return views.look(models, picture, replace(settings_of(models.detector), attention=PLAIN))


# Models --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_logits", (False, True))
def test_plain_weights_invert_the_conversion_to_enact(scale_logits):
    plain = torch.nn.MultiheadAttention(8, 2).state_dict()
    again = plain_weights(clustered_weights(plain, 2, scale_logits), 2, scale_logits)
    assert set(again) == set(plain)
    for name, tensor in plain.items():
        assert_close(again[name], tensor)


@pytest.mark.parametrize("kind", KINDS)
def test_the_attention_is_switched_only_where_weights_can_be_converted(kind, picture):
    (variant, flags), reason = KINDS[kind]
    loaded = detector(variant, flags)
    if reason:
        assert reason in why_not_convertible(loaded)
        return
    assert why_not_convertible(loaded) is None
    own = settings_of(loaded)
    other = Models(loaded).get(replace(own, attention=PLAIN if own.attention == ENACT else ENACT))
    # With clusters of one token, ENACT is plain attention: only then must the outputs agree.
    for clustering in (*clusterings(loaded.model), *clusterings(other.model)):
        clustering.fixed_length = 1
    try:
        assert_close(other.detect(picture.pixels).boxes, loaded.detect(picture.pixels).boxes)
    finally:
        for clustering in clusterings(loaded.model):
            clustering.fixed_length = None


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"sigma": 1.0}, "sigma 1"),
        ({"clusters": "regions"}, "clusters regions"),
        ({"order": "hilbert"}, "order hilbert"),
        ({"temperature": 0.5}, "temperature 0.5"),
        ({"clusters": "equal", "max_clusters": 5}, "at most 5 clusters"),
    ],
)
def test_settings_change_the_model_and_are_built_once_with_shared_weights(models, picture, changes, text):
    own = settings_of(models.detector)
    settings = replace(own, **changes)
    changed = models.get(settings)
    assert models.get(settings) is changed and models.get(own) is models.detector
    assert settings_of(changed) == settings and text in settings.text() and text not in own.text()
    backbone = next(name for name in changed.model.state_dict() if name.startswith("backbone."))
    assert changed.model.state_dict()[backbone].data_ptr() == models.detector.model.state_dict()[backbone].data_ptr()
    seen, before = views.see(changed, picture.pixels), views.see(models.detector, picture.pixels)
    if "temperature" not in changes:  # it changes weights, not clusters
        assert not torch.equal(seen.layers[0].clusters, before.layers[0].clusters)
    assert not torch.equal(seen.detections.boxes, before.detections.boxes)


def test_scores_of_a_converted_model_do_not_depend_on_chance():
    loaded = detector("conditional", "--encoder_attention mhsa")
    settings = replace(settings_of(loaded), attention=ENACT)
    first, second = (clusterings(Models(loaded).get(settings).model)[0].W_prob.weight for _ in range(2))
    assert torch.equal(first, second) and first.std() > 0


def test_old_models_are_dropped(models, monkeypatch):
    monkeypatch.setattr("enact_common.explore.models.KEPT", 2)
    own = settings_of(models.detector)
    for sigma in (1.0, 2.0, 4.0):
        models.get(replace(own, sigma=sigma))
    assert [settings.sigma for settings in models.built] == [2.0, 4.0]


def test_anchor_detr_has_one_order():
    assert orders_of(detector("anchor")) == ["rows"] and orders_of(detector("detr")) == ["rows", "hilbert"]


# Pictures and files --------------------------------------------------------------------------------------------------


def test_each_decoder_layer_has_its_attention(models, view):
    first, second = views.attention_of(models, view, query=3)
    whole = introspect(models.detector, view.picture.pixels, torch.tensor([3]))
    assert first.shape == second.shape == (2, 8, 10)  # decoder layers, map
    assert_close(first, whole.by_layer[:, 0])
    assert_close(first[-1], whole.attention[0])
    assert_close(first.sum(dim=(1, 2)), torch.ones(2))
    assert not torch.equal(first, second)


def test_a_view_has_two_models_times_and_clusters(view):
    first, second = view.both()
    assert len(first.layers) == 2 and second.layers == []
    assert first.milliseconds > 0 and (first.memory is None or first.memory >= 0)
    assert first.detections.scores.tolist() == sorted(first.detections.scores.tolist(), reverse=True)
    assert re.fullmatch(
        r"\d+ detections, [\d.]+ ms, [\d.]+ MiB, .*clusters of 80 cells", views.figures_text(first, 0.0)
    )
    assert views.figures_text(replace(second, memory=None), 2.0).endswith("memory not measured")


def test_changed_settings_run_one_model_and_a_threshold_runs_none(models, view, monkeypatch, tmp_path):
    runs = []
    see = views.see
    monkeypatch.setattr(views, "see", lambda *args: runs.append(args) or see(*args))
    changed = views.with_second(models, view, replace(view.first.settings, sigma=1.0))
    assert len(runs) == 1 and changed.first is view.first
    assert views.with_second(models, changed, changed.second.settings) is changed
    assert views.with_second(models, view, view.first.settings).second is view.first
    for threshold in (0.0, 0.3, 1.0):
        views.draw_seen(view.picture, view.first, threshold)
        views.write_downloads(view, "c.pth", threshold, tmp_path)
    assert len(runs) == 1


def test_pictures_are_drawn(models, view):
    attention = views.attention_of(models, view, 3)
    factor = views.zoom(view.picture)
    assert views.draw_seen(view.picture, view.first, 0.0).shape == (64 * factor, 80 * factor, 3)
    pictures = [*views.draw_maps(view.picture, view.first), *views.draw_maps(view.picture, view.second)]
    pictures += [views.draw_query(view.picture, view.first, 3, attention[0]), views.side_by_side(view, 0.0)]
    for drawn in pictures:
        assert drawn.dtype == np.uint8 and drawn.shape[2] == 3 and drawn.std() > 10
    # A query without a detection among the likeliest has no box.
    few = replace(view.first, detections=views.likeliest(view.first.detections, 2.0))
    views.draw_query(view.picture, few, 3, attention[0])


def test_downloads_hold_what_is_shown(view, tmp_path):
    threshold = float(view.first.detections.scores[2])
    picture, text = views.write_downloads(view, "model.pth", threshold, tmp_path)
    with Image.open(picture) as image:
        assert image.size == (2 * 80 * views.zoom(view.picture) + 12, 64 * views.zoom(view.picture) + views.CAPTION)
    values = json.loads(text.read_text())
    assert values["image"] == {"file_name": "noise.png", "width": 80, "height": 64}
    assert [model["settings"]["encoder_attention"] for model in values["models"]] == [ENACT, PLAIN]
    found = values["models"][0]["detections"]
    assert len(found) == 3 and all(row["score"] >= round(threshold, 5) for row in found)
    assert found[0]["box"] == pytest.approx(view.first.detections.boxes[0].tolist(), abs=0.01)
    layers = values["models"][0]["encoder_layers"]
    assert torch.equal(torch.tensor(layers[1]["clusters"]), view.first.layers[1].clusters)


def test_a_large_image_is_scaled_down_and_its_boxes_refer_to_the_whole(models, tmp_path):
    picture = views.read_picture(save_image(tmp_path / "long.png", width=12_000, height=60))
    assert picture.pixels.shape == (3, 8, 1600) and picture.size == (60, 12_000)
    assert "12,000 x 60" in picture.note() and "1,600 x 8" in picture.note()
    assert views.read_picture(tmp_path / "long.png", least_side=12_000).note() == ""
    view = views.look(models, picture, settings_of(models.detector))
    box = views.as_json(view, "c.pth", 0.0)["models"][0]["detections"][0]["box"]
    assert box == pytest.approx((view.first.detections.boxes[0] * 7.5).tolist(), abs=0.01)


def test_a_file_that_is_no_image_or_too_large_is_refused_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "notes.jpg").write_text("no image")
    with pytest.raises(UserError, match=r"^notes\.jpg: not an image") as error:
        views.read_picture(tmp_path / "notes.jpg")
    assert str(tmp_path) not in str(error.value)
    monkeypatch.setattr(views, "MAX_PIXELS", 100)
    with pytest.raises(UserError, match="80 x 64 pixels are more than .* make the image smaller"):
        views.read_picture(save_image(tmp_path / "a.png"))


def test_a_click_finds_the_smallest_box():
    boxes = torch.tensor([[0.0, 0, 50, 50], [10, 10, 20, 20], [60, 60, 70, 70]])
    found = Detections(boxes, torch.ones(3), torch.zeros(3, dtype=torch.int64), ["a"] * 3, [1] * 3, torch.arange(3))
    places = [(15, 15), (40, 40), (65, 61), (80, 5)]
    assert [views.detection_at(found, *place) for place in places] == [1, 0, 2, None]
    assert views.detection_at(views.likeliest(found, 2.0), 15, 15) is None


def test_the_choice_of_detections_has_each_query_once(view):
    options = views.options_of(view, 0.0)
    queries = [query for _, query in options]
    assert len(set(queries)) == len(queries) and queries[0] == int(view.first.detections.queries[0])
    assert views.options_of(view, 1.1) == []


def test_names_show_folders_only_if_needed():
    assert views.names_of([Path("a/1.png"), Path("b/2.png")]) == ["1.png", "2.png"]
    assert views.names_of([Path("x/a/1.png"), Path("x/b/1.png")]) == [os.path.join("a", "1.png"), "b/1.png"]
    assert views.names_of([]) == []


def test_two_users_at_once_get_their_own_results(models, tmp_path):
    own = settings_of(models.detector)
    pictures = [views.read_picture(save_image(tmp_path / f"{i}.png", seed=i)) for i in range(2)]
    wanted = [replace(own, attention=PLAIN), replace(own, sigma=1.0)]
    alone = [views.look(models, *pair) for pair in zip(pictures, wanted, strict=True)]
    together: dict[int, views.View] = {}

    def use(i: int) -> None:
        together[i] = views.look(models, pictures[i], wanted[i])

    threads = [threading.Thread(target=use, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert_close(together[i].second.detections.boxes, alone[i].second.detections.boxes)
        assert together[i].picture is pictures[i] and together[i].second.settings == wanted[i]


# The command ---------------------------------------------------------------------------------------------------------


def refused(capsys, *argv) -> str:
    """The error of a command line, which must end with status 2."""
    assert command.main([str(word) for word in argv]) == 2
    return capsys.readouterr().err


def test_a_missing_extra_names_the_one_install(capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else find_spec(name))
    message = refused(capsys, "any.pth")
    assert "needs gradio, not installed: pip install 'enact-detection[explore]'" in message


def test_an_empty_folder_a_missing_and_a_wrong_file_are_refused(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("text")
    assert "no image in this folder" in refused(capsys, "any.pth", tmp_path / "empty")
    assert "no such file or folder" in refused(capsys, "any.pth", tmp_path / "none")
    assert "not an image" in refused(capsys, "any.pth", tmp_path / "text.png")
    # Images may come after flags.
    assert "no such file or folder" in refused(capsys, "any.pth", "--no_browser", tmp_path / "none", "--port", 0)


def test_a_busy_port_and_a_foreign_host_are_refused(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"--port {port}: already in use on 127.0.0.1" in refused(capsys, "any.pth", "--port", port)
    assert "not an address of this machine" in refused(capsys, "any.pth", "--host", "192.0.2.1", "--port", 0)
    for host in ("no.such.host.invalid", "a..b"):
        assert f"--host {host}: no such host" in refused(capsys, "any.pth", "--host", host, "--port", 0)
    with pytest.raises(SystemExit):
        command.main(["any.pth", "--port", "70000"])
    assert command.free_port("127.0.0.1", 0) > 0


def test_a_checkpoint_of_another_kind_is_refused(capsys, tmp_path):
    torch.save({"model": {"fc.weight": torch.zeros(2, 2)}}, tmp_path / "other.pth")
    assert "fits none of the variants" in refused(capsys, tmp_path / "other.pth", "--port", 0)
    assert "none.pth" in refused(capsys, tmp_path / "none.pth", "--port", 0)


def test_images_come_from_files_and_folders(tmp_path):
    (tmp_path / "folder").mkdir()
    paths = [save_image(tmp_path / "one.png"), save_image(tmp_path / "folder" / "two.png")]
    assert command.find_images([paths[0], tmp_path / "folder"]) == paths


def test_a_browser_opens_only_where_there_are_windows(monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    assert not command.has_browser()
    monkeypatch.setenv("DISPLAY", ":0")
    assert command.has_browser()


# The page ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{"smoothing_sigma": 0.25}, {"smoothing_sigma": 20.0, "enact_max_clusters": 3000, "enact_temperature": 7.5}],
)
def test_sliders_include_the_settings_of_the_checkpoint(models, changes):
    gradio = pytest.importorskip("gradio")
    from enact_common.explore.page import settings_controls, settings_from

    loaded = copy(models.detector)
    loaded.args = with_flags(loaded.args, **changes)
    with gradio.Blocks():
        controls = settings_controls(loaded)
    values = [control.preprocess(control.value) for control in controls]
    assert settings_from(*values) == replace(settings_of(loaded), attention=PLAIN)


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="module")
def address(models, tmp_path_factory):
    """The address of a page with one image to choose, served by this process."""
    folder = tmp_path_factory.mktemp("explore")
    with pytest.MonkeyPatch.context() as patch:
        # `go_offline` changes these.
        for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY", "GRADIO_TEMP_DIR", "NO_PROXY", "no_proxy"):
            patch.setenv(name, os.environ.get(name, ""))
        command.go_offline(folder)
        from enact_common.explore.page import build_page, serve

        given = save_image(folder / "given.png", seed=5)
        page = build_page(models, "small.pth", [given], 0.0, folder)
        yield serve(page, "127.0.0.1", free_port(), browser=False)
        page.close()


def test_a_page_that_does_not_answer_is_explained(monkeypatch):
    gradio = pytest.importorskip("gradio")
    from enact_common.explore.page import serve

    monkeypatch.setattr(gradio.networking, "url_ok", lambda url: False)
    with gradio.Blocks() as page:
        pass
    with pytest.raises(UserError, match="does not answer: the machine is very busy"):
        serve(page, "127.0.0.1", free_port(), browser=False)
    page.close()


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield launched
        launched.close()


def visit(browser, address: str):
    """A page of a new user, once the first picture is there; and the addresses that it asked for."""
    page, asked = browser.new_context(viewport={"width": 1400, "height": 1200}).new_page(), []
    page.set_default_timeout(120_000)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.wait_for_selector("#detections_2 img")
    return page, asked


def text_of(page, selector: str, pattern: str) -> str:
    """The text of an element as soon as it matches."""
    element = page.locator(selector).filter(has_text=re.compile(pattern))
    element.wait_for()
    return element.inner_text()


@pytest.mark.slow
def test_a_user_uploads_slides_clicks_switches_and_saves(browser, address, tmp_path):
    page, asked = visit(browser, address)
    text_of(page, "#note", "given.png")
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []

    page.set_input_files("#upload input[type=file]", save_image(tmp_path / "mine.png", seed=1))
    text_of(page, "#note", "mine.png")
    text_of(page, "#caption_2", "plain attention")

    page.fill("#threshold input[type=number]", "1")
    text_of(page, "#caption_1", r"\b0 detections")
    page.fill("#threshold input[type=number]", "0")
    text_of(page, "#caption_1", r"[1-9]\d* detections")

    page.click("#attention label:has-text('ENACT')")
    text_of(page, "#caption_2", "ENACT: clusters windows")
    page.click("#clusters label:has-text('regions')")
    text_of(page, "#caption_2", "clusters regions")

    page.locator("#detections_1 img").click()
    page.wait_for_selector("#attention_map_2 img")
    assert re.match(r"\d+: class", page.input_value("#query input"))

    with page.expect_download() as download:
        page.click("#save_json")
    values = json.loads(Path(download.value.path()).read_text())
    assert values["image"]["file_name"] == "mine.png"
    assert values["models"][1]["settings"]["enact_clusters"] == "regions"
    page.context.close()


@pytest.mark.slow
def test_two_users_wrong_files_and_large_images(browser, address, tmp_path):
    (first, _), (second, _) = visit(browser, address), visit(browser, address)
    first.set_input_files("#upload input[type=file]", save_image(tmp_path / "wide.png", width=12_000, height=60))
    second.set_input_files("#upload input[type=file]", save_image(tmp_path / "second.png", seed=2))
    text_of(second, "#note", "second.png")
    text_of(first, "#note", "12,000 x 60 pixels. It was scaled down")

    (tmp_path / "text.png").write_text("no image")
    second.click("#upload button[aria-label='Clear']")
    second.set_input_files("#upload input[type=file]", tmp_path / "text.png")
    text_of(second, ".toast-body", "text.png: not an image")
    text_of(second, "#note", "second.png")
    for page in (first, second):
        page.context.close()
