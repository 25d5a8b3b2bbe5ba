"""The training loop: batches in, steps, records and checkpoints out.

What a run has written is always a prefix of what the whole run writes: records up to a step are on
disk before the checkpoint of that step, and a run that is taken up first drops those after it.
"""

import inspect
import json
import signal
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from modeling_convt5 import ConvT5Config

from .checkpointing import Checkpoints
from .export import Export
from .input_pipeline import Batches
from .main import PREEMPTED
from .metrics import Board, JsonLines, Throughput, model_flops, peak_flops
from .prepare import prepare
from .records import is_prepared, read_manifest
from .settings import Settings, digest
from .step import (
    Model,
    abstract_state,
    compile_steps,
    host_places,
    make_mesh,
    model_config,
    to_devices,
)
from .tokens import TokenizerFile, open_tokenizer

FINISHED = 0
# Rewinds to one checkpoint before the run gives up: the fault is not in the batches then.
_MAX_REWINDS = 3
# Steps that wait in the devices' queue: one keeps them busy. The loop would run ahead by up to
# log_every steps, which a pre-emption, given half a minute or so, had to wait for before saving.
_QUEUED = 2


class BadStep(RuntimeError):
    """A loss or gradient that is not finite, or a spike, where the policy is to stop."""


class Preemption:
    """Notices SIGTERM: at once before training, between two steps while training.

    With several processes JAX's coordinator agrees on a step for all of them.
    """

    def __init__(self):
        self.training = self.noticed = False
        self.calls = 0

    def __enter__(self):
        if jax.process_count() == 1:
            self.before = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, *error):
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self.before)

    def _notice(self, signum, frame):
        if not self.training:
            raise SystemExit(PREEMPTED)  # nothing is lost: preparing goes on where it stopped
        self.noticed = True

    def reached(self) -> bool:
        """Whether to save and leave after this step; every process calls it after every step."""
        self.calls += 1  # unlike the step, it never goes back
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(self.calls)
        return self.noticed


@dataclass
class Run:
    """Everything that the loop uses, ready to go.

    Attributes:
        settings, workdir, model, checkpoints, export: of the run.
        start, train, evaluate: compiled steps.
        batches, validation: of the two splits; the latter None without evaluation.
        abstract: shapes, dtypes and shardings of the state.
        records, rows, board: metrics.jsonl, rows.jsonl or None, TensorBoard's files.
    """

    settings: Settings
    model: Model
    checkpoints: Checkpoints
    export: Export | None
    start: Callable
    train: Callable
    evaluate: Callable
    batches: Batches
    validation: Batches | None
    abstract: dict
    records: JsonLines
    rows: JsonLines | None
    board: Board

    def to_devices(self, batch: dict) -> dict:
        mesh, size = self.model.mesh, self.settings.batch_size
        return to_devices(batch, self.batches.places, mesh, size)


def set_up(
    settings: Settings, workdir: Path, export_to: str | None = None, repository: str | None = None
) -> Run:
    """Check the settings, prepare the data if they are raw, build the model, compile nothing yet.

    Raises:
        ValueError: for whatever does not fit, before anything is trained.
    """
    tokenizer = open_tokenizer(settings.tokenizer)
    mesh = make_mesh(settings)
    config = model_config(settings, tokenizer)
    model = Model(config, settings, mesh)
    make_workdir(workdir)
    records = find_records(settings, tokenizer, workdir)
    places = host_places(mesh, settings.batch_size)
    batches, validation = (
        Batches(settings, tokenizer, records, split, places)
        if split == "train" or settings.eval_every
        else None
        for split in ("train", "validation")
    )
    made_of = {
        **settings.fingerprint(),
        "model_config": model_digest(config),
        "tokenizer_sha256": tokenizer.sha256,
        "records": digest(read_manifest(records)["splits"]["train"]),
    }
    made_of = json.loads(json.dumps(made_of))  # as it will be read back
    checkpoints = Checkpoints(workdir / "checkpoints", settings.keep_last, made_of)
    start, train, evaluate = compile_steps(model, settings)
    first = jax.process_index() == 0
    if first:
        epochs = settings.train_steps * settings.batch_size / len(batches.rows)
        print(
            f"{config.num_parameters():,} parameters; {len(batches.rows):,} rows, read "
            f"{epochs:.2f} times; mesh {dict(mesh.shape)}",
            file=sys.stderr,
        )
    export = None
    if export_to is not None or repository is not None:
        export = Export(model, settings, tokenizer, workdir, export_to, repository)
    return Run(
        settings=settings,
        model=model,
        checkpoints=checkpoints,
        export=export,
        start=start,
        train=train,
        evaluate=evaluate,
        batches=batches,
        validation=validation,
        abstract=abstract_state(model, settings),
        records=JsonLines(workdir / "metrics.jsonl", first),
        rows=JsonLines(workdir / "rows.jsonl", first) if settings.log_rows else None,
        board=Board(workdir / "tensorboard", first),
    )


