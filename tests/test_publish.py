"""Cards and publishing: what is refused, what is sent, and every fault of a Hub on the way."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file
from task_files import save_tiny_model
from test_hub_server import add, hub  # noqa: F401 - a running Hub

from evaluation.results import read_results, summarise, write_json
from model_cards import publish, render, sandbox
from modeling_convt5 import ConvT5Config, ConvT5ForConditionalGeneration

CARDS = Path(render.__file__).parent / "cards"
TEXTS = ["the filter reads its past and nothing else", "positive negative"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    return save_tiny_model(tmp_path_factory.mktemp("saved"), TEXTS)


@pytest.fixture
def checkpoint(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


@pytest.fixture
def results(tmp_path):
    record = {
        "task": "sst2",
        "model": "checkpoint",
        "metrics": summarise([{"accuracy": 0.8125}, {"accuracy": 0.84375}]),
        "rows": {"test": 64},
        "command": "python examples/finetune.py --task sst2",
        "evaluated_on": "test",
    }
    write_json(tmp_path / "run" / "results.json", record)
    (tmp_path / "run" / "curve.png").write_bytes(b"\x89PNG")
    return tmp_path / "run" / "results.json"


@pytest.fixture
def no_processes(monkeypatch):
    """The two sandboxed processes are left out where only the way to the Hub is of interest."""
    monkeypatch.setattr(publish, "outputs", lambda *args, **kwargs: np.zeros(3))


def run(hub, checkpoint, *more):  # noqa: F811
    arguments = ["--checkpoint", str(checkpoint), "--repo_id", "user/tiny", "--endpoint", hub.url]
    return publish.main([*arguments, *map(str, more)])


def test_published_and_loaded_back_in_both_frameworks(hub, checkpoint, results, capsys):  # noqa: F811
    assert run(hub, checkpoint, "--results", results, "--private") == 0
    printed = capsys.readouterr().out
    assert "loaded back in torch" in printed
    repo = hub.repo("user/tiny")
    assert repo.private and len(repo.commits) == 2  # the Hub's initial one, and ours
    files = repo.find("main").files
    assert {"README.md", "SHA256SUMS", ".eval_results/sst2.yaml", "plots/curve.png"} <= set(files)
    for path in checkpoint.iterdir():
        assert files[path.name] == path.read_bytes()
    card = ModelCard(files["README.md"].decode())
    assert card.data.eval_results[0].metric_value == pytest.approx(0.828125)
    assert "| sst2 | 64 test | accuracy | 0.8281 | 0.0221 | 2 |" in card.text
    assert "![curve](plots/curve.png)" in card.text
    sums = dict(line.split("  ")[::-1] for line in files["SHA256SUMS"].decode().splitlines())
    assert sums["convolution.py"] in card.text and "model.safetensors" in sums


def test_again_nothing_is_sent(hub, checkpoint, no_processes):  # noqa: F811
    assert run(hub, checkpoint) == 0
    head, puts = hub.repo("user/tiny").find("main").oid, len(hub.asked("PUT", "/lfs/"))
    assert run(hub, checkpoint) == 0
    assert hub.repo("user/tiny").find("main").oid == head
    assert len(hub.asked("PUT", "/lfs/")) == puts and len(hub.asked("POST", "/commit/")) == 1


def test_a_new_version_replaces_code_and_weights(hub, checkpoint, no_processes):  # noqa: F811
    assert run(hub, checkpoint) == 0
    old = hub.repo("user/tiny").find("main")
    model = ConvT5ForConditionalGeneration.from_pretrained(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size="20KB")
    assert run(hub, checkpoint) == 0
    new = hub.repo("user/tiny").find("main")
    assert "model.safetensors" in old.files and "model.safetensors" not in new.files
    assert "model.safetensors.index.json" in new.files
    before = ConvT5ForConditionalGeneration.from_pretrained("user/tiny", revision=old.oid)
    after = ConvT5ForConditionalGeneration.from_pretrained("user/tiny", revision=new.oid)
    for key, value in before.state_dict().items():
        assert torch.equal(after.state_dict()[key], value)


def test_plots_of_several_results_keep_their_names(hub, checkpoint, results, no_processes, capsys):  # noqa: F811
    other = results.parent.with_name("other") / "results.json"
    shutil.copytree(results.parent, other.parent)
    assert run(hub, checkpoint, "--results", results, other) == 2
    assert "sst2, sst2 are not all different" in capsys.readouterr().err
    record = json.loads(other.read_text()) | {"task": "imdb"}
    other.write_text(json.dumps(record))
    assert run(hub, checkpoint, "--results", results, other) == 0
    files = hub.repo("user/tiny").find("main").files
    assert {"plots/sst2_curve.png", "plots/imdb_curve.png"} <= set(files)
    with pytest.raises(SystemExit):
        publish.main(["--checkpoint", str(checkpoint), "--repo_id", "tiny"])
    assert "--repo_id tiny: expected owner/name" in capsys.readouterr().err


def test_a_dry_run_sends_nothing(hub, checkpoint, no_processes, capsys):  # noqa: F811
    assert run(hub, checkpoint, "--dry_run") == 0
    assert hub.requests == [] and "nothing was sent" in capsys.readouterr().out


FAULTS = [
    ("POST", "/api/repos/create"),
    ("GET", "/api/models/"),
    ("POST", "/preupload/"),
    ("POST", "/objects/batch"),
    ("PUT", "/lfs/"),
    ("POST", "/verify"),
    ("POST", "/commit/"),
]


@pytest.mark.parametrize("status", [503, None], ids=["busy", "cut"])
@pytest.mark.parametrize("times", [1, 100])
@pytest.mark.parametrize(("method", "path"), FAULTS)
def test_faults(hub, checkpoint, no_processes, capsys, method, path, status, times):  # noqa: F811
    """Success or a clear error; never half a repository; then the same command succeeds."""
    assert run(hub, checkpoint) == 0
    old = hub.repo("user/tiny").find("main")
    model = ConvT5ForConditionalGeneration.from_pretrained(checkpoint)
    with torch.no_grad():
        model.shared.weight.mul_(2)
    model.save_pretrained(checkpoint)
    hub.fail(method, path, status, times)
    code = run(hub, checkpoint)
    new = hub.repo("user/tiny").find("main")
    weights = (checkpoint / "model.safetensors").read_bytes()
    if code == 0:
        assert new.parent == old.oid and new.files["model.safetensors"] == weights
    else:
        assert code == 1 and "Run the command again" in capsys.readouterr().err
        assert new.oid == old.oid
    hub.faults.clear()
    sent = len(hub.asked("PUT", "/lfs/"))
    assert run(hub, checkpoint) == 0
    assert hub.repo("user/tiny").find("main").files["model.safetensors"] == weights
    if code == 0:  # all was there
        assert len(hub.asked("PUT", "/lfs/")) == sent


def test_what_has_arrived_is_not_sent_twice(hub, checkpoint, no_processes):  # noqa: F811
    hub.fail("POST", "/commit/", 500)
    assert run(hub, checkpoint) == 1
    assert len(hub.asked("PUT", "/lfs/")) == 1
    assert list(hub.repo("user/tiny").find("main").files) == [".gitattributes"]
    assert run(hub, checkpoint) == 0
    assert len(hub.asked("PUT", "/lfs/")) == 1


def test_someone_elses_commit_in_between_is_kept(hub, checkpoint, no_processes, capsys):  # noqa: F811
    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_repo("user/tiny")

    def other():
        api.create_commit("user/tiny", [add("notes.md", "mine")], commit_message="mine")

    hub.fail("POST", "/preupload/", before=other)
    assert run(hub, checkpoint) == 1
    assert "has changed since commit" in capsys.readouterr().err
    assert hub.repo("user/tiny").find("main").files["notes.md"] == b"mine"
    assert run(hub, checkpoint) == 0
    assert "notes.md" in hub.repo("user/tiny").find("main").files


def test_a_stale_parent_is_an_error(hub, checkpoint, no_processes, capsys):  # noqa: F811
    assert run(hub, checkpoint) == 0
    first = next(iter(hub.repo("user/tiny").commits))
    (checkpoint / "LICENSE").write_text("Apache-2.0")
    assert run(hub, checkpoint, "--parent_commit", first) == 1
    assert "has changed since commit" in capsys.readouterr().err


def test_a_token_that_may_not_write(hub, checkpoint, no_processes, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert run(hub, checkpoint) == 1
    assert "hf auth login" in capsys.readouterr().err and not hub.repos


def test_other_outputs_after_loading_back(hub, checkpoint, monkeypatch, capsys):  # noqa: F811
    def outputs(source, *args, **kwargs):
        return np.zeros(3) if source == checkpoint else np.ones(3)

    monkeypatch.setattr(publish, "outputs", outputs)
    assert run(hub, checkpoint) == 1
    assert "computes something else" in capsys.readouterr().err


def _cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def _stray_shard(folder):
    shutil.copyfile(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")


def _other_type(folder):
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "model_type": "t5"}))


def _without(folder, name):
    """The folder lacks one tensor."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})


