"""What each of two processes does in the test of sharded parameters: `python -m tests.optim.ranks RANK FOLDER`."""

from __future__ import annotations

import datetime
import functools
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from tests.contracts.optimizers import OPTIMIZERS, YARDSTICK, Settings, Subject, make_parameters, set_gradients
from tests.contracts.training import plain

NUM_RANKS, NUM_STEPS = 2, 3
SHAPES = ((8, 6), (7, 5), (3, 9), (6, 2, 2, 2), (5,), (1,), (1, 4), ())  # even, uneven, and less than one row a process
LAYOUTS: dict[str, Placement] = {"rows": Shard(0), "columns": Shard(1), "replicated": Replicate()}

FULLY_SHARDED = ("default", "maximize", "bfloat16", "8bit", "noise")  # settings that are tried under it
ROUNDING = 1e-5  # where products of matrices are summed in another order

Placed = Callable[[Tensor], DTensor]


def _placed(tensor: Tensor, mesh: DeviceMesh, placement: Placement) -> DTensor:
    """A tensor without the dimension that a layout cuts stays whole on each process."""
    cut = placement.dim if isinstance(placement, Shard) else -1
    return distribute_tensor(tensor, mesh, [placement if cut < tensor.dim() else Replicate()])


def same_as_one_process(subject: Subject, settings: Settings, place: Placed, exact: bool) -> None:
    """Every entry of every parameter, after each step."""
    whole = make_parameters(shapes=SHAPES)
    parts = [nn.Parameter(place(p.detach())) for p in whole]
    optimizers = [subject(whole, **settings), subject(parts, **settings)]
    for step in range(NUM_STEPS):
        set_gradients(whole, step)
        for p, part in zip(whole, parts, strict=True):
            assert p.grad is not None
            part.grad = place(p.grad)
        for optimizer in optimizers:
            optimizer.step()
        _equal(parts, whole, exact=exact)


def _equal(parts: Iterable[Tensor], whole: Iterable[Tensor], *, exact: bool) -> None:
    for i, (part, p) in enumerate(zip(parts, whole, strict=True)):
        assert isinstance(part.data, DTensor)
        found, bound = part.data.full_tensor(), 0.0 if exact else ROUNDING
        off = (found - p.detach()).abs().max().item()
        assert off <= bound, f"parameter {i} of shape {tuple(p.shape)} is off by {off:.2e}"


def _net() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))
    for p, value in zip(
        net.parameters(), make_parameters(shapes=[tuple(p.shape) for p in net.parameters()]), strict=True
    ):
        p.data.copy_(value.data)
    return net


def _sharded_net(mesh: DeviceMesh) -> nn.Sequential:
    net = _net()
    for layer in net:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def _fit(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


def _state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    of_module, of_optimizer = get_state_dict(module, optimizer)
    return {"model": of_module, "optimizer": of_optimizer}


def fully_sharded(subject: Subject, settings: Settings, mesh: DeviceMesh, folder: Path, exact: bool) -> None:
    """FSDP2 trains as one process does, and goes on alike from a distributed checkpoint of its third step."""
    net, sharded = _net(), _sharded_net(mesh)
    optimizers = [subject(m.parameters(), **settings) for m in (net, sharded)]
    for module, optimizer in zip((net, sharded), optimizers, strict=True):
        _fit(module, optimizer, range(3))
    _equal(sharded.parameters(), net.parameters(), exact=exact)
    dcp.save(
        dict(zip(("model", "optimizer"), get_state_dict(sharded, optimizers[1]), strict=True)), checkpoint_id=folder
    )

    again = _sharded_net(mesh)
    optimizer = subject(again.parameters(), **settings)
    # The optimizer has no state yet: PyTorch makes one by a step of rate 0 on gradients of 0, which must move nothing.
    state = _state(again, optimizer)
    _equal(again.parameters(), _net().parameters(), exact=True)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(again, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for module, stepping in ((net, optimizers[0]), (sharded, optimizers[1]), (again, optimizer)):
        _fit(module, stepping, range(3, 6))
    _equal(sharded.parameters(), net.parameters(), exact=exact)
    resumed, uninterrupted = ([p.data.to_local() for p in m.parameters()] for m in (again, sharded))  # type: ignore[attr-defined]
    assert plain(resumed) == plain(uninterrupted), "the resumed run is another one"


class _Local(torch.optim.SGD):
    """Divides each process's part of a gradient by the norm of that part: an error, to be noticed."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                part = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
                part.div_(1 + part.norm())
        return super().step(closure)


def cases(mesh: DeviceMesh, folder: Path, subjects: Iterable[Subject]) -> Iterator[tuple[str, Callable[[], None]]]:
    for subject in subjects:
        for name, settings in subject.settings.items():
            exact = subject.elementwise or name == "default"
            layouts = list(LAYOUTS) if name == "default" else ["rows"]
            for layout in layouts:
                place = functools.partial(_placed, mesh=mesh, placement=LAYOUTS[layout])
                yield (
                    f"{subject.name}-{name}-{layout}",
                    functools.partial(same_as_one_process, subject, settings, place, exact),
                )
            if name in FULLY_SHARDED:
                label = f"{subject.name}-{name}-fully_shard"
                yield label, functools.partial(fully_sharded, subject, settings, mesh, folder / label, exact)
        place = functools.partial(_placed, mesh=mesh, placement=Shard(0))
        yield (
            f"{subject.name}-foreach-rows",
            functools.partial(same_as_one_process, subject, {"foreach": True}, place, exact=True),
        )
    planted = Subject(_Local, {"default": {}}, ("default",), {}, {}, {})
    place = functools.partial(_placed, mesh=mesh, placement=Shard(0))
    yield "planted-error", functools.partial(same_as_one_process, planted, {"lr": 0.1}, place, exact=False)


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=NUM_RANKS,
        timeout=datetime.timedelta(seconds=30),
    )  # fmt: skip
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    subjects = (YARDSTICK, *OPTIMIZERS)
    outcomes = {}
    for name, case in cases(mesh, folder, subjects):
        try:
            case()
            outcomes[name] = ""
        except Exception:  # noqa: BLE001 - whatever it is, the other cases are told of, and this one is reported
            outcomes[name] = traceback.format_exc(limit=-4)
    (folder / f"{rank}.json").write_text(json.dumps(outcomes))
    dist.barrier()  # a process that leaves first tears the connection from under the other
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
