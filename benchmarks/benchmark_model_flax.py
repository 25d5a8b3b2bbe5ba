"""What `benchmark_model.py --framework flax` measures: ConvT5 in Flax beside itself as T5.

"T5" is the same code with `attention` in every layer. Everything is compiled by XLA.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from modeling_convt5 import ConvT5Config, FlaxConvT5EncoderModel, FlaxConvT5ForConditionalGeneration
from modeling_convt5.convolution_flax import dynamic_conv, lightweight_conv

CONVOLUTIONS = ("lightweight", "dynamic", "dilated", "hybrid")
BASELINE = "T5"
MODELS = (*CONVOLUTIONS, BASELINE)
PARTS = ("encoder", "training", "generation", "memory", "mixing", "compilation")


def configuration(name: str, args: argparse.Namespace, layers: int, **fields) -> ConvT5Config:
    """The presets' settings at the size of the run; "hybrid" has attention in its last layer."""
    size = {
        "d_model": args.d_model,
        "d_kv": 64,
        "num_heads": args.d_model // 64,
        "d_ff": 4 * args.d_model,
        "num_layers": layers,
        "num_decoder_layers": layers,
        "dropout_rate": 0.0,
        **fields,
    }
    family = {"T5": "transformer", "hybrid": "lightweight"}.get(name, name)
    if name == "hybrid":
        size["encoder_mixers"] = ["lightweight"] * (layers - 1) + ["attention"]
    return ConvT5Config.from_preset(f"{family}-base", **size)


