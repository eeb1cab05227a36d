r"""Certificates: is this network a strict local minimum of the exact objective, and how far is it from one?

At a closed form the gradient is not zero but exponentially small, of the order of the theorem's remainder
:cite:`zhang26`, Theorem 3.1. Newton's method started there converges to a nearby minimum, and the distance between the
two is the remainder R itself. Whether the minimum is strict is decided by its Hessian over the live units, and by a
directional test for the dead ones, where the objective has a kink and no Hessian.

Blocks of several units are not settled by the printed proof (derived here): the objective is flat along turns of a
block's orthogonal factor O up to noise that crosses gates, and that noise often lets it fall, exponentially little near
the closed form and visibly after a large turn. So a certificate also follows finite turns, and distinguishes a strict
minimum from a network along whose turns the objective is flat to rounding, or falls.

Everything is computed in the span of the data plus one direction orthogonal to it (derived here). Rotations that fix
the data leave the objective unchanged, so the Hessian does not couple different directions orthogonal to the data and
is the same along each: one of them represents all. The weights must lie in that span, as those of closed forms do.

Networks with biases are certified alike: the symmetries act on b₁ as on W₁, and the search for a growing unit includes
its bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from dae_theory.checks import check_data, check_level, check_positive, is_concrete
from dae_theory.conditions import check_conditions
from dae_theory.curvature import dense_curvature, lanczos_curvature
from dae_theory.dead_units import DeadDirection, dead_direction
from dae_theory.exact_training import from_span, minimize_exact_objective, span_basis, to_span
from dae_theory.minimizers import memorizing_minimizer
from dae_theory.model import AffineDae, Dae, by_unit, live_columns
from dae_theory.precision import full_precision
from dae_theory.risk import exact_objective
from dae_theory.symmetry import symmetry_tangents
from dae_theory.turns import Turn, lowest_turn
from dae_theory.types import Scalar

__all__ = [
    "Certificate",
    "ResidualLaw",
    "certify",
    "hessian",
    "residual_law",
]


class Certificate(NamedTuple):
    """Whether a network is a strict local minimum, and the numbers that decide it; all concrete."""

    gradient_norm: Float[Array, ""]
    """Gradient norm of the exact objective in weights and biases, at the network that was passed in."""
    refined: Dae
    """The minimum that Newton's method reaches from that network, with all p columns."""
    refined_gradient_norm: Float[Array, ""]
    """Gradient norm at ``refined``."""
    converged: Bool[Array, ""]
    """Whether ``refined_gradient_norm`` is within the tolerance. If not, ``refined`` is the last iterate, which the
    fields below describe."""
    distance_sq: Float[Array, ""]
    """Squared distance from the network to ``refined``, summed over weights and biases; ``2 ‖R‖²`` for a tied closed
    form."""
    curvatures: Float[Array, " m"]
    """Ascending eigenvalues of the Hessian at ``refined`` over its live columns; Ritz values if it is too large to
    diagonalize."""
    min_curvature: Float[Array, ""]
    """Smallest of ``curvatures``. At a minimum with balanced live columns it is at most 4λ, the curvature along their
    rescaling."""
    min_curvature_modulo_symmetry: Float[Array, ""]
    """Smallest curvature over directions orthogonal to rescalings, splittings, rotations and, with biases, offsets of
    units that are always on."""
    curvature_error: Float[Array, ""]
    """Some eigenvalue lies within this distance of ``min_curvature_modulo_symmetry``. Nonzero only for Lanczos."""
    num_live: Int[Array, ""]
    """Number of columns that are not zero."""
    num_symmetries: Int[Array, ""]
    """Dimension of the span of rescalings, splittings, rotations within blocks, and offsets."""
    num_rotations: Int[Array, ""]
    """Dimension of the rotations alone: changes of a block's orthogonal factor O. The objective is flat along them up
    to the noise that crosses the block's gates."""
    min_rotation_curvature: Float[Array, ""]
    """Smallest curvature along rotations; infinite if there are none."""
    dead: DeadDirection
    """The direction in which a zero column is least stable."""
    dead_stable: Bool[Array, ""]
    """Whether no zero column was seen to lower the objective by growing; true if no column is zero."""
    turn: Turn
    """The lowest of the finite turns that :func:`dae_theory.turns.lowest_turn` tries."""
    falls_along_turn: Bool[Array, ""]
    """Whether the objective falls along a turn of a block by more than rounding: negative curvature along rotations, or
    a negative change along a finite turn. The latter lies at a distance from ``refined``. Where
    the curvature along rotations is zero to rounding, nothing in between is known to rise; where it is positive, the
    turn leads over a barrier. In both cases ``refined`` is not called strict."""
    flat_along_turns: Bool[Array, ""]
    """Whether the objective does not fall along a turn, but some curvature along rotations is zero to rounding."""
    strict: Bool[Array, ""]
    """Whether ``refined``, which is ``distance_sq`` away, is a strict local minimum modulo rescalings and splittings:
    converged, positive curvature modulo symmetry and along rotations, no lower objective along a finite turn, and no
    zero column that lowers the objective by growing."""

    @property
    def verdict(self) -> str:
        """The outcome in words; the first that applies.

        ``"not converged"``, ``"negative curvature"``, ``"undecided curvature"`` (within ``curvature_error``), ``"zero
        columns grow"``, ``"falls along a turn"``, ``"flat along turns to rounding"`` or ``"strict"``.
        """
        outcomes = {
            "not converged": not self.converged,
            "negative curvature": self.min_curvature_modulo_symmetry < -self.curvature_error,
            "undecided curvature": self.min_curvature_modulo_symmetry <= self.curvature_error,
            "zero columns grow": not self.dead_stable,
            "falls along a turn": self.falls_along_turn,
            "flat along turns to rounding": self.flat_along_turns,
        }
        return next((name for name, applies in outcomes.items() if applies), "strict")


