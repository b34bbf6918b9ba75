"""Channel attention, Eq. 1-2."""
import pytest
import torch

from icf.context import ChannelAttention, VisualContext


@pytest.mark.parametrize("literal", [False, True])
def test_pretrained_features_are_whole_at_the_start(literal):
    maps = [torch.randn(10, 16, 4, 4), torch.randn(10, 24, 2, 2)]
    out = VisualContext([16, 24], ("video", "frame"), 8, literal)(maps, 5)
    assert all(torch.equal(a, b) for a, b in zip(out, maps, strict=True))


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("frames", [1, 5])
def test_it_is_the_papers_equation(settle, frames, literal):
    block = settle(ChannelAttention(6, 4, literal)).double()
    x = torch.randn(10, 6, 3, 2, dtype=torch.float64)
    q, k, v = block.qkv(block.reduce(x)).chunk(3, 1)
    rows = [part.reshape(10 // frames, frames * 4, 6) for part in (q, k, v)]                # Q, K, V^T [B, TC, HW]
    expected = []
    for q, k, v in zip(*rows, strict=True):
        a = torch.softmax(q @ k.T / (block.log_tau.exp() * 6 ** 0.5), -1)
        expected.append((v.T @ a).T if literal else (a @ v))
    expected = block.expand(torch.stack(expected).reshape(10, 4, 3, 2))
    torch.testing.assert_close(block(x, frames), expected)


@pytest.mark.parametrize("literal", [False, True])
def test_padded_frames_are_seen_by_none(settle, literal):
    block = settle(ChannelAttention(6, 4, literal))
    x, mask = torch.randn(10, 6, 3, 2), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    changed = x.clone()
    changed[8:] = 7.0
    torch.testing.assert_close(block(changed, 5, mask)[:8], block(x, 5, mask)[:8])
    torch.testing.assert_close(block(x, 5, mask)[5:8], block(x[5:8], 3))      # as a clip of 3 frames


def test_video_level_crosses_frames_and_frame_level_does_not(settle):
    maps = [torch.randn(5, 6, 2, 2), torch.randn(5, 6, 2, 2)]
    changed = [x.clone() for x in maps]
    changed[0][3] += 1
    for level, crosses in (("video", True), ("frame", False)):
        context = settle(VisualContext([6, 6], (level,), 4))
        same = torch.isclose(context(maps, 5)[0], context(changed, 5)[0]).flatten(1).all(1)
        assert same.tolist() == [not crosses] * 3 + [False] + [not crosses]


def test_temperature_is_learned(settle):
    block = settle(ChannelAttention(6, 4))
    block(torch.randn(5, 6, 2, 2), 5).square().sum().backward()
    assert block.log_tau.grad.abs() > 0
