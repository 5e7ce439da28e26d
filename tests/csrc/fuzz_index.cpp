// The index reader, planner, sampler and reader on arbitrary bytes: as they are, and with all checksums made right, so that
// what lies behind them is reached too.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <system_error>

#include "fuzz_target.hpp"
#include "hash.hpp"
#include "planner.hpp"
#include "reader.hpp"
#include "sampler.hpp"
#include "store.hpp"

using namespace vito;

namespace {

// Rejecting is all that bad bytes may lead to.
template <class Body>
void tolerate(Body body) {
  try {
    body();
  } catch (const std::invalid_argument&) {
  } catch (const std::out_of_range&) {
  }
}

void use(const Index& index) {
  const SamplerConfig config{3, 0.5, {0.4, 1}, {-0.3, 0.3}, 0.5, 0.8, 0.4, 0.4, 0.2, 0.1, 0.2, {0.1, 2}, {}, {}, true, false};
  Reader reader(index, "/nonexistent", 1);
  for (uint64_t clip = 0; clip < std::min<uint64_t>(index.num_clips(), 50); ++clip) {
    tolerate([&] {
      const Index::Clip view = index.clip(clip);
      const uint32_t frames = view.record().num_frames;
      for (uint32_t f = 0; f < std::min(frames, 200u); ++f) tolerate([&] { (void)view.pts(f); });
      for (uint32_t p = 0; p < std::min(view.record().num_packets, 200u); ++p) tolerate([&] { (void)view.packet(p); });
      for (const bool single : {false, true})
        for (const uint32_t frame : {0u, frames / 2, frames - 1}) {
          const uint32_t pair[] = {frame, frames / 3};
          tolerate([&] { plan_packets(view, pair, 2, single); });
          tolerate([&] { reader.read(&clip, pair, 1, 2, true, single); });
        }
    });
  }
  tolerate([&] {
    const Sampler sampler(index, config, 1);
    for (int64_t n = 0; n < 20; ++n) {
      int64_t clip, video;
      int32_t frame[3], crop[12];
      double time[3];
      uint8_t flip[3];
      float params[24];
      const uint32_t attempt = static_cast<uint32_t>(n % 3);
      tolerate([&] { sampler.sample(&n, &attempt, 1, {&clip, &video, frame, time, crop, flip, params}); });
    }
  });
}

void open_bytes(const std::string& bytes) {
  const MemoryFile file(bytes);
  tolerate([&] { use(Index(file.path())); });
}

template <class T>
void store(std::string& bytes, uint64_t at, T value) {
  std::memcpy(&bytes[at], &value, sizeof value);
}

// Makes sizes and checksums right wherever the tables lie inside the bytes.
void repair(std::string& bytes) {
  if (bytes.size() < sizeof(Header)) return;
  std::memcpy(&bytes[0], kIndexMagic, sizeof kIndexMagic);
  store(bytes, offsetof(Header, version), kIndexVersion);
  store(bytes, offsetof(Header, file_size), uint64_t{bytes.size()});
  Header header;
  std::memcpy(&header, bytes.data(), sizeof header);
  const auto inside = [&](uint64_t at, uint64_t size) { return at <= bytes.size() && size <= bytes.size() - at; };
  for (uint64_t clip = 0; clip < std::min<uint64_t>(header.num_clips, 1000); ++clip) {
    const uint64_t at = header.records_offset + clip * sizeof(Record);
    if (!inside(at, sizeof(Record))) break;
    Record record;
    std::memcpy(&record, &bytes[at], sizeof record);
    if (inside(record.block_offset, record.block_size))
      record.block_checksum =
          static_cast<uint32_t>(xxh64(bytes.data() + record.block_offset, record.block_size, clip));
    record.checksum = xxh64(&record, offsetof(Record, checksum), clip);
    std::memcpy(&bytes[at], &record, sizeof record);
  }
  if (inside(header.shards_offset, header.shards_size))
    store(bytes, offsetof(Header, shards_checksum),
          xxh64(bytes.data() + header.shards_offset, header.shards_size, 0));
  store(bytes, offsetof(Header, checksum), xxh64(bytes.data(), offsetof(Header, checksum), 0));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string bytes(reinterpret_cast<const char*>(data), size);
  open_bytes(bytes);
  repair(bytes);
  open_bytes(bytes);
  return 0;
}

std::vector<std::string> fuzz_seeds() {
  TestClip reordered;
  reordered.packets = {{0, kKey}, {3, 0}, {1, kDisposable}, {2, kNoPicture}, {4, kKey | kOpen}, {6, 0}, {5, 0}};
  return {read_file(TestStore({constant_clip(5), reordered, constant_clip(1)}).index_path()),
          read_file(TestStore(std::vector<TestClip>{}).index_path())};
}