def make_workdir(workdir: Path) -> None:
    """Create it.

    Raises:
        ValueError: if it is a file or a bucket.
    """
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir {workdir} is a file: expected a folder, or nothing yet.")
    if ":/" in str(workdir):
        raise ValueError(
            f"--workdir {workdir}: expected a folder of a file system that all hosts share. Mount "
            "the bucket or a network disk (docs/tpu.md)."
        )
    workdir.mkdir(parents=True, exist_ok=True)


def model_digest(config: ConvT5Config) -> str:
    """The same for the same model, whichever release of transformers describes it."""
    ours = [name for name in inspect.signature(ConvT5Config.__init__).parameters if name != "self"]
    fields = {name: getattr(config, name) for name in ours if name != "kwargs"}
    return digest(json.dumps(fields, sort_keys=True))


def find_records(settings: Settings, tokenizer: TokenizerFile, workdir: Path) -> str:
    """The folder of records: `data_dir`, or made from it in the work directory.

    Raises:
        ValueError: if there are no data, or if another tokenizer wrote the records.
    """
    if not settings.data_dir:
        raise ValueError(
            "Settings.data_dir is not set: pass --override data_dir=FOLDER, a folder with text or "
            "with records of `python -m pretraining.prepare`."
        )
    folder = settings.data_dir
    if not is_prepared(folder):
        folder = str(workdir / "records")
        if jax.process_index() == 0:
            prepare(settings.data_dir, str(tokenizer.path), folder)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("records")
    written = read_manifest(folder)["tokenizer_sha256"]
    if written != tokenizer.sha256:
        raise ValueError(
            f"{folder} was written with another tokenizer (sha256 {written[:12]}...) than "
            f"{tokenizer.path} ({tokenizer.sha256[:12]}...). Use that one, or prepare the text "
            "again."
        )
    return folder


def train(run: Run, preemption: Preemption) -> int:
    """Train to the last step, from the last checkpoint if there is one; returns the exit code."""
    settings, checkpoints = run.settings, run.checkpoints
    data = iter(run.batches)
    state, step = begin(run, data)
    clock = Throughput(
        settings.batch_size
        * model_flops(run.model.config, settings.inputs_length, settings.targets_length),
        peak_flops(),
    )
    show = jax.process_index() == 0 and sys.stderr.isatty()
    bar = tqdm(initial=step, total=settings.train_steps, unit="step", disable=not show)
    skipped, rewinds, stopped, queue = int(state["skipped"]), 0, False, deque()
    preemption.training = True
    while step < settings.train_steps and not stopped:
        batch = next(data)
        state, metrics = run.train(state, run.to_devices(batch))
        step += 1
        queue.append(metrics["loss"])
        if len(queue) > _QUEUED:
            jax.block_until_ready(queue.popleft())
        clock.step()
        bar.update()
        last = step == settings.train_steps
        stopped = preemption.reached()
        save = last or stopped or step % settings.checkpoint_every == 0
        log = last or step % settings.log_every == 0
        if run.rows is not None:
            run.rows.append({"step": step, "rows": batch["rows"].tolist()})
        if log or save:
            before, skipped = skipped, int(metrics["skipped"])
            if skipped > before and settings.on_bad_step != "skip":
                state, step, rewinds = rewind(run, step, metrics, rewinds)
                skipped, bar.n = before, step
                clock.start()
                continue
        if log:
            record_step(run, step, metrics, clock, bar)
        if last or (settings.eval_every and step % settings.eval_every == 0):
            evaluate(run, step, state)
        if save:
            keep(run, step, state, data)
            rewinds = 0
        if run.export and not last and settings.export_every and step % settings.export_every == 0:
            run.export.write(state["params"], step, last=False)
        if log or save:
            clock.start()
    bar.close()
    checkpoints.wait()
    if step < settings.train_steps:
        return PREEMPTED
    if run.export:
        run.export.write(state["params"], step)
    return FINISHED


