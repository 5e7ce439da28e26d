#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>
#include <stdexcept>
#include <vector>

#include "check.hpp"
#include "sampler.hpp"
#include "store.hpp"

using namespace vito;

namespace {

const double kLogAspect = std::log(4.0 / 3.0);

SamplerConfig config(uint32_t views) {
  return {views, 0.2, {0.4, 1.0}, {-kLogAspect, kLogAspect}, 0.5, 0.8, 0.4, 0.4, 0.2, 0.1, 0.2, {0.1, 2.0},
          {1.0, 0.1, 0.1, 0.1}, {0.0, 0.2, 0.2, 0.2}, false, false};
}

struct Batch {
  explicit Batch(size_t size, uint32_t views)
      : clip(size), video(size), frame(size * views), crop(size * views * 4), time(size * views), flip(size * views),
        params(size * views * param::kCount) {}
  SampleArrays arrays() {
    return {clip.data(), video.data(), frame.data(), time.data(), crop.data(), flip.data(), params.data()};
  }
  std::vector<int64_t> clip, video;
  std::vector<int32_t> frame, crop;
  std::vector<double> time;
  std::vector<uint8_t> flip;
  std::vector<float> params;
};

Batch sample(const Sampler& sampler, const std::vector<int64_t>& numbers, uint32_t attempt = 0) {
  Batch out(numbers.size(), sampler.views());
  sampler.sample(numbers.data(), std::vector<uint32_t>(numbers.size(), attempt).data(), numbers.size(), out.arrays());
  return out;
}

std::vector<int64_t> range(int64_t count) {
  std::vector<int64_t> numbers;
  for (int64_t i = 0; i < count; ++i) numbers.push_back(i);
  return numbers;
}

}  // namespace

TEST(sampler, one_at_a_time_equals_the_batch) {
  const TestStore store({constant_clip(30), constant_clip(9), constant_clip(1)});
  const Index index(store.index_path());
  for (uint32_t views = 1; views <= kMaxViews; ++views) {
    const Sampler sampler(index, config(views), 11);
    const Batch all = sample(sampler, range(50));
    for (int64_t n = 0; n < 50; ++n) {
      const Batch one = sample(sampler, {n});
      const size_t at = static_cast<size_t>(n) * views;
      CHECK_EQUAL(one.clip[0], all.clip[static_cast<size_t>(n)]);
      CHECK(std::equal(one.frame.begin(), one.frame.end(), &all.frame[at]));
      CHECK(std::equal(one.crop.begin(), one.crop.end(), &all.crop[at * 4]));
      CHECK(std::equal(one.params.begin(), one.params.end(), &all.params[at * param::kCount]));
    }
  }
}

TEST(sampler, crops_lie_inside_whatever_the_frame) {
  for (const auto& [width, height] : {std::pair{1, 1}, {1, 500}, {500, 1}, {17, 33}, {1920, 1080}, {65535, 65535}}) {
    TestClip clip = constant_clip(3);
    clip.width = width;
    clip.height = height;
    const TestStore store({clip});
    const Index index(store.index_path());
    const Batch out = sample(Sampler(index, config(4), 1), range(500));
    for (size_t i = 0; i < out.crop.size(); i += 4) {
      const int32_t* box = &out.crop[i];
      CHECK(box[0] >= 0 && box[1] >= 0 && box[2] >= 1 && box[3] >= 1);
      CHECK(box[0] + box[2] <= height && box[1] + box[3] <= width);
    }
  }
}

TEST(sampler, attempts_visit_every_clip_once) {
  for (size_t clips = 1; clips <= 7; ++clips) {
    const TestStore store(std::vector<TestClip>(clips, constant_clip(2)));
    const Index index(store.index_path());
    const Sampler sampler(index, config(2), 4);
    for (int64_t n = 0; n < 20; ++n) {
      std::set<int64_t> seen;
      for (uint32_t attempt = 0; attempt < clips; ++attempt) seen.insert(sample(sampler, {n}, attempt).clip[0]);
      CHECK_EQUAL(seen.size(), clips);
    }
  }
}

TEST(sampler, numbers_and_attempts_at_their_limits) {
  const TestStore store({constant_clip(30), constant_clip(9)});
  const Index index(store.index_path());
  const Sampler sampler(index, config(2), ~uint64_t{0});
  const Batch out = sample(sampler, {0, INT64_MAX, INT64_MAX - 1}, UINT32_MAX);
  for (const int64_t clip : out.clip) CHECK(clip == 0 || clip == 1);
}

TEST(sampler, refuses_an_empty_index) {
  const TestStore store(std::vector<TestClip>{});
  const Index index(store.index_path());
  CHECK_THROWS(Sampler(index, config(2), 0), std::invalid_argument, "no clips");
}
