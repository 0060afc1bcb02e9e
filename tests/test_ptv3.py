"""PTv3 equals the original, and has the properties that the original lacks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import clouds_of, level_key, load, make_row, voxel_key

from point_jax.interop.pointcept import from_state_dict, to_state_dict
from point_jax.interop.release import config_of, constants, spec_of, variant_of
from point_jax.models.functional import functional
from point_jax.models.ptv3 import PTv3, up_cast
from point_jax.models.spec import STEM_RADIUS, PTv3Spec, StageSpec

CAPACITIES = (1536, 1300, 850, 500, 300)


class Golden:
    """A golden case: the network with the original's weights, its row and its arrays."""

    def __init__(self, name):
        self.arrays, about = load(name)
        weights = load(about["weights_file"].removesuffix(".npz"))[0]
        spec = spec_of(about["config"], variant_of(weights))
        init, self.apply = functional(lambda rngs: PTv3(spec, rngs=rngs))
        self.template = jax.eval_shape(init, jax.random.key(0))
        self.params = jax.tree.map(
            jnp.asarray, from_state_dict(weights, self.template, constants=constants(spec))
        )
        self.weights, self.spec = weights, spec
        depths = np.stack([self.arrays[f"enc{s}.serialized_depth"] for s in range(5)])
        cloud = clouds_of(self.arrays["in.offset"])
        grid = self.arrays["in.grid_coord"]
        stem = STEM_RADIUS if spec.stem == "conv" else 0
        # One shape for all cases, so that they compile once.
        self.row = make_row(grid, cloud, about["config"], depths, CAPACITIES, 4, stem)
        self.x = self.row.put(self.arrays["in.feat"])
        self.coord = self.row.put(self.arrays["in.coord"])
        self.mask = self.row.put(self.arrays["in.mask"]) if spec.mask_token else None
        self.grad_names = about.get("grad_param_names")

    def key(self, level):
        arrays = self.arrays
        return voxel_key(clouds_of(arrays[f"enc{level}.offset"]), arrays[f"enc{level}.grid_coord"])

    def match(self, level, ours, theirs):
        """Both (n, C) in our order of the level's voxels."""
        mine = level_key(self.row.hierarchy[level])
        find = {k: i for i, k in enumerate(self.key(level))}
        return np.asarray(ours)[: len(mine)], theirs[[find[k] for k in mine]]


def close(got, want, tolerance):
    error = np.abs(np.asarray(got) - want).max() / np.abs(want).max()
    assert error < tolerance, f"error {error:.2e} of the largest magnitude, allowed {tolerance:.0e}"


ENCODERS = ["b1_ptv3m2_enc_noflash", "b2_ptv3m2_enc_single_small", "b3_ptv3m2_enc_varlen"]
DECODERS = ["c1_ptv3m2_encdec_noflash", "c3_ptv3m2_encdec_varlen"]
ROTARY = ["d1_utonia_enc_noflash", "d3_utonia_enc_varlen", "d4_utonia_encdec_norope_dec"]
FIRST = ["e1_ptv3m1_encdec_noflash", "e3_ptv3m1_encdec_varlen"]


@pytest.mark.parametrize("name", ENCODERS + DECODERS + ROTARY + FIRST)
def test_features_of_every_level_equal_the_originals(name):
    golden = Golden(name)
    hierarchy = golden.row.hierarchy
    out = jax.jit(golden.apply)(golden.params, golden.x, hierarchy, golden.mask, golden.coord)
    for level in range(5):
        close(*golden.match(level, out.levels[level], golden.arrays[f"enc{level}.feat"]), 1e-4)
    for level, decoded in enumerate(out.decoded):
        close(*golden.match(level, decoded, golden.arrays[f"dec{level}.feat"]), 1e-4)
    for times in (2, 4):
        if f"upcast{times}.feat" in golden.arrays:
            ours = up_cast(out.levels, golden.row.hierarchy, times)
            close(*golden.match(4 - times, ours, golden.arrays[f"upcast{times}.feat"]), 1e-4)


