"""Every optimizer of the package, the settings it is tried in, and which of PyTorch's checks do not apply to it."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spectral_callbacks import optim

Settings = dict[str, Any]

SHAPES = ((6, 5), (4, 3, 2, 2), (5,), ())  # a matrix, a convolution, a bias, a scalar
PATHS = ("foreach", "fused", "differentiable", "capturable")  # say how a step is computed, not what it is


@dataclasses.dataclass(frozen=True)
class Subject:
    """An optimizer under test."""

    optimizer: type[torch.optim.Optimizer]
    settings: Mapping[str, Settings]  # by name, "default" among them
    brief: Sequence[str]  # those of the quick tests; the slow ones try all
    alive: Settings  # settings in which no hyper-parameter is without effect ...
    changes: Mapping[str, Any]  # ... and for each of them another value
    wrong: Mapping[str, tuple[Any, ...]]  # for each hyper-parameter, values to be refused
    not_applicable: Mapping[str, str] = dataclasses.field(default_factory=dict)  # name of a check -> the reason
    alone: Mapping[str, Settings] = dataclasses.field(default_factory=dict)  # further settings a change needs
    noisy: frozenset[str] = frozenset()  # settings whose noise differs between the parameters of an optimizer
    intermediates: int = 1  # copies of all parameters that a foreach step may hold, as PyTorch grants two to ASGD
    real: frozenset[str] = frozenset()  # settings in which a complex number is not its two parts
    elementwise: bool = True  # every entry moves on its own

    @property
    def name(self) -> str:
        return self.optimizer.__name__

    def shortened(self) -> Subject:
        """The same with only the settings of the quick tests."""
        return dataclasses.replace(self, settings={name: self.settings[name] for name in self.brief})

    @property
    def arguments(self) -> set[str]:
        """The names that the constructor takes."""
        return set(inspect.signature(self.optimizer.__init__).parameters) - {"self", "params"}

    def paths(self, *skip: str) -> list[Settings]:
        """The ways to compute a step that the constructor offers: each alone, and none of them."""
        flags = [flag for flag in PATHS if flag in self.arguments and flag not in ("capturable", *skip)]
        off = dict.fromkeys(flags, False)
        return [off, *({**off, flag: True} for flag in flags)]

    def all_settings(self, *skip: str, but: Iterable[str] = ()) -> Iterable[Settings]:
        """Every setting but those named, in every way to compute it but those to skip."""
        for name in [name for name in self.settings if name not in set(but)]:
            for path in self.paths(*skip):
                yield {**path, **self.settings[name]}

    def __call__(self, parameters: Any, **settings: Any) -> torch.optim.Optimizer:
        return self.optimizer(parameters, **settings)


def make_parameters(
    dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES, seed: int = 0
) -> list[nn.Parameter]:
    """Parameters of either sign, none near zero: a multiplicative update would leave it there."""
    generator = torch.Generator().manual_seed(seed)
    parameters = []
    for shape in shapes:
        size = 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
        sign = torch.randint(2, shape, generator=generator) * 2 - 1
        parameters.append(nn.Parameter((size * sign).to(dtype)))
    return parameters


def set_gradients(parameters: Iterable[Tensor], step: int) -> None:
    """Give each parameter the gradient of step `step`: of a quadratic, a wave, and noise that only the step decides."""
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters:
        w = parameter.detach().double()
        scale = torch.linspace(0.1, 2, max(w.numel(), 1), dtype=torch.float64)[: w.numel()].reshape(w.shape)
        noise = torch.randn(w.shape, generator=generator, dtype=torch.float64)
        parameter.grad = (scale * (w - 0.9) + 0.3 * torch.sin(3 * w) + noise).to(parameter.dtype)


def train(optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """Let the optimizer take these steps, each with the gradient that its number gives."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        set_gradients(parameters, step)
        optimizer.step()


