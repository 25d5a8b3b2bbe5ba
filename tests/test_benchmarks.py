"""The benchmark scripts run and write what they say. Nothing here is timed."""

import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pretraining_runs as runs
import pytest
from task_files import write_task

from benchmarks import (
    benchmark_convolution,
    benchmark_families,
    benchmark_table2,
    benchmark_two_sentences,
)
from benchmarks.cells import run_cells

ROOT = Path(__file__).parent.parent
SMALL = "--kernel_sizes 3 --lengths 4 --tokens 8 --d_model 8 --num_filters 2 --rounds 2 --threads 1"


def test_convolution_writes_a_page_and_its_data_once(tmp_path):
    arguments = [*SMALL.split(), "--output_dir", str(tmp_path / "results")]
    run = subprocess.run(
        [sys.executable, "benchmarks/benchmark_convolution.py", *arguments],
        cwd=ROOT,
        # The package of this process, whether installed or on the path.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    data, page = sorted((tmp_path / "results").iterdir())
    assert (data.suffix, page.suffix) == (".json", ".md") and data.stem == page.stem
    results = json.loads(data.read_text())
    assert "--kernel_sizes 3" in results["command"] and results["command"] in page.read_text()
    (record,) = results["times"]
    assert (record["kernel_size"], record["length"]) == (3, 4)
    assert len(record["seconds"]["dynamic"]["forward_backward"]) == 2
    assert [r["num_filters"] for r in results["memory"]] == [2, 2, 8]
    with pytest.raises(SystemExit, match="exists. Pass --overwrite to replace it."):
        benchmark_convolution.main(arguments)
    assert json.loads(data.read_text()) == results


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--d_model 10 --num_filters 4", "--num_filters 4 must divide --d_model 10"),
        ("--rounds 0", "--rounds 0: expected 1 or more."),
        ("--lengths 0 128", "--lengths [0, 128]: expected 1 or more."),
    ],
)
def test_convolution_names_a_wrong_argument(arguments, message, capsys):
    with pytest.raises(SystemExit):
        benchmark_convolution.parse(arguments.split())
    assert message in capsys.readouterr().err


