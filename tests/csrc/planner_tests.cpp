#include "planner.hpp"

#include <algorithm>
#include <set>
#include <stdexcept>

#include "check.hpp"
#include "store.hpp"

using namespace vito;

namespace {

using Numbers = std::vector<uint32_t>;

std::string text(const Numbers& numbers) {
  std::string out;
  for (const uint32_t number : numbers) out += std::to_string(number) + " ";
  return out;
}

struct Planned {
  std::string packets, pictures;
  size_t runs;
};

Planned plan(const TestClip& clip, const Numbers& frames, bool single_stream = true) {
  const TestStore store({clip});
  const Index index(store.index_path());
  const Plan plan = plan_packets(index.clip(0), frames.data(), frames.size(), single_stream);
  return {text(plan.packets), text(plan.pictures), plan.runs.size()};
}

// I P P P I P P P: no reordering.
TestClip simple() {
  TestClip clip;
  for (int64_t i = 0; i < 8; ++i) clip.packets.push_back({i, static_cast<uint8_t>(i % 4 == 0 ? kKey : 0)});
  return clip;
}

// Decoding order I0 P3 b1 b2 | I6 b4 b5 P9 b7 b8, by times; the b are not referred to. The second key is open: b4 and b5
// come after it and are shown before.
TestClip open_group(const char* codec, uint8_t b = kDisposable) {
  TestClip clip;
  clip.codec = codec;
  clip.packets = {{0, kKey}, {3, 0}, {1, b}, {2, b}, {6, kKey | kOpen}, {4, b}, {5, b}, {9, 0}, {7, b}, {8, b}};
  return clip;
}

}  // namespace

TEST(planner, one_run_from_the_key) {
  const Planned p = plan(simple(), {6});
  CHECK_EQUAL(p.packets, std::string("4 5 6 "));
  CHECK_EQUAL(p.pictures, std::string("2 "));
}

TEST(planner, runs_in_one_group_merge) {
  const Planned p = plan(simple(), {3, 1});
  CHECK_EQUAL(p.packets, std::string("0 1 2 3 "));
  CHECK_EQUAL(p.pictures, std::string("3 1 "));
  CHECK_EQUAL(p.runs, 1u);
}

TEST(planner, runs_of_two_groups_leave_out_what_lies_between) {
  const Planned p = plan(simple(), {1, 6, 1, 4});
  CHECK_EQUAL(p.packets, std::string("0 1 4 5 6 "));
  CHECK_EQUAL(p.pictures, std::string("1 4 1 2 "));
  CHECK_EQUAL(p.runs, 2u);
}

TEST(planner, constant_clips_read_the_frame_alone) {
  const Planned p = plan(constant_clip(10), {7, 2, 7});
  CHECK_EQUAL(p.packets, std::string("2 7 "));
  CHECK_EQUAL(p.pictures, std::string("1 0 1 "));
}

TEST(planner, what_nothing_refers_to_is_left_out) {
  const Planned p = plan(open_group("h264"), {3});
  CHECK_EQUAL(p.packets, std::string("0 1 "));
  const Planned q = plan(open_group("h264"), {2});
  CHECK_EQUAL(q.packets, std::string("0 1 3 "));
  CHECK_EQUAL(q.pictures, std::string("1 "));
}

TEST(planner, frames_before_an_open_key_start_earlier) {
  const Planned p = plan(open_group("h264"), {4});
  CHECK_EQUAL(p.packets, std::string("0 1 4 5 "));
  CHECK_EQUAL(p.pictures, std::string("2 "));
  const Planned q = plan(open_group("h264"), {6, 4});  // the key's own run is taken up
  CHECK_EQUAL(q.packets, std::string("0 1 4 5 "));
  CHECK_EQUAL(q.pictures, std::string("3 2 "));
  CHECK_EQUAL(q.runs, 1u);
}

