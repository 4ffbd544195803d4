"""The recursions of DCT-AdamW and Trion as their paper states them, in numpy, with dense matrices."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import scipy.fft

Array = np.ndarray[Any, Any]


def cosines(n: int) -> Array:  # (n, n)
    """Return Q, the columns of the orthonormal DCT-II: X @ Q transforms the rows of X."""
    return np.asarray(scipy.fft.dct(np.eye(n), type=2, norm="ortho"))


def top(S: Array, r: int) -> Array:
    """Return the r columns with the largest 2-norms."""
    return np.sort(np.argsort(-(S**2).sum(axis=0), kind="stable")[:r])


def eight_bits(E: Array) -> Array:
    """Return E after 255 levels a row."""
    scale = np.abs(E).max(axis=1, keepdims=True) / 127
    return np.rint(E / np.where(scale > 0, scale, 1)) * scale


@dataclasses.dataclass
class DctAdamW:
    """The step of a matrix with at least as many rows as columns, its columns rotated by Q_prevᵀ Q_new."""

    r: int
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    every: int = 1
    feedback: str = "none"
    t: int = 0
    kept: list[Array] = dataclasses.field(default_factory=list)  # the columns of every step

    def step(self, W: Array, G: Array) -> Array:
        rows, n = W.shape
        Q, (b1, b2) = cosines(n), self.betas
        if not self.t:
            self.m, self.v, self.E = np.zeros((rows, self.r)), np.zeros((rows, self.r)), np.zeros_like(W)
            self.ages, self.I = np.zeros(self.r), np.arange(self.r)
        A = G + self.E
        if self.t % self.every == 0:
            new = top(A @ Q, self.r)
            R = np.rint(Q[:, self.I].T @ Q[:, new])  # is 0 or 1 to 1e-16, which v of a new column would be made of
            self.m, self.v, self.ages, self.I = self.m @ R, np.abs(self.v @ R), self.ages @ R, new
        self.t += 1
        self.ages = self.ages + 1
        self.kept.append(self.I)
        Qr = Q[:, self.I]
        a = A @ Qr
        error = A - a @ Qr.T
        self.E = {"none": np.zeros_like(W), "full": error, "8bit": eight_bits(error)}[self.feedback]
        self.m = b1 * self.m + (1 - b1) * a
        self.v = b2 * self.v + (1 - b2) * a**2
        mhat, vhat = self.m / (1 - b1**self.ages), self.v / (1 - b2**self.ages)
        return (1 - self.lr * self.weight_decay) * W - self.lr * (mhat / (np.sqrt(vhat) + self.eps)) @ Qr.T


def newton_schulz(X: Array, count: int = 5) -> Array:
    """Return X with the quintic a σ + b σ³ + c σ⁵ applied to its singular values, count times."""
    U, s, Vt = np.linalg.svd(X, full_matrices=False)
    s = s / (np.linalg.norm(X) + 1e-7)
    for _ in range(count):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (U * s) @ Vt


@dataclasses.dataclass
class Trion:
    """The step of a matrix of any shape, left or right projection as the paper has it."""

    r: int
    lr: float = 0.02
    momentum: float = 0.95
    weight_decay: float = 0.0
    scale: str = "kj"
    M: Array | None = None

    def step(self, W: Array, G: Array) -> Array:
        R, C = W.shape
        B = G if self.M is None else self.M + G
        Q = cosines(min(R, C))
        if R >= C:
            Qr = Q[:, top(B @ Q, self.r)]
            m = B @ Qr
            self.M = B - (1 - self.momentum) * m @ Qr.T
            update = newton_schulz(m) @ Qr.T
        else:
            Qr = Q[:, top(B.T @ Q, self.r)]
            m = Qr.T @ B
            self.M = B - (1 - self.momentum) * Qr @ m
            update = Qr @ newton_schulz(m)
        scales = {"kj": max(1, R / C) ** 0.5, "kimi": 0.2 * math.sqrt(max(R, C)), "dion": (R / C) ** 0.5, "none": 1.0}
        return (1 - self.lr * self.weight_decay) * W - self.lr * scales[self.scale] * update
