"""DiffusionEntropy: entropy and information of the layers' features, and a word where there is none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from spectral_callbacks.callbacks import DiffusionEntropy
from spectral_callbacks.linalg import Status
from spectral_callbacks.metrics import diffusion_entropy, diffusion_mutual_information, kernel_width, label_groups
from tests.callbacks.representations.nets import NETS, Convolutional, labelled
from tests.callbacks.runs import complaints, fit, series
from tests.contracts.training import record


class Still(Convolutional):
    """Does not move: features are the input and twice the input."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.spoiled = nn.Identity(), nn.Identity()
        self.head = nn.Linear(36, 3)

    def spoil(self, x: Tensor) -> Tensor:
        return 2 * x

    def forward(self, x: Tensor) -> Tensor:
        h = self.same(x.flatten(1))
        return self.head(h) + 0 * self.spoiled(self.spoil(h)).nan_to_num().sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def entropy(*layers: str, **options: Any) -> DiffusionEntropy:
    return DiffusionEntropy(layers, **{"every_n_steps": 2, "on_error": "raise", "num_classes": 3, **options})


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_numbers_are_those_of_the_features() -> None:
    data = labelled(60)
    callback = entropy("same", "spoiled", num_samples=60)
    fit(Still(), callback, data=data)
    # Of all samples the entropy does not depend on their order, which information does through its draws alone.
    x, _ = data.dataset.tensors  # pyright: ignore[reportAttributeAccessIssue]
    x = x.flatten(1)
    entry = callback.history[0]
    assert entry["entropy/num_samples"] == 60
    assert entry["entropy/dse_max"] == pytest.approx(math.log2(60))
    assert entry["entropy/sigma/same"] == pytest.approx(kernel_width(x))
    assert entry["entropy/sigma/spoiled"] == pytest.approx(2 * kernel_width(x))
    truth = diffusion_entropy(x, generator=seeded()).value
    for layer in ("same", "spoiled"):  # whatever their scale
        assert entry[f"entropy/dse/{layer}"] == pytest.approx(truth, rel=1e-9)
        assert entry[f"entropy/dse_error/{layer}"] == 0
    assert series(callback, "entropy/dsmi_label/same") == [entry["entropy/dsmi_label/same"]] * len(callback.history)


def test_information_is_that_with_the_labels_and_with_clusters_of_the_inputs() -> None:
    data = labelled(60)
    callback = entropy("same", num_samples=60, seed=3, num_repetitions=3)
    fit(Still(), callback, data=data)
    seen: list[tuple[Tensor, Tensor]] = []

    class Noting(DiffusionEntropy):
        def measure(self, probe: Any) -> Any:
            x, y = (torch.cat([b.batch[i] for b in probe.batches]) for i in (0, 1))
            seen.append((x, y))
            return super().measure(probe)

    fit(Still(), Noting(["same"], num_samples=60, seed=3, num_classes=3, every_n_steps=2), data=data)
    x, y = seen[0][0].flatten(1), seen[0][1]
    generator = torch.Generator().manual_seed(3)
    label = diffusion_mutual_information(x, y, num_repetitions=3, generator=generator)
    groups = label_groups(seen[0][0], num_classes=3, generator=torch.Generator().manual_seed(3))
    generator.manual_seed(3)
    around = diffusion_mutual_information(x, groups, num_repetitions=3, generator=generator)
    for name, truth in (("label", label), ("input", around)):
        assert callback.history[0][f"entropy/dsmi_{name}/same"] == pytest.approx(truth.value, abs=1e-9)
        assert callback.history[0][f"entropy/dsmi_{name}_error/same"] == pytest.approx(truth.error, abs=1e-9)


@pytest.mark.parametrize(
    ("sigma", "width"), [("official", 10.0), ("sqrt_dim", 6.0), (0.5, 0.5)], ids=["official", "sqrt_dim", "number"]
)
def test_the_width_is_the_one_that_was_asked_for(sigma: Any, width: float) -> None:
    data = labelled(60)
    callback = entropy("same", sigma=sigma, t=2, alpha=0.5, targets=[])
    fit(Still(), callback, data=data)
    x, _ = data.dataset.tensors  # pyright: ignore[reportAttributeAccessIssue]
    truth = diffusion_entropy(x.flatten(1), sigma=width, t=2, alpha=0.5, generator=seeded())
    assert callback.history[0]["entropy/sigma/same"] == width
    assert callback.history[0]["entropy/dse/same"] == pytest.approx(truth.value, rel=1e-9)
    assert not any("dsmi" in tag for tag in callback.history[0])


