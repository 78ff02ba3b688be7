"""Each schedule against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from prunetune.sparsity import schedules


def test_linear_to_zero() -> None:
    schedule = schedules.linear_to_zero(0.4, 4)
    assert [schedule(t) for t in (0, 1, 2, 3)] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert [schedule(t) for t in (4, 5, 1000)] == [0.0, 0.0, 0.0]
    assert schedules.linear_to_zero(0.0, 4)(1) == 0.0


def test_linear_to_zero_with_a_horizon_between_two_epochs() -> None:
    schedule = schedules.linear_to_zero(1.0, 2.5)
    assert schedule(2) == pytest.approx(0.2)
    assert schedule(3) == 0.0


def test_linear_until() -> None:
    schedule = schedules.linear_until(1.0, 21.0, 4)
    assert [schedule(t) for t in (0, 1, 2, 3)] == [1.0, 6.0, 11.0, 16.0]
    assert schedule(3.999) == pytest.approx(20.995)
    assert schedule(4) is None
    assert schedule(9) is None


def test_rise() -> None:
    schedule = schedules.rise(0.4)
    assert [schedule(t) for t in (0.0, 0.1, 0.2, 0.4, 1.0)] == pytest.approx([0, 0.25, 0.5, 1, 1])
    assert schedules.rise(0)(0) == 1.0


def test_constant() -> None:
    assert [schedules.constant()(t) for t in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]


def test_cosine() -> None:
    schedule = schedules.cosine()
    expected = [1, (1 + math.sqrt(0.5)) / 2, 0.5, 0.25, 0]
    assert [schedule(t) for t in (0, 1 / 4, 1 / 2, 2 / 3, 1)] == pytest.approx(expected)


def test_step() -> None:
    schedule = schedules.step(milestones=[0.5, 0.75], factor=0.1)
    assert [schedule(t) for t in (0, 0.49, 0.5, 0.74, 0.75, 1)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert schedules.step(milestones=[], factor=0.1)(0.9) == 1


def test_warmup_squeezes_the_schedule_into_the_rest() -> None:
    schedule = schedules.with_warmup(schedules.cosine(), 0.2)
    assert [schedule(t) for t in (0, 0.1, 0.2, 0.6, 1.0)] == pytest.approx([0, 0.5, 1.0, 0.5, 0.0])


def test_no_warmup_is_the_schedule_itself() -> None:
    schedule = schedules.cosine()
    assert schedules.with_warmup(schedule, 0) is schedule