TEST(planner, an_open_key_starts_a_run_without_its_leading_pictures) {
  const Planned p = plan(open_group("h264", 0), {9});
  CHECK_EQUAL(p.packets, std::string("4 7 "));
  CHECK_EQUAL(p.pictures, std::string("1 "));
}

TEST(planner, an_open_key_is_no_second_start_unless_the_decoder_is_reset) {
  CHECK_EQUAL(plan(open_group("h264"), {0, 6}).packets, std::string("0 1 4 "));
  CHECK_EQUAL(plan(open_group("h264"), {0, 6}, false).packets, std::string("0 4 "));
  CHECK_EQUAL(plan(open_group("hevc"), {0, 6}).packets, std::string("0 4 "));
}

TEST(planner, without_key_flags_everything_from_the_start_is_needed) {
  TestClip clip = simple();
  clip.packets[4].flags = 0;
  CHECK_EQUAL(plan(clip, {6}).packets, std::string("0 1 2 3 4 5 6 "));
}

TEST(planner, packets_without_a_picture_are_read_and_not_counted) {
  TestClip clip;
  clip.packets = {{0, kKey | kDiscard}, {1, kNoPicture}, {1, 0}, {2, 0}};
  const Planned p = plan(clip, {1});
  CHECK_EQUAL(p.packets, std::string("0 1 2 3 "));
  CHECK_EQUAL(p.pictures, std::string("2 "));  // the discarded one comes out of the decoder, the hidden one does not
}

TEST(planner, the_second_field_of_a_picture_belongs_to_it) {
  TestClip clip;
  clip.packets = {{0, kKey}, {0, kNoPicture}, {1, kDisposable}, {1, kDisposable | kNoPicture}, {2, 0}, {2, kNoPicture}};
  CHECK_EQUAL(plan(clip, {0}).packets, std::string("0 1 "));
  CHECK_EQUAL(plan(clip, {1}).packets, std::string("0 1 2 3 "));
  CHECK_EQUAL(plan(clip, {2, 0}).packets, std::string("0 1 3 4 5 "));
  CHECK_EQUAL(plan(clip, {2, 0}).pictures, std::string("1 0 "));
  clip.codec = "vp8";  // here a packet without a picture is a frame of its own
  CHECK_EQUAL(plan(clip, {0}).packets, std::string("0 "));
}

TEST(planner, frames_that_do_not_exist) {
  CHECK_THROWS(plan(simple(), {8}), std::out_of_range, "frame 8");
}

// Against an independent statement of what a plan must be, over all pairs of many random clips.
TEST(planner, plans_are_decodable_and_minimal) {
  uint64_t state = 1;
  const auto random = [&](uint32_t limit) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 33) % limit;
  };
  for (int round = 0; round < 60; ++round) {
    TestClip clip;
    for (int64_t i = 0, n = 4 + random(20); i < n; ++i)
      clip.packets.push_back({i, static_cast<uint8_t>(i == 0 || random(6) == 0 ? +kKey : random(3) ? 0 : kDisposable)});
    const TestStore store({clip});
    const Index index(store.index_path());
    for (uint32_t i = 0; i < clip.packets.size(); ++i) {
      for (uint32_t j = 0; j < clip.packets.size(); ++j) {
        const Numbers frames{i, j};
        const Plan plan = plan_packets(index.clip(0), frames.data(), 2, true);
        std::set<uint32_t> needed;
        for (const uint32_t frame : frames) {
          needed.insert(frame);
          for (uint32_t at = frame; !(clip.packets[at].flags & kKey);)
            if (!(clip.packets[--at].flags & kDisposable)) needed.insert(at);
        }
        CHECK(std::equal(needed.begin(), needed.end(), plan.packets.begin(), plan.packets.end()));
        for (size_t v = 0; v < 2; ++v) CHECK_EQUAL(plan.packets[plan.pictures[v]], frames[v]);
      }
    }
  }
}
