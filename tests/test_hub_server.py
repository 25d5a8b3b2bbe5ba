"""The loopback Hub against the real client; what publishes to a Hub is tested through it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from hub_server import HubServer
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from task_files import save_tiny_model, write_parquet, write_task

from evaluation import run
from evaluation.data import load
from evaluation.results import read_results
from evaluation.tasks import get_task
from modeling_convt5 import ConvT5ForConditionalGeneration

ROOT = Path(__file__).parent.parent


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A running server that this process' huggingface_hub talks to, with a cache of its own."""
    from huggingface_hub import constants, hf_api
    from huggingface_hub.utils import _http

    with HubServer() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            server.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        # transformers keeps a client of its own, made when it is first needed.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        monkeypatch.setenv("HF_TOKEN", server.token)
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # retries at once
        yield server


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token=hub.token)


def add(path, content):
    return CommitOperationAdd(path, content.encode() if isinstance(content, str) else content)


def test_create_commit_and_read(api, hub, tmp_path):
    repo = api.create_repo("user/model", private=True).repo_id
    assert repo == "user/model"
    assert api.create_repo("user/model", exist_ok=True).repo_id == repo
    assert api.whoami()["name"] == "user"
    weights = bytes(range(256)) * 40
    info = api.create_commit(
        repo, [add("a.txt", "one"), add("b/w.safetensors", weights)], commit_message="first"
    )
    assert api.list_repo_files(repo) == [".gitattributes", "a.txt", "b/w.safetensors"]
    assert api.repo_info(repo).sha == info.oid and api.repo_info(repo).private
    second = api.create_commit(repo, [add("a.txt", "two")], commit_message="second")
    for revision, text in ((info.oid, "one"), (second.oid, "two"), ("main", "two")):
        path = hf_hub_download(repo, "a.txt", revision=revision)
        assert Path(path).read_text() == text
    folder = snapshot_download(repo, revision=info.oid)
    assert Path(folder, "b/w.safetensors").read_bytes() == weights
    assert [c.title for c in api.list_repo_commits(repo)] == ["second", "first", "initial commit"]
    (found,) = api.get_paths_info(repo, ["b/w.safetensors"])
    assert found.lfs.size == len(weights)
    api.create_tag(repo, tag="v1", revision=info.oid)
    api.create_branch(repo, branch="other")
    refs = api.list_repo_refs(repo)
    assert {ref.name for ref in refs.branches} == {"main", "other"}
    assert Path(hf_hub_download(repo, "a.txt", revision="v1")).read_text() == "one"
    tree = {item.path for item in api.list_repo_tree(repo)}
    assert tree == {".gitattributes", "a.txt", "b"}
    pull = api.create_commit(repo, [add("a.txt", "3")], commit_message="third", create_pr=True)
    assert pull.pr_num == 1 and Path(hf_hub_download(repo, "a.txt")).read_text() == "two"
    api.delete_repo(repo)
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info(repo)


def test_strangers_and_wrong_names(api, hub):
    api.create_repo("user/model", private=True)
    with pytest.raises(RepositoryNotFoundError):
        HfApi(endpoint=hub.url, token=False).repo_info("user/model")
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(endpoint=hub.url, token="hf_wrong").create_repo("user/other")
    with pytest.raises(RevisionNotFoundError):
        api.repo_info("user/model", revision="none")


def test_a_stale_parent_is_refused(api, hub):
    api.create_repo("user/model")
    head = api.repo_info("user/model").sha
    api.create_commit("user/model", [add("a", "1")], commit_message="m", parent_commit=head)
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("user/model", [add("a", "2")], commit_message="m", parent_commit=head)


def test_the_same_files_again_upload_nothing(api, hub):
    api.create_repo("user/model")
    files = [("a.txt", "1"), ("w.safetensors", b"22")]
    first = api.create_commit("user/model", [add(*f) for f in files], commit_message="m")
    count = len(hub.asked("PUT", "/lfs/"))
    again = api.create_commit("user/model", [add(*f) for f in files], commit_message="m")
    assert again.oid == first.oid and len(hub.asked("PUT", "/lfs/")) == count == 1


