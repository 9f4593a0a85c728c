/* Products with a base's weights: a few rows' at memory's pace, many rows' at that of arithmetic, from one layout.
 *
 * A weight (O, I) lies in blocks of 48 outputs, the last one of what is left: in each, group after group of neighbouring
 * inputs, 32 bits of each output. A block stays in a core's cache while all rows are multiplied with it, eight at a time,
 * whose sums stand in registers. A sum is added up in one order however many rows there are: what a row gives does not
 * depend on the others.
 */
#pragma GCC target("avx512bf16,avx512vnni")
#include "product.h"

enum { ROWS = 8, VECTORS = 3, BLOCK = VECTORS * LANES, AHEAD = 2048 };
enum { GROUPS_AT_ONCE = 2048, ROWS_AT_ONCE = 512, PAIRS_AHEAD = 48 }; /* of a weight as it is stored */

void veneer_pack(const Group *weight, Group *packed, int64_t outputs, int64_t inputs) {
  for (int64_t first = 0; first < outputs; first += BLOCK)
    for (int64_t i = 0, last = smaller(first + BLOCK, outputs); i < inputs; i++)
      for (int64_t o = first; o < last; o++) *packed++ = weight[o * inputs + i];
}

INLINE Ints shift_of(const Product *p, int64_t column) {
  Ints shift;
  memcpy(&shift, p->shift + column, sizeof shift);
  return shift;
}

/* Adds to sums (rows, vectors), of float32 or integers, what so many groups of inputs give. All loops of few turns are
 * unrolled, else the compiler stores the sums in every turn, and takes twice as long. */
INLINE void multiply(int integers, int rows, int vectors, __m512i *sums, const Group *block, const Group *input,
                     int64_t stride, int64_t groups) {
  __m512i sum[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) sum[r][v] = _mm512_loadu_si512(sums + r * vectors + v);
  for (int64_t i = 0; i < groups; i++, block += vectors * LANES) {
    __m512i weights[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) {
      weights[v] = _mm512_loadu_si512(block + v * LANES);
      __builtin_prefetch(block + v * LANES + AHEAD, 0, 2); /* the CPU itself stops asking where a page ends */
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      const __m512i numbers = _mm512_set1_epi32((int)input[r * stride + i]);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; v++) {
        if (integers)
          sum[r][v] = _mm512_dpbusd_epi32(sum[r][v], numbers, weights[v]);
        else
          sum[r][v] = (__m512i)_mm512_dpbf16_ps((__m512)sum[r][v], (__m512bh)weights[v], (__m512bh)numbers);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) _mm512_storeu_si512(sums + r * vectors + v, sum[r][v]);
}

/* A function for each size: only then does the compiler keep all sums in registers. */
#define SIZED(integers, rows, vectors)                                                                                 \
  static __attribute__((noinline)) void multiply_##integers##_##rows##_##vectors(                                      \
      __m512i *sums, const Group *block, const Group *input, int64_t stride, int64_t groups) {                         \
    multiply(integers, rows, vectors, sums, block, input, stride, groups);                                             \
  }
#define ALL(of, integers, vectors)                                                                                     \
  of(integers, 1, vectors) of(integers, 2, vectors) of(integers, 3, vectors) of(integers, 4, vectors)                  \
  of(integers, 5, vectors) of(integers, 6, vectors) of(integers, 7, vectors) of(integers, 8, vectors)
ALL(SIZED, 0, 1) ALL(SIZED, 0, 2) ALL(SIZED, 0, 3) ALL(SIZED, 1, 1) ALL(SIZED, 1, 2) ALL(SIZED, 1, 3)
#define NAMED(integers, rows, vectors) multiply_##integers##_##rows##_##vectors,
static void (*const MULTIPLY[2][VECTORS][ROWS])(__m512i *, const Group *, const Group *, int64_t, int64_t) = {
    {{ALL(NAMED, 0, 1)}, {ALL(NAMED, 0, 2)}, {ALL(NAMED, 0, 3)}},
    {{ALL(NAMED, 1, 1)}, {ALL(NAMED, 1, 2)}, {ALL(NAMED, 1, 3)}},
};

/* Stores what a sum makes of sixteen outputs, `o` the first of them. */
INLINE void finish(int integers, const Product *p, __m512i sum, int64_t row, int64_t o) {
  Floats y = (Floats)sum;
  if (integers)
    y = __builtin_convertvector((Ints)sum, Floats) * load(p->output_scale, o, 0) * p->row_scale[row] +
        p->row_middle[row] * load(p->output_sum, o, 0);
  if (p->bias) y += load(p->bias, o, p->bias_bfloat16);
  store(p->output, row * p->output_stride + o, y, p->output_bfloat16);
}

/* The outputs of a block, `column` the first of them. */
INLINE void product_of_block(int integers, const Product *p, int64_t column) {
  const int vectors = smaller(BLOCK, p->outputs - column) / LANES;
  const Group *block = p->packed + column * p->inputs;
  for (int64_t row = 0; row < p->rows; row += ROWS) {
    const int rows = smaller(ROWS, p->rows - row);
    __m512i sum[ROWS * VECTORS];
    for (int i = 0; i < rows * vectors; i++)
      sum[i] = integers ? (__m512i)-shift_of(p, column + i % vectors * LANES) : _mm512_setzero_si512();
    MULTIPLY[integers][vectors - 1][rows - 1](sum, block, p->input + row * p->input_stride, p->input_stride, p->inputs);
    for (int i = 0; i < rows * vectors; i++)
      finish(integers, p, sum[i], row + i / vectors, column + i % vectors * LANES);
  }
}

