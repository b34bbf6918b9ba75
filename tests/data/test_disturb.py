"""Disturbed clips: what changes, by how much, what stays, and that it is always the same."""
import json

import numpy as np
import pytest
import torch

from icf.data.audio import SILENCE
from icf.data.disturb import LEVELS, UNRELATED, Disturbed, unrelated_sound

KINDS = ("silence", "noise", "offscreen", "shuffled", "snr:20", "mix:2")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("subset", ["s4", "avss"])
def test_disturbance_changes_the_sound_or_the_frames_alone_and_always_alike(load, subset, kind):
    dataset = load(subset, "test")
    first, again, other = (Disturbed(dataset, kind, seed) for seed in (42, 42, 1))
    assert len(first) == len(dataset) and first.names == dataset.names and first.classes == dataset.classes
    changed = different = 0
    for index in range(len(dataset)):
        clip, true = first[index], dataset[index]
        for name in ("masks", "frame_mask", "label_mask", "log_mel" if kind == "mix:2" else "frames"):
            assert torch.equal(getattr(clip, name), getattr(true, name))
        name = "frames" if kind == "mix:2" else "log_mel"
        assert torch.equal(getattr(clip, name), getattr(again[index], name))
        changed += not torch.equal(getattr(clip, name), getattr(true, name))
        different += not torch.equal(getattr(clip, name), getattr(other[index], name))
    assert changed == (round(len(dataset) / 4) if kind == "mix:2" else len(dataset))
    assert (different == 0) == (kind == "silence")


def test_silence_is_silent(load):
    assert torch.allclose(Disturbed(load("s4", "test"), "silence")[1].log_mel, torch.tensor(SILENCE))


class Sounds:
    """Just enough of a data set to measure sounds."""

    names, subset, split = ["loud", "silent"], "s4", "test"
    sounds = [0.3 * torch.sin(torch.arange(80000) / 9), torch.zeros(80000)]

    def __len__(self):
        return 2

    def waveform(self, index):
        return self.sounds[index], 16000


def rms(sound):
    return sound.square().mean().sqrt().item()


def test_noise_has_the_level_of_the_clip_or_20_db_below_full_scale():
    noise = Disturbed(Sounds(), "noise")
    assert rms(noise.waveform(0)[0]) == pytest.approx(rms(Sounds.sounds[0]), rel=0.02)
    assert rms(noise.waveform(1)[0]) == pytest.approx(0.1, rel=0.02)
    assert abs(torch.corrcoef(torch.stack([noise.waveform(0)[0], Sounds.sounds[0]]))[0, 1]) < 0.02


@pytest.mark.parametrize("decibel", [0, 20, 35])
def test_added_noise_has_the_ratio_that_was_asked_for(decibel):
    noisy = Disturbed(Sounds(), f"snr:{decibel}")
    added = noisy.waveform(0)[0] - Sounds.sounds[0]
    assert 20 * torch.log10(torch.tensor(rms(Sounds.sounds[0]) / rms(added))).item() == pytest.approx(decibel, abs=0.1)
    assert not noisy.waveform(1)[0].any()


@pytest.mark.parametrize("subset", ["s4", "ms3", "avss"])
def test_offscreen_sounds_come_from_clips_without_a_common_class(load, subset):
    dataset = load(subset, "test")
    heard, seen = dataset.sounding_classes(), dataset.visible_classes()
    assert all(heard) and all(seen)
    for index, partner in enumerate(Disturbed(dataset, "offscreen").partners):
        shared = [len(seen[index] & other) for place, other in enumerate(heard) if place != index]
        assert partner != index and len(seen[index] & heard[partner]) == min(shared)


def test_offscreen_without_known_classes_warns(own_root, load):
    root = own_root("ms3")
    (root / "toy_manifest.json").unlink()
    dataset = load("ms3", "test", root=root)
    with pytest.warns(UserWarning, match="the classes of ms3's clips are not known"):
        partners = Disturbed(dataset, "offscreen").partners
    assert all(partner != index for index, partner in enumerate(partners))


def test_offscreen_warns_where_all_clips_share_a_class():
    class Alike(Sounds):
        def sounding_classes(self):
            return [frozenset({"disc"}), frozenset({"disc", "star"})]

    with pytest.warns(UserWarning, match="2 of 2 clips share a class"):
        assert Disturbed(Alike(), "offscreen").partners == [1, 0]


