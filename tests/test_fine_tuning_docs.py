"""The page on fine-tuning: its commands parse, its files exist, and the harness' task is ours."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from task_files import save_tiny_model, write_task

from evaluation import run, submissions
from evaluation.tasks import TASKS, get_task
from examples import demo, filters, finetune
from model_cards import publish

ROOT = Path(finetune.__file__).parents[1]
PAGE = ROOT / "docs" / "fine_tuning.md"
HARNESS = ROOT / "evaluation" / "lm_eval"
COMMANDS = [
    line
    for block in re.findall(r"^```\n(.+?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    if re.match(r"python|accelerate|torchrun", line)
    and "benchmarks." not in line  # test_benchmarks.py
]


def test_the_page_has_commands():
    assert len(COMMANDS) == 17


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, monkeypatch, tmp_path):
    """Every argument exists; what the commands do is tested where their programs are."""
    words = shlex.split(command)
    program, arguments = next(
        (word, words[i + 1 :]) for i, word in enumerate(words) if re.search(r"\.py$|\.\w+$", word)
    )
    if arguments and arguments[0] == "run.yaml":
        monkeypatch.chdir(tmp_path)
        (tmp_path / "run.yaml").write_text("task: sst2\nmodel: DIR\noutput_dir: O\n")
    if program == "examples/finetune.py":
        assert finetune.parse(arguments)[0].task in {*TASKS, "custom"}
    elif program == "examples/finetune_flax.py":
        pytest.importorskip("jax", reason="JAX is not installed")
        from examples import finetune_flax

        assert finetune_flax.parse(arguments).task in TASKS
    elif program == "evaluation.run":
        assert set(run.parse(arguments).tasks) <= set(TASKS)
    else:
        module = {
            "evaluation.submissions": submissions,
            "examples/demo.py": demo,
            "examples/filters.py": filters,
            "model_cards.publish": publish,
        }[program]
        # Its files are not there: it gets as far as saying so.
        assert module.main(arguments) == 2


def test_links_and_task_names():
    text = PAGE.read_text()
    for target in re.findall(r"\]\((\.\./[^)]+)\)", text):
        assert (PAGE.parent / target).exists(), target
    table = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| `.*\|$", text, re.MULTILINE)))
    assert set(TASKS) <= set(table)


def test_the_harness_task_is_the_tables():
    content = yaml.safe_load((HARNESS / "convt5_sst2.yaml").read_text())
    task = get_task("sst2")
    assert content["doc_to_text"].replace("{{", "{").replace("}}", "}") == task.template
    assert content["doc_to_choice"] == [f"{word}</s>" for word in task.words]


def test_the_harness_agrees_with_evaluation_run(tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from lm_eval.tasks import TaskManager

    write_task(tmp_path / "data" / "sst2", "sst2", 20)
    task = get_task("sst2")
    lines = (tmp_path / "data" / "sst2" / "dev.tsv").read_text().splitlines()[1:]
    texts = [task.input_text({"sentence": line.split("\t")[0]}) for line in lines]
    folder = save_tiny_model(tmp_path / "model", [*texts, *task.words])
    monkeypatch.chdir(tmp_path)
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "backend": "seq2seq", "trust_remote_code": True},
        tasks=["convt5_sst2"],
        task_manager=TaskManager(include_path=str(HARNESS), include_defaults=False),
        device="cpu",
        batch_size=4,
    )
    arguments = ["--model", str(folder), "--tasks", "sst2", "--data_dir", "data"]
    assert run.main([*arguments, "--output_dir", "out", "--splits", "validation"]) == 0
    record = yaml.safe_load(Path("out/results.json").read_text())
    theirs = found["results"]["convt5_sst2"]["acc,none"]
    assert theirs == pytest.approx(record["metrics"]["accuracy"]["mean"])
