#include "bitstream.hpp"

#include "index.hpp"

namespace vito {

uint32_t BitReader::bits(int count) {
  uint32_t value = 0;
  for (; count > 0; --count, ++at_) {
    const uint32_t bit = at_ / 8 < bytes_.size() ? bytes_[at_ / 8] >> (7 - at_ % 8) & 1u : 0u;
    value = value << 1 | bit;
  }
  return value;
}

uint32_t BitReader::golomb() {
  int zeros = 0;
  while (zeros < 32 && bits(1) == 0) ++zeros;
  return zeros < 32 ? (1u << zeros) - 1 + bits(zeros) : UINT32_MAX;
}

int nal_length_size(bool hevc, Bytes extradata) {
  const size_t at = hevc ? 21 : 4;
  return extradata.size() > at && extradata[0] == 1 ? (extradata[at] & 3) + 1 : 0;
}

namespace {

// Position of the next 00 00 01, or the end.
size_t find_start_code(Bytes bytes) {
  for (size_t i = 0; i + 2 < bytes.size(); ++i)
    if (bytes[i] == 0 && bytes[i + 1] == 0 && bytes[i + 2] == 1) return i;
  return bytes.size();
}

Bytes next_annexb(Bytes& rest) {
  Bytes nal;
  while (nal.empty()) {
    const size_t code = find_start_code(rest);
    if (code == rest.size()) return rest = {};
    rest.drop_front(code + 3);
    nal = rest.sub(0, find_start_code(rest));
    rest.drop_front(nal.size());
    while (!nal.empty() && nal.back() == 0) nal.drop_back(1);  // trailing zeros belong to the next start code
  }
  return nal;
}

// Payload of the recovery point message: 0 if the picture itself is the recovery point.
std::optional<uint32_t> recovery_frames(Bytes sei) {
  Bytes rest = sei.sub(1);
  while (rest.size() > 2) {
    uint32_t type = 0, size = 0;
    for (uint32_t* value : {&type, &size}) {
      unsigned char byte = 255;
      while (byte == 255 && !rest.empty()) {
        byte = rest[0];
        *value += byte;
        rest.drop_front(1);
      }
    }
    if (type == 6) return BitReader(rest).golomb();
    if (size > rest.size()) break;
    rest.drop_front(size);
  }
  return std::nullopt;
}

uint8_t h264_flags(Bytes packet, int length_size) {
  bool idr = false, intra = true, disposable = true, recovery = false, slices = false;
  while (true) {
    const Bytes nal = next_nal(packet, length_size);
    if (nal.empty()) break;
    const int type = nal[0] & 31;
    if (type == 6) recovery |= recovery_frames(nal) == 0u;
    if (type != 1 && type != 2 && type != 5) continue;
    slices = true;
    idr |= type == 5;
    disposable &= (nal[0] >> 5 & 3) == 0;
    BitReader header(nal.sub(1));
    header.golomb();  // first_mb_in_slice
    const uint32_t slice = header.golomb() % 5;
    intra &= slice == 2 || slice == 4;
  }
  if (!slices) return 0;
  if (idr) return kKey;
  return static_cast<uint8_t>((recovery && intra ? kKey | kOpen : 0) | (disposable ? kDisposable : 0));
}

// Temporal sub-layers by a sequence parameter set, 0 for any other unit.
int layers_by(Bytes nal) { return nal.size() > 2 && (nal[0] >> 1 & 63) == 33 ? (nal[2] >> 1 & 7) + 1 : 0; }

// The same of the whole stream, 0 if its extradata are silent.
int hevc_layers(Bytes extradata) {
  int layers = 0;
  if (nal_length_size(true, extradata) == 0) {
    for (Bytes nal; !layers && !(nal = next_nal(extradata, 0)).empty();) layers = layers_by(nal);
    return layers;
  }
  Bytes rest = extradata.sub(22);  // hvcC: arrays of units of one type
  if (!rest.empty()) rest.drop_front(1);
  while (!layers && rest.size() > 3) {
    int units = rest[1] << 8 | rest[2];
    rest.drop_front(3);
    for (; units > 0 && rest.size() > 2; --units) {
      const Bytes nal = next_nal(rest, 2);
      if (nal.empty()) return 0;
      if (!layers) layers = layers_by(nal);
    }
  }
  return layers;
}

uint8_t hevc_flags(Bytes extradata, Bytes packet, int length_size) {
  while (true) {
    const Bytes nal = next_nal(packet, length_size);
    if (nal.size() < 2) return 0;
    const int type = nal[0] >> 1 & 63, layer = nal[1] & 7;
    if (type == 19 || type == 20) return kKey;                // IDR
    if (type >= 16 && type <= 21) return kKey | kOpen;        // BLA, CRA
    // Even types: no picture of the same sub-layer refers to it; and above the highest there is none to do so.
    if (type < 16) return type % 2 == 0 && layer == hevc_layers(extradata) ? kDisposable : 0;
    if (type < 32) return 0;  // reserved
  }
}

uint8_t vp8_flags(Bytes packet) {
  if (packet.empty()) return kNoPicture;
  return static_cast<uint8_t>((packet[0] & 1 ? 0 : kKey) | (packet[0] & 16 ? 0 : kNoPicture));
}

struct Vp9Frame {
  bool key, shown;
};

Vp9Frame vp9_frame(Bytes frame) {
  BitReader bits(frame);
  if (bits.bits(2) != 2) return {false, true};
  const uint32_t low = bits.bits(1), high = bits.bits(1);
  if (low && high) bits.bits(1);
  if (bits.bits(1)) return {false, true};  // an earlier frame is shown
  const bool key = bits.bits(1) == 0;
  return {key, bits.bits(1) == 1};
}

uint8_t vp9_flags(Bytes packet) {
  if (packet.empty()) return kNoPicture;
  Vp9Frame all = vp9_frame(packet);
  const unsigned char marker = packet.back();
  const size_t frames = (marker & 7u) + 1, width = (marker >> 3 & 3u) + 1, index = 2 + width * frames;
  if ((marker & 0xE0) == 0xC0 && packet.size() > index && packet[packet.size() - index] == marker) {
    Bytes sizes = packet.sub(packet.size() - index + 1), rest = packet;
    for (size_t i = 0; i < frames; ++i) {
      size_t size = 0;
      for (size_t byte = 0; byte < width; ++byte) size |= static_cast<size_t>(sizes[i * width + byte]) << (8 * byte);
      if (size == 0 || size > rest.size()) break;
      all.shown |= vp9_frame(rest.sub(0, size)).shown;
      rest.drop_front(size);
    }
  }
  return static_cast<uint8_t>((all.key ? kKey : 0) | (all.shown ? 0 : kNoPicture));
}

struct Av1State {
  bool reduced = false, frame = false, key = false, shown = false;
};

void read_obus(Bytes rest, Av1State& state) {
  while (!rest.empty()) {
    const int type = rest[0] >> 3 & 15;
    const size_t header = rest[0] & 4 ? 2 : 1;
    const bool sized = rest[0] & 2;
    if (rest.size() < header) return;
    rest.drop_front(header);
    uint64_t size = rest.size();
    if (sized) {
      size = 0;
      for (int shift = 0; shift < 56 && !rest.empty(); shift += 7) {
        const unsigned char byte = rest[0];
        rest.drop_front(1);
        size |= static_cast<uint64_t>(byte & 127) << shift;
        if (!(byte & 128)) break;
      }
    }
    if (size > rest.size()) return;
    BitReader bits(rest.sub(0, size));
    if (type == 1) {  // sequence header
      bits.bits(4);
      state.reduced = bits.bits(1);
    } else if (type == 3 || type == 6) {  // frame header, frame
      const bool existing = !state.reduced && bits.bits(1);
      const bool key = state.reduced || (!existing && bits.bits(2) == 0);
      const bool shown = state.reduced || existing || bits.bits(1);
      state.key |= !state.frame && key && shown;
      state.shown |= shown;
      state.frame = true;
    }
    rest.drop_front(size);
  }
}

uint8_t av1_flags(Bytes extradata, Bytes packet) {
  Av1State state;
  if (extradata.size() > 4 && extradata[0] == 0x81) read_obus(extradata.sub(4), state);
  state.frame = state.key = state.shown = false;
  read_obus(packet, state);
  return static_cast<uint8_t>((state.key ? kKey : 0) | (state.shown ? 0 : kNoPicture));
}

}  // namespace

Bytes next_nal(Bytes& rest, int length_size) {
  if (length_size == 0) return next_annexb(rest);
  const size_t prefix = static_cast<size_t>(length_size);
  if (rest.size() < prefix) return rest = {};
  size_t size = 0;
  for (size_t i = 0; i < prefix; ++i) size = size << 8 | rest[i];
  if (size == 0 || size > rest.size() - prefix) return rest = {};
  const Bytes nal = rest.sub(prefix, size);
  rest.drop_front(prefix + size);
  return nal;
}

std::optional<uint8_t> packet_flags(std::string_view codec, Bytes extradata, Bytes packet) {
  if (codec == "mjpeg") return kKey;
  if (codec == "h264") return h264_flags(packet, nal_length_size(false, extradata));
  if (codec == "hevc") return hevc_flags(extradata, packet, nal_length_size(true, extradata));
  if (codec == "vp8") return vp8_flags(packet);
  if (codec == "vp9") return vp9_flags(packet);
  if (codec == "av1") return av1_flags(extradata, packet);
  return std::nullopt;
}

}  // namespace vito
