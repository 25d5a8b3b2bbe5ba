"""examples/finetune.py: every task from end to end, ways of answering, resuming, refusing."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from task_files import make_tokenizer, save_tiny_model, write_csv, write_jsonl, write_task

from evaluation import run as evaluation_run
from evaluation.data import Data, load
from evaluation.results import read_results
from evaluation.splits import arrange, some_of
from evaluation.tasks import ANSWERED_BY, TASKS, get_task
from examples import finetune

ROOT = Path(finetune.__file__).parents[1]
QUICK = ["--max_steps", "2", "--disable_tqdm", "true", "--use_cpu", "true"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of every task, in one folder."""
    root = tmp_path_factory.mktemp("files")
    for name in TASKS:
        write_task(root / name, name)
    return root


@pytest.fixture(scope="module")
def folder(files, tmp_path_factory):
    """A tiny model that knows every word of them."""
    texts = []
    for task in TASKS.values():
        texts += task.words
        for rows in load(task, files).rows.values():
            texts += [task.input_text(row) for row in rows]
            texts += [task.target_text(row) for row in rows if row["label"] is not None]
    torch.manual_seed(0)
    return save_tiny_model(tmp_path_factory.mktemp("model"), texts)


def run(task, model, output, *more, data=None):
    arguments = ["--task", task, "--model", str(model), "--output_dir", str(output)]
    arguments += ["--data_dir", str(data)] if data else []
    return finetune.main([*arguments, *QUICK, *map(str, more)])


@pytest.mark.parametrize("name", [name for name in TASKS if name not in ANSWERED_BY])
def test_every_task(name, files, folder, tmp_path):
    assert run(name, folder, tmp_path, data=files) == 0
    (record,) = read_results(tmp_path / "results.json")
    task = get_task(name)
    assert record["task"] == name and set(task.metrics) <= set(record["metrics"])
    assert set(record["rows"]) >= set(task.rows) | {"validation"}
    for metric in record["metrics"].values():
        assert len(metric["per_seed"]) == 1 and -1 <= metric["mean"] <= 1
    # The saved model answers as the one that was trained.
    split = record["evaluated_on"]
    arguments = ["--model", str(tmp_path), "--tasks", name, "--data_dir", str(files)]
    output = ["--output_dir", str(tmp_path / "again"), "--splits"]
    if split not in load(task, files).rows:
        return
    assert evaluation_run.main([*arguments, *output, split]) == 0
    (again,) = read_results(tmp_path / "again" / "results.json")
    for metric in task.metrics:
        # bfloat16 nowhere: the same weights, the same rows.
        assert again["metrics"][metric] == record["metrics"][metric]


@pytest.mark.parametrize("name", ANSWERED_BY)
def test_diagnostic_sets_are_answered_by_another_tasks_model(name, files, folder, tmp_path, capsys):
    assert run(name, folder, tmp_path, data=files) == 2
    assert f"a model of {ANSWERED_BY[name]}: use evaluation.run" in capsys.readouterr().err
    arguments = ["--model", str(folder), "--tasks", name, "--data_dir", str(files)]
    assert evaluation_run.main([*arguments, "--output_dir", str(tmp_path)]) == 0
    lines = (tmp_path / name / "predictions_test.jsonl").read_text().splitlines()
    assert len(lines) == 12


def test_seeds_are_summarised_and_a_second_run_trains_nothing(files, folder, tmp_path):
    assert run("sst2", folder, tmp_path, "--seeds", 0, 1, data=files) == 0
    (record,) = read_results(tmp_path / "results.json")
    assert len(record["metrics"]["accuracy"]["per_seed"]) == 2 and record["seeds"] == [0, 1]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("seed_*/model/*")}
    assert run("sst2", folder, tmp_path, "--seeds", 0, 1, 2, data=files) == 0
    assert len(read_results(tmp_path / "results.json")[0]["seeds"]) == 3
    for path, changed in before.items():
        assert path.stat().st_mtime_ns == changed
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert "model.safetensors" in names and not any(n.endswith((".bin", ".pt")) for n in names)
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_evaluations_may_be_a_share_of_the_steps(files, folder, tmp_path):
    assert run("sst2", folder, tmp_path, "--eval_steps", 0.5, data=files) == 0
    history = json.loads((tmp_path / "seed_0" / "metrics.json").read_text())["history"]
    assert [entry["step"] for entry in history if "eval_accuracy" in entry] == [1, 2]


