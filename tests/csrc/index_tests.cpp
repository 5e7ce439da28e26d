#include <sys/stat.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <system_error>

#include "check.hpp"
#include "hash.hpp"
#include "index.hpp"
#include "store.hpp"

using namespace vito;

namespace {

// 3 constant clips, one with B frames, one whose second packet is not shown.
std::vector<TestClip> some_clips() {
  TestClip reordered, hidden;
  reordered.packets = {{0, kKey}, {3, 0}, {1, kDisposable}, {2, kDisposable}, {4, kKey | kOpen}, {6, 0}, {5, 0}};
  hidden.packets = {{0, kKey}, {1, kNoPicture}, {1, 0}, {2, kDiscard}, {7, 0}};
  return {constant_clip(5), reordered, constant_clip(1), hidden, constant_clip(12)};
}

std::string describe(const Index& index, uint64_t number) {
  const Index::Clip clip = index.clip(number);
  const Record& r = clip.record();
  std::string out = std::string(clip.source()) + "|" + std::string(clip.extradata()) + "|" + r.codec;
  for (const int64_t value : {r.video, r.start, r.end, int64_t{r.width}, int64_t{r.height}, int64_t{r.shard}})
    out += "," + std::to_string(value);
  for (uint32_t p = 0; p < r.num_packets; ++p) {
    const Packet packet = clip.packet(p);
    for (const int64_t value : {static_cast<int64_t>(packet.offset), int64_t{packet.size}, int64_t{packet.checksum},
                                packet.pts, int64_t{packet.flags}})
      out += "," + std::to_string(value);
  }
  for (uint32_t f = 0; f < r.num_frames; ++f) out += ";" + std::to_string(clip.order(f));
  return out;
}

}  // namespace

TEST(index, what_is_written_is_read) {
  const TestStore store(some_clips());
  const Index index(store.index_path());
  CHECK_EQUAL(index.num_clips(), 5u);
  CHECK_EQUAL(index.num_frames(), 5u + 7 + 1 + 3 + 12);
  CHECK_EQUAL(index.num_packets(), 5u + 7 + 1 + 5 + 12);
  CHECK_EQUAL(index.format(), std::string("copy"));
  uint64_t offset = 0;
  for (uint64_t c = 0; c < 5; ++c) {
    const Index::Clip clip = index.clip(c);
    CHECK_EQUAL(std::string(clip.source()), "source-" + std::to_string(c));
    CHECK_EQUAL(clip.extradata(), std::string_view("extra"));
    for (uint32_t p = 0; p < clip.record().num_packets; ++p) {
      const Packet packet = clip.packet(p);
      const std::string bytes = payload(c, p);
      CHECK_EQUAL(packet.offset, offset);
      CHECK_EQUAL(packet.size, bytes.size());
      CHECK_EQUAL(packet.checksum, packet_checksum(bytes.data(), bytes.size()));
      CHECK_EQUAL(packet.pts, some_clips()[c].packets[p].pts);
      CHECK_EQUAL(packet.flags, some_clips()[c].packets[p].flags);
      offset += packet.size;
    }
  }
}

TEST(index, presentation_order_is_by_time_and_skips_what_is_not_shown) {
  const TestStore store(some_clips());
  const Index index(store.index_path());
  const uint32_t reordered[] = {0, 2, 3, 1, 4, 6, 5}, hidden[] = {0, 2, 4};
  for (uint32_t f = 0; f < 7; ++f) CHECK_EQUAL(index.clip(1).order(f), reordered[f]);
  for (uint32_t f = 0; f < 3; ++f) CHECK_EQUAL(index.clip(3).order(f), hidden[f]);
}

