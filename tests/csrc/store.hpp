// Small stores for the tests, in a directory of their own that goes with them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "index.hpp"
#include "index_writer.hpp"

struct TestPacket {
  int64_t pts;
  uint8_t flags;
};

class TemporaryDirectory {
 public:
  TemporaryDirectory();
  ~TemporaryDirectory();
  std::string file(const std::string& name) const { return path + "/" + name; }
  std::string path;
};

std::string read_file(const std::string& path);
void write_file(const std::string& path, const std::string& bytes);

// Bytes as a file that touches no disk.
class MemoryFile {
 public:
  explicit MemoryFile(const std::string& bytes);
  ~MemoryFile();
  std::string path() const;

 private:
  int fd_;
};

// Bytes of a packet: differ from packet to packet and from clip to clip.
std::string payload(size_t clip, size_t packet);

// One clip from the packets' times and flags (decoding order), `gap` unused bytes after each packet.
struct TestClip {
  std::vector<TestPacket> packets;
  std::string codec = "h264";
  size_t gap = 0;
  int64_t width = 320, height = 180;
};

TestClip constant_clip(size_t frames);

// index.bin and one shard, shard.bin, that holds all clips.
class TestStore {
 public:
  explicit TestStore(const std::vector<TestClip>& clips);
  std::string index_path() const { return directory.file("index.bin"); }
  TemporaryDirectory directory;
  std::string shard;  // its bytes
};
