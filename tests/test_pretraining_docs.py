"""docs/tpu.md: every command of the program parses, and those for two CPU cores run."""

import re
import shlex

import pretraining_runs as runs
import pytest

from pretraining import main, plot, prepare, train_tokenizer
from pretraining.settings import load

PAGE = (runs.ROOT / "docs" / "tpu.md").read_text()
BLOCKS = [
    block.replace("\\\n", " ")
    for block in re.findall(r"^```\n(.+?)^```", PAGE, re.MULTILINE | re.DOTALL)
]
# A line, or what a pod's machines are told; "..." stands for arguments said before.
COMMANDS = [
    shlex.split(command.replace("...", ""), comments=True)
    for block in BLOCKS
    for command in re.findall(r"python (-m pretraining\.[^\n']+?)(?:'?$|; do)", block, re.MULTILINE)
]


def test_the_page_has_commands():
    assert len(COMMANDS) == 11
    assert {words[1] for words in COMMANDS} == {
        "pretraining.main",
        "pretraining.plot",
        "pretraining.prepare",
        "pretraining.train_tokenizer",
    }


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_arguments_and_fields_exist(words):
    program, arguments = words[1], words[2:]
    if program == "pretraining.main":
        if "--config" not in arguments:
            arguments += ["--config", runs.CONFIG, "--workdir", "DIR"]
        args = main.parse(arguments)
        config = args.config if args.config == runs.CONFIG else str(runs.ROOT / args.config)
        load(config, args.override)
    else:
        module = {
            "pretraining.plot": plot,
            "pretraining.prepare": prepare,
            "pretraining.train_tokenizer": train_tokenizer,
        }[program]
        with pytest.raises((SystemExit, ValueError)) as raised:  # its files are not there
            module.main(arguments)
        assert re.search(r"DATA|TEXT|RECORDS|tokenizer|runs/tiny|t5-base", str(raised.value)) or (
            raised.value.code == 2
        )


def test_the_commands_for_two_cores_run(tmp_path, monkeypatch, capsys):
    runs.make_data(tmp_path / "TEXT")
    monkeypatch.chdir(tmp_path)
    programs = {"prepare": prepare, "main": main, "plot": plot, "train_tokenizer": train_tokenizer}
    blocks = [b for b in BLOCKS if "configs/tiny_cpu.py" in b or "train_tokenizer" in b]
    for block in reversed(blocks):  # the tokenizer, then what uses it
        for line in block.splitlines():
            arguments = shlex.split(line)[3:]
            if "--config" in arguments:
                arguments[arguments.index("--config") + 1] = runs.CONFIG
                small = {**runs.FAST, "train_steps": 2, "eval_every": 0, "log_rows": False}
                arguments += ["--override", *(f"{key}={value!r}" for key, value in small.items())]
            if "--vocab_size" in arguments:
                arguments[arguments.index("--vocab_size") + 1] = "200"
            assert programs[shlex.split(line)[2].split(".")[1]].main(arguments) == 0, line
    for name in ("tokenizer.json", "RECORDS/manifest.json", "losses.png"):
        assert (tmp_path / name).is_file()
    assert (tmp_path / "runs" / "tiny" / "hub" / "model.safetensors").is_file()
