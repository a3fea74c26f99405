"""Introspection of a detector: its values match the forward pass, and its figures are legible."""

import functools
import importlib.util
import io
import itertools

import matplotlib
import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL, build, parse
from matplotlib.patches import Rectangle
from PIL import Image
from test_clustering_settings import expected_clusters
from torch.nn import functional as F
from torch.testing import assert_close

from enact_common.attention.clustering import clusterings, self_information, smooth
from enact_common.attention.hilbert import hilbert_order
from enact_common.data.categories import LabelMap
from enact_common.data.images import decode_image
from enact_common.inference import introspection_plots
from enact_common.inference.detector import Detections, LoadedDetector
from enact_common.inference.introspection import (
    MAX_DETECTIONS,
    SHOWN,
    check_kinds,
    introspect,
    memory_attentions,
    output_and_weights,
    write_introspection,
)
from enact_common.utils.errors import UserError
from enact_common.variants import VARIANTS

# The images of `shapes` have 64 x 80 pixels, which gives a feature map of 8 x 10 cells.
SIZE = "--eval_size 64 --max_size 80 --enc_layers 2".split()
CELLS = (8, 10)

# Per variant, flags that change the decoder's cross-attention or the clustering.
FLAGS = {
    "detr": ("", "--encoder_attention mhsa --pre_norm", "--enact_clusters regions --enact_mask_padding"),
    "conditional": (
        "",
        "--encoder_attention mhsa --pre_norm",
        "--enact_max_clusters 5 --enact_per_image",
        "--enact_order hilbert",
    ),
    "anchor": (
        "",
        "--encoder_attention mhsa",
        "--attention_type nn.MultiheadAttention --enact_mask_padding --enact_max_clusters 5",
        "--num_feature_levels 3 --backbone resnet50 --dilation --backbone_stages 4 --eval_size 128 --max_size 160 "
        "--enc_layers 4 --enact_per_image --enact_mask_padding",
        "--enact_clusters regions --enact_max_clusters 9",
    ),
}
MODELS = [(variant, flags) for variant in VARIANTS for flags in FLAGS[variant]]
CLUSTERED = [(variant, flags) for variant, flags in MODELS if "mhsa" not in flags]


@functools.cache
def detector(variant: str, flags: str = "") -> LoadedDetector:
    """A detector with random weights."""
    torch.manual_seed(0)
    argv = [*SMALL_MODEL[variant], *SIZE, *flags.split(), "--num_classes", "3"]
    model, _, postprocessors = build(variant, *argv)
    args = parse(variant, *argv)
    labels = LabelMap((0, 1, 2), ("class 0", "class 1", "class 2"))
    return LoadedDetector(variant, args, model, postprocessors["bbox"], labels, 0.0, torch.device("cpu"))


@pytest.fixture
def pixels(shapes):
    """An image, uint8 (3, 64, 80)."""
    return decode_image(sorted((shapes / "val2017").iterdir())[0])


def order_of(flags: str) -> torch.Tensor:
    """The indices of the map's cells in the order of clustering, int64 (h w,)."""
    return hilbert_order(*CELLS) if "hilbert" in flags else torch.arange(CELLS[0] * CELLS[1])


def values_of(attention, value):
    """The projected values of an attention, (batch, heads, N, head_dim)."""
    if isinstance(attention, torch.nn.MultiheadAttention):
        value = F.linear(value, attention.in_proj_weight.chunk(3)[2], attention.in_proj_bias.chunk(3)[2])
        value = value if attention.batch_first else value.transpose(0, 1)
    elif hasattr(attention, "in_proj_weight"):
        value = F.linear(value, attention.in_proj_weight.chunk(5)[4], attention.in_proj_bias.chunk(5)[4])
        value = value.flatten(1, 2)
    else:
        value = value.transpose(0, 1)
    return value.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)


def attention_call(model, images):
    """(arguments, keywords, output) of the cross-attention to the feature map in one forward pass."""
    calls = []

    def note(_, args, kwargs, output):
        calls.append((args, kwargs, output if torch.is_tensor(output) else output[0]))

    handle = memory_attentions(model)[-1].register_forward_hook(note, with_kwargs=True)
    model(images)
    handle.remove()
    (call,) = calls
    return call


