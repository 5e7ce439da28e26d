#include "index_writer.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <system_error>

#include "hash.hpp"

namespace vito {

namespace {

constexpr size_t kBuffer = 1 << 20;

template <class T>
void append(std::string& bytes, T value) {
  bytes.append(reinterpret_cast<const char*>(&value), sizeof value);
}

class Checker {
 public:
  explicit Checker(uint64_t clip) : prefix_("clip " + std::to_string(clip) + ": ") {}
  void operator()(bool good, const char* field, int64_t value, const char* rule) const {
    if (!good) throw std::invalid_argument(prefix_ + field + " is " + std::to_string(value) + ", must be " + rule);
  }

 private:
  std::string prefix_;
};

void check_clip(const ClipInput& c, const std::vector<Shard>& shards, const Checker& check) {
  const int64_t big = UINT32_MAX;
  check(c.num_packets >= 1 && c.num_packets <= INT32_MAX, "the number of packets", static_cast<int64_t>(c.num_packets),
        "1 to 2^31 - 1");
  check(c.width >= 1 && c.width <= 65535, "width", c.width, "1 to 65535");
  check(c.height >= 1 && c.height <= 65535, "height", c.height, "1 to 65535");
  check(c.rotation >= 0 && c.rotation < 720 && c.rotation % 90 == 0, "rotation", c.rotation, "0 to 630 by 90");
  check(c.tick_num >= 1 && c.tick_num <= big, "time_base's numerator", c.tick_num, "1 to 2^32 - 1");
  check(c.tick_den >= 1 && c.tick_den <= big, "time_base's denominator", c.tick_den, "1 to 2^32 - 1");
  check(c.shard >= 0 && static_cast<uint64_t>(c.shard) < shards.size(), "shard", c.shard, "the number of a shard");
  check(!c.codec.empty() && c.codec.size() <= 15 && c.codec.find('\0') == std::string::npos, "codec's length",
        static_cast<int64_t>(c.codec.size()), "1 to 15 characters");
  check(c.extradata.size() <= UINT32_MAX && c.source.size() <= UINT32_MAX, "extradata's or source's length", big + 1,
        "below 2^32");
  const int64_t shard_size = static_cast<int64_t>(shards[static_cast<size_t>(c.shard)].size);
  for (size_t i = 0; i < c.num_packets; ++i) {
    check(c.pts[i] >= -kMaxPts && c.pts[i] <= kMaxPts, "a pts", c.pts[i], "within 2^53 ticks of 0");
    check(c.sizes[i] >= 1 && c.sizes[i] <= big, "a size", c.sizes[i], "1 to 2^32 - 1");
    check(c.offsets[i] >= 0 && c.offsets[i] <= shard_size - c.sizes[i], "an offset", c.offsets[i],
          "such that the packet ends within its shard");
    check((c.flags[i] & ~kAllFlags) == 0, "a flag", c.flags[i], "a combination of the known packet flags");
  }
}

// A frame that no key comes before cannot be decoded: the packer must say that it is none (kNoPicture, kDiscard).
void check_decodable(const ClipInput& c, const Checker& check) {
  size_t key = 0;
  while (key < c.num_packets && !(c.flags[key] & kKey)) ++key;
  check(key < c.num_packets, "the number of keys", 0, "at least 1");
  for (size_t i = 0; i < c.num_packets; ++i) {
    const bool shown = !(c.flags[i] & (kDiscard | kNoPicture));
    const bool decodable = i >= key && (c.pts[i] >= c.pts[key] || !(c.flags[key] & kOpen));
    check(!shown || decodable, "the first key", static_cast<int64_t>(key), "decoded and shown before every frame");
  }
}

// Packet numbers of the frames, in presentation order.
std::vector<uint32_t> presentation_order(const ClipInput& c) {
  std::vector<uint32_t> order;
  for (size_t i = 0; i < c.num_packets; ++i)
    if (!(c.flags[i] & (kDiscard | kNoPicture))) order.push_back(static_cast<uint32_t>(i));
  std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return c.pts[a] < c.pts[b]; });
  return order;
}

// Ticks a frame if the clip fits the constant layout, else 0.
uint32_t constant_step(const ClipInput& c) {
  const int64_t step = c.num_packets > 1 ? c.pts[1] - c.pts[0] : c.end - c.pts[0];
  if (step < 1 || step > int64_t{UINT32_MAX}) return 0;
  for (size_t i = 0; i < c.num_packets; ++i) {
    const int64_t end = c.offsets[i] + c.sizes[i];
    if (c.flags[i] != kKey || end - c.offsets[0] > int64_t{UINT32_MAX}) return 0;
    if (i + 1 < c.num_packets && (c.offsets[i + 1] != end || c.pts[i + 1] - c.pts[i] != step)) return 0;
  }
  return static_cast<uint32_t>(step);
}

}  // namespace

IndexWriter::IndexWriter(std::string path, std::string format, std::vector<Shard> shards)
    : path_(std::move(path)), shards_(std::move(shards)) {
  if (format.empty() || format.size() > 15 || format.find('\0') != std::string::npos)
    throw std::invalid_argument("format is '" + format + "', must be 1 to 15 characters");
  for (const Shard& shard : shards_)
    if (shard.size > kMaxOffset || !valid_shard_name(shard.name))
      throw std::invalid_argument("shard '" + shard.name + "' of " + std::to_string(shard.size) +
                                  " bytes: must be a file name inside the store, and below 2^56 bytes");
  std::memcpy(header_.magic, kIndexMagic, sizeof kIndexMagic);
  std::memcpy(header_.format, format.data(), format.size());
  header_.version = kIndexVersion;
  buffer_.reserve(kBuffer);
  fd_ = open(path_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd_ < 0) fail(errno);
  try {
    const Header empty{};  // an unfinished file has no magic
    write(&empty, sizeof empty);
  } catch (...) {
    close(fd_);
    throw;
  }
}

