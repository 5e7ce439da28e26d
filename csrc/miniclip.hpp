// A few packets of a clip as a Matroska file of their own, for decoders that take files and cannot seek (DALI).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "bytes.hpp"

namespace vito {

struct MiniPacket {
  Bytes data;
  uint32_t rank;        // place of its picture among those of the file: becomes its time
  bool key, invisible;  // invisible: yields no picture
  bool resets;          // a run that starts here follows another: the decoder must forget what came before
};

struct MiniClip {
  std::string_view codec;  // FFmpeg's name
  Bytes extradata;
  uint32_t width, height;
  std::vector<MiniPacket> packets;  // decoding order
};

// The file. Throws std::invalid_argument for a codec that Matroska has no name for here, or for H.264 or HEVC packets
// whose parameter sets are nowhere to be found.
std::vector<unsigned char> write_miniclip(const MiniClip& clip);

}  // namespace vito
