"""Losses of preferences: the numbers of trl 0.19.1 (in float64), and of a pocket calculator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ft import preferences

CHOSEN, REJECTED = np.array([-12.0, -30.0, -5.0]), np.array([-14.0, -25.0, -9.5])
REF_CHOSEN, REF_REJECTED = np.array([-13.0, -28.5, -7.0]), np.array([-13.5, -27.0, -8.0])
TOKENS, REJECTED_TOKENS = np.array([6.0, 15.0, 4.0]), np.array([7.0, 10.0, 5.0])
RATIOS = CHOSEN - REF_CHOSEN, REJECTED - REF_REJECTED
MEANS = CHOSEN / TOKENS, REJECTED / REJECTED_TOKENS
MEAN_RATIOS = RATIOS[0] / TOKENS, RATIOS[1] / REJECTED_TOKENS


@pytest.mark.parametrize("name,pair,settings,want", [
  ("dpo", RATIOS, dict(beta=0.1), [0.6209570477895321, 0.8833821554187771, 0.533382155418777]),
  ("dpo", RATIOS, dict(beta=0.5, label_smoothing=0.1),
   [0.46187100611489995, 1.7352241504380872, 0.33522415043808723]),
  ("robust", RATIOS, dict(beta=0.5, label_smoothing=0.1),
   [0.2931210061148999, 2.1289741504380872, -0.0585258495619128]),
  ("hinge", RATIOS, dict(beta=0.5), [0.25, 2.75, 0.0]),
  ("ipo", MEAN_RATIOS, dict(beta=0.5), [0.5804988662131522, 1.69, 0.04]),
  ("orpo", MEANS, dict(beta=0.5), [0.34657359027997264, 0.2259658019990793, 0.18162181032527974]),
  ("cpo", (CHOSEN, REJECTED), dict(beta=0.1, label_smoothing=0.1),
   [0.6181388693815918, 0.9240769841801066, 0.5382489459974549]),
  ("simpo", MEANS, dict(beta=2.0, simpo_gamma=0.5),
   [0.9740769841801067, 0.4740769841801067, 0.3711006659477778]),
])
def test_losses_of_pairs_are_trls(name, pair, settings, want):
  loss = preferences.LOSSES[name]
  assert set(settings) <= set(loss.settings)
  np.testing.assert_allclose(loss.function(*pair, **settings), want, rtol=1e-5)


def test_kto_is_trls():
  baseline = preferences.kto_baseline(np.array([1.0, -0.5, 1.0, 99.0]), np.array([1, 1, 1, 0.0]))
  assert float(baseline) == pytest.approx(0.5)
  settings = dict(beta=0.5, desirable_weight=1.5, undesirable_weight=0.5)
  np.testing.assert_allclose(
    preferences.kto(RATIOS[0], np.ones(3), baseline, **settings),
    [0.656735248671303, 1.0965878679450074, 0.48123195123691054], rtol=1e-5)
  np.testing.assert_allclose(
    preferences.kto(RATIOS[1], np.zeros(3), baseline, **settings),
    [0.1887703343990727, 0.3395893495876965, 0.13447071068499755], rtol=1e-5)


def test_ktos_baseline_is_no_less_than_zero_and_passes_no_gradient():
  assert float(preferences.kto_baseline(np.array([-3.0, 1.0]), np.ones(2))) == 0.0
  slope = jax.grad(lambda x: preferences.kto_baseline(x, jnp.ones(2)))(jnp.array([3.0, 1.0]))
  assert not np.any(slope)


def test_reward_models_by_hand():
  """log(1 + e^-2) = 0.126928, and with a margin of 2 log 2."""
  np.testing.assert_allclose(preferences.bradley_terry(np.array([3.0, 3.0]), np.array([1.0, 1.0]),
                                                       np.array([0.0, 2.0])),
                             [0.12692801, 0.69314718], rtol=1e-6)


def test_an_answer_that_is_certain_has_finite_odds_and_gradient():
  value, slope = jax.value_and_grad(lambda x: preferences.orpo(x, -1.0, 1.0))(0.0)
  assert np.isfinite(value) and np.isfinite(slope)


def test_the_divergence_is_a_low_estimate_that_grows_with_the_change():
  """One token: r - 1 - log r. Two tokens count by their mean: if their changes cancel, 0."""
  one = preferences.divergence(np.log([1.0, 2.0, 0.5]), np.ones(3))
  np.testing.assert_allclose(one, [0.0, 2 - 1 - np.log(2), 0.5 - 1 + np.log(2)], atol=1e-7)
  assert float(preferences.divergence(np.zeros(1), np.full(1, 2.0))[0]) == 0.0
  np.testing.assert_allclose(preferences.divergence(np.log([4.0]), np.array([2.0])),
                             2 * (2 - 1 - np.log(2)), rtol=1e-6)
