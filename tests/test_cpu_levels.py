"""The CPU loops at every instruction-set level: the same bits, and 64-bit indices.

The extension holds one clone of each loop for AVX-512, AVX2 and the baseline, and picks by cpuid. Neither
GLIBC_TUNABLES nor ATEN_CPU_CAPABILITY steers that choice (it is libgcc's, not glibc's or ATen's), so
csrc/cpu/kernels.cpp is compiled here once for each level, without its clones, and the three programs are compared.
"""

import platform
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

import mixout_kernels as mk
from mixout_kernels import _extension

# What a level needs of /proc/cpuinfo. GCC before 12 clones by single features.
NEEDS = {
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "x86-64-v3": {"avx2", "bmi1", "bmi2", "f16c", "fma"},
    "avx512f": {"avx512f"},
    "avx2": {"avx2"},
    "baseline": set(),
}

if platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists():
    pytest.skip("instruction-set levels are chosen on x86-64 Linux only", allow_module_level=True)

# Every function of kernels.h on fixed pseudo-random data, the results as hexadecimal bytes, a line each.
PROGRAM = """
#include <cstdio>
#include <cstring>
#include "cpu/kernels.cpp"
using namespace mixout::cpu;
constexpr int64_t kN = 1003, kRows = 37, kColumns = 41;

template <typename T>
void print(const char* name, const std::vector<T>& values) {
  std::printf("%s", name);
  std::vector<unsigned char> bytes(values.size() * sizeof(T));
  std::memcpy(bytes.data(), values.data(), bytes.size());
  for (unsigned char byte : bytes) std::printf("%02x", byte);
  std::printf("\\n");
}

// Of many magnitudes, subnormal numbers among them.
template <typename T>
std::vector<T> data(uint64_t key, int64_t n) {
  std::vector<T> values(n);
  for (int64_t i = 0; i < n; ++i) {
    const auto r = mixout::philox4x32_10(key, i);
    values[i] = static_cast<T>(std::ldexp(static_cast<float>(static_cast<int32_t>(r.word[0])), -20 - r.word[1] % 40));
  }
  return values;
}

template <typename W, typename U, typename O>
void mixes() {
  std::vector<uint32_t> words(kN);
  mask_words(7, 0, 1, kN, words.data());
  const auto w = data<W>(1, kN);
  const auto u = data<U>(2, kN);
  const arithmetic_t<W> scale = 1 / 0.3;
  for (const U* target : {u.data(), static_cast<const U*>(nullptr)}) {
    std::vector<O> out(kN);
    mix_by_words(w.data(), target, out.data(), words.data(), 3006477107u, scale, kN);
    print("mix_by_words ", out);
    for (bool keep : {true, false}) {
      mix_run(w.data(), target, out.data(), keep, scale, kN);
      print("mix_run ", out);
    }
  }
}

template <typename T, typename O>
void columns() {
  std::vector<int64_t> kept(kColumns + 1);
  const int64_t n = kept_columns(5, 3, 2147483648u, kColumns, kept.data());
  const auto x = data<T>(3, kRows * kColumns);
  std::vector<O> gathered(kRows * (n + 3));
  gather_columns(
      x.data(), kColumns, gathered.data(), n + 3, n + 3, kept.data(), n, arithmetic_t<T>(1 / 0.3), kRows);
  print("gather ", gathered);
  const auto compact = data<O>(4, n * kRows);
  std::vector<T> dw(kRows * kColumns);
  scatter_columns_transposed(
      compact.data(), kRows, dw.data(), kColumns, kept.data(), n, arithmetic_t<O>(1 / 0.3), kRows);
  print("scatter_transposed ", dw);
  std::vector<O> dx(kRows * kColumns);
  scatter_columns(compact.data(), dx.data(), kColumns, kept.data(), n, kRows);
  print("scatter ", dx);
}

int main() {
  using c10::BFloat16;
  using c10::Half;
  for (uint64_t first : {0ull, 3ull, (1ull << 31) - 5, (1ull << 33) + 6, (1ull << 40) + 1})
    for (uint64_t stride : {1ull, 5ull, 1ull << 31}) {
      std::vector<uint32_t> words(101);
      mask_words(0x123456789ABCDEFull, first, stride, 101, words.data());
      std::printf("words %llu %llu", static_cast<unsigned long long>(first), static_cast<unsigned long long>(stride));
      for (uint32_t word : words) std::printf(" %u", word);
      std::printf("\\n");
    }
  for (uint64_t first : {0ull, (1ull << 33) + 4, (1ull << 40)})
    for (uint64_t stride : {4ull, 1ull << 31}) {
      std::vector<uint32_t> words(4 * 101);
      mask_words_of_four_rows(0x123456789ABCDEFull, first, stride, 101, words.data());
      for (int lane = 0; lane < 4; ++lane) {
        const unsigned long long from = first + lane, step = stride;
        std::printf("words %llu %llu", from, step);
        for (int j = 0; j < 101; ++j) std::printf(" %u", words[101 * lane + j]);
        std::printf("\\n");
      }
    }
  mixes<double, double, double>();
  mixes<float, float, float>();
  mixes<float, float, BFloat16>();
  mixes<float, float, Half>();
  mixes<float, BFloat16, float>();
  mixes<float, BFloat16, BFloat16>();
  mixes<BFloat16, BFloat16, BFloat16>();
  mixes<Half, Half, Half>();
  columns<double, double>();
  columns<float, float>();
  columns<float, BFloat16>();
  columns<float, Half>();
  columns<BFloat16, BFloat16>();
  columns<Half, Half>();
}
"""


