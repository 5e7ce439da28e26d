#include "bitstream.hpp"

#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "index.hpp"

using namespace vito;

namespace {

using Raw = std::vector<unsigned char>;

int flags(std::string_view codec, const Raw& packet, const Raw& extradata = {}) {
  const std::optional<uint8_t> value = packet_flags(codec, extradata, packet);
  return value ? *value : -1;
}

const Raw kAvcc{1, 66, 0, 30, 0xFF, 0xE0, 0};  // lengths of four bytes, no parameter sets

}  // namespace

TEST(bitstream, reads_bits_and_golomb_codes) {
  const Raw bytes{0b10100110, 0b01000010};  // 1 | 010 | 011 | 00100 | 00010...
  BitReader bits(bytes);
  for (const uint32_t expected : {0, 1, 2, 3}) CHECK_EQUAL(bits.golomb(), expected);
  BitReader end{Bytes{}};
  CHECK_EQUAL(end.bits(32), 0u);
  CHECK_EQUAL(end.golomb(), UINT32_MAX);
}

TEST(bitstream, splits_nal_units) {
  const Raw annexb{9, 0, 0, 0, 1, 0x65, 1, 2, 0, 0, 1, 0x41, 0, 0, 1, 0, 0, 1, 0x42, 7, 0};
  Bytes rest(annexb);
  for (const std::string& expected : {std::string("\x65\x01\x02"), std::string("\x41"), std::string("\x42\x07")}) {
    const Bytes nal = next_nal(rest, 0);
    CHECK_EQUAL(std::string(nal.begin(), nal.end()), expected);
  }
  CHECK(next_nal(rest, 0).empty());
  const Raw sized{0, 0, 0, 2, 0x65, 1, 0, 0, 0, 9, 0x41};  // the second unit claims more than there is
  rest = sized;
  CHECK_EQUAL(next_nal(rest, 4).size(), 2u);
  CHECK(next_nal(rest, 4).empty());
  Raw hollow;  // a megabyte of start codes with nothing between them
  for (int i = 0; i < 1 << 20; i += 4) hollow.insert(hollow.end(), {0, 0, 0, 1});
  rest = hollow;
  CHECK(next_nal(rest, 0).empty());
  hollow.push_back(0x65);
  rest = hollow;
  CHECK_EQUAL(next_nal(rest, 0).size(), 1u);
}

TEST(bitstream, h264) {
  CHECK_EQUAL(flags("h264", {0, 0, 0, 2, 0x65, 0x88}, kAvcc), int{kKey});            // IDR
  CHECK_EQUAL(flags("h264", {0, 0, 1, 0x65, 0x88}), int{kKey});                      // the same in Annex B
  CHECK_EQUAL(flags("h264", {0, 0, 0, 2, 0x41, 0xC0}, kAvcc), 0);                    // P, referred to
  CHECK_EQUAL(flags("h264", {0, 0, 0, 2, 0x01, 0xA0}, kAvcc), int{kDisposable});     // B, not referred to
  const Raw recovery{0, 0, 1, 0x06, 6, 1, 0x80, 0x80, 0, 0, 1, 0x41, 0x88};          // recovery point 0, then I
  CHECK_EQUAL(flags("h264", recovery), kKey | kOpen);
  const Raw refresh{0, 0, 1, 0x06, 6, 1, 0x40, 0x80, 0, 0, 1, 0x41, 0x88};           // recovery point 1 (intra refresh)
  CHECK_EQUAL(flags("h264", refresh), 0);
  const Raw not_intra{0, 0, 1, 0x06, 6, 1, 0x80, 0x80, 0, 0, 1, 0x41, 0xC0};         // recovery point 0, but P
  CHECK_EQUAL(flags("h264", not_intra), 0);
}

TEST(bitstream, hevc) {
  CHECK_EQUAL(flags("hevc", {0, 0, 1, 19 << 1, 1, 0xA0}), int{kKey});
  CHECK_EQUAL(flags("hevc", {0, 0, 1, 21 << 1, 1, 0xA0}), kKey | kOpen);
  CHECK_EQUAL(flags("hevc", {0, 0, 1, 35 << 1, 1, 0x50, 0, 0, 1, 21 << 1, 1, 0xA0}), kKey | kOpen);  // after a delimiter
  CHECK_EQUAL(flags("hevc", {0, 0, 1, 1 << 1, 1, 0xA0}), 0);
}

