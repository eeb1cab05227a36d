r"""Exact theory of the two-layer ReLU denoising autoencoder :cite:`zhang26`.

======================  =====================================================================================
In the paper            Here
======================  =====================================================================================
x_i, X                  ``data`` (n, d), samples as rows
d, p, n, K              data dimension, hidden units, samples, modes
σ                       ``sigma``: ``y = x + σ ε``, ``ε ~ N(0, I)``
λ                       ``penalty``, as in ``λ (‖W₁‖² + ‖W₂‖²)``; ``weight_decay`` always means an optimizer's
W₁, W₂                  ``ReluDae(w1, w2)``, each (d, p), one column per unit
f(y) = W₂ [W₁ᵀ y]₊      ``denoise(dae, y)``
h(y) = [W₁ᵀ y]₊         ``encode(dae, y)``
f_emp, f_gt             ``empirical_denoiser``, ``mixture_denoiser``
(α, β)-separability     ``dae_theory.conditions.separability``
ρ_k, μ_k, Σ_k           ``GaussianMixture(weights, means, covariances)``
======================  =====================================================================================

Functions are pure and take one example; batch with ``jax.vmap``. References are in ``references.bib``. ``THEORY.md`` in
this directory lists, for every statement, the function that computes it and the test that proves it.
"""

from dae_theory.certificate import certify as certify
from dae_theory.conditions import check_conditions as check_conditions
from dae_theory.conditions import separability as separability
from dae_theory.denoisers import empirical_denoiser as empirical_denoiser
from dae_theory.denoisers import gaussian_denoiser as gaussian_denoiser
from dae_theory.denoisers import mixture_denoiser as mixture_denoiser
from dae_theory.denoisers import score as score
from dae_theory.exact_training import minimize_exact_objective as minimize_exact_objective
from dae_theory.minimizers import block_minimizer as block_minimizer
from dae_theory.minimizers import generalizing_minimizer as generalizing_minimizer
from dae_theory.minimizers import memorizing_minimizer as memorizing_minimizer
from dae_theory.mixture import GaussianMixture as GaussianMixture
from dae_theory.model import ReluDae as ReluDae
from dae_theory.model import denoise as denoise
from dae_theory.model import encode as encode
from dae_theory.model import jacobian as jacobian
from dae_theory.risk import exact_objective as exact_objective
from dae_theory.risk import exact_risk as exact_risk
from dae_theory.risk import monte_carlo_objective as monte_carlo_objective
from dae_theory.risk import monte_carlo_risk as monte_carlo_risk
from dae_theory.symmetry import merge_parallel_columns as merge_parallel_columns
from dae_theory.types import Denoiser as Denoiser
