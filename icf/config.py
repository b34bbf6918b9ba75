"""Every setting of a run, with its default. The command line and the YAML files of `configs/` fill these dataclasses.

Defaults marked *(paper)* are given by the paper, *(COMBO)* come from COMBO-AVS, on which the paper builds, and *(ours)*
fill a gap of the paper; what is not marked follows from the data sets.
"""
from __future__ import annotations

from argparse import ArgumentError
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Literal, get_args

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from icf.files import read_yaml

# What changes no result.
FREE = ("out", "data.workers", "data.cache", "train.log_every", "train.save_every", "train.trackers", "eval.batch")
SUBSETS = ("s4", "ms3", "avss", "folder")
Subset = Literal["s4", "ms3", "avss", "folder"]


@dataclass
class ToyConfig:
    """The embedded benchmark, written below `data.root` when that folder does not exist yet.

    Args:
        size: number of clips, see `icf data toy --help`.
        seed: every clip is drawn from (seed, subset, split, index).
        bias: probability that the salient shape is the one that sounds, in the training and validation splits.
        visible: smallest and largest number of shapes in a clip.
        gap: how much the salient shape stands out in size, contrast and speed: 0 not at all, 1 strongly.
        val_bias: bias of the validation split where it differs.
        clips: numbers of train, val and test clips in place of those of `size`.
    """

    size: Literal["tiny", "small", "full"] = "small"
    seed: int = 0
    bias: float = 0.9
    visible: tuple[int, int] = (2, 3)
    gap: float = 1.0
    val_bias: float | None = None
    clips: tuple[int, int, int] | None = None


@dataclass
class ComposeConfig:
    """A benchmark composed of public data, written below `data.root` when it is not there yet; `icf data compose`.

    Args:
        pictures: Pascal VOC, COCO or DAVIS, or a folder of such folders; not needed once the clips are there.
        sounds: ESC-50, VGGSound, a folder per class, or a folder of the first two; as `pictures`.
        clips: numbers of train, val and test clips.
        size: side of the square frames in pixels.
        seed: every clip is drawn from (seed, split, index).
        bias: probability that the most salient of several objects is one that sounds, in the training split; in the
            others it is so by chance.
        classes: YAML file that adds to the built-in map of sounds to classes, or replaces it; see
            `icf/data/compose/classes.yaml`.
    """

    pictures: Path | None = field(default=None, compare=False)  # the same clips, wherever their sources were
    sounds: Path | None = field(default=None, compare=False)
    clips: tuple[int, int, int] = (900, 80, 240)
    size: int = 224
    seed: int = 0
    bias: float = 0.7
    classes: Path | None = None


@dataclass
class DataConfig:
    """Which clips are read, and how.

    Args:
        root: the folder that holds `Single-source/`, `Multi-sources/` or `AVSBench_semantic/`, or one of these itself.
        subset: `s4`, `ms3`, `avss`, or `folder` for own labelled clips.
        size: side of the square frames given to the model, in pixels (paper: 224).
        frames: frames per clip, one per second (paper: 5; AVSS 10).
        supervision: `auto` reads which frames of a split are labelled from the data set; `first` and `all` force it.
        audio_source: `wav`, or `pkl` for the distributed log-mel files (read by a restricted unpickler).
        audio_timing: `vggish` takes windows every 0.96 s as published; `aligned` one per second.
        augmentation: `none` (paper), `flip` (left and right), or `combo`: scale, crop, flip and colour, as COMBO-AVS.
        workers: loader processes; `null` chooses by the number of cores.
        cache: keep what was read in memory that the workers share: log-mels, frames and labels, each if all of a split
            take less than 1 GiB.
        negatives: share of the training clips that get a sound that belongs to nothing in them, and empty masks
            *(ours, after AVSBench-Robust)*: silence, white or pink noise, voices of several other clips at once, or the
            sound of a clip of another class, at several levels, drawn from (seed, epoch, clip).
        replaced_audio: a folder with `<clip>.wav` for every training clip, what could sound instead, for
            `objective.sc.generator: audio_replacement`.
        captions: JSON file, `{clip: [caption, ...]}` for every training clip, equally many each, of which objects were
            replaced, for `objective.sc.generator: text_revision`.
        toy: set, the data is the toy benchmark, generated when it is missing.
        compose: set, the data is composed of public pictures and sounds when it is missing.
    """

    root: Path = Path("data/avsbench")
    subset: Subset = "s4"
    size: int = 224
    frames: int = 5
    supervision: Literal["auto", "first", "all"] = "auto"
    audio_source: Literal["wav", "pkl"] = "wav"
    audio_timing: Literal["vggish", "aligned"] = "vggish"
    augmentation: Literal["none", "flip", "combo"] = "none"
    workers: int | None = None
    cache: bool = True
    negatives: float = 0.0
    replaced_audio: Path | None = None
    captions: Path | None = None
    toy: ToyConfig | None = None
    compose: ComposeConfig | None = None


