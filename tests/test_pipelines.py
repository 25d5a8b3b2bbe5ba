"""Pipelines: text2text-generation from a checkpoint's own code, and those of transformers."""

import json

import pytest
import torch
from conftest import tiny_config
from test_hub import _run
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast, pipeline

from modeling_convt5 import (
    ConvT5ForConditionalGeneration,
    ConvT5ForSequenceClassification,
    ConvT5ForTokenClassification,
)
from modeling_convt5.pipeline_convt5 import Text2TextGenerationPipeline

WORDS = "the a convolution filter reads its past and nothing else here".split()
TEXTS = ["the filter reads its past", "a convolution", "nothing else here and the past"]

FRESH = """
import json, sys
from transformers import pipeline
folder, output = sys.argv[1:]
generator = pipeline("text2text-generation", model=folder, trust_remote_code=True)
texts = ["the filter reads its past", "a convolution"]
json.dump(generator(texts, max_new_tokens=6, num_beams=1), open(output, "w"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = tiny_config(vocab_size=len(vocabulary), tie_word_embeddings=False, eos_token_id=1)
    ConvT5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_config_json_names_the_pipeline(folder):
    config = json.loads((folder / "config.json").read_text())
    assert list(config["custom_pipelines"]) == ["text2text-generation"]


def test_text2text_generation_in_a_fresh_process(folder, tmp_path):
    _run(FRESH, tmp_path, folder, tmp_path / "results.json")
    model = ConvT5ForConditionalGeneration.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = [
        {
            "generated_text": tokenizer.decode(
                model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=6)[0],
                skip_special_tokens=True,
            )
        }
        for text in TEXTS[:2]
    ]
    assert json.loads((tmp_path / "results.json").read_text()) == expected
    assert any(record["generated_text"] for record in expected)


def test_text2text_generation_arguments(folder, tmp_path):
    generator = pipeline("text2text-generation", model=str(folder), trust_remote_code=True)
    limits = {"max_new_tokens": 6, "num_beams": 3}
    alone = [generator(text, **limits)[0] for text in TEXTS]
    assert generator(TEXTS, **limits) == alone
    assert generator(TEXTS, batch_size=3, **limits) == alone
    several = generator(TEXTS, num_return_sequences=2, **limits)
    assert [len(result) for result in several] == [2, 2, 2]
    ids = generator(TEXTS[0], return_tensors=True, **limits)[0]["generated_token_ids"]
    assert ids[0] == 0 and ids.dtype == torch.long
    shown = generator(TEXTS[0], skip_special_tokens=False, **limits)[0]["generated_text"]
    assert shown.startswith("<pad>")
    with pytest.raises(ValueError, match="An input is 3, expected a text"):
        generator([3])
    repr(generator.model.config)
    generator.save_pretrained(tmp_path)
    again = pipeline("text2text-generation", model=str(tmp_path), trust_remote_code=True)
    assert again(TEXTS, **limits) == alone


def test_a_pipeline_without_tokenizer_says_so(folder):
    model = ConvT5ForConditionalGeneration.from_pretrained(folder)
    with pytest.raises(ValueError, match="has no tokenizer"):
        Text2TextGenerationPipeline(model=model)("the past")


def test_pipelines_that_transformers_still_has(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = tiny_config(vocab_size=tokenizer.vocab_size, num_labels=3)
    classifier = pipeline(
        "text-classification", model=ConvT5ForSequenceClassification(config), tokenizer=tokenizer
    )
    alone = [classifier(text)[0] for text in TEXTS]
    together = classifier(TEXTS, batch_size=3)
    for first, second in zip(alone, together, strict=True):
        assert first["label"] == second["label"]
        assert first["score"] == pytest.approx(second["score"], abs=1e-5)
    tagger = pipeline(
        "token-classification", model=ConvT5ForTokenClassification(config), tokenizer=tokenizer
    )
    assert len(tagger(TEXTS[0])) == 5
