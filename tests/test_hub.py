"""A saved folder is all one needs: remote code in fresh processes, and the installed package."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoModelForTextEncoding

import modeling_convt5
from modeling_convt5 import (
    ConvT5EncoderModel,
    ConvT5ForConditionalGeneration,
    ConvT5ForQuestionAnswering,
    ConvT5ForSequenceClassification,
    ConvT5ForTokenClassification,
    ConvT5Model,
)

SOURCE = Path(modeling_convt5.__file__).parent
# Every file of the package but the package's own two: all of them travel with a checkpoint.
CODE = {path.name for path in SOURCE.glob("*.py")} - {"__init__.py", "__main__.py"}
AUTO_CLASSES = {
    "AutoModel": ConvT5Model,
    "AutoModelForSeq2SeqLM": ConvT5ForConditionalGeneration,
    "AutoModelForTextEncoding": ConvT5EncoderModel,
    "AutoModelForSequenceClassification": ConvT5ForSequenceClassification,
    "AutoModelForTokenClassification": ConvT5ForTokenClassification,
    "AutoModelForQuestionAnswering": ConvT5ForQuestionAnswering,
}

FRESH = """
import sys
import torch
import transformers
folder, outputs, *names = sys.argv[1:]
try:
    import modeling_convt5
    sys.exit("the package is importable: this process proves nothing")
except ImportError:
    pass
ids = torch.arange(12)[None].flip(1)
results = {}
for name in names:
    where = f"{folder}/{name}"
    model = getattr(transformers, name).from_pretrained(where, trust_remote_code=True)
    inputs = {"input_ids": ids}
    if name in ("AutoModel", "AutoModelForSeq2SeqLM"):
        inputs["decoder_input_ids"] = ids
    results[name] = model.eval()(**inputs)[0]
    if name == "AutoModelForSeq2SeqLM":
        results["generated"] = model.generate(ids, max_new_tokens=8, do_sample=False)
        model.save_pretrained(outputs + ".again")
config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=True)
assert type(config).__name__ == "ConvT5Config"
for module in ("jax", "flax", "tensorflow"):
    assert module not in sys.modules, module
