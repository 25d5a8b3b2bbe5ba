"""Fine-tuning to be read: `python examples/finetune_minimal.py MODEL DATA_DIR OUTPUT_DIR [STEPS]`.

MODEL is a saved folder or owner/name with its tokenizer, DATA_DIR holds train.tsv and dev.tsv of
SST-2 (columns `sentence`, `label`). examples/finetune.py does the same for every task, with seeds,
early stopping and files to submit.
"""

import csv
import sys
from pathlib import Path

import torch
from transformers import (
    Adafactor,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

import modeling_convt5  # noqa: F401 - transformers knows the family from here on

WORDS = ("negative", "positive")  # the model writes its label
name, data, output, *steps = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForSeq2SeqLM.from_pretrained(name)


def read(split):
    with Path(data, f"{split}.tsv").open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(f"sst2 sentence: {row['sentence']}", WORDS[int(row["label"])]) for row in rows]


def tokenize(text, label):
    return dict(tokenizer(text, text_target=label, truncation=True, max_length=128))


trainer = Seq2SeqTrainer(
    model,
    Seq2SeqTrainingArguments(output, max_steps=int(steps[0]) if steps else 1000, report_to="none"),
    train_dataset=[tokenize(*row) for row in read("train")],
    data_collator=DataCollatorForSeq2Seq(tokenizer, model),
    processing_class=tokenizer,
    optimizers=(Adafactor(model.parameters(), lr=1e-3, relative_step=False), None),
)
trainer.train()
trainer.save_model(output)

model.eval()  # without dropout
right, rows = 0, read("dev")
for text, label in rows:
    ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
    with torch.no_grad():
        written = model.generate(ids, max_new_tokens=4)[0]
    right += tokenizer.decode(written, skip_special_tokens=True).strip() == label
print(f"accuracy {right / len(rows):.4f}")
