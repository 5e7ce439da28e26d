// Matroska is RFC 9559, EBML is RFC 8794, avcC and hvcC are ISO/IEC 14496-15.
#include "miniclip.hpp"

#include <array>
#include <cstring>
#include <stdexcept>
#include <string>

#include "bitstream.hpp"

namespace vito {

namespace {

using Buffer = std::vector<unsigned char>;

constexpr uint32_t kFrameMs = 40;        // time between two pictures: any will do, decoders count pictures
constexpr uint32_t kClusterFrames = 256;  // block times are 16-bit milliseconds from their cluster's

void put_big_endian(Buffer& out, uint64_t value, int bytes) {
  for (int i = bytes - 1; i >= 0; --i) out.push_back(static_cast<unsigned char>(value >> (8 * i)));
}

void put(Buffer& out, Bytes bytes) { out.insert(out.end(), bytes.begin(), bytes.end()); }

void put_id(Buffer& out, uint32_t id) { put_big_endian(out, id, id > 0xFFFFFF ? 4 : id > 0xFFFF ? 3 : id > 0xFF ? 2 : 1); }

void put_size(Buffer& out, uint64_t size) { put_big_endian(out, size | uint64_t{1} << 56, 8); }

void put_bytes(Buffer& out, uint32_t id, Bytes bytes) {
  put_id(out, id);
  put_size(out, bytes.size());
  put(out, bytes);
}

void put_number(Buffer& out, uint32_t id, uint64_t value) {
  put_id(out, id);
  put_size(out, 8);
  put_big_endian(out, value, 8);
}

const char* matroska_codec(std::string_view codec) {
  static constexpr std::array<std::array<const char*, 2>, 9> kNames{{
      {"h264", "V_MPEG4/ISO/AVC"}, {"hevc", "V_MPEGH/ISO/HEVC"}, {"av1", "V_AV1"},
      {"vp8", "V_VP8"},            {"vp9", "V_VP9"},             {"mjpeg", "V_MJPEG"},
      {"mpeg4", "V_MPEG4/ISO/ASP"}, {"mpeg2video", "V_MPEG2"},   {"mpeg1video", "V_MPEG1"},
  }};
  for (const auto& [ours, name] : kNames)
    if (codec == ours) return name;
  throw std::invalid_argument("no mini-clip can be written of codec '" + std::string(codec) + "'");
}

// Parameter sets of an Annex B stream, by NAL unit type.
std::vector<Bytes> parameter_sets(Bytes stream, bool hevc, int type) {
  std::vector<Bytes> sets;
  while (true) {
    const Bytes nal = next_nal(stream, 0);
    if (nal.empty()) return sets;
    if ((hevc ? nal[0] >> 1 & 63 : nal[0] & 31) == type) sets.push_back(nal);
  }
}

// Without the bytes that the encoder inserts so that no start code arises by chance.
Buffer without_emulation(Bytes nal) {
  Buffer out;
  for (size_t i = 0; i < nal.size(); ++i)
    if (i < 2 || nal[i] != 3 || nal[i - 1] != 0 || nal[i - 2] != 0) out.push_back(nal[i]);
  return out;
}

void put_sets(Buffer& out, const std::vector<Bytes>& sets) {
  for (const Bytes set : sets) {
    put_big_endian(out, set.size() & 0xFFFF, 2);
    put(out, set.sub(0, 0xFFFF));
  }
}

Buffer make_avcc(Bytes stream) {
  const std::vector<Bytes> sps = parameter_sets(stream, false, 7), pps = parameter_sets(stream, false, 8);
  if (sps.empty() || pps.empty() || sps[0].size() < 4 || sps.size() > 31 || pps.size() > 255) return {};
  Buffer out{1, sps[0][1], sps[0][2], sps[0][3], 0xFF, static_cast<unsigned char>(0xE0 | sps.size())};
  put_sets(out, sps);
  out.push_back(static_cast<unsigned char>(pps.size()));
  put_sets(out, pps);
  return out;
}

Buffer make_hvcc(Bytes stream) {
  const std::array<int, 3> types{32, 33, 34};  // video, sequence, picture parameter sets
  std::array<std::vector<Bytes>, 3> sets;
  for (size_t i = 0; i < 3; ++i) {
    sets[i] = parameter_sets(stream, true, types[i]);
    if (sets[i].empty() || sets[i].size() > 255) return {};
  }
  const Buffer sps = without_emulation(sets[1][0]);
  if (sps.size() < 15) return {};
  Buffer out{1};
  put(out, {sps.data() + 3, 12});  // profile, tier, level: as they stand in the sequence parameter set
  // No segmentation or parallelism is promised. 4:2:0 of 8 bits and the frame rate are hints, which decoders take from
  // the parameter sets. Lengths have four bytes.
  put(out, std::string_view("\xF0\x00\xFC\xFD\xF8\xF8\x00\x00\x0F\x03", 10));
  for (size_t i = 0; i < 3; ++i) {
    out.push_back(static_cast<unsigned char>(0x80 | types[i]));
    put_big_endian(out, sets[i].size(), 2);
    put_sets(out, sets[i]);
  }
  return out;
}

// How the track's NAL units are stored: taken as they are, or Annex B made into lengths of four bytes.
struct Track {
  Buffer private_data;
  bool hevc = false;
  bool convert = false;
  int length_size = 0;
};

Track make_track(const MiniClip& clip) {
  const bool hevc = clip.codec == "hevc";
  Track track;
  track.hevc = hevc;
  if (!hevc && clip.codec != "h264") {
    if (clip.codec != "vp8" && clip.codec != "vp9" && clip.codec != "mjpeg")
      track.private_data.assign(clip.extradata.begin(), clip.extradata.end());
    return track;
  }
  track.length_size = nal_length_size(hevc, clip.extradata);
  if (track.length_size) {
    track.private_data.assign(clip.extradata.begin(), clip.extradata.end());
    return track;
  }
  track.convert = true;
  track.length_size = 4;
  for (const Bytes stream : {clip.extradata, clip.packets.empty() ? Bytes{} : clip.packets[0].data}) {
    if (track.private_data.empty()) track.private_data = hevc ? make_hvcc(stream) : make_avcc(stream);
  }
  if (track.private_data.empty())
    throw std::invalid_argument("no mini-clip can be written: the stream's parameter sets are missing");
  return track;
}

// A key of HEVC that continues a sequence (CRA) becomes one that starts a new one (BLA without leading pictures), as the
// standard has it for spliced streams. Pictures decoded before it are still shown.
void splice(unsigned char* nal, size_t size) {
  const int type = nal[0] >> 1 & 63;
  if (type < 16 || type > 21 || size < 3) return;
  if (type == 21) nal[0] = static_cast<unsigned char>((nal[0] & 0x81) | 18 << 1);
  if (nal[2] & ~0x40) nal[2] &= 0xBF;  // no_output_of_prior_pics_flag; never leaves a zero that would need an escape
}

// The packet as the track stores it.
Buffer convert(const Track& track, const MiniPacket& packet) {
  Buffer out;
  const int stored = track.convert ? 0 : track.length_size;
  for (Bytes rest = packet.data, nal; !(nal = next_nal(rest, stored)).empty();) {
    put_big_endian(out, nal.size(), track.length_size);
    put(out, nal);
    if (packet.resets && track.hevc) splice(out.data() + out.size() - nal.size(), nal.size());
  }
  return out;
}

void put_block(Buffer& out, const Track& track, const MiniPacket& packet, uint32_t cluster_rank) {
  Buffer converted;
  Bytes data = packet.data;
  if (track.convert || (packet.resets && track.hevc)) data = converted = convert(track, packet);
  const int32_t time = (static_cast<int32_t>(packet.rank) - static_cast<int32_t>(cluster_rank)) * int32_t{kFrameMs};
  put_id(out, 0xA3);  // SimpleBlock: track number, time, flags, data
  put_size(out, 4 + data.size());
  out.push_back(0x81);
  put_big_endian(out, static_cast<uint16_t>(time), 2);
  out.push_back(static_cast<unsigned char>((packet.key ? 0x80 : 0) | (packet.invisible ? 0x08 : 0)));
  put(out, data);
}

void put_tracks(Buffer& out, const MiniClip& clip, const Track& track) {
  Buffer video, entry, tracks;
  put_number(video, 0xB0, clip.width);
  put_number(video, 0xBA, clip.height);
  put_number(entry, 0xD7, 1);      // TrackNumber
  put_number(entry, 0x73C5, 1);    // TrackUID
  put_number(entry, 0x83, 1);      // TrackType: video
  put_number(entry, 0x9C, 0);      // FlagLacing
  put_number(entry, 0x23E383, uint64_t{kFrameMs} * 1000000);  // DefaultDuration, ns
  put_bytes(entry, 0x86, std::string_view(matroska_codec(clip.codec)));
  if (!track.private_data.empty()) put_bytes(entry, 0x63A2, track.private_data);
  put_bytes(entry, 0xE0, video);
  put_bytes(tracks, 0xAE, entry);
  put_bytes(out, 0x1654AE6B, tracks);
}

void put_info(Buffer& out, uint32_t pictures) {
  Buffer info;
  const double duration = static_cast<double>(pictures) * kFrameMs;
  uint64_t bits;
  std::memcpy(&bits, &duration, sizeof bits);
  put_number(info, 0x2AD7B1, 1000000);  // TimestampScale, ns
  put_number(info, 0x4489, bits);       // Duration
  put_bytes(info, 0x4D80, std::string_view("vito-fast"));
  put_bytes(info, 0x5741, std::string_view("vito-fast"));
  put_bytes(out, 0x1549A966, info);
}

}  // namespace

std::vector<unsigned char> write_miniclip(const MiniClip& clip) {
  const Track track = make_track(clip);
  Buffer head, out, segment, cluster;
  uint32_t pictures = 0;
  for (const MiniPacket& packet : clip.packets) pictures += !packet.invisible;
  put_number(head, 0x4286, 1);  // EBMLVersion
  put_number(head, 0x42F7, 1);  // EBMLReadVersion
  put_number(head, 0x42F2, 4);  // EBMLMaxIDLength
  put_number(head, 0x42F3, 8);  // EBMLMaxSizeLength
  put_bytes(head, 0x4282, std::string_view("matroska"));
  put_number(head, 0x4287, 4);  // DocTypeVersion
  put_number(head, 0x4285, 2);  // DocTypeReadVersion
  put_bytes(out, 0x1A45DFA3, head);
  put_info(segment, pictures);
  put_tracks(segment, clip, track);
  uint32_t cluster_rank = 0;
  for (size_t i = 0; i < clip.packets.size(); ++i) {
    const MiniPacket& packet = clip.packets[i];
    const uint32_t distance = packet.rank > cluster_rank ? packet.rank - cluster_rank : cluster_rank - packet.rank;
    if (i == 0 || packet.resets || distance > kClusterFrames) {
      if (!cluster.empty()) put_bytes(segment, 0x1F43B675, cluster);
      cluster.clear();
      cluster_rank = packet.rank;
      put_number(cluster, 0xE7, uint64_t{cluster_rank} * kFrameMs);
    }
    put_block(cluster, track, packet, cluster_rank);
  }
  if (!cluster.empty()) put_bytes(segment, 0x1F43B675, cluster);
  put_bytes(out, 0x18538067, segment);
  return out;
}

}  // namespace vito
