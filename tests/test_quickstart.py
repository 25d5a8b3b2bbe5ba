"""The quickstart from end to end, at its smallest: results, card, reuse, interruption, errors."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import interruptible

from examples import quickstart, quickstart_report
from modeling_convt5 import ConvT5Config

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = [sys.executable, str(ROOT / "examples" / "quickstart.py")]
METHODS = {"pretrained", "scratch", "tfidf", "tfidf_whole", "majority"}


def start(folder, *arguments):
    command = [*SCRIPT, "--smoke", "--output_dir", str(folder), *arguments]
    return subprocess.Popen(
        interruptible(command),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )


def finish(process, timeout=300):
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Interrupted in pre-training after a checkpoint, then run to its end: (folder, outputs)."""
    folder = tmp_path_factory.mktemp("quickstart")
    process = start(folder)
    deadline = time.monotonic() + 200
    while not list(folder.glob("pretrain-*.part/run/checkpoints/[1-9]*")):  # not that of step 0
        assert process.poll() is None and time.monotonic() < deadline, finish(process)[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    interrupted = finish(process)
    return folder, interrupted, finish(start(folder))


def test_interruption_is_clean_and_resumes(smoke):
    _, (code, output), (resumed_code, resumed_output) = smoke
    assert code == 130, output
    assert "Interrupted. Finished stages and checkpoints are kept" in output
    assert "Traceback" not in output
    assert resumed_code == 0, resumed_output
    assert "text: reusing" in resumed_output and "tokenizer: reusing" in resumed_output
    assert "Going on from the checkpoint of step " in resumed_output


def test_results(smoke):
    folder, _, (_, output) = smoke
    results = json.loads((folder / "hub" / "results.json").read_text())
    assert set(results["metrics"]) == METHODS
    for found in results["metrics"].values():
        for metric in ("accuracy", "macro_f1"):
            assert len(found[metric]["per_seed"]) == len(results["settings"]["seeds"])
            assert 0 <= found[metric]["mean"] <= 1
    assert results["reload"]["identical"] == results["reload"]["compared"] > 0
    assert results["pretraining"]["history"][-1][0] == results["pretraining"]["steps"]
    assert results["rows"]["train"] == quickstart.SMOKE["labels"]
    assert quickstart_report.table(results) in output
    assert quickstart_report.verdict(results) in output


def test_hub_folder_and_card(smoke):
    folder, _, _ = smoke
    hub = folder / "hub"
    names = {path.name for path in hub.iterdir()}
    assert {"README.md", "results.json", "results.png", "config.json", "model.safetensors"} <= names
    assert {"tokenizer.json", "modeling_convt5.py", "convolution.py"} <= names
    assert not any(name.endswith((".bin", ".pt", ".part")) for name in names)
    # The model is the command line's, and nothing of the preset that pre-training starts from.
    config = ConvT5Config.from_pretrained(hub)
    assert config.num_filters is None
    assert config.encoder_dilation == quickstart.SMOKE["dilations"]
    results = json.loads((hub / "results.json").read_text())
    card = (hub / "README.md").read_text()
    assert card == quickstart_report.card(results)
    assert "2105.03322" in card and "revision=" in card and "code_revision" in card
    for heading in ("Usage", "Intended use", "Training data", "Evaluation", "Citation"):
        assert f"\n## {heading}" in card


def test_eight_bit_weights_of_the_quickstart(smoke, tmp_path):
    pytest.importorskip("torchao", reason="torchao (the extra `int8`) is not installed")
    folder, _, _ = smoke
    command = [sys.executable, ROOT / "examples" / "quantize.py", "--model", folder / "hub"]
    command += ["--output", tmp_path / "int8", "--quickstart", folder]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    line = re.compile(r"(.+): ([\d.]+) MB, accuracy ([\d.]+)")
    before, after = (line.fullmatch(text).groups() for text in done.stdout.splitlines())
    assert (before[0], after[0]) == (str(folder / "hub"), str(tmp_path / "int8"))
    assert float(after[1]) < float(before[1])
    assert 0 <= float(after[2]) <= 1


def test_rerun_says_what_it_reuses(smoke):
    folder, _, _ = smoke
    code, output = finish(start(folder))
    assert code == 0, output
    for stage in ("text", "tokenizer", "pretrain", "finetune-pretrained", "finetune-scratch"):
        assert f"{stage}: reusing" in output.replace("-0.02-seed0", "")
    assert "making" not in output


def results(pretrained, scratch, std=0.01):
    metric = {"std": std, "per_seed": []}
    means = {"pretrained": pretrained, "scratch": scratch, "tfidf": 0.5, "tfidf_whole": 0.6}
    return {"metrics": {key: {"accuracy": {"mean": mean, **metric}} for key, mean in means.items()}}


def test_verdict_is_computed_whichever_way_it_went():
    ahead = quickstart_report.verdict(results(0.7, 0.6))
    assert "pre-trained is ahead of ConvT5, not pre-trained by 10.0 points" in ahead
    assert "more than the larger standard deviation" in ahead
    behind = quickstart_report.verdict(results(0.600, 0.605))
    assert "not pre-trained is ahead of ConvT5, pre-trained by 0.5 points" in behind
    assert "within the larger standard deviation" in behind


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--d_model", "0"], "--d_model (=0) must be above 0"),
        (["--pretrained_rates", "1e-3", "-1"], "--pretrained_rates (=-1.0) must be above 0"),
        (["--packages", "numpy", "nonsense"], "must name two or more of python, datasets"),
        (["--vocab_size", "99"], "--vocab_size (=99) must be at least 500"),
        (["--seeds", "1", "1"], "--seeds (=[1, 1]) must be distinct"),
        (["--dropout_rate", "1"], "--dropout_rate (=1.0) must be at least 0 and below 1"),
        (["--dataset_config_name", "en"], "needs --dataset_name as well"),
        (["--labels", "3"], "--labels (=3) must be at least the number of packages, 13"),
    ],
)
def test_errors_name_the_argument(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        quickstart.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_data_set_that_cannot_be_had_is_said(tmp_path):
    process = subprocess.run(
        [*SCRIPT, "--smoke", "--output_dir", str(tmp_path), "--dataset_name", "no/such"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=200,
    )
    assert process.returncode == 1
    assert "error: --dataset_name (=no/such): expected a data set" in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.slow
def test_pretraining_helps_at_full_size(tmp_path):
    process = subprocess.run([*SCRIPT, "--output_dir", str(tmp_path)], cwd=ROOT, timeout=1700)
    assert process.returncode == 0
    found = json.loads((tmp_path / "hub" / "results.json").read_text())
    pretrained, scratch = (found["metrics"][key]["accuracy"] for key in ("pretrained", "scratch"))
    assert pretrained["mean"] - scratch["mean"] > max(pretrained["std"], scratch["std"])
    assert found["peak_memory_mb"] < 4096
