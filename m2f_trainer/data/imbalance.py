"""Class imbalance: samples with rare classes are repeated, or their objects weigh more in the loss.

Repeat-factor sampling is that of LVIS (Gupta, Dollár and Girshick 2019, https://arxiv.org/abs/1908.03195v2, appendix
B.2): f(c) is the fraction of training samples with an object of class c, r(c) = max(1, sqrt(t / f(c))) is its repeat
factor for a threshold t, and a sample's repeat factor is the largest of its classes'.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2f_trainer.data.collate import InstanceDataset
from m2f_trainer.data.dataset import Category
from m2f_trainer.errors import RecipeError

BALANCED = "balanced"
"""The value of the recipe field `class_weights` that computes them from the training split."""

NAMED = 10
"""The maximum number of classes that a message names."""

RNG_STREAM = 2
"""Separates the random numbers of `RepeatedSamples` from those of augmentation and of tiles."""


class RepeatedSamples(InstanceDataset):
    """Training samples in which those with rare classes are repeated, each time with another augmentation.

    Every epoch has the same length: the sum of the repeat factors, rounded up. Systematic sampling with a random start
    repeats a sample as often as its repeat factor, rounded up or down, so that the mean over epochs is proportional to
    the factor. The selection is a function of (seed, epoch), as a sample is one of (seed, epoch, index). Samples
    without rare classes are shown at least once per epoch.
    """

    def __init__(self, dataset: InstanceDataset, threshold: float, seed: int) -> None:
        """`dataset`: images or tiles; `threshold`: t in the module's docstring, a fraction of the samples."""
        super().__init__(dataset.rows, dataset.transform, dataset.categories)
        self.dataset, self.threshold, self.seed = dataset, threshold, seed
        shares = dataset.shares()
        units, classes = dataset.unit_classes().T
        self.class_samples = np.bincount(classes, weights=shares[units], minlength=len(self.categories))
        self.class_factors = repeat_factors(self.class_samples / shares.sum(), threshold)
        self.factors = np.ones(len(shares))
        np.maximum.at(self.factors, units, self.class_factors[classes])
        self._length = math.ceil(float((self.factors * shares).sum()) - 1e-9)
        self._chosen: tuple[int, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return self._length

    def chosen(self, epoch: int) -> NDArray[np.int64]:
        """Index in `dataset` of each sample of an epoch, (len,), ascending."""
        if self._chosen is None or self._chosen[0] != epoch:
            ends = np.cumsum(self.factors[self.dataset.units(epoch)])
            start = np.random.default_rng([self.seed, epoch, 0, RNG_STREAM]).random()
            points = (start + np.arange(len(self))) * (ends[-1] / len(self))
            found = np.searchsorted(ends, points, side="right")
            self._chosen = (epoch, np.minimum(found, len(ends) - 1))
        return self._chosen[1]

    def row(self, index: int, epoch: int) -> Mapping[str, Any]:
        """The row of sample `index` of the epoch."""
        return self.dataset.row(int(self.chosen(epoch)[index]), epoch)

    def images(self, epoch: int) -> NDArray[np.int64]:
        """As `InstanceDataset`."""
        return self.dataset.images(epoch)[self.chosen(epoch)]

    def objects(self) -> NDArray[np.int64]:
        """As `InstanceDataset`, for the first epoch."""
        return self.dataset.objects()[self.chosen(0)]

    def summary(self) -> str:
        """How many samples an epoch has, and which classes are repeated."""
        rare = np.flatnonzero(self.class_factors > 1)
        rare = rare[np.argsort(-self.class_factors[rare], kind="stable")]
        total = f"{len(self.dataset):,}"
        named = [
            f"{self.categories[k].name} {self.class_factors[k]:.1f} times (in {self.class_samples[k]:,.0f} of {total})"
            for k in rare[:NAMED].tolist()
        ]
        more = [f"and {len(rare) - NAMED} more"] if len(rare) > NAMED else []
        classes = ": " + ", ".join([*named, *more]) if len(rare) else ", because none is rarer than the threshold"
        return (
            f"repeat_factor_threshold {self.threshold:g}: {len(self):,} samples per epoch instead of "
            f"{total}; {len(rare)} of {len(self.categories)} classes are repeated{classes}"
        )


def repeat_factors(frequencies: NDArray[np.float64], threshold: float) -> NDArray[np.float64]:
    """Fraction of the samples with each class (K,) -> repeat factors (K,), 1 for a class that is in no sample.

    >>> repeat_factors(np.array([0.5, 0.01, 0.0025, 0.0]), 0.01).tolist()
    [1.0, 1.0, 2.0, 1.0]
    """
    present = np.where(frequencies > 0, frequencies, 1.0)
    return np.asarray(np.maximum(1.0, np.sqrt(threshold / present)))


def balanced_weights(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Objects of each class (K,) -> weights (K,) proportional to 1 / sqrt(count), whose mean over objects is 1.

    >>> balanced_weights(np.array([400, 100])).round(3).tolist()
    [0.833, 1.667]
    """
    inverse = 1 / np.sqrt(np.maximum(counts, 1))
    return np.asarray(inverse * counts.sum() / max((inverse * counts).sum(), 1))


def resolve_weights(given: Mapping[str, float] | str, samples: InstanceDataset) -> dict[str, float]:
    """The recipe's `class_weights` as the weight of every class by its name; 1 for those that are not named.

    Raises:
        RecipeError: a name is not that of a class
    """
    names = [category.name for category in samples.categories]
    if isinstance(given, Mapping):
        for name in given:
            if name not in names:
                nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
                raise RecipeError(
                    f"class_weights: the training split has no class {name!r}; the nearest is {nearest!r}."
                )
        return {name: float(given.get(name, 1)) for name in names}
    counts = np.bincount(samples.labels()[:, 1], minlength=len(names))
    return dict(zip(names, balanced_weights(counts).round(4).tolist(), strict=True))


def weights_of_classes(weights: Mapping[str, float] | str | None, categories: Sequence[Category]) -> list[float] | None:
    """The result of `resolve_weights` in the order of the classes; None if the recipe has no weights."""
    return [float(weights[one.name]) for one in categories] if isinstance(weights, Mapping) else None


def weights_text(weights: Mapping[str, float], samples: InstanceDataset) -> str:
    """The classes of the largest and smallest weights, with their numbers of objects."""
    names = [category.name for category in samples.categories]
    counts = dict(zip(names, np.bincount(samples.labels()[:, 1], minlength=len(names)).tolist(), strict=True))
    total = sum(counts.values())
    order = sorted(names, key=lambda name: (-weights[name], counts[name]))
    shown = order if len(order) <= NAMED else [*order[: NAMED - 2], *order[-2:]]
    parts = [f"{name} {weights[name]:g} ({counts[name]:,} of {total:,} objects)" for name in shown]
    if len(order) > NAMED:
        parts.insert(NAMED - 2, "...")
    return f"class_weights of {len(order)} classes: {', '.join(parts)}"
