"""The clustering settings in the layer and the encoders: regions, per image, padding mask, number of clusters."""

import itertools

import pytest
import torch
from conftest import SMALL_MODEL, build, parse, run
from torch.testing import assert_close

from enact_common import NestedTensor
from enact_common.attention import clusters
from enact_common.attention.clustering import (
    CLUSTERS,
    EntropyClustering,
    clusterings,
    count_regions,
    self_information,
    smooth,
)
from enact_common.attention.layer import EnactSelfAttention
from enact_common.attention.rivals import RIVALS
from enact_common.checkpoints.files import load_checkpoint
from enact_common.cli.flags import CLUSTERING_FLAGS
from enact_common.inference.detector import load_detector
from enact_common.models.layers import attention_settings, clustering_settings
from enact_common.variants import VARIANTS

# Every combination of settings. The sequences below have more than 7 clusters without the limit.
COMBINATIONS = [
    {"clusters": clusters, "per_image": per_image, "mask_padding": mask_padding, "max_clusters": most}
    for clusters, per_image, mask_padding, most in itertools.product(
        ("windows", "regions"), (False, True), (False, True), (None, 7)
    )
]
# Clusters of equal information are always per image and without padding.
COMBINATIONS += [
    {"clusters": "equal", "per_image": True, "mask_padding": True, "max_clusters": most} for most in (None, 7)
]
# Combinations in which an image's clusters depend neither on the other images nor on its padding.
INDEPENDENT = [c for c in COMBINATIONS if c["mask_padding"] and (c["per_image"] or c["clusters"] != "windows")]


def name(combination) -> str:
    return "-".join(str(value) for value in combination.values())


