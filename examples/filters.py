"""Draw the filters of a model: `python examples/filters.py --model DIR --output filters.png`.

One picture a layer of the encoder: a row for each filter, a column for each tap, the current token
between the taps to its left and to its right. A dynamic convolution predicts its filters from the
text: with `--text` the picture has a row for each token, averaged over the filters.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from transformers import AutoModelForTextEncoding, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import modeling_convt5  # noqa: F401 - registers the family


def used_filters(model, inputs: dict[str, torch.Tensor]) -> list[tuple[str, np.ndarray]]:
    """The normalised filters with which an encoder reads one text.

    Args:
        model: with `get_encoder()`.
        inputs: `input_ids` and `attention_mask` (1, L).

    Returns:
        For each layer its mixer and an array: (F, K) of a fixed filter, (L, F, K) of a predicted
        one, (0, 0) of attention, which has none.
    """
    found, hooks = [], []

    def keep(mixer, arguments):
        if not hasattr(mixer, "in_proj"):
            found.append(("attention", np.zeros((0, 0))))
            return
        x = mixer.in_proj(arguments[0])
        x = F.glu(x, dim=-1) if mixer.gate else x
        filters = mixer._step_filter(x)
        filters = filters[0] if filters.dim() == 4 else filters
        found.append((mixer.mixer, filters.float().numpy()))

    encoder = model.get_encoder()
    for layer in encoder.layers:
        hooks.append(layer.mixer.register_forward_pre_hook(keep))
    try:
        with torch.no_grad():
            encoder(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def draw(model, tokenizer, text: str) -> Figure:
    """A picture of each layer's filters."""
    inputs = tokenizer(text, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    filters = used_filters(model.eval(), inputs)
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    figure = Figure(figsize=(2.4 * len(filters), 0.25 * len(tokens) + 2), layout="constrained")
    layers = model.get_encoder().layers
    rows = figure.subplots(1, len(filters), squeeze=False)[0]
    for number, (axis, (mixer, array)) in enumerate(zip(rows, filters, strict=True)):
        axis.set_title(f"layer {number + 1}: {mixer}", fontsize=8)
        if array.size == 0:
            axis.axis("off")
            continue
        by_token = array.ndim == 3
        axis.imshow(array.mean(1) if by_token else array, aspect="auto", cmap="viridis")
        convolution = layers[number].mixer
        taps = np.arange(array.shape[-1])
        offsets = (taps - convolution.left_taps) * convolution.dilation
        axis.set_xticks(taps, [f"{offset:+d}" if offset else "0" for offset in offsets], fontsize=6)
        if by_token:
            axis.set_yticks(range(len(tokens)), tokens, fontsize=6)
        else:
            axis.set_ylabel("filter", fontsize=7)
            axis.yaxis.set_major_locator(MaxNLocator(integer=True))
            axis.tick_params("y", labelsize=6)
    return figure


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a saved folder, or owner/name on the Hub")
    parser.add_argument("--text", default="The filter reads its past and nothing else.")
    parser.add_argument("--output", default="filters.png")
    args = parser.parse_args(argv)
    try:
        model = AutoModelForTextEncoding.from_pretrained(args.model)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        draw(model, tokenizer, args.text).savefig(args.output, dpi=150)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
