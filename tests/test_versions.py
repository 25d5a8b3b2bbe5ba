"""One set of files, the same results on every supported transformers.

`make test-versions` builds one environment a version; here each opens the same saved folders as
remote code, in a fresh process, and its results are compared bit for bit with this environment's.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from test_hub import AUTO_CLASSES, environment

MODELS = {
    "lightweight": {},
    "hybrid": {"encoder_mixers": ["dynamic", "attention"], "decoder_mixers": "dynamic"},
    "untied": {"tie_word_embeddings": False, "decoder_mixers": ["lightweight", "attention"]},
    "alone": {"cross_attention": False, "decoder_kernel_size": 4, "decoder_dilation": 2},
}
FOLDER = Path(__file__).parents[1] / ".venv-versions"
VERSIONS = sorted(path.name for path in FOLDER.glob("*") if (path / "bin/python").exists())

SCRIPT = """
import sys
import torch
import transformers
folder, models, classes, output = sys.argv[1:]
ids = torch.arange(24).flip(0).reshape(2, 12) + 1
mask = torch.ones_like(ids)
mask[1, 7:] = 0
batch = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
batch["input_ids"][0, 11] = batch["input_ids"][1, 6] = 1
results = {}
for name in models.split(","):
    for auto in classes.split(","):
        auto_class = getattr(transformers, auto)
        model = auto_class.from_pretrained(f"{folder}/{name}/{auto}", trust_remote_code=True).eval()
        inputs = dict(batch)
        if auto in ("AutoModel", "AutoModelForSeq2SeqLM"):
            inputs["decoder_input_ids"] = ids[:, :5]
        with torch.no_grad():
            results[f"{name} {auto}"] = model(**inputs)[0]
        if auto != "AutoModelForSeq2SeqLM":
            continue
        for strategy, arguments in {
            "greedy": {}, "beam": {"num_beams": 4}, "sampling": {"do_sample": True, "top_k": 0},
            "uncached": {"use_cache": False},
        }.items():
            torch.manual_seed(0)
            results[f"{name} {strategy}"] = model.generate(
                **batch, min_new_tokens=9, max_new_tokens=12, no_repeat_ngram_size=2, **arguments
            )
torch.save({"version": transformers.__version__, "results": results}, output)
"""


def _run(python, folder, output):
    command = [python, "-I", "-c", SCRIPT, folder, ",".join(MODELS), ",".join(AUTO_CLASSES), output]
    done = subprocess.run(
        [str(part) for part in command],
        env=environment(folder),
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(output, weights_only=True)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The saved folders, and what this environment makes of them."""
    folder = tmp_path_factory.mktemp("versions")
    for name, fields in MODELS.items():
        torch.manual_seed(0)
        for auto, cls in AUTO_CLASSES.items():
            cls(tiny_config(**fields)).save_pretrained(folder / name / auto)
    return folder, _run(sys.executable, folder, folder / "reference.pt")


@pytest.mark.parametrize("version", VERSIONS or [None])
def test_every_version_gives_the_same(version, reference):
    if version is None:
        pytest.skip("no other versions are installed: `make test-versions` builds and runs them")
    folder, expected = reference
    actual = _run(FOLDER / version / "bin/python", folder, folder / f"{version}.pt")
    assert actual["version"].startswith(version)
    assert expected["results"].keys() == actual["results"].keys()
    for name, value in expected["results"].items():
        assert torch.equal(actual["results"][name], value), name
    assert expected["results"]["hybrid greedy"].unique().numel() > 5