def test_another_run_in_the_same_folder_is_refused(files, folder, tmp_path, capsys):
    assert run("sst2", folder, tmp_path, data=files) == 0
    assert run("sst2", folder, tmp_path, "--learning_rate", 0.5, data=files) == 2
    assert "learning_rate was 0.001, is 0.5" in capsys.readouterr().err
    write_task(tmp_path / "sst2", "sst2", 12)
    assert run("sst2", folder, tmp_path / "out", data=tmp_path) == 0
    write_task(tmp_path / "sst2", "sst2", 20)
    assert run("sst2", folder, tmp_path / "out", data=tmp_path) == 2
    assert "(rows_sha256 was " in capsys.readouterr().err


def test_a_mistyped_model_does_not_take_the_folder(files, folder, tmp_path):
    assert run("sst2", tmp_path / "none", tmp_path / "out", data=files) == 2
    assert run("sst2", folder, tmp_path / "out", data=files) == 0


def test_it_learns(tmp_path):
    write_task(tmp_path / "files", "imdb", 200)
    task = get_task("imdb")
    texts = [*task.words]
    for rows in load(task, tmp_path / "files").rows.values():
        texts += [task.input_text(row) for row in rows]
    make_tokenizer(texts).save_pretrained(tmp_path / "tokenizer")
    more = ["--tokenizer", tmp_path / "tokenizer", "--max_steps", 60, "--learning_rate", 0.01]
    more += ["--per_device_train_batch_size", 16, "--config_overrides", "dropout_rate=0.0"]
    out = tmp_path / "out"
    assert run("imdb", "lightweight-tiny", out, *more, data=tmp_path / "files") == 0
    (record,) = read_results(out / "results.json")
    assert record["metrics"]["accuracy"]["mean"] > 0.95
    assert record["rows"] == {"train": 180, "validation": 20, "test": 200}


