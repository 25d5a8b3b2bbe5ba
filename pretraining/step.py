"""One step of training as a function of arrays: model, loss, gradient, update.

The state is a dictionary, and so is a batch; parameters are named by their PyTorch keys.

Shapes: B batch, L inputs length, T targets length, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from modeling_convt5 import ConvT5Config, FlaxConvT5ForConditionalGeneration
from modeling_convt5.checkpoint_flax_convt5 import named_parameters
from modeling_convt5.sharding_flax_convt5 import parameter_sharding

from .optimizer import learning_rate, optimizer
from .settings import AXES, Settings
from .tokens import TokenizerFile

State = dict[str, Any]
Batch = dict[str, jax.Array]
# Memory of the running average of the loss, from which a spike is told.
_AVERAGE = 0.99


def make_mesh(settings: Settings) -> Mesh:
    """All devices of all processes, as "data" x "fsdp" x "tensor".

    Raises:
        ValueError: if the sizes do not give the number of devices, or do not divide the batch.
    """
    sizes = {axis: settings.mesh.get(axis, 1) for axis in AXES}
    count = jax.device_count()
    given = int(np.prod([size for size in sizes.values() if size > 0]))
    sizes = {axis: count // given if size == -1 else size for axis, size in sizes.items()}
    if int(np.prod(list(sizes.values()))) != count:
        raise ValueError(
            f"Settings.mesh={settings.mesh} does not make {count} devices: the sizes' product must "
            f"be {count}. Set one of them to -1 to take what is left."
        )
    rows = sizes["data"] * sizes["fsdp"] * settings.accumulation_steps
    if settings.batch_size % rows:
        raise ValueError(
            f"Settings.batch_size={settings.batch_size} is not allowed: expected a multiple of "
            f"data x fsdp x accumulation_steps = {sizes['data']} x {sizes['fsdp']} x "
            f"{settings.accumulation_steps} = {rows}, so that every device has as many rows."
        )
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over "data" and "fsdp"."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def host_places(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a global batch the devices of this process hold, sorted."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def to_devices(batch: dict[str, np.ndarray], places: np.ndarray, mesh: Mesh, size: int) -> Batch:
    """A global batch of `size` rows from the rows at `places`, which this process has made."""
    sharding = batch_sharding(mesh)

    def spread(array):
        def part(index):
            wanted = np.arange(size)[index[0]]
            return array[np.searchsorted(places, wanted)]

        return jax.make_array_from_callback((size, *array.shape[1:]), sharding, part)

    return {name: spread(array) for name, array in batch.items() if name != "rows"}


def model_config(settings: Settings, tokenizer: TokenizerFile) -> ConvT5Config:
    """The preset with its overrides; vocabulary and special tokens are the tokenizer's.

    Raises:
        ValueError: for an unknown preset or field, or a vocabulary too small for the tokenizer.
    """
    fields = {
        "vocab_size": tokenizer.vocab_size,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    config = ConvT5Config.from_preset(settings.model, **{**fields, **settings.model_overrides})
    if config.vocab_size < tokenizer.size:
        raise ValueError(
            f"Settings.model_overrides: vocab_size={config.vocab_size} is less than the "
            f"{tokenizer.size} ids of the tokenizer {tokenizer.path}. Leave it out."
        )
    for name in ("pad_token_id", "eos_token_id"):
        if getattr(config, name) != fields[name]:
            raise ValueError(
                f"Settings.model_overrides: {name}={getattr(config, name)}, but the tokenizer's is "
                f"{fields[name]}. Leave it out."
            )
    return config


class Model:
    """`FlaxConvT5ForConditionalGeneration` as a function of its parameters.

    Args:
        config: of the model.
        settings: of the run.
        mesh: from `make_mesh`.

    Attributes:
        shapes: {PyTorch key: shape}.
        shardings: {PyTorch key: sharding}.
    """

    def __init__(self, config: ConvT5Config, settings: Settings, mesh: Mesh):
        self.config, self.mesh, self.seed = config, mesh, settings.seed
        self.options = {
            "dtype": jnp.dtype(settings.dtype),
            "param_dtype": jnp.dtype("float64" if settings.dtype == "float64" else "float32"),
            "mesh": mesh,
            "scan_layers": settings.scan_layers,
            "remat": settings.remat,
        }
        template = self.abstract()
        self._graph, state = nnx.split(template)
        places, self._tree = jax.tree_util.tree_flatten_with_path(state)
        # A path ends with the variable's own "value", which is no part of its name.
        self._order = [".".join(str(entry.key) for entry in path[:-1]) for path, _ in places]
        self.shapes = {key: tuple(v.shape) for key, v in named_parameters(template)}
        self.shardings = {
            key: parameter_sharding(key, shape, mesh) for key, shape in self.shapes.items()
        }

    def abstract(self) -> FlaxConvT5ForConditionalGeneration:
        """The model with shapes for parameters."""
        return nnx.eval_shape(lambda: self._build())

    def initial(self) -> dict[str, jax.Array]:
        """Initial parameters, each made where it belongs."""

        def values():
            return {key: variable[...] for key, variable in named_parameters(self._build())}

        return jax.jit(values, out_shardings=self.shardings)()

    def logits(self, params: dict, batch: Batch, rng: jax.Array | None) -> jax.Array:
        """(B, T, V) of a batch, in the dtype of computation; dropout where a key is passed."""
        leaves = [params[key] for key in self._order]
        model = nnx.merge(self._graph, jax.tree_util.tree_unflatten(self._tree, leaves))
        labels, segments = batch["labels"], batch.get("decoder_segment_ids")
        return model(
            input_ids=batch["input_ids"],
            decoder_input_ids=model._shift_right(labels, segments),
            segment_ids=batch.get("segment_ids"),
            decoder_segment_ids=segments,
            dropout_rng=rng,
        ).logits

    def _build(self):
        rngs = nnx.Rngs(self.seed)
        return FlaxConvT5ForConditionalGeneration(self.config, **self.options, rngs=rngs)


def loss_sums(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums over labels that are not -100: cross-entropy, and the squared log-normaliser (z-loss).

    Both in float32 at least, from logits (B, T, V) and labels (B, T).
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    counted = labels != -100
    places = jnp.where(counted, labels, 0)[..., None]
    chosen = jnp.take_along_axis(logits, places, axis=-1)[..., 0]
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    entropy = jnp.where(counted, normaliser - chosen, 0).sum()
    return entropy, jnp.where(counted, jnp.square(normaliser), 0).sum()


def gradients(model: Model, settings: Settings, params: dict, batch: Batch, step: jax.Array):
    """(cross-entropy, z-loss), means over the batch's labels, and their weighted sum's gradient.

    The batch goes through the model in `accumulation_steps` parts; every device has rows in each.
    """
    count = (batch["labels"] != -100).sum()
    key = jax.random.fold_in(jax.random.key(settings.seed), step) if settings.dropout else None

    def loss(params, part, rng):
        entropy, squares = loss_sums(model.logits(params, part, rng), part["labels"])
        entropy, squares = entropy / count, squares / count
        return entropy + settings.z_loss * squares, (entropy, squares)

    differentiate = jax.value_and_grad(loss, has_aux=True)
    parts = settings.accumulation_steps
    if parts == 1:
        (_, losses), grads = differentiate(params, batch, key)
        return losses, grads

    def split(array):
        array = array.reshape(-1, parts, *array.shape[1:]).swapaxes(0, 1)
        rows = PartitionSpec(None, ("data", "fsdp"))
        return jax.lax.with_sharding_constraint(array, NamedSharding(model.mesh, rows))

    def add(total, part):
        number, rows = part
        rng = None if key is None else jax.random.fold_in(key, number)
        (_, losses), grads = differentiate(params, rows, rng)
        return jax.tree.map(jnp.add, total, (losses, grads)), None

    zero = jnp.zeros((), jnp.promote_types(model.options["param_dtype"], jnp.float32))
    start = ((zero, zero), jax.tree.map(jnp.zeros_like, params))
    split_batch = {name: split(array) for name, array in batch.items()}
    return jax.lax.scan(add, start, (jnp.arange(parts), split_batch))[0]


def norm(tree: Any) -> jax.Array:
    """The square root of the sum of all squares."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


