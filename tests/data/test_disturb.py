"""Disturbed clips: what changes, by how much, what stays, and that it is always the same."""
import json

import pytest
import torch

from icf.data.audio import SILENCE
from icf.data.disturb import Disturbed

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
    classes = dataset.sounding_classes()
    assert any(classes)
    for index, partner in enumerate(Disturbed(dataset, "offscreen").partners):
        assert partner != index and not classes[index] & classes[partner]


def test_offscreen_without_known_classes_warns(own_root, load):
    dataset = load("ms3", "test", root=own_root("ms3"))
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