def test_rows_are_grouped_by_length(folder, tmp_path, monkeypatch):
    batches, collate = [], finetune.Collator.__call__

    def seen(self, rows):
        batches.append([len(row["input_ids"]) for row in rows])
        return collate(self, rows)

    monkeypatch.setattr(finetune.Collator, "__call__", seen)
    rows = [{"text": "good " * (1 + i), "label": ("good", "bad")[i % 2]} for i in range(40)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    more = ["--train_sampling_strategy", "group_by_length", "--per_device_train_batch_size", 4]
    more += ["--train_file", tmp_path / "rows.jsonl"]
    assert run("custom", folder, tmp_path / "out", *more) == 0
    assert all(batch == sorted(batch, reverse=True) for batch in batches)
    assert max(batches[0]) > 30  # Trainer begins with the longest


@pytest.mark.parametrize(
    ("task", "method"),
    [
        ("sst2", "head"),
        ("stsb", "head"),
        ("squad", "head"),
        ("sst2", "generate"),
        ("ag_news", "head"),
    ],
)
def test_other_ways_of_answering(task, method, files, folder, tmp_path):
    assert run(task, folder, tmp_path, "--method", method, data=files) == 0
    (record,) = read_results(tmp_path / "results.json")
    assert record["method"] == method
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    if method == "head":
        head = "QuestionAnswering" if task == "squad" else "SequenceClassification"
        assert config["architectures"] == [f"ConvT5For{head}"]
    if task == "ag_news":  # the pipelines' labels
        assert config["id2label"] == {
            "0": "world",
            "1": "sports",
            "2": "business",
            "3": "technology",
        }


# PEFT asks the model by the name that transformers 5 gives up.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_lora_is_merged_into_the_saved_model(files, folder, tmp_path):
    assert run("sst2", folder, tmp_path, "--lora_rank", 2, data=files) == 0
    names = set(load_file(tmp_path / "model" / "model.safetensors"))
    assert names == set(load_file(folder / "model.safetensors"))


def test_a_file_of_ones_own(tmp_path):
    rows = [
        {"review": f"{word} film", "mood": mood} for word, mood in (("good", "up"), ("bad", "down"))
    ]
    write_jsonl(tmp_path / "train.jsonl", rows * 10)
    write_csv(tmp_path / "test.csv", [row.values() for row in rows], ["review", "mood"])
    save_tiny_model(tmp_path / "model", ["good bad film up down"])
    columns = ["--text_column", "review", "--label_column", "mood"]
    named = ["--train_file", tmp_path / "train.jsonl", "--test_file", tmp_path / "test.csv"]
    assert run("custom", tmp_path / "model", tmp_path / "out", *named, *columns) == 0
    (record,) = read_results(tmp_path / "out" / "results.json")
    assert record["rows"] == {"train": 18, "validation": 2, "test": 2}
    assert set(record["metrics"]) == {"accuracy", "macro_f1", "validation_accuracy"}
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert config["id2label"] == {"0": "down", "1": "up"}
    assert run("custom", tmp_path / "model", tmp_path / "other", *columns) == 2


def test_a_yaml_file_and_what_overrides_it(files, folder, tmp_path):
    text = f"task: sst2\nmodel: {folder}\ndata_dir: {files}\noutput_dir: {tmp_path / 'out'}\n"
    text += "seeds: [3, 4]\nmax_steps: 7\nlearning_rate: 1.0e-4\nbf16: false\n"
    (tmp_path / "run.yaml").write_text(text)
    args, training = finetune.parse([str(tmp_path / "run.yaml"), "--max_steps", "2"])
    assert (args.seeds, training.max_steps, training.learning_rate) == ([3, 4], 2, 1e-4)
    assert finetune.main([str(tmp_path / "run.yaml"), *QUICK]) == 0
    (tmp_path / "run.yaml").write_text("task")
    assert finetune.main([str(tmp_path / "run.yaml")]) == 2
    (tmp_path / "run.yaml").write_text(text + "lerning_rate: 1\n")
    with pytest.raises(ValueError, match="lerning_rate"):
        finetune.parse([str(tmp_path / "run.yaml")])


def test_the_papers_defaults(tmp_path):
    _, training = finetune.parse(["--task", "sst2", "--model", "m", "--output_dir", str(tmp_path)])
    assert (training.optim, training.lr_scheduler_type) == ("adafactor", "constant")
    assert training.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "head"], "method='head' does not answer task 'cogs'"),
        (["--config_overrides", "dropout"], "write name=value"),
        (["--seed", "5"], "--seed has no effect here: use --seeds"),
        (["--resume_from_checkpoint", "x"], "goes on by itself"),
        (["--predict_with_generate", "true"], "use --method generate"),
        (["--train_file", "a.tsv"], "task='cogs' takes no --train_file"),
        (["--label_smoothing_factor", "0.1"], "has no effect here: the loss is the model's own"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps 0: expected"),
        (["--max_steps", "-1", "--num_train_epochs", "0"], "expected more than 0, or --max_steps"),
        (["--learning_rate", "nan"], "--learning_rate nan: expected a number, 0 or more"),
        (["--max_train_rows", "-1"], "max_train_rows=-1: expected 1 or more rows"),
        (["--max_test_rows", "0"], "max_test_rows=0: expected 1 or more rows"),
    ],
)
def test_refusals(files, folder, tmp_path, capsys, more, message):
    assert run("cogs", folder, tmp_path, *more, data=files) == 2
    assert message in capsys.readouterr().err
    assert run("cogs", "lightweight-tiny", tmp_path / "other", data=files) == 2
    assert "pass --tokenizer" in capsys.readouterr().err


