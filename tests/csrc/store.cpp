#include "store.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>

#include "hash.hpp"

TemporaryDirectory::TemporaryDirectory() {
  std::string name = (std::filesystem::temp_directory_path() / "vito-XXXXXX").string();
  if (!mkdtemp(name.data())) throw std::runtime_error("no temporary directory");
  path = name;
}

TemporaryDirectory::~TemporaryDirectory() { std::filesystem::remove_all(path); }

std::string read_file(const std::string& path) {
  std::ostringstream out;
  out << std::ifstream(path, std::ios::binary).rdbuf();
  return out.str();
}

void write_file(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

MemoryFile::MemoryFile(const std::string& bytes) : fd_(memfd_create("bytes", MFD_CLOEXEC)) {
  if (fd_ < 0 || write(fd_, bytes.data(), bytes.size()) != static_cast<ssize_t>(bytes.size()))
    throw std::runtime_error("no file in memory");
}

MemoryFile::~MemoryFile() { close(fd_); }

std::string MemoryFile::path() const { return "/proc/self/fd/" + std::to_string(fd_); }

std::string payload(size_t clip, size_t packet) {
  std::string bytes = "clip " + std::to_string(clip) + " packet " + std::to_string(packet) + ":";
  for (size_t i = 0; i < 20 + (clip * 7 + packet * 13) % 50; ++i) bytes += static_cast<char>(i * 31 + packet + clip);
  return bytes;
}

TestClip constant_clip(size_t frames) {
  TestClip clip;
  clip.codec = "mjpeg";
  for (size_t i = 0; i < frames; ++i) clip.packets.push_back({static_cast<int64_t>(i), vito::kKey});
  return clip;
}

TestStore::TestStore(const std::vector<TestClip>& clips) {
  std::vector<std::vector<int64_t>> offsets(clips.size()), sizes(clips.size());
  std::vector<std::vector<uint32_t>> checksums(clips.size());
  for (size_t c = 0; c < clips.size(); ++c) {
    for (size_t p = 0; p < clips[c].packets.size(); ++p) {
      const std::string bytes = payload(c, p);
      offsets[c].push_back(static_cast<int64_t>(shard.size()));
      sizes[c].push_back(static_cast<int64_t>(bytes.size()));
      checksums[c].push_back(vito::packet_checksum(bytes.data(), bytes.size()));
      shard += bytes + std::string(clips[c].gap, '-');
    }
  }
  write_file(directory.file("shard.bin"), shard);
  vito::IndexWriter writer(index_path(), "copy", {{"shard.bin", shard.size()}});
  for (size_t c = 0; c < clips.size(); ++c) {
    std::vector<int64_t> pts;
    std::vector<uint8_t> flags;
    int64_t end = 0;
    for (const TestPacket& packet : clips[c].packets) {
      pts.push_back(packet.pts);
      flags.push_back(packet.flags);
      end = std::max(end, packet.pts + 1);
    }
    writer.add({static_cast<int64_t>(c), "source-" + std::to_string(c), clips[c].codec, "extra", clips[c].width,
                clips[c].height, 0, 0, 1, 25, end, pts.size(), pts.data(), offsets[c].data(), sizes[c].data(),
                checksums[c].data(), flags.data()});
  }
  writer.finish();
}
