"""The Hub folder of a run: weights for both frameworks, code, tokenizer, and a card."""

import json
import sys
from pathlib import Path

import jax
from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import PreTrainedTokenizerFast

from modeling_convt5.checkpoint_flax_convt5 import named_parameters

from .metrics import read_records
from .prepare import write_json
from .settings import Settings
from .step import Model
from .tokens import TokenizerFile

CARD = """---
library_name: transformers
tags:
- convt5
- span-corruption
---
# {name}

{model}, pre-trained by span corruption: {parameters:,} parameters, step {step:,} of
{train_steps:,}, {batch_size} rows of {raw_length} tokens a step, {optimizer}, seed {seed}.

| | |
|---|---|
| training loss | {train_loss} |
| held-out loss | {eval_loss} |
| noise | {noise_density:.0%} of the tokens, spans of {mean_noise_span_length:g} on average |
| sequences | {inputs_length} inputs, {targets_length} targets{packed} |

{curve}
A pre-trained model fills in spans; fine-tune it for a task.

```python
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForSeq2SeqLM.from_pretrained("{name}", trust_remote_code=True)
```

From the Hub, pin the commit that you have read with `revision=`.
"""


class Export:
    """Writes a checkpoint as a Hub folder.

    Args:
        model, settings, tokenizer, workdir: of the run.
        folder: where; None is WORKDIR/export.
        repository: also upload there, or None.
    """

    def __init__(
        self,
        model: Model,
        settings: Settings,
        tokenizer: TokenizerFile,
        workdir: Path,
        folder: str | None,
        repository: str | None,
    ):
        self.model, self.settings, self.tokenizer = model, settings, tokenizer
        self.workdir, self.repository = workdir, repository
        self.folder = Path(folder or workdir / "export")
        if repository is not None:
            try:
                validate_repo_id(repository)
            except HFValidationError as error:
                raise ValueError(f"--push_to_hub {repository!r}: {error}") from None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ValueError(
                f"--export {folder} is a file, or lies below one: expected a folder, or nothing "
                "yet."
            ) from None
        _check_is_ours(self.folder)

    def write(self, params: dict, step: int, last: bool = True) -> None:
        """Write the folder, and upload it; every process calls this, the first one writes.

        Args:
            last: whether nothing will be exported after this. Until then an upload may fail.

        Raises:
            SystemExit: if the last upload fails.
        """
        model = self.model.abstract()
        for key, variable in named_parameters(model):
            variable.set_value(params[key])
        model.save_pretrained(self.folder)
        if jax.process_index() == 0:
            save_tokenizer(self.tokenizer, self.folder)
            self._write_card(step, model.num_parameters())
            if self.repository:
                self._upload(step, last)

    def _upload(self, step, last):
        try:
            api = HfApi()
            name = api.create_repo(self.repository, exist_ok=True).repo_id
            api.upload_folder(repo_id=name, folder_path=self.folder, commit_message=f"Step {step}")
        except Exception as error:  # the client's own errors, httpx's, and those of its threads
            told = f"{self.folder} is written, but {self.repository} did not take it: {error}"
            if last:
                raise SystemExit(f"{told}\nRun the same command again: it uploads.") from error
            print(f"{told}\nThe next export tries again.", file=sys.stderr)

    def _write_card(self, step, parameters):
        settings = self.settings
        records = read_records(self.workdir / "metrics.jsonl")
        losses = {split: "not measured" for split in ("train", "eval")}
        for record in records:
            if record["step"] <= step and record["loss"] is not None:
                losses[record["split"]] = f"{record['loss']:.4f} at step {record['step']:,}"
        curve = ""
        try:
            from .plot import plot
        except ImportError:
            pass  # without matplotlib the card has no curve
        else:
            plot({settings.model: records}, self.folder / "training_curve.png")
            curve = "![Loss against steps](training_curve.png)\n"
        card = CARD.format(
            **{name: getattr(settings, name) for name in vars(settings)},
            name=self.repository or self.folder.name,
            parameters=parameters,
            step=step,
            raw_length=settings.raw_length,
            targets_length=settings.targets_length,
            packed=", packed with segment ids" if settings.packing else "",
            train_loss=losses["train"],
            eval_loss=losses["eval"],
            curve=curve,
        )
        (self.folder / "README.md").write_text(card)


def _check_is_ours(folder):
    """Refuse a folder of something else, whose files would be replaced; a torn export is ours."""
    try:
        is_ours = json.loads((folder / "config.json").read_text())["model_type"] == "convt5"
    except FileNotFoundError:
        is_ours = not (folder / "README.md").exists()  # ours is written last
    except (ValueError, KeyError, TypeError):
        is_ours = False
    if not is_ours:
        raise ValueError(
            f"--export {folder} holds something else than an exported model. Choose an empty "
            "folder."
        )


def save_tokenizer(tokenizer: TokenizerFile, folder: Path) -> None:
    """Write the tokenizer for transformers 4 and 5."""
    name = tokenizer.tokenizer.id_to_token
    unknown = {"unk_token": "<unk>"} if tokenizer.tokenizer.token_to_id("<unk>") is not None else {}
    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer.path),
        pad_token=name(tokenizer.pad_token_id),
        eos_token=name(tokenizer.eos_token_id),
        additional_special_tokens=[f"<extra_id_{i}>" for i in range(tokenizer.num_sentinels)],
        model_input_names=["input_ids", "attention_mask"],
        **unknown,
    )
    fast.save_pretrained(folder)
    # transformers 5 renamed the class and still reads the old name; 4 knows only that one.
    path = folder / "tokenizer_config.json"
    fields = {**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(path, fields)
