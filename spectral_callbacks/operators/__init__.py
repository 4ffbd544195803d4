"""A network and a batch, seen as linear operators on parameter space."""

from spectral_callbacks.operators.gauss_newton import GaussNewton as GaussNewton
from spectral_callbacks.operators.gram import SampleCurvature as SampleCurvature
from spectral_callbacks.operators.gram import gram as gram
from spectral_callbacks.operators.gram import sample_curvature as sample_curvature
from spectral_callbacks.operators.graphs import BatchGraphs as BatchGraphs
from spectral_callbacks.operators.graphs import scalar as scalar
from spectral_callbacks.operators.hessian import Hessian as Hessian
from spectral_callbacks.operators.objective import GradientGraph as GradientGraph
from spectral_callbacks.operators.objective import Objective as Objective
from spectral_callbacks.operators.outputs import Cut as Cut
from spectral_callbacks.operators.outputs import OutputGraph as OutputGraph
from spectral_callbacks.operators.outputs import OutputObjective as OutputObjective
from spectral_callbacks.operators.parameters import ParameterSpace as ParameterSpace
from spectral_callbacks.operators.samples import SampleBatch as SampleBatch
from spectral_callbacks.operators.samples import SampleFunction as SampleFunction
from spectral_callbacks.operators.samples import Samples as Samples
from spectral_callbacks.operators.samples import samples_of as samples_of
