// Bitstream parser and mini-clip writer on arbitrary packets: one byte chooses the codec, one the packets' length, one the
// extradata's length; then come extradata and packets.
#include <stdexcept>

#include "bitstream.hpp"
#include "fuzz_target.hpp"
#include "miniclip.hpp"

using namespace vito;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const char* const kCodecs[] = {"h264", "hevc", "av1", "vp8", "vp9", "mjpeg", "mpeg4", "other"};
  Bytes rest(data, size);
  if (rest.size() < 3) return 0;
  const char* codec = kCodecs[rest[0] % 8];
  const size_t step = rest[1] + size_t{1}, extra = rest[2];
  rest.drop_front(3);
  MiniClip clip{codec, rest.sub(0, extra), 64, 48, {}};
  rest.drop_front(clip.extradata.size());
  for (uint32_t number = 0; !rest.empty(); ++number) {
    const Bytes packet = rest.sub(0, step);
    rest.drop_front(packet.size());
    const uint8_t flags = packet_flags(codec, clip.extradata, packet).value_or(0);
    clip.packets.push_back({packet, packet[0] % 2 ? number : packet[0] * 1000u, (flags & 1) != 0, (flags & 4) != 0,
                            number > 0 && (flags & 1)});
  }
  try {
    if (write_miniclip(clip).empty()) __builtin_trap();
  } catch (const std::invalid_argument&) {
  }
  return 0;
}

std::vector<std::string> fuzz_seeds() {
  const std::string avcc("\1\x42\0\x1E\xFF\xE1\0\5\x67\x42\0\x1E\xAB\1\0\2\x68\xCE", 18);
  const std::string annexb("\0\0\0\1\x67\x42\0\x1E\xAB\0\0\1\x68\xCE\0\0\1\x65\x88\x80\0\0\1\x06\x06\1\x80\0\0\1\x41\x9A", 32);
  std::string hevc("\0\0\1\x40\1\x0C\0\0\1\x42\1\1\1\x60\0\0\3\0\x90\0\0\3\0\0\3\0\x5D\0\0\1\x44\1\xC1\0\0\1\x2A\1\xE0", 39);
  const std::string sized("\0\0\0\3\x65\x88\x80\0\0\0\2\x41\x9A", 13);
  const std::string av1("\x0A\1\0\x32\2\x10\7\x32\2\x30\7", 11), vp9("\x84\x86\xC1\1\1\xC1", 6);
  const auto seed = [](char codec, char step, const std::string& extradata, const std::string& packets) {
    return std::string{codec, step, static_cast<char>(extradata.size())} + extradata + packets;
  };
  return {seed(0, 12, avcc, sized), seed(0, 40, "", annexb), seed(0, 17, annexb, annexb), seed(1, 60, "", hevc + hevc),
          seed(2, 5, "", av1),      seed(4, 5, "", vp9 + vp9), seed(3, 3, "", "\x10\1\2\3\x11\1"), seed(6, 9, "abc", hevc)};
}
