#include "index.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>

#include "hash.hpp"

namespace vito {

namespace {

// [offset, offset + size) lies in [begin, end); never overflows.
bool inside(uint64_t offset, uint64_t size, uint64_t begin, uint64_t end) {
  return offset >= begin && offset <= end && size <= end - offset;
}

using Bits = std::unique_ptr<std::atomic<uint64_t>[]>;

bool marked(const Bits& bits, uint64_t clip) {
  return bits[clip / 64].load(std::memory_order_relaxed) >> clip % 64 & 1;
}

void mark(const Bits& bits, uint64_t clip) {
  bits[clip / 64].fetch_or(uint64_t{1} << clip % 64, std::memory_order_relaxed);
}

bool terminated(const char (&text)[16]) { return std::memchr(text, 0, sizeof text) != nullptr; }

}  // namespace

bool valid_shard_name(std::string_view name) {
  if (name.empty() || name.size() > 4096 || name[0] == '/' || name.find('\0') != name.npos) return false;
  const std::string parts = "/" + std::string(name) + "/";
  return parts.find("/../") == parts.npos;
}

Index::Index(std::string path) : path_(std::move(path)) {
  const int fd = open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe must not make it wait
  if (fd < 0) throw std::system_error(errno, std::generic_category(), path_);
  struct stat status {};
  int error = fstat(fd, &status) ? errno : S_ISDIR(status.st_mode) ? EISDIR : 0;
  const bool regular = S_ISREG(status.st_mode);
  if (!error && regular && status.st_size > 0) {
    size_ = static_cast<uint64_t>(status.st_size);
    void* mapping = mmap(nullptr, size_, PROT_READ, MAP_SHARED, fd, 0);
    if (mapping == MAP_FAILED) error = errno;
    else data_ = static_cast<const unsigned char*>(mapping);
  }
  if (error || !regular) close(fd);
  if (error) throw std::system_error(error, std::generic_category(), path_);
  if (!regular) corrupt("it is no regular file");
  fd_ = fd;
  try {
    read_header();
    read_shards();
    good_records_.reset(new std::atomic<uint64_t>[header_.num_clips / 64 + 1]());
    good_blocks_.reset(new std::atomic<uint64_t>[header_.num_clips / 64 + 1]());
  } catch (...) {
    if (data_) munmap(const_cast<unsigned char*>(data_), size_);
    close(fd_);
    throw;
  }
}

Index::~Index() {
  munmap(const_cast<unsigned char*>(data_), size_);
  close(fd_);
}

void Index::check_whole() const {
  struct stat status {};
  if (fstat(fd_, &status) || static_cast<uint64_t>(status.st_size) < size_)
    corrupt("it was cut short while it was open");
}

void Index::corrupt(const std::string& what) const {
  throw std::invalid_argument(path_ + " is damaged: " + what + "; delete the store and pack again");
}

void Index::read_header() {
  if (size_ < sizeof header_ || std::memcmp(data_, kIndexMagic, sizeof kIndexMagic) != 0)
    corrupt("it is not the index of a vito-fast store");
  std::memcpy(&header_, data_, sizeof header_);
  if (header_.version != kIndexVersion)
    throw std::invalid_argument(path_ + " is a store index of version " + std::to_string(header_.version) +
                                ", but this vito-fast reads version " + std::to_string(kIndexVersion) +
                                "; delete the store and pack again, or install the vito-fast that wrote it");
  if (header_.checksum != xxh64(data_, offsetof(Header, checksum), 0)) corrupt("the header's checksum is wrong");
  if (header_.file_size != size_)
    corrupt("the file has " + std::to_string(size_) + " bytes, its header says " + std::to_string(header_.file_size));
  const uint64_t records = header_.records_offset, shards = header_.shards_offset;
  if (!terminated(header_.format) || !inside(records, 0, sizeof header_, size_) ||
      header_.num_clips > (size_ - records) / sizeof(Record) ||
      !inside(shards, header_.shards_size, records + header_.num_clips * sizeof(Record), size_))
    corrupt("the header's tables lie outside the file");
}

void Index::read_shards() {
  const unsigned char* table = data_ + header_.shards_offset;
  const uint64_t size = header_.shards_size;
  if (header_.shards_checksum != xxh64(table, size, 0)) corrupt("the shard table's checksum is wrong");
  uint64_t at = 0;
  for (uint64_t i = 0; i < header_.num_shards; ++i) {
    if (!inside(at, 12, 0, size)) corrupt("the shard table is too short");
    const uint64_t bytes = load<uint64_t>(table + at);
    const uint32_t length = load<uint32_t>(table + at + 8);
    if (!inside(at + 12, length, 0, size)) corrupt("the shard table is too short");
    const std::string name(reinterpret_cast<const char*>(table + at + 12), length);
    if (!valid_shard_name(name)) corrupt("a shard's name makes no sense");
    shards_.push_back({name, bytes});
    at += 12 + uint64_t{length};
  }
}

const char* Index::defect(const Record& r, uint64_t clip) const {
  if (r.checksum != xxh64(&r, offsetof(Record, checksum), clip)) return "its record's checksum is wrong";
  if (r.layout > kGeneral || r.num_frames < 1 || r.num_frames > r.num_packets || r.num_packets > INT32_MAX) return "its packets are miscounted";
  if (r.layout == kConstant && r.num_frames != r.num_packets) return "its packets are miscounted";
  if (!inside(r.block_offset, r.block_size, sizeof(Header), header_.records_offset) ||
      r.block_size != r.table_size() + r.extradata_size + r.source_size)
    return "its tables lie outside the file";
  if (r.shard >= shards_.size() || r.data_size > kMaxOffset ||
      !inside(r.data_offset, r.data_size, 0, shards_[r.shard].size))
    return "its data lie outside the shard";
  if (r.tick_num < 1 || r.tick_den < 1 || r.start < -kMaxPts || r.end > kMaxPts || r.start >= r.end)
    return "its times make no sense";
  if (r.layout == kConstant &&
      (r.step < 1 || static_cast<uint64_t>(r.step) * (r.num_frames - 1) >= static_cast<uint64_t>(r.end - r.start)))
    return "its times make no sense";
  if (r.width < 1 || r.width > 65535 || r.height < 1 || r.height > 65535) return "its frame size makes no sense";
  if (!terminated(r.codec) || (r.rotation % 90) != 0 || r.rotation >= 720) return "its codec or rotation makes no sense";
  return nullptr;
}

Record Index::record(uint64_t clip) const {
  if (clip >= header_.num_clips)
    throw std::out_of_range("clip " + std::to_string(clip) + " of an index of " + std::to_string(header_.num_clips));
  Record record;
  std::memcpy(&record, record_at(clip), sizeof record);
  if (marked(good_records_, clip)) return record;
  if (const char* what = defect(record, clip)) corrupt("clip " + std::to_string(clip) + ": " + what);
  mark(good_records_, clip);
  return record;
}

Index::Clip::Clip(const Index& index, uint64_t number, const Record& record)
    : index_(&index), number_(number), record_(record), block_(index.data_ + record.block_offset) {
  if (marked(index.good_blocks_, number)) return;
  if (record.block_checksum != static_cast<uint32_t>(xxh64(block_, record.block_size, number)))
    corrupt("its tables' checksum is wrong");
  mark(index.good_blocks_, number);
}

void Index::Clip::corrupt(const char* what) const {
  index_->corrupt("clip " + std::to_string(number_) + ": " + what);
}

Packet Index::Clip::packet(uint32_t number) const {
  if (number >= record_.num_packets)
    throw std::out_of_range("packet " + std::to_string(number) + " of a clip of " +
                            std::to_string(record_.num_packets));
  Packet packet{};
  if (record_.layout == kConstant) {
    const unsigned char* entry = block_ + kConstantEntry * number;
    const uint32_t begin = number ? load<uint32_t>(entry - kConstantEntry) : 0, end = load<uint32_t>(entry);
    if (begin > end || end > record_.data_size) corrupt("a packet lies outside the clip's data");
    packet = {record_.data_offset + begin, end - begin, load<uint32_t>(entry + 4),
              record_.start + static_cast<int64_t>(number) * record_.step, kKey};
  } else {
    const unsigned char* entry = block_ + kGeneralEntry * number;
    const uint64_t offset = load<uint64_t>(entry);
    packet = {offset >> 8, load<uint32_t>(entry + 16), load<uint32_t>(entry + 20), load<int64_t>(entry + 8),
              static_cast<uint8_t>(offset)};
    if (!inside(packet.offset, packet.size, record_.data_offset, record_.data_offset + record_.data_size))
      corrupt("a packet lies outside the clip's data");
    if (packet.pts < -kMaxPts || packet.pts > kMaxPts) corrupt("a packet's time makes no sense");
  }
  return packet;
}

uint32_t Index::Clip::order(uint32_t frame) const {
  if (frame >= record_.num_frames)
    throw std::out_of_range("frame " + std::to_string(frame) + " of a clip of " + std::to_string(record_.num_frames));
  if (record_.layout == kConstant) return frame;
  const uint32_t packet = load<uint32_t>(block_ + kGeneralEntry * record_.num_packets + kOrderEntry * frame);
  if (packet >= record_.num_packets) corrupt("a frame has no packet");
  return packet;
}

int64_t Index::Clip::pts(uint32_t frame) const {
  if (record_.layout == kConstant && frame < record_.num_frames)
    return record_.start + static_cast<int64_t>(frame) * record_.step;
  return packet(order(frame)).pts;
}

std::string_view Index::Clip::extradata() const {
  return {reinterpret_cast<const char*>(block_ + record_.table_size()), record_.extradata_size};
}

std::string_view Index::Clip::source() const {
  return {reinterpret_cast<const char*>(block_ + record_.table_size() + record_.extradata_size), record_.source_size};
}

uint32_t frame_at(const Index& index, uint64_t clip, const Record& record, int64_t tick) {
  if (tick <= record.start) return 0;
  if (record.layout == kConstant) {
    const uint64_t frame = static_cast<uint64_t>(tick - record.start) / record.step;
    return static_cast<uint32_t>(std::min<uint64_t>(frame, record.num_frames - 1));
  }
  const Index::Clip view = index.clip(clip, record);
  uint32_t first = 0, last = record.num_frames;  // the answer lies in [first, last)
  while (last - first > 1) {
    const uint32_t middle = first + (last - first) / 2;
    (view.pts(middle) <= tick ? first : last) = middle;
  }
  return first;
}

}  // namespace vito
