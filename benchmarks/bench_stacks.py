"""Models of other stacks with their own sampling and with ours in its place, interleaved in one process.

    pytest benchmarks/bench_stacks.py --benchmark-only -s

`extra_info` holds the median seconds of both and the median of the ratios of neighbouring runs. Weights are random; a
small backbone leaves the share to the attention that it has in the part of the model which is not the backbone.
"""
import statistics
import time

import pytest
import torch

import icf

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 5
BACKBONE = dict(embedding_size=16, hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1], layer_type="basic",
                out_features=["stage2", "stage3", "stage4"])
IMAGE = 384, 384


def _images(model):
    images = torch.randn(1, 3, *IMAGE, device=DEVICE)

    def run(model):
        outputs = [t for t in model(pixel_values=images).to_tuple() if isinstance(t, torch.Tensor)]
        return sum(t.square().mean() for t in outputs if t.is_floating_point())

    return model.to(DEVICE), run


def deformable_detr():
    transformers = pytest.importorskip("transformers")
    config = transformers.DeformableDetrConfig(
        backbone_config=transformers.ResNetConfig(**BACKBONE), use_timm_backbone=False, use_pretrained_backbone=False,
        backbone=None)
    return _images(transformers.DeformableDetrModel(config))


def mask2former():
    transformers = pytest.importorskip("transformers")
    swin = transformers.SwinConfig(embed_dim=24, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], image_size=IMAGE[0],
                                   out_features=["stage1", "stage2", "stage3", "stage4"])
    return _images(transformers.Mask2FormerModel(transformers.Mask2FormerConfig(backbone_config=swin)))


def d_fine():
    transformers = pytest.importorskip("transformers")
    return _images(transformers.DFineModel(transformers.DFineConfig(num_denoising=0)))


def mmcv_encoder():
    """Six encoder layers' attention of Deformable DETR on the maps of the same image, strides 8 to 64."""
    pytest.importorskip("mmcv")
    icf.patch_mmcv()  # an mmcv without compiled operators cannot be imported before
    icf.unpatch_mmcv()
    from mmcv.ops import MultiScaleDeformableAttention
    layers = torch.nn.ModuleList(MultiScaleDeformableAttention(batch_first=True) for _ in range(6))
    sizes = [(IMAGE[0] // stride, IMAGE[1] // stride) for stride in (8, 16, 32, 64)]
    centres = torch.cat([torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(-1)
                         for h, w in sizes])
    given = {"reference_points": centres[None, :, None].expand(-1, -1, 4, -1).to(DEVICE),
             "spatial_shapes": torch.tensor(sizes, device=DEVICE)}
    given["level_start_index"] = given["spatial_shapes"].prod(1).cumsum(0) - given["spatial_shapes"].prod(1)
    pixels = torch.randn(1, len(centres), 256, device=DEVICE)

    def run(layers):
        x = pixels
        for layer in layers:
            x = layer(x, **given)
        return x.square().mean()

    return layers.to(DEVICE), run


@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
@pytest.mark.parametrize("build", [deformable_detr, mask2former, d_fine, mmcv_encoder])
def bench_patch(benchmark, build, mode):
    torch.manual_seed(0)
    model, run = build()
    patch, unpatch = ((icf.patch_mmcv, icf.unpatch_mmcv) if build is mmcv_encoder else
                      (icf.patch_transformers, icf.unpatch_transformers))

    def step():
        with torch.set_grad_enabled(mode != "forward"):
            out = run(model)
        if mode != "forward":
            model.zero_grad()
            out.backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    def seconds():
        started = time.perf_counter()
        step()
        return time.perf_counter() - started

    own, ours = [], []
    for _ in range(ROUNDS + 1):  # the first warms up
        own.append(seconds())
        patch()
        ours.append(seconds())
        unpatch()
    ratio = statistics.median(a / b for a, b in zip(own[1:], ours[1:], strict=True))
    benchmark.group = f"stacks-{build.__name__}-{mode}"
    benchmark.extra_info.update(
        device=torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu", threads=torch.get_num_threads(),
        torch=torch.__version__, seconds={"own": statistics.median(own[1:]), "ours": statistics.median(ours[1:])},
        times_ours=round(ratio, 2), rounds=ROUNDS)
    print(f"\n{build.__name__} {mode}: " + ", ".join(
        f"{name} {t:.3f} s" for name, t in benchmark.extra_info["seconds"].items()) + f", {ratio:.2f}x")
    patch()
    try:
        benchmark.pedantic(step, rounds=1)
    finally:
        unpatch()
