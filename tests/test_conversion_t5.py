"""T5 becomes ConvT5: the same logits with attention, and warm starts that are what they say."""

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from conversion import convert_t5
from conversion.convert_t5 import converted_config, converted_weights
from modeling_convt5 import ConvT5ForConditionalGeneration
from tests.tolerances import T5_VALUES

CONVOLUTIONS = ("depthwise", "lightweight", "dynamic")
SIZES = {
    "vocab_size": 99,
    "d_model": 32,
    "d_kv": 8,
    "num_heads": 4,
    "d_ff": 48,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "decoder_start_token_id": 0,
}


def tiny_t5(tied=True, **fields):
    """Weights larger than T5's, so that nothing hides; untied as T5 1.1 and FLAN-T5 are."""
    config = T5Config(**{**SIZES, **fields}, tie_word_embeddings=tied, initializer_factor=2.0)
    model = T5ForConditionalGeneration(config).eval()
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight))
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:
            parameter.data.normal_()
    return model


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def batch():
    ids = torch.randint(2, 99, (3, 12))
    mask = torch.ones_like(ids)
    mask[1, 7:], mask[2, 3:] = 0, 0
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "decoder_input_ids": torch.randint(2, 99, (3, 9)),
    }


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"feed_forward_proj": "gated-gelu", "tied": False},
        {"d_kv": 5, "num_heads": 3, "relative_attention_num_buckets": 12},
    ],
    ids=str,
)
def test_all_attention_has_the_logits_of_t5(fields, tmp_path):
    t5 = tiny_t5(**fields)
    saved(t5, tmp_path / "t5")
    arguments = ["--model", str(tmp_path / "t5"), "--output", str(tmp_path / "model")]
    assert convert_t5.main([*arguments, "--mixer", "attention"]) == 0
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
    inputs = batch()
    with torch.no_grad():
        expected, found = t5(**inputs).logits, model(**inputs).logits
    assert (expected - found).abs().max() < T5_VALUES
    generated = [
        m.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=8)
        for m in (t5, model)
    ]
    assert torch.equal(*generated)


@pytest.mark.parametrize("mixer", CONVOLUTIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_a_warm_start_has_every_weight_of_its_model(mixer, gated):
    t5 = tiny_t5(feed_forward_proj="gated-gelu" if gated else "relu", tied=not gated)
    config = converted_config(t5, mixer)
    weights = list(converted_weights(t5, config))
    model = ConvT5ForConditionalGeneration(config)
    tied = model._tied_weights_keys
    expected = {key: tuple(w.shape) for key, w in model.state_dict().items() if key not in tied}
    assert {weight.key: weight.shape for weight in weights} == expected
    assert len(weights) == len(expected)
    assert all(weight.make().shape == weight.shape for weight in weights)


@pytest.mark.parametrize("mixer", CONVOLUTIONS)
def test_a_warm_start_is_t5_where_attention_is_a_window(mixer, tmp_path):
    """With no q . k, and a bias that shuts out all but the nearest three, T5 is a convolution.

    Equal at every position whose window lies within the row: at the ends T5 normalises over fewer.
    """
    t5 = tiny_t5(num_layers=1, num_decoder_layers=1)
    for stack in (t5.encoder, t5.decoder):
        attention = stack.block[0].layer[0].SelfAttention
        attention.q.weight.data.zero_()
        far = attention.relative_attention_bias.weight.data
        # Buckets of distance d: d behind; in the encoder 16 + d ahead.
        near = [0, 1, 17] if stack is t5.encoder else [0, 1, 2]
        far[[i for i in range(32) if i not in near]] = -1e9
    convert_t5.convert(saved(t5, tmp_path / "t5"), tmp_path / "model", mixer)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
    inputs = {name: tensor[:1] for name, tensor in batch().items()}
    outputs = [m(**inputs) for m in (t5, model)]
    states = [output.encoder_last_hidden_state[:, 1:-1] for output in outputs]
    assert torch.allclose(*states, atol=T5_VALUES, rtol=0)
    inputs["encoder_outputs"] = (outputs[0].encoder_last_hidden_state,)
    logits = [m(**inputs).logits[:, 2:] for m in (t5, model)]
    assert torch.allclose(*logits, atol=T5_VALUES, rtol=0)


@pytest.mark.parametrize("mixer", CONVOLUTIONS)
def test_every_weight_of_a_warm_start_can_learn(mixer, tmp_path):
    convert_t5.convert(saved(tiny_t5(), tmp_path / "t5"), tmp_path / "model", mixer)
    model = ConvT5ForConditionalGeneration.from_pretrained(tmp_path / "model")
    inputs = batch()
    inputs["labels"] = inputs.pop("decoder_input_ids")
    model(**inputs).loss.backward()
    assert all(weight.grad.abs().max() > 0 for weight in model.parameters())


@pytest.mark.parametrize("mixer", CONVOLUTIONS)
def test_heads_that_do_not_fill_the_model_are_refused(mixer, tmp_path, capsys):
    folder = saved(tiny_t5(d_kv=5), tmp_path / "t5")
    arguments = ["--model", str(folder), "--output", str(tmp_path / "model"), "--mixer", mixer]
    assert convert_t5.main(arguments) == 2
    assert "num_heads * d_kv = 4 * 5 = 20, but d_model = 32" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_what_is_not_t5_is_refused(tmp_path, capsys):
    arguments = ["--output", str(tmp_path / "out"), "--mixer", "attention", "--model"]
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    assert convert_t5.main([*arguments, str(tmp_path / "bert")]) == 2
    assert "is a 'bert' model, expected 't5'" in capsys.readouterr().err
    assert convert_t5.main([*arguments, str(tmp_path / "absent")]) == 2
    assert "absent" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_existing_folder_is_kept(tmp_path, capsys):
    folder = saved(tiny_t5(), tmp_path / "t5")
    arguments = ["--model", str(folder), "--output", str(folder), "--mixer", "lightweight"]
    before = sorted(path.name for path in folder.iterdir())
    assert convert_t5.main(arguments) == 2 and convert_t5.main([*arguments, "--overwrite"]) == 2
    assert "is not empty" in (error := capsys.readouterr().err) and "which is read" in error
    assert sorted(path.name for path in folder.iterdir()) == before


def test_the_kernel_size_is_a_choice(tmp_path):
    folder = saved(tiny_t5(), tmp_path / "t5")
    config = convert_t5.convert(folder, tmp_path / "model", "lightweight", kernel_size=4)
    assert config.layer_specs("encoder")[0].left_taps == 2
    model = ConvT5ForConditionalGeneration.from_pretrained(tmp_path / "model")
    table = T5ForConditionalGeneration.from_pretrained(folder).encoder.block[0].layer[0]
    table = table.SelfAttention.relative_attention_bias.weight
    # Positions -2, -1, 0 and 1 have the buckets 2, 1, 0 and 17.
    assert torch.equal(model.encoder.layers[2].mixer.filter, table[[2, 1, 0, 17]].T)