WORD_LINES = 5 * 3 + 3 * 2 * 4  # of mask_words, and of mask_words_of_four_rows


def cpu_flags():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next(line for line in lines if line.startswith("flags")).split(":")[1].split())


def runnable(levels):
    return [level for level in levels if NEEDS[level] <= cpu_flags()]


@pytest.fixture(scope="module")
def outputs(compile_host):
    """What the program prints, for each level that this machine can run."""
    includes = [f"-isystem{path}" for path in include_paths()]
    flags = ["-std=c++20", "-O3", "-ffp-contract=off", "-Dtarget_clones(...)="]  # the last: no clones
    return {
        level: compile_host(
            "levels", PROGRAM, *flags, *includes, f"-march={'x86-64' if level == 'baseline' else level}"
        )("").splitlines()
        for level in runnable(["x86-64-v4", "x86-64-v3", "baseline"])
    }


def test_every_level_gives_the_same_bits(outputs):
    assert "baseline" in outputs
    assert len(outputs["baseline"]) == WORD_LINES + 8 * 6 + 6 * 3
    for level, lines in outputs.items():
        assert lines == outputs["baseline"], level


def test_words_for_large_indices_and_strides_are_the_reference_s(outputs):
    """A transposed weight mask steps through the indices by its row length: beyond 2^31 too."""
    seed = torch.tensor([0x123456789ABCDEF])
    for line in outputs["baseline"][:WORD_LINES]:
        name, first, stride, *words = line.split()
        assert name == "words"
        index = int(first) + int(stride) * torch.arange(101)
        assert mk.reference.keep_words(seed, index).tolist() == [int(word) for word in words]


def test_the_extension_reports_the_level_of_this_cpu():
    extension = _extension.load()[0]
    if extension is None:
        pytest.skip("no compiled extension")
    info = extension.build_info()
    if info["cpu_levels"] == ["baseline"]:
        pytest.skip(f"built without clones by {info['compiler']}")
    assert info["cpu_levels"][-1] == "baseline"
    assert info["cpu_level_used"] == runnable(info["cpu_levels"])[0]
    binary = Path(extension.__file__).read_bytes()
    for level in info["cpu_levels"][:-1]:  # the symbol of a clone ends in its level
        suffix = f"arch_{level}".replace("-", "_") if level.startswith("x86") else level
        assert f".{suffix}".encode() in binary