@pytest.mark.parametrize(
    ("labels", "targets"),
    [
        (lambda batch: batch[0][:, 0, 0, 0], "continuous"),
        (lambda batch: batch[0].flatten(1)[:, :4], "vector"),
        (lambda batch: batch[1].tolist(), "list"),
    ],
    ids=["continuous", "vector", "list"],
)
def test_labels_may_be_numbers_vectors_or_lists(labels: Any, targets: str) -> None:
    callback = entropy("same", labels=labels, targets=["label"])
    fit(Still(), callback, data=labelled(60))
    assert 0 < callback.history[0]["entropy/dsmi_label/same"] < math.log2(3)


def test_groups_of_samples_that_stay_are_found_once_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Tensor:
        calls.append(1)
        return label_groups(*arguments, **options)

    monkeypatch.setattr("spectral_callbacks.callbacks.representations.diffusion_entropy.label_groups", counted)
    callback = entropy("same")
    for _ in range(2):
        fit(Still(), callback, data=labelled(60))
    assert len(callback.history) == 6
    assert len(calls) == 4
    calls.clear()
    fit(Still(), entropy("same", data="current", targets=["label"]), data=labelled(60))
    assert len(calls) == 3


# ---- Undisturbed


@pytest.mark.parametrize("kind", NETS)
def test_training_is_bit_identical_on_a_net_that_is(tmp_path: Path, kind: str) -> None:
    callback = entropy(*[layer for layer in NETS[kind].layers if "*" not in layer])
    plain = record(tmp_path, NETS[kind], lambda: labelled(shuffle=True))
    measured = record(tmp_path, NETS[kind], lambda: labelled(shuffle=True), [callback], own_tags=lambda tag: "/" in tag)
    assert plain.differences(measured) == set()
    assert len([tag for tag in callback.history[0] if tag.startswith("entropy/dsmi_input/")]) == 2


# ---- Bad input


def reported(callback: DiffusionEntropy, message: str, module: Convolutional | None = None, **data: Any) -> list[str]:
    with pytest.warns(UserWarning, match=message) as warned:
        fit(module or Still(), callback, data=labelled(**{"num_samples": 60, **data}))
    return [said for said in complaints(warned) if "left out" in said or "nonfinite" in said]


def test_constant_features_have_no_entropy_and_that_is_said_once() -> None:
    class Constant(Still):
        def spoil(self, x: Tensor) -> Tensor:
            return torch.ones_like(x)

    callback = entropy("same", "spoiled", targets=[])
    assert len(reported(callback, r"dse/spoiled left out", Constant())) == 1
    assert not any("spoiled" in tag for entry in callback.history for tag in entry)
    assert all("entropy/dse/same" in entry for entry in callback.history)


def test_features_that_are_not_finite_have_a_status() -> None:
    class Broken(Still):
        def spoil(self, x: Tensor) -> Tensor:
            return x.masked_fill(torch.arange(len(x))[:, None] == 1, math.inf)

    callback = entropy("same", "spoiled", targets=[])
    assert len(reported(callback, "nonfinite", Broken())) == 1
    for entry in callback.history:
        assert entry["entropy/status"] == Status.NONFINITE
        assert not any("spoiled" in tag for tag in entry)


def test_a_single_sample_has_no_entropy() -> None:
    callback = entropy("same", targets=[])
    assert len(reported(callback, "left out", num_samples=1)) == 1
    assert not any("dse/" in tag for entry in callback.history for tag in entry)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (5, "labels=5 is no key of the batch"),
        (lambda batch: torch.zeros(len(batch[0]), dtype=torch.long), "dsmi_label/same left out: .* 1 group"),
        (lambda batch: torch.zeros(3), r"the labels are shape \(3,\) for a batch of"),
        (lambda batch: "text", "the labels are str"),
    ],
    ids=["no key", "one class", "too few", "words"],
)
def test_labels_that_tell_nothing_leave_the_information_out_and_say_so_once(labels: Any, message: str) -> None:
    callback = entropy("same", labels=labels, targets=["label"])
    assert len(reported(callback, message)) == 1
    assert all("entropy/dse/same" in entry for entry in callback.history)
    assert not any("dsmi" in tag for entry in callback.history for tag in entry)


