"""Frozen text towers: prompts with a learnable word in them, and ordinary texts, to features.

A prompt is a template such as ``a video of *``. It is tokenised once; when the tower runs, a hook on its token
embedding puts the learnable vectors where ``*`` stands. Ids, positions, masks and pooling stay those of a plain text.
"""
from __future__ import annotations

import copy
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from icf.files import read_json
from icf.objective.average import average
from icf.weights import in_short, read_weights, require_finite

TEMPLATES = {"video": "a video of *", "segment": "a segment of *", "frame": "a frame of *", "audio": "an audio of *"}
SLOT = "*"          # known to CLIP and RoBERTa: X-CLIP pools at the largest id, so no new token will do
NEUTRAL = "thing"
CONTEXT = 77        # tokens of an ordinary text: CLIP has no more positions, LAION trained CLAP with as many
CHUNK = 256         # ordinary texts per pass

KINDS = ("clip", "xclip", "clap", "laion_clap", "bert", "hash")
DEFAULTS = {"clip": "openai/clip-vit-base-patch32", "xclip": "microsoft/xclip-base-patch32",
            "clap": "laion/clap-htsat-unfused", "laion_clap": "630k-audioset-best.pt",
            "bert": "sentence-transformers/all-MiniLM-L6-v2", "hash": "0"}
CLASSES = {"clip": "CLIPTextModelWithProjection", "xclip": "XCLIPModel", "clap": "ClapTextModelWithProjection",
           "bert": "AutoModel"}

ABOUT = {"openai/clip-vit-base-patch32": "0.6 GB", "microsoft/xclip-base-patch32": "0.8 GB",
         "laion/clap-htsat-unfused": "0.6 GB", "lukewys/laion_clap": "1.9 GB", "roberta-base": "3 MB, a tokeniser",
         "sentence-transformers/all-MiniLM-L6-v2": "0.1 GB"}
"""What is fetched of repositories of the hub."""

LAION_REPOSITORY = "lukewys/laion_clap"
LAION_FILES = ("630k-best.pt", "630k-audioset-best.pt", "630k-fusion-best.pt", "630k-audioset-fusion-best.pt",
               "music_audioset_epoch_15_esc_90.14.pt", "music_speech_epoch_15_esc_89.25.pt",
               "music_speech_audioset_epoch_15_esc_89.98.pt")
LAION_TOKENIZER = "roberta-base"

DEEPEST = 200                                                               # layers of a text model
TOKENIZER_FILES = (("tokenizer.json", "vocab.json"), ("tokenizer.json", "merges.txt"))     # alternatives, best first
MODEL_FILES = (("config.json",), ("model.safetensors", "pytorch_model.bin"), *TOKENIZER_FILES)


