"""RepresentationGeometry: the geometry of the features, undisturbed training, and a word where there is none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from spectral_callbacks.callbacks import RepresentationGeometry
from spectral_callbacks.callbacks.reading import Embedding, Spectrum, Text
from spectral_callbacks.linalg import Status
from spectral_callbacks.metrics import Phase, PhaseChange, PhaseDetector, cka, effective_rank, rankme, two_nn_dimension
from tests.callbacks.representations.nets import NETS, Convolutional, Wide, labelled
from tests.callbacks.runs import complaints, fit, series, steps
from tests.callbacks.test_record import events_of
from tests.contracts.training import record

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is biased by more than 5 %:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*left out:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is biased by its num_samples:UserWarning"),
    pytest.mark.filterwarnings("ignore:a two-NN dimension of:UserWarning"),
]


class Still(Wide):
    """Does not move."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Dropping(Wide):
    """Features that are others in training than in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(36, 64), nn.Dropout(0.5))


def geometry(*layers: str, **options: Any) -> RepresentationGeometry:
    return RepresentationGeometry(layers, **{"every_n_steps": 2, "on_error": "raise", **options})


def features(module: Convolutional, data: DataLoader[Any]) -> Tensor:
    x, _ = data.dataset.tensors  # pyright: ignore[reportAttributeAccessIssue]
    module.eval()
    with torch.no_grad():
        return module.features(x.flatten(1))  # pyright: ignore[reportCallIssue]


# ---- Numbers


def test_the_numbers_are_those_of_the_features_on_all_samples_in_eval_mode() -> None:
    module, data = Dropping(), labelled(200)
    found = geometry("features", num_samples=1000, metrics=["rankme", "effective_rank", "intrinsic_dimension"])
    fit(module, found, data=data, max_epochs=1, limit_train_batches=1)
    entry = found.history[0]
    assert entry["representation/num_samples"] == 200
    fit(module, again := geometry("features", num_samples=1000, every_n_epochs=1, every_n_steps=None), data=data)
    x = features(module, data)
    last = again.history[-1]
    for name, metric in (("rankme", rankme), ("effective_rank", effective_rank)):
        truth = metric(x)
        assert last[f"representation/{name}/features"] == pytest.approx(truth.value, rel=1e-6)
        assert last[f"representation/{name}_error/features"] == pytest.approx(truth.error, rel=1e-4)
    assert 1 < entry["representation/intrinsic_dimension/features"] < 64


def test_the_spectrum_is_that_of_the_covariance() -> None:
    module, data = Wide(), labelled(200)
    callback = geometry("features", every_n_steps=None, every_n_epochs=1, linear_below=0.5)
    fit(module, callback, data=data)
    spectrum = callback.history[-1]["representation/spectrum/features"]
    assert isinstance(spectrum, Spectrum)
    truth = torch.linalg.eigvalsh(features(module, data).double().T.cov(correction=0)).flip(0)
    torch.testing.assert_close(spectrum.values, truth[: len(spectrum.values)], rtol=1e-6, atol=1e-9)
    assert spectrum.weights.sum().item() == pytest.approx(1)
    assert spectrum.linear_below == 0.5


def test_only_so_many_samples_are_taken_and_always_the_same() -> None:
    callback = geometry("features", num_samples=30, every_n_steps=1, projector=True)
    fit(Still(), callback, data=labelled(48), max_epochs=2, limit_train_batches=1)
    assert series(callback, "representation/num_samples") == [30, 30]
    first, second = (entry["representation/embedding/features"].points for entry in callback.history)
    assert len(first) == 30, "two batches of twelve and half of a third"
    assert torch.equal(first, second)


def test_similarity_to_the_measurement_before_is_that_of_the_same_samples() -> None:
    callback = geometry("features", "head", metrics=["cka_previous", "cka_next"])
    fit(Still(), callback, data=labelled(48))
    first, second = callback.history[:2]
    assert "representation/cka_previous/features" not in first
    assert second["representation/cka_previous/features"] == pytest.approx(1)
    assert second["representation/cka_previous_error/features"] == pytest.approx(0, abs=1e-6)
    assert first["representation/cka_next/features"] == second["representation/cka_next/features"]
    assert "representation/cka_next/head" not in first


def test_other_samples_are_not_compared_with_those_before() -> None:
    callback = geometry("features", data="current", every_n_steps=1, metrics=["cka_previous"])
    with pytest.warns(UserWarning, match="cka_previous left out: data='current' has other samples") as warned:
        fit(Wide(), callback, data=labelled())
    assert len([said for said in complaints(warned) if "cka_previous" in said]) == 1
    assert not any("cka_previous" in tag for entry in callback.history for tag in entry)


def test_similarity_to_the_next_layer_is_cka() -> None:
    module, data = Wide(), labelled(60)
    callback = geometry(
        "features", "head", metrics=["cka_next", "intrinsic_dimension"], every_n_epochs=1, every_n_steps=None
    )
    fit(module, callback, data=data)
    x = features(module, data)
    truth = cka(x, module.head(x.tanh()).detach())
    assert callback.history[-1]["representation/cka_next/features"] == pytest.approx(truth.value, rel=1e-5)
    assert callback.history[-1]["representation/cka_next_error/features"] == pytest.approx(truth.error, rel=1e-3)
    assert callback.history[-1]["representation/intrinsic_dimension/features"] == pytest.approx(
        two_nn_dimension(x).value, rel=1e-5
    )


def test_names_of_layers_are_such_as_a_tag_can_have() -> None:
    callback = geometry("body:0")
    fit(NETS["recurrent"](), callback, data=labelled())
    assert "representation/rankme/body_0" in callback.history[0]


# ---- Phases


class Falling(Wide):
    """Scales all but one of its features: their effective rank falls, rises and falls with the factor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def factor(self) -> float:
        t = math.log1p(self.count)
        return math.exp(-t if t < 3 else t - 6 if t < 5 else 4 - t)

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(1)
        scale = torch.full((36,), self.factor())
        scale[0] = 5.0
        return self.head(self.features(h * scale).tanh())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.count += 1


