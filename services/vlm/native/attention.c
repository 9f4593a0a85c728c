/* Attention of a few new tokens of each of several sequences over keys and values in blocks, read where they lie.
 *
 * Owns what torch has no call for: one pass over a sequence's blocks, in float32 whatever they are held in, with a
 * running softmax (https://arxiv.org/abs/1805.02867). A sequence's blocks are taken in its own order, a vector of
 * tokens at a time: what it gets depends neither on the others of a pass, nor on where its blocks lie, nor on threads.
 */
#include "lanes.h"

enum { BLOCK = 16, PAIR = 2, AT_ONCE = LANES / 2 };

/* Some key heads of a sequence's new tokens: where its blocks begin in the table, how many tokens were before and are
 * new, where they lie among the queries and among what is gathered. */
typedef struct {
  int64_t first_block, past, tokens, first_query, first_gathered, first_head, last_head;
} Task;

/* What all tasks of a call share: heads of queries (H) and of keys (G), K numbers each. */
typedef struct {
  const void *query_T_H_K, *key_B_C_G_K, *value_B_C_G_K;
  void *gathered_N_H_K;
  const int64_t *blocks;
  int64_t heads, groups, width;
  int bfloat16;
  float scale;
} Pass;

/* `rows` (1 or 2) queries that read one head's keys, over `tokens` neighbouring ones; each sees its `seen` first. */
INLINE void attend_block(int rows, int bfloat16, int64_t vectors, const Floats *query, Floats *sum, float *most,
                         float *weight, const void *key, const void *value, int64_t stride, int64_t tokens,
                         const int64_t *seen) {
  Floats parts[PAIR][LANES], share[PAIR], fade[PAIR];
  for (int64_t c = 0; c < LANES; c++) {
    Floats part[PAIR] = {{0}};
    for (int64_t v = 0; v < vectors && c < tokens; v++) {
      Floats numbers = load(key, c * stride + v * LANES, bfloat16);
      for (int r = 0; r < rows; r++) part[r] += numbers * query[r * vectors + v];
    }
    for (int r = 0; r < rows; r++) parts[r][c] = part[r];
  }
  for (int r = 0; r < rows; r++) {
    Ints visible = LANE < (int32_t)seen[r];
    Floats score = where(visible, sums(parts[r]), all(-1e30f));
    float before = most[r], here = greatest(score);
    most[r] = here > before ? here : before;
    fade[r] = power_of_two(all(before - most[r]));
    share[r] = where(visible, power_of_two(score - most[r]), all(0));
    weight[r] = weight[r] * fade[r][0] + total(share[r]);
  }
  for (int64_t first = 0; first < vectors; first += AT_ONCE) {
    int count = vectors - first < AT_ONCE ? vectors - first : AT_ONCE;
    Floats part[PAIR][AT_ONCE];
    for (int r = 0; r < rows; r++)
      for (int v = 0; v < count; v++) part[r][v] = sum[r * vectors + first + v] * fade[r];
    for (int64_t c = 0; c < tokens; c++)
      for (int v = 0; v < count; v++) {
        Floats numbers = load(value, c * stride + (first + v) * LANES, bfloat16);
        for (int r = 0; r < rows; r++) part[r][v] += share[r][c] * numbers;
      }
    for (int r = 0; r < rows; r++)
      for (int v = 0; v < count; v++) sum[r * vectors + first + v] = part[r][v];
  }
}

/* Tokens are the outer loop and heads the inner one, so that memory is read in its order; while some are computed the
 * next ones are asked for. */
INLINE void attend_task(int bfloat16, int64_t vectors, const Pass *pass, const Task *task) {
  const int64_t width = vectors * LANES, shared = pass->heads / pass->groups, rows = shared * task->tokens;
  const int64_t stride = pass->groups * width, size = bfloat16 ? 2 : 4, end = task->past + task->tokens;
  const int64_t first = task->first_head, last = task->last_head, states = (last - first) * rows;
  const int64_t *blocks = pass->blocks + task->first_block;
  Floats query[states * vectors], sum[states * vectors];
  float most[states], weight[states];
#define ROW(start, g, r) ((((start) + (r) / shared) * pass->heads + (g) * shared + (r) % shared) * width)
  for (int64_t g = first, state = 0; g < last; g++)
    for (int64_t r = 0; r < rows; r++, state++) {
      for (int64_t v = 0; v < vectors; v++) {
        Floats numbers = load(pass->query_T_H_K, ROW(task->first_query, g, r) + v * LANES, bfloat16);
        query[state * vectors + v] = numbers * pass->scale;
        sum[state * vectors + v] = all(0);
      }
      most[state] = -1e30f;
      weight[state] = 0;
    }
#define PLACE(token) ((blocks[(token) / BLOCK] * BLOCK + (token) % BLOCK) * stride)
  for (int64_t begin = 0; begin < end; begin += LANES) {
    const int64_t tokens = smaller(end - begin, LANES), here = PLACE(begin);
    const int64_t next = end - begin > LANES ? PLACE(begin + LANES) : here;
    for (int64_t g = first; g < last; g++) {
      for (int64_t c = (g - first) * LANES / (last - first); c < (g - first + 1) * LANES / (last - first); c++)
        for (int64_t at = first * width * size; at < last * width * size; at += 64) {
          __builtin_prefetch((const char *)pass->key_B_C_G_K + (next + c * stride) * size + at, 0, 2);
          __builtin_prefetch((const char *)pass->value_B_C_G_K + (next + c * stride) * size + at, 0, 2);
        }
      const char *key = (const char *)pass->key_B_C_G_K + (here + g * width) * size;
      const char *value = (const char *)pass->value_B_C_G_K + (here + g * width) * size;
      for (int64_t r = 0; r < rows; r += PAIR) {
        const int64_t state = (g - first) * rows + r, before = task->past + 1 - begin;
        const int64_t seen[PAIR] = {before + r / shared, before + (r + 1) / shared};
#define STATE query + state * vectors, sum + state * vectors, most + state, weight + state
        if (r + 1 < rows)
          attend_block(2, bfloat16, vectors, STATE, key, value, stride, tokens, seen);
        else
          attend_block(1, bfloat16, vectors, STATE, key, value, stride, tokens, seen);
      }
    }
  }
  for (int64_t g = first, state = 0; g < last; g++)
    for (int64_t r = 0; r < rows; r++, state++)
      for (int64_t v = 0; v < vectors; v++)
        store(pass->gathered_N_H_K, ROW(task->first_gathered, g, r) + v * LANES,
              sum[state * vectors + v] / weight[state], bfloat16);
}

void veneer_attend(const Pass *pass, const Task *tasks, int64_t count) {
  const int64_t vectors = pass->width / LANES;
  int64_t numbers = 0;
  for (int64_t i = 0; i < count; i++)
    numbers += 2 * (tasks[i].past + tasks[i].tokens) * (tasks[i].last_head - tasks[i].first_head) * pass->width;
#pragma omp parallel for schedule(dynamic, 1) if (numbers >= WORTH_THREADS)
  for (int64_t i = 0; i < count; i++)
    if (pass->bfloat16 && pass->width == 128) /* as all models of the class have, unrolled */
      attend_task(1, 128 / LANES, pass, tasks + i);
    else if (pass->width == 128)
      attend_task(0, 128 / LANES, pass, tasks + i);
    else
      attend_task(pass->bfloat16, vectors, pass, tasks + i);
}
