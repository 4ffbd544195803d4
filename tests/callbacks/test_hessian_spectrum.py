"""The numbers of `HessianSpectrum`, against dense matrices in float64 and closed forms."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from spectral_callbacks.callbacks.hessian_spectrum import HessianSpectrum
from spectral_callbacks.callbacks.reading import Spectrum
from spectral_callbacks.linalg import Status
from spectral_callbacks.metrics import outliers
from spectral_callbacks.operators import GaussNewton, Hessian
from spectral_callbacks.tags import check_tag
from tests.callbacks.runs import Regression, Watch, complaints, fit, loader, series, sgd, steps
from tests.faults import SkewedSquare
from tests.oracles import dense_hessian


class Wide(Regression):
    """114 parameters, more than the density can spend products on."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))


class Softmax(pl.LightningModule):
    """Softmax regression from W = 0, in float64 by the trainer's precision."""

    def __init__(self, num_classes: int, dimension: int = 20) -> None:
        super().__init__()
        self.net = nn.Linear(dimension, num_classes, bias=False)
        nn.init.zeros_(self.net.weight)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def clusters(num_classes: int, num_samples: int = 4000, dimension: int = 20) -> DataLoader[Any]:
    """Classes around orthogonal means of norm 4, in one batch."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(num_samples) % num_classes
    x = torch.randn(num_samples, dimension, dtype=torch.float64, generator=generator)
    x[torch.arange(num_samples), y] += 4.0
    return DataLoader(TensorDataset(x, y), batch_size=num_samples)


class Dense(pl.Callback):
    """Hessian, Gauss-Newton matrix and features before every step, on the first batch, in float64."""

    def __init__(self) -> None:
        self.hessians: list[Tensor] = []
        self.gauss_newtons: list[Tensor] = []
        self.features: list[Tensor] = []
        self.batch: Any = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.batch is None:
            self.batch = [t.double() for t in batch]
        x, y = self.batch
        twin = type(pl_module)()
        twin.load_state_dict(copy.deepcopy(pl_module.state_dict()))
        twin.double()
        parameters = list(twin.parameters())
        self.hessians.append(dense_hessian(lambda: twin.loss((x, y)), parameters))
        rows = []
        for output in twin.net(x).flatten():
            row = torch.autograd.grad(output, parameters, retain_graph=True)
            rows.append(torch.cat([r.flatten() for r in row]))
        J = torch.stack(rows)
        self.gauss_newtons.append(2 * J.mT @ J / len(J))  # of the mean of (f - y)² over samples and outputs
        hidden = twin.net[:-1](x).detach()
        self.features.append(torch.cat([hidden, torch.ones(len(x), 1, dtype=torch.float64)], dim=1))


def run(
    *callbacks: HessianSpectrum, module: type[Regression] = Regression, max_epochs: int = 2, **options: Any
) -> Dense:
    torch.manual_seed(0)
    dense = Dense()
    fit(module(), *callbacks, dense, max_epochs=max_epochs, **options)
    return dense


def spectrum(num_eigenvalues: int = 10, **options: Any) -> HessianSpectrum:
    return HessianSpectrum(num_eigenvalues, **{"every_n_steps": 1, "outputs": "net", "on_error": "raise", **options})


def test_each_value_is_that_of_the_dense_hessian_at_its_step() -> None:
    callback = spectrum(4, rtol=1e-3)
    with pytest.warns(
        UserWarning,
        match="num_eigenvalues=4 is too few to see a bulk: the model has 2 outputs, and there may be as many outliers. "
        "Pass num_eigenvalues=12",
    ):
        dense = run(callback)
    assert steps(callback) == list(range(8))
    for entry, H in zip(callback.history, dense.hessians, strict=True):
        values = torch.linalg.eigvalsh(H).flip(0)
        assert entry["hessian/status"] == Status.CONVERGED
        for index, tag in enumerate(("lambda_max", "lambda_2", "lambda_3", "lambda_4")):
            assert entry[f"hessian/{tag}"] == pytest.approx(values[index].item(), rel=1e-4)
        assert "hessian/lambda_5" not in entry
        assert entry["hessian/lambda_min"] == pytest.approx(values[-1].item(), rel=1e-3)
        for tag, bound in (("max", "residual"), ("2", "lambda_2_residual"), ("min", "lambda_min_residual")):
            distance = (values - entry[f"hessian/lambda_{tag}"]).abs().min().item()
            assert distance <= entry[f"hessian/{bound}"] + 1e-5
        assert entry["hessian/mean"] == pytest.approx(values.mean().item(), rel=1e-5)
        assert entry["hessian/negative_mass"] == pytest.approx((values < 0).double().mean().item())
        assert entry["hessian/negative_mass_error"] == 0
        above = values[values > 1e-3 * values[0]]
        assert entry["hessian/condition_number"] == pytest.approx((values[0] / above[-1]).item(), rel=1e-2)
        assert entry["hessian/condition_cutoff"] == pytest.approx(1e-3 * values[0].item(), rel=1e-4)
        density = entry["hessian/density"]
        assert isinstance(density, Spectrum)
        copies = len(density.values) // len(values)  # one for each probe
        expected = values.flip(0).repeat_interleave(copies)
        torch.testing.assert_close(density.values.sort().values, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(density.weights.sum().item(), 1.0)


def test_the_outliers_are_those_of_the_dense_spectrum() -> None:
    callback = spectrum(12, rtol=1e-4)
    dense = run(callback)
    for entry, H in zip(callback.history, dense.hessians, strict=True):
        found = outliers(torch.linalg.eigvalsh(H).flip(0)[:12], size=len(H))
        assert entry["hessian/num_outliers"] == found.count
        assert entry["hessian/bulk_edge"] == pytest.approx(found.bulk_edge, rel=1e-3)
        assert entry["hessian/outlier_gap"] == pytest.approx(found.gap, rel=1e-2)


def test_where_the_density_is_estimated_its_errors_hold() -> None:
    callback = spectrum(2, num_steps=12, num_probes=3)
    with pytest.warns(UserWarning, match="is too few"):
        dense = run(callback, module=Wide, max_epochs=4)
    z_mean, z_mass = [], []
    for entry, H in zip(callback.history, dense.hessians, strict=True):
        values = torch.linalg.eigvalsh(H)
        assert entry["hessian/mean_error"] > 0
        z_mean.append((entry["hessian/mean"] - values.mean().item()) / entry["hessian/mean_error"])
        negative = (values < -1e-6).double().mean().item()
        z_mass.append((entry["hessian/negative_mass"] - negative) / entry["hessian/negative_mass_error"])
    for z in (torch.tensor(z_mean), torch.tensor(z_mass)):
        assert (z.abs() < 3).all()
    assert (torch.tensor(z_mean).abs() > 0.01).any()


def test_gauss_newton_is_measured_on_request() -> None:
    callback = spectrum(4, gauss_newton=True, rtol=1e-3)
    with pytest.warns(UserWarning, match="is too few"):
        dense = run(callback)
    for entry, G in zip(callback.history, dense.gauss_newtons, strict=True):
        values = torch.linalg.eigvalsh(G).flip(0)
        for index, tag in enumerate(("lambda_max", "lambda_2", "lambda_3", "lambda_4")):
            assert entry[f"gauss_newton/{tag}"] == pytest.approx(values[index].item(), rel=1e-3)
        assert entry["gauss_newton/mean"] == pytest.approx(values.mean().item(), rel=1e-5)
        assert "gauss_newton/lambda_min" not in entry
        assert "gauss_newton/negative_mass" not in entry
        assert isinstance(entry["gauss_newton/density"], Spectrum)
        assert check_tag("gauss_newton/density")


def test_the_residual_ratio_is_that_of_the_dense_matrices_within_its_error() -> None:
    callback = spectrum(2, num_steps=2, num_probes=1)
    with pytest.warns(UserWarning, match="is too few"):
        dense = run(callback, max_epochs=5)
    z = []
    for entry, H, G in zip(callback.history, dense.hessians, dense.gauss_newtons, strict=True):
        ratio = ((H - G).norm() / H.norm()).item()
        z.append((entry["hessian/residual_ratio"] - ratio) / entry["hessian/residual_ratio_error"])
        assert entry["hessian/residual_ratio_error"] < 0.25 * ratio
    # The t distribution of 10 vectors, every step its own: a mean of 20 has the standard error 0.25.
    assert abs(sum(z) / len(z)) < 1
    assert 0.4 < torch.tensor(z).std().item() < 2


def test_a_model_linear_in_its_parameters_has_residual_ratio_zero() -> None:
    callback = spectrum(25)
    fit(Softmax(3), callback, data=clusters(3), max_epochs=4, precision="64-true")
    assert series(callback, "hessian/residual_ratio") == pytest.approx([0.0] * 4, abs=1e-12)
    assert series(callback, "hessian/negative_mass") == pytest.approx([0.0] * 4, abs=1e-12)


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
@pytest.mark.parametrize(("num_classes", "place"), [(3, 2.111), (4, 1.25)])
def test_clusters_have_the_outliers_of_the_closed_form(num_classes: int, place: float, precision: str) -> None:
    class Cast(Softmax):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return F.cross_entropy(self.net(x.to(self.net.weight)), y)

    callback = spectrum(28, gauss_newton=True)
    fit(Cast(num_classes), callback, data=clusters(num_classes), precision=precision)
    [entry] = callback.history
    count = num_classes * (num_classes - 1)
    for name in ("hessian", "gauss_newton"):
        assert entry[f"{name}/num_outliers"] == count
        assert entry[f"{name}/outlier_gap"] > 30
        edge = (1 + math.sqrt(20 / 4000)) ** 2 / num_classes  # that of Marchenko and Pastur
        assert entry[f"{name}/bulk_edge"] == pytest.approx(edge, rel=0.03)
        tags = [f"{name}/lambda_max", *(f"{name}/lambda_{i}" for i in range(2, count + 1))]
        assert [entry[tag] for tag in tags] == pytest.approx([place] * count, rel=0.08)
        assert entry[f"{name}/condition_number"] == pytest.approx(place * num_classes, rel=0.3)
    assert entry["hessian/negative_mass"] == pytest.approx(0.0, abs=1e-6)
    mass = torch.tensor([entry["hessian/density"].weights[entry["hessian/density"].values.abs() < 1e-5].sum()])
    assert mass.item() == pytest.approx(1 / num_classes)  # the share of the uniform shift of all classes


def test_the_features_are_the_input_of_the_last_linear_layer() -> None:
    callback, named = spectrum(2), spectrum(2, features="net.2", name="named")
    with pytest.warns(UserWarning, match="is too few"):
        dense = run(callback, named)
    for step, (entry, other, Z) in enumerate(zip(callback.history, named.history, dense.features, strict=True)):
        s = torch.linalg.svdvals(Z)
        assert entry["features/condition_number"] == pytest.approx((s[0] / s[-1]).item(), rel=1e-4)
        # Of the mean over 8 samples and 2 outputs of (f - y)², with learning rate 0.1.
        left = (1 - 0.1 * s**2 / 8) ** step
        assert entry["features/unfitted_modes"] == pytest.approx((left > 1 / math.e).double().mean().item())
        assert other["named/features/condition_number"] == entry["features/condition_number"]


@pytest.mark.filterwarnings("ignore:.*left out:UserWarning")
@pytest.mark.parametrize("outputs", [None, "net", ""])
def test_the_modes_are_fitted_at_the_curvature_that_the_loss_has_in_the_layers_own_outputs(outputs: str | None) -> None:
    """Also where what is behind the layer scales them, and whatever is named as the model's outputs."""

    class Steep(Regression):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.net(x)

        def loss(self, batch: Any) -> Tensor:
            x, y = batch
            return (self(x) - y).square().mean()

    callback = spectrum(8, outputs=outputs)
    dense = run(callback, module=Steep, max_epochs=10)
    shares = []
    for step, Z in enumerate(dense.features):
        s = torch.linalg.svdvals(Z)
        shares.append(((1 - 0.1 * 4 * s**2 / 8) ** step > 1 / math.e).double().mean().item())
    assert series(callback, "features/unfitted_modes") == pytest.approx(shares)
    assert len(set(shares)) > 2


