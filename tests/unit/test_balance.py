"""analysis/balance.py against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from intra_distillation_fairseq.analysis import balance


def summary(*values: float) -> dict:
    return balance.summary(balance.in_order({"a": np.array(values, np.float32)}))


def test_four_values_by_hand():
    """Mean 2.5, deviations -1.5, -.5, .5, 1.5; the mean difference of all 16 pairs is 1.25: Gini 1.25 / 2 / 2.5."""
    result = summary(3, 1, 4, 2)
    assert result["parameters"] == 4
    assert result["mean"] == 2.5
    assert result["std"] == result["std_trimmed"] == pytest.approx(math.sqrt(1.25))
    assert (result["top_mean"], result["rest_mean"], result["ratio"]) == (4, 2, 2)
    assert result["gini"] == pytest.approx(0.25)
    assert result["cv"] == pytest.approx(math.sqrt(1.25) / 2.5)


def test_gini_is_half_the_mean_difference_over_the_mean():
    values = np.random.default_rng(1).exponential(size=301).astype(np.float32)
    expected = np.abs(values[:, None] - values).astype(np.float64).mean() / 2 / values.mean(dtype=np.float64)
    assert summary(*values)["gini"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("value", [0.0, 2.5, 1e-20])
def test_equal_values_are_even(value):
    result = summary(*[value] * 300)
    assert (result["gini"], result["cv"], result["ratio"]) == pytest.approx((0, 0, 1), abs=1e-12)
    assert result["top_mean"] == result["rest_mean"] == result["mean"] == pytest.approx(value)


def test_one_parameter_that_does_everything():
    result = summary(*[0.0] * 9, 5.0)
    assert result["gini"] == pytest.approx(9 / 10)
    assert (result["top_mean"], result["rest_mean"]) == (2.5, 0)  # 2 of 10
    assert result["ratio"] is None
    assert result["cv"] == pytest.approx(3)  # n values of which one alone is not 0: sqrt(n - 1)


def test_a_single_parameter():
    result = summary(7.0)
    assert (result["mean"], result["std"], result["ratio"], result["gini"]) == (7, 0, 1, 0)


def test_the_largest_percent_is_trimmed_and_ties_are_counted():
    values = [1.0] * 100 + [2.0] * 97 + [100.0] * 3  # of 200 two go, although three are equal
    result = summary(*values)
    kept = [1.0] * 100 + [2.0] * 97 + [100.0]
    assert result["std_trimmed"] == pytest.approx(np.std(kept))
    assert result["std"] == pytest.approx(np.std(values))
    assert result["top_mean"] == pytest.approx((37 * 2 + 300) / 40)
    assert result["rest_mean"] == pytest.approx((100 + 60 * 2) / 160)


def test_many_values_are_summed_in_float64_over_blocks():
    """Sums in float32 lose all digits beside 1e6 * 1e5; numpy in float64 tells what is right."""
    values = (1000 + np.random.default_rng(2).random(200_000)).astype(np.float32)
    result = balance.summary(balance.in_order({"a": values[:70_000].reshape(700, 100), "b": values[70_000:]}))
    right = values.astype(np.float64)
    assert result["mean"] == pytest.approx(right.mean(), rel=1e-12)
    assert result["std"] == pytest.approx(right.std(), rel=1e-9)
    ordered = np.sort(right)
    gini = (2 * np.arange(1, 200_001) - 200_001) @ ordered / 200_000 / ordered.sum()
    assert result["gini"] == pytest.approx(gini, rel=1e-9)


def test_groups_are_merged_exactly():
    random = np.random.default_rng(3)
    arrays = {
        name: random.normal(mean, size=shape).astype(np.float32)
        for name, mean, shape in (
            ("encoder.embed_tokens.weight", 0, (11, 3)),
            ("encoder.layers.0.fc1.weight", 5, (4, 3)),
            ("encoder.layers.0.fc1.bias", -5, (4,)),
            ("encoder.layers.0.experts_w1", 1, (2, 3)),
            ("encoder.layers.10.fc1.bias", 1, (4,)),
            ("decoder.layer_norm.weight", 1, (3,)),
            ("version", 1, (1,)),
        )
    }
    layers, modules = balance.groups(arrays, balance.layer_name, balance.module_name)
    assert list(layers) == [
        "encoder.embed_tokens",
        "encoder.layers.0",
        "encoder.layers.10",
        "decoder.layer_norm",
        "version",
    ]
    assert list(modules)[1:4] == ["encoder.layers.0.fc1", "encoder.layers.0", "encoder.layers.10.fc1"]
    together = np.concatenate([a.ravel() for name, a in arrays.items() if name.startswith("encoder.layers.0.")])
    first = layers["encoder.layers.0"]
    assert first["parameters"] == 22
    assert (first["mean"], first["std"]) == pytest.approx((together.mean(), together.std()), rel=1e-5)
    assert modules["encoder.layers.0.fc1"]["parameters"] == 16
