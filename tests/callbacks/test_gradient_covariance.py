"""The covariance of the gradients in runs, against the gradients of samples taken one by one in float64."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SubsetRandomSampler, TensorDataset

from spectral_callbacks.callbacks import GradientCovariance, HessianSpectrum, Sharpness, SpectralCallback
from spectral_callbacks.callbacks.reading import Spectrum
from spectral_callbacks.linalg import Status
from spectral_callbacks.metrics.gradient_noise import GradientMoments
from tests.callbacks.runs import Regression, complaints, fit, loader, samples, series, sgd, steps
from tests.callbacks.separate import Separate
from tests.contracts.networks import images
from tests.contracts.training import record
from tests.oracles import dense_gradient, dense_hessian


class Samples(pl.Callback):
    """Before every step: the gradients of the first batch's samples, one by one in float64, and its Hessian."""

    def __init__(self) -> None:
        self.batch: Any = None
        self.gradients: list[Tensor] = []
        self.hessians: list[Tensor] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.batch is None:
            self.batch = [t.clone() for t in batch]
        module: Any = copy.deepcopy(pl_module).double()
        parameters = list(module.parameters())
        whole = [t.double() for t in self.batch]
        rows = [
            dense_gradient(lambda i=i: module.loss([t[i : i + 1] for t in whole]), parameters)
            for i in range(len(whole[0]))
        ]
        self.gradients.append(torch.stack(rows))
        self.hessians.append(dense_hessian(lambda: module.loss(whole), parameters))


def run(
    *callbacks: SpectralCallback, module: Regression | None = None, data: DataLoader[Any] | None = None, **options: Any
) -> Samples:
    torch.manual_seed(0)
    oracle = Samples()
    fit(Regression() if module is None else module, *callbacks, oracle, data=data, **options)
    return oracle


def covariance(G: Tensor) -> Tensor:  # (n, n)
    centered = G - G.mean(0)
    return centered.mT @ centered / len(G)


def moments(G: Tensor) -> tuple[float, float]:
    """Return tr Σ and |G|² without bias."""
    N, m, square = len(G), G.square().sum(1).mean().item(), G.mean(0).square().sum().item()
    return N / (N - 1) * (m - square), (N * square - m) / (N - 1)


def close(value: float) -> Any:
    return pytest.approx(value, rel=1e-4, abs=1e-6)


# ---- Values


def endless(batch_size: int = 8) -> DataLoader[Any]:
    """Batches of a loader that does not tell how many samples there are."""
    sampler = [list(range(start, start + batch_size)) for start in range(0, 32, batch_size)]
    return DataLoader(samples(), batch_sampler=sampler)


def test_each_number_is_that_of_the_gradients_of_single_samples() -> None:
    callback = GradientCovariance(every_n_steps=1, ema=0.0, on_error="raise")
    oracle = run(callback, data=endless())
    assert steps(callback) == [0, 1, 2, 3]
    for entry, G in zip(callback.history, oracle.gradients, strict=True):
        values = torch.linalg.eigvalsh(covariance(G)).flip(0)[:7]
        spectrum = entry["gradient/covariance"]
        assert isinstance(spectrum, Spectrum)
        assert spectrum.values.tolist() == pytest.approx(values.tolist(), rel=1e-4, abs=1e-6)
        assert spectrum.num_eigenvalues == 7
        assert entry["gradient/covariance_lambda_max"] == close(values[0].item())
        assert entry["gradient/second_moment_lambda_max"] == close(torch.linalg.eigvalsh(G.mT @ G / 8)[-1].item())
        p = values / values.sum()
        assert entry["gradient/effective_rank"] == close(math.exp(-(p * p.log()).sum().item()))
        trace, square = moments(G)
        assert entry["gradient/covariance_trace"] == close(trace)
        assert entry["gradient/signal_to_noise"] == close(square / trace)
        assert entry["gradient/norm"] == close(G.mean(0).norm().item())
        units = G / G.norm(dim=1, keepdim=True)
        cosines = units @ units.mT
        assert entry["gradient/mean_cosine"] == close(((cosines.sum() - 8) / 56).item())
        if square > 0:
            assert entry["gradient/noise_scale"] == close(trace / square)
        assert entry["gradient/num_samples"] == 8
        assert entry["gradient/status"] == Status.CONVERGED