@pytest.mark.parametrize(
    "name", ["b3_ptv3m2_enc_varlen", "c3_ptv3m2_encdec_varlen", "d3_utonia_enc_varlen"]
)
def test_gradients_equal_the_originals(name):
    golden = Golden(name)
    last = 0 if golden.template.get("dec") else 4
    hierarchy = golden.row.hierarchy
    weight = np.zeros((len(hierarchy[last].cloud), golden.arrays["grad.R"].shape[1]), np.float32)
    mine = level_key(hierarchy[last])
    find = {k: i for i, k in enumerate(golden.key(last))}
    weight[: len(mine)] = golden.arrays["grad.R"][[find[k] for k in mine]]

    def loss(params, x):
        out = golden.apply(params, x, hierarchy, golden.mask, golden.coord)
        return ((out.decoded[0] if out.decoded else out.levels[4]) * weight).sum()

    grads, grad_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(golden.params, golden.x)
    close(golden.row.take(grad_x), golden.arrays["grad.in.feat"], 1e-3)
    named = to_state_dict(jax.tree.map(np.asarray, grads))
    names = [n for n in golden.grad_names if n != "in.feat"]
    norms = np.array([np.linalg.norm(named[n]) for n in names])
    np.testing.assert_allclose(
        norms, golden.arrays["grad.norms"][: len(names)], rtol=1e-3, atol=1e-3 * 1e-2
    )
    for key, want in golden.arrays.items():
        name = key.removeprefix("grad.")
        if key.startswith("grad.") and name in named:
            close(named[name], want, 1e-3)


@pytest.mark.parametrize(
    "name", ["b3_ptv3m2_enc_varlen", "c3_ptv3m2_encdec_varlen", *ROTARY[1:], FIRST[1]]
)
def test_weights_go_in_and_out_bit_for_bit(name):
    golden = Golden(name)
    computed = constants(golden.spec)
    for key, array in computed.items():  # what is not a parameter is computed, to a last bit
        np.testing.assert_allclose(array, golden.weights[key], rtol=1e-6)
    kept = {key: golden.weights[key] for key in computed}
    out = to_state_dict(jax.tree.map(np.asarray, golden.params)) | kept
    assert out.keys() == golden.weights.keys()
    for key, array in out.items():
        np.testing.assert_array_equal(array, golden.weights[key])


def test_weights_that_do_not_fit_are_listed():
    golden = Golden("b3_ptv3m2_enc_varlen")
    weights = dict(golden.weights)
    weights["surplus"] = weights.pop("embedding.stem.norm.bias")
    weights["enc.enc4.down.proj.bias"] = np.zeros(7, np.float32)
    with pytest.raises(ValueError) as error:
        from_state_dict(weights, golden.template)
    for part in (
        "missing embedding.stem.norm.bias",
        "left over surplus",
        "enc.enc4.down.proj.bias",
    ):
        assert part in str(error.value)


def test_constants_of_another_network_are_refused():
    golden = Golden("d3_utonia_enc_varlen")
    key = "enc.enc2.block1.attn.rope.inv_freq"
    for wrong in (golden.weights[key] * 2, golden.weights[key][:2]):
        with pytest.raises(ValueError, match=key):
            from_state_dict(
                golden.weights | {key: wrong}, golden.template, constants=constants(golden.spec)
            )


@pytest.mark.parametrize("name", [*ENCODERS[:1], *DECODERS[:1], *ROTARY[1:], FIRST[0]])
def test_a_spec_and_a_release_config_say_the_same(name):
    spec = Golden(name).spec
    variant, config = config_of(spec)
    assert spec_of(config, variant) == spec


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        ("PT-v3m2", {"rope_base": 10}, "rope_base: PT-v3m2 has no such argument"),
        ("PT-v3m2", {"pre_norm": False}, "pre_norm=False: not built here"),
        ("PT-v3m2", {"stride": (2, 2, 4, 2)}, "stride"),
        ("PT-v3m1", {"pdnorm_bn": True}, "pdnorm_bn=True: not built here"),
        ("PT-v3m3", {}, "rope_base is missing"),
        ("PT-v3m3", {"rope_base": 10}, "multiple of 6, got 16"),
        ("PT-v3m2", {"enc_depths": (1, 1)}, "different lengths"),
        ("PT-v3m2", {"order": ("z", "y")}, "no curve 'y'"),
    ],
)
def test_a_config_that_cannot_be_built_says_why(variant, change, message):
    with pytest.raises(ValueError, match=message):
        spec_of(change, variant)


def test_the_base_encoder_has_the_papers_size():
    stages = zip((3, 3, 3, 12, 3), (48, 96, 192, 384, 512), (3, 6, 12, 24, 32), strict=True)
    spec = PTv3Spec(tuple(StageSpec(*numbers, 1024) for numbers in stages))
    init, _ = functional(lambda rngs: PTv3(spec, rngs=rngs))
    shapes = jax.tree.leaves(jax.eval_shape(init, jax.random.key(0)))
    assert round(sum(np.prod(s.shape) for s in shapes) / 1e6, 2) == 108.46