def test_phases_are_those_of_the_detector_on_the_last_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scripted(PhaseDetector):
        seen: list[tuple[int, float, float | None]] = []  # noqa: RUF012

        def update(self, step: int, effective_rank: float, alpha: float | None) -> PhaseChange | None:
            self.seen.append((step, effective_rank, alpha))
            return super().update(step, effective_rank, alpha)

    monkeypatch.setattr("spectral_callbacks.callbacks.representations.representation_geometry.PhaseDetector", Scripted)
    callback = geometry("features", "head", every_n_steps=1)
    fit(Wide(), callback, data=labelled(48))
    assert [step for step, _, _ in Scripted.seen] == steps(callback)
    assert [rank for _, rank, _ in Scripted.seen] == series(callback, "representation/effective_rank/head")
    assert {alpha for _, _, alpha in Scripted.seen} == {None}  # three features have no power law
    assert set(series(callback, "representation/phase")) == {Phase.WARMUP}


@pytest.mark.slow
def test_a_turn_is_told_in_words_and_as_a_number(tmp_path: Path) -> None:
    callback, logger = geometry("features", every_n_steps="geometric"), TensorBoardLogger(tmp_path)
    fit(Falling(), callback, data=labelled(48), max_epochs=200, logger=logger)
    changes = [entry for entry in callback.history if "representation/phase_change" in entry]
    assert [entry["representation/phase"] for entry in changes][:1] == [Phase.ENTROPY_SEEKING]
    words = changes[0]["representation/phase_change"]
    assert isinstance(words, Text)
    assert "features: entropy-seeking since step" in words.words
    written = events_of(logger).Tensors("representation/phase_change/text_summary")
    assert [event.step for event in written] == [entry["step"] for entry in changes]


