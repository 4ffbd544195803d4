"""The command line."""

from __future__ import annotations

import importlib.util
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch.utils.data import DataLoader

import spectral_callbacks.optim
from spectral_callbacks import Sharpness, SpectralCallback
from spectral_callbacks.cli import config_folder, main, run
from spectral_callbacks.cli.report import Report, show
from spectral_callbacks.cli.sweep import read_runs, sweep
from spectral_callbacks.demo import Classifier, DigitsDataModule, NoisyLinearDataModule, RandomFeatures

pytestmark = pytest.mark.usefixtures("in_empty_folder")

CONFIGS = sorted(config_folder().glob("*.yaml"))
SWEEPS = [config for config in CONFIGS if "sweep" in yaml.safe_load(config.read_text())]
at_initialization = pytest.mark.filterwarnings("ignore:.*left out wherever no bulk ends")  # there is none yet
in_the_race = pytest.mark.filterwarnings("ignore:.*friction is within", "ignore:.*Trion has no finite threshold")
CSV = "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: logs}}"
TINY = """
model: {class_path: tests.test_cli.Line}
data: null
trainer:
  accelerator: cpu
  max_steps: 4
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
"""


class Line(pl.LightningModule):
    """A module of a user's own, with its own data and optimizer."""

    def __init__(self, slope: float = 0.0) -> None:
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(float(slope)))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.slope == 13:
            raise RuntimeError("planted")
        self.log("train/slope", self.slope.detach().clone(), batch_size=len(batch))
        return (self.slope * batch - batch).square().mean()

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        return DataLoader(torch.arange(4.0), batch_size=2)  # pyright: ignore[reportArgumentType]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)


def spectral(trainer: pl.Trainer) -> list[SpectralCallback]:
    return [c for c in trainer.callbacks if isinstance(c, SpectralCallback)]  # pyright: ignore[reportAttributeAccessIssue]


def tiny(folder: Path, more: str = "") -> str:
    (folder / "tiny.yaml").write_text(TINY + more)
    return "tiny.yaml"


def test_there_are_configs() -> None:
    assert {"edge_of_stability.yaml", "digits_sgd.yaml"} <= {config.name for config in CONFIGS}
    assert {"hessian_spectrum.yaml", "double_descent.yaml"} <= {config.name for config in SWEEPS}


@at_initialization
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_every_config_fits_as_it_is_and_measures_the_first_step(config: Path, in_empty_folder: Path) -> None:
    cli = run(["fit", "--config", str(config), "--trainer.max_steps=2"])
    assert cli.trainer.global_step == 2
    callbacks = spectral(cli.trainer)
    assert callbacks
    for callback in callbacks:
        first = callback.history[0]
        assert first["step"] == 0
        assert first.get(f"{callback.name}/status", 0) < 2  # neither failed nor not finite
        own = {tag for tag in first if tag.startswith(f"{callback.name}/")} - {f"{callback.name}/status"}
        assert len(own) > 1
        assert all(math.isfinite(value) for value in first.values() if isinstance(value, float))
        if isinstance(callback, Sharpness):
            assert first["sharpness/lambda_max"] > 0
            assert first.get("sharpness/stability_ratio", 0.1) < 0.6  # an adaptive optimizer has none yet
    assert list(in_empty_folder.glob("runs/*/version_0/events.out.tfevents.*"))


@at_initialization
@in_the_race
@pytest.mark.parametrize("config", SWEEPS, ids=lambda config: config.stem)
def test_every_sweep_trains_each_of_its_runs_into_a_folder_of_its_own(config: Path, in_empty_folder: Path) -> None:
    results = sweep([str(config), "--trainer.max_steps=2"])
    names = [run.name for run in read_runs(yaml.safe_load(config.read_text()))]
    assert list(results) == names
    logged = {path.parent for path in in_empty_folder.glob("runs/*/*/version_0/events.out.tfevents.*")}
    assert {str(folder.relative_to(in_empty_folder)) for folder in logged} == {
        f"runs/{config.stem}/{name}/version_0" for name in names
    }
    assert all(results.values())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "at_edge", "nearer"), [("Adam", (0.85, 1.1), 1 / 30), ("momentum", (0.9, 1.1), None)])
