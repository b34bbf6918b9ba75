"""The models of transformers and mmcv give the same with our operator in the place of their own code."""
import copy
import inspect
import pickle
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

import icf
import icf.patch
from icf_kernels._common import backend as backends

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

RESNET = dict(embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
              out_features=["stage2", "stage3", "stage4"])
SWIN = dict(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4, image_size=64,
            out_features=["stage1", "stage2", "stage3", "stage4"])
RT_DETR = dict(d_model=32, encoder_hidden_dim=32, encoder_in_channels=[16, 16, 16], encoder_ffn_dim=32,
               encoder_layers=1, encoder_attention_heads=2, decoder_in_channels=[32, 32, 32], decoder_ffn_dim=32,
               decoder_layers=1, decoder_attention_heads=4, num_queries=10, num_denoising=0, feat_strides=[8, 16, 32])
DINO = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32,
            encoder_attention_heads=4, decoder_attention_heads=4, num_queries=10, max_text_len=8)
LW_DETR = dict(d_model=32, decoder_ffn_dim=32, decoder_layers=1, decoder_self_attention_heads=2,
               decoder_cross_attention_heads=4, num_queries=10, group_detr=1, c2f_num_blocks=1)
VIT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64, out_indices=[1, 2])


def swin(stages):
    return transformers.SwinConfig(**{**SWIN, "out_features": [f"stage{i}" for i in stages]})


def hgnet(stages=(2, 3, 4)):
    return transformers.HGNetV2Config(
        stem_channels=[3, 8, 8], hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], stage_in_channels=[8, 8, 16, 16],
        stage_mid_channels=[8, 8, 8, 8], stage_out_channels=[8, 16, 16, 16], stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1], out_features=[f"stage{i}" for i in stages])


def bert():
    return transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32,
                                   vocab_size=2000)


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


def d_fine(method="default"):
    config = transformers.DFineConfig(backbone_config=hgnet(), decoder_n_points=[2, 4, 3], decoder_method=method,
                                      **RT_DETR)
    return transformers.DFineModel(config), {}


def d_fine_discrete():
    return d_fine("discrete")


def deimv2():
    return transformers.Deimv2Model(transformers.Deimv2Config(backbone_config=hgnet(), **RT_DETR)), {}


def pp_doclayout_v2():
    return transformers.PPDocLayoutV2Model(transformers.PPDocLayoutV2Config(backbone_config=hgnet(), **RT_DETR)), {}


def pp_doclayout_v3():
    config = transformers.PPDocLayoutV3Config(backbone_config=hgnet((1, 2, 3, 4)), x4_feat_dim=8, num_prototypes=4,
                                              mask_feature_channels=[8, 8], **RT_DETR)
    return transformers.PPDocLayoutV3Model(config), {}


def pp_doclayout_v4():
    settings = {"hidden_size" if name == "d_model" else name: value for name, value in RT_DETR.items()}
    config = transformers.PPDocLayoutV4Config(backbone_config=hgnet(), **settings)
    return transformers.PPDocLayoutV4Model(config), {}


def lw_detr():
    vit = transformers.LwDetrViTConfig(pretrain_image_size=64, num_windows=4, window_block_indices=[0], **VIT)
    config = transformers.LwDetrConfig(backbone_config=vit, projector_scale_factors=[1.0], **LW_DETR)
    return transformers.LwDetrModel(config), {}


def rf_detr():
    from transformers.models.rf_detr.configuration_rf_detr import RfDetrDinov2Config
    config = transformers.RfDetrConfig(backbone_config=RfDetrDinov2Config(patch_size=16, num_windows=2, **VIT),
                                       **LW_DETR)
    return transformers.RfDetrModel(config), {}


def omdet_turbo():
    text = transformers.CLIPTextConfig(hidden_size=40, intermediate_size=32, num_hidden_layers=1, projection_dim=40,
                                       num_attention_heads=2, vocab_size=100, max_position_embeddings=8,
                                       bos_token_id=1, eos_token_id=99)
    config = transformers.OmDetTurboConfig(
        text_config=text, backbone_config=swin((2, 3, 4)), use_timm_backbone=False, image_size=64,
        apply_layernorm_after_vision_backbone=False, text_projection_in_dim=40, text_projection_out_dim=40,
        task_encoder_hidden_dim=32, class_embed_dim=40, num_queries=10, encoder_hidden_dim=32,
        vision_features_channels=[32, 32, 32], encoder_in_channels=[16, 32, 64], encoder_attention_heads=2,
        encoder_dim_feedforward=32, decoder_hidden_dim=32, decoder_num_heads=4, decoder_num_layers=1,
        decoder_dim_feedforward=32)
    model = transformers.OmDetTurboForObjectDetection(config)
    model.register_forward_pre_hook(forget_texts)
    ids, mask = torch.tensor([[1, 5, 99]]), torch.ones(2, 3, dtype=torch.long)
    return model, {
        "classes_input_ids": ids.repeat(4, 1), "classes_attention_mask": mask.repeat(2, 1),
        "tasks_input_ids": ids.repeat(2, 1), "tasks_attention_mask": mask, "classes_structure": torch.tensor([2, 2])}


def forget_texts(model, _):
    """OMDet keeps the features of texts, and with them a graph that is gone after its first backward."""
    for texts in (model.language_cache_class, model.language_cache_prompt):
        texts.cache.clear()
        texts.current_load = 0


def grounding_dino():
    config = transformers.GroundingDinoConfig(backbone_config=swin((2, 3, 4)), text_config=bert(), **DINO)
    return transformers.GroundingDinoModel(config), {"input_ids": torch.tensor([[101, 5, 6, 1012, 102]] * 2)}


