// Philox4x32-10, a counter-based random generator: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as
// 1, 2, 3", SC 2011. A block is a pure function of (key, counter), and so is the sampler.
#pragma once

#include <array>
#include <cstdint>

namespace vito {

using Block = std::array<uint32_t, 4>;

inline Block philox(uint64_t key, Block counter) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * counter[0];
    const uint64_t b = uint64_t{0xCD9E8D57u} * counter[2];
    counter = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ k0, static_cast<uint32_t>(b),
               static_cast<uint32_t>(a >> 32) ^ counter[3] ^ k1, static_cast<uint32_t>(a)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return counter;
}

// What a block is for: the top byte of the counter's last word, so that no two uses share random bits.
enum class Purpose : uint32_t { times = 0, crop = 1, photometric = 2, replacement = 3, shuffle = 4 };

// Block `number` of the bits that sample `n`, on attempt `attempt`, uses for `purpose` in `view`.
inline Block draw(uint64_t seed, uint64_t n, uint32_t attempt, Purpose purpose, uint32_t view, uint32_t number) {
  return philox(seed, {static_cast<uint32_t>(n), static_cast<uint32_t>(n >> 32), attempt,
                       static_cast<uint32_t>(purpose) << 24 | view << 16 | number});
}

// [0, 1), in steps of 2^-32.
inline double unit(uint32_t bits) { return bits * 0x1p-32; }

}  // namespace vito
