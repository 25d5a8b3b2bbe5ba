"""The PyTorch and the Flax files are twins: the same classes, methods and arguments, in order.

Both files of a pair are parsed, not imported. What one side has and the other has not is in the
tables below, each line with its reason; a line that is no longer needed fails, too.
"""

import ast
from pathlib import Path

import pytest

import modeling_convt5

SOURCE = Path(modeling_convt5.__file__).parent
PAIRS = {
    "convolution.py": "convolution_flax.py",
    "layers_convt5.py": "layers_flax_convt5.py",
    "masks_convt5.py": "masks_flax_convt5.py",
    "stacks_convt5.py": "stacks_flax_convt5.py",
    "modeling_convt5.py": "modeling_flax_convt5.py",
}

ONLY_PYTORCH = {
    # Hooks that only transformers calls.
    "ConvT5PreTrainedModel.dummy_inputs",
    "ConvT5PreTrainedModel.from_pretrained",
    "ConvT5PreTrainedModel.save_pretrained",
    "ConvT5PreTrainedModel.get_expanded_tied_weights_keys",
    "ConvT5PreTrainedModel._tie_weights",
    "ConvT5PreTrainedModel._resize_token_embeddings",
    "ConvT5PreTrainedModel.set_input_embeddings",
    "ConvT5Stack.get_input_embeddings",
    "ConvT5Stack.set_input_embeddings",
    "ConvT5ForConditionalGeneration.get_output_embeddings",
    "ConvT5ForConditionalGeneration.set_output_embeddings",
    "ConvT5ForConditionalGeneration.prepare_decoder_input_ids_from_labels",
    # Flax initialises a parameter where it is made.
    "ConvT5PreTrainedModel._init_weights",
    "default",
    # A cache is made by `init_cache`, and nothing else is accepted.
    "ConvT5Stack._prepare_cache",
    "ConvT5Attention._encoder_keys_values",
    # Models are built by `_build`, which the base class calls.
    "_ConvT5EncoderDecoder.__init__",
    "ConvT5Model.__init__",
    "ConvT5EncoderModel.__init__",
    "ConvT5ForConditionalGeneration.__init__",
    "ConvT5ForSequenceClassification.__init__",
    "ConvT5ForTokenClassification.__init__",
    "ConvT5ForQuestionAnswering.__init__",
    # torch.nn's dropout knows whether it is training; Flax passes a key.
    "ConvT5Convolution._dropped_filter",
    "ConvT5Convolution._dropout",
}
ONLY_FLAX = {
    # torch.nn has them.
    "FlaxLinear",
    "FlaxEmbedding",
    "FlaxRMSNorm",
    "drop",
    # PyTorch's half-precision kernels work in float32 and round at their end; XLA is told to.
    "widen",
    "narrow",
    "wide_matmul",
    "add",
    "activate",
    # Cross-attention's keys and values are computed before the loop over tokens.
    "FlaxConvT5Attention.keys_values",
    "FlaxConvT5Stack.init_cache",
    "FlaxConvT5ForConditionalGeneration.encode",
    "FlaxConvT5ForConditionalGeneration.init_cache",
    "FlaxConvT5ForConditionalGeneration.decode",
    "FlaxConvT5ForConditionalGeneration._logits",
    # Tied tables are passed, so that a parameter has one path.
    "FlaxConvT5PreTrainedModel._tables",
    "FlaxConvT5PreTrainedModel.__init__",
    "FlaxConvT5PreTrainedModel._build",
    "_FlaxConvT5EncoderDecoder._build",
    "FlaxConvT5EncoderModel._build",
    "FlaxConvT5ForConditionalGeneration._build",
    "FlaxConvT5ForSequenceClassification._build",
    "FlaxConvT5ForTokenClassification._build",
    "FlaxConvT5ForQuestionAnswering._build",
    # scan and remat are functions in JAX, and flags or wrappers in PyTorch.
    "FlaxConvT5Stack._run",
    "FlaxConvT5Stack._run_and_keep",
    "repeating_runs",
    # Activations are spread over a mesh by hand.
    "FlaxConvT5Stack._spread",
    # Weights of an adapter or a quantised projection are read like any other.
    "FlaxConvT5Convolution._prediction",
    # Keys for dropout.
    "split_rng",
}
# Arguments that belong to one framework wherever they stand.
PYTORCH_ARGUMENTS = {
    "layer_idx",  # transformers' caches are objects with one entry a layer
    "use_cache",  # in Flax a cache is used if one is passed
    "return_dict",  # Flax returns objects
    "cache",  # transformers 5.24's other name of past_key_values
    "kwargs",  # what Trainer and generate pass along
    "num_items",  # Trainer's, under gradient accumulation
    "module",  # transformers' attention interface
    "modality",  # transformers' exporters ask for the encoder of a modality
    "scaling",
    "_",
    "stacks",  # whose tables are tied, for transformers' bookkeeping
}
FLAX_ARGUMENTS = {
    "dtype",  # how a Flax module is made
    "param_dtype",
    "rngs",
    "mesh",
    "scan_layers",
    "remat",
    "config",  # of the basic layers and of `_add_embeddings`
    "common",
    "dropout_rng",  # randomness is an argument
    "places",  # where in a preallocated cache new tokens go
    "table",  # tied embeddings
    "tables",
    "positions_table",
    "past_key_values",  # checked where it is used
}


