"""Losses that learn from preferences; pure functions of log-probabilities of whole answers.

The losses of pairs take what the model gives the chosen and the rejected answer, each (B,) float32,
and return a loss (B,) for each pair. What is taken is log π(y|x) - log π_ref(y|x) where a loss has
a reference model, else log π(y|x); summed over the answer's tokens or, where `Loss.mean`, divided
by their number. `LOSSES` says which. The formulas are those of the papers, and of trl.

Shapes: B rows.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Loss:
  """What a loss of pairs reads.

  Attributes:
    function: (chosen (B,), rejected (B,), **settings) -> (B,).
    mean: whether log-probabilities are those of a token (the mean) and not of the answer (the sum).
    reference: whether they are compared with those of a reference model.
    settings: names of the function's arguments beside the two.
  """

  function: Callable
  mean: bool
  reference: bool
  settings: tuple[str, ...]


def dpo(chosen, rejected, beta: float, label_smoothing: float = 0.0):
  """Direct preference optimisation: -log σ(β h), h = chosen - rejected.

  Rafailov et al. (2023), arXiv:2305.18290, equation 7. With label smoothing ε it is conservative
  DPO, for labels of which a share ε is wrong: -(1 - ε) log σ(β h) - ε log σ(-β h) (Mitchell 2023).
  """
  h = beta * (chosen - rejected)
  return -(1 - label_smoothing) * jax.nn.log_sigmoid(h) - label_smoothing * jax.nn.log_sigmoid(-h)


def robust(chosen, rejected, beta: float, label_smoothing: float = 0.0):
  """Robust DPO: without bias when a share ε below 1/2 of the labels is wrong.

  (-(1 - ε) log σ(β h) + ε log σ(-β h)) / (1 - 2 ε); Chowdhury et al. (2024), arXiv:2403.00409.
  """
  h = beta * (chosen - rejected)
  right, wrong = jax.nn.log_sigmoid(h), jax.nn.log_sigmoid(-h)
  return (-(1 - label_smoothing) * right + label_smoothing * wrong) / (1 - 2 * label_smoothing)


def hinge(chosen, rejected, beta: float):
  """max(0, 1 - β h): SLiC's hinge on DPO's margin; Zhao et al. (2023), arXiv:2305.10425."""
  return jnp.maximum(0.0, 1 - beta * (chosen - rejected))


def ipo(chosen, rejected, beta: float):
  """Identity preference optimisation: (h - 1 / (2 β))², of means over tokens.

  Azar et al. (2023), arXiv:2310.12036, equation 17, where β is called τ. That log-ratios are means
  and no sums is what the authors corrected in trl.
  """
  return jnp.square(chosen - rejected - 1 / (2 * beta))


def cpo(chosen, rejected, beta: float, label_smoothing: float = 0.0):
  """The preference part of contrastive preference optimisation: DPO without a reference.

  Xu et al. (2024), arXiv:2401.08417, equation 3; the chosen answer's own loss comes beside it.
  """
  return dpo(chosen, rejected, beta, label_smoothing)


def simpo(chosen, rejected, beta: float, simpo_gamma: float, label_smoothing: float = 0.0):
  """-log σ(β h - γ), of means over tokens without a reference; Meng et al. (2024),
  arXiv:2405.14734, equation 6."""
  return dpo(chosen - simpo_gamma / beta, rejected, beta, label_smoothing)


def orpo(chosen, rejected, beta: float):
  """The odds-ratio part of ORPO: -β log σ(log odds(chosen) - log odds(rejected)).

  odds = p / (1 - p), p the geometric mean of the tokens' probabilities; Hong et al. (2024),
  arXiv:2403.07691, equations 4 to 7, where β is λ. The chosen answer's own loss comes beside it.
  """
  return -beta * jax.nn.log_sigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logp):
  """Returns log(p / (1 - p)); a p that rounds to one counts as just below."""
  logp = jnp.minimum(logp, -1e-6)
  return logp - jnp.log(-jnp.expm1(logp))


LOSSES = {
  "dpo": Loss(dpo, False, True, ("beta", "label_smoothing")),
  "ipo": Loss(ipo, True, True, ("beta",)),
  "hinge": Loss(hinge, False, True, ("beta",)),
  "robust": Loss(robust, False, True, ("beta", "label_smoothing")),
  "orpo": Loss(orpo, True, False, ("beta",)),
  "simpo": Loss(simpo, True, False, ("beta", "simpo_gamma", "label_smoothing")),
  "cpo": Loss(cpo, False, False, ("beta", "label_smoothing")),
}


def kto(ratio, desirable, baseline, beta: float, desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0):
  """Kahneman–Tversky optimisation: (B,) losses of answers that are good or bad by themselves.

  λ_D (1 - σ(β (r - z0))) of a desirable answer and λ_U (1 - σ(β (z0 - r))) of any other;
  Ethayarajh et al. (2024), arXiv:2402.01306, section 4.2, less its constants.

  Args:
    ratio: (B,) r = log π(y|x) - log π_ref(y|x), sums over tokens.
    desirable: (B,) 1 or 0.
    baseline: z0, see `kto_baseline`.
    beta: how fast the value saturates.
    desirable_weight, undesirable_weight: λ_D, λ_U.
  """
  good = desirable_weight * (1 - jax.nn.sigmoid(beta * (ratio - baseline)))
  bad = undesirable_weight * (1 - jax.nn.sigmoid(beta * (baseline - ratio)))
  return jnp.where(desirable > 0, good, bad)


def kto_baseline(ratio, weight):
  """KTO's z0: the estimate of KL(π ‖ π_ref) from answers to other contexts, at least 0, scalar.

  It passes no gradient on, as in the paper.

  Args:
    ratio: (B,) log π(y'|x) - log π_ref(y'|x) of answers y' that belong to other rows.
    weight: (B,), 0 for rows that do not count.
  """
  mean = jnp.sum(ratio * weight) / jnp.maximum(jnp.sum(weight), 1e-9)
  return jax.lax.stop_gradient(jnp.maximum(mean, 0.0))


def bradley_terry(chosen, rejected, margin=0.0):
  """The loss of a reward model: -log σ(r_chosen - r_rejected - margin), (B,).

  Bradley and Terry (1952); Ouyang et al. (2022), arXiv:2203.02155, equation 1; the margin says by
  how much chosen is better (Touvron et al. 2023, arXiv:2307.09288, equation 2).
  """
  return -jax.nn.log_sigmoid(chosen - rejected - margin)


def divergence(ratio, tokens):
  """Returns (N,) the estimate of KL(π_ref ‖ π) over an answer, in nats, from its log-ratio alone.

  n (e^d - 1 - d), where d = ratio / n is the mean log-ratio of its n tokens: Schulman's third
  estimator (joschu.net/blog/kl-approx.html, 2020), which is never negative and 0 where nothing
  changed. It takes the answers for the reference's own, and by Jensen's inequality a mean of
  log-ratios gives no more than the mean over tokens would: a low estimate.

  Args:
    ratio: (N,) log π - log π_ref, sums over tokens.
    tokens: (N,) how many.
  """
  mean = ratio / tokens
  return tokens * (jnp.expm1(mean) - mean)
