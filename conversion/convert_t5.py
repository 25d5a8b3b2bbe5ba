r"""Turns a T5 checkpoint of transformers into a ConvT5: T5 itself, or a convolution's warm start.

    python -m conversion.convert_t5 --model google-t5/t5-base --mixer attention --output FOLDER
    python -m conversion.convert_t5 --model google-t5/t5-base --mixer lightweight --output FOLDER

`--mixer attention` renames: the logits are T5's. The other mixers copy embeddings, norms, mlp and
cross-attention, and start each convolution as what T5's self-attention does regardless of content.
Head h of T5 computes, with b the stack's relative-position bias and v = V x,

    y[t, h] = sum_s softmax_s(q[t, h] . k[s, h] + b[h, s - t]) * v[s, h],    out = O y

Without q . k, and within a window of K positions, the softmax is over b[h, .] alone: a filter of K
taps, the same at every t, normalised as a lightweight convolution normalises it. So

    filter[h, i] = b[h, bucket(i - left_taps)]      (F, K), F = num_heads, sharing "block"
    in_proj      = [2 V; 0]                         the gate's half is zero: sigmoid(0) = 1/2 ...
    out_proj     = O                                ... times 2 V is V: an open gate that can learn

since channels h * d_kv ... (h + 1) * d_kv - 1 of V x are head h's, as block sharing has it. This
asks for num_heads * d_kv = d_model. "depthwise" takes the softmax of the filter as its parameter;
"dynamic" the filter as the bias of its prediction, the prediction's weights being zero (and the
other biases that come with it). What is lost is content (q . k) and whatever lay outside the
window; at a row's ends the taps outside count as zero, where T5 normalises over what there is.

Exit codes: 0 done; 2 it cannot be converted or FOLDER cannot be written, nothing was written;
130 interrupted.
"""

import argparse
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, T5Config, T5ForConditionalGeneration

import modeling_convt5
from modeling_convt5 import ConvT5Config
from modeling_convt5.configuration_convt5 import MIXERS
from modeling_convt5.masks_convt5 import relative_position_bucket

from .model_folder import DTYPES, Weight, new_folder, write_configuration, write_weights

STACKS = ("encoder", "decoder")
# Fields of the same name and meaning.
_FIELDS = (
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_layers",
    "num_decoder_layers",
    "num_heads",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "dropout_rate",
    "layer_norm_epsilon",
    "initializer_factor",
    "feed_forward_proj",
    "pad_token_id",
    "eos_token_id",
    "decoder_start_token_id",
    "classifier_dropout",
)


def convert(
    model: str | Path,
    output: str | Path,
    mixer: str = "attention",
    kernel_size: int = 7,
    dtype: str = "float32",
    overwrite: bool = False,
) -> ConvT5Config:
    """Convert one T5; the arguments are those of the command line.

    Args:
        model: a folder, or a name on the Hub.
        output: the folder to write.
        mixer: of every layer of both stacks, one of ConvT5's.
        kernel_size: taps of the convolutions.
        dtype: of the written weights.
        overwrite: replace what `output` holds.

    Returns:
        The configuration written.

    Raises:
        ValueError: for a model that is not T5, for num_heads * d_kv != d_model with a convolution,
            and for an output that exists or cannot be written.
    """
    t5_config = AutoConfig.from_pretrained(model)
    if t5_config.model_type != "t5":
        raise ValueError(
            f"{model}: is a {t5_config.model_type!r} model, expected 't5' (T5, T5 1.1, FLAN-T5)."
        )
    _check_heads(t5_config, mixer)
    t5 = T5ForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    config = converted_config(t5, mixer, kernel_size)
    inputs = [path for path in Path(model).glob("*") if path.is_file()]
    with new_folder(output, overwrite, inputs) as folder:
        write_configuration(folder, config, dtype)
        write_weights(folder, list(converted_weights(t5, config)), dtype)
        tokenizer = _save_tokenizer(model, folder)
        card = _card(Path(model).name, config, mixer, dtype, tokenizer)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return config


def converted_config(
    t5: T5ForConditionalGeneration, mixer: str, kernel_size: int = 7
) -> ConvT5Config:
    """The configuration of the ConvT5 model that a T5 becomes; raises as `convert`."""
    _check_heads(t5.config, mixer)
    fields = {name: getattr(t5.config, name) for name in _FIELDS}
    if fields["decoder_start_token_id"] is None:
        fields["decoder_start_token_id"] = fields["pad_token_id"]
    # T5 1.1 has logits of its own, whatever a version of transformers calls its configuration.
    tied = torch.equal(t5.lm_head.weight, t5.shared.weight)
    scaled = getattr(t5.config, "scale_decoder_outputs", t5.config.tie_word_embeddings)
    fields |= {"tie_word_embeddings": tied, "scale_decoder_outputs": scaled}
    fields |= {"encoder_mixers": mixer, "decoder_mixers": mixer}
    if mixer != "attention":
        fields |= {"encoder_kernel_size": kernel_size, "decoder_kernel_size": kernel_size}
        fields |= {"num_filters": t5.config.num_heads, "mixer_bias": mixer == "dynamic"}
    return ConvT5Config(**fields)


