"""Transformer, large: self-attention: the paper's baseline, T5 itself.

Ours: the paper gives base only. Layers are computed again in the backward pass.

command    python -m pretraining.main --config pretraining/configs/large_transformer.py \\
               --workdir DIR --override data_dir=RECORDS
parameters 737,668,096
tokens     3.81e+10, 128 x 568 raw ones a step
FLOPs      1.68e+14 a step, 8.80e+19 in all
16 TPU v3 chips    4.692 steps/s       31 h  (computed, not run)
v5e-8              3.758 steps/s     38.8 h  (computed, not run)
v4-32 pod          10.49 steps/s     13.9 h  (computed, not run)
result     not run yet
"""

import dataclasses

from pretraining.configs.base_lightweight import config as base

config = dataclasses.replace(base, model="transformer-large", remat=True)
