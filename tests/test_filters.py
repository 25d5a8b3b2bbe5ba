"""examples/filters.py: the filters drawn are those the convolution uses."""

import numpy as np
import pytest
import torch
from task_files import save_tiny_model

from examples import filters
from modeling_convt5 import ConvT5ForConditionalGeneration

TEXT = "the filter reads its past and nothing else"


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    mixers = ["lightweight", "dynamic", "attention"]
    fields = {"encoder_mixers": mixers, "num_layers": 3, "num_decoder_layers": 1}
    return save_tiny_model(tmp_path / "model", [TEXT], **fields)


def test_the_filters_are_those_in_use(folder):
    model = ConvT5ForConditionalGeneration.from_pretrained(folder).eval()
    ids = torch.arange(3, 11)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    (one, fixed), (two, predicted), (three, none) = filters.used_filters(model, inputs)
    assert (one, two, three) == ("lightweight", "dynamic", "attention") and none.size == 0
    kernel = model.config.encoder_kernel_size
    assert fixed.shape == (2, kernel) and predicted.shape == (8, 2, kernel)
    np.testing.assert_allclose(fixed.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(predicted.sum(-1), 1, rtol=1e-5)
    expected = model.encoder.layers[0].mixer.filter.softmax(-1).detach().numpy()
    np.testing.assert_allclose(fixed, expected, rtol=1e-6)


def test_command(folder, tmp_path, capsys):
    output = tmp_path / "filters.png"
    assert filters.main(["--model", str(folder), "--text", TEXT, "--output", str(output)]) == 0
    assert output.read_bytes()[:4] == b"\x89PNG"
    assert filters.main(["--model", str(tmp_path / "none"), "--output", str(output)]) == 2
