"""Go on pre-training an exported checkpoint in PyTorch, with transformers' Trainer.

    python -m pretraining.prepare --data DATA --tokenizer HUB/tokenizer.json --output RECORDS
    python examples/continue_pretraining.py --model HUB --records RECORDS --output_dir OUT

HUB is what `python -m pretraining.main --export HUB` wrote, or a repository. With --compare the
losses of the first batches are also computed in Flax, whose largest difference is printed.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretraining.collator import SpanCorruptionCollator  # noqa: E402
from pretraining.records import JoinedRows, TokenStream  # noqa: E402
from pretraining.span_corruption import raw_length_for  # noqa: E402


class Rows(torch.utils.data.Dataset):
    """Raw rows of records, to be corrupted by the collator.

    Raises:
        ValueError: if the split is shorter than one row.
    """

    def __init__(self, records: str, split: str, inputs_length: int):
        raw_length, _ = raw_length_for(inputs_length)
        self.rows = JoinedRows(TokenStream(records, split), raw_length)
        if len(self.rows) == 0:
            raise ValueError(
                f"The {split} split of {records} is shorter than one row of {raw_length} tokens: "
                "shorten --inputs_length, or prepare more text."
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        return {"input_ids": self.rows.stream.read(*self.rows.pieces(row)[0])}


def make_trainer(args: argparse.Namespace) -> Trainer:
    """A Trainer over the records, with Adafactor at a constant rate."""
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
    model = AutoModelForSeq2SeqLM.from_pretrained(args.model, trust_remote_code=True)
    collator = SpanCorruptionCollator(
        tokenizer.convert_tokens_to_ids("<extra_id_0>"), tokenizer.eos_token_id, args.seed
    )
    arguments = TrainingArguments(
        args.output_dir,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        optim="adafactor",
        seed=args.seed,
        logging_steps=max(1, args.max_steps // 20),
        save_steps=max(1, args.max_steps),
        report_to=[],
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )
    rows = {
        split: Rows(args.records, split, args.inputs_length) for split in ("train", "validation")
    }
    return Trainer(
        model,
        arguments,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=collator,
        processing_class=tokenizer,
    )


def compare(trainer: Trainer, folder: str, count: int) -> float:
    """The largest difference of the losses of `count` batches in PyTorch and in Flax."""
    import jax.numpy as jnp

    from modeling_convt5 import FlaxConvT5ForConditionalGeneration

    twin = FlaxConvT5ForConditionalGeneration.from_pretrained(folder)
    model, worst = trainer.model.eval(), 0.0
    for _, batch in zip(range(count), trainer.get_train_dataloader(), strict=False):
        with torch.no_grad():
            loss = trainer.compute_loss(model, dict(batch)).item()
        arrays = {name: jnp.asarray(tensor.cpu().numpy()) for name, tensor in batch.items()}
        worst = max(worst, abs(loss - float(twin(**arrays).loss)))
    return worst


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="an exported folder, or owner/name")
    parser.add_argument("--records", required=True, help="written by pretraining.prepare")
    parser.add_argument("--output_dir", required=True, help="checkpoints and the model")
    parser.add_argument("--max_steps", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--inputs_length", type=int, default=512)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", type=int, default=0, metavar="N", help="batches, with Flax")
    args = parser.parse_args(arguments)
    trainer = make_trainer(args)
    found = {}
    if args.compare:
        found["flax_difference"] = compare(trainer, args.model, args.compare)
    found["eval_loss_before"] = trainer.evaluate()["eval_loss"]
    trainer.train()
    found["eval_loss_after"] = trainer.evaluate()["eval_loss"]
    trainer.save_model(args.output_dir)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