_BETAS = ((1.0, 0.9), (-0.1, 0.9), (0.9, 1.0), (math.nan, 0.9))
_NOT_NEGATIVE = (-1.0, math.nan, math.inf)
_COMMON: dict[str, tuple[Any, ...]] = {
    "lr": (*_NOT_NEGATIVE, torch.tensor([0.1, 0.1])), "betas": _BETAS, "eps": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
}  # fmt: skip
_RANKS = (0, -1, 0.0, 1.5, math.nan, True)

_NO_STATE = "it keeps no state without momentum, as SGD does not"
_NOT_FUSED = "it has no fused kernel"
_LOW_RANK = {
    "compiled_step_is_one_graph": "which columns to keep is decided between two graphs",
    "complex_parameters": "a complex matrix has no real cosine transform: it steps by AdamW, tested elsewhere",
    "differentiable": "which columns are selected does not depend continuously on the gradient",
    "fused_matches_forloop": _NOT_FUSED,
    "fused_error_on_params_on_meta": _NOT_FUSED,
}
_MULTIPLICATIVE = {
    "compiled_step_is_one_graph": "whether the gradients are finite is looked at between two graphs",
    "complex_parameters": "a complex number has no sign to keep",
    "complex_2d": "a complex number has no sign to keep",
    "fused_matches_forloop": _NOT_FUSED,
    "fused_error_on_params_on_meta": _NOT_FUSED,
}

_ADAM_LIKE: dict[str, Settings] = {
    "default": {},
    "lr": {"lr": 1e-2},
    "weight_decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "amsgrad": {"amsgrad": True, "weight_decay": 0.1},
    "decoupled": {"decoupled_weight_decay": True, "weight_decay": 0.1},
}
_ADAM_CHANGES = {
    "lr": 2e-2, "betas": (0.8, 0.99), "eps": 1e-2, "weight_decay": 0.2, "amsgrad": True, "maximize": True,
    "decoupled_weight_decay": True,
}  # fmt: skip

YARDSTICK = Subject(
    torch.optim.Adam,
    settings=_ADAM_LIKE,
    brief=("default", "amsgrad"),
    alive={"lr": 1e-2, "weight_decay": 0.1},
    changes=_ADAM_CHANGES,
    wrong={},
)

DIFFGRAD = Subject(
    optim.DiffGrad,
    settings={
        **_ADAM_LIKE,
        "relative": {"friction": "relative"},
        "bfloat16": {"previous_grad_dtype": "bfloat16"},
    },
    brief=("default", "amsgrad", "bfloat16"),
    alive={"lr": 1e-2, "weight_decay": 0.1},
    changes={**_ADAM_CHANGES, "friction": "relative", "previous_grad_dtype": torch.bfloat16},
    wrong={**_COMMON, "friction": ("absolut", 1), "previous_grad_dtype": ("half16", torch.int32, 3)},
    real=frozenset({"bfloat16"}),  # there is no complex one
    intermediates=2,
)

DCT_ADAMW = Subject(
    optim.DCTAdamW,
    settings={
        "default": {},
        "rank": {"lr": 1e-2, "rank": 3},
        "refresh": {"rank": 0.5, "refresh_every": 4},
        "maximize": {"maximize": True, "weight_decay": 0.1},
        "identity": {"basis": "identity", "rank": 0.5},
        "error": {"rank": 0.5, "error_feedback": "full", "refresh_every": 3},
        "8bit": {"rank": 0.5, "error_feedback": "8bit"},
    },
    brief=("default", "8bit"),
    alive={"lr": 1e-2, "weight_decay": 0.1, "rank": 2},
    changes={
        "lr": 2e-2, "betas": (0.8, 0.99), "eps": 1e-2, "weight_decay": 0.2, "maximize": True, "rank": 3,
        "refresh_every": 3, "basis": "identity", "error_feedback": "full",
    },
    wrong={
        **_COMMON, "rank": _RANKS, "refresh_every": (0, -1, 1.5, True), "basis": ("fft", 1),
        "error_feedback": ("4bit", True),
    },
    alone={"refresh_every": {"rank": 0.5}},
    not_applicable=_LOW_RANK,
    elementwise=False,
)  # fmt: skip

