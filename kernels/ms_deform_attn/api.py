"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, Eq. 2 and 3), as users call it."""
import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .._common.backend import choose, recall, remember, require_tensors
from .._common.library import call
from . import ops, reference

Shapes = Tensor | Sequence[tuple[int, int]]
_host_copies = WeakTensorKeyDictionary()  # shapes on a device -> (version of the tensor, the same as host integers)


def ms_deform_attn(value: Tensor, spatial_shapes: Shapes, level_start_index: Tensor | Sequence[int] | None,
                   sampling_locations: Tensor, attention_weights: Tensor, im2col_step: int | None = None, *,
                   backend: str | None = None) -> Tensor:
    """Sum over levels and points of ``weight * bilinear sample of value``, the drop-in for the operator of Deformable
    DETR, Mask2Former, mmcv and the Hugging Face hub.

    A location (x, y) lies in 0..1 of its level and samples pixel ``(x * W - 0.5, y * H - 0.5)``; what is outside of the
    map, infinite or not a number counts as zero, in value and in gradient.

    Args:
        value: ``[B, S, M, D]``, the maps of all levels, flattened and concatenated: S pixels, M heads, D channels.
        spatial_shapes: ``[L, 2]`` (height, width) per level, with ``sum(height * width) == S``. Integers on the host
            cost nothing; of a tensor on a GPU a host copy is made once and kept as long as the tensor.
        level_start_index: ``[L]``, the running sum of ``height * width``, or None. It follows from ``spatial_shapes``,
            so it is only checked, and only where that needs no transfer.
        sampling_locations: ``[B, Q, M, L, P, 2]`` for Q queries and P points per level.
        attention_weights: ``[B, Q, M, L, P]``.
        im2col_step: accepted for compatibility and ignored: a batch of any size runs at once.
        backend: ``"cuda"``, ``"cpp"``, ``"triton"`` or ``"reference"``; by default the first that can run.

    Returns:
        ``[B, Q, M * D]``, of the dtype of ``value``, differentiable in ``value``, ``sampling_locations`` and
        ``attention_weights``. The three may be of different floating dtypes; sums are in float32, or in float64 if any
        of the three is.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
        RuntimeError: the requested backend cannot run, with the reason.
    """
    op, tensors = "ms_deform_attn", (value, sampling_locations, attention_weights)
    signature, plan = recall(op, backend, _settings(op, spatial_shapes, level_start_index), *tensors)
    if plan is not None:
        chosen, sizes = plan
        return call(op, chosen, value, sizes, sampling_locations, attention_weights)
    _check(op, value=value, sampling_locations=sampling_locations, attention_weights=attention_weights)
    sizes = _host_sizes(op, spatial_shapes, level_start_index, value.shape[1])
    (B, _, M, _), L, Q, P = value.shape, len(sizes), *_queries_and_points(sampling_locations, value, sizes)
    _check_shape(op, "sampling_locations", sampling_locations, "[B, Q, M, L, P, 2]", [(B, Q, M, L, P, 2)])
    _check_shape(op, "attention_weights", attention_weights, "[B, Q, M, L, P]", [(B, Q, M, L, P)])
    chosen = choose(op, backend, (value, sizes, None, sampling_locations, attention_weights), ops.CAN_RUN)
    if chosen == "reference":
        return reference.ms_deform_attn(value, sizes, None, sampling_locations, attention_weights)
    sizes, prepared = sum(sizes, ()), _types(*tensors)
    if all(map(operator.is_, prepared, tensors)):  # as kernels take them
        remember(signature, (chosen, sizes))
    cast, locations, weights = prepared
    return call(op, chosen, cast, sizes, locations, weights).to(value.dtype)