def test_model_benchmark_measures_reports_and_goes_on(tmp_path):
    sizes = "--layers 1 --lengths 16 --d_model 64 --tokens 32 --rounds 1 --threads 1".split()
    command = [sys.executable, ROOT / "benchmarks" / "benchmark_model.py", *sizes]
    command += ["--output_dir", tmp_path, "--what"]
    first = subprocess.run([*command, "encoder"], capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-3000:]
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png"}
    page = next(tmp_path.glob("*.md")).read_text()
    assert "## Encoder, forward, 1 layers a stack" in page and "| 16 | " in page
    again = subprocess.run([*command, "encoder"], capture_output=True, text=True)
    assert "1 cells are kept" in again.stdout
    wrong = subprocess.run([*command[:-1], "--d_model", "65"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "--d_model 65: expected a multiple of 64" in wrong.stderr


def test_the_flax_benchmark_measures_and_reports(tmp_path):
    sizes = "--layers 1 --lengths 16 --d_model 64 --tokens 32 --rounds 1 --threads 1".split()
    command = [sys.executable, ROOT / "benchmarks" / "benchmark_model.py", *sizes]
    command += ["--framework", "flax", "--output_dir", tmp_path, "--what"]
    run = subprocess.run([*command, "encoder", "memory"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    (page,) = tmp_path.glob("model-flax_*.md")
    assert "as fast as T5" in page.read_text() and "What XLA plans" in page.read_text()
    wrong = subprocess.run([*command, "compiled"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "--what compiled: expected some of" in wrong.stderr


def module(name, *arguments):
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
    )


def test_conversion_benchmark_writes_converts_and_reports(tmp_path):
    (tmp_path / "scratch").mkdir()
    sizes = "--d_model 32 --num_layers 1 --vocab_size 64".split()
    folders = ["--scratch", str(tmp_path / "scratch"), "--output_dir", str(tmp_path / "results")]
    run = module("benchmark_conversion", *folders, *sizes)
    assert run.returncode == 0, run.stderr[-3000:]
    data, page = sorted((tmp_path / "results").iterdir())
    results = json.loads(data.read_text())
    assert f"{results['parameters']:,} parameters" in page.read_text()
    assert results["conversion"]["peak_bytes"] > 0 and not list((tmp_path / "scratch").iterdir())
    assert str(tmp_path / "scratch") not in page.read_text()


def test_warm_start_benchmark_compares_three_beginnings(tmp_path):
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    words = "the a cat dog sat ran on under mat tree and then it was seen by some one".split()
    lines = []
    for i in range(40):
        text = " ".join(words[(i * k + k * k) % len(words)] for k in range(300))
        lines.append(json.dumps({"text": text}))
    (data_dir / "text.jsonl").write_text("\n".join(lines) + "\n")
    sizes = "--t5_steps 2 --steps 2 --marks 1 --seeds 0 --batch_size 4 --length 16 --d_model 16 "
    sizes += "--num_heads 2 --num_layers 1 --eval_batches 1 --vocab_size 150"
    folders = ["--data_dir", str(data_dir), "--output_dir", str(tmp_path / "results")]
    run = module("benchmark_warm_start", *folders, *sizes.split())
    assert run.returncode == 0, run.stderr[-3000:]
    data, page = sorted((tmp_path / "results").iterdir())
    losses = json.loads(data.read_text())["losses"]
    assert set(losses) == {"warm start", "copied rest", "random"}
    assert all(list(run) == ["0", "1", "2"] for runs in losses.values() for run in runs)
    assert "| 2 | " in page.read_text() and str(data_dir) not in page.read_text()
    empty = module("benchmark_warm_start", "--data_dir", str(tmp_path), "--output_dir", "unused")
    assert empty.returncode and "0 documents" in empty.stderr


def test_cells_are_run_once_and_name_the_one_that_fails(tmp_path):
    script = tmp_path / "cell.py"
    script.write_text(
        "import json, pathlib, shlex, sys\n"
        "folder = pathlib.Path(sys.argv[-1])\n"
        "if sys.argv[1] == 'wrong':\n"
        "    sys.exit('no such model')\n"
        "folder.mkdir()\n"
        "record = {'command': shlex.join(['python', *sys.argv]), 'found': sys.argv[1]}\n"
        "(folder / 'results.json').write_text(json.dumps(record))\n"
    )
    commands = {tmp_path / name: [str(script), name] for name in ("a", "b", "c")}
    commands[tmp_path / "b"] = [str(script), "wrong"]
    with pytest.raises(RuntimeError, match=r"(?s)b ended with exit code 1; .*no such model"):
        run_cells(commands, workers=1)
    assert (tmp_path / "a" / "results.json").is_file()
    kept = json.loads((tmp_path / "a" / "results.json").read_text()) | {"found": "kept"}
    (tmp_path / "a" / "results.json").write_text(json.dumps(kept))
    commands[tmp_path / "b"] = [str(script), "right"]
    found = [record["found"] for record in run_cells(commands, workers=2).values()]
    assert found == ["kept", "right", "c"]
    commands[tmp_path / "a"].append("more")
    with pytest.raises(RuntimeError, match="a holds the results of another command"):
        run_cells(commands, workers=1)


@pytest.fixture
def families(tmp_path):
    """The arguments of four small pre-trainings, and the folder of their results."""
    runs.make_data(tmp_path / "text")
    runs.make_tokenizer(tmp_path / "tokenizer.json")
    arguments = ["--text", tmp_path / "text", "--tokenizer", tmp_path / "tokenizer.json"]
    arguments += ["--work_dir", tmp_path / "work", "--output_dir", tmp_path / "results"]
    # The dilated preset has a window for each of its layers.
    arguments += ["--override", "batch_size=4", "inputs_length=32", "log_every=1"]
    arguments += ["model_overrides={'d_model':16,'d_kv':4,'d_ff':32,'num_heads':2}"]
    return [str(a) for a in arguments], tmp_path / "results"


@pytest.mark.slow
def test_families_makes_what_is_missing_and_table2_goes_on_from_it(tmp_path, families):
    arguments, results = families
    task = write_task(tmp_path / "data" / "sst2", "sst2", 24)
    more = ["--task_dir", task, "--milestones", 2, 4, "--labels", 16]
    more += ["--seeds", 0, 1, "--finetune_steps", 2]
    command = [*arguments, *map(str, more)]
    benchmark_families.main(command)
    (path,) = results.glob("families_*.json")
    found = json.loads(path.read_text())["families"]
    assert set(found) == set(benchmark_families.FAMILIES)
    assert all(set(row["accuracy"]) == {"0", "2", "4"} for row in found.values())
    assert len(list(results.iterdir())) == 4
    (tmp_path / "work" / "cells" / "sst2-dynamic-4" / "results.json").unlink()
    benchmark_families.main(command)
    again = json.loads(path.read_text())["families"]
    assert [row["accuracy"] for row in again.values()] == [
        row["accuracy"] for row in found.values()
    ]
    assert str(tmp_path) not in path.read_text()

    write_task(tmp_path / "data" / "cogs", "cogs", 24)
    (tmp_path / "data" / "nli").mkdir()
    (tmp_path / "data" / "s140").mkdir()
    (tmp_path / "data" / "nli" / "mnli.dev.jsonl").write_text("{}\n")
    row = {"text": "a good film", "label": 1}
    (tmp_path / "data" / "s140" / "test_359_binary.jsonl").write_text(json.dumps(row) + "\n")
    write_task(tmp_path / "squad", "squad", 12)
    (tmp_path / "data" / "xquad").mkdir()
    articles = json.loads((tmp_path / "squad" / "train-v1.1.json").read_text())["data"] * 6
    (tmp_path / "data" / "xquad" / "xquad.en.json").write_text(json.dumps({"data": articles}))
    more = ["--data_dir", tmp_path / "data", "--pretrain_steps", 4, "--tasks", "sst2", "cogs"]
    more += ["squad-head", "--families", "lightweight", "transformer"]
    more += ["--finetune", "max_steps=2", "eval_steps=2", "seeds=0"]
    benchmark_table2.main([*arguments, *map(str, more)])
    page = next(results.glob("table2-sst2-cogs-squad-head_*.md")).read_text()
    assert "with 2 steps instead: 0.0." in page
    assert "| model | | sst2 | cogs | squad-head | s140 |" in page and "by type" in page
    assert page.count("| gain |") == 2
    assert "| model | own input | another's | difference |" in page


COMMANDS = [
    line
    for page in sorted((ROOT / "docs").glob("*.md"))
    for line in page.read_text("utf-8").splitlines()
    if line.startswith("python -m benchmarks.")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_pages_parse(command, capsys):
    """Every argument exists; the files it names are not there."""
    _, _, program, *arguments = shlex.split(command)
    with pytest.raises(SystemExit):
        importlib.import_module(program).parse(arguments)
    assert "there is no such file" in capsys.readouterr().err


def test_families_and_table2_name_a_wrong_argument(tmp_path, families, capsys):
    arguments, _ = families
    task = ["--task_dir", str(tmp_path)]
    for module, more, message in (
        (benchmark_families, ["--task_dir", "none"], "--task_dir none: there is no such file"),
        (benchmark_families, [*task, "--milestones", "4", "2"], "must be rising step numbers"),
        (benchmark_families, [*task, "--workers", "0"], "--workers must be 1 or more"),
        (benchmark_table2, ["--data_dir", "none"], "--data_dir none: there is no such file"),
        (benchmark_table2, ["--data_dir", ".", "--finetune", "x"], "expected NAME=VALUE"),
    ):
        with pytest.raises(SystemExit):
            module.parse([*arguments, *more])
        assert message in capsys.readouterr().err


def test_two_sentences_runs_once_and_reports(tmp_path):
    arguments = ["--work_dir", tmp_path / "work", "--output_dir", tmp_path / "results"]
    arguments += "--facts 2 --values 4 --train_rows 64 --test_rows 8 --steps 1 --seeds 0".split()
    arguments = [str(a) for a in arguments]
    benchmark_two_sentences.main(arguments)
    (path,) = (tmp_path / "results").glob("two-sentences_*.json")
    results = json.loads(path.read_text())
    assert results["receptive_field"]["questions"] == {
        "convolutions only": 13,
        "attention in the last layer": None,
        "attention everywhere": None,
    }
    assert results["rows"] == {"questions": "64 train, 500 validation, 8 test"}
    assert str(tmp_path) not in path.read_text()
    (made,) = (tmp_path / "work").glob("questions-*/test.jsonl")
    for row in map(json.loads, made.read_text().splitlines()):
        words = row["text"].split()
        assert words[words.index(words[-2]) + 1] == row["label"] and len(words) == 4 + 16 + 2
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("*")}
    with path.with_suffix(".md").open("a", encoding="utf-8") as page:
        page.write("\n## Reading\n\nNothing is learned in one step.\n")
    benchmark_two_sentences.main(arguments)
    page = path.with_suffix(".md").read_text("utf-8")
    assert page.endswith("| all |\n\n## Reading\n\nNothing is learned in one step.\n")
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("*")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--gap 12", "--gap 12: expected the receptive field, 13, or more"),
        ("--facts 65", "--facts 65: expected 2 or more, at most --values 64"),
        ("--snli none", "--snli and --tokenizer go together"),
        ("--snli none --tokenizer none", "--snli none: there is no such file"),
    ],
)
def test_two_sentences_names_a_wrong_argument(arguments, message, capsys):
    with pytest.raises(SystemExit):
        benchmark_two_sentences.parse(["--work_dir", "work", *arguments.split()])
    assert message in capsys.readouterr().err