TRION = Subject(
    optim.Trion,
    settings={
        "default": {},
        "rank": {"lr": 1e-2, "rank": 3, "momentum": 0.9},
        "maximize": {"maximize": True, "weight_decay": 0.1},
        "identity": {"basis": "identity", "rank": 0.5, "scale": "kimi"},
        "unscaled": {"scale": "none", "rank": 0.5, "weight_decay": 0.1, "num_iterations": 3},
    },
    brief=("default", "maximize"),
    alive={"lr": 1e-2, "weight_decay": 0.1, "rank": 2},
    changes={
        "lr": 2e-2, "momentum": 0.8, "weight_decay": 0.2, "maximize": True, "rank": 3, "scale": "kimi",
        "num_iterations": 3, "basis": "identity", "adamw_lr": 1e-2, "adamw_betas": (0.8, 0.99), "adamw_eps": 1e-2,
    },
    wrong={
        "lr": _COMMON["lr"], "weight_decay": _NOT_NEGATIVE, "momentum": (1.0, -0.1, math.nan), "rank": _RANKS,
        "scale": ("muon", 2.0), "num_iterations": (0, -1, 1.5, True), "basis": ("fft", 1),
        "adamw_lr": _NOT_NEGATIVE, "adamw_betas": _BETAS, "adamw_eps": _NOT_NEGATIVE,
    },
    not_applicable=_LOW_RANK,
    elementwise=False,
)  # fmt: skip

EXPONENTIATED_GRADIENT = Subject(
    optim.ExponentiatedGradient,
    settings={
        "default": {},
        "momentum": {"lr": 0.1, "momentum": 0.9},
        "weight_decay": {"weight_decay": 0.1},
        "maximize": {"lr": 0.01, "maximize": True, "weight_decay": 0.1},
        "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        "dampening": {"momentum": 0.5, "dampening": 0.2},
        "noise": {"lr": 0.1, "temperature": 1e-4, "seed": 3},
    },
    brief=("default", "nesterov"),
    alive={"lr": 0.1, "momentum": 0.5, "weight_decay": 0.1, "temperature": 1e-3},
    changes={
        "lr": 0.2, "momentum": 0.8, "dampening": 0.2, "weight_decay": 0.2, "nesterov": True, "max_log_step": 0.01,
        "temperature": 1e-2, "seed": 1, "maximize": True,
    },
    wrong={
        "lr": _COMMON["lr"], "weight_decay": _NOT_NEGATIVE, "momentum": (-0.1, math.nan, math.inf),
        "dampening": (math.nan, math.inf), "max_log_step": (0.0, -1.0, math.nan), "temperature": _NOT_NEGATIVE,
        "seed": (1.5, "one"),
    },
    not_applicable={**_MULTIPLICATIVE, "non_empty_state": _NO_STATE},
    noisy=frozenset({"noise"}),
    intermediates=3,
)  # fmt: skip

HYPENTROPY = Subject(
    optim.HypentropyGD,
    settings={
        "default": {},
        "beta": {"lr": 1e-2, "beta": 0.1},
        "weight_decay": {"weight_decay": 0.1},
        "maximize": {"maximize": True, "weight_decay": 0.1},
    },
    brief=("default", "maximize"),
    alive={"weight_decay": 0.1},
    changes={"lr": 0.2, "beta": 0.5, "weight_decay": 0.2, "max_log_step": 0.01, "maximize": True},
    wrong={
        "lr": _COMMON["lr"], "weight_decay": _NOT_NEGATIVE, "beta": (0.0, -1.0, math.nan, math.inf),
        "max_log_step": (0.0, -1.0, math.nan),
    },
    not_applicable={**_MULTIPLICATIVE, "non_empty_state": _NO_STATE},
    intermediates=4,
)  # fmt: skip

OPTIMIZERS = [DIFFGRAD, DCT_ADAMW, TRION, EXPONENTIATED_GRADIENT, HYPENTROPY]
