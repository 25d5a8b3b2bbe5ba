"""Killed and pre-empted runs end as if nothing had happened, to the bit."""

import os
import random
import signal
import time

import numpy as np
import pretraining_runs as runs
import pytest

from pretraining.settings import Settings
from pretraining.train import Preemption, set_up, train

STEPS = 24
SECONDS = 300  # a process that gets nowhere in this time has failed


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """Data, the settings of the run, and the run without interruption."""
    root = tmp_path_factory.mktemp("resume")
    fields = {
        "data_dir": str(runs.make_data(root / "data")),
        "tokenizer": str(runs.make_tokenizer(root / "tokenizer.json")),
        "train_steps": STEPS,
    }
    log = root / "log"
    assert runs.run(runs.arguments(root / "whole", **fields), log) == 0, log.read_text()
    return root, fields, root / "whole"


def _wait_for(condition, process, log):
    """True once the condition holds, False if the process ended before."""
    limit = time.monotonic() + SECONDS
    while time.monotonic() < limit:
        if condition():
            return True
        if not process.is_alive():
            return False
        time.sleep(0.002)
    process.kill()
    raise AssertionError(f"nothing in {SECONDS} s: {log.read_text()[-3000:]}")


def _last_step(workdir):
    found = runs.records(workdir)
    return found[-1]["step"] if found else -1


def _writing(workdir):
    return any("tmp" in name for name in os.listdir(workdir / "checkpoints"))


def interrupt(fields, workdir, log, plan, seed=0):
    """Start the run again and again, and end it at moments of the plan; then let it finish.

    plan: "kill" at a random moment, "write" during the writing of a checkpoint, or "term".
    Returns the steps at which it was ended.
    """
    rng, ended = random.Random(seed), []
    for kind in plan:
        process = runs.launch(runs.arguments(workdir, **fields), log)
        target = _last_step(workdir) + rng.randint(1, 3)
        alive = _wait_for(lambda t=target: _last_step(workdir) >= t, process, log)
        if kind == "write":
            alive = alive and _wait_for(lambda: _writing(workdir), process, log)
        elif alive:
            time.sleep(rng.random() * 0.1)
        os.kill(process.pid, signal.SIGTERM if kind == "term" else signal.SIGKILL)
        process.join()
        if process.exitcode == 0:
            break
        expected = 75 if kind == "term" else -signal.SIGKILL
        assert process.exitcode == expected, log.read_text()[-3000:]
        ended.append((kind, _last_step(workdir)))
    assert runs.run(runs.arguments(workdir, **fields), log) == 0, log.read_text()[-3000:]
    return ended


def assert_same(workdir, whole, steps):
    assert runs.records(workdir) == runs.records(whole)
    assert runs.records(workdir, "rows.jsonl") == runs.records(whole, "rows.jsonl")
    found, expected = runs.final_state(workdir, steps), runs.final_state(whole, steps)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = found[name] == value if name == "run" else np.array_equal(found[name], value)
        assert same, name


def test_every_row_is_read_once_an_epoch(setup):
    _, _, whole = setup
    rows = [row for record in runs.records(whole, "rows.jsonl") for row in record["rows"]]
    epoch = rows[: len(set(rows))]
    assert len(rows) == STEPS * 4 and sorted(epoch) == sorted(set(rows))


def test_a_run_that_is_killed_ends_as_if_it_was_not(setup):
    root, fields, whole = setup
    workdir = root / "killed"
    ended = interrupt(fields, workdir, root / "log-killed", ["kill", "write", "term"])
    assert len(ended) == 3, ended
    assert_same(workdir, whole, STEPS)


@pytest.mark.slow
def test_twenty_kills_and_five_terminations(setup):
    root, fields, _ = setup
    fields = {**fields, "train_steps": 120}
    log = root / "log-many"
    assert runs.run(runs.arguments(root / "long", **fields), log) == 0, log.read_text()
    plan = ["kill", "write", "kill", "term", "write"] * 5
    ended = interrupt(fields, root / "many", log, plan, seed=1)
    kinds = [kind for kind, _ in ended]
    assert kinds.count("term") == 5 and len(kinds) == 25, ended
    assert_same(root / "many", root / "long", 120)


def test_the_loop_waits_for_the_devices(setup, tmp_path):
    """A pre-emption saves at most two steps later, however seldom the run logs."""
    root, fields, _ = setup
    fields = {**runs.FAST, **fields, "train_steps": 6, "log_every": 6, "eval_every": 0}
    run = set_up(Settings(**{**fields, "checkpoint_every": 6}), tmp_path / "run")
    step, started, finished = run.train, [], []

    class Loss:
        def block_until_ready(self):
            finished.append(self)

    def watched(state, batch):
        assert len(started) - len(finished) <= 2
        state, metrics = step(state, batch)
        started.append(Loss())
        return state, metrics if len(started) == 6 else {**metrics, "loss": started[-1]}

    run.train = watched
    assert train(run, Preemption()) == 0
    assert finished == started[: len(finished)] and len(started) == 6


def test_the_same_command_on_a_finished_run_changes_nothing(setup):
    root, fields, whole = setup
    before = (whole / "metrics.jsonl").read_bytes()
    command = runs.arguments(whole, ["--export", str(root / "hub")], **fields)
    assert runs.run(command, root / "log") == 0
    assert (whole / "metrics.jsonl").read_bytes() == before
    assert (root / "hub" / "model.safetensors").is_file()