def _silent(line: str) -> None:
    del line


def certify(
    dae: Dae,
    data: Float[Array, "n d"],
    sigma: Scalar,
    penalty: Scalar,
    *,
    tolerance: float = 1e-12,
    max_size: int = 1500,
    told: Callable[[str], None] | None = None,
) -> Certificate:
    """Certify a local minimum near ``dae``: gradient, Newton refinement, curvature, turns, stability of zero columns.

    That no turn and no zero column lowers the objective holds as far as :func:`dae_theory.turns.lowest_turn` and
    :func:`dae_theory.dead_units.dead_direction` search. Not jittable, because ranks are shapes. Raises ``ValueError``
    for traced input, weights outside the span of the data, a network of zero columns only, and whatever
    :func:`dae_theory.risk.exact_objective` rejects.

    Args:
        dae: Weights, two arrays of shape (d, p), and biases if it has any.
        data: Clean samples as rows, shape (n, d).
        sigma: Noise level σ >= 0, in the units of the data.
        penalty: λ >= 0, the weight of ``‖W₁‖² + ‖W₂‖²``.
        tolerance: Gradient norm at which the refinement has converged; 1e-12 needs float64.
        max_size: Largest number of live coordinates (2 · rank · live columns) for which the Hessian is diagonalized;
            above it Lanczos' method bounds the smallest curvatures from above.
        told: Called with a line before each stage, which can take minutes for many live columns.

    Example:
        >>> import jax.numpy as jnp
        >>> from dae_theory import ReluDae
        >>> dae, data = ReluDae(jnp.ones((1, 1)), jnp.ones((1, 1))), jnp.ones((1, 1))
        >>> certificate = certify(dae, data, sigma=0.5, penalty=0.01, tolerance=1e-5)
        >>> bool(certificate.converged), int(certificate.num_live), int(certificate.num_symmetries)
        (True, 1, 1)
    """
    check_data(data)
    check_level("sigma", sigma)
    check_level("penalty", penalty)
    if not is_concrete(dae, data, sigma, penalty):
        raise ValueError("certify needs concrete values, because ranks are shapes; call it outside jit.")
    basis = span_basis(data, extra=1)
    small, rows = to_span(dae, data, basis)
    _check_in_span(dae, small)
    live = np.flatnonzero(live_columns(small, tolerance=1e-12))
    if live.size == 0:
        raise ValueError("all columns of the network are zero: there is nothing to certify.")
    start = by_unit(small, lambda w: w[..., live])
    told = told or _silent
    coordinates = sum(part.size for part in start)
    told(f"refining {live.size} live columns by Newton's method ({coordinates} coordinates)")
    end = minimize_exact_objective(start, rows, sigma, penalty, method="products", tolerance=tolerance, max_rough=0)
    tangents = symmetry_tangents(end.dae, families=("rescaling", "splitting", "rotation", "offset"), data=rows)
    rotations = symmetry_tangents(end.dae, families=("rotation",), data=rows)
    told(f"curvature by {'the method of Lanczos' if coordinates > max_size else 'diagonalization'}")
    if coordinates > max_size:
        curvature = lanczos_curvature(end.dae, rows, sigma, penalty, tangents, rotations)
    else:
        curvature = dense_curvature(hessian(end.dae, rows, sigma, penalty), tangents, rotations)
    refined = _with_columns(dae, from_span(end.dae, basis), live)
    # A negative value within the rounding of the eigenvalues is not evidence of negative curvature.
    rounding = -coordinates * float(jnp.finfo(rows.dtype).eps) * curvature.values[-1]
    told("searching for directions in which a zero column grows, and turns that lower the objective")
    dead = dead_direction(end.dae, rows, sigma, penalty)
    # Splitting a live unit into a dead one costs nothing, so the slack is at most 0, and 0 up to rounding where stable.
    lowest_slack = -math.sqrt(float(jnp.finfo(rows.dtype).eps)) * float(penalty)
    stable = dead.slack >= lowest_slack if live.size < dae.w1.shape[1] else jnp.asarray(True)
    turn = lowest_turn(end.dae, rows, sigma, penalty)
    falls = (curvature.along_rotations < rounding) | (turn.change < -_objective_rounding(end.objective))
    flat = ~falls & (curvature.along_rotations <= -rounding)
    positive = curvature.modulo_symmetry > curvature.error
    return Certificate(
        gradient_norm=_gradient_norm(start, rows, sigma, penalty),
        refined=refined,
        refined_gradient_norm=end.gradient_norm,
        converged=end.converged,
        distance_sq=sum((jnp.sum(jnp.square(a - b)) for a, b in zip(end.dae, start, strict=True)), jnp.zeros(())),
        curvatures=curvature.values,
        min_curvature=curvature.values[0],
        min_curvature_modulo_symmetry=curvature.modulo_symmetry,
        curvature_error=curvature.error,
        num_live=jnp.asarray(live.size),
        num_symmetries=jnp.asarray(len(tangents)),
        num_rotations=jnp.asarray(len(rotations)),
        min_rotation_curvature=curvature.along_rotations,
        dead=dead._replace(encoder=basis @ dead.encoder, decoder=basis @ dead.decoder),
        dead_stable=stable,
        turn=turn,
        falls_along_turn=falls,
        flat_along_turns=flat,
        strict=end.converged & positive & stable & ~falls & ~flat,
    )


