"""An exported checkpoint is a Hub folder: PyTorch goes on with it, and finds the same losses."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pretraining_runs as runs
import pytest
import tolerances
import torch
from test_hub_server import hub  # noqa: F401 - a running Hub
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from benchmarks import benchmark_pretraining
from examples import continue_pretraining
from modeling_convt5 import FlaxConvT5ForConditionalGeneration
from pretraining import export, plot
from pretraining.input_pipeline import Batches
from pretraining.main import main
from pretraining.settings import load
from pretraining.tokens import open_tokenizer


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of a run of packed rows and its export, its settings, its command."""
    root = tmp_path_factory.mktemp("export")
    fields = {
        "data_dir": str(runs.make_data(root / "text")),
        "tokenizer": str(runs.make_tokenizer(root / "tokenizer.json")),
        "train_steps": 6,
        "packing": True,
        "export_every": 4,
    }
    command = runs.arguments(root / "run", ["--export", str(root / "hub")], **fields)
    assert main(command) == 0
    return root, load(runs.CONFIG, command[command.index("--override") + 1 :]), command


def test_the_folder_is_for_both_frameworks_and_says_what_it_is(exported):
    root, settings, _ = exported
    twin = FlaxConvT5ForConditionalGeneration.from_pretrained(root / "hub")
    assert twin.config.dropout_rate == 0.1  # pre-training's is a matter of the run
    state = runs.final_state(root / "run", 6)
    from modeling_convt5.checkpoint_flax_convt5 import named_parameters

    for key, variable in named_parameters(twin):
        assert np.array_equal(variable[...], state[f"['params']['{key}']"]), key
    card = (root / "hub" / "README.md").read_text()
    last = [r for r in runs.records(root / "run") if r["split"] == "eval"][-1]
    assert f"{last['loss']:.4f} at step 6" in card and "packed with segment ids" in card
    assert (root / "hub" / "training_curve.png").stat().st_size > 5000
    tokenizer = AutoTokenizer.from_pretrained(root / "hub", trust_remote_code=True)
    ids = tokenizer(runs.make_texts(1)[0]).input_ids
    assert ids[-1] == 1 and tokenizer.convert_tokens_to_ids("<extra_id_0>") == 81
    assert tokenizer.pad_token_id == 0


def test_a_run_pushes_its_export(exported, hub):  # noqa: F811
    root, _, command = exported
    assert main([*command, "--push_to_hub", "user/pretrained"]) == 0  # finished: only the export
    files = hub.repo("user/pretrained").find("main").files
    for path in (root / "hub").iterdir():
        if path.suffix in (".py", ".json", ".safetensors", ".md"):
            assert files[path.name] == path.read_bytes(), path.name
    model = AutoModelForSeq2SeqLM.from_pretrained("user/pretrained", trust_remote_code=True)
    local = AutoModelForSeq2SeqLM.from_pretrained(root / "hub", trust_remote_code=True)
    for key, value in local.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_a_hub_that_fails_does_not_stop_training(exported, tmp_path, monkeypatch, capsys):
    class Down:
        def create_repo(self, *args, **kwargs):
            raise ConnectionError("no route to the Hub")

    monkeypatch.setattr(export, "HfApi", Down)
    root, _, command = exported
    command = [*command, "--push_to_hub", "user/other"]
    command[command.index("--workdir") + 1] = str(tmp_path / "run")
    command[command.index("--export") + 1] = str(tmp_path / "hub")
    with pytest.raises(SystemExit, match="Run the same command again: it uploads"):
        main(command)
    assert "The next export tries again" in capsys.readouterr().err  # that of step 4
    assert runs.records(tmp_path / "run")[-1]["step"] == 6


@pytest.mark.parametrize("packing", [True, False])
def test_pytorch_has_flaxs_loss_on_the_programs_own_batches(exported, packing):
    import dataclasses

    root, settings, _ = exported
    settings = dataclasses.replace(settings, packing=packing)
    tokenizer = open_tokenizer(settings.tokenizer)
    records = str(root / "run" / "records")
    model = AutoModelForSeq2SeqLM.from_pretrained(root / "hub", trust_remote_code=True).eval()
    twin = FlaxConvT5ForConditionalGeneration.from_pretrained(root / "hub")
    batches = Batches(settings, tokenizer, records, "train", np.arange(4))
    for _, batch in zip(range(3), batches, strict=False):
        batch.pop("rows")
        tensors = {name: torch.tensor(array, dtype=torch.long) for name, array in batch.items()}
        with torch.no_grad():
            loss = model(**tensors).loss.item()
        other = float(twin(**{name: jnp.asarray(a) for name, a in batch.items()}).loss)
        assert abs(loss - other) <= tolerances.EXPORT_LOSS


def test_continued_pretraining_in_pytorch(exported, tmp_path, capsys):
    root, *_ = exported
    arguments = ["--model", root / "hub", "--records", root / "run" / "records", "--output_dir"]
    arguments += [tmp_path, "--max_steps", 20, "--batch_size", 4, "--inputs_length", 32]
    arguments += ["--compare", 4, "--learning_rate", 0.01]
    assert continue_pretraining.main([str(a) for a in arguments]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["flax_difference"] <= tolerances.EXPORT_LOSS
    assert found["eval_loss_after"] < found["eval_loss_before"]
    assert (tmp_path / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="is shorter than one row"):
        continue_pretraining.Rows(str(root / "run" / "records"), "validation", 100_000)


def test_curves_are_drawn_from_the_records(exported, tmp_path, monkeypatch):
    root, *_ = exported
    assert plot.main([str(root / "run"), "--output", str(tmp_path / "losses.png")]) == 0
    assert (tmp_path / "losses.png").stat().st_size > 5000
    other = tmp_path / "other" / "run"
    other.mkdir(parents=True)
    (other / "metrics.jsonl").write_bytes((root / "run" / "metrics.jsonl").read_bytes())
    monkeypatch.setattr(plot, "plot", lambda runs, path: seen.update(runs))
    seen: dict = {}
    assert plot.main([str(root / "run"), str(other)]) == 0
    assert list(seen) == [str(root / "run"), str(other)]
    with pytest.raises(ValueError, match="metrics.jsonl: there is no such file"):
        plot.main([str(tmp_path), "--output", str(tmp_path / "none.png")])


def test_operations_are_counted_and_drawn(tmp_path):
    command = [sys.executable, runs.ROOT / "benchmarks" / "benchmark_flops.py"]
    command += ["--size", "tiny", "--layers", "1", "--lengths", "32", "--output_dir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png"}
    records = json.loads(next(tmp_path.glob("*.json")).read_text())["records"]
    assert [record["family"] for record in records] == [
        "lightweight",
        "dynamic",
        "dilated",
        "transformer",
    ]
    for record in records:
        assert record["formula"] < record["xla"] < 1.5 * record["formula"]


def test_pipeline_and_checkpoints_are_measured(exported, tmp_path, capsys):
    root, settings, _ = exported
    command = ["--data", root / "run" / "records", "--tokenizer", settings.tokenizer]
    command += ["--rounds", 1, "--rows_steps", 2, "--steps", 2, "--output_dir", tmp_path]
    command += ["--override", f"model_overrides={runs.MODEL}", "batch_size=4", "inputs_length=32"]
    assert benchmark_pretraining.main([str(part) for part in command]) == 0
    page = next(tmp_path.glob("pretraining_*.md")).read_text()
    assert "| rows made / rows consumed |" in page and "steps with a checkpoint / without |" in page
    assert page in capsys.readouterr().out