def ms_deform_attn_fused(value: Tensor, spatial_shapes: Shapes, reference_points: Tensor, sampling_offsets: Tensor,
                         attention_logits: Tensor, *, backend: str | None = None) -> Tensor:
    """:func:`ms_deform_attn` with the sampling locations and the softmax inside of the operator.

    In pixels of a level of size (W, H): for reference points (x, y) ``x * W + dx - 0.5``, for boxes (x, y, w, h)
    ``x * W + dx * w * W / (2 * P) - 0.5``, likewise in y. The weights are the softmax of the logits over all L * P
    points. Offsets and logits are taken as linear layers give them, also as slices of the output of one layer.

    Args:
        value, spatial_shapes, backend: as in :func:`ms_deform_attn`.
        reference_points: ``[B, Q, L, 2 or 4]`` in 0..1; B and L may be 1, for all images or levels alike.
        sampling_offsets: ``[B, Q, M * L * P * 2]`` or ``[B, Q, M, L, P, 2]``: (x, y) in pixels of the level or, for
            boxes, in P-ths of half their width and height.
        attention_logits: ``[B, Q, M * L * P]``, ``[B, Q, M, L * P]`` or ``[B, Q, M, L, P]``.

    Returns:
        ``[B, Q, M * D]``, of the dtype of ``value``, differentiable in all four tensors.

    Raises:
        ValueError, RuntimeError: as :func:`ms_deform_attn`.
    """
    op, tensors = "ms_deform_attn_fused", (value, reference_points, sampling_offsets, attention_logits)
    signature, plan = recall(op, backend, _settings(op, spatial_shapes), *tensors)
    if plan is not None:
        chosen, sizes, points_shape, offsets_shape = plan
        return call(op, chosen, value, sizes, reference_points.expand(points_shape),
                    sampling_offsets.view(offsets_shape), attention_logits.view(offsets_shape[:-1]))
    _check(op, value=value, reference_points=reference_points, sampling_offsets=sampling_offsets,
           attention_logits=attention_logits)
    sizes = _host_sizes(op, spatial_shapes, None, value.shape[1])
    (B, _, M, _), L, Q, P = value.shape, len(sizes), *_queries_and_points(sampling_offsets, value, sizes)
    _check_shape(op, "reference_points", reference_points, "[B or 1, Q, L or 1, 2 or 4]",
                 [(b, Q, level, n) for b in (B, 1) for level in (L, 1) for n in (2, 4)])
    _check_shape(op, "sampling_offsets", sampling_offsets, "[B, Q, M * L * P * 2] or [B, Q, M, L, P, 2]",
                 [(B, Q, M * L * P * 2), (B, Q, M, L, P, 2)])
    _check_shape(op, "attention_logits", attention_logits, "[B, Q, M * L * P], [B, Q, M, L * P] or [B, Q, M, L, P]",
                 [(B, Q, M * L * P), (B, Q, M, L * P), (B, Q, M, L, P)])
    chosen = choose(op, backend, (value, sizes, reference_points, sampling_offsets, attention_logits), ops.CAN_RUN)
    if chosen == "reference":
        return reference.ms_deform_attn_fused(value, sizes, reference_points, sampling_offsets, attention_logits)
    offsets, logits = sampling_offsets.reshape(B, Q, M, L, P, 2), attention_logits.reshape(B, Q, M, L, P)
    cast, offsets, logits = _types(value, offsets, logits, reference_points)
    points = reference_points.to(torch.promote_types(cast.dtype, torch.float32))  # few, and worth more than 16 bits
    points = _unit_stride(points).expand(B, Q, L, -1)
    sizes, prepared = sum(sizes, ()), (cast, points, offsets, logits)
    if signature and all((a.dtype, a.data_ptr()) == (b.dtype, b.data_ptr())  # of nothing, all addresses are the same
                         for a, b in zip(prepared, tensors, strict=True)):
        remember(signature, (chosen, sizes, points.shape, offsets.shape))
    return call(op, chosen, cast, sizes, points, offsets, logits).to(value.dtype)


