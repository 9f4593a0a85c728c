/* Vectors of float32 lanes and what is held in float32 or bfloat16: as wide as those of the CPU that is compiled for. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

/* Numbers that are read: for fewer, to wake a thread takes longer than the work, and much longer where others want its
 * core. torch has the same bound (at::internal::GRAIN_SIZE). */
enum { WORTH_THREADS = 1 << 15 };
#define INLINE static inline __attribute__((always_inline))

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE Floats all(float x) { return x - (Floats){}; }
INLINE Floats where(Ints chosen, Floats a, Floats b) { return (Floats)(((Ints)a & chosen) | ((Ints)b & ~chosen)); }

/* Between sixteen bits and 32; of AVX2 the compiler makes each from two halves if it is not told. */
INLINE Bits widened(Halves x) {
#ifdef __AVX512F__
  return __builtin_convertvector(x, Bits);
#else
  return (Bits)_mm256_cvtepu16_epi32((__m128i)x);
#endif
}
INLINE Halves narrowed(Bits x) {
#ifdef __AVX512F__
  return __builtin_convertvector(x, Halves);
#else
  return (Halves)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
#endif
}

INLINE Floats load(const void *from, int64_t at, int bfloat16) {
  if (!bfloat16) {
    Floats x;
    memcpy(&x, (const float *)from + at, sizeof x);
    return x;
  }
  Halves upper;
  memcpy(&upper, (const uint16_t *)from + at, sizeof upper);
  return (Floats)(widened(upper) << 16);
}

INLINE void store(void *to, int64_t at, Floats x, int bfloat16) {
  if (!bfloat16) {
    memcpy((float *)to + at, &x, sizeof x);
    return;
  }
  Bits bits = (Bits)x;
  Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; /* to nearest, ties to even */
  Bits astray = (Bits)(x != x);
  Halves upper = narrowed((rounded & ~astray) | (0x7fc0 & astray));
  memcpy((uint16_t *)to + at, &upper, sizeof upper);
}

/* 2^x for x <= 0 to float32's precision, 2^-126 at least; what is not a number stays so. */
INLINE Floats power_of_two(Floats x) {
  x = where(x < -126.f, all(-126.f), x);
  Ints whole = __builtin_convertvector(x - 0.5f, Ints);
  Floats rest = x - __builtin_convertvector(whole, Floats); /* from -1/2 to 1/2: Taylor's series of e^(rest ln 2) */
  Floats y = all(1.5403530e-4f);
  y = y * rest + 1.3333558e-3f;
  y = y * rest + 9.6181291e-3f;
  y = y * rest + 5.5504109e-2f;
  y = y * rest + 2.4022651e-1f;
  y = y * rest + 6.9314718e-1f;
  y = y * rest + 1.f;
  return y * (Floats)((whole + 127) << 23);
}

#define FOLD(a, b, even, odd) (__builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd))
#ifdef __AVX512F__
static const Ints EVEN[] = {
    {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30},
    {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29},
    {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27},
    {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23},
};
static const Ints ODD[] = {
    {1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31},
    {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31},
    {4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31},
    {8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31},
};
static const Ints LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#else
static const Ints EVEN[] = {{0, 8, 2, 10, 4, 12, 6, 14}, {0, 1, 8, 9, 4, 5, 12, 13}, {0, 1, 2, 3, 8, 9, 10, 11}};
static const Ints ODD[] = {{1, 9, 3, 11, 5, 13, 7, 15}, {2, 3, 10, 11, 6, 7, 14, 15}, {4, 5, 6, 7, 12, 13, 14, 15}};
static const Ints LANE = {0, 1, 2, 3, 4, 5, 6, 7};
#endif

/* Rows become columns. */
INLINE void transpose(Ints rows[LANES]) {
  Ints turned[LANES];
#pragma GCC unroll 4
  for (int level = 0, step = 1; step < LANES; level++, step *= 2) {
#pragma GCC unroll 16
    for (int r = 0; r < LANES; r++)
      turned[r] = r & step ? __builtin_shuffle(rows[r - step], rows[r], ODD[level])
                           : __builtin_shuffle(rows[r], rows[r + step], EVEN[level]);
    memcpy(rows, turned, sizeof turned);
  }
}

/* Lane i is the sum of parts[i]. */
INLINE Floats sums(Floats parts[LANES]) {
  for (int level = 0, count = LANES / 2; count; level++, count /= 2)
    for (int i = 0; i < count; i++) parts[i] = FOLD(parts[2 * i], parts[2 * i + 1], EVEN[level], ODD[level]);
  return parts[0];
}

INLINE float total(Floats x) {
  for (int step = LANES / 2; step; step /= 2) x += __builtin_shuffle(x, LANE ^ step);
  return x[0];
}

INLINE float greatest(Floats x) {
  for (int step = LANES / 2; step; step /= 2) {
    Floats turned = __builtin_shuffle(x, LANE ^ step);
    x = where(turned > x, turned, x);
  }
  return x[0];
}