def test_shuffled_uses_every_sound_once_and_fits_its_length(load):
    dataset = load("avss", "test")
    shuffled = Disturbed(dataset, "shuffled")
    assert sorted(shuffled.partners) == list(range(len(dataset)))
    assert all(partner != index for index, partner in enumerate(shuffled.partners))
    for index, partner in enumerate(shuffled.partners):
        sound, other = shuffled.waveform(index)[0], dataset.waveform(partner)[0]
        shared = min(len(sound), len(other))
        assert len(sound) == len(dataset.waveform(index)[0]) and torch.equal(sound[:shared], other[:shared])


def test_mixed_frames_are_those_of_the_pairing(load, tmp_path):
    dataset = load("s4", "test")
    mixed = Disturbed(dataset, "mix:3")
    mixed.save_pairing(tmp_path / "deep" / "pairing.json")
    frames = json.loads((tmp_path / "deep" / "pairing.json").read_text())["frames"]
    assert len(frames) == round(len(dataset) / 4)
    for name, swaps in frames.items():
        clip, true = mixed[dataset.names.index(name)], dataset[dataset.names.index(name)]
        assert len({swap["frame"] for swap in swaps}) == 3
        for swap in swaps:
            other = dataset[dataset.names.index(swap["clip"])]
            assert swap["clip"] != name and torch.equal(clip.frames[swap["frame"]], other.frames[swap["its_frame"]])
        for t in set(range(5)) - {swap["frame"] for swap in swaps}:
            assert torch.equal(clip.frames[t], true.frames[t])


def test_pairing_names_whose_sound_was_heard(load):
    dataset = load("s4", "test")
    shuffled = Disturbed(dataset, "shuffled")
    for name, other in shuffled.pairing["sounds"].items():
        clip, source = (names.index(n) for names, n in ((dataset.names, name), (dataset.names, other)))
        torch.testing.assert_close(shuffled[clip].log_mel[:4], dataset[source].log_mel[:4])
    assert shuffled.pairing["seed"] == 42 and shuffled.pairing["kind"] == "shuffled"


def test_disturbances_add_up(load):
    dataset = load("s4", "test")
    mixed = Disturbed(dataset, "mix:5")
    both = Disturbed(mixed, "silence")
    for index in range(len(dataset)):
        assert torch.equal(both[index].frames, mixed[index].frames)
        assert torch.allclose(both[index].log_mel, torch.tensor(SILENCE))


@pytest.mark.parametrize("kind", ["loud", "snr", "snr:x", "snr:nan", "silence:2", "mix:"])
def test_unknown_kinds_are_refused(kind):
    with pytest.raises(ValueError, match="kind: expected one of"):
        Disturbed(Sounds(), kind)


def test_sounds_from_log_mel_files_cannot_be_disturbed(load):
    dataset = load("s4", "test", audio_source="pkl")
    with pytest.raises(ValueError, match="silence needs data.audio_source wav, got pkl"):
        Disturbed(dataset, "silence")
    assert len(Disturbed(dataset, "mix:1")) == len(dataset)


# --- sounds that belong to nothing, in training ----------------------------------------------------------------------


@pytest.mark.parametrize("subset", ["s4", "ms3", "avss"])
def test_a_share_of_the_training_clips_gets_a_sound_that_belongs_to_nothing(load, subset):
    plain, mixed = load(subset, "train"), load(subset, "train", negatives=0.5)
    seen = set()
    for epoch in range(8):
        mixed.set_epoch(epoch)
        for index in range(len(plain)):
            clip, true = mixed[index], plain[index]
            for name in ("frames", "frame_mask", "label_mask"):
                assert torch.equal(getattr(clip, name), getattr(true, name))
            if clip.negative:
                assert not clip.masks.any() and torch.equal(clip.own_log_mel, true.log_mel)
                assert not torch.equal(clip.log_mel, true.log_mel)
                assert not clip.log_mel[~clip.frame_mask].any()
            else:
                assert torch.equal(clip.masks, true.masks) and torch.equal(clip.log_mel, true.log_mel)
                assert clip.own_log_mel is None
            seen.add((epoch, index, clip.negative))
            assert true.negative is None
    share = sum(negative for *_, negative in seen) / len(seen)
    assert 0.25 < share < 0.75 and len({index for _, index, negative in seen if negative}) == len(plain)


def test_negatives_depend_on_seed_epoch_and_clip_alone(load):
    def draw(seed, epoch, order):
        dataset = load("ms3", "train", negatives=0.6)
        dataset.seed = seed
        dataset.set_epoch(epoch)
        return {index: dataset[index] for index in order}

    first, again = draw(3, 2, range(5)), draw(3, 2, [4, 2, 0, 1, 3])
    for index, clip in first.items():
        assert clip.negative == again[index].negative and torch.equal(clip.log_mel, again[index].log_mel)
    for other in (draw(3, 1, range(5)), draw(4, 2, range(5))):
        assert any(not torch.equal(first[index].log_mel, other[index].log_mel) for index in first)


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_has_no_negatives(load, split):
    dataset = load("s4", split, negatives=0.9)
    assert all(dataset[index].negative is None for index in range(len(dataset)))


