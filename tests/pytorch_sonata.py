"""The released PyTorch encoder on a CPU, and a training step of Sonata around it.

The code at https://github.com/facebookresearch/sonata is run as it is, with random weights. What of
it needs CUDA or a package besides PyTorch has a stand-in of PyTorch's own operations:
`scaled_dot_product_attention`, a convolution tap by tap, `segment_reduce`.
"""

import copy
import itertools
import os
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from point_jax.measure.inputs import Input

# Of Sonata's configuration, as configs/sonata.py:base has it.
ORDERS = ("z", "z-trans", "hilbert", "hilbert-trans")
PROTOTYPES, SINKHORN_STEPS = 4096, 3
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.07
MOMENTUM, CLIP = 0.994, 3.0


class SparseConvTensor:
    """Features and their voxels; the pairs of each level are found once."""

    def __init__(self, features, indices, spatial_shape, batch_size, pairs=None):
        self.features, self.indices, self.shape = features, indices, (spatial_shape, batch_size)
        self.pairs = {} if pairs is None else pairs

    def replace_feature(self, features):
        return SparseConvTensor(features, self.indices, *self.shape, self.pairs)


class Correlation(torch.autograd.Function):
    """The sum over taps, with a backward pass that makes each tap's part of the gradient once."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)  # where autocast is on
    def forward(ctx, x, weight, bias, pairs):
        ctx.save_for_backward(x, weight)
        ctx.pairs = pairs
        out = torch.addmm(bias, x, weight[len(weight) // 2])
        for tap, rows, reads in pairs:
            out.index_add_(0, rows, x.index_select(0, reads) @ weight[tap])
        return out

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        centre, of_weight = len(weight) // 2, torch.zeros_like(weight)
        grad = g @ weight[centre].T
        torch.mm(x.T, g, out=of_weight[centre])
        for tap, rows, reads in ctx.pairs:
            slope = g.index_select(0, rows)
            grad.index_add_(0, reads, slope @ weight[tap].T)
            torch.mm(x.index_select(0, reads).T, slope, out=of_weight[tap])
        return grad, of_weight, g.sum(0), None


class SubMConv3d(nn.Module):
    def __init__(self, inputs, outputs, kernel_size, bias, indice_key):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(kernel_size**3, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.level = indice_key

    def forward(self, sparse):
        if self.level not in sparse.pairs:
            sparse.pairs[self.level] = _find_pairs(sparse.indices)
        pairs = sparse.pairs[self.level]
        return sparse.replace_feature(
            Correlation.apply(sparse.features, self.weight, self.bias, pairs)
        )


def _find_pairs(indices):
    """(tap, rows, the rows that these read) of all taps but the centre."""

    def key(voxel):
        return voxel[:, 0] << 48 | (voxel[:, 1:] + 1) @ torch.tensor([1 << 32, 1 << 16, 1])

    voxels = indices.long()
    keys, order = torch.sort(key(voxels))
    steps = nn.functional.pad(torch.cartesian_prod(*[torch.arange(-1, 2)] * 3), (1, 0))
    found = []
    for tap, step in enumerate(steps):
        wanted = key(voxels + step)
        at = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
        rows = torch.nonzero(keys[at] == wanted)[:, 0]
        if tap != len(steps) // 2:
            found.append((tap, rows, order[at[rows]]))
    return found


class DropPath(nn.Module):
    def __init__(self, share):
        super().__init__()
        self.kept = 1.0 - share

    def forward(self, x):
        if not self.training:
            return x
        return x * (x.new_empty(len(x), 1).bernoulli_(self.kept) / self.kept)


def _attention(qkv, starts, max_seqlen, dropout_p, softmax_scale):
    """Patches of one length that follow one another go together."""
    lengths = np.diff(starts.numpy())
    runs = [(n, len(list(same))) for n, same in itertools.groupby(lengths)]
    out = []
    for part, (n, count) in zip(qkv.split([n * count for n, count in runs]), runs, strict=True):
        q, k, v = part.reshape(count, n, *qkv.shape[1:]).permute(2, 0, 3, 1, 4)
        product = nn.functional.scaled_dot_product_attention(q, k, v, scale=softmax_scale)
        out.append(product.transpose(1, 2).reshape(-1, *qkv.shape[2:]))
    return torch.cat(out)


def _segment(x, pointers, reduce):
    return torch.segment_reduce(x.float(), reduce, offsets=pointers).to(x.dtype)


def _stand_ins():
    """Modules that the released code imports, by name."""

    def module(name, **names):
        made = types.ModuleType(name)
        vars(made).update(names)
        return made

    modules = module("modules", is_spconv_module=lambda layer: isinstance(layer, SubMConv3d))
    sparse = dict(SparseConvTensor=SparseConvTensor, SubMConv3d=SubMConv3d, modules=modules)
    pytorch = module("spconv.pytorch", **sparse)
    return {
        "spconv": module("spconv", pytorch=pytorch),
        "spconv.pytorch": pytorch,
        "flash_attn": module("flash_attn", flash_attn_varlen_qkvpacked_func=_attention),
        "torch_scatter": module("torch_scatter", segment_csr=_segment),
        "timm": module("timm"),
        "timm.layers": module("timm.layers", DropPath=DropPath),
        "huggingface_hub": module(
            "huggingface_hub", hf_hub_download=None, PyTorchModelHubMixin=object
        ),
    }


def _encoder(folder, **options):
    """The base encoder of the code at `folder`."""
    sys.modules.update(_stand_ins())
    sonata = types.ModuleType("sonata")  # without what its own imports besides
    sonata.__path__ = [str(Path(folder).resolve() / "sonata")]
    sys.modules["sonata"] = sonata
    from sonata.model import PointTransformerV3

    setattr(torch.Tensor, "half", lambda x: x)  # noqa: B010  CUDA's attention takes no float32
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    return PointTransformerV3(in_channels=9, order=ORDERS, enc_mode=True, **options)


def forward(cloud: Input, dtype: str, folder: Path) -> Callable[[], None]:
    """A forward pass without gradients; orders, tables and clusters are made in it."""
    network = _encoder(folder, shuffle_orders=False, drop_path=0.0).eval()
    given = _point(cloud.grid, cloud.features, [len(cloud.grid)])

    def call():
        with torch.inference_mode(), torch.autocast("cpu", enabled=dtype == "bfloat16"):
            network(dict(given))

    return call


def _point(grid, features, counts):
    """What the encoder is given: clouds of so many voxels each."""
    features = torch.tensor(features)
    return {
        "feat": features,
        "coord": features[:, :3],
        "grid_coord": torch.tensor(grid),
        "offset": torch.tensor(counts).cumsum(0),
    }


class _Head(nn.Module):
    """Scores of prototypes: both of unit length."""

    def __init__(self, channels, hidden=4096, embed=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, embed))
        self.prototypes = nn.Linear(embed, PROTOTYPES, bias=False)

    def forward(self, x):
        unit = nn.functional.normalize
        return unit(self.mlp(x), dim=-1) @ unit(self.prototypes.weight, dim=-1).T


def _up_cast(point, levels=2):
    """Features of every level, carried up to the one `levels` above the last."""
    for _ in range(levels):
        parent = point.pooling_parent
        parent.feat = torch.cat([parent.feat, point.feat[point.pooling_inverse]], -1)
        point = parent
    return point


@torch.no_grad()
def _sinkhorn(scores):
    share = torch.exp(scores.float() / TEACHER_TEMPERATURE)
    share /= share.sum()
    for _ in range(SINKHORN_STEPS):
        share /= share.sum(0, keepdim=True) * PROTOTYPES
        share /= share.sum(1, keepdim=True) * len(share)
    return share * len(share)


def step(
    views: Sequence[Sequence[dict[str, np.ndarray]]], dtype: str, folder: Path
) -> Callable[[], None]:
    """A training step of Sonata: two heads, three losses, clipping, AdamW, the moving average.

    Args:
      views: for every call what the teacher sees, the same masked, and the small ones: grid (n, 3),
        features (n, 9), mask (n,), counts of the clouds. Making them is not in the step, and
        matches are drawn at random.
      dtype: of the products.
      folder: of the released code.
    """
    backbone = _encoder(folder, mask_token=True, drop_path=0.3)
    channels = 192 + 384 + 512
    parts = {"backbone": backbone, "mask": _Head(channels), "unmask": _Head(channels)}
    student = nn.ModuleDict(parts).train()
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0.04, fused=True)
    points = iter([[_view(view) for view in sides] for sides in views])

    def compare(scores, targets):
        match = torch.randint(len(targets), (len(scores),))
        likely = nn.functional.log_softmax(scores.float() / STUDENT_TEMPERATURE, -1)
        return -(_sinkhorn(targets[match]) * likely).sum(-1).mean()

    def call():
        large, masked, small = next(points)
        with torch.autocast("cpu", enabled=dtype == "bfloat16"):
            with torch.no_grad():
                seen = _up_cast(teacher["backbone"](large)).feat
                targets = {head: teacher[head](seen) for head in ("mask", "unmask")}
            scores = student["mask"](_up_cast(backbone(masked)).feat)
            loss = compare(scores, targets["mask"])  # the same view
            loss = loss + compare(scores, targets["mask"])  # the other one
            scores = student["unmask"](_up_cast(backbone(small)).feat)
            loss = loss + 2 * compare(scores, targets["unmask"])
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            pairs = zip(teacher.parameters(), student.parameters(), strict=True)
            for average, new in pairs:
                average.lerp_(new, 1.0 - MOMENTUM)

    return call


def _view(view):
    point = _point(view["grid"], view["features"], view["counts"])
    return point | {"mask": torch.tensor(view["mask"])}
