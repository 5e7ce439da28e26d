// The fewest packets that show given frames.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "index.hpp"

namespace vito {

struct Plan {
  std::vector<uint32_t> packets;                   // numbers, in decoding order
  std::vector<uint32_t> pictures;                  // for each wanted frame: which of the pictures that come out it is
  std::vector<uint32_t> ranks;                     // for each packet: place of its picture among those that come out
  std::vector<std::pair<uint32_t, uint32_t>> runs; // [first, last) of `packets`: from a key to the last wanted frame
};

// Plans the decoding of `frames` (presentation order; may repeat). With `single_stream` one decoder takes all packets
// without a reset in between, as in a mini-clip; else it is reset before each run. Throws std::out_of_range for a frame
// that the clip does not have, std::invalid_argument for a corrupt index.
Plan plan_packets(const Index::Clip& clip, const uint32_t* frames, size_t count, bool single_stream);

}  // namespace vito
