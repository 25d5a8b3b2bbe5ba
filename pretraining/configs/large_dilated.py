"""Dilated, large: dilated lightweight convolutions, receptive widths 4 to 31.

Ours: the paper gives base only. Layers are computed again in the backward pass.

command    python -m pretraining.main --config pretraining/configs/large_dilated.py \\
               --workdir DIR --override data_dir=RECORDS
parameters 687,336,320
tokens     3.81e+10, 128 x 568 raw ones a step
FLOPs      1.45e+14 a step, 7.62e+19 in all
16 TPU v3 chips    5.415 steps/s     26.9 h  (computed, not run)
v5e-8              4.336 steps/s     33.6 h  (computed, not run)
v4-32 pod          12.11 steps/s       12 h  (computed, not run)
result     not run yet
"""

import dataclasses

from pretraining.configs.base_lightweight import config as base

config = dataclasses.replace(base, model="dilated-large", remat=True)
