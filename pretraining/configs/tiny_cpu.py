"""A tiny model on two CPU cores, to try everything; `model=dynamic-tiny` and so on for the others.

command    python -m pretraining.main --config pretraining/configs/tiny_cpu.py \\
               --workdir runs/tiny --override data_dir=DATA tokenizer=tokenizer.json
HEAD
result     not run yet
"""

from pretraining.settings import Settings

config = Settings(
    model="lightweight-tiny",
    train_steps=10_000,
    batch_size=32,
    inputs_length=128,
    warmup_steps=1_000,
    dtype="float32",
    scan_layers=False,
    log_every=50,
    eval_every=500,
    checkpoint_every=500,
)
