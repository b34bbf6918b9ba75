"""Pixel decoder, queries and masked decoder."""
import pytest
import torch
import torch.nn.functional as F

from icf.model.decoder import Decoder, Fusion, MaskedDecoder
from icf.model.pixel_decoder import PixelDecoder
from icf.model.position import pixel_centers, sine_position

N, T, C = 10, 5, 16


def inputs(n=N, size=16):
    levels = [torch.randn(n, C, size // 2 ** i, size // 2 ** i) for i in range(4)]
    return levels[0], levels[1:], torch.randn(n // T, T, 12)


def make(**options):
    return Decoder(audio_dim=12, dim=C, layers=3, ffn=32, heads=4, queries=7, **options)


def test_pixel_decoder_keeps_the_four_sizes():
    decoder = PixelDecoder([8, 12, 16, 20], dim=C, layers=2, ffn=32, heads=4, points=2)
    maps = [torch.randn(2, c, 24 // 2 ** i, 16 // 2 ** i) for i, c in enumerate((8, 12, 16, 20))]
    pixels, levels = decoder(maps)
    assert pixels.shape == (2, C, 24, 16)
    assert [tuple(x.shape) for x in levels] == [(2, C, 12, 8), (2, C, 6, 4), (2, C, 3, 2)]


def test_positions_are_those_of_the_pixels():
    assert pixel_centers(2, 4, "cpu").tolist() == [[x, y] for y in (.25, .75) for x in (.125, .375, .625, .875)]
    position = sine_position(2, 4, 8, "cpu").view(2, 4, 8)
    assert torch.equal(position[0, 0, :4], position[0, 3, :4]) and torch.equal(position[0, 0, 4:], position[1, 0, 4:])
    wave = torch.tensor([1.0, 0.01])
    torch.testing.assert_close(position[1, 2, 4::2], (0.625 * 2 * torch.pi * wave).sin())
    torch.testing.assert_close(position[1, 2, 1:4:2], (0.75 * 2 * torch.pi * wave).cos())


@pytest.mark.parametrize("mode", ["bidirectional", "audio"])
def test_every_frame_hears_its_own_sound(mode):
    """The queries of frame n change with the sound of frame n and with no other's."""
    decoder = make(mode=mode, audio_keys="own").eval()
    pixels, levels, audio = inputs()
    frames = torch.arange(N)
    before = decoder(pixels, levels, audio, frames).masks
    for n in (0, 4, 7):
        changed = audio.clone()
        changed[n // T, n % T] *= -1
        after = decoder(pixels, levels, changed, frames).masks
        assert [bool((a - b).abs().max() > 1e-5) for a, b in zip(after[0], before[0], strict=True)] == [
            i == n for i in range(N)]


@pytest.mark.parametrize(("keys", "crosses"), [("clip_null", True), ("own", False)])
def test_other_seconds_are_heard_through_the_clips_keys_only(settle, keys, crosses):
    decoder = settle(make(audio_keys=keys), 1.0).eval()
    pixels, levels, audio = inputs()
    changed = audio.clone()
    changed[0, 1] += torch.randn(12)
    a, b = (decoder(pixels, levels, x, torch.arange(N)).pixels for x in (audio, changed))
    moved = [not torch.equal(x, y) for x, y in zip(a, b, strict=True)]
    assert moved == [crosses or n == 1 for n in range(T)] + [False] * T                     # never another clip's


def test_one_key_cannot_tell_where_a_sound_fits(settle):
    """A softmax over one key is constant: with `own` all pixels receive the same, with `clip_null` they differ."""
    pixels, levels, audio = inputs()
    spread = {}
    for keys in ("own", "clip_null"):
        decoder = settle(make(audio_keys=keys), 1.0)
        delta = decoder(pixels, levels, audio, torch.arange(N)).pixels - pixels
        spread[keys] = (delta - delta.mean((2, 3), keepdim=True)).abs().max()
    assert spread["own"] < 1e-5 < 1e-3 < spread["clip_null"]


def test_without_sound_queries_hear_nothing():
    decoder = make(mode="learnable")
    pixels, levels, audio = inputs()
    a, b = (decoder(pixels, levels, x, torch.arange(N)).masks for x in (audio, audio.flip(0)))
    assert torch.equal(a, b) and not any("audio" in name or "fusion" in name for name, _ in decoder.named_parameters())


@pytest.mark.parametrize("keys", ["clip_null", "own"])
def test_padded_seconds_are_not_heard(settle, keys):
    decoder = settle(make(audio_keys=keys), 1.0)
    pixels, levels, audio = inputs(5)
    frames, mask = torch.arange(3), torch.tensor([[True, True, True, False, False]])
    changed = audio.clone()
    changed[:, 3:] = torch.randn(12)
    args = pixels[:3], [x[:3] for x in levels]
    a, b = (decoder(*args, x, frames, mask).masks for x in (audio, changed))
    assert torch.equal(a, b)


@pytest.mark.parametrize("clip_keys", [True, False])
def test_fusion_equals_attention_written_out(settle, clip_keys):
    """The folded projections are those of ordinary bidirectional multi-head attention."""
    fusion = settle(Fusion(C, 4, clip_keys), 1.0).double()
    for linear in (m for m in fusion.modules() if isinstance(m, torch.nn.Linear)):
        torch.nn.init.normal_(linear.bias)
    pixels, audio = torch.randn(N, C, 3, 4).double(), torch.randn(2, T, C).double()
    got_pixels, got_own = fusion(pixels, audio, audio.flatten(0, 1)[:, None], torch.arange(N), None)

    def heads(x):
        return x.unflatten(-1, (4, C // 4)).transpose(-2, -3)                               # [M, S, D]

    for n in range(N):
        clip, step = divmod(n, T)
        tokens = audio[clip].clone()
        if clip_keys:
            tokens[step] += fusion.mark
            tokens = torch.cat([tokens, fusion.null[None]])
        else:
            tokens, step = tokens[step:step + 1], 0
        sounds, x = fusion.audio_norm(tokens), fusion.pixel_norm(pixels[n].flatten(1).T)
        scores = heads(fusion.pixel_query(x)) @ heads(fusion.audio_key(sounds)).transpose(1, 2) / (C // 4) ** 0.5
        heard = (scores.softmax(-1) @ heads(fusion.audio_value(sounds))).transpose(0, 1).flatten(1)
        seen = (scores.softmax(1)[:, :, step, None] * heads(fusion.pixel_value(x))).sum(1).flatten()
        heard = fusion.pixel_scale * fusion.pixel_out(heard)
        torch.testing.assert_close(got_pixels[n], pixels[n] + heard.T.view(C, 3, 4))
        torch.testing.assert_close(got_own[n, 0], audio[clip, n % T] + fusion.audio_scale * fusion.audio_out(seen))


def test_dense_mask_is_the_weighted_mean_of_query_masks():
    decoder = make()
    pixels, levels, audio = inputs()
    decoded = decoder(pixels, levels, audio, torch.arange(N), all_heads=True)
    queries = decoder.queries + decoder.to_queries(decoded.audio)
    embeddings, scores = decoder.masked(queries, levels, decoded.pixels, True)
    masks = torch.einsum("pnqc,nchw->pnqhw", embeddings, decoded.pixels)
    expected = (scores.softmax(2)[..., None] * masks).sum(2, keepdim=True)
    assert decoded.classes is None and decoded.masks.shape == (4, N, 1, 16, 16)
    torch.testing.assert_close(decoded.masks, expected, atol=1e-4, rtol=1e-4)


def test_queries_look_inside_their_masks_only():
    """What lies outside of a query's mask does not reach it, and a query without a mask sees everything."""
    decoder = MaskedDecoder(C, layers=1, ffn=32, heads=4, queries=2, outputs=1)
    decoder.mask, decoder.norm = torch.nn.Identity(), torch.nn.Identity()
    queries = torch.zeros(1, 2, C)
    queries[0, 0, 0], queries[0, 1, 1] = 1, -1                              # mask 0: channel 0, mask 1: none
    pixels = torch.ones(1, C, 8, 8)
    pixels[:, 0, :, 4:] = -1                                                # mask 0 is the left half
    coarse = [torch.randn(1, C, size, size) for size in (4, 2, 2)]
    base = decoder(queries, coarse, pixels, False)[0]
    changed = [coarse[0], coarse[1], coarse[2].clone()]
    changed[2][..., 1] += 1                                                 # right half of the level that is read
    attended = decoder.layers[0].cross_attention
    seen = []
    attended.register_forward_hook(lambda module, args, out: seen.append((args[3], out)))
    decoder(queries, coarse, pixels, False), decoder(queries, changed, pixels, False)
    assert seen[0][0].tolist() == [[[True, False, True, False], [True] * 4]]
    moved = [(a - b).abs().max() > 1e-6 for a, b in zip(seen[0][1][0], seen[1][1][0], strict=True)]
    assert moved == [False, True] and base.shape == (1, 1, 2, C)


def test_masks_at_a_levels_size_equal_masks_made_small():
    pixels, embeddings = torch.randn(2, C, 16, 16), torch.randn(2, 7, C)
    full = F.interpolate(torch.einsum("nqc,nchw->nqhw", embeddings, pixels), size=(4, 4), mode="bilinear",
                         align_corners=False)
    small = F.interpolate(pixels, size=(4, 4), mode="bilinear", align_corners=False)
    torch.testing.assert_close(torch.einsum("nqc,nchw->nqhw", embeddings, small), full, atol=1e-5, rtol=1e-5)


def test_class_head_has_one_output_for_no_object():
    decoder = make(classes=71)
    decoded = decoder(*inputs(), torch.arange(N), all_heads=True)
    assert decoded.classes.shape == (4, N, 7, 72) and decoded.masks.shape == (4, N, 7, 16, 16)
