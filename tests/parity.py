"""PyTorch and Flax side by side: one checkpoint, the same inputs, every difference measured.

    python tests/parity.py            prints the largest difference of every pair of classes

Shapes: B batch, L length, M target length, D d_model.
"""

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import modeling_convt5
from modeling_convt5 import ConvT5Config
from modeling_convt5.checkpoint_flax_convt5 import named_parameters

MODELS = {
    "lightweight": {},
    "dynamic": {"encoder_mixers": "dynamic", "decoder_mixers": "dynamic"},
    "dilated": {"encoder_kernel_size": 4, "encoder_dilation": [1, 2], "decoder_dilation": 2},
    "depthwise": {"encoder_mixers": "depthwise", "decoder_mixers": "depthwise"},
    "attention": {"encoder_mixers": "attention", "decoder_mixers": "attention"},
    "hybrid": {
        "encoder_mixers": ["dynamic", "attention"],
        "decoder_mixers": ["attention", "lightweight"],
    },
}
# What the released checkpoints add, and everything else that the paper's block has not.
SWITCHES = {
    "released": {
        "encoder_kernel_size": 9,
        "decoder_kernel_size": 9,
        "num_filters": None,
        "filter_sharing": "strided",
        "mixer_bias": True,
        "pointwise": True,
        "position_embeddings": "learned",
        "encoder_mixers": "dynamic",
    },
    "unshared": {
        "share_embeddings": False,
        "tie_word_embeddings": False,
        "position_embeddings": "learned",
        "feed_forward_proj": "gated-gelu",
        "mlp_bias": True,
    },
    "positions apart": {"position_embeddings": "learned", "share_position_embeddings": False},
    "switches": {
        "position_embeddings": "sinusoidal",
        "scale_embeddings": True,
        "scale_decoder_outputs": False,
        "mask_decoder_start": True,
        "gate": False,
        "pointwise": True,
        "pointwise_activation": "relu",
        "encoder_left_taps": 2,
        "decoder_left_taps": 8,
    },
}
HEADS = (
    "Model",
    "EncoderModel",
    "ForConditionalGeneration",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)


def parity_config(**overrides) -> ConvT5Config:
    """Two layers a stack and T5's initialisation: differences are those of trained sizes."""
    fields = {
        "vocab_size": 60,
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 32,
        "num_heads": 4,
        "num_layers": 2,
        "dropout_rate": 0.0,
        "num_filters": 2,
        "num_labels": 3,
    }
    return ConvT5Config(**{**fields, **overrides})


