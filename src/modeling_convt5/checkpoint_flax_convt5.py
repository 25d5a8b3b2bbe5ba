"""Loading and saving for the Flax models: the same folder, in both directions, as PyTorch's.

Downloads, caching and uploads are huggingface_hub's.
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import HfApi, snapshot_download

try:  # in a `try`, or transformers would ask PyTorch's users to install JAX
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax.sharding import Mesh
except ImportError as error:
    raise ImportError("ConvT5 in Flax needs JAX and Flax: pip install jax flax") from error

from .generation_flax_convt5 import FlaxGenerationConfig
from .sharding_flax_convt5 import ShardingRules, parameter_sharding
from .weights import FLOATS, WeightFiles, compare, matches, tied_keys, write_weights

logger = logging.getLogger(__name__)

# Parameters of one head or another: new ones are initialised, those of another head left.
HEADS = ("lm_head.", "classification_head.", "classifier.", "qa_outputs.")
# Every Python file that a checkpoint carries, for either framework.
CODE = (
    "cache_convt5.py",
    "cache_flax_convt5.py",
    "checkpoint_flax_convt5.py",
    "configuration_convt5.py",
    "convolution.py",
    "convolution_flax.py",
    "generation_convt5.py",
    "generation_flax_convt5.py",
    "layers_convt5.py",
    "layers_flax_convt5.py",
    "masks_convt5.py",
    "masks_flax_convt5.py",
    "modeling_convt5.py",
    "modeling_flax_convt5.py",
    "outputs_flax_convt5.py",
    "pipeline_convt5.py",
    "presets_convt5.py",
    "sharding_flax_convt5.py",
    "stacks_convt5.py",
    "stacks_flax_convt5.py",
    "weights.py",
)


def named_parameters(module: nnx.Module, prefix: str = "") -> Iterator[tuple[str, nnx.Variable]]:
    """(key, parameter) pairs: a module's own, then its children's."""
    children = []
    items = enumerate(module) if isinstance(module, nnx.List) else vars(module).items()
    for name, value in items:
        if isinstance(value, nnx.Param):
            yield f"{prefix}{name}", value
        elif isinstance(value, (nnx.Module, nnx.List)):
            children.append((name, value))
    for name, child in children:
        yield from named_parameters(child, f"{prefix}{name}.")


class FlaxCheckpointMixin:
    """`from_pretrained`, `save_pretrained` and `push_to_hub`, as transformers' models have them."""

    name_or_path = ""  # of a model that was built, not loaded

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        dtype: jnp.dtype | None = None,
        param_dtype: jnp.dtype | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        mesh: Mesh | None = None,
        sharding_rules: ShardingRules | None = None,
        ignore_mismatched_sizes: bool = False,
        scan_layers: bool = False,
        remat: bool = False,
        rngs: nnx.Rngs | None = None,
        **config_overrides: Any,
    ) -> Any:
        """A model with the weights of a folder or of a repository on the Hub.

        Args:
            pretrained_model_name_or_path: a folder that PyTorch or Flax has saved, or "owner/name".
            dtype: what is computed in; None is `param_dtype`.
            param_dtype: what the parameters are kept in; None is what the file holds. For
                training keep float32 and compute in bfloat16.
            revision, token, cache_dir, local_files_only: huggingface_hub's.
            mesh: devices to spread the parameters over; each reads its own slices only.
            sharding_rules: which parameter goes where; None is `SHARDING_RULES`.
            ignore_mismatched_sizes: initialise a head whose shape is another (`num_labels`).
            scan_layers, remat, rngs: as in `FlaxConvT5PreTrainedModel`.
            config_overrides: fields that replace those of config.json, such as `num_labels=2`.

        Raises:
            OSError: if files are missing or damaged.
            ValueError: listing every missing, unexpected and wrongly shaped parameter.
        """
        folder = _folder(
            pretrained_model_name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        config = _config(cls, folder, config_overrides)
        files = WeightFiles(folder, tied_keys(config))
        param_dtype = jnp.dtype(param_dtype or _stored_dtype(config, files))
        options = {
            "dtype": dtype,
            "param_dtype": param_dtype,
            "mesh": mesh,
            "scan_layers": scan_layers,
            "remat": remat,
        }
        model = nnx.eval_shape(lambda: cls(config, **options, rngs=nnx.Rngs(0)))
        parameters = dict(named_parameters(model))
        shapes = {key: tuple(variable.shape) for key, variable in parameters.items()}
        is_head = matches(HEADS)
        if ignore_mismatched_sizes:
            for key in [key for key in files.shapes if is_head(key)]:
                if key in shapes and files.shapes[key] != shapes[key]:
                    del files.shapes[key]
        encoder_only = not any(key.startswith("decoder.") for key in shapes)
        leave = (*HEADS, "decoder.") if encoder_only else HEADS
        missing = compare(shapes, files, is_head, matches(leave))
        shardings = {
            key: None if mesh is None else parameter_sharding(key, shape, mesh, sharding_rules)
            for key, shape in shapes.items()
        }
        new = _initial(lambda: cls(config, **options, rngs=rngs or nnx.Rngs(0)), missing, shardings)
        for key, variable in parameters.items():
            value = new[key] if key in new else _load(files, key, param_dtype, shardings[key])
            variable.set_value(value)
        if missing:
            logger.warning("New weights, to be trained before use: %s", ", ".join(missing))
        model.generation_config = FlaxGenerationConfig.from_folder(folder, config)
        model.name_or_path, model.bytes_read = str(folder), files.bytes_read
        return model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        max_shard_size: int | str = "50GB",
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **push_arguments: Any,
    ) -> None:
        """Write config, weights, generation settings and all code, for either framework to load.

        On several hosts every process must call this; the first one writes.

        Args:
            save_directory: a folder; created if need be, a model already in it is replaced.
            max_shard_size: the most bytes in one weights file, or such as "5GB".
            push_to_hub: also upload, to `repo_id` (the folder's name if None).
            push_arguments: `push_to_hub`'s.

        Raises:
            FileExistsError: if `save_directory` is a file.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise FileExistsError(f"{folder} is a file: save_pretrained writes a folder.")
        parameters = dict(sorted(named_parameters(self), key=lambda pair: _natural(pair[0])))
        shapes = {key: (tuple(v.shape), np.dtype(v.dtype)) for key, v in parameters.items()}
        first = jax.process_index() == 0
        if first:
            folder.mkdir(parents=True, exist_ok=True)
            self._save_config(folder)
            write_weights(folder, shapes, lambda k: _to_host(parameters[k][...]), max_shard_size)
            _copy_code(folder, Path(self.name_or_path))
        else:  # lends its slices, in the order in which the first process asks
            for variable in parameters.values():
                _to_host(variable[...])
        if push_to_hub and first:
            _upload(folder, repo_id or folder.name, **push_arguments)

    def push_to_hub(self, repo_id: str, **push_arguments: Any) -> str:
        """Upload to the Hub in one commit; returns the commit's address.

        Args:
            repo_id: "owner/name"; created if need be.
            push_arguments: `private`, `token`, `revision`, `commit_message`, `create_pr` and
                `max_shard_size`.
        """
        save = {k: push_arguments.pop(k) for k in ("max_shard_size",) if k in push_arguments}
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **save)
            return _upload(folder, repo_id, **push_arguments) if jax.process_index() == 0 else ""

    def num_parameters(self) -> int:
        """Number of parameters, shared ones counted once."""
        return sum(int(np.prod(v.shape, dtype=np.int64)) for _, v in named_parameters(self))

    def _save_config(self, folder):
        config = type(self.config).from_dict(self.config.to_dict())
        config.architectures = [type(self).__name__.removeprefix("Flax")]
        config.dtype = self.param_dtype.name
        config.save_pretrained(folder)
        self.generation_config.save(folder)


def _folder(name_or_path, **hub_arguments):
    if os.path.isdir(name_or_path):
        return Path(name_or_path)
    name = os.fspath(name_or_path)
    if os.path.exists(name) or os.path.isabs(name) or name.startswith(".") or name.count("/") > 1:
        raise OSError(
            f"{name} is not a folder. Pass a folder that holds config.json and model.safetensors, "
            "or a repository on the Hub as owner/name."
        )
    patterns = ["*.json", "*.safetensors", "*.py"]
    return Path(snapshot_download(name, allow_patterns=patterns, **hub_arguments))


def _config(cls, folder, overrides):
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text())
        model_type = fields["model_type"]
    except FileNotFoundError:
        raise OSError(f"{folder} holds no config.json: it is not a saved model.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"{path} is damaged ({error!r}). Get it again.") from error
    if model_type != cls.config_class.model_type:
        raise ValueError(
            f"{path} is of model_type {model_type!r}, expected {cls.config_class.model_type!r}: "
            f"{cls.__name__} opens ConvT5 models only."
        )
    config, unused = cls.config_class.from_pretrained(
        folder, return_unused_kwargs=True, **overrides
    )
    if unused:
        raise TypeError(
            f"{cls.__name__}.from_pretrained got {', '.join(unused)}: neither an argument of its "
            "own nor a field of ConvT5Config. Check the spelling."
        )
    return config


def _stored_dtype(config, files):
    """The dtype in config.json; failing that, the file's."""
    named = str(getattr(config, "dtype", None) or "").removeprefix("torch.")
    if named in FLOATS.values():
        return named
    return FLOATS.get(next(iter(files.dtypes.values()), "F32"), "float32")