def test_full_batch_training_hovers_at_the_edge_of_its_own_optimizer(
    name: str, at_edge: tuple[float, float], nearer: float | None
) -> None:
    config = config_folder() / "adam_edge_of_stability.yaml"
    (chosen,) = (run for run in read_runs(yaml.safe_load(config.read_text())) if run.name == name)
    trainer = run(["fit", "-c", str(config), *chosen.arguments()]).trainer
    (sharpness,) = spectral(trainer)
    late = [row for row in sharpness.history if row["step"] >= 2 / 3 * trainer.global_step]
    assert at_edge[0] < statistics.median(row["sharpness/stability_ratio"] for row in late) < at_edge[1]
    if nearer is not None:
        of_plain = [row["sharpness/lambda_max"] / row["sharpness/two_over_lr"] for row in late]
        assert statistics.median(of_plain) < nearer


@pytest.mark.slow
@at_initialization
def test_outliers_follow_the_pairs_of_clusters_and_not_the_width() -> None:
    results = sweep([str(config_folder() / "hessian_spectrum.yaml")])
    counts = {name: values["hessian/num_outliers"] for name, values in results.items()}
    assert counts == {
        "2-clusters": 1, "3-clusters": 3, "4-clusters": 6, "6-clusters": 15,
        "3-clusters-width-32": 3, "3-clusters-width-64": 3,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is biased by more than 5 %:UserWarning")
def test_the_toy_has_three_phases_with_skewed_classes_and_two_with_uniform_ones(in_empty_folder: Path) -> None:
    results = sweep([str(config_folder() / "representation_toy.yaml"), "--trainer.max_steps=3000"])
    phases = {name: values["representation/phase"] for name, values in results.items()}
    assert phases == {"skewed": 2, "skewed-in-the-plane": 1, "uniform-in-the-plane": 1}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_information_with_the_label_grows_in_a_net_that_generalises_and_not_in_one_that_memorises(
    in_empty_folder: Path, seed: int
) -> None:
    config = str(config_folder() / "overfitting_entropy.yaml")
    results = sweep([config, f"--seed_everything={seed}", f"--data.init_args.seed={seed}"])
    first, early, last = ("@1", "@80", "")
    true, shuffled = results["true-labels"], results["shuffled-labels"]
    assert true[f"entropy/dsmi_label/net.3{last}"] > true[f"entropy/dsmi_label/net.3{first}"] + 0.7
    for when in (first, early, last):
        assert abs(shuffled[f"entropy/dsmi_label/net.3{when}"]) < 0.1
    start, middle, end = (shuffled[f"entropy_true/dsmi_label/net.3{when}"] for when in (first, early, last))
    assert middle > max(start, end) + 0.05
    assert shuffled["train/accuracy"] > 0.9 > 0.2 > shuffled["val/accuracy"]


def test_a_run_of_a_sweep_is_fit_with_its_overrides(in_empty_folder: Path) -> None:
    """The same numbers as by hand; what is given on the command line goes before both."""
    entries = "sweep:\n  - {model.init_args.slope: 3}\n  - {model.init_args.slope: 5, trainer.max_steps: 2}\n"
    config = tiny(in_empty_folder, "seed_everything: 0\n" + entries + "report: [train/slope]\n")
    results = sweep([config, "--trainer.log_every_n_steps=1"])
    for slope, num_steps in ((3, 4), (5, 2)):
        cli = run(["fit", "-c", config, f"--model.slope={slope}", f"--trainer.max_steps={num_steps}"])
        (name,) = (name for name in results if name.startswith(f"slope={slope}"))
        assert results[name] == {"train/slope": cli.trainer.callback_metrics["train/slope"].item()}
    assert list(results) == ["slope=3", "slope=5,max_steps=2"]
    shorter = sweep([config, "--trainer.max_steps=2"])
    assert shorter["slope=5,max_steps=2"] == results["slope=5,max_steps=2"]
    assert shorter["slope=3"] != results["slope=3"]


def test_each_run_saves_a_config_that_fit_repeats_it_with(in_empty_folder: Path) -> None:
    config = tiny(in_empty_folder, "sweep: [{model.init_args.slope: 3}]\nreport: [train/slope]\n")
    results = sweep([config])
    (saved,) = in_empty_folder.glob("runs/tiny/slope=3/version_0/config.yaml")
    assert not {"sweep", "report"} & set(yaml.safe_load(saved.read_text()))
    again = run(["fit", "-c", str(saved)])
    assert again.trainer.callback_metrics["train/slope"].item() == results["slope=3"]["train/slope"]


def test_the_config_itself_is_left_as_it_was(in_empty_folder: Path) -> None:
    config = tiny(in_empty_folder, "sweep: [{model.init_args.slope: 3}]\n")
    before = Path(config).read_bytes()
    run(["fit", "--config", config])
    sweep([config])
    assert Path(config).read_bytes() == before


def test_a_report_reads_a_metric_after_so_many_steps_and_at_the_end(
    in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = "sweep: [{name: a, model.init_args.slope: 3}, {name: b, model.init_args.slope: 1}]\n"
    config = tiny(
        in_empty_folder, entries + "report: [train/slope@1, train/slope@3, train/slope, train/slope@9, nothing]\n"
    )
    results = sweep([config])
    # The batches are (0, 1) and (2, 3); the error of the slope shrinks by 1 - 0.2 mean(x²), with momentum 0.5.
    errors, velocity = [2.0], 0.0
    for square in (0.5, 6.5, 0.5, 6.5):
        velocity = 0.5 * velocity + 2 * square * errors[-1]
        errors.append(errors[-1] - 0.1 * velocity)
    # What is logged with a step is the slope before it.
    expected = {"train/slope@1": errors[0] + 1, "train/slope@3": errors[2] + 1, "train/slope": errors[3] + 1}
    assert results["a"] == pytest.approx(expected, rel=1e-5)
    assert results["b"] == pytest.approx(dict.fromkeys(expected, 1.0))
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("[")] == ["[1/2] a", "[2/2] b"]
    assert all(f"{value:.4g}" in printed for value in results["a"].values())
    assert printed.rstrip().endswith("--logdir runs/tiny")


def test_a_report_reads_the_validation_that_follows_a_step() -> None:
    def train(num_steps: int, report: Report) -> dict[str, float]:
        torch.manual_seed(0)
        trainer = pl.Trainer(
            max_steps=num_steps, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, callbacks=[report],
        )  # fmt: skip
        trainer.fit(RandomFeatures(20), NoisyLinearDataModule(num_train=30, steps_per_epoch=10))
        return report.values(trainer)

    read = train(30, Report(["val/loss@10", "val/loss@25", "val/loss"]))
    by_hand = {num_steps: train(num_steps, Report(["val/loss"]))["val/loss"] for num_steps in (10, 20, 30)}
    assert len(set(by_hand.values())) == 3
    assert read == {"val/loss@10": by_hand[10], "val/loss@25": by_hand[20], "val/loss": by_hand[30]}


def test_without_a_report_every_metric_but_errors_and_costs_is_compared(in_empty_folder: Path) -> None:
    callbacks = "--trainer.callbacks=spectral_callbacks.Sharpness"
    results = sweep([tiny(in_empty_folder, "sweep: [{name: a}]\n"), callbacks])
    assert {"train/slope", "sharpness/lambda_max", "sharpness/stability_ratio"} <= set(results["a"])
    assert not {"sharpness/residual", "sharpness/status", "sharpness/num_matvecs", "cost/overhead"} & set(results["a"])


def test_what_was_seen_before_a_failure_is_printed(in_empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = "sweep: [{name: good, model.init_args.slope: 3}, {name: bad, model.init_args.slope: 13}]\n"
    with pytest.raises(RuntimeError, match="planted"):
        sweep([tiny(in_empty_folder, entries)])
    printed = capsys.readouterr().out.splitlines()
    assert any("good" in line and "bad" not in line for line in printed[2:])


@pytest.mark.parametrize(
    ("logger", "folders"),
    [
        ("false", set()),
        ("true", {"runs/tiny/a/version_0", "runs/tiny/b/version_0"}),
        (CSV, {"logs/tiny/a/version_0", "logs/tiny/b/version_0"}),
        (f"[{CSV}]", {"logs/tiny/a/version_0", "logs/tiny/b/version_0"}),
        ("lightning.pytorch.loggers.CSVLogger", None),
    ],
)
def test_a_sweep_takes_the_loggers_of_the_config(logger: str, folders: set[str] | None, in_empty_folder: Path) -> None:
    config = tiny(in_empty_folder, f"  logger: {logger}\nsweep: [{{name: a}}, {{name: b}}]\n")
    if folders is None:  # a logger without its folder is no logger that fit would take
        with pytest.raises(SystemExit):
            sweep([config])
        return
    sweep([config])
    saved = {path.parent.relative_to(in_empty_folder) for path in in_empty_folder.glob("*/**/config.yaml")}
    assert set(map(str, saved)) == folders


@pytest.mark.parametrize(
    ("entries", "names"),
    [
        ([{"optimizer.init_args.lr": 0.1}, {"optimizer.init_args.lr": 0.2}], ["lr=0.1", "lr=0.2"]),
        ([{"model.init_args.widths": [64, 64], "a": None}], ["widths=64,-64,a=null"]),
        ([{"a.lr": 1, "b.lr": "x y"}], ["a.lr=1,b.lr=x-y"]),
        ([{"name": "as/it is"}], ["as-it-is"]),
        ([{"name": 7, "a": 1}, {"name": 8, "a": 1}], ["7", "8"]),
    ],
)
def test_runs_are_called_by_their_name_or_their_overrides(entries: list[dict[str, Any]], names: list[str]) -> None:
    assert [run.name for run in read_runs({"sweep": entries})] == names


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("", r"no list of runs at the top-level key sweep. Add one"),
        ("sweep: []", r"no list of runs at the top-level key sweep"),
        ("sweep: {model.slope: 1}", r"no list of runs at the top-level key sweep"),
        ("sweep: [model.slope]", r"entry 1 of sweep is 'model.slope'; it must map dotted keys to values"),
        ("sweep: [{name: a}, {}]", r"entry 2 of sweep is {}; it must map"),
        (
            "sweep: [{trainer.callbacks.0.name: x}]",
            r"the key 'trainer.callbacks.0.name'; .* Lists have no dotted names",
        ),
        ("sweep: [{--model.slope: 1}]", r"the key '--model.slope'; it must be the dotted name"),
        ("sweep: [{3: 1}]", r"the key 3; it must be the dotted name"),
        ("sweep: [{config: x.yaml}]", r"the key 'config'"),
        ("sweep: [{a: 1}, {a: 1}]", r"entry 2 of sweep is called 'a=1', as no other run may be; give it a name"),
        ("sweep: [{name: '/'}]", r"entry 1 of sweep is called ''"),
        ("sweep: [{name: a}]\nreport: val/loss", r"report is 'val/loss'; it must be a list of metrics"),
        ("sweep: [{name: a}]\nreport: ['val/loss@end']", r"report entry 'val/loss@end' must be a tag, or tag@step"),
        ("sweep: [", r"no config can be read"),
    ],
)
def test_a_malformed_sweep_is_refused_before_anything_is_trained(
    more: str, message: str, in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", tiny(in_empty_folder, more)])
    assert stopped.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(message, error), error
    assert not (in_empty_folder / "runs").exists()


def test_an_option_that_fit_does_not_know_is_refused_before_the_first_run(
    in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", tiny(in_empty_folder, "sweep: [{name: a}, {name: b, model.init_args.slop: 3}]\n")])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert "slop" in printed.err
    assert "fit refuses the options of run 'b'" in printed.err
    assert printed.out == ""
    assert not (in_empty_folder / "runs").exists()


@pytest.mark.parametrize("text", ["", "just words", None])
def test_a_file_that_holds_no_config_is_refused(
    text: str | None, in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (in_empty_folder / "some.yaml").write_text(text)
    with pytest.raises(SystemExit):
        main(["sweep", "some.yaml"])
    assert ("no config can be read" if text is None else "a config is a mapping") in capsys.readouterr().err


def test_help_of_sweep_shows_what_to_write(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    example = printed.partition("level:\n")[2].partition("\nEvery run")[0]
    config = yaml.safe_load(example)
    assert len(read_runs(config)) == 3
    assert Report(config["report"]).entries == ("val/loss@1000", "val/loss")


@pytest.mark.parametrize("rich", [True, False])
def test_a_table_has_a_column_a_run_and_a_row_an_entry(
    rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    runs: Mapping[str, Mapping[str, float]] = {"a": {"x/y": 1.25, "z": 2.0}, "b": {"x/y": 3.5}}
    show(runs, "The sweep")
    lines = capsys.readouterr().out.splitlines()
    cells = [line.replace("│", " ").split() for line in lines]
    assert ["x/y", "1.25", "3.5"] in cells
    assert ["z", "2"] in cells
    assert any(line.replace("┃", " ").split() == ["a", "b"] for line in lines)


def test_the_optimizer_of_the_config_takes_the_place_of_the_models_own() -> None:
    optimizer = "--optimizer=torch.optim.SGD", "--optimizer.lr=0.25", "--optimizer.momentum=0.5"
    cli = run(["fit", *optimizer, "--trainer.fast_dev_run=1", "--trainer.accelerator=cpu"])
    (used,) = cli.trainer.optimizers
    assert isinstance(used, torch.optim.SGD)
    assert (used.defaults["lr"], used.defaults["momentum"]) == (0.25, 0.5)


QUICKLY = ("--trainer.fast_dev_run=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false")
OPTIMIZERS = {
    "DiffGrad": {"lr": 0.01, "betas": (0.8, 0.99), "friction": "relative", "previous_grad_dtype": "bfloat16"},
    "DCTAdamW": {"betas": (0.8, 0.99), "rank": 4, "error_feedback": "8bit"},
    "Trion": {"rank": 0.5, "adamw_betas": (0.8, 0.99), "scale": "dion"},
    "ExponentiatedGradient": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "HypentropyGD": {"lr": 0.1, "beta": 0.5},
}


def config_with(folder: Path, optimizer: Mapping[str, Any], model: str = "DaleClassifier") -> str:
    (folder / "own.yaml").write_text(yaml.safe_dump({"model": {"class_path": model}, "optimizer": dict(optimizer)}))
    return "own.yaml"


def as_yaml(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


@pytest.mark.parametrize("prefix", ["", "spectral_callbacks.", "spectral_callbacks.optim."])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_of_a_config_goes_by_its_class_path_or_its_name(
    name: str, prefix: str, in_empty_folder: Path
) -> None:
    settings = OPTIMIZERS[name]
    own = config_with(in_empty_folder, {"class_path": prefix + name, "init_args": as_yaml(settings)})
    (used,) = run(["fit", "--config", own, *QUICKLY]).trainer.optimizers
    assert type(used) is getattr(spectral_callbacks.optim, name)
    assert all(as_yaml(used.defaults)[key] == value for key, value in as_yaml(settings).items())
    assert all(
        used.state[p] or name in {"ExponentiatedGradient", "HypentropyGD"} for p in used.param_groups[0]["params"]
    )


def test_the_names_are_known_to_a_process_that_imported_nothing() -> None:
    model = ["--model=lightning.pytorch.demos.boring_classes.BoringModel", "--data=null"]
    options = ["--optimizer=HypentropyGD", "--trainer.callbacks=OptimizerState", "--trainer.callbacks.every_n_steps=1"]
    program = f"from spectral_callbacks.cli import run; cli = run({['fit', *model, *options, *QUICKLY]!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", program + "print(type(cli.trainer.optimizers[0]), cli.trainer.callbacks)"],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": "/usr/bin:/bin"},
    )
    assert "HypentropyGD" in done.stdout
    assert "OptimizerState" in done.stdout


@pytest.mark.parametrize("callback", ["Sharpness", "OptimizerState", "spectral_callbacks.OptimizerState"])
def test_a_callback_goes_by_its_class_path_or_its_name(callback: str) -> None:
    options = [f"--trainer.callbacks={callback}", "--trainer.callbacks.every_n_steps=1"]
    (found,) = spectral(run(["fit", *options, *QUICKLY]).trainer)
    assert type(found).__name__ == callback.rpartition(".")[2]
    assert found.history


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("DiffGrad", {"lr": -1.0}, "lr is -1.0, and must be"),
        ("DiffGrad", {"betas": [0.9, 1.5]}, r"betas\[1\] is 1.5, and must be"),
        ("DiffGrad", {"previous_grad_dtype": "int8"}, "previous_grad_dtype is 'int8', and must be"),
        ("DCTAdamW", {"rank": 1.5}, "rank is 1.5, and must be"),
        ("Trion", {"momentum": 1.0}, "momentum is 1.0, and must be"),
        ("ExponentiatedGradient", {"max_log_step": 0.0}, "max_log_step is 0.0, and must be"),
        ("HypentropyGD", {"beta": 0.0}, "beta is 0.0, and must be"),
    ],
)
def test_a_wrong_setting_of_an_optimizer_is_a_value_error_that_names_it(
    name: str, settings: Mapping[str, Any], message: str, in_empty_folder: Path
) -> None:
    own = config_with(in_empty_folder, {"class_path": name, "init_args": settings})
    with pytest.raises(ValueError, match=message):
        run(["fit", "--config", own, *QUICKLY])


@pytest.mark.parametrize("settings", [{"frction": "relative"}, {"friction": "none"}, {"betas": 0.9}])
def test_a_setting_that_an_optimizer_does_not_have_is_refused_by_name(
    settings: Mapping[str, Any], in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = config_with(in_empty_folder, {"class_path": "DiffGrad", "init_args": settings})
    with pytest.raises(SystemExit):
        run(["fit", "--config", own, *QUICKLY])
    assert next(iter(settings)) in capsys.readouterr().err


def test_model_and_data_are_the_demos_unless_named() -> None:
    cli = run(["fit", "--trainer.fast_dev_run=1", "--trainer.accelerator=cpu"])
    assert isinstance(cli.model, Classifier)
    assert isinstance(cli.datamodule, DigitsDataModule)


def test_any_module_can_be_trained_and_watched() -> None:
    arguments = ["--model=tests.test_cli.Line", "--model.slope=3", "--data=null", "--trainer.fast_dev_run=1"]
    cli = run(["fit", *arguments, "--trainer.accelerator=cpu", "--trainer.callbacks=spectral_callbacks.Sharpness"])
    assert type(cli.model).__name__ == "Line"
    assert cli.datamodule is None
    (sharpness,) = (c for c in cli.trainer.callbacks if isinstance(c, Sharpness))  # pyright: ignore[reportAttributeAccessIssue]
    assert sharpness.history[0]["sharpness/lambda_max"] == pytest.approx(1.0)  # the mean of 2 x² over x = 0, 1


def test_demo_is_quiet_and_ends_with_the_summary_and_the_line_to_type(in_empty_folder: Path) -> None:
    options = ["--trainer.max_steps=80", "--data.num_train=100"]
    done = subprocess.run(
        [sys.executable, "-m", "spectral_callbacks.cli", "demo", *options],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": "/usr/bin:/bin"},
    )
    assert "measurements" in done.stdout
    assert "2, the last at step 40" in done.stdout
    assert done.stdout.rstrip().endswith("--logdir runs/edge_of_stability/version_0")
    bar = done.stderr.replace("\r", "\n").strip().splitlines()
    assert all("steps/s" in line for line in bar), done.stderr
    assert "80/80" in bar[-1]


def test_help_loads_neither_torch_nor_lightning() -> None:
    program = "import sys; from spectral_callbacks.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", program + "print(sorted({'torch', 'lightning'} & set(sys.modules)))"],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert all(command in done.stdout for command in ("fit", "validate", "test", "predict", "sweep", "demo"))
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize(
    ("command", "missing", "extra"),
    [("fit", "jsonargparse", "cli"), ("demo", "jsonargparse", "cli"), ("demo", "sklearn", "demo")],
)
def test_a_missing_extra_is_reported_with_the_command_that_installs_it(
    command: str, missing: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec

    def found(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == missing else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    with pytest.raises(SystemExit) as stopped:
        main([command])
    assert stopped.value.code == 1
    assert f"pip install 'spectral-callbacks[{extra}]'" in capsys.readouterr().err


def test_an_unknown_command_is_refused_with_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train"])
    assert "invalid choice: 'train'" in capsys.readouterr().err