BROKEN = {
    "spiece.model may hold a pickle": lambda f: (f / "spiece.model").write_bytes(b"\x80\x02x"),
    "LICENSE may hold a pickle": lambda f: (f / "LICENSE").write_bytes(b"PK\x03\x04"),
    "tokenizer.json is damaged": lambda f: (f / "tokenizer.json").write_text("garbage"),
    "generation_config.json holds no": lambda f: (f / "generation_config.json").write_text("[]"),
    "pipeline_convt5.py is no Python": lambda f: (f / "pipeline_convt5.py").write_text("def"),
    "evil.py is imported by no part": lambda f: (f / "evil.py").write_text("import os"),
    "model.safetensors.index.json holds no": lambda f: (
        f / "model.safetensors.index.json"
    ).write_text("[]"),
    "model.safetensors is no safetensors file": lambda f: (f / "model.safetensors").write_bytes(
        b"\x02\0\0\0\0\0\0\0[]"
    ),
    "pytorch_model.bin may hold a pickle": lambda f: (f / "pytorch_model.bin").write_bytes(b"x"),
    "notes.json may hold a pickle": lambda f: (f / "notes.json").write_bytes(b"\x80\x04x"),
    "optimizer.pt may hold a pickle": lambda f: (f / "optimizer.pt").write_bytes(b"x"),
    "trainer_state.json is no part": lambda f: (f / "trainer_state.json").write_text("{}"),
    "model.safetensors is missing": lambda f: (f / "model.safetensors").unlink(),
    "model.safetensors is cut short": _cut,
    "model.safetensors is no safetensors": lambda f: (f / "model.safetensors").write_bytes(b"x"),
    "model-00001-of-00002.safetensors is in no index": _stray_shard,
    "there is no tokenizer": lambda f: (f / "tokenizer.json").unlink(),
    "config.json is missing": lambda f: (f / "config.json").unlink(),
    "config.json is damaged": lambda f: (f / "config.json").write_text("{"),
    "is of model_type 't5'": _other_type,
    "code file modeling_convt5.py is missing": lambda f: (f / "modeling_convt5.py").unlink(),
    "LICENSE is a link": lambda f: (f / "LICENSE").symlink_to("/etc/hostname"),
    "more/ is a folder": lambda f: (f / "more").mkdir(),
}


