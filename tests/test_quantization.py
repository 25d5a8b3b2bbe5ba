"""Eight-bit weights by torchao: only the dense weights are rounded, and the folder opens again."""

import copy

import pytest
import tolerances
import torch
from conftest import tiny_config

from modeling_convt5 import ConvT5ForConditionalGeneration

pytest.importorskip("torchao", reason="torchao (the extra `int8`) is not installed")

from torchao.quantization import Int8WeightOnlyConfig  # noqa: E402
from torchao.utils import TorchAOBaseTensor  # noqa: E402
from transformers import TorchAoConfig  # noqa: E402

MIXERS = ("depthwise", "lightweight", "dynamic", "attention", ["dynamic", "attention"])


def _quantised(folder):
    config = TorchAoConfig(Int8WeightOnlyConfig())
    return ConvT5ForConditionalGeneration.from_pretrained(folder, quantization_config=config)


def _weights(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("num_filters", [2, None])
@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_int8_weights(mixer, num_filters, tmp_path):
    config = tiny_config(
        encoder_mixers=mixer,
        decoder_mixers=mixer,
        num_filters=num_filters,
        d_model=64,
        d_ff=256,
        d_kv=16,
        initializer_factor=1.0,
    )
    model = ConvT5ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "float32")
    quantised = _quantised(tmp_path / "float32")

    # The same model in float32, with the weights that the eight bits stand for.
    rounded, dense = copy.deepcopy(model), 0
    for name, module in rounded.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            weight = quantised.get_submodule(name).weight
            assert isinstance(weight, TorchAOBaseTensor) and weight.qdata.dtype == torch.int8, name
            step = module.weight.abs().amax(1, keepdim=True) / 127
            restored = weight.dequantize().detach()
            assert ((restored - module.weight).abs() <= 0.51 * step).all(), name
            module.weight.data = restored
            dense += 1
    assert dense == sum(isinstance(m, torch.nn.Linear) for m in quantised.modules()) - 1

    ids = torch.randint(2, 40, (2, 9))
    batch = {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    logits, close = quantised(**batch).logits, {"atol": tolerances.FLOAT32_LOGITS, "rtol": 0}
    torch.testing.assert_close(logits, rounded(**batch).logits, **close)
    tokens = quantised.generate(ids, max_new_tokens=8)
    assert torch.equal(tokens, rounded.generate(ids, max_new_tokens=8))

    quantised.save_pretrained(tmp_path / "int8")
    again = ConvT5ForConditionalGeneration.from_pretrained(tmp_path / "int8")
    assert torch.equal(again(**batch).logits, logits)
    assert torch.equal(again.generate(ids, max_new_tokens=8), tokens)
    assert _weights(tmp_path / "int8") < 0.4 * _weights(tmp_path / "float32")
