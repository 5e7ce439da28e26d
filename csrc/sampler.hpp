// Which clip, which frames, which crops, which colours: a pure function of (seed, sample number, attempt).
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "index.hpp"
#include "philox.hpp"

namespace vito {

constexpr uint32_t kMaxViews = 4;
constexpr uint32_t kParams = 8;  // brightness, contrast, saturation, hue, order, grey, blur sigma, solarise threshold

struct Range {
  double low, high;
  double at(double u) const { return low + u * (high - low); }
};

// Checked by the Python side, which names the field; see vito_fast/data/sampler.py for units and provenance.
struct SamplerConfig {
  uint32_t views;
  double window;  // seconds
  Range area, log_aspect;
  double flip, jitter, brightness, contrast, saturation, hue, grey;
  Range sigma;
  std::array<double, kMaxViews> blur, solarise;  // probability in each view
};

// Where the sampler writes: arrays of batch size B in C order.
struct SampleArrays {
  int64_t* clip;   // (B,)
  int64_t* video;  // (B,)
  int32_t* frame;  // (B, V)
  double* time;    // (B, V) seconds
  int32_t* crop;   // (B, V, 4) y, x, height, width
  uint8_t* flip;   // (B, V)
  float* params;   // (B, V, kParams)
};

class Sampler {
 public:
  // The index must outlive the sampler. Throws std::invalid_argument for an empty index.
  Sampler(const Index& index, const SamplerConfig& config, uint64_t seed);

  // Samples `numbers` (each >= 0), with one attempt each. Throws std::invalid_argument for a corrupt index.
  void sample(const int64_t* numbers, const uint32_t* attempts, size_t batch, const SampleArrays& out) const;
  void clips(const int64_t* numbers, const uint32_t* attempts, size_t batch, int64_t* out) const;

  uint32_t views() const { return config_.views; }

 private:
  void times(uint64_t n, uint32_t attempt, uint64_t clip, const Record& record, int32_t* frame, double* time) const;
  void crop(uint64_t n, uint32_t attempt, uint32_t view, const Record& record, int32_t* out) const;
  void photometric(uint64_t n, uint32_t attempt, uint32_t view, uint8_t* flip, float* out) const;

  const Index& index_;
  SamplerConfig config_;
  uint64_t seed_;
};

}  // namespace vito
