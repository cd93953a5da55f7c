"""Every Triton kernel in every configuration that ships, as ptxas compiles it: no spills, tensor cores in their place.

For sm_90; ``--exhaustive`` compiles for sm_80 and sm_100 too, as ``make codegen`` does, which takes ten minutes more.
"""

import pytest

from .conftest import INTERPRETED, needs_compiler

pytestmark = needs_compiler

if INTERPRETED:
    CASES = [None]
else:
    from tools import codegen_triton

    CASES = codegen_triton.cases()


def pytest_generate_tests(metafunc):
    everything = metafunc.config.getoption("--exhaustive") and not INTERPRETED
    metafunc.parametrize("arch", list(codegen_triton.SHARED_MEMORY) if everything else [90])


@pytest.mark.parametrize("launch", CASES, ids=lambda launch: launch and launch.configuration)
def test_compiles_within_bounds(launch, arch):
    kernel = codegen_triton.compile_case(launch, arch)
    assert codegen_triton.problems(kernel, launch) == []
