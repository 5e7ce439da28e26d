// Python bindings of the C++ core. Arrays cross the border as numpy buffers whose dtype and shape are checked here; the
// GIL is released around work that does not touch Python. Every C++ exception has a Python one:
// std::invalid_argument -> ValueError, std::out_of_range -> IndexError, std::system_error -> OSError,
// std::bad_alloc -> MemoryError.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <string_view>
#include <system_error>

#include "bitstream.hpp"
#include "feistel.hpp"
#include "hash.hpp"
#include "index.hpp"
#include "index_writer.hpp"
#include "philox.hpp"
#include "planner.hpp"
#include "reader.hpp"
#include "resize.hpp"
#include "sampler.hpp"

namespace py = pybind11;
using namespace vito;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

void check_length(const py::array& array, py::ssize_t length, const char* name) {
  if (array.ndim() != 1 || array.shape(0) != length)
    throw std::invalid_argument(std::string(name) + " has shape " + py::str(array.attr("shape")).cast<std::string>() +
                                ", must be (" + std::to_string(length) + ",)");
}

const int64_t* check_numbers(const Array<int64_t>& numbers) {
  check_length(numbers, numbers.size(), "numbers");
  for (py::ssize_t i = 0; i < numbers.size(); ++i)
    if (numbers.data()[i] < 0)
      throw std::invalid_argument("sample number " + std::to_string(numbers.data()[i]) + " is negative");
  return numbers.data();
}

uint64_t checked_clip(int64_t clip, const Index& index) {
  if (clip < 0 || static_cast<uint64_t>(clip) >= index.num_clips())
    throw std::out_of_range("clip " + std::to_string(clip) + " of an index of " + std::to_string(index.num_clips()));
  return static_cast<uint64_t>(clip);
}

Index::Clip whole_clip(const Index& index, int64_t clip) {
  index.check_whole();
  return index.clip(checked_clip(clip, index));
}

// Text with a file's name in it, which need not be UTF-8, as Python writes such names.
py::object file_name(std::string_view text) {
  return py::reinterpret_steal<py::object>(
      PyUnicode_DecodeUTF8(text.data(), static_cast<py::ssize_t>(text.size()), "surrogateescape"));
}

