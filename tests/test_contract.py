"""What transformers asks of every model: its common suites' demands that no other test makes."""

import copy
import inspect

import pytest
import tolerances
import torch
from conftest import tiny_config
from transformers import DynamicCache, EncoderDecoderCache

from modeling_convt5 import (
    ConvT5Config,
    ConvT5EncoderModel,
    ConvT5ForConditionalGeneration,
    ConvT5ForQuestionAnswering,
    ConvT5ForSequenceClassification,
    ConvT5ForTokenClassification,
    ConvT5Model,
)
from modeling_convt5.cache_convt5 import CACHE

ENCODERS = (ConvT5EncoderModel, ConvT5ForTokenClassification)
CLASSES = (
    ConvT5Model,
    ConvT5ForConditionalGeneration,
    ConvT5ForSequenceClassification,
    ConvT5ForQuestionAnswering,
    *ENCODERS,
)
EOS = 1


def _config(**fields):
    mixers = {
        "encoder_mixers": ["dynamic", "attention"],
        "decoder_mixers": ["attention", "dynamic"],
    }
    return tiny_config(**{**mixers, **fields})


def _inputs(cls, batch=3, length=7):
    ids = torch.randint(2, 40, (batch, length))
    ids[:, -1] = EOS
    mask = (torch.arange(length) >= torch.tensor([[0], [2], [1]])).long()
    inputs = {"input_ids": ids, "attention_mask": mask}
    if cls not in ENCODERS:
        inputs |= {"decoder_input_ids": ids.roll(1, 1), "decoder_attention_mask": mask}
    return inputs


def _leaves(output):
    """Every tensor of an output, caches left out."""
    if torch.is_tensor(output):
        return [output]
    if isinstance(output, dict):
        output = [value for key, value in output.items() if key != CACHE]
    if isinstance(output, tuple | list):
        return [leaf for value in output for leaf in _leaves(value)]
    return []


def _equal(first, second):
    first, second = _leaves(first), _leaves(second)
    assert len(first) == len(second) > 0
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


@every_class
def test_tuples_and_dictionaries_hold_the_same(cls):
    # transformers refuses a configuration that asks for attentions from another implementation.
    model = cls(_config(attn_implementation="eager")).eval()
    everything = {"output_hidden_states": True, "output_attentions": True}
    inputs = _inputs(cls)
    if cls not in ENCODERS:
        inputs["use_cache"] = False
    output = model(**inputs, **everything)
    _equal(output, model(**inputs, **everything, return_dict=False))
    # The configuration asks for the same things as the arguments.
    for name, value in everything.items():
        setattr(model.config, name, value)
    _equal(output, model(**inputs))
    model.config.return_dict = False
    assert isinstance(model(**inputs), tuple)


@every_class
def test_a_row_of_a_batch_is_the_row_alone(cls):
    model = cls(_config()).double().eval()
    inputs = _inputs(cls)
    for row in range(3):
        alone = model(**{name: value[row : row + 1] for name, value in inputs.items()})
        for one, many in zip(_leaves(alone), _leaves(model(**inputs)), strict=True):
            torch.testing.assert_close(
                many[row : row + 1], one, atol=tolerances.FLOAT64_MODEL, rtol=0
            )


@every_class
def test_returned_states_and_attentions_carry_gradients(cls):
    model = cls(_config(attn_implementation="eager"))
    output = model(**_inputs(cls), output_hidden_states=True, output_attentions=True)
    kept = [
        output[name][0]
        for name in output
        if name.endswith(("hidden_states", "attentions")) and output[name]
    ]
    assert len(kept) == (2 if cls in ENCODERS else 5)
    for tensor in kept:
        tensor.retain_grad()
    output[0].square().sum().backward()
    assert all(tensor.grad.abs().max() > 0 for tensor in kept)


@every_class
def test_models_begin_on_the_meta_device(cls):
    config = _config(mixer_bias=True, position_embeddings="learned", max_position_embeddings=9)
    with torch.device("meta"):
        model = cls(config)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan"))
    model.init_weights()  # nothing may be left as it was, nor lie outside of the state
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert all(leaf.isfinite().all() for leaf in _leaves(model.eval()(**_inputs(cls))))