torch.save(results, outputs)
"""

TRAIN = """
import sys
import torch
from transformers import AutoModelForSeq2SeqLM, Seq2SeqTrainer, Seq2SeqTrainingArguments
folder, output, resume = sys.argv[1:]
model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)
ids = torch.arange(2, 34).reshape(4, 8)
rows = [{"input_ids": row, "labels": row.flip(0)} for row in ids] * 4
arguments = Seq2SeqTrainingArguments(
    output, max_steps=6, save_steps=3, logging_steps=1, per_device_train_batch_size=4,
    report_to=[], use_cpu=True, disable_tqdm=True, seed=1, dataloader_pin_memory=False,
)
trainer = Seq2SeqTrainer(model, arguments, train_dataset=rows)
trainer.train(resume_from_checkpoint=resume or None)
trainer.save_model(output + "/final")
"""


def environment(folder):
    """Variables of a process that cannot reach the Hub, nor anything downloaded earlier."""
    return {
        "HF_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
        "PATH": "",
        # Equal bits need an equal number of threads: sums are split between them.
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }


def _run(code, tmp_path, *arguments):
    """Run code in a process that knows neither the package nor the network."""
    (tmp_path / "elsewhere").mkdir(exist_ok=True)
    command = [sys.executable, "-I", "-c", f"{_HIDE}\n{code}", *map(str, arguments)]
    done = subprocess.run(
        command,
        env=environment(tmp_path),
        cwd=tmp_path / "elsewhere",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


# An editable installation puts the package on every path: take it off again.
_HIDE = """
import importlib.abc, sys
class _Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "modeling_convt5":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, _Hide())
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One saved model of each class."""
    torch.manual_seed(0)
    config = tiny_config(
        encoder_mixers=["dynamic", "attention"], decoder_mixers=["lightweight", "depthwise"]
    )
    root = tmp_path_factory.mktemp("saved")
    for name, cls in AUTO_CLASSES.items():
        cls(config).save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def saved(folders):
    folder = folders / "AutoModelForSeq2SeqLM"
    return ConvT5ForConditionalGeneration.from_pretrained(folder).eval(), folder


def test_a_saved_folder_holds_code_and_no_pickle(saved):
    _, folder = saved
    names = {path.name for path in folder.iterdir()}
    assert names == CODE | {"config.json", "generation_config.json", "model.safetensors"}


def test_the_modeling_file_imports_every_other_itself(saved):
    # transformers 4 looks no further, and copies nothing else from a local folder.
    _, folder = saved
    siblings = {name.removesuffix(".py") for name in CODE - {"modeling_convt5.py"}}
    text = (folder / "modeling_convt5.py").read_text()
    assert siblings == set(re.findall(r"^ *from \.(\w+) import", text, re.MULTILINE))


@pytest.mark.parametrize("name", AUTO_CLASSES)
def test_every_class_saves_every_auto_class(name, folders):
    auto_map = json.loads((folders / name / "config.json").read_text())["auto_map"]
    assert auto_map == {"AutoConfig": "configuration_convt5.ConvT5Config"} | {
        key: f"modeling_convt5.{cls.__name__}" for key, cls in AUTO_CLASSES.items()
    }
    assert CODE <= {path.name for path in (folders / name).iterdir()}


def test_remote_code_in_a_fresh_process(saved, folders, tmp_path):
    model, folder = saved
    _run(FRESH, tmp_path, folders, tmp_path / "results.pt", *AUTO_CLASSES)
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    ids = torch.arange(12)[None].flip(1)
    for name, cls in AUTO_CLASSES.items():
        inputs = {"input_ids": ids}
        if name in ("AutoModel", "AutoModelForSeq2SeqLM"):
            inputs["decoder_input_ids"] = ids
        ours = cls.from_pretrained(folders / name).eval()(**inputs)[0]
        assert torch.equal(ours, results[name]), name
    generated = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(generated, results["generated"])
    again = tmp_path / "results.pt.again"
    assert CODE <= {path.name for path in again.iterdir()}
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_the_installed_package_needs_no_remote_code(saved):
    model, folder = saved
    for auto, cls in ((AutoModel, ConvT5Model), (AutoModelForTextEncoding, ConvT5EncoderModel)):
        assert type(auto.from_pretrained(folder)) is cls
    loaded = AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert type(loaded) is ConvT5ForConditionalGeneration
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_trainer_checkpoints_of_a_remote_code_model_resume(saved, tmp_path):
    _, folder = saved
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    _run(TRAIN, tmp_path, folder, whole, "")
    checkpoint = whole / "checkpoint-3"
    assert CODE <= {path.name for path in checkpoint.iterdir()}
    _run(TRAIN, tmp_path, folder, parts, checkpoint)
    first, second = ((path / "final" / "model.safetensors").read_bytes() for path in (whole, parts))
    assert first == second


def test_sharded_checkpoints_load(saved, tmp_path):
    model, _ = saved
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded = ConvT5ForConditionalGeneration.from_pretrained(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_untied_and_unshared_tables_survive_a_round_trip(tmp_path):
    for number, fields in enumerate(
        (
            {"tie_word_embeddings": False},
            {"share_embeddings": False, "position_embeddings": "learned"},
            {"share_position_embeddings": False, "position_embeddings": "learned"},
            {"position_embeddings": "learned", "cross_attention": False},
        )
    ):
        model = ConvT5ForConditionalGeneration(tiny_config(**fields))
        model.save_pretrained(tmp_path / str(number))
        loaded = ConvT5ForConditionalGeneration.from_pretrained(tmp_path / str(number))
        for name, weight in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], weight), name


def test_importing_the_package_imports_neither_jax_nor_tensorflow():
    code = "import sys, modeling_convt5; print([m for m in ('jax', 'flax') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
