"""Data modules and models that the configs run: real data or synthetic, small enough for a laptop."""

from spectral_callbacks.demo.classifier import Classifier
from spectral_callbacks.demo.clusters import ClustersDataModule
from spectral_callbacks.demo.dale import DaleClassifier
from spectral_callbacks.demo.digits import DigitsDataModule
from spectral_callbacks.demo.langevin import MultiplicativeDiffusion
from spectral_callbacks.demo.matrix_sensing import LowRankDataModule, MatrixSensing
from spectral_callbacks.demo.progress import StepProgressBar
from spectral_callbacks.demo.random_features import NoisyLinearDataModule, RandomFeatures
from spectral_callbacks.demo.regression import RegressionDataModule, Regressor
from spectral_callbacks.demo.sample_images import SampleImages

__all__ = [
    "Classifier",
    "ClustersDataModule",
    "DaleClassifier",
    "DigitsDataModule",
    "LowRankDataModule",
    "MatrixSensing",
    "MultiplicativeDiffusion",
    "NoisyLinearDataModule",
    "RandomFeatures",
    "RegressionDataModule",
    "Regressor",
    "SampleImages",
    "StepProgressBar",
]
