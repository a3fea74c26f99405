"""The explorer's page, made with Gradio (extra `explore`). `view` computes everything that it shows.

A user's view is in `gr.State`, so users do not see each other's images. The page loads nothing from other servers.
"""

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware

from enact_common.attention.clustering import CLUSTERS
from enact_common.explore import view as views
from enact_common.explore.models import ENACT, PLAIN, Models, Settings, orders_of, settings_of, why_not_convertible
from enact_common.explore.view import Picture, View
from enact_common.utils.errors import UserError

# Forbids browsers to load anything for the page from elsewhere; Gradio's own page would ask a few public servers.
CONTENT_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' ws: wss: data: blob:; "
    "frame-ancestors 'none'"
)

# Seconds after which the files of a view are removed, and seconds between the checks.
FILES_LIVE = 3600

MAX_UPLOAD = "200mb"

NO_IMAGE = "Drop an image, or choose one."
NO_QUERY = "Click on a detection, or choose one, to see where its query attends."
ATTENTION_NAMES = {ENACT: "ENACT", PLAIN: "plain"}

STYLE = """
.gradio-container {max-width: 1500px !important; margin: auto;}
footer {display: none !important;}
"""


class ContentPolicy:
    """ASGI middleware that adds `CONTENT_POLICY` to every response.

    Args:
        app: the application below.
    """

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


def build_page(models: Models, checkpoint: str, images: Sequence[Path], threshold: float, folder: Path) -> gr.Blocks:
    """Build the page.

    Args:
        models: the checkpoint's detector.
        checkpoint: its name, for the heading and the JSON files.
        images: images to choose from; the first one is shown at the start.
        threshold: the slider's start.
        folder: for the files to download.
    """
    detector, own = models.detector, settings_of(models.detector)
    reason = why_not_convertible(detector)
    attentions = [ENACT, PLAIN] if reason is None else [own.attention]
    start_attention = own.attention if reason else next(name for name in attentions if name != own.attention)
    clusters = own.attention == ENACT or reason is None
    least_side = detector.args.max_size
    names = views.names_of(images)

    with gr.Blocks(title="ENACT explorer", analytics_enabled=False, delete_cache=(FILES_LIVE, FILES_LIVE)) as page:
        state = gr.State(time_to_live=FILES_LIVE)
        gr.Markdown(
            f"## ENACT explorer\n`{checkpoint}`: {detector.variant}, {own.text()}, on {detector.device}. "
            "The first model is the checkpoint's, the second one has the same weights with your settings."
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                upload = gr.File(label="Image", file_count="single", type="filepath", height=120, elem_id="upload")
                choice = gr.Dropdown(
                    list(zip(names, range(len(names)), strict=True)), value=0 if names else None,
                    label="Images given at the start", visible=bool(names), elem_id="choice",
                )  # fmt: skip
                slider = gr.Slider(0, 1, threshold, step=0.01, label="Least score", elem_id="threshold")
                gr.Markdown(f"**Second model**{'' if reason is None else f': {reason}.'}")
                controls = [
                    gr.Radio(
                        [(ATTENTION_NAMES.get(name, name), name) for name in attentions], value=start_attention,
                        label="Encoder attention", elem_id="attention",
                    ),
                    gr.Slider(
                        0.5, 12, own.sigma, step=0.5, label="Sigma, tokens", elem_id="sigma", visible=clusters,
                        info="trained weights fit their own sigma best",
                    ),
                    gr.Radio(list(CLUSTERS), value=own.clusters, label="Clusters", elem_id="clusters", visible=clusters),
                    gr.Radio(
                        orders_of(detector), value=own.order, label="Order of the tokens", elem_id="order",
                        visible=clusters and len(orders_of(detector)) > 1,
                    ),
                    gr.Slider(
                        0, 5, own.temperature or 0, step=0.1, label="Temperature", elem_id="temperature",
                        info="0: as published", visible=clusters,
                    ),
                    gr.Slider(
                        0, 1024, own.max_clusters or 0, step=1, label="At most M clusters", elem_id="max_clusters",
                        info="0: no limit", visible=clusters,
                    ),
                ]  # fmt: skip
                with gr.Row():
                    save_picture = gr.DownloadButton("Picture", interactive=False, size="sm", elem_id="save_picture")
                    save_json = gr.DownloadButton("JSON", interactive=False, size="sm", elem_id="save_json")
            with gr.Column(scale=4):
                note = gr.Markdown(NO_IMAGE, elem_id="note")
                captions, pictures = two_of(gr.Markdown, "caption"), two_of(picture_box, "detections")
                with gr.Tab("Clusters", visible=clusters):
                    cluster_maps = two_of(picture_box, "cluster_map")
                with gr.Tab("Information", visible=clusters):
                    information_maps = two_of(picture_box, "information_map")
                with gr.Tab("Attention of a detection"):
                    query = gr.Dropdown([], label="Detection", info=NO_QUERY, elem_id="query")
                    attention_maps = two_of(picture_box, "attention_map")

        drawn = [note, *captions, *pictures, query, save_picture, save_json]
        maps = [*cluster_maps, *information_maps]
        everything = [state, *drawn, *maps, *attention_maps]

        def shown(view: View, threshold: float, chosen: int | None = None) -> dict:
            """The components that depend on the threshold."""
            return detections_shown(view, threshold, chosen, checkpoint, folder, drawn)

        @telling
        def read(path: str | None, threshold: float, *values) -> dict:
            if path is None:
                return {note: NO_IMAGE}
            return start_view(views.read_picture(Path(path), least_side), threshold, values)

        @telling
        def choose(index: int | None, threshold: float, *values) -> dict:
            return read(None if index is None else str(images[index]), threshold, *values)

        def start_view(picture: Picture, threshold: float, values: Sequence) -> dict:
            view = views.look(models, picture, settings_from(*values))
            return {state: view, **shown(view, threshold), **maps_shown(view, maps), **dict.fromkeys(attention_maps)}

        @telling
        def switch(view: View | None, threshold: float, chosen: int | None, *values) -> dict:
            if view is None:
                return {note: NO_IMAGE}
            view = views.with_second(models, view, settings_from(*values))
            return {
                state: view,
                **shown(view, threshold, chosen),
                **maps_shown(view, maps),
                **attention_shown(models, view, chosen, attention_maps),
            }

        def redraw(view: View | None, threshold: float, chosen: int | None) -> dict:
            return {note: NO_IMAGE} if view is None else shown(view, threshold, chosen)

        def click(number: int, view: View | None, threshold: float, event: gr.SelectData) -> dict:
            """Choose the detection of picture 0 or 1 at the clicked place."""
            if view is None:
                return {note: NO_IMAGE}
            seen, (x, y) = view.both()[number], event.index
            kept = views.likeliest(seen.detections, threshold)
            factor = views.zoom(view.picture)
            index = views.detection_at(kept, x / factor, y / factor)
            if index is None:
                gr.Info("no detection there; click inside a box")
                return {query: gr.skip()}
            chosen = int(kept.queries[index])
            return {
                query: gr.Dropdown(views.options_of(seen, threshold), value=chosen),
                **attention_shown(models, view, chosen, attention_maps),
            }

        def attend(view: View | None, chosen: int | None) -> dict:
            return {note: NO_IMAGE} if view is None else attention_shown(models, view, chosen, attention_maps)

        upload.upload(read, [upload, slider, *controls], everything, trigger_mode="always_last", api_visibility="private")
        choice.input(choose, [choice, slider, *controls], everything, trigger_mode="always_last", api_visibility="private")
        if names:
            page.load(choose, [choice, slider, *controls], everything, api_visibility="private")
        slider.change(
            redraw, [state, slider, query], drawn, trigger_mode="always_last", show_progress="hidden",
            api_visibility="private",
        )  # fmt: skip
        gr.on(
            [control.release if isinstance(control, gr.Slider) else control.input for control in controls]
            + [control.input for control in controls if isinstance(control, gr.Slider)],
            switch, [state, slider, query, *controls], everything, trigger_mode="always_last", api_visibility="private",
        )  # fmt: skip
        for number, box in enumerate(pictures):
            box.select(
                functools.partial(click, number), [state, slider], [note, query, *attention_maps],
                api_visibility="private",
            )  # fmt: skip
        query.input(attend, [state, query], [note, *attention_maps], api_visibility="private")
    return page


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
    view: View, threshold: float, chosen: int | None, checkpoint: str, folder: Path, components: Sequence
) -> dict:
    """New values of the components that depend on the threshold.

    Args:
        view: the user's view.
        threshold: least score.
        chosen: the chosen query; None for none.
        checkpoint: its name, for the JSON file.
        folder: for the files to download.
        components: the note, two captions, two pictures, the choice of a query, two download buttons.
    """
    note, first_caption, second_caption, first_picture, second_picture, query, save_picture, save_json = components
    first, second = view.both()
    options = views.options_of(first, threshold)
    known = chosen in [value for _, value in options]
    # A folder of its own, because two users may look at files of the same name.
    own_folder = Path(tempfile.mkdtemp(dir=folder))
    picture, text = views.write_downloads(view, checkpoint, threshold, own_folder)
    return {
        note: view.picture.note() or view.picture.name,
        first_caption: caption(view, 0, threshold),
        second_caption: caption(view, 1, threshold),
        first_picture: views.draw_seen(view.picture, first, threshold),
        second_picture: views.draw_seen(view.picture, second, threshold),
        query: gr.Dropdown(options, value=chosen if known else None),
        save_picture: gr.DownloadButton(value=str(picture), interactive=True),
        save_json: gr.DownloadButton(value=str(text), interactive=True),
    }


