"""Compares a converted model with the original: largest differences, and tokens one by one.

    python -m conversion.verify --checkpoint DIR [DIR ...] [--model FOLDER ...]

What is compared with: the original graph, built and run by Mesh-TensorFlow itself (needs the extra
`conversion`), and what a run of it left behind in DIR/reference.npz. Where both are there, both are
compared with; one is enough. Without --model each checkpoint is converted into a temporary folder.

Compared are, in float32:

    encoder_output  at tokens
    logits          teacher-forced, at tokens, with ConvT5Config.mask_decoder_start=True
    incremental     logits of decoding one token after another, everywhere, without that mask
    greedy          the tokens of greedy decoding by `generate`, up to each row's end of sequence

Exit codes: 0 all within the tolerance and all tokens equal, 1 not so, 2 nothing to compare.

Shapes: B batch, L input length, M target length, D d_model, V vocabulary.
"""

import argparse
import contextlib
import importlib.util
import json
import re
import sys
import tempfile
import types
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .mesh_tf_names import read_names
from .tf_checkpoint import Checkpoint, find_checkpoint

# Of float32: 170 roundings of numbers of order 1. The original sums in another order.
TOLERANCE = 1e-5
REFERENCE_FILE = "reference.npz"
GIN_FILE = "operative_config.gin"
_NEEDED = ("inputs", "targets", "encoder_output", "logits", "incremental_logits", "greedy_ids")
# The unit roundoff of each dtype in float32's: what the tolerance is multiplied by.
_ROUNDING = {"float32": 1, "float16": 2**13, "bfloat16": 2**16}


class VerificationError(ValueError):
    """Nothing to compare with, or a reference that does not fit; the message says what to do."""


@dataclass(frozen=True)
class Parity:
    """How far a model is from what it was converted from.

    Attributes:
        model, reference, framework: what was compared.
        differences: largest absolute difference of each output.
        divergences: KL(original || converted) of the teacher-forced logits, largest over the rows,
            by target position, in nats.
        wrong_tokens, tokens: of greedy decoding.
        tolerance: of the differences.
        exact_tokens: whether all tokens have to be equal (in float32).
    """

    model: str
    reference: str
    framework: str
    differences: dict[str, float]
    divergences: list[float]
    wrong_tokens: int
    tokens: int
    tolerance: float
    exact_tokens: bool

    @property
    def passed(self) -> bool:
        within = all(value <= self.tolerance for value in self.differences.values())
        return within and not (self.exact_tokens and self.wrong_tokens)


def verify(
    checkpoint: str | Path,
    folder: str | Path,
    frameworks: list[str] | None = None,
    tolerance: float | None = None,
) -> list[Parity]:
    """Compare a converted model with every original there is: the graph itself, a reference file.

    Args:
        checkpoint: what was converted, as `find_checkpoint` takes it.
        folder: what it was converted into.
        frameworks: of "pytorch" and "flax"; None is all that are installed.
        tolerance: as in `compare`.

    Raises:
        VerificationError: if there is nothing to compare with.
    """
    prefix = find_checkpoint(checkpoint)
    check_available(prefix)
    stored = _stored_outputs(prefix.with_name(REFERENCE_FILE))
    originals = {} if stored is None else {REFERENCE_FILE: stored}
    gin_file = prefix.with_name(GIN_FILE)
    if mesh_tensorflow_is_installed() and gin_file.is_file():
        inputs, targets = (
            _random_tokens(prefix) if stored is None else (stored["inputs"], stored["targets"])
        )
        length = 16 if stored is None else stored["greedy_ids"].shape[1]
        originals["Mesh-TensorFlow"] = mesh_outputs(prefix, gin_file, inputs, targets, length)
    name = prefix.parent.name
    return [
        compare(folder, outputs, source, framework, tolerance, name)
        for source, outputs in originals.items()
        for framework in frameworks or installed_frameworks()
    ]