def converted_weights(t5: T5ForConditionalGeneration, config: ConvT5Config) -> Iterator[Weight]:
    """Every weight of the ConvT5 model, in the order of the model's own state.

    Args:
        t5: in float32.
        config: from `converted_config`.
    """
    state = t5.state_dict()

    def copy(key, source):
        return Weight(key, tuple(state[source].shape), state[source].numpy)

    yield copy("shared.weight", "shared.weight")
    for stack in STACKS:
        table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        for i, spec in enumerate(config.layer_specs(stack)):
            block, layer = f"{stack}.block.{i}.layer", f"{stack}.layers.{i}"
            if i == 0 and spec.mixer == "attention":
                yield copy(f"{stack}.relative_attention_bias.weight", table)
            yield copy(f"{layer}.pre_mixer_norm.weight", f"{block}.0.layer_norm.weight")
            attention = f"{block}.0.SelfAttention"
            if spec.mixer == "attention":
                for part in "qkvo":
                    yield copy(f"{layer}.mixer.{part}.weight", f"{attention}.{part}.weight")
            else:
                filter = relative_filter(state[table], spec, config, causal=stack == "decoder")
                value, output = (state[f"{attention}.{part}.weight"] for part in "vo")
                yield from _convolution(f"{layer}.mixer", value, output, filter, spec.mixer)
            if spec.cross_attention:
                key = f"{layer}.pre_cross_attention_norm.weight"
                yield copy(key, f"{block}.1.layer_norm.weight")
                for part in "qkvo":
                    source = f"{block}.1.EncDecAttention.{part}.weight"
                    yield copy(f"{layer}.cross_attention.{part}.weight", source)
            last = f"{block}.{2 if stack == 'decoder' else 1}"
            yield copy(f"{layer}.pre_mlp_norm.weight", f"{last}.layer_norm.weight")
            for part in ("wi_0", "wi_1", "wo") if config.is_gated_act else ("wi", "wo"):
                yield copy(f"{layer}.mlp.{part}.weight", f"{last}.DenseReluDense.{part}.weight")
        yield copy(f"{stack}.final_norm.weight", f"{stack}.final_layer_norm.weight")
    if not config.tie_word_embeddings:
        yield copy("lm_head.weight", "lm_head.weight")


def relative_filter(table: torch.Tensor, spec, config: ConvT5Config, causal: bool) -> torch.Tensor:
    """The bias of a window's positions: (F, K) logits of a filter, one row a head.

    Args:
        table: T5's relative-position bias (buckets, num_heads).
        spec: the convolution's `LayerSpec`.
        causal: whether the stack is the decoder, whose buckets are all behind.
    """
    distance = (torch.arange(spec.kernel_size) - spec.left_taps) * spec.dilation
    buckets = relative_position_bucket(
        distance,
        bidirectional=not causal,
        num_buckets=config.relative_attention_num_buckets,
        max_distance=config.relative_attention_max_distance,
    )
    return table[buckets].T


def _convolution(key, value, output, filter, mixer):
    """The weights of one convolution from T5's value and output projections, see above."""
    zeros = torch.zeros
    d_model, rows = len(value), filter.numel()
    weights = {"in_proj.weight": torch.cat([2 * value, zeros(d_model, d_model)])}
    if mixer == "dynamic":
        weights["in_proj.bias"] = zeros(2 * d_model)
        weights["filter_proj.weight"] = zeros(rows, d_model)
        weights["filter_proj.bias"] = filter.flatten()  # row h * K + i predicts tap i of filter h
        weights["conv_bias"] = zeros(d_model)
    else:
        weights["filter"] = filter if mixer == "lightweight" else filter.softmax(-1)
    weights["out_proj.weight"] = output
    if mixer == "dynamic":
        weights["out_proj.bias"] = zeros(d_model)
    for name, weight in weights.items():
        make = partial(np.ascontiguousarray, weight.numpy())
        yield Weight(f"{key}.{name}", tuple(weight.shape), make)


def _check_heads(config: T5Config, mixer):
    inner = config.num_heads * config.d_kv
    if mixer != "attention" and inner != config.d_model:
        raise ValueError(
            f"num_heads * d_kv = {config.num_heads} * {config.d_kv} = {inner}, but d_model = "
            f"{config.d_model}: a convolution mixes d_model channels, so T5's value projection "
            "does not fit. Use --mixer attention, or a T5 with d_model = num_heads * d_kv."
        )


def _save_tokenizer(model, folder):
    """Copy T5's tokenizer, if it has one: a folder of weights alone has none."""
    try:
        AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    except (OSError, ValueError):
        return False
    return True


def _card(name, config, mixer, dtype, tokenizer):
    what = (
        "The model is T5, logit for logit."
        if mixer == "attention"
        else "The convolutions start as the part of T5's self-attention that does not depend on "
        "content, within their window. This is a start for further pre-training, not a trained "
        "model."
    )
    return f"""---
library_name: transformers
pipeline_tag: text2text-generation
tags:
- convt5
---

# {name} as ConvT5, mixer {mixer}

{what}

| | |
|---|---|
| source | {name} |
| parameters | {config.num_parameters():,} |
| written in | {dtype} |
| tokenizer | {"the source's" if tokenizer else "none found"} |
| converter | conversion.convert_t5, ConvT5 {modeling_convt5.__version__} |
"""


def _arguments(argv):
    text, _, codes = __doc__.strip().rpartition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m conversion.convert_t5",
        description=text,
        epilog=codes,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="a folder, or a name on the Hub")
    parser.add_argument("--mixer", required=True, choices=MIXERS, help="of every layer")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="what is written")
    parser.add_argument(
        "--kernel_size", type=int, default=7, help="taps of the convolutions (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace FOLDER if it holds files already"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = vars(_arguments(argv))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing is left behind
    try:
        config = convert(**arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    print(f"{arguments['model']} -> {arguments['output']}: {config.num_parameters():,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
