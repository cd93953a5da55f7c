"""The emulation shows what a GPU may hide: each of these kernels has one mistake."""

from __future__ import annotations

import re
import subprocess

import pytest

from tools import mutants

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
// The block that arrives last adds up what all of them have stored.
float4 stored[16];
uint32_t arrivals;
void add_up(bool fence_before, bool fence_after) {
  if (thread_index() != 0) return;
  const float value = static_cast<float>(block_x() + 1);
  store_coherent(stored + block_x(), float4{value, value, value, value});
  if (fence_before) device_fence();
  if (atomic_add(&arrivals, 1) + 1 < blocks_x()) return;
  if (fence_after) device_fence();
  out[0] = 0;
  for (int block = 0; block < blocks_x(); ++block) out[0] += load_coherent(stored + block).x;
}
// Blocks and warps in the order in which they get to run.
int started;
void start(bool) {
  if (thread_index() % 32 == 0) out[block_x() * 2 + thread_index() / 32] = static_cast<float>(started++);
  synchronize_block();
}
void sum(bool) { out[thread_index()] = static_cast<float>(warp_sum(thread_index())); }

int main() {
  std::string what, how;
  int seed;
  std::cin >> what >> how >> seed;
  std::memset(out, 0xFF, sizeof(out));
  using emulation::Order;
  if (how == "ascending") emulation::options.order = Order::ascending;
  if (how == "descending") emulation::options.order = Order::descending;
  emulation::machine.random_state = seed;
  if (what == "add_up") {
    launch("kernel", add_up, {16}, 32, 64, nullptr, how != "no_fence_before", how != "no_fence_after");
    std::cout << out[0];
    return 0;
  }
  if (what == "start") {
    launch("kernel", start, {32}, 64, 64, nullptr, true);
    for (const float value : out) std::cout << value << ' ';
    return 0;
  }
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
    return lambda text, seed=1: [float(value) for value in program(f"{text} {seed}").split()]


@pytest.mark.parametrize("order", ["ascending", "descending", "random"])
def test_barriers(run, order):
    assert run(f"pass_on {order}") == [*range(1, 64), 0]
    assert run(f"sum {order}") == [sum(range(32))] * 32 + [sum(range(32, 64))] * 32


def test_a_missing_barrier_reads_poison(run):
    for seed in range(5):
        values = run("pass_on wrong", seed)
        assert sum(value != value for value in values) >= 32  # the last lane of either warp, at the least


def test_asynchronous_copies(run):
    assert run("copy right") == [2.0] * 64  # 8 of 16 bytes, the rest zero
    assert all(value != value for value in run("copy wrong"))  # not waited for: poison


@pytest.mark.parametrize("order", ["ascending", "descending", "random"])
def test_blocks_hand_over_through_memory(run, order):
    for seed in range(5):
        assert run(f"add_up {order}", seed) == [136.0]


@pytest.mark.parametrize("mistake", ["no_fence_before", "no_fence_after"])
def test_a_missing_fence_reads_poison(run, mistake):
    for seed in range(5):
        (total,) = run(f"add_up {mistake}", seed)
        assert total != total


def test_orders(run):
    """In the plain orders block by block; in the random one mixed, otherwise for each seed, and again the same."""
    assert run("start ascending") == list(range(64))
    assert run("start descending") == list(range(63, -1, -1))
    orders = [run("start random", seed) for seed in range(8)]
    assert all(sorted(order) == list(range(64)) for order in orders)
    assert len({tuple(order) for order in orders}) == 8
    assert run("start random", 0) == orders[0]
    apart = [abs(order[2 * block] - order[2 * block + 1]) for order in orders for block in range(32)]
    assert max(apart) > 1  # another block ran between the warps of one


@pytest.mark.parametrize(
    ("what", "message"), [("overrun", "wrote past its shared memory"), ("diverge", "a barrier was not reached by all")]
)
def test_aborts(program, what, message):
    with pytest.raises(subprocess.CalledProcessError) as error:
        program(f"{what} right 1")
    assert message in error.value.stderr


def test_mutants_of_the_kernels():
    """tools/mutants.py takes out every barrier, wait and fence, one at a time, and knows the tests of each file."""
    calls = re.compile(r"(?:synchronize_block|copy_async_wait|copy_async_commit|device_fence)\(")
    found = mutants.mutants(mutants.REPOSITORY)
    for name, expected in ((path.name, path.read_text()) for path in (mutants.REPOSITORY / mutants.KERNELS).iterdir()):
        if name in mutants.INTRINSICS:
            continue
        removed = [mutant.applied_to(expected) for mutant in found if mutant.source.name == name]
        assert len(set(removed)) == len(removed) == len(calls.findall(expected))
        assert all(len(calls.findall(text)) == len(removed) - 1 for text in removed)
        assert not removed or name in mutants.TESTS