def mm_grounding_dino():
    config = transformers.MMGroundingDinoConfig(backbone_config=swin((2, 3, 4)), text_config=bert(), **DINO)
    return transformers.MMGroundingDinoModel(config), {"input_ids": torch.tensor([[101, 5, 6, 1012, 102]] * 2)}


FAMILIES = [deformable_detr, grounding_dino, mm_grounding_dino, rt_detr, omdet_turbo, lw_detr, rf_detr, pp_doclayout_v2,
            pp_doclayout_v3, pp_doclayout_v4, mask2former, oneformer, rt_detr_v2, d_fine, deimv2]
OWN_CODE = [rt_detr_v2_discrete, d_fine_discrete]  # what the operator does not do


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
    shapes, original = [], icf.patch.ms_deform_attn

    def recorded(value, *args):
        shapes.append(value.shape)
        return original(value, *args)

    monkeypatch.setattr(icf.patch, "ms_deform_attn", recorded)
    yield shapes
    icf.unpatch_transformers()
    icf.unpatch_mmcv()


def prepare(build):
    """A model in float64 and its inputs."""
    torch.manual_seed(0)
    model, inputs = build()
    model = model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sampling_offsets.bias"):  # whole pixels at first, where the gradient jumps
                parameter += 0.25 + 0.25 * torch.rand_like(parameter)
    return model, {"pixel_values": torch.randn(2, 3, 64, 64).double(),
                   **{n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}}


@pytest.mark.parametrize("build", [*FAMILIES, rt_detr_v2_other_points, *OWN_CODE])
def test_same_outputs_and_gradients(build, calls):
    model, inputs = prepare(build)
    expected = run(model, inputs)
    assert icf.patch_transformers() == icf.patch_transformers()
    built_after, _ = prepare(build)
    for patched in (model, built_after):
        calls.clear()
        torch.testing.assert_close(run(patched, inputs), expected, rtol=1e-6, atol=1e-8)
        assert bool(calls) == (build not in OWN_CODE)
    icf.unpatch_transformers()
    calls.clear()
    for restored in (model, built_after):
        torch.testing.assert_close(run(restored, inputs), expected, rtol=0, atol=0)
    assert not calls


def test_nothing_of_the_installed_transformers_is_left_out():
    """Every model with a class or function of deformable attention, or with sampling locations of its own, is patched,
    and tested above."""
    marks = re.compile(r"(class|def) \w*deform\w*att|sampling_locations", re.IGNORECASE)
    sources = (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")
    found = {path.parent.name for path in sources if marks.search(path.read_text(encoding="utf-8"))}
    assert found - {"deprecated"} == set(icf.patch_transformers()) == {build.__name__ for build in FAMILIES}
    icf.unpatch_transformers()


def test_copies_and_pickles_of_patched_models_work(calls):
    model, inputs = prepare(d_fine)
    expected = run(model, inputs)
    icf.patch_transformers()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(run(other, inputs), expected, rtol=1e-6, atol=1e-8)


def test_a_release_that_is_not_known_is_refused_and_nothing_changed(monkeypatch):
    module = import_module("transformers.models.deimv2.modeling_deimv2")
    own = import_module("transformers.models.deformable_detr.modeling_deformable_detr").MultiScaleDeformableAttention
    code = own.forward.__code__
    monkeypatch.setattr(module, "multi_scale_deformable_attention_v2", lambda value, shapes: value)
    with pytest.raises(RuntimeError, match="deimv2.*expected multi_scale_deformable_attention_v2.value, .*not known"):
        icf.patch_transformers()
    assert own.forward.__code__ is code


def first_layer(build):
    """The first deformable attention of a model in float32, and the arguments with which the model calls it."""
    model, inputs = prepare(build)
    layer = next(m for m in model.modules() if type(m).__name__.endswith("MultiscaleDeformableAttention"))
    given = []
    hook = layer.register_forward_hook(lambda _, args, kwargs, output: given.extend((args, kwargs)), with_kwargs=True)
    model.float()(**{name: t.float() if t.is_floating_point() else t for name, t in inputs.items()})
    hook.remove()
    return layer, *given


@pytest.mark.parametrize("build", [deformable_detr, mask2former, d_fine])
@pytest.mark.skipif(bool(backends.PROBLEM["_C"]), reason="without native code there is no operator to hold")
def test_exported_and_compiled_layers_hold_the_operator_while_patched(build, calls):
    layer, args, kwargs = first_layer(build)
    expected = layer(*args, **kwargs)[0]

    def operators():
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*args, **kwargs)[0], expected)
        nodes = torch.export.export(layer, args, kwargs, strict=False).graph.nodes
        return [node.name for node in nodes if "icf." in str(node.target)]

    assert not operators()
    icf.patch_transformers()
    assert operators() == ["ms_deform_attn"]
    icf.unpatch_transformers()
    assert not operators()


@pytest.mark.parametrize("build", [deformable_detr, mask2former, rt_detr])
def test_onnx_export_of_patched_attention(build, tmp_path, calls):
    """A layer of each way of sampling: as a module, as a function. A whole model takes the exporter half a minute."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    icf.patch_transformers()
    layer, args, kwargs = first_layer(build)
    expected = layer(*args, **kwargs)[0]
    calls.clear()
    torch.onnx.export(layer, args, tmp_path / "layer.onnx", kwargs=kwargs, dynamo=True, verbose=False)
    assert not calls  # the layer's own code, in which ONNX knows grid_sample
    session = runtime.InferenceSession(tmp_path / "layer.onnx")
    tensors = inspect.signature(layer.forward).bind(*args, **kwargs).arguments
    feed = {i.name: tensors[i.name].detach().numpy() for i in session.get_inputs()}
    torch.testing.assert_close(torch.from_numpy(session.run(None, feed)[0]), expected.detach(), rtol=1e-4, atol=1e-5)