@pytest.mark.parametrize("message", BROKEN)
def test_folders_that_must_not_be_published(hub, checkpoint, capsys, message):  # noqa: F811
    BROKEN[message](checkpoint)
    assert run(hub, checkpoint) == 2
    assert message in capsys.readouterr().err and hub.requests == []


def test_weights_that_are_not_whole_are_found_before_anything_is_sent(checkpoint):
    _without(checkpoint, "decoder.layers.0.cross_attention.q.weight")
    with pytest.raises(ValueError, match=r"missing_keys .*cross_attention\.q"):
        sandbox.outputs(checkpoint)


def test_weights_that_compute_nan_are_found_before_anything_is_sent(checkpoint):
    model = ConvT5ForConditionalGeneration.from_pretrained(checkpoint)
    with torch.no_grad():
        model.shared.weight.fill_(float("nan"))
    model.save_pretrained(checkpoint)
    with pytest.raises(ValueError, match="computes NaN"):
        sandbox.outputs(checkpoint)


@pytest.mark.parametrize("name", ["me/na me", "me/{x}", "me/a--b", "me/x.git", "me/" + "a" * 200])
def test_names_that_the_hub_refuses(checkpoint, capsys, name):
    with pytest.raises(SystemExit) as caught:
        publish.main(["--checkpoint", str(checkpoint), "--repo_id", name, "--dry_run"])
    assert caught.value.code == 2 and f"--repo_id {name}" in capsys.readouterr().err