def test_busy_servers_and_cut_downloads(api, hub):
    api.create_repo("user/model")
    hub.fail("PUT", "/lfs/", 503, times=2)
    hub.fail("POST", "/preupload/", 503)
    weights = bytes(range(256)) * 8000
    api.create_commit("user/model", [add("w.safetensors", weights)], commit_message="m")
    assert len(hub.asked("PUT", "/lfs/")) == 3
    hub.fail("GET", "resolve/.*safetensors", after_bytes=100_000)
    path = hf_hub_download("user/model", "w.safetensors")
    assert Path(path).read_bytes() == weights
    assert len(hub.asked("GET", "resolve/.*safetensors")) == 2  # the rest, by Range


def test_push_to_hub_and_back(hub, tmp_path):
    torch.manual_seed(0)
    model = ConvT5ForConditionalGeneration(tiny_config()).eval()
    commit = model.push_to_hub("user/convt5")
    loaded = ConvT5ForConditionalGeneration.from_pretrained("user/convt5", revision=commit.oid)
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, decoder_input_ids=ids).logits
        assert torch.equal(loaded.eval()(input_ids=ids, decoder_input_ids=ids).logits, expected)
    files = hub.repo("user/convt5").find("main").files
    assert "convolution.py" in files and "model.safetensors" in files
    assert not any(path.endswith((".bin", ".pt", ".pkl")) for path in files)


def test_the_flax_class_pushes_and_loads_by_revision(hub, tmp_path):
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    import numpy as np

    from modeling_convt5 import FlaxConvT5ForConditionalGeneration

    torch.manual_seed(0)
    original = ConvT5ForConditionalGeneration(tiny_config())
    original.save_pretrained(tmp_path / "model")
    model = FlaxConvT5ForConditionalGeneration.from_pretrained(tmp_path / "model")
    ids = jax.numpy.arange(2, 14)[None]
    expected = model(ids, decoder_input_ids=ids).logits
    first = model.push_to_hub("user/flax", token=hub.token).rpartition("/")[2]
    model.shared.weight[...] *= 2
    assert model.push_to_hub("user/flax", token=hub.token).rpartition("/")[2] != first
    loaded = FlaxConvT5ForConditionalGeneration.from_pretrained("user/flax", revision=first)
    np.testing.assert_array_equal(loaded(ids, decoder_input_ids=ids).logits, expected)
    # The same parameters for PyTorch, to the last bit.
    twin = ConvT5ForConditionalGeneration.from_pretrained("user/flax", revision=first)
    for key, value in original.state_dict().items():
        assert torch.equal(twin.state_dict()[key], value), key


def outside(hub, home):
    """The environment of a new process that uses this Hub, with an empty cache."""
    kept = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    return {**kept, "HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HOME": str(home)} | {
        "HF_MODULES_CACHE": str(home / "modules"),
        "HF_HUB_DISABLE_XET": "1",
    }


OPEN = """
import sys
from transformers import AutoModelForSeq2SeqLM
options = dict(option.split("=") for option in sys.argv[1:])
model = AutoModelForSeq2SeqLM.from_pretrained("user/trained", trust_remote_code=True, **options)
print(type(model).__module__, sum(p.double().sum().item() for p in model.parameters()))
"""


