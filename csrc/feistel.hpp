// A random permutation of [0, size) in O(1) memory: a Feistel network over the next power of two, with cycle walking
// (Black, Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).
#pragma once

#include <array>
#include <cassert>
#include <cstdint>

#include "philox.hpp"

namespace vito {

constexpr uint64_t kMaxShuffle = uint64_t{1} << 40;

class Feistel {
 public:
  // size in [1, 2^40].
  Feistel(uint64_t size, uint64_t seed, uint64_t epoch) : size_(size) {
    assert(size >= 1 && size <= kMaxShuffle);
    int bits = 2;
    while (bits < 40 && (uint64_t{1} << bits) < size) ++bits;
    low_bits_ = bits / 2;
    low_mask_ = (1u << low_bits_) - 1;
    high_mask_ = (1u << (bits - low_bits_)) - 1;
    for (uint32_t i = 0; i < kRounds; i += 4) {
      const Block keys = draw(seed, epoch, 0, Purpose::shuffle, 0, i / 4);
      for (uint32_t j = 0; j < 4; ++j) keys_[i + j] = keys[j];
    }
  }

  uint64_t operator()(uint64_t position) const {
    assert(position < size_);
    // Ends, because the walk stays on the cycle that it started from; less than two steps on average.
    do position = permute(position);
    while (position >= size_);
    return position;
  }

 private:
  static constexpr uint32_t kRounds = 8;

  // Each round adds to one half a function of the other. Adding it again undoes it, so a round is a bijection for any
  // function and for unequal halves.
  uint64_t permute(uint64_t x) const {
    uint32_t low = static_cast<uint32_t>(x) & low_mask_, high = static_cast<uint32_t>(x >> low_bits_);
    for (uint32_t i = 0; i < kRounds; i += 2) {
      high ^= mix(low, keys_[i]) & high_mask_;
      low ^= mix(high, keys_[i + 1]) & low_mask_;
    }
    return uint64_t{high} << low_bits_ | low;
  }

  // Two multiply-xorshift steps with a keyed entry: every input bit reaches the low bits that the mask keeps.
  static uint32_t mix(uint32_t x, uint32_t key) {
    x = (x ^ key) * 0x7FEB352Du;
    x = (x ^ (x >> 15) ^ key) * 0x846CA68Bu;
    return x ^ (x >> 16);
  }

  uint64_t size_;
  int low_bits_;
  uint32_t low_mask_, high_mask_;
  std::array<uint32_t, kRounds> keys_{};
};

}  // namespace vito