def members(name: str) -> dict[str, list[str]]:
    """{qualified name: argument names}, in order, of the public functions and all methods.

    PyTorch's autograd Functions are left out: JAX has `custom_vjp` in their place.
    """
    found = {}
    for node in ast.parse((SOURCE / name).read_text()).body:
        if isinstance(node, ast.ClassDef) and not any(
            "Function" in ast.unparse(base) for base in node.bases
        ):
            found[node.name] = []
            for child in node.body:
                if isinstance(child, ast.FunctionDef):
                    found[f"{node.name}.{child.name}"] = _arguments(child)
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            found[node.name] = _arguments(node)
    return found


def _arguments(function):
    arguments = function.args
    listed = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    listed += [extra for extra in (arguments.vararg, arguments.kwarg) if extra is not None]
    return [argument.arg for argument in listed if argument.arg != "self"]


def twin_name(name: str) -> str:
    """ConvT5Stack.forward -> FlaxConvT5Stack.__call__, and so on."""
    owner, _, method = name.rpartition(".")
    method = "__call__" if method == "forward" else method
    owner = owner.replace("ConvT5", "FlaxConvT5")
    if not owner:
        return method.replace("ConvT5", "FlaxConvT5").replace("TokenMasks", "FlaxTokenMasks")
    return f"{owner.replace('TokenMasks', 'FlaxTokenMasks')}.{method}"


@pytest.mark.parametrize("name", PAIRS)
def test_the_same_names_in_the_same_order(name):
    expected = [twin_name(key) for key in members(name) if key not in ONLY_PYTORCH]
    actual = members(PAIRS[name])
    assert expected == [key for key in actual if not {key, key.split(".")[0]} & ONLY_FLAX]


@pytest.mark.parametrize("name", PAIRS)
def test_the_same_arguments_in_the_same_order(name):
    flax = members(PAIRS[name])
    for key, arguments in members(name).items():
        if twin_name(key) not in flax or key in ONLY_PYTORCH:
            continue
        expected = [a for a in arguments if a not in PYTORCH_ARGUMENTS]
        actual = [a for a in flax[twin_name(key)] if a in expected or a not in FLAX_ARGUMENTS]
        assert expected == actual, f"{key} and its twin differ"


def test_no_exception_outlives_its_reason():
    pytorch = {key for name in PAIRS for key in members(name)}
    flax = {key for name in PAIRS.values() for key in members(name)}
    assert ONLY_PYTORCH <= pytorch
    assert ONLY_FLAX <= flax
    assert not {twin_name(key) for key in ONLY_PYTORCH} & (flax - ONLY_FLAX)