def test_a_resumed_run_goes_on_with_its_phases(tmp_path: Path) -> None:
    whole = geometry("features", every_n_steps=1)
    torch.manual_seed(0)
    fit(Wide(), whole, data=labelled(48), max_epochs=2)
    torch.manual_seed(0)
    module, first = Wide(), geometry("features", every_n_steps=1)
    trainer = fit(module, first, data=labelled(48), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    second = geometry("features", every_n_steps=1)
    fit(Wide(), second, data=labelled(48), max_epochs=2, ckpt_path=str(tmp_path / "end.ckpt"))
    assert steps(first) + steps(second) == steps(whole)
    assert second._phases.state_dict() == whole._phases.state_dict()
    assert second._phases.state_dict() != first._phases.state_dict()


def test_a_second_fit_begins_anew() -> None:
    callback = geometry("features", every_n_steps=1, metrics=["effective_rank", "cka_previous"])
    for _ in range(2):
        torch.manual_seed(0)
        fit(Wide(), callback, data=labelled(48))
    once = geometry("features", every_n_steps=1, metrics=["effective_rank", "cka_previous"])
    torch.manual_seed(0)
    fit(Wide(), once, data=labelled(48))
    assert callback._phases.state_dict() == once._phases.state_dict()
    assert ["representation/cka_previous/features" in entry for entry in callback.history] == 2 * [False, *3 * [True]]


# ---- Undisturbed, on all kinds of nets


@pytest.mark.parametrize("kind", NETS)
def test_training_is_bit_identical_on_a_net_that_is(tmp_path: Path, kind: str) -> None:
    callback = geometry(*NETS[kind].layers, projector=True, labels=1)
    plain = record(tmp_path, NETS[kind], lambda: labelled(shuffle=True))
    measured = record(tmp_path, NETS[kind], lambda: labelled(shuffle=True), [callback], own_tags=lambda tag: "/" in tag)
    assert plain.differences(measured) == set()
    assert len([tag for tag in callback.history[0] if tag.startswith("representation/rankme/")]) >= 2


@pytest.mark.parametrize("kind", NETS)
def test_no_hook_is_left_behind(kind: str) -> None:
    module = NETS[kind]()
    fit(module, geometry(*NETS[kind].layers), data=labelled())
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in module.modules())


@pytest.mark.slow  # by the real clock; tests of the conductor do it by a clock of their own
def test_a_budget_is_kept() -> None:
    class Slow(Wide):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            torch.randn(300, 300).mm(torch.randn(300, 300))
            return super().training_step(batch, batch_idx)

    callback = RepresentationGeometry(["features"], num_samples=64, on_error="raise")
    trainer = fit(Slow(), callback, data=labelled(480), max_epochs=20)
    assert trainer.callback_metrics["cost/overhead"] < 0.15
    assert 1 <= len(callback.history) < 400


# ---- Bad input


class Bad(Wide):
    """Features that a function of the step makes."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make
        self.spoiled = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * self.spoiled(self.make(x.flatten(1))).nan_to_num().sum()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: torch.ones_like(x), "constant"),
        (lambda x: x[:0].sum(0).expand(len(x), -1), "constant"),
    ],
    ids=["ones", "zeros"],
)
def test_constant_features_have_no_geometry_and_that_is_said_once(make: Any, message: str) -> None:
    callback = RepresentationGeometry(["spoiled", "head"], every_n_steps=1)
    with pytest.warns(UserWarning, match=message) as warned:
        fit(Bad(make), callback, data=labelled())
    assert len([said for said in complaints(warned) if "constant" in said]) == 1
    assert not any("spoiled" in tag for entry in callback.history for tag in entry)
    assert all("representation/rankme/head" in entry for entry in callback.history)


def test_features_that_were_constant_are_looked_at_again() -> None:
    module = Bad(lambda x: x * min(module.global_step, 1))
    callback = RepresentationGeometry(["spoiled"], every_n_steps=1)
    fit(module, callback, data=labelled())
    assert ["representation/rankme/spoiled" in entry for entry in callback.history] == [False, True, True, True]


def test_features_that_are_not_finite_have_a_status() -> None:
    callback = RepresentationGeometry(["head", "spoiled"], every_n_steps=1)
    with pytest.warns(UserWarning, match="nonfinite"):
        fit(Bad(lambda x: x.masked_fill(torch.arange(len(x))[:, None] == 1, torch.nan)), callback, data=labelled())
    for entry in callback.history:
        assert entry["representation/status"] == Status.NONFINITE
        assert not any("spoiled" in tag for tag in entry)
        assert "representation/phase" not in entry


def test_a_layer_is_not_compared_across_one_that_is_not_finite() -> None:
    callback = RepresentationGeometry(["features", "spoiled", "head"], every_n_steps=1, metrics=["cka_next"])
    with pytest.warns(UserWarning, match="nonfinite"):
        fit(Bad(lambda x: x * torch.nan), callback, data=labelled())
    assert not any("cka_next" in tag for entry in callback.history for tag in entry)


class TimeFirst(Convolutional):
    """Batches (T, N, d); the head returns (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LSTM(6, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][-1])