TEST(index, constant_clips_take_eight_bytes_a_packet) {
  const TestStore store(some_clips());
  const Index index(store.index_path());
  CHECK_EQUAL(index.record(0).layout, uint8_t{kConstant});
  CHECK_EQUAL(index.record(0).table_size(), 40u);
  CHECK_EQUAL(index.record(1).layout, uint8_t{kGeneral});
  const uint64_t tables = 8 * (5 + 1 + 12) + 24 * (7 + 5) + 4 * (7 + 3), texts = 5 * (5 + 8);
  CHECK(read_file(store.index_path()).size() <= 112 + tables + texts + 127 + 5 * 128 + 12 + 9);
}

TEST(index, frames_by_time) {
  const TestStore store(some_clips());
  const Index index(store.index_path());
  const auto at = [&](uint64_t clip, int64_t tick) { return frame_at(index, clip, index.record(clip), tick); };
  for (int64_t tick = -2; tick < 20; ++tick) {
    CHECK_EQUAL(at(0, tick), static_cast<uint32_t>(std::min<int64_t>(std::max<int64_t>(tick, 0), 4)));
    CHECK_EQUAL(at(3, tick), tick < 1 ? 0u : tick < 7 ? 1u : 2u);
  }
}

TEST(index, numbers_out_of_range) {
  const TestStore store(some_clips());
  const Index index(store.index_path());
  CHECK_THROWS(index.clip(5), std::out_of_range, "clip 5");
  CHECK_THROWS(index.clip(0).packet(5), std::out_of_range, "packet 5");
  CHECK_THROWS(index.clip(1).order(7), std::out_of_range, "frame 7");
}

TEST(index, files_that_are_none) {
  const TemporaryDirectory directory;
  const std::string path = directory.file("index.bin");
  CHECK_THROWS(Index{path}, std::system_error, "index.bin");
  CHECK_THROWS(Index{directory.path}, std::system_error, "directory");
  for (const std::string& bytes : {std::string(), std::string("VITOIDX\n"), std::string(4000, 'x')}) {
    write_file(path, bytes);
    CHECK_THROWS(Index{path}, std::invalid_argument, "is not the index");
  }
  const std::string pipe = directory.file("pipe");
  CHECK_EQUAL(mkfifo(pipe.c_str(), 0600), 0);
  CHECK_THROWS(Index{pipe}, std::invalid_argument, "no regular file");
}

TEST(index, another_version_names_both) {
  const TestStore store(some_clips());
  std::string bytes = read_file(store.index_path());
  bytes[8] = 7;
  write_file(store.index_path(), bytes);
  CHECK_THROWS(Index{store.index_path()}, std::invalid_argument, "version 7, but this vito-fast reads version 1");
}

TEST(index, an_unfinished_file_is_none) {
  const TemporaryDirectory directory;
  { IndexWriter writer(directory.file("index.bin"), "copy", {}); }
  CHECK_THROWS(Index{directory.file("index.bin")}, std::invalid_argument, "is not the index");
}

// Every single flipped bit is either noticed or, in padding that nobody reads, changes nothing.
TEST(index, no_flipped_bit_changes_an_answer) {
  const TestStore store(some_clips());
  const std::string good = read_file(store.index_path());
  Header header;
  std::memcpy(&header, good.data(), sizeof header);
  const Record last = Index(store.index_path()).record(4);
  const uint64_t records = header.records_offset, tables_end = last.block_offset + last.block_size;
  std::vector<std::string> answers;
  for (uint64_t c = 0; c < 5; ++c) answers.push_back(describe(Index(store.index_path()), c));
  for (size_t bit = 0; bit < good.size() * 8; ++bit) {
    std::string bytes = good;
    bytes[bit / 8] = static_cast<char>(bytes[bit / 8] ^ 1 << bit % 8);
    const MemoryFile file(bytes);
    size_t noticed = 0;
    try {
      const Index index(file.path());
      for (uint64_t c = 0; c < 5; ++c) {
        try {
          if (describe(index, c) != answers[c]) FAIL("bit " << bit << " changed clip " << c);
        } catch (const std::invalid_argument&) {
          ++noticed;
        }
      }
    } catch (const std::invalid_argument&) {
      ++noticed;
    }
    const bool padding = bit / 8 >= tables_end && bit / 8 < records;
    if (!noticed && !padding) FAIL("bit " << bit << " was not noticed");
  }
}

