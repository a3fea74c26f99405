"""The explorer's page, made with Gradio (extra `explore`). `view` computes everything that it shows.

A user's view is in `gr.State`, so users do not see each other's images. The page loads nothing from other servers.
"""

import contextlib
import functools
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware

from enact_common.attention.clustering import CLUSTERS
from enact_common.explore import view as views
from enact_common.explore.models import ENACT, PLAIN, Models, Settings, orders_of, settings_of, why_not_convertible
from enact_common.explore.view import View
from enact_common.inference.detector import LoadedDetector
from enact_common.utils.errors import UserError

# Forbids browsers to load anything for the page from elsewhere; Gradio's own page would ask a few public servers.
CONTENT_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' ws: wss: data: blob:; "
    "frame-ancestors 'none'"
)

# Seconds after which the files of a view are removed, and seconds between the checks.
FILES_LIVE = 3600

# Start of the names of the folders with a view's files.
VIEW = "view_"

MAX_UPLOAD = "200mb"

NO_IMAGE = "Drop an image, or choose one."
NO_QUERY = "Click on a detection, or choose one, to see where its query attends."
ATTENTION_TAB = "attention"
ATTENTION_NAMES = {ENACT: "ENACT", PLAIN: "plain"}

STYLE = """
.gradio-container {max-width: 1500px !important; margin: auto;}
footer {display: none !important;}
"""


class ContentPolicy:
    """ASGI middleware that adds `CONTENT_POLICY` to every response of the application below."""

    def __init__(self, app: Callable):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        async def send_with_policy(message: dict) -> None:
            if message["type"] == "http.response.start":
                header = (b"content-security-policy", CONTENT_POLICY.encode())
                message = {**message, "headers": [*message.get("headers", []), header]}
            await send(message)

        await self.app(scope, receive, send_with_policy)


def telling(function: Callable) -> Callable:
    """Show a UserError of an event's function on the page, where it stays until it is closed."""

    @functools.wraps(function)
    def call(*args):
        try:
            return function(*args)
        except UserError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error

    return call


@dataclass
class Components:
    """The page's components that events read and change.

    Attributes:
        view: `gr.State` of the user's `View`; None before the first image.
        upload, choice: the two ways to give an image.
        threshold: the slider of the least score.
        controls: the second model's settings, in the order of `settings_from`.
        note: a line on the image.
        captions, detections, clusters, information, attention: two each, for the first and the second model.
        tabs: the tabs of the last three.
        query: the choice of a detection's query.
        save_picture, save_json: download buttons.
    """

    view: gr.State
    upload: gr.File
    choice: gr.Dropdown
    threshold: gr.Slider
    controls: list
    note: gr.Markdown
    captions: list
    detections: list
    clusters: list
    information: list
    attention: list
    tabs: gr.Tabs
    query: gr.Dropdown
    save_picture: gr.DownloadButton
    save_json: gr.DownloadButton

    def of_threshold(self) -> list:
        """The components that change with the threshold."""
        return [self.note, *self.captions, *self.detections, self.query, self.save_picture, self.save_json]

    def of_view(self) -> list:
        """The components that change with the image and the settings."""
        return [self.view, *self.of_threshold(), *self.clusters, *self.information, *self.attention]


def build_page(models: Models, checkpoint: str, images: Sequence[Path], threshold: float, folder: Path) -> gr.Blocks:
    """Build the page.

    Args:
        models: the checkpoint's detector.
        checkpoint: its name, for the heading and the JSON files.
        images: images to choose from; the first one is shown at the start.
        threshold: the slider's start.
        folder: for the files to download.
    """
    with gr.Blocks(title="ENACT explorer", analytics_enabled=False, delete_cache=(FILES_LIVE, FILES_LIVE)) as page:
        parts = lay_out(models, checkpoint, views.names_of(images), threshold)
        connect(page, parts, models, checkpoint, images, folder)
    return page