@pytest.mark.parametrize("variant, flags", MODELS)
@torch.inference_mode()
def test_attention_weights_reproduce_the_forward_pass(variant, flags):
    model = detector(variant, flags).model
    attention = memory_attentions(model)[-1]
    # Two images of different shapes, so both are padded.
    args, kwargs, output = attention_call(model, [torch.randn(3, 96, 256), torch.randn(3, 224, 128)])

    again, weights = output_and_weights(attention, args, kwargs)
    assert_close(again, output)
    assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
    assert weights.min() == 0 < weights.max()  # padding has weight 0
    value = kwargs["value"] if "value" in kwargs else args[5 if len(args) > 5 else 2]
    attended = (weights @ values_of(attention, value)).transpose(1, 2).flatten(2)
    by_hand = attention.out_proj(attended)
    assert_close(by_hand if by_hand.shape == output.shape else by_hand.transpose(0, 1), output)


@pytest.mark.parametrize("variant, flags", MODELS)
@torch.inference_mode()
def test_attention_of_chosen_queries_is_the_mean_over_heads_and_levels(variant, flags, pixels):
    loaded = detector(variant, flags)
    everything = introspect(loaded, pixels, torch.arange(8)).attention
    args, kwargs, _ = attention_call(loaded.model, loaded.model_input(pixels))
    _, weights = output_and_weights(memory_attentions(loaded.model)[-1], args, kwargs)
    assert weights.shape[:2] == (3 if "levels" in flags else 1, 4)
    assert_close(everything, weights.mean(dim=(0, 1)).view(8, *CELLS))
    assert_close(everything.sum(dim=(1, 2)), torch.ones(8))
    assert not torch.allclose(everything[0], everything[7], rtol=1e-3)
    assert_close(introspect(loaded, pixels, torch.tensor([7, 2])).attention, everything[[7, 2]])
    assert introspect(loaded, pixels, torch.zeros(0, dtype=torch.int64)).attention.shape == (0, *CELLS)


@pytest.mark.parametrize("variant, flags", MODELS)
def test_memory_attention_belongs_to_the_last_decoder_layer(variant, flags):
    model = detector(variant, flags).model
    layers = model.transformer.decoder_layers if variant == "anchor" else model.transformer.decoder.layers
    assert len(layers) == 2
    assert any(module is memory_attentions(model)[-1] for module in layers[1].children())
    assert memory_attentions(model)[-1] is not layers[1].self_attn


@pytest.mark.parametrize("variant, flags", CLUSTERED)
@torch.inference_mode()
def test_information_is_computed_from_the_scored_tokens(variant, flags, pixels):
    loaded, expected, handles = detector(variant, flags), [], []

    def note(layer, args, kwargs):
        if args[0].ndim == 4:  # row-column attention scores the row keys: map plus positions
            src, x = args[:2]
            keys = (src + x.unsqueeze(1)).flatten(1, 2)
        else:
            keys = args[1] if layer.batch_first else args[1].transpose(0, 1)
        expected.append(smooth(self_information(layer.W_prob(keys).squeeze(-1)), layer.kernel))

    for layer in clusterings(loaded.model):
        handles.append(layer.register_forward_pre_hook(note, with_kwargs=True))
    seen = introspect(loaded, pixels, torch.arange(1)).layers
    for handle in handles:
        handle.remove()
    assert len(seen) == len(expected) == 2
    for layer, information in zip(seen, expected, strict=True):
        assert layer.information.shape[1:] == layer.clusters.shape[1:] == CELLS
        assert_close(layer.information.flatten(1)[:, order_of(flags)], information)


@pytest.mark.parametrize("variant, flags", CLUSTERED)
def test_clusters_match_the_definition(variant, flags, pixels):
    loaded = detector(variant, flags)
    kind = "regions" if "regions" in flags else "windows"
    most = next(
        (int(after) for flag, after in itertools.pairwise(flags.split()) if flag == "--enact_max_clusters"), None
    )
    for layer in introspect(loaded, pixels, torch.arange(1)).layers:
        found = (tensor.flatten(1)[:, order_of(flags)] for tensor in (layer.information, layer.clusters))
        for information, clusters in zip(*found, strict=True):
            lists = expected_clusters(information, kind, most)
            expected = torch.full_like(clusters, -1)
            for i, cells in enumerate(lists):
                expected[cells] = i
            assert torch.equal(clusters, expected)