@pytest.mark.filterwarnings("ignore:Cannot enable progress bars")  # the tests switch them off
def test_trainer_pushes_and_code_can_be_pinned(api, hub, tmp_path):
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    model = ConvT5ForConditionalGeneration(tiny_config())
    rows = [{"input_ids": [5, 6, 1], "labels": [7, 1]}] * 4
    options = {"max_steps": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    hub_options = {"push_to_hub": True, "hub_model_id": "user/trained", "hub_token": hub.token}
    arguments = TrainingArguments(str(tmp_path / "out"), **options, **hub_options)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.push_to_hub()
    first = api.repo_info("user/trained").sha
    files = hub.repo("user/trained").find(first).files
    assert {"modeling_convt5.py", "model.safetensors", "config.json"} <= set(files)

    def opened(number, *options):
        command = [sys.executable, "-c", OPEN, *options]
        environment = outside(hub, tmp_path / f"home{number}")
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    done = opened(0, f"revision={first}")
    assert done.returncode == 0, done.stderr[-3000:]
    module, total = done.stdout.split()
    assert "transformers_modules" in module
    assert float(total) == sum(p.double().sum().item() for p in model.parameters())
    # Somebody changes the code: who pinned it does not run it.
    api.create_commit(
        "user/trained", [add("modeling_convt5.py", "raise OSError('new')")], commit_message="m"
    )
    pinned = opened(1, f"code_revision={first}")
    assert pinned.returncode == 0 and pinned.stdout.split()[1] == total, pinned.stderr[-3000:]
    assert "new" in opened(2).stderr


def test_fine_tuning_pushes_the_best_model_with_its_card(hub, tmp_path):
    write_task(tmp_path / "data", "sst2")
    texts = ["sst2 sentence: good bad the film day meal", "negative positive"]
    model = save_tiny_model(tmp_path / "model", texts)
    command = [sys.executable, str(ROOT / "examples" / "finetune.py"), "--task", "sst2"]
    command += ["--model", str(model), "--data_dir", str(tmp_path / "data"), "--max_steps", "2"]
    command += ["--use_cpu", "true", "--output_dir", str(tmp_path / "out"), "--push_to_hub", "true"]

    def tuned(*more):
        return subprocess.run(
            [*command, *more], env=outside(hub, tmp_path / "home"), capture_output=True, text=True
        )

    refused = tuned()
    assert refused.returncode == 2 and "hub_model_id=None" in refused.stderr
    assert not (tmp_path / "out").exists()
    done = tuned("--hub_model_id", "user/tuned")
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(hub.repo("user/tuned").commits) == 2  # the Hub's initial one, and ours
    files = hub.repo("user/tuned").find("main").files
    assert "fine-tuned on sst2" in files["README.md"].decode()
    assert ".eval_results/sst2.yaml" in files
    for path in (tmp_path / "out" / "model").iterdir():
        if path.suffix in (".safetensors", ".json", ".py"):
            assert files[path.name] == path.read_bytes(), path.name


CARD = """---
configs:
- config_name: sst2
  data_files:
  - {split: train, path: "sst2/train-*"}
  - {split: validation, path: "sst2/validation-*"}
---
"""


def test_a_task_from_the_hub(api, hub, tmp_path):
    """Without --data_dir the rows are the Hub's parquet files."""
    write_task(tmp_path / "sst2", "sst2")
    rows = load(get_task("sst2"), tmp_path).rows
    operations = [add("README.md", CARD)]
    for split in ("train", "validation"):
        columns = {name: [row[name] for row in rows[split]] for name in ("sentence", "label")}
        write_parquet(tmp_path / "rows.parquet", columns)
        content = (tmp_path / "rows.parquet").read_bytes()
        operations.append(add(f"sst2/{split}-00000-of-00001.parquet", content))
    name = get_task("sst2").hub[0]
    hub.user = name.split("/")[0]
    api.create_repo(name, repo_type="dataset")
    api.create_commit(name, operations, commit_message="rows", repo_type="dataset")
    texts = [get_task("sst2").input_text(row) for some in rows.values() for row in some]
    model = save_tiny_model(tmp_path / "model", [*texts, "negative positive"])
    arguments = ["--model", str(model), "--tasks", "sst2", "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "evaluation.run", *arguments],
        env=outside(hub, tmp_path / "home"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (record,) = read_results(tmp_path / "out" / "results.json")
    assert record["rows"] == {"validation": 12}
    local = predictions_of(model, tmp_path, "validation")
    lines = (tmp_path / "out" / "sst2" / "predictions_validation.jsonl").read_text().splitlines()
    assert [json.loads(line)["prediction"] for line in lines] == local


def predictions_of(model, data_dir, split):
    """What evaluation.run answers with the same rows from local files."""
    output = data_dir / "local"
    arguments = ["--model", str(model), "--tasks", "sst2", "--data_dir", str(data_dir)]
    assert run.main([*arguments, "--output_dir", str(output), "--splits", split]) == 0
    lines = (output / "sst2" / f"predictions_{split}.jsonl").read_text().splitlines()
    return [json.loads(line)["prediction"] for line in lines]
