// Runs one part of the C++ core a given number of times, so that callgrind counts its instructions.
// Usage: count INDEX sample|plan|miniclip TIMES.
// The difference between two TIMES, divided by their difference, is the cost of one, without start-up.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "index.hpp"
#include "miniclip.hpp"
#include "planner.hpp"
#include "sampler.hpp"

namespace {

constexpr uint32_t kViews = 2;

vito::SamplerConfig default_config() {
  vito::SamplerConfig config{};
  config.views = kViews;
  config.frame_window = 2.56;
  config.crop_area = {0.4, 1.0};
  config.log_aspect = {-0.2876820724517809, 0.2876820724517809};
  config.flip = 0.5, config.jitter = 0.8, config.brightness = 0.4, config.contrast = 0.4;
  config.saturation = 0.2, config.hue = 0.1, config.grayscale = 0.2;
  config.blur_sigma = {0.1, 2.0};
  config.blur = {1.0, 0.1, 0.1, 0.1};
  config.solarize = {0.0, 0.2, 0.2, 0.2};
  return config;
}

void sample(const vito::Index& index, size_t times) {
  const vito::Sampler sampler(index, default_config(), 1);
  std::vector<int64_t> numbers(times), clip(times), video(times);
  std::vector<uint32_t> attempts(times);
  std::vector<int32_t> frame(times * kViews), crop(times * kViews * 4);
  std::vector<double> time(times * kViews);
  std::vector<uint8_t> flip(times * kViews);
  std::vector<float> params(times * kViews * vito::param::kCount);
  for (size_t i = 0; i < times; ++i) numbers[i] = static_cast<int64_t>(i);
  sampler.sample(numbers.data(), attempts.data(), times,
                 {clip.data(), video.data(), frame.data(), time.data(), crop.data(), flip.data(), params.data()});
}

size_t plan(const vito::Index& index, size_t times) {
  size_t packets = 0;
  for (size_t i = 0; i < times; ++i) {
    const vito::Index::Clip clip = index.clip(i % index.num_clips());
    const uint32_t frames[2] = {static_cast<uint32_t>(i * 37 % 180), static_cast<uint32_t>(i * 37 % 180 + i % 64)};
    packets += vito::plan_packets(clip, frames, 2, true).packets.size();
  }
  return packets;
}

size_t miniclip(size_t times) {
  const std::vector<unsigned char> payload(4096, 7);
  size_t bytes = 0;
  for (size_t i = 0; i < times; ++i) {
    vito::MiniClip clip{"vp9", {}, 456, 256, {}};
    for (uint32_t packet = 0; packet < 8; ++packet)
      clip.packets.push_back({{payload.data(), payload.size()}, packet, packet == 0, false, false});
    bytes += vito::write_miniclip(clip).size();
  }
  return bytes;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: count INDEX sample|plan|miniclip TIMES\n");
    return 2;
  }
  const vito::Index index(argv[1]);
  const size_t times = std::strtoull(argv[3], nullptr, 10);
  size_t kept = 0;
  if (!std::strcmp(argv[2], "sample")) sample(index, times);
  if (!std::strcmp(argv[2], "plan")) kept = plan(index, times);
  if (!std::strcmp(argv[2], "miniclip")) kept = miniclip(times);
  std::printf("%zu\n", kept);
}