class TextTower(nn.Module):
    """A frozen text tower. Its parameters need no gradient, but gradients pass through it to the slots.

    Args:
        net: token ids and attention mask [n,L] to features [n,out], with its token `embedding` and `out` as attributes.
        tokenizer: `ids(text)`, `word(text)` (without the marks of begin and end), `is_slot(id)`, and the ids `pad` and
            `largest`.
        templates: those that `forward` knows by number; each holds one `*`.

    Attributes:
        width: of the slot vectors.
        out: width of the features.
    """

    def __init__(self, net: nn.Module, tokenizer: HubTokenizer | HashTokenizer,
                 templates: Sequence[str] = tuple(TEMPLATES.values())):
        super().__init__()
        self.net = net
        self.tokenizer = tokenizer
        self.templates = tuple(templates)
        self.width: int = net.embedding.embedding_dim
        self.out: int = net.out
        self._prompts: dict[tuple, tuple[Tensor, Tensor]] = {}
        self._slots: tuple[Tensor, Tensor] | None = None                    # places and vectors, while a prompt is read
        self.net.embedding.register_forward_hook(self._fill)                # here, as torch.compile cannot in forward
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> TextTower:
        return super().train(False)

    def forward(self, slots: Tensor, template: str | int) -> Tensor:
        """slots: [k, slot_len, width] -> features [k, out] of the template with the slots in place of `*`, not
        normalised, in the dtype of the slots. Each vector of a slot takes the place of one word.

        Raises:
            ValueError: slots of another shape, or a template in which `*` is not one token.
        """
        if slots.ndim != 3 or slots.shape[2] != self.width:
            raise ValueError(f"slots: expected [k, slot_len, {self.width}], got {list(slots.shape)}")
        ids, places = self._prompt(template, slots.shape[1], slots.device)
        ids = ids.expand(len(slots), -1)
        self._slots = places, slots
        try:
            return self.net(ids, torch.ones_like(ids)).to(slots.dtype)
        finally:
            self._slots = None

    def _fill(self, module: nn.Module, arguments: tuple, embedded: Tensor) -> Tensor:
        if self._slots is None:                                             # an ordinary text
            return embedded
        places, slots = self._slots
        return embedded.index_copy(1, places, slots.to(embedded.dtype))

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Ordinary texts to float32 features [n, out], not normalised. A text ends after 77 tokens."""
        device = self.net.embedding.weight.device
        features = [torch.zeros(0, self.out, device=device)]
        for start in range(0, len(texts), CHUNK):
            rows = [torch.tensor(self.tokenizer.ids(text)) for text in texts[start:start + CHUNK]]
            ids = pad_sequence(rows, True, self.tokenizer.pad).to(device)
            mask = pad_sequence([torch.ones_like(row) for row in rows], True).to(device)
            features.append(self.net(ids, mask).float())
        return torch.cat(features)

    @torch.no_grad()
    def neutral(self) -> Tensor:
        """The mean embedding of the tokens of a neutral word, float32 [width]: where slots start from."""
        weight = self.net.embedding.weight
        return weight[torch.tensor(self.tokenizer.word(NEUTRAL), device=weight.device)].float().mean(0)

    @torch.compiler.assume_constant_result                                  # tokenisers cannot be traced
    def _prompt(self, template: str | int, slot_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Ids [1,L] and the places [slot_len] of the slot among them."""
        text = template if isinstance(template, str) else self.templates[template]
        key = text, slot_len, device
        if key not in self._prompts:
            if text.count(SLOT) != 1:
                raise ValueError(f"template: expected one {SLOT!r} in it, got {text!r}")
            ids = self.tokenizer.ids(text.replace(SLOT, " ".join([SLOT] * slot_len)))
            places = [place for place, token in enumerate(ids) if self.tokenizer.is_slot(token)]
            if not slot_len or len(places) != slot_len:
                raise ValueError(f"template: expected {SLOT!r} to be a word of its own in {text!r} and to be known to "
                                 f"the tokeniser, which finds {len(places)} for a slot of {slot_len}")
            with torch.inference_mode(False):                               # kept for training also
                self._prompts[key] = torch.tensor([ids], device=device), torch.tensor(places, device=device)
        return self._prompts[key]