def test_each_row_has_one_purpose():
    rows = [{"sentence": str(i), "label": i % 2} for i in range(40)]
    hidden = [{"sentence": "x", "label": None}]
    task = get_task("sst2")

    def split(**given):
        data = Data({name: list(some) for name, some in given.items()})
        return arrange(task, data), data.notes

    found, _ = split(train=rows[:20], validation=rows[20:30], test=rows[30:])
    assert (len(found.train), len(found.selection)) == (20, 10) and set(found.final) == {"test"}
    found, notes = split(train=rows[:20], validation=rows[20:], test=hidden)
    assert (len(found.train), len(found.selection)) == (18, 2)
    assert set(found.final) == {"validation", "test"} and "2 training rows held out" in notes[0]
    found, notes = split(train=rows, test=hidden)
    sizes = {name: len(some) for name, some in found.final.items()}
    assert sizes == {"test": len(hidden), "held_out": 3}
    found, notes = split(train=rows)
    assert [len(x) for x in (found.train, found.selection, found.final["test"])] == [33, 4, 3]
    seen = [row["sentence"] for row in (*found.train, *found.selection, *found.final["test"])]
    assert sorted(seen) == sorted(row["sentence"] for row in rows)
    # Official files may be sorted by label: a part of them is a sample, in their order.
    part = some_of(rows, 7)
    places = [rows.index(row) for row in part]
    assert len(part) == 7 and places == sorted(places) != list(range(7))
    assert part == some_of(rows, 7) and some_of(rows, None) == some_of(rows, 99) == rows
    with pytest.raises(ValueError, match="too few"):
        split(train=rows[:1])


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def test_killed_and_resumed_equals_uninterrupted(files, folder, tmp_path):
    more = ["--max_steps", "60", "--eval_steps", "10", "--patience", "100"]
    more += ["--per_device_train_batch_size", "4"]
    assert run("sst2", folder, tmp_path / "whole", *more, data=files) == 0
    arguments = ["--task", "sst2", "--model", str(folder), "--data_dir", str(files)]
    command = [sys.executable, str(ROOT / "examples" / "finetune.py"), *arguments, *QUICK, *more]
    process = subprocess.Popen(
        [*command, "--output_dir", str(tmp_path / "parts")],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoints = tmp_path / "parts" / "seed_0" / "checkpoints"
    while not list(checkpoints.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "parts" / "results.json").exists()
    assert run("sst2", folder, tmp_path / "parts", *more, data=files) == 0
    whole, parts = (
        read_results(tmp_path / name / "results.json")[0] for name in ("whole", "parts")
    )
    assert whole["metrics"] == parts["metrics"]
    first, second = (
        load_file(tmp_path / n / "model" / "model.safetensors") for n in ("whole", "parts")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
def test_two_processes_equal_one(files, folder, tmp_path):
    """The same global batch: losses of 20 steps within 1e-5, the same metrics."""
    losses = {}
    arguments = ["--task", "sst2", "--model", str(folder), "--data_dir", str(files)]
    arguments += ["--max_steps", "20", "--eval_steps", "10", "--logging_steps", "1"]
    # Losses of 13 are known to 1e-6; large steps would multiply what rounding leaves there.
    arguments += ["--learning_rate", "1e-4"]
    # Of an epoch's last rows, fewer than a batch, accelerate gives some to both processes.
    arguments += ["--use_cpu", "true", "--disable_tqdm", "true", "--dataloader_drop_last", "true"]
    for processes in (1, 2):
        output = tmp_path / str(processes)
        # `accelerate launch` starts one process on a CPU, whatever --num_processes says.
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        batch = ["--per_device_train_batch_size", str(4 // processes)]
        done = subprocess.run(
            [sys.executable, *launch, str(ROOT / "examples" / "finetune.py"), *arguments, *batch]
            + ["--output_dir", str(output)],
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        result = json.loads((output / "seed_0" / "metrics.json").read_text())
        losses[processes] = [entry["loss"] for entry in result["history"] if "loss" in entry]
        assert len(losses[processes]) == 20
    assert max(abs(a - b) for a, b in zip(*losses.values(), strict=True)) <= 1e-5
    one, two = (read_results(tmp_path / name / "results.json")[0]["metrics"] for name in "12")
    assert one == two


def test_the_minimal_script_is_short_and_runs(files, folder, tmp_path):
    path = ROOT / "examples" / "finetune_minimal.py"
    text = path.read_text()
    assert len(text.splitlines()) <= 60
    command = [sys.executable, str(path), str(folder), str(files / "sst2"), str(tmp_path / "out")]
    done = subprocess.run([*command, "2"], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"accuracy [01]\.\d+", done.stdout)
    assert (tmp_path / "out" / "model.safetensors").is_file()
