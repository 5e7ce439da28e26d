// Clip, frames, crops and colors of a sample: a pure function of (seed, sample number, attempt).
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "index.hpp"
#include "philox.hpp"

namespace vito {

constexpr uint32_t kMaxViews = 4;

// The columns of vito_kernels.photometric.PARAMS, in its order (tests/csrc/test_sampler.py compares the two).
#define VITO_PARAMS(X) X(brightness) X(contrast) X(saturation) X(hue) X(order) X(gray) X(sigma) X(solarize)
namespace param {
#define VITO_NAME(name) name,
enum Column : uint32_t { VITO_PARAMS(VITO_NAME) kCount };
#undef VITO_NAME
}  // namespace param

struct Range {
  double low, high;
  double at(double u) const { return low + u * (high - low); }
};

// Fields of SamplerConfig in vito_fast/config.py, which checks them and documents units and provenance.
struct SamplerConfig {
  uint32_t views;
  double frame_window;  // seconds
  Range crop_area, log_aspect;
  double flip, jitter, brightness, contrast, saturation, hue, grayscale;
  Range blur_sigma;
  std::array<double, kMaxViews> blur, solarize;  // probability in each view
  bool crop_retry;    // draw a crop that does not fit again, instead of clipping it
  bool fixed_frames;  // a clip's frames are the same in every sample
};

// Output arrays of batch size B, in C order.
struct SampleArrays {
  int64_t* clip;   // (B,)
  int64_t* video;  // (B,)
  int32_t* frame;  // (B, V)
  double* time;    // (B, V) seconds
  int32_t* crop;   // (B, V, 4) y, x, height, width
  uint8_t* flip;   // (B, V)
  float* params;   // (B, V, param::kCount)
};

class Sampler {
 public:
  // The index must outlive the sampler. Of a nonempty `chosen`, only these clips are drawn. Throws std::invalid_argument
  // for an empty index and for a clip that it does not have.
  Sampler(const Index& index, const SamplerConfig& config, uint64_t seed, std::vector<int64_t> chosen = {});

  // Samples `numbers` (each >= 0), with one attempt each. Throws std::invalid_argument for a corrupt index.
  void sample(const int64_t* numbers, const uint32_t* attempts, size_t batch, const SampleArrays& out) const;
  void clips(const int64_t* numbers, const uint32_t* attempts, size_t batch, int64_t* out) const;

  uint32_t views() const { return config_.views; }
  uint64_t num_clips() const { return chosen_.empty() ? index_.num_clips() : chosen_.size(); }

 private:
  void times(uint64_t n, uint32_t attempt, uint64_t clip, const Record& record, int32_t* frame, double* time) const;
  void crop(uint64_t n, uint32_t attempt, uint32_t view, const Record& record, int32_t* out) const;
  void photometric(uint64_t n, uint32_t attempt, uint32_t view, uint8_t* flip, float* out) const;

  const Index& index_;
  SamplerConfig config_;
  uint64_t seed_;
  std::vector<int64_t> chosen_;
};

}  // namespace vito
