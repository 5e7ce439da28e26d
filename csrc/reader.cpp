#include "reader.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <stdexcept>
#include <system_error>

#include "hash.hpp"
#include "miniclip.hpp"

namespace vito {

namespace {

constexpr size_t kOpenShards = 128;      // well below the usual limit of 1024 open files
constexpr uint64_t kMaxGap = 32 << 10;   // reading over a gap this small is cheaper than another call
constexpr size_t kMaxPieces = 512;       // below IOV_MAX

// Why a sample cannot be had.
struct Failure {
  ReadCode code;
  std::string message;
};

// Fills the pieces from consecutive bytes of the file.
void read_fully(int fd, uint64_t offset, std::vector<iovec>& pieces, const std::string& path) {
  for (size_t first = 0; first < pieces.size();) {
    const ssize_t n = preadv(fd, pieces.data() + first, static_cast<int>(pieces.size() - first),
                             static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw Failure{ReadCode::io, path + ": " + std::strerror(errno)};
    if (n == 0) throw Failure{ReadCode::truncated, path + " ends at byte " + std::to_string(offset)};
    offset += static_cast<uint64_t>(n);
    size_t left = static_cast<size_t>(n);
    while (first < pieces.size() && left >= pieces[first].iov_len) left -= pieces[first++].iov_len;
    if (left) {
      pieces[first].iov_base = static_cast<unsigned char*>(pieces[first].iov_base) + left;
      pieces[first].iov_len -= left;
    }
  }
}

int checked_threads(int threads) {
  if (threads < 1 || threads > 1024)
    throw std::invalid_argument("threads is " + std::to_string(threads) + ", must be 1 to 1024");
  return threads;
}

}  // namespace

const char* name(ReadCode code) {
  switch (code) {
    case ReadCode::ok: return "ok";
    case ReadCode::missing: return "missing";
    case ReadCode::io: return "io";
    case ReadCode::truncated: return "truncated";
    case ReadCode::checksum: return "checksum";
    case ReadCode::index: return "index";
    case ReadCode::unsupported: return "unsupported";
    case ReadCode::memory: return "memory";
  }
  return "unknown";
}

Reader::File::~File() { close(fd); }

Reader::Reader(const Index& index, std::string directory, int threads)
    : index_(index), directory_(std::move(directory)), pool_(checked_threads(threads)) {}

Reader::FilePtr Reader::open_shard(uint32_t shard) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const auto found = by_shard_.find(shard); found != by_shard_.end()) {
    open_.splice(open_.begin(), open_, found->second);
    return open_.front().second;
  }
  const std::string path = directory_ + "/" + index_.shards()[shard].name;
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe must not make it wait
  if (fd < 0) throw Failure{errno == ENOENT ? ReadCode::missing : ReadCode::io, path + ": " + std::strerror(errno)};
  struct stat status {};
  if (fstat(fd, &status)) {
    const int error = errno;
    close(fd);
    throw Failure{ReadCode::io, path + ": " + std::strerror(error)};
  }
  open_.emplace_front(shard, std::make_shared<File>(fd, static_cast<uint64_t>(status.st_size)));
  by_shard_[shard] = open_.begin();
  if (open_.size() > kOpenShards) {  // whoever still reads from it keeps it open
    by_shard_.erase(open_.back().first);
    open_.pop_back();
  }
  return open_.front().second;
}

void Reader::forget_shard(uint32_t shard) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const auto found = by_shard_.find(shard); found != by_shard_.end()) {
    open_.erase(found->second);
    by_shard_.erase(found);
  }
}

