"""A plug-in encoder: a Keras MobileNet as a torch module that turns tiles into vectors.

    GLEASON_WEIGHTS=MobileNet_Gleason_weights.h5 wsi-extract slides/ out/ --encoder examples/gleason_mobilenet.py:build

A plug-in is a Python file with a function that returns a ``torch.nn.Module``: uint8 (B, H, W, 3) in, float (B, D) out.
This one loads the network of Arvaniti et al., Automated Gleason grading of prostate cancer tissue microarrays via deep
learning, Scientific Reports 2018: MobileNet of width 0.5, whose weights its authors publish under GPL-3.0.
"""

import os
from itertools import pairwise
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

STRIDE_2 = (2, 4, 6, 12)  # depthwise convolutions that halve the picture
CHANNELS = (16, 32, 64, 64, 128, 128, 256, 256, 256, 256, 256, 256, 512, 512)


class SameConv(nn.Module):
    """Convolution, batch norm, ReLU6, padded as TensorFlow does: where a stride leaves one over, right and bottom."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size in (x.shape[3], x.shape[2]):
            missing = max((-(-size // self.stride) - 1) * self.stride + self.kernel - size, 0)
            pads += [missing // 2, missing - missing // 2]
        return F.relu6(self.norm(self.conv(F.pad(x, pads))))


class GleasonMobileNet(nn.Module):
    """uint8 (B, H, W, 3) → float32 (B, 512): the mean of the last block over the picture."""

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = [SameConv(3, CHANNELS[0], 3, 2)]
        for index, (inputs, outputs) in enumerate(pairwise(CHANNELS), 1):
            blocks.append(SameConv(inputs, inputs, 3, 2 if index in STRIDE_2 else 1, groups=inputs))
            blocks.append(SameConv(inputs, outputs, 1, 1))
        self.blocks = nn.Sequential(*blocks)

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, H, W)
        if x.shape[2] != 224 or x.shape[3] != 224:
            x = F.interpolate(x, (224, 224), mode="bilinear", antialias=True)
        features: Tensor = self.blocks(x).mean((2, 3))  # (B, 512)
        return features

    def names(self) -> list[str]:
        """The Keras layer of each block, in order."""
        pairs = [(f"conv_dw_{i}", f"conv_pw_{i}") for i in range(1, len(CHANNELS))]
        return ["conv1", *(name for pair in pairs for name in pair)]


def build() -> nn.Module:
    """The network with the weights that GLEASON_WEIGHTS names; without it, with random ones from seed 0."""
    torch.manual_seed(0)
    net = GleasonMobileNet()
    path = os.environ.get("GLEASON_WEIGHTS")
    if path:
        with h5py.File(path) as file:
            root: Any = file["model_weights"]
            for name, block in zip(net.names(), net.blocks, strict=True):
                assert isinstance(block, SameConv)
                kernel = next(v for key, v in _arrays(root[name]).items() if "kernel" in key)  # (h, w, in, out)
                axes = (2, 3, 0, 1) if "dw" in name else (3, 2, 0, 1)  # depthwise kernels are (h, w, channels, 1)
                block.conv.weight.data.copy_(torch.from_numpy(np.ascontiguousarray(kernel.transpose(axes))))
                norm = {key.rsplit("/", 1)[-1].split(":")[0]: v for key, v in _arrays(root[f"{name}_bn"]).items()}
                block.norm.weight.data.copy_(torch.from_numpy(norm["gamma"]))
                block.norm.bias.data.copy_(torch.from_numpy(norm["beta"]))
                mean, variance = block.norm.running_mean, block.norm.running_var
                assert mean is not None
                assert variance is not None
                mean.copy_(torch.from_numpy(norm["moving_mean"]))
                variance.copy_(torch.from_numpy(norm["moving_variance"]))
    return net.eval()


def _arrays(group: Any) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    group.visititems(lambda name, item: found.update({name: item[:]}) if isinstance(item, h5py.Dataset) else None)
    return found
