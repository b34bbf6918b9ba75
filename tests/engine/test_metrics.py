"""The definitions of icf's metrics against worked examples and against straightforward readings of the formulas."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icf.engine.masks import class_map
from icf.engine.metrics import (
    THRESHOLDS,
    FalsePositives,
    FScore,
    Jaccard,
    MeanChange,
    PixelScores,
    SemanticScores,
    combined_score,
    count_classes,
    f_curves,
)


def clips(n):
    return torch.arange(n)


def box(rows, columns, size=8, value=1):
    mask = torch.zeros(size, size, dtype=torch.uint8)
    mask[rows, columns] = value
    return mask


def jaccard(predictions, truths):
    metric = Jaccard(len(predictions))
    metric.update(torch.stack(predictions).float(), torch.stack(truths), clips(len(predictions)))
    return metric


UPPER, EMPTY, FULL = box(slice(0, 4), slice(None)), box(slice(0), slice(0)), box(slice(None), slice(None))
TRUTH, SHIFTED = box(slice(0, 4), slice(2, 6)), box(slice(0, 4), slice(0, 4))


# J

@pytest.mark.parametrize("prediction, truth, background, strict, skip", [
    pytest.param(UPPER, EMPTY, 0.5, 0, math.nan, id="half of a silent frame"),
    pytest.param(EMPTY, EMPTY, 1, 1, math.nan, id="nothing on a silent frame"),
    pytest.param(FULL, EMPTY, 0, 0, math.nan, id="everything on a silent frame"),
    pytest.param(SHIFTED, TRUTH, 1 / 3, 1 / 3, 1 / 3, id="half overlap"),
    pytest.param(EMPTY, TRUTH, 0, 0, 0, id="nothing found"),
])
def test_jaccard_of_one_frame(prediction, truth, background, strict, skip):
    scores = jaccard([prediction], [truth]).scores()
    values = [float(scores[f"{empty}/frame"]) for empty in ("background", "strict", "skip")]
    assert values == pytest.approx([background, strict, skip], abs=1e-6, nan_ok=True)


def test_jaccard_averages_frames_and_reports_false_alarms_on_silent_ones():
    scores = jaccard([UPPER, SHIFTED], [EMPTY, TRUTH]).scores()
    assert float(scores["background/frame"]) == pytest.approx((0.5 + 1 / 3) / 2, abs=1e-6)
    assert float(scores["strict/frame"]) == pytest.approx(1 / 6, abs=1e-6)
    assert float(scores["skip/frame"]) == pytest.approx(1 / 3, abs=1e-6)
    assert float(scores["false_positive/empty"]) == pytest.approx(0.5)


def test_mean_of_batch_means_weighs_the_last_batch_more():
    scores = jaccard([TRUTH] * 4 + [EMPTY], [TRUTH] * 5).scores()
    assert float(scores["background/frame"]) == pytest.approx(0.8, abs=1e-6)
    assert float(scores["background/batch:4"]) == pytest.approx(0.5, abs=1e-6)


def test_probability_equal_to_the_threshold_is_background():
    metric = FalsePositives(1)
    probability = torch.full((1, 8, 8), 0.5)
    probability[0, :2] = 0.75
    metric.update(probability, clips(1))
    assert float(metric.scores()["FPR"]) == 0.25 and float(metric.scores()["strict"]) == 0


def test_ignored_pixels_count_nowhere():
    truth = TRUTH.to(torch.int64)
    truth[:, 2:4], truth[4:] = -1, 255
    metric = jaccard([SHIFTED], [truth])          # left: truth in columns 4 and 5, prediction in columns 0 and 1
    assert float(metric.scores()["background/frame"]) == 0
    pixels = PixelScores(1, 2)
    pixels.update(SHIFTED[None], truth[None], clips(1))
    assert int(pixels.ignored) == 8 + 32
    assert float(pixels.scores()["accuracy"]) == 8 / 24


# F

def f_score(probability, truth):
    metric = FScore(len(probability))
    metric.update(probability, truth, clips(len(probability)))
    return metric.scores()


def quarters(upper, lower):
    probability = torch.full((4, 4), 0.01)
    probability[:2, :2], probability[2:, :2] = upper, lower
    return probability


QUARTER = box(slice(2), slice(2), 4)


def test_f_of_one_frame_takes_the_best_threshold():
    probability = torch.full((1, 4, 4), 0.05)
    probability[0, 0] = torch.tensor([0.9, 0.8, 0.7, 0.2])
    probability[0, 1, :2] = torch.tensor([0.75, 0.3])
    scores = f_score(probability, box(0, slice(None), 4)[None])
    assert float(scores["per_video/skip"]) == pytest.approx(0.8125, abs=1e-6)


def test_f_depends_on_the_group():
    scores = f_score(torch.stack([quarters(0.9, 0.6), quarters(0.4, 0.1)]), torch.stack([QUARTER, QUARTER]))
    assert float(scores["per_video/skip"]) == pytest.approx(1, abs=1e-6)
    for group in ("batch:2", "batch:4", "dataset"):
        assert float(scores[f"{group}/skip"]) == pytest.approx(0.782609, abs=1e-6)


def test_groups_without_object_count_zero_or_are_skipped():
    truth = torch.stack([torch.zeros_like(QUARTER), QUARTER])
    metric = FScore(2)
    metric.update(torch.stack([quarters(0.9, 0.1)] * 2), truth, clips(2))
    scores = metric.scores()
    assert float(scores["per_video/zero"]) == pytest.approx(0.5, abs=1e-6)
    assert float(scores["per_video/skip"]) == pytest.approx(1, abs=1e-6)
    assert metric.skipped() == {"per_video": 1, "batch:2": 0, "batch:4": 0, "dataset": 0}
    assert float(metric.scores([0])["per_video/zero"]) == 0 and metric.scores([0])["per_video/skip"].isnan()


def noisy_set():
    """40 frames whose F falls as more of them share one threshold."""
    n, i, j = (x.double() for x in torch.meshgrid(torch.arange(40), torch.arange(16), torch.arange(16), indexing="ij"))
    radius, centre = 2 + n % 5, 4 + n % 8
    truth = ((i - 8).abs() <= radius) & ((j - centre).abs() <= radius)
    logits = 2 * (2 * truth.double() - 1) + 3 * torch.sin(12.9898 * i + 78.233 * j + 37.719 * n)
    return (logits + 1.5 * torch.cos(1.7 * n)).sigmoid().float(), truth


@pytest.mark.parametrize("size, expected", [(1, .8686), (2, .8285), (4, .7848), (5, .7786), (8, .7690), (10, .7638),
                                            (20, .7638), (40, .7638)])
def test_f_falls_with_the_size_of_the_group(size, expected):
    probability, truth = noisy_set()
    metric = FScore(40 // size)
    metric.update(probability, truth, torch.arange(40) // size)
    assert float(metric.scores()["per_video/skip"]) == pytest.approx(expected, abs=5e-4)


def test_named_groups_of_the_noisy_set():
    probability, truth = noisy_set()
    scores = f_score(probability, truth)
    values = [float(scores[f"{group}/skip"]) for group in ("per_video", "batch:2", "batch:4", "dataset")]
    assert values == pytest.approx([.8686, .8285, .7848, .7638], abs=5e-4)
    metric = Jaccard(40)
    metric.update(probability, truth, clips(40))
    assert float(metric.scores()["background/frame"]) == pytest.approx(.505321, abs=1e-6)
    share = FalsePositives(40)
    share.update(probability, clips(40))
    assert float(share.scores()["FPR"]) == pytest.approx((probability > 0.5).float().mean().item(), abs=1e-6)
    assert truth.float().mean().item() == pytest.approx(.337891, abs=1e-6)


def test_thresholds_reach_from_zero_to_exactly_one():
    curve = f_curves(torch.tensor([[[1.0, 1.0, 0.0, 0.0]]]), torch.tensor([[[1, 1, 0, 0]]]))[0][0]
    assert curve[0] == pytest.approx(1.3 * 0.5 / (0.3 * 0.5 + 1)) and curve[1] == curve[-1] == 1 and len(curve) == 255
    almost = f_curves(torch.tensor([[[1 - 6e-8, 0.0]]]), torch.tensor([[[1, 0]]]))[0][0]
    assert almost[-2] == 1 and almost[-1] == 0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), on_thresholds=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_histogram_equals_255_comparisons(seed, on_thresholds, dtype):
    generator = torch.Generator().manual_seed(seed)
    probability = torch.rand(3, 7, 9, generator=generator)
    if on_thresholds:                             # every pixel sits exactly on a threshold, or one rounding beside it
        probability = THRESHOLDS[(probability * 254).long()]
        step = torch.randint(-1, 2, probability.shape, generator=generator).float()
        probability = torch.nextafter(probability, probability + step).clamp(0, 1)
    probability = probability.to(dtype)
    truth = torch.rand(3, 7, 9, generator=generator) < 0.4
    reached = probability.float()[:, None] >= THRESHOLDS[:, None, None]                      # [3,255,7,9]
    right = (reached & truth[:, None]).sum((2, 3))
    precision, recall = right / (reached.sum((2, 3)) + 1e-20), right / (truth.sum((1, 2))[:, None] + 1e-20)
    expected = (1.3 * precision * recall / (0.3 * precision + recall)).nan_to_num(0)
    torch.testing.assert_close(f_curves(probability, truth)[0], expected, rtol=1e-6, atol=1e-7)


# AVSS

def semantic_pair():
    return torch.stack([box(slice(2), slice(2), 4, 28), box(slice(2, 4), slice(2, 4), 4, 70)])


def stray_pixel(prediction):
    prediction[0, 3, 3] = 5
    return prediction


def missed(prediction):
    prediction[1] = 0
    return prediction


def too_large(prediction):
    prediction[0, :2, 2] = 28
    return prediction


SEMANTIC = {  # J all, F all, J seen, F seen, seen, J without the last class, J without background
    "perfect": (lambda x: x, .042254, .042254, 1, 1, 3, .028571, .028571),
    "stray pixel": (stray_pixel, .041667, .042109, .739583, .747432, 4, .027976, .028571),
    "missed": (missed, .026408, .026732, .625, .632653, 3, .026786, .014286),
    "too large": (too_large, .036385, .038030, .861111, .900054, 3, .022619, .023810),
}


def semantic(change, padding=0, **kwargs):
    metric, truth = SemanticScores(2, 71, **kwargs), semantic_pair()
    metric.update(change(truth.clone()), truth, clips(2))
    metric.pad(torch.tensor([padding, 0]), clips(2))
    return metric


@pytest.mark.parametrize("change, j, f, j_seen, f_seen, seen, without_last, without_background", SEMANTIC.values(),
                         ids=SEMANTIC)
def test_semantic_scores(change, j, f, j_seen, f_seen, seen, without_last, without_background):
    metric = semantic(change)
    scores = {mode: float(value) for mode, value in metric.scores().items()}
    assert [scores[f"{x}/all/real/include"] for x in "JF"] == pytest.approx([j, f], abs=1e-6)
    assert [scores[f"{x}/seen/real/include"] for x in "JF"] == pytest.approx([j_seen, f_seen], abs=1e-6)
    assert int((metric.per_class()[2] > 0).sum()) == seen
    assert scores["J/all/real/public"] == pytest.approx(without_last, abs=1e-6)
    assert scores["J/all/real/exclude"] == pytest.approx(without_background, abs=1e-6)


def test_padding_frames_raise_the_background():
    scores = {mode: float(value) for mode, value in semantic(too_large, padding=1).scores().items()}
    assert [scores[f"{x}/all/padded/include"] for x in "JF"] == pytest.approx([.036776, .038134], abs=1e-6)
    assert [scores[f"{x}/seen/padded/include"] for x in "JF"] == pytest.approx([.870370, .902505], abs=1e-6)
    assert scores["J/all/padded/public"] == pytest.approx(.023016, abs=1e-6)
    assert scores["J/all/padded/exclude"] == pytest.approx(.023810, abs=1e-6)
    assert scores["J/all/real/include"] == pytest.approx(.036385, abs=1e-6)


def test_scores_of_each_class():
    j, f, counted = semantic(too_large).per_class()
    assert j[[0, 28, 70]].tolist() == pytest.approx([.916667, .666667, 1], abs=1e-6)
    assert f[[0, 28, 70]].tolist() == pytest.approx([.977941, .722222, 1], abs=1e-6)
    assert counted[[0, 28, 70, 5]].tolist() == [2, 1, 1, 0]


def test_min_pixels_forgives_a_stray_pixel():
    metric = semantic(stray_pixel, min_pixels=2)
    j, _, counted = metric.per_class()
    assert counted[5] == 0 and j[0] == pytest.approx((11 / 12 + 1) / 2)


# all pixels together

@pytest.mark.parametrize("change, expected", [
    pytest.param(too_large, {"mIoU/zero": .036385, "mIoU/seen": .861111, "accuracy": .9375, "FDR": .111111,
                             "F1": .918841, "F0.3": .900558}, id="too large"),
    pytest.param(stray_pixel, {"mIoU/seen": .739583, "accuracy": .96875, "FDR": .25, "F1": .744681, "F0.3": .747517},
                 id="stray pixel"),
])
def test_scores_of_all_pixels_together(change, expected):
    metric, truth = PixelScores(2, 71), semantic_pair()
    metric.update(change(truth.clone()), truth, clips(2))
    scores = metric.scores()
    assert {key: float(scores[key]) for key in expected} == pytest.approx(expected, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), classes=st.integers(2, 9))
def test_counts_equal_comparisons_class_by_class(seed, classes):
    generator = torch.Generator().manual_seed(seed)
    prediction, truth = (torch.randint(0, classes, (3, 5, 7), generator=generator, dtype=torch.uint8) for _ in "pt")
    truth[torch.rand(3, 5, 7, generator=generator) < 0.2] = 255
    right, predicted, labelled = count_classes(prediction, truth, classes)
    for c in range(classes):
        assert torch.equal(right[:, c], ((prediction == c) & (truth == c)).sum((1, 2)))
        assert torch.equal(predicted[:, c], ((prediction == c) & (truth != 255)).sum((1, 2)))
        assert torch.equal(labelled[:, c], (truth == c).sum((1, 2)))


@pytest.mark.parametrize("channels", [1, 2, 71])
def test_class_map_is_the_first_maximum(channels):
    scores = torch.randint(0, 9, (3, channels, 6, 5), generator=torch.Generator().manual_seed(0)).float()
    best = scores == scores.amax(1, keepdim=True)
    assert torch.equal(class_map(scores).long(), best.to(torch.uint8).argmax(1))


# sound

def test_change_of_prediction():
    metric = MeanChange(1)
    p = torch.zeros(1, 1, 4, 4)
    q = p.clone()
    q[..., :2, :] = 0.5
    metric.update(p, q, clips(1))
    assert float(metric.scores()["change"]) == 0.25
    metric.reset()
    metric.update(torch.tensor([2.0, 0, 0])[None, :, None, None], torch.tensor([0, 0, 1.0])[None, :, None, None],
                  clips(1))
    assert float(metric.scores()["change"]) == 1


def test_combined_score_is_the_mean_of_conditions():
    assert combined_score(0.8, [1.0, 0.6]) == pytest.approx(0.8)


# sums

def frames(seed=0, n=24, clips_=7, classes=5):
    generator = torch.Generator().manual_seed(seed)
    probability = torch.rand(n, 12, 12, generator=generator)
    truth = torch.rand(n, 12, 12, generator=generator) < 0.3
    truth[::5] = False
    prediction, labels = (torch.randint(0, classes, (n, 12, 12), generator=generator) for _ in range(2))
    return probability, truth.long(), prediction, labels, torch.randint(0, clips_, (n,), generator=generator)


METRICS = {
    "J": (lambda: Jaccard(7), lambda f, s: (f[0][s], f[1][s], f[4][s])),
    "F": (lambda: FScore(7), lambda f, s: (f[0][s], f[1][s], f[4][s])),
    "AVSS": (lambda: SemanticScores(7, 5), lambda f, s: (f[2][s], f[3][s], f[4][s])),
    "pixels": (lambda: PixelScores(7, 5), lambda f, s: (f[2][s], f[3][s], f[4][s])),
    "false positives": (lambda: FalsePositives(7), lambda f, s: (f[0][s], f[4][s])),
    "change": (lambda: MeanChange(7), lambda f, s: (f[0][s, None], 1 - f[0][s, None], f[4][s])),
}


def assert_same(scores, expected):
    assert scores.keys() == expected.keys()
    for key in scores:
        torch.testing.assert_close(scores[key], expected[key], rtol=1e-6, atol=1e-7, equal_nan=True, msg=key)


@pytest.mark.parametrize("make, arguments", METRICS.values(), ids=METRICS)
def test_result_does_not_depend_on_batches_and_order(make, arguments):
    data, whole, parts = frames(), make(), make()
    whole.update(*arguments(data, torch.arange(24)))
    for part in torch.randperm(24, generator=torch.Generator().manual_seed(1)).split(5):
        parts.update(*arguments(data, part))
    assert_same(parts.compute(), whole.compute())


@pytest.mark.parametrize("make, arguments", METRICS.values(), ids=METRICS)
def test_scores_of_some_clips_are_those_of_a_set_of_these_clips(make, arguments):
    data, whole, some = frames(), make(), make()
    whole.update(*arguments(data, torch.arange(24)))
    some.update(*arguments(data, torch.isin(data[4], torch.tensor([1, 4, 6])).nonzero().flatten()))
    assert_same(whole.scores([6, 1, 4]), some.scores([1, 4, 6]))


def _worker(rank, store):
    torch.set_num_threads(1)                      # the forked process has none of the parent's threads
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    data = frames()
    mine = torch.arange(24)[(data[4] % 2) == rank]
    for make, arguments in METRICS.values():
        metric, single = make(), make()
        metric.update(*arguments(data, mine))
        single.update(*arguments(data, torch.arange(24)))
        single.sync_on_compute = False
        assert_same(metric.compute(), single.scores())
        with metric.sync_context():
            assert_same(metric.scores([2, 3]), single.scores([2, 3]))
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_scores_of_one(tmp_path):
    torch.multiprocessing.start_processes(_worker, args=(tmp_path / "store",), nprocs=2, start_method="fork")


@pytest.mark.parametrize("call, message", [
    (lambda: Jaccard(0), "clips"),
    (lambda: count_classes(torch.zeros(1, 2, 2), torch.zeros(1, 3, 2, dtype=torch.uint8), 2), "same shape"),
    (lambda: count_classes(box(0, 0)[None], box(0, 0, value=7)[None], 3), "got 7"),
    (lambda: count_classes(box(0, 0, value=9)[None], box(0, 0)[None], 3), "prediction: .* got 9"),
    (lambda: f_curves(torch.zeros(1, 4, 4, dtype=torch.int64), box(0, 0, 4)[None]), "floating"),
    (lambda: count_classes(box(0, 0)[None], torch.zeros(1, 8, 8), 2), "integer labels"),
])
def test_bad_input_is_refused_with_its_reason(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# numbers of the published code

def waves(channels: int = 1) -> torch.Tensor:
    """Logits [40,channels,24,24] of 8 clips of 5 frames, the same on every machine."""
    sizes = (8, 5, channels, 24, 24)
    c, t, k, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in sizes), indexing="ij")
    return (3 * torch.sin(0.7 * x + 1.3 * c + 2.1 * k) * torch.cos(0.4 * y - 0.9 * t + k)).float().flatten(0, 1)


def test_one_foreground_has_the_numbers_of_avsbenchs_code():
    """`mask_iou` and `Eval_Fmeasure` of its avs_s4/utils/utility.py on these inputs, in batches of 4 clips, and F clip
    by clip; two clips and a frame of another are silent."""
    logits, clip = waves()[:, 0], torch.arange(8).repeat_interleave(5)
    truth = (logits.roll((1, 2), (1, 2)) > 1).long()
    truth[10:20], truth[7] = 0, 0
    j, f = Jaccard(8), FScore(8)
    j.update(logits.sigmoid(), truth, clip), f.update(logits.sigmoid(), truth, clip)
    assert float(j.scores()["background/batch:4"]) == pytest.approx(0.3007164, abs=2e-7)
    assert float(f.scores()["batch:4/zero"]) == pytest.approx(0.3272960, abs=2e-7)
    assert float(f.scores()["per_video/zero"]) == pytest.approx(0.2559195, abs=2e-7)


def test_classes_have_the_numbers_of_avsbenchs_code():
    """`calc_color_miou_fscore` of its avss/utils/compute_color_metrics.py, and what avss/test.py makes of it."""
    prediction, truth = waves(6), waves(6).roll((1, 1), (2, 3)).argmax(1)
    prediction[:, 4] -= 9
    truth[10:15] = 0
    metric = SemanticScores(8, 6)
    metric.update(prediction.argmax(1), truth, torch.arange(8).repeat_interleave(5))
    scores = metric.scores()
    assert float(scores["J/all/real/include"]) == pytest.approx(0.2553041, abs=2e-7)
    assert float(scores["J/all/real/public"]) == pytest.approx(0.2406832, abs=2e-7)
    assert float(scores["F/all/real/public"]) == pytest.approx(0.3489138, abs=2e-7)
