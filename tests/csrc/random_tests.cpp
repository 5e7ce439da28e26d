#include <algorithm>
#include <array>
#include <map>
#include <vector>

#include "check.hpp"
#include "feistel.hpp"
#include "hash.hpp"
#include "philox.hpp"

using namespace vito;

// Known answers of Random123 1.14 (tests/kat_vectors, "philox4x32 10").
TEST(random, philox_known_answers) {
  CHECK((philox(0, {0, 0, 0, 0}) == Block{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  CHECK((philox(~uint64_t{0}, {~0u, ~0u, ~0u, ~0u}) == Block{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  CHECK((philox(0x299f31d0a4093822u, {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}) ==
         Block{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

// From the xxHash specification's sanity checks and its users' documentation.
TEST(random, xxh64_known_answers) {
  CHECK_EQUAL(xxh64("", 0, 0), 0xEF46DB3751D8E999u);
  CHECK_EQUAL(xxh64("abc", 3, 0), 0x44BC2CF5AD770999u);
  const char* text = "Nobody inspects the spammish repetition";
  CHECK_EQUAL(xxh64(text, 39, 0), 0xFBCEA83C8A378BF1u);
}

TEST(random, every_bit_of_the_input_changes_the_checksum) {
  std::vector<unsigned char> bytes(77);
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<unsigned char>(i * 37);
  const uint32_t before = packet_checksum(bytes.data(), bytes.size());
  for (size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    bytes[bit / 8] ^= static_cast<unsigned char>(1 << bit % 8);
    CHECK(packet_checksum(bytes.data(), bytes.size()) != before);
    bytes[bit / 8] ^= static_cast<unsigned char>(1 << bit % 8);
  }
}

TEST(random, feistel_is_a_bijection) {
  for (const uint64_t size : {1, 2, 3, 4, 5, 7, 8, 9, 31, 64, 65, 1000, 4097, 100003}) {
    for (const uint64_t epoch : {0, 1, 12345}) {
      const Feistel shuffle(size, 7, epoch);
      std::vector<bool> seen(size);
      for (uint64_t i = 0; i < size; ++i) {
        const uint64_t to = shuffle(i);
        CHECK(to < size);
        CHECK(!seen[to]);
        seen[to] = true;
      }
    }
  }
}

TEST(random, feistel_of_huge_sizes_stays_in_range_and_apart) {
  for (const uint64_t size : {kMaxShuffle, kMaxShuffle - 1, (kMaxShuffle >> 1) + 1, uint64_t{1} << 33}) {
    const Feistel shuffle(size, 3, 5);
    std::vector<uint64_t> out;
    for (uint64_t i = 0; i < 20000; ++i) out.push_back(shuffle(i < 10000 ? i : size - 1 - i));
    for (const uint64_t to : out) CHECK(to < size);
    std::sort(out.begin(), out.end());
    CHECK(std::adjacent_find(out.begin(), out.end()) == out.end());
  }
}

// All 24 orders of four clips, over many epochs: chi-square with 23 degrees of freedom exceeds 49.7 once in a thousand.
TEST(random, feistel_epochs_are_uniform_over_small_permutations) {
  std::map<std::array<uint64_t, 4>, int> counts;
  const int epochs = 24000;
  for (int epoch = 0; epoch < epochs; ++epoch) {
    const Feistel shuffle(4, 99, static_cast<uint64_t>(epoch));
    ++counts[{shuffle(0), shuffle(1), shuffle(2), shuffle(3)}];
  }
  double chi = 24.0 * 1000 - 1000 * static_cast<double>(counts.size());  // orders that never came
  for (const auto& [order, count] : counts) chi += (count - 1000.0) * (count - 1000.0) / 1000;
  if (chi > 49.7) FAIL("chi-square " << chi << " over " << counts.size() << " orders");
}

// Where position p goes, over epochs: 50 x 50 cells; chi-square with 49 x 49 degrees of freedom.
TEST(random, feistel_places_are_uniform) {
  const uint64_t size = 50;
  const int epochs = 20000;
  std::vector<double> counts(size * size);
  for (int epoch = 0; epoch < epochs; ++epoch) {
    const Feistel shuffle(size, 5, static_cast<uint64_t>(epoch));
    for (uint64_t i = 0; i < size; ++i) ++counts[i * size + shuffle(i)];
  }
  double chi = 0;
  const double expected = static_cast<double>(epochs) / size;
  for (const double count : counts) chi += (count - expected) * (count - expected) / expected;
  if (chi < 2100 || chi > 2720) FAIL("chi-square " << chi << ", expected 2401 within 4.5 standard deviations of 69");
}