void bind_index(py::module_& m) {
  py::class_<Index>(m, "Index")
      .def(py::init<std::string>(), py::arg("path"))
      .def_property_readonly("path", [](const Index& self) { return file_name(self.path()); })
      .def_property_readonly("format", &Index::format)
      .def_property_readonly("num_clips", &Index::num_clips)
      .def_property_readonly("num_frames", &Index::num_frames)
      .def_property_readonly("num_packets", &Index::num_packets)
      .def_property_readonly("shards",
                             [](const Index& self) {
                               py::tuple out(self.shards().size());
                               for (size_t i = 0; i < self.shards().size(); ++i)
                                 out[i] = py::make_tuple(self.shards()[i].name, self.shards()[i].size);
                               return out;
                             })
      .def("clip",
           [](const Index& self, int64_t number) {
             const Index::Clip clip = whole_clip(self, number);
             const Record& r = clip.record();
             py::dict out;
             out["video"] = r.video;
             out["source"] = file_name(clip.source());
             out["codec"] = std::string(r.codec);
             out["width"] = r.width;
             out["height"] = r.height;
             out["rotation"] = r.rotation % 360;
             out["mirror"] = r.rotation >= 360;
             out["shard"] = r.shard;
             out["time_base"] = py::make_tuple(r.tick_num, r.tick_den);
             out["start"] = seconds(r, r.start);
             out["end"] = seconds(r, r.end);
             out["num_frames"] = r.num_frames;
             out["num_packets"] = r.num_packets;
             out["extradata"] = py::bytes(clip.extradata().data(), clip.extradata().size());
             out["constant_rate"] = r.layout == kConstant;
             return out;
           })
      .def("measures",
           [](const Index& self) {
             const py::ssize_t clips = static_cast<py::ssize_t>(self.num_clips());
             Array<double> length(clips);
             Array<int32_t> side(clips);
             Array<int64_t> frames(clips);
             double* length_of = length.mutable_data();
             int32_t* side_of = side.mutable_data();
             int64_t* frames_of = frames.mutable_data();
             {
               const py::gil_scoped_release release;
               self.check_whole();
               for (py::ssize_t i = 0; i < clips; ++i) {
                 const Record r = self.record(static_cast<uint64_t>(i));
                 length_of[i] = seconds(r, r.end) - seconds(r, r.start);
                 side_of[i] = static_cast<int32_t>(std::min(r.width, r.height));
                 frames_of[i] = r.num_frames;
               }
             }
             return py::make_tuple(length, side, frames);
           })
      .def("times",
           [](const Index& self, int64_t number) {
             const Index::Clip clip = whole_clip(self, number);
             Array<double> out(clip.record().num_frames);
             for (uint32_t k = 0; k < clip.record().num_frames; ++k)
               out.mutable_at(k) = seconds(clip.record(), clip.pts(k));
             return out;
           })
      .def("packets", [](const Index& self, int64_t number) {
        const Index::Clip clip = whole_clip(self, number);
        const uint32_t n = clip.record().num_packets, frames = clip.record().num_frames;
        Array<int64_t> offsets(n), sizes(n), pts(n);
        Array<uint32_t> checksums(n);
        Array<uint8_t> flags(n);
        Array<int32_t> order(frames);
        for (uint32_t k = 0; k < n; ++k) {
          const Packet p = clip.packet(k);
          offsets.mutable_at(k) = static_cast<int64_t>(p.offset);
          sizes.mutable_at(k) = p.size;
          checksums.mutable_at(k) = p.checksum;
          pts.mutable_at(k) = p.pts;
          flags.mutable_at(k) = p.flags;
        }
        for (uint32_t k = 0; k < frames; ++k) order.mutable_at(k) = static_cast<int32_t>(clip.order(k));
        return py::make_tuple(offsets, sizes, checksums, pts, flags, order);
      });

  py::class_<IndexWriter>(m, "IndexWriter")
      .def(py::init([](std::string path, std::string format,
                       const std::vector<std::pair<std::string, uint64_t>>& shards) {
             std::vector<Shard> table;
             for (const auto& [name, size] : shards) table.push_back({name, size});
             return std::make_unique<IndexWriter>(std::move(path), std::move(format), std::move(table));
           }),
           py::arg("path"), py::arg("format"), py::arg("shards"))
      .def("add",
           [](IndexWriter& self, int64_t video, const py::bytes& source, const std::string& codec,
              const py::bytes& extradata, int64_t width, int64_t height, int64_t rotation, int64_t shard,
              std::pair<int64_t, int64_t> time_base, int64_t end, const Array<int64_t>& pts,
              const Array<int64_t>& offsets, const Array<int64_t>& sizes, const Array<uint32_t>& checksums,
              const Array<uint8_t>& flags) {
             const py::ssize_t n = pts.size();
             check_length(pts, n, "pts");
             check_length(offsets, n, "offsets");
             check_length(sizes, n, "sizes");
             check_length(checksums, n, "checksums");
             check_length(flags, n, "flags");
             self.add({video, std::string(source), codec, std::string(extradata), width, height, shard, rotation, time_base.first,
                       time_base.second, end, static_cast<size_t>(n), pts.data(), offsets.data(), sizes.data(),
                       checksums.data(), flags.data()});
           },
           py::kw_only(), py::arg("video"), py::arg("source"), py::arg("codec"), py::arg("extradata"),
           py::arg("width"), py::arg("height"), py::arg("rotation"), py::arg("shard"), py::arg("time_base"),
           py::arg("end"), py::arg("pts").noconvert(), py::arg("offsets").noconvert(), py::arg("sizes").noconvert(),
           py::arg("checksums").noconvert(), py::arg("flags").noconvert())
      .def("finish", &IndexWriter::finish);
}

