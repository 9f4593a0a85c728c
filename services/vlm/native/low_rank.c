/* The three products of an adapter's factors with the many numbers of a linear, without a float32 copy of these.
 *
 * A matrix (N, C) of activations or of their gradients, products of low rank (N, R) and a factor (R, C):
 *   inner = matrix factor^T,    matrix += inner factor,    factor = inner^T matrix.
 * Several sets of rows may each have a factor of their own: adapters side by side. Sums are float32, and rounded once.
 */
#include "lanes.h"

/* TILE sums are held at a time, as many as a CPU's registers take. */
enum { TILE = LANES, ROWS = TILE / 4, ROWS_OF_TASK = 32, COLUMNS_OF_TASK = 1024, RANKS = TILE / 2 };

/* Rows of the matrix: `rows` names them set by set, each set from `starts[s]` to `starts[s + 1]`; NULL: all, in order.
 * `inner` has a row for each of them. Strides are in numbers. */
typedef struct {
  void *matrix;
  const int64_t *rows, *starts;
  float *inner;
  void *factor;
  int64_t sets, matrix_stride, inner_stride, factor_stride, factor_of_set, rank, columns, first_column;
  int matrix_bfloat16, factor_bfloat16;
} LowRank;

INLINE int64_t row_of(const LowRank *p, int64_t n) { return (p->rows ? p->rows[n] : n) * p->matrix_stride; }
INLINE void ask(const void *from, int64_t at, int bfloat16) {
  __builtin_prefetch((const char *)from + at * (bfloat16 ? 2 : 4), 0, 3);
}
INLINE int64_t pieces(int64_t whole, int64_t piece) { return (whole + piece - 1) / piece; }

INLINE int worth_threads(const LowRank *p) {
  return (p->starts[p->sets] - p->starts[0] + p->sets * p->rank) * p->columns >= WORTH_THREADS;
}

INLINE void add_tile(int rows, int vectors, int mb, int fb, const LowRank *p, int64_t n, int64_t c, int64_t factor) {
  Floats sum[TILE];
  int64_t at[ROWS];
  for (int i = 0; i < rows; i++) {
    at[i] = row_of(p, n + i) + c;
    for (int v = 0; v < vectors; v++) sum[i * vectors + v] = load(p->matrix, at[i] + v * LANES, mb);
  }
  for (int64_t r = 0; r < p->rank; r++)
    for (int v = 0; v < vectors; v++) {
      const int64_t here = factor + r * p->factor_stride + c + v * LANES;
      Floats numbers = load(p->factor, here, fb);
      if (rows == 1) ask(p->factor, here + vectors * LANES, fb);
      for (int i = 0; i < rows; i++) sum[i * vectors + v] += p->inner[(n + i) * p->inner_stride + r] * numbers;
    }
  for (int i = 0; i < rows; i++)
    for (int v = 0; v < vectors; v++) store(p->matrix, at[i] + v * LANES, sum[i * vectors + v], mb);
}

INLINE void add_rows(int rows, int mb, int fb, const LowRank *p, int64_t n, int64_t first, int64_t last, int64_t set) {
  const int vectors = TILE / rows; /* what a row reads of the factor lies together */
  int64_t c = first;
  for (; last - c >= vectors * LANES; c += vectors * LANES)
    add_tile(rows, vectors, mb, fb, p, n, c, set * p->factor_of_set);
  for (; c < last; c += LANES) add_tile(rows, 1, mb, fb, p, n, c, set * p->factor_of_set);
}

INLINE void add(int mb, int fb, const LowRank *p, int64_t set, int64_t from, int64_t to, int64_t first, int64_t last) {
  int64_t n = from;
  for (; to - n >= ROWS; n += ROWS) add_rows(ROWS, mb, fb, p, n, first, last, set);
  for (; n < to; n++) add_rows(1, mb, fb, p, n, first, last, set);
}

/* The products of `rows` rows with `ranks` rows of the factor. */
INLINE void inner_tile(int rows, int ranks, int mb, int fb, const LowRank *p, int64_t n, int64_t r, int64_t factor) {
  Floats part[TILE];
  for (int i = 0; i < TILE; i++) part[i] = all(0);
  int64_t at[ROWS];
  for (int i = 0; i < rows; i++) at[i] = row_of(p, n + i);
  for (int64_t c = 0; c < p->columns; c += LANES) {
    Floats of_row[ROWS];
    for (int i = 0; i < rows; i++) of_row[i] = load(p->matrix, at[i] + c, mb);
    for (int j = 0; j < ranks; j++) {
      const int64_t here = factor + (r + j) * p->factor_stride + c;
      Floats numbers = load(p->factor, here, fb);
      if (rows == 1) ask(p->factor, here + ranks * p->factor_stride, fb); /* then reading is what takes the time */
      for (int i = 0; i < rows; i++) part[i * 4 + j] += of_row[i] * numbers;
    }
  }
  Floats summed = sums(part);
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < ranks; j++) p->inner[(n + i) * p->inner_stride + r + j] = summed[i * 4 + j];
}

