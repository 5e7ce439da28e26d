#include "miniclip.hpp"

#include <stdexcept>
#include <string>
#include <vector>

#include "check.hpp"

using namespace vito;

namespace {

using Raw = std::vector<unsigned char>;

// Independent reader of the little EBML that the writer uses: elements as (id, content).
struct Element {
  uint32_t id;
  Bytes content;
};

std::vector<Element> elements(Bytes rest) {
  std::vector<Element> out;
  while (!rest.empty()) {
    size_t length = 1;
    while (length < 4 && !(rest[0] >> (8 - length) & 1)) ++length;
    uint32_t id = 0;
    for (size_t i = 0; i < length; ++i) id = id << 8 | rest[i];
    rest.drop_front(length);
    CHECK_EQUAL(int{rest[0]}, 1);  // sizes take eight bytes
    uint64_t size = 0;
    for (size_t i = 1; i < 8; ++i) size = size << 8 | rest[i];
    rest.drop_front(8);
    CHECK(size <= rest.size());
    out.push_back({id, rest.sub(0, size)});
    rest.drop_front(size);
  }
  return out;
}

Bytes only(const std::vector<Element>& all, uint32_t id) {
  Bytes found;
  int count = 0;
  for (const Element& element : all)
    if (element.id == id) found = element.content, ++count;
  CHECK_EQUAL(count, 1);
  return found;
}

int64_t number(Bytes bytes) {
  int64_t value = 0;
  for (const unsigned char byte : bytes) value = value << 8 | byte;
  return value;
}

std::string text(Bytes bytes) { return {bytes.begin(), bytes.end()}; }

struct Block {
  int64_t time;
  int flags;
  std::string data;
};

struct File {
  Raw bytes;
  std::vector<Element> entry;  // of the track
  std::vector<Block> blocks;
};

File parse(Raw bytes) {
  File out{std::move(bytes), {}, {}};
  const auto top = elements(out.bytes);
  CHECK_EQUAL(top.size(), 2u);
  CHECK_EQUAL(text(only(elements(only(top, 0x1A45DFA3)), 0x4282)), std::string("matroska"));
  const auto segment = elements(only(top, 0x18538067));
  out.entry = elements(only(elements(only(segment, 0x1654AE6B)), 0xAE));
  for (const Element& cluster : segment) {
    if (cluster.id != 0x1F43B675) continue;
    const auto content = elements(cluster.content);
    const int64_t base = number(only(content, 0xE7));
    for (const Element& block : content) {
      if (block.id != 0xA3) continue;
      const int16_t relative = static_cast<int16_t>(block.content[1] << 8 | block.content[2]);
      out.blocks.push_back({base + relative, block.content[3], text(block.content.sub(4))});
    }
  }
  return out;
}

MiniClip clip_of(std::string_view codec, const std::vector<Raw>& packets, const Raw& extradata) {
  MiniClip clip{codec, extradata, 64, 48, {}};
  for (size_t i = 0; i < packets.size(); ++i)
    clip.packets.push_back({packets[i], static_cast<uint32_t>(i), i == 0, false, false});
  return clip;
}

const Raw kSps{0x67, 66, 0, 30, 0xAB}, kPps{0x68, 0xCE};

Raw annexb(const std::vector<Raw>& nals) {
  Raw out;
  for (const Raw& nal : nals) {
    out.insert(out.end(), {0, 0, 0, 1});
    out.insert(out.end(), nal.begin(), nal.end());
  }
  return out;
}

}  // namespace

TEST(miniclip, times_follow_the_ranks_in_decoding_order) {
  const std::vector<Raw> packets{{1}, {2, 2}, {3}};
  MiniClip clip = clip_of("vp9", packets, {});
  clip.packets[1].rank = 2;
  clip.packets[2].rank = 1;
  clip.packets[2].invisible = true;
  const File file = parse(write_miniclip(clip));
  CHECK_EQUAL(text(only(file.entry, 0x86)), std::string("V_VP9"));
  CHECK_EQUAL(number(only(elements(only(file.entry, 0xE0)), 0xB0)), 64);
  CHECK_EQUAL(file.blocks.size(), 3u);
  const int64_t times[] = {0, 80, 40};
  const int flags[] = {0x80, 0, 8};
  for (size_t i = 0; i < 3; ++i) {
    CHECK_EQUAL(file.blocks[i].time, times[i]);
    CHECK_EQUAL(file.blocks[i].flags, flags[i]);
    CHECK_EQUAL(file.blocks[i].data, std::string(packets[i].begin(), packets[i].end()));
  }
}

TEST(miniclip, long_clips_have_clusters) {
  const std::vector<Raw> packets(2000, Raw{7});
  const File file = parse(write_miniclip(clip_of("vp8", packets, {})));
  for (size_t i = 0; i < 2000; ++i) CHECK_EQUAL(file.blocks[i].time, static_cast<int64_t>(i) * 40);
}

TEST(miniclip, avcc_is_kept) {
  const Raw avcc{1, 66, 0, 30, 0xFD, 0xE0, 0};  // lengths of two bytes
  const File file = parse(write_miniclip(clip_of("h264", {{0, 2, 0x65, 1}}, avcc)));
  CHECK_EQUAL(text(only(file.entry, 0x63A2)), std::string(avcc.begin(), avcc.end()));
  CHECK_EQUAL(file.blocks[0].data, std::string("\0\2\x65\1", 4));
}

TEST(miniclip, annexb_of_h264_becomes_avcc) {
  const Raw slice{0x65, 9, 8, 7};
  for (const bool in_band : {false, true}) {
    const Raw extradata = in_band ? Raw{} : annexb({kSps, kPps});
    const std::vector<Raw> packets{in_band ? annexb({kSps, kPps, slice}) : annexb({slice})};
    const File file = parse(write_miniclip(clip_of("h264", packets, extradata)));
    const std::string expected("\1\x42\0\x1E\xFF\xE1\0\5\x67\x42\0\x1E\xAB\1\0\2\x68\xCE", 18);
    CHECK_EQUAL(text(only(file.entry, 0x63A2)), expected);
    const std::string tail("\0\0\0\4\x65\x09\x08\x07", 8);
    CHECK_EQUAL(file.blocks[0].data.substr(file.blocks[0].data.size() - 8), tail);
  }
}

TEST(miniclip, lost_parameter_sets) {
  const std::vector<Raw> packets{annexb({{0x65, 1}})};
  CHECK_THROWS(write_miniclip(clip_of("h264", packets, {})), std::invalid_argument, "parameter sets are missing");
  CHECK_THROWS(write_miniclip(clip_of("hevc", packets, {})), std::invalid_argument, "parameter sets are missing");
  CHECK_THROWS(write_miniclip(clip_of("prores", packets, {})), std::invalid_argument, "codec 'prores'");
}

TEST(miniclip, a_second_run_of_hevc_is_spliced) {
  Raw hvcc(23, 0);
  hvcc[0] = 1;
  hvcc[21] = 3;  // lengths of four bytes
  const Raw cra{0, 0, 0, 3, 21 << 1, 1, 0xE0};  // first slice, and what came before is not to be shown
  const std::vector<Raw> packets{cra, cra};
  MiniClip clip = clip_of("hevc", packets, hvcc);
  clip.packets[1].resets = true;
  const File file = parse(write_miniclip(clip));
  CHECK_EQUAL(file.blocks[0].data, std::string(cra.begin(), cra.end()));
  CHECK_EQUAL(file.blocks[1].data, std::string("\0\0\0\3\x24\1\xA0", 7));  // BLA without leading pictures; flag cleared
}