/* outputs = inputs weight^T + bias, inputs and weight in bfloat16, summed in float32 */
void veneer_product(const Product *p) {
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t column = 0; column < p->outputs; column += BLOCK) product_of_block(0, p, column);
}

/* The same of eight bits, whose sums are exact. */
void veneer_product_int8(const Product *p) {
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t column = 0; column < p->outputs; column += BLOCK) product_of_block(1, p, column);
}

/* A stored weight's groups of 16 outputs, turned: `block` has a row for each group. */
INLINE void turn(const Group *weight, int64_t stride, int64_t groups, Group *block, int64_t block_stride) {
  int64_t i = 0;
  for (; i + LANES <= groups; i += LANES) {
    Ints rows[LANES];
    for (int r = 0; r < LANES; r++) memcpy(rows + r, weight + r * stride + i, sizeof *rows);
    transpose(rows);
    for (int r = 0; r < LANES; r++) memcpy(block + (i + r) * block_stride, rows + r, sizeof *rows);
  }
  for (; i < groups; i++)
    for (int r = 0; r < LANES; r++) block[i * block_stride + r] = weight[r * stride + i];
}

/* The same where outputs lie side by side, each group in two rows. */
INLINE void pair(const uint16_t *weight, int64_t stride, int64_t groups, int vectors, Group *block) {
  for (int64_t i = 0; i < groups; i++, weight += 2 * stride)
    for (int v = 0; v < vectors; v++, block += LANES) {
      const uint16_t *here = weight + v * LANES;
      Halves even, odd;
      memcpy(&even, here, sizeof even);
      memcpy(&odd, here + stride, sizeof odd);
      Bits both = widened(even) | widened(odd) << 16;
      memcpy(block, &both, sizeof both);
      __builtin_prefetch(here + PAIRS_AHEAD * stride, 0, 3); /* rows lie too far apart for the CPU to see them coming */
      __builtin_prefetch(here + (PAIRS_AHEAD + 1) * stride, 0, 3);
    }
}

/* Some outputs of some rows: the weight is packed here, some groups at a time, and stays in a core's cache. */
static void stored_block(int turned, const Product *p, int64_t column, int64_t first_row, int64_t rows) {
  static _Thread_local Group block[BLOCK * GROUPS_AT_ONCE] __attribute__((aligned(64)));
  static _Thread_local __m512i sums[ROWS_AT_ONCE * VECTORS];
  const int vectors = smaller(BLOCK, p->outputs - column) / LANES;
  const Group *input = p->input + first_row * p->input_stride;
  memset(sums, 0, sizeof *sums * vectors * rows);
  for (int64_t first = 0; first < p->inputs; first += GROUPS_AT_ONCE) {
    const int64_t groups = smaller(GROUPS_AT_ONCE, p->inputs - first);
    if (turned)
      pair((const uint16_t *)p->packed + 2 * first * p->outputs + column, p->outputs, groups, vectors, block);
    else
      for (int v = 0; v < vectors; v++)
        turn(p->packed + (column + v * LANES) * p->inputs + first, p->inputs, groups, block + v * LANES, vectors * LANES);
    for (int64_t row = 0; row < rows; row += ROWS)
      MULTIPLY[0][vectors - 1][smaller(ROWS, rows - row) - 1](
          sums + row * vectors, block, input + row * p->input_stride + first, p->input_stride, groups);
  }
  for (int64_t i = 0; i < rows * vectors; i++)
    finish(0, p, sums[i], first_row + i / vectors, column + i % vectors * LANES);
}

/* As `veneer_product`, of a weight as it is stored (in `packed`): outputs = inputs weight^T + bias, or with `turned`
 * outputs = inputs weight, what a gradient is multiplied with. */
void veneer_product_stored(const Product *p, int turned) {
#pragma omp parallel for schedule(dynamic, 1) collapse(2)
  for (int64_t row = 0; row < p->rows; row += ROWS_AT_ONCE)
    for (int64_t column = 0; column < p->outputs; column += BLOCK)
      stored_block(turned, p, column, row, smaller(ROWS_AT_ONCE, p->rows - row));
}

/* Rows in eight bits without a sign, `zero` the middle of each row's range; see `quantised` in int8.py. */
void veneer_quantise(const void *from, int64_t stride, int bfloat16, uint8_t *to, float *scale, float *middle,
                     int64_t rows, int64_t width, float zero, float least_scale) {
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    Floats least = load(from, r * stride, bfloat16), most = least;
    Ints astray = {};
    for (int64_t i = 0; i < width; i += LANES) {
      Floats x = load(from, r * stride + i, bfloat16);
      least = where(x < least, x, least), most = where(x > most, x, most), astray |= x - x != 0;
    }
    const float low = -greatest(-least), high = greatest(most), half = (low + high) / 2;
    const float above = high - half > half - low ? high - half : half - low;
    scale[r] = (above > least_scale ? above : least_scale) / zero, middle[r] = half;
    if (_mm512_test_epi32_mask((__m512i)astray, (__m512i)astray)) scale[r] = middle[r] = __builtin_nanf("");
    for (int64_t i = 0; i < width; i += LANES) {
      Floats x = (load(from, r * stride + i, bfloat16) - half) / scale[r];
      __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32((__m512)x), _mm512_set1_epi32((int)zero));
      _mm_storeu_si128((__m128i *)(to + r * width + i), _mm512_cvtepi32_epi8(whole));
    }
  }
}
