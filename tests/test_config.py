"""Settings files: `--config FILE`, the `config.yaml` of a run, and the files in `configs/`."""

import argparse
import functools

import pytest
import yaml
from conftest import ROOT, SMALL_MODEL, parse, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from enact_common import load_variant
from enact_common.cli.config import OF_ONE_RUN, config_text
from enact_common.variants import VARIANTS

PUBLISHED = {
    "detr": {"backbone": "resnet50", "dilation": False, "epochs": 300, "lr_drop": 200, "batch_size": 8},
    "conditional": {"backbone": "resnet101", "dilation": False, "epochs": 50, "lr_drop": 40, "batch_size": 8},
    "anchor": {"backbone": "resnet50", "dilation": True, "epochs": 50, "lr_drop": 40, "batch_size": 4},
}
NAMES = {
    "detr": "detr_resnet50", "conditional": "conditional_detr_resnet101", "anchor": "anchor_detr_resnet50_dc5",
}  # fmt: skip
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1).filter(
    lambda word: not word.startswith("-")
)


@functools.cache
def parser_of(variant: str):
    """A variant's parser; not for parsing `--config`, which changes its defaults."""
    parser = load_variant(variant).main.get_args_parser()
    parser.parse_args([])  # adds the opposites of switches: Hypothesis needs the same flags in every example
    return parser


def write_config(tmp_path, text: str) -> str:
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def settings_of(args: argparse.Namespace) -> dict:
    return {name: value for name, value in vars(args).items() if name not in OF_ONE_RUN}


@st.composite
def command_lines(draw, variant: str) -> list[str]:
    """Valid command lines: some of the parser's flags, with values of their types."""
    argv = []
    for action in draw(st.lists(st.sampled_from(parser_of(variant)._actions), unique_by=lambda action: action.dest)):
        if action.dest in ("help", *OF_ONE_RUN):
            continue
        option = draw(st.sampled_from(action.option_strings))
        if action.nargs == 0:
            argv.append(option)
            continue
        if action.choices:
            value = st.sampled_from(list(action.choices)).map(str)
        elif action.type in (None, str):
            value = WORDS
        elif action.type.__name__ == "boolean":
            value = st.sampled_from(("yes", "no", "true", "0"))
        elif action.type is float or "float" in action.type.__name__ or action.type.__name__ in ("fraction", "decay"):
            value = st.floats(0, 0.99).map(repr)
        else:
            value = st.integers(1, 10**6).map(str)
        counts = {"+": (1, 3), "?": (0, 1)}.get(action.nargs, (1, 1))
        argv += [option, *draw(st.lists(value, min_size=counts[0], max_size=counts[1]))]
    return argv


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_written_settings_read_back_equal(variant, tmp_path_factory, data):
    args = parser_of(variant).parse_args(data.draw(command_lines(variant)))
    text = config_text(parser_of(variant), args)
    path = tmp_path_factory.getbasetemp() / f"{variant}.yaml"
    path.write_text(text, encoding="utf-8")
    again = parse(variant, "--config", str(path))
    assert settings_of(again) == settings_of(args)
    assert config_text(parser_of(variant), again) == text


