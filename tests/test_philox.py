"""Philox4x32-10 and the mask word, in Python and in C++, against the published known answers and each other."""

import math

import pytest
import torch

import mixout_kernels as mk

# Random123's known answers for philox4x32-10 (design of the mask: section 2): key, counter low, counter high, words.
KNOWN_ANSWERS = [
    (0, 0, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (2**64 - 1, 2**64 - 1, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        0x299F31D0A4093822,
        0x85A308D3243F6A88,
        0x0370734413198A2E,
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
# Around 2^31 and 2^32, where 32-bit indices wrap, and around 4 * 2^32, where the counter's low word does.
LARGE_INDICES = [power + offset for power in (2**31, 2**32, 2**33, 2**34, 2**40, 2**62) for offset in range(-6, 7)]
SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x299F31D0A4093822, -987654321987654321]

PROGRAM = """
#include <cstdio>
#include <iostream>
#include "mix.h"
int main() {
  std::string what;
  while (std::cin >> what) {
    if (what == "philox") {
      uint64_t key, lo, hi;
      std::cin >> key >> lo >> hi;
      for (uint32_t word : mixout::philox4x32_10(key, lo, hi).word) std::cout << word << ' ';
    } else if (what == "word") {
      uint64_t seed, i;
      std::cin >> seed >> i;
      std::cout << mixout::mask_word(seed, i);
    } else if (what == "index") {
      int64_t offset, row, column, r, c;
      std::cin >> offset >> row >> column >> r >> c;
      const mixout::Strides strides{offset, row, column};
      std::cout << strides.index(r, c) << ' ' << strides.transposed().index(c, r);
    } else {
      double p;
      std::cin >> p;
      std::cout << mixout::keep_threshold(p);
    }
    std::cout << '\\n';
  }
}
"""


def signed(value):
    return value - 2**64 if value >= 2**63 else value


def seed_tensor(value):
    return torch.tensor([value], dtype=torch.int64)


@pytest.fixture(scope="module")
def host(compile_host):
    program = compile_host("philox", PROGRAM)

    def ask(lines):
        return [[int(word) for word in line.split()] for line in program("\n".join(lines)).splitlines()]

    return ask


def test_reference_known_answer_of_counter_zero_and_key_zero():
    words = mk.reference.philox4x32_10(seed_tensor(0), torch.tensor([0]))
    assert words.tolist() == [KNOWN_ANSWERS[0][3]]


def test_reference_known_answer_through_the_mask():
    # keep(i) = word >= threshold, so bisecting p finds the word: the public function shows the known answer too.
    words = KNOWN_ANSWERS[0][3]
    for word, just_above in ((word, (word + 1) / 2**32) for word in words):
        lane = words.index(word)
        assert mk.keep_mask(0, p=word / 2**32, shape=(4,))[lane]
        assert not mk.keep_mask(0, p=just_above, shape=(4,))[lane]


def test_csrc_known_answers(host):
    lines = [f"philox {key} {low} {high}" for key, low, high, _ in KNOWN_ANSWERS]
    assert host(lines) == [words for *_, words in KNOWN_ANSWERS]


def test_csrc_equals_the_reference_on_random_keys_and_counters(host):
    keys, counters = torch.randint(-(2**63), 2**63 - 1, (2, 500)).tolist()
    expected = [
        mk.reference.philox4x32_10(seed_tensor(key), seed_tensor(counter))[0].tolist()
        for key, counter in zip(keys, counters, strict=True)
    ]
    lines = [f"philox {key % 2**64} {counter % 2**64} 0" for key, counter in zip(keys, counters, strict=True)]
    assert host(lines) == expected


def test_word_is_the_lane_of_its_block():
    index = torch.arange(3, 27)
    blocks = mk.reference.philox4x32_10(seed_tensor(42), torch.arange(7))
    assert torch.equal(mk.reference.keep_words(seed_tensor(42), index), blocks.flatten()[3:27])


@pytest.mark.parametrize("seed", SEEDS)
def test_words_beyond_2_31_elements(host, seed):
    """The weight mask of a tensor with more than 2^31 elements, on the mask function alone: nothing is allocated."""
    words = mk.reference.keep_words(seed_tensor(seed), torch.tensor(LARGE_INDICES))
    assert host([f"word {seed % 2**64} {i}" for i in LARGE_INDICES]) == [[word] for word in words.tolist()]
    # 64-bit all the way: an index that was cut to 32 bits would repeat the words at its low half.
    low = mk.reference.keep_words(seed_tensor(seed), torch.tensor([i % 2**32 for i in LARGE_INDICES]))
    beyond = torch.tensor([i >= 2**32 for i in LARGE_INDICES])
    assert (words[beyond] != low[beyond]).float().mean() > 0.99


@pytest.mark.parametrize(
    "p", [0.0, 2.0**-33, 1e-9, 0.1, 0.3, 0.5, 0.7, 0.9, 1 - 2.0**-32, math.nextafter(1.0, 0.0), 1.0]
)
def test_threshold(host, p):
    assert host([f"threshold {p!r}"]) == [[math.floor(p * 2**32)]]


@pytest.mark.parametrize("strides", [(0, 0, 1), (7, 1, 0), (0, 0, 0), (5, 2**31 + 3, 1), (2**40, 1, 2**33)], ids=str)
def test_index_of_an_element(host, strides):
    """offset + r * row + c * column in 64 bits, and the same of the transpose."""
    offset, row, column = strides
    places = [(0, 0), (1, 2), (30000, 70000), (2**20, 2**21)]
    expected = [[offset + r * row + c * column] * 2 for r, c in places]
    assert host([f"index {offset} {row} {column} {r} {c}" for r, c in places]) == expected