// Packets that lie close together are read by one call, the gaps into a bin.
void Reader::read_packets(const Index::Clip& clip, ReadResult& result, std::vector<Packet>& packets) {
  const uint32_t shard = clip.record().shard;
  const FilePtr file = open_shard(shard);
  const std::string path = directory_ + "/" + index_.shards()[shard].name;
  uint64_t total = 0;
  for (const uint32_t number : result.plan.packets) {
    const Packet packet = clip.packet(number);
    if (packet.offset + packet.size > file->size)
      throw Failure{ReadCode::truncated, path + " has " + std::to_string(file->size) + " bytes, packet " +
                                             std::to_string(number) + " ends at byte " +
                                             std::to_string(packet.offset + packet.size)};
    packets.push_back(packet);
    result.sizes.push_back(packet.size);
    total += packet.size;
  }
  result.data.resize(total);
  std::vector<unsigned char> bin(kMaxGap);
  std::vector<iovec> pieces;
  unsigned char* to = result.data.data();
  for (size_t i = 0; i < packets.size();) {
    const uint64_t begin = packets[i].offset;
    uint64_t end = begin;
    pieces.clear();
    for (; i < packets.size() && pieces.size() < kMaxPieces; ++i) {
      if (packets[i].offset < end || packets[i].offset - end > kMaxGap) break;
      if (packets[i].offset > end) pieces.push_back({bin.data(), packets[i].offset - end});
      pieces.push_back({to, packets[i].size});
      to += packets[i].size;
      end = packets[i].offset + packets[i].size;
    }
    read_fully(file->fd, begin, pieces, path);
  }
  const unsigned char* data = result.data.data();
  for (size_t i = 0; i < packets.size(); data += packets[i++].size)
    if (packet_checksum(data, packets[i].size) != packets[i].checksum)
      throw Failure{ReadCode::checksum, path + ": the checksum of packet " + std::to_string(result.plan.packets[i]) +
                                            " at byte " + std::to_string(packets[i].offset) + " is wrong"};
}

void Reader::read_one(uint64_t number, const uint32_t* frames, size_t views, bool miniclip, bool single_stream,
                      ReadResult& result) {
  Failure failure{ReadCode::ok, {}};
  std::vector<Packet> packets;
  try {
    const Index::Clip clip = index_.clip(number);
    result.plan = plan_packets(clip, frames, views, single_stream);
    try {
      read_packets(clip, result, packets);
    } catch (const Failure&) {
      forget_shard(clip.record().shard);  // the file may have been replaced: look again next time
      throw;
    }
    if (miniclip) {
      try {
        result.data = make_miniclip(clip, result.plan, result.data, result.sizes);
      } catch (const std::invalid_argument& e) {
        throw Failure{ReadCode::unsupported, e.what()};
      }
    }
  } catch (const Failure& e) {
    failure = e;
  } catch (const std::invalid_argument& e) {
    failure = {ReadCode::index, e.what()};
  } catch (const std::bad_alloc&) {
    failure = {ReadCode::memory, "not enough memory for the packets"};
  } catch (const std::length_error&) {
    failure = {ReadCode::memory, "not enough memory for the packets"};
  }
  if (failure.code == ReadCode::ok) return;
  result = {};
  result.code = failure.code;
  result.error = "clip " + std::to_string(number) + ": " + failure.message;
}

std::vector<ReadResult> Reader::read(const uint64_t* clips, const uint32_t* frames, size_t batch, size_t views,
                                     bool miniclip, bool single_stream) {
  index_.check_whole();
  std::vector<ReadResult> results(batch);
  std::vector<std::exception_ptr> errors(batch);  // the caller's mistakes
  pool_.run(batch, [&](size_t i) {
    try {
      read_one(clips[i], frames + i * views, views, miniclip, single_stream, results[i]);
    } catch (...) {
      errors[i] = std::current_exception();
    }
  });
  for (const std::exception_ptr& error : errors)
    if (error) std::rethrow_exception(error);
  return results;
}

std::vector<unsigned char> make_miniclip(const Index::Clip& clip, const Plan& plan,
                                         const std::vector<unsigned char>& data, const std::vector<uint32_t>& sizes) {
  const Record& record = clip.record();
  MiniClip mini{record.codec, clip.extradata(), record.width, record.height, {}};
  size_t at = 0, run = 1;
  for (size_t i = 0; i < plan.packets.size(); ++i) {
    const bool resets = run < plan.runs.size() && plan.runs[run].first == i;
    run += resets;
    const Packet packet = clip.packet(plan.packets[i]);
    mini.packets.push_back({Bytes{data.data() + at, sizes[i]}, plan.ranks[i], (packet.flags & kKey) != 0,
                            (packet.flags & kNoPicture) != 0, resets});
    at += sizes[i];
  }
  return write_miniclip(mini);
}

}  // namespace vito