def _with_columns(dae: Dae, new: Dae, live: np.ndarray) -> Dae:
    """``dae`` with the units ``live``, and b₂, of the network ``new``."""
    parts = {name: part.at[..., live].set(getattr(new, name)) for name, part in dae._asdict().items() if name != "b2"}
    return dae._replace(**parts, **({"b2": new.b2} if isinstance(new, AffineDae) else {}))


@jax.jit
@full_precision
def hessian(dae: Dae, data: Float[Array, "n d"], sigma: Scalar, penalty: Scalar) -> Float[Array, "m m"]:
    """Hessian of the exact objective in its m weights and biases, in the order of ``ravel_pytree``; exactly symmetric.

    Undefined where a unit is zero: leave such units out.
    """
    x, unravel = ravel_pytree(dae)
    gradient = jax.grad(lambda x: exact_objective(unravel(x), data, sigma, penalty))
    _, product = jax.linearize(gradient, x)
    # In batches, not one vmap: m products at once would need m times the memory of one.
    matrix = jax.lax.map(product, jnp.eye(x.size, dtype=x.dtype), batch_size=32)
    return 0.5 * (matrix + matrix.T)


class ResidualLaw(NamedTuple):
    """A line fitted to ``log ‖R‖²`` against ``1/σ²``."""

    slope: float
    intercept: float
    r_squared: float
    margin_sq: float
    """γ² of the closed form at the smallest σ: the slope is predicted to be −γ² up to a constant factor."""
    inverse_sigma_sq: Float[np.ndarray, " s"]
    """``1/σ²`` of each fitted point."""
    log_residual_sq: Float[np.ndarray, " s"]
    """``log ‖R‖²`` of each fitted point."""


