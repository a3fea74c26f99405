"""Settings in a file: `--config`, and the file that a training leaves."""

import pytest
import yaml
from conftest import SMALL_MODEL, parse, train
from hypothesis import given, settings
from hypothesis import strategies as st

from enact_common.cli.config import RUN_FLAGS, config_text, shipped_configs
from enact_common.variants import VARIANTS, load_variant

# images a step, epochs, backbone, dilation, the plain model's learning rate and ENACT's
PUBLISHED = {
    "detr_r50": ("detr", 8, 300, "resnet50", False),
    "conditional_detr_r101": ("conditional", 8, 50, "resnet101", False),
    "anchor_detr_r50_dc5": ("anchor", 4, 50, "resnet50", True),
}
RECOMMENDED = {
    "detr": {"enact_scale_logits": True, "enact_order": "hilbert", "enact_temperature": 1.0},
    "conditional": {"enact_scale_logits": True, "enact_order": "hilbert", "enact_temperature": 1.0},
    "anchor": {"enact_temperature": 1.0},
}
GPUS = 4


def kept(args) -> dict:
    """The arguments that a configuration states."""
    return {name: value for name, value in vars(args).items() if name not in RUN_FLAGS}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_configurations_parse_to_the_published_values(name):
    variant, batch, epochs, backbone, dilation = PUBLISHED[name]
    plain, enact, recommended = (parse(variant, "--config", name + end) for end in ("", "_enact", "_enact_recommended"))
    for args in (plain, enact, recommended):
        assert (args.batch_size * GPUS, args.epochs) == (batch, epochs)
        assert (args.backbone, args.dilation) == (backbone, dilation)
    assert (plain.encoder_attention, plain.lr) == ("mhsa", 1e-4)
    assert (enact.encoder_attention, enact.lr) == ("enact", 5e-5)
    assert enact.smoothing_sigma == (5 if variant == "anchor" else 3)
    # The defaults are the published trainings.
    assert kept(enact) == kept(parse(variant))
    assert kept(plain) == kept(parse(variant, "--encoder_attention", "mhsa"))
    differs = {flag: value for flag, value in kept(recommended).items() if value != getattr(enact, flag)}
    assert differs == RECOMMENDED[variant]


def test_every_shipped_configuration_is_tested():
    assert set(shipped_configs()) == {name + end for name in PUBLISHED for end in ("", "_enact", "_enact_recommended")}


@pytest.mark.parametrize("variant", VARIANTS)
@given(st.data())
@settings(max_examples=15, deadline=None)
def test_a_written_configuration_gives_the_same_arguments(variant, tmp_path_factory, data):
    parser = load_variant(variant).main.get_args_parser()
    words = data.draw(
        st.lists(
            st.sampled_from(
                ["--lr 3e-4", "--no_augmentation", "--enact_per_image", "--no-enact_per_image", "--ema", "--ema 0.5",
                 "--freeze backbone query", "--train_sizes 64 72", "--masks", "--cache_mode decoded",
                 "--dilation false",
                 "--no-dilation", "--dilation", "--encoder_attention mhsa", "--lr_drop_epochs 3 7", "--amp bf16"]
            ), max_size=6,
        )
    )  # fmt: skip
    args = parser.parse_args(" ".join(words).split())
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(config_text(parser, args))
    again = parser.parse_args(["--config", str(path)])
    assert kept(again) == kept(args)
    # The command line wins.
    assert parser.parse_args(["--config", str(path), "--lr", "0.5"]).lr == 0.5


@pytest.mark.parametrize(
    "text, message",
    [
        ("lrr: 1", "no flag 'lrr'; did you mean lr?"),
        ("batch-sise: 1", "did you mean batch_size?"),
        ("lr: fast", "lr: 'fast'"),
        ("amp: fp17", "choose from none, bf16, fp16"),
        ("masks: 3", "expected true or false"),
        ("epochs:", "needs a value"),
        ("epochs: [1, 2]", "expected one value"),
        ("train_sizes: []", "expected at least one value"),
        ("lr: {a: 1}", "expected one value or a list"),
        ("resume: a.pth", "belongs to one run"),
        ("- lr", "holds no settings"),
        ("lr: [", "not a YAML file"),
        ("!!python/object:os.system {}", "not a YAML file"),
    ],
)
def test_a_wrong_configuration_is_named(tmp_path, capsys, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as end:
        parse("detr", "--config", str(path))
    said = capsys.readouterr().err
    assert end.value.code == 2 and str(path) in said and message in said


def test_a_missing_configuration_names_those_there_are(capsys):
    with pytest.raises(SystemExit):
        parse("detr", "--config", "detr_r5O")
    assert "detr_r50_enact_recommended" in capsys.readouterr().err


def test_a_training_leaves_its_configuration(shapes, tmp_path):
    out = tmp_path / "out"
    flags = ["--epochs", "1", "--limit_train", "4", "--limit_val", "1", "--clip_max_norm", "0.2"]
    assert train("detr", shapes, out, *flags) == 0
    written = yaml.safe_load((out / "config.yaml").read_text())
    assert written["clip_max_norm"] == 0.2 and "output_dir" not in written
    args = parse("detr", "--coco_path", str(shapes), *SMALL_MODEL["detr"], *flags)
    assert kept(parse("detr", "--config", str(out / "config.yaml"))) == kept(args)
