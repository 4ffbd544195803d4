"""Matrix-free linear algebra on blocks of vectors."""

from spectral_callbacks.linalg.dct import dct as dct
from spectral_callbacks.linalg.dct import dct_basis as dct_basis
from spectral_callbacks.linalg.dct import inverse_dct as inverse_dct
from spectral_callbacks.linalg.density import Density as Density
from spectral_callbacks.linalg.density import spectral_density as spectral_density
from spectral_callbacks.linalg.eigsh import eigsh as eigsh
from spectral_callbacks.linalg.operator import LinearOperator as LinearOperator
from spectral_callbacks.linalg.operator import Matrix as Matrix
from spectral_callbacks.linalg.result import Eigenpairs as Eigenpairs
from spectral_callbacks.linalg.result import Estimate as Estimate
from spectral_callbacks.linalg.result import Status as Status
from spectral_callbacks.linalg.trace import frobenius_norm as frobenius_norm
from spectral_callbacks.linalg.trace import trace as trace
from spectral_callbacks.linalg.tracking import Tracker as Tracker
