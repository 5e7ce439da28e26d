#include "planner.hpp"

#include <algorithm>
#include <string_view>

namespace vito {

namespace {

// A run in packet numbers, both ends included.
struct Run {
  uint32_t first, last;
};

// Whether a run that starts at `key` shows a picture of time `pts`. One shown before its key may refer to
// pictures before the key (an open group of pictures), so it needs an earlier start.
bool can_start(const Packet& key, int64_t pts, bool closed_only) {
  return (key.flags & kKey) && key.pts <= pts && !(closed_only && (key.flags & kOpen));
}

std::vector<Run> find_runs(const Index::Clip& clip, const std::vector<uint32_t>& targets, bool single_stream) {
  const std::string_view codec = clip.record().codec;
  // The mini-clip writer can turn any key of HEVC into a new start. In other codecs only closed keys are one.
  const bool any_key_resets = codec == "hevc";
  // Where a packet may hold a single field, the one after may be the rest of the picture.
  const bool fields = codec != "vp8" && codec != "vp9" && codec != "av1";
  std::vector<Run> runs;
  for (const uint32_t target : targets) {
    const bool closed_only = !runs.empty() && single_stream && !any_key_resets;
    const int64_t pts = clip.packet(target).pts;
    Run run{target, target};
    while (fields && run.last + 1 < clip.record().num_packets && (clip.packet(run.last + 1).flags & kNoPicture))
      ++run.last;
    while (run.first > 0 && !can_start(clip.packet(run.first), pts, closed_only)) --run.first;
    for (; !runs.empty() && runs.back().last >= run.first; runs.pop_back())
      run = {std::min(run.first, runs.back().first), std::max(run.last, runs.back().last)};
    runs.push_back(run);
  }
  return runs;
}

}  // namespace

Plan plan_packets(const Index::Clip& clip, const uint32_t* frames, size_t count, bool single_stream) {
  std::vector<uint32_t> targets(count);
  for (size_t i = 0; i < count; ++i) targets[i] = clip.order(frames[i]);
  std::vector<uint32_t> distinct = targets;
  std::sort(distinct.begin(), distinct.end());
  distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());

  Plan plan;
  uint32_t shown = 0;  // pictures of the runs before
  std::vector<std::pair<int64_t, uint32_t>> pictures;  // (pts, row of plan.packets) of this run
  for (const Run& run : find_runs(clip, distinct, single_stream)) {
    const uint32_t begin = static_cast<uint32_t>(plan.packets.size());
    const Packet key = clip.packet(run.first);
    pictures.clear();
    for (uint32_t number = run.first; number <= run.last; ++number) {
      const Packet packet = clip.packet(number);
      // Left out are pictures without references to them. So are those that the decoder of an open key would drop, because
      // they refer to missing pictures.
      const bool disposable = (packet.flags & (kDisposable | kNoPicture)) == kDisposable;
      const bool leading = (key.flags & kOpen) && packet.pts < key.pts;
      if ((disposable || leading) && !std::binary_search(distinct.begin(), distinct.end(), number)) continue;
      if (!(packet.flags & kNoPicture)) pictures.emplace_back(packet.pts, static_cast<uint32_t>(plan.packets.size()));
      plan.packets.push_back(number);
    }
    std::sort(pictures.begin(), pictures.end());
    plan.ranks.resize(plan.packets.size(), shown);
    for (size_t i = 0; i < pictures.size(); ++i) plan.ranks[pictures[i].second] = shown + static_cast<uint32_t>(i);
    // A packet without a picture goes with the next one that has one.
    for (size_t row = plan.packets.size() - 1; row-- > begin;)
      if (clip.packet(plan.packets[row]).flags & kNoPicture) plan.ranks[row] = plan.ranks[row + 1];
    shown += static_cast<uint32_t>(pictures.size());
    plan.runs.emplace_back(begin, static_cast<uint32_t>(plan.packets.size()));
  }
  for (const uint32_t target : targets) {
    const auto row = std::lower_bound(plan.packets.begin(), plan.packets.end(), target) - plan.packets.begin();
    plan.pictures.push_back(plan.ranks[static_cast<size_t>(row)]);
  }
  return plan;
}

}  // namespace vito
