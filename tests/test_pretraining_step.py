"""One step: the optimizers against loops, the loss, accumulation, packing, bad steps."""

import dataclasses
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pretraining_runs as runs
import pytest
import tolerances

from pretraining.metrics import Board, JsonLines, Throughput, peak_flops, read_records
from pretraining.optimizer import learning_rate, optimizer
from pretraining.settings import Settings
from pretraining.step import (
    Model,
    compile_steps,
    gradients,
    loss_sums,
    make_mesh,
    model_config,
    to_devices,
)
from pretraining.tokens import open_tokenizer

SETTINGS = Settings(
    model="lightweight-tiny",
    model_overrides=runs.MODEL,
    batch_size=4,
    inputs_length=16,
    dtype="float32",
    warmup_steps=4,
    log_every=2,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = runs.make_tokenizer(tmp_path_factory.mktemp("step") / "tokenizer.json")
    return open_tokenizer(str(path))


def build(tokenizer, **fields):
    settings = dataclasses.replace(SETTINGS, **fields)
    mesh = make_mesh(settings)
    return Model(model_config(settings, tokenizer), settings, mesh), settings


def make_batch(model, rows=4, seed=0):
    rng = np.random.default_rng(seed)
    batch = {
        "input_ids": rng.integers(3, 60, (rows, 16)).astype(np.int32),
        "labels": rng.integers(3, 60, (rows, 6)).astype(np.int32),
    }
    return to_devices(batch, np.arange(rows), model.mesh, rows)


def differentiate(model, settings, params, batch, step=0):
    return jax.jit(lambda p, b: gradients(model, settings, p, b, step))(params, batch)


# --- Optimizers ----------------------------------------------------------------------------------


def adafactor_loop(params, all_grads, warmup):
    """Adafactor from its paper's equations, one matrix at a time, in float64."""
    params = {key: np.asarray(value, np.float64) for key, value in params.items()}
    moments = {key: None for key in params}
    for step, grads in enumerate(all_grads):
        decay = 1 - (step + 1.0) ** -0.8
        rate = 1 / np.sqrt(max(step, warmup))
        for key, param in params.items():
            grad = np.asarray(grads[key], np.float64)
            squares = grad**2 + 1e-30
            if param.ndim == 2 and min(param.shape) >= 128:
                new = squares.mean(axis=1), squares.mean(axis=0)
                old = moments[key] or (np.zeros_like(new[0]), np.zeros_like(new[1]))
                rows, columns = (decay * o + (1 - decay) * n for o, n in zip(old, new, strict=True))
                moments[key] = rows, columns
                second = np.outer(rows, columns) / rows.mean()
            else:
                old = 0.0 if moments[key] is None else moments[key]
                second = moments[key] = decay * old + (1 - decay) * squares
            update = grad / np.sqrt(second)
            update /= max(1.0, np.sqrt((update**2).mean()))
            scale = max(1e-3, np.sqrt((param**2).mean()))
            params[key] = param - rate * scale * update
    return params


def adamw_loop(params, all_grads, schedule):
    params = {key: np.asarray(value, np.float64) for key, value in params.items()}
    first = {key: 0.0 for key in params}
    second = {key: 0.0 for key in params}
    for step, grads in enumerate(all_grads, 1):
        grads = {key: np.asarray(value, np.float64) for key, value in grads.items()}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for key, param in params.items():
            grad = grads[key] * min(1.0, 1.0 / norm)
            first[key] = 0.9 * first[key] + 0.1 * grad
            second[key] = 0.999 * second[key] + 0.001 * grad**2
            update = first[key] / (1 - 0.9**step)
            update /= np.sqrt(second[key] / (1 - 0.999**step)) + 1e-6
            scale = max(1e-3, np.sqrt((param**2).mean()))
            params[key] = param - schedule(step - 1) * scale * update
    return params


def cosine(step, peak=2e-2, warmup=4, total=12, end=1e-5):
    if step < warmup:
        return peak * step / warmup
    done = (step - warmup) / (total - warmup)
    return end + (peak - end) * 0.5 * (1 + np.cos(np.pi * done))


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_optimizers_are_their_papers(name):
    rng = np.random.default_rng(0)
    shapes = {"matrix": (130, 140), "small": (8, 20), "vector": (64,), "tall": (200, 3)}
    params = {key: rng.normal(0, 0.5, shape).astype(np.float32) for key, shape in shapes.items()}
    grads = [
        {key: rng.normal(0, 0.1, shape).astype(np.float32) for key, shape in shapes.items()}
        for _ in range(8)
    ]
    settings = dataclasses.replace(SETTINGS, optimizer=name, train_steps=12)
    transform = optimizer(settings)
    state, found = transform.init(params), params
    for grad in grads:
        updates, state = transform.update(grad, state, found)
        found = {key: found[key] + updates[key] for key in found}
    if name == "adafactor":
        expected = adafactor_loop(params, grads, 4)
    else:
        expected = adamw_loop(params, grads, cosine)
    for key, value in expected.items():
        difference = np.abs(found[key] - value).max() / np.abs(value).max()
        assert difference <= tolerances.OPTIMIZER, key


def test_the_papers_learning_rate():
    rate = learning_rate(Settings())
    assert float(rate(0)) == float(rate(10_000)) == pytest.approx(0.01)
    assert float(rate(40_000)) == pytest.approx(0.005)


# --- Loss ----------------------------------------------------------------------------------------


def test_loss_is_cross_entropy_and_the_squared_normaliser():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 2, (2, 3, 7)), np.array([[1, 6, -100], [0, -100, 2]])
    normaliser = np.log(np.exp(logits).sum(-1))
    entropy = squares = 0.0
    for row in range(2):
        for place in range(3):
            if labels[row, place] != -100:
                entropy += normaliser[row, place] - logits[row, place, labels[row, place]]
                squares += normaliser[row, place] ** 2
    found = loss_sums(jnp.asarray(logits, jnp.float32), jnp.asarray(labels))
    assert np.allclose(found, (entropy, squares), rtol=1e-5)


