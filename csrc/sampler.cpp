#include "sampler.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>

#include "feistel.hpp"

namespace vito {

namespace {

constexpr uint32_t kCropTries = 10;
constexpr double kNoSolarize = 2;  // a threshold that no pixel reaches

// e^x by IEEE arithmetic alone, so that a crop does not depend on the C library. The Taylor series at x / 2^k is exact to
// 1e-14, and is squared k times.
double exponential(double x) {
  constexpr double kTerms[] = {1. / 3628800, 1. / 362880, 1. / 40320, 1. / 5040, 1. / 720, 1. / 120,
                               1. / 24,      1. / 6,      1. / 2,     1.,        1.};
  int halvings = 0;
  for (; std::abs(x) > 0.25; x /= 2) ++halvings;
  double sum = 0;
  for (const double term : kTerms) sum = sum * x + term;
  for (; halvings > 0; --halvings) sum *= sum;
  return sum;
}

int32_t below(int32_t limit, uint32_t bits) {  // uniform in [0, limit)
  return static_cast<int32_t>((static_cast<uint64_t>(limit) * bits) >> 32);
}

// The largest centered crop whose aspect ratio (width / height) is allowed.
void center_crop(int32_t height, int32_t width, Range aspect, int32_t* out) {
  int32_t h = height, w = width;
  if (width < aspect.low * height) h = std::clamp<int32_t>(std::lround(width / aspect.low), 1, height);
  if (width > aspect.high * height) w = std::clamp<int32_t>(std::lround(height * aspect.high), 1, width);
  out[0] = (height - h) / 2;
  out[1] = (width - w) / 2;
  out[2] = h;
  out[3] = w;
}

}  // namespace

Sampler::Sampler(const Index& index, const SamplerConfig& config, uint64_t seed, std::vector<int64_t> chosen)
    : index_(index), config_(config), seed_(seed), chosen_(std::move(chosen)) {
  if (index.num_clips() == 0) throw std::invalid_argument("index " + index.path() + " has no clips to sample");
  if (index.num_clips() > kMaxShuffle)
    throw std::invalid_argument("index " + index.path() + " has more than 2^40 clips");
  for (const int64_t clip : chosen_)
    if (clip < 0 || static_cast<uint64_t>(clip) >= index.num_clips())
      throw std::invalid_argument("index " + index.path() + " has no clip " + std::to_string(clip));
}

// Sample n is position n % N of epoch n / N, of N clips to draw. Attempt a > 0 looks at another position of the same
// epoch, such that the attempts 0 .. N - 1 of one sample visit every clip once.
void Sampler::clips(const int64_t* numbers, const uint32_t* attempts, size_t batch, int64_t* out) const {
  const uint64_t size = num_clips();
  uint64_t epoch = 0;
  Feistel shuffle(size, seed_, epoch);
  for (size_t i = 0; i < batch; ++i) {
    const uint64_t n = static_cast<uint64_t>(numbers[i]);
    if (n / size != epoch) {
      epoch = n / size;
      shuffle = Feistel(size, seed_, epoch);
    }
    uint64_t position = n % size;
    if (attempts[i] && size > 1) {
      const Block bits = draw(seed_, n, 0, Purpose::replacement, 0, 0);
      const uint64_t shift = (uint64_t{bits[0]} << 32 | bits[1]) % (size - 1);
      position = (position + 1 + (shift + attempts[i] - 1) % (size - 1)) % size;
    }
    const uint64_t place = shuffle(position);
    out[i] = chosen_.empty() ? static_cast<int64_t>(place) : chosen_[place];
  }
}

void Sampler::sample(const int64_t* numbers, const uint32_t* attempts, size_t batch, const SampleArrays& out) const {
  index_.check_whole();
  clips(numbers, attempts, batch, out.clip);
  // Records lie anywhere in memory. Asked for in groups, the waits for them overlap.
  constexpr size_t kGroup = 16;
  size_t fetched = 0;
  for (size_t i = 0; i < batch; ++i) {
    if (i == fetched)
      for (; fetched < std::min(batch, i + kGroup); ++fetched) index_.prefetch(static_cast<uint64_t>(out.clip[fetched]));
    const uint64_t n = static_cast<uint64_t>(numbers[i]), clip = static_cast<uint64_t>(out.clip[i]);
    const Record record = index_.record(clip);
    out.video[i] = record.video;
    const size_t row = i * config_.views;
    times(n, attempts[i], clip, record, out.frame + row, out.time + row);
    for (uint32_t v = 0; v < config_.views; ++v) {
      crop(n, attempts[i], v, record, out.crop + (row + v) * 4);
      photometric(n, attempts[i], v, out.flip + row + v, out.params + (row + v) * param::kCount);
    }
  }
}

// A window placed uniformly in the clip, a time for each view uniform in the window, and the frame shown at that time.
// The whole clip is the window if it is shorter; a window of zero gives all views one frame. Fixed frames depend on the
// clip alone.
void Sampler::times(uint64_t n, uint32_t attempt, uint64_t clip, const Record& record, int32_t* frame,
                    double* time) const {
  if (config_.fixed_frames) n = clip, attempt = 0;
  const Block bits = draw(seed_, n, attempt, Purpose::times, 0, 0);
  const Block more = config_.views == kMaxViews ? draw(seed_, n, attempt, Purpose::times, 0, 1) : Block{};
  const double duration = static_cast<double>(record.end - record.start);
  const double window = std::min(duration, config_.frame_window * record.tick_den / record.tick_num);
  const double begin = unit(bits[0]) * (duration - window);
  for (uint32_t v = 0; v < config_.views; ++v) {
    const double at = begin + unit(v < 3 ? bits[v + 1] : more[0]) * window;
    const uint32_t shown = frame_at(index_, clip, record, record.start + static_cast<int64_t>(at));
    frame[v] = static_cast<int32_t>(shown);
    time[v] = seconds(record, record.layout == kConstant ? record.start + static_cast<int64_t>(shown) * record.step
                                                         : index_.clip(clip, record).pts(shown));
  }
}

// Area uniform, aspect ratio log-uniform, position uniform. As in the code of BYOL and DetCon, one draw, whose sides are
// clipped to the frame. With `crop_retry`, torchvision's random-resized-crop: up to ten draws until one fits, then the
// center.
void Sampler::crop(uint64_t n, uint32_t attempt, uint32_t view, const Record& record, int32_t* out) const {
  const int32_t height = static_cast<int32_t>(record.height), width = static_cast<int32_t>(record.width);
  const uint32_t tries = config_.crop_retry ? kCropTries : 1;
  for (uint32_t i = 0; i < tries; ++i) {
    const Block bits = draw(seed_, n, attempt, Purpose::crop, view, i);
    const double side = std::sqrt(config_.crop_area.at(unit(bits[0])) * height * width);
    const double stretch = exponential(config_.log_aspect.at(unit(bits[1])) / 2);
    // Sides fit 32 bits: at most 65535 times the square root of the aspect ratio's bound.
    out[2] = static_cast<int32_t>(side / stretch + 0.5);
    out[3] = static_cast<int32_t>(side * stretch + 0.5);
    if (!config_.crop_retry) {
      out[2] = std::clamp(out[2], 1, height);
      out[3] = std::clamp(out[3], 1, width);
    }
    if (out[2] < 1 || out[3] < 1 || out[2] > height || out[3] > width) continue;
    out[0] = below(height - out[2] + 1, bits[2]);
    out[1] = below(width - out[3] + 1, bits[3]);
    return;
  }
  center_crop(height, width, {exponential(config_.log_aspect.low), exponential(config_.log_aspect.high)}, out);
}

// Every number is drawn, used or not, so that a change of one probability leaves the other draws as they are.
void Sampler::photometric(uint64_t n, uint32_t attempt, uint32_t view, uint8_t* flip, float* out) const {
  const Block color = draw(seed_, n, attempt, Purpose::photometric, view, 0);
  const Block apply = draw(seed_, n, attempt, Purpose::photometric, view, 1);
  const Block rest = draw(seed_, n, attempt, Purpose::photometric, view, 2);
  const auto around = [](double center, double spread, uint32_t bits) {
    return static_cast<float>(center + spread * (2 * unit(bits) - 1));
  };
  const bool jitter = unit(apply[0]) < config_.jitter;
  const bool blur = unit(apply[2]) < config_.blur[view];
  const bool solarize = unit(apply[3]) < config_.solarize[view];
  *flip = unit(rest[0]) < config_.flip;
  out[param::brightness] = jitter ? around(0, config_.brightness, color[0]) : 0;
  out[param::contrast] = jitter ? around(1, config_.contrast, color[1]) : 1;
  out[param::saturation] = jitter ? around(1, config_.saturation, color[2]) : 1;
  out[param::hue] = jitter ? around(0, config_.hue, color[3]) : 0;
  out[param::order] = jitter ? static_cast<float>(below(24, rest[1])) : -1;
  out[param::gray] = unit(apply[1]) < config_.grayscale;
  out[param::sigma] = blur ? static_cast<float>(config_.blur_sigma.at(unit(rest[2]))) : 0;
  out[param::solarize] = static_cast<float>(solarize ? 0.5 : kNoSolarize);
}

}  // namespace vito
