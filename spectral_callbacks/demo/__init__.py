"""Data modules and models that the configs run: real data or synthetic, small enough for a laptop."""

from spectral_callbacks.demo.classifier import Classifier
from spectral_callbacks.demo.clusters import ClustersDataModule
from spectral_callbacks.demo.dale import DaleClassifier
from spectral_callbacks.demo.digits import DigitsDataModule
from spectral_callbacks.demo.langevin import MultiplicativeDiffusion
from spectral_callbacks.demo.language_model import LanguageModel
from spectral_callbacks.demo.matrix_sensing import LowRankDataModule, MatrixSensing
from spectral_callbacks.demo.phase_toy import PhaseToy
from spectral_callbacks.demo.progress import StepProgressBar
from spectral_callbacks.demo.random_features import NoisyLinearDataModule, RandomFeatures
from spectral_callbacks.demo.regression import RegressionDataModule, Regressor
from spectral_callbacks.demo.sample_images import SampleImages
from spectral_callbacks.demo.shuffled_digits import ShuffledDigitsDataModule
from spectral_callbacks.demo.text import TopicsDataModule

__all__ = [
    "Classifier",
    "ClustersDataModule",
    "DaleClassifier",
    "DigitsDataModule",
    "LanguageModel",
    "LowRankDataModule",
    "MatrixSensing",
    "MultiplicativeDiffusion",
    "NoisyLinearDataModule",
    "PhaseToy",
    "RandomFeatures",
    "RegressionDataModule",
    "Regressor",
    "SampleImages",
    "ShuffledDigitsDataModule",
    "StepProgressBar",
    "TopicsDataModule",
]