def test_the_noise_scale_alone_is_averaged_numerator_and_denominator_apart() -> None:
    callback = GradientCovariance(every_n_steps=1, ema=0.5, on_error="raise")
    oracle = run(callback, data=endless())
    traces, squares = zip(*map(moments, oracle.gradients), strict=True)
    for last, entry in enumerate(callback.history):
        weights = [0.5 ** (last - i) for i in range(last + 1)]
        trace = sum(w * t for w, t in zip(weights, traces, strict=False))
        square = sum(w * s for w, s in zip(weights, squares, strict=False))
        assert entry["gradient/noise_scale"] == close(trace / square)
        assert entry["gradient/covariance_trace"] == close(traces[last])
        assert entry["gradient/noise_scale_low"] < entry["gradient/noise_scale"]


def test_averaging_takes_from_the_error_where_each_look_is_at_other_samples_alone() -> None:
    """Here they are the same by construction, which the callback cannot know of the current batch."""
    fixed = GradientCovariance(every_n_steps=1, on_error="raise")
    current = GradientCovariance(every_n_steps=1, data="current", name="current", on_error="raise")
    torch.manual_seed(4)
    fit(Regression(sgd(0.0)), fixed, current, data=DataLoader(samples(12), batch_sampler=[list(range(11))] * 8))
    assert series(current, "current/noise_scale") == pytest.approx(series(fixed, "gradient/noise_scale"), rel=1e-5)
    errors, of_current = series(fixed, "gradient/noise_scale_error"), series(current, "current/noise_scale_error")
    assert errors == pytest.approx([errors[0]] * 8, rel=1e-4)
    weights = torch.tensor([0.9**i for i in range(8)])
    shrunk = (weights / weights.sum()).norm().item()
    assert of_current[-1] == pytest.approx(shrunk * errors[0], rel=1e-4)


def test_a_look_at_very_few_samples_does_not_spoil_the_average() -> None:
    callback = GradientCovariance(every_n_steps=1, data="current", on_error="raise")
    torch.manual_seed(4)
    batches = [list(range(11)), [11, 12, 13]] * 2
    fit(Regression(sgd(0.0)), callback, data=DataLoader(samples(24), batch_sampler=batches))
    assert series(callback, "gradient/num_samples") == [11, 3, 11, 3]
    assert callback.history[1]["gradient/noise_scale"] == callback.history[0]["gradient/noise_scale"]
    assert callback.history[3]["gradient/noise_scale_error"] < callback.history[0]["gradient/noise_scale_error"]


def test_each_run_begins_its_averages_anew() -> None:
    callback = GradientCovariance(every_n_steps=1, on_error="raise")
    run(callback)
    first = series(callback, "gradient/noise_scale")
    run(callback)
    assert series(callback, "gradient/noise_scale") == [*first, *first]


@pytest.mark.parametrize(
    ("num_samples", "num_batches", "expected"), [(3, 1, 3), (1000, 1, 8), (12, 2, 12), (64, 2, 16)]
)
def test_num_samples_is_an_upper_limit_over_all_batches(num_samples: int, num_batches: int, expected: int) -> None:
    callback = GradientCovariance(num_samples, every_n_steps=1, num_batches=num_batches, on_error="raise")
    oracle = run(callback)
    assert series(callback, "gradient/num_samples") == [expected] * len(callback.history)
    if num_samples == 3:
        values = torch.linalg.eigvalsh(covariance(oracle.gradients[0][:3]))
        assert callback.history[0]["gradient/covariance_lambda_max"] == close(values[-1].item())


def test_more_eigenvalues_than_samples_give_fewer() -> None:
    callback = GradientCovariance(4, 100, every_n_steps=1, hessian=True, on_error="raise", max_matvecs=200)
    run(callback)
    assert callback.history[0]["gradient/hessian_overlap_null"] == pytest.approx(3 / 26)


