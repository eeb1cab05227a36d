"""Exact theory of the two-layer ReLU denoising autoencoder."""

from dae_theory.denoisers import empirical_denoiser as empirical_denoiser
from dae_theory.denoisers import gaussian_denoiser as gaussian_denoiser
from dae_theory.denoisers import mixture_denoiser as mixture_denoiser
from dae_theory.denoisers import score as score
from dae_theory.minimizers import block_minimizer as block_minimizer
from dae_theory.minimizers import generalizing_minimizer as generalizing_minimizer
from dae_theory.minimizers import memorizing_minimizer as memorizing_minimizer
from dae_theory.mixture import GaussianMixture as GaussianMixture
from dae_theory.model import ReluDae as ReluDae
from dae_theory.model import denoise as denoise
from dae_theory.model import encode as encode
from dae_theory.model import jacobian as jacobian
from dae_theory.symmetry import merge_parallel_columns as merge_parallel_columns
from dae_theory.types import Denoiser as Denoiser
