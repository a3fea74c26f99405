"""Anchor DETR's row-column products: equal to their definitions, with less memory."""

import json
import statistics

import pytest
import torch
from torch.testing import assert_close

from enact_common.attention.clustering import CLUSTERS, EntropyClustering
from enact_common.attention.clusters import Windows, cut_windows
from enact_common.benchmark.__main__ import main
from enact_common.benchmark.eager import naive_clustered, naive_row_column
from enact_common.benchmark.rowcol import Product
from enact_common.variants import load_variant

models = load_variant("anchor").models
product, rcda, transformer = models.row_column_product, models.row_column_decoupled_attention, models.transformer

# (B, H, W, clusters or queries, head_dim)
SIZES = [
    (2, 3, 4, 5, 2),
    (1, 4, 3, 1, 3),
    (3, 1, 1, 2, 1),
    (2, 1, 5, 3, 2),
    (2, 5, 1, 3, 2),
    (1, 2, 7, 12, 1),
    (5, 6, 2, 4, 8),
]
KINDS = ("clustered", "plain")


def functions(kind):
    """(tested function, its definition)."""
    if kind == "clustered":
        return product.clustered_row_column_product, naive_clustered
    return product.row_column_product, naive_row_column


def shapes(kind, batch, height, width, others, channels):
    """The shapes of a function's three arguments."""
    if kind == "clustered":
        return [(batch, height, others), (batch, width, others), (batch, others, channels)]
    return [(batch, others, width), (batch, others, height), (batch, height, width, channels)]


def arguments(kind, sizes, dtype=torch.float64, **kwargs):
    """Random arguments of a function."""
    return [torch.randn(shape, dtype=dtype, **kwargs) for shape in shapes(kind, *sizes)]


def gradients(function, inputs, weights):
    """The gradients of a weighted sum of the output."""
    return torch.autograd.grad(function(*inputs), inputs, weights)


@pytest.fixture(params=[True, False], ids=["cached", "uncached"])
def device_kind(request, monkeypatch):
    """Runs the code path of CPUs and that of other devices, both on the CPU."""
    monkeypatch.setattr(product, "_cached", lambda device: request.param)


@pytest.fixture(params=[1, 7, 2**20])
def slice_elements(request, monkeypatch):
    """Slice sizes from one cell to everything; most do not divide the map evenly."""
    monkeypatch.setattr(product, "CACHE_SLICE", request.param)
    monkeypatch.setattr(product, "MEMORY_SLICE", request.param)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_products_equal_their_definition(kind, sizes, device_kind, slice_elements):
    function, naive = functions(kind)
    inputs = arguments(kind, sizes, requires_grad=True)
    expected = naive(*inputs)
    assert_close(function(*inputs), expected)
    weights = torch.randn_like(expected)
    assert_close(gradients(function, inputs, weights), gradients(naive, inputs, weights))
    with torch.no_grad():
        assert_close(function(*inputs), expected)


