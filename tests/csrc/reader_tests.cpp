#include "reader.hpp"

#include <sys/stat.h>

#include <filesystem>
#include <stdexcept>
#include <thread>

#include "check.hpp"
#include "store.hpp"

using namespace vito;

namespace {

std::string bytes(const ReadResult& result) { return {result.data.begin(), result.data.end()}; }

std::string code(Reader& reader, uint64_t clip, uint32_t frame, bool miniclip = false) {
  const ReadResult result = reader.read(&clip, &frame, 1, 1, miniclip, true)[0];
  CHECK_EQUAL(result.error.empty(), result.code == ReadCode::ok);
  if (result.code != ReadCode::ok) CHECK(result.data.empty() && result.plan.packets.empty());
  return name(result.code);
}

}  // namespace

TEST(reader, delivers_the_packets_of_the_plan) {
  for (const size_t gap : {0, 1, 40000}) {
    TestClip clip = constant_clip(12);
    clip.gap = gap;
    const TestStore store({clip, clip});
    const Index index(store.index_path());
    Reader reader(index, store.directory.path, 3);
    const std::vector<uint64_t> clips{0, 1, 1};
    const std::vector<uint32_t> frames{3, 4, 11, 0, 5, 5};
    const auto results = reader.read(clips.data(), frames.data(), 3, 2, false, true);
    CHECK_EQUAL(bytes(results[0]), payload(0, 3) + payload(0, 4));
    CHECK_EQUAL(bytes(results[1]), payload(1, 0) + payload(1, 11));
    CHECK_EQUAL(bytes(results[2]), payload(1, 5));
    CHECK_EQUAL(results[0].sizes[1], payload(0, 4).size());
  }
}

TEST(reader, long_plans_take_several_calls) {
  TestClip clip;
  for (int64_t i = 0; i < 3000; ++i) clip.packets.push_back({i, static_cast<uint8_t>(i == 0 ? kKey : 0)});
  clip.gap = 3;
  const TestStore store({clip});
  const Index index(store.index_path());
  Reader reader(index, store.directory.path, 1);
  const uint64_t number = 0;
  const uint32_t frame = 2999;
  std::string expected;
  for (size_t p = 0; p < 3000; ++p) expected += payload(0, p);
  CHECK_EQUAL(bytes(reader.read(&number, &frame, 1, 1, false, true)[0]), expected);
}

TEST(reader, faults_are_told_apart_and_stay_with_their_sample) {
  const TestStore store({constant_clip(4), constant_clip(4)});
  const Index index(store.index_path());
  Reader reader(index, store.directory.path, 2);
  const std::string shard = store.directory.file("shard.bin");
  CHECK_EQUAL(code(reader, 0, 3), std::string("ok"));

  std::string bad = store.shard;
  bad[payload(0, 0).size() + 5] ^= 1;  // in packet 1 of clip 0
  write_file(shard, bad);
  CHECK_EQUAL(code(reader, 0, 1), std::string("checksum"));
  CHECK_EQUAL(code(reader, 0, 0), std::string("ok"));
  CHECK_EQUAL(code(reader, 1, 1), std::string("ok"));

  std::filesystem::remove(shard);
  write_file(shard, store.shard.substr(0, store.shard.size() - 1));
  Reader again(index, store.directory.path, 2);
  CHECK_EQUAL(code(again, 1, 3), std::string("truncated"));
  CHECK_EQUAL(code(again, 1, 2), std::string("ok"));

  std::filesystem::remove(shard);
  Reader gone(index, store.directory.path, 2);
  CHECK_EQUAL(code(gone, 0, 0), std::string("missing"));
  write_file(shard, store.shard);  // it is back
  CHECK_EQUAL(code(gone, 0, 0), std::string("ok"));

  std::filesystem::remove(shard);
  CHECK_EQUAL(mkfifo(shard.c_str(), 0600), 0);
  Reader piped(index, store.directory.path, 2);
  CHECK(code(piped, 0, 0) != "ok");  // and does not wait for who would write into it

  std::filesystem::remove(shard);
  std::filesystem::create_directory(shard);
  Reader directory(index, store.directory.path, 2);
  CHECK(code(directory, 0, 0) != "ok");
}

TEST(reader, a_shard_that_shrinks_while_it_is_open) {
  const TestStore store({constant_clip(4)});
  const Index index(store.index_path());
  Reader reader(index, store.directory.path, 1);
  CHECK_EQUAL(code(reader, 0, 3), std::string("ok"));
  std::filesystem::resize_file(store.directory.file("shard.bin"), store.shard.size() - 1);
  CHECK_EQUAL(code(reader, 0, 3), std::string("truncated"));
  write_file(store.directory.file("shard.bin"), store.shard);
  CHECK_EQUAL(code(reader, 0, 3), std::string("ok"));
}

TEST(reader, a_corrupt_index_is_a_fault_of_the_sample) {
  const TestStore store({constant_clip(4), constant_clip(4)});
  std::string bytes = read_file(store.index_path());
  bytes[sizeof(Header) + 5] ^= 1;  // in the tables of clip 0
  write_file(store.index_path(), bytes);
  const Index index(store.index_path());
  Reader reader(index, store.directory.path, 1);
  CHECK_EQUAL(code(reader, 0, 0), std::string("index"));
  CHECK_EQUAL(code(reader, 1, 0), std::string("ok"));
}

TEST(reader, the_callers_mistakes_throw) {
  const TestStore store({constant_clip(4)});
  const Index index(store.index_path());
  Reader reader(index, store.directory.path, 2);
  CHECK_THROWS(code(reader, 0, 4), std::out_of_range, "frame 4");
  CHECK_THROWS(code(reader, 1, 0), std::out_of_range, "clip 1");
  CHECK_THROWS(Reader(index, store.directory.path, 0), std::invalid_argument, "threads is 0");
}

TEST(reader, codecs_without_a_name_in_matroska) {
  TestClip clip = constant_clip(4);
  clip.codec = "unheard-of";
  const TestStore store({clip});
  const Index index(store.index_path());
  Reader reader(index, store.directory.path, 2);
  CHECK_EQUAL(code(reader, 0, 0, true), std::string("unsupported"));
  CHECK_EQUAL(code(reader, 0, 0, false), std::string("ok"));
}

TEST(reader, many_threads_may_read_at_once) {
  const TestStore store(std::vector<TestClip>(20, constant_clip(30)));
  const Index index(store.index_path());
  Reader reader(index, store.directory.path, 4);
  std::vector<int> wrong(6);
  std::vector<std::thread> threads;
  for (size_t t = 0; t < wrong.size(); ++t)
    threads.emplace_back([&, t] {
      for (uint32_t round = 0; round < 50; ++round) {
        std::vector<uint64_t> clips(20);
        std::vector<uint32_t> frames(20);
        for (uint32_t i = 0; i < 20; ++i) clips[i] = (i * 7 + round) % 20, frames[i] = (i * 11 + round) % 30;
        const auto results = reader.read(clips.data(), frames.data(), 20, 1, false, true);
        for (size_t i = 0; i < 20; ++i) wrong[t] += bytes(results[i]) != payload(clips[i], frames[i]);
      }
    });
  for (std::thread& thread : threads) thread.join();
  for (const int count : wrong) CHECK_EQUAL(count, 0);
}
