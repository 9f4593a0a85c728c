/* Norms, gates and losses, forward and backward: one pass over memory for what torch takes four to eight for. Arithmetic is
 * float32's, rounded once. */
#include <math.h>

#include "lanes.h"

/* Rows of `width` numbers, as many as `outer` x `inner`; a tensor's strides for both, in numbers. */
typedef struct {
  int64_t outer, inner, width, outer_stride, inner_stride;
  int bfloat16;
} Rows;

INLINE int64_t row_at(const Rows *rows, int64_t row) {
  return row / rows->inner * rows->outer_stride + row % rows->inner * rows->inner_stride;
}

INLINE void norm_row(int bf, const Rows *rows, int64_t row, const void *x, const void *weight, void *y, float *scale,
                     float epsilon) {
  const int64_t at = row_at(rows, row), width = rows->width;
  Floats squares[4] = {{0}};
  for (int64_t i = 0; i < width; i += LANES) {
    Floats numbers = load(x, at + i, bf);
    squares[i / LANES % 4] += numbers * numbers;
  }
  const float mean = total(squares[0] + squares[1] + squares[2] + squares[3]) / width;
  scale[row] = 1 / sqrtf(mean + epsilon);
  for (int64_t i = 0; i < width; i += LANES)
    store(y, row * width + i, load(x, at + i, bf) * scale[row] * load(weight, i, bf), bf);
}

/* y = x / sqrt(mean(x^2) + epsilon) * weight, contiguous; `scale` is each row's divisor, inverted. */
void veneer_norm(const Rows *rows, const void *x, const void *weight, void *y, float *scale, float epsilon) {
#pragma omp parallel for if (rows->outer * rows->inner * rows->width >= WORTH_THREADS)
  for (int64_t row = 0; row < rows->outer * rows->inner; row++)
    if (rows->bfloat16)
      norm_row(1, rows, row, x, weight, y, scale, epsilon);
    else
      norm_row(0, rows, row, x, weight, y, scale, epsilon);
}

INLINE void norm_row_grad(int bf, const Rows *rows, int64_t row, const void *x, const void *weight, const void *grad,
                          void *x_grad, const float *scale) {
  const int64_t at = row_at(rows, row), width = rows->width, here = row * width;
  Floats sums_[2] = {{0}};
  for (int64_t i = 0; i < width; i += LANES)
    sums_[i / LANES % 2] += load(grad, here + i, bf) * load(weight, i, bf) * load(x, at + i, bf);
  const float shared = total(sums_[0] + sums_[1]) / width * scale[row] * scale[row];
  for (int64_t i = 0; i < width; i += LANES) {
    Floats direct = load(grad, here + i, bf) * load(weight, i, bf);
    store(x_grad, here + i, (direct - load(x, at + i, bf) * shared) * scale[row], bf);
  }
}

/* The gradient of x, contiguous as that of y. */
void veneer_norm_grad(const Rows *rows, const void *x, const void *weight, const void *grad, void *x_grad,
                      const float *scale) {
#pragma omp parallel for if (rows->outer * rows->inner * rows->width >= WORTH_THREADS)
  for (int64_t row = 0; row < rows->outer * rows->inner; row++)
    if (rows->bfloat16)
      norm_row_grad(1, rows, row, x, weight, grad, x_grad, scale);
    else
      norm_row_grad(0, rows, row, x, weight, grad, x_grad, scale);
}

INLINE Floats sigmoid(Floats x) {
  Floats e = power_of_two(where(x < 0, x, -x) * 1.44269504f);
  return where(x < 0, e, all(1)) / (1 + e);
}

INLINE void gate_part(int bf, const void *gate_up, void *y, int64_t row, int64_t width, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i += LANES) {
    Floats gate = load(gate_up, 2 * row * width + i, bf), up = load(gate_up, (2 * row + 1) * width + i, bf);
    store(y, row * width + i, gate * sigmoid(gate) * up, bf);
  }
}

