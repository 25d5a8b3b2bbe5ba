"""Turns a Mesh-TensorFlow checkpoint into a folder that transformers loads.

    python -m conversion.convert_mesh_tf --checkpoint DIR --output FOLDER

Needs neither TensorFlow nor PyTorch nor Flax. Sizes come from the variables' shapes, and must be
those of operative_config.gin where that lies beside the checkpoint. One weight at a time is held in
memory, and what is written goes to FOLDER only when all of it is there.

Exit codes: 0 done; 1 --verify found a difference above the tolerance, nothing was written; 2 the
checkpoint cannot be converted or FOLDER cannot be written, nothing was written (or --push_to_hub
failed afterwards, and FOLDER is there); 130 interrupted, nothing was written.
"""

import argparse
import hashlib
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import modeling_convt5
from modeling_convt5 import ConvT5Config

from . import verify
from .gin_config import GinConfig
from .mesh_tf_config import infer_config
from .mesh_tf_names import Entry, check, read_names, table
from .model_folder import (
    DTYPES,
    Weight,
    new_folder,
    push_to_hub,
    write_configuration,
    write_tokenizer,
    write_weights,
)
from .tf_checkpoint import Checkpoint, find_checkpoint, inside


class ParityError(ValueError):
    """The converted model differs from the original by more than the tolerance."""


@dataclass
class Conversion:
    """A checkpoint that has been read as far as its names and shapes.

    Attributes:
        entries: the table of weights and variables.
        dropped: variables left out, by kind.
        notes: what had to be assumed, and what a user should know.
        gin_file: None where there is none.
    """

    checkpoint: Checkpoint
    config: ConvT5Config
    entries: list[Entry]
    dropped: dict[str, int]
    notes: list[str]
    gin_file: Path | None

    @property
    def left_out(self) -> list[str]:
        """The variables that no weight is made of."""
        used = {name for entry in self.entries for name in entry.variables}
        return [name for name in self.checkpoint.variables if name not in used]

    @property
    def inputs(self) -> list[Path]:
        return self.checkpoint.files + ([self.gin_file] if self.gin_file else [])


def read(path: str | Path, num_heads: int | None = None) -> Conversion:
    """Open a checkpoint, infer its configuration and match its variables with the model's weights.

    Args:
        path: a folder, or a checkpoint in it, as `find_checkpoint` takes it.
        num_heads: for a checkpoint without gin file whose variables do not tell.

    Raises:
        ValueError: for files that are damaged, and for models that ConvT5 cannot be.
    """
    prefix = find_checkpoint(path)
    checkpoint = Checkpoint(prefix)
    gin_file = prefix.with_name(verify.GIN_FILE)
    gin = None
    if gin_file.exists():
        gin = GinConfig(inside(prefix.parent, verify.GIN_FILE))
    names = read_names(checkpoint.variables)
    config, assumed = infer_config(checkpoint.variables, names, gin, num_heads)
    entries = table(config, names, checkpoint.variables)
    dropped = check(entries, checkpoint.variables)
    notes = [f"Not in {verify.GIN_FILE}, so assumed: {text}." for text in assumed]
    notes += _decoding_notes(config)
    return Conversion(checkpoint, config, entries, dropped, notes, gin_file if gin else None)


def convert(
    path: str | Path,
    output: str | Path,
    tokenizer: str | Path | None = None,
    dtype: str = "float32",
    verified: bool = False,
    overwrite: bool = False,
    num_heads: int | None = None,
    progress: bool | None = True,
) -> str:
    """Convert one checkpoint; the arguments are those of the command line.

    Args:
        progress: False shows no progress bar, None only on a terminal.

    Returns:
        A report of what was done, for people.

    Raises:
        ValueError: as `read`; for an output that exists or cannot be written; for a tokenizer that
            cannot be read.
        ParityError: with `verified`, for differences above the tolerance.
    """
    source = read(path, num_heads)
    tokenizer = None if tokenizer is None else Path(tokenizer)
    if tokenizer is not None and not tokenizer.is_file():
        raise ValueError(f"{tokenizer}: there is no such file. Give T5's SentencePiece model.")
    if verified:
        verify.check_available(source.checkpoint.prefix)
    inputs = source.inputs + ([tokenizer] if tokenizer else [])
    start = time.perf_counter()
    with new_folder(output, overwrite, inputs) as folder:
        write_configuration(folder, source.config, dtype)
        if tokenizer is not None:
            ids = write_tokenizer(folder, tokenizer)
            if ids > source.config.vocab_size:
                source.notes.append(
                    f"The tokenizer has {ids} ids and the model {source.config.vocab_size}: texts "
                    "with the higher ids cannot be fed. It belongs to another model."
                )
        with tqdm(
            total=len(source.checkpoint.variables),
            desc="converting",
            unit="variable",
            disable=None if progress is None else not progress,
        ) as bar:
            write_weights(folder, [_weight(source, entry, bar) for entry in source.entries], dtype)
            for name in source.left_out:  # a file that is damaged there may be so elsewhere
                source.checkpoint.read(name)
                bar.update()
        seconds = time.perf_counter() - start
        parities = _verify(source, folder) if verified else []
        card = _card(source, inputs, dtype, parities)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return _report(source, output, parities, seconds)