INLINE void inner(int mb, int fb, const LowRank *p, int64_t set, int64_t from, int64_t to) {
  const int64_t factor = set * p->factor_of_set;
  for (int64_t r = 0; r < p->rank; r += 4) {
    const int whole = p->rank - r >= 4;
    if (whole && to - from == ROWS) {
      inner_tile(ROWS, 4, mb, fb, p, from, r, factor);
      continue;
    }
    for (int64_t n = from; n < to; n++)
      if (whole)
        inner_tile(1, 4, mb, fb, p, n, r, factor);
      else
        for (int64_t s = r; s < p->rank; s++) inner_tile(1, 1, mb, fb, p, n, s, factor);
  }
}

INLINE void outer_tile(int ranks, int vectors, int mb, const LowRank *p, int64_t r, int64_t c) {
  Floats sum[RANKS][2];
  for (int j = 0; j < ranks; j++)
    for (int v = 0; v < vectors; v++) sum[j][v] = all(0);
  for (int64_t n = p->starts[0]; n < p->starts[1]; n++)
    for (int v = 0; v < vectors; v++) {
      Floats numbers = load(p->matrix, row_of(p, n) + c + v * LANES, mb);
      for (int j = 0; j < ranks; j++) sum[j][v] += p->inner[n * p->inner_stride + r + j] * numbers;
    }
  for (int j = 0; j < ranks; j++)
    for (int v = 0; v < vectors; v++) store(p->factor, (r + j) * p->factor_stride + c + v * LANES, sum[j][v], 0);
}

INLINE void outer(int mb, const LowRank *p, int64_t first, int64_t last) {
  for (int64_t c = first; c < last; c += 2 * LANES)
    for (int64_t r = 0; r < p->rank; r += RANKS) {
      const int whole = last - c >= 2 * LANES;
      if (whole && p->rank - r >= RANKS) {
        outer_tile(RANKS, 2, mb, p, r, c);
        continue;
      }
      for (int64_t s = r; s < smaller(p->rank, r + RANKS); s++)
        for (int64_t d = c; d < smaller(last, c + 2 * LANES); d += LANES) outer_tile(1, 1, mb, p, s, d);
    }
}

#define BY_DTYPE(call, ...)                                                                                           \
  do {                                                                                                                \
    if (p->matrix_bfloat16 && p->factor_bfloat16)                                                                     \
      call(1, 1, __VA_ARGS__);                                                                                        \
    else if (p->matrix_bfloat16)                                                                                      \
      call(1, 0, __VA_ARGS__);                                                                                        \
    else if (p->factor_bfloat16)                                                                                      \
      call(0, 1, __VA_ARGS__);                                                                                        \
    else                                                                                                              \
      call(0, 0, __VA_ARGS__);                                                                                        \
  } while (0)

/* inner = matrix factor^T */
void veneer_inner(const LowRank *p) {
#pragma omp parallel if (worth_threads(p))
  for (int64_t set = 0; set < p->sets; set++)
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t from = p->starts[set]; from < p->starts[set + 1]; from += ROWS)
      BY_DTYPE(inner, p, set, from, smaller(from + ROWS, p->starts[set + 1]));
}

/* matrix += inner factor */
void veneer_add(const LowRank *p) {
  const int64_t parts = pieces(p->columns, COLUMNS_OF_TASK);
#pragma omp parallel if (worth_threads(p))
  for (int64_t set = 0; set < p->sets; set++) {
    const int64_t start = p->starts[set], stop = p->starts[set + 1];
#pragma omp for collapse(2) schedule(dynamic, 1) nowait
    for (int64_t from = start; from < stop; from += ROWS_OF_TASK)
      for (int64_t part = 0; part < parts; part++)
        BY_DTYPE(add, p, set, from, smaller(from + ROWS_OF_TASK, stop), part * COLUMNS_OF_TASK,
                 smaller((part + 1) * COLUMNS_OF_TASK, p->columns));
  }
}

/* outputs += B (A inputs) for linears that read one input: `a` is of all A, one under the other, `b` of each B. All that
 * changes from pass to pass is told here. */
void veneer_update(LowRank *a, LowRank *b, int64_t linears, const int64_t *rows, const int64_t *starts, float *inner,
                   void *inputs, int64_t input_stride, void *outputs, int64_t output_stride, int bfloat16) {
  a->rows = rows, a->starts = starts, a->inner = inner, a->inner_stride = a->rank;
  a->matrix = inputs, a->matrix_stride = input_stride, a->matrix_bfloat16 = bfloat16;
  veneer_inner(a);
  for (int64_t i = 0; i < linears; i++) {
    b[i].rows = rows, b[i].starts = starts, b[i].inner = inner, b[i].inner_stride = a->rank;
    b[i].matrix = (char *)outputs + b[i].first_column * (bfloat16 ? 2 : 4);
    b[i].matrix_stride = output_stride, b[i].matrix_bfloat16 = bfloat16;
    veneer_add(b + i);
    inner += b[i].rank;
  }
}

/* factor = inner^T matrix, in float32, of one set */
void veneer_outer(const LowRank *p) {
#pragma omp parallel for schedule(dynamic, 1) if (worth_threads(p))
  for (int64_t first = 0; first < p->columns; first += 8 * LANES)
    if (p->matrix_bfloat16)
      outer(1, p, first, smaller(first + 8 * LANES, p->columns));
    else
      outer(0, p, first, smaller(first + 8 * LANES, p->columns));
}
