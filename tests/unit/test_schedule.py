"""alpha' of eq. 11-12 against hand-computed values, and its error messages."""

import math

import pytest

from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.schedule import AlphaSchedule


@pytest.mark.parametrize(
    ("num_updates", "expected"),
    [(0, 0.0), (100, 1.135e-4), (500, 0.004765), (1000, 0.02383), (2000, 0.1191), (3000, 0.3054), (5000, 1.0)]
    + [(7500, 2.5637), (9999, 4.99884), (10000, 5.0), (49999, 5.0)],
)
def test_iwslt_recipe(num_updates, expected):
    # alpha 5, p 5, q 10 over 50,000 updates: gamma = ln(1/5)/ln(1/2) = 2.3219
    assert AlphaSchedule(5, "adaptive", 5, 10, 50_000)(num_updates) == pytest.approx(expected, rel=1e-3)


def test_thresholds_are_exact():
    schedule = AlphaSchedule(5, "adaptive", 6.25, 10, 50_000)  # the WMT'17 recipe
    assert schedule(5_000) == pytest.approx(1.0, rel=1e-12)
    assert schedule(8_000) == 5.0
    assert schedule(7_999) < 5.0


def test_linear_where_q_is_alpha_times_p():
    schedule = AlphaSchedule(4, "adaptive", 2, 8, 100)
    assert [schedule(x) for x in (0, 10, 25, 40, 50)] == pytest.approx([0, 0.8, 2, 3.2, 4])


def test_grows_without_a_jump():
    schedule = AlphaSchedule(5, "adaptive", 5, 10, 1000)
    values = [schedule(x) for x in range(1001)]
    assert all(a <= b for a, b in zip(values, values[1:]))
    assert max(b - a for a, b in zip(values, values[1:])) < 0.06


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_alpha_of_at_most_one_is_constant_and_needs_no_max_update(alpha):
    schedule = AlphaSchedule(alpha, "adaptive", 5, 10, 0)
    assert not schedule.is_adaptive
    assert [schedule(x) for x in (0, 1, 10_000)] == [alpha] * 3


def test_constant():
    assert [AlphaSchedule(5, "constant", 10, 5, 0)(x) for x in (0, 7)] == [5.0, 5.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, "adaptive", 5, 10, 100), "--id-alpha is -1: allowed is a number of at least 0"),
        ((math.nan, "constant", 5, 10, 100), "--id-alpha is nan: allowed is a number of at least 0"),
        ((5, "adaptive", 10, 10, 100), "--id-p is 10 and --id-q is 10: allowed is 0 < p < q"),
        ((5, "adaptive", 10, 5, 100), "--id-p is 10 and --id-q is 5: allowed is 0 < p < q"),
        ((5, "adaptive", 0, 5, 100), "--id-p is 0 and --id-q is 5: allowed is 0 < p < q"),
        ((5, "adaptive", math.nan, 5, 100), "--id-p is nan and --id-q is 5: allowed is 0 < p < q"),
        ((5, "adaptive", 5, 10, 0), "--max-update is 0: allowed is a number above 0"),
        ((5, "linear", 5, 10, 100), "--id-alpha-schedule is 'linear': allowed are adaptive, constant"),
    ],
)
def test_wrong_values_are_named(arguments, message):
    with pytest.raises(UserError) as error:
        AlphaSchedule(*arguments)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