def test_errors_vanish_where_the_whole_dataset_was_seen() -> None:
    whole = GradientCovariance(every_n_steps=1, on_error="raise", labels=lambda batch: (batch[1][:, 0] > 0).long())
    part = GradientCovariance(16, every_n_steps=1, on_error="raise", name="part")
    run(whole, part, data=loader(32, 32))
    for tag in ("noise_scale", "covariance_trace", "covariance_lambda_max", "mean_cosine", "within_class_trace"):
        assert whole.history[0][f"gradient/{tag}_error"] == 0
        assert part.history[0].get(f"part/{tag}_error", 1.0) > 0
    entry = whole.history[0]
    assert entry["gradient/noise_scale_low"] == pytest.approx(entry["gradient/noise_scale"])
    assert entry["gradient/noise_scale_high"] == pytest.approx(entry["gradient/noise_scale"])
    assert entry["gradient/covariance_trace"] == close(entry["gradient/covariance"].values.sum().item())


def test_a_loader_of_ones_own_need_not_be_the_dataset_of_training() -> None:
    whole = GradientCovariance(every_n_steps=4, data=loader(32, 32), on_error="raise")
    part = GradientCovariance(every_n_steps=4, data=loader(64, 32), name="part", on_error="raise")
    run(whole, part, data=loader(32, 32))
    assert whole.history[0]["gradient/covariance_trace_error"] == 0
    assert part.history[0]["part/covariance_trace_error"] > 0


def stream() -> DataLoader[Any]:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(samples())

    return DataLoader(Stream(), batch_size=32)


DATASETS: dict[str, tuple[Any, DataLoader[Any], int | None]] = {
    "training's own": ("fixed", loader(32, 32, shuffle=True), 32),
    "with replacement": ("fixed", loader(32, 32, sampler=RandomSampler(samples(), replacement=True)), None),
    "of a sampler that does not tell": ("current", endless(32), None),
    "of a second loader": ("train", loader(32, 32, sampler=RandomSampler(samples(), replacement=True)), 32),
    "of a second loader over a part": ("train", loader(64, 32, sampler=SubsetRandomSampler(range(32))), 32),
    "of one's own": (loader(32, 32), loader(64, 32), 32),
    "of one's own with replacement": (
        loader(32, 32, sampler=RandomSampler(samples(), replacement=True)), loader(64, 32), None,
    ),
    "of one's own that is a stream": (stream(), loader(64, 32), None),
}  # fmt: skip


@pytest.mark.parametrize("which", DATASETS)
def test_errors_are_over_draws_from_the_data_that_the_samples_come_from(which: str) -> None:
    """All 32 samples of a dataset leave no error; as many of endless data do."""
    data, training, size = DATASETS[which]
    callback = GradientCovariance(every_n_steps=10, data=data, hessian=True, outputs="net", on_error="raise")
    run(callback, data=training)
    assert callback.history[0]["gradient/num_samples"] == 32
    for tag in ("covariance_trace", "loss_noise_alignment"):
        assert (callback.history[0][f"gradient/{tag}_error"] == 0) == (size == 32)


def test_the_noise_scale_of_each_module_is_that_of_its_own_parameters() -> None:
    callback = GradientCovariance(every_n_steps=1, per_layer=True, ema=0.0, on_error="raise")
    oracle = run(callback, data=endless())
    seen = 0
    for entry, G in zip(callback.history, oracle.gradients, strict=True):
        for layer, columns in (("net.0", slice(0, 16)), ("net.2", slice(16, 26))):
            trace, square = moments(G[:, columns])
            assert (f"gradient/noise_scale/{layer}" in entry) == (square > 0), "there is none where no signal is seen"
            assert (f"gradient/noise_scale_error/{layer}" in entry) == (square > 0)
            if square > 0:
                assert entry[f"gradient/noise_scale/{layer}"] == close(trace / square)
                error = GradientMoments.from_gram(G[:, columns] @ G[:, columns].mT).noise_scale().error
                assert entry[f"gradient/noise_scale_error/{layer}"] == close(error)
                seen += 1
    assert seen > 3


