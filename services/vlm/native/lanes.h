/* Vectors of sixteen float32 lanes and what is held in float32 or bfloat16; the compiler makes of them what the CPU has. */
#include <stdint.h>
#include <string.h>

enum { LANES = 16 };
typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
#define INLINE static inline __attribute__((always_inline))

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE Floats all(float x) { return x - (Floats){}; }
INLINE Floats where(Ints chosen, Floats a, Floats b) { return (Floats)(((Ints)a & chosen) | ((Ints)b & ~chosen)); }

INLINE Floats load(const void *from, int64_t at, int bfloat16) {
  if (!bfloat16) {
    Floats x;
    memcpy(&x, (const float *)from + at, sizeof x);
    return x;
  }
  Halves upper;
  memcpy(&upper, (const uint16_t *)from + at, sizeof upper);
  return (Floats)(__builtin_convertvector(upper, Bits) << 16);
}

INLINE void store(void *to, int64_t at, Floats x, int bfloat16) {
  if (!bfloat16) {
    memcpy((float *)to + at, &x, sizeof x);
    return;
  }
  Bits bits = (Bits)x;
  Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; /* to nearest, ties to even */
  Bits astray = (Bits)(x != x);
  Halves upper = __builtin_convertvector((rounded & ~astray) | (0x7fc0 & astray), Halves);
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
static const Ints EVEN[4] = {
    {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30},
    {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29},
    {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27},
    {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23},
};
static const Ints ODD[4] = {
    {1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31},
    {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31},
    {4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31},
    {8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31},
};
static const Ints LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

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
