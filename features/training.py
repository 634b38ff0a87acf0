"""Training: what every loop here shares: groups of parameters, the schedule, half precision, the average of weights."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

__all__ = ["cosine_schedule", "follow", "half_precision", "parameter_groups"]


@torch.no_grad()
def follow(average: nn.Module, live: nn.Module, decay: float) -> None:
    """Move the average's weights towards the live ones; whatever is no weight (running means) is taken over."""
    for kept, weight in zip(average.parameters(), live.parameters(), strict=True):
        kept.lerp_(weight, 1 - decay)
    for stays, found in zip(average.buffers(), live.buffers(), strict=True):
        stays.copy_(found)


def cosine_schedule(warm: int, total: int) -> Callable[[int], float]:
    """What the learning rate is multiplied by at each step: a linear rise, then half a cosine down to 0."""

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, total - warm))))

    return factor


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Biases and norms are vectors, and not decayed."""
    parameters = list(module.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def half_precision(precision: str, device: torch.device) -> tuple[Any, torch.amp.GradScaler]:
    """Autocast and loss scaling for what was asked; on a CPU ``"auto"`` is float32, which repeats to the bit."""
    if precision == "auto":
        precision = "fp32" if device.type != "cuda" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    context = nullcontext() if dtype is None else torch.autocast(device.type, dtype)
    return context, torch.amp.GradScaler(device.type, enabled=precision == "fp16")