def test_plots_have_any_name(hub, checkpoint, results, no_processes):  # noqa: F811
    (results.parent / "my loss_0.5.png").write_bytes(b"\x89PNG")
    assert run(hub, checkpoint, "--results", results) == 0
    files = hub.repo("user/tiny").find("main").files
    assert "plots/my loss_0.5.png" in files
    assert b"(plots/my%20loss_0.5.png)" in files["README.md"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import socket; socket.create_connection(('127.0.0.1', 9))", "reach the network"),
        ("import subprocess; subprocess.run(['true'])", "start a program"),
        ("open('/tmp/convt5-sandbox-test', 'w')", "tried to write /tmp/convt5-sandbox-test"),
        ("open(b'/tmp/convt5-sandbox-test', 'w')", "tried to write /tmp/convt5-sandbox-test"),
        ("import os; os.remove('/tmp/convt5-none')", "tried to write /tmp/convt5-none"),
        ("import os; os.mkdir('/tmp/convt5-sandbox-test')", "tried to write /tmp/convt5-sandbox"),
    ],
)
def test_code_with_side_effects_is_refused(checkpoint, line, message):
    path = checkpoint / "cache_convt5.py"
    path.write_text(f"{path.read_text()}\n{line}\n")
    with pytest.raises(ValueError, match=message):
        sandbox.outputs(checkpoint)
    assert not Path("/tmp/convt5-sandbox-test").exists()


def test_cards_are_complete_and_their_numbers_from_results(results):
    records = read_results(results)
    config = ConvT5Config.from_preset("lightweight-tiny")
    card = render.render("user/tiny", config, "of an unstated origin", records)
    render.check_card(card, records)
    assert "[0.8281]" not in card
    for wrong, message in (
        (card.replace("0.8281", "0.9281"), "says 0.9281"),
        (card.replace("## Limitations\n", ""), "missing or out of order: .'Limitations'"),
        (card.replace(render.NOT_MEASURED, ""), "'Environmental figures' is empty"),
        (card.replace("license: apache-2.0\n", ""), "lacks license"),
    ):
        with pytest.raises(ValueError, match=message):
            render.check_card(wrong, records)


def test_cards_of_the_variants_are_rendered_from_the_template(tmp_path):
    assert render.main(["--output_dir", str(tmp_path)]) == 0
    rendered = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert len(rendered) == 9
    assert rendered == {path.name: path.read_text() for path in CARDS.iterdir()}
    assert all(render.NOT_EVALUATED in text for text in rendered.values())
    assert "67,145,728 parameters" in rendered["convt5-released-lightweight-small.md"]
    assert "sees 195 tokens" in rendered["convt5-dilated-base.md"]


def test_results_belong_to_one_variant(results, tmp_path, capsys):
    arguments = ["--output_dir", str(tmp_path), "--variant", "convt5-dynamic-base"]
    assert render.main([*arguments, "--results", str(results)]) == 0
    assert "0.8281" in (tmp_path / "convt5-dynamic-base.md").read_text()
    with pytest.raises(SystemExit):
        render.main(["--results", str(results)])
