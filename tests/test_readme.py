"""The code blocks of README.md and docs/generation.md run as they stand, one after the other."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from test_pipelines import folder  # noqa: F401 - a tiny model with its tokenizer

README = Path(__file__).parents[1] / "README.md"
GENERATION = README.parent / "docs" / "generation.md"


def _run(page, count):
    blocks = re.findall(r"^```python\n(.+?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == count
    names = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    return names


@pytest.fixture
def in_a_checkout(folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "runs/quickstart/hub")


def test_code_blocks_of_the_readme(in_a_checkout):
    assert _run(README, 3)["config"].encoder_mixers[-1] == "attention"


def test_code_blocks_of_the_page_on_generation(in_a_checkout):
    names = _run(GENERATION, 2)
    model, inputs = names["model"], names["inputs"]
    plain = model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(names["compiled"], plain)
    assert torch.equal(names["again"].sequences, plain)


def test_files_that_the_readme_names_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        if not target.startswith("http"):
            assert (README.parent / target).exists(), target