@pytest.mark.parametrize("sizes", [*SIZES[:-1:2], pytest.param(SIZES[-1], marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_gradcheck(kind, sizes, device_kind, monkeypatch):
    monkeypatch.setattr(product, "CACHE_SLICE", 20)
    monkeypatch.setattr(product, "MEMORY_SLICE", 20)
    assert torch.autograd.gradcheck(functions(kind)[0], arguments(kind, sizes, requires_grad=True))


@pytest.mark.parametrize("wanted", range(3))
@pytest.mark.parametrize("sizes", SIZES[:2], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_one_argument(kind, sizes, wanted, device_kind):
    function, naive = functions(kind)
    inputs = arguments(kind, sizes)
    inputs[wanted].requires_grad_()
    weights = torch.randn_like(naive(*inputs))
    actual, expected = (torch.autograd.grad(f(*inputs), inputs[wanted], weights) for f in (function, naive))
    assert_close(actual, expected)


@pytest.mark.parametrize("sizes", [SIZES[0], SIZES[-1]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_permuted_and_expanded_arguments(kind, sizes, device_kind, slice_elements):
    function, naive = functions(kind)
    permuted = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in arguments(kind, sizes)]
    expanded = [x[:1].expand_as(x) for x in arguments(kind, sizes)]
    for inputs in (permuted, expanded):
        inputs = [x.requires_grad_() for x in inputs]
        expected = naive(*inputs)
        assert_close(function(*inputs), expected)
        # A permuted and an expanded gradient.
        for weights in (torch.randn_like(expected.mT.contiguous()).mT, torch.ones(()).double().expand_as(expected)):
            assert_close(gradients(function, inputs, weights), gradients(naive, inputs, weights))


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_inputs_are_saved_for_the_backward_pass(kind):
    inputs = arguments(kind, (4, 9, 11, 40, 8), requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        functions(kind)[0](*inputs)
    assert {x.untyped_storage().data_ptr() for x in saved} == {x.untyped_storage().data_ptr() for x in inputs}


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_bytes_are_saved_than_by_the_definition(kind):
    sizes = shapes(kind, 4, 12, 15, 40 if kind == "clustered" else 12 * 15, 8)
    ours, naive = (Product(f, sizes, torch.device("cpu")).saved_bytes() for f in functions(kind))
    assert ours == 4 * sum(torch.Size(shape).numel() for shape in sizes)
    assert ours < 0.35 * naive


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_close(kind, dtype, device_kind):
    function = functions(kind)[0]
    inputs = [x.to(dtype).float().requires_grad_() for x in arguments(kind, (2, 6, 9, 20, 4))]
    halves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    expected, actual = function(*inputs), function(*halves)
    assert actual.dtype == dtype
    weights = torch.randn_like(expected).to(dtype)
    results = [actual, *gradients(function, halves, weights)]
    for half, full in zip(results, [expected, *gradients(function, inputs, weights.float())], strict=True):
        assert half.dtype == dtype
        assert (half.float() - full).norm() < 0.02 * full.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_does_not_change_the_product(kind, device_kind):
    function, naive = functions(kind)
    inputs = arguments(kind, (2, 6, 9, 20, 4), torch.float32, requires_grad=True)
    weights = torch.randn_like(naive(*inputs))
    with torch.autocast("cpu", torch.bfloat16):
        output = function(*inputs)
        actual = gradients(function, inputs, weights)
    assert_close(output, naive(*inputs))
    assert_close(actual, gradients(naive, inputs, weights))


@pytest.mark.parametrize("change", [(0, 0), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_shapes_that_do_not_fit_are_refused(kind, change):
    which, axis = change
    inputs = arguments(kind, (2, 3, 4, 5, 2))
    inputs[which] = inputs[which].repeat_interleave(2, axis)
    with pytest.raises(ValueError, match="expected (row|col) .B, .*, got ") as error:
        functions(kind)[0](*inputs)
    assert str([tuple(x.shape) for x in inputs]) in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_other_ranks_and_mixed_dtypes_are_refused(kind):
    inputs = arguments(kind, (2, 3, 4, 5, 2))
    for wrong in ([x[0] for x in inputs], [*inputs[:2], inputs[2].unsqueeze(0)]):
        with pytest.raises(ValueError, match="expected (row|col) "):
            functions(kind)[0](*wrong)
    with pytest.raises(ValueError, match="the same dtype.*float64.*float32"):
        functions(kind)[0](*inputs[:2], inputs[2].float())


def test_the_benchmark_compares_with_the_definitions(tmp_path, capsys):
    path = tmp_path / "figures.json"
    argv = "rowcol --clustered 3 4 5 --plain 3 4 12 --plain 3 4 2 --batch 2 --channels 2 --repeat 2 --output".split()
    assert main([*argv, str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["case"] for row in rows] == ["3 x 4, 5 clusters", "3 x 4, 12 queries", "3 x 4, 2 queries"]
    for row in rows:
        median = {name: statistics.median(runs) for name, runs in row["seconds"].items()}
        assert row["time_ratio"] == pytest.approx(median["ours"] / median["naive"])
        assert row["saved_ratio"] == row["saved_bytes"]["ours"] / row["saved_bytes"]["naive"] < 1
    assert sum(line.startswith("| 3 x 4, ") for line in capsys.readouterr().out.splitlines()) == 3


def test_the_benchmark_refuses_an_unknown_device(capsys):
    assert main(["rowcol", "--device", "nowhere"]) == 2
    assert "--device nowhere" in capsys.readouterr().err


def heads(x, count):
    """Split channels into heads: (batch, ..., d) to (batch, ..., heads, head_dim)."""
    return x.unflatten(-1, (count, -1))


MAPS = [(5, 3), (3, 5)]


@pytest.mark.parametrize("height, width", MAPS)
def test_attention_to_rows_and_columns_equals_its_definition(height, width):
    attention = rcda.MultiheadRCDA(8, 2).double()
    torch.nn.init.normal_(attention.in_proj_bias)
    value, query = torch.randn(2, height, width, 8).double(), torch.randn(2, 4, 8).double()
    query_x, query_y, x, y = (torch.randn(*shape, 8).double() for shape in ((4,), (4,), (2, width), (2, height)))
    mask_row = torch.tensor([[False] * width, [False] * (width - 1) + [True]])
    mask_col = torch.tensor([[False] * (height - 1) + [True], [False] * height])
    key_row, key_col = value.mean(1) + x, value.mean(2) + y

    inputs = (query + query_x, query + query_y, key_row, key_col, value)
    parts = zip(inputs, attention.in_proj_weight.chunk(5), attention.in_proj_bias.chunk(5), strict=True)
    q_row, q_col, k_row, k_col, v = (heads(tensor @ w.T + b, 2) for tensor, w, b in parts)
    row = torch.einsum("bqne,bwne->bnqw", q_row, k_row) / 2  # square root of head_dim 4
    col = torch.einsum("bqne,bhne->bnqh", q_col, k_col) / 2
    row = row.masked_fill(mask_row[:, None, None], -torch.inf).softmax(-1)
    col = col.masked_fill(mask_col[:, None, None], -torch.inf).softmax(-1)
    expected = attention.out_proj(torch.einsum("bnqw,bnqh,bhwne->bqne", row, col, v).flatten(2))
    assert_close(attention(query, query_x, query_y, key_row, key_col, value, mask_row, mask_col), expected)


@pytest.mark.parametrize("height, width", MAPS)
def test_attention_to_clusters_equals_its_definition(height, width):
    attention = rcda.ClusteredRCDA(8, 2).double()
    torch.nn.init.normal_(attention.in_proj_bias)
    rows, columns = torch.randn(2, width, 8).double(), torch.randn(2, height, 8).double()
    clusters_row, clusters_col, clusters = torch.randn(3, 2, 6, 8).double()

    inputs = (clusters_row, clusters_col, rows, columns, clusters)
    parts = zip(inputs, attention.in_proj_weight.chunk(5), attention.in_proj_bias.chunk(5), strict=True)
    k_row, k_col, q_row, q_col, v = (heads(tensor @ w.T + b, 2) for tensor, w, b in parts)
    row = (torch.einsum("bwne,bmne->bnwm", q_row, k_row) / 2).softmax(-1)
    col = (torch.einsum("bhne,bmne->bnhm", q_col, k_col) / 2).softmax(-1)
    expected = attention.out_proj(torch.einsum("bnhm,bnwm,bmne->bhwne", col, row, v).flatten(3))
    assert_close(attention(rows, columns, clusters_row, clusters_col, clusters), expected)


@pytest.mark.parametrize("clusters", CLUSTERS)
def test_map_clustering_equals_clustering_of_the_explicit_keys(clusters):
    clustering = transformer.MapClustering(8, sigma=1.0, clusters=clusters).double()
    src, x, y = (torch.randn(*shape, 8).double() for shape in ((2, 5, 7), (2, 7), (2, 5)))
    row, col, content, _ = clustering(src, x, y)
    k_row, k_col = ((src + position).flatten(1, 2) for position in (x.unsqueeze(1), y.unsqueeze(2)))
    expected = EntropyClustering.forward(clustering, k_row, k_col, src.flatten(1, 2))
    for ours, laid_out in zip((row, col, content), expected, strict=True):
        assert_close(ours, laid_out)


def saved_maps(layer, height, width, dtype) -> float:
    """The bytes that a layer saves for its backward pass, divided by the bytes of its float32 input map."""
    src = torch.randn(2, height, width, 64, requires_grad=True)
    x, y = (torch.randn(2, side, 64, requires_grad=True).to(dtype) for side in (width, height))
    positions = transformer.RowColumnPositions(x, y, torch.zeros(2, height, width, dtype=torch.bool), None, None)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        return Product.count_saved(lambda: layer.attend(src, positions)) / (src.numel() * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_encoder_layer_saves_fewer_bytes_with_clusters(monkeypatch, dtype):
    sizes = (64, 64, 0.0)
    clustered = transformer.ClusteredEncoderLayer(rcda.ClusteredRCDA(64, 4), *sizes, {"sigma": 1.0})
    monkeypatch.setattr(
        clustered.ENACT, "cluster_scores", lambda scores, mask: Windows(cut_windows(scores, 9).softmax(-1))
    )
    plain = transformer.RowColumnEncoderLayer(rcda.MultiheadRCDA(64, 4), *sizes)
    # Two maps of nearly equal size, without and with tokens left over after the last window.
    fitting, left_over = (saved_maps(clustered, 18, width, dtype) for width in (24, 25))
    assert left_over == pytest.approx(fitting, rel=0.05)
    assert left_over < 0.7 * saved_maps(plain, 18, 25, dtype)