def lay_out(models: Models, checkpoint: str, names: Sequence[str], threshold: float) -> Components:
    """Make the page's components; `names` are those of the images to choose from."""
    detector = models.detector
    own, clusters = settings_of(detector), can_cluster(detector)
    gr.Markdown(
        f"## ENACT explorer\n`{checkpoint}`: {detector.variant}, {own.text()}, on {detector.device}. "
        "The first model is the checkpoint's; the second one has the same weights with your settings."
    )
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            inputs = {
                "view": gr.State(time_to_live=FILES_LIVE),
                "upload": gr.File(label="Image", type="filepath", height=120, elem_id="upload"),
                "choice": gr.Dropdown(
                    list(zip(names, range(len(names)), strict=True)), value=0 if names else None,
                    label="Images given at the start", visible=bool(names), elem_id="choice",
                ),
                "threshold": gr.Slider(0, 1, threshold, step=0.01, label="Least score", elem_id="threshold"),
                "controls": settings_controls(detector),
            }  # fmt: skip
            with gr.Row():
                buttons = {
                    name: gr.DownloadButton(label, interactive=False, size="sm", elem_id=name)
                    for name, label in (("save_picture", "Save picture"), ("save_json", "Save JSON"))
                }
        with gr.Column(scale=4):
            note = gr.Markdown(NO_IMAGE, elem_id="note")
            captions, detections = two_of(gr.Markdown, "caption"), two_of(picture_box, "detections")
            with gr.Tabs() as tabs:
                with gr.Tab("Clusters", visible=clusters):
                    cluster_maps = two_of(picture_box, "clusters_map")
                with gr.Tab("Information", visible=clusters):
                    information = two_of(picture_box, "information_map")
                with gr.Tab("Attention of a detection", id=ATTENTION_TAB):
                    query = gr.Dropdown([], label="Detection", info=NO_QUERY, elem_id="query")
                    attention = two_of(picture_box, "attention_map")
    return Components(
        **inputs, **buttons, note=note, captions=captions, detections=detections, clusters=cluster_maps,
        information=information, attention=attention, tabs=tabs, query=query,
    )  # fmt: skip


def can_cluster(detector: LoadedDetector) -> bool:
    """Whether the second model can have ENACT."""
    return detector.args.encoder_attention == ENACT or why_not_convertible(detector) is None


def settings_controls(detector: LoadedDetector) -> list:
    """Make the controls of the second model's settings, in the order of `settings_from`.

    The second model starts with the other attention, if the weights can be converted.
    """
    own, reason, clusters = settings_of(detector), why_not_convertible(detector), can_cluster(detector)
    attentions = [own.attention] if reason else [ENACT, PLAIN]
    gr.Markdown(f"**Second model**: {reason}." if reason else "**Second model**")
    # Gradio refuses values beyond a slider's ends, so these include the checkpoint's.
    return [
        gr.Radio(
            [(ATTENTION_NAMES.get(name, name), name) for name in attentions], label="Encoder attention",
            value=next((name for name in attentions if name != own.attention), own.attention), elem_id="attention",
        ),
        gr.Slider(
            min(0.5, own.sigma), max(12, own.sigma), own.sigma, step=0.5, label="Sigma, tokens",
            info="weights fit the sigma of their training", elem_id="sigma", visible=clusters,
        ),
        gr.Radio(list(CLUSTERS), value=own.clusters, label="Clusters", elem_id="clusters", visible=clusters),
        gr.Radio(
            orders_of(detector), value=own.order, label="Order of the tokens", elem_id="order",
            visible=clusters and len(orders_of(detector)) > 1,
        ),
        gr.Slider(
            0, max(5, own.temperature or 0), own.temperature or 0, step=0.1, label="Temperature",
            info="0: as published", elem_id="temperature", visible=clusters,
        ),
        gr.Slider(
            0, max(1024, own.max_clusters or 0), own.max_clusters or 0, step=1, label="At most M clusters",
            info="0: no limit", elem_id="max_clusters", visible=clusters,
        ),
    ]  # fmt: skip


