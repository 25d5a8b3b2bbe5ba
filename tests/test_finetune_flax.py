"""examples/finetune_flax.py: the same tasks, files and results as in PyTorch."""

import argparse
import json

import numpy as np
import pytest
import torch
from task_files import make_tokenizer, save_tiny_model, write_task
from tolerances import LABEL_SCORES
from transformers import AutoTokenizer

pytest.importorskip("jax", reason="JAX is not installed")

from flax import nnx

from evaluation import run as evaluation_run
from evaluation.data import load
from evaluation.prediction import predict
from evaluation.results import read_results
from evaluation.tasks import get_task
from examples import finetune_flax
from modeling_convt5 import ConvT5ForConditionalGeneration, FlaxConvT5ForConditionalGeneration

NAMES = ("sst2", "trec", "cogs", "record", "stsb")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    for name in NAMES:
        write_task(root / name, name, 6)
    return root


@pytest.fixture(scope="module")
def folder(files, tmp_path_factory):
    texts = []
    for name in NAMES:
        task = get_task(name)
        texts += task.words
        for rows in load(task, files).rows.values():
            texts += [task.input_text(row) for row in rows]
            texts += [task.target_text(row) for row in rows if row["label"] is not None]
    torch.manual_seed(0)
    return save_tiny_model(tmp_path_factory.mktemp("model"), texts)


def run(task, model, files, output, *more):
    arguments = ["--task", task, "--model", model, "--data_dir", files, "--output_dir", output]
    arguments += ["--max_steps", 2, "--batch_size", 4, "--quiet", *more]
    return finetune_flax.main([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    "name", ["sst2", "cogs", *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES[1::2])]
)
def test_tasks(name, files, folder, tmp_path):
    assert run(name, folder, files, tmp_path) == 0
    (record,) = read_results(tmp_path / "results.json")
    assert record["framework"] == "flax" and set(get_task(name).metrics) <= set(record["metrics"])
    # PyTorch answers from the saved folder as Flax did.
    split = record["evaluated_on"]
    arguments = ["--model", str(tmp_path), "--tasks", name, "--data_dir", str(files)]
    output = tmp_path / "again"
    assert evaluation_run.main([*arguments, "--output_dir", str(output), "--splits", split]) == 0
    theirs = (output / name / f"predictions_{split}.jsonl").read_text().splitlines()
    ours = (tmp_path / "seed_0" / f"predictions_{split}.jsonl").read_text().splitlines()
    for one, other in zip(map(json.loads, ours), map(json.loads, theirs), strict=True):
        assert one["prediction"] == other["prediction"]


def test_label_scores_are_pytorchs(files, folder):
    task, tokenizer = get_task("trec"), AutoTokenizer.from_pretrained(folder)
    rows = load(task, files).rows["test"]
    args = argparse.Namespace(batch_size=4, max_input_length=64)
    graphdef, state = nnx.split(FlaxConvT5ForConditionalGeneration.from_pretrained(folder))
    ours = finetune_flax.answer(task, "score", tokenizer, graphdef, state, rows, args)
    theirs = predict(
        task, ConvT5ForConditionalGeneration.from_pretrained(folder), tokenizer, rows, "score"
    )
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one["scores"], other["scores"], atol=LABEL_SCORES, rtol=0)


def test_it_learns_from_nothing_and_resumes_by_seed(tmp_path, capsys):
    write_task(tmp_path / "files", "imdb", 200)
    task, texts = get_task("imdb"), []
    for rows in load(task, tmp_path / "files").rows.values():
        texts += [*task.words, *(task.input_text(row) for row in rows)]
    make_tokenizer(texts).save_pretrained(tmp_path / "tokenizer")
    more = ["--tokenizer", tmp_path / "tokenizer", "--dropout_rate", 0, "--max_steps", 60]
    more += ["--batch_size", 16, "--seeds", 0, "--learning_rate", 0.01]
    out = tmp_path / "out"
    assert run("imdb", "lightweight-tiny", tmp_path / "files", out, *more) == 0
    (record,) = read_results(out / "results.json")
    assert record["metrics"]["accuracy"]["mean"] > 0.95
    changed = (out / "seed_0" / "model" / "model.safetensors").stat().st_mtime_ns
    assert run("imdb", "lightweight-tiny", tmp_path / "files", out, *more) == 0
    assert (out / "seed_0" / "model" / "model.safetensors").stat().st_mtime_ns == changed
    more[more.index("--learning_rate") + 1] = 0.02
    assert run("imdb", "lightweight-tiny", tmp_path / "files", out, *more) == 2
    assert "learning_rate was 0.01, is 0.02" in capsys.readouterr().err


def test_refusals(files, folder, tmp_path, capsys):
    assert run("cogs", folder, files, tmp_path, "--method", "score") == 2
    assert "method='score' does not answer task 'cogs'" in capsys.readouterr().err
    for more in (["--batch_size", 0], ["--max_steps", -1], ["--num_train_epochs", 0]):
        assert run("sst2", folder, files, tmp_path / "wrong", *more) == 2
        assert f"{more[0]} {more[1]}: expected" in capsys.readouterr().err
    assert run("sst2", "lightweight-tiny", files, tmp_path) == 2
    assert "pass --tokenizer" in capsys.readouterr().err