def text_tower(kind: str, weights: str | nn.Module = "default", dtype: torch.dtype = torch.float32,
               key: str = "model.mit.text", templates: Sequence[str] = tuple(TEMPLATES.values())) -> TextTower:
    """Build a tower.

    Args:
        kind: `clip`, `xclip`, `clap` (through transformers), `laion_clap` (LAION's own checkpoints), `bert` (any
            sentence encoder of transformers with BERT's interface) or `hash` (tiny, random, needs no file).
        weights: `default`, or
            for `clip`, `xclip`, `clap`, `bert` a name on the Hugging Face hub, or a local folder in that format;
            for `laion_clap` the name of a published file, a local `.pt` (RoBERTa's tokeniser files beside it are used,
            else `roberta-base` from the hub), or a `laion_clap.CLAP_Module`, whose text part is copied;
            for `hash` a seed.
        dtype: of the parameters, and so of the work where no autocast says otherwise.
        key: the configuration key that an error names.
        templates: see `TextTower`.

    Raises:
        ValueError: unknown kind, weights that do not fit it or cannot be used, or a package that is not installed.
        FileNotFoundError: a folder that lacks a file.
        ConnectionError: weights that are neither here nor can be fetched.
    """
    if kind not in KINDS:
        raise ValueError(f"{key}: expected one of {', '.join(KINDS)}, got {kind!r}")
    if isinstance(weights, str):
        weights = DEFAULTS[kind] if weights == "default" else os.path.expanduser(weights)
    if kind == "hash":
        net, tokenizer = HashNet(_seed(weights, key)), HashTokenizer()
    elif kind == "laion_clap":
        net, tokenizer = _laion(weights, key)
    else:
        net, tokenizer = _from_transformers(kind, weights, key)
    require_finite(f"{key}: {weights}", dict(net.named_parameters()))
    if tokenizer.largest >= net.embedding.num_embeddings:
        raise ValueError(f"{key}: {weights} has {net.embedding.num_embeddings} tokens, its tokeniser more")
    tower = TextTower(net.to(dtype), tokenizer, templates)
    try:
        finite = tower.encode([NEUTRAL]).isfinite().all()
    except Exception as error:                      # settings that are read without a check, wherever they are used
        raise ValueError(f"{key}: {weights} cannot read a text ({in_short(error)})") from error
    if not finite:
        raise ValueError(f"{key}: {weights} makes a text of values that are not finite")
    return tower


def require_towers(specs: Mapping[str, str]) -> None:
    """Raise one ConnectionError for all files of towers that are neither here nor can be fetched, before any is read.

    Args:
        specs: `kind` or `kind:weights` of each tower, by the key that an error names.
    """
    missing: dict[str, list[str]] = {}
    for key, spec in specs.items():
        kind, _, weights = spec.partition(":")
        for name, wanted in _repositories(kind, os.path.expanduser(weights or DEFAULTS.get(kind, ""))):
            with suppress(ValueError):                                      # of a name that the hub can have none of:
                if _cached(name, wanted) is None:                           # told where the tower is read
                    missing.setdefault(name, []).append(key)
    reason = _unreachable(next(iter(missing))) if missing else ""
    if reason:
        said = [f"{name} ({f'about {ABOUT[name]}, ' if name in ABOUT else ''}{' and '.join(keys)})"
                for name, keys in missing.items()]
        raise ConnectionError(
            f"text towers: {', '.join(said)}: no local folder, not in the cache of the Hugging Face hub, and cannot be "
            f"fetched from there ({reason}); with a network, `hf download NAME` fills the cache, which HF_HOME moves "
            "and HF_HUB_OFFLINE=1 reads alone; or give a local folder, as clip:FOLDER; or hash, a small tower that "
            "needs no file, for tests")


def _repositories(kind: str, weights: str) -> list[tuple[str, Sequence[Sequence[str]]]]:
    """Repositories of the hub that a tower is read from, and the files wanted of each; none for local files."""
    if kind in CLASSES:
        return [] if Path(weights).is_dir() else [(weights, MODEL_FILES)]
    if kind == "laion_clap" and not Path(weights).is_file() and weights in LAION_FILES:
        return [(LAION_REPOSITORY, [[weights]]), (LAION_TOKENIZER, TOKENIZER_FILES)]
    return []


def _cached(name: str, wanted: Sequence[Sequence[str]]) -> Path | None:
    """The folder of a repository in the hub's cache; None if it lacks a file.

    Raises:
        huggingface_hub.errors.HFValidationError: the hub can have none of that name.
    """
    import huggingface_hub as hub
    try:
        folder = Path(hub.snapshot_download(name, local_files_only=True))
    except OSError:
        return None
    return None if _lacking({path.name for path in folder.iterdir()}, wanted) else folder


def _unreachable(name: str) -> str:
    """Why the hub cannot be asked about a repository; empty if it answers, be it with an error."""
    import huggingface_hub as hub
    try:
        hub.model_info(name, timeout=10)
    except hub.errors.HfHubHTTPError:
        return ""
    except Exception as error:
        return in_short(error)
    return ""


# --- towers of transformers ------------------------------------------------------------------------------------------


