"""The heads: T5's where the mixers are attention; their losses, and checkpoints across heads."""

import logging

import pytest
import tolerances
import torch
import transformers
from conftest import tiny_config
from test_modeling import _from_t5
from transformers import T5Config, Trainer, TrainingArguments

from modeling_convt5 import (
    ConvT5ForConditionalGeneration,
    ConvT5ForQuestionAnswering,
    ConvT5ForSequenceClassification,
    ConvT5ForTokenClassification,
)

HEADS = {
    "SequenceClassification": ConvT5ForSequenceClassification,
    "TokenClassification": ConvT5ForTokenClassification,
    "QuestionAnswering": ConvT5ForQuestionAnswering,
}
EOS = 1


def _texts(batch=3, length=10):
    """Right-padded rows of 10, 7 and 4 tokens, each ending in EOS."""
    ids = torch.randint(4, 40, (batch, length))
    mask = torch.ones_like(ids)
    for row, end in zip(range(batch), (length, 7, 4), strict=True):
        ids[row, end - 1], ids[row, end:], mask[row, end:] = EOS, 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def _answers(name, labels=3):
    if name == "QuestionAnswering":
        return {"start_positions": torch.tensor([1, 2, 99]), "end_positions": torch.tensor([3] * 3)}
    if name == "TokenClassification":
        return {"labels": torch.randint(0, labels, (3, 10)).masked_fill(torch.eye(3, 10) > 0, -100)}
    return {"labels": torch.tensor([0, 2, 1])}


def _model(name, **fields):
    num_labels = {} if name == "QuestionAnswering" else {"num_labels": 3}
    return HEADS[name](tiny_config(**num_labels, **fields)).eval()


def _logits(output):
    return [value for key, value in output.items() if "logits" in key]


@pytest.mark.parametrize("name", HEADS)
def test_all_attention_heads_are_t5s(name):
    fields = {"attn_implementation": "sdpa"}
    model = _model(name, encoder_mixers="attention", decoder_mixers="attention", **fields)
    t5_fields = {
        key: getattr(model.config, key)
        for key in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
    }
    t5_config = T5Config(**t5_fields, num_labels=model.config.num_labels, decoder_start_token_id=0)
    t5 = getattr(transformers, f"T5For{name}")(t5_config).eval()
    weights = {_from_t5(key.removeprefix("transformer.")): w for key, w in t5.state_dict().items()}
    model.load_state_dict(weights)
    batch = {**_texts(), **_answers(name)}
    expected, actual = t5(**batch), model(**batch)
    torch.testing.assert_close(actual.loss, expected.loss, atol=tolerances.T5_VALUES, rtol=0)
    for ours, theirs in zip(_logits(actual), _logits(expected), strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerances.T5_VALUES, rtol=0)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("mixer", ["lightweight", ["dynamic", "attention"]], ids=str)
def test_padding_changes_nothing_on_either_side(name, mixer):
    model = _model(name, encoder_mixers=mixer, decoder_mixers=mixer).double()
    ids = torch.randint(4, 40, (1, 8))
    ids[0, -1] = EOS
    alone = _logits(model(input_ids=ids))
    for padding in ((3, 0), (0, 3)):
        padded = {
            "input_ids": torch.nn.functional.pad(ids, padding, value=0),
            "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), padding),
        }
        for expected, actual in zip(alone, _logits(model(**padded)), strict=True):
            if name != "SequenceClassification":
                actual = actual[:, padding[0] : padding[0] + 8]
            torch.testing.assert_close(actual, expected, atol=tolerances.FLOAT64_MODEL, rtol=0)


@pytest.mark.parametrize("name", HEADS)
def test_packed_rows_stay_apart(name):
    model = _model(name, encoder_mixers=["dynamic", "attention"]).double()
    first, second = torch.randint(4, 40, (1, 5)), torch.randint(4, 40, (1, 6))
    first[0, -1] = second[0, -1] = EOS
    segments = torch.tensor([[1] * 5 + [2] * 6])
    packed = model(input_ids=torch.cat([first, second], 1), segment_ids=segments)
    for expected, actual in zip(_logits(model(input_ids=second)), _logits(packed), strict=True):
        if name != "SequenceClassification":  # which classifies the last example
            actual = actual[:, 5:]
        torch.testing.assert_close(actual, expected, atol=tolerances.FLOAT64_MODEL, rtol=0)


