/* Products with a base's weights: a few rows' at memory's pace, many rows' at that of arithmetic, from one layout.
 *
 * A weight (O, I) lies in blocks of 48 outputs, the last one of what is left: in each, group after group of neighbouring
 * inputs, 32 bits of each output. A block stays in a core's cache while all rows are multiplied with it, eight at a time,
 * whose sums stand in registers. A sum is added up in one order however many rows there are: what a row gives does not
 * depend on the others.
 */
#pragma GCC target("avx512bf16,avx512vnni")
#include "lanes.h"

#include <immintrin.h>

enum { ROWS = 8, VECTORS = 3, BLOCK = VECTORS * LANES, AHEAD = 2048 };
typedef uint32_t Group; /* two neighbouring inputs in bfloat16, or four in eight bits */

/* `inputs` and `input_stride` count groups. Of eight bits: inputs without a sign, `shift` is what that adds to each
 * output; each row has a scale and the number that all of its own were lessened by, each output a scale and what the
 * sum of its weights is. */
typedef struct {
  const Group *packed, *input;
  const void *bias;
  void *output;
  const float *row_scale, *row_middle, *output_scale, *output_sum;
  const int32_t *shift;
  int64_t rows, outputs, inputs, input_stride, output_stride;
  int bias_bfloat16, output_bfloat16;
} Product;

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

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

INLINE void tile(int integers, int rows, int vectors, const Product *p, const Group *block, int64_t row, int64_t column) {
  __m512i sum[ROWS][VECTORS]; /* float32, or integers */
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < vectors; v++) sum[r][v] = integers ? (__m512i)-shift_of(p, column + v * LANES) : (__m512i)all(0);
  for (int64_t i = 0; i < p->inputs; i++, block += vectors * LANES) {
    __m512i weights[VECTORS];
    for (int v = 0; v < vectors; v++) {
      weights[v] = _mm512_loadu_si512(block + v * LANES);
      __builtin_prefetch(block + v * LANES + AHEAD, 0, 2); /* the CPU itself stops asking where a page ends */
    }
    for (int r = 0; r < rows; r++) {
      const __m512i numbers = _mm512_set1_epi32((int)p->input[(row + r) * p->input_stride + i]);
      for (int v = 0; v < vectors; v++)
        sum[r][v] = integers ? _mm512_dpbusd_epi32(sum[r][v], numbers, weights[v])
                             : (__m512i)_mm512_dpbf16_ps((__m512)sum[r][v], (__m512bh)weights[v], (__m512bh)numbers);
    }
  }
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < vectors; v++) {
      const int64_t o = column + v * LANES;
      Floats y = (Floats)sum[r][v];
      if (integers)
        y = __builtin_convertvector((Ints)sum[r][v], Floats) * load(p->output_scale, o, 0) * p->row_scale[row + r] +
            p->row_middle[row + r] * load(p->output_sum, o, 0);
      if (p->bias) y += load(p->bias, o, p->bias_bfloat16);
      store(p->output, (row + r) * p->output_stride + o, y, p->output_bfloat16);
    }
}

INLINE void block_of(int integers, int vectors, const Product *p, int64_t column) {
  const Group *block = p->packed + column * p->inputs;
  int64_t row = 0;
  for (; row + ROWS <= p->rows; row += ROWS) tile(integers, ROWS, vectors, p, block, row, column);
  switch (p->rows - row) { /* the compiler must know how many, for sums to stand in registers */
#define CASE(n)                                                                                                        \
  case n:                                                                                                              \
    tile(integers, n, vectors, p, block, row, column);                                                                 \
    break;
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
  }
}

INLINE void product(int integers, const Product *p) {
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t column = 0; column < p->outputs; column += BLOCK) switch (smaller(BLOCK, p->outputs - column) / LANES) {
    case 1:
      block_of(integers, 1, p, column);
      break;
    case 2:
      block_of(integers, 2, p, column);
      break;
    default:
      block_of(integers, VECTORS, p, column);
    }
}

/* outputs = inputs weight^T + bias, inputs and weight in bfloat16, summed in float32 */
void veneer_product(const Product *p) { product(0, p); }

/* The same of eight bits, whose sums are exact. */
void veneer_product_int8(const Product *p) { product(1, p); }

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
