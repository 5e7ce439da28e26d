// Runs a fuzz target without libFuzzer: TARGET_replay COUNT tries mutations of the seeds, the same ones every time;
// TARGET_replay FILE... tries the files, as libFuzzer leaves them; TARGET_replay --seeds DIRECTORY writes the seeds there,
// for libFuzzer to start from.
#include <cstdio>
#include <cstdlib>
#include <random>

#include "fuzz_target.hpp"
#include "store.hpp"

namespace {

using Random = std::mt19937_64;

size_t place(const std::string& bytes, Random& random) { return random() % bytes.size(); }

// The usual ways in which files go wrong, and numbers at their limits.
void mutate(std::string& bytes, Random& random) {
  static const uint64_t kLimits[] = {0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, INT64_MAX, UINT64_MAX};
  if (bytes.empty()) {
    bytes.push_back(static_cast<char>(random()));
    return;
  }
  const size_t at = place(bytes, random);
  switch (random() % 7) {
    case 0: bytes[at] = static_cast<char>(bytes[at] ^ 1 << random() % 8); break;
    case 1: bytes[at] = static_cast<char>(random()); break;
    case 2: bytes.resize(at); break;
    case 3: bytes.insert(at, bytes.substr(place(bytes, random), random() % 64)); break;
    case 4: bytes.erase(at, random() % 64); break;
    case 5: {
      const uint64_t value = kLimits[random() % 10] + random() % 3 - 1;
      const size_t width = size_t{1} << random() % 4;
      for (size_t i = 0; i < width && at + i < bytes.size(); ++i) bytes[at + i] = static_cast<char>(value >> (8 * i));
      break;
    }
    case 6: {
      const size_t from = place(bytes, random), size = std::min(random() % 64, bytes.size() - std::max(at, from));
      bytes.replace(at, size, bytes.substr(from, size));
      break;
    }
  }
}

void try_bytes(const std::string& bytes) {
  // A copy of exactly the right size, so that AddressSanitizer sees one byte too far.
  const std::vector<uint8_t> exact(bytes.begin(), bytes.end());
  LLVMFuzzerTestOneInput(exact.data(), exact.size());
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> seeds = fuzz_seeds();
  if (argc == 3 && std::string(argv[1]) == "--seeds") {
    for (size_t i = 0; i < seeds.size(); ++i) write_file(argv[2] + ("/seed-" + std::to_string(i)), seeds[i]);
    return 0;
  }
  char* end = nullptr;
  const long count = argc == 2 ? std::strtol(argv[1], &end, 10) : 0;
  if (count <= 0 || *end) {
    for (int i = 1; i < argc; ++i) try_bytes(read_file(argv[i]));
    std::printf("%d files\n", argc - 1);
    return argc < 2;
  }
  Random random(20240607);
  for (const std::string& seed : seeds) try_bytes(seed);
  for (long i = 0; i < count; ++i) {
    std::string bytes = seeds[static_cast<size_t>(i) % seeds.size()];
    for (uint64_t n = 1 + random() % 4; n > 0; --n) mutate(bytes, random);
    try_bytes(bytes);
  }
  std::printf("%ld mutations\n", count);
}
