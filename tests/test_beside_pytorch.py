"""The stand-ins that PyTorch's encoder is timed with (needs PyTorch)."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from pytorch_sonata import SparseConvTensor, SubMConv3d  # noqa: E402

GRID = 5


@pytest.fixture
def sparse():
    """Two clouds of 40 voxels of a grid, in any order, two channels."""
    draw = np.random.default_rng(0)
    voxels = np.concatenate(
        [
            np.stack([np.full(40, cloud), *np.unravel_index(places, (GRID,) * 3)], axis=1)
            for cloud in range(2)
            for places in [draw.permutation(GRID**3)[:40]]
        ]
    )
    features = torch.tensor(draw.normal(size=(80, 2)), requires_grad=True)
    return SparseConvTensor(features, torch.tensor(voxels, dtype=torch.int32), [GRID] * 3, 2)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    made = SubMConv3d(2, 3, 3, bias=True, indice_key="level").double()
    for values in made.parameters():
        torch.nn.init.normal_(values)
    return made


def test_the_convolution_is_a_dense_one_read_at_the_voxels(sparse, layer):
    cloud, *at = sparse.indices.long().T
    dense = torch.zeros(2, 2, GRID, GRID, GRID, dtype=torch.float64)
    dense[cloud, :, *at] = sparse.features.detach()
    kernel = layer.weight.detach().reshape(3, 3, 3, 2, 3).permute(4, 3, 0, 1, 2)
    wanted = torch.nn.functional.conv3d(dense, kernel, layer.bias.detach(), padding=1)
    torch.testing.assert_close(layer(sparse).features.detach(), wanted[cloud, :, *at])


def test_its_gradients_are_those_of_finite_differences(sparse, layer):
    def run(features, weight, bias):
        parameters = {"weight": weight, "bias": bias}
        replaced = sparse.replace_feature(features)
        return torch.func.functional_call(layer, parameters, (replaced,)).features

    assert torch.autograd.gradcheck(run, (sparse.features, *layer.parameters()), fast_mode=True)