def residual_law(
    data: Float[Array, "n d"], sigmas: Float[Array, " s"], penalty: Scalar, *, tolerance: float = 1e-12
) -> ResidualLaw:
    r"""Fit how the remainder of Corollary 3.2 vanishes with the noise :cite:`zhang26`, Theorem 3.1.

    .. math:: \log \|R\|_F^2 \approx \log C - c\,\gamma^2/\sigma^2

    Computes one certificate per σ; ``‖R‖²`` is half of the squared distance to the refined minimum, since W₁ = W₂.
    Choose σ for which ``‖R‖²`` stays above rounding, about 1e-15. Raises ``ValueError`` for fewer than two σ, a
    refinement that does not converge, and whatever :func:`certify` rejects.
    """
    check_positive("sigmas", sigmas)
    if sigmas.ndim != 1 or sigmas.size < 2:
        raise ValueError(f"sigmas must be a vector of at least two noise levels, got shape {sigmas.shape}.")
    logs = []
    for sigma in np.asarray(sigmas):
        closed = memorizing_minimizer(data, float(sigma), penalty, data.shape[0])
        certificate = certify(closed, data, float(sigma), penalty, tolerance=tolerance)
        if not certificate.converged:
            raise ValueError(f"the refinement did not converge at sigma = {sigma}; leave that noise level out.")
        logs.append(math.log(float(certificate.distance_sq) / 2))
    x, y = np.asarray(sigmas, float) ** -2.0, np.asarray(logs)
    slope, intercept = np.polyfit(x, y, 1)
    rest = y - (slope * x + intercept)
    labels = np.arange(data.shape[0])
    margin = float(check_conditions(data, labels, float(np.min(np.asarray(sigmas))), penalty, 1).margin)
    spread = float(np.sum((y - y.mean()) ** 2))
    return ResidualLaw(float(slope), float(intercept), 1 - float(rest @ rest) / spread, margin**2, x, y)


@jax.jit
def _gradient_norm(dae: Dae, rows: Float[Array, "n d"], sigma: Scalar, penalty: Scalar) -> Float[Array, ""]:
    return jnp.linalg.norm(ravel_pytree(jax.grad(exact_objective)(dae, rows, sigma, penalty))[0])


def _objective_rounding(value: Float[Array, ""]) -> Float[Array, ""]:
    return 2**9 * jnp.finfo(value.dtype).eps * jnp.abs(value)


def _check_in_span(dae: Dae, small: Dae) -> None:
    for name in set(dae._fields) - {"b1"}:
        full, part = getattr(dae, name), getattr(small, name)
        total, inside = float(jnp.sum(jnp.square(full))), float(jnp.sum(jnp.square(part)))
        if total - inside > 1e3 * float(jnp.finfo(full.dtype).eps) * total:
            raise ValueError(
                f"{name} has a component of norm {math.sqrt(total - inside):.3g} outside the span of the data; project "
                "it with dae_theory.exact_training.to_span, or add rows to the data that span it."
            )
