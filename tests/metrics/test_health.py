"""The rules of health, each against trajectories written by hand."""

from itertools import pairwise

import pytest

from lightning_mp.metrics import ScaleLimits, ScaleRecord, find_first_applied, health_spans, judge_health

DYNAMIC = ScaleLimits(is_dynamic=True, min_scale=1.0, max_scale=2.0**32)


def records(*runs):
    """Return attempts from (how many, scale, skipped)."""
    flat = [(scale, skipped) for count, scale, skipped in runs for _ in range(count)]
    return [ScaleRecord(step, scale, skipped, skipped) for step, (scale, skipped) in enumerate(flat)]


def falling(start, num):
    return [(1, start / 2**i, True) for i in range(num)]


def judge(found, limits=DYNAMIC):
    return judge_health(found, limits, first_applied=find_first_applied(found))


@pytest.mark.parametrize(
    ("expected", "runs"),
    [
        ("calibrating", []),
        ("calibrating", [*falling(2.0**16, 12)]),
        ("healthy", [*falling(2.0**16, 12), (5, 16.0, False)]),
        ("healthy", [(1, 256.0, False)]),
        # From 65536 to 256 is 2**8; to 512 it is 2**7, and 9 skips of 109 are below a fifth.
        ("collapsing", [(100, 2.0**16, False), *falling(2.0**16, 9)]),
        ("healthy", [(100, 2.0**16, False), *falling(2.0**16, 8)]),
        # The scale of the step after the last overflow shows the fall: it is the scale used.
        ("collapsing", [(100, 2.0**16, False), *falling(2.0**16, 8), (1, 256.0, False)]),
        # A fall that took longer than 50 attempts is none.
        ("healthy", [(100, 2.0**16, False)] + [run for i in range(9) for run in ((9, 2.0 ** (16 - i), False),)]),
        # Slow fall: one overflow in ten, 2**8 over 80 attempts.
        ("thrashing", [(1, 8.0, False), *[run for _ in range(30) for run in ((1, 8.0, True), (2, 8.0, False))]]),
        # Exactly a fifth is not over it.
        ("healthy", [(1, 8.0, False), *[run for _ in range(20) for run in ((1, 8.0, True), (4, 8.0, False))]]),
        # Skips before the first applied one are calibration.
        ("healthy", [(40, 8.0, True), (10, 8.0, False)]),
        # What was skipped more than 100 attempts ago is over.
        ("healthy", [(1, 8.0, False), (50, 8.0, True), (100, 8.0, False)]),
        ("stuck", [(1, 1.0, True)]),
        ("stuck", [(10, 1.0, False), (1, 1.0, True), (3, 1.0, False)]),
        ("healthy", [(10, 1.0, False)]),
        ("stuck", [(3, 2.0**32, False)]),
        # Collapsing comes before stuck, stuck before thrashing.
        ("collapsing", [(1, 2.0**9, False), *falling(2.0**9, 10)]),
        ("stuck", [(10, 1.0, False), (10, 1.0, True)]),
    ],
)
def test_first_rule_that_applies_decides(expected, runs):
    assert judge(records(*runs)) == expected


def test_without_a_dynamic_scale_nothing_calibrates_or_sticks():
    static = ScaleLimits()
    assert judge([], static) == "healthy"
    assert judge(records((3, 1.0, True)), static) == "healthy"
    assert judge(records((1, 1.0, False), (3, 1.0, True)), static) == "thrashing"


def test_gradscaler_at_zero_is_stuck_for_good():
    assert judge(records((3, 0.0, True)), ScaleLimits(is_dynamic=True)) == "stuck"


def test_a_resumed_run_is_not_calibrating_though_its_window_was_all_skipped():
    assert judge_health(records((5, 8.0, True)), DYNAMIC, first_applied=None) == "calibrating"
    window = [ScaleRecord(200 + r.step, r.loss_scale, True, True) for r in records((100, 8.0, True))]
    assert judge_health(window, DYNAMIC, first_applied=7) == "thrashing"


def test_spans_cover_the_run_in_order():
    found = records(*falling(2.0**12, 4), (20, 256.0, False), *falling(256.0, 8))
    # 19 clean attempts follow the first applied one: the fifth skip makes 5 of 24, over a fifth.
    assert [span[2] for span in health_spans(found, DYNAMIC)] == ["calibrating", "healthy", "thrashing"]
    spans = health_spans(found, DYNAMIC)
    assert spans[-1][0] == 4 + 20 + 4
    assert [spans[0][0], spans[-1][1]] == [0, 31]
    assert all(a[1] < b[0] for a, b in pairwise(spans))


def test_spans_of_a_long_run_stay_few():
    assert len(health_spans(records((50_000, 8.0, False)), DYNAMIC)) == 1