def caption(view: View, number: int, threshold: float) -> str:
    """The two lines over a picture."""
    seen = view.both()[number]
    title = "As in the checkpoint" if number == 0 else "With your settings"
    return f"**{title}**: {seen.settings.text()}<br>{views.figures_text(seen, threshold)}"


def maps_shown(view: View, components: Sequence) -> dict:
    """New values of two pictures of clusters and two of information."""
    first, second = (views.draw_maps(view.picture, seen) or (None, None) for seen in view.both())
    return dict(zip(components, (first[1], second[1], first[0], second[0]), strict=True))


def attention_shown(models: Models, view: View, chosen: int | None, components: Sequence) -> dict:
    """New values of the two pictures of a query's attention; empty without a query."""
    if chosen is None:
        return dict.fromkeys(components)
    both = zip(view.both(), views.attention_of(models, view, chosen), strict=True)
    drawn = [views.draw_query(view.picture, seen, chosen, by_layer) for seen, by_layer in both]
    return dict(zip(components, drawn, strict=True))


def serve(page: gr.Blocks, host: str, port: int, browser: bool) -> str:
    """Start the server in a thread.

    Args:
        page: from `build_page`.
        host, port: where it listens.
        browser: whether to open the page in the user's browser.

    Returns:
        the page's address.
    """
    page.queue(default_concurrency_limit=4)
    _, address, _ = page.launch(
        server_name=host, server_port=port, inbrowser=browser, share=False, prevent_thread_lock=True, quiet=True,
        footer_links=[], max_file_size=MAX_UPLOAD, ssr_mode=False, mcp_server=False, enable_monitoring=False, pwa=False,
        css=STYLE, theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        app_kwargs={"middleware": [Middleware(ContentPolicy)]},
    )  # fmt: skip
    return address