def test_the_last_end_of_sequence_is_classified():
    model = _model("SequenceClassification")
    ids = torch.tensor([[5, EOS, 6, 7, EOS, 0], [5, 6, 7, 8, 9, EOS]])
    mask = (ids != 0).long()
    alone = model(input_ids=ids[:1, :5]).logits
    together = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(together[:1], alone, atol=tolerances.FLOAT32_LOGITS, rtol=0)
    model.config.eos_token_id = [EOS, 2]
    torch.testing.assert_close(model(input_ids=ids[:1, :5]).logits, alone)


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "labels"),
    [
        ("regression", 1, torch.tensor([0.5, 1.0, -2.0])),
        ("regression", 2, torch.randn(3, 2)),
        ("single_label_classification", 4, torch.tensor([0, 3, 1])),
        ("multi_label_classification", 4, torch.tensor([[0.0, 1, 1, 0]] * 3)),
    ],
)
def test_problem_types(problem_type, num_labels, labels):
    config = tiny_config(num_labels=num_labels)
    model = ConvT5ForSequenceClassification(config).eval()
    if num_labels == 2:
        config.problem_type = problem_type  # two numbers could be two labels as well
    output = model(**_texts(), labels=labels)
    logits = output.logits
    expected = {
        "regression": lambda: ((logits.reshape(labels.shape) - labels) ** 2).mean(),
        "single_label_classification": lambda: (
            -logits.log_softmax(-1).gather(1, labels[:, None]).mean()
        ),
        "multi_label_classification": lambda: (
            -(labels * logits.sigmoid().log() + (1 - labels) * (-logits).sigmoid().log()).mean()
        ),
    }[problem_type]()
    torch.testing.assert_close(output.loss, expected)
    assert config.problem_type == problem_type
    output.loss.backward()
    assert model.encoder.layers[0].mixer.filter.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["SequenceClassification", "TokenClassification"])
def test_accumulated_batches_have_the_gradient_of_one_large_batch(name, tmp_path):
    texts, answers = _texts(), _answers(name)
    rows = [{k: v[i] for k, v in {**texts, **answers}.items()} for i in range(3)] * 4
    losses = []
    for size, steps in ((4, 1), (1, 4)):
        torch.manual_seed(0)
        model = _model(name, classifier_dropout=0.0)
        arguments = TrainingArguments(
            str(tmp_path / str(size)),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=3,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)  # the log keeps four decimals


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_pretrained_folder_opens_with_any_head(name, tied, tmp_path, caplog):
    pretrained = ConvT5ForConditionalGeneration(tiny_config(tie_word_embeddings=tied))
    pretrained.save_pretrained(tmp_path / "pretrained")
    auto = getattr(transformers, f"AutoModelFor{name}")
    with caplog.at_level(logging.WARNING):
        model, info = auto.from_pretrained(tmp_path / "pretrained", output_loading_info=True)
    assert type(model) is HEADS[name]
    heads = ("classification_head.", "classifier.", "qa_outputs.")
    assert info["missing_keys"]
    assert all(key.startswith(heads) for key in info["missing_keys"])
    assert set(info["unexpected_keys"]) <= {"lm_head.weight"}
    weights = pretrained.state_dict()
    for key, weight in model.state_dict().items():
        if not key.startswith(heads):
            assert torch.equal(weight, weights[key]), key
    model.save_pretrained(tmp_path / "fine-tuned")
    again, info = auto.from_pretrained(tmp_path / "fine-tuned", output_loading_info=True)
    assert not any(info.values())
    for key, weight in again.state_dict().items():
        assert torch.equal(weight, model.state_dict()[key]), key
    # And back: the stacks of a fine-tuned checkpoint, under another head.
    _, info = ConvT5ForConditionalGeneration.from_pretrained(
        tmp_path / "fine-tuned", output_loading_info=True
    )
    assert all(key.startswith(heads) for key in info["unexpected_keys"])


def test_wrong_inputs_of_heads_are_named():
    model, batch = _model("SequenceClassification"), _texts()
    with pytest.raises(ValueError, match=r"Rows \[1\] of input_ids hold no end-of-sequence"):
        model(input_ids=torch.tensor([[5, EOS], [5, 6]]))
    with pytest.raises(NotImplementedError, match="inputs_embeds do not tell where a text ends"):
        model(inputs_embeds=torch.zeros(1, 4, 16))
    with pytest.raises(ValueError, match="both hold the same text"):
        model(**batch, decoder_input_ids=torch.ones(3, 2).long())
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match=r"labels has shape \(3,\), expected \(3, 3\)"):
        model(**batch, labels=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="made from input_ids"):
        _model("QuestionAnswering")(inputs_embeds=torch.zeros(1, 4, 16))


@pytest.mark.parametrize("name", HEADS)
def test_missing_weights_are_initialised_as_new_ones(name, tmp_path):
    # With the memory of a freed tensor in their place, weights would look random as well.
    config = tiny_config(d_model=64, num_labels=2, tie_word_embeddings=False)
    ConvT5ForConditionalGeneration(config).save_pretrained(tmp_path)
    for _ in range(3):
        garbage = [torch.full((64, 64), float("nan")) for _ in range(50)]
        del garbage
        model = HEADS[name].from_pretrained(tmp_path)
        for key, weight in model.state_dict().items():
            if key.startswith(("classif", "qa_outputs")):
                expected = 2.0 * 64**-0.5 if weight.dim() == 2 else 0.0
                assert float(weight.square().mean().sqrt()) == pytest.approx(expected, rel=0.25), (
                    key
                )