@pytest.mark.parametrize("variant, flags", [*((v, "") for v in VARIANTS), ("conditional", "--encoder_attention mhsa")])
def test_introspection_does_not_change_the_detector(variant, flags, pixels, monkeypatch):
    loaded = detector(variant, flags)
    before = loaded.detect(pixels)
    introspect(loaded, pixels, before.queries)
    with pytest.raises(ZeroDivisionError), monkeypatch.context() as patch:
        patch.setattr(type(memory_attentions(loaded.model)[-1]), "forward", lambda *args, **kwargs: 1 / 0)
        introspect(loaded, pixels, before.queries)
    for module in loaded.model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert getattr(module, "observer", None) is None
    after = loaded.detect(pixels)
    assert torch.equal(after.boxes, before.boxes) and torch.equal(after.scores, before.scores)


@pytest.mark.parametrize(
    "variant, flags", [("detr", ""), ("conditional", FLAGS["conditional"][1]), ("anchor", "")], ids=VARIANTS
)
@pytest.mark.slow
def test_figures_are_written(variant, flags, pixels, tmp_path):
    loaded = detector(variant, flags)
    kinds = ["attention"] if "mhsa" in flags else ["clusters", "attention", "entropy"]
    written = write_introspection(loaded, pixels, loaded.detect(pixels), kinds, tmp_path / "new", "a.b")
    assert written == [tmp_path / "new" / f"a.b_{kind}.png" for kind in kinds]
    assert sorted((tmp_path / "new").iterdir()) == sorted(written)
    for path in written:
        with Image.open(path) as picture:
            assert 1000 < picture.width < 2600 and 400 < picture.height < 1200
            assert len(picture.convert("RGB").getcolors(2**24)) > 100


def test_kinds_that_a_model_cannot_show_are_refused_before_any_work(pixels, tmp_path, monkeypatch):
    plain = detector("detr", "--encoder_attention mhsa")
    monkeypatch.setattr(plain.model, "forward", lambda *args: pytest.fail("the model ran before the check"))
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), [], [], torch.zeros(0))
    for kind in ("entropy", "clusters"):
        with pytest.raises(UserError, match=f"--show {kind}: .*no clusters.* it can show attention"):
            write_introspection(plain, pixels, nothing, ["attention", kind], tmp_path / "new", "a")
    with pytest.raises(UserError, match="--show boxes: .*entropy, clusters, attention"):
        check_kinds(plain, ["boxes"])
    check_kinds(plain, ["attention"])
    check_kinds(detector("detr"), SHOWN)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"enact-detection\[plots\]"):
        check_kinds(plain, ["attention"])
    check_kinds(plain, [])
    assert not (tmp_path / "new").exists()


def test_a_model_without_encoder_layers_shows_only_attention(pixels, tmp_path):
    bare = detector("conditional", "--enc_layers 0")
    with pytest.raises(UserError, match="it can show attention"):
        check_kinds(bare, SHOWN)
    assert len(write_introspection(bare, pixels, bare.detect(pixels), ["attention"], tmp_path, "a")) == 1


def collect_figures(monkeypatch):
    """A list that collects the figures of later `write_introspection` calls."""
    figures = []

    def collecting(draw):
        def keep(*args):
            figures.append(draw(*args))
            return figures[-1]

        return keep

    for name in ("draw_information", "draw_clusters", "draw_attention"):
        monkeypatch.setattr(introspection_plots, name, collecting(getattr(introspection_plots, name)))
    return figures


