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
b₁, b₂                  ``AffineDae(w1, b1, w2, b2)``, biases, behind the same functions
f_emp, f_gt             ``empirical_denoiser``, ``mixture_denoiser``
(α, β)-separability     ``dae_theory.conditions.separability``
ρ_k, μ_k, Σ_k           ``GaussianMixture(weights, means, covariances)``
======================  =====================================================================================

Functions are pure and take one example; batch with ``jax.vmap``. References are in ``references.bib``. ``THEORY.md`` in
this directory lists, for every statement, the function that computes it and the test that proves it.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