class ProjectedText(nn.Module):
    """A text model of transformers and the projection of its pooled output."""

    def __init__(self, model: nn.Module, projection: nn.Module):
        super().__init__()
        self.model = model
        self.projection = projection
        self.out: int = [layer for layer in projection.modules() if isinstance(layer, nn.Linear)][-1].out_features

    @property
    def embedding(self) -> nn.Embedding:
        table = self.model.embeddings
        return table.token_embedding if hasattr(table, "token_embedding") else table.word_embeddings

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask: [n,L] int64 -> [n,out]."""
        return self.projection(self.model(input_ids=ids, attention_mask=mask).pooler_output)


class SentenceText(nn.Module):
    """A sentence encoder of transformers: the `mean` of its tokens, or the first, `cls`."""

    def __init__(self, model: nn.Module, pooling: str):
        super().__init__()
        self.model = model
        self.pooling = pooling
        self.out: int = model.config.hidden_size

    @property
    def embedding(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask: [n,L] int64 -> [n,out]."""
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return states[:, 0] if self.pooling == "cls" else average(states, mask.bool())[:, 0]


def _pooling(folder: Path, weights: str, key: str) -> str:
    """`mean` or `cls`, as the folder's `1_Pooling/config.json` of sentence-transformers says; mean without one."""
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean"
    try:
        modes = {name.removeprefix("pooling_mode_") for name, on in read_json(path).items()
                 if name.startswith("pooling_mode_") and on}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{key}: {path} cannot be read as a pooling ({in_short(error)})") from error
    known = {("mean_tokens",): "mean", ("cls_token",): "cls"}
    if tuple(modes) not in known:
        raise ValueError(f"{key}: expected the pooling of {weights} to be mean or cls, got "
                         f"{', '.join(sorted(modes)) or 'none'}")
    return known[tuple(modes)]


class HubTokenizer:
    """What a tower needs of a tokeniser of transformers."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.pad: int = tokenizer.pad_token_id
        self.largest: int = max(tokenizer.get_vocab().values())

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, truncation=True, max_length=CONTEXT)["input_ids"]

    def word(self, text: str) -> list[int]:
        return self.tokenizer(f" {text}", add_special_tokens=False)["input_ids"]    # RoBERTa's words begin with a blank

    def is_slot(self, token: int) -> bool:
        return self.tokenizer.decode([token]).strip() == SLOT


def _from_transformers(kind: str, weights: str, key: str) -> tuple[ProjectedText, HubTokenizer]:
    transformers = _transformers(kind, key)
    folder = _folder(weights, MODEL_FILES, key)
    try:
        config = read_json(folder / "config.json")
        family = config["model_type"].split("_")[0]                                 # clip_text_model: clip
        layers = config.get("text_config", config).get("num_hidden_layers", 0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{key}: {weights} has no config.json of a transformers model") from error
    if family != kind and kind != "bert":
        raise ValueError(f"{key}: {weights} holds a model of type {family}, expected {kind}")
    if isinstance(layers, int) and layers > DEEPEST:                                # all are made before one is read
        raise ValueError(f"{key}: {weights} has {layers} layers, expected at most {DEEPEST}")
    try:
        with _quiet(transformers):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model, report = getattr(transformers, CLASSES[kind]).from_pretrained(
                folder, local_files_only=True, weights_only=True, dtype=torch.float32, output_loading_info=True)
    except Exception as error:
        raise ValueError(f"{key}: {weights} cannot be read as {kind} ({in_short(error)})") from error
    missing = sorted(name for name in report["missing_keys"]
                     if name.startswith("text_") or kind == "bert" and not name.startswith("pooler."))
    if missing:
        raise ValueError(f"{key}: {weights} does not fit {kind}: it lacks {len(missing)} weights, {missing[0]} first")
    if kind == "bert":
        if not isinstance(getattr(model.config, "hidden_size", None), int):
            raise ValueError(f"{key}: {weights} holds a model of type {family}, expected an encoder of sentences")
        return SentenceText(model, _pooling(folder, weights, key)), HubTokenizer(tokenizer)
    return ProjectedText(model.text_model, model.text_projection), HubTokenizer(tokenizer)


def _transformers(kind: str, key: str):
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"{key}: {kind!r} needs the package transformers, which cannot be imported "
                         f"({in_short(error)}); pip install transformers") from error
    return transformers


@contextmanager
def _quiet(transformers) -> Iterator[None]:
    """Without the notes on a checkpoint's other towers, which are left out on purpose, and without progress bars."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _folder(name: str, wanted: Sequence[Sequence[str]], key: str) -> Path:
    """A local folder as it is, or a repository of the hub as its folder in the hub's cache, fetched where need be.

    Only the cache is asked first, and one request decides whether the hub can be reached: its client would try each
    file again and again. `wanted`: files, each with its alternatives.
    """
    if Path(name).is_dir():
        lacking = _lacking({path.name for path in Path(name).iterdir()}, wanted)
        if lacking:
            raise FileNotFoundError(f"{key}: the folder {name!r} has no {lacking}")
        return Path(name)
    import huggingface_hub as hub
    try:
        if folder := _cached(name, wanted):
            return folder
    except hub.errors.HFValidationError as error:
        raise FileNotFoundError(f"{key}: there is no folder {name!r}, nor can the hub have one of that name") from error
    try:
        files = {entry.rfilename for entry in hub.model_info(name, timeout=10).siblings}
        chosen = [next(file for file in group if file in files) for group in wanted if files & set(group)]
        lacking = _lacking(files, wanted)
        folder = None if lacking else hub.snapshot_download(name, allow_patterns=[*chosen, "*.json", "*.txt"])
    except Exception as error:
        raise ConnectionError(f"{key}: {name!r} is no local folder, is not in the cache of the Hugging Face hub and "
                              f"cannot be fetched from there ({in_short(error)}); give a local folder") from error
    if lacking:
        raise FileNotFoundError(f"{key}: the hub's {name!r} has no {lacking}")
    return Path(folder)