def test_parts_of_a_batch_have_the_gradient_of_the_whole(tokenizer):
    model, settings = build(tokenizer, accumulation_steps=1)
    params, batch = model.initial(), make_batch(model)
    # Unequal rows: what is averaged over is the batch's labels, not the parts'.
    batch["labels"] = batch["labels"].at[0, 2:].set(-100)
    losses, whole = differentiate(model, settings, params, batch)
    split = dataclasses.replace(settings, accumulation_steps=4)
    parts_losses, parts = differentiate(model, split, params, batch)
    assert np.allclose(losses, parts_losses, atol=tolerances.LAYOUT_LOSS, rtol=0)
    for key, value in whole.items():
        difference = np.abs(parts[key] - value).max() / max(np.abs(value).max(), 1e-12)
        assert difference <= tolerances.LAYOUT_GRADIENTS, key


def test_scan_remat_and_bfloat16_compute_keep_float32_parameters(tokenizer):
    overrides = {**runs.MODEL, "num_layers": 3, "num_decoder_layers": 2}
    plain, _ = build(tokenizer, model_overrides=overrides, scan_layers=False)
    params, batch = plain.initial(), make_batch(plain)
    scanned, settings = build(tokenizer, model_overrides=overrides, scan_layers=True, remat=True)
    expected = differentiate(plain, settings, params, batch)
    found = differentiate(scanned, settings, params, batch)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        difference = np.abs(one - other).max() / max(np.abs(one).max(), 1e-12)
        assert difference <= tolerances.LAYOUT_GRADIENTS
    half, settings = build(tokenizer, dtype="bfloat16")
    start, train, _ = compile_steps(half, settings)
    state, metrics = train(start(), make_batch(half))
    assert all(value.dtype == jnp.float32 for value in state["params"].values())
    moments = [m for m in jax.tree.leaves(state["optimizer"]) if m.ndim]
    assert all(m.dtype == jnp.float32 for m in moments)
    assert half.logits(state["params"], make_batch(half), None).dtype == jnp.bfloat16


def test_training_learns_a_batch_and_counts(tokenizer):
    model, settings = build(tokenizer, warmup_steps=100, seed=3)
    start, train, evaluate = compile_steps(model, settings)
    state, batch, losses = start(), make_batch(model), []
    for _ in range(60):
        state, metrics = train(state, batch)
        losses.append(float(metrics["step_loss"]))
    assert losses[-1] < losses[0] - 1 and int(state["step"]) == 60 and int(state["skipped"]) == 0
    assert float(metrics["loss"]) == pytest.approx(np.mean(losses[-2:]), rel=1e-5)
    entropy, count = evaluate(state["params"], batch)
    assert int(count) == 24 and float(entropy) / 24 < losses[-2]
    assert train._cache_size() == 1