def check_available(prefix: Path) -> None:
    """Raise VerificationError unless there is something to compare this checkpoint with."""
    runnable = mesh_tensorflow_is_installed() and prefix.with_name(GIN_FILE).is_file()
    if not runnable and not prefix.with_name(REFERENCE_FILE).is_file():
        raise VerificationError(
            f"{prefix.parent}: there is nothing to compare with. Put a {REFERENCE_FILE} beside the "
            f"checkpoint, or the run's {GIN_FILE} and install TensorFlow and Mesh-TensorFlow: pip "
            'install "convt5[conversion]".'
        )


def markdown(parities: list[Parity]) -> str:
    """The table of differences, and the divergences by position."""
    lines = [
        "| model | compared with | framework | encoder output | logits | incremental logits "
        "| largest KL | greedy tokens equal | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for parity in parities:
        values = [f"{value:.1e}" for value in parity.differences.values()]
        equal = f"{parity.tokens - parity.wrong_tokens} / {parity.tokens}"
        verdict = "within" if parity.passed else "ABOVE"
        cells = [parity.model, parity.reference, parity.framework, *values]
        cells += [f"{max(parity.divergences):.1e}", equal, f"{verdict} {parity.tolerance:.0e}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "KL(original || converted) of the teacher-forced logits, in nats, by position:",
        "",
    ]
    for parity in parities:
        values = " ".join(f"{value:.0e}" for value in parity.divergences)
        lines.append(f"- {parity.model}, {parity.reference}, {parity.framework}: {values}")
    return "\n".join(lines)


def _stored_outputs(path):
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise VerificationError(f"{path}: cannot be read ({error}).") from error


def _random_tokens(prefix):
    """Inputs (2, 16) and targets (2, 12), the second row shorter, padded and ended as T5's are."""
    variables = Checkpoint(prefix).variables
    vocab = min(v.shape[0] for name, v in variables.items() if re.match(r"\w+/embedding$", name))
    rng = np.random.default_rng(0)
    rows = []
    for length in (16, 12):
        tokens = rng.integers(2, vocab, (2, length), dtype=np.int32)
        tokens[0, -1] = tokens[1, length // 2] = 1
        tokens[1, length // 2 + 1 :] = 0
        rows.append(tokens)
    return rows


def compare(
    folder: str | Path,
    outputs: dict[str, np.ndarray],
    reference: str,
    framework: str = "pytorch",
    tolerance: float | None = None,
    name: str | None = None,
) -> Parity:
    """Run a converted model on the inputs of the original's outputs.

    Args:
        folder: the converted model.
        outputs: those of a reference file: inputs (B, L), targets (B, M), decoder_input_ids (B, M)
            (else made from targets), encoder_output (B, L, D), logits (B, M, V),
            incremental_logits (B, M, V), greedy_ids (B, any).
        reference: what they came from, for the table.
        framework: "pytorch" or "flax".
        tolerance: largest difference allowed; None is `TOLERANCE`, times the roundoff of the
            folder's dtype over that of float32.
    """
    missing = [key for key in _NEEDED if key not in outputs]
    if missing:
        raise VerificationError(f"{reference}: lacks {', '.join(missing)}.")
    own = model_outputs(folder, outputs, framework)
    dtype = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["dtype"]
    is_input, is_target = outputs["inputs"] != 0, outputs["targets"] != 0
    places = {"encoder_output": is_input, "logits": is_target, "incremental_logits": slice(None)}
    differences = {}
    for key, where in places.items():
        if own[key].shape != outputs[key].shape:
            raise VerificationError(
                f"{key}: the model's is {own[key].shape}, the reference's {outputs[key].shape}. "
                "The reference was made with another model."
            )
        # Not a number is a difference, too, and larger than any tolerance.
        difference = np.abs(own[key][where].astype(np.float64) - outputs[key][where])
        differences[key] = float(np.nan_to_num(difference, nan=np.inf).max(initial=0.0))
    divergence = _kl_divergence(outputs["logits"], own["logits"])
    expected = until_end(outputs["greedy_ids"])
    found = until_end(own["greedy_ids"])
    return Parity(
        model=name or Path(folder).name,
        reference=reference,
        framework=framework,
        differences=differences,
        divergences=np.where(is_target, divergence, 0.0).max(axis=0).tolist(),
        wrong_tokens=int((expected != found).sum()),
        tokens=expected.size,
        tolerance=TOLERANCE * _ROUNDING[dtype] if tolerance is None else tolerance,
        exact_tokens=dtype == "float32",
    )


def until_end(ids: np.ndarray, eos: int = 1) -> np.ndarray:
    """Ids (B, M) with zeros after each row's first end of sequence, as T5 reads its decodes.

    Mesh-TensorFlow's own rows go on until all of them have ended.
    """
    ended = np.cumsum(ids == eos, axis=1) - (ids == eos) > 0
    return np.where(ended, 0, ids)


def _kl_divergence(expected, found):
    """KL(expected || found) of logits (B, M, V), in nats: (B, M)."""
    logs = []
    for logits in (expected, found):
        logits = logits.astype(np.float64)
        logits = logits - logits.max(axis=-1, keepdims=True)
        logs.append(logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))
    return (np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=-1)


# --- the converted model --------------------------------------------------------------------------


def model_outputs(
    folder: str | Path, outputs: dict[str, np.ndarray], framework: str = "pytorch"
) -> dict[str, np.ndarray]:
    """What the converted model computes, in float32, from a reference's inputs and targets."""
    load, tensor, array = _FRAMEWORKS[framework]()
    inputs, targets = outputs["inputs"], outputs["targets"]
    shifted = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
    # Where the target is padding, Mesh-TensorFlow feeds padding, too.
    forced = outputs.get("decoder_input_ids", np.where(targets != 0, shifted, 0))
    given = {"input_ids": tensor(inputs), "attention_mask": tensor(inputs != 0)}
    result = {}
    for key, masked, decoder_inputs in (
        ("logits", True, forced),
        ("incremental_logits", False, shifted),
    ):
        model = load(folder, mask_decoder_start=masked)
        output = model(**given, decoder_input_ids=tensor(decoder_inputs))
        result[key] = array(output.logits)
        result["encoder_output"] = array(output.encoder_last_hidden_state)
    length = outputs["greedy_ids"].shape[1]
    generated = array(load(folder).generate(**given, max_new_tokens=length))[:, 1:]
    ids = np.zeros((len(inputs), length), generated.dtype)
    ids[:, : generated.shape[1]] = generated
    return {**result, "greedy_ids": ids}


def _pytorch():
    import torch

    from modeling_convt5 import ConvT5ForConditionalGeneration

    def load(folder, **options):
        options["dtype"] = torch.float32
        return ConvT5ForConditionalGeneration.from_pretrained(folder, **options).eval()

    def tensor(array):
        return torch.from_numpy(np.ascontiguousarray(array)).long()

    def array(tensor):
        return tensor.detach().numpy()

    return load, tensor, array


def _flax():
    import jax.numpy as jnp

    from modeling_convt5 import FlaxConvT5ForConditionalGeneration

    def load(folder, **options):
        options["param_dtype"] = jnp.float32
        return FlaxConvT5ForConditionalGeneration.from_pretrained(folder, **options)

    def tensor(array):
        return jnp.asarray(array, jnp.int32)

    return load, tensor, np.asarray


_FRAMEWORKS = {"pytorch": _pytorch, "flax": _flax}


def installed_frameworks() -> list[str]:
    """The frameworks that a converted model can be run in here."""
    modules = {"pytorch": "torch", "flax": "flax"}
    return [name for name in _FRAMEWORKS if importlib.util.find_spec(modules[name])]


# --- the original ---------------------------------------------------------------------------------


def mesh_outputs(
    checkpoint: Path, gin_file: Path, inputs: np.ndarray, targets: np.ndarray, decode_length: int
) -> dict[str, np.ndarray]:
    """What Mesh-TensorFlow itself computes, on the CPU in float32, in the form of a reference file.

    Args:
        checkpoint: the prefix.
        gin_file: the operative configuration, from which the graph is built.
        inputs, targets: (B, L) and (B, M), 0 for padding.
        decode_length: length of greedy decodes.

    Raises:
        VerificationError: if TensorFlow or Mesh-TensorFlow is missing.
    """
    return _MeshModel(checkpoint, gin_file).outputs(inputs, targets, decode_length)


class _MeshModel:
    """The original model, built anew in a graph of its own for each of its outputs."""

    def __init__(self, checkpoint, gin_file):
        self.tf, self.mtf, self.transformer = _import_mesh_tensorflow()
        import gin

        gin.clear_config()
        # The training run's modules are not needed here, nor are its settings.
        lines = gin_file.read_text(encoding="utf-8").splitlines()
        lines = [line for line in lines if not line.startswith(("import ", "from "))]
        gin.parse_config(lines, skip_unknown=True)
        self.reader = self.tf.train.load_checkpoint(str(checkpoint))
        shapes = self.reader.get_variable_to_shape_map()
        self.vocab = {
            stack: shapes.get(f"{stack}/embedding", shapes.get("shared/embedding"))[0]
            for stack in ("encoder", "decoder")
        }
        self.kernel_sizes = set(read_names(shapes).taps.values())

    def outputs(self, inputs, targets, decode_length):
        teacher_forced = self._run(inputs, targets, self._teacher_forced)
        incremental = self._run(inputs, targets, self._incremental)
        longer = self._possible(decode_length)
        decoded = self._run(inputs, targets, lambda *args: self._greedy(*args, longer))
        return {
            "inputs": inputs,
            "targets": targets,
            "encoder_output": teacher_forced[0],
            "logits": teacher_forced[1],
            "incremental_logits": np.stack(incremental, axis=1),
            "greedy_ids": decoded[0][:, :decode_length],
        }

    def _possible(self, length):
        """A length in which Mesh-TensorFlow can decode: it mistakes one of K for the K inputs."""
        while length in self.kernel_sizes:
            length += 1
        return length

    def _run(self, inputs, targets, build):
        """The values of the tensors that `build(model, inputs, targets)` returns."""
        tf, mtf = self.tf, self.mtf
        with tf.Graph().as_default():
            graph = mtf.Graph()
            mesh = mtf.Mesh(graph, "mesh")
            model = self.transformer.make_bitransformer(
                input_vocab_size=self.vocab["encoder"],
                output_vocab_size=self.vocab["decoder"],
                layout="",
                mesh_shape="",
            )
            batch = mtf.Dimension("batch", len(inputs))
            tensors = []
            for array in (inputs, targets):
                shape = mtf.Shape([batch, mtf.Dimension("length", array.shape[1])])
                value = tf.constant(array, tf.int32)
                tensors.append(mtf.import_tf_tensor(mesh, value, shape))
            results = build(model, *tensors)
            implementation = mtf.placement_mesh_impl.PlacementMeshImpl([], [], [""])
            lowering = mtf.Lowering(graph, {mesh: implementation})
            exported = [lowering.export_to_tf_tensor(result) for result in results]
            with tf.Session() as session:
                variables = tf.global_variables()
                values = {
                    variable.initializer.inputs[1]: self._value(variable.op.name)
                    for variable in variables
                }
                session.run([variable.initializer for variable in variables], values)
                session.run(lowering.copy_masters_to_slices())
                return session.run(exported)

    def _value(self, name):
        return self.reader.get_tensor(name).astype(np.float32)

    def _teacher_forced(self, model, inputs, targets):
        encoded, encode = [], model.encoder.call_simple

        def call_simple(*args, **kwargs):
            output = encode(*args, **kwargs)
            encoded.append(output[0])
            return output

        model.encoder.call_simple = call_simple
        mode = self.tf.estimator.ModeKeys.EVAL
        logits, _ = model.call_simple(inputs, targets, compute_loss=False, mode=mode)
        return encoded[0], logits

    def _greedy(self, model, inputs, targets, decode_length):
        return [model.decode(inputs, max_decode_length=decode_length)]

    def _incremental(self, model, inputs, targets):
        """Logits of each step of `decode`, the tokens being those of the targets.

        The sampled token is replaced by the target's, where `decode` samples; the loop is unrolled
        so that each step's logits can be taken out of it.
        """
        mtf, logits = self.mtf, []
        columns = mtf.unstack(targets, targets.shape.dims[1])
        tokens = iter(columns)

        def forced(step_logits, *args, **kwargs):
            logits.append(step_logits)
            return next(tokens)

        def unrolled(condition, body, state):
            for _ in columns:
                state = body(*state)
            return state

        with (
            _replaced(mtf, "sample_with_temperature", forced),
            _replaced(mtf, "while_loop", unrolled),
        ):
            model.decode(inputs, max_decode_length=self._possible(len(columns)))
        return logits


def _import_mesh_tensorflow():
    """TensorFlow's version-1 interface, Mesh-TensorFlow, and its transformer module.

    Mesh-TensorFlow 0.1.21 predates TensorFlow 2.16: what it imports and does not need here is put
    in place before it is imported.
    """
    if not mesh_tensorflow_is_installed():
        raise VerificationError(
            "Running the original needs TensorFlow and Mesh-TensorFlow: pip install "
            '"convt5[conversion]". Without them, put a reference.npz beside the checkpoint.'
        )
    import tensorflow.compat.v1 as tf
    from tensorflow.python.framework import ops

    tf.disable_v2_behavior()
    if not hasattr(tf, "estimator"):
        modes = {"TRAIN": "train", "EVAL": "eval", "PREDICT": "infer"}
        tf.estimator = types.ModuleType("tensorflow.compat.v1.estimator")
        tf.estimator.ModeKeys = type("ModeKeys", (), modes)
        tf.estimator.SessionRunHook = tf.estimator.CheckpointSaverListener = object
    if not hasattr(ops, "register_tensor_conversion_function"):
        ops.register_tensor_conversion_function = lambda *args, **kwargs: None
    import mesh_tensorflow as mtf

    name = "mesh_tensorflow.transformer"
    if name not in sys.modules:  # its own __init__ imports data pipelines
        package = types.ModuleType(name)
        package.__path__ = [str(Path(mtf.__file__).parent / "transformer")]
        sys.modules[name] = mtf.transformer = package
    from mesh_tensorflow.transformer import transformer, transformer_layers  # noqa: F401

    return tf, mtf, transformer


def mesh_tensorflow_is_installed() -> bool:
    """Whether the original can be run here."""
    return all(importlib.util.find_spec(name) for name in ("tensorflow", "mesh_tensorflow"))


@contextlib.contextmanager
def _replaced(module, name, function):
    original = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, original)


# --- the command line -----------------------------------------------------------------------------


def _arguments(argv):
    parser = argparse.ArgumentParser(
        prog="python -m conversion.verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", nargs="+", required=True, metavar="DIR", help="originals")
    parser.add_argument("--model", nargs="+", metavar="FOLDER", help="one for each checkpoint")
    parser.add_argument(
        "--framework",
        nargs="+",
        choices=_FRAMEWORKS,
        help="which of the model's implementations to run (default: all that are installed)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        help=f"largest difference (default: {TOLERANCE}, for float16 and bfloat16 by as much more "
        "as they round more)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = _arguments(argv)
    folders = arguments.model
    try:
        if folders is not None and len(folders) != len(arguments.checkpoint):
            raise VerificationError(
                f"--model names {len(folders)} folders, --checkpoint "
                f"{len(arguments.checkpoint)}: give one for each, or none."
            )
        parities = []
        for i, checkpoint in enumerate(arguments.checkpoint):
            with tempfile.TemporaryDirectory() as scratch:
                folder = folders[i] if folders else Path(scratch) / "model"
                if not folders:
                    from .convert_mesh_tf import convert

                    convert(checkpoint, folder, progress=None)
                settings = arguments.framework, arguments.tolerance
                parities += verify(checkpoint, folder, *settings)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(markdown(parities))
    return 0 if all(parity.passed for parity in parities) else 1


if __name__ == "__main__":
    sys.exit(main())
