"""How much slower Adam moves under masks that are drawn anew in every step."""

from __future__ import annotations

from . import checks


def learning_rate_factor(p: float, grad_p: float = 0.0) -> float:
    """What to multiply Adam's learning rate by, so that weights move as fast as unmasked ones.

    .. code-block:: text

        1 / sqrt((1 - p)(1 - grad_p))

    An entry that gets a gradient g with probability 1 - p, rescaled or not, has a first moment proportional to
    (1 - p) g and the root of a second moment proportional to sqrt(1 - p) g: Adam's step, their quotient, is sqrt(1 - p)
    of what it would be, whatever the scale of the gradient. Measured with AdamW on a constant gradient: 0.707 at
    p = 0.5 and 0.314 at p = 0.9 of the distance without a mask. So mixout and GradDrop at a high p want a higher
    learning rate than dropout, by about this factor; SGD with rescaled gradients wants none.

    Args:
        p: the mix probability of mixout, in [0, 1).
        grad_p: the probability of GradDrop, in [0, 1).

    Raises:
        ValueError: for a probability of 1, under which nothing moves, or outside of [0, 1].
    """
    for argument, value in (("p", p), ("grad_p", grad_p)):
        checks.probability("learning_rate_factor", argument, value)
        if value == 1:
            raise ValueError(f"learning_rate_factor: {argument}: expected a number below 1, got {value}: nothing moves")
    return ((1 - p) * (1 - grad_p)) ** -0.5