TEST(bitstream, hevc_pictures_that_none_refers_to) {
  const Raw flat{0, 0, 1, 33 << 1, 1, 0x01}, layered{0, 0, 1, 33 << 1, 1, 0x03};  // one and two temporal sub-layers
  Raw hvcc(22, 0);
  hvcc[0] = 1, hvcc[21] = 3;
  for (const unsigned char byte : {2, 32, 0, 1, 0, 3, 64, 1, 0, 33, 0, 1, 0, 3, 33 << 1, 1, 0x03})
    hvcc.push_back(byte);
  const Raw low{0, 0, 1, 0, 1, 0xA0}, high{0, 0, 1, 8 << 1, 2, 0xA0}, referred{0, 0, 1, 9 << 1, 2, 0xA0};
  CHECK_EQUAL(flags("hevc", low, flat), int{kDisposable});
  CHECK_EQUAL(flags("hevc", low, layered), 0);  // one of the sub-layer above may refer to it
  CHECK_EQUAL(flags("hevc", high, layered), int{kDisposable});
  CHECK_EQUAL(flags("hevc", referred, layered), 0);
  CHECK_EQUAL(flags("hevc", {0, 0, 0, 3, 8 << 1, 2, 0xA0}, hvcc), int{kDisposable});
  CHECK_EQUAL(flags("hevc", {0, 0, 0, 3, 0, 1, 0xA0}, hvcc), 0);
  CHECK_EQUAL(flags("hevc", low), 0);  // unknown
}

TEST(bitstream, vp8_vp9) {
  CHECK_EQUAL(flags("vp8", {0x10, 0, 0}), int{kKey});
  CHECK_EQUAL(flags("vp8", {0x11, 0, 0}), 0);
  CHECK_EQUAL(flags("vp8", {0x01, 0, 0}), int{kNoPicture});
  CHECK_EQUAL(flags("vp9", {0x82}), int{kKey});                    // marker 2, profile 0, key, shown
  CHECK_EQUAL(flags("vp9", {0x86}), 0);                            // not key, shown
  CHECK_EQUAL(flags("vp9", {0x84}), int{kNoPicture});              // not key, not shown
  CHECK_EQUAL(flags("vp9", {0x88}), 0);                            // shows an earlier frame
  CHECK_EQUAL(flags("vp9", {0x84, 0x86, 0xC1, 1, 1, 0xC1}), 0);    // superframe: hidden, then shown
  CHECK_EQUAL(flags("vp9", {0x84, 0x84, 0xC1, 1, 1, 0xC1}), int{kNoPicture});
}

TEST(bitstream, av1) {
  CHECK_EQUAL(flags("av1", {0x0A, 1, 0x00, 0x32, 1, 0x10}), int{kKey});       // sequence; key frame, shown
  CHECK_EQUAL(flags("av1", {0x32, 1, 0x30}), 0);                              // inter frame, shown
  CHECK_EQUAL(flags("av1", {0x32, 1, 0x20}), int{kNoPicture});                // inter frame, not shown
  CHECK_EQUAL(flags("av1", {0x1A, 1, 0x80}), 0);                              // shows an earlier frame
  CHECK_EQUAL(flags("av1", {0x0A, 1, 0x08, 0x32, 1, 0x00}), int{kKey});       // reduced still picture header
}

TEST(bitstream, others) {
  CHECK_EQUAL(flags("mjpeg", {0xFF}), int{kKey});
  CHECK_EQUAL(flags("mpeg4", {0, 0, 1}), -1);
}

TEST(bitstream, garbage_is_survived) {
  std::mt19937 random(1);
  for (int i = 0; i < 20000; ++i) {
    Raw packet(random() % 40), extradata(random() % 30);
    for (unsigned char& byte : packet) byte = static_cast<unsigned char>(random() % 4 ? random() : random() % 2);
    for (unsigned char& byte : extradata) byte = static_cast<unsigned char>(random() % 2 ? random() : 1);
    for (const char* codec : {"h264", "hevc", "vp8", "vp9", "av1"}) flags(codec, packet, extradata);
  }
}
