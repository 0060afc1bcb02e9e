"""Attention within patches, among slots of one segment, without storing the K x K scores.

The forward pass keeps the output and the log-sum-exp of each query; the backward pass makes the
scores again (FlashAttention, arXiv:2205.14135). Three implementations of this: a loop that suits
CPUs (`attention_loop`), a kernel for TPUs (`attention_tpu`) and one for GPUs (`attention_gpu`).
With a table of relative position bias it is the loop everywhere.

The implementation is chosen when a program is lowered, so that a program is traced without
tracing kernels that its platform does not have.
"""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

from point_jax.geometry.loops import products
from point_jax.ops import attention_loop

SAVED = ("attention_out", "attention_lse")  # names of what the backward pass keeps


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def patch_attention(
    clouds: int,
    width: int,
    qkv: jax.Array,
    segment: jax.Array,
    narrow: jax.Array | None,
    used: jax.Array,
    grid: jax.Array | None = None,
    table: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(D) + bias) v within each patch, among slots of the same segment.

    Args:
      clouds: G, static; segments are below it.
      width: K, slots of a patch, static.
      qkv: (S, 3, H, D), queries, keys and values of every slot, patch after patch.
      segment: (S,) int32 from -1, empty; a slot attends to the slots of its patch with the same
        number.
      narrow: () bool, whether patches have K / 4 slots; None if they never do. The slots of a
        segment then lie in one patch.
      used: () int32, patches in use, the first ones; the others give zeros.
      grid: (S, 3) int32 voxels, for the relative position bias; None for no bias.
      table: (3, R, H) float32, the bias: for each axis by the voxel of the query minus that of the
        key, clipped to what R = 2 bound + 1 entries hold; the three are added. Its gradient is a
        scatter-add, in an order that GPUs do not fix.

    Returns:
      (S, H, D), dtype of qkv. Empty slots are finite where qkv is, and mean nothing. Scores,
      softmax and sums are float32; weights are rounded to the dtype of qkv for their products, in
      the loop for their sum as well.
    """
    return _forward(clouds, width, qkv, segment, narrow, used, grid, table)[0]


def _forward(clouds, width, qkv, segment, narrow, used, grid, table):
    if table is not None:
        return attention_loop.forward(clouds, width, qkv, segment, narrow, used, grid, table)
    rest = () if narrow is None else (narrow,)
    return _forward_p.bind(qkv, segment, used, *rest, clouds=clouds, width=width)


def _fwd(clouds, width, qkv, segment, narrow, used, grid, table):
    found = _forward(clouds, width, qkv, segment, narrow, used, grid, table)
    out, lse = (checkpoint_name(x, name) for x, name in zip(found, SAVED, strict=True))
    return out, (qkv, segment, narrow, used, grid, table, out, lse)


def _bwd(clouds, width, saved, g):
    qkv, segment, narrow, used, grid, table, out, lse = saved
    if table is not None:
        dqkv, dtable = attention_loop.backward(
            clouds, width, qkv, segment, narrow, used, out, lse, g, grid, table
        )
        return dqkv, None, None, None, None, dtable
    rest = () if narrow is None else (narrow,)
    dqkv = _backward_p.bind(qkv, segment, used, out, lse, g, *rest, clouds=clouds, width=width)[0]
    return dqkv, None, None, None, None, None


patch_attention.defvjp(_fwd, _bwd)


def _forward_loop(qkv, segment, used, narrow=None, *, clouds, width):
    return attention_loop.forward(clouds, width, qkv, segment, narrow, used)


def _backward_loop(qkv, segment, used, out, lse, g, narrow=None, *, clouds, width):
    return attention_loop.backward(clouds, width, qkv, segment, narrow, used, out, lse, g)[:1]


def _kernels(platform: str):
    """A platform's module. Imported where it is used: Pallas takes a second."""
    if platform == "tpu":
        from point_jax.ops import attention_tpu as kernels
    else:
        from point_jax.ops import attention_gpu as kernels
    return kernels


def _forward_kernel(platform, qkv, segment, used, narrow=None, *, clouds, width):
    with products(forward_operations(width, qkv)):
        return _kernels(platform).forward(width, qkv, segment, narrow, used)


def _backward_kernel(platform, qkv, segment, used, out, lse, g, narrow=None, *, clouds, width):
    with products(5 * _product(width, qkv)):  # scores, their slopes, and three gradients
        return [_kernels(platform).backward(width, qkv, segment, narrow, used, out, lse, g)]


def forward_operations(width: int, qkv: jax.Array | ShapedArray) -> int:
    """Multiplications and additions of the products that attention of full patches takes."""
    return 2 * _product(width, qkv)  # scores, mixing


def _product(width, qkv):
    """Operations of one of a row's products, queries by keys or the like."""
    slots, _, heads, channels = qkv.shape
    return 2 * slots * width * heads * channels


def _primitive(name, shapes, loop, kernel):
    """A primitive of several results whose implementation is the platform's."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(shapes)

    @cache
    def compiled(clouds, width):
        return jax.jit(partial(primitive.bind, clouds=clouds, width=width))

    primitive.def_impl(lambda *arrays, clouds, width: compiled(clouds, width)(*arrays))
    mlir.register_lowering(primitive, mlir.lower_fun(loop))
    for platform in ("tpu", "cuda"):
        lower = mlir.lower_fun(partial(kernel, platform))
        if platform == "cuda":
            lower = partial(_with_a_gpu, lower)
        mlir.register_lowering(primitive, lower, platform=platform)
    return primitive


def _with_a_gpu(lower, *arguments, **static):
    """Lowers with a GPU in sight, which JAX from 0.11 on asks for; any will do.

    What is lowered is compiled for the GPU that it runs on, which an exporting machine need not
    have.
    """
    mesh = jax.sharding.get_abstract_mesh()
    planned, here = mesh.abstract_device, jax.devices()[0]
    if here.platform == "gpu" or (planned and planned.device_kind != here.device_kind):
        return lower(*arguments, **static)
    known = {"device_kind": "NVIDIA A100", "num_cores": None, "platform": "gpu"}
    fields = {field.name for field in dataclasses.fields(jax.sharding.AbstractDevice)}
    device = jax.sharding.AbstractDevice(**{name: known[name] for name in fields})
    with jax.sharding.use_abstract_mesh(mesh.update(abstract_device=device)):
        return lower(*arguments, **static)


def _forward_shapes(qkv, segment, *_, clouds, width):
    slots, _, heads, channels = qkv.shape
    lse = ShapedArray((heads, slots), jnp.float32)
    return qkv.update(shape=(slots, heads, channels)), lse


def _backward_shapes(qkv, *_, clouds, width):
    return [qkv.update()]


_forward_p = _primitive("patch_attention", _forward_shapes, _forward_loop, _forward_kernel)
_backward_p = _primitive(
    "patch_attention_gradient", _backward_shapes, _backward_loop, _backward_kernel
)