class MSDeformAttn(nn.Module):
    """The attention layer of Deformable DETR and its descendants, with the parameter names of Deformable DETR,
    Mask2Former and transformers, so that their state dicts load.

    Args:
        d_model: width of queries, input and output; a multiple of ``n_heads``.
        n_levels, n_heads, n_points: maps, heads, and samples per map, head and query.
    """

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4):
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"MSDeformAttn: d_model must be a multiple of n_heads, got {d_model} and {n_heads}")
        self.d_model, self.n_levels, self.n_heads, self.n_points = d_model, n_levels, n_heads, n_points
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    def reset_parameters(self):
        """As in Deformable DETR: head m looks in direction 2 pi m / M, its point p at p + 1 pixels, all equally."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angle = torch.arange(self.n_heads) * (2 * math.pi / self.n_heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)  # [M, 2]
        direction = direction / direction.abs().amax(-1, keepdim=True)
        reach = torch.arange(1, self.n_points + 1)[:, None]  # [P, 1]
        offsets = (direction[:, None, None] * reach).expand(-1, self.n_levels, -1, -1)  # [M, L, P, 2]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, query: Tensor, reference_points: Tensor, input_flatten: Tensor, input_spatial_shapes: Shapes,
                input_level_start_index: Tensor | Sequence[int] | None = None,
                input_padding_mask: Tensor | None = None) -> Tensor:
        """
        Args:
            query: ``[B, Q, C]``.
            reference_points: ``[B, Q, L, 2 or 4]`` in 0..1; B and L may be 1.
            input_flatten: ``[B, S, C]``, the maps of all levels, flattened and concatenated.
            input_spatial_shapes: ``[L, 2]`` (height, width); integers on the host cost nothing.
            input_level_start_index: accepted for compatibility, it follows from the shapes.
            input_padding_mask: ``[B, S]`` bool, True where the input is padding and counts as zero.

        Returns:
            ``[B, Q, C]``.
        """
        value = self.value_proj(input_flatten)  # [B, S, C]
        if input_padding_mask is not None:
            value = value.masked_fill(input_padding_mask[..., None], 0)
        attended = ms_deform_attn_fused(value.unflatten(-1, (self.n_heads, -1)), input_spatial_shapes, reference_points,
                                        self.sampling_offsets(query), self.attention_weights(query))
        return self.output_proj(attended)  # [B, Q, C]


def _check(op, *, value, **others):
    require_tensors(op, value=value, **others)
    if value.dim() != 4 or 0 in value.shape[2:]:
        raise ValueError(f"{op}: value must be [B, S, M, D] with at least one head and channel, "
                         f"got {list(value.shape)}")
    for name, tensor in {"value": value, **others}.items():
        if not tensor.is_floating_point() or tensor.device != value.device:
            raise ValueError(f"{op}: {name} must be floating point and on the device of value, {value.device}, "
                             f"got {tensor.dtype} on {tensor.device}")


def _check_shape(op, name, tensor, layout, allowed):
    # size by size, as compilers of symbolic sizes want it: from a list of whole shapes they multiply out all cases
    if not any(len(shape) == tensor.dim() and all(a == b for a, b in zip(tensor.shape, shape, strict=True))
               for shape in allowed):
        wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(allowed))
        raise ValueError(f"{op}: {name} must be {layout}, here {wanted}, got {list(tensor.shape)}")


def _host_sizes(op, spatial_shapes, level_start_index, pixels):
    """((H, W), ...) as host integers, checked against the number of pixels of value."""
    sizes = _host_copy(op, spatial_shapes) if isinstance(spatial_shapes, Tensor) else spatial_shapes
    sizes = tuple((h, w) for h, w in sizes)
    if torch.compiler.is_compiling() and (isinstance(spatial_shapes, Tensor) or _symbolic(sizes)):
        return _symbolic_sizes(op, sizes, pixels)
    sizes = tuple((int(h), int(w)) for h, w in sizes)
    if not sizes or any(h < 1 or w < 1 for h, w in sizes) or sum(h * w for h, w in sizes) != pixels:
        raise ValueError(f"{op}: spatial_shapes must be (height, width) per level, together the {pixels} pixels of "
                         f"value, got {sizes}, together {sum(h * w for h, w in sizes)}")
    if isinstance(level_start_index, Tensor):
        level_start_index = level_start_index.tolist() if _readable(level_start_index) else None
    starts = [sum(h * w for h, w in sizes[:level]) for level in range(len(sizes))]
    if level_start_index is not None and list(level_start_index) != starts:
        raise ValueError(f"{op}: level_start_index must be the running sum of height * width, {starts}, "
                         f"got {list(level_start_index)}")
    return sizes


def _symbolic(sizes):
    return any(isinstance(size, torch.SymInt) for level in sizes for size in level)


def _symbolic_sizes(op, sizes, pixels):
    """((H, W), ...) that are read, and checked, when the compiled function runs."""
    for h, w in sizes:
        torch._check(h >= 1)
        torch._check(w >= 1)
    torch._check(sum(h * w for h, w in sizes) == pixels,  # a string: torch.export(strict=True) takes no function
                 f"{op}: spatial_shapes must be (height, width) per level, together the pixels of value")
    return sizes


def _settings(op, spatial_shapes, level_start_index=None):
    """Sizes, and starts where these are read, as host integers that can be remembered; None where compiled."""
    if torch.compiler.is_compiling():
        return None
    sizes = spatial_shapes
    if isinstance(sizes, Tensor):
        sizes = map(tuple, _host_copy(op, sizes))
    starts = level_start_index
    if isinstance(starts, Tensor):
        starts = starts.tolist() if _readable(starts) else None
    return tuple(sizes), None if starts is None else tuple(starts)


def _readable(tensor):
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _host_copy(op, shapes):
    if shapes.dim() != 2 or shapes.shape[1] != 2 or shapes.is_floating_point():
        raise ValueError(f"{op}: spatial_shapes must be integers [L, 2], got {shapes.dtype} {list(shapes.shape)}")
    if shapes.device.type == "cpu" or torch.compiler.is_compiling():
        return shapes.tolist()
    version, sizes = _host_copies.get(shapes, (None, None))
    if version != shapes._version:
        sizes = shapes.tolist()  # the one place that waits for the device
        _host_copies[shapes] = shapes._version, sizes
    return sizes


def _queries_and_points(coordinates, value, sizes):
    """Q and P as [B, Q, M * L * P * 2] or [B, Q, M, L, P, 2] say, which the checks of shape then hold it to."""
    shape, per_point = coordinates.shape, value.shape[2] * len(sizes) * 2
    return (shape[1] if len(shape) > 1 else 0), max(math.prod(shape[2:]) // per_point, 1)


def _types(value, coordinates, weights, *others):
    """The tensors as kernels take them: float64 if any is, else coordinates and weights alike, float32 or as value."""
    if torch.float64 in (t.dtype for t in (value, coordinates, weights, *others)):
        return _unit_stride(value.double()), _rows(coordinates.double()), _rows(weights.double())
    if coordinates.dtype != weights.dtype or coordinates.dtype != value.dtype:
        coordinates, weights = coordinates.float(), weights.float()
    return _unit_stride(value), _rows(coordinates), _rows(weights)


def _unit_stride(tensor):
    return tensor if tensor.stride(-1) == 1 else _laid_out(tensor)


def _rows(tensor):
    """The tensor, copied unless what belongs to one query lies together; images and queries may be strides apart."""
    together = all(tensor.stride(i) == math.prod(tensor.shape[i + 1:]) or tensor.shape[i] == 1
                   for i in range(2, tensor.dim()))
    return tensor if together else _laid_out(tensor)


def _laid_out(tensor):
    """A copy without gaps; `contiguous` leaves strides of empty tensors, and of axes of one element, as they are."""
    return tensor.clone(memory_format=torch.contiguous_format)