SamplerConfig sampler_config(const py::dict& c) {
  const auto number = [&](const char* key) { return c[key].cast<double>(); };
  const auto range = [&](const char* key) {
    const auto pair = c[key].cast<std::pair<double, double>>();
    return Range{pair.first, pair.second};
  };
  const auto per_view = [&](const char* key) { return c[key].cast<std::array<double, kMaxViews>>(); };
  const uint32_t views = c["views"].cast<uint32_t>();
  if (views < 1 || views > kMaxViews) throw std::invalid_argument("views must be 1 to 4");
  return {views, number("frame_window"), range("crop_area"), range("log_aspect"), number("flip"), number("jitter"),
          number("brightness"), number("contrast"), number("saturation"), number("hue"), number("grayscale"),
          range("blur_sigma"), per_view("blur"), per_view("solarize"), c["crop_retry"].cast<bool>(),
          c["fixed_frames"].cast<bool>()};
}

void bind_sampler(py::module_& m) {
#define VITO_NAME(name) #name,
  m.attr("PARAMS") = py::tuple(py::cast(std::vector<std::string>{VITO_PARAMS(VITO_NAME)}));
#undef VITO_NAME
  py::class_<Sampler>(m, "Sampler")
      .def(py::init([](const Index& index, const py::dict& config, uint64_t seed, const Array<int64_t>& chosen) {
             return std::make_unique<Sampler>(index, sampler_config(config), seed,
                                              std::vector<int64_t>(chosen.data(), chosen.data() + chosen.size()));
           }),
           py::arg("index"), py::arg("config"), py::arg("seed"), py::arg("chosen").noconvert(), py::keep_alive<1, 2>())
      .def_property_readonly("num_clips", &Sampler::num_clips)
      .def("sample",
           [](const Sampler& self, const Array<int64_t>& numbers, const Array<uint32_t>& attempts) {
             const int64_t* n = check_numbers(numbers);
             const py::ssize_t batch = numbers.size(), views = self.views();
             check_length(attempts, batch, "attempt");
             Array<int64_t> clip(batch), video(batch);
             Array<int32_t> frame({batch, views}), crop({batch, views, py::ssize_t{4}});
             Array<double> time({batch, views});
             Array<uint8_t> flip({batch, views});
             Array<float> params({batch, views, py::ssize_t{param::kCount}});
             const SampleArrays out{clip.mutable_data(), video.mutable_data(), frame.mutable_data(),
                                    time.mutable_data(), crop.mutable_data(),  flip.mutable_data(),
                                    params.mutable_data()};
             {
               const py::gil_scoped_release release;
               self.sample(n, attempts.data(), static_cast<size_t>(batch), out);
             }
             return py::make_tuple(clip, video, frame, time, crop, flip, params);
           },
           py::arg("numbers").noconvert(), py::arg("attempts").noconvert())
      .def("clips",
           [](const Sampler& self, const Array<int64_t>& numbers, const Array<uint32_t>& attempts) {
             const int64_t* n = check_numbers(numbers);
             check_length(attempts, numbers.size(), "attempt");
             Array<int64_t> out(numbers.size());
             int64_t* clips = out.mutable_data();
             {
               const py::gil_scoped_release release;
               self.clips(n, attempts.data(), static_cast<size_t>(numbers.size()), clips);
             }
             return out;
           },
           py::arg("numbers").noconvert(), py::arg("attempts").noconvert());

  m.def("philox", [](uint64_t key, const Block& counter) { return philox(key, counter); }, py::arg("key"),
        py::arg("counter"), "One Philox4x32-10 block.");
  m.def(
      "shuffled",
      [](uint64_t size, uint64_t seed, uint64_t epoch, const Array<int64_t>& positions) {
        if (size < 1 || size > kMaxShuffle)
          throw std::invalid_argument("size is " + std::to_string(size) + ", must be 1 to 2^40");
        check_length(positions, positions.size(), "positions");
        const Feistel shuffle(size, seed, epoch);
        Array<int64_t> out(positions.size());
        for (py::ssize_t i = 0; i < positions.size(); ++i) {
          const int64_t position = positions.data()[i];
          if (position < 0 || static_cast<uint64_t>(position) >= size)
            throw std::out_of_range("position " + std::to_string(position) + " of a shuffle of " +
                                    std::to_string(size));
          out.mutable_at(i) = static_cast<int64_t>(shuffle(static_cast<uint64_t>(position)));
        }
        return out;
      },
      py::arg("size"), py::arg("seed"), py::arg("epoch"), py::arg("positions").noconvert(),
      "Where the epoch's shuffle of [0, size) sends each position.");
}

