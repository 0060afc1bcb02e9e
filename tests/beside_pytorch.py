"""Forward passes of the released PyTorch encoder and of this one, in the same minutes.

    git clone https://github.com/facebookresearch/sonata
    pip install torch==2.13.0 addict
    python tests/beside_pytorch.py --sonata=sonata [--input=FILE | --points=N] [--dtype=bfloat16]

Two machines, or two hours of one, differ by more than the two programs do. So processes of either
take turns, and the ratio is that of their medians. The released code is run as it is, random
weights, without gradients; what of it needs CUDA has a stand-in of PyTorch's own operations:
`scaled_dot_product_attention`, a convolution tap by tap, `segment_reduce`. Both begin with voxels
and features and make orders, tables and clusters themselves.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("jax", "pytorch")


def stand_ins(torch):
    """Modules that the released code imports, by name."""
    from torch import nn

    class SparseConvTensor:
        def __init__(self, features, indices, spatial_shape, batch_size, pairs=None):
            self.features, self.indices, self.shape = features, indices, (spatial_shape, batch_size)
            self.pairs = {} if pairs is None else pairs  # of each level, found once

        def replace_feature(self, features):
            return SparseConvTensor(features, self.indices, *self.shape, self.pairs)

    def find_pairs(indices):
        def key(voxel):
            return voxel[:, 0] << 48 | (voxel[:, 1:] + 1) @ torch.tensor([1 << 32, 1 << 16, 1])

        voxels = indices.long()
        keys, order = torch.sort(key(voxels))
        steps = torch.cartesian_prod(*[torch.arange(-1, 2)] * 3)
        for step in nn.functional.pad(steps, (1, 0)):
            wanted = key(voxels + step)
            at = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
            rows = torch.nonzero(keys[at] == wanted)[:, 0]
            yield rows, order[at[rows]]

    class SubMConv3d(nn.Module):
        def __init__(self, inputs, outputs, kernel_size, bias, indice_key):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(kernel_size**3, inputs, outputs))
            self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
            self.level = indice_key

        def forward(self, sparse):
            if self.level not in sparse.pairs:
                sparse.pairs[self.level] = list(find_pairs(sparse.indices))
            x = sparse.features
            weight, centre = self.weight.to(x.dtype), len(self.weight) // 2
            out = torch.addmm(self.bias.to(x.dtype), x, weight[centre])
            for tap, (rows, reads) in enumerate(sparse.pairs[self.level]):
                if tap != centre:
                    out.index_add_(0, rows, x[reads] @ weight[tap])
            return sparse.replace_feature(out)

    def attention(qkv, starts, max_seqlen, dropout_p, softmax_scale):
        # One cloud: whole patches, or one of its own length.
        patches = qkv.reshape(-1, min(len(qkv), max_seqlen), *qkv.shape[1:])
        q, k, v = patches.permute(2, 0, 3, 1, 4)
        product = nn.functional.scaled_dot_product_attention(q, k, v, scale=softmax_scale)
        return product.transpose(1, 2).reshape(-1, *qkv.shape[2:])

    def segment(x, pointers, reduce):
        return torch.segment_reduce(x.float(), reduce, offsets=pointers).to(x.dtype)

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
        "flash_attn": module("flash_attn", flash_attn_varlen_qkvpacked_func=attention),
        "torch_scatter": module("torch_scatter", segment_csr=segment),
        "timm": module("timm"),
        "timm.layers": module("timm.layers", DropPath=nn.Identity),
        "huggingface_hub": module(
            "huggingface_hub", hf_hub_download=None, PyTorchModelHubMixin=object
        ),
    }


def pytorch_call(grid, features, dtype, folder):
    """A forward pass of the base encoder at `folder`."""
    import torch

    sys.modules.update(stand_ins(torch))
    sonata = types.ModuleType("sonata")  # without what its own imports besides
    sonata.__path__ = [str(Path(folder).resolve() / "sonata")]
    sys.modules["sonata"] = sonata
    from sonata.model import PointTransformerV3

    setattr(torch.Tensor, "half", lambda x: x)  # noqa: B010  CUDA's attention takes no float32
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    orders = ("z", "z-trans", "hilbert", "hilbert-trans")
    network = PointTransformerV3(
        in_channels=9, order=orders, enc_mode=True, shuffle_orders=False, drop_path=0.0
    ).eval()
    feat, voxels = torch.from_numpy(features), torch.from_numpy(grid)
    given = {"feat": feat, "coord": feat[:, :3], "grid_coord": voxels}
    given["offset"] = torch.tensor([len(grid)])

    def call():
        with torch.inference_mode(), torch.autocast("cpu", enabled=dtype == "bfloat16"):
            network(dict(given))

    return call


def jax_call(grid, features, dtype, _):
    """The same as `launch.benchmark` measures it."""
    import jax

    from launch import benchmark
    from point_jax.measure.inputs import Input

    flags, rest = benchmark.parse(["", f"--dtype={dtype}"])
    build = benchmark.builder(flags, benchmark.read_config(flags, rest))
    none = np.zeros((0, 3), np.float32)
    program = build(Input("", grid, features, none, none, none))
    compiled = program.function.lower(*program.arguments, *program.static).compile()
    return lambda: jax.block_until_ready(compiled(*program.arguments))


def measure(side, file, dtype, folder, calls):
    """Seconds of each call, two before them not counted."""
    arrays = np.load(file)
    make = pytorch_call if side == "pytorch" else jax_call
    call, taken = make(arrays["grid"], arrays["features"], dtype, folder), []
    for _ in range(2 + calls):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return taken[2:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sonata", required=True, help="the released code's folder")
    parser.add_argument("--input", type=Path, help="as for launch.benchmark")
    parser.add_argument("--points", type=int, default=20_000, help="of a room, without --input")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument("--calls", type=int, default=5, help="of each process")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # of a child
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if given.side:
        print(*measure(given.side, given.input, given.dtype, given.sonata, given.calls))
        return 0
    if not (Path(given.sonata) / "sonata" / "model.py").is_file():
        parser.error(f"--sonata={given.sonata} has no sonata/model.py")

    from point_jax.measure.inputs import file_input, room_input

    cloud = file_input(given.input, 0.02) if given.input else room_input(given.points, 0.02)
    found = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cloud.npz"
        np.savez(file, grid=cloud.grid, features=cloud.features)
        env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": folder}
        for _ in range(given.rounds):
            for side in SIDES:
                command = [sys.executable, __file__, *sys.argv[1:], f"--side={side}"]
                command += [f"--input={file}"]
                said = subprocess.run(command, env=env, text=True, stdout=subprocess.PIPE)
                if said.returncode:
                    return said.returncode
                seconds = map(float, said.stdout.splitlines()[-1].split())
                found[side].append(statistics.median(seconds))
                print(f"{side} {found[side][-1]:.3f} s", flush=True)
    ours, theirs = (statistics.median(found[side]) for side in SIDES)
    print(f"{cloud.name}, {len(cloud.grid):,} voxels, {given.dtype}: here {ours:.3f} s, ", end="")
    print(f"PyTorch {theirs:.3f} s, ratio {ours / theirs:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
