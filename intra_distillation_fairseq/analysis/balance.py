"""How evenly a sensitivity is spread over the parameters: the numbers of Figures 2, 3 and 5, of arrays alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

TOP_ONE_IN = 5  # Figure 2 compares the most sensitive 20% with the other parameters
TRIM_ONE_IN = 100  # the paper leaves the most sensitive 1% out (App. B); of which standard deviation it does not say
# Values worked on at a time: small enough for the cache, and no copy of 50 million values in float64 is ever made.
_BLOCK = 1 << 16


class Moments(NamedTuple):
    """Number, mean and sum of squared deviations from it, of values that may come in parts."""

    count: int
    mean: float
    squares: float

    @property
    def std(self) -> float:
        """Standard deviation, that of the whole population."""
        return math.sqrt(self.squares / self.count)

    def __add__(self, other: Moments) -> Moments:  # type: ignore[override]
        """Of both parts together (Chan, Golub, LeVeque 1983)."""
        count = self.count + other.count
        apart = other.mean - self.mean
        share = other.count / count
        return Moments(
            count, self.mean + apart * share, self.squares + other.squares + apart * apart * self.count * share
        )


def in_order(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """All values in one array, ascending, float32; takes most of the time of a summary."""
    values = np.concatenate([array.ravel() for array in arrays.values()]).astype(np.float32, copy=False)
    values.sort()
    return values


def summary(ordered: np.ndarray) -> dict[str, float | int | None]:
    """How even the values are.

    Of equal values Gini coefficient and coefficient of variation are 0 and the ratio is 1; of n values of which one
    alone is not 0 the Gini coefficient is (n - 1) / n.

    Args:
        ordered: (n,) values of at least 0, ascending, n at least 1.
    Returns:
        parameters (n); mean; std; std_trimmed, without the largest 1% (n // 100 values); top_mean of the largest 20%
        (n // 5 values, at least one) and rest_mean of the others; ratio of these two, None where it has no limit;
        gini, the Gini coefficient; cv, the coefficient of variation std / mean.
    """
    count = len(ordered)
    all_of_them, trimmed = moments(ordered), moments(ordered[: count - count // TRIM_ONE_IN])
    top = max(count // TOP_ONE_IN, 1)
    top_mean = moments(ordered[count - top :]).mean
    rest_mean = moments(ordered[: count - top]).mean if count > top else top_mean
    mean = all_of_them.mean
    return {
        "parameters": count,
        "mean": mean,
        "std": all_of_them.std,
        "std_trimmed": trimmed.std,
        "top_mean": top_mean,
        "rest_mean": rest_mean,
        "ratio": top_mean / rest_mean if rest_mean else (None if top_mean else 1.0),
        "gini": _gini(ordered, mean),
        "cv": all_of_them.std / mean if mean else 0.0,
    }


def groups(
    arrays: Mapping[str, np.ndarray], *names: Callable[[str], str]
) -> tuple[dict[str, dict[str, float | int]], ...]:
    """Number, mean and standard deviation of the values of each group of parameters, in the model's order.

    Args:
        arrays: a value for each element of each parameter, by the parameter's name.
        names: from a parameter's name to its group's: `layer_name`, `module_name`. Each gives one result.
    """
    results: tuple[dict[str, Moments], ...] = tuple({} for _ in names)
    for parameter, array in arrays.items():
        mine = moments(array.ravel())
        for result, name in zip(results, names):
            group = name(parameter)
            result[group] = result[group] + mine if group in result else mine
    return tuple(
        {group: {"parameters": m.count, "mean": m.mean, "std": m.std} for group, m in result.items()}
        for result in results
    )


def layer_name(parameter: str) -> str:
    """encoder.layers.0.fc1.weight -> encoder.layers.0; what is in no numbered layer: its module."""
    parts = parameter.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else module_name(parameter)


def module_name(parameter: str) -> str:
    """encoder.layers.0.fc1.weight -> encoder.layers.0.fc1; a parameter of the model itself keeps its name."""
    return parameter.rpartition(".")[0] or parameter


def moments(values: np.ndarray) -> Moments:
    """Of (n,) values, n at least 1, computed in float64."""
    result: Moments | None = None
    for _, block in _blocks(values):
        mean = float(block.mean())
        block -= mean
        mine = Moments(len(block), mean, float(block @ block))
        result = mine if result is None else result + mine
    assert result is not None
    return result


def _gini(ordered: np.ndarray, mean: float) -> float:
    """Sum over i = 1..n of (2i - n - 1) x_i / (n^2 * mean), of ascending x: half the mean difference, over the mean."""
    if not mean:
        return 0.0
    count, total = len(ordered), 0.0
    for start, block in _blocks(ordered):
        ranks = np.arange(start, start + len(block), dtype=np.float64)
        total += float((2 * ranks + 1 - count) @ block)
    return total / count / count / mean


def _blocks(values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(values), _BLOCK):
        yield start, values[start : start + _BLOCK].astype(np.float64)