def begin(run: Run, data) -> tuple[dict, int]:
    """The state to go on from, and its step; `data` is put where that step left it."""
    step = run.checkpoints.latest()
    if step is None:
        state, step = run.start(), 0
        run.checkpoints.save(0, state, data.get_state())  # to rewind to, and to find a full disk
        run.checkpoints.wait()
    else:
        run.checkpoints.check(step)
        state, place = run.checkpoints.restore(step, run.abstract)
        data.set_state(place)
        if jax.process_index() == 0:
            print(f"Going on from the checkpoint of step {step:,}.", file=sys.stderr)
    for lines in (run.records, run.rows):
        if lines is not None:
            lines.keep_until(step)
    return state, step


def rewind(run: Run, step: int, metrics: dict, rewinds: int) -> tuple[dict, int, int]:
    """The last checkpoint's state, without its place in the data: the bad batches are behind.

    Returns the state, its step, and the number of rewinds to it.

    Raises:
        BadStep: if the policy is to stop, or if rewinding does not help.
    """
    if run.settings.on_bad_step == "stop" or rewinds == _MAX_REWINDS:
        raise stop(run, step, metrics)
    step = run.checkpoints.latest()
    state, _ = run.checkpoints.restore(step, run.abstract)
    for lines in (run.records, run.rows):
        if lines is not None:
            lines.keep_until(step)
    return state, step, rewinds + 1


def stop(run: Run, step: int, metrics: dict) -> BadStep:
    """The error that ends a run; the last good checkpoint stays the last."""
    kept = run.checkpoints.latest()
    return BadStep(
        f"At or shortly before step {step} the loss ({float(metrics['step_loss'])}) or the "
        f"gradient (norm {float(metrics['gradient_norm'])}) was not finite, or the loss a spike. "
        f"The step was not applied; the last checkpoint is that of step {kept}. Go on with "
        "--override on_bad_step=skip or on_bad_step=rewind, or lower the learning rate."
    )


def record_step(run: Run, step: int, metrics: dict, clock: Throughput, bar) -> None:
    """Write a record of the training split, and show it."""
    values = {key: np.asarray(value).item() for key, value in jax.device_get(metrics).items()}
    figures = clock.report(values["tokens"])
    epoch = step * run.settings.batch_size / len(run.batches.rows)
    record = {"step": step, "split": "train", **values, "epoch": epoch, **figures}
    run.records.append(record)
    run.board.add(record)
    bar.set_postfix(
        {
            "loss": f"{values['loss']:.3f}",
            "tokens/s": f"{figures.get('tokens_per_second', 0):,.0f}",
            "s/step": f"{figures.get('seconds_per_step', 0):.3f}",
            "MFU": f"{100 * figures.get('flops_utilisation', 0):.0f} %",
        }
    )


def evaluate(run: Run, step: int, state: dict) -> None:
    """The mean loss of the validation split, the same batches and noise each time."""
    if run.validation is None:
        return
    total = count = 0.0
    for batch in run.validation:
        entropy, labels = run.evaluate(state["params"], run.to_devices(batch))
        total, count = total + float(entropy), count + float(labels)
    record = {"step": step, "split": "eval", "loss": total / count, "targets": int(count)}
    run.records.append(record)
    run.board.add(record)


def keep(run: Run, step: int, state: dict, data) -> None:
    """Begin a checkpoint, once everything it stands for is on disk."""
    for lines in (run.records, run.rows):
        if lines is not None:
            lines.sync()
    run.checkpoints.save(step, state, data.get_state())
