/* Products in float32 with a base's weights as they are stored, in bfloat16: of a few hundred rows at a CPU's pace of
 * arithmetic, and nothing is kept of a shape or of a weight.
 *
 * A core takes some outputs, widens what some inputs are multiplied with into a panel that stays in its cache, and goes
 * through all rows, six at a time, whose sums stand in registers. A sum is added up in the inputs' order however many
 * rows there are: what a row gives does not depend on the others.
 */
#include "product.h"

enum { ROWS = 6, VECTORS = 2, PANEL = VECTORS * LANES, PANELS = 2 };
enum { INPUTS_AT_ONCE = 512, ROWS_AT_ONCE = 512, AHEAD = 16 };

/* Adds to sums (rows, PANEL) what so many inputs give. All loops of few turns are unrolled, so that sums stay in
 * registers. */
INLINE void multiply(int rows, float *sums_, const float *panel, const float *input, int64_t stride, int64_t count) {
  Floats sum[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) sum[r][v] = load(sums_, r * PANEL + v * LANES, 0);
  for (int64_t i = 0; i < count; i++, panel += PANEL) {
    Floats weights[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) weights[v] = load(panel, v * LANES, 0);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      const Floats number = all(input[r * stride + i]);
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; v++) sum[r][v] += number * weights[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) store(sums_, r * PANEL + v * LANES, sum[r][v], 0);
}

/* A function for each number of rows: only then does the compiler keep all sums in registers. */
#define SIZED(rows)                                                                                                    \
  static __attribute__((noinline)) void multiply_##rows(float *sums_, const float *panel, const float *input,         \
                                                        int64_t stride, int64_t count) {                               \
    multiply(rows, sums_, panel, input, stride, count);                                                                \
  }
SIZED(1) SIZED(2) SIZED(3) SIZED(4) SIZED(5) SIZED(6)
static void (*const MULTIPLY[ROWS])(float *, const float *, const float *, int64_t, int64_t) = {
    multiply_1, multiply_2, multiply_3, multiply_4, multiply_5, multiply_6,
};

/* The weights of a vector of outputs, `column` the first, with some inputs: a row of the panel for each input. */
static void widen(int turned, const Product *p, int64_t column, int64_t first, int64_t count, float *panel) {
  const uint16_t *weight = (const uint16_t *)p->packed;
  if (turned) {
    for (int64_t i = 0; i < count; i++) {
      const int64_t at = (first + i) * p->outputs + column;
      store(panel, i * PANEL, load(weight, at, 1), 0);
      /* rows lie too far apart for the CPU to see them coming */
      __builtin_prefetch(weight + at + AHEAD * p->outputs, 0, 3);
    }
    return;
  }
  for (int64_t i = 0; i < count; i += LANES) {
    Ints rows[LANES];
    for (int o = 0; o < LANES; o++) rows[o] = (Ints)load(weight, (column + o) * p->inputs + first + i, 1);
    transpose(rows);
    for (int r = 0; r < LANES; r++) memcpy(panel + (i + r) * PANEL, rows + r, sizeof *rows);
  }
}

/* The outputs of some panels, `column` the first of them, for some rows. */
static void product_of_panels(int turned, const Product *p, int64_t column, int64_t first_row, int64_t rows) {
  static _Thread_local float panel[PANELS][INPUTS_AT_ONCE * PANEL] __attribute__((aligned(64)));
  static _Thread_local float sum[PANELS][ROWS_AT_ONCE * PANEL] __attribute__((aligned(64)));
  const int panels = smaller(PANELS, (p->outputs - column) / PANEL);
  const float *input = (const float *)p->input + first_row * p->input_stride;
  for (int n = 0; n < panels; n++) memset(sum[n], 0, rows * PANEL * sizeof(float));
  for (int64_t first = 0; first < p->inputs; first += INPUTS_AT_ONCE) {
    const int64_t count = smaller(INPUTS_AT_ONCE, p->inputs - first);
    for (int n = 0; n < panels; n++)
      for (int v = 0; v < VECTORS; v++)
        widen(turned, p, column + n * PANEL + v * LANES, first, count, panel[n] + v * LANES);
    for (int64_t row = 0; row < rows; row += ROWS)
      for (int n = 0; n < panels; n++)
        MULTIPLY[smaller(ROWS, rows - row) - 1](sum[n] + row * PANEL, panel[n], input + row * p->input_stride + first,
                                                p->input_stride, count);
  }
  for (int64_t row = 0; row < rows; row++)
    for (int n = 0; n < panels; n++)
      for (int v = 0; v < VECTORS; v++) {
        const int64_t o = column + n * PANEL + v * LANES;
        Floats y = load(sum[n], row * PANEL + v * LANES, 0);
        if (p->bias) y += load(p->bias, o, p->bias_bfloat16);
        store(p->output, (first_row + row) * p->output_stride + o, y, 0);
      }
}

/* Of inputs in float32 with a weight as it is stored, in bfloat16 (in `packed`): outputs = inputs weight^T + bias, or with
 * `turned` outputs = inputs weight, what a gradient is multiplied with. */
void veneer_product_stored(const Product *p, int turned) {
#pragma omp parallel for schedule(dynamic, 1) collapse(2)
  for (int64_t row = 0; row < p->rows; row += ROWS_AT_ONCE)
    for (int64_t column = 0; column < p->outputs; column += PANELS * PANEL)
      product_of_panels(turned, p, column, row, smaller(ROWS_AT_ONCE, p->rows - row));
}