def _decoding_notes(config):
    """Mesh-TensorFlow decodes with the last K inputs, of which a window may need earlier ones."""
    specs = [spec for spec in config.layer_specs("decoder") if spec.mixer != "attention"]
    if all(spec.left_taps == spec.kernel_size - 1 for spec in specs):
        return []
    return [
        "The decoder's window ends before the current position. Mesh-TensorFlow's decoding keeps "
        "too few inputs for it and decodes otherwise than it scores; ConvT5 decodes as it scores."
    ]


def _weight(source, entry, bar):
    def make():
        arrays = []
        for name in entry.variables:
            arrays.append(source.checkpoint.read(name))
            bar.update()
        return entry.to_weight(arrays)

    return Weight(entry.key, entry.shape, make)


def _verify(source, folder):
    parities = verify.verify(source.checkpoint.prefix, folder)
    if not all(parity.passed for parity in parities):
        raise ParityError(
            "The converted model differs from the original, so it was not kept.\n"
            + verify.markdown(parities)
        )
    return parities


def _report(source, output, parities, seconds):
    checkpoint, config = source.checkpoint, source.config
    variables = [checkpoint.variables[n] for entry in source.entries for n in entry.variables]
    megabytes = sum(variable.size for variable in variables) / 1e6
    dtypes = Counter(variable.dtype for variable in variables)
    lines = [
        f"{checkpoint.prefix} (step {checkpoint.step}) -> {output}",
        f"{config.num_parameters():,} parameters from {sum(dtypes.values())} variables: "
        + ", ".join(f"{count} in {dtype}" for dtype, count in sorted(dtypes.items())),
        "left out: " + ", ".join(f"{count} {kind}" for kind, count in source.dropped.items()),
        f"{megabytes:.1f} MB read and written in {seconds:.1f} s ({megabytes / seconds:.0f} MB/s)",
        *(f"note: {note}" for note in source.notes),
    ]
    return "\n".join(lines) + ("\n" + verify.markdown(parities) if parities else "")


def _card(source, inputs, dtype, parities):
    """The model card: where the weights come from, and how exactly they are the original's."""
    checkpoint, config = source.checkpoint, source.config
    files = "\n".join(f"| `{path.name}` | `{_sha256(path)}` |" for path in inputs)
    notes = "\n".join(f"- {note}" for note in source.notes) or "- Nothing had to be assumed."
    parity = (
        verify.markdown(parities)
        if parities
        else (
            "Not measured when this was converted: `--verify` does, and so does conversion.verify."
        )
    )
    mixers = " + ".join(
        dict.fromkeys(spec.mixer for s in ("encoder", "decoder") for spec in config.layer_specs(s))
    )
    return f"""---
library_name: transformers
pipeline_tag: text2text-generation
tags:
- convt5
---

# {mixers} ConvT5, {config.num_parameters():,} parameters

Converted from a Mesh-TensorFlow checkpoint. This card says where the weights come from; what they
are good for, and what they were trained on, is for their publisher to add.

```python
from transformers import AutoModelForSeq2SeqLM

model = AutoModelForSeq2SeqLM.from_pretrained("<this folder>", trust_remote_code=True)
```

## Provenance

| | |
|---|---|
| source | `{checkpoint.prefix.absolute().parent.name}/{checkpoint.prefix.name}` |
| step | {checkpoint.step} |
| written in | {dtype} |
| converter | conversion.convert_mesh_tf, ConvT5 {modeling_convt5.__version__} |

| input | SHA-256 |
|---|---|
{files}

{notes}

## Parity

{parity}

Generation equals the original's decoding. The original hides the decoder's start token from its
convolutions when it trains and scores, and does not when it decodes:
`from_pretrained(..., mask_decoder_start=True)` gives the scores of training.
"""


def _sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _arguments(argv):
    text, _, codes = __doc__.strip().rpartition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m conversion.convert_mesh_tf",
        description=text,
        epilog=codes,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR[/NAME-STEP]",
        help="a folder (the checkpoint that its file `checkpoint` names, else the newest), or one "
        "checkpoint in it, as DIR/model.ckpt-524288",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="what is written")
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="T5's SentencePiece model, copied along"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of the written weights, whatever the checkpoint holds (default: %(default)s)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare with the original (conversion.verify) before anything is kept",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace FOLDER if it holds files already"
    )
    parser.add_argument(
        "--num_heads",
        type=int,
        metavar="N",
        help="attention heads, for a checkpoint without operative_config.gin",
    )
    parser.add_argument(
        "--push_to_hub", metavar="OWNER/NAME", help="upload FOLDER to this repository afterwards"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = _arguments(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing is left behind
    try:
        report = convert(
            arguments.checkpoint,
            arguments.output,
            tokenizer=arguments.tokenizer,
            dtype=arguments.dtype,
            verified=arguments.verify,
            overwrite=arguments.overwrite,
            num_heads=arguments.num_heads,
            progress=None,
        )
    except ParityError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    print(report)
    if arguments.push_to_hub:
        try:
            address = push_to_hub(Path(arguments.output), arguments.push_to_hub)
        except Exception as error:  # the Hub's client raises those of its HTTP library, too
            print(f"error: {arguments.output} was written, not uploaded: {error}", file=sys.stderr)
            return 2
        print(f"uploaded to {address}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
