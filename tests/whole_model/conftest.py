from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from mixout_kernels import _extension, backends


@contextmanager
def products_of_f_linear() -> Iterator[None]:
    """The CPU backend without its fused products, of any dtype, as on a CPU without AVX2.

    The order of summation is then F.linear's, and masks, targets and their lives can be compared bit for bit with plain
    models.
    """
    if _extension.load()[0] is None:
        yield
        return
    cpu = backends.load("cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_HAS_PRODUCT", False)
        patch.setattr(cpu, "_HAS_F16_PRODUCT", False)
        patch.setattr(cpu, "_BF16_UNIT", "none")
        yield


@pytest.fixture(autouse=True)
def _products_of_f_linear(request: pytest.FixtureRequest) -> Iterator[None]:
    """For every test here; ``@pytest.mark.fused_product`` keeps the fused product, where there is one."""
    if request.node.get_closest_marker("fused_product") is None:
        with products_of_f_linear():
            yield
        return
    if _extension.load()[0] is not None and "fused" not in backends.load("cpu").schedules(torch.float32):
        pytest.skip("NO AVX2 HERE: there is no fused product on this CPU")
    yield
