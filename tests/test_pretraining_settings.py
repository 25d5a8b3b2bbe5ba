"""Configurations are run records; whatever does not fit is refused in a sentence."""

import ast
import dataclasses
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pretraining_runs as runs
import pytest

from modeling_convt5 import ConvT5Config
from pretraining.configs import base_lightweight
from pretraining.estimate import estimate
from pretraining.input_pipeline import Batches
from pretraining.main import main, parse
from pretraining.prepare import prepare
from pretraining.records import TokenStream
from pretraining.settings import Settings, load, override
from pretraining.step import make_mesh, model_config
from pretraining.tokens import open_tokenizer
from pretraining.train import find_records, model_digest, set_up

NAMES = [
    f"{size}_{family}"
    for size in ("small", "base", "large")
    for family in ("lightweight", "dynamic", "dilated", "transformer")
]


@pytest.mark.parametrize("name", [*NAMES, "tiny_cpu"])
def test_a_configuration_is_a_run_record(name):
    path = runs.ROOT / "pretraining" / "configs" / f"{name}.py"
    settings = load(str(path))
    text = ast.get_docstring(ast.parse(path.read_text()))
    for line in estimate(settings):
        assert line in text, line
    assert f"--config pretraining/configs/{name}.py" in text and "result" in text
    size, _, family = name.partition("_")
    if name != "tiny_cpu":
        assert settings.model == f"{family}-{size}"
        free = {"model": settings.model, "remat": settings.remat}
        assert dataclasses.replace(base_lightweight.config, **free) == settings


def test_the_base_configuration_is_the_papers():
    config = base_lightweight.config
    assert (config.train_steps, config.batch_size, config.inputs_length) == (524_288, 128, 512)
    assert (config.optimizer, config.warmup_steps, config.z_loss) == ("adafactor", 10_000, 1e-4)
    assert not config.dropout and config.dtype == "bfloat16"


def test_overrides_are_literals_strings_and_keys():
    found = override(
        Settings(),
        [
            *("train_steps=10", "data_dir=/a=b", "packing=True", "mesh.fsdp=2", "z_loss=0"),
            *("model_overrides={'d_model': 32}", "model_overrides.d_ff=64"),
        ],
    )
    assert (found.train_steps, found.data_dir, found.packing) == (10, "/a=b", True)
    assert found.mesh == {"data": -1, "fsdp": 2, "tensor": 1} and found.z_loss == 0
    assert found.model_overrides == {"d_model": 32, "d_ff": 64}


def test_every_field_is_read(tmp_path):
    """A field that nothing reads is a promise that nothing keeps."""
    sources = [p for p in (runs.ROOT / "pretraining").glob("*.py") if p.name != "settings.py"]
    text = "\n".join(path.read_text() for path in sources)
    derived = {"noise_density", "mean_noise_span_length"}
    for field in dataclasses.fields(Settings):
        assert f"settings.{field.name}" in text or field.name in derived, field.name


