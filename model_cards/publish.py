"""Put a checkpoint on the Hub, in one commit, with a card that says what was measured.

    python -m model_cards.publish --checkpoint DIR --results results.json --repo_id owner/name

Before: the folder is checked: safetensors only, and its own code opens it in a process that has no
network. After: it is loaded back by its commit and must compute the same. Running it again uploads
nothing that is there already. Exit code 0; 2 for what must be mended first; 1 where the Hub failed.
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import re
import struct
import sys
from pathlib import Path

import numpy as np
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
)
from huggingface_hub.utils import HFValidationError, validate_repo_id

from evaluation.results import eval_results, read_results
from modeling_convt5 import ConvT5Config

from .render import VARIANTS, check_card, code_files, render
from .sandbox import outputs

# What a published checkpoint may hold besides Python files.
ALLOWED = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "chat_template.jinja",
    "LICENSE",
    "training_curve.png",  # pretraining's
    # Written anew:
    "README.md",
    "SHA256SUMS",
}
CODE_AND_WEIGHTS = (".py", ".safetensors", ".safetensors.index.json")
GENERATED = ("README.md", "SHA256SUMS")
TOKENIZERS = ("tokenizer.json", "spiece.model")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".h5")


class HubError(Exception):
    """The Hub refused or failed; the message says what became of the repository."""


def check_checkpoint(folder: Path) -> ConvT5Config:
    """Refuse a folder that must not be published.

    Raises:
        ValueError: listing every fault.
    """
    if not folder.is_dir():
        raise ValueError(f"checkpoint={str(folder)!r} is not a folder. Pass a saved model.")
    faults, names = [], set()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            faults.append(f"{name} is a link: put the file itself there")
        elif path.is_dir() and path.name != "__pycache__":
            faults.append(f"{name}/ is a folder: a checkpoint is flat, move it away")
        elif path.parent == folder and path.is_file():
            names.add(name)
            faults += _check_file(path)
    faults += _check_weights(folder, names)
    if not names & set(TOKENIZERS):
        faults.append(f"there is no tokenizer: save one there ({' or '.join(TOKENIZERS)})")
    config = None
    try:
        fields = json.loads((folder / "config.json").read_text("utf-8"))
        if fields.get("model_type") != ConvT5Config.model_type:
            faults.append(f"config.json is of model_type {fields.get('model_type')!r}, not convt5")
        else:
            config = ConvT5Config.from_pretrained(folder)
            needed = {reference.split(".")[0] + ".py" for reference in config.auto_map.values()}
            missing = sorted(needed - {path.name for path in code_files(folder)})
            faults += [f"the code file {name} is missing: save the model again" for name in missing]
            faults += _check_code(folder, config)
    except FileNotFoundError:
        faults.append("config.json is missing")
    except (ValueError, AttributeError) as error:
        faults.append(f"config.json is damaged or names no code: {error}")
    if faults:
        raise ValueError(f"{folder} must not be published:\n- " + "\n- ".join(faults))
    return config


def _check_file(path):
    with path.open("rb") as file:
        head = file.read(4)
    # Pickle protocols 2 to 5, and the zip files that torch.save writes.
    if path.suffix in PICKLES or re.match(rb"\x80[\x02-\x05]|PK\x03\x04", head):
        return [f"{path.name} may hold a pickle, which runs code when opened: remove it"]
    if path.suffix == ".json":
        try:
            if not isinstance(json.loads(path.read_text("utf-8")), dict):
                return [f"{path.name} holds no JSON object: save the model again"]
        except (ValueError, RecursionError) as error:
            return [f"{path.name} is damaged: {error}"]
    shard = path.name.startswith("model-") and path.suffix == ".safetensors"
    if path.name not in ALLOWED and path.suffix != ".py" and not shard:
        return [f"{path.name} is no part of a checkpoint: remove it"]
    return []


def _check_code(folder, config):
    """Every Python file is one that the configuration names, or that those import."""
    pipelines = getattr(config, "custom_pipelines", None) or {}
    references = [*config.auto_map.values(), *(p["impl"] for p in pipelines.values())]
    waiting = {reference.split(".")[0] for reference in references} | {"modeling_flax_convt5"}
    here = {path.stem: path for path in code_files(folder)}
    faults, reached = [], set()
    while waiting:
        name = waiting.pop()
        if name in reached or name not in here:
            continue
        reached.add(name)
        try:
            tree = ast.parse(here[name].read_bytes())
        except (SyntaxError, ValueError) as error:
            faults.append(f"{name}.py is no Python: {error}")
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                waiting |= {node.module} if node.module else {alias.name for alias in node.names}
    faults += [
        f"{name}.py is imported by no part of the model: remove it"
        for name in here.keys() - reached
    ]
    return sorted(faults)


def _check_weights(folder, names):
    """Every file of weights is whole, and all of an index are there."""
    faults = []
    wanted = {"model.safetensors"}
    if "model.safetensors.index.json" in names:
        try:
            index = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))
            wanted = set(index["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            return [f"model.safetensors.index.json is damaged: {error!r}"]
    faults += [f"{name} is missing" for name in sorted(wanted - names)]
    present = {name for name in names if name.endswith(".safetensors")}
    faults += [f"{name} is in no index: remove it" for name in sorted(present - wanted)]
    for name in sorted(wanted & present):
        with (folder / name).open("rb") as file:
            head = file.read(8)
            try:
                (length,) = struct.unpack("<Q", head)
                header = json.loads(file.read(length))
                ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
                size = 8 + length + max(ends)
            except (
                struct.error,
                ValueError,
                KeyError,
                TypeError,
                AttributeError,
                OverflowError,
                MemoryError,
                RecursionError,
            ):
                faults.append(f"{name} is no safetensors file")
                continue
        if size != (folder / name).stat().st_size:
            faults.append(f"{name} is cut short or too long: its header speaks of {size} bytes")
    return faults


def plan(folder: Path, repo_id: str, results: list[str], origin: str) -> dict[str, Path | bytes]:
    """{path in the repository: file or content}: the checkpoint, its card and what belongs to it.

    Raises:
        ValueError: for a folder, a results file or a card that must not be published.
    """
    config = check_checkpoint(folder)
    records = [record for path in results for record in read_results(path)]
    files: dict[str, Path | bytes] = {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name not in GENERATED
    }
    for record in records:
        if not record["metrics"]:
            raise ValueError(
                f"results of {record['task']}: no metrics (its rows have no labels): leave it out."
            )
    tasks = [record["task"] for record in records]
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"results: {', '.join(tasks)} are not all different tasks: leave one out.")
    for path in results:
        # Every fine-tuning calls its plot curve.png.
        of = f"{read_results(path)[0]['task']}_" if len(results) > 1 else ""
        for plot in sorted(Path(path).parent.glob("*.png")):
            files[f"plots/{of}{plot.name}"] = plot
    plots = [name for name in files if name.startswith("plots/") or name == "training_curve.png"]
    # Checked without the plots, whose names are free to hold numbers.
    check_card(render(repo_id, config, origin, records, folder), records)
    card = render(repo_id, config, origin, records, folder, plots)
    files["README.md"] = card.encode()
    files |= {path: text.encode() for path, text in eval_results(records).items()}
    sums = [f"{hashlib.sha256(_content(f)).hexdigest()}  {name}\n" for name, f in files.items()]
    files["SHA256SUMS"] = "".join(sums).encode()
    return files


def _content(file):
    return file if isinstance(file, bytes) else file.read_bytes()


def upload(api: HfApi, repo_id: str, files: dict, private: bool, parent: str | None) -> str:
    """One commit of all files; returns its name, or the present one's where nothing has changed.

    Args:
        parent: the commit that must be the newest one; by default the one found at the start, so
            that nobody's work in between is lost.

    Raises:
        HubError: saying what became of the repository.
    """
    try:
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        parent = parent or api.repo_info(repo_id).sha
        there = api.list_repo_files(repo_id, revision=parent)
        stale = [
            path
            for path in there
            if path not in files
            and path.endswith((".py", ".safetensors", ".safetensors.index.json"))
        ]
        operations = [CommitOperationAdd(name, file) for name, file in files.items()]
        operations += [CommitOperationDelete(path) for path in stale]
        commit = api.create_commit(
            repo_id, operations, commit_message="Publish checkpoint", parent_commit=parent
        )
    # The client raises errors of its own, of httpx and of its threads: for the user all are one.
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 412:
            raise HubError(
                f"{repo_id} has changed since commit {parent}: look at what is new there, then run "
                "the command again. Nothing was published."
            ) from error
        if status in (401, 403):
            raise HubError(
                f"The Hub does not let this token write to {repo_id} ({status}): log in with `hf "
                "auth login`, or set HF_TOKEN, with a token that may. Nothing was published."
            ) from error
        raise HubError(
            f"Publishing to {repo_id} failed: {error}\nFiles appear there all at once or not at "
            "all. Run the command again: what has arrived is not sent twice."
        ) from error
    return commit.oid


def load_back(api: HfApi, folder: Path, repo_id: str, commit: str, expected: dict) -> None:
    """Load the commit into empty caches and compare what it computes with the folder.

    Raises:
        HubError: if it does not open, or computes something else.
    """
    for framework, value in expected.items():
        try:
            found = outputs(repo_id, framework, commit, api.endpoint, api.token or get_token())
        except ValueError as error:
            raise HubError(f"{repo_id} at {commit} was published, but: {error}") from error
        if not np.array_equal(found, value):
            raise HubError(
                f"{repo_id} at {commit} computes something else than {folder} in {framework} "
                f"(largest difference {np.abs(found - value).max()}). Earlier commits are as they "
                "were."
            )


def publish(args: argparse.Namespace) -> str | None:
    """Check, upload and load back; returns the commit, or None for a dry run."""
    folder = Path(args.checkpoint)
    files = plan(folder, args.repo_id, args.results, args.origin)
    frameworks = ["torch"]
    if importlib.util.find_spec("jax") and "modeling_flax_convt5.py" in files:
        frameworks.append("flax")
    expected = {framework: outputs(folder, framework) for framework in frameworks}
    for name, file in files.items():
        print(f"{len(_content(file)):>14,}  {name}")
    if args.dry_run:
        print(f"Checked; opened in {' and '.join(frameworks)}. A dry run: nothing was sent.")
        return None
    api = HfApi(endpoint=args.endpoint)
    commit = upload(api, args.repo_id, files, args.private, args.parent_commit)
    load_back(api, folder, args.repo_id, commit, expected)
    print(f"{api.endpoint}/{args.repo_id}/tree/{commit}")
    print(f"loaded back in {' and '.join(frameworks)}: the outputs are the same")
    return commit


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m model_cards.publish", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="a saved model with its tokenizer")
    parser.add_argument("--results", nargs="*", default=[], help="results files of this checkpoint")
    parser.add_argument("--repo_id", required=True, help="owner/name")
    parser.add_argument("--origin", help="where the weights are from; that of the variant by name")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--dry_run", action="store_true", help="check everything, send nothing")
    parser.add_argument("--parent_commit", help="refuse if this is not the newest commit there")
    parser.add_argument("--endpoint", default=constants.ENDPOINT, help="the Hub's address")
    args = parser.parse_args(argv)
    owner, _, name = args.repo_id.partition("/")
    if not owner or not name or "/" in name:
        parser.error(f"--repo_id {args.repo_id}: expected owner/name.")
    try:
        validate_repo_id(args.repo_id)
    except HFValidationError as error:
        parser.error(f"--repo_id {args.repo_id}: {error}")
    if args.origin is None:
        args.origin = VARIANTS[name].origin if name in VARIANTS else "of an unstated origin"
    try:
        publish(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except HubError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
