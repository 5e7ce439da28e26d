// XXH64, the checksum of everything a store holds (algorithm: Yann Collet, xxHash fast digest specification 0.2).
// Chosen over CRC32C because it runs at memory speed without special instructions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace vito {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "store files are little-endian and are read in place");

template <class T>
inline T load(const unsigned char* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

namespace detail {
constexpr uint64_t kPrime1 = 0x9E3779B185EBCA87u, kPrime2 = 0xC2B2AE3D27D4EB4Fu, kPrime3 = 0x165667B19E3779F9u,
                   kPrime4 = 0x85EBCA77C2B2AE63u, kPrime5 = 0x27D4EB2F165667C5u;

inline uint64_t rotate(uint64_t x, int bits) { return (x << bits) | (x >> (64 - bits)); }
inline uint64_t lane(uint64_t acc, uint64_t input) { return rotate(acc + input * kPrime2, 31) * kPrime1; }
inline uint64_t merge(uint64_t hash, uint64_t acc) { return (hash ^ lane(0, acc)) * kPrime1 + kPrime4; }
}  // namespace detail

inline uint64_t xxh64(const void* data, size_t size, uint64_t seed) {
  using namespace detail;
  const unsigned char* p = static_cast<const unsigned char*>(data);
  const unsigned char* const end = p + size;
  uint64_t hash = seed + kPrime5;
  if (size >= 32) {
    uint64_t a = seed + kPrime1 + kPrime2, b = seed + kPrime2, c = seed, d = seed - kPrime1;
    for (; end - p >= 32; p += 32) {
      a = lane(a, load<uint64_t>(p));
      b = lane(b, load<uint64_t>(p + 8));
      c = lane(c, load<uint64_t>(p + 16));
      d = lane(d, load<uint64_t>(p + 24));
    }
    hash = rotate(a, 1) + rotate(b, 7) + rotate(c, 12) + rotate(d, 18);
    hash = merge(merge(merge(merge(hash, a), b), c), d);
  }
  hash += size;
  for (; end - p >= 8; p += 8) hash = rotate(hash ^ lane(0, load<uint64_t>(p)), 27) * kPrime1 + kPrime4;
  if (end - p >= 4) {
    hash = rotate(hash ^ (load<uint32_t>(p) * kPrime1), 23) * kPrime2 + kPrime3;
    p += 4;
  }
  for (; p < end; ++p) hash = rotate(hash ^ (*p * kPrime5), 11) * kPrime1;
  hash = (hash ^ (hash >> 33)) * kPrime2;
  hash = (hash ^ (hash >> 29)) * kPrime3;
  return hash ^ (hash >> 32);
}

// What the index keeps of a packet: 32 bits miss a random corruption once in four thousand million.
inline uint32_t packet_checksum(const void* data, size_t size) { return static_cast<uint32_t>(xxh64(data, size, 0)); }

}  // namespace vito
