"""Pictures of clips: colours where they belong."""
import numpy as np
import pytest
import torch

from icf.engine.pictures import FALSE, MISSED, RIGHT, contact_sheet, mel_picture, overlay, strips


def test_overlay_colours_the_mask_and_nothing_else():
    frame, mask = np.full((12, 16, 3), 100, np.uint8), np.zeros((12, 16), np.uint8)
    mask[3:9, 4:12], mask[0] = 1, 255
    picture = np.asarray(overlay(frame, mask, (200, 0, 0), alpha=0.5, dim=0.25))
    assert picture[5, 6].tolist() == [150, 50, 50], "inside, half of each"
    assert picture[3, 4].tolist() == [200, 0, 0], "outline, solid"
    assert picture[11, 0].tolist() == picture[0, 5].tolist() == [75, 75, 75], "outside and ignored, dimmed"
    assert np.array_equal(picture, overlay(frame.transpose(2, 0, 1), mask, (200, 0, 0), dim=0.25))
    assert np.array_equal(frame, np.full((12, 16, 3), 100)), "the frame itself is left alone"


def test_overlay_takes_a_colour_per_class():
    mask = np.zeros((9, 18), np.uint8)
    mask[:, :9], mask[:, 9:] = 1, 2
    picture = np.asarray(overlay(np.zeros((3, 9, 18), np.uint8), mask, [(9, 9, 9), (200, 0, 0), (0, 0, 100)]))
    assert picture[4, 4].tolist() == [100, 0, 0] and picture[4, 14].tolist() == [0, 0, 50]


def test_overlay_refuses_a_mask_of_another_size():
    with pytest.raises(ValueError, match=r"\(8, 9\)"):
        overlay(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9), np.uint8), (1, 2, 3))


def test_prediction_shows_what_is_right_false_and_missed(make_sample):
    prediction = torch.zeros(3, 40, 40, dtype=torch.uint8)
    prediction[:, 10:30, 20:40] = 1
    picture = np.asarray(strips(make_sample(prediction=prediction), ())["prediction"]).astype(int)
    scale = picture.shape[0] // 40
    for column, color in ((15, MISSED), (25, RIGHT), (35, FALSE)):
        expected = (np.array(color) + 100) / 2                     # opacity one half over a grey of 100
        assert np.abs(picture[20 * scale, column * scale] - expected).max() <= 2


def test_mel_picture_has_time_to_the_right_and_low_tones_below():
    log_mel = torch.full((2, 1, 96, 64), -4.6)
    log_mel[1, :, :, 5] = 4
    picture = np.asarray(mel_picture(log_mel)).astype(int).sum(2)
    assert picture.shape == (64, 192)
    assert picture[63 - 5, 140] == picture.max() and picture[63 - 5, 50] < picture.max() / 5


def test_contact_sheet_holds_all_clips(make_sample):
    one, two = (contact_sheet([make_sample()] * n).size for n in (1, 2))
    assert one[0] == two[0] and two[1] - 12 == 2 * (one[1] - 12)
