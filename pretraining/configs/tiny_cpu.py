"""A tiny model on two CPU cores, to try everything; `model=dynamic-tiny` and so on for the others.

command    python -m pretraining.main --config pretraining/configs/tiny_cpu.py --workdir runs/tiny \\
               --override data_dir=DATA tokenizer=tokenizer.json
parameters 5,819,248
tokens     0.0 G raw, 32 x 141 a step
FLOPs      4.64e+10 a step, 4.64e+14 in all
16 TPU v3 chips 16979.6 steps/s     0.0 h  (computed, not run)
v5e-8           13597.5 steps/s     0.0 h  (computed, not run)
v4-32 pod       37962.6 steps/s     0.0 h  (computed, not run)
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