def titles(figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def headings(figure) -> str:
    return " ".join(text.get_text() for text in figure.texts)


def test_the_most_likely_detections_are_shown_once_per_query(pixels, tmp_path, monkeypatch):
    queries = torch.tensor([3, 5, 3, 0, 1, 2, 4, 6])
    scores = torch.linspace(0.9, 0.2, 8)
    boxes = torch.arange(32.0).view(8, 4)
    found = Detections(boxes, scores, torch.arange(8), [f"thing {i}" for i in range(8)], [0] * 8, queries)
    figures = collect_figures(monkeypatch)
    write_introspection(detector("detr"), pixels, found, ["attention"], tmp_path, "a")
    shown = [0, 1, 3, 4, 5, 6]
    assert len(shown) == MAX_DETECTIONS
    assert titles(figures[0]) == [f"thing {i} {scores[i]:.2f}" for i in shown]
    panels = [axes for axes in figures[0].axes if axes.get_title()]
    for axes, i in zip(panels, shown, strict=True):
        left, top, right, bottom = boxes[i].tolist()
        assert all(patch.get_bbox().extents.tolist() == [left, top, right, bottom] for patch in axes.patches)


def test_an_image_without_detections_is_drawn_and_says_so(pixels, tmp_path, monkeypatch):
    loaded, figures = detector("conditional"), collect_figures(monkeypatch)
    written = write_introspection(loaded, pixels, loaded.detect(pixels, threshold=1.0), SHOWN, tmp_path, "a")
    assert [path.name for path in written] == ["a_entropy.png", "a_clusters.png", "a_attention.png"]
    assert "nothing was found" in headings(figures[2])


def test_a_class_name_is_not_read_as_a_formula():
    attention, boxes = torch.rand(1, 4, 5), torch.tensor([[1.0, 1, 9, 9]])
    image = np.zeros((20, 30, 3), np.uint8)
    figure = introspection_plots.draw_attention(image, attention, boxes, ["$a_$"], torch.ones(1))
    with io.BytesIO() as file, matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(file, format="svg")
        assert "$a_$ 1.00" in file.getvalue().decode()


def test_titles_count_the_clusters_and_dropped_cells_are_hatched():
    image = np.zeros((20, 30, 3), np.uint8)
    windows = torch.tensor([[[-1, 0, 0], [1, 1, -1]]])
    one = torch.zeros(1, 2, 3, dtype=torch.int64)
    figure = introspection_plots.draw_clusters(image, [windows, one])
    assert titles(figure) == [
        "Encoder layer 1\n2 clusters, mean 2.0 cells",
        "Encoder layer 2\n1 cluster, mean 6.0 cells",
    ]
    assert "2 x 3 cells" in headings(figure) and "hatched" in headings(figure)
    hatched = [patch.get_bbox().extents.tolist() for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    assert hatched == [[0, 0, 10, 10], [20, 10, 30, 20]]
    assert not figure.axes[1].patches
    assert "hatched" not in headings(introspection_plots.draw_clusters(image, [one]))


def test_several_levels_are_named_in_titles():
    image = np.zeros((20, 30, 3), np.uint8)
    figure = introspection_plots.draw_information(image, list(torch.rand(2, 3, 4, 5)))
    expected = [f"Encoder layer {i}, level {j}" for i in (1, 2) for j in (1, 2, 3)]
    assert titles(figure) == expected
    places = [axes.get_position() for axes in figure.axes if axes.get_title()]
    assert len({round(place.x0, 6) for place in places}) == 3 and len({round(place.y0, 6) for place in places}) == 2


@pytest.mark.parametrize("seed", range(5))
def test_borders_separate_cells_of_different_clusters(seed):
    clusters = np.sort(np.random.default_rng(seed).integers(-1, 9, 24)).reshape(4, 6)
    lines = {tuple(map(tuple, line)) for line in introspection_plots.borders(clusters).tolist()}
    expected = set()
    for y, x in itertools.product(range(4), range(6)):
        if x < 5 and clusters[y, x] != clusters[y, x + 1]:
            expected.add(((x + 1, y), (x + 1, y + 1)))
        if y < 3 and clusters[y, x] != clusters[y + 1, x]:
            expected.add(((x, y + 1), (x + 1, y + 1)))
    assert lines == expected


def test_one_cluster_has_no_border_and_one_tint():
    clusters = np.zeros((2, 3), np.int64)
    assert introspection_plots.borders(clusters).shape == (0, 2, 2)
    assert len(np.unique(introspection_plots.tints(clusters).reshape(-1, 4), axis=0)) == 1


@pytest.mark.parametrize("length", [1, 2, 5, 7, 13])
def test_neighbouring_clusters_have_different_tints(length):
    clusters = (np.arange(9 * 13) // length).reshape(9, 13)
    clusters[-1, -2:] = -1
    tints = introspection_plots.tints(clusters)
    assert (tints[clusters < 0, 3] == 0).all() and (tints[clusters >= 0, 3] > 0).all()
    for i in range(clusters.max() + 1):
        assert len(np.unique(tints[clusters == i], axis=0)) == 1
    for one, other in ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[1:], np.s_[:-1])):
        differ = clusters[one] != clusters[other]
        assert (tints[one] != tints[other]).any(axis=-1)[differ].all()


def test_upsampled_maps_align_with_their_cells():
    # A cell has 10 x 10 pixels. Its centre has its value; halfway to the next centre is the mean of both.
    values = introspection_plots.upsampled(torch.tensor([[0.0, 4.0], [8.0, 8.0]]), np.zeros((20, 20, 3), np.uint8))
    side = len(values)
    assert values[0, 0] == 0 and values[-1, -1] == 8 and values[side // 8, -side // 8] == 4
    assert values[0, side // 2] == pytest.approx(2, abs=0.01)


def texts(figure):
    """The (text, extent in pixels) pairs of a figure."""
    figure.draw_without_rendering()  # places the texts
    found = [*figure.texts, *(axes.title for axes in figure.axes)]
    for axes in figure.axes:
        found += [axes.xaxis.label, *axes.get_xticklabels()]
    return [(text.get_text(), text.get_window_extent()) for text in found if text.get_text()]


@pytest.mark.parametrize(
    "panels, levels, height, width",
    [(1, 1, 32, 32), (1, 1, 60, 800), (6, 1, 60, 800), (6, 1, 400, 20), (3, 3, 400, 20), (3, 3, 120, 160)],
)
@pytest.mark.parametrize("kind", SHOWN)
@pytest.mark.slow
def test_texts_and_panels_do_not_overlap_at_any_shape(kind, panels, levels, height, width):
    image = np.full((height, width, 3), 128, np.uint8)
    if kind == "attention":
        n = min(panels * levels, MAX_DETECTIONS)
        attention, boxes = torch.rand(n, 4, 5), torch.tensor([[1.0, 2, 20, 30]]).expand(n, -1)
        names = ["a name $without$ an end, or nearly so"] * n
        figure = introspection_plots.draw_attention(image, attention, boxes, names, torch.full((n,), 0.5))
    elif kind == "clusters":
        clusters = (torch.arange(100) - 3).clamp(min=-1).view(10, 10)
        figure = introspection_plots.draw_clusters(image, [clusters.expand(levels, -1, -1)] * panels)
    else:
        figure = introspection_plots.draw_information(image, list(0.0123456 * torch.rand(panels, levels, 4, 5)))
    size = figure.get_size_inches()
    assert size.min() > 1.5 and size[0] <= 18 and size[1] <= 10

    words = texts(figure)
    extents = [extent for _, extent in words]
    panel = [axes.get_window_extent() for axes in figure.axes if axes.get_title()]
    for extent in extents + panel:
        assert extent.x0 >= 0 and extent.y0 >= 0 and extent.x1 <= figure.bbox.x1 and extent.y1 <= figure.bbox.y1
    for (word, one), (other_word, other) in itertools.combinations(words, 2):
        assert not one.overlaps(other), (word, other_word)
    for one, other in itertools.product(extents, panel):
        assert not one.overlaps(other)
    for extent in panel:
        assert extent.width / extent.height == pytest.approx(width / height, rel=1e-3)


def test_a_map_of_one_cell_is_drawn():
    image = np.full((32, 32, 3), 128, np.uint8)
    figure = introspection_plots.draw_information(image, [torch.full((1, 1, 1), 0.25)])
    labels = [extent for word, extent in texts(figure) if word[0].isdigit()]
    assert len(labels) == 3
    assert not any(one.overlaps(other) for one, other in itertools.combinations(labels, 2))
    introspection_plots.draw_clusters(image, [torch.zeros(1, 1, 1, dtype=torch.int64)])