def expected_clusters(information, clusters, max_clusters):
    """The clusters for one image's information (N,) by their definition: a list of lists of token indices."""
    signal = [0.0, *information.tolist(), 0.0]
    curved = [2 * signal[i] - signal[i - 1] - signal[i + 1] > 0 for i in range(1, len(signal) - 1)]
    regions = [[0]]
    for i in range(1, len(curved)):
        if curved[i] == curved[i - 1]:
            regions[-1].append(i)
        else:
            regions.append([i])
    tokens = len(curved)
    if clusters == "equal":
        return clusters_of_equal_information(information, min(max_clusters or -(-tokens // 16), tokens))
    if clusters == "regions":
        together = -(-len(regions) // (max_clusters or tokens))
        return [sum(regions[i : i + together], []) for i in range(0, len(regions), together)]
    length = round(tokens / len(regions))
    while max_clusters and tokens // length > max_clusters:
        length += 1
    first = tokens % length // 2
    return [list(range(i, i + length)) for i in range(first, first + tokens // length * length, length)]


def clusters_of_equal_information(information, count):
    """Token by token: each goes to the cluster that the middle of its information lies in, if none stays empty."""
    lists, passed, total = [[]], 0.0, information.sum().item()
    for token, own in enumerate(information.tolist()):
        wanted = int((passed + own / 2) / total * count)
        passed += own
        left = len(information) - token  # this token and those behind it
        if lists[-1] and (wanted >= len(lists) or left <= count - len(lists)):
            lists.append([])
        lists[-1].append(token)
    return lists


@pytest.mark.parametrize("combination", INDEPENDENT, ids=name)
@pytest.mark.parametrize("sigma, temperature", [(0.5, None), (1.5, 0.2), (1.5, None)])
def test_clusters_match_the_definition(combination, sigma, temperature):
    layer = EntropyClustering(6, sigma, **combination, temperature=temperature).double()
    tokens, mask = torch.randn(3, 60, 6, dtype=torch.float64), torch.zeros(3, 60, dtype=torch.bool)
    # A feature map of 6 x 10: image 1 is padded at the right, image 2 at the bottom.
    mask[1] = torch.ones(6, 10).index_fill(1, torch.arange(7), 0).bool().flatten()
    mask[2, 20:] = True
    (pooled,) = layer(tokens, key_padding_mask=mask)
    padding_mask = layer.cluster(tokens, mask).padding_mask
    for i in range(3):
        own = tokens[i, ~mask[i]]
        information = smooth(self_information(layer.W_prob(own).T), layer.kernel)[0]
        lists = expected_clusters(information, combination["clusters"], combination["max_clusters"])
        logits = information / (temperature * information.mean()) if temperature else information
        expected = torch.stack([logits[part].softmax(0) @ own[part] for part in lists])
        assert_close(pooled[i, : len(lists)], expected)
        assert pooled[i, len(lists) :].abs().sum() == 0
        if padding_mask is not None:
            assert padding_mask[i].tolist() == [False] * len(lists) + [True] * (pooled.shape[1] - len(lists))
        assert combination["max_clusters"] is None or len(lists) <= combination["max_clusters"]


@pytest.mark.parametrize("most", [None, 3, 7, 1000])
def test_a_single_image_has_the_same_windows_in_all_modes(most):
    tokens = torch.randn(1, 83, 8)
    layers = [EntropyClustering(8, 1.5, max_clusters=most, per_image=p, mask_padding=m) for p in (0, 1) for m in (0, 1)]
    for layer in layers[1:]:
        layer.load_state_dict(layers[0].state_dict())
        for mask in (None, torch.zeros(1, 83, dtype=torch.bool)):
            assert_close(layer(tokens, key_padding_mask=mask)[0], layers[0](tokens)[0])


def test_temperature_spreads_the_pooling_weights():
    """Each image is scaled by its own mean. Without a temperature the pooling weights are almost equal."""
    tokens = torch.randn(2, 1000, 8)
    published = EntropyClustering(8, 1.0)
    layers = {t: EntropyClustering(8, 1.0, temperature=t) for t in (1e9, 1.0, 0.1)}
    weights = {None: published.cluster(tokens).weights}
    information = smooth(self_information(published.W_prob(tokens).squeeze(-1)), published.kernel)
    length = weights[None].shape[-1]
    for temperature, layer in layers.items():
        layer.load_state_dict(published.state_dict())
        weights[temperature] = layer.cluster(tokens).weights
        logits = information / information.mean(dim=1, keepdim=True) / temperature
        front = 1000 % length // 2
        expected = logits[:, front : front + 1000 // length * length].unflatten(1, (-1, length)).softmax(dim=-1)
        assert_close(weights[temperature], expected)
    greatest = {temperature: w.amax(dim=-1).mean().item() * length for temperature, w in weights.items()}
    assert greatest[1e9] == pytest.approx(1, abs=1e-5) and greatest[None] == pytest.approx(1, abs=0.01)
    assert 1.05 < greatest[1.0] < greatest[0.1] <= length


@pytest.mark.parametrize("clusters", CLUSTERS)
@pytest.mark.parametrize("num_tokens", [1, 3, 400])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_temperature_gives_finite_outputs_for_any_scores(clusters, num_tokens, scale):
    """From equal scores to one token with all the probability."""
    layer = EntropyClustering(4, 1.0, clusters=clusters, temperature=0.01)
    with torch.no_grad():
        layer.W_prob.weight.fill_(scale)
    tokens = torch.randn(2, num_tokens, 4, requires_grad=True)
    pooled = layer(tokens)[0]
    pooled.square().sum().backward()
    assert pooled.isfinite().all() and tokens.grad.isfinite().all() and layer.W_prob.weight.grad.isfinite().all()
    weights = layer.cluster(tokens).pool(torch.ones(2, num_tokens, 1))
    assert_close(weights.amax(), torch.tensor(1.0))


def test_the_shared_window_length_ignores_padding():
    layer = EntropyClustering(8, 1.0, mask_padding=True)
    tokens, mask = torch.randn(2, 120, 8), torch.zeros(2, 120, dtype=torch.bool)
    mask[1, 45:] = True
    lengths = []
    for i in range(2):
        own = tokens[i : i + 1, ~mask[i]]
        regions = count_regions(smooth(self_information(layer.W_prob(own).squeeze(-1)), layer.kernel))
        lengths.append(own.shape[1] / regions.item())
    length = round(sum(lengths) / 2)
    clusters = layer.cluster(tokens, mask)
    assert clusters.padding_mask.logical_not().sum(1).tolist() == [120 // length, 45 // length]


@pytest.mark.parametrize("combination", COMBINATIONS, ids=name)
@pytest.mark.parametrize("num_tokens", [1, 2, 61])
def test_assignment_matches_the_pooled_tokens(combination, num_tokens):
    layer = EntropyClustering(4, 1.5, **combination)
    tokens, mask = torch.randn(3, num_tokens, 4), torch.zeros(3, num_tokens, dtype=torch.bool)
    mask[1, num_tokens // 2 + 1 :] = True
    clusters = layer.cluster(tokens, mask)
    # Pooling unit vectors gives each token's weight in every cluster.
    weights = clusters.pool(torch.eye(num_tokens).expand(3, -1, -1))  # (batch, M, N)
    pooled = weights > 0
    assert (pooled.sum(dim=1) <= 1).all()
    expected = torch.where(pooled.any(dim=1), pooled.to(torch.uint8).argmax(dim=1), -1)
    assert torch.equal(clusters.assignment(num_tokens), expected)


@pytest.mark.parametrize("combination", COMBINATIONS, ids=name)
def test_cluster_hooks_get_the_information_of_each_token(combination):
    layer = EntropyClustering(4, 1.5, **combination)
    tokens, mask = torch.randn(2, 24, 4), torch.zeros(2, 4, 6, dtype=torch.bool)
    mask[1, :, 4:] = mask[1, 3:] = True
    mask = mask.flatten(1)
    calls = []
    layer.register_cluster_hook(lambda *call: calls.append(call))
    clusters = layer.cluster(tokens, mask)
    ((information, hooked),) = calls
    assert hooked is clusters
    for i in range(2):
        present = ~mask[i] if combination["mask_padding"] else torch.ones(24, dtype=torch.bool)
        own = smooth(self_information(layer.W_prob(tokens[i : i + 1, present]).squeeze(-1)), layer.kernel)
        assert_close(information[i, present], own[0])
        assert information[i, ~present].abs().sum() == 0


@pytest.mark.parametrize("combination", COMBINATIONS, ids=name)
@pytest.mark.slow
def test_gradients_pass_gradcheck(combination):
    layer = EntropyClustering(4, 1.0, **combination).double()
    tokens = torch.randn(2, 12, 4, dtype=torch.float64, requires_grad=True)
    others = torch.randn(2, 12, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[1, 9:] = True
    weight = layer.W_prob.weight

    def pooled(tokens, others, weight):
        return torch.func.functional_call(
            layer, {"W_prob.weight": weight}, (tokens, others), {"key_padding_mask": mask}
        )

    torch.autograd.gradcheck(pooled, (tokens, others, weight))


@pytest.mark.parametrize("combination", COMBINATIONS[1:], ids=name)
def test_pool_shared_equals_pooling_repeated_values(combination):
    layer = EntropyClustering(5, 1.0, **combination)
    tokens, values = torch.randn(2, 24, 5), torch.randn(2, 6, 3)
    mask = torch.ones(2, 4, 6, dtype=torch.bool)
    mask[0, :, :5] = mask[1, :3] = False
    clusters, index = layer.cluster(tokens, mask.flatten(1)), torch.arange(24) % 6
    assert_close(clusters.pool_shared(values, index), clusters.pool(values[:, index]))


@pytest.mark.parametrize("combination", COMBINATIONS, ids=name)
def test_clustering_reads_back_to_the_host_at_most_once(combination, monkeypatch):
    layer, tokens, mask = EntropyClustering(8, **combination), torch.randn(3, 50, 8), torch.rand(3, 50) > 0.8
    reads = []
    for method in ("tolist", "item", "__bool__", "__int__", "__float__", "cpu", "numpy", "nonzero"):
        original = getattr(torch.Tensor, method)

        def counted(self, *args, _method=method, _original=original, **kwargs):
            reads.append(_method)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, method, counted)
    layer(tokens, tokens, key_padding_mask=mask)
    assert len(reads) == (combination["clusters"] != "equal")


@pytest.mark.parametrize("combination", COMBINATIONS, ids=name)
def test_an_image_of_only_padding_gives_finite_values(combination):
    attention = EnactSelfAttention(8, 2, batch_first=True, **combination)
    tokens, mask = torch.randn(2, 30, 8, requires_grad=True), torch.zeros(2, 30, dtype=torch.bool)
    mask[1] = True
    output, _ = attention(tokens, tokens, tokens, mask)
    output.sum().backward()
    assert output.isfinite().all() and tokens.grad.isfinite().all()


def test_masked_clusters_are_not_attended_to():
    """The batch gives the same output as each image by itself."""
    attention = EnactSelfAttention(8, 2, batch_first=True, clusters="regions", sigma=1.0)
    tokens = torch.randn(3, 50, 8)
    output, _ = attention(tokens, tokens, tokens)
    for i in range(3):
        assert_close(output[i : i + 1], attention(*[tokens[i : i + 1]] * 3)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrong", [{"clusters": "lines"}, {"max_clusters": 0}, {"temperature": 0.0}])
def test_invalid_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EnactSelfAttention(8, 2, **wrong)


FLAGS = {
    "windows": "--enact_per_image --enact_mask_padding",
    "regions": "--enact_clusters regions --enact_mask_padding",
    "limited": "--enact_per_image --enact_mask_padding --enact_max_clusters 9",
    "temperature": "--enact_clusters regions --enact_mask_padding --enact_temperature 0.1",
    "equal": "--enact_clusters equal --enact_max_clusters 9",
    "equal_default": "--enact_clusters equal",
}


def encoder_outputs(variant, model, features, mask):
    """The encoder's output (batch, h, w, d) for projected features (batch, d, h, w) and their padding mask."""
    outputs = []
    transformer = model.transformer
    if variant == "anchor":
        layer = transformer.encoder_layers[-1]
        handle = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
        transformer(features.permute(0, 2, 3, 1).unsqueeze(1), mask)
        handle.remove()
        return outputs[0]
    pos = model.backbone[1](NestedTensor(features, mask))
    _, memory = transformer(features, mask, model.query_embed.weight, pos)
    return memory.permute(0, 2, 3, 1)


@pytest.mark.slow
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize(
    "variant, own", [(v, "") for v in VARIANTS] + [("anchor", "--attention_type nn.MultiheadAttention")]
)
def test_an_images_encoding_does_not_depend_on_the_batch(variant, own, flags):
    argv = [*SMALL_MODEL[variant], "--dropout", "0", "--enc_layers", "3", *own.split(), *flags.split()]
    model = build(variant, *argv, "--smoothing_sigma", "1")[0].eval()
    small, large = torch.randn(1, 32, 7, 9), torch.randn(1, 32, 12, 13)
    with torch.no_grad():
        alone = encoder_outputs(variant, model, small, torch.zeros(1, 7, 9, dtype=torch.bool))
        # The same image, padded with noise, in a batch with a larger one.
        batch, mask = torch.randn(2, 32, 12, 13), torch.ones(2, 12, 13, dtype=torch.bool)
        batch[0, :, :7, :9], mask[0, :7, :9] = small[0], False
        batch[1], mask[1] = large[0], False
        together = encoder_outputs(variant, model, batch, mask)
    assert_close(together[:1, :7, :9], alone, rtol=1e-5, atol=1e-5)


def test_without_the_flags_the_encoding_depends_on_the_batch():
    """The published behaviour, which the flags change."""
    model = build("detr", *SMALL_MODEL["detr"], "--smoothing_sigma", "1")[0].eval()
    features = torch.randn(2, 32, 12, 13)
    features[1] = features[1, :, :1, :1]
    with torch.no_grad():
        both = encoder_outputs("detr", model, features, torch.zeros(2, 12, 13, dtype=torch.bool))
        alone = encoder_outputs("detr", model, features[:1], torch.zeros(1, 12, 13, dtype=torch.bool))
    assert (both[0] - alone[0]).abs().max() > 1e-3


SETTINGS = (
    "--enact_clusters regions --enact_per_image --enact_mask_padding --enact_max_clusters 5 --enact_temperature 0.5"
)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.slow
def test_clustering_flags_are_saved_and_restored(variant, shapes, tmp_path, capfd):
    argv = ["--coco_path", shapes, *SMALL_MODEL[variant], "--limit_val", "2"]
    assert run(variant, *argv, "--output_dir", tmp_path / "run", "--epochs", "1", *SETTINGS.split()) == 0
    checkpoint = tmp_path / "run" / "checkpoint.pth"
    assert load_checkpoint(str(checkpoint))["args"]["enact_clusters"] == "regions"
    capfd.readouterr()
    # Regions are always per image, so --enact_per_image has no effect and is not shown.
    text = "clusters regions, mask_padding True, max_clusters 5, temperature 0.5"
    assert run(variant, *argv, "--resume", checkpoint, "--eval") == 0
    assert text in capfd.readouterr().out
    # The command line overrides the checkpoint.
    other = "--enact_clusters windows --no-enact_mask_padding --enact_max_clusters 0 --enact_temperature 0".split()
    assert run(variant, *argv, "--resume", checkpoint, "--eval", *other) == 0
    assert "clusters windows, per_image True)" in capfd.readouterr().out


@pytest.mark.slow
def test_scale_logits_must_match_the_checkpoint(shapes, tmp_path, capfd):
    """Unlike the other settings, this one must be the same as in training."""
    argv = ["--coco_path", shapes, *SMALL_MODEL["detr"], "--limit_val", "2"]
    scaled = [*argv, "--enact_scale_logits"]
    assert run("detr", *scaled, "--output_dir", tmp_path / "run", "--epochs", "1") == 0
    checkpoint = tmp_path / "run" / "checkpoint.pth"
    capfd.readouterr()
    assert run("detr", *argv, "--resume", checkpoint, "--eval") == 2
    assert "Pass the flags of that run: --enact_scale_logits" in capfd.readouterr().err
    assert run("detr", *scaled, "--resume", checkpoint, "--eval") == 0
    assert "scale_logits True" in capfd.readouterr().out
    assert load_detector(checkpoint, "cpu").model.transformer.encoder.layers[0].self_attn.scale_logits

    # A checkpoint from before the flag was trained without it.
    state = torch.load(checkpoint, weights_only=False)
    args = dict(state["args"] if isinstance(state["args"], dict) else vars(state["args"]))
    torch.save({**state, "args": {k: v for k, v in args.items() if k != "enact_scale_logits"}}, checkpoint)
    assert run("detr", *scaled, "--resume", checkpoint, "--eval") == 2
    assert "Pass the flags of that run: no --enact_scale_logits" in capfd.readouterr().err


def test_clustering_settings_are_off_by_default():
    assert clustering_settings(parse("detr")) == {
        "sigma": 3.0,
        **COMBINATIONS[0],
        "temperature": None,
        "kernels": "auto",
        "zero_scores": False,
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_that_start_at_zero_learn(variant):
    """At first, clusters do not depend on the tokens. The scores get a gradient, although their weights are zero."""
    argv = "--enact_zero_scores --enact_clusters equal --enact_max_clusters 4 --enact_temperature 1".split()
    model, *_ = build(variant, *SMALL_MODEL[variant], *argv)
    layers = clusterings(model)
    assert layers
    for layer in layers:
        first, second = (
            layer.cluster_scores(layer.score(torch.randn(1, 24, layer.W_prob.in_features))) for _ in range(2)
        )
        assert_close(first.weights, second.weights)
        assert first.assignment(24).tolist() == second.assignment(24).tolist()
    nested = NestedTensor(torch.randn(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.bool))
    model.train()(nested)["pred_logits"].square().sum().backward()
    assert all(layer.W_prob.weight.grad.abs().max() > 0 for layer in layers)


def test_gradients_do_not_depend_on_the_part_size(monkeypatch):
    layer = EntropyClustering(4, 1.0, clusters="regions").double()
    tokens = torch.randn(3, 31, 4, dtype=torch.float64, requires_grad=True)
    gradients = []
    for part in (2**20, 50, 1):
        monkeypatch.setattr(clusters, "GRADIENT_PART", part)
        gradients.append(torch.autograd.grad(layer(tokens)[0].square().sum(), [tokens, layer.W_prob.weight]))
    for others in gradients[1:]:
        assert_close(others, gradients[0])


@pytest.mark.parametrize("combination", COMBINATIONS, ids=name)
def test_non_contiguous_tokens_are_pooled_equally(combination):
    layer = EntropyClustering(4, 1.0, **combination)
    tokens, mask = torch.randn(30, 3, 4).transpose(0, 1), torch.rand(3, 30) > 0.8
    expected = layer(tokens.contiguous(), key_padding_mask=mask)[0]
    assert_close(layer(tokens, key_padding_mask=mask)[0], expected)


def test_an_image_of_only_padding_does_not_change_other_windows():
    layer = EntropyClustering(8, 1.0, mask_padding=True)
    tokens, mask = torch.randn(2, 90, 8), torch.zeros(2, 90, dtype=torch.bool)
    mask[1] = True
    alone = layer(tokens[:1], key_padding_mask=mask[:1])[0]
    assert_close(layer(tokens, key_padding_mask=mask)[0][:1], alone)


def test_arguments_of_earlier_versions_are_accepted():
    args = parse("detr")
    for flag in CLUSTERING_FLAGS:
        delattr(args, flag)
    assert clustering_settings(args) == clustering_settings(parse("detr"))
    args.encoder_attention = "avgpool"
    assert attention_settings(args) == {"token_budget": None}


@pytest.mark.parametrize("words, budget", [((), None), (("0",), None), (("7",), 7)], ids=["default", "0", "7"])
@pytest.mark.parametrize("name", RIVALS)
def test_rivals_get_their_budget(name, words, budget):
    args = parse("detr", "--encoder_attention", name, *(("--token_budget", *words) if words else ()))
    expected = {"token_budget": budget} if RIVALS[name].takes_budget else {}
    expected |= {"zero_scores": False} if RIVALS[name].learns_scores else {}
    assert attention_settings(args) == expected


@pytest.mark.parametrize(
    "attention, given, idle",
    [
        ("mhsa", "--enact_per_image", "--enact_per_image"),
        ("enact", "--enact_per_image --token_budget 9", "--token_budget"),
        ("avgpool", "--enact_scale_logits --token_budget 9", "--enact_scale_logits"),
        ("kmeans", "--enact_zero_scores", "--enact_zero_scores"),
    ],
)
def test_settings_without_effect_are_named(attention, given, idle, shapes, capfd):
    argv = [*SMALL_MODEL["detr"], "--encoder_attention", attention, "--epochs", "0", *given.split()]
    assert run("detr", "--coco_path", shapes, *argv) == 0
    assert f"note: {idle}: no effect with --encoder_attention {attention}" in capfd.readouterr().out


def test_nan_stays_in_its_image_with_equal_clusters():
    """No token has a share of the information then, which must not lead to clusters that do not exist."""
    layer, tokens = EntropyClustering(4, 1.0, clusters="equal", max_clusters=5), torch.randn(2, 30, 4)
    expected = layer(tokens)[0]
    tokens[1, 7] = torch.nan
    assert_close(layer(tokens)[0][0], expected[0])
    assert layer(tokens)[0][1].isnan().all()