def test_gradient_descent_on_the_last_layer_fits_the_modes_that_are_not_counted() -> None:
    """Real steps, and what is left of the outputs along each mode of the features."""

    class Head(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.net[0].requires_grad_(False)

        def loss(self, batch: Any) -> Tensor:
            x, y = batch
            return (3 * self.net(x) - y).square().sum(1).mean()

    callback, heads, features = spectrum(8, every_n_steps=1, outputs=None), [], []

    def see(trainer: pl.Trainer, module: Any, batch: Any) -> None:
        heads.append(torch.cat([module.net[2].weight.double().mT, module.net[2].bias.double()[None]]).detach().clone())
        x = module.net[:2](batch[0]).double()
        features.append((torch.cat([x, torch.ones(len(x), 1)], dim=1).detach(), batch[1].double()))

    with pytest.warns(UserWarning, match="left out"):
        fit(Head(), callback, Watch(see), data=loader(8), max_epochs=25)
    Z, y = features[0]
    _, _, V = torch.linalg.svd(Z, full_matrices=False)
    best = torch.linalg.lstsq(3 * Z, y).solution
    for step in (1, 5, 24):
        left = (V @ (heads[step] - best)).norm(dim=1) / (V @ (heads[0] - best)).norm(dim=1)
        share = (left > 1 / math.e).double().mean().item()
        assert callback.history[step]["features/unfitted_modes"] == pytest.approx(share)


def test_an_inner_layer_can_be_the_one_whose_features_are_measured() -> None:
    callback = spectrum(12, features="net.0")
    with pytest.warns(UserWarning, match="unfitted_modes left out: the loss depends on net.2.weight, net.2.bias other"):
        dense = run(callback)
    s = torch.linalg.svdvals(torch.cat([dense.batch[0], torch.ones(8, 1)], dim=1))
    assert series(callback, "features/condition_number") == pytest.approx([(s[0] / s[-1]).item()] * 8, rel=1e-4)


class Chain(Regression):
    """A layer, and the linear one behind it, called as a test asks."""

    def __init__(
        self, layer: nn.Module, *, call: Callable[[nn.Linear, Tensor], Tensor] = lambda head, x: head(x)
    ) -> None:
        super().__init__()
        self.net = nn.Sequential()
        self.layer, self.head, self.call = layer, nn.Linear(2, 2), call

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (self.call(self.head, self.layer(x)) - y).square().mean()


def condition(Z: Tensor, *, ones: bool) -> float:
    Z = Z.flatten(0, -2).double()
    s = torch.linalg.svdvals(torch.cat([Z, torch.ones(len(Z), 1)], dim=1) if ones else Z)
    return (s[0] / s[-1]).item()


def features_of(module: pl.LightningModule, data: Any = None, **options: Any) -> float | None:
    callback = spectrum(8, **{"outputs": None, "every_n_steps": 100, **options})
    fit(module, callback, data=data)
    return callback.history[0].get("features/condition_number")


@pytest.mark.filterwarnings("ignore:.*left out:UserWarning")
def test_a_layer_that_is_called_by_keyword_has_features() -> None:
    x = next(iter(loader()))[0]
    module = Chain(nn.Identity(), call=lambda head, x: head(input=x[:, :2]))
    assert features_of(module) == pytest.approx(condition(x[:, :2], ones=True), rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*residual_ratio left out:UserWarning")
@pytest.mark.parametrize("name", ["net.2", "alias.2"])
def test_features_of_a_compiled_layer_go_by_any_of_its_names(name: str) -> None:
    class Compiled(Regression):
        def __init__(self) -> None:
            super().__init__()
            hidden = next(iter(loader()))[0].double() @ self.net[0].weight.double().mT + self.net[0].bias
            self.expected = condition(hidden.detach().tanh(), ones=True)
            self.alias = self.net = torch.compile(self.net, backend="eager")  # pyright: ignore[reportAttributeAccessIssue]

    module = Compiled()
    assert features_of(module, features=name) == pytest.approx(module.expected, rel=1e-3)


@pytest.mark.filterwarnings("ignore:.*residual_ratio left out:UserWarning")
@pytest.mark.filterwarnings("ignore:.*unfitted_modes left out:UserWarning")
@pytest.mark.parametrize("layer", [nn.LayerNorm(3), nn.Identity(), nn.Linear(3, 3)])
def test_every_position_of_a_sequence_is_a_row_of_the_feature_matrix(layer: nn.Module) -> None:
    class Sequence(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def loss(self, batch: Any) -> Tensor:
            x, y = batch
            return (self.net(self.layer(torch.stack([x, x.sin()], dim=1)).sum(1)) - y).square().mean()

    x = next(iter(loader()))[0]
    expected = condition(torch.stack([x, x.sin()], dim=1), ones=isinstance(layer, nn.Linear))
    assert features_of(Sequence(), features="layer") == pytest.approx(expected, rel=1e-4)


class Convolved(Regression):
    """Images of 1 x 1 x 3, or signals of 1 x 3."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layer, self.shape = layer, shape

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (self.net(self.layer(x.view(self.shape)).flatten(1)) - y).square().mean()


NO_MATRIX: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "an image": (nn.Conv2d(1, 1, 1), (8, 1, 1, 3), r"'layer', Conv2d, has the shape \(8, 1, 1, 3\)"),
    "a signal, channels before positions": (
        nn.Conv1d(1, 1, 1),
        (8, 1, 3),
        r"'layer', Conv1d, has the shape \(8, 1, 3\)",
    ),
    "four dimensions": (nn.Tanh(), (8, 1, 1, 3), r"'layer', Tanh, has the shape \(8, 1, 1, 3\)"),
}


@pytest.mark.filterwarnings("ignore:.*residual_ratio left out:UserWarning")
@pytest.mark.parametrize("kind", NO_MATRIX)
def test_an_input_that_is_no_feature_matrix_has_no_features_and_one_message(kind: str) -> None:
    layer, shape, message = NO_MATRIX[kind]
    callback = spectrum(8, features="layer", outputs=None)
    with pytest.warns(
        UserWarning, match=rf"features/\* left out: the input of features={message}.*behind the pool"
    ) as warned:
        fit(Convolved(layer, shape), callback)
    assert len([text for text in complaints(warned) if "features" in text]) == 1
    assert steps(callback) == [0, 1, 2, 3]
    assert not [tag for entry in callback.history for tag in entry if tag.startswith("features")]


@pytest.mark.filterwarnings("ignore:.*left out:UserWarning")
def test_features_in_half_precision_are_left_out() -> None:
    """Rounding would pass for their small singular values."""
    callback = spectrum(2, rtol=0.1)
    with pytest.warns(UserWarning, match=r"features/\* left out: the features are in half precision"):
        fit(Regression(), callback, data=loader(400, batch_size=200), precision="bf16-true")
    assert not any(tag.startswith("features/") for entry in callback.history for tag in entry)


@pytest.mark.parametrize("rows", [64, 4096])
@pytest.mark.parametrize("spread", [1.0, 3e-5])
def test_a_small_singular_value_is_seen_however_many_rows_there_are(rows: int, spread: float) -> None:
    class Given(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 2, bias=False))

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 3, generator=generator) @ torch.diag(torch.tensor([1.0, 1.0, spread]))
    data = DataLoader(TensorDataset(x, torch.zeros(rows, 2)), batch_size=rows)
    s = torch.linalg.svdvals(x.double())
    with pytest.warns(UserWarning, match="left out"):
        assert features_of(Given(), data) == pytest.approx((s[0] / s[-1]).item(), rel=1e-3)


@pytest.mark.parametrize("dtype", ["32-true", "64-true"])
def test_a_column_that_repeats_others_does_not_count(dtype: str) -> None:
    class Repeating(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 2, bias=False))

        def loss(self, batch: Any) -> Tensor:
            x, y = batch
            return (self.net(torch.cat([x, x[:, :1] / 3 + x[:, 1:2] / 7], dim=1)) - y).square().mean()

    x = next(iter(loader(32, batch_size=32)))[0].double()
    s = torch.linalg.svdvals(torch.cat([x, x[:, :1] / 3 + x[:, 1:2] / 7], dim=1))
    callback = spectrum(8, outputs=None)
    with pytest.warns(UserWarning, match="left out"):
        fit(Repeating(), callback, data=loader(32, batch_size=32), precision=dtype)
    assert callback.history[0]["features/condition_number"] == pytest.approx((s[0] / s[2]).item(), rel=1e-4)


def test_hooks_are_gone_after_measuring() -> None:
    module = Regression()
    with pytest.warns(UserWarning, match="is too few"):
        fit(module, spectrum(2))
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in module.modules())


def test_without_outputs_what_needs_them_is_left_out_with_one_message() -> None:
    callback = spectrum(8, outputs=None, gauss_newton=True)
    with pytest.warns(UserWarning, match=r"residual_ratio and gauss_newton/\* left out: .*outputs= is None") as warned:
        run(callback)
    assert len(complaints(warned)) == 1
    for entry in callback.history:
        assert not [tag for tag in entry if "ratio" in tag or "gauss" in tag]
        assert "hessian/negative_mass" in entry
        assert "features/unfitted_modes" in entry


@pytest.mark.filterwarnings("ignore:.*residual_ratio left out:UserWarning")
def test_without_a_linear_layer_there_are_no_features_and_one_message() -> None:
    class Plain(Regression):
        def __init__(self) -> None:
            super().__init__(sgd(1e-3))
            self.net = nn.Sequential()
            self.w = nn.Parameter(torch.linspace(-1.0, 1.0, 20))

        def loss(self, batch: Any) -> Tensor:
            return (self.w.square() * torch.arange(1.0, 21.0)).sum() / 2

    callback = spectrum(9, outputs=None)
    with pytest.warns(UserWarning, match=r"features/\* left out: the loss did not run an nn.Linear") as warned:
        fit(Plain(), callback)
    assert len([message for message in complaints(warned) if "features" in message]) == 1
    assert series(callback, "hessian/lambda_max") == pytest.approx([20.0] * 4)


def test_a_loss_that_is_not_convex_in_the_outputs_leaves_gauss_newton_out_with_the_reason() -> None:
    class Bounded(Regression):
        def loss(self, batch: Any) -> Tensor:
            x, y = batch
            return (self.net(x) - y).sin().mean()

    callback = spectrum(9, gauss_newton=True)
    with pytest.warns(UserWarning, match="left out: the loss is not convex in the outputs") as warned:
        fit(Bounded(), callback, max_epochs=2)
    assert len([message for message in complaints(warned) if "convex" in message]) == 1
    assert not [tag for entry in callback.history for tag in entry if "gauss" in tag or "ratio" in tag]
    assert all("hessian/lambda_max" in entry for entry in callback.history)


def test_a_regression_is_told_of_its_outputs() -> None:
    class Many(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 12))

        def loss(self, batch: Any) -> Tensor:
            return (self.net(batch[0]) - 1).square().mean()

    with pytest.warns(UserWarning, match=r"the model has 12 outputs.*Pass num_eigenvalues=32\.$") as warned:
        fit(Many(), spectrum(10), data=loader(batch_size=16))
    assert not [text for text in complaints(warned) if "class" in text]


def test_a_spectrum_without_an_edge_is_said_once_a_run_for_all_its_matrices() -> None:
    class Decaying(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(30, 1, bias=False))

        def loss(self, batch: Any) -> Tensor:
            scale = 4.0 ** -torch.arange(30)
            return (self.net(torch.eye(30)) * scale.sqrt()[:, None]).square().sum() / 2

    callback = spectrum(12, gauss_newton=True, num_steps=2, num_probes=1)
    with pytest.warns(UserWarning, match="no bulk ends among the largest eigenvalues, as is usual at init") as warned:
        fit(Decaying(), callback)
    assert len([text for text in complaints(warned) if "outlier" in text]) == 1
    assert len(callback.history) == 4
    assert not [tag for entry in callback.history for tag in entry if "outlier" in tag]


class SkewedLater(Regression):
    """Has a symmetric Hessian while it is tested, and none from the third step on."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step < 2:
            return self.loss(batch)
        return SkewedSquare.apply(torch.cat([p.flatten() for p in self.parameters()])).sum() + 0 * self.loss(batch)


@pytest.mark.filterwarnings("ignore:.*left out:UserWarning")
def test_products_that_turn_asymmetric_give_a_status_and_no_number() -> None:
    callback = spectrum(8, outputs=None)
    with pytest.warns(UserWarning, match="breakdown: The products are not those of one symmetric matrix"):
        fit(SkewedLater(), callback)
    assert series(callback, "hessian/status") == [0, 0, Status.BREAKDOWN, Status.BREAKDOWN]
    logged = [{tag for tag in entry if tag.startswith(("hessian", "features"))} for entry in callback.history]
    assert logged[1] >= {"hessian/lambda_max", "hessian/density", "features/condition_number"}
    assert logged[2:] == [{"hessian/status", "hessian/num_matvecs"}] * 2


def test_a_batch_with_fewer_samples_than_outputs_has_no_outliers_and_one_message() -> None:
    callback = spectrum(28)
    data = DataLoader(clusters(8).dataset, batch_size=4)
    with pytest.warns(
        UserWarning, match="the probe has 4 samples, and the model more outputs, 8. Raise num_batches"
    ) as warned:
        fit(Softmax(8), callback, data=data, precision="64-true", limit_train_batches=2)
    assert len(complaints(warned)) == 1
    for entry in callback.history:
        assert not {"hessian/num_outliers", "hessian/bulk_edge", "hessian/outlier_gap"} & set(entry)
        assert entry["hessian/status"] == Status.CONVERGED


@pytest.mark.filterwarnings("ignore:.*left out:UserWarning")
@pytest.mark.parametrize("options", [{"max_matvecs": 3, "num_steps": 3}, {"max_matvecs": 1, "num_steps": 1}], ids=str)
def test_a_tiny_budget_has_an_honest_status(options: dict[str, Any]) -> None:
    callback = spectrum(**options, num_probes=1, gauss_newton=True)
    with pytest.warns(UserWarning, match="budget: The budget of products was spent") as warned:
        dense = run(callback, module=Wide)
    assert len([message for message in complaints(warned) if "budget" in message]) == 1
    assert series(callback, "hessian/status") == [Status.BUDGET] * 8
    for entry, H in zip(callback.history, dense.hessians, strict=True):
        values = torch.linalg.eigvalsh(H)
        for tag, bound in (("lambda_max", "residual"), ("lambda_min", "lambda_min_residual")):
            distance = (values - entry[f"hessian/{tag}"]).abs().min().item()
            assert distance <= entry[f"hessian/{bound}"] + 1e-5
        assert f"hessian/lambda_{options['max_matvecs'] + 1}" not in entry
        assert "hessian/num_outliers" not in entry
        spent = 3 * options["max_matvecs"] + 2 * options["num_steps"] + 20
        assert entry["hessian/num_matvecs"] <= spent


def test_num_matvecs_counts_every_product_but_the_self_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = [0]
    for kind in (Hessian, GaussNewton):

        def counting(self: Any, X: Tensor, matmat: Any = kind.matmat) -> Tensor:
            counted[0] += X.shape[1]
            return matmat(self, X)

        monkeypatch.setattr(kind, "matmat", counting)
    callback = spectrum(10, gauss_newton=True)
    run(callback, max_epochs=1)
    assert sum(series(callback, "hessian/num_matvecs")) == counted[0] - 2


def test_the_graph_of_the_gradient_is_built_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [0]
    forward = nn.Sequential.forward

    def counting(self: nn.Sequential, x: Tensor) -> Tensor:
        runs[0] += 1
        return forward(self, x)

    monkeypatch.setattr(nn.Sequential, "forward", counting)
    fit(Regression(), spectrum(10, every_n_steps=10))
    first = runs[0]
    runs[0] = 0
    fit(Regression(), spectrum(10, every_n_steps=1))
    assert runs[0] - first == 3 * 4  # three more measurements: Hessian, Gauss-Newton, features, and their curvature


@pytest.mark.filterwarnings("ignore:.*left out:UserWarning")
def test_a_loss_that_is_not_finite_has_status_3_and_no_values() -> None:
    class Exploding(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch) * (
                float("nan") if self.trainer.global_step == 0 and "log" in self.__dict__ else 1.0
            )

    callback = spectrum()
    with pytest.warns(UserWarning, match="nonfinite: A product is not finite"):
        fit(Exploding(), callback)
    first, *others = callback.history
    assert first["hessian/status"] == Status.NONFINITE
    assert not {"hessian/lambda_max", "hessian/density", "hessian/negative_mass", "hessian/residual_ratio"} & set(first)
    assert all(entry["hessian/status"] == Status.CONVERGED for entry in others)


def test_the_charts_draw_what_is_logged_and_the_density_is_a_histogram(tmp_path: Any) -> None:
    callback = spectrum(12)
    logger = TensorBoardLogger(tmp_path)
    fit(Regression(), callback, logger=logger, log_every_n_steps=1)
    drawn = [tag for chart in callback.charts for tag in chart.tags]
    assert set(drawn) <= set(callback.history[0])
    assert {"hessian/bulk_edge", "hessian/negative_mass", "hessian/residual_ratio"} <= set(drawn)
    events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0}).Reload()
    assert len(events.Histograms("hessian/density")) == 4
    assert "hessian/density_points" in events.Tags()["tensors"]


def test_a_name_of_its_own_comes_first_in_every_tag() -> None:
    callback = spectrum(10, gauss_newton=True, name="eval.hessian", mode="eval")
    fit(Regression(), callback)
    tags = set(callback.history[0]) - {"step", "cost/overhead"}
    assert all(tag.startswith("eval.hessian/") for tag in tags)
    assert {"eval.hessian/lambda_max", "eval.hessian/gauss_newton/lambda_max"} <= tags


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no eigenvalue": ({"num_eigenvalues": 0}, "k=0 eigenpairs were asked for"),
    "no budget": ({"max_matvecs": 0}, "max_matvecs=0 must be at least"),
    "no step": ({"num_steps": 0}, "num_steps=0 must be at least 1"),
    "no probe": ({"num_probes": 0}, "num_probes=0 must be at least 1"),
    "cutoff": ({"cutoff": 1.0}, r"cutoff=1\.0 must lie between 0 and 1"),
    "axis": ({"linear_below": 0.0}, r"linear_below=0\.0 must be a positive eigenvalue"),
    "tolerance": ({"rtol": 2.0}, r"rtol=2\.0 must lie between 0 and 1"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_arguments_are_refused(kind: str) -> None:
    options, message = BAD[kind]
    with pytest.raises(ValueError, match=message):
        HessianSpectrum(**options)


def test_features_that_no_layer_is_called_are_refused_with_a_close_name() -> None:
    callback = HessianSpectrum(features="nett.2")
    with pytest.warns(UserWarning, match="features='nett.2' names no submodule of Regression; did you mean 'net.2'"):
        trainer = fit(Regression(), callback)
    assert trainer.global_step == 4
    assert callback.history == []


def test_a_layer_that_does_not_run_has_no_features() -> None:
    class Idle(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(2, 2).requires_grad_(False)

    callback = spectrum(10, features="idle")
    with pytest.warns(UserWarning, match="the loss did not run 'idle'"):
        fit(Idle(), callback, data=loader())
    assert not [tag for tag in callback.history[0] if tag.startswith("features/")]