def test_names_of_modules_become_tags_that_loggers_take() -> None:
    class Odd(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.spread = nn.Parameter(torch.ones(2))
            self.parts = nn.ModuleDict({"first part": nn.Linear(2, 2), "first_part": nn.Linear(2, 2)})

        def loss(self, batch: Any) -> Tensor:
            x, y = batch
            z = self.parts["first_part"](self.parts["first part"](self.net(x)))
            return (self.spread * z - y).square().mean()

    callback = GradientCovariance(every_n_steps=4, per_layer=True, on_error="raise")
    torch.manual_seed(0)
    module = Odd()
    before = copy.deepcopy(module)
    fit(module, callback, data=loader(32, 32))
    found = {
        tag.removeprefix("gradient/noise_scale/"): value
        for tag, value in callback.history[0].items()
        if tag.startswith("gradient/noise_scale/")
    }
    names = {"spread": "spread", "parts.first_part": "parts.first_part", "parts.first_part_2": "parts.first part"}
    assert names.keys() <= found.keys() <= {*names, "net.0", "net.2"}
    x, y = samples().tensors
    for tag, name in names.items():
        own = [p for path, p in before.named_parameters() if path.startswith(name)]
        G = torch.stack([dense_gradient(lambda i=i: before.loss([x[i : i + 1], y[i : i + 1]]), own) for i in range(32)])
        squared = G.mean(0).square().sum()
        assert found[tag] == pytest.approx((covariance(G).trace() / squared).item(), rel=1e-3)


# ---- Classes


def signs(batch: Any) -> Tensor:
    return (batch[1][:, 0] > 0).long()


@pytest.mark.parametrize("labels", [signs, f"{__name__}.signs"])
def test_the_traces_within_and_between_classes_add_up(labels: Any) -> None:
    callback = GradientCovariance(every_n_steps=1, labels=labels, num_batches=2, on_error="raise")
    run(callback)
    for entry in callback.history:
        total = entry["gradient/within_class_trace"] + entry["gradient/between_class_trace"]
        assert total == close(entry["gradient/covariance_trace"])


def test_the_trace_within_classes_is_that_about_their_means() -> None:
    callback = GradientCovariance(every_n_steps=1, labels=signs, on_error="raise")
    oracle = run(callback, data=endless())
    G, labels = oracle.gradients[0], signs(oracle.batch)
    within = sum(len(G[labels == c]) * G[labels == c].var(0).sum().item() for c in (0, 1)) / len(G)
    assert callback.history[0]["gradient/within_class_trace"] == close(within)


def test_classes_are_those_of_the_first_samples() -> None:
    callback = GradientCovariance(5, every_n_steps=1, labels=signs, on_error="raise")
    run(callback)
    assert len(callback.history) == 4
    assert all("gradient/within_class_trace" in entry for entry in callback.history)


class Classes(Regression):
    """Its batches are (x, y, class) or a dict of these."""

    def loss(self, batch: Any) -> Tensor:
        x, y, _ = batch.values() if isinstance(batch, dict) else batch
        return (self.net(x) - y).square().mean()


def with_classes(*, as_dict: bool = False) -> DataLoader[Any]:
    x, y = samples().tensors
    data = TensorDataset(x, y, (y[:, 0] > 0).long())

    def collate(items: list[Any]) -> dict[str, Tensor]:
        parts = zip(*items, strict=True)
        return {name: torch.stack(part) for name, part in zip(("x", "y", "class"), parts, strict=True)}

    return DataLoader(data, batch_size=8, collate_fn=collate if as_dict else None)


@pytest.mark.parametrize("as_dict", [False, True])
def test_labels_are_found_by_key_or_index(as_dict: bool) -> None:
    by_key = GradientCovariance(every_n_steps=1, labels="class" if as_dict else 2, on_error="raise")
    by_function = GradientCovariance(every_n_steps=1, labels=signs, on_error="raise")
    torch.manual_seed(0)
    fit(Classes(), by_key, data=with_classes(as_dict=as_dict))
    torch.manual_seed(0)
    fit(Regression(), by_function)
    tag = "gradient/within_class_trace"
    assert series(by_key, tag) == pytest.approx(series(by_function, tag), rel=1e-6)


WRONG_LABELS: list[tuple[Any, str]] = [
    (5, r"labels=5 is no key of the batch, a list \(IndexError"),
    ("class", "labels='class' is no key of the batch, a list"),
    (1, r"labels=1 gives shape \(8, 2\) and type torch.float32 for a batch of 8 samples; it must give an integer"),
    (lambda batch: torch.zeros(3, dtype=torch.long), r"gives shape \(3,\) and type torch.int64 for a batch of 8"),
    (lambda batch: "cat", "gives str for a batch of 8 samples"),
    (lambda batch: batch["class"], r"fails on the batch, a list \(TypeError"),
    (lambda batch: {}["class"], r"fails on the batch, a list \(KeyError\('class'\)\); pass the key or index"),
    (lambda batch: 1 // 0, r"fails on the batch, a list \(ZeroDivisionError"),
    (lambda batch: [2**70] * 8, "gives numbers for a batch of 8 samples that no int64 can hold"),
]


@pytest.mark.parametrize(("labels", "message"), WRONG_LABELS)
def test_labels_that_are_none_leave_the_classes_out_and_say_so_once(labels: Any, message: str) -> None:
    callback = GradientCovariance(every_n_steps=1, labels=labels, on_error="raise")
    with pytest.warns(UserWarning, match=f"within_class_trace and between_class_trace left out: .*{message}") as warned:
        fit(Regression(), callback)
    assert len(complaints(warned)) == 1
    assert len(callback.history) == 4
    assert all("gradient/noise_scale" in entry for entry in callback.history)


# ---- Curvature


def test_without_eigenvectors_the_overlaps_are_left_out_and_nothing_is_said() -> None:
    callback = GradientCovariance(every_n_steps=1, on_error="raise")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        fit(Regression(), callback)
    assert complaints(warned) == []
    assert not [tag for tag in callback.history[0] if "hessian" in tag or "subspace" in tag or "alignment" in tag]
    assert "gradient/num_matvecs" not in callback.history[0]


PROVIDERS: dict[str, Callable[[], SpectralCallback]] = {
    "Sharpness": lambda: Sharpness(3, every_n_steps=2, rtol=1e-4),
    "HessianSpectrum": lambda: HessianSpectrum(3, every_n_steps=2, rtol=1e-4, num_steps=4),
}


@pytest.mark.filterwarnings("ignore:.*left out:UserWarning")
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("comes_first", [True, False])
def test_eigenvectors_of_the_same_step_are_shared_whatever_the_order(provider: str, comes_first: bool) -> None:
    callback, other = GradientCovariance(every_n_steps=1, on_error="raise"), PROVIDERS[provider]()
    oracle = run(*((other, callback) if comes_first else (callback, other)))
    for entry, G, H in zip(callback.history, oracle.gradients, oracle.hessians, strict=True):
        if entry["step"] % 2:
            assert "gradient/hessian_overlap" not in entry
            continue
        top = torch.linalg.eigh(H).eigenvectors[:, -3:]
        noise = torch.linalg.eigh(covariance(G)).eigenvectors[:, -3:]
        overlap = (top.mT @ noise).square().sum().item() / 3
        assert entry["gradient/hessian_overlap"] == pytest.approx(overlap, rel=2e-3)
        assert entry["gradient/hessian_overlap_null"] == pytest.approx(3 / 26)
        g = G.mean(0)
        share = ((top.mT @ g).square().sum() / g.square().sum()).item()
        assert entry["gradient/top_subspace_share"] == pytest.approx(share, rel=2e-3)
        assert entry["gradient/top_subspace_share_null"] == pytest.approx(3 / 26)
    assert "gradient/num_matvecs" not in callback.history[0]


def test_the_share_of_the_gradient_uses_all_vectors_that_are_known() -> None:
    callback = GradientCovariance(num_eigenvalues=2, every_n_steps=1, on_error="raise")
    run(callback, Sharpness(5, every_n_steps=1))
    assert callback.history[0]["gradient/top_subspace_share_null"] == pytest.approx(5 / 26)
    assert callback.history[0]["gradient/hessian_overlap_null"] == pytest.approx(2 / 26)


def test_eigenvectors_of_another_probe_are_not_shared() -> None:
    callback = GradientCovariance(every_n_steps=1, on_error="raise")
    run(callback, Sharpness(every_n_steps=1, num_batches=2))
    assert "gradient/hessian_overlap" not in callback.history[-1]


def test_own_eigenvectors_are_searched_where_too_few_are_known() -> None:
    alone = GradientCovariance(num_eigenvalues=3, every_n_steps=1, hessian=True, rtol=1e-4, on_error="raise")
    beside = GradientCovariance(num_eigenvalues=3, every_n_steps=1, hessian=True, rtol=1e-4, on_error="raise")
    run(alone)
    run(beside, Sharpness(every_n_steps=1))
    tag = "gradient/hessian_overlap"
    assert series(beside, tag) == pytest.approx(series(alone, tag), rel=1e-3)
    assert series(alone, "gradient/num_matvecs")[0] > 30


def test_enough_eigenvectors_of_others_cost_no_search() -> None:
    callback = GradientCovariance(num_eigenvalues=3, every_n_steps=1, hessian=True, on_error="raise")
    run(callback, Sharpness(3, every_n_steps=1))
    assert series(callback, "gradient/num_matvecs") == [10 + 26] * 4, "tr(ΣH) and the trace, exact at n products"


def test_the_alignment_of_noise_and_curvature_is_the_ratio_of_the_curvature_seen() -> None:
    callback = GradientCovariance(every_n_steps=1, hessian=True, on_error="raise")
    oracle = run(callback)
    for entry, G, H in zip(callback.history, oracle.gradients, oracle.hessians, strict=True):
        sigma = covariance(G)
        truth = ((sigma @ H).trace() / (sigma.trace() * H.trace() / 26)).item()
        error = entry["gradient/noise_curvature_alignment_error"]
        # 10 vectors in so few dimensions: beyond 4 errors once in 100 cases
        assert abs(entry["gradient/noise_curvature_alignment"] - truth) < 6 * error < truth


def test_the_alignment_with_the_loss_is_that_of_the_gauss_newton_matrix() -> None:
    from spectral_callbacks.callbacks import TraceStability

    callback = GradientCovariance(every_n_steps=4, hessian=True, outputs="net", on_error="raise")
    other = TraceStability(every_n_steps=4, outputs="net", on_error="raise")
    run(callback, other)
    for tag in ("alignment", "alignment_error"):
        assert callback.history[0][f"gradient/loss_noise_{tag}"] == pytest.approx(other.history[0][f"trace/{tag}"])


def test_a_budget_that_is_spent_shows_in_the_status() -> None:
    callback = GradientCovariance(every_n_steps=1, hessian=True, max_matvecs=5, on_error="raise")
    with pytest.warns(UserWarning, match="The budget of products was spent"):
        fit(Regression(), callback)
    assert series(callback, "gradient/status") == [Status.BUDGET] * 4


@pytest.mark.filterwarnings("ignore:Sharpness.*The budget of products:UserWarning")
@pytest.mark.parametrize("ride", [False, True])
def test_a_budget_that_was_spent_on_the_eigenvectors_shows_in_the_status(ride: bool) -> None:
    callback = GradientCovariance(every_n_steps=1, ride=ride, on_error="raise")
    with pytest.warns(UserWarning, match=r"GradientCovariance.*The budget of products was spent"):
        fit(Regression(), callback, Sharpness(3, every_n_steps=2, max_matvecs=4))
    assert ["gradient/hessian_overlap" in entry for entry in callback.history] == [True, False, True, False]
    assert series(callback, "gradient/status") == [1, 0, 1, 0]


# ---- Training is bit-identical


def test_training_is_bit_identical_where_samples_must_be_run_one_by_one(tmp_path: Path) -> None:
    callback = GradientCovariance(every_n_steps=3, per_layer=True, labels=1, on_error="raise")
    plain = record(tmp_path, Separate, images)
    measured = record(tmp_path, Separate, images, [callback], own_tags=lambda tag: "/" in tag)
    assert plain.differences(measured) == set()
    assert len(callback.history) == 3
    assert all(entry["gradient/covariance_trace"] > 0 for entry in callback.history)


# ---- Where it is written


def test_tensorboard_holds_the_spectrum_as_histogram_and_points(tmp_path: Path) -> None:
    callback, logger = GradientCovariance(every_n_steps=2, on_error="raise"), TensorBoardLogger(tmp_path)
    fit(Regression(), callback, logger=logger)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0, "tensors": 0}).Reload()
    assert [event.step for event in events.Histograms("gradient/covariance")] == [0, 2]
    assert "gradient/covariance_points" in events.Tags()["tensors"]
    assert [event.value for event in events.Scalars("gradient/norm")] == pytest.approx(
        series(callback, "gradient/norm")
    )


