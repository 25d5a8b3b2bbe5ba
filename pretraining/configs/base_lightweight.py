"""Lightweight, base: lightweight convolutions, 7 taps, 2 filters.

The paper's settings.

command    python -m pretraining.main --config pretraining/configs/base_lightweight.py \\
               --workdir DIR --override data_dir=RECORDS
parameters 208,747,344
tokens     3.81e+10, 128 x 568 raw ones a step
FLOPs      4.23e+13 a step, 2.22e+19 in all
16 TPU v3 chips    18.62 steps/s     7.82 h  (computed, not run)
v5e-8              14.91 steps/s     9.77 h  (computed, not run)
v4-32 pod          41.62 steps/s      3.5 h  (computed, not run)
result     not run yet
"""

from pretraining.settings import Settings

config = Settings(model="lightweight-base")
