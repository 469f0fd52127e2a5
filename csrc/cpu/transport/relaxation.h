// When a problem stops, and by how much its updates are over-relaxed: the rule of
// reference/transport/sinkhorn.py.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

namespace weft {

class Relaxation {
 public:
  Relaxation(double tolerance, bool relax) : tolerance_(tolerance), relax_(relax) {}

  double factor() const { return omega_; }
  // After which iterations it reads the `floor`, the error that rounding leaves.
  static bool decides(int64_t count) { return count % kCheck == 0; }

  // After an iteration; false if it was the last.
  bool goes_on(int64_t count, double error, double floor) {
    if (tolerance_ < 0) return true;
    const bool met = error <= tolerance_;
    if (met && omega_ == 1) return false;
    if (met) omega_ = 1;
    if (count % kCheck == kCheck / 2) halfway_ = error;
    if (!decides(count)) return true;
    if (error > kStalled * checked_ && error <= floor) return false;
    checked_ = error;
    if (!relax_) return true;
    const double rate = met ? 1 : std::pow(error / halfway_, 2.0 / kCheck);
    if (rate >= 1) {
      if (omega_ > 1) cap_ = 1 + kCaution * (cap_ - 1);
      omega_ = 1;
    } else if (rate > omega_ - 1) {
      // The squared rate of the plain iteration, if its errors fall at `rate` with this factor.
      const double squared = (rate + omega_ - 1) * (rate + omega_ - 1) / (rate * omega_ * omega_);
      const double best = 2 / (1 + std::sqrt(1 - std::clamp(squared, 0.0, 1.0)));
      omega_ = std::max(omega_, std::min(best, cap_));
    }
    return true;
  }

 private:
  static constexpr int64_t kCheck = 20;
  static constexpr double kStalled = 0.95, kCaution = 0.9;

  double tolerance_;
  bool relax_;
  double omega_ = 1, cap_ = 1.97;
  double halfway_ = std::numeric_limits<double>::infinity(), checked_ = halfway_;
};

}  // namespace weft
