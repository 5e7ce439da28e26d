// Writes the file that index.hpp describes. Blocks are streamed; only the records (128 bytes a clip) stay in memory.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "index.hpp"

namespace vito {

// A clip to write. The arrays have one entry a packet, in decoding order.
struct ClipInput {
  int64_t video;
  std::string source, codec, extradata;
  int64_t width, height, shard, rotation;
  int64_t tick_num, tick_den;  // seconds a tick
  int64_t end;                 // ticks: when the last frame ends
  size_t num_packets;
  const int64_t* pts;
  const int64_t* offsets;
  const int64_t* sizes;
  const uint32_t* checksums;
  const uint8_t* flags;
};

class IndexWriter {
 public:
  // Creates or replaces the file. All members throw std::system_error when the file cannot be written.
  IndexWriter(std::string path, std::string format, std::vector<Shard> shards);
  ~IndexWriter();
  IndexWriter(const IndexWriter&) = delete;
  IndexWriter& operator=(const IndexWriter&) = delete;

  // Throws std::invalid_argument, naming clip and field, for input that makes no sense.
  void add(const ClipInput& clip);
  // Writes tables and header and syncs: only from here on is the file an index. Returns the number of clips.
  uint64_t finish();

 private:
  void write(const void* data, size_t size);
  void flush();
  [[noreturn]] void fail(int error) const;

  std::string path_;
  int fd_;
  uint64_t written_ = 0;  // bytes, those in the buffer included
  std::vector<unsigned char> buffer_;
  Header header_{};
  std::vector<Shard> shards_;
  std::vector<Record> records_;
};

}  // namespace vito