// Hands a vector's memory to numpy without a copy.
template <class T>
Array<T> to_array(std::vector<T>&& values) {
  auto owner = std::make_unique<std::vector<T>>(std::move(values));
  const py::ssize_t size = static_cast<py::ssize_t>(owner->size());
  T* data = owner->data();
  const py::capsule base(owner.get(), [](void* p) { delete static_cast<std::vector<T>*>(p); });
  owner.release();
  return Array<T>(size, data, base);
}

template <class To, class From>
Array<To> copied(const std::vector<From>& values) {
  Array<To> out(static_cast<py::ssize_t>(values.size()));
  std::copy(values.begin(), values.end(), out.mutable_data());
  return out;
}

py::tuple plan_arrays(const Plan& plan) {
  Array<int64_t> runs({static_cast<py::ssize_t>(plan.runs.size()), py::ssize_t{2}});
  int64_t* row = runs.mutable_data();
  for (const auto& [first, last] : plan.runs) *row++ = first, *row++ = last;
  return py::make_tuple(copied<int64_t>(plan.packets), copied<int32_t>(plan.pictures), runs);
}

std::vector<uint32_t> checked_frames(const Array<int64_t>& frames) {
  std::vector<uint32_t> out;
  for (py::ssize_t i = 0; i < frames.size(); ++i) {
    const int64_t frame = frames.data()[i];
    if (frame < 0 || frame > int64_t{UINT32_MAX})
      throw std::out_of_range("frame " + std::to_string(frame) + " does not exist");
    out.push_back(static_cast<uint32_t>(frame));
  }
  return out;
}

py::list read(Reader& reader, const Index& index, const Array<int64_t>& clips, const Array<int64_t>& frames,
              bool miniclip, bool single_stream) {
  const py::ssize_t batch = clips.size();
  check_length(clips, batch, "clips");
  if (frames.ndim() != 2 || frames.shape(0) != batch || frames.shape(1) < 1)
    throw std::invalid_argument("frames has shape " + py::str(frames.attr("shape")).cast<std::string>() +
                                ", must be (" + std::to_string(batch) + ", views)");
  std::vector<uint64_t> numbers;
  for (py::ssize_t i = 0; i < batch; ++i) numbers.push_back(checked_clip(clips.data()[i], index));
  const std::vector<uint32_t> wanted = checked_frames(frames);
  std::vector<ReadResult> results;
  {
    const py::gil_scoped_release release;
    results = reader.read(numbers.data(), wanted.data(), static_cast<size_t>(batch),
                          static_cast<size_t>(frames.shape(1)), miniclip, single_stream);
  }
  py::list out;
  for (ReadResult& result : results) {
    const py::tuple plan = plan_arrays(result.plan);
    // Messages quote file names, which need not be UTF-8.
    const py::object error = py::reinterpret_steal<py::object>(PyUnicode_DecodeUTF8(
        result.error.data(), static_cast<py::ssize_t>(result.error.size()), "replace"));
    out.append(py::make_tuple(name(result.code), error, to_array(std::move(result.data)),
                              copied<int64_t>(result.sizes), plan[0], plan[1], plan[2]));
  }
  return out;
}

Bytes contiguous_bytes(const py::buffer_info& info) {
  if (!PyBuffer_IsContiguous(info.view(), 'C')) throw std::invalid_argument("data must be contiguous");
  return {static_cast<const unsigned char*>(info.ptr), static_cast<size_t>(info.size * info.itemsize)};
}

