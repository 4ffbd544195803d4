"""A run resumed at step 37 is the uninterrupted one, bit for bit, whatever carried it over."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from spectral_callbacks.optim import DiffGrad
from tests.contracts.optimizers import DIFFGRAD, OPTIMIZERS, YARDSTICK, Subject, make_parameters, train
from tests.contracts.training import plain

RESUME_AT, LAST = 37, 60
OTHER_STATES = {"amsgrad", "bfloat16", "error", "8bit", "momentum", "noise"}  # settings with more or other state

Run = tuple[list[nn.Parameter], torch.optim.Optimizer]
Fresh = Callable[[], Run]
Carry = Callable[[Run, Fresh, Path], Run]


def _copied(parameters: list[nn.Parameter], other: list[nn.Parameter]) -> None:
    for p, q in zip(parameters, other, strict=True):
        q.data.copy_(p.data)


def _saved(run: Run, fresh: Fresh, folder: Path) -> Run:
    file = io.BytesIO()
    torch.save({"parameters": [p.detach() for p in run[0]], "optimizer": run[1].state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    parameters, optimizer = fresh()
    _copied(loaded["parameters"], parameters)
    optimizer.load_state_dict(loaded["optimizer"])
    return parameters, optimizer


def _deepcopied(run: Run, fresh: Fresh, folder: Path) -> Run:
    return copy.deepcopy(run)


def _pickled(run: Run, fresh: Fresh, folder: Path) -> Run:
    return pickle.loads(pickle.dumps(run))


def _distributed_checkpoint(run: Run, fresh: Fresh, folder: Path) -> Run:
    """A plain loop's way: state dicts go into a checkpoint whose tensors are then read in place."""

    def content(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        state = optimizer.state_dict()["state"]
        return {
            "parameters": {str(i): p.detach() for i, p in enumerate(parameters)},
            "state": {str(i): dict(entry) for i, entry in state.items()},
        }

    dcp.save(content(*run), checkpoint_id=folder)
    parameters, optimizer = fresh()
    train(optimizer, range(1))  # so that it has a state to be read into
    loaded = content(parameters, optimizer)
    dcp.load(loaded, checkpoint_id=folder)
    state = {int(i): entry for i, entry in loaded["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return parameters, optimizer


CARRIES: dict[str, Carry] = {
    "save": _saved, "deepcopy": _deepcopied, "pickle": _pickled, "dcp": _distributed_checkpoint,
}  # fmt: skip


def _resumed(fresh: Fresh, carry: Carry, folder: Path) -> tuple[Any, Any]:
    """The uninterrupted run's end, and that of the run which was carried over."""
    parameters, optimizer = fresh()
    train(optimizer, range(RESUME_AT))
    other = carry((parameters, optimizer), fresh, folder)
    ends = []
    for parameters_, optimizer_ in ((parameters, optimizer), other):
        train(optimizer_, range(RESUME_AT, LAST))
        ends.append((plain(parameters_), plain(optimizer_.state_dict())))
    assert ends[0][1]["param_groups"] == ends[1][1]["param_groups"]
    return ends[0], ends[1]


def _cases() -> list[Any]:
    """All of them; the quick ones are each optimizer's default, its other states, and half types."""
    cases = []
    for subject, dtype, name in itertools.product([YARDSTICK, *OPTIMIZERS], (torch.float32, torch.bfloat16), CARRIES):
        for setting in subject.settings:
            half = dtype == torch.bfloat16
            quick = (setting == "default" and (not half or name == "save")) or (
                setting in OTHER_STATES and name == "save" and not half
            )
            label = f"{subject.name}-{setting}-{str(dtype)[6:]}-{name}"
            marks = () if quick else pytest.mark.slow
            cases.append(pytest.param(subject, setting, dtype, CARRIES[name], id=label, marks=marks))
    return cases


@pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable):UserWarning")
@pytest.mark.parametrize(("subject", "setting", "dtype", "carry"), _cases())
def test_a_resumed_run_is_the_uninterrupted_one(
    subject: Subject, setting: str, dtype: torch.dtype, carry: Carry, tmp_path: Path
) -> None:
    def fresh() -> Run:
        parameters = make_parameters(dtype)
        return parameters, subject(parameters, **subject.settings[setting])

    uninterrupted, resumed = _resumed(fresh, carry, tmp_path)
    assert resumed == uninterrupted


class _Forgetful(DiffGrad):
    """Loses the last gradient on the way."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["previous_grad"] = torch.zeros_like(state["previous_grad"])


def _without_state(run: Run, fresh: Fresh, folder: Path) -> Run:
    parameters, optimizer = fresh()
    _copied(run[0], parameters)
    return parameters, optimizer


@pytest.mark.parametrize(
    ("optimizer", "carry"), [(_Forgetful, _saved), (DiffGrad, _without_state), (torch.optim.Adam, _without_state)]
)
def test_what_is_lost_on_the_way_is_noticed(optimizer: Any, carry: Carry, tmp_path: Path) -> None:
    def fresh() -> Run:
        parameters = make_parameters()
        return parameters, optimizer(parameters)

    uninterrupted, resumed = _resumed(fresh, carry, tmp_path)
    assert resumed != uninterrupted


class _Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return DIFFGRAD(self.parameters(), lr=1e-2, previous_grad_dtype="bfloat16")


def _fit(num_epochs: int, folder: Path, checkpoint: Path | None = None) -> pl.Trainer:
    torch.manual_seed(0)
    module = _Net()
    data = TensorDataset(torch.randn(24, 4), torch.randint(3, (24,)))
    trainer = pl.Trainer(
        max_epochs=num_epochs, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=8), ckpt_path=checkpoint, weights_only=True)
    return trainer


def test_a_lightning_checkpoint_resumes_bit_for_bit(tmp_path: Path) -> None:
    checkpoint = tmp_path / "half.ckpt"
    _fit(2, tmp_path).save_checkpoint(checkpoint)
    whole, resumed = _fit(4, tmp_path), _fit(4, tmp_path, checkpoint)
    assert whole.global_step == resumed.global_step == 12
    assert plain(whole.model.state_dict()) == plain(resumed.model.state_dict())  # type: ignore[union-attr]
    assert plain(whole.optimizers[0].state_dict()) == plain(resumed.optimizers[0].state_dict())