INLINE void gate_part_grad(int bf, const void *gate_up, const void *grad, void *gate_up_grad, int64_t row, int64_t width,
                           int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i += LANES) {
    const int64_t of_gate = 2 * row * width + i, of_up = (2 * row + 1) * width + i;
    Floats gate = load(gate_up, of_gate, bf), up = load(gate_up, of_up, bf);
    Floats here = load(grad, row * width + i, bf), open = sigmoid(gate), passed = gate * open;
    store(gate_up_grad, of_gate, here * up * (open + passed * (1 - open)), bf);
    store(gate_up_grad, of_up, here * passed, bf);
  }
}

enum { NUMBERS_OF_TASK = 2048 };
#define PARTS ((width + NUMBERS_OF_TASK - 1) / NUMBERS_OF_TASK)
#define FIRST (part * NUMBERS_OF_TASK)
#define LAST (FIRST + NUMBERS_OF_TASK < width ? FIRST + NUMBERS_OF_TASK : width)

/* y = gate * sigmoid(gate) * up; each row of `gate_up` is its gate and then its up. */
void veneer_swiglu(const void *gate_up, void *y, int64_t rows, int64_t width, int bfloat16) {
#pragma omp parallel for collapse(2) if (2 * rows * width >= WORTH_THREADS)
  for (int64_t row = 0; row < rows; row++)
    for (int64_t part = 0; part < PARTS; part++)
      if (bfloat16)
        gate_part(1, gate_up, y, row, width, FIRST, LAST);
      else
        gate_part(0, gate_up, y, row, width, FIRST, LAST);
}

void veneer_swiglu_grad(const void *gate_up, const void *grad, void *gate_up_grad, int64_t rows, int64_t width,
                        int bfloat16) {
#pragma omp parallel for collapse(2) if (2 * rows * width >= WORTH_THREADS)
  for (int64_t row = 0; row < rows; row++)
    for (int64_t part = 0; part < PARTS; part++)
      if (bfloat16)
        gate_part_grad(1, gate_up, grad, gate_up_grad, row, width, FIRST, LAST);
      else
        gate_part_grad(0, gate_up, grad, gate_up_grad, row, width, FIRST, LAST);
}

INLINE void cross_entropy_row(int bf, void *logits, int64_t target, float *loss, int64_t at, int64_t width, int grad) {
  const float log2_e = 1.44269504f;
  Floats most = all(-INFINITY), sum[4] = {{0}};
  for (int64_t i = 0; i < width; i += LANES) {
    Floats x = load(logits, at + i, bf);
    most = where(x > most, x, most);
  }
  const float greatest_ = greatest(most);
  for (int64_t i = 0; i < width; i += LANES)
    sum[i / LANES % 4] += power_of_two((load(logits, at + i, bf) - greatest_) * log2_e);
  const float log_sum = greatest_ + logf(total(sum[0] + sum[1] + sum[2] + sum[3]));
  const int64_t first = at + target / LANES * LANES, lane = target % LANES;
  *loss = log_sum - load(logits, first, bf)[lane];
  if (!grad) return;
  Floats of_target = power_of_two((load(logits, first, bf) - log_sum) * log2_e);
  of_target[lane] -= 1;
  for (int64_t i = 0; i < width; i += LANES)
    store(logits, at + i, power_of_two((load(logits, at + i, bf) - log_sum) * log2_e), bf);
  store(logits, first, of_target, bf);
}

/* Each row's negative log-likelihood of its target; with `grad` the logits become the gradient of that. */
void veneer_cross_entropy(void *logits, const int64_t *targets, float *losses, int64_t rows, int64_t width, int bfloat16,
                          int grad) {
#pragma omp parallel for if (rows * width >= WORTH_THREADS)
  for (int64_t row = 0; row < rows; row++)
    if (bfloat16)
      cross_entropy_row(1, logits, targets[row], losses + row, row * width, width, grad);
    else
      cross_entropy_row(0, logits, targets[row], losses + row, row * width, width, grad);
}