def test_dropout_follows_from_the_step(tokenizer):
    model, settings = build(tokenizer, dropout=True)
    params, batch = model.initial(), make_batch(model)
    one, same, other, dry = (
        float(differentiate(model, used, params, batch, step)[0][0])
        for used, step in (
            (settings, 1),
            (settings, 1),
            (settings, 2),
            (dataclasses.replace(settings, dropout=False), 1),
        )
    )
    assert one == same and len({one, other, dry}) == 3


# --- Bad steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_a_bad_step_is_counted_and_changes_nothing_else(tokenizer, name):
    model, settings = build(tokenizer, optimizer=name)
    start, train, _ = compile_steps(model, settings)
    state, _ = train(start(), make_batch(model))
    before = jax.tree.map(np.asarray, state)
    broken = make_batch(model)
    broken["labels"] = broken["labels"].at[0, 0].set(10**6)  # no row of the table: NaN
    state, metrics = train(state, broken)
    assert not np.isfinite(metrics["step_loss"]) and int(state["skipped"]) == 1
    assert int(state["step"]) == 2
    # The optimizer has made one step, and says the rate of its second.
    _, metrics = train(jax.tree.map(jnp.copy, state), make_batch(model))
    assert float(metrics["learning_rate"]) == float(learning_rate(settings)(1))
    for part in ("params", "optimizer", "average", "window"):
        for one, other in zip(
            jax.tree.leaves(before[part]), jax.tree.leaves(state[part]), strict=True
        ):
            assert np.array_equal(one, other), part


def test_a_spike_is_a_bad_step(tokenizer):
    model, settings = build(tokenizer, spike_threshold=0.5)
    start, train, _ = compile_steps(model, settings)
    state, metrics = train(start(), make_batch(model))
    for seed in range(3):
        state, metrics = train(state, make_batch(model, seed=seed))
    assert int(state["skipped"]) == 0
    state["average"] = state["average"] - 3
    state, metrics = train(state, make_batch(model))
    assert int(state["skipped"]) == 1


# --- Records -------------------------------------------------------------------------------------


def test_records_are_whole_lines_and_can_be_taken_back(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        lines.append({"step": step, "split": "train", "loss": float("nan") if step == 3 else 1.0})
    with open(lines.path, "a") as file:
        file.write('{"step": 6, "sp')  # the power went
    assert [record["step"] for record in read_records(lines.path)] == [1, 2, 3, 4, 5]
    assert read_records(lines.path)[2]["loss"] is None
    lines.keep_until(4)
    assert lines.path.read_text().count("\n") == 4 and "sp" in lines.path.read_text()
    lines.append({"step": 5, "split": "train", "loss": 1.0})
    assert [record["step"] for record in read_records(lines.path)] == [1, 2, 3, 4, 5]
    JsonLines(tmp_path / "other.jsonl", write=False).append({"step": 1})
    assert not (tmp_path / "other.jsonl").exists()


def test_tensorboard_has_the_records_where_it_is_installed(tmp_path, monkeypatch):
    seen = []

    class SummaryWriter:
        def __init__(self, folder):
            seen.append(folder)

        def add_scalar(self, name, value, step):
            seen.append((name, value, step))

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=SummaryWriter))
    Board(tmp_path, True).add({"step": 3, "split": "eval", "loss": 2.0})
    assert seen == [str(tmp_path), ("eval/loss", 2.0, 3)]
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # not installed
    Board(tmp_path, True).add({"step": 3, "split": "eval", "loss": 2.0})
    assert len(seen) == 2


def test_throughput_counts_steps_after_the_first():
    clock = Throughput(flops=10.0, peak=1e9)
    clock.step()
    assert clock.report(100) == {}
    clock.start()
    for _ in range(3):
        clock.step()
    found = clock.report(100)
    assert found["tokens_per_second"] == pytest.approx(100 / found["seconds_per_step"])
    used = 10.0 / found["seconds_per_step"] / 1e9
    assert found["flops_utilisation"] == pytest.approx(used)
    assert "flops_utilisation" not in Throughput(1.0, None).report(1)
    assert peak_flops() > 1e8
