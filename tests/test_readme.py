"""The code blocks of README.md and of pages in docs run as they stand, one after the other."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_pipelines import folder  # noqa: F401 - a tiny model with its tokenizer

README = Path(__file__).parents[1] / "README.md"
GENERATION = README.parent / "docs" / "generation.md"
FLAX = README.parent / "docs" / "flax.md"


def _run(page, count, **names):
    blocks = re.findall(r"^```python\n(.+?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == count
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    return names


@pytest.fixture
def in_a_checkout(folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "runs/quickstart/hub")


def test_code_blocks_of_the_readme(in_a_checkout):
    assert _run(README, 4)["config"].encoder_mixers[-1] == "attention"


def test_code_blocks_of_the_page_on_generation(in_a_checkout):
    names = _run(GENERATION, 2)
    model, inputs = names["model"], names["inputs"]
    plain = model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(names["compiled"], plain)
    assert torch.equal(names["again"].sequences, plain)


def test_code_blocks_of_the_page_on_flax(in_a_checkout):
    ids = np.arange(2, 14).reshape(2, 6)
    batch = {"input_ids": ids, "labels": ids}
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "decoder_input_ids": ids}
    names = _run(FLAX, 4, folder="runs/quickstart/hub", batch=batch, **given)
    assert names["value"] > 0 and names["cache"].seen == 6


def test_files_that_the_readme_names_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        if not target.startswith("http"):
            assert (README.parent / target).exists(), target
