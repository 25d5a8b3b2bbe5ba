"""What a pre-training run is: a dataclass, Python files that fill it, and overrides by name.

A configuration file exposes `config`, a `Settings` (or `get_config()` that returns one), and begins
with the record of its run. Overrides are `field=value`, or `field.key=value` inside a dictionary.
"""

import ast
import dataclasses
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

from .span_corruption import MEAN_NOISE_SPAN_LENGTH, NOISE_DENSITY, noise_counts, raw_length_for

AXES = ("data", "fsdp", "tensor")
# What may change when a run is resumed: how it is run, watched and kept, not what it computes.
RESUMABLE = (
    "accumulation_steps",
    "checkpoint_every",
    "data_dir",
    "eval_every",
    "export_every",
    "keep_last",
    "log_rows",
    "mesh",
    "on_bad_step",
    "prefetch",
    "remat",
    "scan_layers",
    "tokenizer",
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The paper's settings are the defaults.

    Attributes:
        data_dir: a folder written by `python -m pretraining.prepare`, or anything that command
            reads; the run then prepares it in its work directory first.
        tokenizer: a tokenizer.json, a folder that holds one, or a repository on the Hub.
        model: a preset of `ConvT5Config`.
        model_overrides: fields of `ConvT5Config` that replace the preset's. The vocabulary's size
            and the ids of padding and end are the tokenizer's.
        train_steps: optimizer steps in all.
        batch_size: rows of a step, over all devices and accumulation steps.
        inputs_length: tokens of an encoder row; the length of targets follows from it.
        noise_density, mean_noise_span_length: as in `span_corruption`.
        packing: corrupt every document on its own and pack several in a row with segment ids, so
            that nothing reads across; otherwise documents are joined and cut, as T5 does.
        seed: of weights, order, noise and dropout.
        optimizer: "adafactor" (the paper's) or "adamw" (scaled by the parameters' RMS, nanoT5).
        learning_rate: Adafactor: factor of the inverse square root, 1.0 in the paper. AdamW: the
            peak, 2e-2 in nanoT5. None is that value.
        warmup_steps: steps at the constant 1/sqrt(warmup_steps), or of AdamW's linear rise.
        z_loss: weight of the squared logarithm of the softmax's normaliser.
        dropout: use the model's dropout rates; the paper pre-trains without.
        dtype: what is computed in: "bfloat16", "float32" or "float64". Parameters and optimizer
            are float32 (float64 for float64).
        accumulation_steps: parts in which a batch goes through the model, one after another.
        mesh: sizes of the axes "data" (copies of the model), "fsdp" (parameters are split) and
            "tensor" (layers are split); one of them may be -1: what is left of the devices.
        scan_layers, remat: as in `FlaxConvT5PreTrainedModel`.
        on_bad_step: what happens after a step whose loss or gradient is not finite, or whose loss
            exceeds the running average by `spike_threshold`. Such a step is never applied. "stop"
            ends the run, "skip" goes on with the next batch, "rewind" goes back to the last
            checkpoint and on with the next batch.
        spike_threshold: in nats; None looks for values that are not finite only.
        log_every, eval_every, checkpoint_every, export_every: in steps; an eval_every of 0 is
            never, an export_every of 0 at the end only. The last step is always evaluated and kept.
        eval_batches: batches of the validation split in one evaluation, at most.
        keep_last: checkpoints kept.
        prefetch: batches that threads prepare ahead.
        log_rows: write the rows of every batch into WORKDIR/rows.jsonl; of several processes, the
            first writes those that it reads itself.
    """

    data_dir: str = ""
    tokenizer: str = "google-t5/t5-base"
    model: str = "lightweight-base"
    model_overrides: dict = dataclasses.field(default_factory=dict)
    train_steps: int = 524_288
    batch_size: int = 128
    inputs_length: int = 512
    noise_density: float = NOISE_DENSITY
    mean_noise_span_length: float = MEAN_NOISE_SPAN_LENGTH
    packing: bool = False
    seed: int = 0
    optimizer: str = "adafactor"
    learning_rate: float | None = None
    warmup_steps: int = 10_000
    z_loss: float = 1e-4
    dropout: bool = False
    dtype: str = "bfloat16"
    accumulation_steps: int = 1
    mesh: dict = dataclasses.field(default_factory=lambda: {"data": -1, "fsdp": 1, "tensor": 1})
    scan_layers: bool = True
    remat: bool = False
    on_bad_step: str = "stop"
    spike_threshold: float | None = None
    log_every: int = 100
    eval_every: int = 5_000
    checkpoint_every: int = 1_000
    export_every: int = 0
    eval_batches: int = 50
    keep_last: int = 3
    prefetch: int = 8
    log_rows: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _check_type(field, getattr(self, field.name))
        for name in ("train_steps", "batch_size", "warmup_steps", "accumulation_steps"):
            self._at_least(name, 1)
        for name in ("log_every", "eval_batches", "keep_last", "prefetch", "checkpoint_every"):
            self._at_least(name, 1)
        for name in ("eval_every", "export_every", "seed", "z_loss"):
            self._at_least(name, 0)
        for name, allowed in (
            ("optimizer", ("adafactor", "adamw")),
            ("dtype", ("bfloat16", "float32", "float64")),
            ("on_bad_step", ("stop", "skip", "rewind")),
        ):
            if getattr(self, name) not in allowed:
                self._fail(name, f"one of {', '.join(allowed)}", "Check the spelling.")
        for name in ("learning_rate", "spike_threshold"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                self._fail(name, "None or a number above 0", "None is the default.")
        if self.batch_size % self.accumulation_steps:
            self._fail(
                "batch_size",
                f"a multiple of accumulation_steps={self.accumulation_steps}",
                "Every part has the same number of rows.",
            )
        if self.seed >= 1 << 63:
            self._fail("seed", "a number below 2**63", "Any smaller one serves.")
        self._check_mesh()
        if self.packing and self.inputs_length < 4:
            self._fail("inputs_length", "4 or more with packing", "A part needs two tokens.")
        raw_length_for(self.inputs_length, self.noise_density, self.mean_noise_span_length)

    @property
    def raw_length(self) -> int:
        """Tokens of a row before its corruption."""
        return self._lengths()[0]

    @property
    def targets_length(self) -> int:
        """Tokens of a decoder row."""
        return self._lengths()[1]

    @property
    def num_spans(self) -> int:
        """Noise spans, and so sentinels, of a full row."""
        return noise_counts(self.raw_length, self.noise_density, self.mean_noise_span_length)[1]

    def fingerprint(self) -> dict[str, Any]:
        """The fields that a resumed run must not change.

        `train_steps` is one of them where the learning rate depends on it.
        """
        free = {*RESUMABLE, "train_steps", "eval_batches"}
        if self.optimizer == "adamw":
            free.remove("train_steps")
        return {name: value for name, value in vars(self).items() if name not in free}

    def _lengths(self):
        return raw_length_for(self.inputs_length, self.noise_density, self.mean_noise_span_length)

    def _check_mesh(self):
        unknown = sorted(set(self.mesh) - set(AXES))
        if unknown:
            self._fail("mesh", f"the axes {', '.join(AXES)}", f"There is no axis {unknown[0]!r}.")
        sizes = list(self.mesh.values())
        if not all(_is_int(size) and (size > 0 or size == -1) for size in sizes):
            self._fail("mesh", "sizes of 1 or more, or -1", "-1 is what is left of the devices.")
        if sizes.count(-1) > 1:
            self._fail("mesh", "at most one -1", "Say how many devices one of the axes has.")

    def _at_least(self, name, least):
        if not getattr(self, name) >= least:
            self._fail(name, f"{least} or more", "Set a size.")

    def _fail(self, name, allowed, fix):
        raise ValueError(
            f"Settings.{name}={getattr(self, name)!r} is not allowed: expected {allowed}. {fix}"
        )


def load(path: str, overrides: list[str] | tuple[str, ...] = ()) -> Settings:
    """The settings of a configuration file, overridden.

    Raises:
        ValueError: for a missing or wrong file, an unknown field or a wrong value.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(
            f"--config {path}: there is no such file. Those of the paper are in "
            f"{Path(__file__).parent / 'configs'}."
        )
    spec = importlib.util.spec_from_file_location(f"pretraining_config_{file.stem}", file)
    if spec is None:
        raise ValueError(f"--config {path}: expected a Python file that defines `config`.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings = module.get_config() if hasattr(module, "get_config") else vars(module).get("config")
    if not isinstance(settings, Settings):
        raise ValueError(
            f"--config {path}: expected `config`, or `get_config()` that returns one, of class "
            f"pretraining.settings.Settings, got {type(settings).__name__}."
        )
    return override(settings, overrides)


def override(settings: Settings, overrides: list[str] | tuple[str, ...]) -> Settings:
    """Settings with `field=value` and `field.key=value` replaced; values are Python literals.

    Raises:
        ValueError: for what is not `field=value`, an unknown field or a wrong value.
    """
    fields = dataclasses.asdict(settings)
    texts = {field.name for field in dataclasses.fields(settings) if field.type is str}
    for text in overrides:
        name, equals, value = text.partition("=")
        field, dot, key = name.partition(".")
        if not equals:
            raise ValueError(f"--override {text}: expected field=value.")
        if field not in fields or (dot and not isinstance(fields[field], dict)):
            raise ValueError(
                f"--override {text}: there is no field {name!r}. The fields are "
                f"{', '.join(fields)}."
            )
        try:
            literal = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError):
            literal = value  # a string needs no quotes
        if field not in texts or isinstance(literal, str):
            value = literal
        if dot:
            fields[field][key] = value
        else:
            fields[field] = value
    return Settings(**fields)


def digest(value: Any) -> str:
    """A short name for a value: equal values have equal names in every process."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _check_type(field, value):
    """Whole numbers pass as floats; nothing else passes as what it is not."""
    allowed = field.type
    fits = isinstance(value, allowed) and not (isinstance(value, bool) and allowed is not bool)
    if not fits and not (_is_int(value) and isinstance(0.0, allowed)):
        name = allowed.__name__ if isinstance(allowed, type) else allowed
        raise ValueError(
            f"Settings.{field.name}={value!r} is not allowed: expected {name}, got "
            f"{type(value).__name__}. Correct the value."
        )