def connect(
    page: gr.Blocks, parts: Components, models: Models, checkpoint: str, images: Sequence[Path], folder: Path
) -> None:
    """Connect the components' events to `view`. Arguments as in `build_page`."""

    def shown(view: View, threshold: float, chosen: int | None) -> dict:
        return detections_shown(parts, view, threshold, chosen, checkpoint, folder)

    def all_shown(view: View, threshold: float, chosen: int | None) -> dict:
        maps, attention = maps_shown(parts, view), attention_shown(parts, models, view, chosen)
        return {parts.view: view, **shown(view, threshold, chosen), **maps, **attention}

    @telling
    def read(path: str | None, threshold: float, *values) -> dict:
        if path is None:
            return {parts.note: NO_IMAGE}
        picture = views.read_picture(Path(path), models.detector.args.max_size)
        return all_shown(views.look(models, picture, settings_from(*values)), threshold, None)

    def choose(index: int | None, threshold: float, *values) -> dict:
        return read(None if index is None else str(images[index]), threshold, *values)

    @telling
    def switch(view: View | None, threshold: float, chosen: int | None, *values) -> dict:
        if view is None:
            return {parts.note: NO_IMAGE}
        return all_shown(views.with_second(models, view, settings_from(*values)), threshold, chosen)

    def redraw(view: View | None, threshold: float, chosen: int | None) -> dict:
        return {parts.note: NO_IMAGE} if view is None else shown(view, threshold, chosen)

    def attend(view: View | None, chosen: int | None) -> dict:
        return {parts.note: NO_IMAGE} if view is None else attention_shown(parts, models, view, chosen)

    def clicked_on(number: int) -> Callable:
        """Return the function that chooses the detection of picture 0 or 1 at the clicked place."""

        def click(view: View | None, threshold: float, event: gr.SelectData) -> dict:
            if view is None:
                return {parts.note: NO_IMAGE}
            kept, factor = views.likeliest(view.both()[number].detections, threshold), views.zoom(view.picture)
            index = views.detection_at(kept, *(place / factor for place in event.index))
            if index is None:
                gr.Info("no detection there; click inside a box")
                return {parts.query: gr.skip()}
            chosen = int(kept.queries[index])
            return {
                parts.query: gr.Dropdown(views.options_of(view, threshold), value=chosen),
                parts.tabs: gr.Tabs(selected=ATTENTION_TAB),
                **attention_shown(parts, models, view, chosen),
            }

        return click

    # The newest of several values counts, such as those of a slider that is being dragged.
    newest = {"trigger_mode": "always_last", "api_visibility": "private"}
    settings = [parts.threshold, *parts.controls]
    parts.upload.upload(read, [parts.upload, *settings], parts.of_view(), **newest)
    parts.choice.input(choose, [parts.choice, *settings], parts.of_view(), **newest)
    if images:
        page.load(choose, [parts.choice, *settings], parts.of_view(), **newest)
    seen = [parts.view, parts.threshold, parts.query]
    parts.threshold.change(redraw, seen, parts.of_threshold(), show_progress="hidden", **newest)
    # Only a release tells of a slider's reset button.
    changes = [control.input for control in parts.controls]
    changes += [control.release for control in parts.controls if isinstance(control, gr.Slider)]
    gr.on(changes, switch, [*seen, *parts.controls], parts.of_view(), **newest)
    attended = [parts.note, parts.query, parts.tabs, *parts.attention]
    for number, picture in enumerate(parts.detections):
        picture.select(clicked_on(number), [parts.view, parts.threshold], attended, **newest)
    parts.query.input(attend, [parts.view, parts.query], [parts.note, *parts.attention], **newest)


