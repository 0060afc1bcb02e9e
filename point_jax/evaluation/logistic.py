"""The linear probe near its optimum: multinomial logistic regression by L-BFGS.

What a linear layer learns in a few hundred steps of SGD depends on its learning rate, and raw input
needs another one than features do. This loss is convex: everybody gets close to the best layer that
there is, floors too, and nothing is tuned but the penalty, on training scenes held out. With the
weakest penalty the steps end before the optimum, where predictions have long settled: on correlated
features (6,000 x 200, 8 classes) less than 1 % of them differ from the optimum's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize

from point_jax.evaluation.confusion import confusion, scores
from point_jax.evaluation.features import Extractor, Labelled
from point_jax.evaluation.knn import draw_bank
from point_jax.evaluation.predict import LinearPredictor
from point_jax.evaluation.ridge import BALANCE, held_out
from point_jax.evaluation.standard import Standard

BANK = 60_000
PENALTIES = (1e-2, 1e-3, 1e-4, 1e-5)  # the strongest first, which wins a tie
# Of L-BFGS, for each penalty, from the solution of the one before.
STEPS = 150
TOLERANCE = 1e-6  # of the loss, from one step to the next: below is float32's rounding


@dataclass(frozen=True)
class Logistic:
    """A fitted probe: class probabilities are softmax(features @ kernel + bias).

    Attributes:
      kernel: (C, K) float32, in units of the features as they are.
      bias: (K,) float32.
      penalty: the one of `PENALTIES` that did best on the held-out scenes.
      held_out_mIoU: mIoU of that choice on the held-out scenes, fitted without them.
    """

    kernel: np.ndarray
    bias: np.ndarray
    penalty: float
    held_out_mIoU: float

    def predictor(self, extractor: Extractor) -> LinearPredictor:
        """The probe on top of the extractor whose features it was fitted to."""
        return LinearPredictor(extractor, self.kernel, self.bias)


def fit_logistic(
    data: Labelled,
    classes: int,
    bank: int = BANK,
    seed: int = 0,
    balance: float = BALANCE,
) -> Logistic:
    """Fits the probe: the penalty chosen on every fifth scene, then all scenes fitted with it.

    Args:
      data: at least two training scenes; see `held_out`.
      classes: K.
      bank: most voxels of all scenes together, see `draw_bank`.
      seed: of the draw.
      balance: weight of a voxel is count^-balance of its class, see `ridge.BALANCE`.

    Raises:
      ValueError: too few scenes, no labels in those fitted or held out, or a label above K - 1.
    """
    held = held_out(len(data), "logistic")
    features, labels, scene = draw_bank(data, classes, bank, seed)
    out = np.isin(scene, held)
    parts = (out, "held out (every fifth, of fewer the last)"), (~out, "that are fitted")
    for rows, which in parts:
        if not rows.any():
            raise ValueError(
                f"no labelled voxel in the training scenes {which}: their labels are all -1"
            )
    standard = Standard.of(features)
    features = standard(features)
    weight = np.maximum(np.bincount(labels, minlength=classes), 1.0) ** -balance

    def fit(rows: np.ndarray, penalties: Sequence[float], start: np.ndarray) -> list[np.ndarray]:
        return _path(features[rows], labels[rows], weight[labels[rows]], penalties, start)

    nothing = np.zeros((features.shape[1] + 1, classes))
    paths = fit(~out, PENALTIES, nothing)
    names = [str(i) for i in range(classes)]
    miou = []
    for layer in paths:
        found = _logits(layer, features[out]).argmax(1).astype(np.int32)
        miou.append(scores(confusion(found, labels[out], classes), names).mIoU)
    best = int(np.argmax(miou))
    (layer,) = fit(np.ones(len(labels), bool), PENALTIES[best : best + 1], paths[best])
    kernel = layer[:-1] * standard.inverse[:, None]
    bias = layer[-1] - standard.mean @ kernel
    return Logistic(
        kernel.astype(np.float32), bias.astype(np.float32), PENALTIES[best], float(miou[best])
    )


def _path(
    features: np.ndarray,
    labels: np.ndarray,
    weight: np.ndarray,
    penalties: Sequence[float],
    layer: np.ndarray,
) -> list[np.ndarray]:
    """The optimum (C + 1, K) float64 for each penalty, the bias last; begins with `layer`."""
    arrays = jnp.asarray(features), jnp.asarray(labels), jnp.asarray(weight / weight.sum())
    shape, found = layer.shape, []
    for penalty in penalties:

        def loss(flat: np.ndarray, penalty: float = penalty) -> tuple[float, np.ndarray]:
            value, slope = _loss(jnp.asarray(flat.reshape(shape), jnp.float32), penalty, *arrays)
            return float(value), np.asarray(slope, np.float64).ravel()

        options = {"maxiter": STEPS, "ftol": TOLERANCE}
        result = minimize(loss, layer.ravel(), jac=True, method="L-BFGS-B", options=options)
        layer = result.x.reshape(shape)
        found.append(layer)
    return found


def _logits(layer: np.ndarray, features: np.ndarray) -> np.ndarray:
    return features @ layer[:-1].astype(np.float32) + layer[-1].astype(np.float32)


@jax.jit
@jax.value_and_grad
def _loss(
    layer: jax.Array,
    penalty: jax.Array | float,
    features: jax.Array,
    labels: jax.Array,
    weight: jax.Array,
) -> jax.Array:
    """Weighted mean cross-entropy, plus penalty / 2 times the squares of the kernel."""
    exact = jax.lax.Precision.HIGHEST
    logits = jnp.dot(features, layer[:-1], precision=exact) + layer[-1][None]
    right = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    entropy = jax.nn.logsumexp(logits, axis=1) - right
    return (weight * entropy).sum() + penalty / 2 * (layer[:-1] ** 2).sum()