def _initial(build, keys, shardings):
    """The initial values of some parameters; XLA leaves the others of the model out."""
    if not keys:
        return {}

    def values():
        parameters = dict(named_parameters(build()))
        return {key: parameters[key][...] for key in keys}

    if all(shardings[key] is None for key in keys):
        return jax.jit(values)()
    return jax.jit(values, out_shardings={key: shardings[key] for key in keys})()


def _load(files, key, dtype, sharding):
    """A parameter on its devices; a slice that several devices hold is read once."""
    if sharding is None:
        return jnp.asarray(files.read(key).astype(dtype, copy=False))
    read = {}

    def slice_at(index):
        place = str(index)
        if place not in read:
            read[place] = files.read(key, index).astype(dtype, copy=False)
        return read[place]

    return jax.make_array_from_callback(files.shapes[key], sharding, slice_at)


def _natural(key):
    """For sorting as transformers does before it fills shards: layers.2 before layers.10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in key.split(".")]


def _to_host(array):
    if not array.is_fully_addressable:
        from jax.experimental import multihost_utils

        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def _copy_code(folder, source):
    """The Python files of both frameworks, from beside this one or from where the model came."""
    for name in CODE:
        for origin in (Path(__file__).parent / name, source / name):
            if origin.is_file():
                if not (folder / name).exists() or not origin.samefile(folder / name):
                    shutil.copyfile(origin, folder / name)
                break


def _upload(
    folder,
    repo_id,
    private=None,
    token=None,
    revision=None,
    commit_message="Upload model",
    create_pr=False,
):
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        commit_message=commit_message,
        create_pr=create_pr,
    )
    return commit.commit_url