@pytest.mark.parametrize("num_samples", [20, 48])
def test_samples_are_counted_along_their_dimension(num_samples: int) -> None:
    x, y = labelled(48).dataset.tensors  # pyright: ignore[reportAttributeAccessIssue]
    batches = DataLoader(
        list(zip(x[:, 0], y, strict=True)),  # pyright: ignore[reportArgumentType]
        batch_size=12,
        collate_fn=lambda pairs: (torch.stack([a for a, _ in pairs], 1), torch.stack([b for _, b in pairs])),
    )
    callback = geometry("body:0", "head", batch_dim=1, num_samples=num_samples, projector=True, data=batches)
    fit(TimeFirst(), callback, data=batches)
    entry = callback.history[0]
    assert entry["representation/num_samples"] == num_samples
    assert entry["representation/embedding/body_0"].points.shape == (num_samples, 4)
    assert entry["representation/embedding/head"].points.shape == (num_samples, 3)


def test_a_layer_of_changing_width_that_a_pattern_met_is_left_out() -> None:
    class Growing(Wide):
        def __init__(self) -> None:
            super().__init__()
            self.varying = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0 * self.varying(x.flatten(1)[:, : len(x)]).sum()

    callback = geometry("varying*", "head")
    with pytest.warns(UserWarning, match="layer 'varying' has 12 features in one batch and 6 in another") as warned:
        fit(Growing(), callback, data=labelled(30), max_epochs=2)
    assert len([said for said in complaints(warned) if "varying" in said]) == 1
    assert all("representation/rankme/head" in entry for entry in callback.history)


def test_a_single_sample_has_no_geometry() -> None:
    callback = RepresentationGeometry(["head"], every_n_steps=1)
    with pytest.warns(UserWarning, match="a single sample"):
        fit(Wide(), callback, data=labelled(1))
    assert not any("rankme" in tag for entry in callback.history for tag in entry)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["bdy"], "layers='bdy' names no submodule of Recurrent; did you mean 'body'"),
        (["body"], r"layer 'body' returned tuple, and features are one tensor; name the entry that is meant: body:0"),
        (["bod?"], r"met no layer that returns features"),
    ],
)
def test_a_layer_without_features_is_reported_once_and_training_goes_on(layers: list[str], message: str) -> None:
    callback = RepresentationGeometry(layers, every_n_steps=1)
    with pytest.warns(UserWarning, match=message) as warned:
        trainer = fit(NETS["recurrent"](), callback, data=labelled())
    assert len([said for said in complaints(warned) if "Training goes on" in said]) == 1
    assert trainer.global_step == 4
    assert [entry["representation/status"] for entry in callback.history] == [Status.BREAKDOWN] * len(callback.history)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "net"}, r"layers='net' must be a list"),
        ({"layers": []}, r"layers=\[\] must be a list"),
        ({"num_samples": 1}, r"num_samples=1 must be at least 2"),
        ({"metrics": ["rank_me"]}, r"metrics: 'rank_me' is none; did you mean 'rankme'"),
        ({"false_alarm_rate": 0.0}, r"false_alarm_rate is 0\.0"),
        ({"pooling": "max"}, r"pooling='max' must be one of"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RepresentationGeometry(**{"layers": ["net"], **options})


# ---- The projector


def test_the_projector_is_given_the_kept_samples_with_their_labels() -> None:
    module, data = Wide(), labelled(40)
    callback = geometry("features", projector=True, labels=1, every_n_epochs=1, every_n_steps=None)
    fit(module, callback, data=data)
    embedding = callback.history[-1]["representation/embedding/features"]
    assert isinstance(embedding, Embedding)
    x, y = features(module, data), data.dataset.tensors[1]  # pyright: ignore[reportAttributeAccessIssue]
    for row, label in zip(embedding.points, embedding.labels, strict=True):
        [place] = (torch.isclose(x, row, atol=1e-5).all(1)).nonzero().flatten().tolist()
        assert y[place].item() == int(label)


def test_trainer_without_a_validation_loader_says_so() -> None:
    callback = RepresentationGeometry(["features"], data="val", every_n_steps=1)
    with pytest.warns(UserWarning, match="nothing validates in this run"):
        fit(Wide(), callback, data=labelled())
