"""The configuration: presets and their sizes, JSON, errors, and no field without effect."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import tiny_config
from transformers import T5Config

from modeling_convt5 import PRESETS, ConvT5Config, ConvT5ForConditionalGeneration

# From the paper and the released checkpoints; transformer-base is T5-base.
PARAMETERS = {
    "lightweight-base": 208_747_344,
    "dynamic-base": 209_005_056,
    "transformer-base": 222_903_552,
    "released-lightweight-small": 67_145_728,
    "released-lightweight-base": 209_788_928,
    "released-lightweight-large": 738_879_488,
    "released-dynamic-base": 323_035_136,
}


def _count(config):
    with torch.device("meta"):
        model = ConvT5ForConditionalGeneration(config)
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())


def test_defaults_are_those_of_t5():
    ours, theirs = ConvT5Config().to_dict(), T5Config(decoder_start_token_id=0).to_dict()
    shared = set(ours) & set(theirs) - {"model_type", "auto_map"}
    assert {"d_model", "d_kv", "dropout_rate", "vocab_size", "eos_token_id"} <= shared
    assert {key: ours[key] for key in shared} == {key: theirs[key] for key in shared}


def test_defaults_of_the_convolution():
    config = ConvT5Config()
    assert (config.encoder_mixers, config.decoder_mixers) == ("lightweight", "lightweight")
    assert (config.encoder_kernel_size, config.encoder_dilation) == (7, 1)
    assert (config.num_filters, config.filter_sharing) == (None, "block")
    assert config.gate and config.cross_attention is True and config.tie_word_embeddings
    assert not (config.mixer_bias or config.pointwise or config.position_embeddings)
    assert (config.pad_token_id, config.eos_token_id, config.decoder_start_token_id) == (0, 1, 0)
    assert config.bos_token_id is None


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_parameter_counts(name):
    config = ConvT5Config.from_preset(name)
    assert _count(config) == config.num_parameters() == PARAMETERS[name]


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in PARAMETERS])
def test_the_formula_counts_every_preset(name):
    config = ConvT5Config.from_preset(name)
    assert _count(config) == config.num_parameters()


@pytest.mark.parametrize(
    "overrides",
    [
        {"cross_attention": False},
        {"cross_attention": [True, False]},
        {"encoder_mixers": ["dynamic", "attention"], "mixer_bias": True, "pointwise": True},
        {"gate": False, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
        {"share_embeddings": False, "position_embeddings": "learned", "mlp_bias": True},
        {"share_position_embeddings": False, "position_embeddings": "learned"},
        {"num_filters": None, "num_decoder_layers": 3, "position_embeddings": "sinusoidal"},
    ],
    ids=str,
)
def test_the_formula_counts_the_rare_switches(overrides):
    config = tiny_config(**overrides)
    assert _count(config) == config.num_parameters()


def test_dilated_presets_scale_the_papers_twelve_windows():
    config = ConvT5Config.from_preset("dilated-base")
    widths = [(s.kernel_size - 1) * s.dilation + 1 for s in config.layer_specs("encoder")]
    assert widths == [4, 4, 7, 7] + 4 * [15] + 4 * [31]
    assert config.receptive_field() == 195
    tiny = ConvT5Config.from_preset("dilated-tiny")
    assert tiny.encoder_kernel_size == [4, 4, 8, 16] and tiny.encoder_dilation == [1, 2, 2, 2]
    other = ConvT5Config.from_preset("dilated-tiny", num_layers=2, num_decoder_layers=3)
    assert other.encoder_kernel_size == [4, 8] and other.decoder_kernel_size == [4, 8, 16]


def test_receptive_fields():
    assert ConvT5Config.from_preset("lightweight-base").receptive_field() == 73
    released = ConvT5Config.from_preset("released-lightweight-base", num_layers=12)
    assert released.receptive_field() == 97
    assert ConvT5Config.from_preset("transformer-base").receptive_field("decoder") is None


def test_windows():
    config = tiny_config(num_layers=3, encoder_kernel_size=[7, 4, 1], decoder_kernel_size=5)
    assert [spec.left_taps for spec in config.layer_specs("encoder")] == [3, 2, 0]
    assert [spec.left_taps for spec in config.layer_specs("decoder")] == [4, 4, 4]


def test_cost_is_linear_for_convolutions_and_quadratic_for_attention():
    convolution = ConvT5Config.from_preset("lightweight-base")
    attention = ConvT5Config.from_preset("transformer-base")
    assert convolution.flops_per_token(64) != attention.flops_per_token(64)
    short, long = (convolution.flops_per_token(n)["encoder"] for n in (512, 8192))
    assert short == long
    short, long = (attention.flops_per_token(n)["encoder"] for n in (512, 8192))
    assert long - short == 2 * 12 * 2 * (8192 - 512) * 768


@pytest.mark.parametrize("name", ["dilated-tiny", "released-dynamic-base"])
def test_json_round_trip(name, tmp_path):
    config = ConvT5Config.from_preset(
        name, encoder_left_taps=[1, None] * 2 if "tiny" in name else 2
    )
    config.save_pretrained(tmp_path)
    loaded = ConvT5Config.from_pretrained(tmp_path)
    before, after = config.to_dict(), loaded.to_dict()
    assert {**before, "_name_or_path": ""} == {**after, "_name_or_path": ""}
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "convt5"


def test_unknown_fields_are_kept_as_in_transformers():
    assert ConvT5Config(favourite_colour="green").favourite_colour == "green"
    assert ConvT5Config(num_labels=5).num_labels == 5


def test_t5_names_reach_the_fields():
    config = ConvT5Config.from_preset("lightweight-tiny", hidden_size=64)
    assert config.d_model == config.hidden_size == 64
    assert config.num_hidden_layers == 4 and config.num_attention_heads == 4


WRONG = [
    ({"encoder_mixers": "lstm"}, "encoder_mixers='lstm'.*'depthwise', 'lightweight'"),
    ({"decoder_mixers": ["dynamic", 3]}, "decoder_mixers=3"),
    ({"encoder_mixers": ["dynamic"]}, r"encoder_mixers=\['dynamic'\].*num_layers=2"),
    ({"decoder_dilation": [1, 1, 1]}, "decoder_dilation=.*num_decoder_layers=2"),
    ({"encoder_kernel_size": 0}, "encoder_kernel_size=0.*at least 1"),
    ({"encoder_kernel_size": "7"}, "encoder_kernel_size='7'"),
    ({"decoder_kernel_size": 3.5}, "decoder_kernel_size=3.5"),
    ({"encoder_dilation": True}, "encoder_dilation=True"),
    ({"encoder_left_taps": -1}, "encoder_left_taps=-1.*at least 0 or None"),
    ({"decoder_left_taps": 3}, "decoder_left_taps=3.*at least kernel size - 1 = 6"),
    ({"num_filters": 3}, "num_filters=3.*divisor of d_model=16"),
    ({"num_filters": 0}, "num_filters=0"),
    ({"filter_sharing": "blocks"}, "filter_sharing='blocks'.*'block', 'strided'"),
    ({"filter_dropout": 1.0}, "filter_dropout=1.0"),
    ({"dropout_rate": -0.1}, "dropout_rate=-0.1"),
    ({"cross_attention": "yes"}, "cross_attention='yes'"),
    ({"cross_attention": [True]}, "cross_attention=.*list of num_decoder_layers=2"),
    ({"position_embeddings": "rotary"}, "position_embeddings='rotary'"),
    ({"position_embeddings": "sinusoidal", "d_model": 15, "num_filters": 1}, "d_model=15.*even"),
    ({"pointwise_activation": "relu"}, "pointwise_activation='relu'.*pointwise=True"),
    ({"feed_forward_proj": "gated-"}, "feed_forward_proj='gated-'"),
    ({"feed_forward_proj": None}, "feed_forward_proj=None"),
    ({"gate": 1}, "gate=1.*True or False"),
    ({"d_model": 0}, "d_model=0"),
    ({"num_layers": 2.0}, "num_layers=2.0"),
    ({"layer_norm_epsilon": 0}, "layer_norm_epsilon=0"),
    (
        {"encoder_mixers": "attention", "relative_attention_num_buckets": 2},
        "relative_attention_num_buckets=2.*at least 4",
    ),
    (
        {"decoder_mixers": "attention", "relative_attention_max_distance": 8},
        "relative_attention_max_distance=8.*more than 16",
    ),
]


@pytest.mark.parametrize(("fields", "message"), WRONG, ids=[str(f) for f, _ in WRONG])
def test_wrong_values_are_named(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny_config(**fields)
    assert str(error.value).startswith("ConvT5Config.")


def test_wrong_presets_are_named():
    with pytest.raises(ValueError, match="'lightweight-huge'.*lightweight-tiny"):
        ConvT5Config.from_preset("lightweight-huge")
    with pytest.raises(ValueError, match="unknown field kernel_size"):
        ConvT5Config.from_preset("lightweight-tiny", kernel_size=9)


# Each field, changed alone, must change a model: its shapes, its outputs or its training outputs.
CHANGES = {
    "vocab_size": 41,
    "d_model": 24,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_decoder_layers": 3,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 18,
    "dropout_rate": 0.5,
    "layer_norm_epsilon": 0.5,
    "initializer_factor": 1.0,
    "feed_forward_proj": "gelu",
    "tie_word_embeddings": False,
    "encoder_mixers": "depthwise",
    "decoder_mixers": "dynamic",
    "encoder_kernel_size": 3,
    "decoder_kernel_size": 4,
    "encoder_dilation": 2,
    "decoder_dilation": 3,
    "encoder_left_taps": 0,
    "decoder_left_taps": 9,
    "num_filters": 4,
    "filter_sharing": "strided",
    "filter_dropout": 0.5,
    "gate": False,
    "cross_attention": [True, False],
    "mixer_bias": True,
    "mlp_bias": True,
    "pointwise": True,
    "pointwise_activation": "relu",
    "position_embeddings": "sinusoidal",
    "max_position_embeddings": 30,
    "share_embeddings": False,
    "share_position_embeddings": False,
    "scale_embeddings": True,
    "scale_decoder_outputs": False,
    "mask_decoder_start": True,
    "pad_token_id": 5,
    "decoder_start_token_id": 6,
}
# Read by generation, by the heads or by transformers rather than by these outputs.
READ_ELSEWHERE = {"use_cache", "eos_token_id", "is_encoder_decoder", "classifier_dropout"}
CONTEXT = {
    "relative_attention_num_buckets": {"encoder_mixers": "attention"},
    "relative_attention_max_distance": {"encoder_mixers": "attention"},
    "pointwise_activation": {"pointwise": True},
    "max_position_embeddings": {"position_embeddings": "learned"},
    "share_position_embeddings": {"position_embeddings": "learned"},
}


def _outputs(fields):
    torch.manual_seed(0)
    model = ConvT5ForConditionalGeneration(tiny_config(**fields)).train()
    torch.manual_seed(1)
    ids = torch.arange(48).remainder(40)[None]
    labels = torch.tensor([[7, 8, -100, 9, -100, 4]]).repeat(1, 2)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if "position_embeddings" in fields and fields.get("max_position_embeddings", 512) < 48:
        ids = ids[:, :20]
    return shapes, model(input_ids=ids, labels=labels).logits


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_is_read(field):
    context = CONTEXT.get(field, {})
    shapes, logits = _outputs(context)
    changed_shapes, changed_logits = _outputs({**context, field: CHANGES[field]})
    assert changed_shapes != shapes or not torch.equal(changed_logits, logits)


def test_the_table_of_changes_is_complete():
    arguments = ConvT5Config.__init__.__annotations__.keys() - {"return", "kwargs"}
    assert arguments == CHANGES.keys() | READ_ELSEWHERE


def test_the_command_prints_every_preset():
    command = [sys.executable, "-m", "modeling_convt5"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in table.splitlines()[1:]] == list(PRESETS)
    assert "208,747,344" in table
    rows = subprocess.run([*command, "--json", "dilated-base"], capture_output=True, text=True)
    assert json.loads(rows.stdout)[0]["receptive_field"] == 195
    wrong = subprocess.run([*command, "huge"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "unknown preset" in wrong.stderr
