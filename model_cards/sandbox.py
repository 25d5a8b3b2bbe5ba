"""Open a checkpoint by its own code, in a process that may do nothing else.

`outputs(...)` starts that process. It knows neither the installed package nor, for a folder, the
network: while the checkpoint's code is imported and run, connections, other programs and writing
outside of a temporary folder raise an error.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

# Runs before any code of the checkpoint. An editable installation is on every path: it is hidden.
GUARD = """
import importlib.abc, os, sys

class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "modeling_convt5":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hide())
source, revision, home, result = sys.argv[1:]
online = "HF_HUB_OFFLINE" not in os.environ
REFUSED = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen")
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.truncate")
armed = False

def guard(event, arguments):
    if not armed:
        return
    if event in REFUSED:
        raise RuntimeError(f"the checkpoint's code tried to start a program ({event})")
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        if not online:
            raise RuntimeError(f"the checkpoint's code tried to reach the network ({event})")
    paths = ()
    if event == "open":
        flags = arguments[2] if isinstance(arguments[2], int) else 0
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            paths = arguments[:1]
    elif event in CHANGES:
        paths = arguments[:2]
    elif event == "os.symlink":  # what it points to is looked at when it is opened
        paths = arguments[1:2]
    for path in paths:
        if isinstance(path, (str, bytes, os.PathLike)):
            path = os.path.realpath(os.fsdecode(path))
            if not path.startswith((home + os.sep, "/dev/")):
                raise RuntimeError(f"the checkpoint's code tried to write {path}")

sys.addaudithook(guard)
"""

TORCH = """
import numpy as np
import torch, transformers
from transformers import AutoConfig, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module
options = {"trust_remote_code": True}
if revision:
    options["revision"] = revision
for name in ("AutoModelForSeq2SeqLM", "AutoModelForTokenClassification"):
    getattr(transformers, name)  # transformers imports late: let it, before the guard is armed
armed = True
config = AutoConfig.from_pretrained(source, **options)
class_name = config.architectures[0]
auto = {v.split(".")[-1]: k for k, v in config.auto_map.items()}[class_name]
options["output_loading_info"] = True
model, info = getattr(transformers, auto).from_pretrained(source, dtype="float32", **options)
model.eval()
for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
    if info[kind]:
        raise ValueError(f"weights: {kind} {sorted(map(str, info[kind]))[:5]}")
for pipeline in (getattr(config, "custom_pipelines", None) or {}).values():
    get_class_from_dynamic_module(pipeline["impl"], source, revision=revision or None)
AutoTokenizer.from_pretrained(source, trust_remote_code=True, revision=revision or "main")
assert type(model).__module__.startswith("transformers_modules"), "not the checkpoint's own code"
ids = torch.arange(2, 14)[None] % config.vocab_size
ids[0, -1] = config.eos_token_id
inputs = {"input_ids": ids}
if auto in ("AutoModel", "AutoModelForSeq2SeqLM"):
    inputs["decoder_input_ids"] = ids
with torch.no_grad():
    output = model(**inputs)[0].numpy()
np.save(result, output)
"""

FLAX = """
import numpy as np
import jax.numpy as jnp
import flax
from transformers.dynamic_module_utils import get_class_from_dynamic_module
import json
from huggingface_hub import hf_hub_download
jnp.zeros(1)  # JAX looks for devices late: let it, before the guard is armed
armed = True
if os.path.isdir(source):
    path = os.path.join(source, "config.json")
else:
    path = hf_hub_download(source, "config.json", revision=revision or None)
fields = json.load(open(path))
name = "modeling_flax_convt5.Flax" + fields["architectures"][0]
cls = get_class_from_dynamic_module(name, source, revision=revision or None)
model = cls.from_pretrained(source, revision=revision or None, param_dtype=jnp.float32)
ids = np.arange(2, 14)[None] % model.config.vocab_size
ids[0, -1] = model.config.eos_token_id
inputs = {"input_ids": jnp.asarray(ids)}
if name.endswith(("FlaxConvT5Model", "ForConditionalGeneration")):
    inputs["decoder_input_ids"] = inputs["input_ids"]
output = model(**inputs)
fields = ("logits", "start_logits", "last_hidden_state")
array = next(getattr(output, f) for f in fields if getattr(output, f, None) is not None)
np.save(result, np.asarray(array))
"""


def outputs(
    source: str | Path,
    framework: str = "torch",
    revision: str = "",
    endpoint: str | None = None,
    token: str | None = None,
) -> np.ndarray:
    """What the checkpoint computes for one fixed row of twelve tokens.

    Args:
        source: a folder, or with `endpoint` a repository on that Hub.
        framework: "torch" or "flax".
        revision: a commit.
        endpoint, token: the Hub's; without an endpoint the process is offline.

    Raises:
        ValueError: with the end of the process' messages, if the checkpoint does not open.
    """
    with tempfile.TemporaryDirectory() as home:
        home = os.path.realpath(home)
        result = os.path.join(home, "outputs.npy")
        environment = {
            **{key: os.environ[key] for key in ("PATH", "OMP_NUM_THREADS") if key in os.environ},
            "HF_HOME": os.path.join(home, "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HOME": home,
            "TMPDIR": home,
            "JAX_PLATFORMS": "cpu",
        }
        if endpoint is None:
            environment["HF_HUB_OFFLINE"] = "1"
        else:
            environment["HF_ENDPOINT"] = endpoint
        if token:
            environment["HF_TOKEN"] = token
        code = GUARD + {"torch": TORCH, "flax": FLAX}[framework]
        place = str(Path(source).resolve()) if endpoint is None else str(source)
        done = subprocess.run(
            [sys.executable, "-I", "-B", "-c", code, place, revision, home, result],
            env=environment,
            cwd=home,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise ValueError(
                f"{source} does not open by its own code in {framework}:\n{done.stderr[-2000:]}"
            )
        found = np.load(result)
        if not np.isfinite(found).all():
            raise ValueError(f"{source} computes NaN or infinity in {framework}: train it again.")
        return found