@dataclass
class VisualConfig:
    """The visual encoder: any timm model with a four-level feature pyramid at strides 4, 8, 16, 32.

    Args:
        name: timm's name: `pvt_v2_b5` or `resnet50.tv_in1k` *(paper)*.
        weights: `imagenet` (through timm, needs a network once), a local file, or `none` for a seeded random start.
        freeze_norm: BatchNorm keeps its stored statistics *(ours: the frames of a batch are correlated)*.
    """

    name: str = "pvt_v2_b5"
    weights: str = "imagenet"
    freeze_norm: bool = True


@dataclass
class AudioConfig:
    """The sound encoder.

    Args:
        weights: a local `vggish-10086976.pth`, `download` (torch.hub, needs a network once), or `none`; of YAMNet
            torch_audioset's `yamnet.pth`, or a `.safetensors` or `.npz` of its arrays. Its features pass a LayerNorm
            before the decoder hears them, and before they are matched to text *(ours; without it a network trained from
            nothing goes deaf)*.
        width: multiplies the channels of every layer but VGGish's last; 1 is the published network.
        train: train it; otherwise it stays frozen *(COMBO)*.
        standardise: its features in standard deviations from their running means, before that LayerNorm *(ours; those
            of a random network are alike for all sounds, and some networks that start from nothing never listen)*.
        name: `vggish` *(paper)*, or `yamnet` *(ours)*, whose features a LayerNorm and a linear layer, both learned,
            bring to VGGish's width: 3 instead of 72 million weights, a twelfth of the work.
    """

    weights: str = "download"
    width: float = 1.0
    train: bool = False
    standardise: bool = False
    name: Literal["vggish", "yamnet"] = "vggish"


@dataclass
class ContextConfig:
    """Spatio-temporal channel attention, Eq. 1-2.

    The temperature of Eq. 1, which the paper does not give, is sqrt(H W) times a learned factor *(ours)*; the result
    passes a convolution that starts at zero *(ours)*.

    Args:
        levels: whose output feeds the decoder: `video` attends over all channels of a clip, `frame` within a frame.
        dim: channels attended over, per frame *(ours; the paper would need up to 1.7 GB a clip)*.
        literal_product: the printed `V A` instead of `(A V^T)^T`, whose columns do not sum to one.
    """

    levels: tuple[Literal["video", "frame"], ...] = ("video", "frame")
    dim: int = 256
    literal_product: bool = False


@dataclass
class DecoderConfig:
    """Pixel decoder, audio-visual queries and mask decoder, as in Mask2Former and COMBO-AVS *(COMBO)*.

    Args:
        dim: model width.
        pixel_layers: layers of multi-scale deformable attention.
        pixel_ffn: width inside their feed-forward networks.
        layers: layers of masked cross-attention; each, and the initial queries, has a supervised head.
        ffn: width inside their feed-forward networks.
        heads: of attention.
        points: that deformable attention samples per head and level.
        queries: learnable queries.
        query_mode: `bidirectional` *(paper)* | `audio` (queries get the sound as it is) | `learnable` (no sound).
        audio_keys: sound that the pixels attend to: the clip's seconds and a learned null token, or their `own` second.
        head: `dense` for one foreground, the mean of the queries' masks weighted by a softmax over the queries *(ours;
            the paper does not say how masks become one)*; `mask2former` for classes; `auto` by the number of classes.
    """

    dim: int = 256
    pixel_layers: int = 6
    pixel_ffn: int = 1024
    layers: int = 9
    ffn: int = 2048
    heads: int = 8
    points: int = 4
    queries: int = 100
    query_mode: Literal["bidirectional", "audio", "learnable"] = "bidirectional"
    audio_keys: Literal["clip_null", "own"] = "clip_null"
    head: Literal["auto", "dense", "mask2former"] = "auto"


