"""A saved model with eight-bit weights, in a folder that opens like any other.

    pip install "convt5[int8]"
    python examples/quantize.py --model FOLDER --output FOLDER-int8

Every dense layer but the output's is stored as int8 with one scale for each of its rows; token
tables, norms and the convolutions' own filters keep their precision. Prints the size of the weight
files before and after, and with --quickstart runs/quickstart the accuracy on its test docstrings.
"""

import argparse
import sys
from pathlib import Path

from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, TorchAoConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def accuracy(model, tokenizer, run: Path) -> float:
    """Accuracy on the docstrings with which the quickstart in the folder `run` was tested."""
    from examples.quickstart_training import TextToLabel, held_out, scores

    rows, input_length = held_out(run)
    task = TextToLabel(tokenizer, input_length)
    return scores(rows, task.predict(model, rows))["accuracy"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="the saved folder")
    parser.add_argument("--output", type=Path, required=True, help="where the int8 folder goes")
    parser.add_argument("--quickstart", type=Path, help="output_dir of a finished quickstart")
    args = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
    quantization = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForSeq2SeqLM.from_pretrained(
        args.model, trust_remote_code=True, quantization_config=quantization
    )
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    for folder in (args.model, args.output):
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
        print(f"{folder}: {size:.2f} MB", end="")
        if args.quickstart is not None:
            model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)
            print(f", accuracy {accuracy(model, tokenizer, args.quickstart):.4f}", end="")
        print()


if __name__ == "__main__":
    main()
