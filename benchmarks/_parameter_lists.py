"""Parameters of well-known networks, by their shapes, with gradients: what a step of an optimizer works on."""

from __future__ import annotations

import torch
from torch import nn

Shape = tuple[int, ...]


def resnet_50() -> list[Shape]:
    """Return ResNet-50's: 161 tensors, 25.56 million parameters."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, num_blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        outputs = 4 * width
        for block in range(num_blocks):
            convolutions = [(width, inputs, 1, 1), (width, width, 3, 3), (outputs, width, 1, 1)]
            if block == 0:
                convolutions.append((outputs, inputs, 1, 1))
            for shape in convolutions:
                shapes += [shape, shape[:1], shape[:1]]  # and its batch norm
            inputs = outputs
    return [*shapes, (1000, inputs), (1000,)]


def gpt_2_small() -> list[Shape]:
    """Return GPT-2 small's: 148 tensors, 124.4 million parameters."""
    width = 768
    shapes: list[Shape] = [(50257, width), (1024, width)]
    for _ in range(12):
        for outputs, inputs in ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width)):
            shapes += [(outputs, inputs), (outputs,)]
        shapes += [(width,)] * 4  # two layer norms
    return [*shapes, (width,), (width,)]


def parameters(shapes: list[Shape]) -> list[nn.Parameter]:
    """Return parameters of 0.1 to 0.2, none of them 0, with gradients of about 0.001."""
    generator = torch.Generator().manual_seed(0)
    found = [nn.Parameter(torch.rand(shape, generator=generator).mul_(0.1).add_(0.1)) for shape in shapes]
    for p in found:
        p.grad = torch.randn(p.shape, generator=generator).mul_(1e-3)
    return found
