// The k × k part of the Grassmann step, shared by its CPU and CUDA kernels: what the tall products
// of a class are multiplied with. `work` is room for kWork matrices.
#pragma once
#include "common/small_matrix.h"

namespace weft::grassmann {

// The order is that of REORTH in the public function.
enum class Reorth { none, qr_signed, polar, newton_schulz, gcr };

constexpr double kLongestStep = 1 << 20;  // radians; beyond, ‖αH‖_F is shortened to it
constexpr double kNear = 0.25;            // ‖PᵀP − I‖_F where one round of a QR or polar suffices
constexpr int kRounds = 60;               // a basis without full rank has no end
constexpr int kWork = 5;

// From M = HᵀH: cosine = cos √A, sine = α sin √A / √A and radial = α M sin √A / √A of A = α²M, with
// α shortened where ‖αH‖_F is beyond the longest step.
template <typename Team>
WEFT_HOST_DEVICE void geodesic(Team team, int k, double alpha, const double* m, double* cosine,
                               double* sine, double* radial, double* work) {
  const double length = fabs(alpha) * sqrt(small_matrix::trace(k, m));
  if (length > kLongestStep) alpha *= kLongestStep / length;
  double* a = work;
  for (int e = team.rank(); e < k * k; e += team.size()) a[e] = alpha * alpha * m[e];
  team.sync();
  small_matrix::versine_sinc(team, k, a, cosine, sine, work + k * k);
  for (int e = team.rank(); e < k * k; e += team.size()) {
    cosine[e] = (e / k == e % k ? 1.0 : 0.0) - cosine[e];
    sine[e] *= alpha;
  }
  team.sync();
  small_matrix::multiply(team, k, m, sine, radial);
}

// ‖W − I‖_F
WEFT_HOST_DEVICE inline double from_identity(int k, const double* w) {
  double sum = 0;
  for (int e = 0; e < k * k; ++e) {
    const double difference = w[e] - (e / k == e % k ? 1.0 : 0.0);
    sum += difference * difference;
  }
  return sqrt(sum);
}

// F of one round of P ← P F, from W = PᵀP (overwritten), whose distance from I is known. True if no
// other round is needed, or none can help: F is not finite.
template <typename Team>
WEFT_HOST_DEVICE bool orthonormalizer(Team team, int k, Reorth reorth, int round, double distance,
                                      double enough, double* w, double* factor, double* work) {
  if (round == kRounds) distance = 0;
  if (reorth == Reorth::newton_schulz) {
    // Converges where ‖P‖² < 3, and squares the distance once it is below 1.
    const double scale = round == 0 && distance > 1 ? small_matrix::trace(k, w) : 1.0;
    for (int e = team.rank(); e < k * k; e += team.size())
      factor[e] = ((e / k == e % k ? 3.0 : 0.0) - w[e] / scale) / (2 * sqrt(scale));
    team.sync();
    return !(distance > enough);
  }
  if (reorth == Reorth::polar) {
    small_matrix::inverse_sqrt(team, k, w, factor, work);
  } else {
    small_matrix::inverse_cholesky(team, k, w, factor);
  }
  const double size = small_matrix::trace(k, factor);
  return !(distance > kNear) || !(size - size == 0);  // not finite
}

// Householder's column signs into the last F of a QR: `top` holds the first k rows of P.
template <typename Team>
WEFT_HOST_DEVICE void flip_columns(Team team, int k, const double* top, bool square, double* factor,
                                   double* rotated, double* sign) {
  small_matrix::multiply(team, k, top, factor, rotated);
  small_matrix::householder_signs(team, k, rotated, square, sign);
  for (int e = team.rank(); e < k * k; e += team.size()) factor[e] *= sign[e % k];
  team.sync();
}

}  // namespace weft::grassmann