def test_tokens_are_no_labels_unless_they_are_named() -> None:
    x = torch.randn(36, 1, 6, 6, generator=seeded())
    tokens = torch.randint(9, (36, 4), generator=seeded())

    class Alone(Still):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0]).square().mean()

    data = DataLoader(TensorDataset(x, tokens), batch_size=36)
    callback = entropy("same", targets=["label"])
    with pytest.warns(UserWarning, match=r"integers of the shape \(36, 4\), such as tokens"):
        fit(Alone(), callback, data=data)
    assert not any("dsmi" in tag for tag in callback.history[0])
    callback = entropy("same", targets=["label"], labels=1)
    fit(Alone(), callback, data=data)
    assert "entropy/dsmi_label/same" in callback.history[0]


def test_inputs_that_are_no_numbers_have_to_be_named() -> None:
    class Words(Convolutional):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embedding(x).mean(1))

    words = torch.randint(5, (40, 6), generator=seeded())
    data = DataLoader(TensorDataset(words, words[:, 0] % 3), batch_size=10)
    callback = entropy("embedding", targets=["input"])
    with pytest.warns(UserWarning, match=r"the batch holds no floating-point tensor, and inputs= is None"):
        fit(Words(), callback, data=data)
    callback = entropy("embedding", targets=["input"], inputs=lambda batch: batch[0].float())
    fit(Words(), callback, data=data)
    assert "entropy/dsmi_input/embedding" in callback.history[0]


def test_labels_are_not_taken_for_inputs() -> None:
    class Words(Convolutional):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (self.head(self.embedding(batch[0]).mean(1))[:, 0] - batch[1]).square().mean()

    words = torch.randint(5, (40, 6), generator=seeded())
    data = DataLoader(TensorDataset(words, words.float().mean(1)), batch_size=10)
    callback = entropy("embedding")
    with pytest.warns(UserWarning, match=r"dsmi_input left out: the first floating-point tensor of the batch is where"):
        fit(Words(), callback, data=data)
    assert "entropy/dsmi_label/embedding" in callback.history[0]
    assert "entropy/dsmi_input/embedding" not in callback.history[0]


def test_inputs_of_several_shapes_leave_the_entropy_as_it_is() -> None:
    callback = entropy("same", inputs=lambda batch: batch[0].flatten(1)[:, : len(batch[0])])
    with pytest.warns(UserWarning, match="dsmi_input left out: the inputs of the batches have several shapes"):
        fit(Still(), callback, data=labelled(30))
    assert {"entropy/dse/same", "entropy/dsmi_label/same"} <= set(callback.history[0])


def test_all_samples_that_were_asked_for_count(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []
    module = "spectral_callbacks.callbacks.representations.diffusion_entropy"
    for name, function in {"entropy": diffusion_entropy, "mutual_information": diffusion_mutual_information}.items():

        def limited(*arguments: Any, function: Any = function, **settings: Any) -> Any:
            limits.append(settings.get("max_samples", 10_000))
            return function(*arguments, **settings)

        monkeypatch.setattr(f"{module}.diffusion_{name}", limited)
    callback = DiffusionEntropy(["same"], ["label"], every_n_epochs=1, num_samples=20_000, on_error="raise")
    limits.clear()  # of what the settings were checked with
    fit(Still(), callback, data=labelled(60))
    assert limits == 2 * len(callback.history) * [60], "not the 10,000 that the metric stops at by itself"


def test_an_index_into_a_batch_that_is_one_tensor_is_no_label() -> None:
    class Alone(Still):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch).square().mean()

    x = torch.randn(36, 1, 6, 6, generator=seeded())
    with pytest.warns(UserWarning, match=r"labels=1 is no key of the batch, a Tensor"):
        fit(Alone(), entropy("same", targets=["label"]), data=DataLoader(x, batch_size=36))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["labels"]}, r"targets: 'labels' must be one of 'label', 'input'"),
        ({"pooling": "none"}, r"pooling=\"none\" makes several rows of a sample"),
        ({"sigma": "mean"}, r"sigma"),
        ({"sigma": -1.0}, r"sigma"),
        ({"t": 0}, r"t=0"),
        ({"alpha": 2.0}, r"alpha=2"),
        ({"num_repetitions": 1}, r"num_repetitions=1 must be at least 2"),
        ({"num_classes": 1}, r"num_classes=1 must be at least 2"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionEntropy(**{"layers": ["net"], **options})
