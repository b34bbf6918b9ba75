"""mmcv's attention gives the same with our operator in the place of its own: a stand-in laid out as mmcv is, written
from its documentation, and the real one where it is installed. Each run is a process of its own, as an mmcv without
compiled operators can be imported after the patch only."""
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

# mmcv/utils/ext_loader.py, mmcv/ops/multi_scale_deform_attn.py and one operator more, by names and arguments.
STAND_IN = {
    "__init__.py": "",
    "ops/__init__.py": "from .multi_scale_deform_attn import MultiScaleDeformableAttention\nfrom .nms import nms\n",
    "ops/nms.py": """
import mmcv._ext as ext
assert hasattr(ext, "nms")

def nms(boxes, scores, iou_threshold):
    return ext.nms(boxes, scores, iou_threshold=iou_threshold, offset=0)
""",
    "ops/multi_scale_deform_attn.py": """
import torch
from torch import nn
from torch.nn.functional import grid_sample
import mmcv._ext as ext
assert hasattr(ext, "ms_deform_attn_forward")


class MultiScaleDeformableAttnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights,
                im2col_step):
        return ext.ms_deform_attn_forward(value, value_spatial_shapes, value_level_start_index, sampling_locations,
                                          attention_weights, im2col_step=im2col_step)


def multi_scale_deformable_attn_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights):
    (B, _, M, D), (Q, L, P) = value.shape, (sampling_locations.shape[i] for i in (1, 3, 4))
    out, start = 0, 0
    for level, (h, w) in enumerate(value_spatial_shapes.tolist()):
        image = value[:, start:start + h * w].permute(0, 2, 3, 1).reshape(B * M, D, h, w)
        grid = 2 * sampling_locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1
        weights = attention_weights[:, :, :, level].transpose(1, 2).reshape(B * M, 1, Q, P)
        out = out + (grid_sample(image, grid, align_corners=False) * weights).sum(-1)
        start += h * w
    return out.view(B, M * D, Q).transpose(1, 2)


class MultiScaleDeformableAttention(nn.Module):
    def __init__(self, embed_dims=256, num_heads=8, num_levels=4, num_points=4, im2col_step=64, dropout=0.1,
                 batch_first=False, norm_cfg=None, init_cfg=None, value_proj_ratio=1.0):
        super().__init__()
        self.shape, self.batch_first = (num_heads, num_levels, num_points), batch_first
        self.im2col_step, self.dropout = im2col_step, nn.Dropout(dropout)
        self.sampling_offsets = nn.Linear(embed_dims, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(embed_dims, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(embed_dims, int(embed_dims * value_proj_ratio))
        self.output_proj = nn.Linear(int(embed_dims * value_proj_ratio), embed_dims)

    def forward(self, query, key=None, value=None, identity=None, query_pos=None, key_padding_mask=None,
                reference_points=None, spatial_shapes=None, level_start_index=None, **kwargs):
        identity, value = query if identity is None else identity, query if value is None else value
        query = query if query_pos is None else query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)
        value = self.value_proj(value).unflatten(-1, (self.shape[0], -1))
        offsets = self.sampling_offsets(query).unflatten(-1, (*self.shape, 2))
        weights = self.attention_weights(query).unflatten(-1, (self.shape[0], -1)).softmax(-1)
        locations = reference_points[:, :, None, :, None] + offsets / spatial_shapes.flip(-1)[:, None]
        sample = MultiScaleDeformableAttnFunction.apply if value.is_cuda else None
        weights = weights.unflatten(-1, self.shape[1:])
        if sample is not None:
            out = sample(value, spatial_shapes, level_start_index, locations, weights, self.im2col_step)
        else:
            out = multi_scale_deformable_attn_pytorch(value, spatial_shapes, locations, weights)
        out = self.output_proj(out)
        return self.dropout(out if self.batch_first else out.transpose(0, 1)) + identity
"""}

USE = """
import sys
import pytest
import torch
import icf, icf.ops, icf.patch

compiled = bool(sys.argv[1:])
calls, original = [], icf.patch.ms_deform_attn
def recorded(*args):
    calls.append(len(args))
    return original(*args)
icf.patch.ms_deform_attn = recorded

if not compiled:
    with pytest.raises(ModuleNotFoundError, match="mmcv._ext"):
        import mmcv.ops
    icf.patch_mmcv()
    icf.unpatch_mmcv()
from mmcv.ops import MultiScaleDeformableAttention, nms
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction as kernel
from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch as copied

torch.manual_seed(0)
shapes = torch.tensor([[6, 5], [3, 4]])
starts = torch.tensor([0, 30])
tensors = [torch.randn(7, 2, 32), torch.randn(42, 2, 32), torch.rand(2, 7, 2, 2)]
value, locations, weights = torch.randn(2, 42, 4, 8), torch.rand(2, 7, 4, 2, 3, 2), torch.rand(2, 7, 4, 2, 3)

def run(module):
    query, value, points = (t.double().requires_grad_() for t in tensors)
    out = module(query, value=value, reference_points=points, spatial_shapes=shapes, level_start_index=starts)
    module.zero_grad()
    out.cos().sum().backward()
    return [out.detach(), query.grad, value.grad, *(p.grad.clone() for p in module.parameters())]

before = MultiScaleDeformableAttention(32, 4, 2, 3).double().eval()
torch.nn.init.normal_(before.sampling_offsets.weight, std=0.1)
expected, plain = run(before), copied(value, shapes, locations, weights)
assert not calls
ours = icf.ops.MSDeformAttn(32, 2, 4, 3).double()  # mmcv's parameters, without its identity
ours.load_state_dict(before.state_dict())
query, value_, points = (t.double() for t in tensors)
torch.testing.assert_close(ours(query.transpose(0, 1), points, value_.transpose(0, 1), shapes).transpose(0, 1) + query,
                           expected[0])
icf.patch_mmcv()
icf.patch_mmcv()
after = MultiScaleDeformableAttention(32, 4, 2, 3).double().eval()
after.load_state_dict(before.state_dict())
for module in (before, after):
    calls.clear()
    torch.testing.assert_close(run(module), expected, rtol=1e-6, atol=1e-8)
    assert calls
calls.clear()
torch.testing.assert_close(copied(value, shapes, locations, weights), plain)
assert calls
torch.testing.assert_close(kernel.apply(value, shapes, starts, locations, weights, 64), plain)
if not compiled:
    with pytest.raises(RuntimeError, match="without its compiled operators, nms among them"):
        nms(torch.rand(3, 4), torch.rand(3), 0.5)
icf.unpatch_mmcv()
icf.unpatch_mmcv()
calls.clear()
torch.testing.assert_close(run(before), expected, rtol=0, atol=0)
assert not calls and "apply" not in vars(kernel)
print("same")
"""


def write_stand_in(root, **more):
    """Returns the PYTHONPATH."""
    for name, text in {**STAND_IN, **more}.items():
        path = root / "mmcv" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])


def use(*args, **variables):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", USE, *args], capture_output=True, text=True,
                          env={**os.environ, **variables})
    assert done.stdout.split()[-1:] == ["same"], done.stderr


def test_without_compiled_operators(tmp_path):
    use(PYTHONPATH=write_stand_in(tmp_path))


def test_with_compiled_operators(tmp_path):
    functions = "def nms(*args, **kwargs): ...\ndef ms_deform_attn_forward(*args, **kwargs): ...\n"
    use("compiled", PYTHONPATH=write_stand_in(tmp_path, **{"_ext.py": functions}))


def test_installed_mmcv():
    pytest.importorskip("mmcv")
    use(*(["compiled"] if find_spec("mmcv._ext") else []))