def timed(calls: dict, rounds: int) -> dict[str, float]:
    """Median seconds of each call, one after the other in every round, compiled beforehand."""
    times = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if round_:  # the first one compiles
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def _batch(args, length):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.integers(2, 1000, (max(1, args.tokens // length), length)))


def _encoder(name, args, layers):
    """The parameters of an encoder, its forward and its forward+backward."""
    model = FlaxConvT5EncoderModel(configuration(name, args, layers, vocab_size=1000))
    graphdef, state = nnx.split(model)

    def forward(state, ids):
        return nnx.merge(graphdef, state)(ids).last_hidden_state

    def loss(state, ids):
        return forward(state, ids).sum()

    return state, jax.jit(forward), jax.jit(jax.grad(loss))


def measure_encoder(args, layers, length) -> dict:
    """Seconds of the encoder alone, forward and forward+backward."""
    ids, calls = _batch(args, length), {"forward": {}, "forward+backward": {}}
    for name in MODELS:
        state, forward, backward = _encoder(name, args, layers)
        calls["forward"][name] = lambda f=forward, s=state: f(s, ids)
        calls["forward+backward"][name] = lambda f=backward, s=state: f(s, ids)
    return {what: timed(models, args.rounds) for what, models in calls.items()}


def measure_memory(args, layers, length) -> dict:
    """MB that XLA plans beside inputs and parameters, of the forward and the backward pass."""
    ids = _batch(args, length)
    found = {"forward": {}, "forward+backward": {}}
    for name in MODELS:
        state, *functions = _encoder(name, args, layers)
        for what, function in zip(found, functions, strict=True):
            memory = function.lower(state, ids).compile().memory_analysis()
            found[what][name] = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 1e6
    return found


def measure_training(args, layers, length) -> dict:
    """Seconds of a whole step: loss, gradients, AdamW; targets are T5's 114 for 512 inputs."""
    ids, calls, optimizer = _batch(args, length), {}, optax.adamw(1e-4)
    labels = ids[:, : max(2, length * 114 // 512)]
    for name in MODELS:
        model = FlaxConvT5ForConditionalGeneration(configuration(name, args, layers))
        graphdef, state = nnx.split(model)

        def step(state, slots, graphdef=graphdef):
            def loss(state):
                return nnx.merge(graphdef, state)(ids, labels=labels).loss

            gradients = jax.grad(loss)(state)
            updates, slots = optimizer.update(gradients, slots, state)
            return optax.apply_updates(state, updates), slots

        step, held = jax.jit(step, donate_argnums=(0, 1)), [state, optimizer.init(state)]

        def call(step=step, held=held):
            held[:] = step(*held)
            return held

        calls[name] = call
    return {"step": timed(calls, args.rounds)}


def measure_generation(args, layers) -> dict:
    """Seconds a token after 32 and after 2,048 tokens, batch 1; and tokens a second, batch 8."""
    found = {}
    for name in [*MODELS, *(f"{name} alone" for name in CONVOLUTIONS[:3])]:
        fields = {"cross_attention": False} if name.endswith(" alone") else {}
        config = configuration(name.removesuffix(" alone"), args, layers, vocab_size=1000, **fields)
        found[name] = _token_times(FlaxConvT5ForConditionalGeneration(config), args)
    ids, calls = _batch(args, 512)[:8], {}
    for name in MODELS:
        model = FlaxConvT5ForConditionalGeneration(configuration(name, args, layers))
        arguments = {"max_new_tokens": args.steps, "min_new_tokens": args.steps}
        calls[name] = lambda m=model, a=arguments: m.generate(ids, **a)
    seconds = timed(calls, args.rounds)
    speed = {name: len(ids) * args.steps / second for name, second in seconds.items()}
    return {"token": found, "throughput": speed}


def _token_times(model, args):
    """Median seconds of one more token, at two positions in turn, in one compiled step."""
    encoded = _batch(args, 512)[:1]
    hidden = model.encode(encoded).last_hidden_state
    graphdef, state = nnx.split(model)

    @jax.jit
    def step(state, token, cache):
        model = nnx.merge(graphdef, state)
        output = model.decode(token, hidden, None, past_key_values=cache)
        return output.logits[:, -1].argmax(-1, keepdims=True), output.past_key_values

    caches, token = {}, jnp.full((1, 1), 7)
    for position in (32, 2048):
        cache = model.init_cache(1, 4096, hidden)
        read = jax.jit(lambda s, t, c: nnx.merge(graphdef, s).decode(t, hidden, None, None, c))
        caches[position] = read(state, jnp.full((1, position), 7), cache).past_key_values
    times = {position: [] for position in caches}
    for i in range(args.steps + 5):
        for position in caches:
            start = time.perf_counter()
            _, caches[position] = jax.block_until_ready(step(state, token, caches[position]))
            if i >= 5:
                times[position].append(time.perf_counter() - start)
    return {str(position): statistics.median(t) for position, t in times.items()}


def measure_mixing(args, kernel_size) -> dict:
    """Seconds of the convolution and of its block's two projections, forward and with backward."""
    rng, d_model, filters, length = np.random.default_rng(0), args.d_model, 12, 512
    rows = max(1, 2 * args.tokens // length)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    x, wide = normal(rows, length, d_model), normal(2 * d_model, d_model)
    narrow = normal(d_model, d_model)
    filter, weight = normal(filters, kernel_size), normal(filters * kernel_size, d_model) / 30

    def projections(x, wide, narrow):
        value, gate = jnp.split(x @ wide.T, 2, axis=-1)
        return (value * jax.nn.sigmoid(gate)) @ narrow.T

    ops = {
        "projections": (projections, (x, wide, narrow)),
        "lightweight": (lambda x, f: lightweight_conv(x, f, kernel_size // 2), (x, filter)),
        "dynamic": (
            lambda x, w: dynamic_conv(x, x, w, None, kernel_size, kernel_size // 2),
            (x, weight),
        ),
    }
    calls = {"forward": {}, "forward+backward": {}}
    for name, (op, operands) in ops.items():
        both = jax.jit(
            lambda *operands, op=op: jax.vjp(op, *operands)[1](jnp.ones_like(operands[0]))
        )
        once = jax.jit(op)
        calls["forward"][name] = lambda f=once, o=operands: f(*o)
        calls["forward+backward"][name] = lambda f=both, o=operands: f(*o)
    return {what: timed(models, args.rounds) for what, models in calls.items()}


def measure_compilation(args, layers) -> dict:
    """Seconds to compile a training step's loss and gradients, layers unrolled or in a loop."""
    ids = _batch(args, 512)[:1]
    found = {}
    for name in ("lightweight", "dynamic", BASELINE):
        for scan in (False, True):
            config = configuration(name, args, layers, vocab_size=1000)
            model = nnx.eval_shape(
                lambda config=config, scan=scan: FlaxConvT5ForConditionalGeneration(
                    config, scan_layers=scan
                )
            )
            graphdef, state = nnx.split(model)

            def loss(state, graphdef=graphdef):
                return nnx.merge(graphdef, state)(ids, labels=ids[:, :114]).loss

            lowered = jax.jit(jax.grad(loss)).lower(state)
            start = time.perf_counter()
            memory = lowered.compile().memory_analysis()
            found[f"{name}, {'scan' if scan else 'unrolled'}"] = {
                "seconds": time.perf_counter() - start,
                "MB": memory.temp_size_in_bytes / 1e6,
            }
    return found


MEASURES = {
    "encoder": measure_encoder,
    "training": measure_training,
    "generation": measure_generation,
    "memory": measure_memory,
    "mixing": measure_mixing,
    "compilation": measure_compilation,
}


def jobs(args: argparse.Namespace) -> list[list]:
    found = [["encoder", n, length] for n in args.layers for length in args.lengths]
    least = min(args.layers)
    found += [["training", least, length] for length in args.lengths]
    found.append(["generation", least])
    found += [["memory", least, length] for length in args.lengths]
    found += [["mixing", kernel_size] for kernel_size in (7, 15, 31)]
    found.append(["compilation", 24])
    return [job for job in found if job[0] in args.what]


def extra_tables(cells: dict) -> list[str]:
    """Markdown of what only this framework measures: the op's share, and compiling."""
    lines, rows = [], [(key, cell) for key, cell in cells.items() if key[0] == "mixing" and cell]
    if rows:
        lines += ["", "## The mixing op, as a share of its block's two projections", ""]
        lines += ["| K | op | forward | forward and backward |", "|---|---|---|---|"]
    for (_, kernel_size), cell in rows:
        for op in ("lightweight", "dynamic"):
            shares = [times[op] / times["projections"] for times in cell.values()]
            lines.append(f"| {kernel_size} | {op} | {shares[0]:.3f} | {shares[1]:.3f} |")
    for (part, *job), cell in cells.items():
        if part == "compilation" and cell:
            lines += ["", f"## Compiling loss and gradients, {job[0]} + {job[0]} layers", ""]
            lines += ["| model | seconds | temporaries, MB |", "|---|---|---|"]
            for name, found in cell.items():
                lines.append(f"| {name} | {found['seconds']:.1f} | {found['MB']:,.0f} |")
    return lines