def two_of(component: Callable, name: str) -> list:
    """Two components next to each other, for the first and the second model."""
    with gr.Row():
        return [component(elem_id=f"{name}_{number}") for number in (1, 2)]


def picture_box(elem_id: str) -> gr.Image:
    """An image that the page shows; the user cannot change it."""
    return gr.Image(
        elem_id=elem_id, interactive=False, show_label=False, format="png", buttons=["download", "fullscreen"]
    )


def settings_from(
    attention: str, sigma: float, clusters: str, order: str, temperature: float, max_clusters: float
) -> Settings:
    """The settings from the values of the page's controls."""
    return Settings(attention, float(sigma), clusters, order, temperature or None, int(max_clusters) or None)


def detections_shown(
    parts: Components, view: View, threshold: float, chosen: int | None, checkpoint: str, folder: Path
) -> dict:
    """New values of the components that change with the threshold. Arguments as in `build_page`."""
    options = views.options_of(view, threshold)
    remove_old(folder)
    # A folder for these files alone, because two users may look at files of the same name.
    picture, text = views.write_downloads(view, checkpoint, threshold, Path(tempfile.mkdtemp(prefix=VIEW, dir=folder)))
    values = {
        parts.note: view.picture.note() or view.picture.name,
        parts.query: gr.Dropdown(options, value=chosen if chosen in [query for _, query in options] else None),
        parts.save_picture: gr.DownloadButton(value=str(picture), interactive=True),
        parts.save_json: gr.DownloadButton(value=str(text), interactive=True),
    }
    titles = ("As in the checkpoint", "With your settings")
    for seen, title, caption, box in zip(view.both(), titles, parts.captions, parts.detections, strict=True):
        values[caption] = f"**{title}**: {seen.settings.text()}<br>\n{views.figures_text(seen, threshold)}"
        values[box] = views.draw_seen(view.picture, seen, threshold)
    return values


def remove_old(folder: Path) -> None:
    """Remove the files of views that are older than `FILES_LIVE`; Gradio removes its copies after the same time."""
    for old in folder.glob(f"{VIEW}*"):
        # Another user's event may have removed it.
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > FILES_LIVE:
                shutil.rmtree(old)


def maps_shown(parts: Components, view: View) -> dict:
    """New values of the pictures of clusters and information."""
    values = {}
    for seen, clusters, information in zip(view.both(), parts.clusters, parts.information, strict=True):
        values[information], values[clusters] = views.draw_maps(view.picture, seen)
    return values


def attention_shown(parts: Components, models: Models, view: View, chosen: int | None) -> dict:
    """New values of the pictures of a query's attention; empty without a query."""
    if chosen is None:
        return dict.fromkeys(parts.attention)
    both = zip(view.both(), views.attention_of(models, view, chosen), strict=True)
    drawn = [views.draw_query(view.picture, seen, chosen, by_layer) for seen, by_layer in both]
    return dict(zip(parts.attention, drawn, strict=True))


def serve(page: gr.Blocks, host: str, port: int, browser: bool) -> str:
    """Start the server in a thread, and return the page's address.

    Raises:
        UserError: the page does not answer.
    """
    page.queue(default_concurrency_limit=4)
    try:
        _, address, _ = page.launch(
            server_name=host, server_port=port, inbrowser=browser, share=False, prevent_thread_lock=True, quiet=True,
            footer_links=[], max_file_size=MAX_UPLOAD, ssr_mode=False, mcp_server=False, enable_monitoring=False,
            pwa=False, css=STYLE, app_kwargs={"middleware": [Middleware(ContentPolicy)]},
            theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        )  # fmt: skip
    except ValueError as error:
        if "localhost is not accessible" not in str(error):
            raise
        # Gradio asks its own page for an answer, and gives up after some seconds.
        raise UserError(
            f"the page on --host {host} --port {port} does not answer: the machine is very busy, or a proxy takes its "
            f"requests; try again, or set no_proxy={host}"
        ) from error
    return address
