"""Activations: what named layers return while a loss is evaluated."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from spectral_callbacks.probe.outputs import named_module, plain_name
from spectral_callbacks.probe.probe import Probe

_WILD = frozenset("*?[")
_SHOWN = 3
_KNOB = "layers"


@dataclasses.dataclass(frozen=True)
class Layer:
    """A submodule, and which entry of what it returns is meant.

    Attributes:
        name: Dotted, without what torch.compile puts into it, and with the path, as `lstm:0`.
        module: The submodule.
        path: Indices or keys that lead to a tensor within a tuple or mapping that the submodule returns.
        is_chosen: Whether it was named, and not met by a pattern.
    """

    name: str
    module: nn.Module
    path: tuple[str, ...]
    is_chosen: bool

    def entry_of(self, output: Any) -> Tensor:
        """Return the tensor that is meant, detached.

        Raises:
            ValueError: If what the submodule returned is no tensor, or there is no such entry.
        """
        for part in self.path:
            output = self._entry(output, part)
        if isinstance(output, Tensor):
            return output.detach()
        if isinstance(output, PackedSequence):
            raise ValueError(
                f"layer {self.name!r} returned a PackedSequence, whose rows are time steps of several sequences; name "
                "a layer behind torch.nn.utils.rnn.pad_packed_sequence, or wrap the two in a module."
            )
        raise ValueError(
            f"layer {self.name!r} returned {type(output).__name__}, and features are one tensor{self._remedy(output)}"
        )

    def _entry(self, output: Any, part: str) -> Any:
        try:
            if isinstance(output, Mapping):
                return output[part]
            if isinstance(output, (tuple, list)) and not isinstance(output, PackedSequence):
                return output[int(part)]
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"layer {self.name!r} returned {type(output).__name__} without an entry {part!r}{self._remedy(output)}"
            ) from error
        raise ValueError(
            f"layer {self.name!r} returned {type(output).__name__}, which has no entries; leave ':{part}' out."
        )

    def _remedy(self, output: Any) -> str:
        root = self.name.partition(":")[0]
        if isinstance(output, Mapping):
            keys = ", ".join(f"{root}:{key}" for key in list(output)[:_SHOWN])
        elif isinstance(output, (tuple, list)):
            keys = ", ".join(f"{root}:{index}" for index in range(min(len(output), _SHOWN)))
        else:
            return "; name a submodule that returns one."
        return f"; name the entry that is meant: {keys}." if keys else ", and it is empty."


def find_layers(module: nn.Module, patterns: Iterable[str]) -> tuple[Layer, ...]:
    """Return the submodules that names or patterns mean, in their order, each once.

    Args:
        module: The root.
        patterns: Dotted names, or patterns with `*`, `?` or `[...]`, which meet whole names, dots included; behind a
            colon the entry that is meant of a tuple or mapping that the submodule returns, as `lstm:0` or
            `encoder:last_hidden_state`.

    Raises:
        ValueError: If there is none, or one of them means no submodule; it names those that come close.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Sequential(nn.LSTM(2, 2)))
        >>> [layer.name for layer in find_layers(net, ["2.0:0", "[01]"])]
        ['2.0:0', '0', '1']
    """
    found: dict[str, Layer] = {}
    for pattern in patterns:
        name, *path = pattern.split(":")
        chosen = not _WILD & set(name)
        names = [plain_name(name)] if chosen else _matching(module, name)
        for each in names:
            whole = ":".join([each, *path])
            if whole not in found or chosen:
                found[whole] = Layer(whole, named_module(module, each, knob=_KNOB), tuple(path), chosen)
    if not found:
        raise ValueError(f'{_KNOB}=[] names no layer; pass dotted names, or patterns such as "encoder.*".')
    return tuple(found.values())


def _matching(module: nn.Module, pattern: str) -> list[str]:
    names = list(dict.fromkeys(plain_name(name) for name, _ in module.named_modules() if plain_name(name)))
    matching = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if not matching:
        close = difflib.get_close_matches(pattern, names, n=_SHOWN, cutoff=0.3) or names[:_SHOWN]
        hint = f"; it has {', '.join(map(repr, close))}" if close else ""
        raise ValueError(f"{_KNOB}={pattern!r} matches no submodule of {type(module).__name__}{hint}.")
    return matching


def activations(
    probe: Probe, layers: Sequence[Layer], *, seed: int, left_out: Callable[[Layer, str], None]
) -> Iterator[tuple[Any, dict[Layer, Tensor]]]:
    """Yield each batch of a probe with what the layers returned on it, one batch at a time.

    The loss is evaluated, in the mode of the probe and without disturbing the model. What it is does not matter, as
    long as it runs the layers. Gradients stay enabled, as fused forward passes of a transformer run no submodule.

    Args:
        probe: An open one.
        layers: Of its module.
        seed: Of random numbers that the loss draws.
        left_out: Is told of layers met by a pattern that did not return one tensor, once for each batch, and why.

    Raises:
        ValueError: If a layer that was chosen by name did not run, ran more than once, or returned no tensor.
    """
    for index, batch in enumerate(probe.batches):
        seen: dict[Layer, list[Tensor | ValueError]] = {layer: [] for layer in layers}
        with contextlib.ExitStack() as hooks:
            for layer in layers:
                hooks.callback(layer.module.register_forward_hook(_catcher(layer, seen[layer])).remove)
            probe.evaluate(batch, seed=seed + index)
        found: dict[Layer, Tensor] = {}
        for layer, outputs in seen.items():
            try:
                found[layer] = _only(layer, outputs)
            except ValueError as error:
                if layer.is_chosen:
                    raise
                left_out(layer, str(error))
        yield batch, found


def _catcher(layer: Layer, outputs: list[Tensor | ValueError]) -> Callable[[nn.Module, Any, Any], None]:
    def catch(_module: nn.Module, _arguments: Any, output: Any) -> None:
        try:
            outputs.append(layer.entry_of(output).clone())  # what follows may write to it in place
        except ValueError as error:  # to be raised behind the model's own code
            outputs.append(error)

    return catch


def _only(layer: Layer, outputs: Sequence[Tensor | ValueError]) -> Tensor:
    if not outputs:
        raise ValueError(
            f"layer {layer.name!r} did not run while the loss was evaluated; name one that is called as `module(x)` (a "
            "call of `.forward` or of another method, and TorchScript, pass unseen), or pass loss= that runs it."
        )
    if len(outputs) > 1:
        raise ValueError(
            f"layer {layer.name!r} ran {len(outputs)} times in one evaluation of the loss, and which time is meant is "
            "not known; name a layer that runs once, or pass loss= that runs it once, such as one that returns "
            "pl_module(batch[0]).sum()."
        )
    if isinstance(outputs[0], ValueError):
        raise outputs[0]
    return outputs[0]