def train_step(model: Model, settings: Settings, state: State, batch: Batch):
    """The next state, and the step's metrics: scalars.

    A step whose loss, gradient or update is not finite, or whose loss is a spike, changes nothing
    but the counts.
    """
    params, step = state["params"], state["step"]
    (loss, z_loss), grads = gradients(model, settings, params, batch, step)
    updates, moments = optimizer(settings).update(grads, state["optimizer"], params)
    norms = norm(grads), norm(updates)
    good = jnp.isfinite(loss) & jnp.isfinite(norms[0]) & jnp.isfinite(norms[1])
    average = state["average"]
    if settings.spike_threshold is not None:
        good &= jnp.isnan(average) | (loss <= average + settings.spike_threshold)
    # NaN stands for "no step yet", and the first loss takes its place.
    moved = jnp.where(jnp.isnan(average), loss, _AVERAGE * average + (1 - _AVERAGE) * loss)
    fresh = step % settings.log_every == 0
    window = jax.tree.map(lambda x: jnp.where(fresh, jnp.zeros_like(x), x), state["window"])
    window = {
        "loss": window["loss"] + jnp.where(good, loss, 0),
        "steps": window["steps"] + good,
    }

    def choose(new, old):
        return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)

    new = {
        "step": step + 1,
        "params": choose(optax.apply_updates(params, updates), params),
        "optimizer": choose(moments, state["optimizer"]),
        "average": jnp.where(good, moved, average),
        "skipped": state["skipped"] + ~good,
        "window": window,
    }
    metrics = {
        "loss": window["loss"] / window["steps"],
        "step_loss": loss,
        "z_loss": z_loss,
        "gradient_norm": norms[0],
        "update_norm": norms[1],
        "parameter_norm": norm(params),
        # The optimizer does not count the steps that were skipped.
        "learning_rate": learning_rate(settings)(step - state["skipped"]),
        "skipped": new["skipped"],
        "tokens": (batch["labels"] != -100).sum()
        + (batch["input_ids"] != model.config.pad_token_id).sum(),
    }
    return new, metrics


