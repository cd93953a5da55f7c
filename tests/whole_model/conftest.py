from collections.abc import Iterator

import pytest
import torch

from mixout_kernels import _extension, backends


@pytest.fixture(autouse=True)
def _products_of_f_linear(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU backend without its fused product, as on a CPU without AVX-512.

    The order of summation is then F.linear's, and masks, targets and their lives can be compared bit for bit with plain
    models. ``@pytest.mark.fused_product`` keeps the fused product, where there is one.
    """
    if _extension.load()[0] is None:
        yield
        return
    cpu = backends.load("cpu")
    if request.node.get_closest_marker("fused_product") is None:
        monkeypatch.setattr(cpu, "_HAS_PRODUCT", False)
    elif "fused" not in cpu.schedules(torch.float32):
        pytest.skip("NO AVX-512 HERE: there is no fused product on this CPU")
    yield
