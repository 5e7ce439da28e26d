// What a packet is, read from the coded bits: containers leave key flags out or set them wrongly.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "bytes.hpp"

namespace vito {

// The packet's PacketFlags (kDiscard apart, which only a container knows); nothing for a codec not known here.
// Never reads outside the packet; bits that make no sense give no flags.
std::optional<uint8_t> packet_flags(std::string_view codec, Bytes extradata, Bytes packet);

// How NAL units are stored in a packet of H.264 or HEVC: the bytes of the length before each, or 0 for Annex B start
// codes. `extradata` is avcC or hvcC if it starts with 1.
int nal_length_size(bool hevc, Bytes extradata);

// Takes the next NAL unit off `rest`; empty at the end, or where a length makes no sense.
Bytes next_nal(Bytes& rest, int length_size);

// Most significant bit first; zeros beyond the end.
class BitReader {
 public:
  explicit BitReader(Bytes bytes) : bytes_(bytes) {}
  uint32_t bits(int count);
  uint32_t golomb();  // ue(v)

 private:
  Bytes bytes_;
  size_t at_ = 0;
};

}  // namespace vito