@pytest.mark.parametrize("hessian", [False, True])
def test_charts_draw_the_overlap_only_where_eigenvectors_will_be_known(hessian: bool) -> None:
    callback = GradientCovariance(every_n_steps=4, hessian=hessian)
    fit(Regression(), callback)
    drawn = {tag for chart in callback.charts for tag in chart.tags}
    assert ("gradient/hessian_overlap" in drawn) == hessian
    beside = GradientCovariance(every_n_steps=4)
    fit(Regression(), beside, Sharpness(every_n_steps=4))
    assert "gradient/hessian_overlap" in {tag for chart in beside.charts for tag in chart.tags}


# ---- Bad input

BAD: list[tuple[dict[str, Any], str]] = [
    ({"num_samples": 1}, "num_samples=1 must be at least 2"),
    ({"num_eigenvalues": 0}, "num_eigenvalues=0 must be at least 1"),
    ({"ema": 1.0}, "ema=1.0 must lie between 0"),
    ({"ema": -0.1}, "ema=-0.1 must lie between 0"),
    ({"linear_below": 0.0}, "linear_below=0.0 must be a positive eigenvalue"),
    ({"labels": 1.5}, r"labels=1.5 must be a function \(batch\) -> \(N,\) integers"),
    ({"labels": "no.such.function"}, "labels='no.such.function' must be the dotted path of a function"),
    ({"max_matvecs": 0, "hessian": True}, "max_matvecs=0 must be at least"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_a_bad_argument_is_refused_with_its_value_and_its_rule(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientCovariance(**options)


class Summed(Regression):
    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (self.net(x) - y).square().sum()


class Normalized(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))


class Centered(Regression):
    """Mixes the samples of a batch by hand."""

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        z = self.net(x)
        return (z - z.mean(0) - y).square().mean()


COUPLED: dict[str, tuple[Callable[[], Regression], str]] = {
    "a sum": (Summed, "the loss of a batch is not the mean over its samples"),
    "batch norm": (Normalized, "BatchNorm"),
    "a mean over the batch": (Centered, "not the mean over its samples|several samples"),
}


@pytest.mark.parametrize("kind", COUPLED)
def test_a_batch_whose_samples_have_no_gradient_of_their_own_is_refused_once(kind: str) -> None:
    make, message = COUPLED[kind]
    callback = GradientCovariance(every_n_steps=1)
    with pytest.warns(UserWarning, match=message) as warned:
        fit(make(), callback)
    assert len(complaints(warned)) == 1
    assert callback.history == [{"step": 0, "gradient/status": float(Status.BREAKDOWN)}]


def test_batch_norm_is_measured_in_eval_mode() -> None:
    callback = GradientCovariance(every_n_steps=1, mode="eval", on_error="raise")
    fit(Normalized(), callback)
    assert len(callback.history) == 4
    assert all(entry["gradient/covariance_trace"] > 0 for entry in callback.history)


def test_gradients_that_are_not_finite_leave_a_status() -> None:
    class Broken(Regression):
        def loss(self, batch: Any) -> Tensor:
            x, y = batch
            return (self.net(x) - y).square().mean() * (math.nan if self.global_step == 2 else 1.0)

    callback = GradientCovariance(every_n_steps=1)
    with pytest.warns(UserWarning, match="not finite"):
        fit(Broken(sgd(0.0)), callback)
    assert series(callback, "gradient/status") == [0, 0, Status.NONFINITE, Status.NONFINITE]
    assert "gradient/noise_scale" not in callback.history[2]


def test_a_batch_of_one_sample_has_no_covariance_and_the_run_goes_on() -> None:
    callback = GradientCovariance(every_n_steps=1, data="current", on_error="raise")
    with pytest.warns(UserWarning, match="a batch of a single sample has no covariance"):
        fit(Regression(), callback, data=loader(17, 8))
    assert series(callback, "gradient/num_samples") == [8, 8, 1]
    assert "gradient/covariance_trace" not in callback.history[2]
    assert "gradient/covariance_trace" in callback.history[1]
