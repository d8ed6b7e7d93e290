"""Sharpness-aware minimisation: the step is taken with the gradient of the highest point near by.

The gradient at θ + rho g/‖g‖ (Foret et al. 2021, arXiv:2010.01412), with the same rows and dropout
masks; batch statistics are those of the first pass. Cost: every step twice.
"""

from ft import anchor

KEYS = {"rho": (0.0, "radius of the neighbourhood, 0.05 as a rule; 0: off", (0.0, None))}


def make(config, context) -> anchor.Part | None:
  """Returns the radius; see `ft.anchor.make`."""
  del context
  return anchor.Part(rho=config.rho) if config.rho else None