def test_a_rare_line_break_in_a_word_is_kept():
    parser = parser_of("detr")
    text = config_text(parser, parser.parse_args(["--lr_backbone_names", "a\x85b"]))
    assert yaml.safe_load(text)["lr_backbone_names"] == ["a\x85b"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_flag_is_written_except_those_of_one_run(variant):
    parser = parser_of(variant)
    known = {action.dest for action in parser._actions} - {"help"}
    keys = yaml.safe_load(config_text(parser, parser.parse_args([])))
    dests = {{"no_aux_loss": "aux_loss", "no_augmentation": "augmentation"}.get(key, key) for key in keys}
    assert dests == known - set(OF_ONE_RUN)


def test_the_command_line_overrides_the_file(tmp_path):
    path = write_config(
        tmp_path, "lr: 1e-3\nsgd: true\nno-augmentation: true\nenact_per_image: true\nmasks: yes\nfreeze: [a, b]\n"
    )
    args = parse("detr", "--config", path)
    assert (args.lr, args.sgd, args.augmentation, args.enact_per_image) == (1e-3, True, False, True)
    assert args.masks and args.freeze == ["a", "b"] and not hasattr(args, "config")
    argv = "--lr 1 --no-sgd --augmentation --no-enact_per_image --no-masks --freeze c".split()
    for words in ([*argv, "--config", path], [f"--config={path}", *argv]):
        args = parse("detr", *words)
        assert (args.lr, args.sgd, args.augmentation, args.enact_per_image) == (1, False, True, False)
        assert not args.masks and args.freeze == ["c"]


@pytest.mark.parametrize(
    "text, argv, lr",
    [
        ("encoder_attention: mhsa", [], 1e-4),
        ("encoder_attention: mhsa\nlr: 5e-5", [], 5e-5),
        ("encoder_attention: mhsa", ["--encoder_attention", "enact"], 5e-5),
        ("lr: 3e-4", ["--encoder_attention", "mhsa"], 3e-4),
        ("epochs: 3", ["--encoder_attention", "mhsa"], 1e-4),
    ],
)
def test_the_default_learning_rate_depends_on_the_attention_unless_the_file_sets_it(text, argv, lr, tmp_path):
    assert parse("detr", "--config", write_config(tmp_path, text), *argv).lr == lr


@pytest.mark.parametrize(
    "text, values",
    [
        ("", {}),
        ("cache_mode: true", {"cache_mode": "encoded"}),
        ("cache_mode: false", {"cache_mode": False}),
        ("cache_mode: decoded", {"cache_mode": "decoded"}),
        ("ema: true", {"ema": 0.999}),
        ("ema: 0.9", {"ema": 0.9}),
        ("ema:", {"ema": None}),
        ("dilation: true", {"dilation": True}),
        ("no-dilation: true", {"dilation": False}),
        ("dilation: 'no'", {"dilation": False}),
        ("aux_loss: false", {"aux_loss": False}),
        ("no_aux_loss: false", {"aux_loss": True}),
        ("coco_path: -dir", {"coco_path": "-dir"}),
        ("coco-path: 17", {"coco_path": "17"}),
        ("--epochs: 7", {"epochs": 7}),
        ("train_sizes: 64", {"train_sizes": [64]}),
        ("freeze: []", {"freeze": []}),
        ("backbone_weights: none", {"backbone_weights": "none"}),
    ],
)
def test_yaml_values_are_parsed_like_flags(text, values, tmp_path):
    args = vars(parse("detr", "--config", write_config(tmp_path, text)))
    assert {name: args[name] for name in values} == values


@pytest.mark.parametrize(
    "text, message",
    [
        ("lrr: 3", "lrr: no such flag of this model; did you mean lr?"),
        ("zzzzzz: 3", "zzzzzz: no such flag of this model; "),
        ("focal_alpha: 0.5", "focal_alpha: no such flag of this model"),
        ("config: other.yaml", "config: is for the command line only"),
        ("lr: fast", "lr: argument --lr: invalid non_negative_float value: 'fast'"),
        ("lr:", "lr: has no value"),
        ("lr: [1, 2]", "lr: takes one value, not a list"),
        ("lr: {a: 1}", "lr: must be a value or a list of values, is a dict"),
        ("batch_size: 0", "batch_size: argument --batch_size: must be at least 1, got 0"),
        ("backbone: vgg", "backbone: argument --backbone: invalid choice: 'vgg'"),
        ("sgd: 1", "sgd: must be true or false, is 1"),
        ("train_sizes: []", "train_sizes: is an empty list"),
        ("train_sizes: [[1]]", "train_sizes: must be a list of plain values"),
        ("lr: 1\nlr: 2", "the key lr appears twice"),
        ("dilation: true\nno-dilation: true", "dilation and no-dilation set the same flag"),
        ("- lr", "must be lines of FLAG: VALUE, is a list"),
        ("lr: [", "not a YAML file"),
        ("lr: !!python/object/apply:os.getcwd []", "not a YAML file"),
        ("? [1, 2]\n: 3", "--config"),
    ],
)
def test_errors_name_the_file_and_the_key_with_advice(text, message, tmp_path, capsys):
    path = write_config(tmp_path, text)
    with pytest.raises(SystemExit) as end:
        parse("detr", "--config", path)
    error = capsys.readouterr().err
    assert end.value.code == 2 and path in error and message in error and "usage" not in error


def test_a_missing_file_is_reported_with_the_shipped_ones(tmp_path, capsys):
    for name in ("nowhere", str(tmp_path / "detr_resnet50"), str(tmp_path)):
        with pytest.raises(SystemExit):
            parse("detr", "--config", name)
        error = capsys.readouterr().err
        assert f"--config {name}: no such file" in error and "anchor_detr_resnet50_dc5_enact_recommended" in error


def test_shipped_files_cover_every_variant():
    suffixes = ("", "_enact", "_enact_recommended")
    expected = {f"{name}{suffix}.yaml" for name in NAMES.values() for suffix in suffixes}
    assert {path.name for path in (ROOT / "configs").iterdir()} == expected


@pytest.mark.parametrize("suffix", ["", "_enact", "_enact_recommended"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_shipped_files_hold_the_published_values(variant, suffix):
    plain = suffix == ""
    args = parse(variant, "--config", NAMES[variant] + suffix)
    expected = PUBLISHED[variant] | {"encoder_attention": "mhsa" if plain else "enact", "lr": 1e-4 if plain else 5e-5}
    expected |= {"smoothing_sigma": 5.0 if variant == "anchor" else 3.0, "lr_backbone": 1e-5, "weight_decay": 1e-4}
    if suffix == "_enact":
        expected |= {"enact_clusters": "windows", "enact_order": "rows"}
        expected |= {"enact_temperature": 0, "enact_max_clusters": 0}
        expected |= {"enact_per_image": False, "enact_mask_padding": False, "enact_scale_logits": False}
    elif suffix:
        own = variant != "anchor"
        expected |= {
            "enact_temperature": 1,
            "enact_zero_scores": own,
            "enact_order": "hilbert" if own else None,
            "enact_scale_logits": own,
        }
    assert {name: getattr(args, name) for name in expected} == expected
    # All other values are the parser's defaults, as in the published trainings.
    assert {name: value for name, value in settings_of(args).items() if name not in expected} == {
        name: value for name, value in settings_of(parse(variant)).items() if name not in expected
    }
    args.coco_path = "coco"
    parser_of(variant).check(args)


@pytest.mark.slow
def test_a_runs_config_repeats_the_training(shapes, tmp_path):
    argv = ["--coco_path", str(shapes), *SMALL_MODEL["conditional"], "--epochs", "1"]
    assert run("conditional", *argv, "--output_dir", str(tmp_path / "a")) == 0
    text = (tmp_path / "a" / "config.yaml").read_text()
    saved = yaml.safe_load(text)
    assert saved["epochs"] == 1 and saved["num_classes"] >= 3 and not set(OF_ONE_RUN) & set(saved)
    assert run("conditional", "--config", str(tmp_path / "a" / "config.yaml"), "--output_dir", str(tmp_path / "b")) == 0
    assert (tmp_path / "b" / "config.yaml").read_text() == text
    # A resumed training with more epochs updates the file.
    resume = ["--auto_resume", "--epochs", "2", "--output_dir", str(tmp_path / "a")]
    assert run("conditional", "--config", str(tmp_path / "a" / "config.yaml"), *resume) == 0
    assert yaml.safe_load((tmp_path / "a" / "config.yaml").read_text()) == {**saved, "epochs": 2}