TEST(index, truncation_is_noticed) {
  const TestStore store(some_clips());
  const std::string good = read_file(store.index_path());
  for (size_t size = 0; size < good.size(); ++size) {
    const MemoryFile file(good.substr(0, size));
    CHECK_THROWS(Index{file.path()}, std::invalid_argument, "");
  }
}

TEST(index, swapped_records_are_noticed) {
  const TestStore store({constant_clip(5), constant_clip(5)});
  std::string bytes = read_file(store.index_path());
  uint64_t records;
  std::memcpy(&records, bytes.data() + offsetof(Header, records_offset), sizeof records);
  std::swap_ranges(bytes.begin() + static_cast<long>(records), bytes.begin() + static_cast<long>(records) + 128,
                   bytes.begin() + static_cast<long>(records) + 128);
  write_file(store.index_path(), bytes);
  const Index index(store.index_path());
  CHECK_THROWS(index.clip(0), std::invalid_argument, "clip 0: its record's checksum is wrong");
}

TEST(index, the_writer_refuses_nonsense) {
  const TemporaryDirectory directory;
  for (const char* name : {"", "/etc/passwd", "..", "../shard", "a/../../shard"})
    CHECK_THROWS(IndexWriter(directory.file("index.bin"), "copy", {{name, 1}}), std::invalid_argument, "inside the store");
  for (const char* name : {"shard-00000.bin", "a/b", "a..b", "..a"}) CHECK(valid_shard_name(name));
  const int64_t pts[] = {0, 1}, offsets[] = {0, 10}, sizes[] = {10, 10};
  const uint32_t checksums[] = {1, 2};
  const uint8_t flags[] = {kKey, 0};
  const ClipInput good{0, "a", "h264", "", 32, 32, 0, 0, 1, 25, 2, 2, pts, offsets, sizes, checksums, flags};
  const auto refused = [&](const char* message, auto change) {
    IndexWriter writer(directory.file("index.bin"), "copy", {{"s", 20}});
    ClipInput bad = good;
    change(bad);
    CHECK_THROWS(writer.add(bad), std::invalid_argument, message);
  };
  const int64_t far[] = {0, 11}, zero[] = {10, 0};
  const uint8_t no_key[] = {0, 0}, late_key[] = {0, kKey}, unknown[] = {kKey, 64}, unseen[] = {kKey | kDiscard, kNoPicture};
  const int64_t huge[] = {0, kMaxPts + 1};
  refused("clip 0: width is 0", [](ClipInput& c) { c.width = 0; });
  refused("height is 65536", [](ClipInput& c) { c.height = 65536; });
  refused("rotation is 45", [](ClipInput& c) { c.rotation = 45; });
  refused("time_base's denominator is 0", [](ClipInput& c) { c.tick_den = 0; });
  refused("shard is 1", [](ClipInput& c) { c.shard = 1; });
  refused("codec's length is 0", [](ClipInput& c) { c.codec = ""; });
  refused("end is 1", [](ClipInput& c) { c.end = 1; });
  refused("an offset is 11", [&](ClipInput& c) { c.offsets = far; });
  refused("a size is 0", [&](ClipInput& c) { c.sizes = zero; });
  refused("a pts is", [&](ClipInput& c) { c.pts = huge; });
  refused("a flag is 64", [&](ClipInput& c) { c.flags = unknown; });
  refused("the number of keys is 0", [&](ClipInput& c) { c.flags = no_key; });
  refused("the first key is 1", [&](ClipInput& c) { c.flags = late_key; });
  refused("the number of frames is 0", [&](ClipInput& c) { c.flags = unseen; });
  refused("the number of packets is 0", [&](ClipInput& c) { c.num_packets = 0; });
}