@dataclass
class LossConfig:
    """The segmentation loss: weights of Eq. 18, all 1 in the paper, which gives no more than the names of its terms.

    Args:
        preset: of matched masks (`mask2former`): `paper`, or `combo`, COMBO-AVS' weights (cross entropy of classes 2,
            BCE 5, dice 5). Queries without a mask weigh .1 in the class term, and matching costs are 2 class, 5 BCE,
            5 dice *(COMBO)*.
        bce: binary cross entropy of masks.
        dice: of masks, with 1 added above and below *(ours)*.
        focal: of the dense head's pixels, the sigmoid focal loss with alpha .25, gamma 2; of classes, as they are read
            by a softmax, the softmax focal loss (1 - p)^2 (-log p), without alpha *(ours; a sigmoid focal loss trains
            what nothing reads)*.
        deep_supervision: the initial queries and every layer are supervised, all alike *(COMBO)*.
    """

    preset: Literal["paper", "combo"] = "paper"
    bce: float = 1.0
    dice: float = 1.0
    focal: float = 1.0
    deep_supervision: bool = True


@dataclass
class ModelConfig:
    """The network.

    Args:
        classes: 1 for a single foreground (S4, MS3), else all classes with background (AVSS: 71).
        network: `icf`, or a model of others to which the objective may be added (Table 3): `tpavi`, AVSBench's, or
            `avsegformer`. Of `decoder`, TPAVI takes `dim`, AVSegFormer the sizes; `context` is that of the objective.
    """

    classes: int = 1
    visual: VisualConfig = field(default_factory=VisualConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    network: Literal["icf", "tpavi", "avsegformer"] = "icf"


@dataclass
class MITConfig:
    """Multi-granularity implicit text, Eq. 3-5: pseudo-words in prompts, read by frozen text towers, and matched.

    A tower is `clip`, `xclip`, `clap`, `laion_clap`, `bert` (any sentence encoder of transformers, all-MiniLM-L6-v2 by
    default) or `hash` (a small local one, for tests and the toy), with a hub name or a folder of weights after a colon
    if not the default: `clip:openai/clip-vit-base-patch16`.

    What is matched are means over the frames of a level and their pixels of the two coarsest maps, projected *(ours)*;
    the gates of Eq. 5 are three-layer MLPs that end in a sigmoid *(ours)*.

    Args:
        enabled: off, SC is off too, and CDCL contrasts sight and sound alone.
        levels: granularities of the visual text.
        frame: tower of frames *(paper: CLIP)*.
        video: tower of videos and segments *(paper: VideoCLIP, whose weights are not to be had; X-CLIP stands in)*.
        audio: tower of sounds *(paper: CLAP)*.
        precision: of the towers' weights.
        dim: width of texts, which the towers must share.
        texts: pseudo-words per level *(paper: 15 in the table of its supplement, 30 in the text)*.
        slot_len: learned vectors per pseudo-word *(ours)*.
        match: `st_top1`, the best match with a straight-through gradient *(ours)*; `hard`, gradient to the chosen text
            alone; `mean`, Eq. 3 as printed, whose mean over all texts selects nothing.
        standardise: compare a feature with a text by how much closer they are than features usually are to that text,
            in standard deviations *(ours)*. Prompts of one template are alike, and so are features of one encoder: as
            printed, nearly all sounds match one text.
        match_tau: temperature of the straight-through gradient *(ours)*, of what is compared: standard deviations (1 if
            `null`), or cosines where not `standardise` (.07).
        fuse: weight of a text in Eq. 4: `query`, a learned query against the text *(ours)*; `level_scalar`, one number
            a level *(ours)*.
        softmax: what the weights of Eq. 4 sum to one over: the texts that speak of a `second`, so that the text varies
            in time *(ours)*; or all texts of the `clip`, as printed, one text for all seconds.
        z_mode: composite text `per_frame`, or `pooled` over the clip, which makes its Gaussian a point.
        parts: a segment is 1 / parts of the clip, rounded up *(paper: 2; AVSS 4)*.
        stride: frames between segments, `null` for their length; the last is completed backwards *(ours)*.
        inject: `cross_attention` lets the decoder's queries read the text *(paper: in ablations without CDCL)*; the
            model then needs the learned texts, though no tower, at test time.
        inversion_weight: of Eq. 3 read as an objective *(ours)*.
        diversity_weight: of the squares of the texts' mutual cosines *(ours)*.
    """

    enabled: bool = True
    levels: tuple[Literal["video", "segment", "frame"], ...] = ("video", "segment", "frame")
    frame: str = "clip"
    video: str = "xclip"
    audio: str = "clap"
    precision: Literal["fp32", "bf16"] = "fp32"
    dim: int = 512
    texts: int = 15
    slot_len: int = 1
    match: Literal["st_top1", "hard", "mean"] = "st_top1"
    standardise: bool = True
    match_tau: float | None = None
    fuse: Literal["query", "level_scalar"] = "query"
    softmax: Literal["second", "clip"] = "second"
    z_mode: Literal["per_frame", "pooled"] = "per_frame"
    parts: int = 2
    stride: int | None = None
    inject: Literal["none", "cross_attention"] = "none"
    inversion_weight: float = 0.0
    diversity_weight: float = 0.0


@dataclass
class SCConfig:
    """Semantic counterfactuals, Eq. 6-12.

    To Eq. 11 is added, with weight 1, what the texts lose by the latent space: 1 - cos(decoded, text) *(ours; the paper
    names no autoencoder, nor what trains it)*.

    Args:
        enabled: make counterfactuals; needs MIT.
        generator: where counterfactual texts come from. `diffusion`: the paper's latent diffusion. Its ablations:
            `feature` adds noise to the text itself and rotates it, and denoises nothing; `vqvae` quantises the rotated
            latent; `pair_swap` exchanges sounds or pictures between clips; `audio_replacement` takes sounds of
            `data.replaced_audio`, else of another clip of the batch; `text_revision` takes `data.captions`. Of these
            three, texts that say the same as the clip's own are no negatives *(ours)*. `dropout` (random features set
            to zero) and `residual` (the sound orthogonal to the picture as a negative of vision and sound) are from a
            third-party summary of the paper.
        latent: `linear`, a learned projection to `dim`, or `identity` *(ours; the paper names no autoencoder)*.
        latent_norm: `layer`, norm sqrt(dim), so that the schedule's signal-to-noise ratio holds, or `unit` *(ours)*.
        dim: width of the latent space *(ours)*.
        blocks: of dimensions that are rotated each by itself *(ours)*.
        mode: factors of the degree: `inter` (m), `intra` (s), or `both`.
        alpha: interval of the degree alpha *(paper)*.
        alpha_learnable: learn a degree per candidate inside the interval.
        floor: least m and s *(ours)*.
        candidates: counterfactuals that are made per clip *(ours; the paper does not say)*.
        keep: how many of the closest are kept *(paper: 8)*.
        start: diffusion step at which the text is rotated *(paper: 200)*.
        steps: of the diffusion *(ours)*.
        ddim_steps: from there to a clean text *(ours)*.
        beta: schedule *(ours)*.
        part: of the text that is rotated: `all` of it, or, for sight, what sound gives to it and, for sound, what sight
            does (`other`), so that each has to know of the other *(ours; the paper rotates "partial representations")*.
        rotate: the noised latent (`noised`) *(ours; Eq. 8 has no t, the text says an intermediate state)*, or the clean
            one before noise is added (`clean`).
        predict: rows of the noise loss: clean and rotated ones (`mixed`) *(ours; the noise that was added is not what
            a rotated text holds)*, or rotated ones, as printed (`rotated`).
        condition: denoise knowing what is seen.
        ortho: Eq. 10: `target`, the denoised cosine at its constructed value, and a hinge that keeps the mean degree
            above `min_degree` *(ours)*; `paper`, as printed, whose minimum is no rotation at all; `off`.
        min_degree: least mean degree, as a share of the middle of `alpha`: .35 at the paper's interval *(ours)*. A
            fixed degree would make one network of all intervals.
        lambda_z: weight in Eq. 10 *(paper)*.
        lambda_ortho: weight in Eq. 11 *(paper)*.
        symmetric: take off a counterfactual what noising and denoising alone do to its text *(ours)*. Without it,
            contrast learns to tell denoised texts from others.
        grad: of the contrast into the generator, its denoiser, decoder and degree *(ours)*: `none`; through the
            `last_step` of the sampler, or `full`, which teach it negatives that are easy to tell; `reversed`, through
            the last step with its sign turned, which teaches it hard ones. A generator without steps takes it whole.
        detach_z: the text is not trained to be easily denoised *(ours)*.
        width: of the denoiser *(ours)*.
        layers: of the denoiser *(ours)*.
        heads: of the denoiser *(ours)*.
    """

    enabled: bool = True
    generator: Literal["diffusion", "feature", "vqvae", "pair_swap", "audio_replacement", "text_revision", "dropout",
                       "residual"] = "diffusion"
    latent: Literal["linear", "identity"] = "linear"
    latent_norm: Literal["layer", "unit"] = "layer"
    dim: int = 256
    blocks: int = 8
    mode: Literal["both", "inter", "intra"] = "both"
    alpha: tuple[float, float] = (0.7, 0.8)
    alpha_learnable: bool = True
    floor: float = 0.05
    candidates: int = 16
    keep: int = 8
    start: int = 200
    steps: int = 1000
    ddim_steps: int = 10
    beta: Literal["scaled_linear", "linear"] = "scaled_linear"
    rotate: Literal["noised", "clean"] = "noised"
    predict: Literal["mixed", "rotated"] = "mixed"
    condition: bool = True
    ortho: Literal["target", "paper", "off"] = "target"
    min_degree: float = 0.47
    lambda_z: float = 0.8
    lambda_ortho: float = 1.0
    symmetric: bool = True
    grad: Literal["none", "last_step", "full", "reversed"] = "none"
    part: Literal["all", "other"] = "all"
    detach_z: bool = True
    width: int = 256
    layers: int = 4
    heads: int = 4


@dataclass
class CDCLConfig:
    """Collaborative distribution-aware contrast, Eq. 13-17, after the decoder's interaction of sight and sound.

    Args:
        enabled: contrast sight, sound and text.
        kind: what a clip is compared by: the `distribution` of its frames, their mean (`prototype`), or each `feature`.
        pairs: sight and sound, sound and text, sight and text.
        dim: width of the shared space.
        sign: `similarity`, exp(-D / tau) *(ours)*; `paper`, exp(+D / tau) as printed, which drives positives apart.
        symmetric: contrast in both directions *(ours; printed: from sight to sound)*.
        tau: temperature *(ours)*.
        gamma: weight of the entropies *(ours)*.
        eps: what is added to covariances in the entropies *(ours)*.
        entropy: `in_distance`, as printed, where that of the anchor cancels; `regularizer`, or `none`.
        spectral: of the distance, see `icf.ops.gaussian_wasserstein`.
        positives: clips that do not repel: those with the same most frequent audio text (`index`) *(ours)*; with audio
            texts of a cosine of at least `theta` (`threshold`), with those from `theta_low` on left out (`band`); none
            but the clip itself (`diag`).
        theta: least cosine of audio texts of positives, for `threshold` and `band`.
        theta_low: cosine from which clips are left out, for `band`.
        no_negatives: a clip that all others are positives of repels them nonetheless (`diag`), or is left out (`skip`).
        text_negatives: counterfactuals (`cf`) *(paper)*, texts of other clips (`batch`), which stand in where there is
            no SC, or `both`, the sum of two losses *(ours)*. Against its own counterfactuals alone a text, and sound
            and sight with it, may be the same for all clips: on the toy benchmark the loss vanishes so, and
            segmentation gets worse.
        weights: of counterfactuals, by their degree (`rho`) *(ours)* or by `alpha` alone, as printed.
        weight_grad: the contrast may lower its loss by the degree in these weights, as far as `sc.grad` lets it *(ours;
            the weights are otherwise constant)*.
        weight_sum: `one`, as printed: all negatives weigh as one; `keep`: each as one.
        visual_pool: vision is averaged where the model itself sees a foreground (`mask`) *(ours)*, or everywhere
            (`gap`).
        gather: contrast with the clips of all processes.
    """

    enabled: bool = True
    kind: Literal["distribution", "prototype", "feature"] = "distribution"
    pairs: tuple[Literal["va", "al", "vl"], ...] = ("va", "al", "vl")
    dim: int = 256
    sign: Literal["similarity", "paper"] = "similarity"
    symmetric: bool = True
    tau: float = 0.2
    gamma: float = 0.1
    eps: float = 1e-2
    entropy: Literal["in_distance", "regularizer", "none"] = "in_distance"
    spectral: Literal["plain", "smooth", "entropic", "eps"] = "plain"
    positives: Literal["index", "threshold", "band", "diag"] = "index"
    theta: float = 0.9
    theta_low: float = 0.6
    no_negatives: Literal["diag", "skip"] = "diag"
    text_negatives: Literal["cf", "batch", "both"] = "both"
    weights: Literal["rho", "alpha"] = "rho"
    weight_grad: bool = False
    weight_sum: Literal["one", "keep"] = "one"
    visual_pool: Literal["mask", "gap"] = "mask"
    gather: bool = True


@dataclass
class ObjectiveConfig:
    """The training objective beside segmentation, Eq. 19.

    Args:
        enabled: off, there is none, whatever its parts say: the paper's baseline.
        cf_weight: of SC's own losses *(paper)*.
        cdcl_weight: of the contrast *(paper)*.
        va: of sight and sound within the contrast *(paper)*.
        al: of sound and text *(paper)*.
        vl: of sight and text *(paper)*.
    """

    enabled: bool = True
    mit: MITConfig = field(default_factory=MITConfig)
    sc: SCConfig = field(default_factory=SCConfig)
    cdcl: CDCLConfig = field(default_factory=CDCLConfig)
    cf_weight: float = 0.2
    cdcl_weight: float = 0.2
    va: float = 0.4
    al: float = 0.3
    vl: float = 0.3

    def check(self, key: str = "objective") -> None:
        """Raise ValueError, naming the key, where fields contradict one another or are out of range."""
        if not self.enabled:
            return
        mit, sc, cdcl = self.mit, self.sc, self.cdcl
        _require(mit.enabled or cdcl.enabled, f"{key}.enabled", "false where neither mit nor cdcl are", True)
        _require(mit.enabled or not sc.enabled, f"{key}.sc.enabled",
                 "false where mit.enabled is false: counterfactuals are made of texts", True)
        _require(mit.enabled or not cdcl.enabled or set(cdcl.pairs) <= {"va"}, f"{key}.cdcl.pairs",
                 "[va] where mit.enabled is false", cdcl.pairs)
        _require(mit.enabled or cdcl.positives == "diag" or not cdcl.enabled, f"{key}.cdcl.positives",
                 "diag where mit.enabled is false", cdcl.positives)
        texts = sc.enabled and sc.generator != "residual"
        _require(texts or not cdcl.enabled or cdcl.text_negatives != "cf" or not set(cdcl.pairs) - {"va"},
                 f"{key}.cdcl.text_negatives", "batch or both where SC makes no texts", cdcl.text_negatives)
        read = mit.inject != "none" or sc.enabled or (cdcl.enabled and {*cdcl.pairs} - {"va"})
        _require(not mit.enabled or read, f"{key}.mit.inject", "cross_attention where neither SC nor CDCL use the text",
                 mit.inject)
        _require(bool(mit.levels), f"{key}.mit.levels", "at least one", mit.levels)
        for name in ("texts", "slot_len", "parts"):
            _require(getattr(mit, name) >= 1, f"{key}.mit.{name}", "at least 1", getattr(mit, name))
        _require(mit.match_tau is None or mit.match_tau > 0, f"{key}.mit.match_tau", "above 0, or null", mit.match_tau)
        _require(sc.part == "all" or sc.generator in ("diffusion", "feature", "vqvae", "dropout"), f"{key}.sc.part",
                 "all where sc.generator does not change the text itself", sc.part)
        _require(0 <= sc.min_degree <= 1, f"{key}.sc.min_degree", "0 to 1, a share of alpha", sc.min_degree)
        lo, hi = sc.alpha
        _require(0 <= lo <= hi <= 1, f"{key}.sc.alpha", "lo <= hi in [0, 1]", sc.alpha)
        _require(1 <= sc.keep <= sc.candidates, f"{key}.sc.keep", "1 to sc.candidates", sc.keep)
        _require(denoises(sc.start, sc.ddim_steps, sc.steps), f"{key}.sc.start",
                 "a multiple of sc.ddim_steps, at most sc.steps, by strides that the schedule can take", sc.start)
        _require(sc.blocks >= 1 and sc.dim % sc.blocks == 0 and sc.dim // sc.blocks >= 2, f"{key}.sc.blocks",
                 "a divisor of sc.dim that leaves at least 2 dimensions", sc.blocks)
        _require(cdcl.tau > 0, f"{key}.cdcl.tau", "above 0", cdcl.tau)


@dataclass
class TrainConfig:
    """The recipe.

    Args:
        batch: clips per step and process *(paper: 8)*.
        epochs: passes over the training clips *(paper: 60)*.
        iters: optimiser steps, in place of epochs.
        lr: learning rate of AdamW *(COMBO)*.
        weight_decay: of matrices; norms, biases, queries and embeddings have none *(COMBO)*.
        backbone_lr: rate of the visual encoder, as a share of `lr` *(COMBO)*.
        schedule: of the rate: `poly`nomial *(COMBO)*, `cosine` or `constant`.
        power: of the polynomial *(COMBO)*.
        warmup: steps in which the rate rises.
        clip: norm that the gradient of the whole model is clipped to *(COMBO: 0.01)*; 0 leaves it alone.
        accumulate: steps whose gradients are added up before the optimiser moves.
        amp: mixed precision.
        compile: backend of torch.compile that the model runs through, `inductor` say, or `cudagraphs`. A resumed run
            then equals an uninterrupted one up to rounding.
        seed: initialisation, order of the data and everything random in the step.
        init_from: weights to start from (a run folder or a .safetensors file); MS3 is usually started from S4.
        evaluate_every: epochs between evaluations of the validation split, 0 for the last only.
        save_every: steps between checkpoints within an epoch, 0 for epoch ends only. What a resumed run has to do again
            is the steps since the last one: with 1 the step in flight, whatever ended the run.
        log_every: steps between two readings of the losses.
        gradient_norms: every ten times as many steps, also log how strongly each term pulls at encoder, decoder, MIT,
            SC and CDCL; costs a backward pass per term then, and nothing otherwise.
        trackers: where losses, speed, scores, settings and pictures go beside the run's own files: `tensorboard`, and
            what else Accelerate knows and is installed, as `wandb`. A resumed run begins a new one there.
    """

    batch: int = 8
    epochs: int = 60
    iters: int | None = None
    lr: float = 1e-4
    weight_decay: float = 0.05
    backbone_lr: float = 0.1
    schedule: Literal["poly", "cosine", "constant"] = "poly"
    power: float = 0.9
    warmup: int = 0
    clip: float = 0.01
    accumulate: int = 1
    amp: Literal["no", "bf16", "fp16"] = "no"
    compile: Literal["no", "inductor", "cudagraphs", "aot_eager", "eager"] = "no"
    seed: int = 0
    init_from: Path | None = None
    evaluate_every: int = 1
    save_every: int = 0
    log_every: int = 10
    gradient_norms: bool = False
    trackers: tuple[str, ...] = ("tensorboard",)


@dataclass
class EvalConfig:
    """Evaluation; `icf evaluate` prints every mode of a metric, these choose what is computed.

    Args:
        batch: clips per step.
        threshold: of the sigmoid, for binary masks.
        negatives: sounds put in place of the true one, for false positives and sensitivity.
        snr_db: white noise added to the sound at this signal-to-noise ratio.
        frame_mix: frames per clip exchanged with other clips, in a quarter of the clips.
    """

    batch: int = 8
    threshold: float = 0.5
    negatives: tuple[Literal["silence", "noise", "offscreen", "shuffled"], ...] = (
        "silence", "noise", "offscreen", "shuffled")
    snr_db: float | None = None
    frame_mix: int = 0


@dataclass
class Config:
    """One run: its data, model, loss, objective, recipe and evaluation, and the folder it writes to.

    Args:
        backend: of the operators: `auto`, the fastest that can run, `reference`, `cpp`, `cuda` or `triton`, with
            exceptions by operator or family of operators, as in `auto,gw_contrast=reference`; `null` leaves it to
            `icf.set_backend` and the variable ICF_BACKEND.
        out: the run's folder.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    backend: str | None = None
    out: Path = Path("runs/default")

    def check(self) -> None:
        """Raise ValueError, naming the key, where fields contradict one another or are out of range."""
        require = _require
        size = self.data.size
        require(size > 0 and size % 32 == 0, "data.size", "a positive multiple of 32", size)
        require(self.data.frames >= 1, "data.frames", "at least 1", self.data.frames)
        require(self.model.classes >= 1, "model.classes", "at least 1", self.model.classes)
        require(self.data.subset in get_args(Subset), "data.subset", f"one of {SUBSETS}", self.data.subset)
        require(self.data.toy is None or self.data.compose is None, "data.compose", "null where data.toy is set",
                self.data.compose)
        decoder = self.model.decoder
        require(decoder.heads >= 1 and decoder.dim % decoder.heads == 0, "model.decoder.dim",
                "divisible by model.decoder.heads", f"{decoder.dim} and {decoder.heads}")
        require(decoder.head != "dense" or self.model.classes == 1, "model.decoder.head",
                "mask2former or auto where model.classes is above 1", decoder.head)
        require(not (self.data.subset == "avss" and self.model.classes == 1), "model.classes",
                "the number of classes with background for data.subset=avss", self.model.classes)
        for name in ("batch", "epochs", "accumulate", "log_every"):
            require(getattr(self.train, name) >= 1, f"train.{name}", "at least 1", getattr(self.train, name))
        require(self.train.iters is None or self.train.iters >= 1, "train.iters", "at least 1", self.train.iters)
        require(self.train.lr > 0, "train.lr", "above 0", self.train.lr)
        require(not self.train.gradient_norms or self.train.compile == "no", "train.gradient_norms",
                "false for a compiled step, whose backward runs but once", True)
        require(0 <= self.data.negatives < 1, "data.negatives", "a share, at least 0 and below 1", self.data.negatives)
        require(not self.data.negatives or self.data.audio_source == "wav", "data.negatives",
                "0 where data.audio_source is pkl: sounds are made as waveforms", self.data.negatives)
        mit = self.objective.mit
        require(not self.data.negatives or not self.objective.enabled or not mit.enabled or mit.inject == "none",
                "data.negatives", "0 where objective.mit.inject tells the model of the clip's own sound",
                self.data.negatives)
        self.objective.check()
        revised = self.objective.enabled and self.objective.sc.enabled and (
            self.objective.sc.generator == "text_revision")
        require(not revised or self.data.captions is not None, "data.captions",
                "a JSON file of revised captions for objective.sc.generator=text_revision", self.data.captions)
        require(0 < self.eval.threshold < 1, "eval.threshold", "between 0 and 1", self.eval.threshold)

    def to_dict(self) -> dict:
        """Plain values, as JSON and YAML hold them."""
        return _plain(asdict(self))

    def differences(self, other: Config) -> dict[str, tuple[object, object]]:
        """Fields, as `train.lr`, in which another configuration gives other results: its value, and the own one."""
        there, here = flat(other.to_dict()), flat(self.to_dict())
        return {key: (there.get(key), here.get(key)) for key in {**here, **there}
                if key not in FREE and there.get(key) != here.get(key)}

    @classmethod
    def from_dict(cls, values: dict) -> Config:
        """The inverse of :meth:`to_dict`; raises ValueError where a key is unknown or a value of the wrong type."""
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(Config, as_group=False)
        try:
            return build_config(parser, parser.parse_object(values))
        except ArgumentError as error:
            raise ValueError(f"configuration: {error}") from None


def flat(values: dict, prefix: str = "") -> dict[str, object]:
    """The values of nested dicts by their full names, as `train.lr`."""
    by_name = {}
    for key, value in values.items():
        by_name |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return by_name


class ConfigFile(ActionConfigFile):
    """jsonargparse's option of a YAML file, or text, but an error names the file."""

    def __call__(self, parser, cfg, values, option_string=None):
        file = "\n" not in values and Path(values).is_file()
        if file:
            read_yaml(values)  # for its errors
        try:
            super().__call__(parser, cfg, values, option_string)
        except (ArgumentError, TypeError, ValueError) as error:
            raise ArgumentError(self, f"{values}: {error}" if file else str(error)) from None


def config_parser(**options) -> ArgumentParser:
    """A parser of every field, as `--data.size 224`, and of YAML files that hold some of them, as `--config FILE`."""
    parser = ArgumentParser(**options, allow_abbrev=False)
    parser.add_argument("--config", action=ConfigFile, help="YAML file, or text, with any of the fields below")
    parser.add_class_arguments(Config, as_group=False)
    return parser


def build_config(parser: ArgumentParser, parsed: Namespace) -> Config:
    """The checked configuration of what ``parser`` has parsed."""
    for key, default in parser.get_defaults().items():  # an empty value passes as any type, and for a whole section
        _require(default is None or parsed.get(key) is not None, key, "a value", None)
    values = parser.instantiate(parsed)
    cfg = _at_home(Config(**{field.name: values[field.name] for field in fields(Config)}))
    cfg.check()
    return cfg


def _at_home(config):
    """A section whose paths from `~` on lie in the user's home: no shell has seen those of YAML and `--out=~/x`."""
    for item in fields(config):
        value = getattr(config, item.name)
        if isinstance(value, Path):
            setattr(config, item.name, value.expanduser())
        elif is_dataclass(value):
            _at_home(value)
    return config


def denoises(start: int, ddim_steps: int, steps: int) -> bool:
    """Whether a schedule of ``steps`` leads from ``start`` to zero in ``ddim_steps`` equal strides."""
    stride = start // max(ddim_steps, 1)
    return 0 < start <= steps and ddim_steps >= 1 and start == stride * ddim_steps and (
        steps // (steps // stride) == stride)


def _require(ok: bool, key: str, expected: str, got) -> None:
    if not ok:
        raise ValueError(f"{key}: expected {expected}, got {got}")


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
