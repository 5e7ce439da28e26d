// The index of a store: one file, mapped and read in place.
//
//   Header | blocks, one a clip | Record[num_clips] | shard table
//
// A clip's block holds its packet table, its presentation order, its codec's extradata and its source's name.
//
// The packet table has two layouts:
//   constant: 8 bytes a packet {u32 end, u32 checksum}, as for a JPEG clip of constant rate. Every packet is a key
//             frame, packets follow one another without gaps, and frame k is shown at start + k * step.
//   general:  24 bytes a packet {u64 offset << 8 | flags, i64 pts, u32 size, u32 checksum}, then u32 order[num_frames].
//
// Trust: opening verifies the header and the shard table only, so that it costs the same for ten clips and a million. A
// clip's record and block are verified when they are first touched. All are XXH64 checksums, seeded by the clip's
// number, so that two swapped records are noticed too. Bounds are checked even behind a right checksum: no file
// content makes the reader leave the mapping.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace vito {

constexpr char kIndexMagic[8] = {'V', 'I', 'T', 'O', 'I', 'D', 'X', '\n'};
constexpr uint32_t kIndexVersion = 1;
constexpr int64_t kMaxPts = int64_t{1} << 53;  // exact as a double, and no difference overflows
constexpr uint64_t kMaxOffset = uint64_t{1} << 56;

enum PacketFlag : uint8_t {
  kKey = 1,         // decoding can start here
  kDiscard = 2,     // decodes to a picture that is not part of the clip
  kNoPicture = 4,   // decodes to no picture at all
  kDisposable = 8,  // no other picture refers to it
  kOpen = 16,       // a key whose decoder must be in its initial state (not an IDR picture)
};
constexpr uint8_t kAllFlags = kKey | kDiscard | kNoPicture | kDisposable | kOpen;

enum Layout : uint8_t { kConstant = 0, kGeneral = 1 };
constexpr uint64_t kConstantEntry = 8, kGeneralEntry = 24, kOrderEntry = 4;

struct Header {
  char magic[8];
  uint32_t version;
  uint32_t reserved;
  uint64_t file_size;
  uint64_t num_clips;
  uint64_t num_frames;
  uint64_t num_packets;
  uint64_t records_offset;
  uint64_t shards_offset;
  uint64_t shards_size;
  uint64_t num_shards;
  uint64_t shards_checksum;
  char format[16];
  uint64_t checksum;  // of all bytes before it
};
static_assert(sizeof(Header) == 112);

struct Record {
  int64_t video;          // equal for clips of one source video
  uint64_t block_offset;  // in the index
  uint64_t block_size;
  uint64_t data_offset;  // in the shard: the range that holds all the clip's packets
  uint64_t data_size;
  int64_t start;  // ticks: when the first frame is shown
  int64_t end;    // ticks: when the last frame ends
  uint32_t step;  // ticks a frame; constant layout only
  uint32_t tick_num, tick_den;  // seconds a tick
  uint32_t num_packets, num_frames;
  uint32_t width, height;
  uint32_t shard;
  uint32_t extradata_size, source_size;
  char codec[16];
  uint16_t rotation;  // degrees clockwise for display; 360 more if mirrored left to right before that
  uint8_t layout;
  uint8_t reserved;
  uint32_t block_checksum;
  uint64_t checksum;  // of all bytes before it

  uint64_t table_size() const {
    return layout == kConstant ? kConstantEntry * num_packets
                               : kGeneralEntry * num_packets + kOrderEntry * num_frames;
  }
};
static_assert(sizeof(Record) == 128);

struct Packet {
  uint64_t offset;  // in the shard
  uint32_t size;
  uint32_t checksum;
  int64_t pts;
  uint8_t flags;

  bool shown() const { return !(flags & (kDiscard | kNoPicture)); }
};

struct Shard {
  std::string name;  // relative to the store
  uint64_t size;
};

// A relative path that stays inside the store: an index from elsewhere shall not make anyone read other files.
bool valid_shard_name(std::string_view name);

class Index {
 public:
  // Throws std::system_error (file) or std::invalid_argument (content).
  explicit Index(std::string path);
  ~Index();
  Index(const Index&) = delete;
  Index& operator=(const Index&) = delete;

  const std::string& path() const { return path_; }
  std::string format() const { return header_.format; }
  uint64_t num_clips() const { return header_.num_clips; }
  uint64_t num_frames() const { return header_.num_frames; }
  uint64_t num_packets() const { return header_.num_packets; }
  const std::vector<Shard>& shards() const { return shards_; }

  // Throws std::invalid_argument if the file was cut short since: to touch the lost pages would kill the process.
  void check_whole() const;

  // All below throw std::out_of_range for a number that the index does not have and std::invalid_argument for
  // corruption. Thread-safe.
  Record record(uint64_t clip) const;
  void prefetch(uint64_t clip) const { __builtin_prefetch(record_at(clip)), __builtin_prefetch(record_at(clip) + 64); }

  // A verified clip: its record and cheap access to its block. Valid as long as the index.
  class Clip {
   public:
    const Record& record() const { return record_; }
    Packet packet(uint32_t number) const;
    uint32_t order(uint32_t frame) const;  // packet number of a frame
    int64_t pts(uint32_t frame) const;     // in ticks
    std::string_view extradata() const;
    std::string_view source() const;

   private:
    friend class Index;
    Clip(const Index& index, uint64_t number, const Record& record);
    [[noreturn]] void corrupt(const char* what) const;

    const Index* index_;
    uint64_t number_;
    Record record_;
    const unsigned char* block_;
  };
  Clip clip(uint64_t clip) const { return Clip(*this, clip, record(clip)); }
  Clip clip(uint64_t clip, const Record& record) const { return Clip(*this, clip, record); }

 private:
  const unsigned char* record_at(uint64_t clip) const { return data_ + header_.records_offset + clip * sizeof(Record); }
  [[noreturn]] void corrupt(const std::string& what) const;
  void read_header();
  void read_shards();
  const char* defect(const Record& record, uint64_t clip) const;

  std::string path_;
  int fd_ = -1;
  const unsigned char* data_ = nullptr;
  uint64_t size_ = 0;
  Header header_{};
  std::vector<Shard> shards_;
  // One bit a verified clip. The first thread to verify sets it, and to verify twice does no harm.
  std::unique_ptr<std::atomic<uint64_t>[]> good_records_, good_blocks_;
};

// Frame shown at `tick`: the last whose pts is not later, or the first.
uint32_t frame_at(const Index& index, uint64_t clip, const Record& record, int64_t tick);

inline double seconds(const Record& record, int64_t pts) {
  return static_cast<double>(pts) * record.tick_num / record.tick_den;
}

}  // namespace vito
