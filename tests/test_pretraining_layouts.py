"""One device, eight devices, two processes of four devices: the same training."""

import signal
import socket
import time

import numpy as np
import pretraining_runs as runs
import pytest
import tolerances

EIGHT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
FOUR = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
MESH = {"data": -1, "fsdp": 2, "tensor": 2}


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    root = tmp_path_factory.mktemp("layouts")
    fields = {
        "data_dir": str(runs.make_data(root / "data")),
        "tokenizer": str(runs.make_tokenizer(root / "tokenizer.json")),
        "batch_size": 8,
        "train_steps": 1,
        "optimizer": "adafactor",
        "warmup_steps": 10_000,
        "dropout": False,
    }
    return root, fields


def _one(root, name, fields, **environment):
    log = root / f"log-{name}"
    assert runs.run(runs.arguments(root / name, **fields), log, **environment) == 0, log.read_text()
    return root / name


def _start_two(root, name, fields):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    processes = []
    for number in range(2):
        options = ["--coordinator", coordinator, "--num_processes", "2"]
        options += ["--process_id", str(number)]
        command = runs.arguments(root / name, options, mesh=MESH, **fields)
        processes.append(runs.launch(command, root / f"log-{name}-{number}", **FOUR))
    return processes


def _two(root, name, fields):
    processes = _start_two(root, name, fields)
    for number, process in enumerate(processes):
        process.join()
        assert process.exitcode == 0, (root / f"log-{name}-{number}").read_text()[-4000:]
    return root / name


def _difference(one, other, step, part=""):
    """The largest difference of a checkpoint's arrays, each relative to its largest entry."""
    found, expected = runs.final_state(one, step), runs.final_state(other, step)
    assert found.keys() == expected.keys()
    return max(
        np.abs(found[name] - value).max() / max(np.abs(value).max(), 1e-30)
        for name, value in expected.items()
        if name != "run" and part in name and np.issubdtype(value.dtype, np.floating)
    )


def _losses(workdir):
    return np.array([record["loss"] for record in runs.records(workdir)])


def test_eight_devices_take_the_first_step_of_one(setup):
    """AdamW's first moment after a step is a tenth of the (clipped) gradient."""
    root, fields = setup
    fields = {**fields, "optimizer": "adamw", "warmup_steps": 1, "train_steps": 2}
    fields["checkpoint_every"] = 1
    one = _one(root, "one", fields)
    eight = _one(root, "eight", {**fields, "mesh": MESH, "accumulation_steps": 2}, **EIGHT)
    assert np.abs(_losses(one)[0] - _losses(eight)[0]) <= tolerances.LAYOUT_LOSS
    assert _difference(eight, one, 1, "'mu'") <= tolerances.LAYOUT_GRADIENTS
    assert runs.records(one, "rows.jsonl") == runs.records(eight, "rows.jsonl")


@pytest.mark.slow
def test_two_processes_take_the_first_step_of_one(setup):
    root, fields = setup
    fields = {**fields, "optimizer": "adamw", "warmup_steps": 1, "train_steps": 2}
    fields["checkpoint_every"] = 1
    one = _one(root, "one-of-two", fields)
    two = _two(root, "two", fields)
    assert np.abs(_losses(one)[0] - _losses(two)[0]) <= tolerances.LAYOUT_LOSS
    assert _difference(two, one, 1, "'mu'") <= tolerances.LAYOUT_GRADIENTS


@pytest.mark.slow
def test_fifty_steps_in_float64_are_the_same_everywhere(setup):
    """Also resumed from one layout to the next, and with exports on every process."""
    root, fields = setup
    fields = {**fields, "dtype": "float64", "train_steps": 50, "checkpoint_every": 10}
    one = _one(root, "double-one", fields)
    eight = _one(root, "double-eight", {**fields, "mesh": MESH}, **EIGHT)
    two = _two(root, "double-two", fields)
    for other in (eight, two):
        assert np.abs(_losses(other) - _losses(one)).max() <= tolerances.LAYOUT_FLOAT64
        assert _difference(other, one, 50) <= tolerances.LAYOUT_FLOAT64
    mixed = _two(root, "double-mixed", {**fields, "train_steps": 20})
    _one(root, "double-mixed", {**fields, "train_steps": 35, "mesh": MESH}, **EIGHT)
    _one(root, "double-mixed", fields)
    kept = [
        np.array([r["loss"] for r in runs.records(w) if r["split"] == "train"])
        for w in (mixed, one)
    ]
    assert np.abs(kept[0] - kept[1]).max() <= tolerances.LAYOUT_FLOAT64
    assert _difference(mixed, one, 50) <= tolerances.LAYOUT_FLOAT64
    # Of two processes, the first writes down its own half of each batch.
    halves, whole = runs.records(mixed, "rows.jsonl"), runs.records(one, "rows.jsonl")
    assert [len(record["rows"]) for record in halves] == [4] * 20 + [8] * 30
    for half, record in zip(halves, whole, strict=True):
        assert half == {**record, "rows": record["rows"][: len(half["rows"])]}


@pytest.mark.slow
def test_a_termination_of_one_process_saves_both(setup):
    root, fields = setup
    fields = {**fields, "train_steps": 2000, "checkpoint_every": 1000, "eval_every": 0}
    workdir = root / "terminated"
    processes = _start_two(root, "terminated", fields)
    limit = time.monotonic() + 300
    while len(runs.records(workdir)) < 3 and time.monotonic() < limit:
        time.sleep(0.05)
    processes[1].terminate()
    for number, process in enumerate(processes):
        process.join()
        log = (root / f"log-terminated-{number}").read_text()[-3000:]
        assert process.exitcode == 75, (signal.SIGTERM, process.exitcode, log)
    last = runs.records(workdir)[-1]["step"]
    fields["train_steps"] = last + 2
    _two(root, "terminated", fields)
    whole = _two(root, "unterminated", fields)
    assert runs.records(workdir) == runs.records(whole)
