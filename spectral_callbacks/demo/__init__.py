"""Data modules and models that the configs run: real data or synthetic, small enough for a laptop."""

from spectral_callbacks.demo.classifier import Classifier
from spectral_callbacks.demo.clusters import ClustersDataModule
from spectral_callbacks.demo.digits import DigitsDataModule
from spectral_callbacks.demo.progress import StepProgressBar
from spectral_callbacks.demo.random_features import NoisyLinearDataModule, RandomFeatures
from spectral_callbacks.demo.regression import RegressionDataModule, Regressor

__all__ = [
    "Classifier",
    "ClustersDataModule",
    "DigitsDataModule",
    "NoisyLinearDataModule",
    "RandomFeatures",
    "RegressionDataModule",
    "Regressor",
    "StepProgressBar",
]
