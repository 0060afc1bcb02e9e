"""The convolution that PyTorch's encoder is timed with (needs PyTorch, which is an extra)."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytorch_sonata = pytest.importorskip("pytorch_sonata")

GRID = 5


def clouds(each, voxels, seed=0):
    """Two clouds of so many points, on as many different voxels of a grid, in any order."""
    draw = np.random.default_rng(seed)
    rows = []
    for cloud in range(2):
        known = draw.permutation(GRID**3)[:voxels]
        places = np.concatenate([known, draw.choice(known, each - voxels)])
        at = np.unravel_index(draw.permutation(places), (GRID,) * 3)
        rows.append(np.stack([np.full(each, cloud), *at], axis=1))
    features = torch.tensor(draw.normal(size=(2 * each, 2)), requires_grad=True)
    voxels = torch.tensor(np.concatenate(rows), dtype=torch.int32)
    return pytorch_sonata.SparseConvTensor(features, voxels, [GRID] * 3, 2)


def convolution(level="level0"):
    """One of two to three channels, with random weights, at a level of the network."""
    torch.manual_seed(0)
    made = pytorch_sonata.SubMConv3d(2, 3, 3, bias=True, indice_key=level).double()
    for values in made.parameters():
        torch.nn.init.normal_(values)
    return made


def dense(layer, sparse):
    """What PyTorch's convolution of a grid has at the voxels."""
    cloud, *at = sparse.indices.long().T
    grid = torch.zeros(2, 2, GRID, GRID, GRID, dtype=torch.float64)
    grid[cloud, :, *at] = sparse.features.detach()
    kernel = layer.weight.detach().reshape(3, 3, 3, 2, 3).permute(4, 3, 0, 1, 2)
    found = torch.nn.functional.conv3d(grid, kernel, layer.bias.detach(), padding=1)
    return found[cloud, :, *at]


def test_it_is_a_dense_convolution_read_at_the_voxels():
    layer, cloud = convolution(), clouds(40, 40)
    torch.testing.assert_close(layer(cloud).features.detach(), dense(layer, cloud))


def test_every_level_has_pairs_of_its_own():
    cloud, other = clouds(40, 40), clouds(30, 30, seed=1)
    other.pairs = convolution()(cloud).pairs  # as a coarser level of the same network
    coarser = convolution("level1")
    torch.testing.assert_close(coarser(other).features.detach(), dense(coarser, other))


def test_in_bfloat16_only_rounding_differs():
    layer, cloud = convolution().float(), clouds(40, 40)
    plain = layer(cloud.replace_feature(cloud.features.float())).features
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer(cloud.replace_feature(cloud.features.float())).features
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), plain, atol=0.2, rtol=0)


@pytest.mark.parametrize("voxels", [40, 30], ids=["distinct", "shared"])
def test_its_gradients_are_those_of_finite_differences(voxels):
    layer, cloud = convolution(), clouds(40, voxels)

    def run(features, weight, bias):
        parameters = {"weight": weight, "bias": bias}
        replaced = cloud.replace_feature(features)
        return torch.func.functional_call(layer, parameters, (replaced,)).features

    assert torch.autograd.gradcheck(run, (cloud.features, *layer.parameters()), fast_mode=True)
