"""transformers' models give the same with our operator in the place of their own code."""
import pytest
import torch

import icf

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

RESNET = dict(embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
              out_features=["stage2", "stage3", "stage4"])
SWIN = dict(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4, image_size=64,
            out_features=["stage1", "stage2", "stage3", "stage4"])
RT_DETR = dict(d_model=32, encoder_hidden_dim=32, encoder_in_channels=[16, 16, 16], encoder_ffn_dim=32,
               encoder_layers=1, encoder_attention_heads=2, decoder_in_channels=[32, 32, 32], decoder_ffn_dim=32,
               decoder_layers=1, decoder_attention_heads=4, num_queries=10, num_denoising=0, feat_strides=[8, 16, 32])


def deformable_detr():
    config = transformers.DeformableDetrConfig(
        backbone_config=transformers.ResNetConfig(**RESNET), use_timm_backbone=False, use_pretrained_backbone=False,
        backbone=None, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=4, decoder_attention_heads=4, num_queries=10)
    return transformers.DeformableDetrModel(config), {}


def mask2former():
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(**SWIN), feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=32, dim_feedforward=32, encoder_layers=1, decoder_layers=2, num_attention_heads=4,
        num_queries=10, common_stride=4)
    return transformers.Mask2FormerModel(config), {}


def oneformer():
    config = transformers.OneFormerConfig(
        backbone_config=transformers.SwinConfig(**SWIN), hidden_dim=32, mask_dim=32, conv_dim=32,
        encoder_feedforward_dim=32, dim_feedforward=32, encoder_layers=1, decoder_layers=2, num_attention_heads=4,
        num_queries=10, text_encoder_width=32, text_encoder_context_length=7, text_encoder_num_layers=1,
        text_encoder_vocab_size=20, is_training=False, query_dec_layers=1, task_seq_len=7)
    return transformers.OneFormerModel(config), {"task_inputs": torch.ones(2, 7)}


def rt_detr():
    config = transformers.RTDetrConfig(backbone_config=transformers.RTDetrResNetConfig(**RESNET), **RT_DETR)
    return transformers.RTDetrModel(config), {}


def rt_detr_v2(points=(4, 4, 4), method="default"):
    backbone = transformers.RTDetrResNetConfig(**RESNET)
    config = transformers.RTDetrV2Config(backbone_config=backbone, decoder_method=method, **RT_DETR)
    model = transformers.RTDetrV2Model(config)
    for module in model.modules():
        if hasattr(module, "n_points_list"):  # the configuration allows for equal numbers only
            module.n_points_list = list(points)
    return model, {}


def rt_detr_v2_other_points():
    return rt_detr_v2(points=(2, 4, 6))


def rt_detr_v2_discrete():
    return rt_detr_v2(method="discrete")


def grounding_dino():
    text = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32,
                                   vocab_size=2000)
    config = transformers.GroundingDinoConfig(
        backbone_config=transformers.SwinConfig(**{**SWIN, "out_features": ["stage2", "stage3", "stage4"]}),
        text_config=text, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=4, decoder_attention_heads=4, num_queries=10, max_text_len=8)
    return transformers.GroundingDinoModel(config), {"input_ids": torch.tensor([[101, 5, 6, 1012, 102]] * 2)}


def run(model, inputs):
    """Outputs and gradients of a model."""
    model.zero_grad()
    outputs = model(**inputs).to_tuple()
    outputs = [o for o in outputs if isinstance(o, torch.Tensor) and o.is_floating_point() and o.requires_grad]
    loss = sum((o * torch.arange(o.numel()).cos().view_as(o)).nan_to_num(0, 0, 0).mean() for o in outputs)
    loss.backward()
    return [o.detach() for o in outputs], {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def calls(monkeypatch):
    """The shapes with which our operator was called."""
    import icf.patch
    shapes, original = [], icf.patch.ms_deform_attn

    def recorded(value, *args):
        shapes.append(value.shape)
        return original(value, *args)

    monkeypatch.setattr(icf.patch, "ms_deform_attn", recorded)
    yield shapes
    icf.unpatch_transformers()


@pytest.mark.parametrize("build", [deformable_detr, mask2former, oneformer, rt_detr, rt_detr_v2,
                                   rt_detr_v2_other_points, rt_detr_v2_discrete, grounding_dino])
def test_same_outputs_and_gradients(build, calls):
    torch.manual_seed(0)
    model, inputs = build()
    model = model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sampling_offsets.bias"):  # whole pixels at first, where the gradient jumps
                parameter += 0.25 + 0.25 * torch.rand_like(parameter)
    inputs = {"pixel_values": torch.randn(2, 3, 64, 64).double(),
              **{n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}}
    expected = run(model, inputs)
    assert icf.patch_transformers() == icf.patch_transformers()
    actual = run(model, inputs)
    assert bool(calls) == (build is not rt_detr_v2_discrete)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)
    icf.unpatch_transformers()
    before = len(calls)
    torch.testing.assert_close(run(model, inputs), expected, rtol=0, atol=0)
    assert len(calls) == before