def _lacking(files: set[str], wanted: Sequence[Sequence[str]]) -> str:
    """The first group of which there is no file, in words; empty if there is none."""
    return next((" or ".join(group) for group in wanted if not files & set(group)), "")


# --- LAION's checkpoints ---------------------------------------------------------------------------------------------


def _laion(weights: str | nn.Module, key: str) -> tuple[ProjectedText, HubTokenizer]:
    """LAION-CLAP's text branch: RoBERTa, and two linear layers on its pooled output.

    Their package is not needed: importing it fetches three tokenisers, and it wants numpy < 2.
    """
    if isinstance(weights, nn.Module):
        return _from_clap_module(weights, key)
    transformers = _transformers("laion_clap", key)
    path = Path(weights)
    if not path.is_file() and weights in LAION_FILES:
        path = _folder(LAION_REPOSITORY, [[weights]], key) / weights
    with torch.serialization.safe_globals(_numpy_scalars()):
        state = read_weights(key, str(path))
    beside = {file.name for file in path.parent.iterdir()}
    folder = _folder(LAION_TOKENIZER, TOKENIZER_FILES, key) if _lacking(beside, TOKENIZER_FILES) else path.parent
    try:
        tokenizer = transformers.RobertaTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(f"{key}: {folder} cannot be read as RoBERTa's tokeniser ({in_short(error)})") from error
    try:
        state = {name.removeprefix("module."): value for name, value in state.items()}
        branch, projection = _part(state, "text_branch."), _part(state, "text_projection.")
        branch.pop("embeddings.position_ids", None)                         # stored by older transformers only
        model = transformers.RobertaModel(_roberta_config(transformers, branch))
        model.load_state_dict(branch)
        head = nn.Sequential(*(_linear(projection, place) for place in (0, 2)))
        head.insert(1, nn.ReLU())
        head.load_state_dict(projection)
    except (KeyError, RuntimeError, ValueError, TypeError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{key}: {weights} holds something other than a CLAP of LAION with RoBERTa "
                         f"({in_short(error)})") from error
    return ProjectedText(model, head), HubTokenizer(tokenizer)


