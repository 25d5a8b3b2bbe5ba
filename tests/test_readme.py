"""The code blocks of README.md run as they stand, one after the other."""

import re
import shutil
from pathlib import Path

from test_pipelines import folder  # noqa: F401 - a tiny model with its tokenizer

README = Path(__file__).parents[1] / "README.md"


def test_code_blocks_of_the_readme(folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "runs/quickstart/hub")
    blocks = re.findall(r"^```python\n(.+?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    names = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["config"].encoder_mixers[-1] == "attention"


def test_files_that_the_readme_names_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        if not target.startswith("http"):
            assert (README.parent / target).exists(), target
