// pydefect._native.ScoreSet: arrays are read where they lie, without the interpreter's lock. Users' mistakes
// are answered in pydefect/metrics.py; what is checked here keeps memory safe.
#include "metrics_bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "metrics.h"

namespace py = pybind11;

namespace pydefect {
namespace {

using Scores = py::array_t<float>;

View view_of(const py::array& array) {
  if (array.ndim() != 2) throw py::value_error("an image must have two dimensions");
  return {static_cast<const std::byte*>(array.data()),
          array.shape(0),
          array.shape(1),
          array.strides(0),
          array.strides(1),
          static_cast<int>(array.itemsize())};
}

View mask_of(const py::array& mask, const View& scores) {
  if (mask.itemsize() > 2 || (mask.dtype().kind() != 'u' && mask.dtype().kind() != 'b'))
    throw py::type_error("a mask must be bool, uint8 or uint16");
  const View view = view_of(mask);
  if (view.rows != scores.rows || view.columns != scores.columns)
    throw py::value_error("a mask must have the size of its scores");
  return view;
}

// (scores, mask or None, [(mask of a region, saturation), ...])
using Image = std::tuple<Scores, std::optional<py::array>, std::vector<std::pair<py::array, int64_t>>>;

void add_images(ScoreSet& set, const std::vector<Image>& images, int threads) {
  std::vector<ScoredImage> views;
  for (const auto& [scores, mask, regions] : images) {
    ScoredImage& image = views.emplace_back();
    image.scores = view_of(scores);
    if (mask) image.mask = mask_of(*mask, image.scores);
    for (const auto& [region, saturation] : regions)
      image.regions.push_back({mask_of(region, image.scores), saturation});
  }
  const py::gil_scoped_release release;
  set.add_images(views, threads);
}

void add_labelled(ScoreSet& set, const py::array_t<float, py::array::c_style>& scores,
                  const py::array_t<bool, py::array::c_style>& labels, int threads) {
  if (scores.ndim() != 1 || labels.ndim() != 1 || scores.size() != labels.size())
    throw py::value_error("scores and labels must be one-dimensional and of one length");
  static_assert(sizeof(bool) == 1);
  const auto* values = scores.data();
  const auto* marks = reinterpret_cast<const uint8_t*>(labels.data());
  const int64_t count = scores.size();
  const py::gil_scoped_release release;
  set.add_labelled(values, marks, count, threads);
}

py::dict summary(const ScoreSet& set, const std::vector<double>& pro_limits,
                 const std::vector<double>& spro_limits, int threads) {
  if (set.normal() == 0 || set.defective() == 0) throw py::value_error("both classes are needed");
  if (!pro_limits.empty() && set.components() == 0) throw py::value_error("there are no components");
  if (!spro_limits.empty() && set.regions() == 0) throw py::value_error("there are no regions");
  MetricsSummary found;
  {
    const py::gil_scoped_release release;
    found = set.summary(pro_limits, spro_limits, threads);
  }
  py::dict result;
  result["auroc"] = found.auroc;
  result["average_precision"] = found.average_precision;
  result["f1_max"] = found.f1;
  result["f1_threshold"] = found.f1_threshold;
  result["pro"] = found.pro;
  result["spro"] = found.spro;
  return result;
}

template <class Value>
py::array_t<Value> array_of(const std::vector<Value>& values) {
  return py::array_t<Value>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::dict operating_points(const ScoreSet& set, double step, int threads) {
  if (set.normal() == 0 || set.defective() == 0) throw py::value_error("both classes are needed");
  OperatingPoints points;
  {
    const py::gil_scoped_release release;
    points = set.operating_points(step, threads);
  }
  py::dict result;
  result["thresholds"] = array_of(points.thresholds);
  result["true_positives"] = array_of(points.true_positives);
  result["false_positives"] = array_of(points.false_positives);
  result["pro"] = array_of(points.pro);
  result["spro"] = array_of(points.spro);
  return result;
}

std::pair<int64_t, int64_t> count_above(const ScoreSet& set, float threshold) {
  const py::gil_scoped_release release;
  const auto [defective, normal] = set.count_above(threshold);
  return {defective, normal};
}

}  // namespace

void bind_metrics(py::module_& module) {
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const std::domain_error& error) {
      PyErr_SetString(PyExc_FloatingPointError, error.what());
    }
  });
  py::class_<ScoreSet>(module, "ScoreSet", "Scores and what they are scores of; see pydefect.metrics.")
      .def(py::init<>())
      .def("add_labelled", &add_labelled, py::arg("scores").noconvert(), py::arg("labels").noconvert(),
           py::arg("threads"))
      .def("add_images", &add_images, py::arg("images").noconvert(), py::arg("threads"))
      .def("merge", &ScoreSet::merge, py::arg("other"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("normal", &ScoreSet::normal)
      .def_property_readonly("defective", &ScoreSet::defective)
      .def_property_readonly("components", &ScoreSet::components)
      .def_property_readonly("regions", &ScoreSet::regions)
      .def("summary", &summary, py::arg("pro_limits"), py::arg("spro_limits"), py::arg("threads"))
      .def("operating_points", &operating_points, py::arg("step"), py::arg("threads"))
      .def("count_above", &count_above, py::arg("threshold"));
}

}  // namespace pydefect
