"""The emulation shows what a GPU may hide: each of these kernels has one mistake."""

from __future__ import annotations

import subprocess

import pytest

PROGRAM = """
#include <cstring>
#include <iostream>
#include <string>
#include "cuda/launch.h"
using namespace mixout::cuda;

float out[64];

// Each thread hands its number to the next one.
void pass_on(bool barrier) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  shared[thread_index()] = thread_index();
  if (barrier) synchronize_block();
  out[thread_index()] = shared[(thread_index() + 1) % 64];
}
void copy(bool wait) {
  alignas(16) static const float source[4] = {1, 2, 3, 4};
  auto* shared = reinterpret_cast<float*>(shared_memory()) + 4 * thread_index();
  copy_async(shared, source, 8);
  copy_async_commit();
  if (wait) copy_async_wait(0);
  out[thread_index()] = shared[1] + shared[3];
}
void overrun(bool) { shared_memory()[64 * 16 + thread_index()] = 1; }
void diverge(bool) {
  if (thread_index() < 32) synchronize_block();
}
void sum(bool) { out[thread_index()] = static_cast<float>(warp_sum(thread_index())); }

int main() {
  std::string what, how;
  std::cin >> what >> how;
  std::memset(out, 0xFF, sizeof(out));
  emulation::options.descending = how == "descending";
  const auto kernel = what == "copy" ? copy : what == "overrun" ? overrun : what == "diverge" ? diverge
      : what == "sum" ? sum : pass_on;
  launch("kernel", kernel, {1}, 64, 64 * 16, nullptr, how != "wrong");
  for (const float value : out) std::cout << value << ' ';
}
"""


@pytest.fixture(scope="module")
def program(compile_host):
    return compile_host("emulation", PROGRAM, "-std=c++17", "-DMIXOUT_HOST_EMULATION", "-U_FORTIFY_SOURCE")


@pytest.fixture(scope="module")
def run(program):
    return lambda text: [float(value) for value in program(text).split()]


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_barriers(run, order):
    assert run(f"pass_on {order}") == [*range(1, 64), 0]
    assert run(f"sum {order}") == [sum(range(32))] * 32 + [sum(range(32, 64))] * 32


def test_a_missing_barrier_reads_poison(run):
    values = run("pass_on wrong")
    assert sum(value != value for value in values) == 63  # all but the last thread, which runs last


def test_asynchronous_copies(run):
    assert run("copy right") == [2.0] * 64  # 8 of 16 bytes, the rest zero
    assert all(value != value for value in run("copy wrong"))  # not waited for: poison


@pytest.mark.parametrize(
    ("what", "message"), [("overrun", "wrote past its shared memory"), ("diverge", "a barrier was not reached by all")]
)
def test_aborts(program, what, message):
    with pytest.raises(subprocess.CalledProcessError) as error:
        program(f"{what} right")
    assert message in error.value.stderr
