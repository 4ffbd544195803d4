"""A network and a batch, seen as linear operators on parameter space."""

from spectral_callbacks.operators.hessian import Hessian as Hessian
from spectral_callbacks.operators.objective import GradientGraph as GradientGraph
from spectral_callbacks.operators.objective import Objective as Objective
from spectral_callbacks.operators.parameters import ParameterSpace as ParameterSpace