@every_class
def test_weights_may_come_as_a_dictionary(cls):
    model = cls(_config())
    state = model.state_dict()
    again = cls.from_pretrained(None, config=copy.deepcopy(model.config), state_dict=state)
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(again.state_dict()[name], state[name]) for name in state)


@every_class
def test_every_part_shares_one_configuration_and_its_attention(cls):
    model = cls(_config()).eval()
    inputs = _inputs(cls)
    expected = _leaves(model(**inputs))
    parts = [module for module in model.modules() if hasattr(module, "config")]
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        assert {part.config._attn_implementation for part in parts} == {implementation}
        for one, two in zip(_leaves(model(**inputs)), expected, strict=True):
            torch.testing.assert_close(one, two, atol=tolerances.FLOAT32_LOGITS, rtol=0)
    assert all(part.config is model.config for part in parts)


@every_class
def test_checkpointing_is_switched_on_and_off_everywhere(cls):
    model = cls(_config())
    switches = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    assert len(switches) > len(model.encoder.layers)
    for action in ("enable", "disable"):  # by the names of transformers 5, and of 4
        switch = getattr(model, f"activation_checkpointing_{action}", None)
        (switch or getattr(model, f"gradient_checkpointing_{action}"))()
        assert {module.gradient_checkpointing for module in switches} == {action == "enable"}


@every_class
def test_inputs_can_be_made_to_require_gradients(cls):
    model = cls(_config())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.enable_input_require_grads()
    assert model(**_inputs(cls))[0].requires_grad
    model.disable_input_require_grads()
    assert not model(**_inputs(cls))[0].requires_grad


@every_class
def test_embeddings_are_read_and_replaced(cls):
    model = cls(_config())
    assert list(inspect.signature(cls.forward).parameters)[1] == cls.main_input_name
    table = torch.nn.Embedding(12, 16)
    model.set_input_embeddings(table)
    assert model.get_input_embeddings() is table
    stacks = [model.encoder] if cls in ENCODERS else [model.encoder, model.decoder]
    assert all(stack.embed_tokens is table for stack in stacks)


@pytest.mark.parametrize("tied", [True, False])
def test_vocabularies_shrink_and_are_padded(tied):
    model = ConvT5ForConditionalGeneration(_config(tie_word_embeddings=tied))
    model.resize_token_embeddings(30)
    assert model.lm_head.weight.shape == model.shared.weight.shape == (30, 16)
    assert model.config.vocab_size == model.lm_head.out_features == 30
    model.resize_token_embeddings(33, pad_to_multiple_of=8)
    assert model.lm_head.weight.shape == model.shared.weight.shape == (40, 16)
    model(input_ids=torch.full((1, 3), 39), labels=torch.full((1, 2), 39)).loss.backward()


def test_a_head_of_another_size_is_replaced_only_when_asked(tmp_path):
    ConvT5ForSequenceClassification(_config(num_labels=3)).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        ConvT5ForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    model, info = ConvT5ForSequenceClassification.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {key for key, *_ in info["mismatched_keys"]} == {
        "classification_head.out_proj.weight",
        "classification_head.out_proj.bias",
    }
    assert model(**_inputs(ConvT5ForSequenceClassification)).logits.shape == (3, 5)


@pytest.mark.parametrize("cross_attention", [True, False])
@pytest.mark.parametrize("mixer", ["lightweight", "dynamic", ["attention", "dynamic"]], ids=str)
def test_a_decoder_alone_keeps_a_cache(mixer, cross_attention):
    config = _config(decoder_mixers=mixer, cross_attention=cross_attention)
    decoder = ConvT5Model(config).double().get_decoder().eval()
    ids, mask = torch.randint(2, 40, (3, 9)), torch.randint(0, 2, (3, 9))
    full = decoder(ids, attention_mask=mask, use_cache=False)
    assert len(full) == 1
    first = decoder(ids[:, :6], attention_mask=mask[:, :6], use_cache=True)
    assert len(first) == 2 and len(first[CACHE]) == config.num_decoder_layers
    then = decoder(ids[:, 6:], attention_mask=mask, **{CACHE: first[CACHE]})
    expected = full.last_hidden_state[:, 6:]
    torch.testing.assert_close(
        then.last_hidden_state, expected, atol=tolerances.FLOAT64_MODEL, rtol=0
    )


