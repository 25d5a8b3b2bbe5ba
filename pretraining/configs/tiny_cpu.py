"""A tiny model on two CPU cores, to try everything; `model=dynamic-tiny` and so on for the others.

command    python -m pretraining.main --config pretraining/configs/tiny_cpu.py \\
               --workdir runs/tiny --override data_dir=DATA tokenizer=tokenizer.json
parameters 5,819,248
tokens     4.51e+07, 32 x 141 raw ones a step
FLOPs      4.64e+10 a step, 4.64e+14 in all
16 TPU v3 chips 1.698e+04 steps/s 0.000164 h  (computed, not run)
v5e-8           1.36e+04 steps/s 0.000204 h  (computed, not run)
v4-32 pod       3.796e+04 steps/s 7.32e-05 h  (computed, not run)
result     two cores (AMD EPYC), 2,700 steps: 2.1 steps/s, 22 minutes, held-out loss 3.43
           with a vocabulary of 8,000 (benchmarks/results/families_*)
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
