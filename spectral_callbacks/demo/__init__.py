"""Data modules and models that the configs run: real data, small enough for a laptop."""

from spectral_callbacks.demo.classifier import Classifier
from spectral_callbacks.demo.digits import DigitsDataModule
from spectral_callbacks.demo.progress import StepProgressBar

__all__ = ["Classifier", "DigitsDataModule", "StepProgressBar"]
