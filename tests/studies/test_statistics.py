"""Intervals and tests on numbers whose answers are known."""
import json

import numpy as np
import pytest

from icf.studies.statistics import Measured, interval, read_measured, statistics_table, summary, wilcoxon


@pytest.mark.parametrize("shape", [(40,), (10, 60)])
def test_an_interval_covers_the_mean_about_as_often_as_it_says(shape):
    """Seeds differ by 1, clips by 2; over 60 draws of the data 95 % cover 0, with few seeds somewhat less."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(60):
        values = rng.normal(0, 1, shape[0])
        if len(shape) == 2:
            values = values[:, None] + rng.normal(0, 2, shape[1]) + rng.normal(0, 1, shape)
        low, high = interval(values)
        covered += low < 0 < high
    assert 52 <= covered <= 60


def test_an_interval_of_equal_values_is_a_point_and_is_the_same_each_time():
    assert interval(np.full((3, 7), 0.25)) == pytest.approx((0.25, 0.25))
    values = np.random.default_rng(1).random((4, 9))
    assert interval(values) == interval(values)


@pytest.mark.parametrize("differences, p", [
    ([0.01, 0.02, 0.03, 0.04, 0.05], 2 / 2**5), (np.arange(1, 11) / 100, 2 / 2**10),
    ([0.1, -0.2, 0.3, -0.4, 0.5], 0.8125), ([0.1] * 4, None), ([0.0] * 6, None)])
def test_wilcoxon(differences, p):
    """All of one sign: 2 of the 2^n ways to sign them are as far out."""
    assert wilcoxon(differences) == (p if p is None else pytest.approx(p))


def runs(offset, seeds=range(6)):
    clips = {seed: np.random.default_rng(seed).random(20) for seed in seeds}
    return {seed: Measured({"J": float(x.mean() + offset), "FPR noise": 0.1 - offset}, {"J": x + offset})
            for seed, x in clips.items()}


def test_gains_are_paired_by_seed():
    """The seeds differ far more than the methods, by whose constant difference the interval is a point."""
    base, better = runs(0), runs(0.01, range(1, 6))
    gain = summary(better, base)["J"]["gain"]
    assert gain["seeds"] == [1, 2, 3, 4, 5] and gain["better"] == 5
    found = summary(runs(0.01), base)
    assert found["J"]["gain"]["mean"] == pytest.approx(0.01)
    assert found["J"]["gain"]["interval"] == pytest.approx((0.01, 0.01))
    assert found["FPR noise"]["gain"]["better"] == 6, "less is better"
    assert "gain" not in summary(base, {})["J"] and summary(base, {})["J"]["interval"][0] < found["J"]["mean"]


def test_what_evaluation_writes_is_read(tmp_path):
    clips = [{"name": str(i), "groups": ["aligned" if i % 2 else "conflicting"], "J": i / 10, "F": 0.5,
              "FPR noise": 0.1} for i in range(4)]
    results = {"J": 0.15, "F": 0.5, "clips": clips, "groups": {"aligned": {"J": 0.2}, "conflicting": {"J": 0.1}},
               "negatives": {"noise": {"FPR": 0.1, "strict": 0.9, "J": 0.1}, "shuffled": {"J": 0.12}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    run = read_measured(tmp_path)
    assert run.scores == {"J": 0.15, "F": 0.5, "J aligned": 0.2, "J conflicting": 0.1, "J other sound": 0.12,
                          "FPR noise": 0.1, "empty noise": 0.9}
    assert run.clips["J conflicting"].tolist() == [0, 0.2] and run.clips["FPR noise"].tolist() == [0.1] * 4
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="not what icf evaluate writes"):
        read_measured(tmp_path)


def test_the_table_says_how_many_seeds_each_row_rests_on():
    base, found = runs(0), {}
    found["baseline"], found["icf"] = summary(base, {}), summary(runs(0.01, range(5)), base)
    text = statistics_table({"baseline": "baseline", "icf": "whole"}, found, "Comparison")
    assert "| baseline | 6 |" in text and "| whole | 5 |" in text and "5 of 5 | 0.062" in text