void bind_reader(py::module_& m) {
  m.def(
      "packet_flags",
      [](const std::string& codec, const py::buffer& extradata, const py::buffer& packet) {
        const py::buffer_info head = extradata.request(), body = packet.request();
        return packet_flags(codec, contiguous_bytes(head), contiguous_bytes(body));
      },
      py::arg("codec"), py::arg("extradata"), py::arg("packet"));
  m.def(
      "plan_packets",
      [](const Index& index, int64_t clip, const Array<int64_t>& frames, bool single_stream) {
        check_length(frames, frames.size(), "frames");
        const std::vector<uint32_t> wanted = checked_frames(frames);
        return plan_arrays(
            plan_packets(whole_clip(index, clip), wanted.data(), wanted.size(), single_stream));
      },
      py::arg("index"), py::arg("clip"), py::arg("frames").noconvert(), py::arg("single_stream"));

  // Keeps the index for checks of the arguments.
  struct BoundReader {
    const Index& index;
    Reader reader;
  };
  py::class_<BoundReader>(m, "Reader")
      .def(py::init([](const Index& index, std::string directory, int threads) {
             return std::unique_ptr<BoundReader>(new BoundReader{index, {index, std::move(directory), threads}});
           }),
           py::arg("index"), py::arg("directory"), py::arg("threads"), py::keep_alive<1, 2>())
      .def(
          "read",
          [](BoundReader& self, const Array<int64_t>& clips, const Array<int64_t>& frames, bool miniclip,
             bool single_stream) { return read(self.reader, self.index, clips, frames, miniclip, single_stream); },
          py::arg("clips").noconvert(), py::arg("frames").noconvert(), py::arg("miniclip"), py::arg("single_stream"));
}

void bind_resize(py::module_& m) {
  m.def(
      "resize_cubic",
      [](const py::array_t<uint8_t>& picture, const std::array<size_t, 4>& window, bool vertically, bool horizontally,
         Array<uint8_t>& out) {
        if (picture.ndim() != 3 || picture.shape(2) != 3 || picture.strides(2) != 1 || picture.strides(1) != 3 ||
            picture.strides(0) < 3 * picture.shape(1) || picture.size() == 0)
          throw std::invalid_argument("the picture must be (height, width, 3) with whole rows of pixels");
        if (out.ndim() != 3 || out.shape(0) != out.shape(1) || out.shape(2) != 3)
          throw std::invalid_argument("out must be (size, size, 3)");
        const Picture source{picture.data(), static_cast<size_t>(picture.shape(0)),
                             static_cast<size_t>(picture.shape(1)), static_cast<size_t>(picture.strides(0))};
        uint8_t* target = out.mutable_data();
        const size_t size = static_cast<size_t>(out.shape(0));
        const py::gil_scoped_release release;
        resize_cubic(source, {window[0], window[1], window[2], window[3]}, vertically, horizontally, size, target);
      },
      py::arg("picture").noconvert(), py::arg("window"), py::arg("vertically"), py::arg("horizontally"),
      py::arg("out").noconvert());
}

}  // namespace

PYBIND11_MODULE(_sampler, m) {
  m.attr("API") = 4;  // to be raised with every change that vito_fast/native.py must not load an older build for
  m.doc() = "vito-fast's C++ core: store index, sampler, packet planner, reader and mini-clip writer.";
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const std::system_error& e) {
      // what() is "PATH: message"; OSError wants (errno, message, path) and chooses its subclass by errno.
      const std::string what = e.what(), message = e.code().message();
      const size_t path = what.size() > message.size() + 2 ? what.size() - message.size() - 2 : 0;
      const py::object args = py::make_tuple(e.code().value(), message, file_name(what.substr(0, path)));
      PyErr_SetObject(PyExc_OSError, args.ptr());
    } catch (const std::invalid_argument& e) {
      PyErr_SetObject(PyExc_ValueError, file_name(e.what()).ptr());
    }
  });
  m.def(
      "checksum",
      [](const py::buffer& data) {
        const py::buffer_info info = data.request();
        const Bytes bytes = contiguous_bytes(info);
        const py::gil_scoped_release release;
        return packet_checksum(bytes.data(), bytes.size());
      },
      py::arg("data"), "Checksum of a packet: the low 32 bits of XXH64 with seed 0.");
  bind_index(m);
  bind_sampler(m);
  bind_reader(m);
  bind_resize(m);
}