def test_a_batch_knows_its_negatives(load):
    from icf.data import collate
    dataset = load("s4", "train", negatives=0.5)
    clips = [dataset[index] for index in range(len(dataset))]
    batch = collate(clips)
    assert batch.negative.tolist() == [clip.negative for clip in clips]
    for own, clip in zip(batch.own_log_mel, clips, strict=True):
        assert torch.equal(own, clip.own_log_mel if clip.negative else clip.log_mel)
    ordinary = collate([clip for clip in clips if not clip.negative])
    assert not ordinary.negative.any() and ordinary.own_log_mel is None
    assert collate([load("s4", "train")[0]]).negative is None


class Many(Sounds):
    """Six clips, two of a class."""

    names = list("abcdef")
    sounds = [(0.1 + 0.1 * i) * torch.sin(torch.arange(80000) * (0.02 + 0.03 * i)) for i in range(6)]
    classes = [frozenset({name}) for name in ("dog", "dog", "cat", "cat", "car", "car")]

    def __len__(self):
        return 6

    def frame_count(self, index):
        return 5

    def sounding(self, index):
        return self.classes[index]

    visible = sounding


class Chosen:
    """A generator that chooses one kind and one level."""

    def __init__(self, kind, level, seed=0):
        self.rng, self.answers = np.random.default_rng(seed), [kind, level]

    def choice(self, of):
        assert self.answers[0] in of
        return self.answers.pop(0)

    def __getattr__(self, name):
        return getattr(self.rng, name)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", UNRELATED)
def test_unrelated_sounds_have_their_level_and_length(kind, level):
    sound = unrelated_sound(Many(), 0, Chosen(kind, level))
    assert sound.shape == (80000,) and sound.dtype == torch.float32
    assert rms(sound) == pytest.approx(0 if kind == "silence" else 10 ** (level / 20), rel=1e-3)


def test_pink_noise_falls_by_three_decibels_an_octave():
    power = torch.fft.rfft(unrelated_sound(Many(), 0, Chosen("pink", -20))).abs().square()
    octaves = [power[n:2 * n].mean().log10() * 10 for n in (500, 1000, 2000, 4000, 8000)]
    assert all(a - b == pytest.approx(3, abs=0.6) for a, b in zip(octaves, octaves[1:], strict=False))


@pytest.mark.parametrize("kind", ["offscreen", "babble"])
@pytest.mark.parametrize("seed", range(5))
def test_other_clips_share_no_class(kind, seed):
    sound = unrelated_sound(Many(), 0, Chosen(kind, -20, seed))
    heard = [abs(torch.corrcoef(torch.stack([sound, other]))[0, 1]) > 0.2 for other in Many.sounds]
    assert not heard[0] and not heard[1]
    assert sum(heard) == 1 if kind == "offscreen" else sum(heard) in (0, 3, 4)              # 0: five are not to be had


def test_what_is_seen_in_silence_is_not_heard_either():
    class Seen(Many):
        classes = [frozenset({name}) for name in ("dog", "dog", "cat", "cat", "cat", "car")]
        visible = lambda self, index: frozenset({"dog", "cat"})  # noqa: E731

    sound = unrelated_sound(Seen(), 0, Chosen("offscreen", -20))
    assert abs(torch.corrcoef(torch.stack([sound, Many.sounds[5]]))[0, 1]) > 0.99


def test_where_classes_are_not_known_no_other_clip_is_taken_alone():
    class Unknown(Many):
        classes = [frozenset()] * 6

    asked = []

    class Kinds(Chosen):
        def choice(self, of):
            asked.append(tuple(of))
            return super().choice(of)

    unrelated_sound(Unknown(), 0, Kinds("babble", -20))
    assert "offscreen" not in asked[0]


@pytest.mark.parametrize(("changes", "key"), [
    ({"data": {"negatives": 1.0}}, "data.negatives"), ({"data": {"negatives": -0.1}}, "data.negatives"),
    ({"data": {"negatives": 0.2, "audio_source": "pkl"}}, "data.negatives"),
    ({"data": {"negatives": 0.2}, "objective": {"mit": {"inject": "cross_attention"}}}, "data.negatives")])
def test_negatives_that_cannot_be_are_refused(changes, key):
    from icf.config import Config
    with pytest.raises(ValueError, match=f"{key}: expected"):
        Config.from_dict(changes)