# --- Bad inputs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("train_stpes=10", "there is no field 'train_stpes'. The fields are data_dir"),
        ("train_steps.x=10", "there is no field 'train_steps.x'"),
        ("train_steps", "expected field=value"),
        ("train_steps=ten", r"Settings.train_steps='ten' is not allowed: expected int, got str"),
        ("train_steps=0", r"Settings.train_steps=0 is not allowed: expected 1 or more"),
        ("batch_size=True", "expected int, got bool"),
        ("batch_size=3.5", "expected int, got float"),
        ("packing=yes", "expected bool, got str"),
        ("optimizer=adam", "expected one of adafactor, adamw"),
        ("dtype=float16", "expected one of bfloat16, float32, float64"),
        ("on_bad_step=ignore", "expected one of stop, skip, rewind"),
        ("learning_rate=-1", "expected None or a number above 0"),
        ("noise_density=1.5", r"noise_density \(=1.5\) must lie between 0 and 1"),
        ("inputs_length=2", r"inputs_length \(=2\) must be at least 3"),
        ("accumulation_steps=3", "expected a multiple of accumulation_steps=3"),
        ("mesh.model=2", "There is no axis 'model'"),
        ("mesh={'data': 0}", "expected sizes of 1 or more, or -1"),
        ("mesh={'data': -1, 'fsdp': -1}", "expected at most one -1"),
        ("keep_last=0", "Settings.keep_last=0 is not allowed: expected 1 or more"),
        ("accumulation_steps=0", "expected 1 or more"),
        ("mesh={{}:1}", "Settings.mesh"),
        (f"seed={2**63}", "expected a number below"),
    ],
)
def test_wrong_fields(pair, message):
    with pytest.raises(ValueError, match=message):
        override(Settings(), [pair])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no such file"),
        ("x = 1", "expected `config`, or `get_config\\(\\)` that returns one"),
        ("config = {'train_steps': 1}", "of class pretraining.settings.Settings, got dict"),
    ],
)
def test_wrong_configuration_files(text, message, tmp_path):
    path = tmp_path / "config.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load(str(path))
    path.write_text(
        "from pretraining.settings import Settings\ndef get_config():\n    return Settings()\n"
    )
    assert load(str(path)) == Settings()


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A tokenizer, records, and settings that fit them."""
    root = tmp_path_factory.mktemp("settings")
    tokenizer = runs.make_tokenizer(root / "tokenizer.json")
    prepare(str(runs.make_data(root / "text")), str(tokenizer), root / "records", workers=1)
    fields = {**runs.FAST, "data_dir": str(root / "records"), "tokenizer": str(tokenizer)}
    return root, Settings(model="lightweight-tiny", dtype="float32", **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data_dir": ""}, "Settings.data_dir is not set"),
        ({"data_dir": "/nowhere"}, "data_dir='/nowhere': there is no such file or folder"),
        ({"data_dir": "hf://c4"}, "expected hf://owner/name or hf://owner/name/config"),
        ({"tokenizer": "/nowhere.json"}, "there is no file /nowhere.json"),
        ({"model": "lightweight-huge"}, "unknown preset"),
        ({"model_overrides": {"d_modle": 8}}, "unknown field d_modle"),
        ({"model_overrides": {"vocab_size": 64}}, "less than the 82 ids of the tokenizer"),
        ({"model_overrides": {"eos_token_id": 5}}, "but the tokenizer's is 1"),
        ({"mesh": {"data": 3}}, "does not make 1 devices"),
        ({"inputs_length": 512}, "25|28 noise spans a row, but the tokenizer 20 sentinels"),
        ({"inputs_length": 4000, "mean_noise_span_length": 40.0}, "less than one row of"),
        ({"optimizer": "adamw", "warmup_steps": 24, "train_steps": 24}, "less than train_steps=24"),
    ],
    ids=str,
)
def test_wrong_runs(ready, fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        set_up(dataclasses.replace(ready[1], **fields), tmp_path / "run")


def test_a_mesh_that_does_not_divide_the_batch(monkeypatch):
    monkeypatch.setattr("jax.device_count", lambda: 8)
    with pytest.raises(ValueError, match="expected a multiple of data x fsdp x accumulation_steps"):
        make_mesh(Settings(batch_size=12))
    with pytest.raises(ValueError, match="does not make 8 devices: the sizes' product must be 8"):
        make_mesh(Settings(mesh={"data": -1, "fsdp": 3}))


def test_wrong_tokenizers(tmp_path, ready):
    root, settings = ready
    (tmp_path / "torn.json").write_text("{")
    with pytest.raises(ValueError, match="is not a tokenizer of the `tokenizers` library"):
        open_tokenizer(str(tmp_path / "torn.json"))
    text = (root / "tokenizer.json").read_text()
    (tmp_path / "none.json").write_text(text.replace("extra_id", "other_id"))
    with pytest.raises(ValueError, match="has no <extra_id_0>. Span corruption needs T5's"):
        open_tokenizer(str(tmp_path / "none.json"))
    swapped = json.loads(text)
    for token in swapped["added_tokens"]:
        names = {"<extra_id_3>": "<extra_id_4>", "<extra_id_4>": "<extra_id_3>"}
        token["content"] = names.get(token["content"], token["content"])
    (tmp_path / "up.json").write_text(json.dumps(swapped))
    with pytest.raises(ValueError, match="sentinels count down from <extra_id_0>"):
        open_tokenizer(str(tmp_path / "up.json"))
    other = open_tokenizer(str(runs.make_tokenizer(tmp_path / "other.json", sentinels=21)))
    with pytest.raises(ValueError, match="was written with another tokenizer"):
        find_records(settings, other, tmp_path)


def test_wrong_records(tmp_path, ready):
    root, _ = ready
    folder = tmp_path / "records"
    shutil.copytree(root / "records", folder)
    path = folder / "00000-train.tokens"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="00000-train.tokens: expected .* bytes, found .* bytes"):
        TokenStream(folder, "train")
    path.unlink()
    with pytest.raises(ValueError, match="found nothing"):
        TokenStream(folder, "train")
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="manifest.json is damaged"):
        TokenStream(folder, "train")
    with pytest.raises(ValueError, match="holds no manifest.json: write records with"):
        TokenStream(tmp_path, "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no text to train on"):
        prepare(str(tmp_path / "empty"), str(root / "tokenizer.json"), tmp_path / "out")
    other = runs.make_tokenizer(tmp_path / "other.json", sentinels=21)
    with pytest.raises(ValueError, match="Choose another output folder"):
        prepare(str(root / "text"), str(other), root / "records", workers=1)


def test_wrong_places(tmp_path, ready):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file: expected a folder, or nothing yet"):
        set_up(ready[1], tmp_path / "file")
    with pytest.raises(ValueError, match="expected a folder of a file system that all hosts share"):
        set_up(ready[1], Path("gs://bucket/run"))
    with pytest.raises(ValueError, match="--export .*file is a file, or lies below one"):
        set_up(ready[1], tmp_path / "run", export_to=str(tmp_path / "file"))
    with pytest.raises(ValueError, match="sub is a file, or lies below one"):
        set_up(ready[1], tmp_path / "run", export_to=str(tmp_path / "file" / "sub"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="mine holds something else than an exported model"):
        set_up(ready[1], tmp_path / "run", export_to=str(tmp_path / "mine"))
    for name in ("", "a/b/c d"):
        with pytest.raises(ValueError, match=f"--push_to_hub '{name}'"):
            set_up(ready[1], tmp_path / "run", repository=name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--config x", "the following arguments are required: --workdir"),
        ("--config x --workdir y --coordinator a:1", "needs --num_processes and --process_id"),
        ("--config x --workdir y --num_processes 2", "go with --coordinator HOST:PORT"),
    ],
)
def test_wrong_command_lines(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse(arguments.split())
    assert message in capsys.readouterr().err


# --- What a run may be taken up with -------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(ready, tmp_path_factory):
    """The work directory of a run of two steps, and its settings."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    fields = {"data_dir": ready[1].data_dir, "tokenizer": ready[1].tokenizer, "train_steps": 2}
    assert main(runs.arguments(workdir, **fields)) == 0
    return workdir, fields


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed: 0 in the checkpoint, 1 now"),
        ({"model_overrides": {**runs.MODEL, "d_ff": 64}}, "another run.*undo the change"),
        ({"optimizer": "adamw", "warmup_steps": 1}, "optimizer: 'adafactor' in the checkpoint"),
    ],
    ids=str,
)
def test_checkpoints_of_another_run(finished, change, message):
    workdir, fields = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=f"(?s){message}"):
        main(runs.arguments(workdir, **{**fields, **change}))
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_still_serves(finished, tmp_path):
    workdir, fields = finished
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    for path in (copy / "checkpoints" / "2" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(ValueError, match="(?s)checkpoints/2 cannot be read .*remove that folder"):
        main(runs.arguments(copy, **fields))
    shutil.rmtree(copy / "checkpoints" / "2")
    assert main(runs.arguments(copy, **fields)) == 0
    assert runs.records(copy) == runs.records(workdir)


# --- Bad steps -----------------------------------------------------------------------------------


@pytest.fixture
def poisoned(ready, tmp_path):
    """Records of which one row, read in the fifth step, has a token of no vocabulary: NaN."""
    folder, settings = tmp_path / "records", ready[1]
    shutil.copytree(ready[0] / "records", folder)
    tokens = np.fromfile(folder / "00000-train.tokens", "<u2")
    # The batches' threads read ahead from a memory map: of the other folder, whose file stays.
    source = ready[0] / "records"
    batches = Batches(settings, open_tokenizer(settings.tokenizer), source, "train", np.arange(4))
    fifth = next(batch for number, batch in enumerate(batches, 1) if number == 5)
    row = min(fifth["rows"].tolist())
    tokens[row * settings.raw_length] = 60_000
    tokens.tofile(folder / "00000-train.tokens")
    return {"data_dir": str(folder), "tokenizer": settings.tokenizer}, row, tmp_path / "run"


def test_bad_steps_stop_skip_or_rewind(poisoned):
    fields, row, workdir = poisoned
    fields = {**fields, "train_steps": 40, "eval_every": 0, "keep_last": 1}
    with pytest.raises(SystemExit, match="was not finite, or the loss a spike. The step was not"):
        main(runs.arguments(workdir, on_bad_step="stop", **fields))
    found = runs.records(workdir, "rows.jsonl")
    bad = found[-1]["step"]
    assert row in found[-1]["rows"] and bad == 5
    assert all(record["loss"] is not None for record in runs.records(workdir))
    (kept,) = (int(p.name) for p in (workdir / "checkpoints").iterdir())
    assert kept == 3

    steps = {"train_steps": bad + 2}
    assert main(runs.arguments(workdir, on_bad_step="skip", **{**fields, **steps})) == 0
    assert runs.records(workdir)[-1]["skipped"] == 1
    state = runs.final_state(workdir, bad + 2)
    assert all(np.isfinite(v).all() for k, v in state.items() if k != "run")


def test_a_rewound_run_goes_on_behind_the_bad_batch(poisoned):
    fields, row, workdir = poisoned
    fields = {**fields, "train_steps": 30, "eval_every": 0, "on_bad_step": "rewind"}
    assert main(runs.arguments(workdir, **fields)) == 0
    found = runs.records(workdir, "rows.jsonl")
    assert [record["step"] for record in found] == list(range(1, 31))
    assert not any(row in record["rows"] for record in found)
    assert all(record["skipped"] == 0 for record in runs.records(workdir))


def test_every_module_says_what_it_is_for():
    for path in (runs.ROOT / "pretraining").glob("*.py"):
        assert importlib.import_module(f"pretraining.{path.stem}").__doc__


def test_the_configuration_of_a_model_is_the_tokenizers(ready):
    root, settings = ready
    tokenizer = open_tokenizer(str(root))
    config = model_config(settings, tokenizer)
    assert (config.vocab_size, tokenizer.size, tokenizer.num_sentinels) == (128, 82, 20)
    assert (config.pad_token_id, config.eos_token_id, config.decoder_start_token_id) == (0, 1, 0)


def test_the_digest_of_a_model_is_of_its_own_fields():
    """Not of the defaults that this release of transformers puts beside them."""
    one, other = (ConvT5Config.from_preset("lightweight-tiny") for _ in range(2))
    other.transformers_version, other.max_length, other.of_next_year = "9.9", 7, True
    assert model_digest(one) == model_digest(other)
    other.d_ff += 1
    assert model_digest(one) != model_digest(other)


def test_a_record_on_a_full_disk_is_an_error_of_the_disk(tmp_path):
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "from pretraining.checkpointing import is_disk_full\n"
        "from pretraining.metrics import JsonLines\n"
        "lines = JsonLines(sys.argv[1])\n"
        "try:\n"
        "    while True: lines.append({'step': 1, 'loss': 0.5})\n"
        "except OSError as error: sys.exit(0 if is_disk_full(error) else 3)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "metrics.jsonl")]
    assert subprocess.run(command, cwd=runs.ROOT).returncode == 0


def test_preempted_while_it_imports(ready):
    command = [sys.executable, "-m", "pretraining.main", "--config", runs.CONFIG, "--workdir", "x"]
    process = subprocess.Popen(
        command, cwd=ready[0], env={**os.environ, "PYTHONPATH": str(runs.ROOT)}
    )
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        process.kill()
        pytest.skip("this system does not show which signals a process catches")
    while process.poll() is None:
        (caught,) = re.findall(r"SigCgt:\s*(\w+)", status.read_text())
        if int(caught, 16) >> (signal.SIGTERM - 1) & 1:
            break
        time.sleep(0.01)
    process.terminate()
    assert process.wait(60) == 75


def test_a_full_disk_is_named_and_the_last_checkpoint_stays(finished, tmp_path):
    """A limit on file sizes, from the first step on, stands in for the disk."""
    workdir, fields = finished
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from pretraining import main, train; begin = train.begin\n"
        "def limited(*args):\n"
        "    found = begin(*args)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, 4_000))\n"
        "    return found\n"
        "train.begin = limited; sys.exit(main.main(sys.argv[1:]))"
    )
    command = runs.arguments(copy, **{**fields, "train_steps": 4, "log_rows": False})
    run = subprocess.run(
        [sys.executable, "-c", script, *command], cwd=runs.ROOT, capture_output=True, text=True
    )
    assert run.returncode == 1 and "the disk is full" in run.stderr, run.stderr[-3000:]
    assert "it goes on from the last checkpoint" in run.stderr
    assert main(runs.arguments(copy, **{**fields, "train_steps": 4})) == 0
    assert runs.records(copy)[-1]["step"] == 4
