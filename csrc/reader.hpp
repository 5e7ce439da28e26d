// Reads the packets of frames from the shards and verifies them.
#pragma once

#include <cstdint>
#include <exception>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "index.hpp"
#include "planner.hpp"
#include "thread_pool.hpp"

namespace vito {

enum class ReadCode { ok, missing, io, truncated, checksum, index, unsupported, memory };
const char* name(ReadCode code);

// The data of one sample, or the reason why it cannot be read.
struct ReadResult {
  ReadCode code = ReadCode::ok;
  std::string error;
  std::vector<unsigned char> data;  // the plan's packets one after another, or a Matroska file
  std::vector<uint32_t> sizes;      // of each packet as stored
  Plan plan;
};

class Reader {
 public:
  // The index must outlive the reader. `directory` holds the shards.
  Reader(const Index& index, std::string directory, int threads);

  // One result for each of `batch` clips with `views` frames each (presentation order). Bad data never throw, they are
  // in the results; std::out_of_range for a clip or frame that does not exist.
  std::vector<ReadResult> read(const uint64_t* clips, const uint32_t* frames, size_t batch, size_t views, bool miniclip,
                               bool single_stream);

 private:
  struct File {
    int fd;
    uint64_t size;
    explicit File(int fd, uint64_t size) : fd(fd), size(size) {}
    ~File();
  };
  using FilePtr = std::shared_ptr<const File>;

  FilePtr open_shard(uint32_t shard);
  void forget_shard(uint32_t shard);
  void read_one(uint64_t clip, const uint32_t* frames, size_t views, bool miniclip, bool single_stream,
                ReadResult& result);
  void read_packets(const Index::Clip& clip, ReadResult& result, std::vector<Packet>& packets);

  const Index& index_;
  std::string directory_;
  std::mutex mutex_;  // of the open shards: the most recently used first
  std::list<std::pair<uint32_t, FilePtr>> open_;
  std::unordered_map<uint32_t, std::list<std::pair<uint32_t, FilePtr>>::iterator> by_shard_;
  ThreadPool pool_;
};

// A mini-clip of a plan whose packets' bytes lie one after another in `data`.
std::vector<unsigned char> make_miniclip(const Index::Clip& clip, const Plan& plan,
                                         const std::vector<unsigned char>& data, const std::vector<uint32_t>& sizes);

}  // namespace vito