IndexWriter::~IndexWriter() {
  if (fd_ >= 0) close(fd_);
}

void IndexWriter::fail(int error) const { throw std::system_error(error, std::generic_category(), path_); }

void IndexWriter::flush() {
  for (size_t done = 0; done < buffer_.size();) {
    const ssize_t n = ::write(fd_, buffer_.data() + done, buffer_.size() - done);
    if (n < 0 && errno != EINTR) fail(errno);
    if (n > 0) done += static_cast<size_t>(n);
  }
  buffer_.clear();
}

void IndexWriter::write(const void* data, size_t size) {
  const unsigned char* bytes = static_cast<const unsigned char*>(data);
  buffer_.insert(buffer_.end(), bytes, bytes + size);
  written_ += size;
  if (buffer_.size() >= kBuffer) flush();
}

void IndexWriter::add(const ClipInput& c) {
  if (fd_ < 0) throw std::invalid_argument("the index is finished: no clip can be added");
  const uint64_t number = records_.size();
  const Checker check(number);
  check_clip(c, shards_, check);
  check_decodable(c, check);
  const std::vector<uint32_t> order = presentation_order(c);
  check(!order.empty(), "the number of frames", 0, "at least 1");
  check(c.end > c.pts[order.back()] && c.end <= kMaxPts, "end", c.end, "later than the last frame's pts");

  Record r{};
  r.video = c.video;
  r.step = constant_step(c);
  r.layout = r.step ? kConstant : kGeneral;
  r.start = c.pts[order.front()];
  r.end = c.end;
  r.tick_num = static_cast<uint32_t>(c.tick_num);
  r.tick_den = static_cast<uint32_t>(c.tick_den);
  r.num_packets = static_cast<uint32_t>(c.num_packets);
  r.num_frames = static_cast<uint32_t>(order.size());
  r.width = static_cast<uint32_t>(c.width);
  r.height = static_cast<uint32_t>(c.height);
  r.shard = static_cast<uint32_t>(c.shard);
  r.rotation = static_cast<uint16_t>(c.rotation);
  r.extradata_size = static_cast<uint32_t>(c.extradata.size());
  r.source_size = static_cast<uint32_t>(c.source.size());
  std::memcpy(r.codec, c.codec.data(), c.codec.size());
  int64_t begin = c.offsets[0], end = 0;
  for (size_t i = 0; i < c.num_packets; ++i) {
    begin = std::min(begin, c.offsets[i]);
    end = std::max(end, c.offsets[i] + c.sizes[i]);
  }
  r.data_offset = static_cast<uint64_t>(begin);
  r.data_size = static_cast<uint64_t>(end - begin);

  std::string block;
  for (size_t i = 0; i < c.num_packets; ++i) {
    if (r.layout == kConstant) {
      append(block, static_cast<uint32_t>(c.offsets[i] + c.sizes[i] - begin));
      append(block, c.checksums[i]);
    } else {
      append(block, static_cast<uint64_t>(c.offsets[i]) << 8 | c.flags[i]);
      append(block, c.pts[i]);
      append(block, static_cast<uint32_t>(c.sizes[i]));
      append(block, c.checksums[i]);
    }
  }
  if (r.layout == kGeneral)
    for (uint32_t packet : order) append(block, packet);
  block += c.extradata;
  block += c.source;
  r.block_offset = written_;
  r.block_size = block.size();
  r.block_checksum = static_cast<uint32_t>(xxh64(block.data(), block.size(), number));
  r.checksum = xxh64(&r, offsetof(Record, checksum), number);

  write(block.data(), block.size());
  records_.push_back(r);
  header_.num_frames += r.num_frames;
  header_.num_packets += r.num_packets;
}

uint64_t IndexWriter::finish() {
  if (fd_ < 0) throw std::invalid_argument("the index is finished already");
  static const char zeros[sizeof(Record)] = {};
  write(zeros, -written_ % sizeof(Record));  // a record fills two cache lines and never lies in two pages
  header_.num_clips = records_.size();
  header_.records_offset = written_;
  for (const Record& record : records_) write(&record, sizeof record);
  std::string table;
  for (const Shard& shard : shards_) {
    append(table, shard.size);
    append(table, static_cast<uint32_t>(shard.name.size()));
    table += shard.name;
  }
  header_.num_shards = shards_.size();
  header_.shards_offset = written_;
  header_.shards_size = table.size();
  header_.shards_checksum = xxh64(table.data(), table.size(), 0);
  write(table.data(), table.size());
  flush();
  header_.file_size = written_;
  header_.checksum = xxh64(&header_, offsetof(Header, checksum), 0);
  if (fsync(fd_)) fail(errno);
  if (pwrite(fd_, &header_, sizeof header_, 0) != static_cast<ssize_t>(sizeof header_)) fail(errno ? errno : EIO);
  if (fsync(fd_)) fail(errno);
  const int fd = fd_;
  fd_ = -1;
  if (close(fd)) fail(errno);
  return header_.num_clips;
}

}  // namespace vito