def batch(head: str, kind: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of one class: rows padded on either side ("padded") or packed ("packed").

    Lengths are odd: L = 11, M = 7.
    """
    rng = np.random.default_rng(seed)
    rows, length, targets = 3, 11, 7
    ids = rng.integers(2, 60, (rows, length))
    inputs = {"input_ids": ids}
    decodes = head in ("Model", "ForConditionalGeneration")
    if kind == "padded":
        mask = np.ones_like(ids)
        mask[1, 8:], mask[2, :3] = 0, 0
        inputs["attention_mask"], inputs["input_ids"] = mask, np.where(mask, ids, 0)
        if decodes:
            decoder_mask = np.ones((rows, targets), int)
            decoder_mask[1, 5:] = 0
            inputs["decoder_attention_mask"] = decoder_mask
    else:
        inputs["segment_ids"] = np.repeat([[1] * 4 + [2] * 5 + [0] * 2], rows, 0)
        if decodes:
            inputs["decoder_segment_ids"] = np.repeat([[1] * 3 + [2] * 3 + [0]], rows, 0)
    if head == "ForSequenceClassification":
        inputs["input_ids"][:, [5, 7]] = 1
        inputs["labels"] = rng.integers(0, 3, rows)
    elif head == "ForTokenClassification":
        inputs["labels"] = np.where(
            rng.random(ids.shape) < 0.3, -100, rng.integers(0, 3, ids.shape)
        )
    elif head == "ForQuestionAnswering":
        inputs["start_positions"], inputs["end_positions"] = (
            np.array([1, 3, 99]),
            np.array([4, 5, 2]),
        )
    elif decodes:
        targets_ids = rng.integers(2, 60, (rows, targets))
        inputs["decoder_input_ids"] = targets_ids
        if head == "ForConditionalGeneration":
            inputs["labels"] = np.where(rng.random(targets_ids.shape) < 0.3, -100, targets_ids)
    return inputs


def pair(head: str, overrides: dict[str, Any], dtype: str = "float32") -> tuple[Any, Any]:
    """The PyTorch and the Flax class `head` with the same weights, through one saved folder."""
    torch.manual_seed(0)
    model = getattr(modeling_convt5, f"ConvT5{head}")(parity_config(**overrides)).eval()
    model = model.to(getattr(torch, dtype))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        twin = getattr(modeling_convt5, f"FlaxConvT5{head}").from_pretrained(folder)
    return model, twin


def differences(model, twin, inputs: dict[str, np.ndarray]) -> dict[str, float]:
    """The largest difference of each kind: "output" (loss, logits, states) absolute,
    "relative output" to the largest entry of its tensor, "gradient" likewise, by key."""
    torch_inputs = {key: torch.tensor(value) for key, value in inputs.items()}
    outputs = model(**torch_inputs, output_hidden_states=True)
    objective = outputs.loss if getattr(outputs, "loss", None) is not None else _objective(outputs)
    objective.backward()
    graphdef, state = nnx.split(twin)

    def function(state):
        outputs = nnx.merge(graphdef, state)(**inputs, output_hidden_states=True)
        loss = getattr(outputs, "loss", None)
        return (_objective(outputs) if loss is None else loss), outputs

    evaluate = jax.jit(jax.value_and_grad(function, has_aux=True))
    (_, twin_outputs), twin_gradients = evaluate(state)
    found = {"output": 0.0, "relative output": 0.0, "gradient": 0.0}
    for name in outputs.keys():
        if name in ("past_key_values", "cache"):
            continue
        values, twin_values = outputs[name], twin_outputs[name]
        if isinstance(values, tuple):
            assert len(values) == len(twin_values), name
        else:
            values, twin_values = (values,), (twin_values,)
        for value, twin_value in zip(values, twin_values, strict=True):
            _note(found, value, twin_value)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    steepest = max(float(gradient.abs().max()) for gradient in gradients.values())
    twin_gradients = dict(named_parameters(nnx.merge(graphdef, twin_gradients)))
    assert set(gradients) <= set(twin_gradients), set(gradients) ^ set(twin_gradients)
    for name, twin_gradient in twin_gradients.items():
        twin_gradient = np.asarray(twin_gradient[...], np.float64)
        if name not in gradients:  # PyTorch never touched it
            assert not twin_gradient.any(), name
            continue
        gradient = gradients[name].double().numpy()
        # One that is zero but for rounding (a bias before a softmax) is held to the steepest.
        largest = np.abs(gradient).max()
        scale = largest if largest > 1e-5 * steepest else steepest
        difference = np.abs(gradient - twin_gradient).max() / scale
        found["gradient"] = max(found["gradient"], difference)
    return found


def _objective(outputs):
    """A number that every state matters to, for classes that have no loss."""
    states = outputs.last_hidden_state
    if isinstance(states, torch.Tensor):
        weights = torch.linspace(-1, 1, states.shape[-1], dtype=states.dtype)
        return ((states * weights) ** 2).mean()
    weights = jnp.linspace(-1, 1, states.shape[-1], dtype=states.dtype)
    return ((states * weights) ** 2).mean()


def _note(found, value, twin_value):
    value = value.detach().double().numpy()
    twin_value = np.asarray(twin_value, np.float64)
    assert value.shape == twin_value.shape, (value.shape, twin_value.shape)
    difference = np.abs(value - twin_value).max()
    largest = np.abs(value).max()
    found["output"] = max(found["output"], difference)
    found["relative output"] = max(found["relative output"], difference / max(largest, 1e-6))


def cases() -> list[tuple[str, str, dict[str, Any]]]:
    """(head, name of the model, overrides): every head of every model, cross-attention or not."""
    found = []
    for name, overrides in {**MODELS, **SWITCHES}.items():
        for head in HEADS:
            found.append((head, name, overrides))
            if head not in ("EncoderModel", "ForTokenClassification"):
                found.append((head, f"{name}, no cross", {**overrides, "cross_attention": False}))
    return found


def main(report: Callable[[str], None] = print) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--output", help="write the table as JSON here, too")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for head, name, overrides in cases():
        model, twin = pair(head, overrides, arguments.dtype)
        for kind in ("padded", "packed"):
            model.zero_grad()
            found = differences(model, twin, batch(head, kind))
            rows.append({"head": head, "model": name, "inputs": kind, **found})
            report(
                f"{head:26} {name:26} {kind:7} "
                + "  ".join(f"{k} {v:.1e}" for k, v in found.items())
            )
    largest = {
        key: max(row[key] for row in rows) for key in ("output", "relative output", "gradient")
    }
    report(
        f"{len(rows)} comparisons, largest: "
        + ", ".join(f"{k} {v:.2e}" for k, v in largest.items())
    )
    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump({"dtype": arguments.dtype, "largest": largest, "rows": rows}, file, indent=1)
    return largest


if __name__ == "__main__":
    main()
