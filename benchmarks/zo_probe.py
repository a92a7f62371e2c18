"""How well differences of rounded losses tell a slope, by the size of a probe.

A one-sided probe sees the slope along its direction, the curvature, and the rounding of a 16-bit
model.  Small probes drown in the last, large ones in the second.  The table shows, for the
recommended method's probes of SmolLM2-135M, the correlation of its projected gradients in bf16, in
bf16 with an fp32 residual stream, and in fp32, with those of tiny probes in fp32.

    python benchmarks/zo_probe.py
"""

from __future__ import annotations

import copy
import dataclasses
import random
import sys

import numpy as np
import torch
from torch import nn
from zo_quality import Task, unlabelled

from headrace.zo import ZOSettings, ZOStep, label_word_losses, measure_basis, recommended

SIZES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
BATCH = 16


def main() -> int:
    """Print the table."""
    task = Task(judged=500, chosen=250, longest=14)
    chance = random.Random(5)
    data = task.batch(chance.sample(task.train, BATCH))
    bf16 = task.model()
    fp32 = copy.deepcopy(bf16).float()
    basis = measure_basis(bf16, [unlabelled(task.batch(chance.sample(task.train, BATCH)))])
    methods = {
        "random": recommended(seed=9, examples=BATCH),
        "measured": recommended(seed=9, examples=BATCH, basis=basis),
    }

    def slopes(model: nn.Module, method: ZOSettings, eps: float, residual: bool) -> np.ndarray:
        settings = dataclasses.replace(method, eps=eps, fp32_residual=residual)
        zo, parts = ZOStep(model, settings), settings.estimator.parts
        result = zo.step_together(
            lambda m, copies: label_word_losses(m, data, copies, words=task.words, parts=parts),
            lr=0.0,
        )
        zo.close()
        return np.array(settings.estimator.projected_grads(result.record.losses, eps))

    torch.manual_seed(0)
    print(f"{'right factors':<14}{'eps':>9}{'bf16':>8}{'fp32 residual':>15}{'fp32':>8}")
    for name, method in methods.items():
        true = slopes(fp32, method, 1e-4, False)
        for eps in SIZES:
            found = (
                slopes(bf16, method, eps, False),
                slopes(bf16, method, eps, True),
                slopes(fp32, method, eps, False),
            )
            told = [float(np.corrcoef(one, true)[0, 1]) for one in found]
            print(
                f"{name:<14}{eps:>9.1e}{told[0]:>8.3f}{told[1]:>15.3f}{told[2]:>8.3f}", flush=True
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