@pytest.mark.skipif(CACHE != "cache", reason="the name changes with transformers 5.24")
def test_the_old_name_of_the_cache_warns_and_works():
    model = ConvT5ForConditionalGeneration(_config()).eval()
    inputs = _inputs(ConvT5ForConditionalGeneration)
    new = model(**inputs, cache=EncoderDecoderCache(DynamicCache(), DynamicCache()))
    for part in (model, model.get_decoder()):
        given = inputs if part is model else {"input_ids": inputs["input_ids"]}
        empty = EncoderDecoderCache(DynamicCache(), DynamicCache())
        with pytest.warns(FutureWarning, match="`past_key_values` is deprecated"):
            old = part(**given, past_key_values=empty)
        assert old.cache.get_seq_length() == 7
        if part is model:
            assert torch.equal(old.logits, new.logits)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("search", [{}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_what_generate_returns_at_every_step(search, use_cache):
    config = _config(eos_token_id=None)
    model = ConvT5ForConditionalGeneration(config).eval()
    output = model.generate(
        torch.randint(2, 40, (2, 7)),
        max_new_tokens=4,
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
        output_attentions=True,
        **search,
    )
    rows = 4 if search else 2
    assert output.sequences.shape == (rows, 5)
    for scores in (*output.scores, *output.logits):
        assert scores.shape == (rows, 40)
    assert [tuple(state.shape) for state in output.encoder_hidden_states] == [(2, 7, 16)] * 3
    assert [tuple(weight.shape) for weight in output.encoder_attentions] == [(2, 4, 7, 7)]
    assert len(output.scores) == len(output.logits) == len(output.decoder_hidden_states) == 4
    for step in range(4):
        queries = 1 if use_cache else step + 1
        states, weights = output.decoder_hidden_states[step], output.decoder_attentions[step]
        assert [tuple(state.shape) for state in states] == [(rows, queries, 16)] * 3
        assert [tuple(weight.shape) for weight in weights] == [(rows, 4, queries, step + 1)]
        cross = [tuple(weight.shape) for weight in output.cross_attentions[step]]
        assert cross == [(rows, 4, queries, 7)] * 2
    assert (output[CACHE] is not None) == use_cache if CACHE in output else not use_cache


@pytest.mark.parametrize("static", [False, True])
def test_transformers_exports_generation(static):
    exporters = pytest.importorskip(
        "transformers.exporters", reason="transformers before 5.24 exports nothing itself"
    )
    from transformers import GenerationConfig

    model = ConvT5ForConditionalGeneration(_config()).eval().requires_grad_(False)
    inputs = {"input_ids": torch.randint(2, 40, (2, 7)), "attention_mask": torch.ones(2, 7).long()}
    settings = {"cache_implementation": "static", "max_cache_len": 16} if static else {}
    exported = exporters.DynamoExporter().export_for_generation(
        model,
        inputs,
        config=exporters.DynamoConfig(dynamic=True),
        generation_config=GenerationConfig(use_cache=True, **settings),
    )
    assert "decode" in exported.components


def test_the_configuration_is_read_as_transformers_writes_it(tmp_path):
    config = ConvT5Config(d_model=37, num_labels=5, problem_type="regression")
    assert len(config.id2label) == len(config.label2id) == 5
    config.num_labels = 3
    assert len(config.id2label) == len(config.label2id) == 3
    config.save_pretrained(tmp_path / "part")
    loaded = ConvT5Config.from_pretrained(tmp_path, subfolder="part")
    assert loaded.to_dict() == config.to_dict()
    config.to_json_file(tmp_path / "config.json")
    assert ConvT5Config.from_json_file(tmp_path / "config.json").to_dict() == config.to_dict()
    # Fields given beside the file pass the same checks as those in it.
    assert (
        ConvT5Config.from_pretrained(tmp_path, encoder_mixers="dynamic").encoder_mixers == "dynamic"
    )
    loaded, unused = ConvT5Config.from_pretrained(tmp_path, return_unused_kwargs=True, colour=1)
    assert unused == {"colour": 1}
    with pytest.raises(ValueError, match="encoder_mixers='fourier'"):
        ConvT5Config.from_pretrained(tmp_path, encoder_mixers="fourier")