def initial_state(model: Model, settings: Settings, params: dict) -> State:
    """The state before the first step."""
    zero = jnp.zeros((), jnp.promote_types(model.options["param_dtype"], jnp.float32))
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "optimizer": optimizer(settings).init(params),
        "average": zero * jnp.nan,
        "skipped": jnp.zeros((), jnp.int32),
        "window": {"loss": zero, "steps": jnp.zeros((), jnp.int32)},
    }


def abstract_state(model: Model, settings: Settings) -> State:
    """The state's shapes, dtypes and shardings: moments of a parameter's shape lie with it."""
    dtype = model.options["param_dtype"]
    params = {key: jax.ShapeDtypeStruct(shape, dtype) for key, shape in model.shapes.items()}
    shapes = jax.eval_shape(lambda params: initial_state(model, settings, params), params)
    copied = NamedSharding(model.mesh, PartitionSpec())

    def place(path, leaf):
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        key = next((key for key in keys if key in model.shapes), None)
        with_it = key is not None and leaf.shape == model.shapes[key]
        sharding = model.shardings[key] if with_it else copied
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, shapes)


def compile_steps(model: Model, settings: Settings) -> tuple[Callable, Callable, Callable]:
    """(start() -> state, train(state, batch) -> state, metrics, evaluate(params, batch) -> sums).

    `train` reuses the memory of the state it is given.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, settings))
    copied = NamedSharding(model.mesh, PartitionSpec())
    fill = jax.jit(partial(initial_state, model, settings), out_shardings=shardings)
    train = jax.jit(
        partial(train_step, model, settings), donate_argnums=0, out_shardings=(shardings, copied)
    )

    def evaluate(params, batch):
        entropy, _ = loss_sums(model.logits(params, batch, None), batch["labels"])
        return entropy, (batch["labels"] != -100).sum()

    return lambda: fill(model.initial()), train, jax.jit(evaluate, out_shardings=copied)