def _from_clap_module(module: nn.Module, key: str) -> tuple[ProjectedText, HubTokenizer]:
    model = getattr(module, "model", None)
    if getattr(model, "text_branch_type", None) != "roberta":
        raise ValueError(f"{key}: expected a laion_clap.CLAP_Module with tmodel='roberta', got {type(module).__name__}")
    return (ProjectedText(copy.deepcopy(model.text_branch), copy.deepcopy(model.text_projection)),
            HubTokenizer(module.tokenize))


def _numpy_scalars() -> list[Callable | tuple[Callable, str]]:
    """LAION's files also hold the numbers of their evaluation, as numpy's scalars: data, no code."""
    import numpy
    scalar = numpy.float64(0).__reduce__()[0]
    return [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar"), numpy.dtype,
            type(numpy.dtype("f8")), type(numpy.dtype("f4")), type(numpy.dtype("i8"))]


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _linear(state: dict[str, Tensor], place: int) -> nn.Linear:
    out, width = state[f"{place}.weight"].shape
    return nn.Linear(width, out)


def _roberta_config(transformers, state: dict[str, Tensor]):
    """RoBERTa's configuration by the shapes of its weights; what these do not tell is that of `roberta-base`."""
    vocabulary, width = state["embeddings.word_embeddings.weight"].shape
    layers = {int(found[1]) for name in state if (found := re.match(r"encoder\.layer\.(\d+)\.", name))}
    return transformers.RobertaConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=len(layers),
        num_attention_heads=max(1, width // 64),
        intermediate_size=len(state["encoder.layer.0.intermediate.dense.bias"]), layer_norm_eps=1e-5,
        max_position_embeddings=len(state["embeddings.position_embeddings.weight"]),
        type_vocab_size=len(state["embeddings.token_type_embeddings.weight"]))


# --- the tiny tower --------------------------------------------------------------------------------------------------


class HashNet(nn.Module):
    """A random transformer over hashed words, the same for the same seed on every machine: 2 layers, 64 to 512.

    It stands in for the real towers where there are no files: it tells texts apart and passes gradients, and knows
    nothing about their meaning.
    """

    BUCKETS, WIDTH, LAYERS = 4096, 64, 2

    def __init__(self, seed: int):
        super().__init__()
        self.out = 512
        self.embedding = nn.Embedding(self.BUCKETS, self.WIDTH)
        self.position = nn.Embedding(CONTEXT, self.WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(self.WIDTH, 4, 4 * self.WIDTH, dropout=0.0, activation="gelu", batch_first=True,
                                       norm_first=True) for _ in range(self.LAYERS))
        self.norm = nn.LayerNorm(self.WIDTH)
        self.projection = nn.Linear(self.WIDTH, self.out, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                std = 0.02 if "embedding" in name or "position" in name else parameter.shape[1] ** -0.5
                nn.init.normal_(parameter, std=std, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask: [n,L] int64 -> [n,512]: the mean over the words."""
        x = self.embedding(ids) + self.position.weight[:ids.shape[1]]
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=mask == 0)
        weight = mask.to(x.dtype)[..., None]
        return self.projection(self.norm((x * weight).sum(1) / weight.sum(1)))


class HashTokenizer:
    """Lower-case words to one of HashNet's buckets; 0 pads, 1 ends every text, and 2 is the slot."""

    pad = 0
    largest = HashNet.BUCKETS - 1

    def ids(self, text: str) -> list[int]:
        return [*self.word(text)[:CONTEXT - 1], 1]

    def word(self, text: str) -> list[int]:
        return [2 if word == SLOT else 3 + zlib.crc32(word.encode()) % (HashNet.BUCKETS - 3)
                for word in re.findall(r"\w+|[^\w\s]", text.lower())]

    def is_slot(self, token: int) -> bool:
        return token == 2


def _seed(weights: str, key: str) -> int:
    if not str(weights).isdecimal():
        raise ValueError(f"{key}: expected a seed, 0 or more, as the weights of the hash tower, got {weights!r}")
    return int(weights)
